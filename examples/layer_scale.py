"""Treat the layers that carry most of the old abilities more gently: scale the updates of each layer.

    python examples/layer_scale.py MODEL old.jsonl new.jsonl OUT

``extract`` writes ``layer_importance.json`` beside the Fisher; the update of a layer is multiplied by
``(median(I) / I) ** 0.5``, at least 0.1, with I the mean Fisher of its weights. Scaling gradients would do nothing:
AdamW divides it out again.
"""

from common import arguments, train

import fisherkit
from fisherkit import ExtractOptions
from fisherkit.training import MaskedUpdate


def main() -> None:
    """Measure, train, save."""
    options = arguments(__doc__, old="rows that must stay", new="rows to learn").parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    fisherkit.extract(options.model, options.old, options.out / "fisher.safetensors", ExtractOptions(force=True))
    scaled = MaskedUpdate(options.out / "layer_importance.json", power=0.5, floor=0.1)
    train(options.model, options.new, options.out, steps=options.steps, rate=1e-5, callbacks=[scaled])


if __name__ == "__main__":
    main()
