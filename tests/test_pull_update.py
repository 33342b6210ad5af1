"""A soft subspace: after every step the change so far is divided in its directions, and nothing else happens to it."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from lora_runs import adapted, adapted_matrices
from pull_oracle import PULL, ByHand, close, drawn, held, of_file, step, three_weights, write
from torch import Tensor, nn
from training_runs import OPTIMIZERS, copies, learn, llama

import fisherkit
from fisherkit.options import MaskOptions
from fisherkit.training import constrain, rules

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
Checkpoint = Callable[[str], Path]
TURN_BYTES = 256
DOWN = "model.layers.1.mlp.down_proj.weight"
CONV = "transformer.h.1.mlp.c_fc.weight"


# Steps


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_divides_the_whole_change_in_the_directions_and_is_free_outside(axis: int, tmp_path: Path) -> None:
    model = three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), sides="UV"[axis])
    start = copies(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
def test_every_optimizer_is_drawn_back_once_per_step(name: str, tmp_path: Path, turns: int | None) -> None:
    model, twin = three_weights(), three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), sides="VU")
    optimizer = OPTIMIZERS[name](model.parameters())
    constrain(optimizer, model, tmp_path / "s.safetensors", steps=1).turn_bytes = turns
    by_hand = ByHand(twin, OPTIMIZERS[name](twin.parameters()), pulls)
    for seed in range(4):
        step(model, optimizer, seed)
        by_hand.step(seed)
        close(dict(model.named_parameters()), dict(twin.named_parameters()), 5e-6)


def test_a_handle_that_is_removed_draws_no_more(tmp_path: Path) -> None:
    model, free = three_weights(), three_weights()
    write(tmp_path / "s.safetensors", held(model))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, free)]
    handle = constrain(optimizers[0], model, tmp_path / "s.safetensors", steps=1)
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
    constrain(optimizer, model, tmp_path / "s.safetensors", anchor=anchor, steps=1)
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
            constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
    pulls = of_file(tmp_path / "s.safetensors", 5.0)
    assert pulls[weight][2] == (0 if architecture == "gpt2" else 1)  # of the inputs, however the weight is stored
    model, twin = (llama(architecture).eval() for _ in range(2))  # no dropout
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, twin)]
    constrain(optimizers[0], model, tmp_path / "s.safetensors", steps=1)
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
    constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
    constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
    constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
            constrain(optimizer, model, tmp_path / file, pull=pull, steps=1)
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
    handle = constrain(optimizer, model, tmp_path / "s.safetensors", parity="paper", steps=1)
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
        constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
    constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "anchor.safetensors", steps=1)
    for _ in range(20):
        model["w"].grad = torch.zeros_like(model["w"])
        optimizer.step()
        assert torch.equal(model["w"].float(), start)
