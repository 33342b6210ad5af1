"""Depths: for several densities at once, what a stable sort of all scores keeps for each."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fisherkit.floats import STORED, narrow, widen
from fisherkit.kernels.nested import MOST
from fisherkit.kernels.prune_scores import BLOCK
from fisherkit.kernels.tensor_pair import TensorPair
from fisherkit.kernels.top_k import Threshold
from fisherkit.pairs import nested
from fisherkit.pairs.nested import depths_by_quota, depths_by_threshold, take_deeper
from fisherkit.pairs.parallel import BlockPool
from fisherkit.pairs.prune import Pruning

SHARES = (0.0, 1e-4, 0.1, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[BlockPool]:
    with BlockPool(2) as opened:
        yield opened


def pair_of(size: int, metric: str, code: str = "BF16", *, coarse: bool = False, seed: int = 0) -> TensorPair:
    """A tensor with zeros, unchanged entries and, where it is coarse, few different scores."""
    random = np.random.default_rng(seed)
    w = (random.standard_normal(size) * 0.02).astype(np.float32)
    d = (random.standard_normal(size) * 1e-3).astype(np.float32)
    if coarse:
        w, d = np.round(w * 64) / 64, np.round(d * 1000) / 256
    w[random.random(size) < 0.02] = 0
    d[random.random(size) < 0.1] = 0
    base, tuned = narrow(w.astype(np.float32), code), narrow((w + d).astype(np.float32), code)
    mean = float(np.abs(widen(base, code)).mean()) if size else 0.0
    return TensorPair(base, code, tuned, code, metric, mean)


def scores(pair: TensorPair) -> np.ndarray:
    """Scores as the definition has them, -inf where an entry has no claim."""
    w, f = np.abs(widen(pair.base, pair.base_code)), widen(pair.tuned, pair.tuned_code)
    with np.errstate(all="ignore"):
        d = np.abs(f - widen(pair.base, pair.base_code))
        found = {"fapm": d * (1 - np.float32(pair.mean) / w), "relative": -(d / w), "magnitude": d}[pair.metric]
    found[(d == 0) | ~np.isfinite(d) | ((w == 0) & (pair.metric != "magnitude"))] = -np.inf
    return found


def kept_of(pair: TensorPair, quota: int) -> np.ndarray:
    flags = np.zeros(pair.base.size, bool)
    found = scores(pair)
    flags[np.argsort(-found.astype(np.float64), kind="stable")[:quota]] = True
    return flags & (found > -np.inf)


@pytest.mark.parametrize("metric", ["fapm", "relative", "magnitude"])
@pytest.mark.parametrize("size", [0, 1, 7, 5000, 2 * BLOCK + 5])
@pytest.mark.parametrize("coarse", [False, True])
def test_every_selection_is_that_of_one_stable_sort(metric: str, size: int, coarse: bool, pool: BlockPool) -> None:
    pair = pair_of(size, metric, coarse=coarse)
    quotas = [int(share * size) for share in SHARES]
    depths, bad = depths_by_quota(pair, quotas, pool, seed=3, stream=1)
    wanted = np.zeros(size, int)
    for kept in quotas:
        wanted += kept_of(pair, kept)
    assert bad == 0
    assert np.array_equal(depths, wanted)


@pytest.mark.parametrize("metric", ["fapm", "random", "relative", "magnitude"])
@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_a_tensor_of_one_depth_is_what_pruning_alone_gives(metric: str, code: str, pool: BlockPool) -> None:
    size = BLOCK + 77
    quotas = sorted(int(share * size) for share in SHARES)
    for coarse in (False, True):
        depths, _ = depths_by_quota(pair_of(size, metric, code, coarse=coarse), quotas, pool, seed=3, stream=9)
        for at, kept in enumerate(quotas):
            one, other = (pair_of(size, metric, code, coarse=coarse) for _ in range(2))
            take_deeper(one, depths, len(quotas) - 1 - at, pool)
            alone, _ = Pruning(pool, 3).by_quota(
                other,
                kept,
                9,
                lambda: pair_of(size, metric, code, coarse=coarse),  # noqa: B023  called at once
            )
            assert one.base.tobytes() == alone.base.tobytes()
            assert one.base.dtype == STORED[code]


def test_a_misleading_sample_costs_a_pass_and_nothing_else(pool: BlockPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(BLOCK + 9, "magnitude")
    quotas = [100, 5000, 200_000]
    wanted, _ = depths_by_quota(pair, quotas, pool, seed=0, stream=0)
    passes = []
    monkeypatch.setattr(nested, "count_block", lambda *given: passes.append(1) or count_block(*given))
    for value in (-1.0, 0.0, 1e-3, 1e9):
        passes.clear()
        monkeypatch.setattr(nested, "sample_scores", lambda *_, v=value: np.full(50_000, v, np.float32))
        found, _ = depths_by_quota(pair, quotas, pool, seed=0, stream=0)
        assert np.array_equal(found, wanted)
        assert len(passes) == 4  # two blocks, twice


count_block = nested.count_block


def test_ties_of_a_threshold_go_to_the_first(pool: BlockPool) -> None:
    base = np.zeros(2 * BLOCK, np.float32)
    pair = TensorPair(base, "F32", np.ones_like(base), "F32", "magnitude", 0.0)
    thresholds = [Threshold(np.float32(1), ties) for ties in (0, 3, BLOCK + 1)]
    depths, _ = depths_by_threshold(pair, thresholds, pool, seed=0, stream=0)
    assert (depths[:3] == 2).all()
    assert (depths[3 : BLOCK + 1] == 1).all()
    assert not depths[BLOCK + 1 :].any()


@pytest.mark.parametrize("metric", ["fapm", "random"])
def test_what_is_not_finite_is_counted_and_never_kept(metric: str, pool: BlockPool) -> None:
    pair = pair_of(BLOCK + 100, metric)
    for place, value in ((3, np.nan), (BLOCK + 1, np.inf), (BLOCK + 7, -np.inf)):
        pair.tuned[place] = narrow(np.array([value], np.float32), "BF16")[0]
    depths, bad = depths_by_quota(pair, [pair.base.size] * 2, pool, seed=0, stream=0)
    assert bad == 3
    assert not depths[[3, BLOCK + 1, BLOCK + 7]].any()
    assert depths.max() == 2


def test_depths_count_as_many_selections_as_they_promise(pool: BlockPool) -> None:
    pair = pair_of(2000, "magnitude")
    depths, _ = depths_by_quota(pair, [1500] * MOST, pool, seed=0, stream=0)
    assert set(np.unique(depths)) == {0, MOST}
    assert int((depths == MOST).sum()) == 1500


def test_values_of_the_tuned_side_are_copied_bit_by_bit(pool: BlockPool) -> None:
    pair = pair_of(64, "magnitude")
    pair.tuned[:] = torch.full((64,), -0.0, dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    take_deeper(pair, np.arange(64, dtype=np.uint8), 31, pool)
    assert (pair.base[32:] == 0x8000).all()
