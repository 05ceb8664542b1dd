"""Marks: which variant a holder gets (code), and what the variants are (mark)."""
