"""Treat the layers that carry most of the old abilities more gently: scale the updates of each layer.

    python examples/layer_scale.py MODEL old.jsonl new.jsonl OUT

``extract`` writes ``layer_importance.json`` beside the Fisher; the update of a layer is multiplied by
``(median(I) / I) ** 0.5``, at least 0.1, with I the mean Fisher of its weights. Scaling gradients would do nothing:
AdamW divides it out again.
"""

import argparse
from pathlib import Path

from data import pad, read_rows, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import fisherkit
from fisherkit.options import ExtractOptions
from fisherkit.training import MaskedUpdate


def main() -> None:
    """Measure, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    fisherkit.extract(options.model, options.old, options.out / "fisher.safetensors", ExtractOptions(force=True))

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=settings(options.out / "trainer", steps=options.steps, rate=1e-5),
        train_dataset=read_rows(options.new, tokenizer),
        data_collator=pad(tokenizer),
        processing_class=tokenizer,
        callbacks=[MaskedUpdate(options.out / "layer_importance.json", power=0.5, floor=0.1)],
    )
    trainer.train()
    trainer.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
