"""Aliases: names that operators point at a model, so that applications needn't change when it does.

An alias means the base, an adapter (whatever its newest version is) or one version of it, never another
alias. Moving one is a single swap: a request has the old model or the new one.
"""

from __future__ import annotations

import asyncio
import time
from sqlite3 import Connection

from coserve.errors import InvalidRequest, NotFound
from coserve.server import alias_store, job_store
from coserve.server.alias_store import Alias
from coserve.server.application.adapter_names import AdapterNames
from coserve.server.database import Database


class Aliases:
    """The aliases of one server; `names` looks them up when a request says a model."""

    def __init__(self, names: AdapterNames, database: Database) -> None:
        self._names = names
        self._database = database
        self._lock = asyncio.Lock()

    async def restore(self) -> None:
        """Read the table, once the adapters are known."""
        found = await self._database.run(alias_store.all_rows)
        self._names.aliases = {alias.name: alias for alias in found}

    def all(self) -> list[Alias]:
        """Every alias, in order of name."""
        return [alias for _, alias in sorted(self._names.aliases.items())]

    def get(self, name: str) -> Alias:
        """One alias; NotFound."""
        found = self._names.aliases.get(name)
        if found is None:
            raise NotFound(f"There is no alias {name[:200]!r}.", param="alias")
        return found

    async def set(self, name: str, model: str) -> Alias:
        """Point a new or a known alias at a model.

        Raises InvalidRequest for a name that can't be one or is an adapter's, and for a model that is an
        alias; ModelNotFound for one nobody knows.
        """
        async with self._lock:
            if name not in self._names.aliases:
                self._names.check_name(name, "alias")
                if self._names.knows(name) or name in await self._database.run(_to_be_published):
                    raise InvalidRequest(
                        f"{name!r} is an adapter's name, or one that a job will publish under.",
                        param="alias",
                    )
            if model in self._names.aliases:
                raise InvalidRequest(
                    f"{model!r} is an alias itself; name the model that it means.", param="model"
                )
            if not self._names.is_base(model):
                self._names.get(model)
            alias = Alias(name, model, int(time.time()))
            await self._database.run(lambda db: alias_store.put(db, alias))
            self._names.aliases = {**self._names.aliases, name: alias}
            return alias

    async def delete(self, name: str) -> None:
        """Forget an alias; NotFound."""
        async with self._lock:
            self.get(name)
            await self._database.run(lambda db: alias_store.delete(db, name))
            self._names.aliases = {key: alias for key, alias in self._names.aliases.items() if key != name}


def _to_be_published(connection: Connection) -> set[str]:
    return {job.publish_as for job in job_store.all_jobs(connection) if not job.is_over}
