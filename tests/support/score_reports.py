"""Reports of ``score`` made from a few figures by hand."""

from collections.abc import Mapping

from fisherkit.methods.score.report import Change, CheckpointScore, ScoreReport, SetScore

Figures = tuple[float, float]
"""Loss in nats per token, and share of exact matches."""


def set_score(figures: Figures, first: Figures | None, ci95: float | None = 0.01) -> SetScore:
    """Figures of a set; ``first`` are the first checkpoint's, None for that one itself."""
    (loss, exact), change = figures, None
    if first is not None:
        change = Change(difference=loss - first[0], ci95=ci95, worse=0.1, kl=0.01, agreement=0.9)
    return SetScore(
        samples=50,
        tokens=1000,
        loss=loss,
        ci95=None if ci95 is None else 10 * ci95,
        perplexity=2.7**loss,
        accuracy=0.5,
        exact=exact,
        bits_per_byte=loss / 3,
        bits_ci95=ci95,
        change=change,
        choices=None,
    )


def report(checkpoints: Mapping[str, Mapping[str, Figures]], ci95: float | None = 0.01) -> ScoreReport:
    """A report of checkpoints by name, each with its figures by set."""
    first = next(iter(checkpoints.values()))
    return ScoreReport(
        measure="loss",
        sets={name: {"source": f"{name}.jsonl", "samples": 50} for name in first},
        checkpoints=[
            CheckpointScore(
                name=name,
                sets={one: set_score(held[one], None if held is first else first[one], ci95) for one in first},
                engine="stream",
            )
            for name, held in checkpoints.items()
        ],
        made={"fisherkit": "0.1.0"},
    )


def sweep(
    *, losses: Mapping[str, tuple[float, float]], exact: Mapping[str, tuple[float, float]] | None = None
) -> ScoreReport:
    """A report of two sets, ``old`` and ``new``, by checkpoint."""
    shares = exact or dict.fromkeys(losses, (0.5, 0.5))
    return report(
        {name: {"old": (old, shares[name][0]), "new": (new, shares[name][1])} for name, (old, new) in losses.items()}
    )
