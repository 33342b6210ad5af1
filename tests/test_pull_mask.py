"""The preset shield: what it makes of a Fisher, on the command line too, and what merge makes of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from pull_oracle import close, drawn, of_file
from training_runs import llama
from typer.testing import CliRunner

import fisherkit
from fisherkit.artefacts.mask_file import open_mask
from fisherkit.cli import app
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.options import MaskOptions, MergeOptions
from fisherkit.render.summary_text import headline
from fisherkit.training import constrain

Checkpoint = Callable[[str], Path]
DOWN = "model.layers.1.mlp.down_proj.weight"
CONV = "transformer.h.1.mlp.c_fc.weight"


# The preset


def made_with(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text())["options"]


def test_shield_is_a_soft_subspace_of_inputs(measured: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    report = fisherkit.mask(measured("llama"), out, MaskOptions(preset="shield"))
    wanted = {"preset": "shield", "basis": "activation", "svd_energy": 0.99, "svd_rank": None}
    assert wanted | {"pull": 5.0, "side": "right"} == {key: made_with(out)[key] for key in (*wanted, "pull", "side")}
    assert report.energy is not None
    assert report.energy >= 0.99
    with open_mask(out) as file:
        assert (file.kind, file.direction, file.pull) == ("subspace", "protect", 5.0)
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
    default = {"svd_rank": None, "svd_energy": None if "svd_rank" in changes else 0.99, "pull": 5.0}
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
    with pytest.raises(CheckpointError, match=r"alone\.json.*missing"):
        constrain(optimizer, model, alone, steps=1)
    constrain(optimizer, model, alone, pull=0.2, steps=1).remove()


def test_a_fisher_is_no_anchor_and_modes_of_a_weight_cannot_be_pulled(
    measured: Callable[[str], Path], tmp_path: Path
) -> None:
    fisher = measured("llama")
    shield = fisherkit.mask(fisher, tmp_path / "shield.safetensors", MaskOptions(preset="shield")).path
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="a fisher, not a model"):
        constrain(optimizer, model, shield, anchor=fisher, steps=1)
    modes = fisherkit.mask(fisher, tmp_path / "modes.safetensors", MaskOptions(svd_rank=2, side="right")).path
    with pytest.raises(OptionError, match=r"pull.*--basis activation.*--basis fisher"):
        constrain(optimizer, model, modes, pull=0.2, steps=1)


def test_inspect_says_that_a_subspace_is_soft(measured: Callable[[str], Path], tmp_path: Path) -> None:
    made = fisherkit.mask(measured("llama"), tmp_path / "shield.safetensors", MaskOptions(preset="shield"))
    assert "soft (pull 5.0)" in headline(fisherkit.inspect(made.path))


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
        ({"preset": "shield", "train": "top"}, "--train top.*subspace"),
        ({"preset": "shield", "keep": 0.3}, "--keep 0.3.*binary masks.*subspaces"),
        ({"preset": "shield", "scope": "global"}, "--scope global.*binary masks"),
        ({"preset": "shield", "score": "magnitude"}, "--score magnitude.*binary masks"),
        ({"preset": "shield", "side": "left"}, "--side left: --basis activation.*inputs"),
        ({"preset": "shield", "svd_rank": 2, "svd_energy": 0.9}, "how many modes"),
        ({"preset": "shield", "pull": 0}, "--pull.*above 0"),
        ({"preset": "shield", "basis": "kron"}, "--preset shield.*--basis activation.*--basis kron"),
        ({"svd_rank": 2, "pull": 0.3}, "--pull 0.3.*--basis activation.*--basis fisher"),
        ({"svd_rank": 2, "pull": 0.3, "basis": "kron"}, "--pull 0.3.*--basis activation.*--basis kron"),
        ({"train": "top", "pull": 0.3}, "--pull 0.3.*subspaces"),
        ({"preset": "ssu", "pull": 0.3}, "--pull 0.3.*subspaces"),
        ({"preset": "fggm", "svd_rank": 2}, "--preset fggm.*binary masks"),
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
    assert made_with(out)["pull"] == 5
    done = CliRunner().invoke(app, [*given, "--pull", "0.5", "--svd-rank", "3", "--force"])
    assert done.exit_code == 0, done.output
    assert (made_with(out)["pull"], made_with(out)["svd_rank"]) == (0.5, 3)
    done = CliRunner().invoke(app, [*given, "--pull", "nan", "--force"])
    assert done.exit_code != 0
    assert "--pull must lie above 0" in done.output


# merge


def as_a_course(pull: tuple[Any, list[float], int]) -> tuple[Any, list[float], int]:
    """Strengths t of one step that leave what a course of strengths s leaves: 1 / (1 + t) = (1 - exp(-s)) / s."""
    q, strengths, axis = pull
    return q, [s / (1 - math.exp(-s)) - 1 if s else 0.0 for s in strengths], axis


@pytest.mark.parametrize(("architecture", "weight"), [("llama", DOWN), ("gpt2", CONV)])
@pytest.mark.parametrize("pull", [0.2, 30.0])
def test_merge_takes_what_a_course_takes_from_a_constant_update(
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
    pulls = {name: as_a_course(own) for name, own in of_file(mask, pull).items()}
    wanted = {n: drawn(theirs[n], ours[n], pulls[n]) if n in pulls else theirs[n] for n in ours}
    close(merged, wanted, 1e-6)
    change, full = (float((one[weight].double() - ours[weight].double()).norm()) for one in (merged, theirs))
    assert 0 < change < 0.99 * full
