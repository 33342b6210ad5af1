"""Different spellings of the same tensor: which names, and which parts of tensors, mean the same weights.

A checkpoint, an adapter trained on it and the model in memory name one weight in several ways: text-only and multimodal
classes differ in their prefixes, wrappers add theirs, and experts lie in one file each for themselves
(``experts.3.up_proj.weight``) and in another fused (``experts.gate_up_proj``). Names are brought to one *spelling*, and
tensors cut into *pieces*; equal spellings are the same weights. Spellings are for comparing: nothing is ever written
under one. Standard library only; knows names and shapes, no files and no values.

Axes of fused experts: E experts, I intermediate, H hidden. ``gate_up_proj`` is [E, 2I, H], the gate's rows first, and
``down_proj`` [E, H, I]; ``up_proj`` without a gate is [E, I, H].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

# What wrappers put in front of or inside of a name.
_WRAPPERS = re.compile(
    r"^(?:(?:module|base_model\.model|_orig_mod|_fsdp_wrapped_module)\.)+"
    r"|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)

# The text model inside a multimodal one, or under the name of its class. Anchored: a tower's own layers stay apart.
_TEXT = re.compile(r"^(?:model\.model\.|(?:model\.)?language_model\.(?:model\.)?)")
_HEAD = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?lm_head\.")
_NEOX_HEAD = re.compile(r"^embed_out\.")
_BACKBONE = re.compile(r"^backbone\.")  # Nemotron-H on disk
_BARE = re.compile(r"^(?=(?:layers\.\d+|embed_tokens|norm)\.)")  # saved from the model without its head
_TOWER = re.compile(
    r"^(?=(?:vision_tower|visual|vision_model|audio_tower|multi_modal_projector|embed_vision|embed_audio)\.)"
)

# Experts and routers: the names of Granite, ERNIE, Mixtral and PhiMoE on disk against those of the model in memory.
_MOVED = (
    (".block_sparse_moe.input_linear.weight", ".mlp.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".mlp.experts.down_proj"),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
)
_MOE = re.compile(r"\.block_sparse_moe\.")
_ROUTER = re.compile(r"\.mlp\.router\.(?:layer\.|gate\.)?(?=(?:weight|bias)$)")
_EXPERT = re.compile(r"(\.experts\.\d+)\.(w[123])(?=\.)")
_W123 = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that some other checkpoint may hold as a tensor of its own; often the whole tensor.

    In a tensor of shape ``[..., rows, columns]`` (a vector or a scalar is one row) it is rows ``start:stop`` of expert
    ``expert``. In memory order it is always one contiguous run: see ``span``.

    Attributes:
        spelling: what the piece is called, in the spelling of ``spelling()``.
        expert: index into the first axis; None where the piece is not one expert of a fused tensor.
        start: first row, along the last axis but one.
        stop: row after the last.
    """

    spelling: str
    expert: int | None
    start: int
    stop: int

    def span(self, shape: Shape) -> tuple[int, int]:
        """First element and number of elements, in the flat tensor of ``shape`` that this is a piece of."""
        if self.expert is None:
            return 0, math.prod(shape)
        rows, columns = shape[1:]
        return (self.expert * rows + self.start) * columns, (self.stop - self.start) * columns

    def shape_in(self, shape: Shape) -> Shape:
        """Shape of the piece of a tensor of ``shape``."""
        return shape if self.expert is None else (self.stop - self.start, shape[2])


def spelling(name: str) -> str:
    """Return the one spelling of a tensor's name, equal for the same weight in any layout that is known here.

    Prefixes of wrappers, multimodal classes and GPT-2's ``transformer.`` go; experts and routers are called as they are
    in memory. ``model.language_model.layers.0.mlp.up_proj.weight`` is ``model.layers.0.mlp.up_proj.weight``; towers for
    images and sound keep theirs. A spelling is its own spelling.
    """
    name = _WRAPPERS.sub("", name)
    name = _TEXT.sub("model.", _NEOX_HEAD.sub("lm_head.", _HEAD.sub("lm_head.", name)))
    name = _BARE.sub("model.", _BACKBONE.sub("model.", name)).removeprefix("transformer.")
    name = _TOWER.sub("model.", name)
    for disk, memory in _MOVED:
        name = name.replace(disk, memory)
    name = _ROUTER.sub(".mlp.gate.", _MOE.sub(".mlp.", name))
    return _EXPERT.sub(lambda match: f"{match[1]}.{_W123[match[2]]}", name)


def pieces(shapes: Mapping[str, Shape]) -> dict[str, tuple[Piece, ...]]:
    """Cut every tensor of one checkpoint into its pieces, in memory order.

    A tensor is one piece, except for fused experts: ``X.experts.gate_up_proj`` is, expert by expert,
    ``X.experts.{e}.gate_proj.weight`` (its upper half of rows) and ``X.experts.{e}.up_proj.weight``, and
    ``X.experts.down_proj`` is ``X.experts.{e}.down_proj.weight``.

    They are cut only where ``gate_up_proj`` (or a plain ``up_proj``) and ``down_proj`` lie beside each other with the
    shapes above. The transposed layout of gpt-oss, Llama 4 and Qwen3-VL, [E, H, 2I] and [E, I, H], in some with gate
    and up interleaved, never has those shapes. All checkpoints of these models share it, so there it stays whole.

    Args:
        shapes: shape by tensor name; all of the checkpoint, since a tensor's neighbour decides.
    """
    spelled = {name: spelling(name) for name in shapes}
    fused = {spelled[name]: shape for name, shape in shapes.items() if len(shape) == 3 and ".experts." in spelled[name]}
    return {name: _cut(spelled[name], shape, fused) for name, shape in shapes.items()}


def _cut(name: str, shape: Shape, fused: Mapping[str, Shape]) -> tuple[Piece, ...]:
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    if name not in fused or not _is_output_first(module, fused):
        return (Piece(name, None, 0, shape[-2] if len(shape) > 1 else 1),)
    experts, rows, _ = shape
    parts = {"gate_up_proj": ("gate_proj", "up_proj")}.get(kind, (kind,))
    height = rows // len(parts)
    return tuple(
        Piece(f"{module}.{expert}.{part}.weight", expert, height * n, height * (n + 1))
        for expert in range(experts)
        for n, part in enumerate(parts)
    )


def _is_output_first(module: str, fused: Mapping[str, Shape]) -> bool:
    """Return whether the fused experts of ``module`` (``X.experts``) are [E, out, in], as their two shapes say.

    Args:
        module: spelling of the module.
        fused: shapes of three-dimensional tensors, by spelling.
    """
    down = fused.get(f"{module}.down_proj")
    for kind, parts in (("gate_up_proj", 2), ("up_proj", 1)):
        up = fused.get(f"{module}.{kind}")
        if up is not None and down is not None:
            return up == (down[0], parts * down[2], down[1])
    return False
