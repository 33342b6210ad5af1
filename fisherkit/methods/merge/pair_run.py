"""Steps that fapm and merge share: open and match the pair, load a tensor, refuse its values, leave it alone."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fisherkit.checkpoint.target import check_apart
from fisherkit.errors import CheckpointError
from fisherkit.floats import Stored
from fisherkit.kernels import compiled
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair
from fisherkit.methods.merge.tensor_selection import Chosen, choose
from fisherkit.options import PairOptions
from fisherkit.pairs.outputs import Targets, check_output
from fisherkit.pairs.pair import Pair, open_pair
from fisherkit.pairs.parallel import BlockPool
from fisherkit.pairs.prune import flipped_signs
from fisherkit.pairs.reader import Tensors
from fisherkit.pairs.rewrite import Changed, TensorRow
from fisherkit.pairs.shards import refuse_unwritable
from fisherkit.pairs.virtual import take_tuned
from fisherkit.progress import Say, Track

_UNRELATED = 0.45  # share of flipped signs; independent weights have a half
_ENOUGH_SIGNS = 1024  # entries below which that share says nothing


@dataclass(frozen=True)
class Request:
    """Arguments of a command.

    Attributes:
        method: ``fapm`` or ``merge``.
        base: as given.
        tuned: as given.
        targets: what is to be made; None for nothing.
        options: of the command.
        command: the command line for the card; None writes the call in Python.
        track: progress.
        say: remarks for people.
    """

    method: str
    base: str
    tuned: str
    targets: Targets | None
    options: PairOptions
    command: Sequence[str] | None
    track: Track
    say: Say


@dataclass(frozen=True)
class Run:
    """A request with both checkpoints open and matched.

    Attributes:
        request: what was asked for.
        checkpoints: BASE and FT.
        tensors: reads them.
        chosen: which tensors take part.
    """

    request: Request
    checkpoints: Pair
    tensors: Tensors
    chosen: Chosen


@contextmanager
def open_run(request: Request, inputs: Sequence[Path] = ()) -> Iterator[Run]:
    """Open and match the pair, and refuse outputs that are inputs or could not be written.

    Args:
        request: what is asked for.
        inputs: files that are read besides the pair.

    Raises:
        CheckpointError: the two cannot be read, or do not belong together.
        OptionError: --only and --skip leave nothing.
        OutputError: an output is one of the inputs, or could not be written.
    """
    with ExitStack() as stack:
        checkpoints = stack.enter_context(open_pair(request.base, request.tuned))
        if request.targets is not None:
            _check_apart(request.targets, checkpoints, inputs)
        if request.targets is not None and request.targets.checkpoint is not None:
            refuse_unwritable(checkpoints.base.index)
        pool = stack.enter_context(BlockPool())
        tensors = stack.enter_context(Tensors(checkpoints, pool))
        chosen = choose(tensors, request.options)
        compiled.switch_on(sum(tensors.info(name).numel for name in chosen.names))
        for note in checkpoints.tuned.notes:
            request.say(f"note: {note}")
        yield Run(request, checkpoints, tensors, chosen)


def _check_apart(targets: Targets, checkpoints: Pair, inputs: Sequence[Path]) -> None:
    """Refuse outputs that would replace an input or a part of one, or each other."""
    if targets.checkpoint is not None:
        check_output(targets.checkpoint, checkpoints)
        check_apart((targets.checkpoint,), inputs, None)
    read = (checkpoints.base_source.path, checkpoints.tuned_source.path, *inputs)
    check_apart(targets.around, (*read, *(path.with_suffix(".json") for path in read)), targets.checkpoint)


class Loaded(NamedTuple):
    """A tensor of both checkpoints, and what its row of the report says besides its counts."""

    pair: TensorPair
    remarks: TensorRow


def load_pair(
    tensors: Tensors,
    name: str,
    options: PairOptions,
    *,
    metric: str = "fapm",
    mean: float | None = None,
    selects: bool = False,
) -> Loaded:
    """Read a tensor of both checkpoints, and look whether they are related.

    Args:
        tensors: reads them.
        name: a tensor that takes part.
        options: say what becomes of NaN and infinities.
        metric: what entries are scored by.
        mean: mean magnitude of the base's, if it is known already.
        selects: entries are only selected. FT's are given as the output can hold them then, in the base's type: what
            rounding takes away did not change, and takes no place in a quota.

    Returns:
        The pair; the remarks may hold ``unrelated``, and ``changed`` and ``rounded_away`` where types differ.

    Raises:
        CheckpointError: the base holds NaN or infinities.
    """
    pair = tensors.load(name, metric, keep_nonfinite=options.nan == "keep-base", mean=mean)
    remarks: TensorRow = {}
    is_matrix = len(tensors.info(name).shape) > 1
    if is_matrix and pair.base.size >= _ENOUGH_SIGNS and flipped_signs(pair) > _UNRELATED:
        remarks["unrelated"] = True
    if selects and pair.base_code in ("BF16", "F16") and pair.tuned_code != pair.base_code:
        pair, changed, lost = tensors.in_bases_type(pair)
        remarks |= {"changed": changed, "rounded_away": lost}
    return Loaded(pair, remarks)


def finished(run: Run, options: PairOptions, name: str, loaded: Loaded, counts: DeltaCounts, scale: float) -> Changed:
    """Return a tensor whose base was overwritten with a new delta, with its row of the report.

    Args:
        run: the pair.
        options: say what becomes of NaN and infinities.
        name: the tensor.
        loaded: its values, and what its row says besides its counts.
        counts: of the entries of the delta.
        scale: factor of the delta.

    Raises:
        CheckpointError: values that are not finite, or beyond BASE's type.
    """
    refuse_bad_values(run.tensors, name, counts.nonfinite, options, loaded.pair.base)
    info, place = run.tensors.info(name), run.chosen.places[name]
    row: TensorRow = {
        "layer": place.layer,
        "module": place.module,
        "shape": list(info.shape),
        "weights": info.numel,
        "kept": counts.kept,
        "zero_deltas": counts.zero_deltas,
        "nonfinite": counts.nonfinite,
        "scale": scale,
        "energy": counts.energy,
        "energy_kept": counts.energy_kept / counts.energy if counts.energy else 0.0,
        **loaded.remarks,
    }
    if counts.rounded_away:
        row |= {"changed": counts.kept + counts.rounded_away, "rounded_away": counts.rounded_away}
    return Changed(loaded.pair.base, row)


def untouched(tensors: Tensors, name: str, chosen: Chosen, options: PairOptions) -> Stored | None:
    """Return a tensor that does not take part, as the output should have it; None if it does take part.

    Args:
        tensors: reads it.
        name: the tensor.
        chosen: which tensors take part.
        options: say what becomes of the others.

    Raises:
        CheckpointError: it becomes FT's, which holds NaN or infinities.
    """
    if chosen.is_left_out(name) and options.rest == "tuned":
        return all_of_tuned(tensors, name, options)
    return None if chosen.takes_part(name) else tensors.base(name)


def all_of_tuned(tensors: Tensors, name: str, options: PairOptions) -> Stored:
    """Return FT's tensor in BASE's type; what is not finite there is refused, or BASE's.

    Args:
        tensors: reads it.
        name: a floating tensor that both have.
        options: say what becomes of NaN and infinities.

    Raises:
        CheckpointError: there are some that --nan does not allow.
    """
    pair = tensors.load(name, keep_nonfinite=True, mean=0.0)
    refuse_bad_values(tensors, name, take_tuned(pair, tensors.pool), options)
    return pair.base


def refuse_bad_values(
    tensors: Tensors, name: str, nonfinite: int, options: PairOptions, result: Stored | None = None
) -> None:
    """Refuse a tensor in which differences are not finite, or whose result is not, unless --nan allows it.

    Args:
        tensors: reads the tensor again, to say where.
        name: the tensor.
        nonfinite: how many differences were not finite.
        options: say whether that is allowed.
        result: [n] what is to be written of it.

    Raises:
        CheckpointError: see above.
    """
    if options.nan != "refuse":
        return
    is_half = tensors.info(name).dtype == "F16"
    if nonfinite:
        pair = tensors.load(name)
        tensors.refuse_nonfinite(name, "FT", pair.tuned, pair.tuned_code)
        if not is_half:  # finite values whose difference is not
            raise CheckpointError(f"{name}: {nonfinite} differences are out of range; --nan keep-base takes BASE there")
    beyond = nonfinite
    if is_half and not nonfinite and result is not None:
        beyond = sum(tensors.pool.map(lambda start, stop: _count_beyond_half(result[start:stop]), result.size))
    if beyond:
        raise CheckpointError(
            f"{name}: {beyond} values are beyond float16, BASE's type; convert BASE to bfloat16 first"
        )


def _count_beyond_half(stored: Stored) -> int:
    """Count the entries of a stored float16 array that are infinite or NaN: all of their exponent bits are set."""
    return int(np.count_nonzero((stored.view(np.uint16) & 0x7C00) == 0x7C00))
