"""Python programs run in children of one process that has imported torch and transformers, so that they start at once.

A test session has one server, which imports nothing before the first request. A client sends its arguments, folder,
environment and standard streams over a socket; the child takes them over and runs as ``python ARGUMENTS`` would. Exit
codes, signals, limits and terminals are those of a process of its own; only what was imported is there already. A test
of what gets imported, or of a fresh interpreter, runs ``sys.executable`` itself.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[2]
ADDRESS = "FISHERKIT_TEST_SERVER"
# What no library reads while it is imported. Where anything else differs from the server's, a real process is started.
LATE = {
    "FISHERKIT_TEST_APART",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "PATH",
    "PWD",
    "OLDPWD",
    "TERM",
    "PYTEST_CURRENT_TEST",
    "_",
}

Done = subprocess.CompletedProcess[str]
Stream = int | IO[Any]


# The client


class Forked:
    """A running program, with as much of subprocess.Popen as tests need."""

    def __init__(
        self,
        words: Sequence[str],
        streams: Sequence[Stream],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._wire = socket.socket(socket.AF_UNIX)
        self._wire.connect(os.environ[ADDRESS])
        about = {"words": list(words), "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        numbers = [one if isinstance(one, int) else one.fileno() for one in streams]
        socket.send_fds(self._wire, [b"s"], numbers)
        self._answers = self._wire.makefile("rw", encoding="utf-8")
        self._answers.write(json.dumps(about) + "\n")
        self._answers.flush()
        self.pid = int(self._answers.readline())

    def send_signal(self, number: int) -> None:
        """Send a signal to the program."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the program's end, and return its exit code, or the negative number of the signal that ended it.

        Args:
            timeout: seconds after which the program and its children are killed, and TimeoutError is raised.
        """
        self._wire.settimeout(timeout)
        with self._wire, self._answers:
            try:
                return int(self._answers.readline())
            except TimeoutError:
                os.killpg(self.pid, signal.SIGKILL)
                raise


def run(
    words: Sequence[str],
    *,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
    timeout: float = 300,
) -> Done:
    """Run ``python WORDS`` and catch what it prints, as subprocess.run does.

    Args:
        words: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``.
        stdin: what the program reads; None is this process's own stdin.
        cwd: the program's folder; None is this process's own.
        env: environment variables that are added to this process's own, or that replace them.
        fresh: start an interpreter that has imported nothing.
        timeout: seconds after which the program is killed, and an exception raised.
    """
    environment = {**os.environ, **(env or {})}
    if fresh or not _can_fork(env or {}):
        return subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            check=False,
            input=stdin,
            cwd=cwd,
            env=environment,
            timeout=timeout,
        )
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryFile("w+", encoding="utf-8") as given:
        given.write(stdin or "")
        given.seek(0)
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()  # not files, which limits on a program's writes would cut
        program = Forked(words, (0 if stdin is None else given, to_out, to_err), cwd=cwd, env=environment)
        os.close(to_out)
        os.close(to_err)
        streams = pool.map(_read_all, (out, err))
        return subprocess.CompletedProcess([sys.executable, *words], program.wait(timeout), *streams)


def _read_all(pipe: int) -> str:
    with open(pipe, encoding="utf-8") as file:
        return file.read()


def _can_fork(changes: Mapping[str, str]) -> bool:
    return ADDRESS in os.environ and all(name in LATE or os.environ.get(name) == changes[name] for name in changes)


# The server


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start a server whose address stands in the environment from now on; it ends when its stdin is closed.

    Args:
        folder: where its socket goes; a socket's path holds some 100 bytes at most.
    """
    address = str(folder / "socket")
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONPATH"] = search  # the same for real processes, so that both find the package
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        server = subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest
        )
    os.environ[ADDRESS] = address
    return server


def serve(listening: socket.socket) -> None:
    """Answer clients until stdin ends; the first of them waits for the imports."""
    ready, _, _ = select.select([listening, 0], [], [])
    if 0 in ready:
        return
    _import_what_is_slow()
    gc.collect()
    gc.freeze()  # or the first collection in each child copies all that is there
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while 0 not in select.select([listening, 0], [], [])[0]:
        wire, _ = listening.accept()
        with wire:
            if os.fork() == 0:
                listening.close()
                _keep(wire)


def _import_what_is_slow() -> None:
    import torch  # noqa: F401
    import transformers

    import fisherkit.cli
    import fisherkit.methods.extract.measure
    import fisherkit.methods.merge.fapm  # noqa: F401

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM"):
        getattr(transformers, name)


def _keep(wire: socket.socket) -> NoReturn:
    """Run one program in a child, and tell its client the child's number and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(wire, 1, 3)
    with wire.makefile("rw", encoding="utf-8") as answers:
        about = json.loads(answers.readline())
        child = os.fork()
        if child:
            for stream in streams:
                os.close(stream)
            answers.write(f"{child}\n")
            answers.flush()
            answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
            answers.flush()
            os._exit(0)
    wire.close()
    os.setsid()  # so that it can be killed with its children
    _take_over(streams)
    os._exit(_run(about))


def _take_over(streams: Sequence[int]) -> None:
    """Make the client's streams this process's own."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115


def _run(about: Mapping[str, Any]) -> int:
    """Run the program, and end as the interpreter does, but for taking torch apart, which takes a second."""
    code = 0
    try:
        _become(about)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        print(f"Exception ignored while flushing sys.stdout: {error!r}", file=sys.stderr)
        return 120
    return code


def _become(about: Mapping[str, Any]) -> None:
    """Run the program in its folder and environment."""
    os.chdir(about["cwd"])
    os.environ.clear()
    os.environ.update(about["env"])
    kind, *words = about["words"]
    sys.path[0] = about["cwd"]
    if kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    else:
        sys.argv, sys.path[0] = about["words"], str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
