"""Input and output axis of a stored weight. Standard library only; reads no values.

A linear layer stores [out, in]. Two kinds of weights are the other way round, and nothing in the file says so: GPT-2's
Conv1D, [in, out], and the fused experts of gpt-oss, Llama 4 and Qwen3-VL, [E, in, out] against [E, out, in] elsewhere.
Shapes give them away where neighbours lie in the same file; the name of the architecture does where they do not.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from fisherkit.checkpoint.names.spelling import Shape, spelling

_CONV1D = re.compile(r"(?:^|\.)(?:attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
_CONV1D_MODELS = ("gpt2", "openaigpt", "openai-gpt", "imagegpt", "decisiontransformer")
_INPUT_FIRST_MODELS = ("gptoss", "llama4", "qwen3vlmoe", "qwen3omnimoe")
_CONVOLUTION = re.compile(r"(?:^|[._])conv(?:[._\d]|$)")


class Axes(NamedTuple):
    """Axes of a weight, counted from the first."""

    input: int
    output: int


class AxisFinder:
    """Answers for the weights of one model.

    Args:
        shapes: of all weights that lie in the file; neighbours explain each other.
        architecture: the model's class or type, such as ``GPT2LMHeadModel`` or ``gpt_oss``; empty where unknown.
    """

    def __init__(self, shapes: Mapping[str, Shape], architecture: str = "") -> None:
        self._shapes = shapes
        self._fused = {spelling(name): shape for name, shape in shapes.items() if len(shape) == 3}
        self._model = re.sub(r"[_\-.]", "", architecture.lower())
        self._conv1d = self._has_conv1d()

    def axes(self, name: str) -> Axes | None:
        """Input and output axis of a weight; None for what is no matrix: vectors, biases, convolutions."""
        shape, last = self._shapes[name], name.rpartition(".")[2]
        if last.endswith("bias") or len(shape) not in (2, 3) or (len(shape) == 3 and _CONVOLUTION.search(name)):
            return None
        if len(shape) == 2:
            return Axes(0, 1) if self._conv1d and _CONV1D.search(name) else Axes(1, 0)
        return Axes(1, 2) if self._is_input_first(name) else Axes(2, 1)

    def _has_conv1d(self) -> bool:
        """[in, 3 in] is Conv1D's layout of queries, keys and values together; a linear layer has [3 in, in]."""
        together = [shape for name, shape in self._shapes.items() if name.endswith("attn.c_attn.weight")]
        if together:
            return all(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in together)
        return self._model.startswith(tuple(model.replace("-", "") for model in _CONV1D_MODELS))

    def _is_input_first(self, name: str) -> bool:
        """Gate and up together are twice as long as down is wide; without a gate shapes fit either way."""
        module = spelling(name).removesuffix(".weight").rpartition(".")[0]
        up, down = (self._fused.get(f"{module}.{kind}") for kind in ("gate_up_proj", "down_proj"))
        if up is not None and down is not None:
            found = up[2] == 2 * down[1], up[1] == 2 * down[2]
            if found[0] != found[1]:
                return found[0]
        return self._model.startswith(_INPUT_FIRST_MODELS)
