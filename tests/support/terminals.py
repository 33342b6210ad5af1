"""Programs that run with a terminal for stdout and stderr."""

import os
import pty
import subprocess
import sys
import termios


def in_a_terminal(code: str, **environment: str) -> str:
    """What a Python program prints when stdout and stderr are a terminal of 100 columns."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (50, 100))
    fixed = {"PYTHONPATH": os.getcwd(), "TERM": "xterm-256color", "PATH": os.environ["PATH"]}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, env=fixed | environment)
    os.close(child)
    output = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(parent)
    assert process.wait() == 0, output.decode()
    return output.decode()
