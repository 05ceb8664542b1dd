"""Attacks on what this project builds, as code: they use public doors only, and say what they cost."""
