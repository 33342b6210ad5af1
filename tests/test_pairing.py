"""A tensor of BASE gets FT's values whatever FT's layout is; what does not belong together is refused in one line."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.matching.pairing import Pairing, pair
from fisherkit.checkpoint.names.location import tower
from fisherkit.errors import CheckpointError

Checkpoint = Callable[[str], Path]
Arrays = dict[str, NDArray[Any]]
MOE = ("qwen3-moe", "mixtral")


def matched(base: Path, tuned: Path) -> Pairing:
    return pair(open_index(base), open_index(tuned), base_folder=base, tuned_folder=tuned)


def stored(folder: Path) -> Arrays:
    with ArrayReader(open_index(folder)) as reader:
        return {name: reader.read(name) for name in reader.index.tensors}


def through(pairing: Pairing) -> Arrays:
    with ArrayReader(pairing.tuned) as reader:
        return {name: pairing.read(name, reader) for name in pairing.matched}


def equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    same_names = one.keys() == other.keys()
    return same_names and all(one[n].dtype == other[n].dtype and np.array_equal(one[n], other[n]) for n in one)


def write(folder: Path, arrays: Mapping[str, NDArray[Any]], **config: Any) -> Path:
    """A checkpoint by hand; config.json only where something is to be in it."""
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def toy(seed: int = 0, rows: int = 8, layers: int = 2, **more: NDArray[Any]) -> Arrays:
    """A model of a few tensors, tied; ``more`` with underscores for dots where they are doubled."""
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(layers) for part in ("up", "down")]
    made: Arrays = {"model.embed_tokens.weight": rng.standard_normal((rows, 4)).astype(np.float32)}
    made |= {name: rng.standard_normal((4, 4)).astype(np.float32) for name in names}
    return made | {"model.norm.weight": np.ones(4, np.float32)} | {k.replace("__", "."): v for k, v in more.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", toy(), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A multimodal model, and its text model saved by the text-only class."""
    folder = tmp_path_factory.mktemp("gemma4")
    model = tiny.build("gemma4-31b", seed=1)
    text_config = model.config.text_config
    text_config.tie_word_embeddings = True
    text = transformers.Gemma4ForCausalLM(text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    model.save_pretrained(folder / "multimodal")
    text.save_pretrained(folder / "text")
    return folder / "multimodal", folder / "text"


class TestLayouts:
    @pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma4-31b", "gemma4-e2b", "gpt2", "mixtral"])
    def test_shard_boundaries_make_no_difference(
        self, checkpoint: Checkpoint, architecture: str, tmp_path: Path
    ) -> None:
        tuned = tiny.save(architecture, tmp_path / "tuned", seed=1, shard="10GB")
        found = matched(checkpoint(architecture), tuned)
        assert found.matched == tuple(open_index(checkpoint(architecture)).tensors)
        assert (found.base_only, found.tuned_only, found.notes) == ((), (), ())
        assert equal(through(found), stored(tuned))

    def test_values_come_in_the_dtype_of_ft(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        tuned = tiny.save("llama", tmp_path / "tuned", seed=1, dtype=torch.bfloat16)
        found = matched(checkpoint("llama"), tuned)
        assert {found.code(name) for name in found.matched} == {"BF16"}
        assert equal(through(found), stored(tuned))

    def test_a_pickled_checkpoint_pairs_like_its_safetensors(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        weights = stored(checkpoint("llama"))
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "pytorch_model.bin")
        assert equal(through(matched(checkpoint("llama"), tmp_path)), weights)

    @pytest.mark.parametrize("architecture", MOE)
    @pytest.mark.parametrize("base_is_fused", [False, True])
    def test_experts_fused_and_apart_meet(self, architecture: str, base_is_fused: bool, tmp_path: Path) -> None:
        """The oracle is transformers, which saves the same model in both layouts."""
        model = tiny.build(architecture, seed=1)
        model.save_pretrained(tmp_path / "fused", save_original_format=False)
        model.save_pretrained(tmp_path / "apart", max_shard_size="30KB")
        base, tuned = (tmp_path / name for name in (("fused", "apart") if base_is_fused else ("apart", "fused")))
        found = matched(base, tuned)
        assert equal(through(found), stored(base))
        assert (found.base_only, found.tuned_only) == ((), ())
        assert "FT stores its experts in another way" in found.notes[0]

    @pytest.mark.parametrize("base_is_fused", [False, True])
    def test_any_part_of_a_tensor_can_be_read(self, base_is_fused: bool, tmp_path: Path) -> None:
        model = tiny.build("qwen3-moe")
        for name, original in (("fused", False), ("apart", True)):
            model.save_pretrained(tmp_path / name, save_original_format=original)
        base, tuned = (tmp_path / name for name in (("fused", "apart") if base_is_fused else ("apart", "fused")))
        found = matched(base, tuned)
        name = max(found.matched, key=lambda name: (".experts." in name, found.base.tensors[name].numel))
        whole = stored(base)[name].reshape(-1)
        with ArrayReader(found.tuned) as reader:
            for start, stop in ((0, 0), (0, 1), (7, whole.size - 3), (whole.size - 1, whole.size), (0, whole.size)):
                out = np.full(stop - start, np.nan, np.float32)
                found.read_into(name, reader, out, start)
                assert np.array_equal(out, whole[start:stop])
            found.prefetch(name, reader)
            with pytest.raises(IndexError, match=r"elements 1 to \d+ of"):
                found.read_into(name, reader, np.empty_like(whole), 1)
            with pytest.raises(IndexError, match="elements -1 to 0 of"):
                found.read_into(name, reader, np.empty(1, np.float32), -1)

    def test_gpt_neox_head_is_found_under_either_name(self, tmp_path: Path) -> None:
        model = tiny.build("gpt-neox")
        model.save_pretrained(tmp_path / "disk")
        model.save_pretrained(tmp_path / "memory", save_original_format=False)
        assert equal(through(matched(tmp_path / "disk", tmp_path / "memory")), stored(tmp_path / "disk"))

    def test_expert_of_several_dtypes_is_refused(self, tmp_path: Path) -> None:
        experts = {
            f"model.layers.0.mlp.experts.{e}.{part}_proj.weight": np.ones(shape, np.float16 if e else np.float32)
            for e in (0, 1)
            for part, shape in (("gate", (2, 4)), ("up", (2, 4)), ("down", (4, 2)))
        }
        fused = {
            "model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 4, 4), np.float32),
            "model.layers.0.mlp.experts.down_proj": np.ones((2, 4, 2), np.float32),
        }
        base = write(tmp_path / "base", toy() | fused)
        with pytest.raises(CheckpointError, match=r"experts of \S+_proj.*F16, F32"):
            matched(base, write(tmp_path / "tuned", toy(1) | experts))

    def test_more_experts_than_base_has_are_refused(self, tmp_path: Path) -> None:
        def experts(count: int) -> Arrays:
            shapes = (("gate", (2, 4)), ("up", (2, 4)), ("down", (4, 2)))
            name = "model.layers.0.mlp.experts.{}.{}_proj.weight".format
            return {name(e, part): np.ones(shape, np.float32) for e in range(count) for part, shape in shapes}

        base = write(tmp_path / "base", toy() | experts(2))
        with pytest.raises(CheckpointError, match=r" 3 that BASE lacks \(\S+experts.2.down_proj.weight, "):
            matched(base, write(tmp_path / "tuned", toy(1) | experts(3)))

    def test_two_names_of_one_tensor_are_refused(self, base: Path, tmp_path: Path) -> None:
        weights = toy(1)
        weights["model.language_model.norm.weight"] = weights["model.norm.weight"]
        with pytest.raises(CheckpointError, match=r"two names of one tensor"):
            matched(base, write(tmp_path / "tuned", weights))

    def test_pairing_needs_no_torch(self) -> None:
        code = (
            "import sys, fisherkit.checkpoint.matching.pairing; assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestTowers:
    def test_a_text_only_fine_tune_pairs_with_a_multimodal_base(self, sides: tuple[Path, Path]) -> None:
        multimodal, text = sides
        found = matched(multimodal, text)
        weights = stored(multimodal)
        assert set(found.base_only) == {name for name in weights if tower(name)}
        assert any(".vision_tower." in name for name in found.base_only)
        assert equal(through(found), {name: weights[name] for name in found.matched})
        assert found.tuned_only == ()
        assert "FT has no model.embed_vision; kept from BASE: 1 tensor" in found.notes
        assert any(note.startswith("FT has no model.vision_tower; kept from BASE: ") for note in found.notes)

    def test_towers_that_base_lacks_are_dropped(self, sides: tuple[Path, Path]) -> None:
        multimodal, text = sides
        found = matched(text, multimodal)
        assert found.base_only == ()
        assert all(tower(name) for name in found.tuned_only)
        assert "BASE has no model.embed_vision; dropped from FT: 1 tensor" in found.notes

    def test_half_a_tower_is_refused(self, sides: tuple[Path, Path], tmp_path: Path) -> None:
        weights = stored(sides[0])
        gone = next(name for name in weights if ".vision_tower." in name)
        del weights[gone]
        with pytest.raises(CheckpointError, match=r"lacks 1 tensor of BASE \(model\.vision_tower"):
            matched(sides[0], write(tmp_path / "tuned", weights, tie_word_embeddings=True))

    def test_a_part_of_a_decoder_block_is_no_tower(self, base: Path, tmp_path: Path) -> None:
        expert = {"model.layers.0.vision_expert.weight": np.ones((4, 4), np.float32)}
        with pytest.raises(CheckpointError, match=r"lacks 1 tensor of BASE \(model.layers.0.vision_expert.weight\)"):
            matched(write(tmp_path / "multimodal", toy() | expert), base)

    @pytest.mark.parametrize("name", ["mtp.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"])
    def test_layers_that_predict_further_tokens_are_bases(self, name: str, tmp_path: Path) -> None:
        more = {name: np.ones((4, 4), np.float32)}
        base = write(tmp_path / "base", toy() | more, num_hidden_layers=2)
        tuned = write(tmp_path / "tuned", toy(1), num_hidden_layers=2)
        assert matched(base, tuned).base_only == (name,)
        assert matched(tuned, base).tuned_only == (name,)

    def test_keys_that_no_block_uses_may_be_missing(self, tmp_path: Path) -> None:
        unused = {"model.layers.1.self_attn.k_proj.weight": np.ones((4, 4), np.float32)}
        used = {"model.layers.0.self_attn.k_proj.weight": np.ones((4, 4), np.float32)}
        config = {"text_config": {"num_hidden_layers": 2, "num_kv_shared_layers": 1}}
        base = write(tmp_path / "base", toy() | used | unused, **config)
        found = matched(base, write(tmp_path / "tuned", toy(1) | used, **config))
        assert found.base_only == tuple(unused)
        with pytest.raises(CheckpointError, match=r"lacks 1 tensor of BASE \(model.layers.0.self_attn.k_proj.weight\)"):
            matched(base, write(tmp_path / "other", toy(1) | unused, **config))


class TestLeftOver:
    def test_a_missing_decoder_weight_is_refused(self, base: Path, tmp_path: Path) -> None:
        weights = toy(1)
        del weights["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(CheckpointError, match=r"lacks 1 tensor of BASE \(model.layers.1.mlp.up_proj.weight\)"):
            matched(base, write(tmp_path / "tuned", weights))

    def test_at_most_three_names_are_listed_on_each_side(self, base: Path, tmp_path: Path) -> None:
        weights = {name.replace(".mlp.", ".ffn."): array for name, array in toy(1).items()}
        with pytest.raises(CheckpointError) as error:
            matched(base, write(tmp_path / "tuned", weights))
        assert "lacks 4 tensors of BASE (" in str(error.value)
        assert "has 4 that BASE lacks (" in str(error.value)
        assert str(error.value).count("and 1 more") == 2
        assert "\n" not in str(error.value)

    def test_unmerged_lora_factors_are_called_by_their_name(self, base: Path, tmp_path: Path) -> None:
        lora = {"model.layers.0.mlp.up_proj.lora_A.default.weight": np.ones((2, 4), np.float32)}
        with pytest.raises(CheckpointError, match=r"LoRA factors.*merge_and_unload"):
            matched(base, write(tmp_path / "tuned", toy(1) | lora))

    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32)),
            ("model.layers.0.attn.bias", np.ones((1, 1, 4, 4), np.float32)),
            ("model.layers.0.attn.masked_bias", np.float32(-1e4)),
            ("model.layers.0.attn.mask", np.ones((4, 4), np.bool_)),
            ("model.position_ids", np.arange(4)[None]),
        ],
    )
    def test_constants_are_bases_and_never_matched(self, name: str, array: NDArray[Any], tmp_path: Path) -> None:
        array = np.asarray(array)
        plain, more = write(tmp_path / "plain", toy()), write(tmp_path / "more", toy(1) | {name: array})
        assert matched(more, plain).base_only == (name,)
        assert matched(more, plain).notes == (f"integers and constants that only BASE stores are kept: {name}",)
        assert matched(plain, more).tuned_only == (name,)
        assert matched(plain, more).notes == (f"integers and constants that only FT stores are dropped: {name}",)
        both = matched(more, write(tmp_path / "both", toy(2) | {name: array}))
        assert (both.base_only, both.tuned_only, both.notes) == ((name,), (name,), ())

    def test_a_bias_vector_is_a_weight(self, tmp_path: Path) -> None:
        bias = {"model.layers.0.attn.bias": np.ones(4, np.float32)}
        found = matched(write(tmp_path / "base", toy() | bias), write(tmp_path / "tuned", toy(1) | bias))
        assert "model.layers.0.attn.bias" in found.matched


class TestDifferentModels:
    def test_models_without_a_common_name_are_two_models(
        self, base: Path, checkpoint: Checkpoint, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match=r"two different models.*0 of 6 tensors[^;]*$"):
            matched(base, checkpoint("gpt2"))

    def test_models_of_another_width_are_two_models(self, base: Path, tmp_path: Path) -> None:
        wide = {name: np.ones([2 * size for size in array.shape], np.float32) for name, array in toy().items()}
        with pytest.raises(CheckpointError, match=r"two different models.*0 of 6 .*\[8, 4\] in BASE, \[16, 8\] in"):
            matched(base, write(tmp_path / "tuned", wide))

    @pytest.mark.parametrize(("rows", "smaller"), [(7, "FT"), (9, "BASE")])
    def test_another_vocabulary_is_refused_with_the_way_out(
        self, base: Path, rows: int, smaller: str, tmp_path: Path
    ) -> None:
        text = rf" 8 rows in BASE, {rows} in FT.*{smaller} .*embeddings\({max(rows, 8)}\)"
        with pytest.raises(CheckpointError, match=text):
            matched(base, write(tmp_path / "tuned", toy(1, rows=rows)))

    def test_another_shape_is_named_with_both(self, base: Path, tmp_path: Path) -> None:
        weights = toy(1) | {"model.norm.weight": np.ones((4, 1), np.float32)}
        with pytest.raises(CheckpointError, match=r"model.norm.weight is \[4\] in BASE, \[4, 1\] in FT"):
            matched(base, write(tmp_path / "tuned", weights))


class TestTiedEmbeddings:
    def head(self, weights: Arrays, add: float = 0.0) -> Arrays:
        return weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + np.float32(add)}

    def test_a_head_equal_to_the_embedding_is_dropped_where_base_ties(self, base: Path, tmp_path: Path) -> None:
        found = matched(base, write(tmp_path / "tuned", self.head(toy(1)), tie_word_embeddings=True))
        assert found.tuned_only == ("lm_head.weight",)
        assert found.notes == ("FT's lm_head.weight equals its embedding and is dropped: BASE ties the two",)
        assert not found.untied

    def test_a_head_that_base_neither_stores_nor_ties_is_refused(self, tmp_path: Path) -> None:
        base = write(tmp_path / "base", toy(), tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match=r"has 1 that BASE lacks \(lm_head.weight\)"):
            matched(base, write(tmp_path / "tuned", self.head(toy(1))))

    def test_equal_means_equal_values_whatever_the_dtype(self, base: Path, tmp_path: Path) -> None:
        weights = toy(1)
        half = weights["model.embed_tokens.weight"].astype(np.float16)
        weights |= {"lm_head.weight": half, "model.embed_tokens.weight": half.astype(np.float32)}
        assert matched(base, write(tmp_path / "tuned", weights)).tuned_only == ("lm_head.weight",)

    def test_a_head_that_diverged_is_refused_where_base_ties(self, base: Path, tmp_path: Path) -> None:
        weights = self.head(toy(1))
        weights["lm_head.weight"][-1, -1] += 1  # the last value of all
        with pytest.raises(CheckpointError, match=r"lm_head.weight has diverged.* ties"):
            matched(base, write(tmp_path / "tuned", weights))

    @pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
    def test_a_stored_head_is_paired_with_a_tied_embedding(self, config: dict[str, Any], tmp_path: Path) -> None:
        base = write(tmp_path / "base", self.head(toy(), 1), tie_word_embeddings=False)
        found = matched(base, write(tmp_path / "tuned", toy(1), **config))
        read = through(found)
        assert np.array_equal(read["lm_head.weight"], read["model.embed_tokens.weight"])
        assert found.untied
        assert found.tied_pairs == {}
        assert "FT ties its head to its embedding" in found.notes[0]

    def test_a_model_saved_without_its_head_is_refused(self, tmp_path: Path) -> None:
        base = write(tmp_path / "base", self.head(toy(), 1), tie_word_embeddings=False)
        for name, config in (("says-no", {"tie_word_embeddings": False}), ("silent", {})):
            with pytest.raises(CheckpointError, match=r"no lm_head.weight.*config"):
                matched(base, write(tmp_path / name, toy(1), **config))

    def test_a_silent_config_is_taken_for_tied_where_base_is_in_effect(self, tmp_path: Path) -> None:
        found = matched(write(tmp_path / "base", self.head(toy())), write(tmp_path / "tuned", toy(1)))
        assert found.tied_pairs == {"lm_head.weight": "model.embed_tokens.weight"}
        assert not found.untied

    def test_twins_are_equal_on_both_sides(self, tmp_path: Path) -> None:
        tied = write(tmp_path / "base", self.head(toy()), tie_word_embeddings=True)
        equal_ends = write(tmp_path / "equal", self.head(toy(1)), tie_word_embeddings=True)
        untied = write(tmp_path / "untied", self.head(toy(1), 1), tie_word_embeddings=False)
        assert matched(tied, equal_ends).tied_pairs == {"lm_head.weight": "model.embed_tokens.weight"}
        assert matched(tied, untied).tied_pairs == {}
        assert matched(tied, untied).untied
        assert matched(untied, equal_ends).untied

    def test_a_config_that_ties_what_differs_is_refused(self, tmp_path: Path) -> None:
        base = write(tmp_path / "base", self.head(toy(), 1), tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match=r"config ties lm_head.weight to .*diverged"):
            matched(base, write(tmp_path / "tuned", self.head(toy(1), 1), tie_word_embeddings=True))


class TestQuantised:
    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("model.layers.0.mlp.up_proj.weight_scale_inv", np.ones((1, 1), np.float32)),
            ("model.layers.0.mlp.up_proj.weight_scale", np.ones(1, np.float32)),
            ("model.layers.0.mlp.up_proj.qweight", np.ones((1, 4), np.int32)),
            ("model.layers.0.mlp.up_proj.scales", np.ones((1, 4), np.float16)),
            ("model.layers.0.mlp.up_proj.weight", np.ones((4, 4), np.int8)),
            ("model.layers.0.mlp.up_proj.weight", np.ones((8, 1), np.uint8)),
            ("model.layers.0.mlp.up_proj.weight.absmax", np.ones(4, np.float32)),
            ("model.layers.0.mlp.up_proj.SCB", np.ones(4, np.float32)),
            ("model.layers.0.mlp.experts.gate_up_proj_blocks", np.ones((2, 2), np.uint8)),
        ],
    )
    @pytest.mark.parametrize("which", [0, 1])
    def test_either_side_is_refused(
        self, base: Path, name: str, array: NDArray[Any], which: int, tmp_path: Path
    ) -> None:
        packed = write(tmp_path / "packed", toy() | {name: array})
        sides = (packed, base) if which else (base, packed)
        with pytest.raises(CheckpointError, match=r"packed.*quantised.*dequantise"):
            matched(*sides)

    def test_the_method_is_named(self, base: Path, tmp_path: Path) -> None:
        config = {"quantization_config": {"quant_method": "gptq"}}
        weights = toy(1) | {"model.layers.0.mlp.up_proj.qweight": np.ones((1, 4), np.int32)}
        with pytest.raises(CheckpointError, match=r"quantised \(gptq\); dequantise"):
            matched(base, write(tmp_path / "packed", weights, **config))
        with pytest.raises(CheckpointError, match=r"quantised \(gptq\).*no tensor is.*quantization_config"):
            matched(base, write(tmp_path / "plain", toy(1), text_config=config))

    def test_masks_of_bytes_are_not_quantised_weights(self, base: Path, tmp_path: Path) -> None:
        mask = {"model.layers.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}
        assert matched(base, write(tmp_path / "tuned", toy(1) | mask)).tuned_only == tuple(mask)
