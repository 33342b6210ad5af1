"""Options of every command, as frozen dataclasses that check themselves.

Standard library only: building options must not import torch.
"""

from fisherkit.options.checks import (
    check_pull,
    check_steps,
    exact_share,
    parse_bytes,
    parse_json,
    parse_layers,
    parse_rate,
    parse_shares,
)
from fisherkit.options.combine import CombineOptions
from fisherkit.options.extract import ExtractOptions, PromptOptions, RunOptions
from fisherkit.options.fields import parse_field
from fisherkit.options.mask import Direction, ExportOptions, MaskOptions, Selection
from fisherkit.options.merge import FapmOptions, MergeOptions, Metric, PairOptions, Side
from fisherkit.options.score import ScoreOptions

__all__ = [
    "CombineOptions",
    "Direction",
    "ExportOptions",
    "ExtractOptions",
    "FapmOptions",
    "MaskOptions",
    "MergeOptions",
    "Metric",
    "PairOptions",
    "PromptOptions",
    "RunOptions",
    "ScoreOptions",
    "Selection",
    "Side",
    "check_pull",
    "check_steps",
    "exact_share",
    "parse_bytes",
    "parse_field",
    "parse_json",
    "parse_layers",
    "parse_rate",
    "parse_shares",
]
