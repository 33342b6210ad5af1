"""Plan of the covariances that a run gathers: of inputs of linear layers, and of gradients at their outputs.

Layers that are called with the very same tensor (queries, keys and values; gate and up) share one input covariance.
Which ones do is observed: the model runs on the meta device, or a batch through the blocks, while a probe notes the
tensor that reaches each layer. Of fused experts, which see other tokens each, the inputs alone can be gathered, where a
checkpoint holds each expert's matrices as tensors of their own. What is left has no covariance, and is named in the
report.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisherkit.checkpoint.layout import TensorSpec
from fisherkit.engine.covariance.experts import Experts, experts_of
from fisherkit.engine.model.linear_layers import find_linear_layers
from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import OptionError
from fisherkit.kernels.covariance import sketch_rank

CovarianceSide = Literal["input", "output"]
SharedInputs = dict[str, str]
"""Parameter -> first parameter of its block whose layer was called with the same tensor."""


@dataclass(frozen=True)
class Form:
    """Which covariances are gathered, and how they are stored.

    Attributes:
        outputs: those of gradients at outputs too; else inputs alone, and those of fused experts with them.
        rank: columns of the factor of each; None for whole ones, but for those that are sketched.
        code: safetensors code of factors; whole ones are always F32.
    """

    outputs: bool = True
    rank: int | None = None
    code: str = "F32"


@dataclass(frozen=True)
class Covariance:
    """An uncentered covariance: E[x x^T] of a layer's inputs, or E[g g^T] of the gradients at its output.

    Attributes:
        name: of the stored tensor.
        side: ``input`` or ``output``.
        parameters: weights whose layers share it; rows are taken from calls of the first one's layer.
        tensors: checkpoint names of these weights.
        block: number of the block that they lie in.
        size: channels.
        rank: columns of the factor that is stored, or None where the whole is.
        sketch: columns of the sketch that it is added up in, or None where that is done in full.
        code: of what is stored.
        expert: whose input it is, of a parameter that holds several; None for a layer's.
    """

    name: str
    side: CovarianceSide
    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    block: int
    size: int
    rank: int | None
    sketch: int | None = None
    code: str = "F32"
    expert: int | None = None

    @property
    def spec(self) -> TensorSpec:
        """Tensor that holds it: E's upper triangle, row after row, or B [size, rank] with E ~ B B^T."""
        whole = (self.size * (self.size + 1) // 2,)
        return TensorSpec(self.name, self.code, whole if self.rank is None else (self.size, self.rank))

    @property
    def sum_shape(self) -> tuple[int, int]:
        """Shape of the float32 sum, E [size, size] or its sketch."""
        return self.size, self.sketch or self.size


class Layer(NamedTuple):
    """A linear layer whose weight is one tensor of the checkpoint."""

    module: nn.Module
    tensor: str
    block: int
    inputs: int
    outputs: int


def layers_of(skeleton: Skeleton, plan: Plan, general: frozenset[str], blocks: Sequence[int]) -> dict[str, Layer]:
    """Return the layers of some blocks that have covariances, by the parameter that is their weight.

    Args:
        skeleton: the model.
        plan: its targets.
        general: parameters that are left to autograd although a linear layer holds them; they have none.
        blocks: block numbers.
    """
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
    skeleton: Skeleton, plan: Plan, general: frozenset[str], shared_inputs: Mapping[str, str], form: Form
) -> list[Covariance]:
    """Return all covariances of a run, in model order.

    Args:
        skeleton: the model.
        plan: its targets.
        general: see ``layers_of``.
        shared_inputs: as a probe found them; a layer that is missing here shares its input with none.
        form: which of them, and how.

    Raises:
        OptionError: no target is the weight of a linear layer.
    """
    layers = layers_of(skeleton, plan, general, [block for block in plan.targets if block is not None])
    sharing: dict[str, list[str]] = {}
    for name in layers:
        sharing.setdefault(shared_inputs.get(name, name), []).append(name)
    covariances = []
    for name, layer in layers.items():
        if name in sharing:
            first = [name, *(other for other in sharing[name] if other != name)]  # called before the others
            covariances.append(_covariance("input", first, layers, layer.inputs, form))
        if form.outputs:
            covariances.append(_covariance("output", [name], layers, layer.outputs, form))
    if not form.outputs:
        inside = [block for block in plan.targets if block is not None]
        for name, experts in experts_of(skeleton, plan, inside).items():
            covariances += [_of_expert(name, experts, expert, form) for expert in experts.tensors]
    if not covariances:
        raise OptionError("--statistics: none of the targets is the weight of a linear layer in a block")
    return covariances


def covariance_bytes(skeleton: Skeleton, plan: Plan, shared_inputs: Mapping[str, str], form: Form) -> int:
    """Return the bytes of the file of covariances; an upper bound where ``shared_inputs`` is empty."""
    covariances = plan_covariances(skeleton, plan, frozenset(), shared_inputs, form)
    return sum(covariance.spec.nbytes for covariance in covariances)


def memory_of_covariances(skeleton: Skeleton, plan: Plan, form: Form) -> dict[int | None, int]:
    """Return the bytes in memory of each block's covariances, at most; under None what finishing one takes besides."""
    memory: dict[int | None, int] = {None: 0}
    for covariance in plan_covariances(skeleton, plan, frozenset(), {}, form):
        nbytes = 4 * math.prod(covariance.sum_shape)
        memory[covariance.block] = memory.get(covariance.block, 0) + nbytes
        # Float64 copies of a sketch, and its signs; of a whole one, its eigenvectors or its triangle.
        finishing = 10 * nbytes if covariance.sketch else 6 * nbytes if covariance.rank else covariance.spec.nbytes
        memory[None] = max(memory[None], finishing)
    return memory


def left_out(plan: Plan, covariances: Sequence[Covariance]) -> tuple[str, ...]:
    """Return the checkpoint names of the matrices among the targets that have no covariance."""
    covered = {name for covariance in covariances for name in covariance.tensors}
    return tuple(t.name for t in plan.tensors if len(t.shape) > 1 and t.name not in covered)


def _covariance(
    side: CovarianceSide, parameters: Sequence[str], layers: Mapping[str, Layer], size: int, form: Form
) -> Covariance:
    tensors, block = tuple(layers[name].tensor for name in parameters), layers[parameters[0]].block
    return Covariance(f"{tensors[0]}.{side}", side, tuple(parameters), tensors, block, size, *_kept(size, form))


def _of_expert(name: str, experts: Experts, expert: int, form: Form) -> Covariance:
    tensors, size = experts.tensors[expert], experts.channels
    return Covariance(f"{tensors[0]}.input", "input", (name,), tensors, experts.block, size, *_kept(size, form), expert)


def _kept(size: int, form: Form) -> tuple[int | None, int | None, str]:
    """Return rank, sketch and code of a covariance of ``size`` channels."""
    sketch = sketch_rank(size, form.rank)
    rank = sketch if form.rank is None else form.rank if form.rank < size else None
    return rank, sketch, "F32" if rank is None else form.code


class SharedInputProbe:
    """Context in which some blocks run once; afterwards ``shared_inputs`` says which layers share."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self._first: dict[tuple[Any, ...], str] = {}
        # A freed tensor's memory may be given to the next one, which would then look like the same tensor.
        self._alive: list[Tensor] = []
        self._hooks = ExitStack()
        self.shared_inputs: SharedInputs = {}

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.callback(layer.module.register_forward_pre_hook(self._hook(name), with_kwargs=True).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()
        self._first.clear()
        self._alive.clear()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input"]
            self._alive.append(tensor)
            key = (self._layers[name].block, *identity(tensor))
            self.shared_inputs.setdefault(name, self._first.setdefault(key, name))

        return hook


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that no other living tensor has: its memory, its layout there, and its count of changes in place."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version


@torch.no_grad()
def probe_on_meta(skeleton: Skeleton, plan: Plan, general: frozenset[str] = frozenset()) -> SharedInputs | None:
    """Find the layers that share their input by a forward on the meta device; None where the model does not run there.

    It needs no weights and no batch. A copy runs, since some models keep what they see in a forward: positions, sines.

    Args:
        skeleton: the model.
        plan: its targets.
        general: see ``layers_of``.
    """
    if not all(parameter.is_meta for parameter in skeleton.model.parameters()):
        return None
    blocks = [block for block in plan.targets if block is not None]
    meta = torch.device("meta")
    ids, mask = torch.zeros(1, 4, dtype=torch.long, device=meta), torch.zeros(1, 1, 4, 4, device=meta)
    try:
        model = copy.deepcopy(skeleton.model)
        with SharedInputProbe(layers_of(replace(skeleton, model=model), plan, general, blocks)) as probe:
            # Given positions and a mask, models read no values from tensors; on meta there are none.
            model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # a model's own code may raise anything here, and a batch will show the same
        return None
    return probe.shared_inputs
