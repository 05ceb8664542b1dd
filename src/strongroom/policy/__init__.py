"""Policy: what may be done by whom, decided by Cedar from arguments alone, and explained."""
