"""``python -m fisherkit`` and the console script."""

from fisherkit.cli import app


def main() -> None:
    """Run the command line; exits with the command's code."""
    app(prog_name="fisherkit")


if __name__ == "__main__":
    main()
