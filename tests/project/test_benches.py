"""The benches speak of functions that exist: a renamed kernel or argument would make them fall over."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parents[2] / "bench"


def ledger() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ledger", BENCH / "ledger.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ledger"] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_the_ledger_times_functions_by_arguments_that_they_have() -> None:
    module = ledger()
    functions = {
        name: getattr(importlib.import_module(f"coserve.kernels.{home}"), name)
        for home, names in module.KERNELS.items()
        for name in names
    }
    unknown = set(module.WORK) - set(functions) - {"base linear", "base linear, dx"}
    assert not unknown
    shared = inspect.getsource(module._window)
    for name, work in module.WORK.items():
        if name in functions:
            source = shared if name.startswith("window_") else inspect.getsource(work)
            asked = set(re.findall(r'arguments\["(\w+)"\]', source))
            assert asked <= set(inspect.signature(functions[name]).parameters), name
