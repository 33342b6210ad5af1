"""fisherkit: which weights of a language model carry what it can do, which may change, and what to keep.

Everything here is imported on first use: ``import fisherkit`` brings in neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisherkit.errors import FisherkitError
    from fisherkit.methods.fapm import fapm, plan_fapm, sweep_fapm
    from fisherkit.methods.fapm_report import FapmReport
    from fisherkit.methods.fisher import ExtractReport, extract, plan_extract
    from fisherkit.methods.masks import MaskReport, mask
    from fisherkit.methods.merge import MergeReport, merge
    from fisherkit.methods.summary import Summary, inspect
    from fisherkit.options import ExtractOptions, FapmOptions, MaskOptions, MergeOptions
    from fisherkit.training.sources import load_mask

__version__ = "0.1.0"

_HOMES = {
    "ExtractOptions": "fisherkit.options",
    "ExtractReport": "fisherkit.methods.fisher",
    "FapmOptions": "fisherkit.options",
    "FapmReport": "fisherkit.methods.fapm_report",
    "FisherkitError": "fisherkit.errors",
    "MaskOptions": "fisherkit.options",
    "MaskReport": "fisherkit.methods.masks",
    "MergeOptions": "fisherkit.options",
    "MergeReport": "fisherkit.methods.merge",
    "Summary": "fisherkit.methods.summary",
    "extract": "fisherkit.methods.fisher",
    "fapm": "fisherkit.methods.fapm",
    "inspect": "fisherkit.methods.summary",
    "load_mask": "fisherkit.training.sources",
    "mask": "fisherkit.methods.masks",
    "merge": "fisherkit.methods.merge",
    "plan_extract": "fisherkit.methods.fisher",
    "plan_fapm": "fisherkit.methods.fapm",
    "sweep_fapm": "fisherkit.methods.fapm",
}

__all__ = [
    "ExtractOptions",
    "ExtractReport",
    "FapmOptions",
    "FapmReport",
    "FisherkitError",
    "MaskOptions",
    "MaskReport",
    "MergeOptions",
    "MergeReport",
    "Summary",
    "__version__",
    "extract",
    "fapm",
    "inspect",
    "load_mask",
    "mask",
    "merge",
    "plan_extract",
    "plan_fapm",
    "sweep_fapm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fisherkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
