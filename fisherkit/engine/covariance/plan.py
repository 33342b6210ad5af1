"""Which second moments a run gathers: of what goes into its linear layers, and of the gradients at what comes out.

Layers that are called with the very same tensor (queries, keys and values; gate and up) share the moment of it. Which
ones do is heard, not known: one batch runs through the blocks while every layer notes the tensor that reached it.
Weights that are no linear layer's (fused experts, which see other tokens each) have no moment, and are named.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisherkit.checkpoint.layout import TensorSpec
from fisherkit.engine.model.linear_layers import find_linear_layers
from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import OptionError
from fisherkit.kernels.covariance import sketch_rank

MomentSide = Literal["input", "output"]
SharedInputs = dict[str, str]
"""Parameter -> the first parameter of its block whose layer was called with the same tensor."""


@dataclass(frozen=True)
class Covariance:
    """A second moment, E[x x^T] of inputs or E[g g^T] of output gradients.

    Attributes:
        name: of the stored tensor.
        side: of what.
        parameters: weights whose layers share it; the first one's calls are what is added.
        tensors: their checkpoint names.
        block: that they lie in.
        size: channels.
        rank: columns of the sketch, or None for the whole [size, size].
    """

    name: str
    side: MomentSide
    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    block: int
    size: int
    rank: int | None

    @property
    def spec(self) -> TensorSpec:
        """The tensor that holds it: E [size, size], or B [size, rank] with E ~ B B^T."""
        return TensorSpec(self.name, "F32", (self.size, self.rank or self.size))


class Layer(NamedTuple):
    """A linear layer whose weight is one tensor of the checkpoint."""

    module: nn.Module
    tensor: str
    block: int
    inputs: int
    outputs: int


def layers_of(skeleton: Skeleton, plan: Plan, general: frozenset[str], blocks: Sequence[int]) -> dict[str, Layer]:
    """The layers of some blocks that have moments, by the parameter that is their weight."""
    found = {}
    for block in blocks:
        linear, _ = find_linear_layers(skeleton.model, plan.names([block]), general)
        for layer in linear:
            if layer.weight is None:
                continue
            tensors, shape = plan.targets[block][layer.weight], tuple(skeleton.model.get_parameter(layer.weight).shape)
            if len(tensors) == 1 and tensors[0].shape == shape:
                inputs, outputs = shape if isinstance(layer.module, Conv1D) else (shape[1], shape[0])
                found[layer.weight] = Layer(layer.module, tensors[0].name, block, inputs, outputs)
    return found


def plan_covariances(
    skeleton: Skeleton, plan: Plan, general: frozenset[str], shared_inputs: Mapping[str, str]
) -> list[Covariance]:
    """All moments of a run, in model order; layers that nothing was heard of share with none.

    Raises:
        OptionError: no target is the weight of a linear layer.
    """
    layers = layers_of(skeleton, plan, general, [block for block in plan.targets if block is not None])
    sharing: dict[str, list[str]] = {}
    for name in layers:
        sharing.setdefault(shared_inputs.get(name, name), []).append(name)
    moments = []
    for name, layer in layers.items():
        if name in sharing:
            moments.append(_moment("input", sharing[name], layers, layer.inputs))
        moments.append(_moment("output", [name], layers, layer.outputs))
    if not moments:
        raise OptionError("--statistics activations: none of the targets is the weight of a linear layer in a block")
    return moments


def covariance_bytes(skeleton: Skeleton, plan: Plan, shared_inputs: Mapping[str, str]) -> dict[int, int]:
    """Bytes of the moments of each block; with nothing heard an upper bound, as if no input were shared."""
    found: dict[int, int] = {}
    for moment in plan_covariances(skeleton, plan, frozenset(), shared_inputs):
        found[moment.block] = found.get(moment.block, 0) + moment.spec.nbytes
    return found


def memory_of_moments(skeleton: Skeleton, plan: Plan) -> dict[int | None, int]:
    """Bytes in memory of the moments of each block, at most; under None what one takes while it is finished."""
    memory: dict[int | None, int] = dict(covariance_bytes(skeleton, plan, {}).items())
    largest = max((m.spec.nbytes for m in plan_covariances(skeleton, plan, frozenset(), {}) if m.rank), default=0)
    memory[None] = 10 * largest  # float64 copies of a sketch, and its signs
    return memory


def left_out(plan: Plan, moments: Sequence[Covariance]) -> tuple[str, ...]:
    """Checkpoint names of the matrices among the targets that have no moments."""
    covered = {name for moment in moments for name in moment.tensors}
    return tuple(t.name for t in plan.tensors if len(t.shape) > 1 and t.name not in covered)


def _moment(side: MomentSide, parameters: Sequence[str], layers: Mapping[str, Layer], size: int) -> Covariance:
    tensors = tuple(layers[name].tensor for name in parameters)
    first = layers[parameters[0]]
    return Covariance(f"{first.tensor}.{side}", side, tuple(parameters), tensors, first.block, size, sketch_rank(size))


class SharedInputProbe:
    """A context in which one batch runs through some blocks; ``heard`` tells afterwards which layers share inputs."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self._first: dict[tuple[Any, ...], str] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the same memory
        self._hooks = ExitStack()
        self.shared_inputs: SharedInputs = {}

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.callback(layer.module.register_forward_pre_hook(self._listen(name), with_kwargs=True).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()
        self._first.clear()
        self._alive.clear()

    def _listen(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input"]
            self._alive.append(tensor)
            key = (self._layers[name].block, *identity(tensor))
            self.shared_inputs.setdefault(name, self._first.setdefault(key, name))

        return hook


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from all others that are alive: its memory, how it is laid out there, and its changes."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version


@torch.no_grad()
def probe_on_meta(skeleton: Skeleton, plan: Plan) -> SharedInputs | None:
    """Which layers share their input, from a forward on the meta device; None where the model does not run there."""
    blocks = [block for block in plan.targets if block is not None]
    meta = torch.device("meta")
    ids, mask = torch.zeros(1, 4, dtype=torch.long, device=meta), torch.zeros(1, 1, 4, 4, device=meta)
    try:
        with SharedInputProbe(layers_of(skeleton, plan, frozenset(), blocks)) as probe:
            # With positions and a mask of its own no model looks at values, which there are none of.
            skeleton.model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, KeyError, IndexError):
        return None
    return probe.shared_inputs
