"""All parts of a running server, made once by parts.py and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass

from coserve.config import ServerConfig
from coserve.engine.client import EngineClient
from coserve.metrics import Metrics
from coserve.server.application.adapters import Adapters
from coserve.server.application.aliases import Aliases
from coserve.server.application.chat_settings import ChatSettings
from coserve.server.application.files import Files
from coserve.server.application.generation import Generator
from coserve.server.application.jobs import Jobs
from coserve.server.application.lifecycle import Lifecycle
from coserve.server.application.models import BaseModel
from coserve.server.application.sampling import SamplingRules
from coserve.server.application.uploads import Uploads
from coserve.server.auth import Authenticator
from coserve.server.quotas import Quotas
from coserve.server.service_tiers import ServiceTiers
from coserve.server.tinker.service import Tinker
from coserve.tokenizer import Tokenizer


@dataclass(frozen=True)
class Context:
    """The application layer behind every route and RPC."""

    config: ServerConfig
    base: BaseModel
    engine: EngineClient
    tokenizer: Tokenizer
    chat: ChatSettings
    rules: SamplingRules
    lifecycle: Lifecycle
    metrics: Metrics
    auth: Authenticator
    tiers: ServiceTiers
    quotas: Quotas
    generator: Generator
    adapters: Adapters
    aliases: Aliases
    files: Files
    uploads: Uploads
    jobs: Jobs
    tinker: Tinker
