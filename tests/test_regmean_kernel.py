"""The solve of ``merge --regmean`` against least squares on the inputs themselves, in float64."""

from collections.abc import Sequence

import covariance_files
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fisherkit.errors import CheckpointError
from fisherkit.kernels import regmean
from fisherkit.kernels.moment import Moment
from fisherkit.kernels.regmean import Filter, best_factors, decompose, lower_inverse

Doubles = NDArray[np.float64]
MU = 1e-3
N, OUT = 24, 15


def drawn(tokens: int, size: int = N, seed: int = 0) -> Doubles:
    """Inputs whose energy falls off by channel and is mixed."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((size, size))
    return random.standard_normal((tokens, size)) * 0.8 ** np.arange(size) @ mixing


def delta(seed: int = 9, size: int = N) -> Doubles:
    return np.random.default_rng(seed).standard_normal((OUT, size))


def moment(rows: Doubles, rank: int | None = None) -> Moment:
    matrix = covariance_files.covariance(rows)
    if rank is None:
        return Moment(matrix)
    kept = covariance_files.factor(matrix, rank)
    return Moment(None, kept, max(0.0, float(np.trace(matrix) - np.square(kept).sum())) / len(matrix))


def solved(news: Sequence[tuple[float, Moment]], old: Moment | None, deltas: Sequence[Doubles], lam: float) -> Doubles:
    return decompose(news, old, MU).solve(deltas, lam).delta


def least_squares(
    news: Sequence[tuple[float, Doubles]], old: Doubles | None, deltas: Sequence[Doubles], lam: float
) -> Doubles:
    """Rows of inputs stacked: what each task's layer puts out is wanted of the new delta, and zero on old inputs."""
    rows, wanted = [], []
    for (weight, x), d in zip(news, deltas, strict=True):
        mu = MU * float(np.square(x).sum()) / len(x) / x.shape[1]
        for part in (x / np.sqrt(len(x)), np.sqrt(mu) * np.eye(x.shape[1])):
            rows.append(np.sqrt(weight) * part)
            wanted.append(rows[-1] @ d.T)
    if old is not None:
        rows.append(np.sqrt(lam / len(old)) * old)
        wanted.append(np.zeros((len(old), OUT)))
    stacked = [torch.from_numpy(np.concatenate(parts)) for parts in (rows, wanted)]
    return torch.linalg.lstsq(*stacked, driver="gelsd").solution.T.numpy()


def assert_close(found: Doubles, wanted: Doubles, tolerance: float = 1e-9) -> None:
    assert np.linalg.norm(found - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-12)


@pytest.mark.parametrize("lam", [0, 0.01, 1, 30])
@pytest.mark.parametrize("tokens", [5, N, 200])
def test_the_delta_is_that_of_least_squares_on_the_inputs(lam: float, tokens: int) -> None:
    new, old, d = drawn(tokens, seed=1), drawn(70, seed=2), delta()
    found = solved([(1.0, moment(new))], moment(old), [d], lam)
    assert_close(found, least_squares([(1.0, new)], old, [d], lam))


@pytest.mark.parametrize("old", [None, drawn(40, seed=5)])
def test_several_fine_tunes_are_least_squares_on_all_of_their_inputs(old: Doubles | None) -> None:
    news = [(1.0, drawn(90, seed=1)), (0.5, drawn(12, seed=2)), (2.0, drawn(40, seed=3))]
    deltas = [delta(seed) for seed in range(3)]
    moments = [(weight, moment(x)) for weight, x in news]
    found = solved(moments, moment(old) if old is not None else None, deltas, 0.7)
    assert_close(found, least_squares(news, old, deltas, 0.7))
    swapped = solved(moments[::-1], moment(old) if old is not None else None, deltas[::-1], 0.7)
    assert_close(swapped, found)


def test_without_old_ones_it_is_regmean_as_published() -> None:
    """W = (sum_k W_k C_k)(sum_k C_k)^-1 (arXiv 2212.09849), of whole weights instead of deltas."""
    xs, base = [drawn(90, seed=1), drawn(80, seed=2)], delta(7)
    deltas = [delta(3), delta(4)]
    grams = [x.T @ x / len(x) for x in xs]
    grams = [c + MU * np.trace(c) / N * np.eye(N) for c in grams]
    wanted = sum((base + d) @ c for d, c in zip(deltas, grams, strict=True)) @ np.linalg.inv(sum(grams))
    assert_close(base + solved([(1.0, moment(x)) for x in xs], None, deltas, 1.0), wanted)


def test_a_weight_of_zero_gives_the_fine_tune_and_a_large_one_the_base_where_old_inputs_lie() -> None:
    new, old, d = moment(drawn(200, seed=1)), drawn(10, seed=2), delta()
    assert_close(solved([(1.0, new)], moment(old), [d], 0), d)
    far = solved([(1.0, new)], moment(old), [d], 1e12)
    assert np.abs(far @ old.T).max() < 1e-6
    assert np.linalg.norm(far) > 0.1 * np.linalg.norm(d)  # 14 directions are free


@pytest.mark.parametrize("rank", [None, 6])
def test_the_order_of_the_inputs_does_not_matter(rank: int | None) -> None:
    new, old, d = drawn(200, seed=1), drawn(60, seed=2), delta()
    order = np.random.default_rng(3).permutation(N)
    plain = solved([(1.0, moment(new, rank))], moment(old, rank), [d], 1.0)
    turned = solved([(1.0, moment(new[:, order], rank))], moment(old[:, order], rank), [d[:, order]], 1.0)
    assert_close(turned, plain[:, order])


@pytest.mark.parametrize("ranks", [(3, 5), (11, 12), (12, 12), (24, 24), (24, None), (None, 5)])
def test_factors_are_solved_as_the_matrices_that_they_stand_for(ranks: tuple[int | None, int | None]) -> None:
    rows, d = (drawn(200, seed=1), drawn(60, seed=2)), delta()
    new, old = (moment(x, rank) for x, rank in zip(rows, ranks, strict=True))
    plain = [Moment(one.within(None)) for one in (new, old)]
    for lam in (0.0, 0.5, 20.0):
        found = decompose([(1.0, new)], old, MU).solve([d], lam)
        wanted = decompose([(1.0, plain[0])], plain[1], MU).solve([d], lam)
        assert_close(found.delta, wanted.delta)
    if ranks == (24, 24):
        assert_close(plain[0].full, covariance_files.covariance(rows[0]))  # type: ignore[arg-type]


def test_factors_of_several_fine_tunes() -> None:
    news = [(1.0, moment(drawn(200, seed=1), 4)), (3.0, moment(drawn(200, seed=2), 5))]
    old, deltas = moment(drawn(60, seed=3), 3), [delta(3), delta(4)]
    plain = [(weight, Moment(one.within(None))) for weight, one in news]
    assert decompose(news, old, MU).basis is not None
    assert_close(solved(news, old, deltas, 0.7), solved(plain, Moment(old.within(None)), deltas, 0.7))


@pytest.mark.parametrize("rank", [None, 5])
def test_energies_are_those_of_the_delta_on_the_inputs(rank: int | None) -> None:
    new, old, d = moment(drawn(200, seed=1), rank), moment(drawn(60, seed=2), rank), delta()
    solver = decompose([(1.0, new)], old, MU)
    found, gains = solver.solve([d], 2.0), solver.gains(2.0)
    g = new.within(None) + solver.damping[0] * np.eye(N)
    c = old.within(None)
    for metric, ratio in ((g, np.ones_like(gains)), (c, solver.spectrum)):
        assert np.trace(d @ metric @ d.T) == pytest.approx(float(ratio @ found.energies), rel=1e-8)
        left = float((ratio * gains**2) @ found.energies)
        assert np.trace(found.delta @ metric @ found.delta.T) == pytest.approx(left, rel=1e-8)


@pytest.mark.parametrize("rank", [None, 4])
def test_dead_channels_and_inputs_that_are_zero_give_no_nan(rank: int | None) -> None:
    dead, d = drawn(50, seed=1), delta()
    dead[:, ::2] = 0
    nothing = np.zeros((3, N))
    for new, old in ((dead, dead), (dead, nothing), (nothing, dead), (nothing, nothing)):
        found = solved([(1.0, moment(new, rank))], moment(old, rank), [d], 1.0)
        assert np.isfinite(found).all()
        if not old.any():
            assert_close(found, d)
    assert np.abs(solved([(1.0, moment(dead, rank))], moment(dead, rank), [d], 1.0)).max() <= np.abs(d).max() * 5


def test_a_covariance_that_rounding_left_indefinite_is_damped_more() -> None:
    new = moment(drawn(5, seed=1))
    assert new.full is not None
    rough = Moment(new.full - 3 * MU * new.mean * np.eye(N))
    solver = decompose([(1.0, rough)], moment(drawn(60, seed=2)), MU)
    assert solver.damping[0] == pytest.approx(10 * MU * rough.mean)
    assert np.isfinite(solver.solve([delta()], 1.0).delta).all()
    with pytest.raises(CheckpointError, match="far from positive semi-definite"):
        decompose([(1.0, Moment(100 * np.ones((N, N)) - 99 * np.eye(N)))], None, MU)


@pytest.mark.parametrize("size", [1, 64, 65, 200])
def test_a_triangle_is_inverted(size: int) -> None:
    lower = np.tril(np.random.default_rng(size).standard_normal((size, size)), -1) / size + np.eye(size) * 2
    assert_close(lower_inverse(lower), np.linalg.inv(lower))
    assert not np.triu(lower_inverse(lower), 1).any()


def test_one_decomposition_serves_all_weights_of_old(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old, d = moment(drawn(200, seed=1)), moment(drawn(60, seed=2)), delta()
    solver: Filter = decompose([(1.0, new)], old, MU)
    monkeypatch.setattr(regmean.np.linalg, "eigh", None)
    for lam in (0.0, 0.1, 1.0, 10.0):
        wanted = least_squares([(1.0, drawn(200, seed=1))], drawn(60, seed=2), [d], lam)
        assert_close(solver.solve([d], lam).delta, wanted)


@pytest.mark.parametrize("rank", [None, 5])
def test_the_best_factors_are_those_in_the_metric_of_all_inputs(rank: int | None) -> None:
    new, old, d, lam = moment(drawn(200, seed=1), rank), moment(drawn(60, seed=2), rank), delta(), 0.7
    solver = decompose([(1.0, new)], old, MU)
    metric = new.within(None) + solver.damping[0] * np.eye(N) + lam * old.within(None)
    wanted = solver.solve([d], lam).delta
    lower = np.linalg.cholesky(metric)
    u, s, v = np.linalg.svd(wanted @ lower, full_matrices=False)
    weighed = solver.weighed([d], lam)
    assert np.square(weighed).sum() == pytest.approx(float(np.square(s).sum()), rel=1e-8)
    for count in (1, 4, OUT):
        b, a, held = best_factors(weighed, count)
        assert_close(b @ solver.unweighed(a, lam), (u[:, :count] * s[:count]) @ v[:count] @ np.linalg.inv(lower), 1e-7)
        assert held == pytest.approx(float(np.square(s[:count]).sum() / np.square(s).sum()), rel=1e-8)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (1, 5)])
def test_factors_of_less_than_their_rank_and_of_zeros(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((shape[0], 1)) @ random.standard_normal((1, shape[1]))
    b, a, held = best_factors(rows, 4)
    assert b.shape[1] == a.shape[0] <= 4
    assert_close(b @ a, rows)
    assert held == pytest.approx(1)
    b, a, held = best_factors(np.zeros(shape), 4)
    assert held == 1
    assert not (b @ a).any()
