"""The only door for everybody who holds no lease (spec/gateway.md)."""
