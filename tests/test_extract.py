"""The streamed Fisher is that of the slow obvious loop, whatever the architecture, grouping, batching or file."""

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
from torch import Tensor

import fisherkit
from fisherkit.engine.fisher import squared_gradients
from fisherkit.engine.sweep import sweep
from fisherkit.errors import CheckpointError, FisherkitError, OptionError, UnsupportedModelError
from fisherkit.options import ExtractOptions
from fisherkit.prompts.dataset import load_prompts

Checkpoint = Callable[[str], Path]
EXACT: dict[str, Any] = {"store": "fp32", "group_size": 2, "batch_tokens": 40}


def options(**changes: Any) -> ExtractOptions:
    return ExtractOptions(**{**EXACT, **changes})


def run(model: Path, prompts: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    fisherkit.extract(model, prompts, out, options(**changes))
    return torch.load(out)  # plainly, as a user would


def expected(model: Path, prompts: Path, reduction: str = "mean", **changes: Any) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return oracle.fisher(model, load_prompts(str(prompts), tokenizer, options(**changes)).samples, reduction)


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, value in found.items():
        error = (value - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def matrices(architecture: str, folder: Path) -> set[str]:
    """Checkpoint tensors of two or more axes in the text model's blocks, from the disk names alone."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {}
    for shard in set(index.values()):
        kept.update(safetensors.torch.load_file(folder / shard))
    towers = ("vision", "embed_vision")
    return {
        name
        for name, tensor in kept.items()
        if tensor.ndim >= 2 and any(part.isdigit() for part in name.split(".")) and not any(t in name for t in towers)
    }


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_streamed_fisher_equals_the_float64_loop(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    found = run(model, prompts, tmp_path / "fisher.pt", engine="stream")
    assert set(found) == matrices(architecture, model)
    assert all(value.dtype == torch.float32 and value.any() for value in found.values())
    assert_close(found, expected(model, prompts))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gemma4-e2b", "gemma4-31b", "qwen3-moe"])
def test_every_parameter_of_the_text_model_can_be_measured(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    found = run(model, prompts, tmp_path / "fisher.pt", targets="all", engine="stream")
    wanted = expected(model, prompts)
    assert set(found) == {name for name in wanted if "vision" not in name}
    assert_close(found, wanted)


@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral", "gemma4-e2b", "gpt2"])
def test_resident_engine_gives_the_same(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    streamed = run(model, prompts, tmp_path / "a.pt", targets="all")
    resident = run(model, prompts, tmp_path / "b.pt", targets="all", engine="resident")
    assert streamed.keys() == resident.keys()
    assert_close(streamed, resident, 3e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma4-e2b"])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_group_size_does_not_matter(
    architecture: str, group_size: int, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    one = run(model, prompts, tmp_path / "a.pt")
    other = run(model, prompts, tmp_path / "b.pt", group_size=group_size)
    assert_close(one, other, 1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_batch_size_and_padding_do_not_matter(
    architecture: str, batch_tokens: int, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    one = run(model, prompts, tmp_path / "a.pt")
    other = run(model, prompts, tmp_path / "b.pt", batch_tokens=batch_tokens)
    assert_close(one, other, 5e-6)


def test_pt_safetensors_and_folder_hold_the_same(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("llama")
    flat = run(model, prompts, tmp_path / "fisher.pt")
    fisherkit.extract(model, prompts, tmp_path / "single.safetensors", options())
    report = fisherkit.extract(model, prompts, tmp_path / "folder", options(shard_bytes=20_000))
    shards: dict[str, Tensor] = {}
    for file in report.files:
        if file.suffix == ".safetensors":
            shards.update(safetensors.torch.load_file(file))
    for other in (safetensors.torch.load_file(tmp_path / "single.safetensors"), shards):
        assert other.keys() == flat.keys()
        assert all(torch.equal(other[name], flat[name]) for name in flat)


def test_sum_over_tokens_instead_of_their_mean(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("llama")
    found = run(model, prompts, tmp_path / "fisher.pt", reduction="sum")
    assert_close(found, expected(model, prompts, "sum"))


def test_only_tokens_of_the_answer_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = [{"prompt": "What is two plus two?", "completion": " Four."}, {"prompt": "Yes", "completion": " no, no"}]
    prompts = tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    model = checkpoint("llama")
    found = run(model, prompts, tmp_path / "a.pt")
    assert_close(found, expected(model, prompts))
    whole = run(model, prompts, tmp_path / "b.pt", loss="all")
    assert not torch.allclose(found["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.up_proj.weight"])


def test_stored_bf16_is_the_rounded_fp32(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("llama")
    exact = run(model, prompts, tmp_path / "a.pt")
    stored = run(model, prompts, tmp_path / "b.pt", store="bf16")
    assert all(torch.equal(stored[name], exact[name].bfloat16()) for name in exact)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2", "gpt2"])
def test_bf16_checkpoints_are_computed_in_bf16_with_float32_sums(
    architecture: str, prompts: Path, tmp_path: Path
) -> None:
    model = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16)
    report = fisherkit.extract(model, prompts, tmp_path / "fisher.pt", options(dtype="bfloat16"))
    assert report.provenance["run"]["dtype"] == "bfloat16"
    wanted = expected(model, prompts)
    for name, value in torch.load(tmp_path / "fisher.pt").items():
        assert torch.cosine_similarity(value.flatten(), wanted[name].flatten().float(), dim=0) > 0.98, name
    exact = run(model, prompts, tmp_path / "exact.pt", dtype="float32")
    assert_close(exact, wanted)


def test_sampled_labels_depend_on_the_seed_alone(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model, name = checkpoint("llama"), "model.layers.1.mlp.up_proj.weight"
    one = run(model, prompts, tmp_path / "a.pt", labels="sampled", seed=7)
    same = run(model, prompts, tmp_path / "b.pt", labels="sampled", seed=7, batch_tokens=1, group_size=1)
    other = run(model, prompts, tmp_path / "c.pt", labels="sampled", seed=8)
    data = run(model, prompts, tmp_path / "d.pt")
    assert_close(one, same, 2e-6)
    assert not torch.allclose(one[name], other[name])
    assert not torch.allclose(one[name], data[name])


def test_layers_and_patterns_choose_tensors(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("llama")
    whole = run(model, prompts, tmp_path / "all.pt", targets="all")
    layers = run(model, prompts, tmp_path / "layers.pt", layers=(1,))
    assert set(layers) == {name for name in matrices("llama", model) if ".layers.1." in name}
    pattern = run(model, prompts, tmp_path / "pattern.pt", targets=r"q_proj|embed|norm\.weight$")
    assert "model.embed_tokens.weight" in pattern
    assert "model.layers.2.self_attn.q_proj.weight" in pattern
    assert not any("k_proj" in name for name in pattern)
    assert_close({**layers, **pattern}, whole, 3e-6)


def test_unknown_layers_and_patterns_without_a_match_are_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="has 3 layers, 0 to 2"):
        run(checkpoint("llama"), prompts, tmp_path / "a.pt", layers=(0, 3))
    with pytest.raises(OptionError, match=r"no tensor.*matches"):
        run(checkpoint("llama"), prompts, tmp_path / "a.pt", targets="nothing_like_it")


def test_sidecar_sums_are_those_of_the_tensors(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("llama")
    found = run(model, prompts, tmp_path / "fisher.pt")
    sidecar = json.loads((tmp_path / "fisher.json").read_text())
    layers = json.loads((tmp_path / "layer_importance.json").read_text())
    for name, value in found.items():
        assert sidecar["tensors"][name]["sum"] == pytest.approx(float(value.double().sum()), rel=1e-12)
        assert sidecar["tensors"][name]["max"] == float(value.max())
    total = sum(float(value.double().sum()) for value in found.values())
    assert layers["total"] == pytest.approx(total, rel=1e-12)
    assert [row["name"] for row in layers["layers"]] == [f"model.layers.{n}" for n in range(3)]
    assert sum(row["share"] for row in layers["layers"]) == pytest.approx(1.0)
    assert sidecar["file_bytes"] == (tmp_path / "fisher.pt").stat().st_size
    assert sidecar["prompts"]["samples"] == 5
    assert sidecar["run"]["engine"] == "stream"


def test_a_second_fisher_does_not_touch_the_first_ones_files(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    run(model, prompts, tmp_path / "fisher.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(model, prompts, tmp_path / "other.pt", reduction="sum")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "other.layer_importance.json").is_file()


def test_an_existing_sidecar_name_is_not_overwritten(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(FisherkitError, match=r"prompts\.json: exists already"):
        run(checkpoint("llama"), prompts, tmp_path / "prompts.pt")
    assert (tmp_path / "prompts.json").read_text() == "[]"


def test_gpt2_as_it_lies_on_the_hub_without_its_prefix(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    tensors = {}
    for shard in checkpoint("gpt2").glob("*.safetensors"):
        tensors.update(safetensors.torch.load_file(shard))
    model = tmp_path / "model"
    model.mkdir()
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    safetensors.torch.save_file(bare, model / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((checkpoint("gpt2") / name).read_bytes())
    found = run(model, prompts, tmp_path / "fisher.pt")
    wanted = expected(checkpoint("gpt2"), prompts)
    assert set(found) <= set(bare)
    assert_close({f"transformer.{name}": value for name, value in found.items()}, wanted)


# Where streaming cannot be trusted


def test_a_replay_that_disagrees_with_autograd_is_noticed(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = squared_gradients.add_squared_linear_grads_

    def doubled(*args: Any) -> None:
        plain(*args)
        plain(*args)

    monkeypatch.setattr(squared_gradients, "add_squared_linear_grads_", doubled)
    with pytest.raises(UnsupportedModelError, match=r"another Fisher.*autograd"):
        run(checkpoint("llama"), prompts, tmp_path / "a.pt", engine="stream")
    report = fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "b.pt", options())
    assert report.provenance["run"]["engine"] == "resident"
    assert "another Fisher than plain autograd" in report.provenance["run"]["reason"]
    assert_close(torch.load(tmp_path / "b.pt"), expected(checkpoint("llama"), prompts))


BETWEEN = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
import torch

class BetweenConfig(LlamaConfig):
    model_type = "between"

class BetweenModel(LlamaModel):
    config_class = BetweenConfig
    def forward(self, input_ids=None, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            out = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
            hidden = {step}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

class BetweenForCausalLM(LlamaForCausalLM):
    config_class = BetweenConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = BetweenModel(config)
        self.post_init()
"""


@pytest.mark.parametrize(("step", "engine"), [("out * 1.5", "resident"), ("out", "stream")])
def test_remote_code_runs_when_trusted_and_falls_back_where_blocks_do_not_follow_each_other(
    step: str, engine: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "modeling_between.py").write_text(BETWEEN.replace("{step}", step))
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "between",
        "architectures": ["BetweenForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_between.BetweenConfig",
            "AutoModelForCausalLM": "modeling_between.BetweenForCausalLM",
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(FisherkitError, match="trust-remote-code"):
        run(model, prompts, tmp_path / "fisher.pt")
    report = fisherkit.extract(model, prompts, tmp_path / "fisher.pt", options(trust_remote_code=True))
    assert report.provenance["run"]["engine"] == engine
    if engine == "stream":
        assert_close(torch.load(tmp_path / "fisher.pt"), expected(checkpoint("llama"), prompts))


# What is refused


def test_encoder_decoders_are_refused_by_name(tmp_path: Path, prompts: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder"):
        fisherkit.plan_extract(tmp_path / "t5", None)


def test_quantised_checkpoints_are_refused_with_the_way_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModelError, match=r"quantised.*dequantise"):
        fisherkit.plan_extract(tmp_path, None)


def damaged(checkpoint: Checkpoint, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the small Llama in one file, its tensors changed."""
    tensors: dict[str, Tensor] = {}
    for shard in checkpoint("llama").glob("*.safetensors"):
        tensors.update(safetensors.torch.load_file(shard))
    change(tensors)
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint("llama") / name).read_bytes())
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_reported_by_name(
    value: float, name: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    model = damaged(checkpoint, tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=rf"{name}.*1 weights.*NaN"):
        run(model, prompts, tmp_path / "fisher.pt")
    assert not (tmp_path / "fisher.pt").exists()


def test_missing_and_misshapen_tensors_are_reported_by_name(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"
    missing = damaged(checkpoint, tmp_path / "missing", lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"no tensor.*{name}"):
        run(missing, prompts, tmp_path / "fisher.pt")

    def reshape(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:8].clone()

    with pytest.raises(CheckpointError, match=rf"{name}.*\[8, 32\].*config.json.*\[16, 32\]"):
        run(damaged(checkpoint, tmp_path / "reshaped", reshape), prompts, tmp_path / "fisher.pt")


def test_a_tokenizer_of_another_model_is_noticed(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:20].clone()

    model = damaged(checkpoint, tmp_path / "model", change)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(CheckpointError, match=r"embeds only 20.*tokenizer"):
        run(model, prompts, tmp_path / "fisher.pt")


def test_samples_longer_than_the_model_has_positions_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    prompts = tiny.write_prompts(tmp_path / "long.jsonl", ["river " * 60])
    with pytest.raises(OptionError, match=r"64 positions.*--max-length 64"):
        run(checkpoint("gpt2"), prompts, tmp_path / "fisher.pt")
    run(checkpoint("gpt2"), prompts, tmp_path / "fisher.pt", max_length=64)


def test_a_model_that_fits_neither_way_is_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisherkit.engine.model.residence.shared_between_blocks", lambda blocks: "the weight")
    monkeypatch.setattr("fisherkit.methods.extract.engines.available_bytes", lambda device: 1000)
    with pytest.raises(UnsupportedModelError, match=r"cannot be streamed.*blocks share"):
        run(checkpoint("llama"), prompts, tmp_path / "fisher.pt")


def test_tied_weights_that_differ_are_refused(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = damaged(checkpoint, tmp_path / "model", lambda tensors: None)  # untied, so its head is another matrix
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"tied by config.json.*differ"):
        run(model, prompts, tmp_path / "fisher.pt")


def test_an_overflowing_loss_names_the_row(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"].mul_(1e38)

    model = damaged(checkpoint, tmp_path / "model", change)
    with pytest.raises(FisherkitError, match=r"row \d: .*(nan|inf)"):
        run(model, prompts, tmp_path / "fisher.pt")


def test_the_outcome_does_not_depend_on_the_size_of_the_memory_budget(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("gemma4-e2b")
    one = run(model, prompts, tmp_path / "a.pt")
    monkeypatch.setattr(
        "fisherkit.engine.sweep.spool.Budget.take", lambda self, count: False
    )  # everything from the disk
    other = run(model, prompts, tmp_path / "b.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_engine_asks_for_memory_of_one_group_only(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    plain = sweep.run_blocks

    def watched(skeleton: Any, blocks: Any, *args: Any) -> Any:
        loaded = [n for n, b in enumerate(skeleton.blocks) if not next(b.parameters()).is_meta]
        held.append(len(loaded))
        assert set(blocks) <= set(loaded)
        return plain(skeleton, blocks, *args)

    monkeypatch.setattr(sweep, "run_blocks", watched)
    run(checkpoint("gemma3"), prompts, tmp_path / "fisher.pt", group_size=1)
    assert set(held) == {1}
