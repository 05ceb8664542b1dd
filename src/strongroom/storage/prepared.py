"""Statements that are compiled once in a process."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


class Prepared:
    """A statement with named parameters, for what every release asks.

    SQLAlchemy keeps what it compiles by engine, and each room that is opened has one of its own: compiling would cost
    each of them more than all that the statements do. Values go to the driver, and come from it, as they are: the types
    of the columns convert nothing here.
    """

    def __init__(self, statement: sa.Select[Any] | sa.Insert | sa.Update | sa.Delete) -> None:
        self._statement = statement
        self._compiled: dict[str, tuple[str, list[str] | None]] = {}  # by dialect: text, and order of its parameters

    def __call__(self, tx: sa.Connection, **values: Any) -> sa.CursorResult[Any]:
        """Execute it in `tx`. Errors as any statement of the transaction."""
        text, order = self._compiled.get(tx.dialect.name) or self.text_for(tx.dialect)
        return tx.exec_driver_sql(text, values if order is None else tuple([values[name] for name in order]))

    def text_for(self, dialect: sa.Dialect) -> tuple[str, list[str] | None]:
        """What a database of this kind is sent, and the order of the parameters if they have no names there."""
        compiled: Any = self._statement.compile(dialect=dialect)
        found = compiled.string, compiled.positiontup if compiled.positional else None
        self._compiled[dialect.name] = found
        return found
