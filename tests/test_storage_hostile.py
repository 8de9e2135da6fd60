"""What `tt.load` refuses: damaged and hostile files. Nothing in them is executed, nothing but `FileError` is raised."""

import io
import json
import os
import pathlib
import pickle
import random
import re
import struct
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch.core import topology

GOLDEN = pathlib.Path(__file__).parent / "data" / "network_v1.tt"


def bits(net):
    """The `state_dict` as bytes."""
    state = {n: t.view(torch.uint16) if t.dtype == torch.bfloat16 else t for n, t in net.state_dict().items()}
    return {name: (tensor.dtype, tensor.shape, tensor.numpy(force=True).tobytes()) for name, tensor in state.items()}


def spec_neuron():
    values = {"mem_decay": 0.9, "threshold": 1.0, "spike_scale": 1.0}
    return tt.snn.SpecNeuron(
        tt.NeuronSpec(
            "snntorch.Leaky",
            reset_timing="same_step_residual",
            surrogate=tt.functional.Surrogate("atan"),
            parameters={name: tt.Parameter(np.float32(value), True) for name, value in values.items()},
        )
    )


# ---- load: a valid file, changed in one place ------------------------------------------------------------------------


@pytest.fixture
def members(tmp_path):
    """The members of the file of `small_network`, by name."""
    tt.save(tmp_path / "good.tt", small_network())
    with zipfile.ZipFile(tmp_path / "good.tt") as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def small_network():
    """In the file: modules 0 Linear, 1 SpecNeuron, 2 Identity, 3 LIB, 4 BatchNorm1d, 5 Sequential."""
    return tt.Sequential(nn.Linear(2, 2), spec_neuron(), tt.snn.LIB(2), nn.BatchNorm1d(2))


def refused(path, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tt.FileError) as caught:
            tt.load(path)
    where, message = str(caught.value)[: len(str(path))], str(caught.value)[len(str(path)) :]
    assert where == str(path)
    assert re.search(words, message), message
    assert len(message) < 1500


def write(path, members, **options):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
        warnings.simplefilter("ignore")  # "Duplicate name"
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return path


def put(data, path, value):
    """Set, or with `...` delete, the value at a path like "modules.0.class"; "+" appends, "*" updates the whole."""
    *parts, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for part in parts:
        data = data[part]
    if value is ...:
        del data[last]
    elif last == "+":
        data.append(value)
    elif last == "*":
        data.update(value)
    else:
        data[last] = value


MODULE = {"class": "torch.nn.Tanh", "arguments": {}, "training": True, "tensors": {}, "children": []}
TENSOR = {"dtype": "float32", "shape": [2], "strides": None, "parameter": True, "requires_grad": True}
DEEP = [{**MODULE, "class": "torch.nn.Sequential", "children": [["0", i - 1]] if i else []} for i in range(101)]
WIDE = [
    {**MODULE, "class": "torch.nn.Sequential", "children": [[str(j), i - 1] for j in range(4)] if i else []}
    for i in range(40)
]
EDITS = {
    "no format": ("format", ..., "not a network saved with tt.save"),
    "other format": ("format", "safetensors", "not a network saved with tt.save"),
    "newer version": ("version", 2, "upgrade"),
    "older version": ("version", 0, "format version 0"),
    "bool version": ("version", True, "format version True"),
    "text version": ("version", "1", "format version '1'"),
    "unknown field": ("extra", 1, "extra"),
    "no tensors": ("tensors", ..., "missing.*tensors"),
    "modules no list": ("modules", {}, "modules=.*wrong type"),
    "no modules": ("modules", [], "no module"),
    "module no object": ("modules.0", 3, "module 0 must be an object"),
    "unknown class": ("modules.0.class", "torch.nn.Lienar", "module 0: class 'torch.nn.Lienar'"),
    "os.system": ("modules.0.class", "os.system", "class 'os.system'"),
    "builtins": ("modules.0.class", "builtins.eval", "class 'builtins.eval'"),
    "base class": ("modules.0.class", "torch.nn.Module", "class 'torch.nn.Module'"),
    "class no text": ("modules.0.class", ["torch.nn.Linear"], "class=.*wrong type"),
    "module field missing": ("modules.0.training", ..., "module 0: fields missing.*training"),
    "module field unknown": ("modules.0.hook", "x", "unknown.*hook"),
    "training no bool": ("modules.0.training", 1, "training=1"),
    "argument missing": ("modules.0.arguments.in_features", ..., "module 0: torch.nn.Linear: arguments missing"),
    "argument unknown": ("modules.0.arguments.device", "cuda", "unknown: .'device'"),
    "argument no int": ("modules.0.arguments.in_features", 2.0, r"in_features=2\.0 must be an integer"),
    "argument bool": ("modules.0.arguments.in_features", True, "in_features=True must be an integer"),
    "argument negative": ("modules.0.arguments.in_features", -2, "module 0"),
    "huge layer": ("modules.0.arguments.in_features", 10**12, r"\[2, 2\].*\[2, 1000000000000\]"),
    "overflowing layer": ("modules.0.arguments.in_features", 10**17, "module 0"),
    "huge LIB": ("modules.3.arguments.num_neurons", 10**12, r"module 3.*\[2\]"),
    "LIB without neurons": ("modules.3.arguments.num_neurons", 0, "module 3"),
    "named function": ("modules.3.arguments.spike_fn", "os.system", "spike_fn='os.system'"),
    "function twice": ("modules.3.arguments.quant_fn", "tracetorch.functional.sigmoid4x", "quant_fn"),
    "function missing": ("modules.3.arguments.spike_fn", None, "spike_fn"),
    "function class": ("modules.2.class", "torch.nn.Tanh", "module 3.*quant_fn=Tanh"),
    "LIB child": ("modules.3.children.+", ["other", 0], "children.*other"),
    "Linear child": ("modules.1.children.+", ["0", 0], "module 1"),
    "leaf child": ("modules.4.children.+", ["0", 0], "module 4.*children"),
    "attribute child": ("modules.5.children.0.0", "forward", "module 5.*forward"),
    "dotted child": ("modules.5.children.0.0", "a.b", "module 5"),
    "unnamed child": ("modules.5.children.0.0", "", "module 5"),
    "same names": ("modules.5.children.0.0", "1", "one name"),
    "cycle": ("modules.5.children.0.1", 5, "children come before parents"),
    "forward child": ("modules.0.children", [["0", 5]], "children come before parents"),
    "negative child": ("modules.5.children.0.1", -1, "children come before parents"),
    "bool child": ("modules.5.children.0.1", False, "not a child"),
    "unused module": ("modules.5.children.0", ..., r"modules \[0\] belong to no network"),
    "second root": ("modules.+", MODULE, r"modules \[5\]"),
    "deep modules": ("*", {"modules": DEEP, "tensors": []}, "100 deep"),
    "wide modules": ("*", {"modules": WIDE, "tensors": []}, "100000 modules"),
    "tensor number": ("modules.0.tensors.weight", 99, "'weight' is the tensor 99"),
    "negative tensor": ("modules.0.tensors.weight", -1, "'weight' is the tensor -1"),
    "bool tensor": ("modules.0.tensors.weight", True, "'weight' is the tensor True"),
    "tensor null": ("modules.4.tensors.weight", None, "belong to no module"),
    "weight gone": ("modules.0.tensors", {"bias": 0, "weight": None}, "belong to no module"),
    "weights swapped": ("modules.0.tensors", {"weight": 1, "bias": 0}, r"'weight' has the shape \[2\]"),
    "tensor missing": ("modules.0.tensors", {"weight": 0}, "belong to no module"),
    "tensor surplus": ("modules.0.tensors.mask", 0, "surplus: .'mask'"),
    "state in the file": ("modules.3.tensors.mem", 1, "mem"),
    "LIB tensor unknown": ("modules.3.tensors.raw_gamma", 1, "module 3"),
    "tensor no object": ("tensors.0", [], "tensor 0 must be an object"),
    "tensor field unknown": ("tensors.0.device", "cuda", "tensor 0: .*device"),
    "dtype unknown": ("tensors.0.dtype", "object", "dtype='object' is not known"),
    "dtype other": ("tensors.0.dtype", "float64", "tensor_0.npy has .* bytes"),
    "dtype of the same size": ("tensors.0", {**TENSOR, "shape": [2, 2], "dtype": "int32"}, "requires_grad"),
    "bits of another dtype": (
        "tensors.0",
        {**TENSOR, "shape": [2, 2], "dtype": "int32", "requires_grad": False},
        "<i4",
    ),
    "shape other": ("tensors.0.shape", [4], r"tensor_0.npy.*\(4,\).*\(2, 2\)"),
    "shape negative": ("tensors.0.shape", [-2, -2], "no shape"),
    "shape bool": ("tensors.0.shape", [True, 4], "no shape"),
    "shape float": ("tensors.0.shape", [2.0, 2], "no shape"),
    "shape nested": ("tensors.0.shape", [[2], 2], "no shape"),
    "shape huge": ("tensors.0.shape", [10**6, 10**6, 10**6, 10**6], "no shape"),
    "shape huge and empty": ("tensors.0.shape", [0, 10**16, 10**16], "no shape"),
    "shape large": ("tensors.0.shape", [10**6, 10**6], "tensor_0.npy has"),
    "shape of many dimensions": ("tensors.0.shape", [1] * 99, "no shape"),
    "strides short": ("tensors.0.strides", [2], "strides"),
    "strides overlapping": ("tensors.0.strides", [1, 1], "strides"),
    "strides far": ("tensors.0.strides", [10**9, 1], "strides"),
    "strides negative": ("tensors.0.strides", [-2, 1], "strides"),
    "strides bool": ("tensors.0.strides", [2, True], "strides"),
    "parameter as buffer": ("tensors.0.parameter", False, "'weight' must be a parameter"),
    "tensor record surplus": ("tensors.+", TENSOR, "belong to no module"),
    "spec no object": ("modules.1.arguments.spec", 1, "module 1.*spec=1"),
    "spec choice": ("modules.1.arguments.spec.reset", "explode", "module 1.*reset='explode'"),
    "spec choice no text": ("modules.1.arguments.spec.reset", ["none"], "module 1"),
    "spec form": ("modules.1.arguments.spec.form", "os.system", "module 1.*os.system"),
    "spec form no text": ("modules.1.arguments.spec.form", {"a": 1}, "module 1"),
    "spec field missing": ("modules.1.arguments.spec.clamp", ..., "module 1.*clamp"),
    "spec field unknown": ("modules.1.arguments.spec.evil", 1, "module 1.*evil"),
    "spec surrogate": ("modules.1.arguments.spec.surrogate", {"name": "eval", "parameters": {}}, "module 1.*eval"),
    "spec surrogate number": ("modules.1.arguments.spec.surrogate.parameters.alpha", "2", "module 1.*alpha"),
    "spec surrogate no object": ("modules.1.arguments.spec.surrogate", "atan", "module 1"),
    "spec unit": ("modules.1.arguments.spec.time_unit", {"a": []}, "module 1.*time_unit=.* must be a text"),
    "spec step": ("modules.1.arguments.spec.dt", "1", "module 1"),
    "spec without parameters": ("modules.1.arguments.spec.parameters", None, "module 1.*parameters"),
    "spec parameter missing": ("modules.1.arguments.spec.parameters.threshold", ..., "module 1.*threshold"),
    "spec parameter unknown": (
        "modules.1.arguments.spec.parameters.x",
        {"raw": "value", "learnable": True},
        "module 1",
    ),
    "spec raw form": ("modules.1.arguments.spec.parameters.threshold.raw", "exec", "module 1.*exec"),
    "spec learnable": ("modules.1.arguments.spec.parameters.threshold.learnable", False, "module 1.*threshold"),
    "spec with values": ("modules.1.arguments.spec.parameters.threshold.value", 1.0, "module 1.*value"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_changed_topology_is_refused(name, members, tmp_path):
    path, value, words = EDITS[name]
    data = json.loads(members["network.json"])
    put(data, path, value)
    refused(write(tmp_path / "bad.tt", {**members, "network.json": json.dumps(data)}), words)


JSONS = {
    "empty": (b"", "not JSON"),
    "not JSON": (b"hello", "not JSON"),
    "not UTF-8": (b'{"format": "\xff"}', "not JSON"),
    "a list": (b"[]", "not a network"),
    "NaN": (b'{"format": NaN}', "NaN"),
    "infinity": (b'{"format": -Infinity}', "-Infinity"),
    "overflow": (b'{"format": 1e999}', "1e999"),
    "long integer": (b'{"format": ' + b"9" * 5000 + b"}", "18 characters"),
    "field twice": (b'{"version": 1, "version": 1}', "field twice"),
    "deep": (b'{"a":' * 100_000, "not JSON"),
    "deep lists": (b"[" * 1_000_000, "not JSON"),
    "large": (b" " * (topology.MAX_JSON_BYTES + 1), "at most 16777216"),
}


@pytest.mark.parametrize("name", JSONS)
def test_json_that_cannot_be_read_is_refused(name, members, tmp_path):
    text, words = JSONS[name]
    refused(write(tmp_path / "bad.tt", {**members, "network.json": text}), words)


# ---- load: the arrays ------------------------------------------------------------------------------------------------


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


W = np.ones((2, 2), np.float32)
ARRAYS = {
    "missing": (None, r"missing \['tensor_0.npy'\]"),
    "empty": (b"", "tensor_0.npy has 0 bytes"),
    "no npy": (b"x" * 144, "tensor_0.npy is not the array"),
    "one byte more": (npy(W) + b"\0", "bytes"),
    "other dtype": (npy(W.view(np.int32)), "<i4"),
    "big-endian": (npy(W.astype(">f4")), ">f4"),
    "Fortran order": (npy(np.asfortranarray(np.array([[1, 2], [3, 4]], np.float32))), "fortran_order': True"),
    "other shape": (npy(W.reshape(4)), r"\(4,\)"),
    "structured": (npy(W.reshape(-1).view([("a", "<f4")])), "tensor_0.npy"),
    "objects": (npy(np.array([None, 1], object), version=(1, 0)), "tensor_0.npy"),
    "npy version 2": (npy(W, version=(2, 0)), "tensor_0.npy"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_array_is_refused(name, members, tmp_path):
    data, words = ARRAYS[name]
    changed_members = {**members, "tensor_0.npy": data}
    if data is None:
        del changed_members["tensor_0.npy"]
    refused(write(tmp_path / "bad.tt", changed_members), words)


def test_an_array_of_the_right_size_is_loaded(members, tmp_path):
    """The cases above are refused for what is wrong with them: this array differs in its values only."""
    data = members["tensor_0.npy"][:-16] + W.tobytes()
    assert (tt.load(write(tmp_path / "good.tt", {**members, "tensor_0.npy": data}))[0].weight == 1).all()


def test_a_bool_is_0_or_1(tmp_path):
    net = nn.Linear(2, 1, bias=False)
    net.weight = nn.Parameter(torch.tensor([[True, False]]), requires_grad=False)
    tt.save(tmp_path / "net.tt", net)
    with zipfile.ZipFile(tmp_path / "net.tt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members["tensor_0.npy"] = members["tensor_0.npy"][:-2] + b"\x02\x00"
    refused(write(tmp_path / "bad.tt", members), "neither 0 nor 1")


def test_a_spec_must_be_finite(members, tmp_path):
    number = json.loads(members["network.json"])["modules"][1]["tensors"]["threshold"]
    name = f"tensor_{number}.npy"
    data = members[name][:-4] + struct.pack("<f", float("nan"))
    refused(write(tmp_path / "bad.tt", {**members, name: data}), "module 1.*not finite")


# ---- load: the archive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil.npy", "/etc/passwd", "tensor_99.npy", "tensor_00.npy", "a.pkl", "x/", "t\0.npy"]
)
def test_members_that_have_no_place_are_refused(name, members, tmp_path):
    refused(write(tmp_path / "bad.tt", {**members, name: b""}), "no place|surplus")
    assert {p.name for p in tmp_path.iterdir()} == {"good.tt", "bad.tt"}


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "bad.tt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    refused(path, "no place")
    for data in (b"", b"hello", b"PK\x05\x06" + bytes(18), pickle.dumps({"a": 1})):
        path.write_bytes(data)
        refused(path, "not a network file|is missing")
    np.savez(tmp_path / "x.npz", a=W)
    refused(tmp_path / "x.npz", "no place")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        tt.load(tmp_path / "net.tt")
    with pytest.raises(FileNotFoundError):
        tt.save(tmp_path / "folder" / "net.tt", nn.Tanh())


def test_compressed_members_are_refused(members, tmp_path):
    bomb = {**members, "tensor_0.npy": members["tensor_0.npy"] + bytes(10**8)}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(write(tmp_path / "bad.tt", bomb, compression=method), "compressed")
        bomb = members


def test_a_member_twice_is_refused(members, tmp_path):
    for name in ("network.json", "tensor_0.npy"):
        refused(write(tmp_path / "bad.tt", [*members.items(), (name, members[name])]), f"'{name}' is there twice")


def central(data, name):
    """Offset of the directory entry of a member."""
    return data.rindex(b"PK\x01\x02", 0, data.rindex(name))


def test_overlapping_members_are_refused(members, tmp_path):
    """Two entries over the same bytes, and sizes that reach past the end, into the directory or the next member."""
    data = bytearray(write(tmp_path / "bad.tt", members).read_bytes())
    first, second = central(data, b"tensor_0.npy"), central(data, b"tensor_1.npy")
    offset = bytearray(data)
    offset[second + 42 : second + 46] = data[first + 42 : first + 46]
    (tmp_path / "bad.tt").write_bytes(offset)
    refused(tmp_path / "bad.tt", "overlaps")
    for size, words in ((200, "overlaps|damaged|bytes"), (2**31, "said to end"), (2**32 - 2, "said to end")):
        longer = bytearray(data)
        longer[first + 20 : first + 28] = struct.pack("<II", size, size)
        (tmp_path / "bad.tt").write_bytes(longer)
        refused(tmp_path / "bad.tt", words)


def test_a_wrong_byte_in_an_array_is_refused(members, tmp_path):
    data = bytearray(write(tmp_path / "bad.tt", members).read_bytes())
    data[data.index(members["tensor_0.npy"]) + len(members["tensor_0.npy"]) - 1] ^= 1
    (tmp_path / "bad.tt").write_bytes(data)
    refused(tmp_path / "bad.tt", "CRC")


# ---- load: nothing is executed, nothing else is raised ---------------------------------------------------------------


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_nothing_in_a_file_is_executed(members, tmp_path):
    marker = os.fspath(tmp_path / "executed")
    payload = pickle.dumps(Payload(marker))
    pickle.loads(payload)
    assert os.path.exists(marker), "the payload works"
    os.rmdir(marker)
    objects = npy(np.array([Payload(marker)], object))
    data = json.loads(members["network.json"])
    texts = [f"__import__('os').mkdir({marker!r})", "os.mkdir", "builtins.eval", "tracetorch.core.storage.save"]
    files = [payload, *({**members, name: bad} for name in members for bad in (payload, objects))]
    files += [{**members, "data.pkl": payload, "tensor_99.npy": objects}]
    for where in (
        "modules.0.class",
        "modules.3.arguments.spike_fn",
        "modules.1.arguments.spec.form",
        "tensors.0.dtype",
    ):
        for text in texts:
            bad = json.loads(json.dumps(data))
            put(bad, where, text)
            files.append({**members, "network.json": json.dumps(bad)})
    header = np.lib.format.magic(1, 0) + struct.pack("<H", 118) + f"{texts[0]}".encode().ljust(117)[:117] + b"\n"
    files.append({**members, "tensor_0.npy": header + bytes(16)})
    for content in files:
        path = tmp_path / "bad.tt"
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
        refused(path, ".")
        assert not os.path.exists(marker)


def mutations(data, count, rng):
    """Every truncation near a boundary, then random changes: bytes, bits, runs, cuts, and pieces moved."""
    for _ in range(count):
        mutated = bytearray(data)
        i, j = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
        match rng.randrange(7):
            case 0:
                mutated[i] ^= 1 << rng.randrange(8)
            case 1:
                mutated[i] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                mutated[i : i + 4] = rng.randbytes(4)
            case 3:
                del mutated[i:]
            case 4:
                del mutated[i : i + rng.randrange(1, 40)]
            case 5:
                mutated[i:i] = data[j : j + rng.randrange(1, 40)]
            case 6:  # in the directory at the end, where a random place seldom is
                k = len(data) - 1 - rng.randrange(22 + 60 * 4)
                mutated[k] = rng.choice((0, 1, 0x08, 0xFF, rng.randrange(256)))
        yield bytes(mutated)


def test_a_damaged_file_is_refused_or_means_the_same(tmp_path):
    data, expected = GOLDEN.read_bytes(), bits(tt.load(GOLDEN))
    outcomes = {"refused": 0, "same": 0}
    started = time.monotonic()
    for mutated in mutations(data, 1500, random.Random(0)):
        (tmp_path / "bad.tt").write_bytes(mutated)
        try:
            net = tt.load(tmp_path / "bad.tt")
        except tt.FileError:
            outcomes["refused"] += 1
        else:
            assert bits(net) == expected
            outcomes["same"] += 1
    assert time.monotonic() - started < 60, "a damaged file takes no longer than a good one"
    assert outcomes["refused"] > 500
    assert outcomes["same"] > 5


def test_damaged_json_is_refused_or_a_network(members, tmp_path):
    """The same behind a right CRC: what is checked here is the reader of the topology."""
    text, refusals = members["network.json"], 0
    for mutated in mutations(text, 1500, random.Random(1)):
        try:
            net = tt.load(write(tmp_path / "bad.tt", {**members, "network.json": mutated}))
        except tt.FileError:
            refusals += 1
        else:
            assert isinstance(net, nn.Module)
    assert refusals > 1000


ODD = (None, True, -1, 0, 3, 10**12, 10**17, 0.5, 1e300, "", "a.b", "torch.nn.Linear", [], [1], [[]], {}, {"a": None})


def test_a_topology_of_odd_values_is_refused_or_a_network(members, tmp_path):
    """Any one value replaced, by each of `ODD` or by another part of the topology."""
    rng, outcomes = random.Random(2), {"refused": 0, "loaded": 0}

    def places(value, path=()):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key), child
            if isinstance(child, (dict, list)):
                yield from places(child, (*path, key))

    parts = list(places(json.loads(members["network.json"])))
    for path, _ in parts:
        for value in (*rng.sample(ODD, 4), rng.choice(parts)[1]):
            data = json.loads(members["network.json"])
            place = data
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            try:
                tt.load(write(tmp_path / "bad.tt", {**members, "network.json": json.dumps(data)}))
                outcomes["loaded"] += 1
            except tt.FileError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 500
    assert outcomes["loaded"] > 5
