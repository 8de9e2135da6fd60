"""What a subject is: `describe`, `build`, `run`; and how its answers travel and are checked.

The same three calls serve in process and in a child process. Documents are JSON, arrays are float32 or float64 in npz.
Nothing a subject says is believed: `check_description`, `check_build` and `check_run` refuse what is not as it should
be, with a `SubjectError`, and `read_npz` neither unpickles nor unpacks more than it was announced.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.oracle.raw import RAW

PROTOCOL = 1
NPZ_LIMIT = 64 * 2**20
JSON_LIMIT = 2**20

Array: TypeAlias = NDArray[Any]
Json: TypeAlias = dict[str, Any]
Arrays: TypeAlias = dict[str, Array]

_DTYPES = ("<f4", "<f8")
_DATE = (1980, 1, 1, 0, 0, 0)


class SubjectError(RuntimeError):
    """A subject that failed, or answered what it must not."""


class Unsupported(Exception):
    """Raised by a subject's `build`, or by `run` for a dtype: it cannot express it. Names field, value and why."""

    def __init__(self, field: str, value: object, why: str) -> None:
        super().__init__(f"{field}={value!r}: {why}")
        self.field, self.value, self.why = field, str(value), why


class Subject(Protocol):
    """A simulator under test.

    One subject builds one neuron at a time: `run` runs what the last `build` made.
    """

    def describe(self) -> Json:
        """{"name", "framework", "version"}: strings; perhaps "notes", a string."""

    def build(self, spec: Json) -> Json:
        """Make a neuron layer from a `NeuronSpec` as JSON: all its fields, `record(spec)`; every number is float32.

        Returns:
            {} or some of: "stores_before_reset" (bool; as the spec says, if left out), "gradients" (a string: why it
            has none of this spec; "" if it has), "parameters" ({name: a `Parameter` as JSON}: what it trains, or
            computes its decay from, where that is another raw form), "dt" (a number: the time step in which that
            counts, if the spec has none), "notes" (a string).

        Raises:
            Unsupported: it cannot express the spec.
        """

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """Run from the initial state over x, [T, B, N], in calls of these lengths, the state carried on.

        x is float32; float64 in the cases of "number.double", whose states are to be float64 too.

        Returns:
            "outputs" [T, B, N]; if it can show them "state.<name>" of all of the spec's states ("v_mem", perhaps
            "i_syn", "i_exc" and "i_inh", "adaptation") [T, B, N], after every step, and "final.<name>" [B, N]; with
            `grad_output` [T, B, N], dL/doutput, "grad.x" [T, B, N] and "grad.<parameter>" of every learnable parameter,
            in the parameter's shape.

        Raises:
            Unsupported: it computes in no such dtype.
        """


@dataclass(frozen=True)
class Built:
    """A checked answer to `build`."""

    stores_before_reset: bool
    gradients: str = ""
    notes: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    dt: float | None = None


def record(spec: NeuronSpec) -> Json:
    """What a subject's `build` is given: `spec.to_dict()` with every field, those at a late default included."""
    data = spec.to_dict()
    return {**data, **{f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in data}}


def encode(document: Mapping[str, Any]) -> bytes:
    """One line of ASCII JSON. A number that JSON has not is an error."""
    return json.dumps(document, allow_nan=False).encode("ascii") + b"\n"


def decode(line: bytes) -> Json:
    """The inverse; raises `SubjectError` unless it is one JSON object, not longer than `JSON_LIMIT`."""
    if len(line) > JSON_LIMIT:
        raise SubjectError(f"a line of more than {JSON_LIMIT} bytes where JSON is expected")
    try:
        document = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SubjectError(f"not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(document, dict):
        raise SubjectError(f"not a JSON object: {line[:80]!r}")
    return document


def write_npz(arrays: Mapping[str, Array]) -> bytes:
    """An npz file, the same bytes for the same arrays: stored, dated 1980, in the order given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", _DATE)
            member.create_system, member.external_attr = 3, 0o600 << 16
            content = io.BytesIO()
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
            npy.write_array(content, little, version=(1, 0), allow_pickle=False)
            archive.writestr(member, content.getvalue())
    return buffer.getvalue()


def _read_npy(name: str, content: bytes) -> Array:
    stream = io.BytesIO(content)
    if npy.read_magic(stream) != (1, 0):
        raise SubjectError(f"{name}: not an npy array of format 1.0")
    shape, fortran, dtype = npy.read_array_header_1_0(stream)
    if dtype.str not in _DTYPES:
        raise SubjectError(f"{name}: dtype {dtype.str}; give float32 or float64, little endian")
    data = content[stream.tell() :]
    count = 1
    for size in shape:
        count *= size
    if any(size < 0 for size in shape) or count * dtype.itemsize != len(data):
        raise SubjectError(f"{name}: shape {list(shape)} and {len(data)} bytes do not fit")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def read_npz(content: bytes, limit: int = NPZ_LIMIT) -> Arrays:
    """float32 and float64 arrays of an npz file. Nothing is unpickled, nothing larger than `limit` is unpacked.

    Raises:
        SubjectError: not such a file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(members) > 64 or len(set(names)) != len(names):
                raise SubjectError(
                    f"an npz file of {len(members)} arrays, {len(set(names))} of them by name; at most 64"
                )
            if sum(member.file_size for member in members) > limit:
                raise SubjectError(f"an npz file that unpacks to more than {limit} bytes")
            arrays = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if not re.fullmatch(r"[a-z][a-z_.]{0,40}", name):
                    raise SubjectError(f"an array named {name!r:.60}; names are lower case letters, _ and .")
                with archive.open(member) as stream:
                    arrays[name] = _read_npy(name, stream.read(limit))
            return arrays
    except SubjectError:
        raise
    except Exception as error:  # zipfile and npy raise many kinds; whatever it is, it is no npz file
        raise SubjectError(f"not an npz file: {type(error).__name__}: {error}") from error


def _text(answer: Mapping[str, Any], name: str, most: int, default: str | None = None) -> str:
    value = answer.get(name, default)
    if not isinstance(value, str) or len(value) > most:
        raise SubjectError(f"{name}={value!r:.60}: must be a string of at most {most} characters")
    return value


def check_description(answer: Any) -> dict[str, str]:
    """name, framework, version and notes of a subject. Raises `SubjectError` unless they are strings."""
    if not isinstance(answer, Mapping):
        raise SubjectError(f"describe answered {answer!r:.60}: must be a mapping")
    found = {name: _text(answer, name, 80) for name in ("name", "framework", "version")}
    empty = [name for name, text in found.items() if not text]
    if empty:
        raise SubjectError(f"describe: {empty[0]} is empty")
    return found | {"notes": _text(answer, "notes", 1000, "")}


def check_build(answer: Any, spec: NeuronSpec) -> Built:
    """A checked answer to `build`. A parameter in another raw form must have the value of the spec's, to rounding."""
    if not isinstance(answer, Mapping):
        raise SubjectError(f"build answered {answer!r:.60}: must be a mapping")
    unknown = set(answer) - {"stores_before_reset", "gradients", "parameters", "dt", "notes"}
    if unknown:
        raise SubjectError(f"build: {sorted(map(str, unknown))[0]!r:.60} is not known")
    before = answer.get("stores_before_reset", spec.stores_before_reset)
    if not isinstance(before, bool):
        raise SubjectError(f"build: stores_before_reset={before!r:.60}: must be true or false")
    dt = answer.get("dt", spec.dt)
    if dt is not None and (isinstance(dt, bool) or not isinstance(dt, (int, float)) or not 0 < dt < float("inf")):
        raise SubjectError(f"build: dt={dt!r:.60}: must be a finite number above 0")
    dt = spec.dt if spec.dt is not None else dt
    parameters = {}
    given = answer.get("parameters", {})
    if not isinstance(given, Mapping):
        raise SubjectError(f"build: parameters={given!r:.60}: must be a mapping")
    for name, document in given.items():
        if name not in spec.parameters:
            raise SubjectError(f"build: parameters: {name!r:.60} is none of the spec's")
        try:
            parameters[name] = Parameter.from_dict(document)
        except SpecError as error:
            raise SubjectError(f"build: parameters: {name}: {error}") from error
        _check_value(name, parameters[name], spec, dt)
    return Built(before, _text(answer, "gradients", 1000, ""), _text(answer, "notes", 4000, ""), parameters, dt)


def _check_value(name: str, theirs: Parameter, spec: NeuronSpec, dt: float | None) -> None:
    ours = spec.parameters[name]
    values, slack = [], np.zeros(())
    for parameter in (theirs, ours):
        if parameter.raw not in RAW:
            raise SubjectError(f"build: parameters: {name}: the oracle has no equations for {parameter.raw!r}")
        raw = parameter.value.astype(np.float64)
        with np.errstate(all="ignore"):
            values.append(RAW[parameter.raw].value(raw, dt))
            slack = slack + RAW[parameter.raw].error(raw, dt)
    if theirs.value.shape != ours.value.shape or not np.all(
        np.abs(values[0] - values[1]) <= (slack + 8) * 2.0**-24 * np.abs(values[1])
    ):
        raise SubjectError(f"build: parameters: {name} is {theirs}, the spec's is {ours}")


def check_run(answer: Any, spec: NeuronSpec, x: Array, grad: bool) -> Arrays:
    """Checked arrays of a run: the names, shapes and dtypes that belong to the spec, and no others."""
    if not isinstance(answer, Mapping) or "outputs" not in answer:
        raise SubjectError(f"run answered {answer!r:.60}: must be a mapping with 'outputs'")
    shapes: dict[str, tuple[int, ...]] = {"outputs": x.shape}
    shapes |= {f"state.{name}": x.shape for name in spec.states}
    shapes |= {f"final.{name}": x.shape[1:] for name in spec.states}
    if grad:
        shapes["grad.x"] = x.shape
        shapes |= {f"grad.{n}": p.value.shape for n, p in spec.parameters.items() if p.learnable}
        missing = [name for name in shapes if name.startswith("grad.") and name not in answer]
        if missing:
            raise SubjectError(f"run: {missing[0]!r} is missing")
    found = {}
    for name, array in answer.items():
        if name not in shapes:
            raise SubjectError(f"run: {name!r:.60} is none of {', '.join(shapes)}")
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            raise SubjectError(
                f"run: {name} is {getattr(array, 'dtype', type(array).__name__)}; give float32 or float64"
            )
        if array.shape != shapes[name]:
            raise SubjectError(f"run: {name} has shape {list(array.shape)}, expected {list(shapes[name])}")
        found[name] = array
    for group in ("state", "final"):
        shown = [name for name in spec.states if f"{group}.{name}" in found]
        if shown and len(shown) != len(spec.states):
            raise SubjectError(
                f"run: {group}.{shown[0]} without the other states; give all of {', '.join(spec.states)}"
            )
    return found
