"""The fused kernel gives what the plain one gives, interpreted on a CPU; and it compiles, as far as a CPU can show."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fisherkit
from fisherkit.kernels import fisher as kernels
from fisherkit.kernels import fused
from fisherkit.options import ExtractOptions

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
SOURCE = Path(fused.__file__).with_name("triton_fisher.py")


def load(name: str) -> ModuleType:
    """A module of its own: whether a kernel is interpreted is settled when its file is imported."""
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield load("interpreted_fisher")


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(fisher: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
    squares = ((g.double().T @ x.double()) ** 2 for x, g in zip(inputs, grads, strict=True))
    return sum(squares, fisher.double())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (130, 70), (64, 200), (5, 129)])
def test_fused_squares_are_those_of_the_formula(shape: tuple[int, int], dtype: torch.dtype, interpreted: Any) -> None:
    lengths = (3, 1, 64, 33)  # ragged: within a step, a whole step, a step and a token
    inputs = [random(length, shape[1], seed=length, dtype=dtype) for length in lengths]
    grads = [random(length, shape[0], seed=50 + length, dtype=dtype) for length in lengths]
    fisher = random(*shape, seed=9, dtype=torch.float32).abs()
    wanted = oracle(fisher, inputs, grads)
    for tile in (interpreted.TILES[0], interpreted.TILES[-1]):
        found = fisher.clone()
        interpreted.add_squared_linear_grads_(found, inputs, grads, tile)
        # Products of 16-bit numbers are exact in float32, and nothing is rounded to 16 bits on the way.
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


@needs_triton
def test_tensors_need_not_be_contiguous(interpreted: Any) -> None:
    x, g = random(3, 40, 36, seed=1, dtype=torch.float32), random(20, 3, 40, seed=2, dtype=torch.float32).movedim(0, 2)
    inputs, grads = [x[n, :length] for n, length in enumerate((40, 2, 9))], [g[0], g[1, :2], g[2, :9]]
    fisher = torch.zeros(36, 20)
    interpreted.add_squared_linear_grads_(fisher.T, inputs, grads, interpreted.TILES[-1])
    torch.testing.assert_close(fisher.T.double(), oracle(torch.zeros(20, 36), inputs, grads), rtol=1e-4, atol=1e-4)
    interpreted.add_squared_linear_grads_(fisher.T, inputs[:1], grads[:1], interpreted.TILES[-1])
    expected = oracle(torch.zeros(20, 36), [*inputs, inputs[0]], [*grads, grads[0]])
    torch.testing.assert_close(fisher.T.double(), expected, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    "lengths",
    [(64, 64), (16, 48, 32), (1, 1, 1), (0, 5, 0), (0, 0), (4090, 10, 64), (5000,)],
    ids=["whole steps", "whole small steps", "one token", "none in some", "none at all", "more than at once", "long"],
)
def test_how_samples_are_cut_into_steps_does_not_matter(
    lengths: tuple[int, ...], rows: int, bulk: bool, interpreted: Any
) -> None:
    batch_x, batch_g = (random(sum(lengths), size, seed=size, dtype=torch.bfloat16) for size in (16, 24))
    inputs, grads = list(batch_x.split(lengths)), list(batch_g.split(lengths))
    found = torch.zeros(24, 16)
    interpreted.add_squared_linear_grads_(found, inputs, grads, interpreted.Tile(32, 16, 4, 2, bulk, rows))
    wanted = oracle(torch.zeros(24, 16), inputs, grads)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


@needs_triton
def test_samples_that_lie_behind_each_other_are_not_copied(interpreted: Any) -> None:
    batch = torch.zeros(3, 32, 8)
    assert interpreted._joined(list(batch), 16).data_ptr() == batch.data_ptr()
    memory = batch.numpy()
    strangers = [torch.from_numpy(memory[0]), torch.from_numpy(memory[1])]  # as two small tensors on a device can lie
    for samples in ([batch[0], batch[2]], [batch[0, :31], batch[1]], [batch[0], batch[1].clone()], strangers):
        joined = interpreted._joined(samples, 16)
        assert joined.data_ptr() != batch.data_ptr()
        assert joined.shape == (64, 8)


@needs_triton
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2's Conv1D has its weight the other way round
def test_extract_with_the_fused_kernel_is_extract_without(
    architecture: str,
    checkpoint: Callable[[str], Path],
    prompts: Path,
    tmp_path: Path,
    interpreted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []

    def add(fisher: Tensor, inputs: Any, grads: Any, tile: Any) -> None:
        used.append(fisher.shape)
        interpreted.add_squared_linear_grads_(fisher, inputs, grads, tile)

    options = ExtractOptions(store="fp32", batch_tokens=40)
    fisherkit.extract(checkpoint(architecture), prompts, tmp_path / "plain.pt", options)
    monkeypatch.setattr(kernels, "fused_tile", lambda *_: interpreted.TILES[-1])
    monkeypatch.setattr(kernels, "add_fused_", add)
    fisherkit.extract(checkpoint(architecture), prompts, tmp_path / "fused.pt", options)
    assert used
    plain, found = torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "fused.pt")
    for name, value in plain.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name


@needs_triton
@pytest.mark.parametrize(
    ("capability", "bulk", "instructions"),
    [(80, False, ["mma.sync"]), (90, False, ["wgmma"]), (90, True, ["wgmma", "cp.async.bulk.tensor"])],
)
def test_the_kernel_compiles_to_tensor_cores(
    capability: int, bulk: bool, instructions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module: Any = load(f"compiled_fisher_{capability}_{bulk}")
    tile, kernel = module.TILES[0 if bulk else -1], module._kernel
    constants = {"BULK": bulk, "PRECISION": "tf32", "WIDEN": False, "NEIGHBOURS": 8}
    constants |= {"fisher_i": 1, "gradient_o": 1, "input_i": 1}
    constants |= {"TILE_O": tile.outputs, "TILE_I": tile.inputs, "TILE_R": tile.rows}
    pointers = {"fisher": "*fp32", "gradients": "*bf16", "inputs": "*bf16", "lasts": "*i32"}
    if bulk:
        pointers["gradients"] = f"tensordesc<bf16[{tile.rows}, {tile.outputs}]>"
        pointers["inputs"] = f"tensordesc<bf16[{tile.rows}, {tile.inputs}]>"
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    even = [*(name for name in pointers if "desc" not in pointers[name]), "size_o", "size_i", "fisher_o"]
    even += [] if bulk else ["gradient_r", "input_r"]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(kernel, types, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    for instruction in instructions:
        assert instruction in made.asm["ptx"]
    assert made.metadata.shared <= (227 << 10 if bulk else 48 << 10)


# Whether it is used


def test_a_kernel_that_does_not_run_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "fisherkit.kernels.triton_fisher", None)
    with pytest.warns(RuntimeWarning, match="the fused kernel is not used: ModuleNotFoundError"):
        assert not fused.works.__wrapped__(kernels.add_squared_tiles_, torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize("factor", [1, 2])
def test_a_kernel_that_differs_is_left_out_with_a_warning(
    factor: int, interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fisherkit.kernels.triton_fisher", interpreted)
    monkeypatch.setattr(fisherkit.kernels, "triton_fisher", interpreted, raising=False)

    def plain(fisher: Tensor, inputs: Any, grads: Any) -> None:
        kernels.add_squared_tiles_(fisher, inputs, grads)
        fisher.mul_(factor)

    cpu = torch.device("cpu")
    if factor == 1:
        assert fused.works.__wrapped__(plain, cpu)
        return
    with pytest.warns(RuntimeWarning, match="the fused kernel is not used: it differs from plain torch"):
        assert not fused.works.__wrapped__(plain, cpu)


@needs_triton
@pytest.mark.parametrize("factor", [1, 2])
def test_a_tile_that_differs_is_not_chosen_however_fast(
    factor: int, interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(fisher: Tensor, inputs: Any, grads: Any) -> None:
        kernels.add_squared_tiles_(fisher, inputs, grads)
        fisher.mul_(factor)

    times = iter([9.0, *range(1, 9)])  # the plain way is the slowest, the first tile the fastest
    monkeypatch.setattr(interpreted, "_TUNED_ON", 16)
    monkeypatch.setattr(interpreted.triton.testing, "do_bench", lambda way, **_: next(times))
    found = interpreted.fastest.__wrapped__(plain, torch.float32, 4, torch.device("cpu"))
    assert (found is None) == (factor == 2)
    assert found is None or (found.rows, found.bulk) == (16, False)


def test_a_cpu_never_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "fisherkit.kernels.triton_fisher", None)
    fisher = torch.zeros(2, 3)
    kernels.add_squared_linear_grads_(fisher, [torch.ones(4, 3)], [torch.ones(4, 2)])
    assert fisher.sum().item() == 96
