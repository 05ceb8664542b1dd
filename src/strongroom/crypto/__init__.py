"""Standard constructions, one place for each: key schedule, sealed boxes, AEAD segments, signatures, key stores."""
