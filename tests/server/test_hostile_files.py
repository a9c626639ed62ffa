"""Archives, paths, forms and tensor files made to harm: each is refused by name and leaves nothing behind."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coserve.errors import CoserveError, InvalidRequest, PayloadTooLarge
from coserve.lora.peft_files import CONFIG_FILE, TENSOR_FILE
from coserve.lora.safetensors_header import BadSafetensors, read_header
from coserve.server.application import adapter_files
from coserve.server.application.adapter_files import allowed_directory, fetch
from coserve.server.application.archives import extract
from tests.server.fake_engine import write_peft
from tests.server.running import ServerThread

LIMIT = 2**20
ROOT = Path(__file__).parents[2]


def tar_of(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED, mode: int = 0) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", how) as bundle:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, how
            bundle.writestr(info, data)
    return packed.getvalue()


def long_header(kind: bytes, size: int) -> bytes:
    """A tar member whose name (or attributes) would be read into memory whole."""
    info = member("x", kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + b"1" * min(size, 4 * LIMIT)


def sparse() -> bytes:
    info = member(TENSOR_FILE)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    data = b"1\n0\n1\n".ljust(512, b"\0") + b"x" * 512
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def wide_directory() -> bytes:
    """A zip that says of its directory that it has 3 GB."""
    packed = zip_of({CONFIG_FILE: b"{}"})
    end = packed.rindex(b"PK\5\6")
    return packed[: end + 12] + struct.pack("<L", 3 * 2**30) + packed[end + 16 :]


SMALL = {CONFIG_FILE: b"{}", TENSOR_FILE: b"x"}
BOMB = bytes(20 * LIMIT)
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "noise": lambda: b"\x00\xff" * 5000,
    "cut gzip": lambda: gzip.compress(tar_of((member(CONFIG_FILE), b"{}")))[:-9],
    "cut zip": lambda: zip_of(SMALL)[:-5],
    "up": lambda: tar_of((member(f"../{CONFIG_FILE}"), b"{}")),
    "up inside": lambda: tar_of((member(f"a/../../{CONFIG_FILE}"), b"{}")),
    "absolute": lambda: tar_of((member(f"/tmp/{CONFIG_FILE}"), b"{}")),
    "backslash": lambda: tar_of((member(f"..\\{CONFIG_FILE}"), b"{}")),
    "zip up": lambda: zip_of({f"../{TENSOR_FILE}": b"x", **SMALL}),
    "zip absolute": lambda: zip_of({f"/etc/{TENSOR_FILE}": b"x", **SMALL}),
    "zip link": lambda: zip_of(SMALL, mode=0o120777),
    "zip lzma": lambda: zip_of(SMALL, zipfile.ZIP_LZMA),
    "zip bzip2": lambda: zip_of({**SMALL, TENSOR_FILE: BOMB}, zipfile.ZIP_BZIP2),
    "zip directory": wide_directory,
    "symlink": lambda: tar_of((member(TENSOR_FILE, tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "hard link": lambda: tar_of((member(TENSOR_FILE, tarfile.LNKTYPE, "/etc/passwd"), b"")),
    "device": lambda: tar_of((member("null", tarfile.CHRTYPE), b"")),
    "pipe": lambda: tar_of((member(CONFIG_FILE, tarfile.FIFOTYPE), b"")),
    "sparse": sparse,
    "long name": lambda: long_header(tarfile.GNUTYPE_LONGNAME, 3 * 2**30),
    "long link": lambda: long_header(tarfile.GNUTYPE_LONGLINK, LIMIT),
    "long attributes": lambda: long_header(tarfile.XHDTYPE, 3 * 2**30),
    "attributes of all": lambda: long_header(tarfile.XGLTYPE, LIMIT),
    "attributes for ever": lambda: long_header(tarfile.XHDTYPE, 0)[:512] * 5000,
    "twice": lambda: tar_of((member(CONFIG_FILE), b"{}"), (member(f"a/{CONFIG_FILE}"), b"{}")),
    "deep": lambda: tar_of((member(f"a/b/{CONFIG_FILE}"), b"{}")),
    "many": lambda: tar_of(*((member(f"m{n}"), b"") for n in range(1500))),
    "pickle": lambda: tar_of((member(CONFIG_FILE), b"{}"), (member("adapter_model.bin"), pickle.dumps(1))),
    "xz": lambda: tar_of((member(CONFIG_FILE), b"{}"), mode="w:xz"),
    "bomb": lambda: gzip.compress(tar_of((member(TENSOR_FILE), BOMB))),
    "bomb beside": lambda: gzip.compress(tar_of((member("other"), BOMB), (member(CONFIG_FILE), b"{}"))),
    "zip bomb": lambda: zip_of({**SMALL, TENSOR_FILE: BOMB}),
}
TOO_LARGE = {"bomb", "bomb beside", "zip bomb"}


@pytest.mark.parametrize("name", list(ARCHIVES))
def test_archives(tmp_path: Path, name: str) -> None:
    archive, target = tmp_path / "a", tmp_path / "in" / "target"
    archive.write_bytes(ARCHIVES[name]())
    with pytest.raises(CoserveError) as refusal:
        extract(archive, target, LIMIT)
    assert isinstance(refusal.value, PayloadTooLarge if name in TOO_LARGE else InvalidRequest), refusal.value
    assert str(tmp_path) not in refusal.value.message
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]
    assert all(path.parent == target and not path.is_symlink() for path in written)
    assert sum(path.stat().st_size for path in written) <= LIMIT


@pytest.mark.parametrize("kind", ["zip", "stored zip", "w", "w:gz"])
def test_plain_archives_come_in(tmp_path: Path, kind: str) -> None:
    files = {**SMALL, "README.md": b"hello", TENSOR_FILE: os.urandom(LIMIT // 2)}
    if "zip" in kind:
        packed = zip_of(files, zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED)
    else:
        packed = tar_of(*((member(f"a/{name}"), data) for name, data in files.items()), mode=kind)
    (tmp_path / "a").write_bytes(packed)
    extract(tmp_path / "a", tmp_path / "target", LIMIT)
    assert (tmp_path / "target" / TENSOR_FILE).read_bytes() == files[TENSOR_FILE]


# ---------------------------------------------------------------------- paths


@pytest.fixture
def room(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(an allowed root, a secret beside it)."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    write_peft(root / "good")
    write_peft(secret / "adapter")
    (secret / "README.md").write_text("sentinel-secret")
    yield root, secret


@pytest.mark.parametrize(
    "path",
    [
        "{secret}/adapter", "{root}/../secret/adapter", "{root}/good/../../secret/adapter", "{root}-other",
        "{root}/out", "{root}/out/adapter", "/", "", ".", "~root", "{root}\x00/good", "{root}/loop", "\udcff",
        "http://127.0.0.1/x", "file://{root}/good", "{upper}", "x" * 5000,
    ],
)  # fmt: skip
def test_paths_outside_of_the_roots(room: tuple[Path, Path], path: str) -> None:
    root, secret = room
    (root / "out").symlink_to(secret)
    (root / "loop").symlink_to(root / "loop")
    given = path.format(root=root, secret=secret, upper=str(root).upper() + "/good")
    with pytest.raises(CoserveError) as refusal:
        allowed_directory(given, [root.resolve()])
    assert str(secret) not in refusal.value.message


def test_links_inside_of_a_root_are_followed(room: tuple[Path, Path], tmp_path: Path) -> None:
    """A downloaded model is links to its files; they only must not lead out."""
    root, _ = room
    blobs = root / "blobs"
    blobs.mkdir()
    for file in (root / "good").iterdir():
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    source = allowed_directory(f"{root}/good", [root.resolve()])
    fetch(source, tmp_path / "t", (CONFIG_FILE, TENSOR_FILE), [root.resolve()], 2**30)
    assert (tmp_path / "t" / TENSOR_FILE).stat().st_size > 0


@pytest.mark.parametrize("kind", ["link", "hard", "directory", "pipe", "large"])
def test_files_that_are_not_plain_ones_under_the_root(
    room: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    root, secret = room
    place = root / "good" / "README.md"
    if kind == "link":
        place.symlink_to(secret / "README.md")
    elif kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.write_bytes(b"x" * 2000)
    names, limit = (CONFIG_FILE, TENSOR_FILE, "README.md"), 1000 if kind == "large" else 2**30
    if kind == "hard":  # a name of a file like any other
        fetch(root / "good", tmp_path / "t", names, [root.resolve()], limit)
        return
    with pytest.raises(CoserveError):
        fetch(root / "good", tmp_path / "t", names, [root.resolve()], limit)
    assert not (tmp_path / "t" / "README.md").exists()


def test_a_link_put_in_place_after_the_path_was_judged(
    room: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened counts: a swap between the check and the opening gains nothing."""
    root, secret = room
    source = allowed_directory(f"{root}/good", [root.resolve()])
    real_open = os.open

    def swap(path: Any, *rest: Any) -> int:
        if (root / "good").is_dir() and not (root / "good").is_symlink():
            (root / "good").rename(root / "was")
            (root / "good").symlink_to(secret / "adapter")
        return real_open(path, *rest)

    monkeypatch.setattr(adapter_files.os, "open", swap)
    with pytest.raises(InvalidRequest, match="not under an --adapter-root"):
        fetch(source, tmp_path / "t", (CONFIG_FILE, TENSOR_FILE), [root.resolve()], 2**30)
    assert not any((tmp_path / "t").iterdir())


def test_a_link_in_a_root_is_not_served(server: ServerThread, http: httpx.Client, adapter_root: Path) -> None:
    """Whoever may write to a root and load adapters would else read any file of the server's through it."""
    secret = adapter_root.parent / "secret.txt"
    secret.write_text("sentinel-secret")
    folder = write_peft(adapter_root / "linked")
    (folder / "README.md").symlink_to(secret)
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": "linked", "lora_path": str(folder)})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "path_not_allowed"
    assert "secret" not in answer.text and http.get("/v1/models/linked").status_code == 404
    state = server.server.context.files.folder.parent
    assert not [path.name for path in state.iterdir() if path.name.endswith(".tmp")]


# ---------------------------------------------------------------------- settings

FOREVER = (
    "([a-z0-9._]+)+!"  # Python's re tries 2^30 ways on a module's path, the other threads standing still
)
SLOW = r"(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(?!)"  # nobody has a quick way
EXPRESSIONS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": FOREVER}, "match no linear layer"),
    ({"rank_pattern": {FOREVER: 4}}, "matches none"),
    ({"target_modules": SLOW}, "too long to match"),
    ({"exclude_modules": SLOW}, "too long to match"),
    ({"rank_pattern": {SLOW: 4}}, "too long to match"),
    ({"alpha_pattern": {SLOW: 4}}, "too long to match"),
    ({"target_modules": "("}, "regular expression"),
    ({"rank_pattern": {"(": 4}}, "regular expression"),
]


@pytest.mark.parametrize("place", range(len(EXPRESSIONS)))
def test_expressions_that_never_end(http: httpx.Client, adapter_root: Path, place: int) -> None:
    changed, said = EXPRESSIONS[place]
    name = f"regex-{place}"
    folder = write_peft(adapter_root / name)
    settings = json.loads((folder / CONFIG_FILE).read_text()) | changed
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
    assert answer.status_code == 400 and said in answer.text, answer.text


def test_nor_in_a_jobs_settings(http: httpx.Client) -> None:
    for lora in ({"target_modules": SLOW}, {"target_modules": [SLOW]}, {"rank_pattern": {SLOW: 4}}):
        answer = http.post("/v1/fine_tuning/jobs", json={"training_file": "file-none", "lora": lora})
        assert answer.status_code in (400, 404), answer.text


# ---------------------------------------------------------------------- tensors, pickle


def entry(**changed: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}}


@pytest.mark.parametrize(
    "header",
    [
        entry(shape=[10**4000] * 50), entry(shape=[1e400]), entry(shape=[1.0]), entry(shape=[-1]),
        entry(shape=[1] * 1000), entry(shape="1"), entry(shape={"1": 1}), entry(shape=[True]),
        entry(data_offsets=[0, 10**4000]), entry(data_offsets=["0", "4"]), entry(data_offsets=[0, 1e400]),
        entry(data_offsets=[0]), entry(dtype=[]), entry(dtype="F99"), {"t": 3}, {"t": None}, [], 5,
    ],
)  # fmt: skip
def test_hostile_headers_of_tensor_files(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(BadSafetensors):
        read_header(path)
    for length in (2**63, 2**64 - 1, 2**40):
        path.write_bytes(struct.pack("<Q", length) + text)
        with pytest.raises(BadSafetensors):
            read_header(path)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.place),))


def test_pickle_is_never_loaded(http: httpx.Client, adapter_root: Path, tmp_path: Path) -> None:
    """Under its own name, and under the name of a tensor file."""
    harm = pickle.dumps(Harm(tmp_path / "harm"))
    for name in ("adapter_model.bin", "adapter_model.pt", TENSOR_FILE):
        folder = write_peft(adapter_root / f"harm-{name}")
        (folder / TENSOR_FILE).unlink()
        (folder / name).write_bytes(harm)
        body = {"lora_name": "harm", "lora_path": str(folder)}
        answer = http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 400, answer.text
        assert name == TENSOR_FILE or "pickle files (.bin, .pt) are never loaded" in answer.text
    assert not (tmp_path / "harm").exists()
    pickle.loads(harm)
    assert (tmp_path / "harm").exists()  # it would have


LOADERS = re.compile(
    r"\b(pickle|cPickle|dill|joblib|shelve|marshal)\b|torch\.load|allow_pickle=True|yaml\.(unsafe_)?load\(|"
    r"(?<![\w.])(eval|exec)\("
)


def test_nothing_in_the_package_loads_pickles_or_runs_text() -> None:
    found = []
    for path in sorted((ROOT / "coserve").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom | ast.Call) and LOADERS.search(_head(node)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {_head(node)}")
    assert found == []


def _head(node: ast.AST) -> str:
    """What is imported, or called and with which switches."""
    if not isinstance(node, ast.Call):
        return ast.unparse(node)
    return f"{ast.unparse(node.func)}({','.join(map(ast.unparse, node.keywords))}"


# ---------------------------------------------------------------------- forms


def form(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    made = b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    return made + f"--{boundary}--\r\n".encode()


def field(name: str, data: bytes = b"x") -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', data


FILE = ('Content-Disposition: form-data; name="file"; filename="f"', b"data")
UP = (FILE[0].replace('"f"', '"../../x"'), b"data")
FORMS: dict[str, tuple[str, bytes, int]] = {
    "no boundary": ("multipart/form-data", form(FILE), 400),
    "long boundary": (f"multipart/form-data; boundary={'b' * 500}", form(FILE, boundary="b" * 500), 400),
    "same field": ("multipart/form-data; boundary=b", form(*[field("purpose")] * 5000, FILE), 400),
    "many fields": ("multipart/form-data; boundary=b", form(*[field(f"f{n}") for n in range(40)], FILE), 400),
    "two files": ("multipart/form-data; boundary=b", form(FILE, FILE), 400),
    "long header": ("multipart/form-data; boundary=b", form((f"x: {'y' * 20000}", b"")), 400),
    "many headers": ("multipart/form-data; boundary=b", form(("\r\n".join(["x: y"] * 5000), b"")), 400),
    "large field": ("multipart/form-data; boundary=b", form(field("purpose", b"x" * 2**21), FILE), 413),
    "no end": ("multipart/form-data; boundary=b", form(FILE)[:-9], 400),
    "noise": ("multipart/form-data; boundary=b", b"\x00" * 4096, 400),
    "empty": ("multipart/form-data; boundary=b", b"", 400),
    "nameless": ("multipart/form-data; boundary=b", form(("x: y", b"z")), 400),
    "up": ("multipart/form-data; boundary=b", form(UP, field("purpose", b"user_data")), 200),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("chunked", [False, True])
def test_forms(server: ServerThread, http: httpx.Client, name: str, chunked: bool) -> None:
    kind, body, status = FORMS[name]
    sent: Any = (body[place : place + 1000] for place in range(0, len(body), 1000)) if chunked else body
    answer = http.post("/v1/files", content=sent, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    if status != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    else:
        assert answer.json()["filename"] == "x"
    folder = server.server.context.files.folder
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
