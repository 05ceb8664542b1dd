"""Bytes to values and back, without input or output: what model files and the room's own files look like."""
