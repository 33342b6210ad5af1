"""Compiled loops against numpy's: the same bits, the same counts, whatever the entries are."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pairs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherkit
from fisherkit.floats import STORED, narrow, widen
from fisherkit.kernels import compiled
from fisherkit.kernels.llvm_loops import LANES, METRICS
from fisherkit.kernels.prune import BlockResult, keep_block
from fisherkit.kernels.prune_scores import BLOCK, Scratch
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair, magnitude_sum
from fisherkit.kernels.top_k import EVERYTHING, NOTHING, ThresholdRange
from fisherkit.options import FapmOptions, MergeOptions
from fisherkit.pairs.blend import Treatment, blend
from fisherkit.pairs.parallel import BlockPool

pytest.importorskip("llvmlite")

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.0, -1.0, 0.02, 65504.0, 3e38, -3e38, np.inf, -np.inf, np.nan]
RANGES = {
    "usual": ThresholdRange(np.float32(1e-3), np.float32(2e-3)),
    "below zero": ThresholdRange(np.float32(-1e-2), np.float32(-1e-4)),
    "around zero": ThresholdRange(np.float32(-1e-3), np.float32(1e-3)),
    "zero": ThresholdRange(np.float32(0), np.float32(0)),
    "everything": EVERYTHING,
    "nothing": NOTHING,
}


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    compiled._is_on.clear()
    yield
    compiled._is_on.clear()


def entries(size: int, seed: int, code: str, *, special: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Stored entries of both sides: weights and small steps, some of them the numbers that are easily got wrong."""
    random = np.random.default_rng(seed)
    w = random.standard_normal(size, dtype=np.float32) * np.float32(0.02)
    f = w + random.standard_normal(size, dtype=np.float32) * np.float32(5e-3)
    for side in (w, f):
        at = random.random(size) < special
        side[at] = random.choice(np.array(SPECIAL, np.float32), int(at.sum()))
    same = random.random(size) < 0.1
    f[same] = w[same]
    return narrow(w, code), narrow(f, code)


def bits(stored: np.ndarray) -> bytes:
    return stored.tobytes()


def kept_by(switch: bool, pair: TensorPair, guess: ThresholdRange, write: bool) -> tuple[bytes, BlockResult]:
    (compiled._is_on.set if switch else compiled._is_on.clear)()
    own = TensorPair(pair.base.copy(), pair.base_code, pair.tuned, pair.tuned_code, pair.metric, pair.mean)
    result = keep_block(own, guess, Scratch(max(pair.base.size, 1)), write=write)
    return bits(own.base), result


def assert_same_counts(one: DeltaCounts, other: DeltaCounts) -> None:
    assert one[:5] == other[:5]
    assert one[5:] == pytest.approx(other[5:], rel=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    code=st.sampled_from(compiled.CODES),
    metric=st.sampled_from(METRICS),
    guess=st.sampled_from(sorted(RANGES)),
    size=st.integers(0, 300),
    seed=st.integers(0, 1000),
    special=st.sampled_from([0.0, 0.1, 1.0]),
    write=st.booleans(),
    mean=st.sampled_from([0.0, 0.016, 1e30]),
)
def test_what_is_kept_does_not_depend_on_who_computes_it(
    code: str, metric: str, guess: str, size: int, seed: int, special: float, write: bool, mean: float
) -> None:
    base, tuned = entries(size, seed, code, special=special)
    pair = TensorPair(base, code, tuned, code, metric, mean)
    ours, theirs = (kept_by(switch, pair, RANGES[guess], write) for switch in (True, False))
    assert ours[0] == theirs[0]
    assert_same_counts(ours[1].counts, theirs[1].counts)
    assert np.array_equal(ours[1].candidates, theirs[1].candidates)
    assert bits(ours[1].scores) == bits(theirs[1].scores)
    assert bits(ours[1].deltas) == bits(theirs[1].deltas)


@pytest.mark.parametrize("code", compiled.CODES)
def test_a_whole_block_is_kept_the_same(code: str) -> None:
    base, tuned = entries(BLOCK, 3, code, special=0.0)
    mean = float(np.abs(widen(base, code)).mean())
    pair = TensorPair(base, code, tuned, code, "fapm", mean)
    ours, theirs = (kept_by(switch, pair, RANGES["usual"], True) for switch in (True, False))
    assert ours[0] == theirs[0]
    assert_same_counts(ours[1].counts, theirs[1].counts)
    assert ours[1].counts.kept > 1000
    assert ours[1].candidates.size > 1000
    assert np.array_equal(ours[1].candidates, theirs[1].candidates)


@pytest.mark.parametrize("code", compiled.CODES)
@pytest.mark.parametrize("size", [1, 255, 4097, 5000, 100_001])
@pytest.mark.parametrize("special", [0.0, 0.1])
def test_the_mean_has_the_same_bits(code: str, size: int, special: float) -> None:
    base, _ = entries(size, size, code, special=special)
    by_numpy = magnitude_sum(base, code, Scratch(size))
    compiled._is_on.set()
    assert magnitude_sum(base, code, Scratch(size)) == by_numpy


@settings(max_examples=150, deadline=None)
@given(
    code=st.sampled_from(["BF16", "F32", "F16"]),
    shape=st.sampled_from([(0,), (1,), (7,), (3, 5), (40, 17), (16, 8)]),
    seed=st.integers(0, 1000),
    special=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([1.0, 0.5, 0.3, 0.0, -1.0, 1e30]),
    masks=st.booleans(),
)
def test_what_is_blended_does_not_depend_on_who_computes_it(
    code: str, shape: tuple[int, ...], seed: int, special: float, scale: float, masks: bool
) -> None:
    base, tuned = entries(int(np.prod(shape)), seed, code, special=special)
    mask = np.random.default_rng(seed).random(shape) < 0.5 if masks else None
    found = []
    for switch in (True, False):
        (compiled._is_on.set if switch else compiled._is_on.clear)()
        pair = TensorPair(base.copy(), code, tuned, code)
        with BlockPool(1) as pool, np.errstate(over="ignore", invalid="ignore"):
            counts = blend(pair, shape, Treatment(mask=mask, scale=scale), pool)
        found.append((bits(pair.base), counts))
    assert found[0][0] == found[1][0]
    assert_same_counts(found[0][1], found[1][1])


@pytest.mark.parametrize("types", [("BF16", "F32"), ("F64", "F64"), ("F32", "BF16")])
def test_what_no_loop_is_for_is_left_to_numpy(types: tuple[str, str]) -> None:
    base, _ = entries(1000, 1, types[0], special=0.0)
    _, tuned = entries(1000, 1, types[1], special=0.0)
    pair = TensorPair(base, types[0], tuned, types[1], "fapm", 0.016)
    ours, theirs = (kept_by(switch, pair, RANGES["usual"], True) for switch in (True, False))
    assert ours[0] == theirs[0]
    assert ours[1].counts == theirs[1].counts


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("metric", ["fapm", "relative", "magnitude"])
def test_checkpoints_are_the_same_with_and_without(
    metric: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pairs.make(tmp_path)
    options = FapmOptions(metric=metric, scope=scope, sparsity=0.7)  # type: ignore[arg-type]
    fisherkit.fapm(base, tuned, tmp_path / "plain", options)
    assert not compiled._is_on.is_set()
    monkeypatch.setattr(compiled, "WORTH_IT", 0)
    fisherkit.fapm(base, tuned, tmp_path / "fast", options)
    assert compiled._is_on.is_set()
    assert pairs.same_checkpoint(tmp_path / "plain", tmp_path / "fast")


def test_merges_are_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pairs.make(tmp_path)
    fisherkit.merge(base, tuned, tmp_path / "plain", MergeOptions(alpha=0.3))
    monkeypatch.setattr(compiled, "WORTH_IT", 0)
    fisherkit.merge(base, tuned, tmp_path / "fast", MergeOptions(alpha=0.3))
    assert pairs.same_checkpoint(tmp_path / "plain", tmp_path / "fast")


def test_loops_are_compiled_where_they_can_be() -> None:
    """Or every test above compares numpy with itself."""
    compiled._is_on.set()
    for code in compiled.CODES:
        assert compiled.row_sums(np.zeros(256, STORED[code]), code) is not None
        assert all(compiled.keep_loop(code, metric) is not None for metric in METRICS)
    for code in ("BF16", "F32"):
        assert compiled.blend_loop(code, masks=True, scales=True) is not None
    assert LANES == 8, "numpy's sums have eight lanes"


def test_without_llvmlite_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compiled.switch_on(compiled.WORTH_IT)
    assert compiled.keep_loop("BF16", "fapm") is None
    assert compiled.row_sums(np.zeros(512, np.float32), "F32") is None


def test_what_llvm_refuses_is_left_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.llvm_loops, "row_sums", lambda code: "not its language")
    compiled._compile.cache_clear()
    compiled._is_on.set()
    try:
        assert compiled.row_sums(np.zeros(512, np.float32), "F32") is None
        assert magnitude_sum(np.ones(5000, np.float32), "F32", Scratch(5000)) == (5000.0, 0)
    finally:
        compiled._compile.cache_clear()


def test_small_work_is_not_worth_it() -> None:
    compiled.switch_on(compiled.WORTH_IT - 1)
    assert compiled.keep_loop("BF16", "fapm") is None


@pytest.mark.parametrize("size", [0, 5, (1 << 18) + 3, (1 << 21) + 5])
def test_numbers_are_counted_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(size).integers(0, 1 << 16, size, np.uint16) >> np.uint16(size % 2)
    expected = np.bincount(numbers, minlength=1 << 16)
    assert np.array_equal(compiled.count_16_bits(numbers), expected)
    compiled._is_on.set()
    monkeypatch.setattr(compiled, "_MOST_COUNTED", 1 << 20)  # several times
    assert np.array_equal(compiled.count_16_bits(numbers), expected)
