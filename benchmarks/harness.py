"""score --choices against lm-evaluation-harness on the same rows: log-likelihood of every choice, acc and acc_norm.

    pip install lm_eval        # in an environment of its own, beside this package
    python benchmarks/harness.py --questions 200

The rows are made here: a context, three to five choices of different lengths, the number of the right one. The harness
reads them by a task of its own making (doc_to_text is the context, doc_to_choice the choices, a blank between them);
fisherkit by ``--choices choices``. The model has random weights, so that the right answers are no more likely than
others: what is compared is what both make of each choice.
"""

import argparse
import json
import math
import random
import tempfile
from pathlib import Path

WORDS = [
    "river",
    "city",
    "the",
    "of",
    "north",
    "seven",
    "blue",
    "under",
    "Madrid",
    "walks",
    "stone",
    "and",
    "a",
    "never",
    "green",
    "house",
]


def main() -> None:
    """Make model and rows, ask both, compare choice by choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()
    import checkpoints

    folder = Path(tempfile.mkdtemp(prefix="fisherkit-harness-"))
    model = checkpoints.make(
        folder / "model",
        blocks=options.blocks,
        hidden=options.hidden,
        intermediate=3 * options.hidden,
        dtype="float32",
        vocabulary=300,
    )
    rows = _rows(options.questions)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ours, theirs = _fisherkit(model, path, folder), _harness(model, path)
    differences = [
        abs(a - b)
        for one, other in zip(ours["choices"], theirs["choices"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    picked = sum(
        _first_best(one) == _first_best(other) for one, other in zip(ours["choices"], theirs["choices"], strict=True)
    )
    print(
        f"{len(rows)} questions, {len(differences)} choices; largest difference of a log-likelihood "
        f"{max(differences):.1e}"
    )
    print(f"the same choice in {picked} of {len(rows)} questions")
    for name in ("acc", "acc_norm"):
        print(f"{name:9} fisherkit {ours[name]:.4f}   lm-evaluation-harness {theirs[name]:.4f}")


def _rows(count: int) -> list[dict[str, object]]:
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(draw.randint(3, 5))]
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))
        rows.append({"prompt": prompt, "choices": choices, "answer": draw.randrange(len(choices))})
    return rows


def _first_best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _fisherkit(model: Path, path: Path, folder: Path) -> dict[str, object]:
    import fisherkit
    from fisherkit.artefacts.score_samples import read_samples

    options = fisherkit.ScoreOptions(choices="choices", limit=None)
    report = fisherkit.score(model, {"rows": path}, options, samples=folder / "samples.jsonl")
    found = report.checkpoints[0].sets["rows"].choices
    losses = [row["choice_losses"] for row in read_samples(folder / "samples.jsonl")]
    return {
        "acc": found.accuracy,
        "acc_norm": found.accuracy_norm,
        "choices": [[-loss for loss in question] for question in losses],
    }


def _harness(model: Path, path: Path) -> dict[str, object]:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(
        config={
            "task": "rows",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": " ",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        }
    )
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[task],
        device="cpu",
        batch_size=16,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(done["samples"]["rows"], key=lambda sample: sample["doc_id"])
    choices = [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
    assert all(math.isfinite(value) for question in choices for value in question)
    results = done["results"]["rows"]
    return {"acc": results["acc,none"], "acc_norm": results["acc_norm,none"], "choices": choices}


if __name__ == "__main__":
    main()
