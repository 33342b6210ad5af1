"""Streaming engine: one forward sweep and one backward sweep over a model of any size, group by group of blocks.

Let F be the cost of one forward of everything and G the number of groups. Forward sweep: F without the last group.
Backward sweep: replay F, input gradients F, squared weight gradients F. Together (4 - 1/G) F and two reads of the
weights, however many groups there are; resident are one group's weights (the next one's are read ahead), its float32
accumulators and one batch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fisherkit.engine.covariance.hooks import CovarianceHooks
from fisherkit.engine.fisher.squared_gradients import Capture, add_squared_parameters_, trainable
from fisherkit.engine.model.findings import FINDINGS
from fisherkit.engine.model.linear_layers import BatchingCheck
from fisherkit.engine.model.weights import Weights
from fisherkit.engine.sweep.block_arguments import Arguments
from fisherkit.engine.sweep.blocks import Boundary, differentiate_blocks, run_blocks
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.losses import Losses
from fisherkit.engine.sweep.recorder import BlockCallRecorder
from fisherkit.engine.sweep.selfcheck import check_replay
from fisherkit.engine.sweep.spool import Spool


def stream(job: Job) -> None:
    """Measure every target of the plan; values go to ``job.sink``, progress to ``job.work``.

    Raises:
        Unreplayable: the blocks of this model cannot be run one by one.
        NeedsBatchSizeOne: batches must hold one sample each.
        CheckpointError: damaged or missing weights.
        FisherkitError: a loss that is not finite.
    """
    with (
        job.open_source() as source,
        Weights(job.skeleton, source, job.device, keep=job.keep_weights) as weights,
    ):
        weights.load_outer()
        with Sweep(job, weights) as sweep, job.ranks.guarding(), sweep.settling():
            sweep.run()


class Sweep:
    """State of a run.

    The work folder names what crosses group borders: boundary-0 enters group 0, boundary-N leaves the last one;
    gradient-N is the gradient with respect to boundary-N.
    """

    def __init__(self, job: Job, weights: Weights) -> None:
        self.job, self.weights = job, weights
        self.groups = job.plan.groups
        self.top = len(self.groups) - 1
        self.recorder = BlockCallRecorder(job.skeleton)
        spool = Spool(job.spools / "arguments.bin", job.budget)
        self.arguments = Arguments(job, self.recorder, spool, job.plan.names([None]))
        self.has_outer = bool(job.plan.names([None]))
        self.losses = Losses(job)
        self.replays = self.replayed = 0  # of groups in all, of batches so far
        self.spools: dict[str, Spool] = {}
        self.disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self.committing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.disk.shutdown(wait=True)
        self.arguments.close()
        for spool in self.spools.values():
            spool.close()

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Wait for the commit that is under way before a finding gets out: an error in it counts for more."""
        try:
            yield
        except FINDINGS:
            self._wait_for_commit()
            raise

    def run(self) -> None:
        """Go on from where the work folder says, to the end."""
        progress = self.job.work.progress
        measured = [number for number, group in enumerate(self.groups) if self.job.plan.names(group)]
        lowest = 0 if self.has_outer else measured[0]
        if "forward" not in progress:
            self.weights.enter(self.groups[0])
            with self.job.ranks.agreeing():
                check_replay(self.job, self.recorder, self.groups[0])
        self._record()
        if "backward" not in progress:
            self._forward(progress.get("forward", 0))  # the first note may be on its way
            self._probe_top()
        counts = [len(self.job.replays(group)) for group in self.groups]
        begin = progress.get("backward", self.top + 1)
        self.replays, self.replayed = sum(counts[lowest:]), sum(counts[begin:]) * len(self.job.batches)
        for number in range(begin - 1, lowest - 1, -1):
            self._backward(number, lowest)
        if self.has_outer and "outer" not in progress:
            self._wait_for_commit()
            self._outer()
        self._wait_for_commit()

    def _record(self) -> None:
        """Record the arguments of all blocks, and boundary 0."""
        fresh = "forward" not in self.job.work.progress
        if fresh:  # also in a rank that has no batch
            self._spool("boundary-0", fresh=True)
        with self.job.ranks.agreeing():
            for batch in range(len(self.job.batches)):
                first = self.arguments.record(batch)
                if fresh:
                    self._spool("boundary-0").put(str(batch), *Boundary(first).pack())
                self.job.track("prompts", batch + 1, len(self.job.batches))
        if fresh:
            self._commit(["boundary-0"], [], forward=0)

    def _forward(self, done: int) -> None:
        """Make the boundaries between the groups."""
        for number in range(done, self.top):
            self.weights.enter(self.groups[number], self._next(number + 1))
            leaving = self._spool(f"boundary-{number + 1}", fresh=True)
            with self.job.ranks.agreeing():
                for batch in range(len(self.job.batches)):
                    leaving.put(str(batch), *self._push(number, batch).pack())
                    step = number * len(self.job.batches) + batch + 1
                    self.job.track("forward", step, self.top * len(self.job.batches))
            shared_inputs = {} if self.job.covariances is None else {"heard": dict(self.job.covariances.shared_inputs)}
            self._commit([f"boundary-{number + 1}"], [], forward=number + 1, **shared_inputs)
            self.weights.leave(self.groups[number])

    @torch.no_grad()
    def _push(self, number: int, batch: int) -> Boundary:
        """Push a batch through a group; the first one also shows if batches suit it, and what shares an input."""
        job, group = self.job, self.groups[number]
        record, entering = self.arguments.get(batch, group), self._load(f"boundary-{number}", batch)
        if batch:
            return run_blocks(job.skeleton, group, record, entering)
        probing: AbstractContextManager[None] = (
            nullcontext() if job.covariances is None else job.covariances.probing(group)
        )
        with BatchingCheck(job.skeleton.model, job.plan.names(group), job.general) as batching, probing:
            leaving = run_blocks(job.skeleton, group, record, entering)
        batching.check(job.ids(job.batches[batch]))
        return leaving

    def _probe_top(self) -> None:
        """Lay out the covariances; find shared inputs in the last group, which the forward sweep leaves out, before.

        Where they are known, no batch is pushed.
        """
        covariances = self.job.covariances
        if covariances is None or covariances.is_laid_out:
            return
        self._wait_for_commit()
        if not covariances.knows_shared_inputs and self.job.plan.names(self.groups[self.top]):
            self.weights.enter(self.groups[self.top])
            with self.job.ranks.agreeing():
                if self.job.batches:
                    self._push(self.top, 0)
        covariances.lay_out()
        self.job.work.commit(moments=covariances.state())

    def _backward(self, number: int, lowest: int) -> None:
        """Replay a group, add up its targets' squares, and pass the gradient down to the boundary that enters it."""
        job, group = self.job, self.groups[number]
        self.weights.enter(group, self._next(number - 1) if number > lowest else ())
        passed = self._spool(f"gradient-{number}", fresh=True)
        replays, loss = job.replays(group), dict[str, float]()
        for turn, names in enumerate(replays):
            sums, is_last = job.accumulators(names), turn == len(replays) - 1
            gathering = job.gathering(group) if turn == 0 else nullcontext()
            with Capture(job.skeleton.model, sums, job.general) as capture, gathering as gather:
                hooks: list[Capture | CovarianceHooks] = [capture] if gather is None else [capture, gather]
                with job.ranks.agreeing():
                    for batch, members in enumerate(job.batches):
                        for hook in hooks:
                            hook.begin(job.lengths(members))
                        gradient = self._replay(number, batch, keep=not is_last, again=turn > 0)
                        if turn == 0:
                            passed.put(str(batch), *gradient.pack())
                        for hook in hooks:
                            hook.finish()
                        self.replayed += 1
                        job.track("backward", self.replayed, self.replays * len(job.batches))
            if is_last:
                self.weights.leave(group)
            if number == self.top and turn == 0:
                loss["loss"] = self.losses.mean()
            job.deliver(group, sums, gather)
        is_kept = number < self.top or (len(replays) > 1 and job.batches)
        spent = [f"gradient-{number + 1}"] if is_kept else []
        self._commit([f"gradient-{number}"], [*spent, f"boundary-{number}"], backward=number, **loss)

    def _next(self, number: int) -> Sequence[int]:
        """Return the group to read while another computes, if there is memory for both."""
        return self.groups[number] if self.job.plan.read_ahead else ()

    def _replay(self, number: int, batch: int, *, keep: bool, again: bool) -> Boundary:
        """Replay a batch in a group, and differentiate it.

        Args:
            number: of the group.
            batch: its number.
            keep: keep the gradient that the head gives, for when the last group is replayed again.
            again: the group was replayed before, for other targets.
        """
        job, group = self.job, self.groups[number]
        record, entering = self.arguments.get(batch, group), self._load(f"boundary-{number}", batch)
        if number < self.top or again:
            gradient = self._load(f"gradient-{number + 1}", batch)
            return differentiate_blocks(job.skeleton, group, record, entering, lambda leaving: gradient)
        with BatchingCheck(job.skeleton.model, job.plan.names(group), job.general) as batching:

            def gradient_at(leaving: Boundary) -> Boundary:
                if batch == 0:  # the forward sweep left the last group out, so its check is made here
                    batching.check(job.ids(job.batches[batch]))
                gradient = self._head(batch, leaving)
                if keep:
                    self._spool(f"gradient-{number + 1}", fresh=True).put(str(batch), *gradient.pack())
                return gradient

            return differentiate_blocks(job.skeleton, group, record, entering, gradient_at)

    def _head(self, batch: int, leaving: Boundary) -> Boundary:
        """Return the gradient of every sample's loss with respect to the hidden states that leave the last block."""
        hidden, members = leaving.hidden.detach(), self.job.batches[batch]
        gradient = torch.zeros_like(hidden)
        if len(members) == 1:  # whatever the axes of the hidden states are
            gradient = self._head_of(members[0], hidden)
        else:
            for row, sample in enumerate(members):
                length = len(self.job.samples[sample].ids)
                gradient[row, :length] = self._head_of(sample, hidden[row : row + 1, :length])[0]
        if self.has_outer:
            self._spool(f"boundary-{self.top + 1}", fresh=True).put(str(batch), *Boundary(hidden).pack())
            if batch == len(self.job.batches) - 1:
                self._spool(f"boundary-{self.top + 1}").finish()
        return Boundary(gradient)

    def _head_of(self, sample: int, hidden: Tensor) -> Tensor:
        final = hidden.clone().requires_grad_()
        with torch.enable_grad():
            loss = self.job.loss(sample, self.recorder.logits(self.job.inputs([sample]), final=final)[0])
            (gradient,) = torch.autograd.grad(loss, final)
        self.losses.add(sample, loss)
        return gradient

    def _outer(self) -> None:
        """Measure targets around the blocks, sample by sample.

        A tied embedding has a gradient from the head and one from the bottom; they are added before the square.
        """
        job = self.job
        sums = job.accumulators(job.plan.names([None]))
        with trainable(job.skeleton.model, sums) as parameters:
            for batch, (sample,) in enumerate(job.batches):
                final, arrived = self._load(f"boundary-{self.top + 1}", batch).hidden, self._load("gradient-0", batch)
                with torch.enable_grad():
                    logits, first, tensors = self.recorder.outer(job.inputs([sample]), final)
                    loss = job.loss(sample, logits[0])
                roots = [(loss, torch.ones_like(loss)), (first, arrived.hidden)]
                roots += [(tensors[place], gradient) for place, gradient in arrived.inputs.items()]
                roots = [(root, gradient) for root, gradient in roots if root.requires_grad]
                torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
                add_squared_parameters_(sums, parameters)
                job.track("outer", batch + 1, len(job.batches))
        job.deliver([None], sums)
        self._commit([], [], outer=True)

    # The work folder

    def _spool(self, name: str, *, fresh: bool = False) -> Spool:
        path = self.job.spools / f"{name}.bin"
        if name not in self.spools:
            self.spools[name] = Spool(path, self.job.budget) if fresh else Spool.reopen(path, self.job.budget)
        return self.spools[name]

    def _load(self, name: str, batch: int) -> Boundary:
        return Boundary.unpack(*self._spool(name).get(str(batch), self.job.device))

    def _commit(self, whole: list[str], spent: list[str], **progress: Any) -> None:
        """Note progress once spools and Fisher values are on the disk, while the next group computes.

        Args:
            whole: spools that nothing more is put into.
            spent: spools that nobody needs once it is noted.
            progress: to note.
        """
        self._wait_for_commit()
        state, finished = self.job.state(), [self._spool(name) for name in whole]

        def commit() -> None:
            for spool in finished:
                spool.finish()
            self.job.sync()
            self.job.note(**state, **progress)
            self.job.ranks.meet("noted")  # what is spent may go once it is noted, no sooner
            for name in spent:
                self._spool(name).remove()
                del self.spools[name]

        self.committing = self.disk.submit(commit)

    def _wait_for_commit(self) -> None:
        """Wait for the commit that is under way."""
        if self.committing is not None:
            committing, self.committing = self.committing, None
            committing.result()
