"""A checkpoint is computed in its own dtype, unless this CPU multiplies it far more slowly than float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkit
from fisherkit.engine.model import compute_dtype
from fisherkit.engine.model.compute_dtype import FACTOR, ProbeShape, choose_compute_dtype, shape_to_come, slowdown
from fisherkit.options import ExtractOptions, MaskOptions

CPU = torch.device("cpu")


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Pretends that 16-bit products take so many times as long."""
    return lambda value: monkeypatch.setattr(compute_dtype, "slowdown", lambda dtype, shape: value)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_slow_dtypes_are_widened_and_others_are_not(stored: torch.dtype, ratio: Callable[[float], None]) -> None:
    ratio(FACTOR - 0.01)
    assert choose_compute_dtype(stored, CPU) == (stored, None)
    ratio(FACTOR)
    assert choose_compute_dtype(stored, CPU)[0] is torch.float32
    ratio(70.4)
    assert "70 times" in str(choose_compute_dtype(stored, CPU)[1])


def test_float32_and_accelerators_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "slowdown", None)
    assert choose_compute_dtype(torch.float32, CPU) == (torch.float32, None)
    assert choose_compute_dtype(torch.bfloat16, torch.device("cuda")) == (torch.bfloat16, None)


def test_the_probe_times_all_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: [1.0, 1.0, 1.0], torch.float16: [1.0, 100.0, 7.0]}
    products = compute_dtype._products

    def timed(dtype: torch.dtype, shape: ProbeShape) -> list[Callable[[], float]]:
        assert [product().shape for product in products(dtype, shape)] == [(64, 800), (64, 600), (800, 600)]
        return [lambda value=value: value for value in seconds[dtype]]

    monkeypatch.setattr(compute_dtype, "_products", timed)
    monkeypatch.setattr(compute_dtype, "_seconds", lambda product: product())
    assert slowdown.__wrapped__(torch.float16, ProbeShape(64, 600, 800)) == 36.0


def test_the_probe_has_the_shape_of_the_products_to_come_but_for_large_and_small_ones() -> None:
    middling = transformers.LlamaConfig(hidden_size=704, intermediate_size=900)
    assert shape_to_come(middling, 64) == ProbeShape(64, 704, 900)
    llama = transformers.LlamaConfig(hidden_size=96, intermediate_size=200)
    assert shape_to_come(llama, 40) == ProbeShape(64, 512, 512)
    assert shape_to_come(transformers.GPT2Config(n_embd=80), 40) == ProbeShape(64, 512, 512)
    assert shape_to_come(transformers.LlamaConfig(), 4096) == ProbeShape(64, 1024, 1024)


def test_a_slow_product_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = iter(range(100))
    monkeypatch.setattr(compute_dtype.time, "thread_time", lambda: float(next(clock)))
    assert compute_dtype._seconds(lambda: calls.append(1)) == 1.0
    assert len(calls) == 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slower", [1.0, 70.0])
def test_the_self_check_and_the_statistics_compute_as_chosen(
    stored: torch.dtype, slower: float, ratio: Callable[[float], None], prompts: Path, tmp_path: Path
) -> None:
    model = tiny.save("llama", tmp_path / "model", dtype=stored)
    ratio(slower)
    seen: set[torch.dtype] = set()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.add(args[0].dtype) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        options = ExtractOptions(statistics="activations", engine="stream", limit=2)
        fisherkit.extract(model, prompts, tmp_path / "a.pt", options)
    finally:
        handle.remove()
    assert seen == {torch.float32 if slower > 1 else stored}


@pytest.mark.parametrize(("slower", "computed"), [(1.0, "bfloat16"), (70.0, "float32")])
def test_the_choice_is_said_written_down_and_overruled(
    slower: float, computed: str, ratio: Callable[[float], None], prompts: Path, tmp_path: Path
) -> None:
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    ratio(slower)
    said: list[str] = []
    report = fisherkit.extract(model, prompts, tmp_path / "a.pt", ExtractOptions(store="fp32"), say=said.append)
    assert report.provenance["run"]["dtype"] == computed
    assert report.provenance["model"]["dtype"] == "bfloat16"
    assert any("computing in float32" in line for line in said) == (computed == "float32")
    options = ExtractOptions(store="fp32", dtype=computed)
    fisherkit.extract(model, prompts, tmp_path / "b.pt", options)
    one, other = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")
    assert all(torch.equal(one[name], other[name]) for name in other)
    ratio(1.0 if slower > 1 else 70.0)
    report = fisherkit.extract(model, prompts, tmp_path / "c.pt", options)
    assert report.provenance["run"]["dtype"] == computed


def test_a_plan_reckons_with_the_dtype_that_is_computed_in(ratio: Callable[[float], None], tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    plans = []
    for slower in (1.0, 70.0):
        ratio(slower)
        plans.append(fisherkit.plan_extract(model, None))
    assert [plan["dtype"] for plan in plans] == ["bfloat16", "float32"]
    assert plans[1]["peak_bytes"]["host"] > plans[0]["peak_bytes"]["host"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_subspaces_of_16_bit_weights_are_multiplied_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[torch.dtype] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                self.seen |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
            return func(*args, **(kwargs or {}))

    model = tiny.save("llama", tmp_path / "model", dtype=stored)
    options = MaskOptions(svd_rank=2, basis="weight", weights=str(model))
    with Products() as products:
        fisherkit.mask(model, tmp_path / "svd.safetensors", options)
    assert products.seen
    assert products.seen <= {torch.float32, torch.float64}
