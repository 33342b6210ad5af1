"""What fapm and merge have in common: checks before, and the files around the weights after."""

import hashlib
import json
import math
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fisherkit._version import __version__
from fisherkit.checkpoint.folder.model_card import model_card, public_id, read_card
from fisherkit.checkpoint.folder.side_files import code_files, copy_side_files, folder_of, output_config, side_files
from fisherkit.checkpoint.target import MANIFEST
from fisherkit.errors import CheckpointError, OutputError
from fisherkit.floats import Stored, widen
from fisherkit.kernels.prune import TensorPair, converted
from fisherkit.methods.merge.tensor_selection import Chosen, choose
from fisherkit.options import PairOptions
from fisherkit.pairs.pair import Pair, open_pair
from fisherkit.pairs.parallel import BlockPool
from fisherkit.pairs.prune import flipped_signs
from fisherkit.pairs.reader import Tensors
from fisherkit.pairs.rewrite import Row, check_output, refuse_unwritable, rewrite
from fisherkit.progress import Say, Track

_MUCH_ROUNDED = 0.2  # share of the changes that rounding may take away without a word
_UNRELATED = 0.45  # share of flipped signs; independent weights have a half


@dataclass(frozen=True)
class Request:
    """What a command was asked for.

    Attributes:
        method: ``fapm`` or ``merge``.
        base: as given.
        tuned: as given.
        out: the target; None where only a report is wanted.
        options: of the command.
        command: the command line for the card; None writes the call in Python.
        track: progress.
        say: remarks for people.
    """

    method: str
    base: str
    tuned: str
    out: Path | None
    options: PairOptions
    command: Sequence[str] | None
    track: Track
    say: Say


class Run:
    """Both sides open, matched and chosen from; a context."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._stack = ExitStack()
        self.warnings: list[str] = []
        self._flipped: dict[str, None] = {}
        self._rounded: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.pair: Pair = stack.enter_context(open_pair(self.request.base, self.request.tuned))
            if self.request.out is not None:
                options = self.request.options
                check_output(self.request.out, self.pair, force=options.force, resume=options.resume)
                refuse_unwritable(self.pair.base.index)
            self.tensors = stack.enter_context(Tensors(self.pair, stack.enter_context(BlockPool())))
            self.chosen: Chosen = choose(self.tensors, self.request.options)
            self._rest, self._names = frozenset(self.chosen.rest), frozenset(self.chosen.names)
            self._stack = stack.pop_all()
        for note in self.pair.tuned.notes:
            self.request.say(f"note: {note}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def sides(self, name: str, metric: str = "fapm", mean: float | None = None, *, selects: bool = False) -> TensorPair:
        """Both sides of a tensor; what looks unrelated is remembered.

        Where entries are only selected (``selects``), FT's are given as the output can hold them, in the base's type:
        what rounding takes away did not change, and takes no place in a quota.
        """
        keep = self.request.options.nan == "keep-base"
        sides = self.tensors.sides(name, metric, keep_nonfinite=keep, mean=mean)
        if len(self.tensors.info(name).shape) > 1 and sides.base.size >= 1024 and flipped_signs(sides) > _UNRELATED:
            self._flipped[name] = None
        if selects and sides.base_code in ("BF16", "F16") and sides.tuned_code != sides.base_code:
            sides, changed, lost = self.tensors.in_bases_type(sides)
            self.note_rounding(name, changed, lost)
        return sides

    def note_rounding(self, name: str, changed: int, lost: int) -> None:
        """Remember how many of a tensor's changes are too small for the base's type."""
        self._rounded[name] = (changed, lost)

    def remark(self, name: str) -> Row:
        """What a tensor's row says besides its counts: whether it looks unrelated, and what rounding took away."""
        changed, lost = self._rounded.get(name, (0, 0))
        rounded = {"changed": changed, "rounded_away": lost} if lost else {}
        return ({"unrelated": True} if name in self._flipped else {}) | rounded

    def recall(self, rows: Mapping[str, Row]) -> None:
        """Remember what the run had seen that this one goes on with."""
        self._flipped |= {name: None for name, row in rows.items() if row.get("unrelated")}
        self._rounded |= {
            name: (row["changed"], row["rounded_away"]) for name, row in rows.items() if "rounded_away" in row
        }

    def say_warnings(self) -> None:
        """Tell what a person should know of the result."""
        for warning in self.all_warnings():
            self.request.say(f"warning: {warning}")

    def check_finite(self, name: str, count: int, result: Stored | None = None) -> None:
        """Refuse a tensor in which ``count`` differences were not finite, or whose result is not, unless allowed to."""
        if self.request.options.nan != "refuse":
            return
        if count:
            sides = self.tensors.sides(name)
            self.tensors.refuse_nonfinite(name, "FT", sides.tuned, sides.tuned_code)
            if self.tensors.info(name).dtype == "F16":
                raise CheckpointError(
                    f"{name}: {count} values are beyond float16, BASE's type; convert BASE to bfloat16 first"
                )
            raise CheckpointError(f"{name}: {count} differences are out of range; --nan keep-base takes BASE there")
        if result is not None and self.tensors.info(name).dtype == "F16":
            beyond = sum(self.tensors.team.map(lambda start, stop: _beyond_half(result[start:stop]), result.size))
            if beyond:
                raise CheckpointError(
                    f"{name}: {beyond} values are beyond float16, BASE's type; convert BASE to bfloat16 first"
                )

    def untouched(self, name: str) -> Stored | None:
        """A tensor that does not take part, as the output should have it; None if it does take part."""
        if name in self._rest and self.request.options.rest == "tuned":
            return self._tuned(name)
        return None if name in self._names else self.tensors.base(name)

    def _tuned(self, name: str) -> Stored:
        """All of FT's tensor in BASE's type; what is not finite is refused, or BASE's."""
        sides = self.tensors.sides(name, keep_nonfinite=True, mean=0.0)

        def take(start: int, stop: int) -> int:
            part = sides.part(start, stop)
            taken = converted(part.tuned, part.tuned_code, part.base_code)
            finite = np.isfinite(widen(taken, part.base_code))
            np.copyto(part.base, taken, where=finite)
            return finite.size - int(np.count_nonzero(finite))

        self.check_finite(name, sum(self.tensors.team.map(take, sides.base.size)))
        return sides.base

    def write(
        self,
        change: Callable[[str], tuple[Stored, Row]],
        settings: Mapping[str, Any],
        report: Callable[[Mapping[str, Row]], dict[str, Any]],
        facts: Callable[[Mapping[str, Any]], Mapping[str, str]],
        recall: Callable[[Mapping[str, Row]], object] = lambda rows: None,
    ) -> tuple[tuple[Path, ...], dict[str, Any]]:
        """Write the output.

        Args:
            change: see engine.rewrite.
            settings: what makes another result; a run with others is not resumed.
            report: from the rows of all tensors to what goes into the manifest; may refuse.
            facts: rows of the card's table, from the report.
            recall: called with the rows of a killed run that this one goes on with.

        Returns:
            The files of the output, and the report.
        """
        options, out = self.request.options, self.request.out
        assert out is not None, "only a run with a target writes"
        made: dict[str, Any] = {}

        def recall_all(rows: Mapping[str, Row]) -> None:
            self.recall(rows)
            recall(rows)

        def finish(folder: Path | None, rows: Mapping[str, Row]) -> None:
            made.update(report(rows))
            if folder is not None:
                made["files"] = self._surround(folder, made, facts(made))

        files, _ = rewrite(
            self.tensors,
            out,
            change,
            fingerprint=self._fingerprint(settings),
            shard_bytes=options.shard_bytes,
            resume=options.resume,
            force=options.force,
            recall=recall_all,
            finish=finish,
            track=self.request.track,
        )
        self.say_warnings()
        return files, made

    def all_warnings(self) -> list[str]:
        """What a person should know of the result."""
        changed, lost = (sum(column) for column in zip(*self._rounded.values(), (0, 0), strict=True))
        found = list(self.warnings)
        if lost > _MUCH_ROUNDED * changed:
            types = ", ".join(sorted({self.tensors.info(name).dtype for name in self._rounded}))
            found.append(
                f"{lost:,} of {changed:,} changes are too small for BASE's type ({types}) and vanish in the output; a "
                "BASE in float32 would hold them"
            )
        if not self._flipped:
            return found
        first, count = next(iter(self._flipped)), len(self._flipped)
        return [
            *found,
            f"about half of the entries of {count} matrices changed sign, as in {first!r}: FT does not look like a "
            "fine-tune of BASE",
        ]

    def _untied(self) -> bool:
        """Whether head and embedding may differ in the output."""
        tuned, names = self.pair.tuned, self._names
        return tuned.untied or any((head in names) != (body in names) for head, body in tuned.tied_pairs.items())

    def _fingerprint(self, settings: Mapping[str, Any]) -> dict[str, str]:
        return {
            "base": self.pair.base.index.fingerprint(),
            "tuned": self.pair.tuned.fingerprint(),
            "options": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
            "fisherkit": __version__,
        }

    def _surround(self, folder: Path, report: Mapping[str, Any], facts: Mapping[str, str]) -> list[str]:
        """Put config, tokenizer, card and manifest beside the weights; the names of all files of the output."""
        base, tuned = self.pair.base_source.path, self.pair.tuned_source.path
        beside = None if self.pair.tuned.kind == "delta" else tuned
        config = output_config(base, beside, untied=self._untied())
        files = side_files(base, beside)
        for note in (*config.notes, *(f"Python code was copied: {name}" for name in code_files(files))):
            self.request.say(f"note: {note}")
        names = list(copy_side_files(files, folder))
        if config.values is not None:
            names.append(_write(folder / "config.json", json.dumps(config.values, indent=2, ensure_ascii=False) + "\n"))
        card = model_card(
            method=self.request.method,
            base_id=public_id(self.pair.base_source),
            tuned_id=public_id(self.pair.tuned_source),
            command=self.request.command or (f"fisherkit.{self.request.method}(...)",),
            facts=facts,
            base_card=read_card(folder_of(base)),
            tuned_card=read_card(folder_of(tuned)) if beside is not None else None,
        )
        names.append(_write(folder / "README.md", card))
        names += [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
        if sum(name.endswith(".safetensors") for name in names) > 1:
            names.append("model.safetensors.index.json")
        _write(folder / MANIFEST, json.dumps({**report, "files": sorted(set(names))}, indent=1, default=str) + "\n")
        return [*sorted(set(names)), MANIFEST]


def _beyond_half(stored: Stored) -> int:
    """How many entries of a stored float16 array are infinite or NaN."""
    return int(np.count_nonzero((stored.view(np.uint16) & 0x7C00) == 0x7C00))


def _write(path: Path, text: str) -> str:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    return path.name


def provenance(run: Run) -> dict[str, Any]:
    """Where a result comes from."""
    request = run.request
    options = {key: value for key, value in asdict(request.options).items() if key not in ("force", "resume")}
    return {
        "format": f"fisherkit.{request.method}/1",
        "base": {"id": public_id(run.pair.base_source), "revision": run.pair.base_source.revision},
        "tuned": {
            "id": public_id(run.pair.tuned_source),
            "revision": run.pair.tuned_source.revision,
            "kind": run.pair.tuned.kind,
        },
        "command": shlex.join(request.command) if request.command else None,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "versions": {"fisherkit": __version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def totals(rows: Mapping[str, Row], counts: Sequence[str]) -> dict[str, Any]:
    """Sums over tensors of the ``counts``; ``energy_kept`` is the share of all squared deltas that is left."""
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
