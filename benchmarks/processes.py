"""Running a command and measuring it: seconds, CPU seconds, peak memory of its process tree, and how busy the rest was.

Standard library only: a child's peak counts from its parent's memory at the fork, so the parent stays small.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CALM = 0.1  # share of all cores that others may use before a side starts
_PROBE_SECONDS = 0.5
_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Took:
    """Time and memory that a command took.

    Attributes:
        seconds: wall time, from before the fork to after the exit.
        cpu: user and system seconds of the process and its children.
        peak: bytes resident at most, over the process tree; mapped files count as far as they are resident.
        private: the same without pages of files, sampled every 10 ms.
        others: share of all cores that everything else used meanwhile, the kernel's own threads included.
    """

    seconds: float
    cpu: float
    peak: int
    private: int
    others: float


def measure(command: Sequence[str], *, patience: float = 0) -> Took:
    """Wait for a calm moment, at most ``patience`` seconds, and run the command; ends this process if it fails."""
    wait_for_calm(patience)
    os.sync()
    before, started = _busy_seconds(), time.monotonic()
    process = subprocess.Popen(
        command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with _Sampler(process.pid) as sampler:
        said = process.stderr.read() if process.stderr else b""  # until it exits
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(command)} ended with {process.returncode}\n{said.decode(errors='replace')[-1000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    others = max(0.0, _busy_seconds() - before - cpu) / seconds / (os.cpu_count() or 1)
    return Took(seconds, cpu, max(usage.ru_maxrss * 1024, sampler.resident), sampler.private, others)


def wait_for_calm(patience: float) -> None:
    """Return when the machine is nearly idle, or after ``patience`` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before, started = _busy_seconds(), time.monotonic()
        time.sleep(_PROBE_SECONDS)
        if (_busy_seconds() - before) / (time.monotonic() - started) / (os.cpu_count() or 1) < _CALM:
            return


def evict(files: Iterable[Path]) -> None:
    """Have the system forget what it holds of these files in memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _environment() -> dict[str, str]:
    """Ours, without what slows every start: both sides may keep their bytecode."""
    left_out = ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME")
    return {key: value for key, value in os.environ.items() if key not in left_out} | {"HF_HUB_OFFLINE": "1"}


def _busy_seconds() -> float:
    """Seconds that all cores have worked since the machine was started."""
    user, nice, system, _idle, _waiting, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


class _Sampler:
    """Samples the highest sums of resident and private memory over a process tree."""

    def __init__(self, pid: int) -> None:
        self.resident = self.private = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            found = [_memory(pid) for pid in _tree(self._pid)]
            self.resident = max(self.resident, sum(resident for resident, _ in found))
            self.private = max(self.private, sum(private for _, private in found))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from _tree(int(child))


def _memory(pid: int) -> tuple[int, int]:
    """Resident bytes, and those of them that are no pages of files."""
    try:
        _size, resident, files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - files) * page
