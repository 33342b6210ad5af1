"""Tensors that threads take side by side come out as one after the other; errors and order are the same."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pairs
import pytest
from kills import Killed, killed_after

import fisherkit
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.writer import StreamedWriter
from fisherkit.errors import OutputError
from fisherkit.options import FapmOptions, MergeOptions
from fisherkit.pairs import parallel, reader, rewrite
from fisherkit.pairs.parallel import BlockPool


def test_items_come_back_in_order_and_what_a_thread_maps_it_does_itself() -> None:
    with BlockPool(3) as pool:

        def one(item: int) -> tuple[int, set[int]]:
            return item, set(pool.map(lambda start, stop: threading.get_ident(), 10, 1)) - {threading.get_ident()}

        assert list(pool.side_by_side(one, iter(range(50)))) == [(item, set()) for item in range(50)]
        assert len(pool.map(lambda start, stop: start, 10, 1)) == 10


def test_no_more_items_are_asked_for_than_are_under_way() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            asked.append(item)
            yield item

    with BlockPool(2) as pool:
        for done, _ in enumerate(pool.side_by_side(lambda item: item, items())):
            assert len(asked) <= done + 4


def test_the_first_error_in_order_is_the_one_that_is_raised() -> None:
    second_failed = threading.Event()

    def fail(item: int) -> None:
        if item == 2:
            second_failed.wait(5)
            raise ValueError("first")
        if item == 3:
            second_failed.set()
            raise ValueError("second")

    with BlockPool(2) as pool, pytest.raises(ValueError, match="first"):
        list(pool.side_by_side(fail, range(10)))


def test_after_an_error_no_thread_works_on() -> None:
    working: list[int] = []
    begun = threading.Event()

    def one(start: int, stop: int) -> None:
        if start == 0:
            begun.wait(5)
            raise ValueError("first")
        begun.set()
        time.sleep(0.05)
        working.append(start)

    with BlockPool(3) as pool:
        with pytest.raises(ValueError, match="first"):
            pool.map(one, 100, 1)
        done = list(working)
        time.sleep(0.2)
        assert done
        assert working == done
        assert len(done) < 20  # what had not begun was left


def half_small(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have half of a checkpoint's tensors count as small, and large ones written in many parts."""
    sizes = sorted(info.nbytes for info in open_index(base).tensors.values())
    assert sizes[0] < sizes[len(sizes) // 2] < sizes[-1]
    monkeypatch.setattr(reader, "_SIDE_BY_SIDE_BYTES", sizes[len(sizes) // 2])
    monkeypatch.setattr(parallel, "_TRANSFER", 64)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("method", ["fapm", "merge"])
def test_the_number_of_threads_and_who_shares_what_do_not_matter(
    method: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pairs.make(tmp_path)
    run = {
        "fapm": lambda out: fisherkit.fapm(base, tuned, out, FapmOptions(sparsity=0.7)),
        "merge": lambda out: fisherkit.merge(base, tuned, out, MergeOptions(alpha=0.5)),
    }[method]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(threads)))
    reports = [run(tmp_path / "side-by-side")]
    half_small(base, monkeypatch)
    reports.append(run(tmp_path / "both"))
    monkeypatch.setattr(reader, "_SIDE_BY_SIDE_BYTES", -1)
    reports.append(run(tmp_path / "shared"))
    for report in reports:
        assert list(report.tensors) == list(reports[0].tensors)
    for file in sorted((tmp_path / "side-by-side").glob("*.safetensors")):
        for other in ("both", "shared"):
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("steps", [1, 5, 9, 14])
def test_a_run_killed_among_small_or_large_tensors_goes_on_to_the_same_bits(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pairs.make(tmp_path)
    whole = fisherkit.fapm(base, tuned, tmp_path / "whole", FapmOptions(sparsity=0.7))
    half_small(base, monkeypatch)
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    with pytest.raises(Killed):
        fisherkit.fapm(
            base, tuned, tmp_path / "out", FapmOptions(sparsity=0.7), track=killed_after(steps, stage="writing")
        )
    gone_on = fisherkit.fapm(base, tuned, tmp_path / "out", FapmOptions(sparsity=0.7, resume=True))
    assert list(gone_on.tensors) == list(whole.tensors)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_disk_that_fails_behind_the_work_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells of a lost write but once: a sync after it would find nothing wrong."""
    base, tuned = pairs.make(tmp_path)
    monkeypatch.setattr(rewrite, "_FLUSH_BYTES", 0)
    fisherkit.fapm(base, tuned, tmp_path / "whole")
    sync, calls = StreamedWriter.sync, iter(range(1000))

    def fail_once(writer: StreamedWriter) -> None:
        if next(calls) == 0:
            raise OutputError("the disk is full")
        sync(writer)

    monkeypatch.setattr(StreamedWriter, "sync", fail_once)
    with pytest.raises(OutputError, match="the disk is full"):
        fisherkit.fapm(base, tuned, tmp_path / "lost")
    assert pairs.is_whole(tmp_path / "whole")
    assert not (tmp_path / "lost").exists()
