"""``python -m fisherkit`` and the console script."""

import os
import sys
import time

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; exits with the command's code.

    The commands are imported in here, so that Ctrl-C in the first third of a second is answered in one line too.
    """
    follows = _follows()
    try:
        from fisherkit.cli import app

        app(prog_name="fisherkit")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as end:
        if follows and end.code:
            time.sleep(1)  # a launcher ends all ranks once one has ended: the first must have spoken before
        raise


def _follows() -> bool:
    """Return whether this is one of several ranks and not the first, which alone speaks: the others are silenced.

    So are torch's C++ parts, which tell at length that a peer is gone. What a rank must say all the same goes to
    ``sys.__stderr__``.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "--debug" in sys.argv:
        return False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("RANK", "0") == "0":
        return False
    sys.__stderr__ = os.fdopen(os.dup(2), "w", encoding="utf-8")  # type: ignore[misc]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return True


if __name__ == "__main__":
    main()
