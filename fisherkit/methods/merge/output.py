"""Files around the weights of an output: configuration, tokenizer, card, manifest; and figures for every report."""

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fisherkit._version import __version__
from fisherkit.checkpoint.atomic import write_text
from fisherkit.checkpoint.folder.model_card import model_card, public_id, public_path, read_card, redact
from fisherkit.checkpoint.folder.side_files import code_files, copy_side_files, folder_of, output_config, side_files
from fisherkit.checkpoint.target import MANIFEST
from fisherkit.methods.merge.pair_run import Request, Run
from fisherkit.pairs.pair import Pair
from fisherkit.pairs.reader import Tensors
from fisherkit.pairs.rewrite import TensorRow
from fisherkit.progress import Say

_MUCH_ROUNDED = 0.2  # share of the changes that rounding may take away without a word


def provenance(request: Request, checkpoints: Pair) -> dict[str, Any]:
    """Return where a result comes from: checkpoints, command, options, versions.

    Args:
        request: what was asked for.
        checkpoints: BASE and FT.
    """
    options = {key: value for key, value in asdict(request.options).items() if key not in ("force", "resume", "shard")}
    return {
        "format": f"fisherkit.{request.method}/1",
        "base": {"id": public_id(checkpoints.base_source), "revision": checkpoints.base_source.revision},
        "tuned": {
            "id": public_id(checkpoints.tuned_source),
            "revision": checkpoints.tuned_source.revision,
            "kind": checkpoints.tuned.kind,
        },
        "command": redact(request.command) if request.command else None,
        "options": {key: _public(value) for key, value in options.items()},
        "versions": {"fisherkit": __version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def _public(value: Any) -> Any:
    """Return an option's value with nothing of a path but its name; a fine-tune of ``--also`` is one, or an id."""
    if isinstance(value, tuple):
        nested = [[public_path(str(one)) for one in pair] for pair in value if isinstance(pair, tuple)]
        return nested or [_public(one) for one in value]
    return value.name if isinstance(value, Path) else value


def fingerprint(checkpoints: Pair, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run must have in common with one that it goes on with.

    Args:
        checkpoints: BASE and FT.
        settings: what makes another result.
    """
    return {
        "base": checkpoints.base.index.fingerprint(),
        "tuned": checkpoints.tuned.fingerprint(),
        "options": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
        "fisherkit": __version__,
    }


def totals(rows: Mapping[str, TensorRow], counts: Sequence[str]) -> dict[str, Any]:
    """Return sums over tensors.

    Args:
        rows: by tensor.
        counts: keys of the rows that are summed.

    Returns:
        The sums, the ``density`` kept / weights, and ``energy_kept``, the share of all squared deltas that is left.
    """
    sums = {key: sum(row[key] for row in rows.values()) for key in counts}
    energy = math.fsum(row["energy"] for row in rows.values())
    left = math.fsum(row["energy"] * row["energy_kept"] for row in rows.values())
    share = sums["kept"] / sums["weights"] if sums["weights"] else 0.0
    return {
        "tensors": len(rows),
        **sums,
        "density": share,
        "energy": energy,
        "energy_kept": left / energy if energy else 0.0,
    }


def find_warnings(rows: Mapping[str, TensorRow], tensors: Tensors) -> list[str]:
    """Return what a person should know of the result, from what the rows remark.

    Args:
        rows: by tensor.
        tensors: give the types.
    """
    found = []
    rounded = {name: row for name, row in rows.items() if "rounded_away" in row}
    changed = sum(row["changed"] for row in rounded.values())
    lost = sum(row["rounded_away"] for row in rounded.values())
    if lost > _MUCH_ROUNDED * changed:
        types = ", ".join(sorted({tensors.info(name).dtype for name in rounded}))
        found.append(
            f"{lost:,} of {changed:,} changes are too small for BASE's type ({types}) and vanish in the output; a "
            "BASE in float32 would hold them"
        )
    unrelated = [name for name, row in rows.items() if row.get("unrelated")]
    if unrelated:
        found.append(
            f"about half of the entries of {len(unrelated)} matrices changed sign, as in {unrelated[0]!r}: FT does "
            "not look like a fine-tune of BASE"
        )
    return found


def say_warnings(warnings: Sequence[str], say: Say) -> None:
    """Tell a person what they should know of the result."""
    for warning in warnings:
        say(f"warning: {warning}")


def write_side_files(folder: Path, run: Run, report: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """Put config, tokenizer, card and manifest beside the weights in ``folder``.

    Args:
        folder: where the output is made.
        run: what it is made from.
        report: goes into the manifest, with the names of all files of the output.
        facts: rows of the card's table.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    names = write_config(folder, run)
    names.append(_write(folder / "README.md", _card(run, facts, _beside(run))))
    names += [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
    names += [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]  # of an adapter besides
    if sum(name.endswith(".safetensors") for name in names) > 1:
        names.append("model.safetensors.index.json")
    published = {**report, "path": ".", "files": sorted(set(names))}  # relative to the manifest itself
    _write(folder / MANIFEST, json.dumps(published, indent=1, default=str) + "\n")


def write_config(folder: Path, run: Run) -> list[str]:
    """Put config and tokenizer into ``folder``, and return the names of the files.

    Args:
        folder: where the weights will be, or where somebody looks for what lies around them.
        run: what they are made from.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    base, beside = run.checkpoints.base_source.path, _beside(run)
    config = output_config(base, beside, untied=_is_untied(run))
    files = side_files(base, beside)
    for note in (*config.notes, *(f"Python code was copied: {name}" for name in code_files(files))):
        run.request.say(f"note: {note}")
    names = list(copy_side_files(files, folder))
    if config.values is not None:
        names.append(_write(folder / "config.json", json.dumps(config.values, indent=2, ensure_ascii=False) + "\n"))
    return names


def _beside(run: Run) -> Path | None:
    """Where FT's config and tokenizer are; a delta has nothing around it."""
    return None if run.checkpoints.tuned.kind == "delta" else run.checkpoints.tuned_source.path


def _card(run: Run, facts: Mapping[str, str], tuned_folder: Path | None) -> str:
    return model_card(
        method=run.request.method,
        base_id=public_id(run.checkpoints.base_source),
        tuned_id=public_id(run.checkpoints.tuned_source),
        command=run.request.command or (f"fisherkit.{run.request.method}(...)",),
        facts=facts,
        base_card=read_card(folder_of(run.checkpoints.base_source.path)),
        tuned_card=read_card(folder_of(tuned_folder)) if tuned_folder is not None else None,
    )


def _is_untied(run: Run) -> bool:
    """True if head and embedding may differ in the output, so that its config must not tie them."""
    tuned, chosen = run.checkpoints.tuned, run.chosen
    return tuned.untied or any(
        chosen.takes_part(head) != chosen.takes_part(body) for head, body in tuned.tied_pairs.items()
    )


def _write(path: Path, text: str) -> str:
    write_text(path, text)
    return path.name
