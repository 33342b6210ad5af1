"""Fine-tune only the rows that matter most for the new task (FGGM's mask), with transformers' Trainer.

    python examples/mask_trainer.py MODEL questions.jsonl OUT --mask fggm|random|migu|none

The Fisher of the answers is measured first, the 30 % of rows that score highest may change, the rest keeps its bits.
``random`` is the control that belongs beside it: as many rows, drawn by lot. MIGU needs no Fisher.
"""

from pathlib import Path

from common import arguments, train
from transformers import TrainerCallback

import fisherkit
from fisherkit import ExtractOptions, MaskOptions
from fisherkit.training import MIGU, MaskedUpdate


def main() -> None:
    """Measure, mask, train, save."""
    parser = arguments(__doc__, questions="rows of prompt and completion")
    parser.add_argument("--mask", choices=["fggm", "random", "migu", "none"], default="fggm")
    parser.add_argument("--rate", type=float, default=1e-5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    callbacks: list[TrainerCallback] = []
    if options.mask in ("fggm", "random"):
        callbacks = [MaskedUpdate(make_mask(options.model, options.questions, options.out, options.mask))]
    elif options.mask == "migu":
        callbacks = [MIGU(threshold=0.7)]
    train(options.model, options.questions, options.out, steps=options.steps, rate=options.rate, callbacks=callbacks)


def make_mask(model: Path, questions: Path, out: Path, kind: str) -> Path:
    """Return a row mask from the Fisher of the answers, or by lot."""
    fisher, mask = out / "fisher.safetensors", out / "mask.safetensors"
    fisherkit.extract(model, questions, fisher, ExtractOptions(loss="completion", force=True))
    score = "random" if kind == "random" else "fisher"
    report = fisherkit.mask(fisher, mask, MaskOptions(preset="fggm", score=score, force=True))
    print(f"{report.kept:,} of {report.weights:,} weights may change")
    return mask


if __name__ == "__main__":
    main()
