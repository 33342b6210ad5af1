"""Results as Markdown tables."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.forgetting.measures import Mean
from benchmarks.forgetting.posthoc import POSTHOC
from benchmarks.forgetting.results import (
    PLAIN,
    Arm,
    ByPoint,
    Gain,
    Results,
    by_exact,
    by_loss,
    by_one,
    by_one_loss,
    general,
    new,
    one_general,
    one_new,
)
from benchmarks.forgetting.sizes import Size


def percent(found: Mean, *, sign: bool = False) -> str:
    """``54.2 ± 1.3``, in percent (or points)."""
    return number(Mean(100 * found.mean, 100 * found.half, found.seeds), "+.1f" if sign else ".1f")


def number(found: Mean, form: str) -> str:
    """With its interval; bold where a difference's interval leaves out zero; ``-`` for nothing."""
    if found.mean != found.mean:
        return "-"
    half = "" if found.half != found.half else f" ± {found.half:{form.lstrip('+')}}"
    shown = f"{found.mean:{form}}{half}"
    return f"**{shown}**" if form.startswith("+") and found.decided else shown


def _signed(found: Mean) -> str:
    return percent(found, sign=True)


def gained(gain: Gain, form: Callable[[Mean], str]) -> str:
    """With how many runs lie beyond the ends of the curve, and how many of these say nothing."""
    counts = ((gain.outside, "outside"), (gain.dropped, "left out"))
    parts = [f"{count} of {gain.runs} {what}" for count, what in counts if count]
    return form(gain.gain) + (f" ({', '.join(parts)})" if parts else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table: the first two columns to the left, numbers to the right."""
    marks = ["---", "---", *("---:" for _ in head[2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows)) + "\n"


def arms_of(results: Results, size: Size, *, posthoc: bool) -> list[Arm]:
    """In the order of the plan."""
    methods = [method for method in size.plan if (method in POSTHOC) == posthoc]
    return [(method, setting) for method in methods for setting in results.settings(method)]


def base_table(results: Results) -> str:
    """Return the base's scores by task."""
    line = next((line for line in results.lines if line["method"] == "base"), None)
    if line is None:
        return "(not measured yet)\n"
    old = line["stages"]["0"]["old"]
    return table(
        ("base task", "", "exact match, %", "loss"),
        (
            (name, "", f"{100 * exact:.0f}" if name != "text" else "-", f"{loss:.3f}")
            for name, (exact, loss) in old.items()
        ),
    )


SHORT: Sequence[Arm] = (
    PLAIN,
    ("plain", "0.3"),
    ("random-rows", "0.3"),
    ("migu", "0.7"),
    ("fggm", "input-tensor-0.3"),
    ("fisher-subspace", "0.25"),
    ("activation", "0.9@3"),
    ("ewc", "0.3"),
    ("replay", "1"),
    ("fapm", "0.5"),
    ("fapm", "0.9"),
    ("wise-ft", "0.3"),
    ("pull", "0.2@2"),
    ("shield", "0.2@2"),
    ("shield-onward", "0.2@2"),
)


def short_table(results: Results) -> str:
    """One setting of the main methods, after one task and after all."""
    head = ("method", "setting", "General", "new task", "General at equal new", "General after all", "OP")
    rows = []
    for arm in SHORT:
        if arm in results.arms:
            gain = "the curve" if arm[0] == "plain" else _signed(results.gain(arm).gain)
            one, fresh, old, all_new = (
                percent(results.mean(arm, read)) for read in (one_general, one_new, general, new)
            )
            rows.append((*arm, one, fresh, gain, old, all_new))
    return table(head, rows)


def one_table(results: Results, arms: Sequence[Arm]) -> str:
    """After one task: what is left of the old, what the new is worth, and the old at a match of the new."""
    head = (
        "method",
        "setting",
        "General",
        "text loss",
        "new task",
        "General at equal new",
        "old loss at equal new loss",
    )
    return table(head, (_one_row(results, arm) for arm in arms if arm in results.arms))


def _one_row(results: Results, arm: Arm) -> Sequence[str]:
    return (
        *arm,
        percent(results.mean(arm, one_general)),
        number(results.mean(arm, lambda found: found.single_text), ".3f"),
        percent(results.mean(arm, one_new)),
        *_at_equal(results, arm, by_one, by_one_loss),
    )


def sequence_table(results: Results, arms: Sequence[Arm]) -> str:
    """After all tasks, one after the other."""
    head = (
        *("method", "setting", "General", "text loss", "OP", "learnt", "BWT"),
        *("General at equal OP", "old loss at equal new loss"),
    )
    return table(head, (_sequence_row(results, arm) for arm in arms if results.mean(arm, new).seeds))


def _sequence_row(results: Results, arm: Arm) -> Sequence[str]:
    return (
        *arm,
        percent(results.mean(arm, general)),
        number(results.mean(arm, lambda found: found.text_loss), ".3f"),
        percent(results.mean(arm, new)),
        percent(results.mean(arm, lambda found: found.learnt)),
        percent(results.mean(arm, lambda found: found.bwt), sign=True).strip("*"),
        *_at_equal(results, arm, by_exact, by_loss),
    )


def _at_equal(results: Results, arm: Arm, exact: ByPoint, loss: ByPoint) -> tuple[str, str]:
    """Above the curve of plain fine-tuning: points of exact match, nats of loss (so that plus is better in both)."""
    if arm[0] == "plain":
        return "the curve", "the curve"
    above = gained(results.gain(arm, exact), _signed)
    return above, gained(results.gain(arm, loss), lambda mean: number(mean, "+.3f"))


CONTROLS: Sequence[Arm] = (PLAIN, ("plain", "0.3"), ("random-rows", "0.3"), ("wise-ft", "0.3"))


def differences_table(results: Results, arms: Sequence[Arm]) -> str:
    """General and new task after one task, less those of the controls, paired by seed and order."""
    controls = [control for control in CONTROLS if control in results.arms]
    rows = []
    for arm in arms:
        if arm in results.arms and arm not in controls:
            old = (results.difference(arm, control, one_general) for control in controls)
            learnt = (results.difference(arm, control, one_new) for control in controls)
            rows.append((*arm, *(f"{_signed(a)}; {_signed(b)}" for a, b in zip(old, learnt, strict=True))))
    return table(("method", "setting", *(f"less {' '.join(control)}" for control in controls)), rows)


def orders_table(results: Results, arms: Sequence[Arm]) -> str:
    """Return the gain after one task, by order of tasks."""
    rows = (
        (
            *arm,
            *(gained(results.gain(arm, orders=order), _signed) for order in results.orders),
        )
        for arm in arms
        if arm in results.arms and arm[0] != "plain"
    )
    return table(("method", "setting", *(f"order {order}" for order in results.orders)), rows)


def shield_table(results: Results, arms: Sequence[Arm]) -> str:
    """Every other method against the shield's curve at equal new: minus is worse than the shield."""
    head = ("method", "setting", "General", *(f"order {order}" for order in results.orders), "old loss")
    rows = []
    for arm in arms:
        if arm in results.arms and not arm[0].startswith("shield"):
            gain = results.gain(arm, against="shield")
            orders = (results.gain(arm, against="shield", orders=order) for order in results.orders)
            loss = results.gain(arm, by_one_loss, against="shield")
            gains = (gained(one, _signed) for one in (gain, *orders))
            rows.append((*arm, *gains, gained(loss, lambda mean: number(mean, "+.3f"))))
    return table(head, rows)


def kept_table(results: Results, arms: Sequence[Arm]) -> str:
    """FAPM's own measures, on the fine-tune of one task alone, as published, and on that of all."""
    head = (
        "method",
        "setting",
        "one task: CF",
        "retained",
        "all tasks: CF",
        "retained",
        "one task: above Wise-FT at equal new",
    )
    rows = []
    for arm in (PLAIN, *arms):
        if arm in results.arms:
            of = POSTHOC[arm[0]].of if arm[0] in POSTHOC else PLAIN
            figures = [
                percent(figure)
                for single in (True, False)
                for figure in (results.forgotten(arm, single=single), results.retained(arm, of, single=single))
            ]
            above = gained(results.gain(arm, against="wise-ft"), _signed)
            rows.append((*arm, *figures, "-" if arm == PLAIN or arm[0] == "wise-ft" else above))
    return table(head, rows)


def unavailable(results: Results, size: Size) -> str:
    """Return what the plan has and the lines have not."""
    missing = [f"{m} {s}" for m, settings in size.plan.items() for s in settings if (m, s) not in results.arms]
    return f"Not available in these results: {', '.join(missing)}.\n" if missing else ""
