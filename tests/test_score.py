"""Scores are those of transformers, sample by sample, whatever the architecture, and however a model is cut up."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import score_oracle
import tiny
import torch
from peft_adapters import LINEAR, merged, train

import fisherkit
from fisherkit.artefacts.score_samples import read_samples
from fisherkit.errors import UnsupportedModelError
from fisherkit.methods.score import run
from fisherkit.methods.score.report import ScoreReport
from fisherkit.options import ExtractOptions, ScoreOptions
from fisherkit.prompts.dataset import Sample, load_prompts
from fisherkit.prompts.tokenizer import load_tokenizer

Checkpoint = Callable[[str], Path]
OPTIONS = {"group_size": 2, "batch_tokens": 40, "dtype": "float32"}
CLOSE = 1e-5


def samples_of(folder: Path, prompts: Path, **options: Any) -> tuple[Sample, ...]:
    return load_prompts(prompts, load_tokenizer(folder), ScoreOptions(**options)).samples


def scored(
    models: Sequence[Path], prompts: Any, tmp_path: Path, **options: Any
) -> tuple[ScoreReport, list[dict[str, Any]]]:
    """A report, and the rows of samples beside it."""
    out = tmp_path / "samples.jsonl"
    report = fisherkit.score(models, prompts, ScoreOptions(**{**OPTIONS, "force": True, **options}), samples=out)
    return report, read_samples(out)


def same_figures(one: ScoreReport, other: ScoreReport, tolerance: float = CLOSE) -> bool:
    """Whether two reports say the same of the same sets, but for rounding."""
    rows = [list(report.records()) for report in (one, other)]
    for a, b in zip(*rows, strict=True):
        for key in a.keys() - {"checkpoint"}:
            if isinstance(a[key], float) and isinstance(b[key], float):
                if not math.isclose(a[key], b[key], rel_tol=tolerance, abs_tol=tolerance):
                    return False
            elif a[key] != b[key]:
                return False
    return True


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_every_architecture_gives_the_loss_and_the_divergence_that_transformers_gives(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    models = [checkpoint(architecture), tiny.save(architecture, tmp_path / "other", seed=1)]
    report, rows = scored(models, {"set": prompts}, tmp_path)
    assert [one.engine for one in report.checkpoints] == ["stream", "stream"]
    samples, loaded = samples_of(models[0], prompts), [score_oracle.load(folder) for folder in models]
    assert len(rows) == 2 * len(samples)
    for row in rows:
        model = loaded[row["checkpoint"] != str(models[0])]
        wanted = score_oracle.figures(loaded[0], model, samples[row["row"] - 1])
        assert row["loss"] == pytest.approx(wanted.loss, abs=CLOSE)
        assert (row["accuracy"], row["exact"]) == (pytest.approx(wanted.accuracy), wanted.exact)
        if model is loaded[1]:
            assert row["kl"] == pytest.approx(wanted.kl, abs=CLOSE)
            assert row["agreement"] == pytest.approx(wanted.agreement)
            first = score_oracle.loss(loaded[0], samples[row["row"] - 1])
            assert row["difference"] == pytest.approx(wanted.loss - first, abs=2 * CLOSE)


def test_the_loss_of_a_set_is_that_of_its_tokens(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    report, rows = scored([folder], {"set": prompts}, tmp_path)
    (found,) = report.checkpoints[0].sets.values()
    samples = samples_of(folder, prompts)
    wanted = score_oracle.token_mean([row["loss"] for row in rows], samples)
    assert found.loss == pytest.approx(wanted)
    assert found.perplexity == pytest.approx(math.exp(wanted))
    assert (found.samples, found.tokens) == (len(samples), sum(sample.loss_tokens for sample in samples))
    assert found.change is None
    # In a plain prompt all but the first token count, and the tokenizer puts none of its own before them.
    tokenizer = load_tokenizer(folder)
    text = sum(len(tokenizer.decode(sample.ids[1:]).encode()) for sample in samples)
    assert found.bits_per_byte == pytest.approx(wanted * found.tokens / math.log(2) / text)


def test_an_adapter_scores_as_the_model_that_peft_merges(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=LINEAR)
    merged(base, adapter, tmp_path / "merged")
    load_tokenizer(base).save_pretrained(tmp_path / "merged")
    on_the_fly, _ = scored([base, adapter], {"set": prompts}, tmp_path)
    whole, _ = scored([base, tmp_path / "merged"], {"set": prompts}, tmp_path)
    assert same_figures(on_the_fly, whole)
    assert on_the_fly.checkpoints[1].sets["set"].change.difference != 0
    alone = fisherkit.score(adapter, {"set": prompts}, ScoreOptions(**OPTIONS), base=base)
    assert alone.checkpoints[0].sets["set"].loss == on_the_fly.checkpoints[1].sets["set"].loss


def test_a_sparse_delta_scores_as_the_model_that_fapm_writes(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    base, tuned = checkpoint("llama"), tiny.save("llama", tmp_path / "tuned", seed=1)
    whole, delta = tmp_path / "whole", tmp_path / "delta.safetensors"
    fisherkit.fapm(base, tuned, whole, fisherkit.FapmOptions(sparsity=0.5), sparse=delta)
    found = [fisherkit.score([base, one], {"set": prompts}, ScoreOptions(**OPTIONS)) for one in (whole, delta)]
    assert same_figures(*found, tolerance=0.0)


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma4-e2b", "qwen3-moe", "gpt2"])
def test_how_a_model_is_cut_up_makes_no_difference(
    architecture: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    models = [checkpoint(architecture), tiny.save(architecture, tmp_path / "other", seed=1)]
    reports = [
        scored(models, {"set": prompts}, tmp_path, group_size=group, batch_tokens=tokens, engine=engine)[0]
        for group, tokens, engine in itertools.product((1, 8), (1, 10_000), ("stream",))
    ]
    reports.append(scored(models, {"set": prompts}, tmp_path, engine="resident")[0])
    assert reports[-1].checkpoints[0].engine == "resident"
    assert all(same_figures(reports[0], other) for other in reports[1:])


def test_a_model_scores_the_same_whoever_is_scored_beside_it(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    llama, qwen = checkpoint("llama"), checkpoint("qwen3")
    other = tiny.save("llama", tmp_path / "other", seed=1)
    together, _ = scored([llama, qwen, other], {"set": prompts}, tmp_path)
    for place, folder in enumerate((llama, qwen, other)):
        alone, _ = scored([folder], {"set": prompts}, tmp_path)
        assert alone.checkpoints[0].sets["set"].loss == together.checkpoints[place].sets["set"].loss


def test_sets_are_scored_apart_and_in_order(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    folder, other = checkpoint("llama"), tiny.write_prompts(tmp_path / "other.jsonl", ["One.", "Two and three."])
    both, _ = scored([folder], {"a": prompts, "b": other}, tmp_path)
    assert list(both.sets) == ["a", "b"] == list(both.checkpoints[0].sets)
    for name, path in (("a", prompts), ("b", other)):
        alone, _ = scored([folder], {name: path}, tmp_path)
        assert alone.checkpoints[0].sets[name].loss == pytest.approx(both.checkpoints[0].sets[name].loss, abs=1e-6)


def test_a_checkpoint_against_itself_has_not_changed(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    folder = checkpoint("qwen3")
    twin = tiny.save("qwen3", tmp_path / "twin")
    report, _ = scored([folder, twin], {"set": prompts}, tmp_path)
    change = report.checkpoints[1].sets["set"].change
    assert dataclasses.asdict(change) == {"difference": 0, "ci95": 0, "worse": 0, "kl": 0, "agreement": 1}


def test_logits_come_in_pieces_of_any_size(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one row, and pieces that end inside of a sample."""
    models = [checkpoint("llama"), tiny.save("llama", tmp_path / "other", seed=1)]
    whole, _ = scored(models, {"set": prompts}, tmp_path)
    for rows in (1, 7):
        monkeypatch.setattr("fisherkit.engine.sweep.last_rows.MOST_LOGITS", rows * tiny.VOCABULARY)
        pieces, _ = scored(models, {"set": prompts}, tmp_path)
        assert same_figures(whole, pieces)


def test_blocks_that_cannot_be_replayed_are_run_in_one_piece_and_said(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = checkpoint("llama"), list[str]()
    streamed, _ = scored([folder, checkpoint("qwen3")], {"set": prompts}, tmp_path)
    monkeypatch.setattr(run, "why_resident", lambda skeleton: "its blocks are odd")
    options = ScoreOptions(**OPTIONS)
    resident = fisherkit.score([folder, checkpoint("qwen3")], {"set": prompts}, options, say=lines.append)
    assert {one.engine for one in resident.checkpoints} == {"resident"}
    assert f"{folder}: the whole model is kept in memory: its blocks are odd" in lines
    assert same_figures(streamed, resident)
    with pytest.raises(UnsupportedModelError, match="cannot be streamed: its blocks are odd"):
        fisherkit.score(folder, prompts, ScoreOptions(engine="stream"))


@pytest.mark.parametrize("model_type", ["hrm_text", "glm_moe_dsa", "gemma3n_text"])
def test_unusual_models_give_the_loss_that_transformers_gives(model_type: str, prompts: Path, tmp_path: Path) -> None:
    """Blocks in two lists, blocks that hand each other more, hidden states with an axis before the samples'."""
    model = architectures.make_checkpoint(model_type, tmp_path / "model").model
    _, rows = scored([tmp_path / "model"], {"set": prompts}, tmp_path)
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32, experts_implementation="eager").eval()
    for row, sample in zip(rows, samples_of(tmp_path / "model", prompts), strict=True):
        labels = torch.tensor([token for token, counts in zip(sample.ids, sample.counts, strict=True) if counts])
        found = score_oracle.log_p(loaded, sample)[torch.arange(len(labels)), labels]
        assert row["loss"] == pytest.approx(-float(found.mean()), abs=CLOSE)


def test_a_model_that_turns_out_to_be_odd_starts_over_in_memory(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two, found when the first has made a visit already."""
    from fisherkit.engine.model.findings import Unreplayable
    from fisherkit.engine.sweep import walks

    models = [checkpoint("llama"), tiny.save("llama", tmp_path / "other", seed=1)]
    wanted, _ = scored(models, {"set": prompts}, tmp_path)
    plain, calls = walks.check_forward, list[int]()

    def check(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Unreplayable("it is odd")
        plain(*args)

    monkeypatch.setattr(walks, "check_forward", check)
    found, _ = scored(models, {"set": prompts}, tmp_path)
    assert [one.engine for one in found.checkpoints] == ["stream", "resident"]
    assert same_figures(wanted, found)


def test_padded_vocabularies_are_compared_on_the_tokens_that_both_have(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    model = score_oracle.load(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 24, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[tiny.VOCABULARY :] = 0
    model.save_pretrained(tmp_path / "padded")
    load_tokenizer(base).save_pretrained(tmp_path / "padded")
    report, _ = scored([base, tmp_path / "padded"], {"set": prompts}, tmp_path)
    change = report.checkpoints[1].sets["set"].change
    assert change.kl == pytest.approx(0, abs=1e-9)
    assert change.agreement == 1
    assert change.difference > 0  # entries that no token has take some of the probability


def test_prompts_are_read_as_extract_reads_them(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    """The loss that extract notes, a mean over samples, is that of these samples."""
    folder = checkpoint("llama")
    extracted = fisherkit.extract(folder, prompts, tmp_path / "f.pt", ExtractOptions(limit=3, max_length=9))
    _, rows = scored([folder], {"set": prompts}, tmp_path, limit=3, max_length=9)
    assert extracted.provenance["loss"] == pytest.approx(sum(row["loss"] for row in rows) / 3, abs=CLOSE)
    assert extracted.provenance["prompts"]["loss_tokens"] == sum(row["tokens"] for row in rows)
