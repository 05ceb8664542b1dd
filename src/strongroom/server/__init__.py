"""What answers over a network: the witness."""
