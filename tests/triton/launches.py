"""Launches of a kernel, seen from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Noted:
    """A kernel that notes a setting of each of its launches."""

    def __init__(self, kernel: Any, setting: str) -> None:
        self.kernel, self.setting = kernel, setting
        self.launches: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **settings: Any) -> None:
            self.launches.append(settings[self.setting])
            self.kernel[grid](*args, **settings)

        return launch
