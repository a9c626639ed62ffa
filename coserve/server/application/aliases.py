"""Aliases: names that operators point at a model, so that applications needn't change when it does.

An alias means the base, an adapter (whatever its newest version is) or one version of it, never another
alias. Moving one is a single swap: a request has the old model or the new one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from sqlite3 import Connection

from coserve.errors import CoserveError, InvalidRequest, NotFound
from coserve.log import line
from coserve.server import alias_store, job_store
from coserve.server.alias_store import Alias
from coserve.server.application.adapter_names import AdapterNames
from coserve.server.auth import Key, sees
from coserve.server.database import Database

logger = logging.getLogger(__name__)


class Aliases:
    """The aliases of one server; `names` looks them up when a request says a model."""

    def __init__(self, names: AdapterNames, database: Database) -> None:
        self._names = names
        self._database = database
        self._lock = asyncio.Lock()

    async def restore(self) -> None:
        """Read the table, once the adapters are known. An alias whose model isn't there under this command
        line, or whose name is the base's now, waits in it for a start where that is otherwise."""
        aliases = {}
        for alias in await self._database.run(alias_store.all_rows):
            try:
                if self._names.is_base(alias.name):
                    raise InvalidRequest("Its name is the base model's now.")
                if not self._names.is_base(alias.model):
                    self._names.get(alias.model, key=None)
                aliases[alias.name] = alias
            except CoserveError as error:
                logger.warning(line("alias is left out", name=alias.name, reason=error.message))
        self._names.aliases = aliases

    def all(self, key: Key | None) -> list[Alias]:
        """Every alias that `key` sees, in order of name."""
        found = sorted(self._names.aliases.items())
        return [alias for _, alias in found if self._names.sees_alias(alias, key)]

    def get(self, name: str, key: Key | None) -> Alias:
        """One alias; NotFound, also for one that `key` doesn't see."""
        found = self._names.aliases.get(name)
        if found is None or not self._names.sees_alias(found, key):
            raise NotFound(f"There is no alias {name[:200]!r}.", param="alias")
        return found

    async def set(self, name: str, model: str, key: Key | None) -> Alias:
        """Point a new or a known alias at a model that `key` sees.

        Raises PermissionDenied for a name that `key` may not give, InvalidRequest for one that can't be an
        alias or is an adapter's, and for a model that is an alias; ModelNotFound for one nobody knows.
        """
        async with self._lock:
            self._names.check_named(name, "alias", key)
            if name not in self._names.aliases:
                self._names.check_name(name, "alias", key)
                if self._names.knows(name) or name in await self._database.run(_to_be_published):
                    raise InvalidRequest(
                        f"{name!r} is an adapter's name, or one that a job will publish under.",
                        param="alias",
                    )
            if model in self._names.aliases and sees(key, model):
                raise InvalidRequest(
                    f"{model!r} is an alias itself; name the model that it means.", param="model"
                )
            if not (self._names.is_base(model) and self._names.sees_model(model, key)):
                self._names.get(model, key=key)
            alias = Alias(name, model, int(time.time()))
            await self._database.run(lambda db: alias_store.put(db, alias))
            self._names.aliases = {**self._names.aliases, name: alias}
            return alias

    async def delete(self, name: str, key: Key | None) -> None:
        """Forget an alias; NotFound."""
        async with self._lock:
            self.get(name, key)
            await self._database.run(lambda db: alias_store.delete(db, name))
            self._names.aliases = {
                other: alias for other, alias in self._names.aliases.items() if other != name
            }


def _to_be_published(connection: Connection) -> set[str]:
    return {job.publish_as for job in job_store.all_jobs(connection) if not job.is_over}
