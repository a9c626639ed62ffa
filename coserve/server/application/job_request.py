"""A fine-tuning request checked field by field, every default filled in.

The body is the gRPC request's as a plain dictionary; HTTP's OpenAI fields are brought into that form first.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass

from coserve.server.application.publish_gate import read_gate
from coserve.server.application.training_request import parse_auto, parse_training
from coserve.server.fields import PRIORITIES, Fields, shown
from coserve.server.job_store import PublishGate
from coserve.training.job import TrainingSpec
from coserve.training.methods import METHODS

MAX_SEED = 2**31 - 1

_WORDS = (
    "model training_file validation_file adapter suffix method lora training seed init_from metadata "
    "priority idempotency_key publish_if "
)
REQUEST_FIELDS = frozenset(_WORDS.split())


@dataclass(frozen=True)
class JobRequest:
    """A valid request. `lora` is what it says of the adapter, to be read once it is known which adapter it
    begins from; `auto` names the settings of `training` that the data will decide."""

    model: str
    training_file: str
    validation_file: str
    adapter: str
    suffix: str
    method: str
    lora: Fields
    training: TrainingSpec
    auto: tuple[str, ...]
    seed: int
    init_from: str
    metadata: dict[str, str]
    priority: int
    idempotency_key: str
    publish_if: PublishGate | None
    digest: str


def parse_job_request(body: object, max_model_len: int) -> JobRequest:
    """Check a request; InvalidRequest names the field, unknown ones too."""
    fields = Fields(body)
    fields.only(REQUEST_FIELDS, "the job")
    method = fields.string("method") or "supervised"
    if method not in METHODS:
        raise fields.fail("method", f"must be one of {', '.join(METHODS)}; {shown(method)} is not supported.")
    validation_file = fields.string("validation_file") or ""
    training = fields.object("training") or Fields({}, "training.")
    spec = parse_training(training, max_model_len, method, bool(validation_file))
    seed = fields.integer("seed", None, 0, MAX_SEED)
    return JobRequest(
        model=fields.string("model") or "",
        training_file=fields.required_string("training_file"),
        adapter=fields.string("adapter") or "",
        suffix=fields.string("suffix", "", 64) or "",
        method=method,
        lora=fields.object("lora") or Fields({}, "lora."),
        validation_file=validation_file,
        training=spec,
        auto=parse_auto(training),
        seed=seed if seed is not None else secrets.randbelow(MAX_SEED),
        init_from=fields.string("init_from") or "",
        metadata=fields.metadata(),
        priority=fields.integer("priority", 0, *PRIORITIES) or 0,
        idempotency_key=fields.string("idempotency_key", "", 255) or "",
        publish_if=read_gate(fields, bool(validation_file or spec.validation_split)),
        digest=hashlib.sha256(json.dumps(fields.body, sort_keys=True, default=str).encode()).hexdigest(),
    )
