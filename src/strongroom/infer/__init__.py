"""The inference server inside the boundary: a version of the room, in memory, answering whoever reaches its door.

It is bare on purpose: what the gateway refuses (steering, all log-probabilities, echoes) works here.
"""
