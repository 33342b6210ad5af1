"""A checkpoint is computed in its own dtype, unless this CPU multiplies it far more slowly than float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

import fisherkit
from fisherkit.engine.model import compute_dtype
from fisherkit.engine.model.compute_dtype import FACTOR, choose_compute_dtype, slowdown
from fisherkit.options import ExtractOptions

CPU = torch.device("cpu")


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Pretends that 16-bit products take so many times as long."""
    return lambda value: monkeypatch.setattr(compute_dtype, "slowdown", lambda dtype: value)


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

    def timed(dtype: torch.dtype) -> list[Callable[[], float]]:
        assert [product().shape for product in products(dtype)] == [(64, 512), (64, 512), (512, 512)]
        return [lambda value=value: value for value in seconds[dtype]]

    monkeypatch.setattr(compute_dtype, "_products", timed)
    monkeypatch.setattr(compute_dtype, "_seconds", lambda product: product())
    assert slowdown.__wrapped__(torch.float16) == 36.0


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
