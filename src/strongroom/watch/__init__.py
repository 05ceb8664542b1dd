"""What leaves, measured against what would be worth stealing: meters, the effective size, and budgets."""
