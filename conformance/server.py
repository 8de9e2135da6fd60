"""The subject's side of the child process protocol: `serve(subject)`, or `python -m tracetorch.conformance NAME`.

A message is one line of JSON, and after it as many bytes of npz as its `npz_bytes` says. Requests:

    {"call": "describe", "protocol": 1}
    {"call": "build", "spec": {...}}
    {"call": "run", "calls": [5, 43], "grad": true, "npz_bytes": n}     npz: x, and grad_output if grad

Answers: {"ok": {...}} to the first two, {"ok": {}, "npz_bytes": n} with the arrays of the run, {"unsupported":
{"field", "value", "why"}} to a build, {"error": "what went wrong"} to any. The child ends when its input does.
"""

from __future__ import annotations

import os
import sys
from typing import Any, BinaryIO

from tracetorch.conformance.protocol import (
    JSON_LIMIT,
    NPZ_LIMIT,
    Json,
    Subject,
    SubjectError,
    Unsupported,
    decode,
    encode,
    read_npz,
    write_npz,
)


def _answer(subject: Subject, request: Json, arrays: Any) -> tuple[Json, bytes]:
    call = request.get("call")
    if call == "describe":
        return {"ok": dict(subject.describe())}, b""
    if call == "build":
        return {"ok": dict(subject.build(request["spec"]))}, b""
    if call == "run":
        content = write_npz(subject.run(arrays["x"], list(request["calls"]), arrays.get("grad_output")))
        return {"ok": {}, "npz_bytes": len(content)}, content
    raise SubjectError(f"call={call!r:.60} is not known; known: describe, build, run")


def serve(subject: Subject, requests: BinaryIO | None = None, answers: BinaryIO | None = None) -> None:
    """Answer requests until they end. Without streams: those of the process, of which nothing else may use the output:
    what the subject prints goes to the error stream.
    """
    if requests is None or answers is None:
        requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
    while line := requests.readline(JSON_LIMIT + 1):
        try:
            request = decode(line)
            size = request.get("npz_bytes", 0)
            if not isinstance(size, int) or not 0 <= size <= NPZ_LIMIT:
                raise SubjectError(f"npz_bytes={size!r:.60}: must be an integer from 0 to {NPZ_LIMIT}")
            arrays = read_npz(requests.read(size)) if size else {}
            answer, content = _answer(subject, request, arrays)
            head = encode(answer)
        except Unsupported as refusal:
            said = {"field": refusal.field, "value": refusal.value, "why": refusal.why}
            head, content = encode({"unsupported": said}), b""
        except Exception as error:  # whatever the subject raises is its answer
            head, content = encode({"error": f"{type(error).__name__}: {error}"[:2000]}), b""
        answers.write(head + content)
        answers.flush()


def main(arguments: list[str]) -> None:
    """Serve one of the subjects of this package, by its name.

    Raises:
        SystemExit: not exactly one name.
        ValueError, ImportError: an unknown subject, or one that cannot run here.
    """
    if len(arguments) != 1:
        raise SystemExit("usage: python -m tracetorch.conformance NAME")
    from tracetorch.conformance.subjects import subject

    serve(subject(arguments[0]))
