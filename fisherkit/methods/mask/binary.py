"""A binary mask: rank the units of a Fisher's weights, take the top of every group exactly, write the flags."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fisherkit.artefacts.mask_entry import MaskEntry, pack
from fisherkit.checkpoint.writer import StreamedWriter
from fisherkit.errors import some_names
from fisherkit.floats import Stored
from fisherkit.kernels.mask_scores import Doubles, Flags, Units
from fisherkit.kernels.top_k import quota
from fisherkit.methods.mask.scores import MaskInputs, Scorer
from fisherkit.options import MaskOptions, Selection
from fisherkit.pairs.parallel import BlockPool
from fisherkit.pairs.ranking import ThresholdMask, find_threshold, top_of_group
from fisherkit.progress import Track


@dataclass(frozen=True)
class Masked:
    """A mask or subspace that was written, but not yet put in its place.

    Attributes:
        writer: holds it; ``finish`` is for the caller.
        entries: per weight.
        units: how many were ranked; None for a subspace.
        selected: how many are the top.
        unreached: see Scorer.
        notes: what a person should know.
        details: more about a weight, for the JSON.
    """

    writer: StreamedWriter
    entries: Mapping[str, MaskEntry]
    units: int | None
    selected: int | None
    unreached: tuple[str, ...]
    notes: tuple[str, ...]
    details: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def write_mask(
    out: Path, made_from: MaskInputs, options: MaskOptions, work: Path, pool: BlockPool, track: Track
) -> Masked:
    """Rank the units of every weight and write the flags; see methods.mask.build.

    Args:
        out: the mask to make.
        made_from: the Fisher, and what is scored with it.
        options: see MaskOptions.
        work: work folder, in which it is made.
        pool: threads.
        track: progress in weights.

    Raises:
        CheckpointError: the Fisher holds NaN, infinities, negative values, or nothing but zeros.
        OutputError: the disk is full.
    """
    chosen = options.selection
    units = {name: _units(made_from, name, chosen) for name in made_from.shapes}
    packed = chosen.aggregate == "none"
    plain = {name: MaskEntry(one.shape, one.over, packed) for name, one in units.items()}
    writer = StreamedWriter.create(out, [one.spec(name) for name, one in plain.items()], work=work)
    try:
        ranking = _Ranking(writer, units, chosen, Scorer(made_from, options, chosen.combine, pool), pool, track)
        ranking.run(_groups(made_from, chosen.scope))
    except BaseException:
        writer.close()
        raise
    entries = {name: MaskEntry(one.shape, one.over, packed, ranking.kept[name]) for name, one in units.items()}
    return Masked(
        writer=writer,
        entries=entries,
        units=sum(one.count for one in units.values()),
        selected=ranking.selected,
        unreached=ranking.scorer.unreached,
        notes=_notes(ranking),
    )


def _units(made_from: MaskInputs, name: str, chosen: Selection) -> Units:
    axes = made_from.axes.axes(name) if chosen.aggregate != "none" else None
    over = None if axes is None else axes.input if chosen.aggregate == "input" else axes.output
    return Units(made_from.shapes[name], over)


def _groups(made_from: MaskInputs, scope: str) -> list[list[str]]:
    """Names of the weights that share a quota, in model order."""
    groups: dict[str, list[str]] = {}
    for name in made_from.shapes:
        key = {"tensor": name, "layer": made_from.places[name].layer_name, "global": ""}[scope]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


class _Ranking:
    """Ranks group after group, and counts."""

    def __init__(
        self,
        writer: StreamedWriter,
        units: Mapping[str, Units],
        chosen: Selection,
        scorer: Scorer,
        pool: BlockPool,
        track: Track,
    ) -> None:
        self.scorer = scorer
        self.units = units
        self.chosen = chosen
        self.kept: dict[str, int] = {}
        self.selected = 0
        self.tied = 0
        self.empty: list[str] = []
        self._writer = writer
        self._pool = pool
        self._track = track

    def run(self, groups: Sequence[Sequence[str]]) -> None:
        """Rank every group and write the flags of its weights."""
        self.scorer.prepare()
        for names in groups:
            (self.rank_entries if self.chosen.aggregate == "none" else self.rank_units)(names)
        self.scorer.check_reached()
        self._writer.mark_written(self.units)

    def rank_units(self, names: Sequence[str]) -> None:
        """Rank rows or columns, whose scores are held."""
        scores: list[Doubles] = []
        for name in names:
            scores.append(self.scorer.vector(name, self.units[name]))
            if len(names) > 1:
                self._track("scoring", len(scores), len(names))
        for name, values, flags in zip(names, scores, top_of_group(scores, self._wanted(names)), strict=True):
            if flags.any() and values[flags].min() == 0:
                self.tied += int(np.count_nonzero(values[flags] == 0))
            one = self.units[name]
            self._write(name, flags.reshape(one.flags_shape))
            self._done(name, int(np.count_nonzero(flags)))

    def rank_entries(self, names: Sequence[str]) -> None:
        """Rank entries, whose scores are never held."""
        wanted = self._wanted(names)
        blocks = {name: (self.units[name].numel, self.scorer.block(name)) for name in names}
        threshold_mask = ThresholdMask(find_threshold(blocks, wanted, self._pool) if wanted else None)
        for name, (count, block) in blocks.items():
            selected = 0
            for part in threshold_mask.ranked(count, block, self._pool):
                selected += int(np.count_nonzero(part.flags))
                self.tied += part.tied
                self._write(name, part.flags, part.start)
            self._done(name, selected)

    def _wanted(self, names: Sequence[str]) -> int:
        count = sum(self.units[name].count for name in names)
        wanted = quota(self.chosen.keep, count)
        if not wanted:
            self.empty += names
        return wanted

    def _write(self, name: str, top: Flags, start: int = 0) -> None:
        """Write flags of the top as flags of what may change."""
        free = top if self.chosen.direction == "train" else ~top
        packed = self.chosen.aggregate == "none"
        stored: Stored = pack(free) if packed else free
        self._writer.write_stored(name, stored, start // 8 if packed else start)

    def _done(self, name: str, selected: int) -> None:
        one = self.units[name]
        self.selected += selected
        self.kept[name] = one.size * (selected if self.chosen.direction == "train" else one.count - selected)
        self._track("masking", len(self.kept), len(self.units))


def _notes(ranking: _Ranking) -> tuple[str, ...]:
    found = []
    if unreached := ranking.scorer.unreached:
        expert = all(".experts." in name for name in unreached)
        found.append(
            f"a Fisher of zero is not unimportance but no measurement ({'no token' if expert else 'no gradient'} got "
            f"there): {some_names(unreached)}"
        )
    if ranking.tied:
        found.append(
            f"of the {ranking.selected:,} selected {ranking.tied:,} score zero: only their index selected them"
        )
    if ranking.empty:
        share = f"{float(ranking.chosen.keep):g}"
        names = some_names(ranking.empty)
        found.append(f"too small for a share of {share}, so that nothing of them is selected: {names}")
    single = [name for name, one in ranking.units.items() if one.over is None and len(one.shape) > 1]
    if ranking.chosen.aggregate != "none" and single:
        found.append(f"ranked entry by entry, being no matrices: {some_names(single)}")
    return tuple(found)
