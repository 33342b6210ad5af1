"""merge --fisher: each weight the mean of base and fine-tunes, weighted by their diagonal Fishers (arXiv 2111.09832).

With deltas D_k, Fishers F_k of the new tasks and F_o of the old abilities, entry by entry

    D' = (sum_k D_k (F_k + mu_k)) / (sum_k (F_k + mu_k) + lam F_o),

mu_k a share of the mean of F_k, so that what no Fisher speaks of becomes the mean of the fine-tunes. Constant memory.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fisherkit.artefacts.covariance_file import is_covariances
from fisherkit.artefacts.fisher_sidecar import sidecar_path
from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.names.spelling import spelling
from fisherkit.checkpoint.schema import read_beside
from fisherkit.errors import CheckpointError
from fisherkit.floats import FLOATING, STORED, widen
from fisherkit.kernels.moment import Doubles
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair
from fisherkit.methods.merge.fine_tunes import FineTunes, refuse_swapped
from fisherkit.methods.merge.pair_run import Run
from fisherkit.options import MergeOptions
from fisherkit.pairs.rewrite import TensorRow
from fisherkit.pairs.solve import change_rows, flat_shape

_ENTRIES = 1 << 22  # of a Fisher that are read at a time
_DAMPING = 1e-6  # a Fisher's entries spread over many orders of magnitude below their mean


class FisherMerge:
    """Solver for the weights that all Fishers speak of.

    Args:
        stack: closes the files.
        run: BASE and FT.
        options: name the files.
        tunes: further fine-tunes.

    Raises:
        CheckpointError: a file cannot be read, is of another model, or they have no weight in common.
    """

    def __init__(self, stack: ExitStack, run: Run, options: MergeOptions, tunes: FineTunes) -> None:
        assert options.fisher is not None
        old, new = options.fisher
        self._options, self._tunes = options, tunes
        self._shapes = {name: info.shape for name, info in run.checkpoints.base.index.tensors.items()}
        base, tuned = run.checkpoints.base.index.fingerprint(), run.checkpoints.tuned.fingerprint()
        measured = [[base, tuned], *([base, other] for other in tunes.fingerprints)]
        paths = [new, *(path for _, path in options.also)]
        self._news = [
            _Fisher(stack, path, models, self._shapes, force_model=options.force_model)
            for path, models in zip(paths, measured, strict=True)
        ]
        self._old = (
            _Fisher(stack, old, measured[0], self._shapes, force_model=options.force_model) if old is not None else None
        )
        if self._old is not None and not options.force_model:
            refuse_swapped(self._old.measured_on, self._news[0].measured_on, base, tuned, self._old.path)
        files = [*self._news, *([self._old] if self._old is not None else [])]
        self._covered = frozenset(name for name in run.chosen.names if all(name in file.of for file in files))
        if not self._covered:
            shown = " and ".join(str(file.path) for file in files)
            raise CheckpointError(f"{shown}: speak of no weight in common that takes part")

    @property
    def covered(self) -> frozenset[str]:
        """BASE's tensors that all Fishers speak of."""
        return self._covered

    def change(self, pair: TensorPair, name: str) -> tuple[DeltaCounts, TensorRow]:
        """Overwrite the base's tensor with the weighted mean; returns counts and what its row says of it.

        Args:
            pair: the tensor of BASE and FT, flat.
            name: one of ``covered``.
        """
        share = self._options.damping if self._options.damping is not None else _DAMPING
        spare = (self._old.mean(name) if self._old is not None else 0.0) or 1.0  # for a Fisher of zeros
        mus = [share * (file.mean(name) or spare) for file in self._news]
        sums = np.zeros(4)

        def change(deltas: list[Doubles], rows: slice) -> Doubles:
            nonlocal sums
            width = deltas[0].shape[1]
            span = rows.start * width, rows.start * width + deltas[0].size
            shares = zip(self._options.tune_weights, self._news, mus, strict=True)
            weights = [weight * (file.read(name, *span) + mu) for weight, file, mu in shares]
            wanted = sum(d.reshape(-1) * g for d, g in zip(deltas, weights, strict=True))
            known = sum(weights)
            old = self._old.read(name, *span) if self._old is not None else np.zeros_like(known)
            alone, made = wanted / known, wanted / (known + self._options.old_weight * old)
            squares = np.square(alone), np.square(made)
            sums += [float(np.dot(metric, square)) for metric in (known, old) for square in squares]
            return made.reshape(deltas[0].shape)

        counts = change_rows(
            pair,
            self._tunes.load(name, pair.base),
            flat_shape(self._shapes[name]),
            input_axis=1,
            scale=self._options.alpha,
            change=change,
        )
        new, new_left, old, old_left = (float(one) for one in sums)
        figures = {
            "old_weight": self._options.old_weight,
            "damping": mus,
            "new_energy": new,
            "new_kept": new_left / new if new else 1.0,
            "old_energy": old,
            "old_kept": old_left / old if old else 1.0,
        }
        return counts, {"fisher": figures}


class _Fisher:
    """A Fisher, by BASE's names.

    Attributes:
        of: its own names by BASE's.
        measured_on: fingerprint of the weights of the model; None where nothing says.
    """

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        models: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        force_model: bool,
    ) -> None:
        self.path = path
        self._reader = stack.enter_context(ArrayReader(open_index(path)))
        tensors = self._reader.index.tensors
        made = read_beside(sidecar_path(path)) or {}
        if is_covariances(made):
            raise CheckpointError(f"{path}: holds covariances, which --regmean takes; --fisher takes a Fisher")
        model = made.get("model", {})
        self.measured_on = model.get("weights_sha256") if isinstance(model, Mapping) else None
        if self.measured_on not in (None, *models) and not force_model:
            raise CheckpointError(
                f"{path}: was measured on another model than BASE and its fine-tune; extract it from one of them, or "
                "--force-model for a close relative"
            )
        theirs = {spelling(name): name for name in tensors}
        self.of = {name: theirs[spelling(name)] for name in shapes if spelling(name) in theirs}
        for name, own in self.of.items():
            info = tensors[own]
            if info.shape != shapes[name] or info.dtype not in FLOATING:
                raise CheckpointError(
                    f"{path}: {own} is {list(info.shape)} there and {list(shapes[name])} in BASE; it is a Fisher of "
                    "another model"
                )

    def read(self, name: str, start: int, stop: int) -> Doubles:
        """Read some entries of a tensor, in memory order.

        Raises:
            CheckpointError: a value that no Fisher has.
        """
        info = self._reader.info(self.of[name])
        stored = np.empty(stop - start, STORED[info.dtype])
        self._reader.read_into(info.name, stored, start)
        values = widen(stored, info.dtype).astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise CheckpointError(f"{self.path}: {info.name} has values that no Fisher has: negative, or not finite")
        return values

    def mean(self, name: str) -> float:
        """Return the mean over a tensor."""
        count = self._reader.info(self.of[name]).numel
        parts = ((start, min(start + _ENTRIES, count)) for start in range(0, count, _ENTRIES))
        return sum(float(self.read(name, *part).sum()) for part in parts) / max(count, 1)
