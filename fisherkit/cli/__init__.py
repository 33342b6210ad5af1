"""Commands. Each turns its options into a dataclass, calls one function of the library, and shows what it returns.

torch, transformers and the methods that need them are imported inside the commands: ``--help`` is instant. The order
of the imports below is that of the commands in the help.
"""

from fisherkit.cli import extract, combine, inspect, mask, fapm, merge, score, export, demo  # noqa: I001, F401
from fisherkit.cli.app import app

__all__ = ["app"]
