"""``python -m fisherkit`` and the console script."""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; exits with the command's code.

    The commands are imported in here, so that Ctrl-C in the first third of a second is answered in one line too.
    """
    try:
        from fisherkit.cli import app

        app(prog_name="fisherkit")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
