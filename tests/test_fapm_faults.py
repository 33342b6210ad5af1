"""fapm and merge with everything going wrong: kills, full disks, damaged files, sides that don't belong together.

What is not finished never looks finished; a second run gets there, to the bits of an undisturbed one; nothing of the
user's is replaced; and each failure is one line.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pairs
import pytest
import safetensors.torch
import torch
from pairs import Pair, cli, fisherkit, one_line, worked

from fisherkit.errors import FisherkitError, OutputError, ResumeError
from fisherkit.methods.merge.fapm import fapm
from fisherkit.methods.merge.merge import merge
from fisherkit.options import FapmOptions, MergeOptions
from fisherkit.pairs import rewrite

Q0 = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A bf16 llama in three shards and its fine-tune; tests must not change them."""
    return pairs.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with ties everywhere: ones, of which most became twos; head and embedding are tied and stored twice."""
    folder, drawing = tmp_path_factory.mktemp("level"), torch.Generator().manual_seed(2)
    ones = pairs.changed(pairs.make(folder)[0], folder / "ones", lambda _, tensor: torch.ones_like(tensor))
    config = json.loads((ones / "config.json").read_text())
    (ones / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    moved = {
        name: 1 + (torch.rand(tensor.shape, generator=drawing) < 0.7).to(tensor.dtype)
        for name, tensor in pairs.tensors(ones).items()
    }
    moved[HEAD] = moved[EMBEDDING]
    return ones, pairs.changed(ones, folder / "twos", lambda name, _: moved[name])


# Killed by the system: SIGKILL at one file operation after the other

# Forks a run and kills it at an operation that makes, renames or removes something: at every so-many-th and at all of
# the last ones. Then runs again in copies of what that left. Prints, per kill, the exit codes of the runs afterwards.
_KILLER = """
import json, os, shutil, sys
from pathlib import Path
import fisherkit.methods.merge.fapm, fisherkit.methods.merge.merge
from fisherkit.errors import FisherkitError
from fisherkit.options import FapmOptions, MergeOptions

method, base, tuned, options, start, root, step, last = json.loads(sys.argv[1])
make = {"fapm": fisherkit.methods.merge.fapm.fapm, "merge": fisherkit.methods.merge.merge.merge}[method]
Options = {"fapm": FapmOptions, "merge": MergeOptions}[method]
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.link"}

def run(folder, at=0, **flags):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = [0]
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
    def hook(event, details):
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or writes:
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), 9)
    os.chdir(folder)
    sys.addaudithook(hook)
    try:
        make(base, tuned, "out", Options(**{**options, **flags}))
        if not at:
            Path(root, "operations").write_text(str(seen[0]))
        os._exit(0)
    except FisherkitError as error:
        print(error, file=sys.stderr)
        os._exit(1)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(9)

older = bool(os.listdir(start))
shutil.copytree(start, Path(root, "0"))
assert run(Path(root, "0"), force=older) == 0
operations = int(Path(root, "operations").read_text())
found, flags = [], {"": {}, "force": {"force": True}, "resume": {"resume": True}}
for at in sorted({*range(1, operations, step), *range(operations - last, operations + 1)}):
    folder = Path(root, str(at))
    shutil.copytree(start, folder)
    assert run(folder, at, force=older) == -9
    after = {}
    for kind in flags if at >= operations - last else [list(flags)[at % 3]]:
        shutil.copytree(folder, f"{folder}{kind or 'again'}")
        after[kind] = run(f"{folder}{kind or 'again'}", **flags[kind])
    found.append([at, after])
print(json.dumps(found))
"""


def kill_everywhere(
    folder: Path, method: str, pair: Pair, options: dict[str, Any], older: bool, step: int, last: int
) -> None:
    """Check what every kill leaves, and what a second run makes of it."""
    run = {"fapm": fapm, "merge": merge}[method]
    make = {"fapm": FapmOptions, "merge": MergeOptions}[method]
    start, whole = folder / "start", folder / "whole"
    for place in (start, whole):
        place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole)
        run(*pair, "out", make(**options))  # type: ignore[operator]
        patch.chdir(start)
        if older:
            fapm(*pair, "out", FapmOptions(density=0.5, shard_bytes=60_000))
    expected, before = pairs.files(whole), pairs.files(start)
    words = json.dumps([method, *map(str, pair), options, str(start), str(folder / "killed"), step, last])
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, words], capture_output=True, text=True, check=False, cwd=pairs.ROOT
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert len(kills) > last
    for at, after in kills:
        left = pairs.files(folder / "killed" / str(at))
        output = {name: data for name, data in left.items() if name.startswith("out/")}
        assert output in ({}, before, expected), f"a mixture after kill {at}"
        under_way = (folder / "killed" / str(at) / "out.partial").is_dir()
        for flags, second in after.items():
            got = pairs.files(folder / "killed" / f"{at}{flags or 'again'}")
            if output and flags != "force" and not (flags == "resume" and under_way):  # nobody asked to replace it
                assert second == 1
                assert {name: data for name, data in got.items() if name.startswith("out/")} == output
            else:
                assert second == 0, (at, flags, done.stderr)
                assert got == expected, (at, flags)


@pytest.mark.parametrize(
    ("method", "options", "older", "step", "last"),
    [
        ("fapm", {}, False, 4, 8),
        ("fapm", {"scope": "global", "metric": "magnitude"}, True, 7, 24),  # the older output is removed last
        ("merge", {"alpha": 0.5, "shard_bytes": 30_000}, False, 9, 2),
    ],
)
def test_sigkill_at_any_file_operation_leaves_nothing_that_looks_finished(
    method: str, options: dict[str, Any], older: bool, step: int, last: int, pair: Pair, tmp_path: Path
) -> None:
    kill_everywhere(tmp_path, method, pair, options, older, step, last)


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


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def killed_at(stop: int) -> Callable[[str, int, int], None]:
    """A progress function that kills the run at its so-many-th tensor."""
    left = [stop]

    def track(stage: str, done: int, total: int) -> None:
        left[0] -= stage == "writing"
        if left[0] < 0:
            raise Killed

    return track


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
            fapm(*level, "out", FapmOptions(**options), track=killed_at(stop))
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
            run(pair[0], other, tmp_path / "out", options(force=True), track=killed_at(29))
        said: list[str] = []
        resumed = run(pair[0], other, tmp_path / "out", options(resume=True), say=said.append)
        assert resumed.warnings == whole.warnings
        assert len(whole.warnings) == 1
        assert any(whole.warnings[0] in line for line in said)


def test_a_run_killed_when_all_but_the_tidying_was_done_is_resumed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(OutputError, match="exists already"):
        fapm(*pair, "out")
    fapm(*pair, "out", FapmOptions(resume=True))
    assert pairs.files(tmp_path / "out") == finished
    assert os.listdir() == ["out"]


def test_what_is_gone_on_with_must_be_the_same_run(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_every_tensor(monkeypatch)
    base, tuned, out = *pair, tmp_path / "out"
    with pytest.raises(Killed):
        fapm(base, tuned, out, track=killed_at(9))
    other = pairs.fine_tune(base, tmp_path / "other", seed=8)
    with pytest.raises(ResumeError, match=r"left by a run with other tuned; .*without --resume to start over"):
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
        fapm(pair[0], lora, tmp_path / "out", track=killed_at(9))
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 16}))
    with pytest.raises(ResumeError, match="other tuned"):
        fapm(pair[0], lora, tmp_path / "out", FapmOptions(resume=True))


def test_a_sparse_delta_is_started_over(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    note_every_tensor(monkeypatch)
    delta = Path("delta.safetensors")
    fapm(*pair, "out", sparse=delta)
    expected = pairs.files(tmp_path)
    for name in ("out", "delta.safetensors", "delta.json"):
        shutil.rmtree(name) if name == "out" else Path(name).unlink()
    with pytest.raises(Killed):
        fapm(*pair, "out", sparse=delta, track=killed_at(9))
    assert not delta.exists()
    said: list[str] = []
    fapm(*pair, "out", FapmOptions(resume=True), sparse=delta, say=said.append)
    assert "starting over" in said[0]
    assert pairs.files(tmp_path) == expected

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    for name in ("delta.safetensors", "delta.json"):
        Path(name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "fisherkit.artefacts.sparse_delta.SparseWriter.finish", kill
        )  # the model is there, the delta is not
        with pytest.raises(Killed):
            fapm(*pair, "out", FapmOptions(force=True), sparse=delta)
    fapm(*pair, "out", FapmOptions(resume=True), sparse=delta)
    assert pairs.files(tmp_path) == expected


def test_two_runs_do_not_share_a_work_folder(pair: Pair, tmp_path: Path) -> None:
    def second_run(stage: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another run is at work there"):
            fapm(*pair, tmp_path / "out")

    fapm(*pair, tmp_path / "out", track=second_run)
    assert pairs.is_whole(tmp_path / "out")


# The disk


@pytest.mark.parametrize("limit", [1, 4000, 30_000])
@pytest.mark.parametrize("target", ["out", "--sparse", "out.safetensors"])
def test_a_full_disk_is_one_line_and_a_second_run_gets_there(
    limit: int, target: str, pair: Pair, tmp_path: Path
) -> None:
    words = ["fapm", *pair, *(["--sparse", "d.safetensors", "--density", "1"] if target == "--sparse" else [target])]
    first = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    line = one_line(fisherkit(*words, first=first, cwd=tmp_path))
    assert "disk full" in line
    assert not [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")]
    for again in ("--resume", "--force"):
        worked(cli_in(tmp_path, *words, again))
        assert not list(tmp_path.glob("*.partial"))
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def cli_in(folder: Path, *words: object) -> pairs.Done:
    """A command in another working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return cli(*words)


def test_no_room_is_said_before_the_work(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    line = one_line(cli("fapm", *pair, tmp_path / "out"))
    assert "out: needs 97.7 kB, and 5 kB are free on this disk" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(pair: Pair, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in one_line(cli("fapm", *pair, tmp_path / "out"))
    tmp_path.chmod(0o700)


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

    with pytest.raises(FisherkitError, match=r"model-00003-of-00003.safetensors: ends inside of tensor"):
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
    line = one_line(cli("fapm", base, grown, out))
    assert "model.embed_tokens.weight has 400 rows in BASE, 408 in FT" in line
    assert "resize BASE first, with model.resize_token_embeddings(408)" in line
    cut = pairs.changed(tuned, tmp_path / "cut", lambda _, tensor: tensor)
    pairs.edit(cut, Q0, lambda tensor: tensor[:30])
    assert f"{Q0} is [32, 32] in BASE, [30, 32] in FT" in one_line(cli("merge", base, cut, out))
    assert not out.exists()


def test_quantised_models_are_refused_and_wide_ones_are_not(pair: Pair, tmp_path: Path) -> None:
    packed = pairs.changed(pair[1], tmp_path / "fp8", lambda _, tensor: tensor)
    pairs.edit(packed, Q0, lambda tensor: tensor.to(torch.float8_e4m3fn))
    line = one_line(cli("fapm", pair[0], packed, tmp_path / "out"))
    assert f"{Q0} (F8_E4M3): the checkpoint is quantised; dequantise it first" in line
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
    line = one_line(cli("fapm", base, tuned, tmp_path / "out"))
    assert "lm_head.weight has diverged from the embedding" in line
    assert "save BASE with a head of its own" in line


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


# Outputs that must not be touched


def test_inputs_are_never_written_to(pair: Pair, tmp_path: Path) -> None:
    base, tuned = (shutil.copytree(one, tmp_path / one.name) for one in pair)
    before = pairs.files(tmp_path)
    (tmp_path / "link").symlink_to(base)
    for out in (base, tuned, base / "new", tuned / "a", tmp_path, tmp_path / "link"):
        line = one_line(cli("fapm", base, tuned, out, "--force"))
        assert "itself, or one lies inside of the other; choose another output" in line
    for option, path in (
        ("--report", tuned / "config.json"),
        ("--sparse", base / "model-00001-of-00003.safetensors"),
        ("--sparse", base / "config.safetensors"),  # whose description would be config.json
    ):
        line = one_line(cli("fapm", base, tuned, option, path, "--force"))
        assert "belongs to an input; choose another name" in line
    file = pairs.one_file(base, tmp_path / "file.safetensors")
    bits = file.read_bytes()
    for words in ([file], ["--sparse", file]):
        one_line(cli("fapm", file, tuned, *words, "--force"))
    assert file.read_bytes() == bits
    file.unlink()
    (tmp_path / "link").unlink()
    assert pairs.files(tmp_path) == before


def test_a_side_in_the_work_folder_is_not_dropped_with_it(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fapm(*pair, tmp_path / "out", track=killed_at(9))
    tuned = shutil.copytree(pair[1], tmp_path / "out.partial" / "mine")
    assert "FT lies in" in one_line(cli("fapm", pair[0], tuned, tmp_path / "out"))
    assert pairs.is_whole(tuned)


def test_outputs_of_one_run_do_not_overlap(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for words, what in (
        (["--sparse", "out.safetensors", "--report", "out.json"], "would be written twice"),
        (["out.safetensors", "--sparse", "out.safetensors"], "lies in out.safetensors"),
        (["out", "--report", "out/report.json"], "put it beside it"),
        (["out", "--figure", "out/figure.svg"], "put it beside it"),
        (["out", "--sparse", "out/delta.safetensors"], "put it beside it"),
    ):
        assert what in one_line(cli_in(tmp_path, "fapm", *pair, *words))
    assert pairs.files(tmp_path) == {}


def test_force_replaces_what_is_fisherkits_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    worked(cli("fapm", *pair, out, "--density", "0.5", "--max-shard-size", "9kB"))
    older = pairs.files(out)
    assert "exists already; choose another name, or --force" in one_line(cli("fapm", *pair, out))
    assert pairs.files(out) == older
    for name in ("notes.txt", "sub/notes.txt", "model-00001-of-00003.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
        line = one_line(cli("fapm", *pair, out, "--force"))
        assert f"holds '{name}', so --force does not replace this folder" in line
        assert (out / name).read_text() == "precious"
        (out / name).unlink()
    assert pairs.files(out) == older
    with pytest.raises(Killed):
        fapm(*pair, out, FapmOptions(force=True), track=killed_at(9))
    assert pairs.files(out) == older  # until the new one is whole
    worked(cli("fapm", *pair, out, "--force"))
    assert len(list(out.glob("*.safetensors"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    worked(cli("merge", *pair, out, "--force", "--alpha", "0.5"))  # one of the other command is fisherkit's as well


def test_folders_of_others_are_never_replaced(pair: Pair, tmp_path: Path) -> None:
    model = shutil.copytree(pair[1], tmp_path / "model")
    before = pairs.files(model)
    for flags in ([], ["--force"], ["--resume"]):
        one_line(cli("fapm", *pair, model, *flags))
    assert pairs.files(model) == before
    (tmp_path / "file").write_text("precious")
    assert "what is there is not a folder" in one_line(cli("fapm", *pair, tmp_path / "file", "--force"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    for flags in ([], ["--force"], ["--resume"]):
        line = one_line(cli("fapm", *pair, tmp_path / "out", *flags))
        assert "in the way and no work folder of ours" in line
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    worked(cli("fapm", *pair, tmp_path / "empty"))


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("out.pt", "models are written as safetensors"),
        ("out.bin", "models are written as safetensors"),
        ("out.safetensor", "models are written as safetensors"),
        ("a/b", "there is no folder a; make it first"),
        (".", "not a name for an output"),
        ("", "not a name for an output"),
    ],
)
def test_outputs_that_could_not_be_made_are_refused_at_once(out: str, what: str, pair: Pair, tmp_path: Path) -> None:
    assert what in one_line(cli_in(tmp_path, "fapm", *pair, out))
    assert list(tmp_path.iterdir()) == []
