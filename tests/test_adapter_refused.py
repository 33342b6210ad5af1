"""Adapters that cannot be read whole, or don't fit their base, are refused in one line that says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from peft_adapters import edit_config, edit_tensors, train, values

from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import Adapter
from fisherkit.errors import CheckpointError

Edit = Callable[[Path], None]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _put(key: str, value: Any) -> Edit:
    """Change or (None) drop one tensor."""
    return lambda folder: edit_tensors(
        folder, lambda tensors: {k: v for k, v in (tensors | {key: value}).items() if v is not None}
    )


def _set(**changes: Any) -> Edit:
    return lambda folder: edit_config(folder, **changes)


def _rename(old: str, new: str) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})


def _write(name: str, text: str) -> Edit:
    return lambda folder: bool((folder / name).write_text(text)) and None


def _write_config(text: str) -> Edit:
    return _write("adapter_config.json", text)


MERGE_FIRST = r"merge it first: from peft import .*merge_and_unload\(\); model.save_pretrained\('merged'\)$"
REFUSED: dict[str, tuple[Edit, str]] = {
    "another method": (_set(peft_type="IA3"), "an adapter with peft_type 'IA3' is not read here; " + MERGE_FIRST),
    "biases": (_set(bias="lora_only"), "trained biases is not read here; " + MERGE_FIRST),
    "biases of factors": (_set(lora_bias=True), MERGE_FIRST),
    "replicated layers": (_set(layer_replication=[[0, 2], [1, 3]]), "replicated layers is not .*" + MERGE_FIRST),
    "KaSA": (_set(kasa_config={"beta": 1}), MERGE_FIRST),
    "block-diagonal": (_set(use_bdlora={"nblocks": 2}), MERGE_FIRST),
    "a start out of the base": (
        _set(init_lora_weights="pissa_niter_16"),
        "'pissa_niter_16', which changes.*" + MERGE_FIRST,
    ),
    "activated": (_set(alora_invocation_tokens=[1]), "activated LoRA cannot be merged into weights, by peft neither"),
    "QA-LoRA": (_set(use_qalora=True), "cannot be merged into weights"),
    "unknown tensor": (
        _put(f"{Q0}.lora_C.weight", torch.ones(2)),
        r"'.*lora_C.weight' stands for is not.*" + MERGE_FIRST,
    ),
    "bias of a factor": (_put(f"{Q0}.lora_B.bias", torch.ones(2)), r"'.*lora_B.bias' stands for is not known"),
    "several adapters": (
        _put(f"{Q0}.lora_A.two.weight", torch.ones(4, 32)),
        r"several adapters \(one without a name, two\); save the one",
    ),
    "no place": (
        _rename("layers.0.self_attn", "layers.7.self_attn"),
        "4 of 18 tensors match no weight of .*llama.*, the first '.*layers.7.*'",
    ),
    "no place for one": (
        _put("base_model.model.score.weight", torch.ones(2, 32)),
        "1 of 19 tensors match no weight .*score.weight'",
    ),
    "too wide": (
        _put(f"{Q0}.lora_A.weight", torch.ones(4, 31)),
        r"shape \[32, 31\], and 'model.layers.0.self_attn.q_proj.weight' in .* has \[32, 32\]",
    ),
    "vocabulary": (
        _put("base_model.model.lm_head.weight", torch.ones(401, 32)),
        r"\[401, 32\], and 'lm_head.weight' in .* has \[400, 32\]; is it",
    ),
    "other ranks": (
        _put(f"{Q0}.lora_A.weight", torch.ones(5, 32)),
        r"is \[5, 32\] and '.*lora_B.weight' \[32, 4\], which have no product",
    ),
    "one factor": (_put(f"{Q0}.lora_B.weight", None), "q_proj.*'.*one of its two factors"),
    "a vector": (_put(f"{Q0}.lora_B.weight", torch.ones(32)), "no matrix; " + MERGE_FIRST),
    "magnitudes without DoRA": (
        _put(f"{Q0}.lora_magnitude_vector", torch.ones(32)),
        "use_dora is false.*magnitudes",
    ),
    "DoRA without magnitudes": (_set(use_dora=True), "use_dora is true.*magnitudes"),
    "NaN": (_put(f"{Q0}.lora_A.weight", torch.full((4, 32), torch.nan)), "q_proj.lora_A.weight'.*NaN"),
    "infinity": (
        _put(f"{Q0}.lora_B.weight", torch.full((32, 4), torch.inf).bfloat16()),
        "q_proj.lora_B.weight'.*infinity",
    ),
    "nothing gathered": (_put(f"{Q0}.lora_A.weight", torch.ones(0)), "empty.*several processes"),
    "integers": (
        _put(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.uint8)),
        "stored as U8",
    ),
    "square, either way": (
        _set(fan_in_fan_out=True),
        "fan_in_fan_out.*'model.layers.0.self_attn.q_proj.weight'",
    ),
    "changed twice": (
        _put("base_model.model.model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32)),
        "both.*'model.layers.0.self_attn.q_proj.weight'",
    ),
    "tokens unnamed": (
        _put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 32)),
        "0 trainable tokens of 'model.embed_tokens'.* 2",
    ),
    "alpha": (_set(lora_alpha="8"), 'lora_alpha.*"8".*number'),
    "alpha of NaN": (_set(lora_alpha=float("nan")), "lora_alpha.*NaN.*number"),
    "patterns": (_set(alpha_pattern={"q_(proj": 3}), '"q_.proj" is not a regular expression'),
    "possessive patterns": (
        _set(alpha_pattern={"(q_p)*+roj": 3}),
        "alpha_pattern: .* holds .* which is not understood here; " + MERGE_FIRST,
    ),
    "long patterns": (_set(rank_pattern={"q" * 1001: 3}), "has more than 1000 characters; merge it first"),
    "deep patterns": (_set(rank_pattern={"(" * 60 + "q*" + ")" * 60: 3}), "has more than 50 groups inside of each"),
    "a huge alpha": (_set(lora_alpha=10**400), "lora_alpha is 1000000.* not a number to scale by"),
    "an alpha beyond digits": (
        _write_config('{"peft_type": "LORA", "lora_alpha": 1' + "0" * 5000 + "}"),
        "JSON|lora_alpha",
    ),
    "an absurd scale": (_set(alpha_pattern={"q_proj": 1e300}), r"alpha_pattern\[.*q_proj.*\] is 1e\+300, not a number"),
    "no rank": (_set(r=0), "r is 0, not a rank"),
    "half a rank": (_set(r=2.5), "r is 2.5, not a rank"),
    "a rank of text": (_set(rank_pattern={"q_proj": "4"}), "rank_pattern.* not a rank"),
    "another rank": (_set(r=8), "says rank 8 for 'model.layers.0..*', and '.*lora_A.weight' in .* has 4"),
    "another rank by a pattern": (_set(rank_pattern={"v_proj": 2}), "says rank 2 for '.*v_proj', and .* has 4"),
    "a flag of text": (_set(use_rslora="false"), 'use_rslora is "false", neither true nor false'),
    "a flag of DoRA": (_set(use_dora=1), "use_dora is 1, neither true nor false"),
    "a name of lists": (_set(base_model_name_or_path=["a"]), "base_model_name_or_path is .*, not a text"),
    "a revision": (_set(revision=7), "revision is 7, not a text"),
    "tokens that are not there": (_set(trainable_token_indices=[1, 2]), "names 2 trainable tokens, and the file"),
    "tokens of a module": (
        _set(trainable_token_indices={"embed_tokens": [5]}),
        "names 1 trainable tokens of 'embed_tokens', and the file beside it holds none",
    ),
    "tokens without rows": (
        lambda folder: (
            _set(trainable_token_indices=[1])(folder),
            _put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.tensor(1.0))(folder),
        )[0],
        "trainable_tokens_delta' has no rows",
    ),
    "deep JSON": (_write_config('{"r": ' + "[" * 100_000 + "]" * 100_000 + "}"), "not valid JSON: nested too deeply"),
    "deep settings": (_write_config('{"peft_type": ' + "[" * 500 + "]" * 500 + "}"), "peft_type"),
    "an endless name": (_put("base_model.model." + ".base_layer" * 1000, torch.ones(2)), "name has 11,017 characters"),
    "patterns of lists": (_set(rank_pattern=[3]), "rank_pattern.*object"),
    "names": (_set(modules_to_save="lm_head"), "modules_to_save.*list of names"),
    "indices": (
        _set(trainable_token_indices={"embed_tokens": "all"}),
        "trainable_token_indices.*numbers",
    ),
    "no JSON": (_write("adapter_config.json", "{"), "adapter.*JSON"),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "adapter_config.json.*No such file",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "adapter_config.json.*no adapter_model.safetensors",
    ),
    "cut short": (_write("adapter_model.safetensors", "abc"), "truncated|not a safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(
    case: str, adapter: Path, checkpoint: Callable[[str], Path]
) -> None:
    edit, message = REFUSED[case]
    edit(adapter)
    with pytest.raises(CheckpointError, match=message) as caught:
        Adapter.open(adapter, open_index(checkpoint("llama")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            "embedding and head.*" + MERGE_FIRST,
        ),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "embedding and head"),
        (
            {"target_modules": ["embed_tokens", "lm_head"]},
            "lora_A.*lora_embedding_A'.*'model.embed_tok",
        ),
    ],
)
def test_tied_embeddings_that_come_apart_are_refused(
    lora: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama-tied")
    adapter = train(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **lora})
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter, open_index(base))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([5, 3], "2 trainable tokens of 'model.embed_tokens'.* 3"),
        ({"wte": [5, 3, 1]}, "3 trainable tokens of 'wte', and the file beside it holds none"),
        ([5, 400, 3], "token 400.*'model.embed_tokens.weight'.*has 400"),
        ([5, -1, 3], "token -1"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    indices: Any, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[5, 9, 3])
    edit_config(adapter, trainable_token_indices=indices)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter, open_index(base))


def without_expert(base: Path, folder: Path) -> Path:
    """A copy of the base, less the last expert of every block."""
    folder.mkdir()
    tensors = {name: weight for name, weight in values(base).items() if ".experts.3." not in name}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_experts_of_another_number_are_refused(
    experts: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = without_expert(checkpoint("qwen3-moe"), tmp_path / "fewer")
    with pytest.raises(CheckpointError, match=r"16 rows.*\b4\b.*3 experts"):
        Adapter.open(experts, open_index(base))


def test_a_quantised_base_is_refused(adapter: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = dict(values(checkpoint("llama")))
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}'.*U8"):
        Adapter.open(adapter, open_index(tmp_path / "m.safetensors"))


def test_an_adapter_of_other_modules_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = train(checkpoint("gpt2"), tmp_path / "adapter", target_modules=["c_attn"])
    with pytest.raises(CheckpointError, match=r"6 of 6 tensors.*another model"):
        Adapter.open(adapter, open_index(checkpoint("llama")))


def test_a_closed_adapter_cannot_be_asked(adapter: Path, checkpoint: Callable[[str], Path]) -> None:
    opened = Adapter.open(adapter, open_index(checkpoint("llama")))
    opened.close()
    opened.close()
    name = opened.touched[0]
    with pytest.raises(ValueError, match="already closed"):
        opened.tuned(name, values(checkpoint("llama"))[name])
