"""Second moments of activations are those of a float64 loop, resume to the same bits, and make subspaces that hold."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from kills import Killed, killed_after
from torch import Tensor

import fisherkit
from fisherkit.artefacts.covariance_file import CovarianceFile
from fisherkit.checkpoint.index import open_index
from fisherkit.engine.covariance import hooks, plan, writer
from fisherkit.engine.model.weights import Weights
from fisherkit.errors import OptionError, OutputError, UnsupportedModelError
from fisherkit.kernels import covariance as kernel
from fisherkit.options import ExtractOptions
from fisherkit.prompts.dataset import Sample, load_prompts

Checkpoint = Callable[[str], Path]
EXACT: dict[str, Any] = {"group_size": 2, "batch_tokens": 40, "statistics": "activations"}
FUSED = {"qwen3-moe", "mixtral", "gemma4-moe"}


def options(**changes: Any) -> ExtractOptions:
    return ExtractOptions(**{**EXACT, **changes})


def run(model: Path, prompts: Path, out: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The moments, and the JSON beside them."""
    fisherkit.extract(model, prompts, out, options(**changes))
    beside = out.with_name(f"{out.stem}.activations.json")
    made = json.loads(beside.read_text())
    with CovarianceFile(beside.with_suffix(".safetensors")) as file:
        return {name: torch.from_numpy(file.read(name).values) for name in made["moments"]}, made


def samples_of(model: Path, prompts: Path, **changes: Any) -> list[Sample]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return list(load_prompts(str(prompts), tokenizer, options(**changes)).samples)


def by_weight(found: Mapping[str, Tensor], made: Mapping[str, Any], side: str) -> dict[str, Tensor]:
    rows = made["moments"].items()
    return {tensor: found[name] for name, row in rows if row["side"] == side for tensor in row["tensors"]}


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, name: str = "") -> None:
    error = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("architecture", [*tiny.CONFIGS, *tiny.ODD])
def test_moments_equal_the_float64_loop(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    engine = "stream" if architecture in tiny.CONFIGS else "auto"
    found, made = run(model, prompts, tmp_path / "fisher.safetensors", engine=engine)
    inputs, outputs = oracle.moments(model, samples_of(model, prompts))
    for side, wanted in (("input", inputs), ("output", outputs)):
        ours = by_weight(found, made, side)
        for name, value in ours.items():
            assert torch.equal(value, value.mT)
            assert_close(value, wanted[name], 2e-5, f"{side} of {name}")
        matrices = set(safetensors.torch.load_file(tmp_path / "fisher.safetensors"))
        assert set(ours) == matrices - set(made["left_out"])
    assert bool(made["left_out"]) == (architecture in FUSED)
    assert all("expert" in name or name.endswith((".gate.weight", "router.proj.weight")) for name in made["left_out"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma4-e2b", "qwen3-moe"])
def test_resident_engine_gives_the_same(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    streamed, made = run(checkpoint(architecture), prompts, tmp_path / "a.pt")
    resident, other = run(checkpoint(architecture), prompts, tmp_path / "b.pt", engine="resident")
    assert {name: row["tensors"] for name, row in made["moments"].items()} == {
        name: row["tensors"] for name, row in other["moments"].items()
    }
    for name, value in streamed.items():
        assert_close(value, resident[name].double(), 1e-5, name)


@pytest.mark.parametrize("changes", [{"group_size": 1}, {"group_size": 8}, {"batch_tokens": 1}, {"batch_tokens": 1000}])
def test_groups_batches_and_padding_do_not_matter(
    changes: dict[str, int], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    one, made = run(checkpoint("gemma3"), prompts, tmp_path / "a.pt")
    other, again = run(checkpoint("gemma3"), prompts, tmp_path / "b.pt", **changes)
    assert list(made["moments"]) == list(again["moments"])
    for name, value in one.items():
        assert made["moments"][name]["tokens"] == again["moments"][name]["tokens"]
        assert_close(value, other[name].double(), 5e-6, name)


def test_layers_that_read_the_same_tensor_share_its_moment(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    _, made = run(checkpoint("llama"), prompts, tmp_path / "fisher.pt", layers=(1,))
    prefix = "model.layers.1."
    shared = [
        [name.removeprefix(prefix) for name in row["tensors"]]
        for row in made["moments"].values()
        if row["side"] == "input"
    ]
    assert sorted(map(sorted, shared)) == [
        ["mlp.down_proj.weight"],
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        ["self_attn.k_proj.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight"],
        ["self_attn.o_proj.weight"],
    ]
    assert {row["layer"] for row in made["moments"].values()} == {1}
    assert sum(row["side"] == "output" for row in made["moments"].values()) == 7


def test_the_fisher_is_the_same_with_and_without(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    run(checkpoint("llama"), prompts, tmp_path / "a.safetensors")
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "b.safetensors", options(statistics="fisher"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert not (tmp_path / "b.activations.safetensors").exists()


def test_every_token_counts_once_whatever_the_loss_is_taken_over(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = [{"prompt": "Two plus two?", "completion": " Four."}, {"prompt": "Yes or", "completion": " no."}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, made = run(checkpoint("llama"), path, tmp_path / "fisher.pt", loss="completion")
    samples = samples_of(checkpoint("llama"), path, loss="completion")
    assert {row["tokens"] for row in made["moments"].values()} == {sum(len(sample.ids) for sample in samples)}
    inputs, _ = oracle.moments(checkpoint("llama"), samples)
    for name, value in by_weight(found, made, "input").items():
        assert_close(value, inputs[name], 1e-5, name)
        assert (
            made["moments"][f"{name}.input"]["trace"] == pytest.approx(float(inputs[name].trace()), rel=1e-5)
            if (f"{name}.input" in made["moments"])
            else True
        )


def test_bfloat16_activations_are_added_up_exactly_enough() -> None:
    rows = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0)).bfloat16() * 100
    moment = torch.zeros(40, 40)
    for part in rows.split(700):
        kernel.add_second_moment_(moment, part)
    assert_close(kernel.complete_(moment), rows.double().T @ rows.double(), 1e-6)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1030])
def test_blocks_above_the_diagonal_make_the_whole(size: int) -> None:
    rows = torch.randn(30, size, generator=torch.Generator().manual_seed(size))
    moment = torch.zeros(size, size)
    kernel.add_second_moment_(moment, rows)
    kernel.complete_(moment)
    assert torch.equal(moment, moment.T)
    assert_close(moment, rows.double().T @ rows.double(), 1e-6)


def test_leading_digits_are_those_of_tf32() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    leading = kernel.leading_digits(values)
    assert not (leading.view(torch.int32) & 0x1FFF).any()  # 10 of 23 bits of the mantissa
    assert bool(((values - leading).abs() < values.abs() * 2.0**-10).all())
    assert torch.equal(leading + (values - leading), values)


# Sketches


def decaying(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) * 0.9 ** torch.arange(size)


def sketched(rows: Tensor, rank: int, parts: int) -> Tensor:
    signs = kernel.random_signs(rows.shape[1], rank, torch.device("cpu"))
    sketch = torch.zeros(rows.shape[1], rank)
    for part in rows.split(parts):
        kernel.add_sketch_(sketch, part, signs)
    return kernel.factor_of(sketch, signs)


def test_a_sketch_holds_the_leading_directions() -> None:
    rows = decaying(500, 300)
    exact = rows.double().T @ rows.double()
    factor = sketched(rows, 60, 500)
    values, vectors = torch.linalg.eigh(exact)
    lengths = factor.double().square().sum(0)
    assert bool((lengths.diff() <= 1e-6 * lengths[0]).all())
    torch.testing.assert_close(lengths[:20], values.flip(0)[:20], rtol=1e-2, atol=0)
    found = factor[:, :20].double() / lengths[:20].sqrt()
    torch.testing.assert_close(found.T @ found, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-5)
    top = vectors.flip(1)[:, :20]
    assert float(torch.linalg.matrix_norm(top - found @ (found.T @ top), 2)) < 2e-2
    assert_close(factor @ factor.T, exact, 1e-3)
    assert float(torch.linalg.eigvalsh(exact - (factor @ factor.T).double()).min()) > -1e-4 * float(values[-1])


@pytest.mark.parametrize("parts", [1, 7, 500])
def test_a_sketch_does_not_depend_on_batches(parts: int) -> None:
    rows = decaying(500, 100)
    one, other = sketched(rows, 30, 500), sketched(rows.flip(0), 30, parts)
    assert_close(other @ other.T, (one @ one.T).double(), 1e-4)


@pytest.mark.parametrize("rows", [torch.zeros(5, 50), torch.ones(1, 50), decaying(3, 50)])
def test_a_sketch_of_less_than_its_rank_is_exact(rows: Tensor) -> None:
    factor = sketched(rows, 20, 5)
    assert bool(factor.isfinite().all())
    assert_close(factor @ factor.T, rows.double().T @ rows.double(), 1e-4)


def test_large_moments_are_sketched_and_say_what_they_hold(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(checkpoint("llama"), prompts, tmp_path / "a.pt")
    monkeypatch.setattr(kernel, "SKETCH_ABOVE", 40)
    monkeypatch.setattr(kernel, "SKETCH_RANK", 24)
    for engine in ("stream", "resident"):
        found, made = run(checkpoint("llama"), prompts, tmp_path / f"{engine}.pt", engine=engine)
        for name, row in made["moments"].items():
            if row["size"] <= 40:
                assert row["sketch_rank"] is None
                continue
            assert row["sketch_rank"] == 24
            assert found[name].shape == (48, 24)
            assert row["trace"] == pytest.approx(float(whole[name].trace()), rel=1e-5)
            held = float(found[name].double().square().sum()) / row["trace"]
            assert row["energy"] == pytest.approx(held, rel=1e-5)
            assert 0.8 < row["energy"] <= 1


# Files, plans and faults


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("gemma4-e2b", {"group_size": 1}), ("qwen3-moe", {}), ("llama", {"engine": "resident"})],
)
def test_resumed_run_gives_the_bits_of_an_undisturbed_one(
    architecture: str, changes: dict[str, Any], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model, settings = checkpoint(architecture), {**EXACT, **changes}
    done: list[int] = []
    fisherkit.extract(
        model, prompts, tmp_path / "whole.safetensors", ExtractOptions(**settings), track=lambda *step: done.append(1)
    )
    steps = len(done)
    names = ("whole.safetensors", "whole.activations.safetensors")
    whole = [(tmp_path / name).read_bytes() for name in names]
    described = json.loads((tmp_path / "whole.activations.json").read_text())["moments"]
    for at in sorted({0, 1, steps // 3, steps // 2, 2 * steps // 3, steps - 2, steps - 1}):
        out = tmp_path / f"killed-{at}" / "whole.safetensors"
        out.parent.mkdir()
        with pytest.raises(Killed):
            fisherkit.extract(model, prompts, out, ExtractOptions(**settings), track=killed_after(at))
        assert [path.name for path in out.parent.iterdir()] == ["whole.safetensors.partial"]
        fisherkit.extract(model, prompts, out, ExtractOptions(**settings, resume=True))
        assert [out.with_name(name).read_bytes() for name in names] == whole, f"killed after {at} of {steps} steps"
        assert json.loads((out.parent / "whole.activations.json").read_text())["moments"] == described
        assert not out.with_name(f"{out.name}.partial").exists()


def test_other_files_in_the_way_are_not_replaced(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "fisher.activations.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"fisher\.activations\.safetensors: exists already"):
        run(checkpoint("llama"), prompts, tmp_path / "fisher.pt")
    (tmp_path / "fisher.activations.json").write_text("[]")
    with pytest.raises(OutputError, match=r"fisher\.activations\.json: exists already"):
        run(checkpoint("llama"), prompts, tmp_path / "fisher.pt", force=True)
    assert not (tmp_path / "fisher.pt").exists()


@pytest.mark.parametrize(
    ("architecture", "known"), [("llama", True), ("gpt2", True), ("gemma4-31b", True), ("mixtral", False)]
)
def test_dry_run_knows_the_bytes(
    architecture: str, known: bool, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    plan = fisherkit.plan_extract(checkpoint(architecture), None, options())
    plain = fisherkit.plan_extract(checkpoint(architecture), None, options(statistics="fisher"))
    run(checkpoint(architecture), prompts, tmp_path / "fisher.pt")
    nbytes = sum(info.nbytes for info in open_index(tmp_path / "fisher.activations.safetensors").tensors.values())
    assert plan["activation_bytes"] == nbytes if known else plan["activation_bytes"] > nbytes
    assert ("activation_bytes_at_most" in plan) != known
    assert plan["peak_bytes"]["host"] > plain["peak_bytes"]["host"]
    assert "activation_bytes" not in plain


def test_targets_without_linear_layers_are_refused(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"targets.*linear layer"):
        run(checkpoint("llama"), prompts, tmp_path / "fisher.pt", targets="norm")


@pytest.mark.parametrize("statistics", ["activations", "inputs"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma4-e2b", *tiny.ODD])
def test_a_model_on_meta_shares_the_inputs_that_a_batch_shows(
    architecture: str,
    statistics: str,
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def files(name: str) -> list[bytes]:
        out = tmp_path / name / "out.safetensors"
        out.parent.mkdir()
        fisherkit.extract(checkpoint(architecture), prompts, out, options(statistics=statistics))
        return [file.read_bytes() for file in sorted(out.parent.glob("*.safetensors"))]

    found: list[Any] = []
    monkeypatch.setattr(writer, "probe_on_meta", lambda *its: found.append(plan.probe_on_meta(*its)) or found[-1])
    known = files("known")
    assert (found[0] is None) == (architecture == "phi3-longrope")  # which looks at the numbers of positions
    monkeypatch.setattr(writer, "probe_on_meta", lambda *_: None)
    assert files("observed") == known


@pytest.mark.parametrize(("known", "reads"), [(True, 1), (False, 2)])
def test_inputs_take_one_read_of_the_weights(
    known: bool, reads: int, checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read = Weights._fetch, list[tuple[int, ...]]()

    def fetch(weights: Weights, group: tuple[int, ...]) -> Any:
        read.append(group)
        return plain(weights, group)

    monkeypatch.setattr(Weights, "_fetch", fetch)
    if not known:
        monkeypatch.setattr(writer, "probe_on_meta", lambda *_: None)
    changes: dict[str, Any] = {"statistics": "inputs", "group_size": 1}
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "inputs.safetensors", options(**changes))
    assert {group: read.count(group) for group in read if group[0]} == {(1,): reads, (2,): reads}


@pytest.mark.parametrize("statistics", ["activations", "inputs"])
def test_a_single_group_whose_layers_flatten_their_input_takes_samples_one_by_one(
    statistics: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"statistics": statistics, "targets": "fc[12]", "group_size": 3}
    made = []
    for batch_tokens in (1000, 1):
        out = tmp_path / f"{batch_tokens}.safetensors"
        fisherkit.extract(checkpoint("opt"), prompts, out, options(**changes, batch_tokens=batch_tokens))
        moments = out if statistics == "inputs" else out.with_name(f"{out.stem}.activations.safetensors")
        made.append(safetensors.torch.load_file(moments))
    assert made[0].keys() == made[1].keys()
    for name, value in made[0].items():
        assert_close(value, made[1][name].double(), 1e-5, name)


def test_inputs_that_are_shared_only_sometimes_are_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plan.SharedInputProbe.__exit__

    def lie(probe: plan.SharedInputProbe, *error: Any) -> None:
        plain(probe, *error)
        probe.shared_inputs.update(
            {name: name.replace("o_proj", "q_proj") for name in probe.shared_inputs if "o_proj" in name}
        )

    monkeypatch.setattr(plan.SharedInputProbe, "__exit__", lie)
    with pytest.raises(UnsupportedModelError, match=r"o_proj.*same tensor.*different"):
        run(checkpoint("llama"), prompts, tmp_path / "fisher.pt")


def test_overflow_is_an_error_that_names_the_layer() -> None:
    one = plan.Covariance("x.input", "input", ("x",), ("x",), 0, 2, None)
    accumulator = hooks.Accumulator(one, torch.device("cpu"), None)
    accumulator.add(torch.tensor([[1e30, 1e30]]))
    with pytest.raises(fisherkit.FisherkitError, match=r"x\.input.*not finite"):
        accumulator.finish()
