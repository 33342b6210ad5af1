"""Parts of a Fisher, or of covariances, before they are added: read, held against each other, and weighed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fisherkit.artefacts.covariance_file import CovarianceFile, is_covariances
from fisherkit.artefacts.fisher_sidecar import SCHEMA, sidecar_path, why_not_of
from fisherkit.checkpoint.schema import anything, check, maybe, named, number, read_beside, read_object, table, whole
from fisherkit.errors import CheckpointError, OptionError, some_names
from fisherkit.options.combine import CombineOptions
from fisherkit.prompts.wording import clipped

# What all parts must have in common, and what a person would call it.
_COMMON = (
    (("model", "weights_sha256"), "of another model"),
    (("run", "dtype"), "computed in another --dtype"),
    (("model", "config_sha256"), "of a model with another config"),
    (("model", "tokenizer_sha256"), "made with another tokenizer"),
    (("prompts", "loss"), "made with another --loss"),
    (("prompts", "field"), "made of another --field"),
    (("prompts", "max_length"), "made with another --max-length"),
    (("prompts", "chat_template"), "made with another --chat-template"),
    (("prompts", "template_sha256"), "made with another chat template"),
    (("prompts", "chat_template_kwargs"), "made with other --chat-template-kwargs"),
    (("estimator",), "made with other --labels, --reduction, --targets, --layers or --seed"),
)
_SAMPLES = table({"prompts": table({"samples": whole(1)}), "model": named(anything), "run": named(anything)})
_NEEDED = table({"estimator": named(anything)}, {"loss": maybe(number())})
_OF_ONE_SET = ("prompts",)
"""Groups of the above that Fishers of different prompt sets may differ in."""


@dataclass(frozen=True)
class MeasuredPart:
    """One file to be added.

    Attributes:
        path: a Fisher, or covariances of inputs alone.
        made: the JSON beside it.
        weight: of its mean over samples, all weights together being 1.
    """

    path: Path
    made: Mapping[str, Any]
    weight: float

    @property
    def samples(self) -> int:
        """Number of samples that were measured."""
        return int(self.made["prompts"]["samples"])


def open_parts(paths: Sequence[Path], options: CombineOptions) -> tuple[MeasuredPart, ...]:
    """Read what lies beside the files that are to be added, and refuse what cannot be.

    Args:
        paths: Fishers as ``extract`` wrote them, or files of ``extract --statistics inputs``.
        options: say by what they are weighed.

    Returns:
        The parts in the order of their numbers, or as they were given.

    Raises:
        CheckpointError: a file without a sidecar of its own, or parts that do not belong together, twice, or missing.
        OptionError: weights that do not fit the files.
    """
    if len(paths) < 2 and not options.partial:
        raise OptionError("combine adds two files or more; give all parts")
    sidecars = [_read(path) for path in paths]
    _refuse_twice(paths, sidecars)
    kinds = [is_covariances(made) for made in sidecars]
    if len(set(kinds)) > 1:
        raise CheckpointError(
            f"{paths[kinds.index(True)]}: holds covariances of inputs, and others a Fisher; add alike"
        )
    if options.weights is not None:
        return _weighed(paths, sidecars, options.weights)
    _refuse_others(paths, sidecars, _COMMON)
    whole = [path for path, made in zip(paths, sidecars, strict=True) if "part" not in made]
    if whole:
        raise CheckpointError(
            f"{whole[0]}: is no part of a set (extract --shard makes parts); --weights 1,1 adds Fishers of several sets"
        )
    _refuse_other_divisions(paths, sidecars)
    _refuse_missing(paths[0], sidecars, options)
    total = sum(made["prompts"]["samples"] for made in sidecars)
    parts = [
        MeasuredPart(path, made, made["prompts"]["samples"] / total) for path, made in zip(paths, sidecars, strict=True)
    ]
    return tuple(sorted(parts, key=lambda part: part.made["part"]["number"]))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    beside = sidecar_path(path)
    if not beside.is_file():
        raise CheckpointError(f"{beside}: is missing; extract writes it beside {path.name}, and it says what is in it")
    if is_covariances(read_beside(beside) or {}):
        with CovarianceFile(path) as file:
            made = {**file.provenance, "moments": file.rows}
        check(beside, made, "covariances that can be added to others", _SAMPLES, "extract it anew")
        return made
    made = read_object(beside, "a Fisher", SCHEMA, "extract it anew")
    reason = why_not_of(made, path)
    if reason is not None:
        raise CheckpointError(f"{beside}: does not belong to {path.name} ({reason}); extract it anew")
    for rule in (_SAMPLES, _NEEDED):
        check(beside, made, "a Fisher that can be added to others", rule, "extract it anew")
    return made


def _refuse_twice(paths: Sequence[Path], sidecars: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, Path] = {}
    for path, made in zip(paths, sidecars, strict=True):
        content = str(made.get("content_sha256", path.resolve()))
        if content in seen:
            raise CheckpointError(f"{path}: is the same Fisher as {seen[content]}; give each part once")
        seen[content] = path


def _refuse_others(
    paths: Sequence[Path], sidecars: Sequence[Mapping[str, Any]], common: Sequence[tuple[tuple[str, ...], str]]
) -> None:
    first = sidecars[0]
    for path, made in zip(paths, sidecars, strict=True):
        for keys, what in common:
            if _at(made, keys) != _at(first, keys):
                raise CheckpointError(f"{path}: is {what} than {paths[0]}")
        if _contents(made) != _contents(first):
            raise CheckpointError(f"{path}: holds other tensors than {paths[0]}")


def _contents(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same of two files for them to be added: names and shapes."""
    if is_covariances(made):
        return shapes_of(made["moments"])
    return {name: row["shape"] for name, row in made["tensors"].items()}


def shapes_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return size, rank and weights of every covariance."""
    return {name: [row["size"], row["sketch_rank"], sorted(row["tensors"])] for name, row in rows.items()}


def _at(made: Mapping[str, Any], keys: Sequence[str]) -> object:
    value: Any = made
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _weighed(
    paths: Sequence[Path], sidecars: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> tuple[MeasuredPart, ...]:
    """Fishers of several prompt sets, by the caller's own weights."""
    if len(weights) != len(paths):
        raise OptionError(f"--weights has {len(weights)} numbers for {len(paths)} files; give one for each")
    _refuse_others(paths, sidecars, [one for one in _COMMON if one[0][0] not in _OF_ONE_SET])
    total = sum(weights)
    return tuple(
        MeasuredPart(path, made, weight / total) for path, made, weight in zip(paths, sidecars, weights, strict=True)
    )


def _refuse_other_divisions(paths: Sequence[Path], sidecars: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parts of another prompt set, or of another number of parts, and a part that is given twice."""
    first = sidecars[0]["part"]
    numbers: dict[int, Path] = {}
    for path, made in zip(paths, sidecars, strict=True):
        part = made["part"]
        if part["sha256"] != first["sha256"]:
            reason = _other_set(made["prompts"], sidecars[0]["prompts"])
            raise CheckpointError(f"{path}: is of another prompt set than {paths[0]}: {reason}")
        if part["of"] != first["of"]:
            raise CheckpointError(
                f"{path}: is one of {part['of']} parts and {paths[0]} one of {first['of']}, so they overlap; give the "
                "parts of one division"
            )
        if part["number"] in numbers:
            raise CheckpointError(f"{path}: is part {part['number']}, and so is {numbers[part['number']]}; give one")
        numbers[part["number"]] = path


def _other_set(prompts: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Say how two prompt sets differ, as far as their reports tell, and what to do."""
    name, other = (clipped(PurePath(str(one.get("source"))).name, 60) for one in (prompts, first))
    if name != other:
        return f"{name}, not {other}; --weights 1,1 adds sets"
    rows, others = prompts.get("rows"), first.get("rows")
    if rows != others:
        return f"{rows} rows of {name}, not {others}; extract all parts with one --limit"
    return f"{name} held other text then; extract all parts from one file"


def _refuse_missing(first: Path, sidecars: Sequence[Mapping[str, Any]], options: CombineOptions) -> None:
    missing = missing_parts(sidecars)
    if missing and not options.partial:
        raise CheckpointError(
            f"{first}: {len(missing)} of {sidecars[0]['part']['of']} parts are missing: {some_names(missing, 8)}; "
            "measure them, or go on without by --partial"
        )


def missing_parts(sidecars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the parts of the division that are not there, such as ``3/16``; none for Fishers that are no parts."""
    if any("part" not in made for made in sidecars):
        return []
    of = sidecars[0]["part"]["of"]
    there = Counter(made["part"]["number"] for made in sidecars)
    expected = range(1, of + 1)
    return [f"{number}/{of}" for number in expected if not there[number]]
