"""A subject in a child process: started without a shell, spoken to over its standard streams, never believed."""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from tracetorch.conformance.protocol import (
    JSON_LIMIT,
    NPZ_LIMIT,
    PROTOCOL,
    Array,
    Arrays,
    Json,
    SubjectError,
    Unsupported,
    decode,
    encode,
    read_npz,
    write_npz,
)

_PIECE = 2**16


class _Reader:
    """Reads a stream in a thread of its own, so that waiting for it can end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._pieces: queue.Queue[bytes] = queue.Queue(maxsize=64)
        self._rest = b""
        self._stop = threading.Event()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: Any) -> None:
        piece = b"begin"
        while piece and not self._stop.is_set():
            try:
                piece = stream.read1(_PIECE)
            except (OSError, ValueError):
                piece = b""
            while not self._stop.is_set():
                try:
                    self._pieces.put(piece, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def stop(self) -> None:
        """Lets the thread end."""
        self._stop.set()

    def _more(self, deadline: float) -> None:
        try:
            piece = self._pieces.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if not piece:
            raise EOFError
        self._rest += piece

    def line(self, deadline: float) -> bytes:
        """One line, its end included; not more than `JSON_LIMIT` and a piece. Raises `TimeoutError`, `EOFError`."""
        while b"\n" not in self._rest:
            if len(self._rest) > JSON_LIMIT:
                raise SubjectError(f"more than {JSON_LIMIT} bytes without an end of line, where JSON is expected")
            self._more(deadline)
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"

    def exactly(self, size: int, deadline: float) -> bytes:
        """So many bytes. Raises `TimeoutError`, `EOFError`."""
        pieces, have = [self._rest], len(self._rest)
        while have < size:
            self._rest = b""
            self._more(deadline)
            pieces.append(self._rest)
            have += len(self._rest)
        content = b"".join(pieces)
        self._rest = content[size:]
        return content[:size]


class ChildSubject:
    """A subject that is a command.

    A call that takes longer than its time, ends the process or answers rubbish is a `SubjectError`, and the process is
    killed; the next call starts a new one, in which the last neuron is not built.

    Args:
        command: program and arguments; no shell reads them.
        timeout: seconds a call may take.
        start: seconds more for the first call of a process, which may import a framework.
        environment: of the process; None: this one's.
    """

    def __init__(
        self,
        command: Sequence[str],
        timeout: float = 60.0,
        start: float = 60.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(command, str) or not command:
            raise ValueError(f"command={command!r}: must be a list of the program and its arguments, not empty")
        self.command, self.timeout, self.start, self.environment = list(command), timeout, start, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: _Reader | None = None
        self._errors: deque[bytes] = deque(maxlen=20)
        self._allowed = timeout

    # ---- the three calls ------------------------------------------------------------------------------------------

    def describe(self) -> Json:
        """As `Subject.describe`."""
        return self._call({"call": "describe", "protocol": PROTOCOL})[0]

    def build(self, spec: Json) -> Json:
        """As `Subject.build`."""
        return self._call({"call": "build", "spec": spec})[0]

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> Arrays:
        """As `Subject.run`."""
        arrays = {"x": x} if grad_output is None else {"x": x, "grad_output": grad_output}
        content = write_npz(arrays)
        request = {"call": "run", "calls": list(calls), "grad": grad_output is not None, "npz_bytes": len(content)}
        answer = self._call(request, content)[1]
        return read_npz(answer)

    # ---- the process ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if self._reader is not None:
            self._reader.stop()
            self._reader = None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except (BrokenPipeError, ValueError):
                    continue

    def __enter__(self) -> ChildSubject:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=None if self.environment is None else dict(self.environment),
            )
        except OSError as error:
            raise SubjectError(f"{self.command[0]!r} does not start: {error}") from error
        assert process.stdout is not None
        assert process.stderr is not None
        self._errors.clear()
        self._reader = _Reader(process.stdout)  # type: ignore[arg-type]
        threading.Thread(target=self._drain, args=(process.stderr,), daemon=True).start()
        return process

    def _drain(self, stream: Any) -> None:
        try:
            while piece := stream.read1(1024):
                self._errors.append(piece)
        except (OSError, ValueError):
            return

    def _said(self) -> str:
        text = b"".join(self._errors).decode("utf-8", "replace").strip()
        return f"; it last said: {text[-300:]}" if text else ""

    def _send(self, process: subprocess.Popen[bytes], message: bytes, deadline: float) -> None:
        """Write in a thread: a process that does not read must not hold up this one."""
        failed: list[BaseException] = []

        def write() -> None:
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except (OSError, ValueError) as error:
                failed.append(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(max(0.0, deadline - time.monotonic()))
        if writer.is_alive():
            raise TimeoutError
        if failed:
            raise EOFError

    def _exchange(self, request: Json, content: bytes) -> tuple[Json, bytes]:
        self._allowed = self.timeout
        if self._process is None:
            self._allowed += self.start
            self._process = self._start()
        deadline = time.monotonic() + self._allowed
        process, reader = self._process, self._reader
        assert reader is not None
        self._send(process, encode(request) + content, deadline)
        answer = decode(reader.line(deadline))
        size = answer.get("npz_bytes", 0)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= NPZ_LIMIT:
            raise SubjectError(f"npz_bytes={size!r:.60}: must be an integer from 0 to {NPZ_LIMIT}")
        return answer, reader.exactly(size, deadline)

    def _call(self, request: Json, content: bytes = b"") -> tuple[Json, bytes]:
        what = request["call"]
        try:
            answer, received = self._exchange(request, content)
            return self._result(what, answer), received
        except TimeoutError:
            said = self._said()
            self.close()
            raise SubjectError(f"hangs: no answer to {what} within {self._allowed:g} s{said}") from None
        except EOFError:
            assert self._process is not None
            try:
                code = f"exit status {self._process.wait(timeout=1)}"
            except subprocess.TimeoutExpired:
                code = "its output closed"
            said = self._said()
            self.close()
            raise SubjectError(f"crashes: ends before it has answered {what}, {code}{said}") from None
        except SubjectError as error:
            if not isinstance(error, _Answered):
                self.close()
            raise

    def _result(self, what: str, answer: Json) -> Json:
        keys = set(answer) - {"npz_bytes"}
        if keys == {"ok"} and isinstance(answer["ok"], dict):
            return answer["ok"]
        if keys == {"unsupported"} and what in ("build", "run") and isinstance(answer["unsupported"], dict):
            said = answer["unsupported"]
            if set(said) == {"field", "value", "why"} and all(isinstance(text, str) for text in said.values()):
                raise Unsupported(**said)
        if keys == {"error"} and isinstance(answer["error"], str):
            raise _Answered(answer["error"][:2000])
        raise SubjectError(f"answers {what} with neither ok, unsupported nor error: {answer!r:.100}")


class _Answered(SubjectError):
    """An error that the subject reports itself; its process is well."""
