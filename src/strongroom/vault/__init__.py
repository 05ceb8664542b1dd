"""What the room does with weights: put, release, verify, rotate."""
