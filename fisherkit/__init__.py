"""fisherkit: which weights of a language model carry what it can do, which may change, and what to keep.

Everything here is imported on first use: ``import fisherkit`` brings in neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fisherkit._version import __version__

if TYPE_CHECKING:
    from fisherkit.errors import FisherkitError
    from fisherkit.methods.combine.combine import CombineReport, combine
    from fisherkit.methods.extract.dry_run import plan_extract
    from fisherkit.methods.extract.measure import extract
    from fisherkit.methods.extract.output import ExtractReport
    from fisherkit.methods.inspect.summary import Summary, inspect
    from fisherkit.methods.mask.build import MaskReport, mask
    from fisherkit.methods.merge.fapm import fapm
    from fisherkit.methods.merge.fapm_preview import plan_fapm, sweep_fapm
    from fisherkit.methods.merge.fapm_report import FapmReport
    from fisherkit.methods.merge.merge import MergeReport, merge
    from fisherkit.methods.score.report import ScoreReport
    from fisherkit.methods.score.score import score
    from fisherkit.options import CombineOptions, ExtractOptions, FapmOptions, MaskOptions, MergeOptions, ScoreOptions
    from fisherkit.training.mask_input import load_mask
    from fisherkit.training.names import find_weights

_HOMES = {
    "CombineOptions": "fisherkit.options",
    "CombineReport": "fisherkit.methods.combine.combine",
    "ExtractOptions": "fisherkit.options",
    "ExtractReport": "fisherkit.methods.extract.output",
    "FapmOptions": "fisherkit.options",
    "FapmReport": "fisherkit.methods.merge.fapm_report",
    "FisherkitError": "fisherkit.errors",
    "MaskOptions": "fisherkit.options",
    "MaskReport": "fisherkit.methods.mask.build",
    "MergeOptions": "fisherkit.options",
    "MergeReport": "fisherkit.methods.merge.merge",
    "ScoreOptions": "fisherkit.options",
    "ScoreReport": "fisherkit.methods.score.report",
    "Summary": "fisherkit.methods.inspect.summary",
    "combine": "fisherkit.methods.combine.combine",
    "extract": "fisherkit.methods.extract.measure",
    "fapm": "fisherkit.methods.merge.fapm",
    "find_weights": "fisherkit.training.names",
    "inspect": "fisherkit.methods.inspect.summary",
    "load_mask": "fisherkit.training.mask_input",
    "mask": "fisherkit.methods.mask.build",
    "merge": "fisherkit.methods.merge.merge",
    "plan_extract": "fisherkit.methods.extract.dry_run",
    "plan_fapm": "fisherkit.methods.merge.fapm_preview",
    "score": "fisherkit.methods.score.score",
    "sweep_fapm": "fisherkit.methods.merge.fapm_preview",
}

__all__ = [
    "CombineOptions",
    "CombineReport",
    "ExtractOptions",
    "ExtractReport",
    "FapmOptions",
    "FapmReport",
    "FisherkitError",
    "MaskOptions",
    "MaskReport",
    "MergeOptions",
    "MergeReport",
    "ScoreOptions",
    "ScoreReport",
    "Summary",
    "__version__",
    "combine",
    "extract",
    "fapm",
    "find_weights",
    "inspect",
    "load_mask",
    "mask",
    "merge",
    "plan_extract",
    "plan_fapm",
    "score",
    "sweep_fapm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fisherkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
