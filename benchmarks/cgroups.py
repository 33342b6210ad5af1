"""A memory cgroup (v2 or v1) with a limit, for a process to enter; needs root."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOTS = (  # folder, file of the limit
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


@contextmanager
def limited(limit: int) -> Iterator[Callable[[], object] | None]:
    """Yield a function that a process calls to enter a fresh cgroup of this limit; None where we may not make one."""
    group = make_group(limit)
    if group is None:
        yield None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def make_group(limit: int) -> Path | None:
    """Make a fresh memory cgroup with this limit in bytes; None where we may not."""
    for root, file in ROOTS:
        group = root / f"fisherkit-{os.getpid()}"
        try:
            if not (root / "cgroup.procs").is_file():
                continue
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    return None
