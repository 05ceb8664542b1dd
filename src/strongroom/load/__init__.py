"""Drop-in readers: weights straight from the room into memory. Nothing here writes plaintext to a disk."""
