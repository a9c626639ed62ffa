"""The parts of a server over an engine that has started: each made once, from the command line's settings."""

from __future__ import annotations

import random

from coserve.config import DEMO_MODEL_DIR, EngineConfig, ServerConfig
from coserve.engine.client import EngineClient
from coserve.engine.messages import EngineReady
from coserve.metrics import Metrics
from coserve.models.config import ModelConfig
from coserve.models.fingerprint import model_fingerprint
from coserve.server.application.adapters import Adapters
from coserve.server.application.aliases import Aliases
from coserve.server.application.chat_settings import ChatSettings
from coserve.server.application.files import Files
from coserve.server.application.generation import Generator
from coserve.server.application.jobs import Jobs
from coserve.server.application.lifecycle import Lifecycle
from coserve.server.application.models import base_model
from coserve.server.application.publish_checks import PublishChecks
from coserve.server.application.sampling import SamplingDefaults, SamplingRules
from coserve.server.application.uploads import Uploads
from coserve.server.auth import Authenticator
from coserve.server.context import Context
from coserve.server.database import Database
from coserve.server.quotas import Quotas
from coserve.server.service_tiers import ServiceTiers
from coserve.server.state_dir import StateDir
from coserve.server.tinker.service import Tinker
from coserve.tokenizer import Tokenizer

_TEXT_TOKENS = 100_000  # of a text that is read, though it be over the context


def make_parts(
    config: ServerConfig,
    auth: Authenticator,
    tiers: ServiceTiers,
    state: StateDir,
    database: Database,
    engine: EngineClient,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
) -> Context:
    """The application layer over an engine that has started."""
    info = engine.info
    assert info is not None
    name, max_rank = engine.config.served_model_name, engine.config.max_lora_rank
    lifecycle = Lifecycle(engine)
    fingerprint = model_fingerprint(config.engine.model or DEMO_MODEL_DIR)
    names = (name, *(other for other in config.served_model_names if other != name))
    base = base_model(names, config.engine.model or name, info.max_model_len, info.vocab_size, fingerprint)
    metrics, quotas = _metrics(engine.config, tiers, info, name), Quotas()
    metrics.watch_disk(state.root)
    generator = Generator(
        engine,
        tokenizer,
        lifecycle,
        metrics,
        tiers,
        quotas,
        info.max_model_len,
        info.vocab_size,
        check_live=lambda job_id, key: jobs.records.check_live(job_id, key),
    )
    rules = _rules(config, engine.config.model, tokenizer, info.vocab_size)
    tokenizer.most_tokens = max(2 * info.max_model_len, _TEXT_TOKENS)
    files = Files(database, state)
    adapters = Adapters(
        base=base,
        model_config=model_config,
        engine=engine,
        database=database,
        state=state,
        generator=generator,
        metrics=metrics,
        max_rank=max_rank,
        roots=config.adapter_roots,
        serves_live=config.enable_live_adapters,
    )
    jobs = Jobs(
        base=base,
        model_config=model_config,
        engine=engine,
        tokenizer=tokenizer,
        database=database,
        state=state,
        files=files,
        adapters=adapters,
        checks=PublishChecks(generator, tiers, rules, files),
        lifecycle=lifecycle,
        metrics=metrics,
        auth=auth,
        max_rank=max_rank,
    )
    return Context(
        config=config,
        base=base,
        engine=engine,
        tokenizer=tokenizer,
        chat=ChatSettings.of(config, tokenizer),
        rules=rules,
        lifecycle=lifecycle,
        metrics=metrics,
        auth=auth,
        tiers=tiers,
        quotas=quotas,
        generator=generator,
        adapters=adapters,
        aliases=Aliases(adapters, database),
        files=files,
        uploads=Uploads(database, state, files),
        jobs=jobs,
        tinker=Tinker(
            base=base,
            model_config=model_config,
            engine=engine,
            database=database,
            state=state,
            adapters=adapters,
            generator=generator,
            auth=auth,
            metrics=metrics,
            max_rank=max_rank,
        ),
    )


def _rules(config: ServerConfig, model: str, tokenizer: Tokenizer, vocab_size: int) -> SamplingRules:
    """What requests to generate are held to."""
    seed = config.engine.seed
    return SamplingRules(
        tokenizer,
        vocab_size,
        _sampling_defaults(config.generation_config, model),
        config.max_logprobs,
        config.stream_interval,
        random.Random(seed) if seed else random.SystemRandom(),
    )


def _sampling_defaults(source: str, model: str) -> SamplingDefaults:
    """Those of `--generation-config`."""
    if source == "vllm":
        return SamplingDefaults()
    return SamplingDefaults.from_dir(model if source == "auto" else source)


def _metrics(config: EngineConfig, tiers: ServiceTiers, info: EngineReady, name: str) -> Metrics:
    cache = {
        "block_size": info.block_size,
        "num_gpu_blocks": info.num_blocks,
        "cache_dtype": "auto",
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes or None,
        "num_cpu_blocks": 0,
        "prefix_caching_hash_algo": "blake2b",
    }
    targets = {latency_class.name: latency_class.targets for latency_class in tiers.classes}
    metrics = Metrics(name, info.max_model_len, config.max_loras, cache, targets)
    metrics.engine_started(info)
    return metrics
