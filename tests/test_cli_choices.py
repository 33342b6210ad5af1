"""Options that take one of a few words: the help lists them, a shell completes them, a typo is guessed at."""

from typing import get_args

import pytest
import typer
from typer.testing import CliRunner, Result

from fisherkit.cli import app
from fisherkit.cli.app import Command
from fisherkit.errors import OptionError
from fisherkit.options import ExtractOptions, FapmOptions, MaskOptions, MergeOptions, Metric
from fisherkit.options import extract as extract_choices
from fisherkit.options import mask as mask_choices
from fisherkit.options.checks import not_a_choice
from fisherkit.options.inspect import By, Form

CHOICES = [
    ("extract", "--dtype", extract_choices.DType),
    ("extract", "--store", extract_choices.Store),
    ("extract", "--loss", extract_choices.Loss),
    ("extract", "--labels", extract_choices.Labels),
    ("extract", "--reduction", extract_choices.Reduction),
    ("extract", "--engine", extract_choices.Engine),
    ("extract", "--statistics", extract_choices.Statistics),
    ("extract", "--chat-template", extract_choices.ChatTemplate),
    ("inspect", "--by", By),
    ("inspect", "--format", Form),
    ("mask", "--score", mask_choices.MaskScore),
    ("mask", "--basis", mask_choices.Basis),
    ("mask", "--preset", mask_choices.Preset),
    ("fapm", "--metric", Metric),
    ("merge", "--side", mask_choices.Side),
    ("export", "--to", mask_choices.ExportTarget),
]


def fisherkit(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="fisherkit", env={"COLUMNS": "200", **environment})


@pytest.mark.parametrize("command", sorted({command for command, _, _ in CHOICES}))
def test_help_lists_the_choices(command: str) -> None:
    text = "".join(fisherkit(command, "--help").stdout.split())
    for name, option, kind in CHOICES:
        if name == command:
            assert option in text
            assert "|".join(get_args(kind)) in text.replace("│", "")


@pytest.mark.parametrize(("command", "option", "kind"), CHOICES)
def test_a_shell_completes_the_choices(command: str, option: str, kind: object) -> None:
    words = get_args(kind)
    line = f"fisherkit {command} {option} "
    done = fisherkit(_FISHERKIT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD="3")
    assert done.stdout.split() == list(words)
    started = f"{line}{words[0][:2]}"
    done = fisherkit(_FISHERKIT_COMPLETE="complete_bash", COMP_WORDS=started, COMP_CWORD="3")
    assert done.stdout.split() == [word for word in words if word.startswith(words[0][:2])]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["fapm", "base", "tuned", "out", "--metric", "fpam"], "fapm"),
        (["fapm", "base", "tuned", "out", "--metric=magnitud"], "magnitude"),
        (["inspect", "fisher.pt", "--by", "layers"], "layer"),
        (["extract", "model", "--dtype", "bfloat"], "bfloat16"),
        (["mask", "fisher.pt", "--train", "Top"], "top"),
        (["export", "mask.safetensors", "--to", "llama-factory"], "llamafactory"),
    ],
)
def test_a_typo_is_one_line_that_guesses(arguments: list[str], meant: str) -> None:
    done = fisherkit(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: --")
    assert line.endswith(f"did you mean {meant}?")


def test_a_word_unlike_any_is_refused_without_a_guess() -> None:
    done = fisherkit("fapm", "base", "tuned", "--metric", "\x1b[2Jit's 'is not one of' x")
    (line,) = done.stderr.splitlines()
    assert "did you mean" not in line
    assert "\x1b" not in line
    assert "wise-ft" in line


def test_every_command_refuses_choices_in_one_line() -> None:
    group = typer.main.get_command(app)
    for command in group.commands.values():  # type: ignore[attr-defined]  # a group has commands
        assert isinstance(command, Command)


@pytest.mark.parametrize(("given", "guess"), [("top ", "; did you mean top?"), ("xyz", ""), ("", ""), ("TOP", "")])
def test_guesses_are_close_or_none(given: str, guess: str) -> None:
    assert not_a_choice("train", given, ("top", "bottom")) == (
        f"--train must be one of top, bottom, not {given!r}{guess}"
    )


def test_python_callers_get_the_same_words() -> None:
    with pytest.raises(OptionError, match=r"--metric .* did you mean fapm"):
        FapmOptions(metric="fpam")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"--side .* did you mean left"):
        MergeOptions(side="lefty")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"--score .* did you mean fisher"):
        MaskOptions(train="top", score="fischer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "canonical"),
    [("bf16", "bfloat16"), ("fp32", "float32"), ("fp16", "float16"), ("bfloat16", "bfloat16"), ("auto", "auto")],
)
def test_short_names_of_dtypes_mean_the_long_ones(given: extract_choices.DType, canonical: str) -> None:
    assert ExtractOptions(dtype=given) == ExtractOptions(dtype=canonical)  # type: ignore[arg-type]
    assert ExtractOptions(dtype=given).dtype == canonical


@pytest.mark.parametrize(
    ("given", "canonical"), [("bfloat16", "bf16"), ("float32", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")]
)
def test_long_names_of_the_stored_dtype_mean_the_short_ones(given: extract_choices.Store, canonical: str) -> None:
    assert ExtractOptions(store=given).store == canonical


def test_a_limit_of_zero_is_all_rows_in_help_and_in_errors() -> None:
    assert ExtractOptions(limit=0).limit is None
    assert ExtractOptions(limit=None).limit is None
    assert ExtractOptions(limit=1).limit == 1
    with pytest.raises(OptionError, match="--limit must be at least 0"):
        ExtractOptions(limit=-1)
    assert "0 for all" in fisherkit("extract", "--help").stdout
