"""Fine-tune behind a shield: learn new questions, keep what the model reads on old ones, with transformers' Trainer.

    python examples/shield_trainer.py MODEL old.jsonl new.jsonl OUT --pull 5

``old.jsonl`` is of what must stay; what goes into each layer is measured on it. After every step the weights are drawn
back in those directions. A larger pull keeps more and learns less, so it wants a larger learning rate than plain
fine-tuning; measure the old and the new with several of both, and with ``--pull 0``, which is plain.
"""

from common import arguments, train

import fisherkit
from fisherkit import ExtractOptions, MaskOptions
from fisherkit.training import MaskedUpdate


def main() -> None:
    """Measure, train, save."""
    parser = arguments(
        __doc__, old="rows of prompt and completion that must stay", new="rows of prompt and completion to learn"
    )
    parser.add_argument("--pull", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=2e-5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    callbacks = []
    if options.pull:
        fisher, shield = options.out / "old.safetensors", options.out / "shield.safetensors"
        fisherkit.extract(options.model, options.old, fisher, ExtractOptions(statistics="activations", force=True))
        fisherkit.mask(fisher, shield, MaskOptions(preset="shield", pull=options.pull, force=True))
        callbacks = [MaskedUpdate(shield)]
    train(options.model, options.new, options.out, steps=options.steps, rate=options.rate, callbacks=callbacks)


if __name__ == "__main__":
    main()
