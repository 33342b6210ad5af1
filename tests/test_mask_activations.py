"""Subspaces of activations: what a model reads stays as it was, through masks, training, LoRA and merges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from training_runs import copies, learn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fisherkit
from fisherkit.artefacts.covariance_file import CovarianceFile
from fisherkit.artefacts.mask_file import open_mask
from fisherkit.cli import app
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.kernels import covariance as kernel
from fisherkit.kernels import eigenspace
from fisherkit.methods.mask.build import mask
from fisherkit.options import ExtractOptions, MaskOptions, MergeOptions
from fisherkit.training import constrain

Checkpoint = Callable[[str], Path]
DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
CONV = "transformer.h.1.mlp.c_fc.weight"


def subspace(fisher: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    mask(fisher, out, MaskOptions(**{"svd_rank": 6, "basis": "activation", **changes}))
    return safetensors.torch.load_file(out)


def moment(fisher: Path, weight: str, side: str) -> Tensor:
    """E[x x^T] or E[g g^T] of a weight, float64."""
    beside = fisher.with_name("fisher.activations.json")
    rows = json.loads(beside.read_text())["moments"].items()
    name = next(name for name, row in rows if row["side"] == side and weight in row["tensors"])
    with CovarianceFile(beside.with_suffix(".safetensors")) as file:
        return torch.from_numpy(file.read(name).values).double()


def assert_leading(found: Tensor, of: Tensor) -> None:
    """Orthonormal columns that hold as much of the trace as the leading eigenvectors do."""
    v = found.double()
    torch.testing.assert_close(v.T @ v, torch.eye(v.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)
    best = torch.linalg.eigvalsh(of).flip(0)[: v.shape[1]].sum()
    assert float((v.T @ of @ v).trace()) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize(("architecture", "weight", "part"), [("llama", DOWN, "V"), ("gpt2", CONV, "U")])
def test_the_leading_input_directions_are_stored(
    architecture: str, weight: str, part: str, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    found = subspace(measured(architecture), tmp_path / "s.safetensors")
    inputs = moment(measured(architecture), weight, "input")
    assert {name.rpartition(".")[2] for name in found} == {part, "S"}
    assert_leading(found[f"{weight}.{part}"], inputs)
    torch.testing.assert_close(
        found[f"{weight}.S"].double(), torch.linalg.eigvalsh(inputs).flip(0)[:6], rtol=1e-4, atol=0
    )
    made = json.loads((tmp_path / "s.json").read_text())
    assert (made["options"]["basis"], made["options"]["side"]) == ("activation", "right")
    held = float(found[f"{weight}.S"].double().sum() / inputs.trace())
    assert made["tensors"][weight]["energy"] == pytest.approx(held, rel=1e-5)


def test_weights_that_share_an_input_share_its_directions(measured: Callable[[str], Path], tmp_path: Path) -> None:
    found = subspace(measured("llama"), tmp_path / "s.safetensors")
    q, k, v, o = (found[f"model.layers.0.self_attn.{name}_proj.weight.V"] for name in "qkvo")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert not torch.equal(q, o)


@pytest.mark.parametrize(("architecture", "weight", "parts"), [("llama", DOWN, "VU"), ("gpt2", CONV, "UV")])
def test_kron_has_inputs_and_gradients(
    architecture: str, weight: str, parts: str, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    found = subspace(measured(architecture), tmp_path / "s.safetensors", basis="kron")
    assert_leading(found[f"{weight}.{parts[0]}"], moment(measured(architecture), weight, "input"))
    assert_leading(found[f"{weight}.{parts[1]}"], moment(measured(architecture), weight, "output"))
    assert f"{weight}.S" not in found
    left = subspace(measured(architecture), tmp_path / "l.safetensors", basis="kron", side="left")
    assert torch.equal(left[f"{weight}.{parts[1]}"], found[f"{weight}.{parts[1]}"])
    assert f"{weight}.{parts[0]}" not in left


@pytest.mark.parametrize("energy", [0.2, 0.9, 0.999, 1.0])
def test_energy_takes_the_fewest_directions_that_hold_it(
    energy: float, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    found = subspace(measured("llama"), tmp_path / "s.safetensors", svd_rank=None, svd_energy=energy)
    inputs = moment(measured("llama"), UP, "input")
    values = found[f"{UP}.S"].double()
    assert float(values.sum()) >= energy * float(inputs.trace()) * (1 - 1e-5)
    assert energy == 1 or float(values[:-1].sum()) < energy * float(inputs.trace())
    both = subspace(measured("llama"), tmp_path / "k.safetensors", basis="kron", svd_rank=None, svd_energy=energy)
    assert both[f"{UP}.U"].shape[1] == both[f"{UP}.V"].shape[1] >= len(values)  # the shorter filled up with zeros
    with open_mask(tmp_path / "k.safetensors") as file:
        assert file.modes(UP, (48, 32)).s is None


def test_directions_of_a_factor_are_those_of_its_product() -> None:
    columns = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0))).Q
    factor = columns * torch.tensor([4.0, 3, 2, 1, 0.5, 1e-9, 0, 0])
    found = eigenspace.factor_directions(factor, 40.0)
    torch.testing.assert_close(found.values, torch.tensor([16.0, 9, 4, 1, 0.25]))
    torch.testing.assert_close(found.vectors, columns[:, :5])
    assert found.energy == pytest.approx(30.25 / 40)
    one = eigenspace.fewest(found, 0.6)
    assert one is not None
    assert len(one.values) == 2
    assert eigenspace.fewest(found, 0.9) is None


def test_sketched_moments_make_subspaces_too(
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    measured: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = moment(measured("llama"), DOWN, "input")  # before anything is a sketch
    monkeypatch.setattr(kernel, "SKETCH_ABOVE", 40)
    monkeypatch.setattr(kernel, "SKETCH_RANK", 16)
    options = ExtractOptions(statistics="activations")
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", options)
    found = subspace(tmp_path / "fisher.pt", tmp_path / "s.safetensors", svd_rank=2)
    v = found[f"{DOWN}.V"].double()
    best = torch.linalg.eigvalsh(exact).flip(0)[:2].sum()
    assert float((v.T @ exact @ v).trace()) == pytest.approx(float(best), rel=2e-2)
    said: list[str] = []
    options = MaskOptions(svd_energy=0.9999, basis="activation", force=True)
    mask(tmp_path / "fisher.pt", tmp_path / "s.safetensors", options, say=said.append)
    assert any("the sketch of their covariance holds less" in line for line in said)


# What takes them


@pytest.mark.parametrize(("architecture", "weight"), [("llama", DOWN), ("gpt2", CONV)])
@pytest.mark.parametrize("basis", ["activation", "kron"])
def test_training_has_no_effect_on_protected_inputs(
    architecture: str, weight: str, basis: str, checkpoint: Checkpoint, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = subspace(measured(architecture), tmp_path / "s.safetensors", basis=basis)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(architecture)).train()
    before = copies(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors")
    learn(model, optimizer, 3)
    delta = model.get_parameter(weight).detach().double() - before[weight].double()
    assert delta.norm() > 0.01
    if f"{weight}.V" in parts:
        assert float((delta @ parts[f"{weight}.V"].double()).norm()) < 1e-5 * float(delta.norm())
    if f"{weight}.U" in parts:
        assert float((parts[f"{weight}.U"].double().T @ delta).norm()) < 1e-5 * float(delta.norm())


@pytest.mark.parametrize(("architecture", "weight"), [("llama", DOWN), ("gpt2", CONV)])
@pytest.mark.parametrize("basis", ["activation", "kron"])
def test_lora_keeps_out_of_them(
    architecture: str, weight: str, basis: str, checkpoint: Checkpoint, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = subspace(measured(architecture), tmp_path / "s.safetensors", basis=basis)
    target = weight.split(".")[-2]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=[target],
        fan_in_fan_out=architecture == "gpt2",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint(architecture)), config).double()
    own = {name: value for name, value in parts.items() if f".{target}." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constrain(optimizer, model, own)
    learn(model, optimizer, 2)
    layer = model.get_submodule("base_model.model." + weight.removesuffix(".weight"))
    delta = layer.get_delta_weight("default").detach().double()
    assert delta.norm() > 0.01
    if f"{weight}.V" in parts:
        assert float((delta @ parts[f"{weight}.V"].double()).norm()) < 1e-5 * float(delta.norm())
    if f"{weight}.U" in parts:
        assert float((parts[f"{weight}.U"].double().T @ delta).norm()) < 1e-5 * float(delta.norm())


@pytest.mark.parametrize(("architecture", "weight", "part"), [("llama", DOWN, "V"), ("gpt2", CONV, "U")])
@pytest.mark.parametrize("side", ["both", "right"])
def test_merge_removes_them_from_the_delta(
    side: Any,
    architecture: str,
    weight: str,
    part: str,
    checkpoint: Checkpoint,
    measured: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    parts = subspace(measured(architecture), tmp_path / "s.safetensors")
    base, tuned = checkpoint(architecture), pairs.fine_tune(checkpoint(architecture), tmp_path / "tuned")
    options = MergeOptions(subspace=tmp_path / "s.safetensors", side=side)
    fisherkit.merge(base, tuned, tmp_path / "out", options)
    merged, ours = pairs.tensors(tmp_path / "out"), pairs.tensors(base)
    delta = merged[weight].double() - ours[weight].double()
    basis = parts[f"{weight}.{part}"].double()
    inside = delta @ basis if part == "V" else basis.T @ delta
    assert delta.norm() > 0.01
    assert float(inside.norm()) < 1e-5 * float(delta.norm())
    with pytest.raises(OptionError, match=r"--side left: .*no directions"):
        fisherkit.merge(base, tuned, tmp_path / "left", MergeOptions(subspace=tmp_path / "s.safetensors", side="left"))


def test_a_protected_model_answers_old_prompts_more_alike(
    checkpoint: Checkpoint, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    """With every direction that carries anything protected, a layer's output on the measured prompts hardly moves."""
    subspace(measured("llama"), tmp_path / "s.safetensors", svd_rank=None, svd_energy=0.9999)
    base, tuned = checkpoint("llama"), pairs.fine_tune(checkpoint("llama"), tmp_path / "tuned")
    fisherkit.merge(base, tuned, tmp_path / "out", MergeOptions(subspace=tmp_path / "s.safetensors"))
    inputs = moment(measured("llama"), DOWN, "input")
    ours, theirs, kept = (pairs.tensors(path)[DOWN].double() for path in (base, tuned, tmp_path / "out"))
    moved, held = ((one - ours) @ inputs @ (one - ours).T for one in (theirs, kept))  # mean square of the change
    assert float(held.trace()) < 1e-3 * float(moved.trace())


# Where it cannot be


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(OptionError, match=r"--side left: --basis activation.*inputs"):
        MaskOptions(svd_rank=2, basis="activation", side="left")
    with pytest.raises(OptionError, match="--basis weight"):
        MaskOptions(svd_rank=2, basis="weight", weights="model", activations=Path("a.safetensors"))
    with pytest.raises(OptionError, match=r"--activations .*subspaces"):
        MaskOptions(train="top", activations=Path("a.safetensors"))
    with pytest.raises(OptionError, match=r"--side right.*subspaces"):
        MaskOptions(train="top", side="right")


def test_missing_and_foreign_moments_are_refused(
    checkpoint: Checkpoint, prompts: Path, measured: Callable[[str], Path], tmp_path: Path
) -> None:
    fisherkit.extract(checkpoint("qwen2"), prompts, tmp_path / "fisher.pt", ExtractOptions())
    with pytest.raises(CheckpointError, match="extract --statistics activations`"):
        subspace(tmp_path / "fisher.pt", tmp_path / "s.safetensors")
    other = measured("llama").with_name("fisher.activations.safetensors")
    with pytest.raises(CheckpointError, match="other weights than the Fisher"):
        subspace(tmp_path / "fisher.pt", tmp_path / "s.safetensors", activations=other)
    with pytest.raises(OptionError, match=r"--svd-rank 49.*at most 48"):
        subspace(measured("llama"), tmp_path / "s.safetensors", svd_rank=49)
    with pytest.raises(OutputError, match="input of this command"):
        subspace(measured("llama"), other, force=True)


def test_experts_are_left_out_and_named(measured: Callable[[str], Path], tmp_path: Path) -> None:
    said: list[str] = []
    options = MaskOptions(svd_rank=4, basis="activation")
    report = mask(measured("qwen3-moe"), tmp_path / "s.safetensors", options, say=said.append)
    assert report.tensors == 3 * 4
    assert any("left out, having no covariances (no linear layers)" in line for line in said)


def test_the_command_line_does_it(measured: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    arguments = ["mask", str(measured("llama")), "-o", str(out), "--svd-energy", "0.9", "--basis", "activation", "-q"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    with open_mask(out) as file:
        assert (file.kind, len(file.names)) == ("subspace", 21)
