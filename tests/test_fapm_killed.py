"""fapm and merge killed between two tensors: a second run gets to the bits of an undisturbed one.

Kills before every change of the file system are in test_kills.
"""

import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import pairs
import pytest
import safetensors.torch
import torch
from kills import Killed, killed_after
from pairs import Pair, fisherkit, worked

from fisherkit.errors import OutputError, ResumeError
from fisherkit.methods.merge.fapm import fapm
from fisherkit.methods.merge.merge import merge
from fisherkit.options import FapmOptions, MergeOptions
from fisherkit.pairs import rewrite

Q0 = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """See pairs.make_level."""
    return pairs.make_level(tmp_path_factory.mktemp("level"))


def test_a_killed_command_goes_on_to_the_same_files(pair: Pair, tmp_path: Path) -> None:
    words = ["fapm", *pair, "out", "--scope", "layer", "--figure", "f.svg", "--report", "r.json"]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    worked(fisherkit(*words, cwd=tmp_path / "whole"))
    kill = (
        "import os, fisherkit.pairs.rewrite as r, fisherkit.checkpoint.writer as w\n"
        "r._COMMIT_SECONDS, left, mark = 0, iter(range(9)), w.StreamedWriter.mark_written\n"
        "die = lambda: os.kill(os.getpid(), 9)\n"
        "w.StreamedWriter.mark_written = lambda *a: die() if next(left, None) is None else mark(*a)"
    )
    done = fisherkit(*words, first=kill, cwd=tmp_path / "killed")
    assert (done.returncode, done.stdout) == (-9, "")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["out.partial"]
    worked(fisherkit(*words, "--resume", cwd=tmp_path / "killed"))
    assert pairs.files(tmp_path / "killed") == pairs.files(tmp_path / "whole")


def test_ctrl_c_exits_130_and_says_how_to_go_on(pair: Pair, tmp_path: Path) -> None:
    words = ["fapm", *pair, "out"]
    press = (
        "import os, signal, fisherkit.checkpoint.writer as w\n"
        "left, mark = iter(range(9)), w.StreamedWriter.mark_written\n"
        "def pressed(*a):\n"
        "    mark(*a)\n"
        "    next(left, None) is not None or os.kill(os.getpid(), signal.SIGINT)\n"
        "w.StreamedWriter.mark_written = pressed"
    )
    done = fisherkit(*words, first=press, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("Interrupted. What is finished is in out.partial; --resume goes on with it.\n")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert worked(fisherkit(*words, "--resume", cwd=tmp_path)) == "out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    done = fisherkit("fapm", *pair, "--sweep", "0.5", first=press.replace("mark_written", "sync"), cwd=tmp_path)
    worked(done)


# Killed between two tensors, and gone on with


def note_every_tensor(patch: pytest.MonkeyPatch) -> None:
    """Have runs note what is finished after every tensor, as long ones do every few seconds."""
    patch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    patch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("metric", ["magnitude", "random"])
def test_a_resumed_run_gives_the_bits_of_an_undisturbed_one_ties_and_all(
    scope: str, metric: str, level: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    note_every_tensor(monkeypatch)
    options = {"scope": scope, "metric": metric, "density": 0.3}
    whole = fapm(*level, "out", FapmOptions(**options), figure=True)
    expected = pairs.files(tmp_path / "out")
    for stop in (1, 4, 17, 29):
        shutil.rmtree("out")
        with pytest.raises(Killed):
            fapm(*level, "out", FapmOptions(**options), track=killed_after(stop, stage="writing"))
        assert not (tmp_path / "out").exists()
        resumed = fapm(*level, "out", FapmOptions(**options, resume=True), figure=True)
        assert pairs.files(tmp_path / "out") == expected, stop
        assert resumed.as_json() == whole.as_json()
        assert os.listdir() == ["out"]
    quota = math.floor(Fraction(3, 10) * whole.totals["weights"])
    if scope == "global":  # exact, but for the ties of the head, which keeps what the embedding does
        assert 0 <= whole.totals["kept"] - quota <= whole.tensors[HEAD]["ties"]
    else:
        assert whole.totals["kept"] <= quota


@pytest.mark.parametrize("first", [EMBEDDING, HEAD])
def test_tied_embeddings_stay_tied_whatever_the_quota(first: str, level: Pair, tmp_path: Path) -> None:
    held = pairs.tensors(level[0])
    names = [first, *(name for name in held if name not in (HEAD, EMBEDDING)), {HEAD: EMBEDDING}.get(first, HEAD)]
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(level[0] / "config.json", base)
    shards = {f"model-{number:05d}-of-00030.safetensors": name for number, name in enumerate(names, start=1)}
    for shard, name in shards.items():
        safetensors.torch.save_file({name: held[name]}, base / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, name in shards.items()}
    (base / pairs.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for scope in ("tensor", "layer", "global"):
        for metric in ("fapm", "magnitude", "random", "dare"):
            if metric != "dare" or scope == "tensor":
                out = tmp_path / f"{scope}-{metric}"
                fapm(base, level[1], out, FapmOptions(scope=scope, metric=metric, density=0.3))  # type: ignore[arg-type]
                held = pairs.tensors(out)
                assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
                assert pairs.same_bits(held[HEAD], held[EMBEDDING]), out.name


def test_a_resumed_run_remembers_its_warnings(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_every_tensor(monkeypatch)
    other = pairs.changed(pair[0], tmp_path / "other", lambda _, tensor: torch.randn(tensor.shape).to(tensor.dtype))
    for run, options in ((fapm, FapmOptions), (merge, MergeOptions)):
        whole = run(pair[0], other, tmp_path / "whole", options(force=True))
        with pytest.raises(Killed):
            run(pair[0], other, tmp_path / "out", options(force=True), track=killed_after(29, stage="writing"))
        said: list[str] = []
        resumed = run(pair[0], other, tmp_path / "out", options(resume=True), say=said.append)
        assert resumed.warnings == whole.warnings
        assert len(whole.warnings) == 1
        assert any(whole.warnings[0] in line for line in said)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_when_all_but_the_tidying_was_done_is_completed(
    resume: bool, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_every_tensor(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def kill(_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fisherkit.checkpoint.work_folder.Work.remove", kill)
        with pytest.raises(Killed):
            fapm(*pair, "out")
    finished = pairs.files(tmp_path / "out")
    assert "out.partial" in os.listdir()
    fapm(*pair, "out", FapmOptions(resume=resume), track=killed_after(1, stage="writing"))  # computes nothing
    assert pairs.files(tmp_path / "out") == finished
    assert os.listdir() == ["out"]
    with pytest.raises(OutputError, match="exists already"):
        fapm(*pair, "out", FapmOptions(resume=resume))


def test_what_is_gone_on_with_must_be_the_same_run(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_every_tensor(monkeypatch)
    base, tuned, out = *pair, tmp_path / "out"
    with pytest.raises(Killed):
        fapm(base, tuned, out, track=killed_after(9, stage="writing"))
    other = pairs.fine_tune(base, tmp_path / "other", seed=8)
    with pytest.raises(ResumeError, match=r"other tuned.*without --resume"):
        fapm(base, other, out, FapmOptions(resume=True))
    with pytest.raises(ResumeError, match="other base"):
        fapm(other, tuned, out, FapmOptions(resume=True))
    for change in ({"density": 0.2}, {"seed": 1}, {"shard_bytes": 9000}, {"only": ("mlp",)}, {"nan": "keep-base"}):
        with pytest.raises(ResumeError, match="other options"):
            fapm(base, tuned, out, FapmOptions(resume=True, **change))
    fapm(base, tuned, out, FapmOptions(resume=True, density=0.1))  # the default, spelt out
    assert pairs.is_whole(out)


def test_an_adapters_settings_belong_to_the_run(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_every_tensor(monkeypatch)
    lora = pairs.adapter(tmp_path / "lora", {Q0: pairs.tensors(pair[0])[Q0]})
    with pytest.raises(Killed):
        fapm(pair[0], lora, tmp_path / "out", track=killed_after(9, stage="writing"))
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 16}))
    with pytest.raises(ResumeError, match="other tuned"):
        fapm(pair[0], lora, tmp_path / "out", FapmOptions(resume=True))


def test_two_runs_do_not_share_a_work_folder(pair: Pair, tmp_path: Path) -> None:
    def second_run(stage: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another run"):
            fapm(*pair, tmp_path / "out")

    fapm(*pair, tmp_path / "out", track=second_run)
    assert pairs.is_whole(tmp_path / "out")
