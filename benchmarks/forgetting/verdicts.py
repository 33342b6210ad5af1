"""Questions, and what the runs show of them: better, worse, equal within a margin named beforehand, or not shown.

Every question is of a difference whose unit is the task. It is decided where the 95 % interval leaves out zero and
every base says the same. Nothing here is a statement about large models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.forgetting import results as figures
from benchmarks.forgetting.measures import Estimate
from benchmarks.forgetting.results import Read, Results
from benchmarks.forgetting.settings import whole_grid
from benchmarks.forgetting.sizes import Size
from benchmarks.forgetting.tables import chosen, finishers, learners, show, table

MARGIN = {"exact": 0.05, "loss": 0.05}
"""Within 5 points of exact match, or 0.05 nats, two methods count as equal. Named before any run."""
_WORDS = {
    "better": "shown",
    "worse": "the other way round",
    "equal": "equal within the margin",
    "not shown": "not shown",
}


@dataclass(frozen=True)
class Question:
    """A claim that one curve (or arm) is better than another.

    Attributes:
        said: the claim.
        by: who says it.
        ours: the method that is said to be better.
        theirs: than this one.
        read: of the old.
        whole: in the sequence instead of after one task.
        of_ours: settings in place of the usual ones.
        of_theirs: likewise.
    """

    said: str
    by: str
    ours: str
    theirs: str
    read: Read = figures.old
    whole: bool = False
    of_ours: Sequence[str] | None = None
    of_theirs: Sequence[str] | None = None


def ask(results: Results, size: Size, question: Question) -> tuple[Estimate, str]:
    """Return the difference, plus is better, and how many settings each side has."""
    if question.whole:
        arms = [(name, *chosen(results, size, name)[:1]) for name in (question.ours, question.theirs)]
        if any(len(arm) < 2 for arm in arms):
            return results.difference("all", ("", ""), ("", ""), question.read), "-"
        return results.difference("all", arms[0], arms[1], question.read), "best of each"
    found = results.lead(
        "one",
        question.ours,
        question.theirs,
        question.read,
        of_ours=question.of_ours,
        of_theirs=question.of_theirs,
    )
    counts = (
        len(results.of_curve("one", method) if settings is None else results.known("one", method, settings))
        for method, settings in ((question.ours, question.of_ours), (question.theirs, question.of_theirs))
    )
    return found, "; ".join(map(str, counts))


def verdict(found: Estimate, read: Read) -> str:
    """Return the verdict in words, with its interval where nothing is shown."""
    if found.tasks < 2:
        return "not run"
    kind = found.verdict(MARGIN["loss" if read in figures.LOSSES else "exact"])
    times, form, unit = (1, ".2f", " nats") if read in figures.LOSSES else (100, ".0f", " points")
    return _WORDS[kind] + (f" (± {times * found.half:{form}}{unit})" if kind == "not shown" else "")


def verdict_table(results: Results, size: Size, questions: Sequence[Question]) -> str:
    """All questions with unit, tasks, draws, bases and settings."""
    head = ("claim", "by", "verdict", "difference", "tasks", "draws", "bases", "settings")
    rows = []
    for question in questions:
        found, settings = ask(results, size, question)
        counts = (str(found.tasks), str(found.seeds), str(len(found.bases)), settings)
        difference = show(found, question.read, sign=True)
        rows.append((question.said, question.by, verdict(found, question.read), difference, *counts))
    return table(head, rows, left=3)


def over_plain(results: Results) -> list[Question]:
    """Ask whether each method lies above the curve of plain fine-tuning, after one task."""
    methods = [*learners(results), *finishers(results)]
    return [
        Question(f"{method} over plain's learning rates", "control", method, "plain")
        for method in methods
        if method != "plain"
    ]


def of_shield(results: Results) -> list[Question]:
    """Ask whether the shield's curve lies above every other's, and its sequence: minus is the other way round."""
    one = [method for method in learners(results) if "shield" not in method]
    whole = [method for method in results.methods("all") if "shield" not in method]
    return [
        *(Question(f"shield over {method}, one task", "ours", "shield", method) for method in one),
        *(
            Question(
                f"shield over {method}, sequence: (old + new) / 2", "ours", "shield", method, figures.average, True
            )
            for method in whole
        ),
    ]


def _long(*settings: str) -> tuple[str, ...]:
    return tuple(f"{setting}x4" for setting in settings)


_SLOW = _long("-@0.1", "-@0.3")
_FGGM, _FAPM, _GEMMA = "FGGM", "FAPM", "Gemma 4 Masks"
CLAIMS: Sequence[Question] = (
    Question("FGGM learns as plain does and keeps more", _FGGM, "fggm", "plain"),
    Question("FGGM's trade is better than MIGU's", _FGGM, "fggm", "migu"),
    Question("FGGM is better than random rows of equal number", "control", "fggm", "random-rows"),
    Question("Scores over inputs are better than over outputs", _FGGM, "fggm", "fggm-output"),
    Question("So in the sequence: old", _FGGM, "fggm", "fggm-output", figures.old, True),
    Question("FGGM keeps more old ability in the sequence than plain", _FGGM, "fggm", "plain", figures.old, True),
    Question("FGGM learns more in the sequence than MIGU", _FGGM, "fggm", "migu", figures.new, True),
    Question("FAPM is better than magnitude", _FAPM, "fapm", "magnitude"),
    Question("FAPM is better than random pruning", _FAPM, "fapm", "random"),
    Question("FAPM is better than interpolation", "control", "fapm", "wise-ft"),
    Question("FAPM is better than interpolation: old loss", "control", "fapm", "wise-ft", figures.old_loss),
    Question(
        "FAPM at five densities over interpolation at four shares",
        "question",
        "fapm",
        "wise-ft",
        of_ours=whole_grid("fapm"),
        of_theirs=whole_grid("wise-ft"),
    ),
    Question("FAPM on LoRA is better than LoRA", _FAPM, "lora+fapm", "lora"),
    Question("FAPM after FGGM adds to it", "question", "fggm+fapm", "fggm"),
    Question("Scaling layers by their Fisher: LoRA updates", _GEMMA, "lora+layer-scale", "lora"),
    Question("Scaling layers by their Fisher: the merge's blend", _GEMMA, "layer-scale-merge", "wise-ft"),
    Question("Scaling layers by their Fisher: full fine-tuning", _GEMMA, "layer-scale", "plain"),
    Question("The Fisher's SVD, from prompts alone", _GEMMA, "fisher-subspace", "plain"),
    Question(
        "The Fisher's SVD at four ranks", _GEMMA, "fisher-subspace", "plain", of_ours=whole_grid("fisher-subspace")
    ),
    Question("The inputs' directions protect better than the Fisher's", "ours", "activation", "fisher-subspace"),
    Question("RegMean is better than interpolation", "ours", "regmean", "wise-ft"),
    Question("EWC: sampled labels are better than the data's", "question", "ewc", "ewc-data"),
    Question("Text among the probes: less text loss", "ours", "shield-text", "shield", figures.text_loss),
    Question("Text among the probes: the old tasks", "ours", "shield-text", "shield"),
    Question("The pull without directions keeps text better", "question", "pull", "shield", figures.text_loss),
    Question("LoRA behind the shield", "ours", "lora+shield", "lora"),
    Question(
        "Plain, slow and four times as long, over plain", "control", "plain", "plain", of_ours=_SLOW, of_theirs=None
    ),
    Question("The shield over plain, slow and four times as long", "ours", "shield", "plain", of_theirs=_SLOW),
    Question(
        "The shield over plain, both four times as long",
        "ours",
        "shield",
        "plain",
        of_ours=_long("5@0.4", "5@1", "15@1"),
        of_theirs=_long("-@0.1", "-@0.3", "-@1"),
    ),
    Question(
        "The shield over distillation, both four times as long",
        "ours",
        "shield",
        "distil",
        of_ours=_long("5@0.4", "5@1"),
        of_theirs=_long("5@0.4", "5@1"),
    ),
    Question(
        "The shield over EWC, both four times as long",
        "ours",
        "shield",
        "ewc",
        of_ours=_long("5@0.4", "5@1"),
        of_theirs=_long("10@0.4", "10@1"),
    ),
)
"""Claims as their authors make them, after one task unless they say otherwise."""
