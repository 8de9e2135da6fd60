"""The topology of a network file: its records, and reading them from JSON that anyone may have written."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMAT, VERSION = "tracetorch network", 1
MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 100
MAX_USES = 100_000  # modules, each counted as often as it is used: a few shared ones can nest to 2**100 paths
MAX_DIMS = 32
JSON_MEMBER = "network.json"


class FileError(ValueError):
    """A network that cannot be saved, or a file that is not a network; says what is wrong, where, and what to do."""


class StoredDtype(NamedTuple):
    """How the elements of a tensor are stored: `descr` in the `.npy` header, `carrier` torch's name for those bits."""

    name: str
    torch: torch.dtype
    descr: str
    carrier: torch.dtype


DTYPES: Mapping[str, StoredDtype] = MappingProxyType(
    {
        row.name: row
        for row in (
            StoredDtype("float32", torch.float32, "<f4", torch.float32),
            StoredDtype("float64", torch.float64, "<f8", torch.float64),
            StoredDtype("float16", torch.float16, "<f2", torch.float16),
            StoredDtype("bfloat16", torch.bfloat16, "<u2", torch.uint16),  # numpy has no bfloat16
            StoredDtype("int8", torch.int8, "|i1", torch.int8),
            StoredDtype("int16", torch.int16, "<i2", torch.int16),
            StoredDtype("int32", torch.int32, "<i4", torch.int32),
            StoredDtype("int64", torch.int64, "<i8", torch.int64),
            StoredDtype("uint8", torch.uint8, "|u1", torch.uint8),
            StoredDtype("bool", torch.bool, "|b1", torch.bool),
        )
    }
)


class TensorRecord(NamedTuple):
    """One tensor of the file: what its array must be, and what is made of it."""

    stored: StoredDtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    parameter: bool
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, stored: StoredDtype) -> TensorRecord:
        """The record of a dense tensor; strides that leave gaps or overlap become contiguous ones."""
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        strides = strides if _is_dense(shape, strides) else _contiguous(shape)
        return cls(stored, shape, strides, isinstance(tensor, torch.nn.Parameter), tensor.requires_grad)

    @property
    def header(self) -> bytes:
        """The first bytes of its `.npy` member: format version 1.0, C order, padded to a multiple of 64 bytes."""
        text = f"{{'descr': '{self.stored.descr}', 'fortran_order': False, 'shape': {self.shape}, }}"
        padded = text + " " * (-(len(text) + 11) % 64) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("ascii")

    @property
    def size(self) -> int:
        """Bytes of the whole member."""
        return len(self.header) + math.prod(self.shape) * np.dtype(self.stored.descr).itemsize

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "dtype": self.stored.name,
            "shape": self.shape,
            "strides": None if self.strides == _contiguous(self.shape) else self.strides,
            "parameter": self.parameter,
            "requires_grad": self.requires_grad,
        }


class ModuleRecord(NamedTuple):
    """One module: tensors and children by number. `tensors` has `null` where a module has none of that name."""

    name: str
    arguments: Mapping[str, Any]
    training: bool
    tensors: Mapping[str, int | None]
    children: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = self._asdict()
        return {"class": data.pop("name"), **data}


class Plan(NamedTuple):
    """A checked topology: children have lower numbers than their parents, the network is the last module."""

    modules: Sequence[ModuleRecord]
    tensors: Sequence[TensorRecord]

    def to_json(self) -> bytes:
        """One JSON object; `parse` gives an equal plan. Raises `FileError` if it holds something that JSON has not."""
        modules, tensors = [m.to_dict() for m in self.modules], [t.to_dict() for t in self.tensors]
        data = {"format": FORMAT, "version": VERSION, "modules": modules, "tensors": tensors}
        try:
            return json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")
        except (TypeError, ValueError) as error:
            raise FileError(f"the network holds a value that JSON has not: {error}") from error


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a block of memory, each in a place of its own."""
    expected = 1
    for stride, n in sorted((stride, n) for stride, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= n
    return math.prod(shape) > 0 and all(0 <= stride <= math.prod(shape) for stride in strides)


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse(text: bytes, known: Container[str]) -> Plan:
    """The topology of JSON text, checked as far as this is possible without building the modules.

    Args:
        text: at most `MAX_JSON_BYTES`.
        known: the class names that a file may hold.

    Raises:
        FileError: anything else than a topology of this version; names the module or tensor and the field.
    """
    if len(text) > MAX_JSON_BYTES:
        raise FileError(f"{JSON_MEMBER} would have {len(text)} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        data = json.loads(
            text.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_number,
            object_pairs_hook=_object,
        )
    except (FileError, RecursionError, ValueError) as error:
        raise FileError(f"{JSON_MEMBER} is not JSON that can be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f'{JSON_MEMBER} does not say "format": "{FORMAT}": not a network saved with tt.save')
    version = data.get("version")
    if type(version) is int and version > VERSION:
        raise FileError(f"format version {version}; this traceTorch reads up to {VERSION}: upgrade it")
    if type(version) is not int or version != VERSION:
        raise FileError(f"format version {version!r:.100}; known: {VERSION}")
    check_fields(data, JSON_MEMBER, {"format": str, "version": int, "modules": list, "tensors": list})
    tensors = [_parse_tensor(entry, f"tensor {i}") for i, entry in enumerate(data["tensors"])]
    modules = [_parse_module(entry, i, len(tensors), known) for i, entry in enumerate(data["modules"])]
    _check_graph(modules, len(tensors))
    return Plan(modules, tensors)


def _refuse_constant(text: str) -> Any:
    raise FileError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > 18:
        raise FileError(f"the integer {text:.40} has more than 18 characters")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise FileError(f"the number {text:.40} is not finite")
    return float(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise FileError(f"an object names a field twice: {[key for key, _ in pairs]!r:.200}")
    return data


def check_fields(data: object, where: str, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """`data` as an object with exactly these fields of exactly these types (a bool is no int)."""
    if not isinstance(data, dict):
        raise FileError(f"{where} must be an object, not {data!r:.100}")
    if set(data) != set(types):
        missing, unknown = sorted(set(types) - set(data)), sorted(set(data) - set(types))
        raise FileError(f"{where}: fields missing: {missing}; unknown: {unknown!r:.200}")
    for name, allowed in types.items():
        if type(data[name]) not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            raise FileError(f"{where}: {name}={data[name]!r:.100} is of the wrong type")
    return data


def _parse_tensor(entry: object, where: str) -> TensorRecord:
    types: Mapping[str, Any] = {
        "dtype": str,
        "shape": list,
        "strides": (list, type(None)),
        "parameter": bool,
        "requires_grad": bool,
    }
    data = check_fields(entry, where, types)
    if data["dtype"] not in DTYPES:
        raise FileError(f"{where}: dtype={data['dtype']!r:.100} is not known; known: {', '.join(DTYPES)}")
    stored, shape = DTYPES[data["dtype"]], tuple(data["shape"])
    sizes = all(type(n) is int and n >= 0 for n in shape)
    if not sizes or len(shape) > MAX_DIMS or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise FileError(f"{where}: shape={data['shape']!r:.200} is no shape of a tensor")
    strides = _contiguous(shape) if data["strides"] is None else tuple(data["strides"])
    if data["strides"] is not None:
        integers = len(strides) == len(shape) and all(type(n) is int for n in strides)
        if not integers or not _is_dense(shape, strides):
            raise FileError(f"{where}: strides={data['strides']!r:.200} do not fill the shape {list(shape)}")
    if data["requires_grad"] and not stored.torch.is_floating_point:
        raise FileError(f"{where}: requires_grad=true needs a floating point dtype, not {data['dtype']}")
    return TensorRecord(stored, shape, strides, data["parameter"], data["requires_grad"])


def _parse_module(entry: object, i: int, num_tensors: int, known: Container[str]) -> ModuleRecord:
    where = f"module {i}"
    types = {"class": str, "arguments": dict, "training": bool, "tensors": dict, "children": list}
    data = check_fields(entry, where, types)
    if data["class"] not in known:
        raise FileError(f"{where}: class {data['class']!r:.200} is not one that a network file may hold")
    for name, n in data["tensors"].items():
        if n is not None and (type(n) is not int or not 0 <= n < num_tensors):
            raise FileError(f"{where}: {name!r:.100} is the tensor {n!r:.100}; there are {num_tensors}")
    for child in data["children"]:
        if not isinstance(child, list) or [type(part) for part in child] != [str, int]:
            raise FileError(f"{where}: {child!r:.200} is not a child, [name, number of the module]")
        if not 0 <= child[1] < i:
            raise FileError(f"{where}: the child {child[0]!r:.100} is module {child[1]}; children come before parents")
    children = tuple((name, n) for name, n in data["children"])
    names = [name for name, _ in children]
    if len(set(names)) != len(names):
        raise FileError(f"{where}: two children have one name: {names!r:.200}")
    return ModuleRecord(data["class"], data["arguments"], data["training"], data["tensors"], children)


def _check_graph(modules: Sequence[ModuleRecord], num_tensors: int) -> None:
    """Everything is used, and not nested or repeated without end. (Numbers that only fall admit no cycle.)"""
    if not modules:
        raise FileError("there is no module")
    used = {n for module in modules for _, n in module.children} | {len(modules) - 1}
    if len(used) != len(modules):
        raise FileError(f"modules {sorted(set(range(len(modules))) - used)[:5]} belong to no network")
    used = {n for module in modules for n in module.tensors.values() if n is not None}
    if len(used) != num_tensors:
        raise FileError(f"tensors {sorted(set(range(num_tensors)) - used)[:5]} belong to no module")
    depths: list[int] = []
    uses: list[int] = []
    for i, module in enumerate(modules):
        depths.append(1 + max((depths[n] for _, n in module.children), default=0))
        uses.append(1 + sum(uses[n] for _, n in module.children))
        if depths[i] > MAX_DEPTH or uses[i] > MAX_USES:
            raise FileError(f"nested more than {MAX_DEPTH} deep, or more than {MAX_USES} modules in all (module {i})")
