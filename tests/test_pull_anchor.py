"""The weights that a soft subspace draws back to, and what is refused as a pull or as an anchor."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import safetensors.torch
import torch
from pull_oracle import close, drawn, held, three_weights, write
from training_runs import basis, copies, learn, llama, matrices

import fisherkit
from fisherkit.artefacts.mask_file import open_mask
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.options import MaskOptions, MergeOptions
from fisherkit.training import constrain

Checkpoint = Callable[[str], Path]
TURN_BYTES = 256


@pytest.mark.parametrize("gradient", ["zero", "none"])
def test_weights_without_gradients_go_to_the_anchor_in_the_directions_and_nowhere_else(
    gradient: str, checkpoint: Checkpoint, tmp_path: Path, turns: int | None
) -> None:
    model = llama()
    anchor = copies(dict(model.named_parameters()))
    pulls = write(tmp_path / "s.safetensors", matrices(model), sides="VU")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    moved = copies(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    handle = constrain(optimizer, model, tmp_path / "s.safetensors", anchor=checkpoint("llama"), steps=1)
    handle.turn_bytes = turns
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
        handle = constrain(optimizer, model, tmp_path / "s.safetensors", anchor=anchor, steps=1)
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
    constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "anchor.safetensors", steps=1)
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
        r"anchor\.safetensors: .*no weight 'other'": {"one": torch.zeros(12, 10)},
        r"anchor\.safetensors: other.*\[10, 12\].*\[12, 10\] in this model": {
            "one": torch.zeros(12, 10),
            "other": torch.zeros(10, 12),
        },
    }
    for message, tensors in anchors.items():
        safetensors.torch.save_file(tensors, tmp_path / "anchor.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "anchor.safetensors", steps=1)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        constrain(optimizer, model, tmp_path / "s.safetensors", anchor=tmp_path / "absent", steps=1)
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
        with pytest.raises(OptionError, match=f"^{what} .*soft subspace.*preset shield"):
            constrain(optimizer, model, given, **options, steps=1)
    assert not optimizer._optimizer_step_pre_hooks


def test_two_sides_or_no_spectrum_cannot_be_pulled(tmp_path: Path) -> None:
    model = three_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    u, s, v = basis(12, 2), torch.ones(2), basis(10, 2)
    for number, parts in enumerate(({"one.U": u, "one.V": v}, {"one.U": u, "one.S": s, "one.V": v}, {"one.V": v})):
        path = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file({name: part.contiguous() for name, part in parts.items()}, path)
        with pytest.raises(OptionError, match=r"pull.*one side.*spectrum"):
            constrain(optimizer, model, path, pull=0.2, steps=1)


@pytest.mark.parametrize("pull", [0, 0.0, -0.2, math.nan, math.inf, 1e6, "0.2"])
def test_a_pull_that_is_no_pull_is_refused(pull: Any, tmp_path: Path) -> None:
    model = three_weights()
    write(tmp_path / "s.safetensors", held(model))
    with pytest.raises(OptionError, match=r"--pull.*above 0"):
        constrain(torch.optim.SGD(model.parameters()), model, tmp_path / "s.safetensors", pull=pull, steps=1)
    with pytest.raises(OptionError, match=r"--pull.*above 0"):
        MaskOptions(svd_rank=2, basis="activation", pull=pull)


@pytest.mark.parametrize("pull", ["hard", 0, -1, 1e9, True, math.nan, math.inf, [0.2], {}])
def test_a_file_that_says_nonsense_of_its_pull_is_refused(pull: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = llama()
    write(tmp_path / "s.safetensors", matrices(model))
    beside = tmp_path / "s.json"
    options = {"pull": pull, "pull_per": "course"}
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"options": options}))
    with pytest.raises(CheckpointError, match=r"s\.json: .*no pull"):
        constrain(torch.optim.SGD(model.parameters()), model, tmp_path / "s.safetensors", steps=1)
    if pull == "hard":
        tuned = pairs.fine_tune(checkpoint("llama"), tmp_path / "tuned")
        merged = MergeOptions(subspace=tmp_path / "s.safetensors")
        with pytest.raises(CheckpointError, match=r"'hard'.*no pull"):
            fisherkit.merge(checkpoint("llama"), tuned, tmp_path / "out", merged)
        assert not (tmp_path / "out").exists()


def test_a_file_whose_pull_is_one_per_step_is_refused_unless_another_is_named(tmp_path: Path) -> None:
    model = three_weights()
    write(tmp_path / "s.safetensors", held(model))
    beside = tmp_path / "s.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"options": {"pull": 0.2}}))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(CheckpointError, match=r"s\.json: its pull of 0\.2 is one per step.*make the subspace anew"):
        constrain(optimizer, model, tmp_path / "s.safetensors", steps=24)
    constrain(optimizer, model, tmp_path / "s.safetensors", pull=5, steps=24).remove()


def test_a_file_without_options_is_a_hard_subspace(tmp_path: Path) -> None:
    write(tmp_path / "s.safetensors", held(three_weights()))
    beside = tmp_path / "s.json"
    described = json.loads(beside.read_text())
    del described["options"]
    beside.write_text(json.dumps(described))
    with open_mask(tmp_path / "s.safetensors") as file:
        assert file.pull is None


@pytest.mark.parametrize("options", [None, [], [1], "soft", 3])
def test_options_that_are_no_object_are_refused(options: Any, tmp_path: Path) -> None:
    write(tmp_path / "s.safetensors", held(three_weights()))
    beside = tmp_path / "s.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"options": options}))
    with pytest.raises(CheckpointError, match="options is"):
        open_mask(tmp_path / "s.safetensors")
