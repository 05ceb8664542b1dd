"""What answers over a network: a served room, and the witness."""
