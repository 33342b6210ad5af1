"""Fine-tune behind a shield: learn new questions, keep what the model reads on old ones, with transformers' Trainer.

    python examples/shield_trainer.py MODEL old.jsonl new.jsonl OUT --pull 0.2

``old.jsonl`` is of what must stay; what goes into each layer is measured on it. After every step the weights are drawn
back in those directions. A larger pull keeps more and learns less, so it wants a larger learning rate than plain
fine-tuning; measure the old and the new with several of both, and with ``--pull 0``, which is plain.
"""

import argparse
from pathlib import Path

from data import pad, read_rows, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import fisherkit
from fisherkit.options import ExtractOptions, MaskOptions
from fisherkit.training import MaskedUpdate


def main() -> None:
    """Measure, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("old", type=Path, help="rows of prompt and completion that must stay")
    parser.add_argument("new", type=Path, help="rows of prompt and completion to learn")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pull", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    callbacks = []
    if options.pull:
        fisher, shield = options.out / "old.safetensors", options.out / "shield.safetensors"
        fisherkit.extract(options.model, options.old, fisher, ExtractOptions(statistics="activations", force=True))
        fisherkit.mask(fisher, shield, MaskOptions(preset="shield", pull=options.pull, force=True))
        callbacks = [MaskedUpdate(shield)]

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=settings(options.out / "trainer", steps=options.steps, rate=options.rate),
        train_dataset=read_rows(options.new, tokenizer),
        data_collator=pad(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
