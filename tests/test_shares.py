"""A checkpoint that several processes write, each a share of its files, is that of one process, byte for byte."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pairs
import pytest
from kills import Killed, killed_after
from pairs import Pair, fisherkit, one_line, worked

from fisherkit.errors import OptionError, OutputError
from fisherkit.methods.merge.fapm import fapm
from fisherkit.methods.merge.merge import merge
from fisherkit.options import FapmOptions, MergeOptions
from fisherkit.options.merge import Scope

COMMANDS = {
    "fapm": ("fapm", "BASE", "TUNED", "out", "--report", "r.json", "--figure", "f.svg"),
    "dare": ("fapm", "BASE", "TUNED", "out", "--metric", "dare", "--max-shard-size", "20KB"),
    "global": ("fapm", "BASE", "TUNED", "out", "--scope", "global", "--report", "r.json", "--figure", "f.svg"),
    "merge": ("merge", "BASE", "TUNED", "out", "--alpha", "0.5", "--max-shard-size", "30KB"),
}


def filled(name: str, pair: Pair) -> list[str]:
    given = {"BASE": str(pair[0]), "TUNED": str(pair[1])}
    return [given.get(word, word) for word in COMMANDS[name]]


@pytest.mark.parametrize(
    ("name", "order"), [("fapm", (2, 1, 4, 3)), ("dare", (1, 2, 3)), ("global", (2, 1, 3)), ("merge", (2, 1))]
)
def test_shares_written_in_any_order_are_the_files_of_one_run(
    name: str, order: tuple[int, ...], pair: Pair, tmp_path: Path
) -> None:
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    assert worked(fisherkit(*filled(name, pair), cwd=tmp_path / "one")) == "out\n"
    for number in order:
        done = fisherkit(*filled(name, pair), "--shard", f"{number}/{len(order)}", cwd=tmp_path / "many")
        assert worked(done) == ("out\n" if number == order[-1] else ""), done.stderr
        assert (tmp_path / "many" / "out").exists() == (number == order[-1])
        assert ("missing: " in done.stderr) == (number != order[-1])
    assert pairs.files(tmp_path / "many") == pairs.files(tmp_path / "one")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "changes", [{}, {"sparsity": 0.4}, {"sparsity": 0.0}, {"metric": "magnitude", "nan": "keep-base"}]
)
def test_quotas_of_many_tensors_are_shared_by_shares(
    changes: dict[str, Any], scope: Scope, level: Pair, tmp_path: Path
) -> None:
    base, tuned = level
    if "nan" in changes:
        tuned = pairs.changed(tuned, tmp_path / "nan", lambda name, w: pairs.put(w, math.nan, 1) if "up" in name else w)
    whole = fapm(base, tuned, tmp_path / "whole", FapmOptions(scope=scope, **changes))
    ties = {name: row["ties"] for name, row in whole.tensors.items()}
    assert any(ties.values()) == (changes.get("sparsity") != 0)
    for order in ((1, 2, 3), (3, 1, 2)):
        out = tmp_path / f"shares-{order[0]}"
        for number in order:
            report = fapm(base, tuned, out, FapmOptions(scope=scope, shard=(number, 3), **changes))
            assert bool(report.missing) == (number != order[-1])
        assert {name: row["ties"] for name, row in report.tensors.items()} == ties
        assert pairs.files(out) == pairs.files(tmp_path / "whole")


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """See pairs.make_level."""
    return pairs.make_level(tmp_path_factory.mktemp("level"))


@pytest.mark.parametrize("method", ["fapm", "merge"])
def test_a_share_that_was_killed_is_gone_on_with(
    method: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisherkit.pairs.rewrite._COMMIT_SECONDS", 0)
    run: Any = {"fapm": fapm, "merge": merge}[method]
    make: Any = {"fapm": FapmOptions, "merge": MergeOptions}[method]
    run(*pair, tmp_path / "whole")
    out = tmp_path / "out"
    assert run(*pair, out, make(shard=(1, 2))).missing == ("2/2",)
    with pytest.raises(Killed):
        run(*pair, out, make(shard=(2, 2)), track=killed_after(3, stage="writing"))
    assert not out.exists()
    report = run(*pair, out, make(shard=(2, 2), resume=True))
    assert report.missing == ()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert pairs.files(out) == pairs.files(tmp_path / "whole")


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_share_that_is_complete_is_not_written_again(scope: Scope, pair: Pair, tmp_path: Path) -> None:
    out, options = tmp_path / "out", FapmOptions(shard=(1, 2), scope=scope)
    fapm(*pair, out, options)
    seen: list[str] = []
    again = fapm(*pair, out, options, track=lambda stage, done, total: seen.append(stage))
    assert (again.missing, seen) == (("2/2",), [])


def test_a_share_that_was_cut_short_is_named_and_can_be_written_again(pair: Pair, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.part-1-of-2"
    fapm(*pair, out, FapmOptions(shard=(1, 2)))
    cut = next((folder / "output").rglob("*.safetensors"))
    os.truncate(cut, cut.stat().st_size - 1)
    with pytest.raises(OutputError, match=rf"{cut.name}: .*; delete {folder} and write that share again"):
        fapm(*pair, out, FapmOptions(shard=(2, 2)))
    shutil.rmtree(folder)
    assert fapm(*pair, out, FapmOptions(shard=(1, 2))).missing == ()
    fapm(*pair, tmp_path / "whole")
    assert pairs.files(out) == pairs.files(tmp_path / "whole")


def test_shares_of_another_run_are_not_mixed_in(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fapm(*pair, out, FapmOptions(shard=(1, 2)))
    with pytest.raises(OutputError, match=r"out.part-1-of-2: is a share of a run with other options"):
        fapm(*pair, out, FapmOptions(shard=(2, 2), sparsity=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["out.part-1-of-2"]


def test_what_a_share_cannot_know_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--sparse goes without it"):
        fapm(*pair, tmp_path / "out", FapmOptions(shard=(1, 2)), sparse=tmp_path / "d.safetensors")
    with pytest.raises(OptionError, match="--shard 3/2"):
        FapmOptions(shard=(3, 2))
    assert not list(tmp_path.iterdir())


def test_shares_without_a_file_wait_for_nobody_and_hinder_nobody(pair: Pair, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    for number in (9, 1, 2, 3, 8):
        report = fapm(*pair, out, FapmOptions(shard=(number, 9)), say=said.append)
        assert bool(report.missing) == (number in (9, 1, 2))
    assert said[0] == "share 9/9 has no file to write; 3 shares missing: 1/9, 2/9, 3/9"
    assert said[-1] == f"share 8/9 has nothing left to write: {out} is there"
    fapm(*pair, tmp_path / "whole")
    assert pairs.files(out) == pairs.files(tmp_path / "whole")


def test_an_output_that_is_there_is_refused_before_a_share_is_written(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "out")
    done = fisherkit("fapm", *pair, "out", "--shard", "1/2", cwd=tmp_path)
    assert "out: exists already" in one_line(done)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_share_in_a_pipe_says_what_is_missing_as_json(pair: Pair, tmp_path: Path) -> None:
    done = fisherkit("fapm", *pair, "out", "--shard", "1/3", "--json", "-q", cwd=tmp_path)
    assert json.loads(worked(done))["missing"] == ["2/3", "3/3"]
