"""`coserve keys`: entries for the keys file, without the keys themselves in it."""

from __future__ import annotations

import json
import secrets
import sys
from typing import Annotated

import typer

from coserve.cli.failure import CommandFailed

app = typer.Typer(help="Make keys for --keys-file.", no_args_is_help=True, rich_markup_mode=None)
_ROLES = ("use", "tune", "admin", "metrics")
Role = Annotated[str, typer.Option(metavar="|".join(_ROLES), help="What the key may do.")]
Models = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="A model that it sees, with * and ?; repeatable.")
]
Tenant = Annotated[str, typer.Option(help="Whose files and jobs it shares.")]


@app.command("make")
def make(role: Role = "use", models: Models = None, tenant: Tenant = "") -> None:
    """Make a key: its entry goes to standard output, the key itself, once, to standard error."""
    key = f"csk-{secrets.token_urlsafe(32)}"
    entry = _entry(key, role, models or [], tenant)
    print(f"the key, which is kept nowhere: {key}", file=sys.stderr)
    print(entry)


@app.command("hash")
def hash_key(role: Role = "use", models: Models = None, tenant: Tenant = "") -> None:
    """The entry of a key that is read from standard input."""
    key = sys.stdin.readline().strip()
    if not key:
        raise CommandFailed("no key on standard input", exit_code=2)
    print(_entry(key, role, models or [], tenant))


def _entry(key: str, role: str, models: list[str], tenant: str) -> str:
    from coserve.server.auth import digest

    if role not in _ROLES:
        raise CommandFailed(f"--role {role}: there are {', '.join(_ROLES)}", exit_code=2)
    lines = ["[[keys]]", f'sha256 = "{digest(key).hex()}"', f'role = "{role}"']
    lines += [f"models = {json.dumps(models)}"] if models else []
    lines += [f"tenant = {json.dumps(tenant)}"] if tenant else []
    return "\n".join(lines)
