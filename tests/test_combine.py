"""Parts of a prompt set measured apart add up to the Fisher of the whole set; what does not belong together is refused.

The oracle is a run over all samples, and for weights a sum in float64.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from kills import Killed, killed_after
from pairs import fisherkit as command
from pairs import one_line, worked
from torch import Tensor

import fisherkit
from fisherkit import CombineOptions, ExtractOptions
from fisherkit.errors import CheckpointError, FisherkitError, OptionError, PromptError
from fisherkit.kernels.deal import deal
from fisherkit.methods.combine import fisher_sum
from fisherkit.options.part import Part, parse_part

Checkpoint = Callable[[str], Path]
COMMON: dict[str, Any] = {"group_size": 2, "batch_tokens": 40, "targets": "all"}


def extract(model: Path, prompts: Path, out: Path, **changes: Any) -> Path:
    fisherkit.extract(model, prompts, out, ExtractOptions(**{**COMMON, **changes}))
    return out


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path) if path.suffix == ".pt" else safetensors.torch.load_file(path)


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        error = (value.double() - wanted[name].double()).norm() / wanted[name].double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def record(steps: list[tuple[str, int, int]]) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: steps.append((stage, done, total))


@pytest.fixture(scope="module")
def parts(
    checkpoint: Checkpoint, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[Path]]:
    """The parts of a division of the five prompts; tests must not change them."""
    folder = tmp_path_factory.mktemp("parts")

    def make(of: int) -> list[Path]:
        paths = [folder / f"part-{number}-of-{of}.safetensors" for number in range(1, of + 1)]
        for number, path in enumerate(paths, start=1):
            if not path.exists():
                extract(checkpoint("llama"), prompts, path, shard=(number, of))
        return paths

    return make


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_the_parts_of_a_set_add_up_to_the_undivided_run(
    of: int, parts: Callable[[int], list[Path]], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    whole = extract(checkpoint("llama"), prompts, tmp_path / "whole.pt", store="fp32")
    options = CombineOptions(store="fp32", partial=of == 1)
    report = fisherkit.combine(list(reversed(parts(of))), tmp_path / "sum.safetensors", options)
    assert_close(load(report.path), load(whole), 1e-6)
    ours, theirs = (json.loads(path.with_suffix(".json").read_bytes()) for path in (report.path, whole))
    for key in ("samples", "tokens", "loss_tokens", "sha256", "source"):
        assert ours["prompts"][key] == theirs["prompts"][key], key
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert [one["part"] for one in ours["combined"]["parts"]] == [f"{number}/{of}" for number in range(1, of + 1)]
    for name, figures in theirs["tensors"].items():
        assert ours["tensors"][name]["sum"] == pytest.approx(figures["sum"], rel=1e-5)
    layers = json.loads((tmp_path / "layer_importance.json").read_bytes())["layers"]
    assert [row["layer"] for row in layers] == list(range(len(layers)))
    assert fisherkit.inspect(report.path).notes == ()


@pytest.mark.parametrize("store", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out"])
def test_the_sum_is_that_of_float64_rounded_once(
    name: str, store: str, parts: Callable[[int], list[Path]], tmp_path: Path
) -> None:
    given = parts(3)
    counts = [json.loads(path.with_suffix(".json").read_bytes())["prompts"]["samples"] for path in given]
    held = [load(path) for path in given]
    report = fisherkit.combine(given, tmp_path / name, CombineOptions(store=store))
    files = [path for path in report.files if path.suffix in (".pt", ".safetensors")]
    got = {key: value for file in files for key, value in load(file).items()}
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[store]
    for key, value in got.items():
        exact = sum(one[key].double() * (n / sum(counts)) for one, n in zip(held, counts, strict=True))
        assert torch.equal(value, exact.float().to(dtype)), key


def test_weights_add_the_means_of_several_prompt_sets(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Two and two make four.\nThe Po is a river in Italy.\n")
    first = extract(checkpoint("llama"), prompts, tmp_path / "a.pt", store="fp32", loss="all")
    second = extract(checkpoint("llama"), other, tmp_path / "b.pt", store="fp32")
    options = CombineOptions(weights=(1, 3), store="fp32")
    got = load(fisherkit.combine([first, second], tmp_path / "sum.pt", options).path)
    a, b = load(first), load(second)
    assert_close(got, {name: 0.25 * a[name].double() + 0.75 * b[name].double() for name in a}, 1e-7)
    made = json.loads((tmp_path / "sum.json").read_bytes())
    assert made["prompts"]["samples"] == 7
    assert [one["weight"] for one in made["combined"]["parts"]] == [0.25, 0.75]
    with pytest.raises(CheckpointError, match=r"is no part of a set.*--weights 1,1"):
        fisherkit.combine([first, second], tmp_path / "no.pt")
    with pytest.raises(OptionError, match="3 numbers for 2 files"):
        fisherkit.combine([first, second], tmp_path / "no.pt", CombineOptions(weights=(1, 1, 1)))


def test_what_is_not_one_division_of_one_set_is_refused(
    parts: Callable[[int], list[Path]], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    two, three = parts(2), parts(3)

    def refused(*given: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            fisherkit.combine(given, tmp_path / "out.pt")
        assert not list(tmp_path.glob("out*"))

    refused(three[0], three[2], match=r"1 of 3 parts are missing: 2/3; .*--partial")
    refused(*three, three[1], match="is the same Fisher as .*give each part once")
    refused(two[0], three[1], match="is one of 3 parts and .* one of 2, so they overlap")
    again = extract(checkpoint("llama"), prompts, tmp_path / "again.pt", shard=(2, 3))
    refused(three[1], again, match="is part 2, and so is")
    for changes, what in (
        ({"reduction": "sum"}, "other --labels, --reduction"),
        ({"max_length": 9}, "another --max-length"),
        ({"dtype": "bfloat16"}, "computed in another --dtype"),
        ({"limit": 4}, "of another prompt set than .*: 4 rows of prompts.jsonl, not 5; extract all parts with one --l"),
    ):
        changed = extract(checkpoint("llama"), prompts, tmp_path / "changed.pt", shard=(2, 3), force=True, **changes)
        refused(three[0], changed, three[2], match=what)
    for name, what in (("other", "not prompts.jsonl; --weights 1,1"), ("prompts", "held other text then")):
        text = prompts.read_text().replace("rivers", "towns")
        (tmp_path / f"{name}.jsonl").write_text(text)
        changed = extract(
            checkpoint("llama"), tmp_path / f"{name}.jsonl", tmp_path / "changed.pt", shard=(2, 3), force=True
        )
        refused(three[0], changed, three[2], match=f"of another prompt set than .*: {name}.jsonl.* {what}")
    foreign = extract(checkpoint("llama-tied"), prompts, tmp_path / "foreign.pt", shard=(2, 3))
    refused(three[0], foreign, match="of another model")
    fewer = extract(checkpoint("llama"), prompts, tmp_path / "fewer.pt", shard=(2, 3), layers=(0,))
    refused(three[0], fewer, match="--layers")


def test_a_part_without_its_own_sidecar_is_refused(parts: Callable[[int], list[Path]], tmp_path: Path) -> None:
    given = [Path(shutil.copy(path, tmp_path)) for path in parts(2)]
    with pytest.raises(CheckpointError, match=r"part-1-of-2.json: is missing"):
        fisherkit.combine(given, tmp_path / "out.pt")
    for path, of in zip(given, reversed(parts(2)), strict=True):
        shutil.copy(of.with_suffix(".json"), path.with_suffix(".json"))
    with pytest.raises(CheckpointError, match=r"part-1-of-2.json: does not belong to part-1-of-2.safetensors"):
        fisherkit.combine(given, tmp_path / "out.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_values_that_no_fisher_has_are_refused(bad: float, parts: Callable[[int], list[Path]], tmp_path: Path) -> None:
    given = []
    for path in parts(2):
        given.append(Path(shutil.copy(path, tmp_path)))
        shutil.copy(path.with_suffix(".json"), tmp_path)
    held = load(given[1])
    name = next(iter(held))
    held[name].view(-1)[7] = bad
    safetensors.torch.save_file(held, given[1])
    sidecar = given[1].with_suffix(".json")
    made = json.loads(sidecar.read_bytes())
    from fisherkit.checkpoint.content import content_sha256

    made |= {"content_sha256": content_sha256(given[1]), "file_bytes": given[1].stat().st_size}
    sidecar.write_text(json.dumps(made))
    with pytest.raises(CheckpointError, match=f"part-2-of-2.safetensors: {name} holds values that are no Fisher's"):
        fisherkit.combine(given, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_missing_part_is_gone_on_without_when_asked(parts: Callable[[int], list[Path]], tmp_path: Path) -> None:
    said: list[str] = []
    report = fisherkit.combine(parts(3)[1:], tmp_path / "out.pt", CombineOptions(partial=True), say=said.append)
    assert report.missing == ("1/3",)
    assert said == ["warning: 1 part missing (1/3); this is the mean over the others"]
    assert json.loads((tmp_path / "out.json").read_bytes())["combined"]["missing"] == ["1/3"]


def test_a_killed_sum_goes_on_to_the_same_bits(
    parts: Callable[[int], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_sum, "_COMMIT_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = fisherkit.combine(parts(3), tmp_path / "whole" / "out.safetensors").path.read_bytes()
    out = tmp_path / "killed" / "out.safetensors"
    for steps in (0, 1, 9):
        with pytest.raises(Killed):
            fisherkit.combine(parts(3), out, track=killed_after(steps))
        assert [path.name for path in out.parent.iterdir()] == ["out.safetensors.partial"]
        tracked: list[tuple[str, int, int]] = []
        fisherkit.combine(parts(3), out, CombineOptions(resume=True), track=record(tracked))
        assert (tracked[0][1] > 0) == (steps > 0)
        assert out.read_bytes() == whole
        shutil.rmtree(out.parent)
        out.parent.mkdir()
    with pytest.raises(Killed):
        fisherkit.combine(parts(3), out, track=killed_after(3))
    with pytest.raises(FisherkitError, match="other parts"):
        fisherkit.combine(parts(2), out, CombineOptions(resume=True))


def test_samples_are_dealt_out_once_and_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    for of in (1, 2, 3, 7, 40):
        lengths = torch.randint(1, 300, (33,), generator=generator).tolist()
        dealt = deal(lengths, of)
        assert sorted(index for part in dealt for index in part) == list(range(33))
        assert dealt == deal(list(lengths), of)
        sums = [sum(lengths[index] for index in part) for part in dealt]
        assert max(sums) - min(sums) <= max(lengths)
        assert all(part == sorted(part) for part in dealt)


def test_more_parts_than_samples_leave_an_empty_one_which_is_said(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(PromptError, match="has 5 samples, so part 6/6 is empty; use 5 parts at most"):
        extract(checkpoint("llama"), prompts, tmp_path / "out.pt", shard=(6, 6))


@pytest.mark.parametrize(("text", "part"), [("3/16", (3, 16)), (" 1 / 1 ", (1, 1)), ("16/16", (16, 16))])
def test_parts_are_written_as_fractions(text: str, part: tuple[int, int]) -> None:
    assert parse_part("shard", text) == Part(*part)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/2/3", "1.0/2", "", "1/99999999"])
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--shard"):
        parse_part("shard", text)


@pytest.mark.parametrize("weights", ["", "1,", "a", "1,-1", "1,0", "1.0,00", "nan,1", "1e400,1"])
def test_odd_weights_are_refused_in_one_line(weights: str, parts: Callable[[int], list[Path]], tmp_path: Path) -> None:
    done = command("combine", *parts(2), "--weights", weights, "-o", tmp_path / "out.pt", cwd=tmp_path)
    said = f"Error: --weights takes numbers above 0 such as 1,3, not {weights!r}"
    assert one_line(done, code=2).rstrip("\n") == said


def test_the_command_line_makes_parts_and_adds_them(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        words = ["extract", checkpoint("llama"), prompts, "--shard", f"{number}/2", "-o", f"part-{number}.safetensors"]
        assert worked(command(*words, cwd=tmp_path)) == f"part-{number}.safetensors\n"
        made = json.loads((tmp_path / f"part-{number}.json").read_bytes())
        assert made["part"]["number"] == number
        assert made["run"]["store"] == "fp32"
    assert worked(command("combine", "part-1.safetensors", "part-2.safetensors", cwd=tmp_path)) == "fisher.pt\n"
    assert worked(command("mask", "fisher.pt", "-o", "mask.safetensors", "--preset", "fggm", cwd=tmp_path))
    refused = command("combine", "part-1.safetensors", "part-2.safetensors", cwd=tmp_path)
    assert "exists already" in one_line(refused)
