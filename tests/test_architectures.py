"""What the model brings is measured right, block by block or whole, or is refused by name; never silently wrong."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import oracle
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

import fisherkit
from fisherkit.engine.model.buffers import compute_buffers
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.model.findings import AttendsAhead, NeedsBatchSizeOne
from fisherkit.engine.sweep.causality import check_causality
from fisherkit.errors import OptionError, UnsupportedModelError
from fisherkit.prompts.dataset import Sample, load_prompts

SAMPLE = {
    "bamba": "stream",  # blocks return tuples of two
    "blt": "resident",  # six stacks of blocks
    "dbrx": "stream",  # a router whose gradient is rounding
    "falcon_h1": "stream",  # a buffer filled by a model that does not own it
    "gemma3n": "stream",  # hidden states with an axis in front; a tower whose library is not needed
    "hrm_text": "resident",  # two stacks, and tensors that are split into several parameters
    "idefics3": "stream",  # asks for model.device
    "inkling_mm_model": "stream",  # tensors in another order on disk, of the same shape
    "longcat_flash": "stream",  # counts its layers twice
    "mllama": "stream",  # blocks that are skipped where there is no picture
    "modernbert-decoder": "stream",  # calls its head decoder
    "paligemma": "stream",  # attends to both sides without token types
    "rwkv": "stream",  # blocks take what the one before returned
    "xlstm": "stream",
    "zamba": "resident",  # blocks share weights
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_fisher_of_a_small_model_equals_the_slow_loop(model_type: str, tmp_path: Path) -> None:
    row = architectures.measure(model_type, tmp_path)
    assert row.outcome == SAMPLE[model_type], row
    assert row.difference is not None
    assert row.difference < architectures.WRONG_FROM


@pytest.mark.parametrize(
    ("model_type", "subject"),
    [
        ("blip", "pixel_values"),
        ("pi0", "state"),
        ("cpmant", "cpmant lets tokens see"),
        ("xlnet", "xlnet lets tokens see"),
    ],
)
def test_models_that_need_more_than_tokens_are_refused_by_name(model_type: str, subject: str, tmp_path: Path) -> None:
    row = architectures.measure(model_type, tmp_path)
    assert row.outcome == "refused"
    assert subject in row.reason


def extract(folder: Path, **changes: Any) -> tuple[Any, list[str]]:
    """Measure folder/model on five prompts; the report and what was said."""
    said: list[str] = []
    prompts = tiny.write_prompts(folder / "prompts.jsonl")
    options = dataclasses.replace(architectures.OPTIONS, force=True, **changes)
    report = fisherkit.extract(folder / "model", prompts, folder / "fisher.pt", options, say=said.append)
    return report, said


def test_falling_back_is_said_with_the_reason(tmp_path: Path) -> None:
    architectures.make_checkpoint("hrm_text", tmp_path / "model")
    report, said = extract(tmp_path)
    assert report.provenance["run"]["reason"] == "its blocks lie in 2 lists"
    assert any("whole model" in line and "2 lists" in line for line in said)
    with pytest.raises(UnsupportedModelError, match="2 lists"):
        extract(tmp_path, engine="stream")


def test_weights_that_blocks_share_are_measured_once(tmp_path: Path) -> None:
    architectures.make_checkpoint("zamba", tmp_path / "model")
    extract(tmp_path)
    found = torch.load(tmp_path / "fisher.pt")
    held = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(found) <= set(held)
    assert [name for name in found if "shared_transf" in name]


# Buffers that no checkpoint holds


def test_a_buffer_that_nothing_computes_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures.make_checkpoint("falcon_h1", tmp_path / "model")
    base = transformers.models.falcon_h1.modeling_falcon_h1.FalconH1PreTrainedModel
    monkeypatch.setattr(base, "_init_weights", transformers.PreTrainedModel._init_weights)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mamba\.mup_vector"):
        extract(tmp_path)


class Buffered(nn.Module):
    """A model with one buffer, filled up to its last entry."""

    def __init__(self, dtype: torch.dtype, filled: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(4, dtype=dtype, device="meta"), persistent=False)
        self.filled = filled

    def _init_weights(self, module: nn.Module) -> None:
        self.mask[: self.filled] = 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_one_entry_that_is_left_out_is_noticed_in_any_dtype(dtype: torch.dtype) -> None:
    whole = Buffered(dtype, 4)
    compute_buffers(whole, None, lambda name: True)
    assert whole.mask.tolist() == [1, 1, 1, 1]
    with pytest.raises(UnsupportedModelError, match="buffer mask"):
        compute_buffers(Buffered(dtype, 3), None, lambda name: True)
    compute_buffers(Buffered(dtype, 3), None, lambda name: False)  # of a tower that never runs


def test_buffers_that_an_older_checkpoint_lacks_are_computed(tmp_path: Path) -> None:
    model = Buffered(torch.float32, 4)
    model._non_persistent_buffers_set.clear()
    compute_buffers(model, frozenset(), lambda name: True)
    assert model.mask.tolist() == [1, 1, 1, 1]
    held = Buffered(torch.float32, 4)
    held._non_persistent_buffers_set.clear()
    compute_buffers(held, frozenset({"mask"}), lambda name: True)
    assert held.mask.is_meta


# What follows a token must not matter


def job(batches: list[list[int]]) -> Any:
    samples = [Sample(0, tuple(range(12)), (False, *[True] * 11)), Sample(1, (3, 1, 4), (False, True, True))]
    return SimpleNamespace(
        samples=samples,
        batches=batches,
        device=torch.device("cpu"),
        skeleton=SimpleNamespace(dtype=torch.float32),
        arguments=lambda ids, starts: {"input_ids": ids},
    )


def causal(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["input_ids"].float().cumsum(1)[..., None]


def test_causal_models_pass_the_probe() -> None:
    check_causality(job([[0, 1]]), causal)


def test_seeing_later_tokens_is_noticed() -> None:
    with pytest.raises(AttendsAhead):
        check_causality(job([[0], [1]]), lambda inputs: causal(inputs) + inputs["input_ids"].float().sum())


def test_padding_that_matters_leads_to_batches_of_one() -> None:
    def by_length(inputs: dict[str, Tensor]) -> Tensor:
        return causal(inputs) + inputs["input_ids"].shape[1]

    with pytest.raises(NeedsBatchSizeOne):
        check_causality(job([[0, 1]]), by_length)
    check_causality(job([[0], [1]]), by_length)


@pytest.mark.parametrize("engine", ["auto", "resident"])
def test_an_encoder_that_sees_both_sides_is_refused(engine: str, tmp_path: Path) -> None:
    architectures.make_checkpoint("bert", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"is_decoder": False}))
    with pytest.raises(UnsupportedModelError, match="bert lets tokens see the ones after them"):
        extract(tmp_path, engine=engine)


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_a_prefix_is_read_to_both_sides_and_an_answer_is_not(batch_tokens: int, tmp_path: Path) -> None:
    architectures.make_checkpoint("paligemma", tmp_path / "model")
    rows = [{"prompt": "What is two plus two?", "completion": " Four."}, {"prompt": "Yes", "completion": " no, no"}]
    prompts = tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    options = dataclasses.replace(architectures.OPTIONS, batch_tokens=batch_tokens)
    fisherkit.extract(tmp_path / "model", prompts, tmp_path / "fisher.pt", options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    samples = load_prompts(str(prompts), tokenizer, options).samples
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    wanted = oracle.fisher_of(model, samples, token_types=True)
    for name, value in torch.load(tmp_path / "fisher.pt").items():
        assert float((value - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()), name


@pytest.mark.parametrize("device", ["mps", "xpu", "xpu:0", "meta"])
def test_devices_that_are_not_here_or_hold_nothing_are_refused(device: str) -> None:
    with pytest.raises(OptionError, match=f"--device {device}: not available here .*; use cpu, or auto"):
        choose_device(device)
