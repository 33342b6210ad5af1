"""The command line: data on stdout, people on stderr, one line for what is wrong, and codes that scripts can trust."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from pairs import fisherkit, one_line

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def fisher(checkpoint: Checkpoint, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fisher") / "fisher.pt"
    done = fisherkit("extract", checkpoint("llama"), prompts, "-o", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["inspect", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['fisherkit', *{arguments!r}]\n"
        "import fisherkit.__main__ as m\n"
        "try:\n    m.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'tqdm', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect_of_a_fisher_with_its_sidecar_needs_no_torch(fisher: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['fisherkit', 'inspect', {str(fisher)!r}]\n"
        "import fisherkit.__main__ as m\n"
        "try:\n    m.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layer\t")


def test_extract_prints_the_path_and_nothing_else(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    done = fisherkit("extract", checkpoint("llama"), prompts, "-o", tmp_path / "fisher.safetensors")
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'fisher.safetensors'}\n"
    assert "5 prompts, field prompt, chat template off, 0 truncated, 0 skipped" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fisher.json",
        "fisher.safetensors",
        "layer_importance.json",
    ]


def test_extract_reads_prompts_from_stdin(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = fisherkit(
        "extract", checkpoint("llama"), "-", "-o", tmp_path / "f.pt", "--json", "-q", stdin="Yes.\nWho are you?\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["provenance"]["prompts"]["samples"] == 2
    assert report["path"] == str(tmp_path / "f.pt")
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]


def test_inspect_in_a_pipe_is_tsv_in_model_order(fisher: Path) -> None:
    done = fisherkit("inspect", fisher)
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert header[:6] == ["layer", "tensors", "weights", "sum", "mean", "share"]
    assert [row[0] for row in rows] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    importance = json.loads((fisher.parent / "layer_importance.json").read_text())
    assert [float(row[3]) for row in rows] == [layer["sum"] for layer in importance["layers"]]


@pytest.mark.parametrize("by", ["layer", "module", "tensor"])
def test_inspect_goes_through_sort_head_and_cut(by: str, fisher: Path) -> None:
    command = (
        f"{sys.executable} -m fisherkit inspect {fisher} --by {by} | tail -n +2 | sort -t '\t' -k4,4gr | head -n 1"
    )
    top = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=True)
    own = fisherkit("inspect", fisher, "--by", by, "--sort", "sum", "--top", 1)
    assert top.stdout == own.stdout.splitlines()[1] + "\n"


def test_inspect_json_is_json(fisher: Path) -> None:
    rows = json.loads(fisherkit("inspect", fisher, "--json").stdout)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    lines = fisherkit("inspect", fisher, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_a_closed_pipe_exits_141_quietly(fisher: Path) -> None:
    command = f"{sys.executable} -m fisherkit inspect {fisher} --by tensor | true; echo ${{PIPESTATUS[0]}}"
    codes = set()
    for _ in range(3):  # the reader may be gone before or after the first write
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        codes.add(int(done.stdout))
    assert codes <= {0, 141}


def test_dry_run_needs_only_the_config(tmp_path: Path) -> None:
    text = {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
        "vocab_size": 262144,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
    }
    transformers.Gemma4Config(text_config=text, dtype="bfloat16").save_pretrained(tmp_path)
    done = fisherkit("extract", tmp_path, "builtin", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["targets"] == 410
    assert plan["parameters"] == 29_286_727_680
    assert plan["output_bytes"] == 58_573_455_360
    assert plan["weight_reads"] == 2
    assert plan["groups"] * plan["group_size"] >= 60
    assert plan["peak_bytes"]["host"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_dry_run_counts_samples_where_it_can(checkpoint: Checkpoint, prompts: Path) -> None:
    plan = json.loads(fisherkit("extract", checkpoint("mixtral"), prompts, "--dry-run", "--json").stdout)
    assert plan["samples"] == 5
    assert plan["targets"] == 51


# What is wrong is said in one line


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--group-size", "0"], "--group-size must be at least 1"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["--layers", "7-3"], "--layers takes numbers and ranges"),
        (["--targets", "("], "not a regular expression"),
        (["--device", "tpu"], "--device takes auto"),
        (["--max-shard-size", "many"], "--max-shard-size takes bytes"),
        (["--chat-template-kwargs", "[1]"], "takes a JSON object"),
    ],
)
def test_options_out_of_range_are_usage_errors(
    arguments: list[str], what: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    done = fisherkit("extract", checkpoint("llama"), prompts, "-o", tmp_path / "f.pt", *arguments)
    assert what in one_line(done, 2)


def test_unknown_options_and_missing_arguments_are_usage_errors() -> None:
    assert fisherkit("extract", "--frobnicate").returncode == 2
    assert fisherkit("inspect").returncode == 2


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "a b"}\n{"text": "c"}\n', "row 2"),
        ('{"prompt": "a b"}\n{oops\n', "line 2"),
    ],
)
def test_bad_prompt_files_are_named_with_the_row(
    content: str, what: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    line = one_line(fisherkit("extract", checkpoint("llama"), prompts, "-o", tmp_path / "f.pt"), 1)
    assert "prompts.jsonl" in line
    assert what in line


def test_a_prompt_of_one_token_is_skipped_and_alone_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    bare = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    assert len(bare("x").input_ids) == 2  # BOS and the letter: one loss token
    done = fisherkit("extract", checkpoint("llama"), "-", "-o", tmp_path / "f.pt", "--loss", "completion", stdin="x\n")
    assert "loss" in one_line(done, 1)


@pytest.mark.parametrize("damage", ["truncate", "magic", "missing", "outside", "pickle"])
def test_damaged_checkpoints_are_named(damage: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    shard = sorted(model.glob("*.safetensors"))[1]
    index = model / "model.safetensors.index.json"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "magic":
        shard.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    elif damage == "missing":
        shard.unlink()
    elif damage == "outside":
        index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    else:
        for file in model.glob("*.safetensors*"):
            file.unlink()
        code = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
        (model / "pytorch_model.bin").write_bytes(code)
    line = one_line(fisherkit("extract", model, prompts, "-o", tmp_path / "f.pt"), 1)
    assert ("pytorch_model.bin" if damage == "pickle" else "model-0000") in line
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "f.pt").exists()


def test_wrong_models_are_told_apart(prompts: Path, tmp_path: Path) -> None:
    assert "no such file or" in one_line(fisherkit("extract", "./nowhere", prompts, "-o", tmp_path / "f.pt"), 1)
    assert "org/name" in one_line(fisherkit("extract", tmp_path, prompts, "-o", tmp_path / "f.pt"), 1)
    transformers.BertConfig().save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    assert "no causal language model" in one_line(fisherkit("extract", tmp_path / "vit", "--dry-run"), 1)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = fisherkit("inspect", tmp_path / "nothing.pt", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr


def test_reports_are_written_beside_each_other(fisher: Path, tmp_path: Path) -> None:
    for suffix in ("html", "svg", "csv", "json"):
        done = fisherkit("inspect", fisher, "-o", tmp_path / f"report.{suffix}")
        assert done.stdout == f"{tmp_path}/report.{suffix}\n", done.stderr
        assert (tmp_path / f"report.{suffix}").stat().st_size > 100
    assert "exists already" in one_line(fisherkit("inspect", fisher, "-o", tmp_path / "report.csv"), 1)
