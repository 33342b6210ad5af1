"""RESULTS.md and the curves beside it, written anew from the lines of all sizes that have any."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.forgetting import charts, claims, tables
from benchmarks.forgetting.methods import LEARN
from benchmarks.forgetting.posthoc import POSTHOC
from benchmarks.forgetting.results import Results
from benchmarks.forgetting.runs import order_of, read_lines
from benchmarks.forgetting.sizes import SIZES, Size

_HEAD = """# Does it help? Results of the forgetting benchmark

Written by `python -m benchmarks.forgetting`; do not edit. A base model that knows some tasks learns new ones, one after
the other, under each method; then it is asked both. What came out is what is here, whichever way it went. These are
small models that learn generated tasks: a sign of what a method does, not a promise for large ones.

- **General**: mean exact match of the base's tasks, in percent. **Text loss**: nats per token of held-out plain text.
- **OP**: mean exact match of the new tasks after the last; **learnt**: of each right after it; **BWT**: what later
  tasks did to it.
- **One task**: everything after the first task alone, which is another one for each seed; most fine-tunes are of this
  kind. The sequence is harder: small models forget most of what came before the last task.
- **At equal new**: methods trade old for new at different rates, so each run is held against the curve that
  plain fine-tuning draws for the same seed and order when its learning rate is swept (straight lines between its
  points, the untuned model at one end, the best crossing where there are several). A run that learnt more than any
  point of the curve and kept more than its end (or learnt less and kept less) is held against that end and counted as
  *outside*; one that learnt more and kept less, or the other way round, is *left out*. The same for losses, in nats. A
  curve of several settings has an advantage over a method with a single one: see how many each has.
- Means over seeds (the orders of a seed put together) with 95 % intervals by Student's t; differences are paired. Bold:
  the interval leaves out zero. With so many comparisons, one in twenty is bold by chance.
- **Settings**: `0.2@2` is the setting 0.2 at twice the learning rate that plain fine-tuning has at 1.
- The shield was designed on other draws (seeds 100 to 104, other test items of the old tasks, one task, the base of the
  size `quick`): nothing of it was chosen on the seeds that are shown.
- All methods train the matrices of the blocks alone, by AdamW without weight decay, for the same number of steps.
  Embeddings and norms stay as they are (`plain-all-weights` trains them too).
- A seed is a draw of the new tasks (their items, the cipher's key, the word order) and of the batches; the base model
  is one for all seeds, so the intervals know nothing of how another base would do.
"""


def write(out: Path, size: Size, results: Path, *, left: int) -> None:
    """RESULTS.md with a part for every size that has lines in ``out``, this one first."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [_part(out, size, results, left)]
    for path in sorted(out.glob("*.jsonl")):
        if path != results and path.stem.split("-")[0] in SIZES:
            other = replace(SIZES[path.stem.split("-")[0]], name=path.stem)
            parts.append(_part(out, other, path, 0))
    (out / "RESULTS.md").write_text("\n".join([_HEAD, *parts]), encoding="utf-8")


def _part(out: Path, size: Size, path: Path, left: int) -> str:
    results = Results(read_lines(path))
    trained, kept = (tables.arms_of(results, size, posthoc=posthoc) for posthoc in (False, True))
    pictures = _draw(out, size, results)
    return "\n".join(
        [
            f"## Size `{size.name}`\n",
            _about(size, results, left),
            "### In short\n",
            f"Before any training General is {100 * results.untuned_general:.1f}.\n",
            tables.short_table(results),
            "### Verdicts\n",
            claims.verdicts(results),
            "### One task: methods that act while it is learnt\n",
            tables.one_table(results, trained),
            *pictures[:1],
            "### One task: methods that keep a part of a finished fine-tune\n",
            "The fine-tune is plain's at its full rate (FGGM's or LoRA's where the name says so).\n",
            tables.one_table(results, kept),
            *pictures[1:],
            "### The sequence of tasks\n",
            tables.sequence_table(results, [*trained, *kept]),
            "### What FAPM measures\n",
            "By FAPM's measures, in percent: CF is the relative drop of General, *retained* the share of the "
            "fine-tune's own accuracy.\n",
            tables.kept_table(results, kept),
            "### One task: General at equal new, by order of tasks\n",
            tables.orders_table(results, [*trained, *kept]),
            "### One task: every method against the shield's curve, at equal new\n",
            "Minus: at the new-task score that the method reached, the shield keeps more of the old. Methods that "
            "hardly learn the new task lie at the curve's beginning, where all are equal.\n",
            tables.shield_table(results, [*trained, *kept]),
            "### One task: paired differences against controls\n",
            "General; new task.\n",
            tables.differences_table(results, [*trained, *kept]),
            "### Published figures beside ours\n",
            "In percent: Qwen2-1.5B on TRACE, one run (FGGM, table 1), and Llama-3-8B / Qwen2-7B on eight tasks (FAPM, "
            "abstract). An independent audit of FGGM had MIGU at 47.43, FGGM at 45.84 and plain at 49.31 (OP).\n",
            claims.published(results),
            "### The base\n",
            tables.base_table(results),
            tables.unavailable(results, size),
        ]
    )


def _about(size: Size, results: Results, left: int) -> str:
    made = sorted({tuple(line["made"].items()) for line in results.lines}, key=str)
    orders = "; ".join(f"{order}: {', '.join(order_of(size, order, 0))} (and round)" for order in results.orders)
    seconds = sum(line["seconds"] for line in results.lines)
    facts = [
        f"{len(results.lines)} runs, {seconds / 60:.0f} minutes together; seeds {results.seeds}; "
        f"orders of tasks {orders}",
        f"Llama of {size.layers} blocks, width {size.hidden}, trained here"
        if size.name in SIZES
        else f"base: {size.name}",
        f"each new task: {size.course.steps} steps of {size.course.batch} items at a learning rate of "
        f"{size.course.rate:g}; {size.test_items} test items of each, {size.old_items} of each old one",
        *("; ".join(f"{key} {value}" for key, value in one) for one in made),
    ]
    if left:
        facts.append(f"**{left} runs are still to do**: the same command goes on with them")
    return "".join(f"- {fact}\n" for fact in facts)


def _draw(out: Path, size: Size, results: Results) -> list[str]:
    """Two pictures, and how Markdown shows them."""
    if not results.untuned or not results.settings("plain"):
        return []
    groups: Sequence[tuple[str, str, Sequence[str]]] = (
        (
            "learnt",
            "One task: methods that act while it is learnt",
            [name for name in LEARN if name != "shield-onward"],
        ),
        ("kept", "One task: methods that keep a part of a finished fine-tune", list(POSTHOC)),
    )
    shown = []
    for stem, title, methods in groups:
        name = f"{size.name}-{stem}.svg"
        (out / name).write_text(charts.curves(f"{title} ({size.name})", results, methods), encoding="utf-8")
        shown.append(f"![{title}]({name})\n")
    return shown
