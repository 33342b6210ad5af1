"""``fisherkit`` and ``python`` for shells: programs on the PATH that run in a child of the fork server.

A shell's pipes, redirections and exit codes are those of any program.
"""

import os
import sys
from pathlib import Path

from fork_server import ADDRESS

# -S and -E: the client needs nothing but the standard library, and starts in milliseconds.
_CLIENT = """#!/bin/sh
exec "{python}" -S -E -c '
import json, os, socket, sys
wire = socket.socket(socket.AF_UNIX)
wire.connect("{address}")
socket.send_fds(wire, [b"s"], [0, 1, 2])
with wire.makefile("rw", encoding="utf-8") as answers:
    answers.write(json.dumps({{"words": {words} + sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}) + "\\n")
    answers.flush()
    answers.readline()  # the number of the process
    sys.exit(int(answers.readline()) & 255)
' "$@"
"""


def put(folder: Path) -> str:
    """Put the two programs into a folder, made if need be; returns a PATH that begins with it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in (("fisherkit", '["-m", "fisherkit"]'), ("python", "[]")):
        client = folder / name
        text = _CLIENT.format(python=sys.executable, address=os.environ[ADDRESS], words=words)
        client.write_text(text, encoding="utf-8")
        client.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
