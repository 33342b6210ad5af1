"""Modules stand in one order wherever they are listed: q k v o, gate up down."""

import random
from pathlib import Path

import pytest
import torch
from fisher_files import write_fisher

from fisherkit.checkpoint.names.order import in_model_order, module_rank
from fisherkit.methods.inspect.summary import inspect

ORDERS = [
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj "
    "input_layernorm",
    "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj ln_1",
    "self_attn.q_proj self_attn.o_proj mlp.gate mlp.experts.gate_up_proj mlp.experts.down_proj "
    "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj self_attn.q_norm",
    "self_attn.q_proj block_sparse_moe.gate block_sparse_moe.experts.w1 block_sparse_moe.experts.w3 "
    "block_sparse_moe.experts.w2",
    "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "linear_attn.in_proj_qkvz linear_attn.out_proj mamba.in_proj mamba.out_proj feed_forward.w1 feed_forward.w3 "
    "feed_forward.w2",
]


@pytest.mark.parametrize("text", ORDERS)
def test_any_order_of_a_file_becomes_that_of_the_model(text: str) -> None:
    modules = text.split()
    for seed in range(5):
        shuffled = random.Random(seed).sample(modules, len(modules))  # noqa: S311  # no secret
        assert in_model_order(shuffled) == tuple(modules)


def test_unknown_modules_come_last_in_the_files_order() -> None:
    assert in_model_order(["zeta", "alpha", "self_attn.q_proj", "beta.gamma"])[0] == "self_attn.q_proj"
    assert in_model_order(["zeta", "alpha", "beta.gamma"]) == ("zeta", "alpha", "beta.gamma")
    assert module_rank("self_attn.q_proj.bias") == module_rank("zeta")
    assert in_model_order([]) == ()


@pytest.mark.parametrize("by", ["module", "tensor"])
def test_tables_and_maps_have_this_order_whatever_the_files_is(tmp_path: Path, by: str) -> None:
    modules = ORDERS[0].split()[:7]
    names = [f"model.layers.{layer}.{module}.weight" for layer in (10, 2) for module in sorted(modules)]
    summary = inspect(write_fisher(tmp_path / "f.safetensors", {name: torch.ones(2, 2) for name in names}), by=by)
    assert summary.heat.modules == tuple(modules)
    expected = modules if by == "module" else [f"model.layers.{i}.{one}.weight" for i in (2, 10) for one in modules]
    assert [row.name for row in summary.rows] == expected
