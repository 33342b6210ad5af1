import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from fisher_files import MODULES, fisher_tensors, write_fisher
from rich.console import Console
from terminals import in_a_terminal

from fisherkit.cli import console
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.methods.inspect.summary import Summary, inspect
from fisherkit.render import formatting, terminal

WEIRD = "model.layers.0.[bold]\x1b[31mé\n.weight"


def drawn(
    summary: Summary, *, encoding: str = "utf-8", colour: bool = False, width: int = 80, every: bool = False
) -> str:
    """What the terminal would show; raises UnicodeEncodeError where it could not."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    screen = Console(
        file=stream, width=width, force_terminal=colour, color_system="truecolor" if colour else None, highlight=False
    )
    terminal.draw(summary, screen, every=every)
    stream.seek(0)
    return stream.read()


def heat_map(text: str, module: str) -> list[str]:
    """A module's cells in the three layers of the heat map, without the blanks around them."""
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.split() == ["q", "k", "v", "up"])
    start = lines[at].index(f" {module} ") + 1
    return [line[start : start + 7].strip() for line in lines[at + 1 : at + 4]]


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    tensors = fisher_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    return inspect(write_fisher(tmp_path / "fisher.safetensors", tensors))


def test_a_pipe_gets_full_names_and_exact_numbers(summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    console.show(summary)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("\t")[:6] == ["layer", "tensors", "weights", "sum", "mean", "share"]
    assert [row.split("\t")[0] for row in rows] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert float(rows[0].split("\t")[3]) == summary.rows[0].sum


def test_warnings_go_to_stderr_and_json_stays_json(summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    console.show(summary, "json")
    told = capsys.readouterr()
    assert json.loads(told.out) == summary.records()
    assert told.err.startswith("warning: 1 tensor zero throughout")
    assert "model.layers.1.mlp.up_proj.weight" in told.err


def test_an_unknown_format_is_refused(summary: Summary) -> None:
    with pytest.raises(OptionError, match=r"--format.*auto, table, tsv, csv, json, jsonl"):
        console.show(summary, "xml")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1"])
def test_the_table_draws_in_every_encoding_and_fits(summary: Summary, encoding: str) -> None:
    text = drawn(summary, encoding=encoding)
    assert max(map(len, text.splitlines())) <= 80
    assert ("█" in text) == (encoding == "utf-8")
    assert "The top 1 % of the weights hold" in text
    zero, missing = "0", "·" if encoding == "utf-8" else "-"
    assert [cell == zero for cell in heat_map(text, "up")] == [False, True, False]
    assert [cell == missing for cell in heat_map(text, "v")] == [False, False, True]


def test_seven_modules_in_sixty_layers_fit_eighty_columns(tmp_path: Path) -> None:
    modules = [*MODULES, "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    tensors = {f"model.layers.{i}.{module}.weight": torch.rand(2, 3) for i in range(60) for module in modules}
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", tensors))
    text = drawn(summary, colour=True, every=True)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert max(map(len, plain)) <= 80
    assert sum(line.startswith(" 7 ") or line.startswith("59 ") for line in plain) == 3  # heat map twice, table once
    assert "\x1b[48;2;" in text
    assert "gate" in text


def test_many_modules_wrap_into_panels_with_a_key(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.block.part_{j}.weight": torch.rand(2, 3) for i in range(2) for j in range(60)}
    text = drawn(inspect(write_fisher(tmp_path / "fisher.safetensors", tensors)))
    assert "60 block.part_59" in text
    assert "1  2  3  4" in text


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    summary = inspect(write_fisher(tmp_path / "fisher.pt", {WEIRD: torch.ones(3, 2)}), by="tensor")
    text = drawn(summary)
    assert "\x1b" not in text
    assert "[bold]" in text
    assert r"\x1b[31mé\n" in text


def test_values_that_are_not_finite_are_shown_loudly(tmp_path: Path) -> None:
    tensors = fisher_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    text = drawn(inspect(write_fisher(tmp_path / "fisher.pt", tensors)))
    assert re.search("so far +not finite", text)
    assert "not finite: 1 value in 1 tensor: model.layers.1.mlp.up_proj.weight" in " ".join(text.split())


def test_a_comparison_shows_agreement_in_eighty_columns(tmp_path: Path) -> None:
    here = write_fisher(tmp_path / "here.safetensors")
    text = drawn(inspect(here, write_fisher(tmp_path / "there.pt"), by="module"))
    assert "rank corr" in text
    assert "self_attn.q_proj" in text
    assert "1.000" in text
    assert max(map(len, text.splitlines())) <= 80


def test_layer_importance_and_masks_have_tables(tmp_path: Path) -> None:
    (tmp_path / "layer_importance.json").write_text("[1, 3]")
    assert "75.0 %" in drawn(inspect(tmp_path / "layer_importance.json"))
    flags = {"model.layers.0.a.weight": torch.tensor([True, False]), "model.layers.1.a.weight": torch.ones(2) > 0}
    text = drawn(inspect(write_fisher(tmp_path / "mask.safetensors", flags, statistics=False)))
    assert "density" in text


SHOW = "from fisherkit import inspect; from fisherkit.cli import console; console.show(inspect({!r}))"


def test_a_terminal_gets_colours_unless_told_not_to(tmp_path: Path) -> None:
    code = SHOW.format(str(write_fisher(tmp_path / "fisher.safetensors")))
    assert "\x1b[48;5;" in in_a_terminal(code)
    plain = in_a_terminal(code, NO_COLOR="1")
    assert "\x1b[48" not in plain
    assert "▓" in plain
    assert "#" in in_a_terminal(code, NO_COLOR="1", PYTHONIOENCODING="ascii")


def test_rows_are_exact_in_a_pipe_and_short_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"model": "base", "loss": 1 / 3}, {"model": "tuned\x1b", "loss": None}]
    console.show_rows(rows, ("model", "loss"))
    assert capsys.readouterr().out == f"model\tloss\nbase\t{1 / 3!r}\ntuned\\x1b\tnull\n"
    shown = in_a_terminal(
        f"from fisherkit.cli import console; console.show_rows({rows!r}, ('model', 'loss'))", NO_COLOR="1"
    )
    lines = [line.split() for line in shown.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()]
    assert lines == [["model", "loss"], ["base", "0.3333"], ["tuned\\x1b", "-"]]


# Errors


def failing(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (CheckpointError("x.pt: broken;\n fetch it again"), 1, "Error: x.pt: broken; fetch it again\n"),
        (OptionError("--top must be at least 1"), 2, "Error: --top must be at least 1\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (OSError(28, "No space left on device", "/out/f.pt"), 1, "Error: /out/f.pt: No space left on device\n"),
        (OSError(5, "Input/output error"), 1, "Error: Input/output error\n"),
        (ValueError("a\nb"), 1, "Error: unexpected ValueError: a b; run again with --debug for the whole story\n"),
        (CheckpointError("\x1b[2J"), 1, "Error: \\x1b[2J\n"),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.guard(failing(error)) == code
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_says_what_needs_less(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.guard(failing(error)) == 1
    assert "out of memory; a smaller --group-size or --batch-tokens needs less" in capsys.readouterr().err


def test_debug_and_typers_own_exceptions_pass() -> None:
    with pytest.raises(CheckpointError, match="broken"):
        console.guard(failing(CheckpointError("broken")), debug=True)
    with pytest.raises(typer.BadParameter, match="no"):
        console.guard(failing(typer.BadParameter("no")))
    with pytest.raises(typer.Exit):
        console.guard(failing(typer.Exit(3)))
    assert console.guard(lambda: None) == 0


def test_a_closed_pipe_is_silent_and_141() -> None:
    code = (
        "import sys; from fisherkit.cli import console\n"
        "def run():\n  for i in range(200000): print(i)\n"
        "sys.exit(console.guard(run))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_importing_the_terminal_imports_no_torch() -> None:
    code = (
        "import sys, fisherkit.cli.console, fisherkit.render.files\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Numbers and names


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (29_286_727_680, "29.3 G")]
)
def test_counts_are_short(number: int, text: str) -> None:
    assert formatting.count(number) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "-"), (0.0, "0.00 %"), (1e-9, "<0.01 %"), (0.0123, "1.23 %"), (0.0999999, "10.0 %"), (1, "100.0 %")],
)
def test_shares_are_percents(share: float | None, text: str) -> None:
    assert formatting.percent(share) == text


def test_short_names_still_tell_modules_apart() -> None:
    names = ["self_attn.q_proj", "cross_attn.q_proj", "mlp.up_proj", "up_proj", "norm"]
    short = formatting.short_names(names)
    assert len(set(short.values())) == len(names)
    assert formatting.short_names(["self_attn.q_proj", "mlp.up_proj"]) == {"self_attn.q_proj": "q", "mlp.up_proj": "up"}


def test_colours_run_from_dark_to_light_and_stay_at_the_ends() -> None:
    brightness = [sum(formatting.colour(level / 20)) for level in range(21)]
    assert brightness == sorted(brightness)
    assert formatting.colour(-1) == formatting.colour(0)
    assert formatting.colour(2) == formatting.colour(1)


@pytest.mark.parametrize("kind", [CheckpointError, OptionError, ValueError, MemoryError])
def test_an_error_is_one_line_of_at_most_300_characters(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind("what is wrong: " + "x\n" * 100_000 + "; what to do")

    console.guard(fail)
    line = capsys.readouterr().err
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    assert len(line) <= 301
    assert "what is wrong" in line
    if kind in (CheckpointError, OptionError):
        assert line.endswith("; what to do\n")
