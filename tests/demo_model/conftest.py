"""Fixtures that load the bundled model directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.demo_model.evaluate import DEFAULT_MODEL


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The bundled model's directory."""
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> AutoTokenizer:
    """The bundled tokenizer as ``transformers`` loads it."""
    return AutoTokenizer.from_pretrained(model_dir)
