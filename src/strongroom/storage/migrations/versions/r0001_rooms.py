"""Schema 1: rooms without a log, as release 0.1.0 made them. Nothing makes it any more."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """A database of schema 1 is where this begins."""
    raise RuntimeError("a database of schema 1 is stamped as one, and never made")
