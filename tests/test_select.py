"""Selection and scores: exact counts, ties by index, and agreement with a full sort."""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest

from fisherkit.floats import narrow, widen
from fisherkit.kernels.prune import copy_flagged, keep_block, keep_top_candidates
from fisherkit.kernels.prune_scores import BLOCK, LOWEST, Scratch, drawing, exclude_ineligible, score
from fisherkit.kernels.rescale import FACTORS
from fisherkit.kernels.tensor_pair import TensorPair, magnitude_sum
from fisherkit.kernels.top_k import (
    EVERYTHING,
    HistogramSelect,
    ThresholdRange,
    exact_thresholds,
    from_key,
    keys,
    quota,
    threshold_range,
    top_k_mask,
)


def best(scores: np.ndarray, wanted: int) -> np.ndarray:
    """Flags of the highest scores, ties by index, -inf and NaN never: a stable sort, and nothing clever."""
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores).astype(np.float64), kind="stable")
    flags = np.zeros(scores.size, bool)
    flags[order[:wanted]] = True
    return flags & (scores > -np.inf)


def fapm_scores(w: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The definition, entry by entry, in the paper's two terms and in float64; w and f are float32."""
    w, f = w.astype(np.float64), f.astype(np.float64)
    mean, scores = np.abs(w).mean(), np.full(w.size, -np.inf)
    for i in range(w.size):
        if w[i] != 0 and f[i] != w[i]:
            d = abs(f[i] - w[i])
            scores[i] = d - mean * d / abs(w[i])
    return scores


def run_fapm(w: np.ndarray, f: np.ndarray, code: str, kept: int, guess: ThresholdRange) -> tuple[np.ndarray, int]:
    """One tensor through the kernels; the base's side afterwards, and how many were kept."""
    out = w.copy()
    mean = magnitude_sum(out, code, Scratch(max(out.size, 1)))[0] / out.size
    pair = TensorPair(out, code, f, code, "fapm", mean)
    block = keep_block(pair, guess, Scratch(out.size))
    late = keep_top_candidates(pair, [block], [0], kept - block.counts.kept)
    return out, block.counts.kept + late.count


@pytest.mark.parametrize(
    ("share", "count", "kept"),
    [
        ("0.1", 1000, 100),
        ("0.1", 9, 0),
        ("0.1", 10, 1),
        ("1", 7, 7),
        ("0", 7, 0),
        ("0.3", 10, 3),
        ("0.0001", 10_000, 1),
    ],
)
def test_quota_is_what_a_person_means(share: str, count: int, kept: int) -> None:
    assert quota(Fraction(share), count) == kept


def test_one_minus_nine_tenths_of_a_thousand_is_a_hundred() -> None:
    assert int(1000 * (1 - 0.9)) == 99  # what a script gets
    assert quota(1 - Fraction(repr(0.9)), 1000) == 100


@pytest.mark.parametrize("count", [1, 2, 1000, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "all equal", "with -inf"])
def test_top_k_is_a_stable_sort(count: int, kind: str) -> None:
    random = np.random.default_rng(count)
    scores = random.standard_normal(count).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores, 1)
    if kind == "all equal":
        scores[:] = 0.5
    for wanted in {0, 1, count // 3, count - 1, count}:
        assert (top_k_mask(scores, wanted) == best(scores, wanted)).all()


def test_keys_are_in_the_order_of_the_scores_and_come_back() -> None:
    scores = np.array([-np.inf, LOWEST, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 0.5, 1.0, np.inf], np.float32)
    numbers = keys(scores)
    assert (np.diff(numbers) >= 0).all()
    assert numbers[4] == numbers[5]
    assert [from_key(int(number)) for number in numbers] == list(np.where(scores == 0, 0.0, scores).astype(np.float32))


@pytest.mark.parametrize("start", ["everything", "good", "too high", "too low"])
@pytest.mark.parametrize("kind", ["normal", "ties", "all equal", "negative", "few"])
@pytest.mark.parametrize("wanted", [1, 10, 4000, 9999, 10_000])
def test_histograms_find_the_exact_threshold_whatever_they_start_from(start: str, kind: str, wanted: int) -> None:
    random = np.random.default_rng(7)
    scores = random.standard_normal(10_000).astype(np.float32)
    scores = {
        "normal": scores,
        "ties": np.round(scores, 1),
        "all equal": np.full_like(scores, 0.25),
        "negative": -np.abs(scores),
        "few": np.where(np.arange(10_000) < 50, scores, -np.inf).astype(np.float32),
    }[kind]
    ordered = np.sort(scores[np.isfinite(scores)])[::-1]
    at = ordered[min(wanted, ordered.size) - 1]
    guess = {
        "everything": EVERYTHING,
        "good": ThresholdRange(np.float32(at - 0.01), np.float32(at + 0.01)),
        "too high": ThresholdRange(np.float32(at + 0.5), np.float32(at + 1)),
        "too low": ThresholdRange(np.float32(at - 1), np.float32(at - 0.5)),
    }[start]
    passes = 0

    def visit(pending: Mapping[str, HistogramSelect]) -> None:
        nonlocal passes
        passes += 1
        assert passes < 8
        for block in np.array_split(scores, 7):
            pending["all"].show(block)

    threshold = exact_thresholds({"all": HistogramSelect(guess, wanted)}, visit)["all"]
    kept = scores > threshold.at
    kept[np.flatnonzero(scores == threshold.at)[: threshold.ties]] = True
    assert (kept == best(scores, wanted)).all()


def test_a_threshold_range_holds_the_threshold_and_little_else() -> None:
    random = np.random.default_rng(0)
    scores = random.standard_normal(1_000_000).astype(np.float32)
    for kept in (100, 100_000, 500_000, 999_900):
        found = threshold_range(scores[::16], kept, scores.size)
        at = np.sort(scores)[::-1][kept - 1]
        assert found.low <= at <= found.high
        assert np.count_nonzero((scores >= found.low) & (scores <= found.high)) < 40_000


def test_the_threshold_range_of_a_small_tensor_is_everything() -> None:
    assert threshold_range(np.zeros(1000, np.float32), 10, 2000) == EVERYTHING


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("density", ["0", "0.001", "0.1", "0.5", "0.9", "1"])
def test_kept_entries_are_those_of_the_definition(code: str, density: str) -> None:
    random = np.random.default_rng(3)
    w = random.standard_normal(5000).astype(np.float32) * np.float32(0.02)
    f = w + random.standard_normal(5000).astype(np.float32) * np.float32(1e-3)
    w[::50], f[::50] = 0, np.where(np.arange(100) % 2, 0, 0.5)  # zero weights, changed and not
    f[1::40] = w[1::40]  # entries that did not change
    stored_w, stored_f = narrow(w, code), narrow(f, code)
    scores = fapm_scores(widen(stored_w, code), widen(stored_f, code))
    kept = quota(Fraction(density), 5000)
    out, count = run_fapm(stored_w, stored_f, code, kept, EVERYTHING)
    chosen = best(scores, kept)
    assert count == chosen.sum() == min(kept, np.isfinite(scores).sum())
    # float32 may order two scores differently that float64 tells apart in the 7th digit: compare what was kept by score
    taken = out.view(np.uint8).reshape(5000, -1) != stored_w.view(np.uint8).reshape(5000, -1)
    taken = taken.any(axis=1)
    assert (out[~taken] == stored_w[~taken]).all()
    assert (out[taken] == stored_f[taken]).all()
    if kept:
        floor = scores[chosen].min() if chosen.any() else 0
        assert (scores[taken] >= floor - 1e-5 * abs(floor)).all()
        assert (taken == chosen).mean() > 0.999


def test_a_threshold_range_gives_what_a_full_sort_gives() -> None:
    random = np.random.default_rng(4)
    w = narrow(random.standard_normal(100_000).astype(np.float32), "BF16")  # bf16: thousands of ties
    f = narrow(widen(w, "BF16") + np.float32(0.01) * random.standard_normal(100_000).astype(np.float32), "BF16")
    whole, count = run_fapm(w, f, "BF16", 10_000, EVERYTHING)
    mean = magnitude_sum(w, "BF16", Scratch(w.size))[0] / w.size
    a, b = np.abs(widen(w, "BF16")), np.abs(widen(f, "BF16") - widen(w, "BF16"))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (np.float32(1) - np.float32(mean) / a) * b
    scores[(a == 0) | (b == 0)] = -np.inf
    expected = np.where(best(scores, 10_000), f, w)
    assert count == 10_000
    assert (whole == expected).all()
    guess = threshold_range(scores[::16], 10_000, scores.size)
    assert guess != EVERYTHING
    assert (run_fapm(w, f, "BF16", 10_000, guess)[0] == expected).all()


def test_zero_deltas_and_zero_weights_are_never_kept_even_when_all_may_be() -> None:
    w = np.array([0, 0, 1, 1, 1e-40, -2], np.float32)
    f = np.array([0, 5, 1, 2, 1e-3, -3], np.float32)
    out, count = run_fapm(w, f, "F32", 6, EVERYTHING)
    assert count == 3
    assert (out == np.array([0, 0, 1, 2, 1e-3, -3], np.float32)).all()


def test_not_finite_entries_stay_the_bases_and_are_counted() -> None:
    w = np.array([1, 2, np.nan, 4, np.inf, 6], np.float32)
    f = np.array([1.5, np.nan, 3, np.inf, np.inf, 6.5], np.float32)
    out = w.copy()
    counts = keep_block(
        TensorPair(out, "F32", f, "F32", "magnitude", 1.0), ThresholdRange(np.float32(0.1), np.float32(0.2)), Scratch(6)
    ).counts
    assert (counts.kept, counts.nonfinite, counts.zero_deltas) == (2, 4, 0)
    assert np.array_equal(out, np.array([1.5, 2, np.nan, 4, np.inf, 6.5], np.float32), equal_nan=True)
    assert counts.energy == 0.5


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 4097, 100_001])
def test_the_mean_is_that_of_float64(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    total, bad = magnitude_sum(values, "F32", Scratch(max(size, 1)))
    assert bad == 0
    assert total == pytest.approx(np.abs(values.astype(np.float64)).sum(), rel=1e-6)


def test_the_mean_leaves_out_what_is_not_finite() -> None:
    values = np.array([1, -2, np.nan, np.inf, 3], np.float32)
    assert magnitude_sum(values, "F32", Scratch(5)) == (6.0, 2)


@pytest.mark.parametrize("metric", ["relative", "magnitude", "random"])
def test_controls_score_as_they_say(metric: str) -> None:
    w = np.array([1, 2, 0, 4, 5], np.float32)
    d = np.array([0.5, 0, 1, 2, 0.25], np.float32)
    out = np.empty(5, np.float32)
    score(metric, w, d, 99.0, out, drawing(0, 1, 2))
    exclude_ineligible(metric, w, d, out)
    if metric == "relative":
        assert list(out) == [-0.5, -np.inf, -np.inf, -0.5, np.float32(-0.05)]
    if metric == "magnitude":
        assert list(out) == [0.5, -np.inf, 1, 2, 0.25]
    if metric == "random":
        assert out[1] == -np.inf
        assert ((out >= 0) & (out < 1)).sum() == 4


def test_random_numbers_depend_on_seed_stream_and_block_alone() -> None:
    def draw(*key: int) -> list[float]:
        out = np.empty(4, np.float32)
        drawing(*key)(out)
        return list(out)

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, -1)]}) == 5


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_thinning_keeps_the_mean_of_the_delta(density: float) -> None:
    d = np.abs(np.random.default_rng(5).standard_normal(200_000)).astype(np.float32)
    for metric, make in FACTORS.items():
        factors = make(d, density, 1000, drawing(3, 4, 5))
        if density == 0:
            assert not factors.any()
            continue
        expected = density if metric == "wise-ft" else 1.0
        assert factors.mean() == pytest.approx(expected, abs=0.03)
        if metric != "wise-ft":
            assert np.count_nonzero(factors) == pytest.approx(density * d.size, rel=0.02)


def test_della_keeps_large_deltas_of_a_row_more_often() -> None:
    d = np.tile(np.arange(1, 101, dtype=np.float32), 2000)
    factors = FACTORS["della"](d, 0.5, 100, drawing(0, 0, 0)).reshape(-1, 100)
    kept = (factors != 0).mean(axis=0)
    expected = 0.5 - 0.15 + 0.3 * (np.arange(100) + 0.5) / 100
    assert np.abs(kept - expected).max() < 0.05
    assert np.allclose(factors[factors != 0], np.broadcast_to(1 / expected, factors.shape)[factors != 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("BF16", "BF16"), ("F32", "F32"), ("F64", "F64"), ("BF16", "F32"), ("F32", "BF16")]
)
def test_a_copy_has_the_bits_of_one_side(ours: str, theirs: str) -> None:
    random = np.random.default_rng(6)
    w = narrow(random.standard_normal(1000).astype(np.float32), ours)
    values = random.standard_normal(1000).astype(np.float32)
    f, flags, out = narrow(values, theirs), random.random(1000) < 0.3, w.copy()
    copy_flagged(TensorPair(out, ours, f, theirs), flags, Scratch(1000))
    assert (out == np.where(flags, narrow(widen(f, theirs), ours), w)).all()


def test_blocks_are_what_random_numbers_are_drawn_by() -> None:
    assert BLOCK == 1 << 18, "another size draws other random masks: say so in the changelog"
