"""A tiny Llama with LoRA on some of its projections."""

from typing import Any

import peft
from torch import nn
from training_runs import llama, matrices

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def adapted(architecture: str = "llama", **changes: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS} | changes
    return peft.get_peft_model(llama(architecture), peft.LoraConfig(task_type="CAUSAL_LM", **options))


def adapted_matrices(model: Any) -> dict[str, nn.Parameter]:
    weights = matrices(model.get_base_model())
    return {
        name.replace(".base_layer", ""): weight
        for name, weight in weights.items()
        if name.endswith("base_layer.weight")
    }
