"""What both kinds of output of ``extract`` have in common: a Fisher, or covariances of inputs alone."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from fisherkit.checkpoint.work_folder import Work
from fisherkit.errors import ResumeError
from fisherkit.methods.extract.prepare import Prepared
from fisherkit.progress import Say, Track


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """Result of ``extract``.

    Attributes:
        path: the Fisher; its sidecar and layer importance lie beside it, and covariances if asked for. Or the
            covariances of inputs, where these were asked for alone.
        files: everything that was written.
        provenance: the JSON beside it without the statistics of tensors.
        layers: rows of ``layer_importance.json``; none of covariances.
    """

    path: Path
    files: tuple[Path, ...]
    provenance: dict[str, Any]
    layers: list[dict[str, Any]]


class Output(Protocol):
    """Files of one run, and how they are made.

    Attributes:
        path: the one that a person named.
        partial: the work folder.
        written: everything that is made or replaced, but for ``partial``.
    """

    path: Path
    partial: Path
    written: tuple[Path, ...]

    def check_free(self) -> None:
        """Raise OutputError for what could not be made in the end, or would replace a file of another kind."""
        ...

    def is_of(self, run: str) -> bool:
        """Return whether the output is whole and was made by a run of this fingerprint."""
        ...

    def fill(self, prepared: Prepared, work: Work, track: Track, say: Say, *, run: str, started: float) -> None:
        """Measure, and bring every file of the output into the staging folder.

        Args:
            prepared: the run.
            work: its work folder.
            track: progress.
            say: remarks for people.
            run: fingerprint that is noted.
            started: when, by the monotonic clock.
        """
        ...

    def publish(self, work: Work) -> None:
        """Rename what is staged, what readers open last; goes on where a killed run stopped."""
        ...

    def report(self) -> ExtractReport:
        """Read back what lies at the final names."""
        ...


def damaged(work: Work) -> ResumeError:
    """Return the error of a work folder whose progress contradicts itself."""
    return ResumeError(f"{work.folder}: its progress does not add up; run again without --resume to start over")
