"""Second moments of a group of blocks, added up while batches are replayed and differentiated.

A moment is the mean over all tokens of all samples, prompt tokens included whatever the loss is taken over (padding is
left out): a layer reads all of them. Where a layer sees only some tokens, it is the mean over these. Gradients are of
each sample's own loss, as the Fisher's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fisherkit.engine.covariance.plan import Covariance, Layer, identity
from fisherkit.errors import FisherkitError, UnsupportedModelError
from fisherkit.kernels.covariance import add_second_moment_, add_sketch_, complete_, factor_of, random_signs


class Accumulator:
    """Adds rows up to one moment."""

    def __init__(self, moment: Covariance, device: torch.device, signs: Tensor | None) -> None:
        self.moment = moment
        self.rows = 0
        self._signs = signs
        self._sum = torch.zeros(moment.spec.shape, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [R, size] of any float dtype."""
        self.rows += len(rows)
        if self._signs is None:
            add_second_moment_(self._sum, rows)
        else:
            add_sketch_(self._sum, rows, self._signs)
            self._squares += torch.linalg.vector_norm(rows, dtype=torch.float64).square()

    def finish(self) -> tuple[Tensor, dict[str, Any]]:
        """The mean [size, size], or its factor [size, rank], and what is told of it: trace, tokens, energy held.

        Raises:
            FisherkitError: the moment overflows float32.
        """
        mean = self._sum.div_(max(self.rows, 1))
        if not bool(mean.sum(dtype=torch.float64).isfinite()):
            raise FisherkitError(
                f"{self.moment.name}: the second moment is not finite in float32; try --dtype float32, or bfloat16"
            )
        if self._signs is None:
            trace = float(mean.diagonal().sum(dtype=torch.float64))
            return complete_(mean), {"tokens": self.rows, "trace": trace, "energy": 1.0}
        factor = factor_of(mean, self._signs)
        trace = float(self._squares) / max(self.rows, 1)
        held = float(torch.linalg.vector_norm(factor, dtype=torch.float64)) ** 2
        return factor, {"tokens": self.rows, "trace": trace, "energy": min(1.0, held / trace) if trace else 1.0}


class CovarianceHooks:
    """A context that listens to the layers of a group; ``begin`` and ``finish`` enclose every batch.

    Args:
        layers: by the parameter that is their weight.
        moments: of these layers.
        device: where sums are kept.
    """

    def __init__(self, layers: Mapping[str, Layer], moments: Sequence[Covariance], device: torch.device) -> None:
        self._layers = layers
        signs: dict[int, Tensor] = {}
        for moment in moments:
            if moment.rank is not None and moment.size not in signs:
                signs[moment.size] = random_signs(moment.size, moment.rank, device)
        self._sums = [
            Accumulator(moment, device, signs.get(moment.size) if moment.rank else None) for moment in moments
        ]
        self._inputs = {name: one for one in self._of("input") for name in one.moment.parameters}
        self._outputs = {one.moment.parameters[0]: one for one in self._of("output")}
        self._lengths: Sequence[int] = ()
        self._heard: dict[str, dict[tuple[Any, ...], Tensor]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.callback(layer.module.register_forward_hook(self._listen(name), with_kwargs=True).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()
        self._heard.clear()

    def begin(self, lengths: Sequence[int]) -> None:
        """The batch that runs next holds samples of these many tokens, padded on the right."""
        self._lengths = lengths

    def finish(self) -> None:
        """The batch was differentiated."""
        self._heard.clear()

    def results(self) -> Iterator[tuple[Covariance, Tensor, dict[str, Any]]]:
        """The finished moments and what is told of each, one after the other; their memory goes with them."""
        self._inputs.clear()
        self._outputs.clear()
        while self._sums:
            one = self._sums.pop(0)
            yield one.moment, *one.finish()

    def _of(self, side: str) -> list[Accumulator]:
        return [one for one in self._sums if one.moment.side == side]

    def _listen(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._take_input(name, (args[0] if args else kwargs["input"]).detach())
            if not output.requires_grad:
                output.requires_grad_()  # a layer fed by constants alone still has a gradient of its own

            def receive(grad: Tensor) -> None:
                self._heard.pop(name, None)
                self._outputs[name].add(real_rows(grad.detach(), self._lengths))

            output.register_hook(receive)  # type: ignore[no-untyped-call]

        return hook

    def _take_input(self, name: str, tensor: Tensor) -> None:
        one = self._inputs[name]
        first = one.moment.parameters[0]
        if name == first:
            one.add(real_rows(tensor, self._lengths))
            self._heard.setdefault(name, {})[identity(tensor)] = tensor  # kept, so that its memory stays its own
        elif identity(tensor) not in self._heard.get(first, {}):
            raise UnsupportedModelError(
                f"--statistics activations: {name} and {first} read the same tensor in one batch and different ones in "
                "another; leave one of them out with --targets"
            )


def real_rows(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """The tokens [R, C] of a batch [B, T, ..., C] without its padding."""
    if len(lengths) == 1 or all(length == tensor.shape[1] for length in lengths):
        return tensor.reshape(-1, tensor.shape[-1])
    return torch.cat([tensor[n, :length].reshape(-1, tensor.shape[-1]) for n, length in enumerate(lengths)])
