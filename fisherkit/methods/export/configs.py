"""``export``: what other tools can take of a mask without code of ours, as a small text file.

None of them holds a training run to a mask entry by entry: axolotl and LLaMA-Factory freeze whole tensors or layers and
set learning rates, mergekit weighs layers of a finished fine-tune, and peft's SHiRA trains as many entries as a LoRA of
rank r would, which are drawn from those that the mask lets change. What gets lost is said at the top of each file.

What a mask is silent about is free, here as under MaskedUpdate and ``merge --mask``, unless the file says otherwise.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fisherkit.checkpoint.atomic import write_text
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.methods.export.facts import MaskFacts, WeightFacts, read_facts
from fisherkit.methods.export.shira import is_embedding, shira_text
from fisherkit.options import ExportOptions


def export(source: str | os.PathLike[str], options: ExportOptions, *, folder: Path | None = None) -> str:
    """Return the text for another tool.

    Args:
        source: a mask, or a ``layer_importance.json`` where layers are enough.
        options: see ExportOptions.
        folder: that the text will lie in; a script then finds the mask from there, wherever both are moved. None makes
            the mask's path absolute.

    Raises:
        CheckpointError: the file cannot be read, is a subspace, or has nothing for that tool.
        OptionError: the tool needs a mask, not layer importance.
    """
    path = Path(source)
    facts = read_facts(path, options.base)
    if options.to == "peft-shira" and not facts.weights:
        raise OptionError(f"--to peft-shira needs a mask with its weights; {path} holds layers only")
    if options.to != "peft-shira" and not facts.layers:
        raise CheckpointError(f"{path}: none of its tensors lies in a layer, and {options.to} takes layers alone")
    if options.to == "peft-shira":
        return _shira(facts, folder)
    return _WRITERS[options.to](facts, options)


def write_export(source: str | os.PathLike[str], out: Path, options: ExportOptions) -> Path:
    """Write that text to ``out``; see ``export``.

    Raises:
        OutputError: ``out`` exists (unless ``force``), is the source, or cannot be written.
    """
    text, beside = export(source, options, folder=out.parent), Path(source).with_suffix(".json")
    if out.resolve() in (Path(source).resolve(), beside.resolve()):
        raise OutputError(f"{out}: is the mask itself, or what describes it; choose another name")
    if out.exists() and (out.is_dir() or not options.force):
        raise OutputError(f"{out}: exists already; choose another name, or --force to replace a file")
    write_text(out, text)
    return out


def _shira(facts: MaskFacts, folder: Path | None) -> str:
    embeddings = {weight.name for weight in facts.weights if weight.place.layer is None and is_embedding(weight.name)}
    ranks = {weight.name: weight.rank for weight in facts.weights if weight.rank and weight.name not in embeddings}
    if not ranks:
        raise CheckpointError(
            f"{facts.path}: no linear layer of it lets as many entries change as a LoRA of rank 1 has; keep more"
        )
    others = len(facts.weights) - len(ranks) - len(embeddings)
    return shira_text(facts.path, ranks, folder=folder, embeddings=len(embeddings), others=others)


# axolotl


def _axolotl(facts: MaskFacts, options: ExportOptions) -> str:
    lines = _comments(
        f"For axolotl, from {facts.path.name}: put this into your training config.",
        "Weights are trained or frozen as a whole. Single rows and entries cannot be named here; to hold them, attach",
        "fisherkit.training.MaskedUpdate as a plugin.",
    )
    lines += _unfrozen(facts.weights) if facts.weights else []
    lines += _comments(
        "Learning rates by layer, the highest where most may change. Names end in a dot: layers.1 is not 10.",
        "What has no rate of its own here (other layers, embedding, head) is trained with the first one.",
    )
    lines += [f"learning_rate: {_number(options.learning_rate)}", "lr_groups:"]
    most = max(facts.layers.values())
    for layer, share in facts.layers.items():
        if share:
            rate = _number(options.learning_rate * share / most)
            module = _quoted(f"{facts.prefix}.{layer}.")
            lines += [f"  - name: layer_{layer}", f"    modules: [{module}]", f"    lr: {rate}"]
    return "\n".join(lines) + "\n"


def _unfrozen(weights: Sequence[WeightFacts]) -> list[str]:
    """Return the pattern that trains all but the weights that may not change at all.

    axolotl freezes what no pattern matches, so a list of the weights that may change would freeze what the mask is
    silent about: norms, embedding, head. It takes dots in a pattern literally.
    """
    frozen = [weight.name for weight in weights if not weight.kept]
    if not frozen:
        return _comments(f"Each of the {len(weights)} weights of the mask may change in part, so none is frozen.")
    lines = _comments(
        f"{len(frozen)} of the {len(weights)} weights of the mask may not change at all: those named in this pattern.",
        "They are frozen, and all others are trained, also those that the mask is silent about.",
    )
    experts = sum(".experts." in name for name in frozen)
    if experts:
        lines += _comments(f"NOT frozen are {experts} of them: experts, which lie fused in memory under other names.")
    pattern = f"^(?!(?:{'|'.join(frozen)})$)"
    return [*lines, "unfrozen_parameters:", f"  - {_quoted(pattern)}"]


# LLaMA-Factory


def _llamafactory(facts: MaskFacts, options: ExportOptions) -> str:
    shares = facts.all_layers("llamafactory")
    silent = [layer for layer in range(len(shares)) if layer not in facts.layers]
    if silent:
        raise CheckpointError(
            f"{facts.path}: is silent about layer {silent[0]} of {len(shares)}, and llamafactory trains whole layers "
            "from an end of the model; make the mask of all layers"
        )
    count = max(1, min(len(shares), round(sum(shares))))
    first, last = sum(shares[:count]), sum(shares[-count:])
    modules = _children(facts.weights)
    lines = _comments(
        f"For LLaMA-Factory, from {facts.path.name}: put this into your training config.",
        f"It trains whole layers, the first or the last ones. Of {len(shares)} layers as many are trained as the mask "
        f"lets change ({sum(shares):.1f} layers' worth), at the end where it lets more.",
        "All else is frozen: other layers, embedding, head, final norm. To hold rows and entries, attach",
        "fisherkit.training.MaskedUpdate as a callback.",
    )
    lines += [
        "finetuning_type: freeze",
        f"freeze_trainable_layers: {count if last >= first else -count}",
        f"freeze_trainable_modules: {','.join(modules) or 'all'}",
    ]
    return "\n".join(lines) + "\n"


def _children(weights: Sequence[WeightFacts]) -> list[str]:
    """Return the parts of a block that may change at least as much as blocks do on the whole; empty for all of them."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for weight in weights:
        if weight.place.layer is not None:
            child = counts[weight.place.module.split(".")[0]]
            child[0] += weight.kept
            child[1] += weight.numel
    kept, total = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    chosen = [child for child, (own, size) in counts.items() if own * total >= kept * size]
    return [] if len(chosen) == len(counts) else chosen


# mergekit


def _mergekit(facts: MaskFacts, options: ExportOptions) -> str:
    """Write a weight for every layer, and one for each weight of the mask outside of the layers.

    mergekit spreads a list evenly over all layers of the model, so that its length must be theirs, and gives the first
    value to whatever lies in no layer, the head included: a filter keeps the list to the layers.
    """
    shares = facts.all_layers("mergekit")
    base = options.base or facts.model or "path/to/base"
    outside = [weight for weight in facts.weights if weight.place.layer is None and weight.numel]
    lines = _comments(
        f"For mergekit, from {facts.path.name}: mergekit-yaml THIS OUT.",
        "BASE + weight * (FT - BASE), a weight per layer; entries within a layer are treated alike.",
        "What the mask is silent about is FT's, as with `fisherkit merge --mask`.",
    )
    lines += [
        "merge_method: task_arithmetic",
        f"base_model: {_quoted(base)}",
        "models:",
        f"  - model: {_quoted(options.tuned or 'path/to/finetune')}",
        "    parameters:",
        "      weight:",
        f"        - filter: {_quoted(f'{facts.prefix}.')}",
        f"          value: [{', '.join(_number(share) for share in shares)}]",
    ]
    for weight in outside:
        lines += [
            f"        - filter: {_quoted(weight.name)}",
            f"          value: {_number(weight.kept / weight.numel)}",
        ]
    lines += ["        - value: 1.0", "parameters:", "  normalize: false"]
    return "\n".join(lines) + "\n"


_WRITERS: Mapping[str, Callable[[MaskFacts, ExportOptions], str]] = {
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "mergekit": _mergekit,
}


def _comments(*lines: str) -> list[str]:
    return [f"# {line}" for line in lines]


def _number(value: float) -> str:
    """Return a YAML number; without its point, ``1e-05`` would be a string to YAML 1.1."""
    return f"{value:.6f}" if value == 0 or value >= 1e-3 else f"{value:.5e}"


def _quoted(text: str) -> str:
    """Return a YAML string; JSON's are."""
    return json.dumps(text, ensure_ascii=False)
