"""Tinker's API behind its routes: sessions and what they hold, and what ends with them."""

from __future__ import annotations

import asyncio
import logging

from coserve.engine.client import EngineClient
from coserve.log import line
from coserve.metrics import Metrics
from coserve.models.config import ModelConfig
from coserve.server.application.adapters import Adapters
from coserve.server.application.generation import Generator
from coserve.server.application.models import BaseModel
from coserve.server.auth import Authenticator
from coserve.server.database import Database
from coserve.server.state_dir import StateDir
from coserve.server.tinker.futures import Futures
from coserve.server.tinker.models import Models, TrainedModel
from coserve.server.tinker.passes import Limits
from coserve.server.tinker.runs import Runs
from coserve.server.tinker.samplers import Samplers
from coserve.server.tinker.sessions import Session, Sessions

logger = logging.getLogger(__name__)

SWEEP = 10.0  # seconds


class Tinker:
    """The parts, by their names. `limits` are the model's."""

    def __init__(
        self,
        *,
        base: BaseModel,
        model_config: ModelConfig,
        engine: EngineClient,
        database: Database,
        state: StateDir,
        adapters: Adapters,
        generator: Generator,
        auth: Authenticator,
        metrics: Metrics,
        max_rank: int,
    ) -> None:
        self.base, self.model_config, self.max_rank = base, model_config, max_rank
        self.limits = Limits(base.vocab_size, base.max_model_len)
        self.sessions = Sessions()
        self.futures = Futures()
        self.runs = Runs(database, state, adapters, generator, model_config, max_rank)
        self.models = Models(engine, auth, metrics, self.runs, self.futures)
        self.samplers = Samplers(generator)
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring back what was saved, and look after sessions from now on."""
        await self.runs.restore()
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """All sessions end; the engine forgets their models by itself."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        for session in self.sessions.all():
            for model in self._let_go(session):
                self.models.forget(model)

    async def end(self, session: Session) -> None:
        """Unload a session's models, and forget its samplers, futures and ephemeral saves."""
        models = self._let_go(session)
        for model in models:
            await self.models.unload(model)
        await self.runs.drop_ephemeral(session.model_ids)
        logger.info(line("session ended", id=session.id, models=len(models)))

    def _let_go(self, session: Session) -> list[TrainedModel]:
        self.sessions.remove(session.id)
        self.futures.end_session(session.id)
        for sampler_id in session.sampler_ids:
            self.samplers.remove(sampler_id)
        return self.models.of(session)

    async def sweep(self) -> None:
        """What is due: silent sessions, answers nobody wants any more, saves that have expired."""
        for session in self.sessions.silent():
            logger.warning(line("session is silent", id=session.id))
            await self.end(session)
        self.futures.sweep()
        await self.runs.sweep()

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            try:
                await self.sweep()
            except Exception:
                logger.exception("sessions could not be looked after")
