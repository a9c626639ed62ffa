"""`publish_if` of a job: what has to hold of its adapter before it is published.

    max_valid_loss, min_valid_accuracy   of the last evaluation on the validation set
    checks                               files of questions with the right answers, each with a name: at least
                                         `min_score` of them must be answered right, greedily

A job whose adapter doesn't pass fails and publishes nothing; its checkpoints still answer by their names, and
PublishVersion can make one a version all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from coserve.errors import FailedPrecondition
from coserve.server.fields import Fields
from coserve.server.job_store import Check, CheckResult, PublishGate

MATCHES = ("exact", "contains")
MAX_CHECKS = 8
MAX_ANSWER_TOKENS = 4096
_GATE_FIELDS = frozenset({"max_valid_loss", "min_valid_accuracy", "checks"})
_CHECK_FIELDS = frozenset({"name", "file", "min_score", "match", "max_tokens"})


def read_gate(fields: Fields, is_validated: bool) -> PublishGate | None:
    """A job request's `publish_if`; `is_validated` says whether it has data to be scored on.

    Raises InvalidRequest naming the field.
    """
    gate = fields.object("publish_if")
    if gate is None:
        return None
    gate.only(_GATE_FIELDS, "publish_if")
    for name in ("max_valid_loss", "min_valid_accuracy"):
        if gate.has(name) and not is_validated:
            raise gate.fail(name, "needs a validation_file or training.validation_split.")
    checks = [
        _check(Fields(check, f"publish_if.checks[{index}]."))
        for index, check in enumerate(gate.array("checks") or [])
    ]
    if len(checks) > MAX_CHECKS:
        raise gate.fail("checks", f"must be at most {MAX_CHECKS}, not {len(checks)}.")
    if len({check.name for check in checks}) < len(checks):
        raise gate.fail("checks", "has a name twice.")
    return PublishGate(
        max_valid_loss=gate.number("max_valid_loss", None, 0.0),
        min_valid_accuracy=gate.number("min_valid_accuracy", None, 0.0, 1.0),
        checks=tuple(checks),
    )


def _check(fields: Fields) -> Check:
    fields.only(_CHECK_FIELDS, "a check")
    name, defaults = fields.string("name", None, 64), Check(name="", file="")
    if not name:
        raise fields.fail("name", "is required.")
    score = fields.number("min_score", defaults.min_score, 0.0, 1.0)
    tokens = fields.integer("max_tokens", defaults.max_tokens, 1, MAX_ANSWER_TOKENS)
    return Check(
        name=name,
        file=fields.required_string("file"),
        min_score=defaults.min_score if score is None else score,
        match=fields.choice("match", MATCHES) or defaults.match,
        max_tokens=tokens or defaults.max_tokens,
    )


def refusal(
    gate: PublishGate,
    valid_loss: float | None,
    valid_accuracy: float | None,
    results: Sequence[CheckResult],
) -> FailedPrecondition | None:
    """Why an adapter with these scores isn't published; None when it is."""
    missed: list[tuple[str, str]] = []
    if gate.max_valid_loss is not None and not _at_most(valid_loss, gate.max_valid_loss):
        loss = _shown(valid_loss)
        missed.append(("max_valid_loss", f"its validation loss is {loss}, over {gate.max_valid_loss:g}"))
    if gate.min_valid_accuracy is not None and not _at_least(valid_accuracy, gate.min_valid_accuracy):
        share = _shown(valid_accuracy)
        missed.append(
            ("min_valid_accuracy", f"its validation accuracy is {share}, under {gate.min_valid_accuracy:g}")
        )
    scores = {result.name: result.score for result in results}
    for index, check in enumerate(gate.checks):
        if not _at_least(scores.get(check.name), check.min_score):
            score = _shown(scores.get(check.name))
            text = f"it scores {score} in the check {check.name!r}, under {check.min_score:g}"
            missed.append((f"checks[{index}].min_score", text))
    if not missed:
        return None
    reasons = "; ".join(text for _, text in missed)
    return FailedPrecondition(
        f"The adapter is not published: {reasons}.",
        param=f"publish_if.{missed[0][0]}",
        code="publish_gate_failed",
    )


def _at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _at_least(value: float | None, limit: float) -> bool:
    return value is not None and value >= limit


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
