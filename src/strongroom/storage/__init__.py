"""Where a room's bytes are kept: blobs (ciphertext, in a folder or an object store) and the database."""
