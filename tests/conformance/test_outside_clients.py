"""The official Node client, LangChain and LiteLLM against a real server, each in a process of its own."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.conformance.outside import HERE, NODE, VENV, need, outcomes
from tests.faults.served import Served

NODE_CHECKS = (
    "models", "chat", "chat_stream", "stream_helper", "several_answers", "tools", "tools_streamed",
    "run_tools", "json_schema", "completions", "responses", "response_calls", "response_schema",
    "files_and_jobs", "errors", "abort",
)  # fmt: skip
LANGCHAIN_CHECKS = ("invoke", "stream", "batches", "tools", "structured_output", "responses", "completions")
LITELLM_CHECKS = (
    "completion", "stream", "hosted_vllm", "asynchronous", "tools", "responses", "text_completion", "errors",
)  # fmt: skip


@pytest.fixture(scope="module")
def node(served: Served) -> dict[str, Any]:
    need(NODE / "node_modules" / "openai")
    program = shutil.which("node")
    if program is None:
        pytest.skip("node isn't installed")
    script = [program, str(HERE / "node" / "client.mjs")]
    return outcomes(script, served.url, served.model, COSERVE_NODE=str(NODE))


@pytest.fixture(scope="module")
def langchain(served: Served) -> dict[str, Any]:
    need(VENV)
    return outcomes([str(VENV), str(HERE / "langchain_client.py")], served.url, served.model)


@pytest.fixture(scope="module")
def litellm(served: Served) -> dict[str, Any]:
    need(VENV)
    return outcomes([str(VENV), str(HERE / "litellm_client.py")], served.url, served.model)


@pytest.mark.parametrize("check", NODE_CHECKS)
def test_node(node: dict[str, Any], check: str) -> None:
    assert node.keys() == set(NODE_CHECKS) and node[check] is None, node[check]


@pytest.mark.parametrize("check", LANGCHAIN_CHECKS)
def test_langchain(langchain: dict[str, Any], check: str) -> None:
    assert langchain.keys() == set(LANGCHAIN_CHECKS) and langchain[check] is None, langchain[check]


@pytest.mark.parametrize("check", LITELLM_CHECKS)
def test_litellm(litellm: dict[str, Any], check: str) -> None:
    assert litellm.keys() == set(LITELLM_CHECKS) and litellm[check] is None, litellm[check]
