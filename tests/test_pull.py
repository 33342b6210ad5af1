"""A soft subspace: after every step the change so far is divided in its directions, and nothing else happens to it."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import peft
import pytest
import safetensors.torch
import torch
import transformers
from test_training_lora import adapted, adapted_matrices
from test_training_trainer import train
from torch import Tensor, nn
from training_runs import OPTIMIZERS, basis, copies, learn, llama, matrices
from typer.testing import CliRunner

import fisherkit
from fisherkit.artefacts.mask_file import MaskEntry, header, open_mask
from fisherkit.cli import app
from fisherkit.errors import CheckpointError, OptionError, TrainingError
from fisherkit.kernels.pull import pull_strengths, pulled_share
from fisherkit.options import MaskOptions, MergeOptions
from fisherkit.render.formatting import headline
from fisherkit.training import MaskedUpdate, constrain, optimizer_hooks, rules

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Checkpoint = Callable[[str], Path]
Pulls = dict[str, tuple[Tensor, list[float], int]]  # by weight: directions float64, strengths, the axis they are of
PULL = 0.5
DOWN = "model.layers.1.mlp.down_proj.weight"
CONV = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(params=["at once", "in turns"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in turns":
        monkeypatch.setattr(optimizer_hooks, "_TURN_BYTES", 256)
    else:
        monkeypatch.setattr(optimizer_hooks, "_steps_by_parameter", lambda optimizer, args, kwargs: False)


# The slow way


def strengths(pull: float, energies: Iterable[float], size: int) -> list[float]:
    """s_j = pull * sqrt(c_j / mean(c)), the mean over all channels."""
    found = list(energies)
    mean = sum(found) / size
    return [pull * math.sqrt(energy / mean) if mean > 0 else 0.0 for energy in found]


def drawn(weight: Tensor, start: Tensor, pull: tuple[Tensor, list[float], int], pace: float = 1.0) -> Tensor:
    """start + D - D P, P the matrix of what is taken away: sum_j p s_j / (1 + p s_j) q_j q_j^T; float64."""
    q, s, axis = pull
    taken = torch.zeros(len(q), len(q), dtype=torch.float64)
    for number, strength in enumerate(s):
        taken += pace * strength / (1 + pace * strength) * torch.outer(q[:, number], q[:, number])
    change = weight.detach().double() - start.double()
    return start.double() + change - (change @ taken if axis == 1 else taken @ change)


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    sides: str = "V",
    rank: int = 4,
    pull: Any = PULL,
    energies: Callable[[int], Tensor] = lambda rank: torch.linspace(3.0, 0.1, rank),
    zeros: int = 0,
) -> Pulls:
    """A soft subspace of random directions, of the axis that ``sides`` (one letter for all, or per weight) says.

    Hard where ``pull`` is None. ``zeros`` columns of zeros are put behind the directions.
    """
    stored, entries, found = {}, {}, {}
    for number, (name, weight) in enumerate(weights.items()):
        side = sides[number % len(sides)]
        axis = "UV".index(side)
        q, c = basis(weight.shape[axis], rank, seed=number), energies(rank)
        stored[f"{name}.{side}"] = nn.functional.pad(q, (0, zeros)).contiguous()
        stored[f"{name}.S"] = nn.functional.pad(c, (0, zeros))
        entries[name] = MaskEntry(tuple(weight.shape))
        found[name] = (q.double(), strengths(pull or 0.0, c.tolist(), len(q)), axis)
    safetensors.torch.save_file(stored, path)
    described = header("subspace", path.name, entries, direction="protect", options={"pull": pull})
    path.with_suffix(".json").write_text(json.dumps(described))
    return found


def of_file(path: Path, pull: float) -> Pulls:
    """What is in a file, as the oracle wants it."""
    stored = safetensors.torch.load_file(path)
    found = {}
    for part, q in stored.items():
        name, _, side = part.rpartition(".")
        if side != "S":
            found[name] = (q.double(), strengths(pull, stored[f"{name}.S"].tolist(), len(q)), "UV".index(side))
    return found


def three_weights(seed: int = 0) -> nn.ParameterDict:
    """Two matrices to be held and one that is not."""
    generator = torch.Generator().manual_seed(seed)
    return nn.ParameterDict({n: torch.randn(12, 10, generator=generator) for n in ("one", "other", "free")})


def held(model: nn.ParameterDict) -> dict[str, Tensor]:
    return {name: model[name] for name in ("one", "other")}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on gradients that do not depend on the weights, so that what is compared stays comparable."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name].detach().double(),
            tensor.detach().double(),
            rtol=0,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


class ByHand:
    """The same training with the formula in place of fisherkit: steps freely, then writes what the oracle says."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, pulls: Pulls) -> None:
        self._model, self._optimizer, self._pulls = model, optimizer, pulls
        self._start = copies(dict(model.named_parameters()))

    def step(self, seed: int, pace: float = 1.0) -> None:
        step(self._model, self._optimizer, seed)
        self.draw(pace)

    @torch.no_grad()
    def draw(self, pace: float = 1.0) -> None:
        for name, parameter in self._model.named_parameters():
            if name in self._pulls:
                parameter.copy_(drawn(parameter, self._start[name], self._pulls[name], pace))


# Strengths


def test_strengths_are_the_pull_times_the_root_of_the_energy_over_its_mean() -> None:
    energies = np.array([4.0, 1.0, 0.25, 0.0], np.float32)
    found = pull_strengths(0.3, energies, 7)
    assert found.dtype == np.float32
    assert found == pytest.approx(strengths(0.3, energies.tolist(), 7), rel=1e-6)
    stacked = pull_strengths(0.3, np.stack([energies, 10 * energies, 0 * energies]), 7)
    assert stacked[:2] == pytest.approx(np.stack([found, found]), rel=1e-6)  # the scale of the inputs says nothing
    assert (stacked[2] == 0).all()
    assert pulled_share(found) == pytest.approx([s / (1 + s) for s in found], rel=1e-6)


@pytest.mark.parametrize("size", [1, 5])
def test_all_directions_with_equal_energy_are_pulled_as_told(size: int) -> None:
    assert pull_strengths(0.2, np.full(size, 3.0, np.float32), size) == pytest.approx([0.2] * size)


def test_one_direction_of_many_and_none_at_all() -> None:
    assert pull_strengths(0.2, np.array([1e-30], np.float32), 9) == pytest.approx([0.2 * 3])
    assert (pull_strengths(0.2, np.zeros(4, np.float32), 9) == 0).all()
    assert pull_strengths(0.2, np.zeros(0, np.float32), 9).shape == (0,)


@pytest.mark.parametrize("rank", [1, 10])
def test_the_ends_of_the_number_of_directions(rank: int, tmp_path: Path) -> None:
    model = three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), rank=rank, energies=torch.ones)
    expected = PULL * math.sqrt(10 / rank)
    assert pulls["one"][1] == pytest.approx([expected] * rank)
    start = copies(held(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors")
    step(model, optimizer, 1)
    for name, weight in held(model).items():
        moved = -0.1 * weight.grad.double()  # type: ignore[union-attr]
        q = pulls[name][0]
        inside = moved @ q @ q.T
        wanted = start[name].double() + moved - inside + inside / (1 + expected)
        torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=1e-6)


def test_columns_of_zeros_and_a_spectrum_of_zeros_do_nothing(tmp_path: Path) -> None:
    ends = []
    for number, changes in enumerate(({}, {"zeros": 3}, {"energies": torch.zeros}, None)):
        model = three_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if changes is not None:
            write(tmp_path / f"{number}.safetensors", held(model), **changes)
            constrain(optimizer, model, tmp_path / f"{number}.safetensors")
        for seed in range(3):
            step(model, optimizer, seed)
        ends.append(copies(dict(model.named_parameters())))
    plain, padded, without, free = ends
    close(padded, plain, 1e-6)
    assert all(torch.equal(without[name], free[name]) for name in free)
    assert float((plain["one"] - free["one"]).norm()) > 0.1


# Steps


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_divides_the_whole_change_in_the_directions_and_is_free_outside(axis: int, tmp_path: Path) -> None:
    model = three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), sides="UV"[axis])
    start = copies(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors")
    for seed in range(3):
        before = copies(dict(model.named_parameters()))
        step(model, optimizer, seed)
        free = {name: before[name].double() - 0.1 * weight.grad.double() for name, weight in model.items()}
        for name, (q, s, _) in pulls.items():
            would, did = (w.detach().double() - start[name].double() for w in (free[name], model[name]))
            would, did = (d if axis == 1 else d.T for d in (would, did))
            torch.testing.assert_close(did @ q, (would @ q) / (1 + torch.tensor(s)), rtol=0, atol=2e-6)
            outside = torch.eye(len(q)) - q @ q.T
            torch.testing.assert_close(did @ outside, would @ outside, rtol=0, atol=2e-6)
        torch.testing.assert_close(model["free"].detach().double(), free["free"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("turns")
def test_every_optimizer_is_drawn_back_once_per_step(name: str, tmp_path: Path) -> None:
    model, twin = three_weights(), three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), sides="VU")
    optimizer = OPTIMIZERS[name](model.parameters())
    constrain(optimizer, model, tmp_path / "s.safetensors")
    by_hand = ByHand(twin, OPTIMIZERS[name](twin.parameters()), pulls)
    for seed in range(4):
        step(model, optimizer, seed)
        by_hand.step(seed)
        close(dict(model.named_parameters()), dict(twin.named_parameters()), 5e-6)


def test_a_handle_that_is_removed_draws_no_more(tmp_path: Path) -> None:
    model, free = three_weights(), three_weights()
    write(tmp_path / "s.safetensors", held(model))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, free)]
    handle = constrain(optimizers[0], model, tmp_path / "s.safetensors")
    handle.remove()
    for one, optimizer in zip((model, free), optimizers, strict=True):
        step(one, optimizer, 1)
    assert all(torch.equal(model[name], free[name]) for name in free)


def test_fused_experts_are_drawn_back_one_by_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = llama("qwen3-moe")
    experts = model.model.layers[0].mlp.experts
    names = [f"model.layers.0.mlp.experts.{part}.weight" for part in ("1.up_proj", "1.gate_proj", "3.up_proj")]
    shape = torch.empty(16, 32)
    pulls = write(tmp_path / "s.safetensors", dict.fromkeys(names, shape), sides="VU")
    before = experts.gate_up_proj.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anchor = checkpoint("qwen3-moe")
    constrain(optimizer, model, tmp_path / "s.safetensors", anchor=anchor)
    step(model, optimizer, 0)
    wanted = before.double() - 0.1 * experts.gate_up_proj.grad.double()
    for name, expert, rows in zip(names, (1, 1, 3), (slice(16, 32), slice(16), slice(16, 32)), strict=True):
        wanted[expert, rows] = drawn(wanted[expert, rows], before[expert, rows], pulls[name])
    torch.testing.assert_close(experts.gate_up_proj.detach().double(), wanted, rtol=0, atol=1e-6)


def test_what_fsdp2_spreads_is_drawn_back_with_adapters_and_without(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    ends = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for sharded in (False, True):
            torch.manual_seed(0)
            model = adapted()
            weights = adapted_matrices(model)
            for name in weights:
                model.get_base_model().get_submodule(name.removesuffix(".weight")).base_layer.requires_grad_(True)
            write(tmp_path / "s.safetensors", weights, sides="VU")
            if sharded:
                fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            constrain(optimizer, model, tmp_path / "s.safetensors")
            learn(model, optimizer, 2)
            whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
            ends.append(copies(whole))
    finally:
        dist.destroy_process_group()
    close(ends[1], ends[0], 1e-6)


@pytest.mark.parametrize(("architecture", "weight"), [("llama", DOWN), ("gpt2", CONV)])
def test_a_shield_holds_on_a_model_as_the_formula_says(
    architecture: str, weight: str, checkpoint: Checkpoint, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    fisherkit.mask(measured(architecture), tmp_path / "s.safetensors", MaskOptions(preset="shield"))
    pulls = of_file(tmp_path / "s.safetensors", 0.2)
    assert pulls[weight][2] == (0 if architecture == "gpt2" else 1)  # of the inputs, however the weight is stored
    model, twin = (llama(architecture).eval() for _ in range(2))  # no dropout
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, twin)]
    constrain(optimizers[0], model, tmp_path / "s.safetensors")
    start = copies(dict(twin.named_parameters()))
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        learn(one, optimizer, 1)
    free = copies(dict(twin.named_parameters()))
    wanted = {n: drawn(free[n], start[n], pulls[n]) if n in pulls else free[n] for n in free}
    close(dict(model.named_parameters()), wanted)
    assert float((wanted[weight] - free[weight]).norm()) > 0.05 * float((free[weight] - start[weight]).norm())


# The learning rate's pace


def test_a_warm_up_pulls_by_its_share_of_the_peak_and_a_rate_of_zero_not_at_all(tmp_path: Path) -> None:
    model, twin = three_weights(), three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), sides="VU")
    paces = (0.0, 0.5, 1.0, 0.25, 0.0)
    optimizer, other = (torch.optim.AdamW(one.parameters(), lr=0.1) for one in (model, twin))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda n: (*paces, 0)[n]) for one in (optimizer, other)]
    constrain(optimizer, model, tmp_path / "s.safetensors")
    by_hand = ByHand(twin, other, pulls)
    for seed, pace in enumerate(paces):
        before = copies(dict(model.named_parameters()))
        step(model, optimizer, seed)
        by_hand.step(seed, pace)
        for scheduler in schedulers:
            scheduler.step()
        close(dict(model.named_parameters()), dict(twin.named_parameters()))
        if pace == 0:
            assert all(torch.equal(model[name], before[name]) for name in before)


def test_a_rate_raised_by_hand_becomes_the_peak_of_its_group(tmp_path: Path) -> None:
    model, twin = three_weights(), three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model))

    def optimizer_of(one: nn.ParameterDict) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [one["one"]], "lr": 0.1}, {"params": [one["other"], one["free"]]}], lr=0.01)

    optimizer, other = optimizer_of(model), optimizer_of(twin)
    constrain(optimizer, model, tmp_path / "s.safetensors")
    by_hand = {name: ByHand(twin, other, {name: pulls[name]}) for name in pulls}
    for seed, (one, many, paces) in enumerate(
        [
            (0.1, 0.01, (1.0, 1.0)),  # each group at its own peak
            (0.05, 0.01, (0.5, 1.0)),
            (0.2, 0.001, (1.0, 0.1)),  # raised above the first: the peak from now on
            (0.1, 0.02, (0.5, 1.0)),
            (0.0, 0.01, (0.0, 0.5)),
        ]
    ):
        for groups in (optimizer.param_groups, other.param_groups):
            groups[0]["lr"], groups[1]["lr"] = one, many
        step(model, optimizer, seed)
        step(twin, other, seed)
        for hand, pace in zip(by_hand.values(), paces, strict=True):
            hand.draw(pace)
        close(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("kind", ["none", "missing"])
def test_an_optimizer_that_tells_no_rate_is_at_its_peak(kind: str, tmp_path: Path) -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.1 * parameter.grad)

    make: Callable[..., Any] = transformers.Adafactor if kind == "none" else Rateless
    model, twin = three_weights(), three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model))
    optimizer = make(model.parameters())
    constrain(optimizer, model, tmp_path / "s.safetensors")
    by_hand = ByHand(twin, make(twin.parameters()), pulls)
    for seed in range(2):
        step(model, optimizer, seed)
        by_hand.step(seed)
    close(dict(model.named_parameters()), dict(twin.named_parameters()))


# Between free and hard


def test_a_huge_pull_is_the_hard_subspace_and_a_tiny_one_the_free_run(tmp_path: Path) -> None:
    write(tmp_path / "soft.safetensors", held(three_weights()), sides="VU")
    write(tmp_path / "hard.safetensors", held(three_weights()), sides="VU", pull=None)

    def ends(file: str | None, pull: float | None) -> dict[str, Tensor]:
        model = three_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if file is not None:
            constrain(optimizer, model, tmp_path / file, pull=pull)
        for seed in range(3):
            step(model, optimizer, seed)
        return copies(dict(model.named_parameters()))

    hard, free = ends("hard.safetensors", None), ends(None, None)
    assert float((hard["one"] - free["one"]).norm()) > 0.1
    close(ends("soft.safetensors", 9e5), hard, 5e-6)
    close(ends("soft.safetensors", 1e-7), free, 5e-6)
    close(ends("hard.safetensors", PULL), ends("soft.safetensors", None), 0)  # a hard file made soft
    close(ends("soft.safetensors", PULL), ends("soft.safetensors", None), 0)


def test_paper_parity_divides_the_gradient_and_not_the_change(tmp_path: Path) -> None:
    model = three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), sides="VU")
    start = copies(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = constrain(optimizer, model, tmp_path / "s.safetensors", parity="paper")
    assert not handle.is_anchored_here
    total = {name: torch.zeros(12, 10, dtype=torch.float64) for name in start}
    for seed in range(3):
        step(model, optimizer, seed)
        generator = torch.Generator().manual_seed(seed)
        for name in total:
            total[name] += torch.randn(12, 10, generator=generator).double()
    zero = torch.zeros(12, 10)
    soft = {name: drawn(total[name], zero, pulls[name]) if name in pulls else total[name] for name in total}
    close(dict(model.named_parameters()), {name: start[name].double() - 0.1 * soft[name] for name in soft})


@pytest.mark.parametrize("carries", [True, False])
def test_in_bfloat16_a_pull_far_below_the_spacing_is_not_lost(
    carries: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every free step is exact in both types; what the pull takes each time is less than half of bfloat16's spacing."""
    if not carries:
        monkeypatch.setattr(rules, "_residual", lambda parameter: None)
    spacing = 2.0**-7  # of bfloat16 from 1 to 2
    generator = torch.Generator().manual_seed(0)
    start = 1.25 + spacing * torch.randint(0, 32, (24, 20), generator=generator)
    signs = torch.randint(0, 2, (24, 20), generator=generator) * 2.0 - 1
    ends, without = {}, start - 16 * spacing * signs
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ParameterDict({"w": start.clone().to(dtype)})
        write(tmp_path / "s.safetensors", {"w": start}, rank=20, pull=0.02, energies=torch.ones)
        optimizer = torch.optim.SGD(model.parameters(), lr=spacing)
        constrain(optimizer, model, tmp_path / "s.safetensors")
        for _ in range(16):
            model["w"].grad = signs.to(dtype)
            optimizer.step()
        ends[dtype] = model["w"].detach().float()
    exact, rounded = ends[torch.float32], ends[torch.bfloat16]
    taken = float((without - exact).norm())
    assert taken > 2 * spacing * math.sqrt(start.numel())
    if carries:
        assert float((rounded - exact).abs().max()) < 0.55 * spacing  # one rounding, not the sum of 16
    else:
        assert float((without - rounded).norm()) < 0.5 * taken


def test_bfloat16_weights_settle_at_an_anchor_between_two_of_their_values(tmp_path: Path) -> None:
    """What rounding keeps counts as done: without it they would be drawn on, past the anchor and back again."""
    start = 1.25 + 2.0**-7 * torch.randint(0, 32, (24, 20), generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"w": start + 0.3 * 2.0**-7}, tmp_path / "anchor.safetensors")
    model = nn.ParameterDict({"w": start.bfloat16()})
    write(tmp_path / "s.safetensors", {"w": start}, rank=20, energies=torch.ones)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "anchor.safetensors")
    for _ in range(20):
        model["w"].grad = torch.zeros_like(model["w"])
        optimizer.step()
        assert torch.equal(model["w"].float(), start)


# The anchor


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("gradient", ["zero", "none"])
def test_weights_without_gradients_go_to_the_anchor_in_the_directions_and_nowhere_else(
    gradient: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = llama()
    anchor = copies(dict(model.named_parameters()))
    pulls = write(tmp_path / "s.safetensors", matrices(model), sides="VU")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    moved = copies(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    handle = constrain(optimizer, model, tmp_path / "s.safetensors", anchor=checkpoint("llama"))
    assert not handle.is_anchored_here
    wanted = {name: weight.double() for name, weight in moved.items()}
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if gradient == "zero" else None
        optimizer.step()
        wanted |= {name: drawn(wanted[name], anchor[name], pulls[name]) for name in pulls}
        close(dict(model.named_parameters()), wanted)
    assert all(torch.equal(p, moved[name]) for name, p in model.named_parameters() if name not in pulls)


def test_the_checkpoint_that_training_starts_from_is_the_anchor_that_nobody_names(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write(tmp_path / "s.safetensors", matrices(llama()), sides="VU")
    other = pairs.one_file(checkpoint("llama"), tmp_path / "one.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in pairs.tensors(other).items()}
    safetensors.torch.save_file(renamed, tmp_path / "renamed.safetensors")
    ends = []
    for anchor in (None, checkpoint("llama"), str(other), tmp_path / "renamed.safetensors"):
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        handle = constrain(optimizer, model, tmp_path / "s.safetensors", anchor=anchor)
        assert handle.is_anchored_here == (anchor is None)
        learn(model, optimizer, 2)
        ends.append(copies(dict(model.named_parameters())))
    assert all(torch.equal(end[name], ends[0][name]) for end in ends[1:] for name in end)


def test_an_anchor_in_bfloat16_is_taken_at_its_values(tmp_path: Path) -> None:
    model = three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model))
    anchor = {name: weight.detach().bfloat16() for name, weight in model.items()}
    safetensors.torch.save_file(anchor, tmp_path / "anchor.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "anchor.safetensors")
    start = copies(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    wanted = {name: drawn(start[name], anchor[name], pulls[name]) for name in pulls}
    close(held(model), wanted, 1e-6)
    assert not torch.equal(model["one"], start["one"])


def test_an_anchor_of_another_model_is_refused(tmp_path: Path) -> None:
    model = three_weights()
    write(tmp_path / "s.safetensors", held(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anchors = {
        r"anchor\.safetensors: has no weight 'other', so it cannot be the anchor": {"one": torch.zeros(12, 10)},
        r"anchor\.safetensors: other is \[10, 12\], and \[12, 10\] in this model": {
            "one": torch.zeros(12, 10),
            "other": torch.zeros(10, 12),
        },
    }
    for message, tensors in anchors.items():
        safetensors.torch.save_file(tensors, tmp_path / "anchor.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "anchor.safetensors")
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "absent")
    assert not optimizer._optimizer_step_pre_hooks


def test_a_pull_or_an_anchor_where_nothing_is_soft_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = three_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hard, mask = tmp_path / "hard.safetensors", tmp_path / "mask.safetensors"
    write(hard, held(model), pull=None)
    safetensors.torch.save_file({"one": torch.ones(12, dtype=torch.bool)}, mask)
    layers = tmp_path / "layer_importance.json"
    layers.write_text("[1.0, 2.0]")
    flags = {"one": torch.ones(12, 1, dtype=torch.bool)}
    nothing: list[tuple[Any, dict[str, Any]]] = [
        (hard, {"anchor": checkpoint("llama")}),
        *((soft, {"pull": 0.2}) for soft in (mask, layers, flags, {"one.V": basis(10, 2)}, [1.0, 2.0])),
        *((soft, {"anchor": checkpoint("llama")}) for soft in (mask, layers, flags, {"one.V": basis(10, 2)})),
        (mask, {"pull": 0.2, "anchor": checkpoint("llama")}),
    ]
    for given, options in nothing:
        what = next(iter(options))
        with pytest.raises(OptionError, match=f"^{what} is for a soft subspace, .*preset shield.*; this is none$"):
            constrain(optimizer, model, given, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_two_sides_or_no_spectrum_cannot_be_pulled(tmp_path: Path) -> None:
    model = three_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    u, s, v = basis(12, 2), torch.ones(2), basis(10, 2)
    for number, parts in enumerate(({"one.U": u, "one.V": v}, {"one.U": u, "one.S": s, "one.V": v}, {"one.V": v})):
        path = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file({name: part.contiguous() for name, part in parts.items()}, path)
        with pytest.raises(OptionError, match="a pull takes directions of one side with their spectrum"):
            constrain(optimizer, model, path, pull=0.2)


@pytest.mark.parametrize("pull", [0, 0.0, -0.2, math.nan, math.inf, 1e6, "0.2"])
def test_a_pull_that_is_no_pull_is_refused(pull: Any, tmp_path: Path) -> None:
    model = three_weights()
    write(tmp_path / "s.safetensors", held(model))
    with pytest.raises(OptionError, match="--pull must lie above 0"):
        constrain(torch.optim.SGD(model.parameters()), model, tmp_path / "s.safetensors", pull=pull)
    with pytest.raises(OptionError, match="--pull must lie above 0"):
        MaskOptions(svd_rank=2, basis="activation", pull=pull)


@pytest.mark.parametrize("pull", ["hard", 0, -1, 1e9, True, math.nan, math.inf, [0.2], {}])
def test_a_file_that_says_nonsense_of_its_pull_is_refused(pull: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = llama()
    write(tmp_path / "s.safetensors", matrices(model))
    beside = tmp_path / "s.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"options": {"pull": pull}}))
    with pytest.raises(CheckpointError, match=r"s\.json: .* is no pull; make the subspace anew"):
        constrain(torch.optim.SGD(model.parameters()), model, tmp_path / "s.safetensors")
    if pull == "hard":
        tuned = pairs.fine_tune(checkpoint("llama"), tmp_path / "tuned")
        merged = MergeOptions(subspace=tmp_path / "s.safetensors")
        with pytest.raises(CheckpointError, match="'hard' is no pull"):
            fisherkit.merge(checkpoint("llama"), tuned, tmp_path / "out", merged)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [None, [], [1], "soft", 3])
def test_a_file_without_options_is_a_hard_subspace(options: Any, tmp_path: Path) -> None:
    write(tmp_path / "s.safetensors", held(three_weights()))
    beside = tmp_path / "s.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"options": options}))
    with open_mask(tmp_path / "s.safetensors") as file:
        assert file.pull is None


# Trainer


class Formula(transformers.TrainerCallback):  # type: ignore[misc]
    """The formula in a hook, in place of MaskedUpdate."""

    def __init__(self, pulls: Pulls) -> None:
        self._pulls = pulls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        peak = optimizer.param_groups[0]["initial_lr"]
        by_hand = ByHand(kwargs["model"], optimizer, self._pulls)
        optimizer.register_step_post_hook(lambda o, args, kwargs: by_hand.draw(o.param_groups[0]["lr"] / peak))


def test_a_trainer_draws_back_at_the_pace_of_its_schedule(tmp_path: Path) -> None:
    model = llama()
    before = copies(matrices(model))
    pulls = write(tmp_path / "s.safetensors", matrices(model), sides="VU")
    twin, free = copy.deepcopy(model), copy.deepcopy(model)
    options = {"warmup_steps": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    train(model, tmp_path / "a", MaskedUpdate(tmp_path / "s.safetensors"), **options)
    train(twin, tmp_path / "b", Formula(pulls), **options)
    train(free, tmp_path / "c", None, **options)
    close(matrices(model), matrices(twin), 1e-5)
    ends = [copies(matrices(one))[DOWN] for one in (model, free)]
    assert float((ends[0] - ends[1]).norm()) > 0.05 * float((ends[1] - before[DOWN]).norm())


def test_a_run_that_is_resumed_needs_its_anchor_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    start = llama()
    mask = tmp_path / "s.safetensors"
    write(mask, matrices(start), sides="VU")
    start.save_pretrained(tmp_path / "base")
    whole = copy.deepcopy(start)
    train(whole, tmp_path / "a", MaskedUpdate(mask), save_strategy="steps", save_steps=2, max_steps=4)
    again = {"resume": str(tmp_path / "a" / "checkpoint-2"), "max_steps": 4}
    with pytest.raises(TrainingError, match=r"resumed at step 2, .*; name the checkpoint it began from.*anchor=") as no:
        train(copy.deepcopy(start), tmp_path / "b", MaskedUpdate(mask), **again)
    assert "\n" not in str(no.value)
    resumed = copy.deepcopy(start)
    train(resumed, tmp_path / "b", MaskedUpdate(mask, anchor=tmp_path / "base"), **again)
    close(dict(resumed.named_parameters()), dict(whole.named_parameters()), 1e-6)
    assert not torch.equal(matrices(whole)[DOWN], matrices(start)[DOWN])


def begin(callback: MaskedUpdate, model: nn.Module, optimizer: torch.optim.Optimizer, *, at: int) -> None:
    state = transformers.TrainerState(global_step=at)
    callback.on_train_begin(object(), state, None, model=model, optimizer=optimizer)


def test_a_refused_run_leaves_the_optimizer_free_and_other_runs_need_no_anchor(tmp_path: Path) -> None:
    model = three_weights()
    soft, hard = tmp_path / "soft.safetensors", tmp_path / "hard.safetensors"
    write(soft, held(model))
    write(hard, held(model), pull=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for callback in (MaskedUpdate(soft), MaskedUpdate(hard, pull=0.3)):
        with pytest.raises(TrainingError, match="resumed at step 7"):
            begin(callback, model, optimizer, at=7)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    safetensors.torch.save_file(copies(dict(model.named_parameters())), tmp_path / "anchor.safetensors")
    for callback, at in (
        (MaskedUpdate(soft), 0),
        (MaskedUpdate(hard), 7),
        (MaskedUpdate(soft, anchor=tmp_path / "anchor.safetensors"), 7),
        (MaskedUpdate(soft, parity="paper"), 7),  # nothing is drawn back, so nothing has to be known
    ):
        begin(callback, model, optimizer, at=at)
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        callback.on_train_end(None, None, None)
        assert not optimizer._optimizer_step_pre_hooks


# LoRA


@pytest.mark.parametrize(
    ("architecture", "side", "factor"),
    [("llama", "V", "A"), ("llama", "U", "B"), ("gpt2", "U", "A"), ("gpt2", "V", "B")],
)
def test_lora_is_drawn_back_to_nothing_through_the_factor_that_has_the_directions(
    architecture: str, side: str, factor: str, tmp_path: Path
) -> None:
    gpt2 = architecture == "gpt2"
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if gpt2 else {}
    model, twin = (adapted(architecture, init_lora_weights=False, **options) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    weights = lora_weights(model)
    pulls = write(tmp_path / "s.safetensors", {name: weight for name, (weight, _) in weights.items()}, sides=side)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, twin)]
    before = copies(dict(model.named_parameters()))
    handle = constrain(optimizers[0], model, tmp_path / "s.safetensors")
    assert not handle.is_anchored_here
    assert len(list(handle.rules())) == len(weights)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # nothing before a step
    others = lora_weights(twin)
    for seed in range(3):
        step(model, optimizers[0], seed)
        step(twin, optimizers[1], seed)
        for name, (_, layer) in others.items():
            parameter = getattr(layer, f"lora_{factor}").default.weight
            own = (*pulls[name][:2], 1 if factor == "A" else 0)
            parameter.data.copy_(drawn(parameter, torch.zeros_like(parameter), own))
    close(dict(model.named_parameters()), dict(twin.named_parameters()))
    for name, (weight, layer) in weights.items():
        assert torch.equal(weight, before[f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"])
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        q, s, axis = pulls[name]
        free = twin_delta(a, b, q, s, factor)  # B A if this step's pull had not been
        delta = layer.get_delta_weight("default").detach().double() / layer.scaling["default"]
        inside, would = (d @ q if axis == 1 else d.T @ q for d in (delta, free.T if gpt2 else free))
        torch.testing.assert_close(inside, would / (1 + torch.tensor(s)), rtol=0, atol=1e-5)
        assert float(inside.norm()) > 0.1


def lora_weights(model: Any) -> dict[str, tuple[Tensor, Any]]:
    """The weights under adapters and the layers that they are in, by checkpoint name."""
    layers = model.get_base_model().named_modules()
    return {f"{n}.weight": (layer.base_layer.weight, layer) for n, layer in layers if hasattr(layer, "base_layer")}


def twin_delta(a: Tensor, b: Tensor, q: Tensor, s: list[float], factor: str) -> Tensor:
    """B A with the last division by 1 + s_j in the directions undone."""
    back = torch.eye(len(q), dtype=torch.float64) + q @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ q.T
    a, b = a.detach().double(), b.detach().double()
    return b @ a @ back if factor == "A" else back @ b @ a


def test_lora_goes_on_when_resumed_without_an_anchor(tmp_path: Path) -> None:
    def start() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = adapted()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = start()
    hard, soft = tmp_path / "hard.safetensors", tmp_path / "soft.safetensors"
    write(hard, adapted_matrices(whole), pull=None)
    write(soft, adapted_matrices(whole), pull=0.3)
    begin(MaskedUpdate(soft), whole, optimizer, at=0)
    learn(whole, optimizer, 2)
    halfway = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    learn(whole, optimizer, 2)
    for mask in (MaskedUpdate(soft), MaskedUpdate(hard, pull=0.3)):  # a hard file made soft is the same
        resumed, other = start()
        resumed.load_state_dict(halfway[0])
        other.load_state_dict(copy.deepcopy(halfway[1]))
        begin(mask, resumed, other, at=2)
        learn(resumed, other, 2)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_cannot_be_drawn_back_on_lora_is_refused(tmp_path: Path) -> None:
    dora = adapted(use_dora=True)
    write(tmp_path / "s.safetensors", adapted_matrices(dora))
    with pytest.raises(TrainingError, match="has a DoRA adapter"):
        constrain(torch.optim.SGD(dora.parameters()), dora, tmp_path / "s.safetensors")
    experts = peft.get_peft_model(
        llama("qwen3-moe"), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_parameters=["mlp.experts.down_proj"])
    )
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    write(tmp_path / "e.safetensors", {name: torch.empty(32, 16)})
    with pytest.raises(TrainingError, match="has LoRA on fused experts"):
        constrain(torch.optim.SGD(experts.parameters()), experts, tmp_path / "e.safetensors")


# The preset


def made_with(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text())["options"]


def test_shield_is_a_soft_subspace_of_inputs(measured: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    report = fisherkit.mask(measured("llama"), out, MaskOptions(preset="shield"))
    wanted = {"preset": "shield", "basis": "activation", "svd_energy": 0.99, "svd_rank": None}
    assert wanted | {"pull": 0.2, "side": "right"} == {key: made_with(out)[key] for key in (*wanted, "pull", "side")}
    assert report.energy is not None
    assert report.energy >= 0.99
    with open_mask(out) as file:
        assert (file.kind, file.direction, file.pull) == ("subspace", "protect", 0.2)
        assert file.modes(DOWN).u is None


@pytest.mark.parametrize(
    "changes",
    [
        {"svd_rank": 3},
        {"svd_energy": 0.5},
        {"pull": 0.7, "protect": "top"},
        {"pull": 1, "svd_rank": 48, "side": "right", "basis": "activation"},
    ],
)
def test_other_options_win_over_shield(
    changes: dict[str, Any], measured: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    fisherkit.mask(measured("llama"), out, MaskOptions(preset="shield", **changes))
    default = {"svd_rank": None, "svd_energy": None if "svd_rank" in changes else 0.99, "pull": 0.2}
    wanted = default | {key: value for key, value in changes.items() if key != "protect"}
    assert {key: made_with(out)[key] for key in wanted} == wanted
    rank = changes.get("svd_rank")
    with open_mask(out) as file:
        values = file.modes(DOWN).s
        assert values is not None
        assert rank is None or len(values) <= rank


def test_a_subspace_that_lost_its_description_is_refused(measured: Callable[[str], Path], tmp_path: Path) -> None:
    """Nothing else says that it is soft, and hard it would freeze nearly all."""
    made = fisherkit.mask(measured("llama"), tmp_path / "shield.safetensors", MaskOptions(preset="shield"))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(made.path.read_bytes())
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"alone\.json, which says whether .* is missing"):
        constrain(optimizer, model, alone)
    constrain(optimizer, model, alone, pull=0.2).remove()


def test_a_fisher_is_no_anchor_and_modes_of_a_weight_cannot_be_pulled(
    measured: Callable[[str], Path], tmp_path: Path
) -> None:
    fisher = measured("llama")
    shield = fisherkit.mask(fisher, tmp_path / "shield.safetensors", MaskOptions(preset="shield")).path
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="is a fisher, not a model"):
        constrain(optimizer, model, shield, anchor=fisher)
    modes = fisherkit.mask(fisher, tmp_path / "modes.safetensors", MaskOptions(svd_rank=2, side="right")).path
    with pytest.raises(OptionError, match="a pull is for --basis activation, and this is --basis fisher"):
        constrain(optimizer, model, modes, pull=0.2)


def test_inspect_says_that_a_subspace_is_soft(measured: Callable[[str], Path], tmp_path: Path) -> None:
    made = fisherkit.mask(measured("llama"), tmp_path / "shield.safetensors", MaskOptions(preset="shield"))
    assert "soft (pull 0.2)" in headline(fisherkit.inspect(made.path))


def test_a_subspace_of_activations_is_hard_unless_told(measured: Callable[[str], Path], tmp_path: Path) -> None:
    for pull in (None, 0.4):
        out = tmp_path / f"{pull}.safetensors"
        fisherkit.mask(measured("llama"), out, MaskOptions(svd_rank=2, basis="activation", pull=pull))
        assert made_with(out)["pull"] == pull
        with open_mask(out) as file:
            assert file.pull == pull


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "shield", "train": "top"}, "--train top does not go with a subspace"),
        ({"preset": "shield", "keep": 0.3}, "--keep 0.3 is for binary masks, not for subspaces"),
        ({"preset": "shield", "scope": "global"}, "--scope global is for binary masks"),
        ({"preset": "shield", "score": "magnitude"}, "--score magnitude is for binary masks"),
        ({"preset": "shield", "side": "left"}, "--side left: --basis activation knows inputs"),
        ({"preset": "shield", "svd_rank": 2, "svd_energy": 0.9}, "both say how many modes"),
        ({"preset": "shield", "pull": 0}, "--pull must lie above 0"),
        ({"preset": "shield", "basis": "kron"}, "--preset shield is for --basis activation, not for --basis kron"),
        ({"svd_rank": 2, "pull": 0.3}, "--pull 0.3 is for --basis activation, not for --basis fisher"),
        ({"svd_rank": 2, "pull": 0.3, "basis": "kron"}, "--pull 0.3 is for --basis activation, not for --basis kron"),
        ({"train": "top", "pull": 0.3}, "--pull 0.3 is for subspaces"),
        ({"preset": "ssu", "pull": 0.3}, "--pull 0.3 is for subspaces"),
        ({"preset": "fggm", "svd_rank": 2}, "--preset fggm is for binary masks"),
    ],
)
def test_what_contradicts_a_pull_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MaskOptions(**options)


def test_the_command_line_has_it(measured: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    given = ["mask", str(measured("llama")), "--preset", "shield", "-o", str(out), "-q"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert made_with(out)["pull"] == 0.2
    done = CliRunner().invoke(app, [*given, "--pull", "0.5", "--svd-rank", "3", "--force"])
    assert done.exit_code == 0, done.output
    assert (made_with(out)["pull"], made_with(out)["svd_rank"]) == (0.5, 3)
    done = CliRunner().invoke(app, [*given, "--pull", "nan", "--force"])
    assert done.exit_code != 0
    assert "--pull must lie above 0" in done.output


# merge


@pytest.mark.parametrize(("architecture", "weight"), [("llama", DOWN), ("gpt2", CONV)])
@pytest.mark.parametrize("pull", [0.2, 30.0])
def test_merge_takes_what_one_pull_takes_from_the_delta(
    pull: float,
    architecture: str,
    weight: str,
    checkpoint: Checkpoint,
    measured: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    mask = tmp_path / "s.safetensors"
    fisherkit.mask(measured(architecture), mask, MaskOptions(preset="shield", pull=pull))
    base, tuned = checkpoint(architecture), pairs.fine_tune(checkpoint(architecture), tmp_path / "tuned")
    fisherkit.merge(base, tuned, tmp_path / "out", MergeOptions(subspace=mask))
    ours, theirs, merged = (pairs.tensors(path) for path in (base, tuned, tmp_path / "out"))
    pulls = of_file(mask, pull)
    wanted = {n: drawn(theirs[n], ours[n], pulls[n]) if n in pulls else theirs[n] for n in ours}
    close(merged, wanted, 1e-6)
    change, full = (float((one[weight].double() - ours[weight].double()).norm()) for one in (merged, theirs))
    assert 0 < change < 0.99 * full
