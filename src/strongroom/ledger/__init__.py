"""The ledger: an append-only log of everything that a custodian does about weights (spec/ledger.md)."""
