"""One server for the tests of a module; tests that stop or restart one make their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.fake_engine import DEFAULT_REPLY
from tests.server.running import ServerThread


@pytest.fixture(scope="module")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory, adapter_root: Path) -> Iterator[ServerThread]:
    server = ServerThread(
        tmp_path_factory.mktemp("state") / "s",
        adapter_roots=(str(adapter_root),),
        trust_request_chat_template=True,
    )
    yield server
    server.stop()


@pytest.fixture
def server(module_server: ServerThread) -> ServerThread:
    engine = module_server.engine
    engine.reply, engine.fail_after, engine.fail_load, engine.auto_train = DEFAULT_REPLY, None, None, True
    engine.requests.clear()
    engine.aborted.clear()
    return module_server


@pytest.fixture
def http(server: ServerThread) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
