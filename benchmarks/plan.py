"""Planned against measured memory of extract, on models of different kinds: the plan must never be below the run.

    python benchmarks/plan.py [CASE ...]

Every run is a process of its own, whose anonymous memory is sampled every 4 ms; pages of files do not count, since the
system takes them back when it likes. With --tight, each run once more under a memory cgroup of 1.1 times the planned
peak (needs root), and once below what it needs, where it must be refused.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
SMALL |= {"num_key_value_heads": 12, "vocab_size": 8192, "head_dim": 64}
WIDE = SMALL | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 32}

EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL, "float32", {"group_size": 2}),
    "llama, all": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}, "float32", {"targets": "all"}),
    "llama, bfloat16": ("LlamaConfig", SMALL, "bfloat16", {"group_size": 6, "dtype": "bfloat16"}),
    "llama, widened": ("LlamaConfig", SMALL, "bfloat16", {"group_size": 1, "dtype": "float32"}),
    "llama, activations": ("LlamaConfig", SMALL, "float32", {"group_size": 2, "statistics": "activations"}),
    "llama, long": ("LlamaConfig", SMALL, "float32", {"group_size": 3, "max_length": 1024}),
    "llama, wide": ("LlamaConfig", WIDE, "float32", {"group_size": 1, "max_length": 128}),
    "gemma3, large head": (
        "Gemma3TextConfig",
        SMALL | {"vocab_size": 131072, "num_hidden_layers": 4, "head_dim": 64},
        "bfloat16",
        {"dtype": "bfloat16", "group_size": 2},
    ),
    "experts": ("Qwen3MoeConfig", SMALL | EXPERTS, "float32", {"group_size": 1}),
    "experts, bfloat16": ("Qwen3MoeConfig", SMALL | EXPERTS, "bfloat16", {"group_size": 2, "dtype": "bfloat16"}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 768, "n_layer": 6, "n_head": 12, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1},
        "float32",
        {},
    ),
}
"""Config, its changes, the stored dtype, and options."""
TOLD = "told "


def main() -> None:
    """Run the cases, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tight", action="store_true", help="run under limits around the planned peak")
    parser.add_argument("--folder", help="keep the checkpoints here (a temporary folder otherwise)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(*options.one)
        return
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-plan-"))
    folder.mkdir(parents=True, exist_ok=True)
    import checkpoints

    prompts = checkpoints.prompts(folder / "prompts.jsonl", samples=options.samples, tokens=1024)
    for case in options.cases or CASES:
        model = _make(folder / case.replace(" ", "-").replace(",", ""), case)
        found = _measure(model, prompts, case)
        print(
            f"{case:20} planned {found['planned'] / 1e6:6,.0f} MB   measured {found['measured'] / 1e6:6,.0f} MB"
            f"   {found['planned'] / found['measured']:.2f}   {found['seconds']:5.1f} s   {found['stages']}",
            flush=True,
        )
        if options.tight:
            _run_tight(model, prompts, case, found["planned"])


def _make(folder: Path, case: str) -> Path:
    import checkpoints
    import torch
    import transformers

    if not (folder / "config.json").is_file():
        config, changes, dtype, _ = CASES[case]
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        made = getattr(transformers, config)(**changes)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        checkpoints.tokenizer().save_pretrained(folder)
    return folder


def _measure(model: Path, prompts: Path, case: str) -> dict[str, Any]:
    done = subprocess.run(_command(model, prompts, case), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(TOLD))[len(TOLD) :])


def _run_tight(model: Path, prompts: Path, case: str, planned: int) -> None:
    """Run under 1.1 times the planned peak, and under less than the least that is planned for."""
    import cgroups

    from fisherkit.methods.extract.dry_run import plan_extract

    least = plan_extract(model, prompts, _options(case, memory=1))["peak_bytes"]["host"]
    for limit in (int(1.1 * planned), int(1.1 * least), int(0.95 * least)):
        with cgroups.limited(limit) as enter:
            done = subprocess.run(
                _command(model, prompts, case), preexec_fn=enter, capture_output=True, text=True, check=False
            )
        last = (done.stderr.strip().splitlines() or ["finished"])[-1]
        print(
            f"    under {limit / 1e6:6,.0f} MB: {done.returncode} {last[:200] if done.returncode else ''}", flush=True
        )


def _command(model: Path, prompts: Path, case: str) -> list[str]:
    return [sys.executable, __file__, "--one", str(model), str(prompts), case]


def _options(case: str, **changes: Any) -> Any:
    from fisherkit.options import ExtractOptions

    return ExtractOptions(**{"max_length": 256, "limit": None, "force": True, **CASES[case][3], **changes})


# One run, in its own process


def _one(model: str, prompts: str, case: str) -> None:
    from fisherkit.errors import FisherkitError
    from fisherkit.methods.extract.dry_run import plan_extract
    from fisherkit.methods.extract.measure import extract

    options, stage = _options(case), ["start"]
    planned = plan_extract(model, prompts, options)["peak_bytes"]["host"]
    peaks, stop = dict[str, int](), threading.Event()

    def sample() -> None:
        while not stop.wait(0.004):
            peaks[stage[0]] = max(peaks.get(stage[0], 0), _anonymous())

    def track(name: str, done: int, total: int) -> None:
        stage[0] = name.rsplit(":", maxsplit=1)[-1].split(",", maxsplit=1)[0].split(maxsplit=1)[0]

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.monotonic()
    try:
        extract(model, prompts, Path(prompts).parent / "fisher.pt", options, track=track)
    except FisherkitError as error:
        sys.exit(str(error))
    finally:
        stop.set()
        sampler.join()
    stages = {name: round(peak / 1e6) for name, peak in peaks.items()}
    found = {"planned": planned, "measured": max(peaks.values()), "seconds": time.monotonic() - started}
    print(TOLD + json.dumps(found | {"stages": stages}))


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


if __name__ == "__main__":
    main()
