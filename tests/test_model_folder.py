"""What surrounds the weights arrives whole, from the right side, and nothing else does."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fisherkit.checkpoint.folder.model_card import front_matter, model_card, public_id, read_card, redact
from fisherkit.checkpoint.folder.side_files import (
    code_files,
    copy_side_files,
    folder_of,
    output_config,
    read_config,
    side_files,
)
from fisherkit.checkpoint.hub import ModelSource
from fisherkit.errors import CheckpointError, OutputError

Make = Callable[..., Path]
JUNK = (
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.gguf", "m.ckpt"),
    *("pytorch_model.bin.index.json", "consolidated.00.pth", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"),
    *("training_args.bin", "trainer_state.json", "all_results.json", "events.out.tfevents.1", "adapter_config.json"),
    *("adapter_model.safetensors", ".gitattributes", ".git/config", ".cache/huggingface/x.json", "tokenizer.json.lock"),
    *("checkpoint-500/tokenizer.json", "runs/a/events", "wandb/run.json", "__pycache__/modeling.cpython-311.pyc"),
    *("sub/config.json", "sub/tokenizer.json", "other/notes.txt", "other/model.safetensors", "onnx/vocab.json"),
    *("README.md", "global_step10/mp_rank.json", "zero_to_fp32.py", "latest"),
)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder with files; the content of each says where it is from, unless it is given."""

    def folder(name: str, *names: str, config: dict[str, Any] | None = None, **files: str) -> Path:
        made = tmp_path / name
        for file in names:
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            (made / file).write_text(json.dumps({"from": f"{name}/{file}"}))
        made.mkdir(exist_ok=True)
        for file, text in files.items():
            (made / file.replace("__", ".")).write_text(text)
        if config is not None:
            (made / "config.json").write_text(json.dumps(config))
        return made

    return folder


def came_from(base: Path, tuned: Path | None, **options: Any) -> dict[str, str]:
    return {str(file.path): file.source.parent.name for file in side_files(base, tuned, **options)}


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


class TestSideFiles:
    def test_weights_training_state_and_other_checkpoints_are_never_copied(self, make: Make) -> None:
        names = ("generation_config.json", "LICENSE", "assets/figure.png", "tokenizer_config.json")
        base = make("base", *names, *(name for name in JUNK if name != "adapter_config.json"), config=LLAMA)
        tuned = make("tuned", "tokenizer.json", *JUNK)
        assert came_from(base, None) == {
            "LICENSE": "base",
            "assets/figure.png": "assets",
            "generation_config.json": "base",
            "tokenizer_config.json": "base",
        }
        assert came_from(base, tuned) == {
            "LICENSE": "base",
            "assets/figure.png": "assets",
            "generation_config.json": "base",
            "tokenizer.json": "tuned",
        }

    def test_the_tuned_side_wins_and_base_fills_in(self, make: Make) -> None:
        base = make("base", "generation_config.json", "preprocessor_config.json", "LICENSE", config=LLAMA)
        tuned = make("tuned", "generation_config.json", "tokenizer.json", config=LLAMA)
        assert came_from(base, tuned) == {
            "LICENSE": "base",
            "generation_config.json": "tuned",
            "preprocessor_config.json": "base",
            "tokenizer.json": "tuned",
        }
        assert set(came_from(base, tuned, from_tuned=False).values()) == {"base"}

    def test_a_tokenizer_is_never_mixed_from_two(self, make: Make) -> None:
        base = make("base", "tokenizer.model", "tokenizer.json", "added_tokens.json", "vocab.json", config=LLAMA)
        tuned = make("tuned", "tokenizer.json", "tokenizer_config.json", config=LLAMA)
        assert came_from(base, tuned) == {"tokenizer.json": "tuned", "tokenizer_config.json": "tuned"}
        assert set(came_from(base, make("bare", config=LLAMA)).values()) == {"base"}

    def test_a_template_of_base_never_overrides_one_in_the_tuned_tokenizer(self, make: Make) -> None:
        base = make(
            "base", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", config=LLAMA
        )
        inside = make("inside", config=LLAMA, tokenizer_config__json='{"chat_template": "{{ messages }}"}')
        assert came_from(base, inside) == {"tokenizer_config.json": "inside"}
        without = make("without", config=LLAMA, tokenizer_config__json="{}")
        assert came_from(base, without) == {
            "additional_chat_templates/rag.jinja": "additional_chat_templates",
            "chat_template.jinja": "base",
            "tokenizer_config.json": "without",
        }

    def test_an_adapter_gives_its_tokenizer_and_nothing_of_its_config(self, make: Make) -> None:
        base = make("base", "tokenizer.json", "modeling_x.py", config=LLAMA | {"auto_map": {}})
        adapter = make("adapter", "adapter_config.json", "tokenizer.json", "modeling_x.py", config=LLAMA | {"x": 1})
        assert came_from(base, adapter) == {"modeling_x.py": "base", "tokenizer.json": "adapter"}
        assert output_config(base, adapter).values == LLAMA | {"auto_map": {}}

    def test_python_code_comes_with_the_config_and_is_listed(self, make: Make) -> None:
        base = make("base", "modeling_x.py", config=LLAMA)
        same, other = make("same", "modeling_x.py", config=LLAMA), make("other", "modeling_x.py", "code.py", config={})
        assert came_from(base, same) == {"modeling_x.py": "same"}
        assert came_from(base, other) == {"modeling_x.py": "base"}
        assert code_files(side_files(base, same)) == ("modeling_x.py",)

    def test_a_lone_file_has_side_files_only_in_a_model_folder(self, make: Make) -> None:
        lone = make("downloads", "model.safetensors", "holiday.txt") / "model.safetensors"
        homed = make("model", "model.safetensors", "tokenizer.json", config=LLAMA) / "model.safetensors"
        assert folder_of(lone) is None
        assert side_files(lone, None) == []
        assert read_config(lone) == {}
        assert folder_of(homed) == homed.parent
        assert came_from(lone, homed) == {"tokenizer.json": "model"}
        assert read_config(homed) == LLAMA


class TestCopying:
    def test_links_are_followed_and_permissions_are_those_of_new_files(self, make: Make, tmp_path: Path) -> None:
        blobs = make("blobs", "abc")
        (blobs / "abc").chmod(0o400)
        base = make("base", "additional_chat_templates/rag.jinja", config=LLAMA)
        (base / "tokenizer.json").symlink_to("../blobs/abc")
        (base / "broken.json").symlink_to("nowhere")
        (base / "around").symlink_to(base, target_is_directory=True)
        into = tmp_path / "out"
        made = copy_side_files(side_files(base, None), into)
        assert made == ("additional_chat_templates/rag.jinja", "tokenizer.json")
        assert copy_side_files(side_files(base, None), into) == made  # once more after an interruption
        umask = os.umask(0)
        os.umask(umask)
        for name in made:
            assert not (into / name).is_symlink()
            assert (into / name).read_bytes() == (base / name).read_bytes()
            assert stat.S_IMODE((into / name).stat().st_mode) == 0o666 & ~umask

    def test_a_target_that_cannot_be_written_is_one_line(self, make: Make, tmp_path: Path) -> None:
        base = make("base", "tokenizer.json", config=LLAMA)
        (tmp_path / "out").write_text("a file")
        with pytest.raises(OutputError, match=r"out/tokenizer.json: .*base/tokenizer.json: "):
            copy_side_files(side_files(base, None), tmp_path / "out")

    def test_transformers_loads_what_was_copied(self, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
        import transformers

        base, into = checkpoint("gemma4-31b"), tmp_path / "out"
        copy_side_files(side_files(base, base), into)
        (into / "config.json").write_text(json.dumps(output_config(base, base).values))
        assert read_config(into) == read_config(base)
        assert transformers.AutoConfig.from_pretrained(into).model_type == "gemma4"
        text = "Name three rivers."
        ids = [transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (base, into)]
        assert ids[0] == ids[1]


class TestOutputConfig:
    def test_the_tuned_config_is_used_for_the_same_model(self, make: Make) -> None:
        base = make("base", config=LLAMA | {"dtype": "bfloat16", "tie_word_embeddings": False, "rope": 1})
        tuned = make(
            "tuned", config=LLAMA | {"dtype": "float32", "tie_word_embeddings": True, "rope": 2, "_name_or_path": "/a"}
        )
        found = output_config(base, tuned)
        assert found.values == LLAMA | {"dtype": "bfloat16", "tie_word_embeddings": False, "rope": 2}
        assert found.notes == ()

    def test_the_key_of_the_dtype_stays_as_it_was_called(self, make: Make) -> None:
        base = make("base", config=LLAMA | {"dtype": "bfloat16"})
        tuned = make("tuned", config=LLAMA | {"torch_dtype": "float32"})
        assert output_config(base, tuned).values == LLAMA | {"torch_dtype": "bfloat16"}
        assert output_config(tuned, base).values == LLAMA | {"dtype": "float32"}
        assert output_config(tuned, make("silent", config=LLAMA)).values == LLAMA | {"torch_dtype": "float32"}
        assert output_config(make("quiet", config=LLAMA), tuned).values == LLAMA

    def test_parts_of_the_config_are_stored_like_bases_too(self, make: Make) -> None:
        text = {"dtype": "bfloat16", "tie_word_embeddings": False}
        base = make("base", config=LLAMA | {"tie_word_embeddings": True, "text_config": text})
        tuned = make("tuned", config=LLAMA | {"text_config": {"dtype": "float32", "x": 1}, "rope_config": 3})
        wanted = LLAMA | {"tie_word_embeddings": True, "text_config": text | {"x": 1}, "rope_config": 3}
        assert output_config(base, tuned).values == wanted

    def test_another_class_leaves_bases_config_with_a_note(self, make: Make) -> None:
        base = make("base", config={"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]})
        tuned = make("tuned", config={"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]})
        found = output_config(base, tuned)
        assert found.values == read_config(base)
        assert found.notes == (
            "config.json is BASE's: Gemma4ForCausalLM on the tuned side is not Gemma4ForConditionalGeneration",
        )

    def test_an_output_with_two_ends_is_untied_at_every_level(self, make: Make) -> None:
        base = make("base", config={"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}})
        wanted = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
        assert output_config(base, None, untied=True).values == wanted
        assert output_config(make("bare", config={"a": 1}), None, untied=True).values == {
            "a": 1,
            "tie_word_embeddings": False,
        }

    def test_one_config_is_enough_and_none_is_said(self, make: Make) -> None:
        none, tuned = make("none", "model.safetensors"), make("tuned", config=LLAMA)
        assert output_config(none, tuned).values == LLAMA
        assert output_config(none, None).values is None
        assert output_config(none, None).notes == ("neither side has a config.json, so the output has none",)

    def test_a_damaged_config_is_named(self, make: Make) -> None:
        base = make("base", config__json='{"model_type": ')
        with pytest.raises(CheckpointError, match=r"base/config.json: .*JSON"):
            output_config(base, None)


BASE_CARD = (
    "---\nlicense: gemma   # theirs\nlicense_link: 'https://example.org/a b'\npipeline_tag: any-to-any\n---\n# B\n"
)
TUNED_CARD = """---
license: apache-2.0
pipeline_tag: text-generation
tags:
- trl
---

# Tuned

Text with --- in it.
"""


def card(**changes: Any) -> str:
    given: dict[str, Any] = {
        "method": "fapm",
        "base_id": "google/gemma-4",
        "tuned_id": "me/tuned",
        "command": ["fisherkit", "fapm", "google/gemma-4", "me/tuned", "out dir"],
        "facts": {"kept": "10.0 %", "odd | name": "two\nlines"},
    }
    return model_card(**given | changes)


def parsed(text: str) -> dict[str, Any]:
    front = text.split("---\n")[1]
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


class TestModelCard:
    def test_front_matter_says_what_the_hub_reads(self) -> None:
        assert parsed(card(base_card=BASE_CARD, tuned_card=TUNED_CARD)) == {
            "library_name": "transformers",
            "base_model": ["google/gemma-4", "me/tuned"],
            "tags": ["fisherkit", "fapm", "merge"],
            "license": "gemma",
            "license_link": "https://example.org/a b",
            "pipeline_tag": "text-generation",
        }
        assert parsed(card(method="merge", tuned_id=None))["tags"] == ["fisherkit", "merge"]

    def test_no_licence_and_no_task_is_made_up(self) -> None:
        assert not {"license", "license_link", "pipeline_tag"} & parsed(card()).keys()
        assert "pipeline_tag" not in parsed(card(base_card=BASE_CARD))
        assert parsed(card(tuned_card=TUNED_CARD))["license"] == "apache-2.0"

    @pytest.mark.parametrize(
        "text",
        ["no", "1.0", "2024-01-01", 'a "b" \\ c', "x: y", "it's", "- a", "ключ", "💾", "\x7f", "*", "{a}", "a\tb"],
    )
    def test_any_text_survives_yaml(self, text: str) -> None:
        assert parsed(card(base_card=f"---\nlicense: {json.dumps(text)}\n---\n"))["license"] == text

    def test_values_in_lists_are_read_and_unfinished_fronts_are_not(self) -> None:
        assert front_matter("---\nlicense: [mit, 'x']\n---\n") == {"license": ["mit", "x"]}
        assert front_matter("---\nlicense:\n- mit\n- bsd\nother: 1\n---\n") == {"license": ["mit", "bsd"]}
        assert front_matter("---\r\nlicense: mit\r\n---\r\n") == {"license": "mit"}
        for text in ("", "# Title\nlicense: mit\n", "---\nlicense: mit\n", "---\nlicense: null\n---\n"):
            assert front_matter(text) == {}

    def test_nested_fields_and_hyphenated_keys_do_not_leak_into_the_one_before(self) -> None:
        results = "model-index:\n- name: foo\n  results:\n  - task: {type: text-generation}\n"
        assert front_matter(f"---\nlicense: mit\n{results}pipeline_tag: x\n---\n") == {
            "license": "mit",
            "pipeline_tag": "x",
        }
        assert front_matter(f"---\n{results}license: mit\n---\n") == {"license": "mit"}
        assert front_matter("---\nbase-model: a\nlicense:\n  name: mit\n---\n") == {}

    def test_folded_text_is_read_as_text(self) -> None:
        folded = "---\nlicense: other\nlicense_name: >-\n  my own\n  licence\nlicense_link: LICENSE\n---\n"
        assert front_matter(folded) == {
            "license": "other",
            "license_name": "my own licence",
            "license_link": "LICENSE",
        }

    @pytest.mark.parametrize(
        "front",
        [
            "license: x: y",
            "license: *",
            "a: [",
            "- mit",
            "mit",
            "license: !!python/name:os.system",
            "a: " + "[" * 100_000,
        ],
    )
    def test_what_is_no_front_matter_is_carried_as_nothing(self, front: str) -> None:
        assert front_matter(f"---\n{front}\n---\n") == {}

    def test_the_body_has_command_figures_paper_and_the_old_card(self) -> None:
        text = card(base_card=BASE_CARD, tuned_card=TUNED_CARD)
        assert "```sh\nfisherkit fapm google/gemma-4 me/tuned 'out dir'\n```" in text
        assert "| kept | 10.0 % |\n| odd \\| name | two lines |" in text
        assert "https://arxiv.org/abs/2509.08255" in text
        assert "arxiv" not in card(method="merge")
        assert text.endswith("*The card of me/tuned follows.*\n\n# Tuned\n\nText with --- in it.\n")
        assert text.count("apache-2.0") == 0
        assert "follows" not in card(tuned_card="---\nlicense: mit\n---\n")

    def test_a_name_that_is_no_id_stays_out_of_the_front_matter(self) -> None:
        text = card(base_id="my model `x`", tuned_id="me/tuned")
        assert parsed(text)["base_model"] == ["me/tuned"]
        assert "# my model 'x', fapm" in text
        assert "base_model" not in parsed(card(base_id="a b", tuned_id="checkpoint-5"))  # a folder is no model's id

    def test_tokens_are_not_written_down(self) -> None:
        token = "hf_" + "a1B2" * 8
        text = redact(
            ["fisherkit", "fapm", "--token", "secret", f"--hf-token={token}", f"https://u:{token}@x", "\udcff"]
        )
        assert text == "fisherkit fapm --token REDACTED --hf-token=REDACTED https://u:hf_REDACTED@x '?'"

    def test_of_a_path_on_this_machine_the_name_is_written_down(self) -> None:
        words = ["fisherkit", "merge", "/home/me/base", "runs/tuned", "../out", "~/x", "--mask=/home/me/m.safetensors"]
        assert redact(words) == "fisherkit merge base runs/tuned out x --mask=m.safetensors"
        assert redact(["fisherkit", "fapm", "org/name@v1", "--sparsity", "0.9", "/"]).endswith(
            "org/name@v1 --sparsity 0.9 /"
        )

    def test_a_fence_is_longer_than_any_in_the_command(self) -> None:
        assert "````sh\n" in card(command=["fisherkit", "a```b"])


class TestNames:
    def test_a_path_is_never_published(self, tmp_path: Path) -> None:
        folder = tmp_path / "my-model"
        folder.mkdir()
        assert public_id(ModelSource(folder, str(folder), None)) == "my-model"
        assert public_id(ModelSource(folder / ".", ".", None)) == "my-model"
        assert public_id(ModelSource(folder, "org/name", "a" * 40)) == "org/name"
        cached = tmp_path / "models--org--na-me" / "snapshots" / ("a" * 40)
        assert public_id(ModelSource(cached, str(cached), None)) == "org/na-me"

    def test_a_card_that_is_not_text_is_none(self, make: Make) -> None:
        assert read_card(None) is None
        assert read_card(make("empty")) is None
        (make("binary") / "README.md").write_bytes(b"\xff\xfe\x00")
        assert read_card(make("binary")) is None
        assert read_card(make("card", README__md="# Hello\n")) == "# Hello\n"

    def test_nothing_here_needs_torch_or_transformers(self) -> None:
        modules = "fisherkit.checkpoint.folder.model_card, fisherkit.checkpoint.folder.side_files"
        code = f"import sys, {modules}; assert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)
