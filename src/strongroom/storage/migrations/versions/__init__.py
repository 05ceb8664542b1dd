"""The revisions, oldest first. What is here is never changed: databases have been through it."""
