"""A soft subspace under transformers' Trainer, and on the factors of LoRA."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from lora_runs import adapted, adapted_matrices
from pull_oracle import ByHand, Pulls, close, drawn, held, step, three_weights, write
from torch import Tensor, nn
from trainer_runs import train
from training_runs import copies, learn, llama, matrices

from fisherkit.errors import TrainingError
from fisherkit.training import MaskedUpdate, constrain
from fisherkit.training.course import peak_steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DOWN = "model.layers.1.mlp.down_proj.weight"


# Trainer


class Formula(transformers.TrainerCallback):  # type: ignore[misc]
    """The formula in a hook, in place of MaskedUpdate, over a course of ``steps`` at the peak rate."""

    def __init__(self, pulls: Pulls, steps: float) -> None:
        self._pulls = {name: (q, [one / steps for one in s], axis) for name, (q, s, axis) in pulls.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        peak = optimizer.param_groups[0]["initial_lr"]
        by_hand = ByHand(kwargs["model"], optimizer, self._pulls)
        optimizer.register_step_post_hook(lambda o, args, kwargs: by_hand.draw(o.param_groups[0]["lr"] / peak))


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"warmup_steps": 2, "max_steps": 4}, 0 + 0.5 + 1 + 0.5),
        ({"max_steps": 6}, 6 / 2 + 0.5),
        ({"lr_scheduler_type": "constant", "max_steps": 3}, 3),
    ],
)
def test_a_trainer_draws_back_at_the_pace_of_its_schedule_over_its_whole_course(
    schedule: dict[str, Any], steps: float, tmp_path: Path
) -> None:
    model = llama()
    before = copies(matrices(model))
    pulls = write(tmp_path / "s.safetensors", matrices(model), sides="VU", pull=2)
    twin, free = copy.deepcopy(model), copy.deepcopy(model)
    options = {"optim": "sgd", "learning_rate": 0.1, **schedule}
    train(model, tmp_path / "a", MaskedUpdate(tmp_path / "s.safetensors"), **options)
    train(twin, tmp_path / "b", Formula(pulls, steps), **options)
    train(free, tmp_path / "c", None, **options)
    close(matrices(model), matrices(twin), 1e-5)
    ends = [copies(matrices(one))[DOWN] for one in (model, free)]
    assert float((ends[0] - ends[1]).norm()) > 0.05 * float((ends[1] - before[DOWN]).norm())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("polynomial", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-3}),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
    ],
)
def test_the_length_of_a_course_is_the_sum_of_its_rates_over_their_peak(name: str, options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = transformers.get_scheduler(name, optimizer, 5, 40, scheduler_specific_kwargs=options)
    found = [peak_steps(scheduler, 40)]
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found.append(peak_steps(scheduler, 40))  # as at the end, so on the way, where a run is resumed
    assert found == pytest.approx([sum(rates) / 0.01] * 2, rel=1e-9)


def test_a_course_whose_rates_cannot_be_known_counts_half_and_one_without_a_rate_is_no_error() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    assert peak_steps(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40), 40) == 20
    assert peak_steps(None, 40) == 40
    nothing = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert [peak_steps(one, steps) for one, steps in ((nothing, 40), (nothing, 0), (None, 0))] == [1, 1, 1]


def test_a_run_that_is_resumed_needs_its_anchor_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    start = llama()
    mask = tmp_path / "s.safetensors"
    write(mask, matrices(start), sides="VU")
    start.save_pretrained(tmp_path / "base")
    whole = copy.deepcopy(start)
    train(whole, tmp_path / "a", MaskedUpdate(mask), save_strategy="steps", save_steps=2, max_steps=4)
    again = {"resume": str(tmp_path / "a" / "checkpoint-2"), "max_steps": 4}
    with pytest.raises(TrainingError, match=r"resumed at step 2.*anchor=") as no:
        train(copy.deepcopy(start), tmp_path / "b", MaskedUpdate(mask), **again)
    assert "\n" not in str(no.value)
    resumed = copy.deepcopy(start)
    train(resumed, tmp_path / "b", MaskedUpdate(mask, anchor=tmp_path / "base"), **again)
    close(dict(resumed.named_parameters()), dict(whole.named_parameters()), 1e-6)
    assert not torch.equal(matrices(whole)[DOWN], matrices(start)[DOWN])


def begin(callback: MaskedUpdate, model: nn.Module, optimizer: torch.optim.Optimizer, *, at: int) -> None:
    state = transformers.TrainerState(global_step=at, max_steps=4)
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
    handle = constrain(optimizers[0], model, tmp_path / "s.safetensors", steps=1)
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
    with pytest.raises(TrainingError, match="DoRA"):
        constrain(torch.optim.SGD(dora.parameters()), dora, tmp_path / "s.safetensors", steps=1)
    experts = peft.get_peft_model(
        llama("qwen3-moe"), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_parameters=["mlp.experts.down_proj"])
    )
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    write(tmp_path / "e.safetensors", {name: torch.empty(32, 16)})
    with pytest.raises(TrainingError, match="LoRA on fused experts"):
        constrain(torch.optim.SGD(experts.parameters()), experts, tmp_path / "e.safetensors", steps=1)
