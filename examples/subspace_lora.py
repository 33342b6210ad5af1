"""Train LoRA outside of protected directions, in a loop of one's own.

    python examples/subspace_lora.py MODEL old.jsonl new.jsonl OUT --rank 64

Directions come from the Fisher of the old abilities (``old.jsonl``), the adapter learns ``new.jsonl`` and never reaches
them: after every step B loses U(U^T B) and A loses (A V)V^T. A Fisher is close to rank 1, so what its SVD protects is
little; measure what the old abilities lose, with and without.
"""

import torch
from common import arguments, pad, read_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fisherkit
from fisherkit import ExtractOptions, MaskOptions
from fisherkit.training import constrain


def main() -> None:
    """Measure, find the directions, train, save the adapter."""
    parser = arguments(__doc__, old="rows that must stay", new="rows to learn")
    parser.add_argument("--rank", type=int, default=64, help="protected directions per matrix")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    fisher, subspace = options.out / "fisher.safetensors", options.out / "subspace.safetensors"
    fisherkit.extract(options.model, options.old, fisher, ExtractOptions(force=True))
    fisherkit.mask(fisher, subspace, MaskOptions(svd_rank=options.rank, force=True))

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = read_rows(options.new, tokenizer)
    batches = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=pad(tokenizer))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    handle = constrain(optimizer, model, subspace)
    model.train()
    step = 0
    while step < options.steps:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == options.steps:
                break
    handle.remove()
    model.save_pretrained(options.out / "adapter")


if __name__ == "__main__":
    main()
