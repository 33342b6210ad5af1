"""Output of ``extract``: a Fisher with its sidecar and layer importance, and covariances beside it."""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fisherkit.artefacts import covariance_file, fisher_sidecar
from fisherkit.artefacts.fisher_paths import FisherPaths, publish_fisher
from fisherkit.checkpoint.atomic import write_json
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.covariance.plan import left_out
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.fisher.sink import FisherSink, store_code
from fisherkit.engine.ranks.shared_file import SharedFile
from fisherkit.methods.extract.engines import run_engine
from fisherkit.methods.extract.fit import form_of
from fisherkit.methods.extract.output import ExtractReport, damaged
from fisherkit.methods.extract.prepare import Prepared
from fisherkit.methods.extract.provenance import provenance
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say, Track


class FisherOutput:
    """A Fisher at ``path``; see methods.extract.output.

    Args:
        path: ``.pt``, ``.safetensors``, or a folder.
        options: of the run.

    Raises:
        OutputError: an unknown suffix.
    """

    def __init__(self, path: Path, options: ExtractOptions) -> None:
        self._options = options
        self._paths = FisherPaths.of(path)
        self.path, self.partial = path, self._paths.partial
        self.written: tuple[Path, ...] = (path, *self._paths.described())

    @property
    def _has_covariances(self) -> bool:
        return self._options.statistics == "activations"

    def check_free(self) -> None:
        """Raise OutputError for what could not be made in the end, or would replace a file of another kind."""
        self._paths.check_free(covariances=self._has_covariances, force=self._options.force)

    def is_of(self, run: str) -> bool:
        """Return whether the output is whole and was made by a run of this fingerprint."""
        made = fisher_sidecar.owner(self._paths.sidecar, "run")
        return isinstance(made, dict) and made.get("fingerprint") == run and self._paths.importance.exists()

    def fill(self, prepared: Prepared, work: Work, track: Track, say: Say, *, run: str, started: float) -> None:
        """Measure, and bring every file into the staging folder; arguments as of Output.fill."""
        paths = self._paths
        with (
            self._open_writer(prepared, work) as writer,
            self._open_covariances(prepared, work) as covariances,
            FisherSink(prepared.skeleton, writer, prepared.plan.tensors) as sink,
        ):
            if "sink" in work.progress:
                sink.restore(work.progress["sink"])
            run_engine(prepared, work, sink, covariances, track, say)
            if not prepared.ranks.is_first:
                return
            if sink.figures.keys() != {tensor.name for tensor in prepared.plan.tensors}:
                raise damaged(work)
            names = writer.seal()
        staged = paths.staged
        files = [staged.fisher / name for name in names] if paths.as_folder else [staged.fisher]
        made = provenance(prepared, work.progress["mode"]) | {
            "file": paths.fisher.name,
            "file_bytes": sum(file.stat().st_size for file in files if file.suffix != ".json"),
            "content_sha256": content_sha256(staged.fisher),
            "loss": work.progress.get("loss"),
        }
        made["run"] |= {"fingerprint": run, "seconds": round(time.monotonic() - started, 3)}
        if covariances is not None:
            self._describe_covariances(prepared, covariances, made, say)
        state = sink.state()
        details = {"tensors": fisher_sidecar.placed(state["tensors"]), "histogram": state["histogram"]}
        write_json(staged.sidecar, made | details)
        write_json(staged.importance, fisher_sidecar.layer_sums(prepared.source.id, paths.fisher, state["tensors"]))

    def publish(self, work: Work) -> None:
        """Rename what is staged; the Fisher comes last, and a folder as a whole. Goes on where a killed run stopped."""
        publish_fisher(self.path, work, covariances=self._has_covariances, force=self._options.force)

    def report(self) -> ExtractReport:
        """Read back what lies at the final names."""
        paths = FisherPaths.of(self.path)
        made = json.loads(paths.sidecar.read_bytes())
        layers = json.loads(paths.importance.read_bytes())["layers"]
        beside = [paths.sidecar, paths.importance]
        if self._has_covariances:
            beside += [paths.covariances, paths.covariances_json]
        tensors = sorted(set(paths.fisher.iterdir()) - set(beside)) if paths.as_folder else [paths.fisher]
        known = {key: value for key, value in made.items() if key not in ("tensors", "histogram")}
        return ExtractReport(paths.fisher, (*tensors, *beside), known, layers)

    def _open_writer(self, prepared: Prepared, work: Work) -> StreamedWriter | SharedFile:
        code, shard_bytes = store_code(prepared.options.store), prepared.options.shard_bytes
        specs = [TensorSpec(tensor.name, code, tensor.shape) for tensor in prepared.plan.tensors]
        writer = prepared.ranks.open_file(
            self.path,
            specs,
            work=work.staging,
            again="laid_out" in work.progress,
            stem="fisher",
            shard_bytes=shard_bytes,
        )
        work.commit(laid_out=True)
        return writer

    def _open_covariances(self, prepared: Prepared, work: Work) -> AbstractContextManager[CovarianceWriter | None]:
        """Open the file of covariances, where they are asked for; beside the staged Fisher until that is whole."""
        if not self._has_covariances:
            return nullcontext()
        target, form = self.path.with_name(self._paths.covariances.name), form_of(self._options)
        return CovarianceWriter(
            prepared.skeleton, prepared.plan, target, work.staging, prepared.device, form, prepared.ranks
        )

    def _describe_covariances(
        self, prepared: Prepared, covariances: CovarianceWriter, made: Mapping[str, Any], say: Say
    ) -> None:
        """Write the JSON of the finished covariances into the staging folder."""
        paths = self._paths
        without = left_out(prepared.plan, covariances.covariances)
        if without:
            say(f"activations: {len(without):,} matrices are no linear layer's and were left out, such as {without[0]}")
        staged = paths.staged.fisher.with_name(paths.covariances.name)
        about = covariance_file.description(staged, made, covariances.described(), without)
        write_json(paths.staged.covariances_json, about)
