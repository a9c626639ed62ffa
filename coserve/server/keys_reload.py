"""The keys file, read again while the server runs: on SIGHUP, or when it has changed."""

from __future__ import annotations

import asyncio
import logging
import os

from coserve.config import ServerConfig
from coserve.core.slo import LatencyTargets
from coserve.errors import ConfigError
from coserve.log import line
from coserve.server.auth import Authenticator
from coserve.server.keys_file import KeysFile, read_keys_file

logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int] | None
LOOK_EVERY = 5.0  # seconds


class KeysReload:
    """Keeps an Authenticator at what the file says. A file that can't be honoured as a whole changes nothing.

    Requests under way go on with the key that they came with.
    """

    def __init__(self, config: ServerConfig, default: LatencyTargets) -> None:
        """Read the file for the first time; ConfigError."""
        self._config = config
        self._default = default
        self._stamp = self._look()
        self.file = self._read()
        self.auth = Authenticator.from_config(
            config.api_keys, config.admin_api_keys, self.file.keys, self.file.defaults
        )

    def reload(self) -> None:
        """Read the file again; the log says what came of it."""
        self._stamp = self._look()
        try:
            file = self._read()
            if file.classes != self.file.classes:
                raise ConfigError("--keys-file: its latency classes have changed; they need a restart.")
            self.auth.take(
                Authenticator.from_config(
                    self._config.api_keys, self._config.admin_api_keys, file.keys, file.defaults
                )
            )
        except ConfigError as error:
            logger.error(line("keys not reloaded, the old ones stay", reason=error.message))
            return
        self.file = file
        logger.info(line("keys reloaded", keys=len(file.keys)))

    async def watch(self, every: float = LOOK_EVERY) -> None:
        """Look at the file every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every)
            if self._look() != self._stamp:
                self.reload()

    def _read(self) -> KeysFile:
        file = read_keys_file(self._config.keys_file, self._default)
        if file.has_plain_keys and os.stat(self._config.keys_file).st_mode & 0o077:
            logger.warning("others may read the keys in --keys-file: chmod 600, or sha256 in place of key")
        return file

    def _look(self) -> _Stamp:
        """What tells one file from another under the same name; None while there is none."""
        try:
            found = os.stat(self._config.keys_file)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
