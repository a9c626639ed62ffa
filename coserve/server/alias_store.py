"""Rows of aliases. All functions run inside a `Database` transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """`name` means `model` (the base, an adapter, or name@version) since `created_at`."""

    name: str
    model: str
    created_at: int


def all_rows(connection: sqlite3.Connection) -> list[Alias]:
    """Every alias."""
    return [Alias(*row) for row in connection.execute("SELECT name, model, created_at FROM aliases")]


def put(connection: sqlite3.Connection, alias: Alias) -> None:
    """Add an alias, or point it elsewhere."""
    values = (alias.name, alias.model, alias.created_at)
    connection.execute("INSERT OR REPLACE INTO aliases (name, model, created_at) VALUES (?, ?, ?)", values)


def delete(connection: sqlite3.Connection, name: str) -> None:
    """Forget an alias."""
    connection.execute("DELETE FROM aliases WHERE name = ?", (name,))
