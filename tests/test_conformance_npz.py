"""Answers travel as npz: the same bytes each time, and hostile files are refused."""

from __future__ import annotations

import numpy as np
import pytest

from tracetorch.conformance import SubjectError
from tracetorch.conformance.protocol import read_npz, write_npz

pytestmark = pytest.mark.usefixtures("one_thread")


def test_npz_round_trips_and_is_the_same_bytes():
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "grad.mem_decay": np.array(0.5, np.float64)}
    content = write_npz(arrays)
    assert content == write_npz(arrays)
    back = read_npz(content)
    assert {n: (a.shape, a.dtype, a.tolist()) for n, a in back.items()} == {
        n: (a.shape, a.dtype, a.tolist()) for n, a in arrays.items()
    }


def test_hostile_npz_files_are_refused(tmp_path):
    import io
    import zipfile

    def zipped(name, content, method=zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    def npy(array, **options):
        buffer = io.BytesIO()
        np.save(buffer, array, **options)
        return buffer.getvalue()

    good = npy(np.zeros(3, np.float32))
    huge = good.replace(b"(3,)", b"(9" + b"9" * 12 + b",)", 1)
    pickled = npy(np.array([{}], dtype=object), allow_pickle=True)
    bomb = zipped("x.npy", bytes(80 * 2**20), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    files = [
        (b"", "not a zip file"),
        (b"rubbish", "not a zip file"),
        (b"PK\x03\x04", "not a zip file"),
        (write_npz({"x": np.zeros(3, np.float32)})[:-30], "not a zip file"),
        (bomb, "unpacks to more than"),
        (zipped("../x.npy", good), "an array named '../x'"),
        (zipped("x.npy", b"rubbish"), "reading magic string"),
        (zipped("x.npy", pickled), r"x: dtype \|O"),
        (zipped("x.npy", good[:-1]), r"x: shape \[3\] and 11 bytes"),
        (zipped("x.npy", huge), r"x: shape \[9999999999999\] and 24 bytes"),
        (zipped("x.npy", npy(np.zeros(3, np.int64))), "x: dtype <i8"),
        (zipped("x.npy", npy(np.zeros(3, ">f4"))), "x: dtype >f4"),
    ]
    assert read_npz(zipped("x.npy", good))["x"].tolist() == [0, 0, 0]
    for content, words in files:
        with pytest.raises(SubjectError, match=words):
            read_npz(content)
