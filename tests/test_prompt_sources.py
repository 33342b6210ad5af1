"""Where prompts come from: codecs, folders, patterns and several files give what the one plain file gives."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prompt_sets import QA, load, load_text, texts
from tiny_tokenizers import CHATML, THINKING, tiny_tokenizer

from fisherkit.errors import MissingLibraryError, PromptError
from fisherkit.options import PromptOptions
from fisherkit.prompts import parsers
from fisherkit.prompts.compression import split_compression
from fisherkit.prompts.dataset import PromptSet, load_prompts
from fisherkit.prompts.folders import data_files
from fisherkit.prompts.report import ranges
from fisherkit.prompts.sources import read_rows, source_name

LINES = {
    "a.jsonl": '{"prompt": "one two"}\n{"prompt": "three"}\n',
    "a.json": '[{"prompt": "one two"}, {"prompt": "three"}]',
    "a.csv": "prompt\none two\nthree\n",
    "a.txt": "one two\nthree\n",
    "a": "one two\nthree\n",
}
CODECS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
needs_zstd = pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="no codec here")


def read(source: Any, **options: Any) -> PromptSet:
    return load_prompts(source, tiny_tokenizer(), PromptOptions(**options))


def write(folder: Path, **contents: str) -> Path:
    """Files of JSON Lines, one prompt per word; underscores in names are folders, and two of them a dot."""
    for name, words in contents.items():
        path = folder / (name.replace("__", ".").replace("_", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words.split()), encoding="utf-8")
    return folder


# Codecs


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_file_is_read_as_the_plain_one(tmp_path: Path, name: str, codec: str) -> None:
    found = load_text(tmp_path, name + codec, CODECS[codec](LINES[name].encode()))
    assert texts(found) == ["one two", "three"]


def test_two_members_are_one_file(tmp_path: Path) -> None:
    whole = gzip.compress(b"one two\n") + gzip.compress(b"three\n")
    assert texts(load_text(tmp_path, "a.txt.gz", whole)) == ["one two", "three"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_cut_off_or_foreign_file_is_one_line(tmp_path: Path, codec: str) -> None:
    whole = CODECS[codec](b"".join(b'{"prompt": "%d"}\n' % n for n in range(1000)))
    for content in (whole[: len(whole) // 2], b"not compressed", whole[:5]):
        with pytest.raises(PromptError, match=rf"a\.jsonl\{codec}: cannot be read: ."):
            load_text(tmp_path, f"a.jsonl{codec}", content, limit=None)


@needs_zstd
def test_zstandard_reads_all_frames_and_refuses_a_cut_off_one(tmp_path: Path) -> None:
    import zstandard

    frame = zstandard.ZstdCompressor().compress
    lines = [f"row {n} " + "x" * (n % 97) for n in range(4000)]
    text = "\n".join(lines).encode()
    for whole in (frame(text), frame(text[:5000]) + frame(text[5000:])):
        assert [row["prompt"] for _, row in read_rows(write_bytes(tmp_path / "a.txt.zst", whole))] == lines
    for broken in (whole[:-9], whole[:3], b"not compressed"):
        with pytest.raises(PromptError, match=r"a\.txt\.zst: cannot be read"):
            load_text(tmp_path, "a.txt.zst", broken, limit=None)


def write_bytes(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_without_its_codec_a_zst_file_names_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match=r"a\.txt\.zst: a \.zst file, which needs the library 'zstandard'"):
        load_text(tmp_path, "a.txt.zst", b"x")


def test_the_codec_is_told_by_the_last_suffix_alone() -> None:
    names = ("a.jsonl.GZ", "a.jsonl", "a.gz", "a.gz.jsonl", "a")
    expected = [(".jsonl", ".gz"), (".jsonl", ""), ("", ".gz"), (".jsonl", ""), ("", "")]
    assert [split_compression(Path(name)) for name in names] == expected


# Several files


def test_several_files_are_read_in_order_and_rows_count_in_each(tmp_path: Path) -> None:
    folder = write(tmp_path, a__jsonl="one two", b__jsonl="three")
    names = [folder / "b.jsonl", folder / "a.jsonl"]
    found = read(names)
    assert texts(found) == ["three", "one", "two"]
    assert found.report.source == f"{folder}/b.jsonl and 1 more"
    assert [where for where, _ in read_rows(names)] == [f"{names[0]} row 1", f"{names[1]} row 1", f"{names[1]} row 2"]
    (folder / "c.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(PromptError, match=r"c\.jsonl row 1: no field 'prompt'"):
        read([*names, folder / "c.jsonl"])
    assert read([names[0], "builtin"], limit=3).report.rows == 3
    with pytest.raises(PromptError, match="no prompts in it"):
        read([])


def test_patterns_are_sorted_and_a_file_of_that_name_comes_first(tmp_path: Path) -> None:
    folder = write(tmp_path, data_b__jsonl="three", data_a__jsonl="one two", data_deep_c__jsonl="four")
    assert texts(read(f"{folder}/data/*.jsonl")) == ["one", "two", "three"]
    assert texts(read(f"{folder}/**/*.jsonl")) == ["one", "two", "three", "four"]
    with pytest.raises(PromptError, match="no file fits the pattern"):
        read(f"{folder}/data/*.csv")
    write(folder, **{"*__jsonl": "star"})
    assert texts(read(f"{folder}/*.jsonl")) == ["star"]


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_text("one two\nthree\n"), daemon=True).start()
    assert texts(read(pipe)) == ["one two", "three"]


# Folders


def test_a_folder_of_files_is_read_as_one_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", b__jsonl="three", a__jsonl="one two", _hidden__jsonl="no", README__jsonl="no")
    write(folder, **{"__cache_x__jsonl": "no", "dataset_info": ""})
    (folder / "notes.txt").write_text("not a prompt\n")
    (folder / "dataset_info.json").write_text("{}")
    assert texts(read(folder)) == ["one", "two", "three"]
    (folder / "d.csv").write_text("prompt\nx\n")
    with pytest.raises(PromptError, match=r"holds \.csv and \.jsonl files; name those to read"):
        read(folder)


def test_a_folder_of_text_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("one\ntwo\n")
    assert texts(read(tmp_path / "set")) == ["one", "two"]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (("data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"), None, "train"),
        (("data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"), "test", "test"),
        (("train/a.jsonl", "validation/a.jsonl"), None, "train"),
        (("train/a.jsonl", "valid/a.jsonl"), "validation", "valid"),
        (("gsm8k_train.jsonl", "gsm8k_test.jsonl"), None, "train"),
        (("test.jsonl", "test-2.jsonl"), None, "test"),
        (("contest.jsonl", "trainer.jsonl"), None, "t"),
        (("train/test_set.jsonl",), None, "train/test"),
    ],
)
def test_files_whose_names_tell_splits_are_read_by_split(
    tmp_path: Path, names: tuple[str, ...], split: str | None, chosen: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in data_files(tmp_path, split)]
    assert found == [name for name in sorted(names) if chosen in name]


def test_splits_without_train_must_be_named_and_are_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", test__jsonl="one", dev__jsonl="two")
    with pytest.raises(PromptError, match=r"set: has the splits validation, test; name one as .*set:validation"):
        read(folder)
    with pytest.raises(PromptError, match="has the splits"):
        read(f"{folder}:train")
    assert texts(read(f"{folder}:dev")) == ["two"]
    with pytest.raises(PromptError, match="of no split"):
        read(f"{write(tmp_path / 'plain', a__jsonl='one')}:train")


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = ({"prompt": ["one two"], "completion": ["a"]}, {"prompt": ["three"], "completion": ["b"]})
    table = datasets.Dataset.from_dict(train)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=datasets.Dataset.from_dict(test)).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "tables").mkdir()
    table.to_parquet(str(tmp_path / "tables" / "train-0.parquet"))
    table.to_parquet(str(tmp_path / "tables" / "train-1.parquet"))
    assert texts(read(tmp_path / "one")) == texts(read(tmp_path / "both")) == ["one twoa"]
    assert texts(read(f"{tmp_path / 'both'}:test")) == ["threeb"]
    assert texts(read(tmp_path / "tables")) == ["one twoa"] * 2
    with pytest.raises(PromptError, match="has the splits train, test"):
        read(f"{tmp_path / 'both'}:nope")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(PromptError, match="a saved data set that cannot be read"):
        read(tmp_path / "one")


def test_a_saved_data_set_without_the_library_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingLibraryError, match="a saved data set, which needs the library 'datasets'"):
        read(tmp_path)


# What is too large, too deep, too long


TEXT = "good morning to you all, what is two plus two? "


@pytest.mark.parametrize(
    ("row", "template", "options"),
    [
        ({"prompt": TEXT}, None, {}),
        ({"prompt": TEXT}, CHATML, {}),
        ({"prompt": "hello", "completion": TEXT}, CHATML, {}),
        ({"prompt": "hello", "completion": TEXT}, THINKING, {"max_length": 1000}),
    ],
)
def test_of_a_huge_row_the_head_is_what_counts(
    tmp_path: Path, row: dict[str, str], template: str | None, options: dict[str, Any]
) -> None:
    tokenizer = tiny_tokenizer(template)

    def repeated(times: int) -> PromptSet:
        return load(
            tmp_path, [{key: text * times if text is TEXT else text for key, text in row.items()}], tokenizer, **options
        )

    whole = repeated(400)  # not yet long enough to be cut before it is tokenised
    started = time.monotonic()
    huge = repeated(200_000)
    assert time.monotonic() - started < 10  # half a minute and more where all of it is tokenised
    assert (huge.samples, huge.report.truncated) == (whole.samples, 1)


def test_a_huge_row_of_few_tokens_is_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["x" * 3000])
    found = load(tmp_path, [{"prompt": "x" * 30_000}], tokenizer, max_length=12)
    assert found.samples[0].ids == tuple(tokenizer("x" * 30_000).input_ids)
    assert (len(found.samples[0].ids), found.report.truncated) == (11, 0)


def test_an_answer_behind_a_huge_prompt_is_cut_off_and_not_lost_for_another_reason(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="1 cut off before the first loss token"):
        load(tmp_path, [{"prompt": TEXT * 10_000, "completion": "Four."}])


def test_a_thought_of_ten_million_characters_is_realigned_in_time(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>\n@\n</think>\n\nYes."}] * 2
    short, long = (
        json.loads(json.dumps({"messages": turns}).replace("@", thought)) for thought in ("hm", TEXT * 200_000)
    )
    long["messages"][-1] = short["messages"][-1]
    tokenizer = tiny_tokenizer(THINKING)
    started = time.monotonic()
    found = load(tmp_path, [long], tokenizer, loss="assistant")
    assert time.monotonic() - started < 10
    assert found.samples == load(tmp_path, [short], tokenizer, loss="assistant").samples


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.txt.gz"])
def test_a_line_without_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("fisherkit.prompts.sources.LONGEST_LINE", 1000)
    content = b"prompt\n" + b"x" * 2000
    with pytest.raises(PromptError, match="line 2: is longer than"):
        load_text(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)


def test_a_line_is_as_long_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list(parsers.decoded_lines(io.BytesIO(b"x" * 9 + b"\n" + b"y" * 10), "name", 10))
    assert lines == ["x" * 9 + "\n", "y" * 10]
    with pytest.raises(PromptError, match="name line 1: is longer"):
        list(parsers.decoded_lines(io.BytesIO(b"x" * 11), "name", 10))
    monkeypatch.setattr(parsers, "LARGEST_JSON", 3)
    with pytest.raises(PromptError, match="as one JSON value"):
        list(parsers.parse_json(iter(["[\n", "]\n"]), "name"))


DEEP = "[" * 500 + "]" * 500
DEEPER = "[" * 100_000 + "]" * 100_000
LONG = "x" * 100_000
HOSTILE = {
    "deep row": DEEP,
    "deeper row": DEEPER,
    "deep field": f'{{"prompt": {DEEP}}}',
    "deeper field": f'{{"prompt": {DEEPER}}}',
    "deep content": f'{{"messages": [{{"role": "user", "content": {DEEP}}}]}}',
    "deep tools": f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": [{{"a": {DEEP}}}]}}',
    "deep tools as text": json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": DEEPER}),
    "huge number": f'{{"prompt": {10**4000}}}',
    "huger number": f'{{"prompt": 1{"0" * 5000}}}',
    "infinite": '{"prompt": 1e999}',
    "column name": json.dumps({LONG: 1}),
    "columns": json.dumps({f"column {n}": 1 for n in range(10_000)}),
    "role": json.dumps({"messages": [{"role": LONG}, {LONG: 1}]}),
    "part": json.dumps({"messages": [{"role": "user", "content": [{"type": LONG}]}]}),
    "half a pair": '{"prompt": "a \\ud83d"}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("template", [None, CHATML])
def test_hostile_json_is_one_short_line(tmp_path: Path, name: str, template: str | None) -> None:
    for suffix in ("jsonl", "json"):
        content = HOSTILE[name] if suffix == "jsonl" else f"[{HOSTILE[name]}]"
        with pytest.raises(PromptError) as caught:
            load_text(tmp_path, f"a.{suffix}", content, tiny_tokenizer(template))
        assert len(str(caught.value)) <= 300
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["x" * 5000, "x/" * 3000 + "a.jsonl", "a\0b", "[" * 100, "~/no", ""])
def test_odd_names_are_one_short_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError) as caught:
        read(source)
    assert len(str(caught.value)) <= 300


def test_a_limit_beyond_64_bits_is_no_limit(tmp_path: Path) -> None:
    assert load(tmp_path, [QA, QA], limit=10**30, max_length=10**30).report.samples == 2


def test_names_of_sources_are_short_and_ranges_are_exact() -> None:
    assert source_name(["a", Path("b")]) == "a and 1 more"
    assert [source_name(Path("a")), source_name(["a"]), source_name([])] == ["a", "a", "nothing"]
    assert [ranges([3]), ranges([0, 1, 2, 5, 7, 8])] == ["3", "0-2,5,7-8"]
