"""Values that every other part shares: identifiers, canonical JSON, limits, settings. No I/O."""
