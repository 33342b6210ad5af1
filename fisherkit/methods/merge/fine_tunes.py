"""Further fine-tunes of one base, opened beside the pair of BASE and FT."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fisherkit.checkpoint.names.spelling import spelling
from fisherkit.checkpoint.target import check_apart
from fisherkit.errors import CheckpointError
from fisherkit.floats import Stored
from fisherkit.methods.merge.pair_run import Run
from fisherkit.pairs.outputs import check_output
from fisherkit.pairs.pair import Pair, open_pair
from fisherkit.pairs.parallel import BufferPool


class FineTunes:
    """Fine-tunes besides FT, whose values are read for one tensor after the other.

    Args:
        stack: closes them.
        run: BASE and FT.
        given: paths or ids.

    Raises:
        CheckpointError: one cannot be read, does not belong to BASE, or has weights that FT lacks.
        OutputError: the output is one of them.
    """

    def __init__(self, stack: ExitStack, run: Run, given: Sequence[str]) -> None:
        self._run = run
        self._pairs: list[Pair] = []
        self._names: list[frozenset[str]] = []
        self._buffers = [BufferPool() for _ in given]
        for one in given:
            pair = stack.enter_context(open_pair(run.request.base, one))
            self._check(pair, one)
            self._pairs.append(pair)
            self._names.append(frozenset(pair.tuned.names))

    @property
    def fingerprints(self) -> list[str]:
        """Texts that change when the values do."""
        return [pair.tuned.fingerprint() for pair in self._pairs]

    def load(self, name: str, base: Stored) -> list[tuple[Stored, str] | None]:
        """Read a tensor of each, flat, with its code; None where one leaves it as it is in BASE.

        Args:
            name: of BASE's tensor.
            base: [n] its values, not changed yet.
        """
        found: list[tuple[Stored, str] | None] = []
        for pair, names, buffers in zip(self._pairs, self._names, self._buffers, strict=True):
            if name in names:
                values = pair.tuned.load(name, base, self._run.tensors.pool, buffers)
                found.append((values, pair.tuned.code(name)))
            else:
                found.append(None)
        return found

    def _check(self, pair: Pair, given: str) -> None:
        targets, run = self._run.request.targets, self._run
        if targets is not None and targets.checkpoint is not None:
            check_output(targets.checkpoint, pair)
        if targets is not None:
            check_apart(targets.around, (pair.tuned_source.path,), targets.checkpoint)
        ours = frozenset(run.checkpoints.tuned.names)
        extra = [name for name in pair.tuned.names if name not in ours]
        if extra:
            raise CheckpointError(
                f"--also {given}: changes {len(extra)} tensors that FT leaves alone, such as {spelling(extra[0])!r}; "
                "give the fine-tune with the most tensors as FT"
            )
        for other in (run.checkpoints, *self._pairs):
            if other.tuned_source.path.resolve() == pair.tuned_source.path.resolve():
                raise CheckpointError(f"--also {given}: is given twice; each fine-tune counts once")


def refuse_swapped(old: str | None, new: str | None, base: str, tuned: str, path: Path) -> None:
    """Refuse OLD and NEW in each other's place, where the models that they were measured on tell.

    Args:
        old: fingerprint of the model that OLD was measured on.
        new: the same of NEW.
        base: fingerprint of BASE.
        tuned: of FT.
        path: of OLD.

    Raises:
        CheckpointError: OLD was measured on FT, and NEW on BASE.
    """
    if base != tuned and old == tuned and new == base:
        raise CheckpointError(
            f"{path}: was measured on FT, and NEW on BASE: OLD comes first; swap them, or --force-model if it is meant"
        )
