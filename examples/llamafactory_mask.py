"""Hold a LLaMA-Factory run to a mask: its command line takes no callbacks, its function does.

    python examples/llamafactory_mask.py config.yaml mask.safetensors

The config is LLaMA-Factory's own, with ``finetuning_type: full`` (or ``lora`` for a subspace or layer scales), without
DeepSpeed.
"""

import argparse
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from fisherkit.training import MaskedUpdate


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("mask", type=Path, help="a mask, a subspace or a layer_importance.json")
    options = parser.parse_args()
    run_exp(yaml.safe_load(options.config.read_text(encoding="utf-8")), callbacks=[MaskedUpdate(options.mask)])


if __name__ == "__main__":
    main()
