"""Progress on stderr: a bar on a terminal, and at most a line a minute anywhere else."""

import os
import sys
import time
from typing import TYPE_CHECKING

from fisherkit.progress import Say, Track

if TYPE_CHECKING:
    from tqdm import tqdm

PAUSE = 60.0  # seconds between two lines
_FORMAT = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"


def tracker(label: str, say: Say, *, begin: str = "") -> Track:
    """Return a progress function for the library.

    TQDM_DISABLE asks for lines on a terminal too.

    Args:
        label: the command.
        say: prints a line.
        begin: said at once, before anything is imported; empty for nothing.
    """
    if begin:
        say(f"{label}: {begin}")
    bars = sys.stderr.isatty() and os.environ.get("TQDM_DISABLE", "0") in ("", "0")
    return _Bars(label) if bars else _Lines(label, say, said=bool(begin))


class _Bars:
    """A tqdm bar per stage; each is closed when its stage is done or another begins."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stage = ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        name, _, details = stage.partition(": ")
        if self._bar is None or (name, total) != (self._stage, self._bar.total):
            self._close()
            self._stage = name
            self._bar = tqdm(
                total=total,
                initial=done,  # a resumed run: the time left is reckoned from what this process does
                desc=f"{self._label}: {name}",
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                bar_format=_FORMAT,
                smoothing=0.1,
            )
        self._bar.set_postfix_str(details, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class _Lines:
    """A line at the first call, unless one was said already, and then at most one a minute, whatever the stage."""

    def __init__(self, label: str, say: Say, *, said: bool) -> None:
        self._label, self._say = label, say
        self._said = time.monotonic() if said else None
        self._began = ("", 0.0, 0)  # stage, when it was first seen, how much of it was done then

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, name = time.monotonic(), stage.partition(": ")[0]
        if name != self._began[0]:
            self._began = name, now, done
        if self._said is None or now - self._said >= PAUSE:
            self._said = now
            share = f"{100 * done // total} %" if total else ""
            self._say(f"{self._label}: {', '.join(filter(None, [stage, share, self._left(now, done, total)]))}")

    def _left(self, now: float, done: int, total: int) -> str:
        """Say how long the rest of the stage will take at the pace so far; nothing where that is not known yet."""
        _, began, first = self._began
        if done <= first or done >= total:
            return ""
        return f"{_duration((now - began) * (total - done) / (done - first))} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
