"""The error that a command ends with when what went wrong lies outside this process."""

from __future__ import annotations


class CommandFailed(Exception):
    """The command can't do what was asked; the message says why and what to do. `exit_code` is 1 or 2."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
