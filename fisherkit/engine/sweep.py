"""The streaming engine: one forward sweep and one backward sweep over a model of any size, group by group of blocks.

Let F be the cost of one forward of everything. Forward sweep: F. Backward sweep: replay F, input gradients F, squared
weight gradients F. Together 4F and two reads of the weights, however many groups there are; resident are one group's
weights, its float32 accumulators and one batch (DESIGN section 3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherkit.engine.arguments import Arguments
from fisherkit.engine.blocks import Boundary, differentiate_blocks, run_blocks
from fisherkit.engine.capture import Capture, Census, add_squared_parameters_, trainable
from fisherkit.engine.job import Job
from fisherkit.engine.selfcheck import check_replay
from fisherkit.engine.tape import Tape
from fisherkit.engine.weights import Weights
from fisherkit.engine.work import Spool


def stream(job: Job) -> None:
    """Measure every target of the plan; values go to ``job.sink``, progress to ``job.work``.

    Raises:
        Unreplayable: the blocks of this model cannot be run one by one.
        NeedsSingles: batches must hold one sample each.
        CheckpointError: damaged or missing weights.
        FisherkitError: a loss that is not finite.
    """
    with Weights(job.skeleton, job.device, keep=job.keep_weights) as weights:
        weights.load_outer()
        sweep = _Sweep(job, weights)
        try:
            sweep.run()
        finally:
            sweep.close()


class _Sweep:
    def __init__(self, job: Job, weights: Weights) -> None:
        self.job, self.weights = job, weights
        self.groups = job.plan.groups
        self.tape = Tape(job.skeleton)
        self.arguments = Arguments(job, self.tape)
        self.has_outer = bool(job.plan.names([None]))
        self.spools: dict[str, Spool] = {}

    def run(self) -> None:
        progress = self.job.work.progress
        measured = [number for number, group in enumerate(self.groups) if self.job.plan.names(group)]
        lowest = 0 if self.has_outer else measured[0]
        if "forward" not in progress:
            self.weights.enter(self.groups[0])
            check_replay(job=self.job, tape=self.tape, blocks=self.groups[0])
        self._record()
        self._forward(progress["forward"])
        self._head()
        for number in range(progress["backward"] - 1, lowest - 1, -1):
            self._backward(number, then=self.groups[number - 1] if number > lowest else ())
        if self.has_outer and "outer" not in progress:
            self._outer()

    def close(self) -> None:
        self.arguments.close()
        for spool in self.spools.values():
            spool.close()

    # The work folder names what crosses group borders: boundary-0 enters group 0, boundary-N leaves the last one;
    # gradient-N is the gradient with respect to boundary-N.

    def _spool(self, name: str, *, fresh: bool = False) -> Spool:
        path = self.job.work.folder / f"{name}.bin"
        if name not in self.spools:
            self.spools[name] = Spool(path, self.job.budget) if fresh else Spool.reopen(path, self.job.budget)
        return self.spools[name]

    def _drop(self, name: str) -> None:
        self._spool(name).remove()
        del self.spools[name]

    def _load(self, name: str, batch: int) -> Boundary:
        return Boundary.unpack(*self._spool(name).get(str(batch)), self.job.device)

    def _record(self) -> None:
        """What all blocks are called with, and boundary 0."""
        fresh = "forward" not in self.job.work.progress
        for number in range(len(self.job.batches)):
            first = self.arguments.record(number)
            if fresh:
                self._spool("boundary-0", fresh=True).put(str(number), *Boundary(first).pack())
            self.job.track("prompts", number + 1, len(self.job.batches))
        if fresh:
            self._spool("boundary-0").finish()
            self.job.work.commit(forward=0)

    def _forward(self, done: int) -> None:
        """Boundaries 1 to N; the last group keeps its weights for the backward sweep."""
        if "backward" in self.job.work.progress:
            return
        for number in range(done, len(self.groups)):
            last = number == len(self.groups) - 1
            then = self.groups[number - 1] if last and number else self.groups[min(number + 1, len(self.groups) - 1)]
            self.weights.enter(self.groups[number], then)
            leaving = self._spool(f"boundary-{number + 1}", fresh=True)
            for batch in range(len(self.job.batches)):
                leaving.put(str(batch), *self._push(number, batch).pack())
                self.job.track("forward", number * len(self.job.batches) + batch + 1, self._steps)
            leaving.finish()
            self.job.work.commit(forward=number + 1)
            if not last:
                self.weights.leave(self.groups[number])

    @torch.no_grad()
    def _push(self, number: int, batch: int) -> Boundary:
        group, general = self.groups[number], self.job.general
        record, entering = self.arguments.get(batch, group), self._load(f"boundary-{number}", batch)
        if batch:
            return run_blocks(self.job.skeleton, group, record, entering)
        with Census(self.job.skeleton.model, self.job.plan.names(group), general) as census:
            leaving = run_blocks(self.job.skeleton, group, record, entering)
        census.check(self.job.ids(self.job.batches[batch]))
        return leaving

    def _head(self) -> None:
        """Losses, and the gradient at the last boundary, sample by sample."""
        top = len(self.groups)
        if "backward" in self.job.work.progress:
            return
        gradients = self._spool(f"gradient-{top}", fresh=True)
        done, losses = 0, []
        for number, batch in enumerate(self.job.batches):
            hidden = self._load(f"boundary-{top}", number).hidden
            gradient = torch.zeros_like(hidden)
            for row, sample in enumerate(batch):
                length = len(self.job.samples[sample].ids)
                gradient[row, :length], loss = self._head_of(sample, hidden[row : row + 1, :length])
                losses.append(loss)
            gradients.put(str(number), *Boundary(gradient).pack())
            done += len(batch)
            self.job.track("head", done, len(self.job.samples))
        gradients.finish()
        self.job.work.commit(backward=top, loss=sum(losses) / len(losses))
        if not self.has_outer:
            self._drop(f"boundary-{top}")

    def _head_of(self, sample: int, hidden: Tensor) -> tuple[Tensor, float]:
        final = hidden.detach().clone().requires_grad_()
        ids = self.job.ids([sample])
        with torch.enable_grad():
            loss = self.job.loss(sample, self.tape.logits(ids, final=final)[0])
            (gradient,) = torch.autograd.grad(loss, final)
        return gradient[0], loss.item()

    def _backward(self, number: int, then: Sequence[int]) -> None:
        """Replay a group, add up its targets' squares, and pass the gradient down to its lower boundary."""
        job, group = self.job, self.groups[number]
        self.weights.enter(group, then)
        sums = job.accumulators(group)
        passed = self._spool(f"gradient-{number}", fresh=True)
        with Capture(job.skeleton.model, sums, job.general) as capture:
            for batch, members in enumerate(job.batches):
                capture.begin(job.lengths(members))
                entering, gradient = (
                    self._load(f"boundary-{number}", batch),
                    self._load(f"gradient-{number + 1}", batch),
                )
                record = self.arguments.get(batch, group)
                below = differentiate_blocks(job.skeleton, group, record, entering, gradient)
                passed.put(str(batch), *below.pack())
                capture.finish()
                step = (len(self.groups) - 1 - number) * len(job.batches) + batch + 1
                job.track("backward", step, self._steps)
        self.weights.leave(group)
        state = job.deliver(group, sums)
        passed.finish()
        job.work.commit(backward=number, sink=state)
        self._drop(f"gradient-{number + 1}")
        if number or not self.has_outer:
            self._drop(f"boundary-{number}")

    def _outer(self) -> None:
        """Targets around the blocks, sample by sample: a tied embedding gets the sum of both its gradients squared."""
        job, top = self.job, len(self.groups)
        sums = job.accumulators([None])
        with trainable(job.skeleton.model, sums) as parameters:
            for batch, (sample,) in enumerate(job.batches):
                final, arrived = self._load(f"boundary-{top}", batch).hidden, self._load("gradient-0", batch)
                with torch.enable_grad():
                    logits, first, tensors = self.tape.outer(job.ids([sample]), final)
                    loss = job.loss(sample, logits[0])
                roots = [(loss, torch.ones_like(loss)), (first, arrived.hidden)]
                roots += [(tensors[place], gradient) for place, gradient in arrived.inputs.items()]
                roots = [(root, gradient) for root, gradient in roots if root.requires_grad]
                torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
                add_squared_parameters_(sums, parameters)
                job.track("outer", batch + 1, len(job.batches))
        job.work.commit(outer=True, sink=job.deliver([None], sums))

    @property
    def _steps(self) -> int:
        return len(self.groups) * len(self.job.batches)
