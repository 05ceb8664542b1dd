"""Values that all other parts share: identifiers, canonical JSON, limits, the clock, settings. No files, no network."""
