"""A GPU's part played by the CPU: kernels as Triton compiles them for one, launched by its own launcher.

Triton's launcher for CUDA packs the arguments and hands them to `cuLaunchKernelEx`. Here that is a function of a small
stand-in for the driver's library, which runs the kernel's PTX, each instruction translated to a statement of C, for
every thread in turn. So what is compiled and what is launched is tested on the tensors' memory; what ptxas and the
hardware make of the PTX is not. An instruction that is not translated is refused by name. What is read, written or
asked for outside of the launch's tensors, or at an address that is no multiple of its size, is counted and refused.
"""

from __future__ import annotations

import atexit
import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton_without_gpu import Driver, triton

_DRIVER = """
#include <stdint.h>
#include <string.h>
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned count; } Launch;
typedef void (*Thread)(void **parameters, uint32_t program, uint32_t thread);
uint64_t tensors[64][2];
int64_t known, faults;
void *allowed(uint64_t address, uint64_t size) {
  static char nowhere[64];
  if (address % size == 0)
    for (int64_t k = 0; k < known; k++)
      if (tensors[k][0] <= address && address + size <= tensors[k][1]) return (void *)address;
  faults++;
  return nowhere;
}
int cuLaunchKernelEx(const Launch *launch, void *function, void **parameters, void **extra) {
  if (launch->grid[1] != 1 || launch->grid[2] != 1 || launch->block[1] != 1 || launch->shared) return 1;
  for (uint32_t program = 0; program < launch->grid[0]; program++)
    for (uint32_t thread = 0; thread < launch->block[0]; thread++)
      ((Thread)function)(parameters, program, thread);
  return 0;
}
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { memcpy(data, &pointer, 8); return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "a launch that these kernels have no use for"; return 0; }
"""
_HEAD = """
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
static inline float to_f32(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double to_f64(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint32_t of_f32(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint64_t of_f64(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static float __attribute__((noinline)) fma_down(float a, float b, float c) {
  fesetround(FE_DOWNWARD);
  volatile float x = fmaf(a, b, c);
  fesetround(FE_TONEAREST);
  return x;
}
// NaN loses, and of two zeros the positive one is the larger.
#define LARGER(a, b) (isnan(a) ? (b) : isnan(b) ? (a) : (a) > (b) ? (a) : (b) > (a) ? (b) : signbit(a) ? (b) : (a))
#define SMALLER(a, b) (isnan(a) ? (b) : isnan(b) ? (a) : (a) < (b) ? (a) : (b) < (a) ? (b) : signbit(a) ? (a) : (b))
void *allowed(uint64_t address, uint64_t size);
"""
_FLAGS = ("-O1", "-w", "-ffp-contract=off", "-frounding-math", "-fPIC", "-shared")
_C_TYPES = {"b": "uint{}_t", "u": "uint{}_t", "s": "int{}_t"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^"}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARED |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_OPPOSITE = {"eq": "!=", "ne": "==", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
_ROUNDED = {"rni": "rint", "rmi": "floor", "rpi": "ceil", "rzi": "trunc"}
_SPECIAL = {"ex2": "exp2", "lg2": "log2", "rcp": "1 / ", "sqrt": "sqrt"}


def _value(operand: str, kind: str) -> str:
    """An operand read as a type of PTX, such as s64, f32 or pred."""
    if operand.startswith("%tid") or operand.startswith("%ctaid"):
        assert operand in ("%tid.x", "%ctaid.x"), operand
        return "thread" if operand == "%tid.x" else "program"
    hexadecimal = re.fullmatch(r"0([fd])([0-9A-F]+)", operand)
    if hexadecimal:
        bits = f"0x{hexadecimal[2]}" + ("ull" if hexadecimal[1] == "d" else "u")
    else:
        bits = operand.removeprefix("%") if operand.startswith("%") else f"{operand}ll"
    if kind == "pred":
        return bits
    if kind[0] == "f":
        return f"to_{kind}({bits})"
    return f"({_C_TYPES[kind[0]].format(kind[1:])}){bits}"


def _put(target: str, kind: str, value: str) -> str:
    name = target.removeprefix("%")
    return f"{name} = of_{kind}({value});" if kind[0] == "f" else f"{name} = {value};"


def _compared(name: str, kind: str, a: str, b: str) -> str:
    """A comparison; of floating point, one with a `u` after its name holds for NaN too."""
    if kind[0] == "f" and name not in _COMPARED:
        if name in ("num", "nan"):
            return f"{'' if name == 'nan' else '!'}(isnan({a}) || isnan({b}))"
        return f"!({a} {_OPPOSITE[name.removesuffix('u')]} {b})" if name != "equ" else f"!({a} < {b} || {a} > {b})"
    if kind[0] == "f" and name == "ne":
        return f"({a} < {b} || {a} > {b})"
    return f"{a} {_COMPARED[name]} {b}"


def _computed(op: str, given: list[str]) -> tuple[str, str]:
    """What an instruction gives, and the type of that."""
    name, *words = op.split(".")
    kind = words[-1]
    values = [_value(operand, kind) for operand in given]
    suffix = "f" if kind == "f32" else ""
    match name:
        case "add" | "sub" | "mul" | "div" | "rem" | "and" | "or" | "xor" if "wide" not in words:
            assert words[:-1] in ([], ["rn"] if kind[0] == "f" else ["lo"]), op
            if kind[0] == "s" and name in ("add", "sub", "mul"):  # wraps round
                kind = f"u{kind[1:]}"
                values = [_value(operand, kind) for operand in given]
            return f"{values[0]} {_INFIX[name]} {values[1]}", kind
        case "mul":
            assert words == ["wide", kind], op
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return f"{_value(given[0], kind)} * ({_C_TYPES[wide[0]].format(wide[1:])}){_value(given[1], kind)}", wide
        case "mad":
            assert words[0] == "lo", op
            a, b, c = (_value(operand, f"u{kind[1:]}") for operand in given)
            return f"{a} * {b} + {c}", f"u{kind[1:]}"
        case "fma":
            assert words in (["rn", kind], ["rm", "f32"]), op
            if "rm" in words:
                return f"fma_down({', '.join(values)})", kind
            return f"fma{suffix}({', '.join(values)})", kind
        case "neg":
            return f"-{values[0]}", kind
        case "not":
            return f"{'!' if kind == 'pred' else '~'}{values[0]}", kind
        case "abs":
            assert kind[0] == "f", op
            return f"fabs{suffix}({values[0]})", kind
        case "min" | "max" if kind[0] != "f":
            return f"{values[0]} {'<' if name == 'min' else '>'} {values[1]} ? {values[0]} : {values[1]}", kind
        case "min" | "max":
            assert words == [kind] or words == ["NaN", kind], op
            picked = f"{'SMALLER' if name == 'min' else 'LARGER'}({', '.join(values)})"
            nan = f"isnan({values[0]}) || isnan({values[1]}) ? NAN : "
            return f"{nan if words[0] == 'NaN' else ''}{picked}", kind
        case "shl" | "shr":
            return f"{values[0]} {'<<' if name == 'shl' else '>>'} {_value(given[1], 'u32')}", kind
        case "setp":
            assert len(words) == 2, op
            return _compared(words[0], kind, *values), "pred"
        case "selp":
            return f"{given[2].removeprefix('%')} ? {values[0]} : {values[1]}", kind
        case "ex2" | "lg2" | "rcp" | "sqrt":
            return f"{_SPECIAL[name]}{suffix if name != 'rcp' else ''}({values[0]})", kind
        case "cvt":
            target = words[-2]
            if "sat" in words:
                x = values[0]
                return f"{x} > 0 ? {x} < 1 ? {x} : 1 : 0", target
            if words[0] in _ROUNDED:
                return f"{_ROUNDED[words[0]]}{suffix}({values[0]})", target
            return values[0], target
        case "mov" if not given[0].startswith("{"):
            return values[0], kind
        case "mov":
            low, high = given[0].strip("{} ").split(", ")
            return f"{_value(low, 'u32')} | (uint64_t){_value(high, 'u32')} << 32", kind
    raise NotImplementedError(f"PTX instruction {op}")


def _moved(op: str, registers: str, address: str) -> str:
    """A load from memory or a store, of one value or a vector."""
    kind = op.split(".")[-1]
    size, names = int(kind[1:]) // 8, registers.strip("{} ").split(", ")
    place, _, offset = address.strip("[] ").partition("+")
    address = f"{place.strip()[1:]} + {offset or 0}"
    lines = []
    for k, name in enumerate(names):
        at = f"(({_C_TYPES['u'].format(8 * size)} *)allowed({address}, {size * len(names)}))[{k}]"
        register = name.strip().removeprefix("%")
        lines.append(f"{register} = {at};" if op.startswith("ld") else f"{at} = {_value(name.strip(), kind)};")
    return " ".join(lines)


def _statement(text: str) -> str:
    """One instruction as C."""
    guard, instruction = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*)", text).groups()  # type: ignore[union-attr]
    op, _, rest = instruction.partition(" ")
    operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest)]
    if op.startswith("bra"):
        found = f"goto {operands[0].removeprefix('$')};"
    elif op == "ret":
        found = "return;"
    elif op.startswith("prefetch"):
        found = f"allowed({_value(operands[0].strip('[] '), 'u64')}, 1);"
    elif op.startswith("ld.param"):
        number = re.search(r"param_(\d+)", rest)[1]  # type: ignore[index]
        found = f"{operands[0][1:]} = *(uint{op.split('.')[-1][1:]}_t *)parameters[{number}];"
    elif op.startswith("ld.global"):
        found = _moved(op, *operands)
    elif op.startswith("st.global"):
        found = _moved(op, operands[1], operands[0])
    elif operands[0].startswith("{"):  # the halves of a register
        low, high = operands[0].strip("{} ").split(", ")
        halves = {low: f"(uint32_t){operands[1][1:]}", high: f"{operands[1][1:]} >> 32"}
        found = " ".join(f"{name[1:]} = {half};" for name, half in halves.items() if name.startswith("%"))
    else:
        value, kind = _computed(op, operands[1:])
        found = _put(operands[0], kind, value)
    return f"if ({guard.replace('%', '')}) {{ {found} }}" if guard else found


def translated(ptx: str) -> str:
    """The one kernel of a PTX text as a function of C that is one of its threads."""
    body = ptx[ptx.index("\n{", ptx.index(".entry")) + 2 :]
    body = re.sub(r"//.*", "", body[: body.index("\n}")])
    registers: list[str] = []
    for kind, prefix, count in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", body):
        declared = "int" if kind == "pred" else _C_TYPES["u"].format(kind[1:])
        registers.append(f"{declared} {', '.join(f'{prefix}{k}' for k in range(int(count)))};")
    lines = []
    for line in body.splitlines():
        text = re.sub(r"\s+", " ", line).strip()
        text = re.sub(r"^\{ (\.reg .*) \}$", r"\1", text)
        if not text or (text.startswith((".loc", ".reg .pred %", ".reg .b", "{", "}", "asm")) and "tmp;" not in text):
            continue
        if re.fullmatch(r"\$?\w+:", text):
            lines.append(f"{text.removeprefix('$')};")
            continue
        parts = [part.strip() for part in text.split(";")]
        lines += [_statement(part) for part in parts if part and not part.startswith(".")]
    return "\n".join(
        [_HEAD, "void thread(void **parameters, uint32_t program, uint32_t thread) {", *registers, *lines, "}"]
    )


def _library(folder: Path, name: str, source: str, *flags: str) -> Path:
    code = folder / f"{name}.c"
    code.write_text(source)
    made = folder / name
    subprocess.run(["cc", *_FLAGS, *flags, "-o", str(made), str(code), "-lm"], check=True, timeout=300)
    return made


@cache
def _driver_library() -> tuple[str, ctypes.CDLL]:
    """The stand-in for the driver's library, one in a process: Triton's launchers find it by its name."""
    folder = tempfile.mkdtemp(prefix="tracetorch-libcuda-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = _library(Path(folder), "libcuda.so.1", _DRIVER, "-Wl,-soname,libcuda.so.1")
    return folder, ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


class Machine(Driver):
    """Triton's view of a GPU whose kernels run here: its own launcher, and PTX translated to C.

    Args:
        folder: for what is compiled.
        capability: of the GPU, 90 for sm_90.
    """

    def __init__(self, folder: Path, capability: int = 90) -> None:
        super().__init__()
        self.folder, self.capability, self.latest = folder, capability, ""
        self.library = _driver_library()[1]
        self.kernels: list[ctypes.CDLL] = []

    def load_start(self, module: object, function: object, name: str, files: Mapping[str, str], digest: str) -> None:
        """Triton's hook: the next binary that it loads is of these files."""
        self.latest = next(Path(path).read_text() for key, path in files.items() if key.endswith(".ptx"))

    def load_binary(self, *_: object) -> tuple[object, int, int, int, int]:
        self.loaded += 1
        self.kernels.append(ctypes.CDLL(str(_library(self.folder, f"kernel{self.loaded}.so", translated(self.latest)))))
        address = ctypes.cast(self.kernels[-1].thread, ctypes.c_void_p).value
        assert address is not None
        return "module", address, 32, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Triton's launcher, and a look at what the kernel did."""
        launcher = triton.backends.nvidia.driver.CudaLauncher(source, metadata)

        def launch(*given: Any) -> None:
            self.launched.append(given[:4])
            tensors = [each for each in given[9:] if isinstance(each, torch.Tensor)]  # after metadata and hooks
            places = [end for t in tensors for end in (t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize)]
            (ctypes.c_uint64 * 128).in_dll(self.library, "tensors")[: len(places)] = places
            ctypes.c_int64.in_dll(self.library, "known").value = len(tensors)
            faults = ctypes.c_int64.in_dll(self.library, "faults")
            faults.value = 0
            launcher(*given)
            assert not faults.value, f"{faults.value} reads and writes outside of the tensors, or across their elements"

        return launch

    def get_current_target(self) -> object:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path, capability: int = 90) -> Machine:
    """A machine that Triton takes for its GPU, until the test ends."""
    import triton.backends.nvidia.driver as nvidia

    monkeypatch.setattr(nvidia, "libcuda_dirs", lambda: [_driver_library()[0]])
    nvidia.library_dirs.cache_clear()
    found = Machine(folder, capability)
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(triton.knobs.runtime, "kernel_load_start_hook", found.load_start)
    return found
