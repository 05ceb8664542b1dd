"""The only door for everybody without a lease: OpenAI-compatible, every field validated, every bit metered
(spec/gateway.md)."""
