"""Ways to damage a file, drawn by hypothesis: bytes, JSON values, safetensors headers, members of a zip."""

import copy
import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Damage = Callable[[bytes], bytes]

DEEP = "@nested lists@"  # stands for what json.dumps cannot write: lists in lists, 3,000 deep
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**62, 2**64, -(2**70), 10**400, 0.0, -0.0, 0.5, 1e308, math.nan, math.inf,
    "", "x", "../../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "\x1b[31mred",
    "a" * 5000, "(a+)+$", ".*", "[", "BF16",
    [], {}, [0], [-1], [2**62, 0], [[]], {"a": 1}, ["x"], DEEP,
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A damage and a description of it, for the report of a failure."""

    text: str
    apply: Damage


def encode(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(value).encode().replace(f'"{DEEP}"'.encode(), b"[" * 3000 + b"]" * 3000)


# Bytes


def byte_changes() -> SearchStrategy[Change]:
    """Cut, extend, flip, overwrite, zero, double; places as a share of the file's length."""
    share = st.floats(0, 1)
    return st.one_of(
        share.map(lambda at: Change(f"cut at {at:.3f}", lambda data: data[: int(at * len(data))])),
        st.binary(max_size=64).map(lambda more: Change(f"append {more!r}", lambda data: data + more)),
        st.tuples(share, st.integers(0, 7)).map(
            lambda where: Change(f"flip {where}", lambda data: _flip(data, *where))
        ),
        st.tuples(share, st.binary(min_size=1, max_size=16)).map(
            lambda where: Change(f"overwrite {where}", lambda data: _overwrite(data, *where))
        ),
        st.tuples(share, share).map(lambda ends: Change(f"zero {ends}", lambda data: _zero(data, *ends))),
        st.just(Change("empty", lambda data: b"")),
        st.just(Change("twice", lambda data: data + data)),
        st.integers(0, 2**64 - 1).map(lambda n: Change(f"length {n}", lambda data: n.to_bytes(8, "little") + data[8:])),
    )


def _flip(data: bytes, at: float, bit: int) -> bytes:
    place = min(int(at * len(data)), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :] if data else data


def _overwrite(data: bytes, at: float, new: bytes) -> bytes:
    place = int(at * max(len(data) - len(new), 0))
    return data[:place] + new + data[place + len(new) :]


def _zero(data: bytes, start: float, stop: float) -> bytes:
    low, high = sorted((int(start * len(data)), int(stop * len(data))))
    return data[:low] + bytes(high - low) + data[high:]


# JSON


def json_changes() -> SearchStrategy[Change]:
    """Replace, drop, rename or add a value at any depth."""
    steps = st.lists(st.floats(0, 1), min_size=1, max_size=5)
    odd = st.sampled_from(range(len(ODD_VALUES)))
    return st.one_of(
        st.tuples(steps, odd).map(lambda d: _json(f"put {_short(d[1])} at {d[0]}", lambda v: _put(v, d[0], d[1]))),
        steps.map(lambda at: _json(f"drop {at}", lambda value: _drop(value, at))),
        steps.map(lambda at: _json(f"rename {at}", lambda value: _rename(value, at))),
        odd.map(lambda which: _json(f"all {_short(which)}", lambda value: ODD_VALUES[which])),
        st.tuples(st.text(max_size=8), odd).map(
            lambda d: _json(f"add {d[0]!r}", lambda v: {**v, d[0]: ODD_VALUES[d[1]]} if isinstance(v, dict) else v)
        ),
    )


def _short(which: int) -> str:
    return repr(ODD_VALUES[which])[:40]


def _json(text: str, change: Callable[[Any], Any]) -> Change:
    return Change(text, lambda data: encode_value(change, data))


def encode_value(change: Callable[[Any], Any], data: bytes) -> bytes:
    """Apply a change to what the bytes say; bytes that say nothing stay."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return encode(change(value))


def _walk(value: Any, steps: list[float]) -> tuple[Any, Any]:
    """The container and the key that the steps lead to, each step a share of the container's length."""
    holder, key = None, None
    for step in steps:
        if not isinstance(value, dict | list) or not value:
            break
        keys = list(value) if isinstance(value, dict) else range(len(value))
        holder, key = value, keys[min(int(step * len(keys)), len(keys) - 1)]
        value = value[key]
    return holder, key


def _put(value: Any, steps: list[float], which: int) -> Any:
    value = copy.deepcopy(value)
    holder, key = _walk(value, steps)
    if holder is None:
        return ODD_VALUES[which]
    holder[key] = ODD_VALUES[which]
    return value


def _drop(value: Any, steps: list[float]) -> Any:
    value = copy.deepcopy(value)
    holder, key = _walk(value, steps)
    if holder is not None:
        del holder[key]
    return value


def _rename(value: Any, steps: list[float]) -> Any:
    value = copy.deepcopy(value)
    holder, key = _walk(value, steps)
    if isinstance(holder, dict):
        holder[f"{key}~"] = holder.pop(key)
    return value


# Headers of safetensors files


def header_changes() -> SearchStrategy[Change]:
    """A change of the JSON that a safetensors file begins with; the length before it is made to fit."""
    return json_changes().map(lambda change: Change(f"header: {change.text}", lambda data: _new_header(data, change)))


def _new_header(data: bytes, change: Change) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = change.apply(data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


# Zip archives, as torch.save writes them


def zip_changes() -> SearchStrategy[Change]:
    """Compress, drop, rename, shorten, swap or replace a member."""
    share = st.floats(0, 1)
    return st.one_of(
        st.just(
            Change("compress all", lambda data: _rezip(data, lambda name, body: (name, body), zipfile.ZIP_DEFLATED))
        ),
        share.map(lambda at: Change(f"drop member {at}", lambda data: _member(data, at, lambda name, body: None))),
        share.map(
            lambda at: Change(f"rename member {at}", lambda d: _member(d, at, lambda name, body: (name + "~", body)))
        ),
        share.map(lambda at: Change(f"half member {at}", lambda d: _member(d, at, lambda n, b: (n, b[: len(b) // 2])))),
        st.tuples(share, byte_changes()).map(
            lambda d: Change(
                f"member {d[0]}: {d[1].text}", lambda data: _member(data, d[0], lambda n, b: (n, d[1].apply(b)))
            )
        ),
        st.just(Change("code in the pickle", lambda data: _rezip(data, _evil))),
    )


def _evil(name: str, body: bytes) -> tuple[str, bytes]:
    run = b"\x80\x02cposix\nsystem\nq\x00X\x10\x00\x00\x00touch code-ran.xyzq\x01\x85q\x02Rq\x03."
    return name, run if name.endswith("data.pkl") else body


def _member(data: bytes, at: float, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> bytes:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError):
        return data
    chosen = names[min(int(at * len(names)), len(names) - 1)]
    return _rezip(data, lambda name, body: change(name, body) if name == chosen else (name, body))


def _rezip(
    data: bytes, change: Callable[[str, bytes], tuple[str, bytes] | None], compression: int = zipfile.ZIP_STORED
) -> bytes:
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w", compression) as target:
            for name in source.namelist():
                changed = change(name, source.read(name))
                if changed is not None:
                    target.writestr(*changed)
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, NotImplementedError, OSError):
        return data
    return made.getvalue()


# Lines of text


def line_changes() -> SearchStrategy[Change]:
    """A change of one row of a JSONL file, or of its bytes."""
    return st.tuples(st.floats(0, 1), json_changes()).map(
        lambda d: Change(f"row {d[0]}: {d[1].text}", lambda data: _change_row(data, *d))
    )


def _change_row(data: bytes, at: float, change: Change) -> bytes:
    rows = data.split(b"\n")
    place = min(int(at * len(rows)), len(rows) - 1)
    rows[place] = change.apply(rows[place])
    return b"\n".join(rows)


def changes_for(path: str) -> SearchStrategy[Change]:
    """Damages that suit a file by its name."""
    suffix = Path(path).suffix
    if suffix == ".json":
        return st.one_of(json_changes(), json_changes(), byte_changes())
    if suffix == ".safetensors":
        return st.one_of(header_changes(), header_changes(), byte_changes())
    if suffix == ".pt":
        return st.one_of(zip_changes(), byte_changes())
    if suffix == ".jsonl":
        return st.one_of(line_changes(), line_changes(), byte_changes())
    return byte_changes()
