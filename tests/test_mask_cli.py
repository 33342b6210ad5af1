"""``mask``, ``export`` and ``inspect`` of masks at the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mask_oracle import fisher_arrays, read_masks, write
from pairs import fisherkit
from safetensors.numpy import save_file

from fisherkit import MaskOptions, inspect, mask
from fisherkit.errors import CheckpointError, OptionError


@pytest.fixture
def fisher(tmp_path: Path) -> Path:
    return write(tmp_path / "fisher.safetensors", fisher_arrays(), architecture="LlamaForCausalLM")


def made(fisher: Path, name: str, **options: object) -> Path:
    return mask(fisher, fisher.with_name(name), MaskOptions(**options)).path  # type: ignore[arg-type]


def test_stdout_has_the_path_and_stderr_the_words(fisher: Path) -> None:
    out = fisher.with_name("m.safetensors")
    done = fisherkit("mask", fisher, "-o", out, "--train", "top", "--keep", "0.1")
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "note: too small for a share of 0.1" in done.stderr
    assert read_masks(out).keys() == fisher_arrays().keys()
    quiet = fisherkit("mask", fisher, "-o", out, "--train", "top", "--force", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, f"{out}\n", "")


def test_json_says_everything(fisher: Path) -> None:
    done = fisherkit("mask", fisher, "-o", fisher.with_name("m.safetensors"), "--preset", "ssu", "--json")
    report = json.loads(done.stdout)
    assert (report["kind"], report["direction"], report["tensors"]) == ("mask", "protect", 10)
    assert report["density"] == report["kept"] / report["weights"]
    beside = json.loads(fisher.with_name("m.json").read_text())
    assert beside["options"]["aggregate"] == "output"
    assert beside["options"]["keep"] == 0.5
    assert beside["fisher"]["model"] == {"id": "org/tiny", "architecture": "LlamaForCausalLM"}
    assert sum(row["kept"] for row in beside["tensors"].values()) == report["kept"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Error: name the direction"),
        (["--train", "top", "--keep", "1"], 2, "Error: --keep must lie above 0 and below 1: 1 selects everything"),
        (["--svd-rank", "100"], 2, "Error: --svd-rank 100 is above the smaller dimension of every matrix; at most 7"),
        (["--train", "top", "--weights", "nowhere", "--score", "gallop"], 1, "Error: nowhere"),
        (["--train", "top", "--against", "nowhere.safetensors"], 1, "Error: nowhere.safetensors"),
    ],
)
def test_what_is_wrong_is_one_line(fisher: Path, arguments: list[str], code: int, message: str) -> None:
    done = fisherkit("mask", fisher, "-o", fisher.with_name("m.safetensors"), "-q", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_mask_cut_short_is_one_line(fisher: Path) -> None:
    out = made(fisher, "m.safetensors", train="top")
    out.write_bytes(out.read_bytes()[:-5])
    for command in (["inspect", out], ["export", out, "--to", "axolotl"]):
        done = fisherkit(*command)
        assert done.returncode == 1
        assert "truncated" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["mask", "export"])
def test_help_is_instant(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['fisherkit', {command!r}, '--help']\nimport fisherkit.__main__ as m\n"
        "try:\n    m.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example:" in done.stdout


# What inspect shows


@pytest.mark.parametrize("aggregate", ["input", "output", "none"])
def test_inspect_shows_the_density_of_every_layer_and_module(fisher: Path, aggregate: str) -> None:
    path = made(fisher, "m.safetensors", train="top", aggregate=aggregate, scope="global")
    flags = read_masks(path)
    for by in ("layer", "module", "tensor"):
        summary = inspect(path, by=by)  # type: ignore[arg-type]
        assert "density" in summary.columns
        assert sum(row.sum for row in summary.rows) == sum(int(f.sum()) for f in flags.values())
    layer = [f for name, f in flags.items() if "layers.1." in name]
    assert inspect(path).rows[1].mean == sum(f.sum() for f in layer) / sum(f.size for f in layer)
    assert inspect(path.with_suffix(".json")).rows == inspect(path).rows


def test_the_headline_says_the_direction(fisher: Path) -> None:
    path = made(fisher, "m.safetensors", protect="top", keep=0.3)
    done = fisherkit("inspect", path, "--format", "table")
    words = " ".join(done.stdout.split())
    assert "may change: the top is frozen (protect), top 30 % of rows per tensor by fisher" in words
    tsv = fisherkit("inspect", path)
    assert tsv.stdout.splitlines()[0].split("\t")[:5] == ["layer", "tensors", "weights", "sum", "density"]


def test_two_masks_are_compared_by_jaccard(fisher: Path) -> None:
    here = made(fisher, "a.safetensors", train="top", scope="global")
    there = made(fisher, "b.safetensors", train="top", aggregate="none", scope="global")
    one, two = read_masks(here), read_masks(there)
    summary = inspect(here, there, by="tensor")
    for row in summary.rows:
        a, b = one[row.name], two[row.name]
        record = {column: summary.value(row, column) for column in ("jaccard", "chance")}
        either = (a | b).sum()
        assert record["jaccard"] == (pytest.approx((a & b).sum() / either) if either else None)
    total = inspect(here, there).total.agreement
    both, either = (sum(int(f(one[n], two[n]).sum()) for n in one) for f in (np.logical_and, np.logical_or))
    assert total is not None
    assert total.jaccard == pytest.approx(both / either)  # type: ignore[union-attr]
    done = fisherkit("inspect", here, there, "--format", "table")
    assert "Jaccard overlap of what may change" in " ".join(done.stdout.split())
    assert inspect(here, here).total.agreement.jaccard == 1.0  # type: ignore[union-attr]


def test_unrelated_masks_overlap_as_chance_says(tmp_path: Path) -> None:
    fisher = write(tmp_path / "f.safetensors", {"model.layers.0.mlp.up_proj.weight": np.ones((300, 300), np.float32)})
    paths = [
        made(fisher, f"{seed}.safetensors", train="top", score="random", aggregate="none", seed=seed) for seed in (1, 2)
    ]
    agreement = inspect(*paths).total.agreement
    assert agreement is not None
    assert agreement.chance == pytest.approx(0.3 / 1.7)  # type: ignore[union-attr]
    assert agreement.jaccard == pytest.approx(0.3 / 1.7, abs=0.01)  # type: ignore[union-attr]


def test_masks_are_compared_with_masks_of_the_same_model(fisher: Path, tmp_path: Path) -> None:
    path = made(fisher, "m.safetensors", train="top")
    with pytest.raises(CheckpointError, match="does not describe a mask"):
        inspect(path, fisher)
    save_file({"x": np.ones(3, np.bool_)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no tensor in common"):
        inspect(path, tmp_path / "x.safetensors")
    smaller = write(tmp_path / "s.safetensors", {n: a[..., :3].copy() for n, a in fisher_arrays().items()})
    with pytest.raises(CheckpointError, match=r"is \[.*\] in .* and \[.*\] in"):
        inspect(path, made(smaller, "n.safetensors", train="top"))
    sub = made(fisher, "u.safetensors", svd_rank=2)
    with pytest.raises(OptionError, match="compared with a mask"):
        inspect(path, sub)
