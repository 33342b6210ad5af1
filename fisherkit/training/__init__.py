"""Training that obeys a mask: which entries, directions or layers a run may change, and how far.

A mask on the *gradient* does not hold: under AdamW weight decay and old momentum still move what it freezes, a scaled
gradient is divided out again, and a projected one leaves a part of the update in the protected directions. So what is
here acts on the *update*: before ``optimizer.step()`` the weights are remembered, after it they are put back, scaled
or projected. Frozen entries stay bit-identical, whatever the optimizer.

Imported on first use: ``import fisherkit.training`` brings in neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisherkit.training.callback import MaskedUpdate
    from fisherkit.training.fggm import FGGM, Task
    from fisherkit.training.mask_input import load_mask
    from fisherkit.training.migu import MIGU
    from fisherkit.training.names import find_weights
    from fisherkit.training.optimizer_hooks import Handle, constrain

_HOMES = {
    "FGGM": "fisherkit.training.fggm",
    "MIGU": "fisherkit.training.migu",
    "Handle": "fisherkit.training.optimizer_hooks",
    "MaskedUpdate": "fisherkit.training.callback",
    "Task": "fisherkit.training.fggm",
    "constrain": "fisherkit.training.optimizer_hooks",
    "find_weights": "fisherkit.training.names",
    "load_mask": "fisherkit.training.mask_input",
}

__all__ = ["FGGM", "MIGU", "Handle", "MaskedUpdate", "Task", "constrain", "find_weights", "load_mask"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fisherkit.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
