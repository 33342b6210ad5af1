"""Compiled inner loops, where llvmlite is there: ``pip install fisherkit[fast]``. Without it the same bits take longer.

LLVM compiles a loop in a few hundredths of a second, in each process and for the processor at hand: no compiler is
needed, and nothing is kept on the disk.
"""

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats, Stored, narrow, widen
from fisherkit.kernels import llvm_loops
from fisherkit.kernels.llvm_loops import LANES, ROW

WORTH_IT = 1 << 26
"""Entries from which on a run is faster with compiled loops: LLVM is 0.1 s and 45 MB."""
CODES = ("BF16", "F16", "F32")
"""Types of stored entries that the loops take; float16 is not blended."""

_COUNTED = 1 << 18  # numbers that numpy takes at a time, which stay in cache
_WORTH_TABLES = 1 << 21  # numbers from which on tables are worth their clearing
_MOST_COUNTED = 1 << 30  # numbers that an int32 can count

_is_on = threading.Event()
_compiling = threading.Lock()
_engines: list[Any] = []  # own the machine code
_ADDRESS, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    llvm_loops.KEEP: [_ADDRESS, _ADDRESS, _INT, *[_FLOAT] * 3, _INT, _INT, *[_ADDRESS] * 5],
    llvm_loops.BLEND: [_ADDRESS, _ADDRESS, _INT, _FLOAT, *[_ADDRESS] * 3],
    llvm_loops.SUMS: [_ADDRESS, _INT, _ADDRESS],
    llvm_loops.COUNT: [_ADDRESS, _INT, _ADDRESS],
}


def switch_on(entries: int) -> None:
    """Have compiled loops used from now on, if llvmlite is there and the work is worth it.

    Args:
        entries: how many there are to work on.
    """
    if entries >= WORTH_IT and importlib.util.find_spec("llvmlite") is not None:
        _is_on.set()


def keep_loop(code: str, metric: str) -> Callable[..., None] | None:
    """Return llvm_loops.keep compiled; None where there is none, and numpy does the work.

    Args:
        code: safetensors code of both sides.
        metric: of fapm.
    """
    if not _is_on.is_set() or code not in CODES or metric not in llvm_loops.METRICS:
        return None
    return _loop(llvm_loops.KEEP, (code, metric))


def blend_loop(code: str, *, masks: bool, scales: bool) -> Callable[..., None] | None:
    """Return llvm_loops.blend compiled; None where there is none.

    Args:
        code: safetensors code of both sides.
        masks: there is a mask.
        scales: there is a factor.
    """
    if not _is_on.is_set() or code not in CODES or code == "F16":
        return None
    return _loop(llvm_loops.BLEND, (code, masks, scales))


def row_sums(stored: Stored, code: str) -> Floats | None:
    """Return the sums of the magnitudes of each whole row of ROW entries, as numpy adds them up; None without a loop.

    Args:
        stored: [n] stored entries.
        code: their safetensors code.
    """
    loop = _loop(llvm_loops.SUMS, (code,)) if _is_on.is_set() and code in CODES else None
    if loop is None:
        return None
    rows = np.empty(stored.size // ROW, np.float32)
    loop(address(stored), rows.size * (ROW // LANES), address(rows))
    return rows


def count_16_bits(numbers: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Return how often each number occurs, [65536]; counted by numpy where there is no loop.

    Args:
        numbers: [n], contiguous.
    """
    loop = _loop(llvm_loops.COUNT, ()) if _is_on.is_set() and numbers.size >= _WORTH_TABLES else None
    total, counted = np.zeros(1 << 16, np.int64), 0
    while loop is not None and numbers.size - counted >= llvm_loops.TABLES:
        words = min(numbers.size - counted, _MOST_COUNTED) // llvm_loops.TABLES
        tables = np.zeros((llvm_loops.TABLES, 1 << 16), np.int32)
        loop(address(numbers[counted:]), words, address(tables))
        total += tables.sum(axis=0)
        counted += words * llvm_loops.TABLES
    for start in range(counted, numbers.size, _COUNTED):
        total += np.bincount(numbers[start : start + _COUNTED], minlength=1 << 16)
    return total


def address(array: NDArray[Any]) -> int:
    """Return where an array begins, for a compiled loop; it must be contiguous and outlive the call."""
    assert array.flags.c_contiguous, "loops go over entries that follow each other"
    return array.ctypes.data


def _loop(name: str, settings: tuple[Any, ...]) -> Callable[..., None] | None:
    with _compiling:
        return _compile(name, settings)


@functools.cache
def _compile(name: str, settings: tuple[Any, ...]) -> Callable[..., None] | None:
    """Compile a loop; None where LLVM will not, or numpy adds up in another order."""
    try:
        loop = _machine_code(name, getattr(llvm_loops, name)(*settings))
    except (ImportError, AttributeError, OSError, RuntimeError):  # of another LLVM than this text is for
        return None
    return loop if name != llvm_loops.SUMS or _adds_as_numpy(loop, settings[0]) else None


def _machine_code(name: str, text: str) -> Callable[..., None]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(text)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return ctypes.CFUNCTYPE(None, *_ARGUMENTS[name])(engine.get_function_address(name))


def _adds_as_numpy(loop: Callable[..., None], code: str) -> bool:
    """Look whether rows are added up in numpy's order, which decides over the last bit of a mean."""
    stored = narrow(np.random.default_rng(0).standard_normal(16 * ROW, dtype=np.float32), code)
    rows = np.empty(16, np.float32)
    loop(address(stored), stored.size // LANES, address(rows))
    return bool(np.array_equal(rows, np.abs(widen(stored, code)).reshape(-1, ROW).sum(axis=1)))
