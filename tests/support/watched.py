"""Run one fisherkit command under limits, writing down its changes of the file system; or die before the n-th of them.

python watched.py '{"words": ["inspect", "fisher.pt"], "log": "changes.txt", "kill_at": 7}'
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def watch(kill_at: int, log: int) -> None:
    """Write every change of the file system to the descriptor ``log``, and die before the ``kill_at``-th."""
    seen = [0]

    def hook(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or not isinstance(details[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(details[0]))
        if path == os.devnull:
            return
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(log, f"{event}\t{path}\n".encode(errors="backslashreplace"))

    sys.addaudithook(hook)


def limit(request: dict[str, Any]) -> None:
    """Bound the memory above what the process has now, and the size of a file that it may write; in bytes."""
    if request.get("memory_bytes"):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + request["memory_bytes"],) * 2)
    if request.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)


def main() -> None:
    """Become the command that the request names."""
    request = json.loads(sys.argv[1])
    sys.argv = ["fisherkit", *request["words"]]
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # a killed process loses nothing that it wrote
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    from fisherkit.__main__ import main as fisherkit

    limit(request)
    watch(request.get("kill_at", 0), log)
    fisherkit()


if __name__ == "__main__":
    main()
