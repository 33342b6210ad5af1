"""fisherkit: which weights of a language model carry what it can do, which may change, and what to keep.

Everything here is imported on first use: ``import fisherkit`` brings in neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisherkit.errors import FisherkitError
    from fisherkit.methods.fisher import ExtractReport, extract, plan_extract
    from fisherkit.methods.summary import Summary, inspect
    from fisherkit.options import ExtractOptions

__version__ = "0.1.0"

_HOMES = {
    "ExtractOptions": "fisherkit.options",
    "ExtractReport": "fisherkit.methods.fisher",
    "FisherkitError": "fisherkit.errors",
    "Summary": "fisherkit.methods.summary",
    "extract": "fisherkit.methods.fisher",
    "inspect": "fisherkit.methods.summary",
    "plan_extract": "fisherkit.methods.fisher",
}

__all__ = [
    "ExtractOptions",
    "ExtractReport",
    "FisherkitError",
    "Summary",
    "__version__",
    "extract",
    "inspect",
    "plan_extract",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fisherkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
