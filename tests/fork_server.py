"""Programs run in children of one process that has imported torch and transformers, so that each starts at once.

``programs`` starts the server and makes a folder with two clients, ``fisherkit`` and ``python``, to be put on the PATH.
A client sends its arguments, folder, environment and standard streams over a socket. The server forks; the child takes
all of that over, runs the program as its own process would, and ends as it does. The client exits with the same code.
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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent

# -S and -E: the client needs nothing but the standard library, and should start in milliseconds.
_CLIENT = """#!/bin/sh
exec "{python}" -S -E -c '
import json, os, socket, sys
wire = socket.socket(socket.AF_UNIX)
wire.connect("{address}")
about = {{"words": ["{name}", *sys.argv[1:]], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(wire, [b"s"], [0, 1, 2])
with wire.makefile("rw") as file:
    file.write(json.dumps(about) + "\\n")
    file.flush()
    sys.exit(int(file.readline() or 1))
' "$@"
"""


@contextmanager
def programs(folder: Path) -> Iterator[Path]:
    """Start a server, and put its two clients into ``folder``.

    Args:
        folder: made if need be.

    Yields:
        The folder, for the PATH of whoever runs ``fisherkit ...`` or ``python FILE ...``.
    """
    with tempfile.TemporaryDirectory() as short:  # a socket's path holds some 100 bytes at most
        address = Path(short) / "socket"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("fisherkit", "python"):
            client = folder / name
            client.write_text(_CLIENT.format(python=sys.executable, address=address, name=name), encoding="utf-8")
            client.chmod(0o755)
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command, environment = [sys.executable, __file__, str(address)], {**os.environ, "PYTHONPATH": search}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            try:
                assert server.stdout.readline(), "the server said nothing: it ended while it imported"
                yield folder
            finally:
                server.stdin.close()  # it ends with its stdin, also where this process is killed


def serve(address: str) -> None:
    """Import what programs need, say that all is ready, then answer clients until stdin ends."""
    _import_what_is_slow()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
        gc.collect()
        gc.freeze()  # or the first collection in each child copies all that is there
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listening, 0], [], [])
            if 0 in ready:
                return
            wire, _ = listening.accept()
            with wire:
                if os.fork() == 0:
                    listening.close()
                    _keep(wire)


def _import_what_is_slow() -> None:
    import peft  # noqa: F401
    import transformers

    import fisherkit.methods.extract.measure
    import fisherkit.training.fggm  # noqa: F401

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "Trainer"):
        getattr(transformers, name)


def _keep(wire: socket.socket) -> NoReturn:
    """Run one program in a child of its own and tell its client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(wire, 1, 3)
    with wire.makefile("rw") as file:
        about = json.loads(file.readline())
        child = os.fork()
        if child:
            for stream in streams:
                os.close(stream)
            file.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
            file.flush()
            os._exit(0)
    wire.close()
    _take_over(streams)
    os._exit(_exit_code(about))


def _take_over(streams: list[int]) -> None:
    """Make the client's streams this process's own."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115


def _exit_code(about: dict[str, Any]) -> int:
    """Run the program and do what the interpreter does at its end, but for taking torch apart, which takes a second."""
    code = 0
    try:
        _become(about)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    return code


def _become(about: dict[str, Any]) -> None:
    """Run the program in its folder and environment."""
    os.chdir(about["folder"])
    os.environ.clear()
    os.environ.update(about["environment"])
    program, *words = about["words"]
    if program == "fisherkit":
        sys.argv = [program, *words]
        runpy.run_module("fisherkit", run_name="__main__")
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
