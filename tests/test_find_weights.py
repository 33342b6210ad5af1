"""Checkpoint names find their parameters in any model, by public names alone."""

import pytest
import torch
from torch import nn
from training_runs import llama, matrices

import fisherkit
from fisherkit.errors import CheckpointError


def test_weights_are_found_by_checkpoint_names_under_wrappers_and_prefixes() -> None:
    model = llama()
    weights = matrices(model)
    for wrapped in (model, torch.compile(model, backend="eager"), nn.Sequential(model)[0]):
        found = fisherkit.find_weights(wrapped, weights)
        assert list(found) == list(weights)
        assert all(found[name] is weight for name, weight in weights.items())
    other = {name.replace("model.", "model.language_model.", 1): weight for name, weight in weights.items()}
    assert all(found is other[name] for name, found in fisherkit.find_weights(model, other).items())


def test_weights_of_another_model_and_parts_of_parameters_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"1 of 1 weights are not in this model, the first 'model.layers.9"):
        fisherkit.find_weights(llama(), ["model.layers.9.mlp.up_proj.weight"])
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name} is no parameter of its own.*gate_up_proj"):
        fisherkit.find_weights(llama("qwen3-moe"), [name])
