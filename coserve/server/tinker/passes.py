"""Reading what a pass is asked for: data as JSON or protobuf, and the loss with its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from coserve.errors import InvalidRequest
from coserve.server.fields import Fields, shown
from coserve.server.grpc_gen import tinker_pb2 as pb
from coserve.training.model_calls import LOSSES, POLICY_LOSSES, Datum, LossSettings, Pass

MAX_DATA = 1024  # of one request; the client cuts at as many
MAX_WIDTH = 256  # targets of a token
_CLIPPED = ("clip_low_threshold", "clip_high_threshold")
_SETTINGS: dict[str, tuple[str, ...]] = {"ppo": _CLIPPED, "cispo": _CLIPPED, "dro": ("beta",)}
_BOUNDS = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}
_DRO_BETA = 0.05
_INPUT = frozenset({"data", "loss_fn", "loss_fn_config"})
_DATUM = frozenset({"model_input", "loss_fn_inputs", "model_input_spans", "loss_fn_input_spans"})
_TENSOR = frozenset({"data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"})
_DTYPES = {"float32": "<f4", "int64": "<i8"}
_PB_DTYPES = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_INT64: "<i8", pb.DTYPE_INT32: "<i4"}


class Limits(NamedTuple):
    """Of the model: ids below `vocab_size`, at most `max_length` tokens a sequence."""

    vocab_size: int
    max_length: int


class RawTensor(NamedTuple):
    """Values as they came, their shape, and the row pointers and columns of sparse ones."""

    values: np.ndarray
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


class RawDatum(NamedTuple):
    """Token ids, and the arrays that the loss reads, by name."""

    tokens: np.ndarray
    inputs: dict[str, RawTensor]


def pass_from_json(fields: Fields, backward: bool, limits: Limits) -> Pass:
    """The call of a `forward_backward_input` or `forward_input`. InvalidRequest naming the field."""
    fields.only(_INPUT, "the pass's input")
    loss = read_loss(fields.required_string("loss_fn"), fields.raw("loss_fn_config") or {})
    items = fields.array("data")
    if items is None:
        raise fields.fail("data", "is required.")
    raw = (_datum_from_json(Fields(item, f"data[{n}].")) for n, item in enumerate(items))
    return Pass(data=_checked(raw, len(items), loss, limits), loss=loss, backward=backward)


def parse_protobuf(body: bytes) -> pb.ForwardBackwardRequest:
    """The message; InvalidRequest where it is none."""
    try:
        return pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest("The body is not a ForwardBackwardRequest.", code="invalid_protobuf") from None


def pass_from_protobuf(message: pb.ForwardBackwardRequest, limits: Limits) -> Pass:
    """The call that a request asks for. InvalidRequest naming the field."""
    config: dict[str, Any] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    loss = read_loss(message.loss_fn, config)
    raw = (_datum_from_protobuf(f"data[{n}].", datum) for n, datum in enumerate(message.data))
    data = _checked(raw, len(message.data), loss, limits)
    return Pass(data=data, loss=loss, backward=not message.forward_only)


def read_loss(name: str, config: object) -> LossSettings:
    """A loss by its name, with its settings."""
    if name not in LOSSES:
        raise InvalidRequest(
            f"loss_fn must be one of {', '.join(LOSSES)}; not {shown(name)}.", param="loss_fn"
        )
    if not isinstance(config, Mapping):
        raise InvalidRequest("loss_fn_config must be a JSON object.", param="loss_fn_config")
    fields = Fields(config, "loss_fn_config.")
    fields.only(frozenset(_SETTINGS.get(name, ())), f"the settings of {name}")
    low, high = _BOUNDS.get(name, (0.8, 1.2))
    low = fields.number("clip_low_threshold", low, 0.0) or 0.0
    high = fields.number("clip_high_threshold", high, 0.0) or 0.0
    if high < low:
        raise fields.fail("clip_high_threshold", f"must be at least the low one ({low:g}), not {high:g}.")
    beta = fields.number("beta", _DRO_BETA, 0.0) or 0.0
    return LossSettings(name=name, clip_low=low, clip_high=high, beta=beta)


def model_input_from_json(fields: Fields, name: str) -> list[int]:
    """The tokens of a ModelInput; chunks of another kind than text are refused."""
    given = fields.object(name)
    if given is None:
        raise fields.fail(name, "is required.")
    given.only(frozenset({"chunks"}), "a model input")
    tokens: list[int] = []
    for number, item in enumerate(given.array("chunks") or ()):
        chunk = Fields(item, f"{given.path}chunks[{number}].")
        if (chunk.string("type", "encoded_text") or "") != "encoded_text":
            raise chunk.fail("type", "must be encoded_text: this server's models read text only.")
        chunk.only(frozenset({"type", "tokens"}), "a chunk of text")
        tokens += chunk.integers("tokens") or []
    return tokens


def _datum_from_json(fields: Fields) -> RawDatum:
    fields.only(_DATUM, "a datum")
    tokens = model_input_from_json(fields, "model_input")
    given = fields.object("loss_fn_inputs") or Fields({})
    inputs = {}
    for name in given.body:
        tensor = given.object(name)
        if tensor is None:
            continue
        tensor.only(_TENSOR, "a tensor")
        dtype = _DTYPES[tensor.choice("dtype", tuple(_DTYPES)) or "float32"]
        try:
            with np.errstate(over="ignore"):  # what becomes infinite is refused as that
                values = np.asarray(tensor.array("data") or [], dtype=dtype)
        except (ValueError, TypeError, OverflowError):
            raise tensor.fail("data", "must be a flat array of numbers.") from None
        shape = tensor.integers("shape")
        inputs[name] = RawTensor(
            values.reshape(-1),
            tuple(shape) if shape is not None else values.shape,
            _indices(tensor, "sparse_crow_indices"),
            _indices(tensor, "sparse_col_indices"),
        )
    return RawDatum(_token_array(tokens, fields.path), inputs)


def _indices(tensor: Fields, name: str) -> np.ndarray | None:
    indices = tensor.integers(name)
    if indices is None:
        return None
    if any(not 0 <= index < 2**31 for index in indices):
        raise tensor.fail(name, "has an index that is none.")
    return np.asarray(indices, dtype=np.int64)


def _token_array(tokens: list[int], path: str) -> np.ndarray:
    try:
        return np.asarray(tokens, dtype=np.int64)
    except OverflowError:
        raise InvalidRequest(
            f"{path}model_input has a token id outside the vocabulary.", param=path + "model_input"
        ) from None


def _datum_from_protobuf(path: str, message: pb.Datum) -> RawDatum:
    parts = []
    for chunk in message.model_input:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise InvalidRequest(
                f"{path}model_input must hold text only: this server's models read nothing else.",
                param=path + "model_input",
            )
        parts.append(_array(chunk.encoded_text.tokens, "<i4", path + "model_input"))
    inputs = {}
    for name, tensor in message.loss_fn_inputs.items():
        field = f"{path}loss_fn_inputs.{name}"
        if tensor.dtype not in _PB_DTYPES:
            raise InvalidRequest(f"{field} must be float32 or int64.", param=field)
        dtype, shape = _PB_DTYPES[tensor.dtype], tuple(tensor.shape)
        if tensor.WhichOneof("encoding") == "sparse_csr":
            csr = tensor.sparse_csr
            indices = (_array(part, "<i8", field) for part in (csr.crow_indices, csr.col_indices))
            inputs[name] = RawTensor(_array(csr.values, dtype, field), shape, *indices)
        else:
            values = _array(tensor.dense, dtype, field)
            inputs[name] = RawTensor(values, shape or values.shape)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return RawDatum(tokens.astype(np.int64), inputs)


def _array(data: bytes, dtype: str, field: str) -> np.ndarray:
    try:
        return np.frombuffer(data, dtype=dtype)
    except ValueError:
        raise InvalidRequest(f"{field} has {len(data)} bytes, no whole numbers.", param=field) from None


def _checked(data: Iterator[RawDatum], count: int, loss: LossSettings, limits: Limits) -> list[Datum]:
    if not 1 <= count <= MAX_DATA:
        raise InvalidRequest(f"data must hold 1 to {MAX_DATA} items, not {count}.", param="data")
    return [_datum(f"data[{number}].", raw, loss, limits) for number, raw in enumerate(data)]


def _datum(path: str, raw: RawDatum, loss: LossSettings, limits: Limits) -> Datum:
    length, field = len(raw.tokens), path + "model_input"
    if not 1 <= length <= limits.max_length:
        raise InvalidRequest(f"{field} must have 1 to {limits.max_length} tokens, not {length}.", param=field)
    _check_ids(raw.tokens, field, limits)
    by_policy = loss.name in POLICY_LOSSES
    wanted = ("target_tokens", "logprobs", "advantages") if by_policy else ("target_tokens", "weights")
    inputs = f"{path}loss_fn_inputs."
    for name in raw.inputs:
        if name not in wanted:
            raise InvalidRequest(
                f"{inputs}{name} is not read by {loss.name}, which takes {', '.join(wanted)}.",
                param=inputs + name,
                code="unknown_field",
            )
    most = 1 if by_policy else MAX_WIDTH
    arrays = [_input(inputs + name, raw.inputs.get(name), length, most) for name in wanted]
    width = arrays[0].shape[1]
    if arrays[-1].shape[1] != width:
        raise InvalidRequest(
            f"{inputs}weights must have the shape of target_tokens, {arrays[0].shape}, not "
            f"{arrays[-1].shape}.",
            param=inputs + "weights",
        )
    _check_ids(arrays[0], inputs + "target_tokens", limits)
    for name, values in zip(wanted[1:], arrays[1:], strict=True):
        if not np.isfinite(values).all():
            raise InvalidRequest(f"{inputs}{name} must be finite.", param=inputs + name)
    return Datum(
        raw.tokens.astype("<i4").tobytes(),
        arrays[0].astype("<i4").tobytes(),
        arrays[-1].astype("<f4").tobytes(),
        arrays[1].astype("<f4").tobytes() if by_policy else b"",
        width,
    )


def _input(field: str, given: RawTensor | None, length: int, most: int) -> np.ndarray:
    """[N, K] of the values for N tokens, K up to `most`; what a sparse tensor leaves out is 0."""
    if given is None:
        raise InvalidRequest(f"{field} is required.", param=field, code="missing_required_parameter")
    shape = given.shape if len(given.shape) == 2 else (*given.shape, 1)
    if len(shape) != 2 or shape[0] != length or not 1 <= shape[1] <= most:
        several = f", or ({length}, K) with K up to {most}" if most > 1 else ""
        raise InvalidRequest(
            f"{field} must have the shape ({length},){several}, one row for each token of model_input; not "
            f"{given.shape}.",
            param=field,
        )
    if given.rows is not None or given.columns is not None:
        return _dense(field, given, shape)
    if given.values.size != length * shape[1]:
        raise InvalidRequest(
            f"{field} has {given.values.size} values, its shape wants {length * shape[1]}.", param=field
        )
    return given.values.reshape(shape)


def _dense(field: str, given: RawTensor, shape: tuple[int, int]) -> np.ndarray:
    """A sparse tensor (compressed rows) with zeros in all other places."""
    rows, columns, values = given.rows, given.columns, given.values
    whole = (
        rows is not None
        and columns is not None
        and len(rows) == shape[0] + 1
        and len(columns) == len(values)
        and rows[0] == 0
        and rows[-1] == len(values)
        and bool((np.diff(rows) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not whole or rows is None or columns is None:
        raise InvalidRequest(f"{field} is sparse, and its indices don't fit its shape.", param=field)
    dense = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def _check_ids(ids: np.ndarray, field: str, limits: Limits) -> None:
    ids = ids.reshape(-1)
    wrong = np.flatnonzero((ids < 0) | (ids >= limits.vocab_size) | (ids != np.floor(ids)))
    if len(wrong):
        found = ids[wrong[0]]
        text = str(int(found)) if math.isfinite(found) else str(found)
        raise InvalidRequest(
            f"{field} has the token id {text}, outside the vocabulary of {limits.vocab_size}.", param=field
        )
