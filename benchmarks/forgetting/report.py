"""RESULTS.md and the curves beside it, written anew from the lines of all sizes that have any."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.forgetting import charts, tables, verdicts
from benchmarks.forgetting.lines import Run, read_lines, read_sessions
from benchmarks.forgetting.measures import LEVELS
from benchmarks.forgetting.results import Results
from benchmarks.forgetting.runs import whole_passes
from benchmarks.forgetting.settings import RATES
from benchmarks.forgetting.sizes import SEQUENCE_SHIFT, SIZES, Size
from benchmarks.forgetting.tasks import PROBED, UNSEEN

_HEAD = f"""# Does it help? Results of the forgetting benchmark, second edition

Written by `python -m benchmarks.forgetting`; do not edit. A base model that knows some tasks learns new ones under
each method; then it is asked both. What came out is what is here, whichever way it went. These are small models that
learn generated tasks: a sign of what a method does, not a promise for large ones. The first edition is in `first/`.

- **Equal tuning.** Every method that learns gets three learning rates ({", ".join(RATES)} of plain fine-tuning's) by
  two strengths, its own knob; plain fine-tuning gets six rates, a way to keep a part of a finished fine-tune two
  settings. More settings are in the tables, and in a curve only where a claim says so. `5@2.5x4` is the strength 5 at
  2.5 times the rate, four times as long.
- **What was tried beforehand.** On a draw of its own (seed 100): three strengths of the shield on three tasks, two or
  three strengths of the pull, EWC, distillation and L2-SP on one task; nothing of the rest. So the shield had more
  trials than its rivals, if fewer than in the first edition.
- **At equal new loss.** A method's curve is the front of its settings and the untuned base: the most of the old at no
  more loss on the new task, on straight lines between settings. Two curves are compared at
  {", ".join(f"{100 * level:.0f}" for level in LEVELS)} % of the way from the base's loss on the new task to the best
  of plain's, in logarithms, as far as both get there (*reaches*). Plus is better, in points of exact match or nats.
  *% of plain's* is one curve divided by the other, only where the other's exact match is at least 10 %.
- **The task is the unit.** Draws and bases of one task are put together; the 95 % interval is Student's t over the
  tasks. **Bold**, and a verdict, need that it leaves out zero and that every base says the same. *Equal* needs that
  it lies within {100 * verdicts.MARGIN["exact"]:.0f} points ({verdicts.MARGIN["loss"]} nats), named before any run;
  everything else is *not shown*, with the half interval. With so many comparisons one in twenty is bold by chance.
- **Old tasks, probed and not.** Methods that look at old data see {", ".join(PROBED)}; nobody sees
  {", ".join(UNSEEN)}, nor the held-out plain text.
- **Sequences** draw their tasks from other seeds (+ {SEQUENCE_SHIFT}). Each method learns them at the two settings with
  the best mean of old and new exact match after one task; the last base has no part in that choice. That mean also
  rewards what learns nothing: see where the untuned base stands (*no training*), and the new beside it.
- All methods train the matrices of the blocks alone, by AdamW without weight decay. Embeddings and norms stay.
"""


def write(out: Path, size: Size, results: Path, *, left: int) -> None:
    """RESULTS.md with a part for every size that has lines in ``out``, this one first."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [_part(out, size, results, left)]
    others = (path for path in sorted(out.glob("*.jsonl")) if path != results and path.stem.split("-")[0] in SIZES)
    parts += [_part(out, _size_of(path), path, 0) for path in others]
    (out / "RESULTS.md").write_text("\n".join([_HEAD, *parts]), encoding="utf-8")


def _size_of(path: Path) -> Size:
    """Return the size that a file's lines are of; where its name says more than the size's, with the lines' places."""
    size = SIZES[path.stem.split("-")[0]]
    cells = [run.cell for run in (Run.of(line["key"]) for line in read_lines(path)) if run.kind == "one"]
    if path.stem == size.name or not cells:
        return size
    bases, seeds = sorted({cell.base for cell in cells}), sorted({cell.seed for cell in cells})
    return replace(size, name=path.stem, bases=tuple(bases), seeds=tuple(seeds), passes=min(size.passes, len(bases)))


def _part(out: Path, size: Size, path: Path, left: int) -> str:
    lines = read_lines(path)
    results = Results(lines)
    learn, finish = tables.learners(results), tables.finishers(results)
    pictures = _draw(out, size, results, learn, finish)
    return "\n".join(
        [
            f"## Size `{size.name}`\n",
            _about(size, path, left),
            "### In short\n",
            "One task: over plain's curve at equal new loss. Sequence: as it ends, at the best setting of each.\n",
            tables.short_table(results, size),
            "### Claims\n",
            verdicts.verdict_table(results, size, verdicts.CLAIMS),
            "### Every method against plain fine-tuning's learning rates\n",
            verdicts.verdict_table(results, size, verdicts.over_plain(results)),
            "### The shield against every method that learns\n",
            "*The other way round*: the other one is better.\n",
            verdicts.verdict_table(results, size, verdicts.of_shield(results)),
            "### One task: curves over plain's, at equal new loss\n",
            tables.lead_table(results, size, [*learn, *finish], "plain"),
            "### One task: curves over the shield's, at equal new loss\n",
            tables.lead_table(results, size, [*learn, *finish], "shield"),
            *pictures,
            "### One task: every setting\n",
            tables.curve_table(results, learn),
            "### One task: parts of a finished fine-tune\n",
            tables.curve_table(results, finish),
            "What each keeps of the fine-tune's gain in new loss, and what that changes of the old.\n",
            tables.kept_table(results, finish),
            "### Longer courses\n",
            "The first draw on the first base alone.\n",
            tables.curve_table(results, learn, long=True),
            "### The sequence\n",
            tables.sequence_table(results, size),
            *_more_sequences(results, size),
            "By the place of a task in the sequence, at its end: exact match in %, and loss.\n",
            tables.position_table(results, size),
            "### The bases\n",
            tables.base_table(results),
        ]
    )


def _more_sequences(results: Results, size: Size) -> list[str]:
    names = " and ".join(size.more_sequences)
    return [f"The knob of {names} at one rate:\n", tables.more_sequence_table(results, size)] if names else []


def _about(size: Size, path: Path, left: int) -> str:
    lines = read_lines(path)
    seconds = sum(line["seconds"] for line in lines)
    facts = [
        f"{len(lines)} runs, {seconds / 60:.0f} minutes of one core together",
        f"{len(size.tasks)} tasks x {len(size.seeds)} draws; bases {', '.join(map(str, size.bases))}, settings chosen "
        f"by {', '.join(map(str, size.design_bases()))} in the first pass",
        f"{whole_passes(size, lines)} of {size.passes} passes complete"
        + ("; each makes every draw once, on another base than the passes before" if size.passes > 1 else ""),
        f"Llama of {size.layers} blocks, width {size.hidden}, trained here",
        f"each new task: {size.course.steps} steps of {size.course.batch} items at a learning rate of "
        f"{size.course.rate:g}; {size.test_items} test items of each, {size.old_items} of each old one",
        *("; ".join(f"{key} {value}" for key, value in made.items()) for made in read_sessions(path)),
    ]
    if left:
        facts.append(f"**{left} runs are still to do**: the same command goes on with them")
    return "".join(f"- {fact}\n" for fact in facts)


def _draw(out: Path, size: Size, results: Results, learn: Sequence[str], finish: Sequence[str]) -> list[str]:
    """Two pictures, and how Markdown shows them."""
    shown = []
    for stem, title, methods in (
        ("learnt", "One task: methods that act while it is learnt", learn),
        ("kept", "One task: methods that keep a part of a finished fine-tune", finish),
    ):
        if "plain" in learn and results.methods("one"):
            name = f"{size.name}-{stem}.svg"
            (out / name).write_text(charts.curves(f"{title} ({size.name})", results, methods), encoding="utf-8")
            shown.append(f"![{title}]({name})\n")
    return shown
