"""Hold an axolotl run to a mask: a plugin for its config. This file must be where Python finds modules.

    plugins:
      - axolotl_mask.MaskPlugin
    fisherkit_mask: mask.safetensors

Run it as ``PYTHONPATH=examples axolotl train config.yaml``. Without DeepSpeed; with FSDP, ``fsdp_version: 2``.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from fisherkit.training import MaskedUpdate


class MaskArgs(BaseModel):
    """Options added to axolotl's config: the path of a mask, a subspace or a ``layer_importance.json``."""

    fisherkit_mask: str


class MaskPlugin(BasePlugin):  # type: ignore[misc]  # axolotl comes without types
    """Adds the callback once the trainer is there."""

    def get_input_args(self) -> str:
        """Return where axolotl finds the plugin's options."""
        return f"{__name__}.MaskArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Return the callbacks to add."""
        return [MaskedUpdate(cfg.fisherkit_mask)]
