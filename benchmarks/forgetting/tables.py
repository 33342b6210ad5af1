"""Results as Markdown tables."""

from collections.abc import Iterable, Sequence

from benchmarks.forgetting import results as figures
from benchmarks.forgetting.choose import best_settings
from benchmarks.forgetting.held import LEARN
from benchmarks.forgetting.measures import TEXT, Estimate
from benchmarks.forgetting.posthoc import POSTHOC
from benchmarks.forgetting.results import Read, Results
from benchmarks.forgetting.settings import Setting, grid
from benchmarks.forgetting.sizes import Size

_PLAIN_FIGURES: Sequence[tuple[str, Read]] = (
    ("new", figures.new),
    ("new loss", figures.new_loss),
    ("old probed", figures.probed),
    ("old not probed", figures.unseen),
    ("old loss, probed", figures.probed_loss),
    ("old loss, not probed", figures.unseen_loss),
    ("text loss", figures.text_loss),
)
_LEADS = _PLAIN_FIGURES[2:]  # of the old


def show(found: Estimate, read: Read, *, sign: bool = False) -> str:
    """``54.2 ± 1.3`` in percent, or nats of a loss; bold where a difference is decided; ``-`` for nothing."""
    if found.mean != found.mean:
        return "-"
    times, digits = (1, 3) if read in figures.LOSSES else (100, 1)
    half = "" if found.half != found.half else f" ± {times * found.half:.{digits}f}"
    shown = f"{times * found.mean:{'+' if sign else ''}.{digits}f}{half}"
    return f"**{shown}**" if sign and found.is_decided else shown


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 2) -> str:
    """Format a table: the first columns to the left, numbers to the right."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows)) + "\n"


def learners(results: Results) -> list[str]:
    """Return the methods with runs of one task that act while it is learnt."""
    return [method for method in results.methods("one") if method in LEARN]


def finishers(results: Results) -> list[str]:
    """Return those that act on a finished fine-tune."""
    return [method for method in results.methods("one") if method in POSTHOC]


def chosen(results: Results, size: Size, method: str) -> list[str]:
    """Return the settings of a method that learn the sequence, the better first."""
    of = size.sequences.get(method, method)
    return best_settings(results, of, grid(of), size.design_cells()) if results.settings("one", of) else []


def base_table(results: Results) -> str:
    """Return exact match and loss of every old task, base by base."""
    runs = {cell.base: run for cell, run in results.runs("one", "base", "-").items()}
    names = list(dict.fromkeys(name for run in runs.values() for name in run.old))
    rows = [
        (
            name,
            "yes" if name in figures.PROBED else "no",
            *(
                f"{100 * exact:.0f}; {loss:.3f}" if name != TEXT else f"{loss:.3f}"
                for exact, loss in (runs[base].old[name] for base in sorted(runs))
            ),
        )
        for name in names
    ]
    return table(("old task", "probed", *(f"base {base}: exact, %; loss" for base in sorted(runs))), rows)


def lead_table(results: Results, size: Size, methods: Sequence[str], against: str) -> str:
    """Each method's curve over that of another, at equal new loss; and what its best setting makes of both."""
    names = (name for name, _ in _LEADS)
    head = ("method", "settings", "reaches", *names, f"old, % of {against}'s", "best (old + new) / 2")
    rows = []
    for method in methods:
        if method != against:
            leads = (show(results.lead("one", method, against, read), read, sign=True) for _, read in _LEADS)
            reach = results.reach("one", method).mean
            share = show(results.ratio("one", method, against), figures.old)
            settings = results.of_curve("one", method)
            best = best_settings(results, method, settings, size.design_cells())[:1]
            average = (show(results.mean("one", method, one, figures.average), figures.average) for one in best)
            rows.append((method, str(len(settings)), f"{100 * reach:.0f} %", *leads, share, *average))
    return table(head, rows, left=1)


def curve_table(results: Results, methods: Sequence[str], *, long: bool = False) -> str:
    """Each setting after one task, as it came out."""
    rows = []
    for method in methods:
        for setting in results.settings("one", method, length=None):
            if (Setting.of(setting).length > 1) == long:
                found = (show(results.mean("one", method, setting, read), read) for _, read in _PLAIN_FIGURES)
                rows.append((method, setting, *found))
    untuned = (show(results.untuned("one", read), read) for _, read in _PLAIN_FIGURES)
    return table(("method", "setting", *(name for name, _ in _PLAIN_FIGURES)), [("(no training)", "", *untuned), *rows])


def kept_table(results: Results, methods: Sequence[str]) -> str:
    """Each part of a finished fine-tune: of its gain in new loss, and of the old ability, what is kept."""
    reads = (("old", figures.old), ("old loss", figures.old_loss), ("text loss", figures.text_loss))
    rows = []
    for method in methods:
        whole = POSTHOC[method].of
        for setting in results.settings("one", method):
            gain = show(results.gain_kept("one", whole, (method, setting)), figures.new)
            changes = (
                show(results.difference("one", (method, setting), whole, read), read, sign=True) for _, read in reads
            )
            rows.append((method, setting, " ".join(whole), gain, *changes))
    head = ("method", "setting", "of", "loss gain kept, %", *(f"{name}, over the fine-tune" for name, _ in reads))
    return table(head, rows, left=3)


_SEQUENCE_FIGURES: Sequence[tuple[str, Read]] = (
    *_PLAIN_FIGURES,
    ("learnt", figures.learnt),
    ("BWT", figures.transfer),
    ("(old + new) / 2", figures.average),
)


def sequence_table(results: Results, size: Size) -> str:
    """After all tasks, at the two settings that were chosen on other seeds, the better first."""
    arms = [(method, setting) for method in results.methods("all") for setting in chosen(results, size, method)]
    untuned = (show(results.untuned("all", read), read) for _, read in _SEQUENCE_FIGURES)
    return _sequences(results, arms, ("(no training)", "", *untuned))


def more_sequence_table(results: Results, size: Size) -> str:
    """Show the same for a method's knob at one rate, whatever was chosen."""
    arms = [(method, setting) for method, settings in size.more_sequences.items() for setting in settings]
    return _sequences(results, [arm for arm in arms if results.runs("all", *arm)])


def _sequences(results: Results, arms: Sequence[tuple[str, str]], *first: Sequence[str]) -> str:
    rows = [(*arm, *(show(results.mean("all", *arm, read), read) for _, read in _SEQUENCE_FIGURES)) for arm in arms]
    return table(("method", "setting", *(name for name, _ in _SEQUENCE_FIGURES)), [*first, *rows])


def position_table(results: Results, size: Size) -> str:
    """Each new task at the end of the sequence by its place in it, at the better setting: exact match; loss."""
    rows = []
    places = range(len(size.tasks))
    for method in results.methods("all"):
        for setting in chosen(results, size, method)[:1]:
            by_place = []
            for at in places:
                exact, loss = (
                    results.mean("all", method, setting, lambda run, at=at, which=which: _at(run, at, which))
                    for which in (0, 1)
                )
                by_place.append(f"{100 * exact.mean:.0f}; {loss.mean:.2f}")
            rows.append((method, setting, *by_place))
    return table(("method", "setting", *(f"task {at + 1}" for at in places)), rows)


def _at(run: figures.Outcome, place: int, which: int) -> float:
    scores = list(run.new.values())
    return scores[place][which] if place < len(scores) else float("nan")


def short_table(results: Results, size: Size) -> str:
    """What README shows: at equal new loss over plain after one task, and the end of the sequence."""
    head = (
        *("method", "settings"),
        *("old probed, one task", "old not probed", "text loss"),
        *("old probed, sequence", "old not probed", "text loss", "new"),
    )
    one: Sequence[Read] = (figures.probed, figures.unseen, figures.text_loss)
    end: Sequence[Read] = (*one, figures.new)
    rows = []
    for method in dict.fromkeys((*learners(results), *results.methods("all"))):
        settings = len(results.of_curve("one", size.sequences.get(method, method)))
        first = (
            ("the curve",) * 3
            if method == "plain"
            else tuple(show(results.lead("one", method, "plain", read), read, sign=True) for read in one)
        )
        best = chosen(results, size, method)[:1]
        last = (show(results.mean("all", method, *best, read), read) if best else "-" for read in end)
        rows.append((method, str(settings), *first, *last))
    return table(head, rows, left=1)
