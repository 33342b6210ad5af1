"""The same under transformers' Trainer and TRL's, and MIGU, the baseline that chooses rows anew for every step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import tiny_tokenizer
from torch import nn
from trainer_runs import train
from training_runs import batch, check_frozen, copies, learn, llama, masks, matrices, subspaces

from fisherkit.errors import OptionError, TrainingError
from fisherkit.training import MIGU, MaskedUpdate

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_torch_fused"},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True, "gradient_checkpointing": True},
    ],
)
def test_a_trainer_obeys(changes: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    train(model, tmp_path, MaskedUpdate(flags), **changes)
    check_frozen(before, weights, flags)


def test_a_trainer_is_free_again_after_the_run(tmp_path: Path) -> None:
    model = llama()
    trainer = train(model, tmp_path, MaskedUpdate(masks(matrices(model))))
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_one_callback_serves_two_runs(tmp_path: Path) -> None:
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    callback = MaskedUpdate(flags)
    train(model, tmp_path, callback, max_steps=1)
    train(model, tmp_path, callback, max_steps=1)
    check_frozen(before, weights, flags)


def test_a_trainer_that_is_resumed_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    start = llama()
    flags = masks(matrices(start))
    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    train(whole, tmp_path / "a", MaskedUpdate(flags), save_strategy="steps", save_steps=2, max_steps=4)
    train(resumed, tmp_path / "b", MaskedUpdate(flags), resume=str(tmp_path / "a" / "checkpoint-2"), max_steps=4)
    check_frozen(matrices(start), matrices(resumed), flags)
    for name, weight in matrices(whole).items():
        assert torch.equal(weight, matrices(resumed)[name]), name


def test_a_trainer_projects_and_scales(tmp_path: Path) -> None:
    model = llama()
    weights = matrices(model)
    before, parts = copies(weights), subspaces(weights)
    train(model, tmp_path, MaskedUpdate(parts))
    for name, weight in weights.items():
        change = weight.detach().double() - before[name].double()
        assert float((parts[f"{name}.U"].double().mT @ change).norm() / change.norm()) < 1e-6
    start = copies(weights)
    train(model, tmp_path, MaskedUpdate([1.0, 1.0, 1e8], floor=0.0, power=1))
    moved = {name: float((weight.detach() - start[name]).norm()) for name, weight in weights.items()}
    assert moved["model.layers.2.mlp.up_proj.weight"] < 1e-5
    assert moved["model.layers.1.mlp.up_proj.weight"] > 1e-2


def test_deepspeed_is_refused_before_the_first_step() -> None:
    args = type("Arguments", (), {"deepspeed": {"zero_optimization": {"stage": 2}}})()
    for callback in (MaskedUpdate({}), MIGU()):
        with pytest.raises(TrainingError, match="DeepSpeed"):
            callback.on_train_begin(args, None, None, model=llama(), optimizer=None)


def test_trl_obeys_too(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": ["Name three rivers.", "Good morning to you all."] * 4}),
        processing_class=tiny_tokenizer(),
        callbacks=[MaskedUpdate(flags)],
    )
    trainer.train()
    check_frozen(before, weights, flags)


# MIGU


def magnitudes(model: nn.Module, seeds: list[int]) -> dict[str, torch.Tensor]:
    """Output magnitudes of every linear layer over the batches, the slow way."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def add(module: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
                rows = output.detach().double().abs().reshape(-1, output.shape[-1])
                found[name] = found.get(name, torch.zeros(rows.shape[1])) + sum(rows)

            hooks.append(module.register_forward_hook(add))
    for seed in seeds:
        model(**batch(seed))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("parity", ["paper", None])
def test_migu_lets_the_rows_change_whose_outputs_are_largest(parity: Any) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    detach = MIGU(0.7, parity=parity).attach(optimizer, model)
    for seeds in ([0, 1], [2]):
        before = copies(dict(model.named_parameters()))
        twin = copy.deepcopy(model)
        for seed in seeds:
            model(**batch(seed)).loss.backward()
        if parity == "paper":
            optimizer.state.clear()  # old momentum would move what is frozen now, as published
        optimizer.step()
        optimizer.zero_grad()
        after = dict(model.named_parameters())
        for name, magnitude in magnitudes(twin, seeds).items():
            free = magnitude >= torch.quantile(magnitude, 0.7)
            changed = (after[f"{name}.weight"] != before[f"{name}.weight"]).any(1)
            assert torch.equal(changed, free), name
            assert free.sum() == pytest.approx(0.3 * len(free), abs=1)
    detach()
    before = copies(matrices(model))
    learn(model, optimizer, 1)
    assert all((weight != before[name]).any(1).all() for name, weight in matrices(model).items())


def test_migu_does_not_count_what_is_evaluated() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    MIGU(0.7).attach(optimizer, model)
    model.eval()
    model(**batch(5))
    model.train()
    twin = copy.deepcopy(model)
    before = copies(matrices(model))
    model(**batch(0)).loss.backward()
    optimizer.step()
    wanted = magnitudes(twin, [0])
    for name, weight in matrices(model).items():
        magnitude = wanted[name.removesuffix(".weight")]
        assert torch.equal((weight != before[name]).any(1), magnitude >= torch.quantile(magnitude, 0.7))


def test_migu_runs_under_a_trainer(tmp_path: Path) -> None:
    model = llama()
    before = copies(matrices(model))
    train(model, tmp_path, MIGU(0.7, parity=None), max_steps=1)
    for name, weight in matrices(model).items():
        assert (weight != before[name]).any(1).sum() == pytest.approx(0.3 * len(weight), abs=1), name


def test_migu_refuses_what_it_cannot_do() -> None:
    for threshold in (-0.1, 1.1):
        with pytest.raises(OptionError, match=r"threshold .*0 and 1"):
            MIGU(threshold)
    with pytest.raises(OptionError, match=r"parity .*'paper'"):
        MIGU(parity="gradient")  # type: ignore[arg-type]
    model = nn.Sequential(nn.Embedding(3, 4))
    with pytest.raises(TrainingError, match="no linear layer"):
        MIGU().attach(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_migu_at_the_ends_of_its_range(threshold: float, share: float) -> None:
    model = nn.Linear(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    MIGU(threshold, parity=None).attach(optimizer, model)
    before = model.weight.detach().clone()
    model(torch.randn(2, 3, 6)).sum().backward()
    optimizer.step()
    changed = (model.weight != before).any(1).float().mean()
    assert float(changed) == pytest.approx(share, abs=1 / 8)
