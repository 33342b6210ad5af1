"""``export``: what other tools can take of a mask without code of ours, as a small text file.

None of them holds a training run to a mask entry by entry: axolotl and LLaMA-Factory freeze whole tensors or layers and
set learning rates, mergekit weighs layers of a finished fine-tune, and peft's SHiRA trains as many entries as a LoRA of
rank r would, which are drawn from those that the mask lets change. What gets lost is said at the top of each file.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherkit.artefacts.layer_importance import layer_scales, read_importance
from fisherkit.artefacts.mask_file import MaskFile, open_mask
from fisherkit.checkpoint.atomic import write_text
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.checkpoint.names.location import Place, block_prefix, locate
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.methods.export.shira import shira_text
from fisherkit.options import ExportOptions


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of a mask: where it sits, its entries, and how many of them may change."""

    name: str
    place: Place
    numel: int
    kept: int
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """What a file says, as far as other tools can be told.

    Attributes:
        path: the file.
        model: that it was measured on; empty where unknown.
        layers: by number, the share of the layer that may change, or the factor of its updates; ascending.
        prefix: of the layers' names, ``model.layers``.
        weights: of a mask; empty for layer importance.
    """

    path: Path
    model: str
    layers: Mapping[int, float]
    prefix: str
    weights: tuple[Weight, ...] = ()


def export(source: str | os.PathLike[str], options: ExportOptions) -> str:
    """The text for another tool.

    Args:
        source: a mask, or a ``layer_importance.json`` where layers are enough.
        options: see ExportOptions.

    Raises:
        CheckpointError: the file cannot be read, is a subspace, or has nothing for that tool.
        OptionError: the tool needs a mask, not layer importance.
    """
    path = Path(source)
    wanted = _from_importance(path) if path.suffix == ".json" else _from_mask(path)
    if options.to == "peft-shira" and not wanted.weights:
        raise OptionError(f"--to peft-shira needs a mask with its weights; {path} holds layers only")
    if options.to != "peft-shira" and not wanted.layers:
        raise CheckpointError(f"{path}: none of its tensors lies in a layer, and {options.to} is told of layers")
    return _WRITERS[options.to](wanted, options)


def write_export(source: str | os.PathLike[str], out: Path, options: ExportOptions) -> Path:
    """Write that text to ``out``; see ``export``.

    Raises:
        OutputError: ``out`` exists (unless ``force``), is the source, or cannot be written.
    """
    text = export(source, options)
    if out.exists() and (out.resolve() == Path(source).resolve() or out.is_dir() or not options.force):
        raise OutputError(f"{out}: exists already; choose another name, or --force to replace a file")
    write_text(out, text)
    return out


# What is read


def _from_importance(path: Path) -> MaskFacts:
    scales = layer_scales(read_importance(path))
    content = json.loads(path.read_bytes())
    rows = content.get("layers") if isinstance(content, dict) else None
    named = str(rows[0].get("name", "")) if isinstance(rows, list) and rows and isinstance(rows[0], dict) else ""
    model = str(content.get("model", "")) if isinstance(content, dict) else ""
    return MaskFacts(
        path=path, model=model, layers=dict(sorted(scales.items())), prefix=named.rpartition(".")[0] or "layers"
    )


def _from_mask(path: Path) -> MaskFacts:
    with open_mask(path) as file:
        if file.kind != "mask":
            raise CheckpointError(f"{path}: is a subspace, which no other tool takes; give a mask")
        prefix = block_prefix(file.names)
        axes = _axes(file)
        weights = tuple(_weight(file, name, prefix, axes) for name in file.names)
        model = str(((file.fisher or {}).get("model") or {}).get("id") or "")
    free: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for weight in weights:
        if weight.place.layer is not None:
            free[weight.place.layer][0] += weight.kept
            free[weight.place.layer][1] += weight.numel
    layers = {layer: kept / total for layer, (kept, total) in sorted(free.items()) if total}
    return MaskFacts(path=path, model=model, layers=layers, prefix=prefix or "layers", weights=weights)


def _axes(file: MaskFile) -> AxisFinder:
    shapes = {name: shape for name in file.names if (shape := file.shape(name)) is not None}
    return AxisFinder(shapes, str(((file.fisher or {}).get("model") or {}).get("architecture") or ""))


def _weight(file: MaskFile, name: str, prefix: str | None, axes: AxisFinder) -> Weight:
    found, kept = file.entry(name), file.kept(name)
    if found is None:  # without a description flags stand for entries: shares stay right
        return Weight(name=name, place=locate(name, prefix), numel=file.read(name).size, kept=kept)
    rank = 0
    linear = len(found.shape) == 2 and axes.axes(name) == (1, 0) and ".experts." not in name  # fused in memory
    if linear:
        rank = kept // sum(found.shape) if sum(found.shape) else 0
    return Weight(name=name, place=locate(name, prefix), numel=found.numel, kept=kept, rank=rank)


# What is written


def _shira(wanted: MaskFacts, options: ExportOptions) -> str:
    ranks = {weight.name: weight.rank for weight in wanted.weights if weight.rank}
    if not ranks:
        raise CheckpointError(
            f"{wanted.path}: no linear layer of it lets as many entries change as a LoRA of rank 1 has; keep more"
        )
    return shira_text(wanted.path, ranks, left_out=len(wanted.weights) - len(ranks))


def _axolotl(wanted: MaskFacts, options: ExportOptions) -> str:
    frozen = sum(not weight.kept for weight in wanted.weights)
    lines = [
        *_comments(
            f"For axolotl, from {wanted.path.name}: put this into your training config.",
            "Weights are trained or frozen as a whole; rows and entries cannot be told apart here.",
            "Names are those of the checkpoint; fused experts have others in memory.",
        )
    ]
    if wanted.weights:
        lines += _comments(f"{len(wanted.weights) - frozen} weights may change, {frozen} may not.")
        lines += ["unfrozen_parameters:"]
        lines += [f"  - {_quoted(f'^{weight.name}$')}" for weight in wanted.weights if weight.kept]
    lines += _comments(
        "Learning rates by layer, the highest where most may change. Names end in a dot: layers.1 is not 10."
    )
    lines += [f"learning_rate: {_number(options.learning_rate)}", "lr_groups:"]
    most = max(wanted.layers.values())
    for layer, share in wanted.layers.items():
        if share:
            name = f"{wanted.prefix}.{layer}."
            rate = options.learning_rate * share / most
            lines += [f"  - name: layer_{layer}", f"    modules: [{_quoted(name)}]", f"    lr: {_number(rate)}"]
    return "\n".join(lines) + "\n"


def _llamafactory(wanted: MaskFacts, options: ExportOptions) -> str:
    shares = list(wanted.layers.values())
    count = max(1, min(len(shares), round(sum(shares))))
    first, last = sum(shares[:count]), sum(shares[-count:])
    modules = _children(wanted.weights)
    lines = _comments(
        f"For LLaMA-Factory, from {wanted.path.name}: put this into your training config.",
        f"It trains whole layers, the first or the last ones. Of {len(shares)} layers as many are trained as the mask "
        f"lets change ({sum(shares):.1f} layers' worth), at the end where it lets more.",
    )
    lines += [
        "finetuning_type: freeze",
        f"freeze_trainable_layers: {count if last >= first else -count}",
        f"freeze_trainable_modules: {','.join(modules) or 'all'}",
    ]
    return "\n".join(lines) + "\n"


def _children(weights: Sequence[Weight]) -> list[str]:
    """Parts of a block that may change at least as much as the blocks do on the whole; empty for all of them."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for weight in weights:
        if weight.place.layer is not None:
            child = counts[weight.place.module.split(".")[0]]
            child[0] += weight.kept
            child[1] += weight.numel
    kept, total = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    chosen = [child for child, (own, size) in counts.items() if own * total >= kept * size]
    return [] if len(chosen) == len(counts) else chosen


def _mergekit(wanted: MaskFacts, options: ExportOptions) -> str:
    layers = [wanted.layers.get(layer, 0.0) for layer in range(max(wanted.layers) + 1)]
    base = options.base or wanted.model or "path/to/base"
    weights = ", ".join(_number(share) for share in layers)
    lines = _comments(
        f"For mergekit, from {wanted.path.name}: mergekit-yaml THIS OUT.",
        "BASE + weight * (FT - BASE), a weight per layer; entries within a layer are treated alike.",
        "The embedding goes with the first layer and the head with the last.",
    )
    lines += [
        "merge_method: task_arithmetic",
        f"base_model: {_quoted(base)}",
        "models:",
        f"  - model: {_quoted(options.tuned or 'path/to/finetune')}",
        "    parameters:",
        f"      weight: [{weights}]",
        "parameters:",
        "  normalize: false",
    ]
    return "\n".join(lines) + "\n"


_WRITERS: Mapping[str, Callable[[MaskFacts, ExportOptions], str]] = {
    "peft-shira": _shira,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "mergekit": _mergekit,
}


def _comments(*lines: str) -> list[str]:
    return [f"# {line}" for line in lines]


def _number(value: float) -> str:
    """A YAML number; without its point, ``1e-05`` would be a string to YAML 1.1."""
    return f"{value:.6f}" if value == 0 or value >= 1e-3 else f"{value:.5e}"


def _quoted(text: str) -> str:
    """A YAML string; JSON's are."""
    return json.dumps(text, ensure_ascii=False)
