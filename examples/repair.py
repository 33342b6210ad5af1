"""Repair a finished fine-tune that forgot: two measurements, one merge, no training.

    python examples/repair.py BASE FT old.jsonl new.jsonl OUT

``old.jsonl`` holds prompts of what the base could do, plain text among them, and ``new.jsonl`` the fine-tune's own
rows. Each is run once, forwards, to gather the covariances of what goes into the layers. The merge then solves for the
change that leaves the layers' outputs the fine-tune's on new inputs and the base's on old ones. A repair is written for
each strength; the one to take is the one that scores best on rows of both kinds that were held out.
"""

import argparse
from pathlib import Path

import fisherkit
from fisherkit import ExtractOptions, MergeOptions

STRENGTHS = (0.3, 1.0, 3.0)
"""What a token of the old inputs counts beside one of the new."""


def main() -> None:
    """Measure both sides, merge."""
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = options.out / "old.safetensors", options.out / "new.safetensors"
    for model, rows, file in zip((options.base, options.tuned), (options.old, options.new), files, strict=True):
        fisherkit.extract(model, rows, file, ExtractOptions(statistics="inputs", force=True), say=print)
    for strength in STRENGTHS:
        chosen = MergeOptions(regmean=files, old_weight=strength, force=True)
        report = fisherkit.merge(options.base, options.tuned, options.out / f"repaired-{strength:g}", chosen, say=print)
        print(f"strength {strength:g}: {report.path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, help_text in (
        ("base", "the model that was fine-tuned"),
        ("tuned", "what was made of it"),
        ("old", "rows of what must stay"),
        ("new", "rows that the fine-tune learnt"),
        ("out", "folder to make"),
    ):
        parser.add_argument(name, type=Path, help=help_text)
    return parser


if __name__ == "__main__":
    main()
