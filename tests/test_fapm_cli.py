"""``fisherkit fapm`` at the command line: what it prints where, what it writes, and what comes of what it wrote."""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from fractions import Fraction
from pathlib import Path

import pairs
import pytest
import torch
from huggingface_hub import constants, metadata_load
from pairs import Pair, cli, fisherkit, one_line, worked
from transformers import AutoModelForCausalLM, AutoTokenizer

Q0 = "model.layers.0.self_attn.q_proj.weight"
MANIFEST = "fisherkit.json"


@pytest.fixture(scope="module")
def lora(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on six of the base's matrices."""
    held = {name: tensor for name, tensor in pairs.tensors(pair[0]).items() if "q_proj" in name or "down_proj" in name}
    return pairs.adapter(tmp_path_factory.mktemp("lora") / "lora", held)


# What goes where


def test_the_path_alone_is_on_stdout_for_scripts(pair: Pair, tmp_path: Path) -> None:
    command = (
        'set -e; OUT=$("$1" -m fisherkit fapm "$2" "$3" "$4" 2>/dev/null); test -f "$OUT/config.json"; echo "$OUT"'
    )
    words = ["bash", "-c", command, "-", sys.executable, *map(str, (*pair, tmp_path / "out"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("option", "name"), [("--sparse", "d.safetensors"), ("--report", "r.json"), ("--figure", "f.svg")]
)
def test_without_an_output_folder_the_file_is_printed(option: str, name: str, pair: Pair, tmp_path: Path) -> None:
    assert worked(cli("fapm", *pair, option, tmp_path / name)) == f"{tmp_path / name}\n"
    beside = {"d.safetensors": {"d.json"}}.get(name, set())
    assert {path.name for path in tmp_path.iterdir()} == {name} | beside


def test_json_is_the_report_and_quiet_is_silent(pair: Pair, tmp_path: Path) -> None:
    done = fisherkit("fapm", *pair, tmp_path / "out", "--json", "--quiet", "--report", tmp_path / "report.json")
    assert worked(done) == json.dumps(json.loads((tmp_path / "report.json").read_text()), indent=1) + "\n"
    assert done.stderr == ""
    report, made = json.loads(done.stdout), json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert made == {**report, "path": ".", "files": made["files"]}  # what is published names no folder of this machine
    assert report["tensors"].keys() == pairs.tensors(pair[0]).keys()
    for name, row in report["tensors"].items():
        assert row["kept"] == int(Fraction(1, 10) * row["weights"]), name


def test_every_number_that_is_written_is_json(pair: Pair, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    tuned = pairs.changed(pair[1], tmp_path / "tuned", lambda name, tensor: tensor if "0" in name else tensor * 0)
    for density in ("0", "1"):
        out = tmp_path / density
        text = worked(cli("fapm", pair[0], tuned, out, "--density", density, "--json"))
        for written in (text, (out / MANIFEST).read_text()):
            assert json.loads(written, parse_constant=refuse)["density"] == int(density)


def test_a_closed_pipe_ends_in_141_and_silence(pair: Pair, tmp_path: Path) -> None:
    for number, arguments in enumerate(([tmp_path / "out"], ["--dry-run"], ["--sweep", "0.5"])):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "fisherkit", "fapm", *pair, *arguments, "--quiet"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, ""), number
    assert pairs.is_whole(tmp_path / "out")


@pytest.mark.parametrize("command", ["fapm", "merge"])
def test_help_has_an_example_that_names_the_command(command: str) -> None:
    text = worked(cli(command, "--help"))
    assert f"Example: fisherkit {command} org/base my-fine-tune out" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["fapm", "OUT", "--sparse", "d.safetensors", "--report", "r.json", "--figure", "f.html"],
        ["fapm", "--figure", "f.svg", "--scope", "global"],
        ["fapm", "--sweep", "0.5,0.9"],
        ["fapm", "--dry-run"],
        ["fapm", "OUT", "--metric", "della", "--max-shard-size", "20kB"],
        ["merge", "OUT", "--alpha", "0.5", "--report", "r.json"],
    ],
)
def test_no_run_brings_in_torch(arguments: list[str], pair: Pair, tmp_path: Path) -> None:
    command, *rest = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    watch = "import atexit; atexit.register(lambda: print('HEAVY', {'torch', 'transformers'} & set(sys.modules)))"
    done = fisherkit(command, *pair, *rest, "--quiet", first=watch, cwd=tmp_path, fresh=True)
    assert worked(done).endswith("HEAVY set()\n")
    assert done.stderr == ""


def test_the_library_brings_in_no_torch(pair: Pair, lora: Path) -> None:
    code = (
        "import sys, fisherkit.methods.merge.fapm_preview as f, fisherkit.methods.merge.merge\n"
        f"f.sweep_fapm({str(pair[0])!r}, {str(lora)!r}, [0.5])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=pairs.ROOT)
    assert done.returncode == 0, done.stderr


# What is in the output


def odd_pair(folder: Path) -> Pair:
    """A base of two types and a fine-tune in float32, with what trainers and users leave beside the weights."""
    base, tuned = pairs.make(folder)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        pairs.edit(base, name, torch.Tensor.float)
    wide = pairs.changed(tuned, folder / "wide", lambda _, tensor: tensor.float())
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"dtype": "float32", "rms_norm_eps": 1e-5}))
    (wide / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    (wide / "chat_template.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text("the base's")
    (base / "preprocessor_config.json").write_text("{}")
    (wide / "optimizer.pt").write_bytes(b"state")
    (wide / "training_args.bin").write_bytes(b"state")
    (wide / "checkpoint-3").mkdir()
    (wide / "checkpoint-3" / "config.json").write_text("{}")
    card = "---\nlicense: mit\nbase_model: org/base\n---\n# Mine\n"
    (wide / "README.md").write_text(card)
    return base, wide


def test_the_output_is_the_bases_layout_with_the_fine_tunes_surroundings(tmp_path: Path) -> None:
    base, tuned = odd_pair(tmp_path)
    done = cli("fapm", base, tuned, tmp_path / "out", "--sparsity", "0.5")
    out = Path(worked(done).strip())
    ours, theirs, got = (pairs.tensors(folder) for folder in (base, tuned, out))
    assert list(got) == list(ours)
    for name, tensor in got.items():
        assert tensor.dtype == ours[name].dtype, name
        from_tuned = theirs[name].to(tensor.dtype)
        assert bool(((tensor == ours[name]) | (tensor == from_tuned)).all()), name
    index = json.loads((out / pairs.INDEX).read_text())
    assert index["weight_map"] == json.loads((base / pairs.INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["rms_norm_eps"]) == ("bfloat16", 1e-5)
    assert json.loads((out / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "preprocessor_config.json").read_text() == "{}"
    listed = json.loads((out / MANIFEST).read_text())["files"]
    assert sorted([*listed, MANIFEST]) == sorted(pairs.files(out))
    assert not {"optimizer.pt", "training_args.bin", "checkpoint-3/config.json"} & pairs.files(out).keys()
    assert (out / "README.md").read_text().endswith("# Mine\n")


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3-moe", "gemma4-31b"])
def test_the_output_loads_as_any_other_model(architecture: str, tmp_path: Path) -> None:
    base, tuned = pairs.make(tmp_path, architecture)
    out = tmp_path / "out"
    worked(cli("fapm", base, tuned, out, "--scope", "layer"))
    model, found = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert not found["unexpected_keys"]
    assert next(model.parameters()).dtype == torch.bfloat16
    tokens = AutoTokenizer.from_pretrained(out)("Name three rivers.", return_tensors="pt").input_ids
    plain, unpruned = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        ours, bases, tuneds = (one.float()(tokens).logits for one in (model, plain, unpruned))
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, bases)
    assert not torch.equal(ours, tuneds)


def test_a_chosen_shard_size_bounds_every_shard(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    worked(cli("fapm", *pair, out, "--max-shard-size", "10kB"))
    shards = {path.name: pairs.tensors(path) for path in out.glob("*.safetensors")}
    assert len(shards) > 3
    for held in shards.values():
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 10_000
    weight_map = json.loads((out / pairs.INDEX).read_text())["weight_map"]
    assert weight_map == {name: shard for shard, held in shards.items() for name in held}
    worked(cli("fapm", *pair, tmp_path / "one", "--max-shard-size", "1GB"))
    assert not (tmp_path / "one" / pairs.INDEX).exists()
    assert pairs.same_checkpoint(out, tmp_path / "one")


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_get_the_permissions_that_the_user_asks_for(
    mask: int, file: int, folder: int, pair: Pair, tmp_path: Path
) -> None:
    beside = ("--sparse", "d.safetensors", "--report", "r.json", "--figure", "f.svg")
    worked(fisherkit("fapm", *pair, "out", *beside, first=f"import os; os.umask({mask})", cwd=tmp_path))
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path.name
    assert stat.S_IMODE((tmp_path / "out" / "model-00001-of-00003.safetensors").stat().st_mode) == file


def test_the_card_says_where_it_comes_from(pair: Pair, tmp_path: Path) -> None:
    worked(cli("fapm", *pair, tmp_path / "out", "--sparsity", "0.75", "--force"))
    fields = metadata_load(tmp_path / "out" / "README.md")
    assert "base_model" not in fields  # folders: no names of models
    assert {"fisherkit", "fapm"} <= set(fields["tags"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"fisherkit fapm {pair[0].name} {pair[1].name} out --sparsity 0.75\n" in text
    assert not [path.name for path in (tmp_path / "out").glob("*.*") if str(tmp_path).encode() in path.read_bytes()]
    kept = json.loads((tmp_path / "out" / MANIFEST).read_text())["totals"]["kept"]
    assert f"{kept:,} of" in text


# Ways to name the sides


def test_layout_of_the_sides_makes_no_difference(pair: Pair, tmp_path: Path) -> None:
    base, tuned = pair
    worked(cli("fapm", base, tuned, tmp_path / "out"))
    files = pairs.one_file(base, tmp_path / "b.safetensors"), pairs.one_file(tuned, tmp_path / "f.safetensors")
    (tmp_path / "bin").mkdir()
    torch.save(pairs.tensors(base), tmp_path / "bin" / "pytorch_model.bin")
    shutil.copy(base / "config.json", tmp_path / "bin")
    for number, sides in enumerate([files, (base, files[1]), (files[0], tuned), (tmp_path / "bin", tuned)]):
        for out in (tmp_path / f"out-{number}", tmp_path / f"out-{number}.safetensors"):
            done = cli("fapm", *sides, out)
            assert worked(done) == f"{out}\n"
            assert pairs.same_checkpoint(out, tmp_path / "out"), (number, out.name)
    assert not (tmp_path / "out-0" / "config.json").exists()
    assert "neither side has a config.json" in cli("fapm", *files, tmp_path / "again").stderr


def test_models_come_from_the_hubs_cache(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair
    commit, model = "a" * 40, tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / commit
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for number, name in enumerate(("org/name", f"org/name@{commit}")):
        out = tmp_path / f"out-{number}"
        worked(cli("fapm", name, tuned, out))
        assert pairs.tensors(out).keys() == pairs.tensors(base).keys()
        assert not [path for path in out.iterdir() if path.is_symlink()]
        assert metadata_load(out / "README.md")["base_model"] == ["org/name"]
        made = json.loads((out / MANIFEST).read_text())["base"]
        assert made == {"id": "org/name", "revision": commit}
    assert "not cached at revision 'v2'" in one_line(cli("fapm", "org/name@v2", tuned, tmp_path / "o"))
    assert "not a local path, and not cached" in one_line(cli("fapm", "org/none", tuned, tmp_path / "o"))
    assert "is BASE itself" in one_line(cli("fapm", "org/name", tuned, snapshot, "--force"))
    assert not (tmp_path / "o").exists()


def test_an_adapter_is_pruned_by_a_tenth_unless_told_otherwise(pair: Pair, lora: Path, tmp_path: Path) -> None:
    base, out = pair[0], tmp_path / "out"
    done = cli("fapm", base, lora, out, "--json")
    report = json.loads(worked(done))
    assert report["density"] == 0.9
    assert report["tuned"]["kind"] == "adapter"
    assert "does not bear" not in done.stderr
    ours, got = pairs.tensors(base), pairs.tensors(out)
    assert {name for name in ours if not torch.equal(ours[name], got[name])} == report["tensors"].keys()
    assert len(report["tensors"]) == 6
    for row in report["tensors"].values():
        assert row["kept"] == row["weights"] * 9 // 10
    done = cli("fapm", base, lora, tmp_path / "most", "--sparsity", "0.9")
    worked(done)
    assert "note: FT is an adapter; a low-rank delta does not bear 90% sparsity" in done.stderr


# Reports


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_a_sweep_is_what_single_runs_say(scope: str, pair: Pair, tmp_path: Path) -> None:
    sparsities = ("0", "0.5", "0.9", "0.999", "1")
    done = cli("fapm", *pair, "--sweep", ",".join(sparsities), "--scope", scope, "--report", tmp_path / "r.json")
    header, *lines = [line.split("\t") for line in worked(done).splitlines()]
    assert header == ["sparsity", "kept", "energy_kept"]
    assert [float(line[0]) for line in lines] == [float(text) for text in sparsities]
    swept = json.loads((tmp_path / "r.json").read_text())["sweep"]
    for sparsity, line, part in zip(sparsities, lines, swept, strict=True):
        single = json.loads(
            worked(cli("fapm", *pair, tmp_path / sparsity, "--sparsity", sparsity, "--scope", scope, "--json"))
        )
        assert int(line[1]) == single["totals"]["kept"]
        assert float(line[2]) == pytest.approx(single["totals"]["energy_kept"], rel=1e-6)
        counts = ("kept", "zero_deltas", "zero_weights", "weights", "threshold")
        for name, row in single["tensors"].items():
            assert {key: row[key] for key in counts} == {key: part["tensors"][name][key] for key in counts}, name
    assert not (tmp_path / "r.json.partial").exists()


def test_a_plan_tells_the_truth_and_writes_nothing(pair: Pair, tmp_path: Path) -> None:
    arguments = ["--sparsity", "0.8", "--scope", "layer", "--only", "matrices", "--skip", "o_proj"]
    plan = json.loads(worked(cli("fapm", *pair, tmp_path / "out", *arguments, "--dry-run", "--json")))
    assert list(tmp_path.iterdir()) == []
    report = json.loads(worked(cli("fapm", *pair, tmp_path / "out", *arguments, "--json")))
    held = pairs.tensors(tmp_path / "out")
    assert plan["output_bytes"] == sum(tensor.nbytes for tensor in held.values())
    assert (plan["tensors"], plan["weights"]) == (report["totals"]["tensors"], report["totals"]["weights"])
    assert plan["left_alone"] == len(held) - plan["tensors"]
    assert plan["kept_at_most"] == report["totals"]["kept"]  # more than a fifth of the entries has changed
    assert plan["density"] == report["density"] == 0.2
    lines = dict(line.split("\t") for line in worked(cli("fapm", *pair, "--dry-run")).splitlines())
    assert lines.keys() == plan.keys()
    assert (lines["metric"], lines["scope"], lines["density"]) == ("fapm", "tensor", "0.1")


@pytest.mark.parametrize("arguments", [["OUT"], ["--report", "r.json"], ["--sweep", "0.5"]])
def test_unrelated_models_are_warned_of_in_every_kind_of_run(arguments: list[str], pair: Pair, tmp_path: Path) -> None:
    other = pairs.changed(pair[0], tmp_path / "other", lambda _, tensor: torch.randn(tensor.shape).to(tensor.dtype))
    words = [tmp_path / word if "." not in word or word == "r.json" else word for word in arguments if word[0] != "-"]
    words = [word for option in arguments if option[0] == "-" for word in [option]] + words
    done = cli("fapm", pair[0], other, *words)
    worked(done)
    assert "matrices changed sign, as in" in done.stderr
    assert "FT does not look like a fine-tune of BASE" in done.stderr


def test_figures_are_whole_files(pair: Pair, tmp_path: Path) -> None:
    suffixes = ("svg", "html") if importlib.util.find_spec("matplotlib") is None else ("svg", "html", "png")
    for suffix in suffixes:
        figure = tmp_path / f"figure.{suffix}"
        worked(cli("fapm", *pair, tmp_path / suffix, "--figure", figure))
        assert figure.stat().st_size > 1000
    assert ET.fromstring((tmp_path / "figure.svg").read_text()).tag.endswith("svg")  # noqa: S314
    if "png" in suffixes:
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "exists already" in one_line(cli("fapm", *pair, tmp_path / "o", "--figure", tmp_path / "figure.svg"))
    assert not (tmp_path / "o").exists()


# Sparse deltas


@pytest.mark.parametrize(
    "arguments",
    [
        ["--scope", "tensor"],
        ["--scope", "global", "--density", "0.004"],
        ["--only", "matrices", "--skip", "down_proj"],
        ["--only", "mlp", "--rest", "base"],
        ["--metric", "random", "--seed", "3", "--density", "1"],
    ],
)
def test_a_sparse_delta_on_its_base_is_the_same_model(arguments: list[str], pair: Pair, tmp_path: Path) -> None:
    delta, alone = tmp_path / "delta.safetensors", tmp_path / "alone.safetensors"
    worked(cli("fapm", *pair, tmp_path / "out", "--sparse", delta, *arguments))
    worked(cli("fapm", *pair, "--sparse", alone, *arguments))
    assert alone.read_bytes() == delta.read_bytes()
    worked(cli("merge", pair[0], delta, tmp_path / "again"))
    assert pairs.same_checkpoint(tmp_path / "out", tmp_path / "again")
    made = json.loads((tmp_path / "delta.json").read_text())
    assert (made["format"], made["file"], made["base"]) == ("fisherkit.delta/1", "delta.safetensors", "base")


def test_an_adapters_delta_on_its_base_is_the_same_model(pair: Pair, lora: Path, tmp_path: Path) -> None:
    worked(cli("fapm", pair[0], lora, tmp_path / "out", "--sparse", tmp_path / "delta.safetensors"))
    worked(cli("merge", pair[0], tmp_path / "delta.safetensors", tmp_path / "again"))
    assert pairs.same_checkpoint(tmp_path / "out", tmp_path / "again")


def test_a_delta_is_refused_on_another_base_and_without_its_description(pair: Pair, tmp_path: Path) -> None:
    base, tuned = pair
    delta, out = tmp_path / "delta.safetensors", tmp_path / "out"
    worked(cli("fapm", base, tuned, "--sparse", delta))
    assert "was made for another base (base)" in one_line(cli("merge", tuned, delta, out))
    other = pairs.changed(base, tmp_path / "other", lambda name, one: pairs.put(one, 3.0, 0) if name == Q0 else one)
    assert "was made for another base" in one_line(cli("merge", other, delta, out))
    assert "is a sparse delta; BASE is the model" in one_line(cli("fapm", delta, tuned, out))
    delta.rename(tmp_path / "renamed.safetensors")
    line = one_line(cli("merge", base, tmp_path / "renamed.safetensors", out))
    assert "is a sparse delta without its renamed.json" in line
    assert not out.exists()


def test_the_description_of_a_delta_replaces_nothing_of_the_users(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    line = one_line(cli("fapm", *pair, "--sparse", tmp_path / "notes.safetensors", "--force"))
    assert re.search(r"notes\.json: exists already.*notes\.safetensors", line)
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    worked(cli("fapm", *pair, "--sparse", tmp_path / "d.safetensors"))
    assert "exists already" in one_line(cli("fapm", *pair, "--sparse", tmp_path / "d.safetensors"))
    worked(cli("fapm", *pair, "--sparse", tmp_path / "d.safetensors", "--force"))


# Usage


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "nothing to write: give OUT, or one of --sparse, --report"),
        (["OUT", "--sparsity", "0.5", "--density", "0.5"], "--sparsity and --density say the same thing"),
        (["OUT", "--sparsity", "1.5"], "--sparsity must lie between 0 and 1, not 1.5"),
        (["OUT", "--density", "nan"], "--density must lie between 0 and 1, not nan"),
        (["OUT", "--metric", "ties"], "--metric must be one of fapm, relative, magnitude"),
        (["OUT", "--scope", "model"], "--scope must be one of tensor, layer, global"),
        (["OUT", "--scope", "global", "--metric", "dare"], "is for metrics that select; dare has no quota"),
        (["OUT", "--only", "("], "--only '(' is not a regular expression"),
        (["OUT", "--skip", "["], "--skip '[' is not a regular expression"),
        (["OUT", "--only", "q_proj", "--only", "zzz"], "--only 'zzz': no tensor of both sides has such a name"),
        (["OUT", "--skip", "."], "--only and --skip leave no tensor to work on"),
        (["OUT", "--only", "q_proj", "--skip", "self_attn"], "leave no tensor to work on"),
        (["OUT", "--nan", "zero"], "--nan must be one of refuse, keep-base"),
        (["OUT", "--rest", "ft"], "--rest must be one of tuned, base"),
        (["OUT", "--seed", "-1"], "--seed must be at least 0, not -1"),
        (["OUT", "--max-shard-size", "large"], "--max-shard-size takes bytes such as 5GB"),
        (["OUT", "--max-shard-size", "0"], "--max-shard-size must be at least 1"),
        (["OUT", "--report", "r.txt"], "a report ends in .json"),
        (["OUT", "--figure", "f.gif"], "a figure ends in .html, .svg or .png"),
        (["OUT", "--sparse", "d.pt"], "a sparse delta ends in .safetensors"),
        (["OUT", "--sparse", "d.safetensors", "--metric", "della"], "--sparse is for metrics that select"),
        (["--sweep", "0.5,x"], "--sweep takes numbers such as 0.5,0.9,0.95, not '0.5,x'"),
        (["--sweep", ""], "--sweep takes numbers"),
        (["--sweep", "0.5,2"], "--sweep must lie between 0 and 1, not 2"),
        (["--sweep", "0.5", "--metric", "wise-ft"], "--sweep is for metrics that select"),
        (["--sweep", "0.5", "--sparse", "d.safetensors"], "they go without --sparse and --figure"),
        (["--dry-run", "--sweep", "0.5"], "it goes without --sweep and --report"),
    ],
)
def test_options_out_of_range_are_usage_errors(
    arguments: list[str], what: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert what in one_line(cli("fapm", *pair, *arguments), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--frobnicate"], ["--sparsity", "much"], ["--sparsity"], ["one", "too", "many"]]
)
def test_what_the_command_does_not_know_is_a_usage_error(arguments: list[str], pair: Pair, tmp_path: Path) -> None:
    done = cli("fapm", *pair, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr
    assert cli("fapm", pair[0]).returncode == 2
    assert not (tmp_path / "out").exists()
