"""How a database of an older release becomes one of this release: Alembic's revisions, one a schema."""
