"""Covariances of a group of blocks, added up while batches are replayed and differentiated.

A covariance is the mean of x x^T over all tokens of all samples. Prompt tokens count, whatever tokens the loss is taken
over, because a layer reads them too; padding does not count. Where a layer sees only some tokens, the mean is over
these. Gradients are those of each sample's own loss, as for the Fisher.

Axes: B samples, T tokens, R rows (real tokens of a batch), C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fisherkit.engine.covariance.experts import ExpertInputs
from fisherkit.engine.covariance.plan import Covariance, Layer, identity
from fisherkit.engine.model.findings import NeedsBatchSizeOne
from fisherkit.engine.ranks.ranks import Ranks
from fisherkit.errors import FisherkitError, UnsupportedModelError
from fisherkit.kernels.covariance import (
    add_second_moment_,
    add_sketch_,
    complete_,
    factor_of,
    leading_factor,
    packed,
    random_signs,
)
from fisherkit.kernels.deal import deal
from fisherkit.kernels.devices import has_float64, wide_device


class Accumulator:
    """Sum of x x^T over rows, in float32, for one covariance.

    Args:
        covariance: that is summed.
        device: where the sum is kept.
        signs: random signs [size, rank] of its sketch, or None where the whole matrix is kept.
    """

    def __init__(self, covariance: Covariance, device: torch.device, signs: Tensor | None) -> None:
        self.covariance = covariance
        self.rows = 0
        self._signs = signs
        self._sum = torch.zeros(covariance.sum_shape, device=device)
        self._squares = torch.zeros((), dtype=_widest(device), device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [R, size] of any float dtype."""
        self.rows += len(rows)
        if self._signs is None:
            add_second_moment_(self._sum, rows)
        else:
            add_sketch_(self._sum, rows, self._signs)
            self._squares += torch.linalg.vector_norm(rows, dtype=self._squares.dtype).square()

    @property
    def sum(self) -> Tensor:
        """What was added up, to be changed in place."""
        return self._sum

    @property
    def counts(self) -> tuple[int, float]:
        """Number of rows, and the sum of their squares, where a sketch does not tell it."""
        return self.rows, float(self._squares)

    @counts.setter
    def counts(self, counts: tuple[int, float]) -> None:
        self.rows = counts[0]
        self._squares.fill_(counts[1])

    def finish(self) -> tuple[Tensor, dict[str, Any]]:
        """Return the mean's upper triangle, or its factor [size, rank], and its figures: tokens, trace, energy.

        ``energy`` is the share of the trace that the factor holds; the whole matrix holds all of it. Where the factor
        is stored in bfloat16, ``rounding`` is the size of what that takes away, relative to the factor.

        Raises:
            FisherkitError: the sum overflows float32.
        """
        mean = self._sum.div_(max(self.rows, 1)).to(wide_device(self._sum.device))
        if not bool(mean.sum(dtype=torch.float64).isfinite()):
            raise FisherkitError(
                f"{self.covariance.name}: the second moment is not finite in float32; try --dtype float32, or bfloat16"
            )
        rank = self.covariance.rank
        if self._signs is None:
            trace = float(mean.diagonal().sum(dtype=torch.float64))
            if rank is None:
                return packed(mean), {"tokens": self.rows, "trace": trace, "energy": 1.0}
            factor = leading_factor(complete_(mean), rank)
        else:
            trace = float(self._squares) / max(self.rows, 1)
            factor = factor_of(mean, self._signs.to(mean.device))[:, :rank]
        length = float(torch.linalg.vector_norm(factor, dtype=torch.float64))
        figures = {"tokens": self.rows, "trace": trace, "energy": min(1.0, length**2 / trace) if trace else 1.0}
        if self.covariance.code == "BF16":
            lost = torch.linalg.vector_norm(factor - factor.bfloat16().float(), dtype=torch.float64)
            figures["rounding"] = float(lost) / length if length else 0.0
        return factor, figures


def _widest(device: torch.device) -> torch.dtype:
    return torch.float64 if has_float64(device) else torch.float32


class CovarianceHooks:
    """Context that hooks the layers of a group; ``begin`` and ``finish`` enclose every batch.

    Args:
        layers: by the parameter that is their weight.
        covariances: of these layers.
        device: where sums are kept.
        weights: gives a parameter by its name, once it is in its place.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        covariances: Sequence[Covariance],
        device: torch.device,
        weights: Callable[[str], Tensor],
    ) -> None:
        self._layers, self._weights = layers, weights
        signs: dict[int, Tensor] = {}  # one matrix serves all sketches of its size
        for one in covariances:
            if one.sketch is not None and one.size not in signs:
                signs[one.size] = random_signs(one.size, one.sketch, device)
        self._sums = [Accumulator(one, device, signs.get(one.size) if one.sketch else None) for one in covariances]
        inputs = [one for one in self._of("input") if one.covariance.expert is None]
        self._inputs = {name: one for one in inputs for name in one.covariance.parameters}
        experts = [one for one in self._sums if one.covariance.expert is not None]
        self._experts = {(one.covariance.parameters[0], one.covariance.expert): one for one in experts}
        self._silent: set[str] = set()  # parameters of experts that no token has reached in this batch
        self._outputs = {one.covariance.parameters[0]: one for one in self._of("output")}
        self._lengths: Sequence[int] = ()
        self._seen: dict[str, dict[tuple[Any, ...], Tensor]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.callback(layer.module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
        names = {name for name, _ in self._experts}
        if names:
            self._hooks.enter_context(ExpertInputs({name: self._weights(name) for name in names}, self._take_tokens))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()
        self._seen.clear()

    def begin(self, lengths: Sequence[int]) -> None:
        """Announce the next batch: its samples have these many tokens and are padded on the right."""
        self._lengths = lengths
        self._silent = {name for name, _ in self._experts}

    def finish(self) -> None:
        """Let go of the batch.

        Raises:
            UnsupportedModelError: experts are multiplied in a way that is not seen.
        """
        self._seen.clear()
        if self._silent:
            raise UnsupportedModelError(
                f"--statistics inputs: no token was seen to reach the experts of {min(self._silent)}; leave them out "
                "with --targets"
            )

    def reduce(self, ranks: Ranks) -> None:
        """Add the sums up over all ranks; this one keeps those that it owns. Sums and sketches are linear in the rows.

        All ranks call it at the same point.
        """
        if ranks.size == 1:
            return
        dealt = deal([one.sum.numel() for one in self._sums], ranks.size)
        owners = {number: rank for rank, numbers in enumerate(dealt) for number in numbers}
        ranks.reduce_([one.sum for one in self._sums], [owners[number] for number in range(len(self._sums))])
        for one, *counts in zip(self._sums, *ranks.gather([one.counts for one in self._sums]), strict=True):
            one.counts = sum(rows for rows, _ in counts), sum(squares for _, squares in counts)
        self._sums = [self._sums[number] for number in dealt[ranks.rank]]

    def results(self) -> Iterator[tuple[Covariance, Tensor, dict[str, Any]]]:
        """Yield each finished covariance with its figures; its sum's memory is free afterwards."""
        for held in (self._inputs, self._outputs, self._experts):
            held.clear()
        while self._sums:
            one = self._sums.pop(0)
            yield one.covariance, *one.finish()

    def _of(self, side: str) -> list[Accumulator]:
        return [one for one in self._sums if one.covariance.side == side]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._take_input(name, (args[0] if args else kwargs["input"]).detach())
            if not self._outputs:
                return  # nothing is differentiated
            if not output.requires_grad:
                output.requires_grad_()  # a layer fed by constants alone still has a gradient of its own

            def receive(grad: Tensor) -> None:
                self._seen.pop(name, None)
                self._outputs[name].add(real_rows(grad.detach(), self._lengths))

            output.register_hook(receive)  # type: ignore[no-untyped-call]

        return hook

    def _take_tokens(self, name: str, expert: int, tokens: Tensor) -> None:
        self._silent.discard(name)
        if (name, expert) in self._experts:
            self._experts[name, expert].add(tokens)

    def _take_input(self, name: str, tensor: Tensor) -> None:
        """Add an input once for all layers that share it, and check that they still do."""
        one = self._inputs[name]
        first = one.covariance.parameters[0]
        if name == first:
            one.add(real_rows(tensor, self._lengths))
            self._seen.setdefault(name, {})[identity(tensor)] = tensor  # kept alive: its memory stays its own
        elif identity(tensor) not in self._seen.get(first, {}):
            raise UnsupportedModelError(
                f"--statistics: {name} and {first} read the same tensor in one batch and different ones in "
                "another; leave one of them out with --targets"
            )


def real_rows(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the tokens [R, C] of a batch [B, T, ..., C] without its padding.

    Raises:
        NeedsBatchSizeOne: the tensor has no such axes, so that nothing tells tokens and padding apart.
    """
    if len(lengths) > 1 and (tensor.shape[0] != len(lengths) or tensor.shape[1] != max(lengths)):
        raise NeedsBatchSizeOne(frozenset())
    if len(lengths) == 1 or all(length == tensor.shape[1] for length in lengths):
        return tensor.reshape(-1, tensor.shape[-1])
    return torch.cat([tensor[n, :length].reshape(-1, tensor.shape[-1]) for n, length in enumerate(lengths)])
