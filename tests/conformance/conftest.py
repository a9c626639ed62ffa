"""One real server with the demo model for all conformance tests."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.faults.served import Served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("conformance") / "state"
    with Served(state, "--enable-live-adapters", "--max-logprobs", "-1") as server:
        yield server
        server.process.terminate()
        assert server.process.wait(60) == 0
    log = server.state_dir.with_suffix(".log").read_text() + (server.state_dir / "engine.log").read_text()
    assert "Traceback" not in log and "captain!" not in log and "What is" not in log


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
