"""`coserve adapters`: list, load, publish and move adapters over gRPC."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from coserve.cli.connection import (
    CHUNK_BYTES,
    DEFAULT_GRPC,
    ApiKey,
    CaCert,
    ClientCert,
    Grpc,
    channel,
    metadata,
)
from coserve.cli.jobs import print_table
from coserve.cli.merge import merge
from coserve.cli.values import existing_dir
from coserve.errors import ConfigError

app = typer.Typer(help="List, load, publish, move and merge adapters.", no_args_is_help=False)
app.command("merge")(merge)
Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Version = Annotated[int, typer.Option(min=0, help="0 is the newest.")]


@app.command("list")
def list_adapters(
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """All adapters with version, rank and where their weights are."""
    from coserve.cli.stubs import adapters

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = adapters(opened)
        answer = stub.ListAdapters(pb.ListAdaptersRequest(), metadata=metadata(api_key))
    rows = [_row(adapter) for adapter in answer.adapters]
    print_table(("NAME", "VERSION", "RANK", "STATUS", "TIER", "DIGEST"), rows)


@app.command("load")
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="A PEFT directory under one of the server's --adapter-root.")],
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep it on the device.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make it the next version of a known name.")
    ] = False,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Load an adapter from a directory that the server can read."""
    request = {"name": name, "path": path, "pinned": pinned, "replace": replace}
    _print(_call("LoadAdapter", grpc_address, api_key, ca_cert, client_cert, **request))


@app.command("pin")
def pin(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Pin it no longer.")] = False,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Keep an adapter's weights on the device, or no longer."""
    request = {"name": name, "pinned": not off}
    _print(_call("LoadAdapter", grpc_address, api_key, ca_cert, client_cert, **request))


@app.command("unload")
def unload(
    name: Name,
    version: Annotated[int, typer.Option(min=0, help="0 is all of them.")] = 0,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Take an adapter out of service; requests that run on it end on it."""
    _call("UnloadAdapter", grpc_address, api_key, ca_cert, client_cert, name=name, version=version)
    print(f"{name}@{version} unloaded" if version else f"{name} unloaded")


@app.command("publish")
def publish(
    name: Name,
    checkpoint: Annotated[str, typer.Argument(help="A job's checkpoint id.")],
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Make a checkpoint the next version of an adapter."""
    _print(
        _call("PublishVersion", grpc_address, api_key, ca_cert, client_cert, name=name, checkpoint=checkpoint)
    )


@app.command("rollback")
def rollback(
    name: Name,
    version: Annotated[int, typer.Option(min=0, help="0 is the one before the newest.")] = 0,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Let a name mean an earlier version again."""
    _print(_call("RollbackAdapter", grpc_address, api_key, ca_cert, client_cert, name=name, version=version))


@app.command("upload")
def upload(
    name: Name,
    directory: Annotated[str, typer.Argument(help="A PEFT directory on this machine.")],
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep it on the device.")] = False,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Send a PEFT directory to the server and publish it."""
    folder = existing_dir(directory, "DIRECTORY")
    from coserve.cli.stubs import adapters

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = adapters(opened)
        stream = _upload_messages(pb.UploadAdapterRequest, name, folder, pinned)
        _print(stub.UploadAdapter(stream, metadata=metadata(api_key)))


@app.command("download")
def download(
    name: Name,
    directory: Annotated[str, typer.Argument(help="Folder to make; must not exist yet.")],
    version: Version = 0,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Write an adapter as a PEFT directory on this machine."""
    folder = Path(directory).expanduser()
    if folder.exists():
        raise ConfigError(f"DIRECTORY {directory}: exists already; name a new one.", param="directory")
    from coserve.cli.stubs import adapters

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = adapters(opened)
        request = pb.DownloadAdapterRequest(name=name, version=version)
        with tempfile.TemporaryFile() as archive:
            for piece in stub.DownloadAdapter(request, metadata=metadata(api_key)):
                archive.write(piece.data)
            archive.seek(0)
            with tarfile.open(fileobj=archive) as tar:
                tar.extractall(folder, filter="data")
    print(f"{name} written to {folder}")


@app.command("alias")
def alias(
    name: Annotated[str, typer.Argument(metavar="[ALIAS]", help="The alias; none lists them all.")] = "",
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="What it is to mean: the base, NAME or NAME@VERSION.")
    ] = "",
    delete: Annotated[bool, typer.Option("--delete", help="Forget the alias.")] = False,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Point an alias at a model, delete it, or list all of them."""
    if delete == bool(model) and (name or delete):
        raise ConfigError("alias: give ALIAS and MODEL, or ALIAS and --delete.", param="model")
    if delete:
        _call("DeleteAlias", grpc_address, api_key, ca_cert, client_cert, alias=name)
        print(f"{name} deleted")
    elif name:
        made = _call("SetAlias", grpc_address, api_key, ca_cert, client_cert, alias=name, model=model)
        print(f"{made.alias} means {made.model}")
    else:
        answer = _call("ListAliases", grpc_address, api_key, ca_cert, client_cert)
        print_table(("ALIAS", "MODEL"), [(found.alias, found.model) for found in answer.aliases])


def _upload_messages(request: Any, name: str, folder: Path, pinned: bool) -> Iterator[Any]:
    """The archive is made twice, to be hashed first, and never in memory."""
    from coserve.server.application.archives import tar_chunks

    digest = hashlib.sha256()
    for chunk in tar_chunks(folder):
        digest.update(chunk)
    yield request(info={"name": name, "pinned": pinned, "sha256": digest.hexdigest()})
    for chunk in tar_chunks(folder):
        for start in range(0, len(chunk), CHUNK_BYTES):
            yield request(data=chunk[start : start + CHUNK_BYTES])


def _call(method: str, address: str, api_key: str, ca_cert: str, client_cert: str, **fields: Any) -> Any:
    from coserve.cli.stubs import adapters

    with channel(address, ca_cert, client_cert) as opened:
        pb, stub = adapters(opened)
        return getattr(stub, method)(getattr(pb, f"{method}Request")(**fields), metadata=metadata(api_key))


def _row(adapter: Any) -> tuple[str, ...]:
    tier = f"{adapter.tier}, pinned" if adapter.pinned else adapter.tier
    name, version, rank = adapter.name, str(adapter.version), str(adapter.rank)
    return name, version, rank, adapter.status, tier, adapter.digest[:12]


def _print(adapter: Any) -> None:
    print(f"{adapter.name}@{adapter.version} rank {adapter.rank} {adapter.status}")
