"""fapm and merge on damaged files, on values that are no numbers, on sides that don't belong together.

Each failure is one line, and leaves nothing behind.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pairs
import pytest
import safetensors.torch
import torch
from pairs import Pair, cli, cli_in, one_line, worked

from fisherkit.errors import FisherkitError
from fisherkit.methods.merge.fapm import fapm

Q0 = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# Damaged sides


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "no index", "page", "empty", "pickle"])
def test_damaged_files_are_named_and_nothing_is_left(side: str, damage: str, pair: Pair, tmp_path: Path) -> None:
    base, tuned = pair
    broken = shutil.copytree(base if side == "base" else tuned, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    named = shard.name
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no index":
        (broken / pairs.INDEX).unlink()
    elif damage == "page":
        shard.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    elif damage == "empty":
        for file in broken.glob("*.safetensors*"):
            file.unlink()
        named = "no tensor file in this folder"
    else:
        for file in broken.glob("*.safetensors*"):
            file.unlink()
        named = "pytorch_model.bin"
        (broken / named).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    sides = (broken, tuned) if side == "base" else (base, broken)
    for command in ("fapm", "merge"):
        line = one_line(cli(command, *sides, tmp_path / "out"))
        assert named in line
        assert "broken" in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_shard_that_shrinks_during_the_run_is_named(pair: Pair, tmp_path: Path) -> None:
    tuned = shutil.copytree(pair[1], tmp_path / "tuned")
    shard = sorted(tuned.glob("*.safetensors"))[-1]

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "writing" and done:
            os.truncate(shard, 2000)

    with pytest.raises(FisherkitError, match=r"model-00003-of-00003.safetensors: ends inside"):
        fapm(pair[0], tuned, tmp_path / "out", track=cut)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["./nowhere", "nowhere.safetensors", "a/b/c", ""])
def test_sides_that_are_not_there_are_named(wrong: str, pair: Pair, tmp_path: Path) -> None:
    for sides in ((pair[0], wrong), (wrong, pair[1])):
        line = one_line(cli("fapm", *sides, tmp_path / "out"))
        assert wrong in line
    assert list(tmp_path.iterdir()) == []


# Values that are no numbers


def broken_values(folder: Path, source: Path, *values: float) -> Path:
    """A copy of a checkpoint with such values at the places 3, 40, 77, ... of a matrix."""
    copy = pairs.changed(source, folder, lambda _, tensor: tensor)
    for number, value in enumerate(values):
        pairs.edit(copy, Q0, lambda tensor, at=3 + 37 * number, value=value: pairs.put(tensor, value, at))
    return copy


NAN, INF = float("nan"), float("inf")
RUNS = [
    *(["fapm", "OUT", "--scope", scope] for scope in ("tensor", "layer", "global")),
    *(
        ["fapm", "OUT", "--metric", metric]
        for metric in ("relative", "magnitude", "random", "wise-ft", "dare", "della")
    ),
    ["fapm", "OUT", "--skip", "q_proj"],
    ["fapm", "OUT", "--density", "0"],
    ["fapm", "--report", "r.json"],
    ["fapm", "--sparse", "d.safetensors"],
    ["fapm", "--sweep", "0.5,0.9"],
    ["merge", "OUT"],
    ["merge", "OUT", "--alpha", "0.5"],
]


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_values_that_are_no_numbers_are_refused_with_the_tensors_name(
    arguments: list[str], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = ["out" if word == "OUT" else word for word in arguments]
    tuned = broken_values(tmp_path / "tuned", pair[1], NAN, INF, -INF)
    line = one_line(cli(command, pair[0], tuned, *rest))
    assert f"{tuned}: FT's tensor '{Q0}' has 3 NaN or infinite entries, the first at index 3; mend it, or" in line
    assert sorted(os.listdir()) == ["tuned"]
    if "--skip" not in arguments:  # what is left out is not read
        base = broken_values(tmp_path / "base", pair[0], NAN, INF)
        line = one_line(cli(command, base, pair[1], *rest))
        assert f"BASE's tensor '{Q0}' has 2 NaN or infinite entries, the first at index 3" in line
        assert "model-00001-of-00003.safetensors" in line
        assert sorted(os.listdir()) == ["base", "tuned"]


@pytest.mark.parametrize("arguments", [run for run in RUNS if run[1] == "OUT"], ids=" ".join)
def test_keep_base_takes_the_bases_entries_there(arguments: list[str], pair: Pair, tmp_path: Path) -> None:
    command, _, *options = arguments
    base = broken_values(tmp_path / "base", pair[0], 1.5, NAN)
    tuned = broken_values(tmp_path / "tuned", pair[1], NAN, 2.5, -INF)
    worked(cli(command, base, tuned, tmp_path / "out", *options, "--nan", "keep-base", "-q"))
    ours, theirs, got = (pairs.tensors(folder)[Q0].reshape(-1) for folder in (base, tuned, tmp_path / "out"))
    if "--skip" in arguments:  # all of FT's there, but for what is no number
        assert pairs.same_bits(got[[3, 77]], ours[[3, 77]])
        assert pairs.same_bits(got[4:77], theirs[4:77])
        return
    assert pairs.same_bits(got[[3, 40, 77]], ours[[3, 40, 77]])
    assert torch.isfinite(got).sum() == got.numel() - 1  # the base's own NaN, which nothing can replace
    made = json.loads((tmp_path / "out" / "fisherkit.json").read_text())
    assert made["tensors"][Q0]["nonfinite"] == 3
    assert made["totals"]["nonfinite"] == 3


def test_values_beyond_the_bases_type_are_refused(pair: Pair, tmp_path: Path) -> None:
    base = pairs.changed(pair[0], tmp_path / "half", lambda _, tensor: tensor.half())
    tuned = pairs.changed(pair[1], tmp_path / "wide", lambda _, tensor: tensor.float())
    pairs.edit(tuned, Q0, lambda tensor: pairs.put(tensor, 1e6, 3))
    for words in (["merge"], ["fapm", "--metric", "magnitude"]):
        line = one_line(cli(words[0], base, tuned, tmp_path / "out", *words[1:]))
        assert f"{Q0}: 1 values are beyond float16, BASE's type; convert BASE to bfloat16 first" in line
    line = one_line(cli("fapm", base, tuned, tmp_path / "out", "--skip", "q_proj"))
    assert f"{Q0}: 1 values are beyond float16, BASE's type; convert BASE to bfloat16 first" in line
    worked(cli("fapm", base, tuned, tmp_path / "out", "--skip", "q_proj", "--nan", "keep-base"))
    got, ours = pairs.tensors(tmp_path / "out")[Q0].reshape(-1), pairs.tensors(base)[Q0].reshape(-1)
    assert got[3] == ours[3]


# Sides that have nothing to give, or don't belong together


@pytest.mark.parametrize(
    "words", [["fapm", "OUT"], ["fapm", "OUT", "--scope", "global"], ["fapm", "--sparse", "d.safetensors"],
              ["fapm", "--report", "r.json"], ["fapm", "--sweep", "0.5"], ["merge", "OUT"]], ids=" ".join
)  # fmt: skip
def test_a_fine_tune_equal_to_its_base_is_an_error_that_leaves_nothing(
    words: list[str], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pair[0], "same")
    command, *rest = ["out" if word == "OUT" else word for word in words]
    line = one_line(cli(command, pair[0], "same", *rest))
    assert "same: is identical to BASE" in line
    assert os.listdir() == ["same"]


def test_an_empty_delta_is_not_written(pair: Pair, tmp_path: Path) -> None:
    line = one_line(cli("fapm", *pair, "--sparse", tmp_path / "d.safetensors", "--density", "0"))
    assert "no entry was kept, so there is nothing to write" in line
    assert list(tmp_path.iterdir()) == []


def error_in(folder: Path, *words: object) -> str:
    """The error of a command in a folder, whose paths are relative: long ones cost a message its middle."""
    return one_line(
        cli_in(folder, *(os.path.relpath(word, folder) if isinstance(word, Path) else word for word in words))
    )


def test_models_that_do_not_belong_together_are_told_apart(pair: Pair, tmp_path: Path) -> None:
    base, tuned = pair
    out = tmp_path / "out"
    assert "BASE and FT are the same" in one_line(cli("fapm", base, base, out))
    moe = pairs.make(tmp_path / "moe", "qwen3-moe")[1]
    line = one_line(cli("fapm", base, moe, out))
    assert "lacks 9 tensors of BASE (model.layers.0.mlp.gate_proj.weight" in line
    assert "must be the model that it was tuned from" in line
    grown = pairs.changed(tuned, tmp_path / "grown", lambda _, tensor: tensor)
    for name in (HEAD, EMBEDDING):
        pairs.edit(grown, name, lambda tensor: torch.cat([tensor, tensor[:8]]))
    line = error_in(tmp_path, "fapm", base, grown, out)
    assert "model.embed_tokens.weight has 400 rows in BASE, 408 in FT" in line
    assert "resize BASE first, with model.resize_token_embeddings(408)" in line
    cut = pairs.changed(tuned, tmp_path / "cut", lambda _, tensor: tensor)
    pairs.edit(cut, Q0, lambda tensor: tensor[:30])
    assert f"{Q0} is [32, 32] in BASE, [30, 32] in FT" in one_line(cli("merge", base, cut, out))
    assert not out.exists()


def test_quantised_models_are_refused_and_wide_ones_are_not(pair: Pair, tmp_path: Path) -> None:
    packed = pairs.changed(pair[1], tmp_path / "fp8", lambda _, tensor: tensor)
    pairs.edit(packed, Q0, lambda tensor: tensor.to(torch.float8_e4m3fn))
    line = error_in(tmp_path, "fapm", pair[0], packed, tmp_path / "out")
    assert re.search(rf"{Q0} \(F8_E4M3\).*quantised.*dequantise", line)
    wide = [pairs.changed(one, tmp_path / f"f64-{one.name}", lambda _, tensor: tensor.double()) for one in pair]
    worked(cli("fapm", *wide, tmp_path / "out"))
    ours, theirs, got = (pairs.tensors(one)[Q0] for one in (*wide, tmp_path / "out"))
    assert got.dtype == torch.float64
    assert bool(((got == ours) | (got == theirs)).all())
    assert int((got != ours).sum()) == got.numel() // 10


def test_embeddings_that_diverged_from_a_tied_head_are_refused(tmp_path: Path) -> None:
    base, tuned = pairs.make(tmp_path, "llama-tied")
    shard = sorted(tuned.glob("*.safetensors"))[0]
    held = safetensors.torch.load_file(shard)
    held[HEAD] = pairs.tensors(tuned)[EMBEDDING] + 1
    safetensors.torch.save_file(held, shard, metadata={"format": "pt"})
    index = json.loads((tuned / pairs.INDEX).read_text())
    index["weight_map"][HEAD] = shard.name
    (tuned / pairs.INDEX).write_text(json.dumps(index))
    line = error_in(tmp_path, "fapm", base, tuned, tmp_path / "out")
    assert re.search("lm_head.weight has diverged.*save BASE with a head of its own", line)


@pytest.mark.parametrize(
    ("weight", "settings", "what"),
    [
        ("model.layers.0.self_attn.r_proj.weight", {}, "2 of 2 tensors match no weight of"),
        ("model.layers.9.self_attn.q_proj.weight", {}, "2 of 2 tensors match no weight of"),
        (Q0, {"peft_type": "IA3"}, "merge it first: from peft import"),
    ],
)
def test_adapters_that_would_go_unused_are_refused(
    weight: str, settings: dict[str, str], what: str, pair: Pair, tmp_path: Path
) -> None:
    lora = pairs.adapter(tmp_path / "lora", {weight: torch.zeros(32, 32)}, **settings)
    assert what in one_line(cli("fapm", pair[0], lora, tmp_path / "out"))
    assert "is an adapter; BASE is the model that it was trained on" in one_line(
        cli("fapm", lora, pair[1], tmp_path / "out")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_an_adapter_beside_other_tensors_is_still_an_adapter(pair: Pair, tmp_path: Path) -> None:
    lora = pairs.adapter(tmp_path / "lora", {Q0: pairs.tensors(pair[0])[Q0]})
    safetensors.torch.save_file({"value": torch.ones(3)}, lora / "value_head.safetensors")
    worked(cli("fapm", pair[0], lora, tmp_path / "out"))
    pairs.edit(lora, f"base_model.model.{Q0.removesuffix('.weight')}.lora_A.weight", lambda one: pairs.put(one, NAN, 1))
    assert "lora_A.weight' holds NaN or infinity" in one_line(cli("fapm", pair[0], lora, tmp_path / "again"))
    assert not (tmp_path / "again.partial").exists()


def test_scalars_empty_tensors_and_integers_go_through(pair: Pair, tmp_path: Path) -> None:
    odd = {
        "model.scale": torch.tensor(2.0, dtype=torch.bfloat16),
        "model.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "model.steps": torch.arange(4),
        "model.flag": torch.tensor([True]),
    }
    files = []
    for one in pair:
        files.append(tmp_path / f"{one.name}.safetensors")
        held = pairs.tensors(one) | odd | {"model.scale": odd["model.scale"] * (1 + (one.name == "tuned"))}
        safetensors.torch.save_file(held, files[-1], metadata={"format": "pt"})
    for scope in ("tensor", "layer", "global"):
        out = tmp_path / scope
        worked(
            cli(
                "fapm", *files, out, "--scope", scope, "--density", "1", "--sparse", tmp_path / f"{scope}-d.safetensors"
            )
        )
        got = pairs.tensors(out)
        for name in ("model.empty", "model.steps", "model.flag"):
            assert pairs.same_bits(got[name], odd[name])
        assert got["model.scale"] == 4
    for words in (["fapm", "--metric", "della"], ["fapm", "--metric", "dare"], ["merge", "--alpha", "0.5"]):
        worked(cli(words[0], *files, tmp_path / f"{words[0]}{words[-1]}", *words[1:]))
    assert pairs.tensors(tmp_path / "merge0.5")["model.scale"] == 3
