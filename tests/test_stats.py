import math

import numpy as np
import pytest
import torch

from fisherkit.checkpoint.names.location import Location, block_prefix, locate
from fisherkit.kernels import stats as kernel
from fisherkit.kernels.histogram import BINS, Histogram, lower_edge
from fisherkit.kernels.stats import BINS_PER_OCTAVE, TensorStats, tensor_stats


def fisher_like(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).pow(4) * 1e-9


def mass_by_sorting(values: np.ndarray, top: float) -> float:
    """Oracle: the share of the total that the largest entries hold, by sorting all of them in float64."""
    ordered = np.sort(values.astype(np.float64).ravel())[::-1]
    cumulative = np.concatenate([[0.0], np.cumsum(ordered)])
    return float(np.interp(top * ordered.size, np.arange(ordered.size + 1), cumulative) / cumulative[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_equal_numpy_in_float64(dtype: torch.dtype) -> None:
    tensor = (fisher_like(300, 70) * 1e6).to(dtype)
    tensor[3, :9] = 0
    stats = tensor_stats(tensor)
    exact = tensor.double().numpy()
    assert stats.numel == 21_000
    assert stats.sum == pytest.approx(exact.sum(), rel=1e-6 if dtype == torch.float64 else 1e-12)
    assert stats.mean == pytest.approx(exact.mean(), rel=1e-6)
    assert stats.max == pytest.approx(exact.max(), rel=1e-6)
    assert stats.zeros == (exact == 0).sum() >= 9
    assert (stats.nonfinite, stats.negative) == (0, 0)


def test_histogram_bins_hold_exactly_what_lies_between_their_edges() -> None:
    values = fisher_like(5000).double().numpy()
    bins = tensor_stats(torch.from_numpy(values)).histogram.bins
    for index, count, total in bins:
        inside = values[(values >= lower_edge(index)) & (values < lower_edge(index + 1))]
        assert count == inside.size
        assert total == pytest.approx(inside.sum(), rel=1e-6)
    assert sum(count for _, count, _ in bins) == values.size


def test_an_octave_has_eight_bins() -> None:
    edges = [lower_edge(index) for index in range(BINS - BINS_PER_OCTAVE, BINS)]
    assert edges == [2.0**127 * (1 + step / 8) for step in range(8)]


@pytest.mark.parametrize("top", [0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 1.0])
def test_mass_equals_sorting_to_a_fraction_of_a_bin(top: float) -> None:
    values = fisher_like(40_000)
    values[:10_000] = 0
    assert tensor_stats(values).histogram.mass(top) == pytest.approx(mass_by_sorting(values.numpy(), top), abs=2e-3)


def test_mass_of_equal_entries_is_the_fraction_itself_and_zeros_count_as_entries() -> None:
    assert tensor_stats(torch.full((1000,), 0.7)).histogram.mass(0.3) == pytest.approx(0.3)
    half = torch.cat([torch.zeros(500), torch.ones(500)])
    assert tensor_stats(half).histogram.mass(0.25) == pytest.approx(0.5)
    assert tensor_stats(half).histogram.mass(0.75) == pytest.approx(1.0)


def test_mass_of_nothing_is_zero() -> None:
    assert tensor_stats(torch.zeros(10)).histogram.mass(0.1) == 0.0
    assert Histogram().mass(1.0) == 0.0


def test_nonfinite_entries_are_counted_and_left_out_of_everything_else() -> None:
    clean = fisher_like(4000)
    broken = torch.cat([clean, torch.tensor([float("nan"), float("inf"), float("-inf")])])
    stats, expected = tensor_stats(broken), tensor_stats(clean)
    assert stats.nonfinite == 3
    assert stats.numel == 4003
    assert (stats.sum, stats.max, stats.zeros, stats.negative) == (expected.sum, expected.max, 0, 0)
    assert stats.histogram == expected.histogram


def test_magnitudes_count_and_negative_entries_are_counted() -> None:
    weights = torch.tensor([-3.0, -1.0, -0.0, 0.0, 2.0])
    stats = tensor_stats(weights)
    assert (stats.sum, stats.max, stats.zeros, stats.negative) == (6.0, 3.0, 2, 2)
    assert stats.histogram == tensor_stats(weights.abs()).histogram


def test_float32_extremes_have_bins() -> None:
    extremes = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny, 1e-45])
    stats = tensor_stats(extremes)
    assert stats.nonfinite == 0
    assert stats.zeros == 0
    assert [index for index, _, _ in stats.histogram.bins] == [0, 8, BINS - 1]


@pytest.mark.parametrize(
    "odd", [[], [-0.0], [-0.0, 0.0], [-1.0], [math.nan], [math.inf, -2.0], [-math.inf, 0.0], [1e-45, -1e-45], [3e38]]
)
def test_what_a_block_s_extremes_rule_out_is_not_there(odd: list[float]) -> None:
    block = torch.cat([fisher_like(500), torch.tensor(odd)])
    looked, all_of_it = kernel._Sums(block.device), kernel._Sums(block.device)
    kernel._add_block_on_cpu_(looked, block)
    kernel._add_block_(all_of_it, block)
    assert torch.equal(looked.counts, all_of_it.counts)
    assert torch.equal(looked.sums[:BINS], all_of_it.sums[:BINS])
    assert torch.equal(looked.others, all_of_it.others)


def test_empty_tensor_and_scalar() -> None:
    assert tensor_stats(torch.zeros(0, 7)) == TensorStats()
    assert TensorStats().mean == 0.0
    assert tensor_stats(torch.tensor(2.5)).sum == 2.5


def test_pieces_add_up_to_the_whole_whatever_the_blocks() -> None:
    whole = fisher_like(1100, 1000)  # more than one block
    parts = tensor_stats(whole[:3]) + tensor_stats(whole[3:700]) + tensor_stats(whole[700:])
    expected = tensor_stats(whole)
    assert parts.sum == pytest.approx(expected.sum, rel=1e-12)
    assert [b[:2] for b in parts.histogram.bins] == [b[:2] for b in expected.histogram.bins]
    assert (parts.numel, parts.max) == (expected.numel, expected.max)


def test_strides_do_not_matter() -> None:
    tensor = fisher_like(64, 33)
    assert tensor_stats(tensor.T).histogram.count == tensor_stats(tensor).histogram.count
    assert tensor_stats(tensor.T).sum == pytest.approx(tensor_stats(tensor).sum, rel=1e-12)


def test_histogram_survives_json() -> None:
    histogram = tensor_stats(fisher_like(1000)).histogram
    assert Histogram.from_json(histogram.to_json()) == histogram
    assert histogram.count == 1000


@pytest.mark.parametrize(
    "rows", [[[3, 0, 1.0]], [[5, 1, 1.0], [4, 1, 1.0]], [[BINS, 1, 1.0]], [[1, 2, -1.0]], [[1, 2]]]
)
def test_histogram_rows_that_cannot_be_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"histogram|unpack"):
        Histogram.from_json(rows)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Location(3, "model.layers.3", "self_attn.q_proj")),
        ("model.layers.3.self_attn.q_proj.bias", Location(3, "model.layers.3", "self_attn.q_proj.bias")),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", Location(0, "model.layers.0", "mlp.experts.gate_proj")),
        ("model.layers.0.mlp.experts.gate_up_proj", Location(0, "model.layers.0", "mlp.experts.gate_up_proj")),
        ("model.embed_tokens.weight", Location(None, "model.embed_tokens", "model.embed_tokens")),
        ("lm_head.weight", Location(None, "lm_head", "lm_head")),
        (
            "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
            Location(None, "model.vision_tower.encoder.layers.3", "model.vision_tower.encoder.layers.mlp.fc1"),
        ),
    ],
)
def test_names_are_split_at_the_text_models_blocks(name: str, place: Location) -> None:
    assert locate(name, "model.layers") == place


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["h.0.attn.c_attn.weight", "wte.weight"], "h"),
        (["transformer.h.0.a.weight", "transformer.h.1.a.weight", "x.0.a"], "transformer.h"),
        (["0.weight", "2.weight"], ""),
        (["wte.weight", "norm.bias"], None),
        ([], None),
    ],
)
def test_blocks_are_found_by_counting(names: list[str], prefix: str | None) -> None:
    assert block_prefix(names) == prefix


def test_a_tower_with_more_tensors_is_not_the_text_model() -> None:
    tower = [f"model.vision_tower.encoder.layers.{i}.mlp.fc{j}.weight" for i in range(9) for j in (1, 2, 3)]
    text = [f"model.language_model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    assert block_prefix(tower + text) == "model.language_model.layers"
    assert block_prefix(tower) == "model.vision_tower.encoder.layers"


def test_gpt2_names_have_layers() -> None:
    assert locate("h.11.attn.c_attn.weight", "h") == Location(11, "h.11", "attn.c_attn")
    assert locate("0.weight", "") == Location(None, "0", "0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [65_535, 65_536, 1 << 20, (1 << 20) + 77])
def test_numbers_of_16_bits_are_counted_as_float32_ones_are(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    bits = torch.randint(-(1 << 15), 1 << 15, (size,), generator=generator, dtype=torch.int32)
    tensor = bits.to(torch.int16).view(dtype)
    found, wanted = tensor_stats(tensor), tensor_stats(tensor.float())
    for name in ("numel", "max", "zeros", "negative", "nonfinite"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.sum == pytest.approx(wanted.sum, rel=1e-13)
    counted, summed = ([row[:2] for row in one.histogram.bins] for one in (found, wanted))
    assert counted == summed
    for one, other in zip(found.histogram.bins, wanted.histogram.bins, strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-13)


def test_16_bit_numbers_of_which_none_is_finite_have_no_largest() -> None:
    assert tensor_stats(torch.full((1 << 17,), float("nan"), dtype=torch.bfloat16)).max == 0.0
