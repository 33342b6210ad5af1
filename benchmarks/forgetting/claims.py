"""Claims: as published, as they came out here, and a plain verdict on each claim.

A claim is confirmed here when the paired difference that it speaks of (of exact match; losses are shown beside it) has
the claimed sign and its 95 % interval leaves out zero; it is not testable here when a run that it needs is not in the
results. Nothing here is a statement about large models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.forgetting.measures import Mean
from benchmarks.forgetting.results import (
    PLAIN,
    Arm,
    Results,
    by_loss,
    by_one,
    by_one_loss,
    general,
    new,
    one_general,
    one_new,
)
from benchmarks.forgetting.tables import number, percent, table

Verdict = Literal["confirmed here", "not confirmed here", "not testable here"]

FGGM: Arm = ("fggm", "input-tensor-0.3")
OUTPUT: Arm = ("fggm", "output-tensor-0.3")
MIGU: Arm = ("migu", "0.7")
RANDOM: Arm = ("random-rows", "0.3")
FAPM: Arm = ("fapm", "0.9")
CARD: Arm = ("fisher-subspace", "0.25")
WEIGHT: Arm = ("weight-subspace", "0.25")
ACTIVATION: Arm = ("activation", "0.9@3")
LAYERS: Arm = ("layer-scale", "0.5")
BOTH: Arm = ("fggm+fapm", "0.9")
SHIELD: Arm = ("shield", "0.2@2")
PULL: Arm = ("pull", "0.2@2")
EWC: Arm = ("ewc", "0.3")
REPLAY: Arm = ("replay", "1")
ONWARD: Arm = ("shield-onward", "0.2@2")
WISE_FT: Arm = ("wise-ft", "0.3")
REGMEAN: Arm = ("regmean", "1")
WITH_TEXT: Arm = ("regmean-text", "1")
WEIGHED: Arm = ("fisher-merge", "3")
AFTER_SHIELD: Arm = ("shield+regmean", "1")
_NOTHING = 0.02
"""General that is no measure of anything."""
_LEARNS = 0.25
"""Share of plain's new-task score below which a method has learnt too little for a comparison to mean anything."""
LORA_FAPM: Arm = ("lora+fapm", "0.1")

PUBLISHED = {
    "fine-tuning, all weights": ("50.89", "49.22"),
    "MIGU": ("55.21", "44.08"),
    "FGGM": ("55.75", "46.00"),
    "FGGM, scores over outputs (OA)": ("53.16", "43.15"),
}
"""General and TRACE-OP of Qwen2-1.5B, one run each (arXiv 2601.18261, table 1; 52.45 and 31.19 before any training)."""


@dataclass(frozen=True)
class Claim:
    """A sentence, who says it, the arms that it needs, and the test of it."""

    said: str
    by: str
    needs: tuple[Arm, ...]
    test: Callable[[Results], tuple[bool, str]]


def judge(results: Results, claim: Claim) -> tuple[Verdict, str]:
    """Return the verdict and why."""
    missing = [" ".join(arm) for arm in claim.needs if arm not in results.arms]
    if missing:
        return "not testable here", f"not run: {', '.join(missing)}"
    if min(len({seed for seed, _ in results.arms[arm]}) for arm in claim.needs) < 2:
        return "not testable here", "fewer than two seeds"
    holds, why = claim.test(results)
    return ("confirmed here" if holds else "not confirmed here"), why


def verdicts(results: Results) -> str:
    """All claims, as a table."""
    rows = [(claim.said, claim.by, *judge(results, claim)) for claim in CLAIMS]
    return table(("claim", "by", "verdict", "why"), rows).replace("---: | ---: |", "--- | --- |", 1)


def published(results: Results) -> str:
    """Published figures beside ours; the scales differ, only signs and ratios can be compared."""
    arms = dict(zip(PUBLISHED, (PLAIN, MIGU, FGGM, OUTPUT), strict=True))
    rows = [
        (name, "", *figures, percent(results.mean(arms[name], general)), percent(results.mean(arms[name], new)))
        for name, figures in PUBLISHED.items()
    ]
    rows.append(("FAPM at 90 %: CF", "", "0.25", "", percent(results.forgotten(FAPM, single=True)), ""))
    retained = results.retained(FAPM, PLAIN, single=True)
    rows.append(("FAPM at 90 %: task accuracy kept", "", "", "99.67", "", percent(retained)))
    return table(("method", "", "General, published", "new, published", "General, here", "new, here"), rows)


def _above(found: Mean) -> bool:
    return found.decided and found.mean > 0


def _points(found: Mean) -> str:
    return f"{percent(found, sign=True).strip('*')} points"


def _general_of_fggm(results: Results) -> tuple[bool, str]:
    found = results.difference(FGGM, PLAIN, general)
    left = results.mean(PLAIN, general).mean
    relative = f"{found.mean / left:+.1%} of plain's" if left > _NOTHING else "plain keeps next to nothing"
    return _above(found), f"sequence: General {_points(found)} ({relative}; published +9.6 %)"


def _new_of_fggm(results: Results) -> tuple[bool, str]:
    found = results.difference(FGGM, MIGU, new)
    return _above(found), f"sequence: OP {_points(found)} (published +4.4 %)"


def _better(ours: Arm, theirs: Arm) -> Callable[[Results], tuple[bool, str]]:
    """By General at equal new, after one task."""

    def test(results: Results) -> tuple[bool, str]:
        found, *losses = (results.gain_over(ours, theirs, point) for point in (by_one, by_one_loss, by_loss))
        return _above(found), _comparison(f"against {' '.join(theirs)}", found, *losses)

    return test


def _at_match(arm: Arm) -> Callable[[Results], tuple[bool, str]]:
    """Above the curve of plain fine-tuning's learning rates."""

    def test(results: Results) -> tuple[bool, str]:
        gain, *losses = (results.gain(arm, point) for point in (by_one, by_one_loss, by_loss))
        outside = f"; {gain.outside} of {gain.runs} runs beyond the curve's ends" if gain.outside else ""
        what = f"against plain's learning rates{outside}"
        return _above(gain.gain), _comparison(what, gain.gain, *(loss.gain for loss in losses))

    return test


def _comparison(against: str, found: Mean, one_loss: Mean, loss: Mean) -> str:
    return (
        f"one task: General at equal new {_points(found)} {against}; old loss at equal new loss better by "
        f"{number(one_loss, '+.3f')}, in the sequence by {number(loss, '+.3f')}"
    )


def _fapm_keeps(results: Results) -> tuple[bool, str]:
    lost, kept = results.forgotten(FAPM, single=True), results.retained(FAPM, PLAIN, single=True)
    why = f"one task, 90 % pruned: CF {percent(lost)} %, {percent(kept)} % of its accuracy kept"
    return lost.mean <= 0.0025 and kept.mean >= 0.9967, why


def _fapm_against(metric: str) -> Callable[[Results], tuple[bool, str]]:
    """At the same sparsity: more of the old without less of the new, or the other way round."""

    def test(results: Results) -> tuple[bool, str]:
        other = (metric, "0.9")
        old, learnt = (results.difference(FAPM, other, read) for read in (one_general, one_new))
        lower = any(found.decided and found.mean < 0 for found in (old, learnt))
        return (
            _above(old) or _above(learnt)
        ) and not lower, f"one task: General {_points(old)}, new task {_points(learnt)}"

    return test


def _over_interpolation(arm: Arm) -> Callable[[Results], tuple[bool, str]]:
    """Above the curve of interpolations between base and fine-tune."""

    def test(results: Results) -> tuple[bool, str]:
        gain = results.gain(arm, against="wise-ft")
        return _above(gain.gain), f"one task: General at equal new {_points(gain.gain)} against Wise-FT"

    return test


def _below_shield(theirs: Arm) -> Callable[[Results], tuple[bool, str]]:
    """A method against the shield's curve, over all and in each order."""

    def test(results: Results) -> tuple[bool, str]:
        gain, why = _beaten(results, theirs)
        loss = results.gain(theirs, by_one_loss, against="shield").gain
        return gain, f"one task: {' '.join(theirs)} against the shield's curve: {why}, old loss {number(loss, '+.3f')}"

    return test


def _beaten(results: Results, arm: Arm) -> tuple[bool, str]:
    """Return whether it lies below the shield's curve: in each order, and beyond its interval in both together."""
    found = [results.gain(arm, against="shield", orders=orders).gain for orders in ("", *results.orders)]
    points = ", ".join(f"{name} {_points(one)}" for name, one in zip(("General", *results.orders), found, strict=True))
    return found[0].decided and all(one.mean < 0 for one in found), points


def _below_shield_all(results: Results) -> tuple[bool, str]:
    """All that learn, replay apart: that one has the old data."""
    rivals = [arm for arm in results.learners(_LEARNS) if not arm[0].startswith(("shield", "lora+shield", "replay"))]
    open_ones = [" ".join(arm) for arm in rivals if not _beaten(results, arm)[0]]
    above = [" ".join(arm) for arm in rivals if _above(results.gain(arm, against="shield").gain)]
    why = f"{len(rivals)} arms learn at least {_LEARNS:.0%} of plain's new task; "
    why += f"above it beyond its interval: {', '.join(above) or 'none'}; "
    return not open_ones, why + f"not decided, or not in both orders: {', '.join(open_ones) or 'none'}"


def _in_sequence(theirs: Arm) -> Callable[[Results], tuple[bool, str]]:
    """Return whether the shield keeps more at the end, and has not learnt less."""

    def test(results: Results) -> tuple[bool, str]:
        old, learnt = (results.difference(SHIELD, theirs, read) for read in (general, new))
        worse = learnt.decided and learnt.mean < 0
        return _above(old) and not worse, f"General {_points(old)}, OP {_points(learnt)} against {' '.join(theirs)}"

    return test


_SEQUENCE_RIVALS = {
    "plain fine-tuning": PLAIN,
    "hard projection": ACTIVATION,
    "a pull without directions": PULL,
    "EWC": EWC,
    "replay": REPLAY,
}


def _onward(results: Results) -> tuple[bool, str]:
    old, learnt = (results.difference(ONWARD, PLAIN, read) for read in (general, new))
    return _above(old) and _above(learnt), f"sequence: General {_points(old)}, OP {_points(learnt)} against plain"


_PAPER, _FAPM_PAPER, _GEMMA = "FGGM", "FAPM", "Gemma 4 Masks"
CLAIMS: Sequence[Claim] = (
    Claim("FGGM keeps more general ability than plain fine-tuning", _PAPER, (FGGM, PLAIN), _general_of_fggm),
    Claim("FGGM learns more than MIGU", _PAPER, (FGGM, MIGU), _new_of_fggm),
    Claim("FGGM's trade is better than MIGU's", _PAPER, (FGGM, MIGU), _better(FGGM, MIGU)),
    Claim("Scores over inputs (IA) are better than over outputs", _PAPER, (FGGM, OUTPUT), _better(FGGM, OUTPUT)),
    Claim("FGGM is better than random rows of equal number", "control", (FGGM, RANDOM), _better(FGGM, RANDOM)),
    Claim("FGGM is better than a lower learning rate", "control", (FGGM, PLAIN), _at_match(FGGM)),
    Claim("90 % pruned, 0.25 % is forgotten and 99.67 % of the task kept", _FAPM_PAPER, (FAPM, PLAIN), _fapm_keeps),
    Claim("FAPM is better than magnitude", _FAPM_PAPER, (FAPM, ("magnitude", "0.9")), _fapm_against("magnitude")),
    Claim("FAPM is better than random pruning", _FAPM_PAPER, (FAPM, ("random", "0.9")), _fapm_against("random")),
    Claim("FAPM is better than interpolation", "control", (FAPM, WISE_FT), _over_interpolation(FAPM)),
    Claim("FAPM is better than a lower learning rate", "control", (FAPM, PLAIN), _at_match(FAPM)),
    Claim("FAPM on LoRA is better than a lower learning rate", _FAPM_PAPER, (LORA_FAPM,), _at_match(LORA_FAPM)),
    Claim("FAPM after FGGM adds to it", "question", (BOTH, FGGM), _better(BOTH, FGGM)),
    Claim("The Fisher's SVD is a defence", _GEMMA, (CARD, PLAIN), _at_match(CARD)),
    Claim("Scaling layers by their Fisher is a defence", _GEMMA, (LAYERS, PLAIN), _at_match(LAYERS)),
    Claim("The weights' SVD is a defence", "OPLoRA", (WEIGHT, PLAIN), _at_match(WEIGHT)),
    Claim("The activations' directions are a defence", "GPM", (ACTIVATION, PLAIN), _at_match(ACTIVATION)),
    Claim("They protect better than the Fisher's SVD", "trials", (ACTIVATION, CARD), _better(ACTIVATION, CARD)),
    Claim(
        "RegMean of base and fine-tune is better than interpolation",
        "ours",
        (REGMEAN, WISE_FT),
        _over_interpolation(REGMEAN),
    ),
    Claim(
        "So it is with plain text among the old prompts", "ours", (WITH_TEXT, WISE_FT), _over_interpolation(WITH_TEXT)
    ),
    Claim(
        "Fisher merging of base and fine-tune is better than interpolation",
        "ours",
        (WEIGHED, WISE_FT),
        _over_interpolation(WEIGHED),
    ),
    Claim("RegMean is better than a lower learning rate", "ours", (REGMEAN, PLAIN), _at_match(REGMEAN)),
    Claim("RegMean is better than FAPM", "ours", (REGMEAN, FAPM), _better(REGMEAN, FAPM)),
    Claim("RegMean after the shield adds to it", "question", (AFTER_SHIELD, SHIELD), _better(AFTER_SHIELD, SHIELD)),
    Claim("The shield is better than a lower learning rate", "ours", (SHIELD, PLAIN), _at_match(SHIELD)),
    Claim("The shield is better than hard projection", "ours", (SHIELD, ACTIVATION), _below_shield(ACTIVATION)),
    Claim("The shield is better than a pull without directions", "ours", (SHIELD, PULL), _below_shield(PULL)),
    Claim("The shield is better than EWC", "ours", (SHIELD, EWC), _below_shield(EWC)),
    Claim("The shield is better than replay of 1 %", "ours", (SHIELD, REPLAY), _below_shield(REPLAY)),
    Claim("The shield is better than every other method that learns", "ours", (SHIELD, PLAIN), _below_shield_all),
    *(
        Claim(
            f"In a sequence the shield keeps more than {name}, OP not decidedly lower",
            "ours",
            (SHIELD, arm),
            _in_sequence(arm),
        )
        for name, arm in _SEQUENCE_RIVALS.items()
    ),
    Claim("Drawn back to each task's own start, it keeps and learns more than plain", "ours", (ONWARD, PLAIN), _onward),
)
