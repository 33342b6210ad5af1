"""Commands to be killed, the files that they start from, and how their files are compared."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pairs
import tiny
from forked import run

# Times, and nothing else, may differ between an undisturbed run and a resumed one.
_BEING_MADE = re.compile(r"\..*\.(new|partial)")  # hidden, and never a final name: a kill may leave it
_TIMES = re.compile(rb'"(created|seconds)": ("[^"]*"|[0-9.e-]+)')


@dataclass(frozen=True)
class Scenario:
    """A command with an output, run in an empty folder or one with an older output.

    Attributes:
        words: the command line; ``{base}`` and so on are the inputs' paths.
        outputs: top-level names that the command makes.
        resumes: it has ``--resume``.
        older: words of an earlier run whose outputs are there already; the command then has ``--force``.
        reader: a command that reads the output; it must refuse what is not whole.
    """

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    resumes: bool = True
    older: tuple[str, ...] = ()
    reader: tuple[str, ...] = ()


_SMALL = ("--batch-tokens", "40", "--group-size", "1")


def _extract(name: str, out: str, *options: str, outputs: tuple[str, ...], **more: Any) -> Scenario:
    return Scenario(name, ("extract", "{base}", "{prompts}", "-o", out, *_SMALL, *options), outputs, **more)


_FISHER = ("fisher.json", "layer_importance.json")
_FAPM_SIDES = ("--figure", "f.svg", "--report", "r.json", "--sparse", "d.safetensors")
SCENARIOS = (
    _extract("extract-pt", "fisher.pt", outputs=("fisher.pt", *_FISHER), reader=("inspect", "fisher.pt")),
    _extract(
        "extract-safetensors",
        "fisher.safetensors",
        outputs=("fisher.safetensors", *_FISHER),
        reader=("inspect", "fisher.safetensors"),
    ),
    _extract("extract-folder", "fisher", outputs=("fisher",), reader=("inspect", "fisher")),
    _extract(
        "extract-over-older",
        "fisher.pt",
        "--reduction",
        "sum",
        outputs=("fisher.pt", *_FISHER),
        older=("extract", "{base}", "{prompts}", "-o", "fisher.pt"),
        reader=("inspect", "fisher.pt"),
    ),
    _extract(
        "extract-activations",
        "fisher.pt",
        "--statistics",
        "activations",
        outputs=("fisher.pt", *_FISHER, "fisher.activations.safetensors", "fisher.activations.json"),
        reader=("inspect", "fisher.pt"),
    ),
    _extract(
        "extract-inputs",
        "i.safetensors",
        "--statistics",
        "inputs",
        outputs=("i.safetensors", "i.json"),
    ),
    Scenario(
        "combine",
        ("combine", "{part-1}", "{part-2}", "-o", "fisher.pt"),
        ("fisher.pt", *_FISHER),
        reader=("inspect", "fisher.pt"),
    ),
    Scenario(
        "mask-rows",
        ("mask", "{fisher}", "-o", "m.safetensors", "--preset", "fggm"),
        ("m.safetensors", "m.json"),
        resumes=False,
        reader=("inspect", "m.safetensors"),
    ),
    Scenario(
        "mask-entries-over-older",
        ("mask", "{fisher}", "-o", "m.safetensors", "--protect", "top", "--aggregate", "none", "--scope", "global"),
        ("m.safetensors", "m.json"),
        resumes=False,
        older=("mask", "{fisher}", "-o", "m.safetensors", "--preset", "fggm"),
        reader=("inspect", "m.safetensors"),
    ),
    Scenario(
        "mask-subspace",
        ("mask", "{fisher}", "-o", "s.safetensors", "--svd-rank", "2"),
        ("s.safetensors", "s.json"),
        resumes=False,
        reader=("inspect", "s.safetensors"),
    ),
    Scenario("fapm", ("fapm", "{base}", "{tuned}", "out"), ("out",), reader=("inspect", "out")),
    Scenario(
        "fapm-side-outputs",
        ("fapm", "{base}", "{tuned}", "out", "--scope", "global", *_FAPM_SIDES),
        ("out", "f.svg", "r.json", "d.safetensors", "d.json"),
    ),
    Scenario("fapm-sparse-alone", ("fapm", "{base}", "{tuned}", *_FAPM_SIDES[4:]), ("d.safetensors", "d.json")),
    Scenario(
        "fapm-no-checkpoint",
        ("fapm", "{base}", "{tuned}", "--scope", "layer", *_FAPM_SIDES),
        ("f.svg", "r.json", "d.safetensors", "d.json"),
    ),
    Scenario(
        "fapm-over-older",
        ("fapm", "{base}", "{tuned}", "out", "--metric", "magnitude", "--scope", "global"),
        ("out",),
        older=("fapm", "{base}", "{tuned}", "out", "--sparsity", "0.5"),
    ),
    Scenario(
        "fapm-last-share",
        ("fapm", "{base}", "{tuned}", "out", "--shard", "2/2"),
        ("out",),
        older=("fapm", "{base}", "{tuned}", "out", "--shard", "1/2"),
        reader=("inspect", "out"),
    ),
    Scenario("merge", ("merge", "{base}", "{tuned}", "out", "--alpha", "0.5", "--report", "r.json"), ("out", "r.json")),
    Scenario(
        "merge-shards", ("merge", "{base}", "{tuned}", "out", "--alpha", "0.5", "--max-shard-size", "30KB"), ("out",)
    ),
    Scenario(
        "merge-solved",
        ("merge", "{base}", "{tuned}", "out", "--regmean", "{old}", "{new}", "--lora-rank", "2", "--figure", "f.svg"),
        ("out", "f.svg"),
    ),
    Scenario(
        "score",
        ("score", "{base}", "{tuned}", "--prompts", "{prompts}", "--samples", "s.jsonl", "-o", "p.svg", *_SMALL),
        ("s.jsonl", "p.svg"),
        reader=("inspect", "s.jsonl"),
    ),
    Scenario(
        "score-over-older",
        ("score", "{base}", "--prompts", "{prompts}", "--samples", "s.jsonl", *_SMALL),
        ("s.jsonl",),
        older=("score", "{tuned}", "--prompts", "{prompts}", "--samples", "s.jsonl"),
        reader=("inspect", "s.jsonl"),
    ),
    Scenario("export", ("export", "{mask}", "--to", "axolotl", "-o", "a.yaml"), ("a.yaml",), resumes=False),
    Scenario("inspect-page", ("inspect", "{fisher}", "-o", "page.html"), ("page.html",), resumes=False),
)


def make_inputs(folder: Path) -> dict[str, str]:
    """A tiny base in shards, its fine-tune, prompts, a Fisher and a mask; by the names that scenarios use."""
    base, tuned = pairs.make(folder)
    prompts = tiny.write_prompts(folder / "prompts.jsonl")
    made = {"base": base, "tuned": tuned, "prompts": prompts}
    for name, file, words in (
        ("fisher", "given.pt", ("extract", base, prompts)),
        ("mask", "given-mask.safetensors", ("mask", "given.pt", "--preset", "fggm")),
        ("old", "old.safetensors", ("extract", base, prompts, "--statistics", "inputs")),
        ("new", "new.safetensors", ("extract", tuned, prompts, "--statistics", "inputs")),
        ("part-1", "part-1.safetensors", ("extract", base, prompts, "--shard", "1/2")),
        ("part-2", "part-2.safetensors", ("extract", base, prompts, "--shard", "2/2")),
    ):
        done = run((*words, "-o", file), folder)
        assert done.code == 0, done.stderr
        made[name] = folder / file
    return {name: str(path) for name, path in made.items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name, times in JSON blanked; without files being made."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _BEING_MADE.fullmatch(path.name):
            data = path.read_bytes()
            found[path.relative_to(folder).as_posix()] = (
                _TIMES.sub(rb'"\1": 0', data) if path.suffix == ".json" else data
            )
    return found


def final(files: Mapping[str, bytes], outputs: tuple[str, ...]) -> dict[str, bytes]:
    """Those files that stand at an output's own name, or below it."""
    return {name: data for name, data in files.items() if name.split("/")[0] in outputs}


def fill(words: tuple[str, ...], inputs: Mapping[str, str]) -> list[str]:
    """The command line with the inputs' paths in place."""
    return [word.format(**inputs) if word.startswith("{") else word for word in words]


ALL = os.environ.get("FISHERKIT_KILLS") == "all"  # make kills


def all_or_quick() -> tuple[Scenario, ...]:
    """Every scenario in ``make kills``; the quick ones of each kind of output in ``make test``."""
    return tuple(one for one in SCENARIOS if ALL or one.name in ("mask-rows", "fapm", "export"))


def quick_kills(scenario: Scenario) -> int:
    """Kills of a scenario in ``make test``: more where a run is quick, and what it leaves of many kinds."""
    return {"extract": 1, "score": 2, "fapm": 8, "merge": 8}.get(scenario.words[0], 2)


def number_of_kills(full: int, small: int) -> int:
    """Moments to try per scenario: ``small`` in ``make test``, ``full`` in ``make kills``."""
    return full if ALL else small
