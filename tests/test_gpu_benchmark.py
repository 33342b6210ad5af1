"""The benchmark for whoever has a GPU runs (here on the CPU, on next to nothing), and claims nothing without one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import extraction, kernel, overlap, table, training

CPU = torch.device("cpu")
TINY = extraction.Shape(blocks=3, hidden=64, intermediate=96, samples=3, tokens=12)


def test_without_a_gpu_nothing_is_run_and_the_page_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "parts", lambda *_: pytest.fail("ran"))
    assert benchmark.main(["--table", str(tmp_path / "none.md")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    page = benchmark.README.read_text("utf-8")
    written = page.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert written == table.NOT_RUN or written.startswith("Run on ")


def test_kernel_rows_have_the_columns_of_their_header() -> None:
    rows = kernel.rows(CPU, sizes=(24,), samples=2)
    assert len(rows) == 6
    assert {len(row) for row in rows} == {len(kernel.HEADER)}
    assert all(float(row[-1]) < (1e-2 if row[0] == "bfloat16" else 1e-5) for row in rows)


def test_extract_runs_against_the_scripts_and_gives_the_same(tmp_path: Path) -> None:
    rows = extraction.against_scripts(TINY, CPU, tmp_path)
    assert [row[0].split(",")[0] for row in rows] == ["extract", "extract", "extract", "recipe", "loop"]
    assert {len(row) for row in rows} == {len(extraction.HEADER)}
    ours, theirs = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "l.pt")
    for name, value in theirs.items():
        assert float((ours[name] - value).norm() / value.norm()) < 0.05, name


def test_large_blocks_are_told_with_what_sixty_would_take(tmp_path: Path) -> None:
    rows, lines = extraction.large_blocks(TINY, CPU, tmp_path)
    assert len(rows) == 1
    assert "60 blocks by proportion" in lines[0]


def test_training_rows_cover_every_rule() -> None:
    rows = training.rows(CPU, layers=2, hidden=64, tokens=128)
    assert [row[0] for row in rows] == ["none", "rows", "elements", "subspace", "pull", "scale"]


def test_copies_count_as_exposed_where_nothing_computes() -> None:
    def event(kind: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "ts": 1e6 * start, "dur": 1e6 * length}

    events = [
        event("kernel", 0, 4),
        event("kernel", 3, 2),
        event("gpu_memcpy", 2, 5),  # two of its five seconds alone
        event("kernel", 9, 1),
        event("gpu_memcpy", 9.5, 0.25),
        event("cpu_op", 0, 100),
        {"ph": "M"},
    ]
    found = overlap.exposed(events)
    assert found == pytest.approx((10, 6, 5.25, 2))
    assert "exposed in 20.0% of the time" in found.words()
    with pytest.raises(SystemExit, match="nothing of the device"):
        overlap.exposed([event("cpu_op", 0, 1)])


def test_a_part_that_fails_is_a_line_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def part() -> list[str]:
        raise RuntimeError("no kernel image\nand so on")

    assert benchmark.attempt("kernel", part) == (["**kernel** failed: RuntimeError: no kernel image"], False)
    assert benchmark.attempt("kernel", lambda: ["fine"]) == (["fine"], True)
    assert "no kernel image" in capsys.readouterr().err


def test_a_run_replaces_the_last_ones_table(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{table.BEGIN}\n\n{table.NOT_RUN}\n\n{table.END}\n\nafter\n")
    for value in ("1", "2"):
        table.replace(page, table.about({"GPU": "none"}, "2026-01-01"), [table.rows(("a", "b"), [(value, "x")])])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\n\nafter\n")
    assert "| 2 | x |" in text
    assert "| 1 | x |" not in text
    assert "- GPU: none" in text
    page.write_text("no place")
    with pytest.raises(SystemExit, match="has no lines"):
        table.replace(page, [], [])
