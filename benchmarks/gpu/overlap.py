"""Share of a run's time in which the device only waits for a copy, from a trace of torch's profiler."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Span = tuple[float, float]
_COPIES = ("gpu_memcpy",)
_COMPUTING = ("kernel", "gpu_memset")


class Exposed(NamedTuple):
    """Seconds of a trace, from the first to the last thing that the device did."""

    whole: float
    computing: float
    copying: float
    exposed: float

    def words(self) -> str:
        """Return it as a line of the table."""
        return (
            f"copies are exposed in {self.exposed / self.whole:.1%} of the time: {self.copying:.2f} s of copies, of "
            f"which {self.exposed:.2f} s beside no computing; the device computes in {self.computing / self.whole:.0%}"
        )

    def against(self, ideal: float, blocks: int) -> str:
        """Return a line on the time that the device computes.

        Args:
            ideal: seconds of the same operations at the rate of matrix products.
            blocks: that were run.
        """
        return (
            f"the device computes {self.computing / blocks:.2f} s a block, of which 4F at the GEMM rate are "
            f"{ideal / self.computing:.0%}; 60 blocks by proportion: {60 * self.computing / blocks:.0f} s of computing"
        )


def traced(run: Callable[[], object]) -> Exposed:
    """Return the exposed copies of a run on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return exposed(json.loads(path.read_text("utf-8"))["traceEvents"])


def exposed(events: Iterable[dict[str, Any]]) -> Exposed:
    """Return the exposed copies of the events of a Chrome trace, whose times are in microseconds."""
    events = [event for event in events if event.get("ph") == "X"]
    copies = _united(_spans(events, _COPIES))
    computing = _united(_spans(events, _COMPUTING))
    either = _united([*copies, *computing])
    if not either:
        raise SystemExit("the trace holds nothing of the device: torch's profiler needs the right to see it")
    whole = either[-1][1] - either[0][0]
    alone = _length(either) - _length(computing)
    return Exposed(*(1e-6 * time for time in (whole, _length(computing), _length(copies), alone)))


def _spans(events: Iterable[dict[str, Any]], kinds: tuple[str, ...]) -> list[Span]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in kinds]


def _united(spans: list[Span]) -> list[Span]:
    """Return the spans in order, those that touch made one."""
    united: list[Span] = []
    for start, stop in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(stop, united[-1][1])
        else:
            united.append((start, stop))
    return united


def _length(spans: list[Span]) -> float:
    return sum(stop - start for start, stop in spans)
