"""Every path of one output of ``extract``, derived once from where the Fisher goes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fisherkit.artefacts.covariance_file import path_beside
from fisherkit.artefacts.fisher_sidecar import check_owned, owner, sidecar_path
from fisherkit.checkpoint.atomic import publish
from fisherkit.checkpoint.target import check_target, is_folder
from fisherkit.checkpoint.work_folder import STAGING, Work

IMPORTANCE = "layer_importance.json"


@dataclass(frozen=True, kw_only=True)
class FisherPaths:
    """Paths of one output; all but ``partial`` lie inside of the Fisher where that is a folder.

    Attributes:
        fisher: the tensors: ``.pt``, ``.safetensors``, or a folder of shards.
        sidecar: JSON with provenance and statistics.
        importance: the sums per layer.
        covariances: of layer inputs and output gradients, where they are asked for; a JSON lies beside them.
        partial: the work folder, gone when the run is over.
    """

    fisher: Path
    sidecar: Path
    importance: Path
    covariances: Path
    partial: Path

    @classmethod
    def of(cls, fisher: Path) -> Self:
        """Derive all paths from the Fisher's.

        The importance takes the Fisher's own name where another Fisher's ``layer_importance.json`` lies beside it.

        Raises:
            OutputError: an unknown suffix.
        """
        importance = (fisher if is_folder(fisher) else fisher.parent) / IMPORTANCE
        if not is_folder(fisher) and importance.exists() and owner(importance, "fisher") != fisher.name:
            importance = fisher.with_name(f"{fisher.stem}.{IMPORTANCE}")
        return cls(
            fisher=fisher,
            sidecar=sidecar_path(fisher),
            importance=importance,
            covariances=path_beside(fisher),
            partial=fisher.with_name(f"{fisher.name}.partial"),
        )

    @property
    def covariances_json(self) -> Path:
        """JSON that describes the covariances."""
        return self.covariances.with_suffix(".json")

    @property
    def as_folder(self) -> bool:
        """True where all files lie inside of a folder, which appears as a whole."""
        return self.sidecar.parent == self.fisher

    @property
    def staged(self) -> "FisherPaths":
        """Paths of the same files, finished but not yet renamed, in the work folder."""
        staging = self.partial / STAGING
        folder = staging / self.fisher.name if self.as_folder else staging
        return FisherPaths(
            fisher=staging / self.fisher.name,
            sidecar=folder / self.sidecar.name,
            importance=folder / IMPORTANCE,  # which of the two names it gets is decided when it is renamed
            covariances=folder / self.covariances.name,
            partial=self.partial,
        )

    def described(self) -> tuple[Path, ...]:
        """Return the files besides the tensors, those that decide last."""
        return self.covariances_json, self.covariances, self.importance, self.sidecar

    def check_free(self, *, covariances: bool, force: bool) -> None:
        """Refuse what could not be made in the end, or would replace a file of another kind.

        Args:
            covariances: whether they are written.
            force: replace an earlier output.

        Raises:
            OutputError: see above.
        """
        check_target(self.fisher, force=force)
        if self.as_folder:
            return  # checked as a whole
        check_owned(self.sidecar, "file", self.fisher, "the statistics")
        check_owned(self.importance, "fisher", self.fisher, "the sums per layer")
        if covariances:
            check_target(self.covariances, force=force)
            check_owned(self.covariances_json, "file", self.covariances, "the facts")


def publish_fisher(target: Path, work: Work, *, covariances: bool, force: bool) -> None:
    """Rename what is staged of a Fisher; it comes last, and a folder as a whole. Goes on where a killed run stopped.

    Args:
        target: where the Fisher goes.
        work: its work folder; notes under ``publishing`` that everything is staged.
        covariances: whether some are staged, beside the Fisher.
        force: replace an earlier output.

    Raises:
        OutputError: a target has appeared meanwhile, or the disk is full.
    """
    paths = FisherPaths.of(target)  # anew: another run may have written its layer_importance.json since
    staged = paths.staged
    if "publishing" not in work.progress:
        paths.check_free(covariances=covariances, force=force)
        work.commit(publishing={"force": force})
    elif os.path.lexists(staged.fisher):
        check_target(paths.fisher, force=force or work.progress["publishing"]["force"])
    beside = staged.fisher.with_name(paths.covariances.name)
    if paths.as_folder and beside.exists():
        beside.replace(staged.covariances)
    if not paths.as_folder:
        publish(list(zip(staged.described(), paths.described(), strict=True)))
    publish([(staged.fisher, paths.fisher)])
