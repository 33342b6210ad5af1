"""Progress of a whole run as one stage, so that one bar and one estimate of the time left hold for all of it.

The engines count batches, sweep by sweep. Here a batch's pass through a group of blocks weighs as much as it costs: 1
forwards, 3 backwards (replay, gradients of inputs, gradients of weights); see engine.sweep.sweep.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fisherkit.engine.model.memory import used_bytes
from fisherkit.engine.model.plan import Plan
from fisherkit.progress import Track

STAGE = "measuring"
_COSTS = {"forward": 1, "backward": 3, "outer": 3, "resident": 1, "inputs": 1}


@dataclass
class WholeRun:
    """A Track for the engines that passes everything on as the one stage ``measuring``.

    What follows the colon tells the sweep, the group, samples per second over the whole run so far, and memory in use.

    Attributes:
        samples: how many are measured.
        steps: calls that each sweep will make, in the order of the sweeps.
        batches: calls per replay of a group of blocks.
        parted: whether groups are replayed several times.
        device: whose memory is told.
        track: gets ``stage, done, total``.
    """

    samples: int
    steps: dict[str, int]
    batches: int
    device: torch.device
    track: Track
    parted: bool = False
    _began: tuple[float, int] | None = field(default=None, init=False)

    def __call__(self, sweep: str, done: int, total: int) -> None:
        """Pass on a sweep's ``done`` of ``total`` batches; sweeps without a cost only show that something is done."""
        now, whole = time.monotonic(), sum(_COSTS[name] * steps for name, steps in self.steps.items())
        if sweep not in self.steps:
            self.track(f"{STAGE}: {sweep} {done} of {total}", 0 if self._began is None else self._began[1], whole)
            return
        before = list(self.steps)[: list(self.steps).index(sweep)]
        at = sum(_COSTS[name] * self.steps[name] for name in before) + _COSTS[sweep] * done
        if self._began is None:
            self._began = now, at - _COSTS[sweep]
        details = [
            sweep,
            self._group(sweep, done, total),
            self._rate(now, at, whole),
            f"{used_bytes(self.device) / 1e9:.1f} GB",
        ]
        self.track(f"{STAGE}: {', '.join(filter(None, details))}", at, whole)

    def _group(self, sweep: str, done: int, total: int) -> str:
        if sweep == "outer":
            return ""
        count = total // self.batches + (sweep == "forward")  # the last group is only swept backwards
        return f"{'replay' if self.parted else 'group'} {(done - 1) // self.batches + 1} of {count}"

    def _rate(self, now: float, at: int, whole: int) -> str:
        """Return how many samples were finished per second, were all of the run like the part that is done."""
        assert self._began is not None
        began, first = self._began
        if now - began < 1:
            return ""
        return f"{self.samples * (at - first) / whole / (now - began):.3g} samples/s"


def whole_run(
    plan: Plan,
    engine: str,
    *,
    inputs_only: bool,
    replays: Sequence[int],
    samples: int,
    batches: int,
    device: torch.device,
    track: Track,
) -> WholeRun:
    """Return the progress of a run from what its engine will do.

    Args:
        plan: groups of blocks and targets.
        engine: ``stream`` or ``resident``.
        inputs_only: nothing is differentiated, and the blocks above the last target are left out.
        replays: of each group in the backward sweep.
        samples: that are measured.
        batches: that they make up.
        device: on which they are measured.
        track: gets the progress of the whole.
    """
    measured = [number for number, group in enumerate(plan.groups) if plan.names(group)]
    around = bool(plan.names([None]))
    if engine == "resident":
        return WholeRun(samples, {"resident": samples * (len(measured) + around)}, samples, device, track)
    if inputs_only:
        return WholeRun(samples, {"inputs": (max(measured, default=0) + 1) * batches}, batches, device, track)
    lowest = 0 if around or not measured else measured[0]
    steps = {"forward": (len(plan.groups) - 1) * batches, "backward": sum(replays[lowest:]) * batches}
    steps |= {"outer": batches} if around else {}
    return WholeRun(samples, steps, batches, device, track, parted=max(replays, default=1) > 1)
