"""`save` and `load`: a native network as one file, topology as JSON and tensors as `.npy`; nothing is pickled.

The format is described in docs/file-format.md. A file names classes, but names are only looked up in `CLASSES`.
Whatever `save` accepts, it has rebuilt and compared: the same code builds a module for `load` and for that comparison.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import struct
import zipfile
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.core.storable import CLASSES, NAMES, construct
from tracetorch.core.topology import (
    DTYPES,
    JSON_MEMBER,
    MAX_DEPTH,
    MAX_JSON_BYTES,
    FileError,
    ModuleRecord,
    Plan,
    TensorRecord,
    parse,
)
from tracetorch.functional.surrogates import Surrogate

__all__ = ["FileError", "load", "save"]

REMEDY = (
    'Convert a network of another framework first: adapters.convert(net, to="tracetorch"). For a class of your own, '
    "save net.state_dict() and build the network in code"
)
# What the zip reader of the standard library raises on damaged archives, by reading it and by fuzzing.
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, OverflowError, ValueError, struct.error)

# ---- saving ----------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], net: nn.Module) -> None:
    """Write a native network: topology, specs, weights, training flags, `requires_grad` and what is shared.

    Hidden states and gradients are not saved. Tensors of any device are written; `load` puts them on the CPU. The file
    appears whole or not at all, and equal networks give equal bytes.

    Args:
        path: the file to write; an existing one is replaced.
        net: `tt.Sequential`, `torch.nn.Sequential`, `tt.snn` layers and the torch layers of docs/file-format.md, in any
            nesting. Exactly these classes: a subclass may compute something else.

    Raises:
        FileError: something in `net` would be lost: a class, function, hook, parametrization, attribute or dtype that
            the format does not hold. Names the module and the remedy. Nothing is written.
        OSError: the file cannot be written. What was there before is untouched.
    """
    collector = _Collector()
    collector.visit(net, "", 0)
    text = collector.plan().to_json()
    _refuse_views(collector.tensors)
    plan = parse(text, CLASSES)  # what is written can be read
    target = os.fspath(path)
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write(file, text, plan, [tensor for tensor, _ in collector.tensors])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


class _Collector:
    """Walks a network once and records it; a module or tensor met again keeps its number."""

    def __init__(self) -> None:
        self.modules: list[ModuleRecord] = []
        self.tensors: list[tuple[Tensor, str]] = []
        self._module_numbers: dict[int, int] = {}
        self._tensor_numbers: dict[int, int] = {}

    def plan(self) -> Plan:
        return Plan(self.modules, [_tensor_record(tensor, where) for tensor, where in self.tensors])

    def visit(self, module: nn.Module | None, path: str, depth: int) -> int:
        where = f"module {path!r:.200}" if path else "the network"
        if id(module) in self._module_numbers:
            return self._module_numbers[id(module)]
        if depth >= MAX_DEPTH:
            raise FileError(f"{where}: nested more than {MAX_DEPTH} deep, or containing itself; flatten it")
        name = _storable_name(module, where)
        assert module is not None
        prefix = f"{path}." if path else ""
        children = tuple((n, self.visit(c, prefix + n, depth + 1)) for n, c in module._modules.items())
        tensors = {
            n: None if t is None else self._number(t, prefix + n, n in module._parameters)
            for n, t in (*module._parameters.items(), *module._buffers.items())
            if n not in module._non_persistent_buffers_set
        }
        try:
            record = ModuleRecord(name, CLASSES[name].arguments(module), module.training, tensors, children)
            given = {n: None if i is None else self.tensors[i][0] for n, i in tensors.items()}
            twin = construct(record, given, list(module._modules.items()))  # type: ignore[arg-type]
            _refuse_differences(module, twin)
        except FileError as error:
            raise FileError(f"{where} cannot be saved: {error}") from error.__cause__
        self.modules.append(record)
        self._module_numbers[id(module)] = len(self.modules) - 1
        return len(self.modules) - 1

    def _number(self, tensor: Tensor, path: str, parameter: bool) -> int:
        if id(tensor) not in self._tensor_numbers:
            if type(tensor) is not (nn.Parameter if parameter else Tensor):
                raise FileError(f"tensor {path!r} is a {_class_name(tensor)}, which cannot be saved. {REMEDY}")
            self._tensor_numbers[id(tensor)] = len(self.tensors)
            self.tensors.append((tensor, path))
        return self._tensor_numbers[id(tensor)]


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _storable_name(module: nn.Module | None, where: str) -> str:
    """The name of a module's class in the file, after refusing what the file could not hold."""
    if module is not None and torch.nn.utils.parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise FileError(
            f"{where} cannot be saved: {names} of it is parametrized, which would be lost; call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if module is None or type(module) not in NAMES:
        raise FileError(f"{where} is a {_class_name(module)}, which cannot be saved. {REMEDY}")
    hooks = [name for name, value in vars(module).items() if name.endswith("_hooks") and value]
    if hooks:
        raise FileError(f"{where} ({_class_name(module)}) has {', '.join(hooks)}, which would be lost; remove them")
    return NAMES[type(module)]


def _refuse_differences(module: nn.Module, twin: nn.Module) -> None:
    """Every attribute must have come back in a module built from the record alone (an own `forward` has not)."""
    # A compiled call and the remembered kind of a removed hook are no part of a network, nor is what a layer keeps for
    # its calls; the file holds the tensors.
    ignored = {"_modules", "_parameters", "_buffers", "_compiled_call_impl", "_is_full_backward_hook", "_choices"}
    ignored |= {"kernels", "scratch", "trail"}
    mine, theirs = vars(module), vars(twin)
    for name in sorted((set(mine) | set(theirs)) - ignored):
        if name not in mine or name not in theirs or not _same(mine[name], theirs[name]):
            raise FileError(
                f"its attribute {name!r} is not what the arguments of {_class_name(module)} make it, and would be "
                "lost; delete it, or set it back"
            )


def _same(a: object, b: object) -> bool:
    a, b = (value.item() if isinstance(value, np.generic) else value for value in (a, b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    plain = (bool, int, float, str, dict, set, slice, Surrogate)
    return a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)


def _tensor_record(tensor: Tensor, where: str) -> TensorRecord:
    refusal = None
    stored = next((row for row in DTYPES.values() if row.torch == tensor.dtype), None)
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        refusal = f"has the layout {tensor.layout} on {tensor.device}; make it dense, with values"
    elif not tensor.is_leaf:
        refusal = "hangs on a graph; detach it"
    elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        refusal = "has gradient hooks, which would be lost; remove them"
    if stored is None:
        refusal = f"is {tensor.dtype}; can be saved: {', '.join(DTYPES)}"
    if stored is None or refusal:
        raise FileError(f"tensor {where!r} {refusal}")
    return TensorRecord.of(tensor, stored)


def _refuse_views(tensors: Sequence[tuple[Tensor, str]]) -> None:
    """Two tensors over one memory would come back apart (one tensor used twice would not)."""
    spans = []
    for tensor, path in tensors:
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), path))
    spans.sort()
    for (device, _, end, path), (next_device, start, _, next_path) in itertools.pairwise(spans):
        if device == next_device and start < end:
            raise FileError(
                f"tensors {path!r} and {next_path!r} are two views of one memory, and would come back apart; make them "
                "one nn.Parameter, or clone one of them"
            )


def _write(file: IO[bytes], text: bytes, plan: Plan, tensors: Sequence[Tensor]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, JSON_MEMBER, text)
        for i, (record, tensor) in enumerate(zip(plan.tensors, tensors, strict=True)):
            values = tensor.detach().resolve_neg().cpu().contiguous().view(record.stored.carrier).numpy()
            values = values.astype(record.stored.descr, copy=False).reshape(-1)
            _write_member(archive, _member(i), record.header, values.view(np.uint8))


def _write_member(archive: zipfile.ZipFile, name: str, header: bytes, values: np.ndarray | None = None) -> None:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16  # the same bytes on every system
    info.file_size = len(header) + (0 if values is None else values.nbytes)
    with archive.open(info, "w") as member:
        member.write(header)
        if values is not None and values.size:
            member.write(values.data)


def _member(i: int) -> str:
    return f"tensor_{i}.npy"


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network that `save` wrote, on the CPU, its hidden states at their start. Made for files from anyone.

    Nothing named in the file is imported or executed, and no memory is taken that the file does not fill.

    Raises:
        FileError: the file is no network of this format, is damaged, or contradicts itself; says what and where.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _load(file)
        except FileError as error:
            raise FileError(f"{os.fspath(path)}: {error}") from error.__cause__


def _load(file: IO[bytes]) -> nn.Module:
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        archive = zipfile.ZipFile(file)
    except _ZIP_ERRORS as error:
        raise FileError(f"not a network file, or cut short ({error}); get it again, or save it with tt.save") from error
    members = _members(archive, file_size)
    if JSON_MEMBER not in members:
        raise FileError(f"the member {JSON_MEMBER!r} is missing: not a network saved with tt.save")
    if members[JSON_MEMBER].file_size > MAX_JSON_BYTES:
        raise FileError(f"{JSON_MEMBER} has {members[JSON_MEMBER].file_size} bytes; at most {MAX_JSON_BYTES} are read")
    plan = parse(_read(archive, members[JSON_MEMBER]), CLASSES)
    expected = {JSON_MEMBER, *map(_member, range(len(plan.tensors)))}
    if set(members) != expected:
        missing, surplus = sorted(expected - set(members))[:5], sorted(set(members) - expected)[:5]
        raise FileError(f"{JSON_MEMBER} and the arrays disagree: missing {missing}, surplus {surplus}")
    for i, record in enumerate(plan.tensors):
        size = members[_member(i)].file_size
        if size != record.size:
            raise FileError(f"{_member(i)} has {size} bytes; the shape and dtype of tensor {i} need {record.size}")
    tensors = [_tensor(_read(archive, members[_member(i)]), r, _member(i)) for i, r in enumerate(plan.tensors)]
    modules: list[nn.Module] = []
    for i, module in enumerate(plan.modules):
        given = {name: None if n is None else tensors[n] for name, n in module.tensors.items()}
        try:
            modules.append(construct(module, given, [(name, modules[n]) for name, n in module.children]))
        except FileError as error:
            raise FileError(f"module {i}: {error}") from error.__cause__
    return modules[-1]


def _members(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's directory by name: plain, stored members, each in a place of its own."""
    members: dict[str, zipfile.ZipInfo] = {}
    end, total = 0, 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.orig_filename
        if name != JSON_MEMBER and not re.fullmatch(r"tensor_(0|[1-9][0-9]{0,8})\.npy", name, re.ASCII):
            raise FileError(f"the member {name!r:.200} has no place in a network file")
        if name in members:
            raise FileError(f"the member {name!r} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise FileError(f"the member {name!r} is compressed; members must be stored")
        if info.header_offset < end:
            raise FileError(f"the member {name!r} overlaps another one")
        end = info.header_offset + 30 + len(name) + info.file_size
        total += info.file_size
        if end > file_size or total > file_size:
            raise FileError(f"the member {name!r} is said to end at byte {end} of a file of {file_size}")
        members[name] = info
    return members


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        data = archive.read(info)  # checks the CRC
    except _ZIP_ERRORS as error:
        raise FileError(f"the member {info.filename!r} is damaged ({error}); get the file again") from error
    if len(data) != info.file_size:
        raise FileError(f"the member {info.filename!r} is cut short")
    return data


def _tensor(data: bytes, record: TensorRecord, member: str) -> Tensor:
    """The tensor of one `.npy` member. Torch allocates it: results may depend on the alignment of memory."""
    if not data.startswith(record.header):
        raise FileError(
            f"{member} is not the array that {JSON_MEMBER} declares: it must start with {record.header.rstrip()!r}, "
            f"and starts with {data[: len(record.header)].rstrip()!r}"
        )
    array = np.frombuffer(data, record.stored.descr, offset=len(record.header)).reshape(record.shape)
    if record.stored.torch == torch.bool and array.size and array.view(np.uint8).max() > 1:
        raise FileError(f"{member} holds a bool that is neither 0 nor 1")
    carrier = torch.empty_strided(record.shape, record.strides, dtype=record.stored.carrier, device="cpu")
    carrier.numpy()[...] = array
    tensor = carrier.view(record.stored.torch)
    if record.parameter:
        return nn.Parameter(tensor, record.requires_grad)
    return tensor.requires_grad_(record.requires_grad)
