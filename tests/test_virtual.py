"""What a virtual checkpoint reads is what would be written, bit for bit: every metric, scope, rest and form of FT."""

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fisher_files
import pairs
import pytest
import tiny
import torch
from pairs import Pair
from torch import Tensor

import fisherkit
from fisherkit.checkpoint.computed_reader import ComputedReader
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.errors import CheckpointError
from fisherkit.methods.merge.points import Points, open_fapm_points, open_merge_points
from fisherkit.options import FapmOptions, MaskOptions, MergeOptions
from fisherkit.options.merge import Metric, Scope
from fisherkit.pairs.virtual import VirtualCheckpoint, open_tuned

METRICS: tuple[Metric, ...] = ("fapm", "relative", "magnitude", "random", "wise-ft", "dare", "della")
SPARSITIES = (0.0, 0.3, 0.9, 1.0)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair whose weights and changes take few values: most scores are those of many other entries."""
    folder = tmp_path_factory.mktemp("coarse")
    rounded = pairs.changed(
        tiny.save("llama", folder / "model", dtype=torch.bfloat16), folder / "base", lambda _, w: (w * 16).round() / 16
    )
    drawing = torch.Generator().manual_seed(3)

    def moved(_: str, tensor: Tensor) -> Tensor:
        return tensor + torch.randint(-2, 3, tensor.shape, generator=drawing) / 8

    return rounded, pairs.changed(rounded, folder / "tuned", lambda name, w: moved(name, w).to(w.dtype))


@pytest.fixture(scope="module")
def adapted(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A base and an adapter on two kinds of its matrices."""
    weights = {n: w for n, w in pairs.tensors(pair[0]).items() if "q_proj" in n or "down_proj" in n}
    return pair[0], pairs.adapter(tmp_path_factory.mktemp("adapter") / "adapter", weights)


@pytest.fixture(scope="module")
def sparse(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A base and a sparse delta that fapm wrote."""
    path = tmp_path_factory.mktemp("sparse") / "delta.safetensors"
    fisherkit.fapm(*pair, None, FapmOptions(sparsity=0.6), sparse=path)
    return pair[0], path


def read(virtual: VirtualCheckpoint, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a virtual checkpoint, in an order that no command would use."""
    chosen = sorted(virtual.index.tensors, reverse=True) if names is None else names
    with closing(ComputedReader(virtual)) as reader:
        return reader.read_many(chosen)


def assert_same(found: dict[str, Tensor], written: Path) -> None:
    wanted = pairs.tensors(written)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        assert pairs.same_bits(found[name], tensor), name


def assert_written(points: Points, both: Pair, options: Sequence[FapmOptions | MergeOptions], folder: Path) -> None:
    """Write every point, and compare."""
    for number, (virtual, own) in enumerate(zip(points.virtual, options, strict=True)):
        out = folder / str(number)
        if isinstance(own, FapmOptions):
            fisherkit.fapm(*both, out, own)
        else:
            fisherkit.merge(*both, out, own)
        assert_same(read(virtual), out)


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_every_density_of_a_selection_is_what_would_be_written(coarse: Pair, scope: Scope, tmp_path: Path) -> None:
    metrics = [metric for metric in METRICS if FapmOptions(metric=metric).selects]
    options = [
        FapmOptions(metric=metric, sparsity=sparsity, scope=scope)
        for metric, sparsity in itertools.product(metrics, SPARSITIES)
    ]
    with open_fapm_points(*coarse, options) as points:
        assert_written(points, coarse, options, tmp_path)


@pytest.mark.parametrize("metric", ["wise-ft", "dare", "della"])
def test_metrics_that_rescale_are_what_would_be_written(coarse: Pair, metric: Metric, tmp_path: Path) -> None:
    options = [FapmOptions(metric=metric, sparsity=sparsity, seed=3) for sparsity in SPARSITIES]
    with open_fapm_points(*coarse, options) as points:
        assert_written(points, coarse, options, tmp_path)


@pytest.mark.parametrize("rest", ["tuned", "base"])
def test_what_is_left_out_is_what_would_be_written(pair: Pair, rest: str, tmp_path: Path) -> None:
    options = [
        FapmOptions(sparsity=sparsity, only=("matrices",), skip=("layers.1",), rest=rest, scope="global")  # type: ignore[arg-type]
        for sparsity in (0.2, 0.7)
    ]
    with open_fapm_points(*pair, options) as points:
        assert_written(points, pair, options, tmp_path)


@pytest.mark.parametrize("kind", ["adapted", "sparse"])
@pytest.mark.parametrize("scope", ["tensor", "layer"])
def test_an_adapter_or_a_delta_is_what_would_be_written(
    kind: str, scope: Scope, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    both: Pair = request.getfixturevalue(kind)
    options: list[FapmOptions | MergeOptions] = [FapmOptions(sparsity=s, scope=scope) for s in (0.1, 0.6)]
    with open_fapm_points(*both, options) as points:  # type: ignore[arg-type]
        assert_written(points, both, options, tmp_path)


@pytest.fixture(scope="module")
def files(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mask, a subspace and an importance of the layers, each of the base."""
    folder = tmp_path_factory.mktemp("files")
    drawing = torch.Generator().manual_seed(5)
    inside = {name: w for name, w in pairs.tensors(pair[0]).items() if ".layers." in name and w.ndim > 1}
    values = {name: torch.rand(w.shape, generator=drawing).pow(4).bfloat16() for name, w in inside.items()}
    fisher = fisher_files.write_fisher(folder / "fisher.safetensors", values)
    fisherkit.mask(fisher, folder / "mask.safetensors", MaskOptions(keep=0.3, train="top", aggregate="none"))
    fisherkit.mask(fisher, folder / "sub.safetensors", MaskOptions(svd_rank=2))
    (folder / "layers.json").write_text(json.dumps([3e-6, 1e-6, 2e-5]))
    return {
        "mask": folder / "mask.safetensors",
        "subspace": folder / "sub.safetensors",
        "layers": folder / "layers.json",
    }


@pytest.mark.parametrize("kind", ["pair", "adapted", "sparse"])
def test_every_strength_of_merge_is_what_would_be_written(
    kind: str, files: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    both: Pair = request.getfixturevalue(kind)
    options = [
        *(MergeOptions(alpha=alpha) for alpha in (0.0, 0.3, 1.0, -0.5)),
        MergeOptions(mask=files["mask"]),
        MergeOptions(subspace=files["subspace"], alpha=0.7),
        *(MergeOptions(layer_scale=files["layers"], power=power) for power in (0.0, 0.5, 2.0)),
        MergeOptions(**{"mask": files["mask"], "subspace": files["subspace"], "layer_scale": files["layers"]}),
    ]
    options = [replace(one, nan="keep-base") for one in options]
    with open_merge_points(*both, options) as points:
        assert_written(points, both, options, tmp_path)


@pytest.mark.parametrize("rest", ["tuned", "base"])
def test_what_a_mask_does_not_speak_of_is_what_would_be_written(
    pair: Pair, files: dict[str, Path], rest: str, tmp_path: Path
) -> None:
    options = [MergeOptions(mask=files["mask"], rest=rest, skip=("layers.0",))]  # type: ignore[arg-type]
    with open_merge_points(*pair, options) as points:
        assert_written(points, pair, options, tmp_path)


@pytest.mark.parametrize("kind", ["pair", "adapted", "sparse"])
def test_ft_itself_is_what_a_merge_at_full_strength_writes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    both: Pair = request.getfixturevalue(kind)
    fisherkit.merge(*both, tmp_path / "out", MergeOptions())
    with open_tuned(*map(str, both)) as tuned, open_fapm_points(*both, [FapmOptions()]) as points:
        assert_same(read(tuned), tmp_path / "out")
        assert_same(read(points.tuned), tmp_path / "out")


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_neither_order_nor_threads_nor_repetition_matter(coarse: Pair, scope: Scope) -> None:
    options = [FapmOptions(metric="magnitude", sparsity=sparsity, scope=scope) for sparsity in (0.25, 0.5, 0.75)]
    names = list(open_index(coarse[0]).tensors)
    with open_fapm_points(*coarse, options) as points, ThreadPoolExecutor(4) as threads:
        first = [read(virtual, names) for virtual in points.virtual]
        asked = [(at, part) for part in (names[::2], names[::-1], names[1::2]) for at in range(len(options))]
        for (at, _), found in zip(
            asked, threads.map(lambda one: read(points.virtual[one[0]], one[1]), asked), strict=True
        ):
            assert all(pairs.same_bits(tensor, first[at][name]) for name, tensor in found.items())


@pytest.mark.parametrize("scope", ["tensor", "layer"])
def test_points_that_cannot_remember_anything_are_the_same(coarse: Pair, scope: Scope) -> None:
    options = [FapmOptions(sparsity=sparsity, scope=scope) for sparsity in SPARSITIES]
    names = list(open_index(coarse[0]).tensors)
    with (
        open_fapm_points(*coarse, options) as points,
        open_fapm_points(*coarse, options, room=0) as forgetful,
        open_fapm_points(*coarse, options, room=5000) as some,
    ):
        for one, others in zip(points.virtual, zip(forgetful.virtual, some.virtual, strict=True), strict=True):
            found = read(one, names)
            for other in others:
                assert all(pairs.same_bits(tensor, found[name]) for name, tensor in read(other, names[::-1]).items())


def test_another_order_of_strengths_changes_nothing(coarse: Pair) -> None:
    options = [FapmOptions(sparsity=sparsity, scope="layer") for sparsity in (0.9, 0.1)]
    with open_fapm_points(*coarse, options) as one, open_fapm_points(*coarse, options[::-1]) as other:
        for ours, theirs in zip(one.virtual, other.virtual[::-1], strict=True):
            found, wanted = read(ours), read(theirs)
            assert all(pairs.same_bits(found[name], wanted[name]) for name in wanted)


def test_config_and_tokenizer_are_those_that_would_be_written(pair: Pair, tmp_path: Path) -> None:
    fisherkit.fapm(*pair, tmp_path / "out", FapmOptions())
    written = pairs.files(tmp_path / "out")
    with open_fapm_points(*pair, [FapmOptions()]) as points:
        beside = pairs.files(points.folder)
    assert "config.json" in beside
    assert "tokenizer.json" in beside
    assert all(written[name] == held for name, held in beside.items())
    assert not points.folder.exists()


def test_a_fingerprint_changes_with_what_would_be_written(pair: Pair, adapted: Pair, files: dict[str, Path]) -> None:
    fapm = [FapmOptions(sparsity=0.5), FapmOptions(sparsity=0.6), FapmOptions(sparsity=0.5, seed=1)]
    merges = [MergeOptions(alpha=0.5), MergeOptions(), MergeOptions(mask=files["mask"])]
    found = []
    for both in (pair, adapted):
        with (
            open_fapm_points(*both, fapm) as points,
            open_merge_points(*both, merges) as others,
            open_tuned(*map(str, both)) as tuned,
        ):
            every = (*points.virtual, *others.virtual, points.tuned, tuned)
            found += [virtual.fingerprint() for virtual in every]
            assert [virtual.fingerprint() for virtual in every] == found[-len(every) :]
    assert len(set(found)) == len(found)


def test_a_density_is_the_sparsity_it_leaves(pair: Pair) -> None:
    options = [FapmOptions(density=0.25), FapmOptions(sparsity=0.75)]
    with open_fapm_points(*pair, options) as points:
        one, other = (read(virtual) for virtual in points.virtual)
        assert points.virtual[0].fingerprint() == points.virtual[1].fingerprint()
    assert all(pairs.same_bits(one[name], other[name]) for name in one)


def test_tensors_that_are_not_there_are_named(pair: Pair) -> None:
    with open_tuned(*map(str, pair)) as tuned, pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        read(tuned, ["nothing"])


def test_what_fapm_refuses_is_refused_when_it_is_read(pair: Pair, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = pairs.changed(pair[1], tmp_path / "broken", lambda n, w: pairs.put(w, torch.nan, 7) if n == name else w)
    with open_fapm_points(pair[0], broken, [FapmOptions()]) as points:
        for virtual in (points.tuned, *points.virtual):
            with pytest.raises(CheckpointError, match=r"FT's tensor '.*up_proj.weight' has 1 NaN .* index 7; mend it"):
                read(virtual)
    with (
        open_tuned(str(pair[0]), str(broken)) as tuned,
        pytest.raises(
            CheckpointError, match=r"broken: put together with .*'.*up_proj.weight' has 1 entries that are NaN"
        ),
    ):
        read(tuned)


def test_an_empty_list_of_names_is_no_tensor(pair: Pair) -> None:
    with open_tuned(*map(str, pair)) as tuned, Reader(open_index(pair[0])) as reader:
        assert read(tuned, []) == reader.read_many([]) == {}
