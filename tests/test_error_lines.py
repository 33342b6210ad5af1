"""An error fits one line of the terminal and still names what is wrong, however long the paths in it are."""

import pytest

from fisherkit.errors import LINE_CHARACTERS, PromptError, fit_line

LONG = "/" + "/".join(["a-folder-of-some-length"] * 12)
TENSOR = "model.layers.31.self_attn.q_proj.weight"


@pytest.mark.parametrize("folder", ["/data", LONG, LONG + LONG])
def test_long_paths_lose_their_folders_and_the_tensor_keeps_its_name(folder: str) -> None:
    line = fit_line(f"{folder}/tuned/model.safetensors: {TENSOR}: shape differs from '{folder}/base/model.safetensors'")
    assert len(line) <= LINE_CHARACTERS
    assert f"tuned/model.safetensors: {TENSOR}: shape differs from '" in line
    assert line.endswith("base/model.safetensors'")


@pytest.mark.parametrize("length", [LINE_CHARACTERS - 1, LINE_CHARACTERS])
def test_what_fits_stays_as_it_is(length: int) -> None:
    text = ("/x/y/z " * length)[:length]
    assert fit_line(text) == text


@pytest.mark.parametrize("part", ["n", "n ", "/", "n/", "'/"])
def test_any_text_fits_and_keeps_its_ends(part: str) -> None:
    line = fit_line(f"start {part * 100_000} end")
    assert len(line) <= LINE_CHARACTERS
    assert line.endswith(" end")


def test_a_name_of_one_long_file_is_not_made_longer() -> None:
    line = fit_line(f"{'f' * 250}/{'g' * 250}: {TENSOR} is missing")
    assert line.endswith(f"g: {TENSOR} is missing")
    assert len(line) < 120


def test_prompt_errors_fit_too() -> None:
    error = PromptError(f"{LONG}{LONG}/prompts.jsonl: line 3 has no field 'prompt'")
    assert str(error).endswith("/prompts.jsonl: line 3 has no field 'prompt'")
