"""``extract --statistics inputs``: covariances of inputs by one forward, whole or as factors, without a Fisher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch
from kills import Killed, killed_after
from pairs import cli, one_line, worked
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fisherkit
from fisherkit.artefacts.covariance_file import CovarianceFile
from fisherkit.checkpoint.index import open_index
from fisherkit.engine.covariance import experts
from fisherkit.engine.model import build, open_model
from fisherkit.errors import OptionError, UnsupportedModelError
from fisherkit.kernels import covariance as kernel
from fisherkit.options import ExtractOptions, MergeOptions
from fisherkit.prompts.dataset import load_prompts

Checkpoint = Callable[[str], Path]
EXACT: dict[str, Any] = {"group_size": 2, "batch_tokens": 40}


APART = {"qwen3-moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
"""Models whose experts are tensors of their own on the disk, and what these are called."""


def run(model: Path, prompts: Path, out: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Covariances by name (of factors B, B B^T), and the JSON beside them."""
    fisherkit.extract(model, prompts, out, ExtractOptions(**{**EXACT, "statistics": "inputs", **changes}))
    return read(out)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    made = json.loads(path.with_suffix(".json").read_text())
    found = {}
    with CovarianceFile(path) as file:
        for name in made["moments"]:
            one = file.read(name)
            values = torch.from_numpy(one.values).double()
            found[name] = values @ values.T if one.is_factor else values
    return found, made


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("engine", ["stream", "resident"])
@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_they_are_those_that_lie_beside_a_fisher(
    architecture: str,
    engine: str,
    checkpoint: Checkpoint,
    prompts: Path,
    measured: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    if engine == "resident" and architecture not in ("llama", "gpt2", "qwen3-moe", "gemma4-e2b"):
        pytest.skip("one of a kind is enough")
    found, made = run(checkpoint(architecture), prompts, tmp_path / "in.safetensors", engine=engine)
    wanted, other = read(measured(architecture).with_name("fisher.activations.safetensors"))
    of_experts = {name for name in found if ".experts." in name}
    assert found.keys() - of_experts == {name for name in wanted if name.endswith(".input")}
    for name in found.keys() - of_experts:
        assert_close(found[name], wanted[name], 1e-5)
        for key in ("tensors", "tokens", "layer", "size"):
            assert made["moments"][name][key] == other["moments"][name][key]
    covered = {tensor for name in of_experts for tensor in made["moments"][name]["tensors"]}
    assert made["left_out"] == [name for name in other["left_out"] if name not in covered]
    assert bool(of_experts) == (architecture in APART)
    assert made["model"] == other["model"]
    assert "estimator" not in made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "in.safetensors"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("architecture", APART)
def test_inputs_of_experts_are_those_of_the_tokens_routed_to_them(
    architecture: str,
    implementation: str,
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = build.build_skeleton

    def built(*arguments: Any, **settings: Any) -> Any:
        skeleton = plain(*arguments, **settings)
        skeleton.model.set_experts_implementation(implementation)
        return skeleton

    monkeypatch.setattr(open_model, "build_skeleton", built)
    found, made = run(checkpoint(architecture), prompts, tmp_path / "in.safetensors")
    sums, tokens = experts_by_hand(checkpoint(architecture), prompts)
    gate, up, down = APART[architecture]
    for (stem, expert), (inner, outer) in sums.items():
        name = next(name for name in found if f"{stem}.experts.{expert}.{gate}.weight.input" in name)
        row, other = made["moments"][name], name.replace(gate, down)
        assert [tensor.split(".")[-2] for tensor in row["tensors"]] == [gate, up]
        assert row["tokens"] == made["moments"][other]["tokens"] == tokens[stem, expert]
        assert_close(found[name], inner / max(tokens[stem, expert], 1), 1e-5)
        assert_close(found[other], outer / max(tokens[stem, expert], 1), 1e-5)
    assert len(sums) == 12
    assert not made["left_out"] or all(".gate." in name for name in made["left_out"])


def experts_by_hand(model: Path, prompts: Path) -> tuple[dict[tuple[str, int], list[Any]], dict[tuple[str, int], int]]:
    """Sums of x x^T of what goes into gate and up, and into down, by layer and expert, in float64; and the tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
    sums: dict[tuple[str, int], list[Any]] = {}
    tokens: dict[tuple[str, int], int] = {}

    def listen(stem: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            for expert in range(module.gate_up_proj.shape[0]):
                x = args[0].detach()[(args[1] == expert).any(dim=-1)]
                gate, up = (x @ module.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
                held = sums.setdefault((stem, expert), [0, 0])
                sums[stem, expert] = [held[0] + x.T @ x, held[1] + inner.T @ inner]
                tokens[stem, expert] = tokens.get((stem, expert), 0) + len(x)

        return hook

    kind = "mlp" if "Qwen" in type(loaded).__name__ else "block_sparse_moe"
    for name, module in loaded.named_modules():
        if hasattr(module, "gate_up_proj"):
            layer = name.split(".layers.")[1].split(".")[0]
            module.register_forward_pre_hook(listen(f"layers.{layer}.{kind}"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        for sample in load_prompts(str(prompts), tokenizer, ExtractOptions(**EXACT)).samples:
            loaded(torch.tensor([sample.ids]))
    return sums, tokens


def test_experts_that_are_multiplied_unseen_are_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts.ExpertInputs, "_find", lambda self, weight: None)
    with pytest.raises(UnsupportedModelError, match=r"no token was seen to reach the experts of .*--targets"):
        run(checkpoint("qwen3-moe"), prompts, tmp_path / "in.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"group_size": 1}, {"group_size": 8}, {"batch_tokens": 1}, {"layers": (1,)}])
def test_groups_batches_and_layers_do_not_matter(
    changes: dict[str, Any], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    one, _ = run(checkpoint("gemma3"), prompts, tmp_path / "a.safetensors")
    other, _ = run(checkpoint("gemma3"), prompts, tmp_path / "b.safetensors", **changes)
    assert (set(one) if "layers" not in changes else {name for name in one if ".layers.1." in name}) == set(other)
    for name, value in other.items():
        assert_close(value, one[name], 5e-6)


def test_a_whole_one_is_half_a_matrix(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    _, made = run(checkpoint("llama"), prompts, tmp_path / "in.safetensors")
    stored = open_index(tmp_path / "in.safetensors").tensors
    for name, row in made["moments"].items():
        assert stored[name].shape == (row["size"] * (row["size"] + 1) // 2,)
        assert stored[name].dtype == "F32"


@pytest.mark.parametrize("store", ["auto", "fp32"])
def test_a_rank_keeps_the_best_factor_and_says_what_it_costs(
    store: Any, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    whole, _ = run(checkpoint("llama"), prompts, tmp_path / "a.safetensors")
    words = ["extract", checkpoint("llama"), prompts, "-o", tmp_path / "b.safetensors", "--statistics", "inputs"]
    done = cli(*words, "--rank", 12, "--store", store, "--group-size", 2, "--batch-tokens", 40)
    worked(done)
    found, made = read(tmp_path / "b.safetensors")
    code = "F32" if store == "fp32" else "BF16"
    for name, row in made["moments"].items():
        values, vectors = torch.linalg.eigh(whole[name])
        best = (vectors[:, -12:] * values[-12:]) @ vectors[:, -12:].T
        assert_close(found[name], best, 1e-5 if code == "F32" else 5e-3)
        assert row["energy"] == pytest.approx(float(values[-12:].sum() / values.sum()), rel=1e-5)
        assert row["dtype"] == code
        assert row["sketch_rank"] == 12
        assert ("rounding" in row) == (code == "BF16")
        assert 0 < row.get("rounding", 1e-3) < 4e-3
    assert {info.dtype for info in open_index(tmp_path / "b.safetensors").tensors.values()} == {code}
    least = min(row["energy"] for row in made["moments"].values())
    assert f"the least {least:.2%}" in done.stderr
    assert ("bfloat16 takes 0." in done.stderr) == (code == "BF16")


def test_a_rank_above_a_size_keeps_all_of_it(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    whole, _ = run(checkpoint("llama"), prompts, tmp_path / "a.safetensors")
    found, made = run(checkpoint("llama"), prompts, tmp_path / "b.safetensors", rank=32)
    ranks = {row["size"]: row["sketch_rank"] for row in made["moments"].values()}
    assert ranks == {32: None, 48: 32}
    for name, value in found.items():
        if made["moments"][name]["sketch_rank"] is None:
            assert torch.equal(value, whole[name])


def test_sketches_serve_ranks_that_are_small_beside_a_size(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(checkpoint("llama"), prompts, tmp_path / "a.safetensors")
    monkeypatch.setattr(kernel, "SKETCH_RANK", 16)
    assert kernel.sketch_rank(48, 4) == 16
    assert kernel.sketch_rank(48, 12) == 24
    assert kernel.sketch_rank(48, 13) is None
    found, made = run(checkpoint("llama"), prompts, tmp_path / "b.safetensors", rank=4)
    for name, row in made["moments"].items():
        best = torch.linalg.eigvalsh(whole[name])[-4:].sum() / whole[name].trace()
        assert 0.9 * float(best) < row["energy"] <= float(best) * 1.001
        assert found[name].norm() > 0


def test_merge_solves_for_experts(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    base, tuned = checkpoint("qwen3-moe"), pairs.fine_tune(checkpoint("qwen3-moe"), tmp_path / "tuned")
    for name, model in (("old", base), ("new", tuned)):
        run(model, prompts, tmp_path / f"{name}.safetensors")
    files = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    report = fisherkit.merge(base, tuned, tmp_path / "out", MergeOptions(regmean=files))
    solved = {name for name, row in report.tensors.items() if "regmean" in row}
    assert {name for name in pairs.tensors(base) if ".experts." in name} <= solved


def test_merge_takes_them(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    """Factors that leave next to nothing out give what whole ones give."""
    base, tuned = checkpoint("llama"), pairs.fine_tune(checkpoint("llama"), tmp_path / "tuned")
    outs = []
    for rank in (None, 47):
        for name, model in (("old", base), ("new", tuned)):
            run(model, prompts, tmp_path / f"{name}{rank}.safetensors", rank=rank, store="fp32")
        files = tmp_path / f"old{rank}.safetensors", tmp_path / f"new{rank}.safetensors"
        fisherkit.merge(base, tuned, tmp_path / f"out{rank}", MergeOptions(regmean=files))
        outs.append(pairs.tensors(tmp_path / f"out{rank}"))
    ours = pairs.tensors(base)
    names = [name for name in ours if "_proj" in name]
    moved = [torch.cat([(out[name] - ours[name]).flatten() for name in names]).double() for out in outs]
    assert_close(moved[1], moved[0], 1e-2)


@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", {}), ("qwen3-moe", {"rank": 8}), ("llama", {"engine": "resident"})]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    architecture: str, changes: dict[str, Any], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model, settings = checkpoint(architecture), {**EXACT, "statistics": "inputs", "group_size": 1, **changes}
    steps: list[int] = []
    fisherkit.extract(
        model, prompts, tmp_path / "whole.safetensors", ExtractOptions(**settings), track=lambda *step: steps.append(1)
    )
    whole, described = (tmp_path / "whole.safetensors").read_bytes(), read(tmp_path / "whole.safetensors")[1]
    count = len(steps)
    for at in sorted({0, 1, count // 2, 2 * count // 3, count - 1}):
        out = tmp_path / f"{at}.safetensors"
        with pytest.raises(Killed):
            fisherkit.extract(model, prompts, out, ExtractOptions(**settings), track=killed_after(at))
        assert not out.exists()
        fisherkit.extract(model, prompts, out, ExtractOptions(**settings, resume=True))
        assert out.read_bytes() == whole
        assert read(out)[1]["moments"] == described["moments"]
        assert not out.with_name(f"{out.name}.partial").exists()
    again = cli("extract", model, prompts, "-o", tmp_path / "whole.safetensors", "--statistics", "inputs")
    assert "exists already" in one_line(again)


def test_dry_run_knows_the_bytes(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    for rank in (None, 8):
        options = ExtractOptions(**EXACT, statistics="inputs", rank=rank)
        plan = fisherkit.plan_extract(checkpoint("llama"), None, options)
        run(checkpoint("llama"), prompts, tmp_path / f"{rank}.safetensors", rank=rank)
        stored = open_index(tmp_path / f"{rank}.safetensors").tensors.values()
        assert plan["activation_bytes"] == sum(info.nbytes for info in stored)
        assert plan["weight_reads"] == 1
        assert "output_bytes" not in plan


def test_options_that_contradict_each_other_are_refused(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--rank is for --statistics inputs"):
        ExtractOptions(rank=8)
    with pytest.raises(OptionError, match=r"--rank must be at least 1"):
        ExtractOptions(rank=0, statistics="inputs")
    with pytest.raises(OptionError, match=r"leave a whole covariance indefinite"):
        ExtractOptions(store="bf16", statistics="inputs")
    words = ("extract", checkpoint("llama"), prompts, "--statistics", "inputs", "-o")
    assert "covariances are written as .safetensors" in one_line(cli(*words, tmp_path / "in.pt"))
    (tmp_path / "in.json").write_text("{}")
    assert "in.json: exists already" in one_line(cli(*words, tmp_path / "in.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
