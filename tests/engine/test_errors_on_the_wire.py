"""An error of the engine comes out of the server as the same class, with its own code, field and delay."""

from __future__ import annotations

import pytest

from coserve import errors
from coserve.engine import messages as m
from coserve.engine.outbox import Outbox
from coserve.server.errors import grpc_code, http_status


def tree(kind: type[errors.CoserveError]) -> list[type[errors.CoserveError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]


def make(kind: type[errors.CoserveError], code: str | None) -> errors.CoserveError:
    if issubclass(kind, errors.DatasetError):
        return kind([errors.LineError(3, "messages", "is empty")], 1)
    if issubclass(kind, errors.RateLimited | errors.Unavailable):
        return kind("Later.", param="field", code=code, retry_after=2.5)
    return kind("No.", param="field", code=code)


@pytest.mark.parametrize("code", [None, "a_code_of_its_own"])
@pytest.mark.parametrize("kind", tree(errors.CoserveError), ids=lambda kind: kind.__name__)
def test_every_class_comes_over_with_any_code(kind, code) -> None:
    sent: list[m.Message] = []
    outbox, error = Outbox(sent.append), make(kind, code)
    outbox.refuse("request", error)
    outbox.reply(1, error)
    outputs, reply = (m.decode_from_engine(m.encode(message)) for message in sent)
    assert isinstance(outputs, m.StepOutputs) and isinstance(reply, m.Reply)
    for fault in (outputs.outputs[0].error, reply.error):
        assert fault is not None
        found = fault.to_error()
        assert (found.message, found.param, found.code) == (error.message, error.param, error.code)
        assert http_status(found) == http_status(error) and grpc_code(found) is grpc_code(error)
        assert getattr(found, "retry_after", None) == getattr(error, "retry_after", None)
        assert type(found) is kind or kind in (errors.CoserveError, errors.DatasetError)


def test_no_two_classes_share_a_word() -> None:
    kinds = [kind for kind in tree(errors.CoserveError) if kind is not errors.CoserveError]
    assert len({kind.default_code for kind in kinds}) == len(kinds)
