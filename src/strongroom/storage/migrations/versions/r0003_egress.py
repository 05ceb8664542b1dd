"""Schema 3: bits that left through the gateway, by scope and window."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """The table of counters."""
    op.create_table(
        "egress",
        sa.Column("scope", sa.Text, primary_key=True),
        sa.Column("period", sa.Text, primary_key=True),
        sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("who", sa.Text, primary_key=True),
        sa.Column("ref", sa.Text, primary_key=True),
        sa.Column("used", sa.BigInteger, sa.CheckConstraint("used >= 0", name="egress_used"), nullable=False),
    )
    op.execute("UPDATE strongroom_schema SET version = 3")
