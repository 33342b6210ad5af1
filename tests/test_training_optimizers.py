"""A rule holds whatever the optimizer holds and whenever it comes to train it; what cannot be held is refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import bits, check_frozen, copies, learn, llama, masks, matrices, subspaces
from transformers import Trainer, TrainerCallback, TrainingArguments

from fisherkit.errors import TrainingError
from fisherkit.training import MIGU, MaskedUpdate, constrain
from fisherkit.training.optimizers import unwrap

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*"),
]


def layer_of(model: nn.Module, number: int) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if f".layers.{number}." in name]


# Weights that are trained later


@pytest.mark.parametrize("kind", ["mask", "subspace", "scale"])
def test_layers_that_are_unfrozen_later_obey_too(kind: str) -> None:
    model = llama()
    for number in (1, 2):
        for parameter in layer_of(model, number):
            parameter.requires_grad_(requires_grad=False)
    weights = matrices(model)
    before, flags, parts = copies(weights), masks(weights), subspaces(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    mask: Any = {"mask": flags, "subspace": parts, "scale": [1.0, 1.0, 1e8]}[kind]
    constrain(optimizer, model, mask, **({"floor": 0.0, "power": 1} if kind == "scale" else {}))
    learn(model, optimizer, 2)
    assert all(torch.equal(weights[name], before[name]) for name in weights if ".layers.0." not in name)
    for parameter in model.parameters():
        parameter.requires_grad_()
    learn(model, optimizer, 3)
    if kind == "mask":
        check_frozen(before, weights, flags)
        return
    for name, weight in weights.items():
        change = weight.detach().double() - before[name].double()
        if kind == "subspace":
            assert float((parts[f"{name}.U"].double().mT @ change).norm() / change.norm()) < 1e-6, name
        else:
            assert float(change.norm()) < 1e-5 if ".layers.2." in name else float(change.norm()) > 1e-2


def test_a_model_that_is_frozen_whole_when_the_mask_comes_obeys_later() -> None:
    model = llama().requires_grad_(requires_grad=False)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constrain(optimizer, model, flags)
    model.requires_grad_()
    learn(model, optimizer)
    check_frozen(before, weights, flags)


def test_a_group_that_is_added_later_is_picked_up() -> None:
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    optimizer = torch.optim.AdamW(layer_of(model, 0), lr=1e-2, weight_decay=0.1)
    constrain(optimizer, model, flags)
    learn(model, optimizer, 1)
    optimizer.add_param_group({"params": layer_of(model, 1) + layer_of(model, 2)})
    learn(model, optimizer, 2)
    check_frozen(before, weights, flags)


def test_weights_that_are_frozen_again_are_left_alone(tmp_path: Path) -> None:
    """Nothing is drawn back to the anchor of a soft subspace while it is not trained."""
    model = llama()
    weights = matrices(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, subspaces(weights))
    learn(model, optimizer, 1)
    name = next(iter(weights))
    weights[name].requires_grad_(requires_grad=False)
    kept = weights[name].detach().clone()
    learn(model, optimizer, 2)
    assert torch.equal(bits(kept), bits(weights[name]))


def test_an_adapter_that_becomes_trained_is_refused_at_that_step() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    model.requires_grad_(requires_grad=False)
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_()
    name = "model.layers.0.self_attn.q_proj.weight"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, {name: torch.zeros(32, 1, dtype=torch.bool)})
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("hada_" in key)
    with pytest.raises(TrainingError, match=f"{name} is moved by an adapter of kind 'loha'"):
        learn(model, optimizer, 1)


# Optimizers that no rule can hold


class Averaging(torch.optim.SGD):
    """Trains one point and evaluates another, as schedule-free optimizers do."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


class Fused(torch.optim.Optimizer):
    """Updates weights during the backward pass, as LOMO does."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
        loss.backward()


class Outer(torch.optim.Optimizer):
    """Wraps an optimizer and writes the weights once more after its step, as Lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], {"lr": 0.0})
        self.optimizer = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)


def test_an_optimizer_with_a_second_set_of_weights_is_refused() -> None:
    model = llama()
    flags = masks(matrices(model))
    averaging = Averaging(model.parameters(), lr=0.1)
    for optimizer in (averaging, Outer(averaging)):
        with pytest.raises(TrainingError, match=r"Averaging keeps a second set of weights.*AdamW"):
            constrain(optimizer, model, flags)
        constrain(optimizer, model, flags, parity="paper").remove()  # as published: nothing is promised there


def test_schedule_free_optimizers_are_refused_by_name() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = llama()
    for kind in (schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree, schedulefree.RAdamScheduleFree):
        with pytest.raises(TrainingError, match=f"{kind.__name__} keeps a second set of weights"):
            constrain(kind(model.parameters(), lr=0.1), model, masks(matrices(model)))


class Copies(torch.optim.Optimizer):
    """Steps on copies of the weights and writes them over the model's, as BAdam does."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.copies = [p.detach().clone().requires_grad_() for p in self.param_groups[0]["params"]]
        self.base_optimizer = torch.optim.SGD(self.copies, lr=0.1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, copy in zip(self.param_groups[0]["params"], self.copies, strict=True):
            copy.grad = parameter.grad
        self.base_optimizer.step()
        for parameter, copy in zip(self.param_groups[0]["params"], self.copies, strict=True):
            parameter.copy_(copy)


def test_an_optimizer_that_steps_on_copies_is_refused() -> None:
    model = llama()
    with pytest.raises(TrainingError, match="Copies steps on copies of the weights"):
        constrain(Copies(model.parameters()), model, masks(matrices(model)))


def test_an_optimizer_that_never_steps_is_refused() -> None:
    model = llama()
    stepless = type("Stepless", (torch.optim.Optimizer,), {})(model.parameters(), {})
    for optimizer in (Fused(model.parameters()), stepless):
        name = type(optimizer).__name__
        with pytest.raises(TrainingError, match=f"{name} updates weights during the backward pass"):
            constrain(optimizer, model, masks(matrices(model)))
        with pytest.raises(TrainingError, match=f"{name} updates weights"):
            MIGU().attach(optimizer, model)


def test_an_optimizer_that_wraps_another_is_held_as_a_whole() -> None:
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    optimizer = Outer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    constrain(optimizer, model, flags)
    assert unwrap(optimizer) is optimizer
    learn(model, optimizer)
    check_frozen(before, weights, flags)


def test_an_optimizer_whose_step_runs_no_hooks_is_refused() -> None:
    model = llama()

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
            self.param_groups = [{"params": list(parameters)}]

        def step(self, closure: Any = None) -> None:
            pass

    with pytest.raises(TrainingError, match="Own runs no step hooks"):
        constrain(Own(model.parameters()), model, masks(matrices(model)))


def test_steps_that_are_held_are_counted() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = constrain(optimizer, model, masks(matrices(model)))
    assert handle.steps == 0
    learn(model, optimizer, 2)
    assert handle.steps == 2


# Under a Trainer


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 11) + number
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], optimizer: Any = None) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    schedule = optimizer and torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Trainer(
        model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks, optimizers=(optimizer, schedule)
    )


class InBackward(TrainerCallback):  # type: ignore[misc]
    """Something else updates the weights, and the optimizer is not asked."""

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer.optimizer.step = lambda closure=None: None


def test_a_run_whose_optimizer_is_never_asked_to_step_ends_at_once(tmp_path: Path) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TrainingError, match="never asked to step"):
        trainer(model, tmp_path, [MaskedUpdate(masks(matrices(model))), InBackward()], optimizer).train()


class Unfreeze(TrainerCallback):  # type: ignore[misc]
    """Trains the last layer alone at first, and all of them after a step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.requires_grad_(requires_grad=False)
        for parameter in layer_of(model, 2):
            parameter.requires_grad_()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.requires_grad_()


@pytest.mark.parametrize("first", [True, False])
def test_an_unfreezing_callback_before_or_after_makes_no_difference(first: bool, tmp_path: Path) -> None:
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    callbacks: list[TrainerCallback] = [Unfreeze(), MaskedUpdate(flags)]
    trainer(model, tmp_path, callbacks if first else callbacks[::-1]).train()
    check_frozen(before, weights, flags)
