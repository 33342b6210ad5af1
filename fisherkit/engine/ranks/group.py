"""Several processes that measure together, over torch.distributed: gloo between CPUs, NCCL between GPUs.

Small things go over a group of gloo, sums over one of NCCL where every rank has a GPU to itself. Where processes must
meet in another thread than the one that runs collectives (weights that are read ahead, commits), they count each other
in a store.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisherkit.checkpoint.tensor_source import TensorSource
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.model.findings import FINDINGS, decode_findings, encode_finding
from fisherkit.engine.ranks.lifeline import GRACE, Failure, Lifeline
from fisherkit.engine.ranks.places import Place
from fisherkit.engine.ranks.rank_work import FollowerWork, claim_spools, drop_spools, sees_folder
from fisherkit.engine.ranks.ranks import Ranks
from fisherkit.engine.ranks.reduce import reduce_to_owners_
from fisherkit.engine.ranks.shared_file import SharedFile
from fisherkit.engine.ranks.shared_weights import SharedWeights
from fisherkit.errors import FisherkitError, RankFailedError, first_line
from fisherkit.kernels.deal import deal
from fisherkit.progress import Say, Track

T = TypeVar("T")
FOREVER = timedelta(days=30)
"""Timeout of collectives: a rank may compute for long before it comes; that one has failed is seen otherwise."""

_INTERRUPTED = "interrupted"


class RankGroup(Ranks):
    """The processes of a torch.distributed group; a context that tells the others what ends it.

    Args:
        rank: of this process.
        places: of all processes, by rank.
        device: that this one computes on.
        sharers: how many processes compute on that very GPU, this one included.
        control: a group of gloo.
        data: a group of NCCL for sums on ``device``; ``control`` where they go over the host.
        store: of all processes; shared by threads.
        lifeline: to the first process, or from it to all others.

    Attributes:
        sent_bytes: bytes of sums that this process sent.
        read_bytes: bytes of weights that it read from the checkpoint.
    """

    def __init__(
        self,
        rank: int,
        places: Sequence[Place],
        *,
        device: torch.device,
        sharers: int,
        control: dist.ProcessGroup,
        data: dist.ProcessGroup,
        store: Any,  # dist.Store, which torch does not declare
        lifeline: Lifeline,
    ) -> None:
        self.rank, self.size = rank, len(places)
        self._places, self._device, self._sharers = places, device, sharers
        self._near = [number for number, place in enumerate(places) if place.machine == places[rank].machine]
        self.neighbours, self.hosts = len(self._near), len({place.machine for place in places})
        self._control, self._data, self._store, self._lifeline = control, data, store, lifeline
        self._counts: dict[str, int] = {}
        if device.type == "cuda" and data is control:
            self.remarks = (
                "some ranks share a GPU, between which NCCL does not work: sums go through the host, over gloo",
            )
        self._sees_files = True
        self._told = False
        self.sent_bytes = self.read_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._lifeline.close(well=True)
            return
        self._tell(error)
        if not self.is_first and not self._lifeline.wait_for_first():
            with contextlib.suppress(AttributeError):
                error.unheard = True  # type: ignore[attr-defined]
        self._lifeline.close(well=False)

    # Small things

    def device(self, chosen: torch.device) -> torch.device:
        """Return the device of this process: of several GPUs in a machine, each process takes its own."""
        assert chosen.type == self._device.type
        return self._device

    def try_sums(self) -> None:
        """Add up a one of each rank: what does not work between them is seen now, and not after the first group.

        NCCL also wants a first collective of all, before some of them send to each other.
        """
        ones = torch.ones(1, device=self._device if self._data is not self._control else "cpu")
        with self._all_here():
            dist.all_reduce(ones, group=self._data)
            if int(ones) != self.size:
                raise RankFailedError(f"the sum of a one from each of {self.size} ranks is {int(ones)}")

    def gather(self, item: T) -> list[T]:
        """Return every rank's item, in order; all ranks call it at the same point."""
        found: list[Any] = [None] * self.size
        with self._all_here():
            dist.all_gather_object(found, item, group=self._control)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` gives in rank 0, or raise what it raises there."""
        made: list[Any] = [None]
        with self.together():
            if self.is_first:
                made = [make()]
        with self._all_here():
            dist.broadcast_object_list(made, 0, group=self._control)
        value: T = made[0]
        return value

    def meet(self, name: str) -> None:
        """Return when all ranks have come here as often as this one."""
        key = self.number(f"meet/{name}")
        self.add(key, 1)
        self.wait(lambda: self.add(key, 0) >= self.size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one rank in all, at the end of the ``with``; one that all have alike stays as it is."""
        own = None
        try:
            yield
        except FisherkitError as error:
            own = error
        texts = self.gather(None if own is None else str(own))
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if failed:
            self._told = True
            if own is not None and texts[self.rank] == texts[failed[0]]:
                raise own
            raise RankFailedError(str(Failure(failed[0], self._places[failed[0]].host, str(texts[failed[0]]))))

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise a finding of one rank in all, at the end of the ``with``; several become one."""
        own = None
        try:
            yield
        except FINDINGS as finding:
            own = encode_finding(finding)
        found = decode_findings([one for one in self.gather(own) if one is not None])
        if found is not None:
            raise found

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Tell the other ranks of an error before anything waits for them on the way out."""
        try:
            yield
        except FINDINGS:
            raise
        except BaseException as error:
            self._tell(error)
            raise

    def own_samples(self, lengths: Sequence[int]) -> list[int]:
        """Return the samples of this rank, dealt out by tokens."""
        return deal(lengths, self.size)[self.rank]

    def share(self, nbytes: int, device: torch.device) -> int:
        """Return the memory that each rank may take: those of a machine share the host's, those of a GPU its own."""
        return self.least(nbytes // (self.neighbours if device.type == "cpu" else self._sharers))

    # Tensors

    def reduce_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Add each tensor up over all ranks, in its owner's memory; all ranks call it at the same point."""
        with self._all_here():
            self.sent_bytes += reduce_to_owners_(
                tensors, owners, self.rank, self.size, self._data, through_host=self._data is self._control
            )

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor of the CPU, which ``receive`` of the other rank takes."""
        with self._watched():
            dist.send(tensor.contiguous().view(-1).view(torch.uint8), to, group=self._control)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous tensor of the CPU with what the other rank sends."""
        with self._watched():
            dist.recv(tensor.view(-1).view(torch.uint8), source, group=self._control)

    def source(self, source: Reader) -> TensorSource:
        """Return a source of which each rank of a machine reads a part for all of them."""
        return SharedWeights(source, self, [self._places[rank] for rank in self._near], self._near.index(self.rank))

    # Files

    def share_work(self, work: Work | None, folder: Path) -> Work:
        """Find out who sees the work folder, and return the view of this rank; see rank_work."""

        def progress() -> dict[str, Any]:
            assert work is not None
            if "run" not in work.progress:
                work.commit(run=secrets.token_hex(8))
            return work.progress

        shared = self.from_first(progress)
        with self.together():
            self._sees_files = sees_folder(folder, self)
            claim_spools(folder, self.rank, shared)
        return work if work is not None else FollowerWork(folder, shared)

    def drop_spools(self, work: Work) -> None:
        """Remove the folder of this rank; what it is in goes where nobody else sees it."""
        drop_spools(work.folder, self.rank, alone=not self._sees_files)

    def spools(self, work: Work) -> Path:
        """Return the folder of this rank, ``rank-K`` in the work folder."""
        return work.folder / f"rank-{self.rank}"

    def open_file(
        self, target: Path, specs: Sequence[TensorSpec], *, work: Path, again: bool, **layout: Any
    ) -> SharedFile:
        """Let rank 0 lay out the file or find it, and all that see it open it."""
        writer = None
        with self.together():
            if self.is_first:
                make = StreamedWriter.reopen if again else StreamedWriter.create
                writer = make(target, specs, work=work, **layout)
        with self.together():
            if self._sees_files and not self.is_first:
                writer = StreamedWriter.reopen(target, specs, work=work, **layout)
        return SharedFile(writer, specs, self)

    # People

    def say(self, say: Say) -> Say:
        """Return ``say`` in rank 0, and silence in all others."""
        return say if self.is_first else lambda line: None

    def track(self, track: Track) -> Track:
        """Return a progress function that ends a run of which another rank has failed; rank 0's goes on to a person."""

        def watched(stage: str, done: int, total: int) -> None:
            self.check()
            if self.is_first:
                track(stage, done, total)

        return watched

    def described(self) -> Mapping[str, int]:
        """Return the numbers of ranks and machines."""
        return {"ranks": self.size, "machines": self.hosts}

    # The others

    def check(self) -> None:
        """Raise RankFailedError if another rank is known to have failed."""
        failure = self._lifeline.failure
        if failure is not None and failure.rank != self.rank:
            raise _raised(failure)

    def number(self, name: str) -> str:
        """Return a key of the store for this use of a name: each rank counts its own."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return f"{name}/{self._counts[name]}"

    def add(self, key: str, amount: int) -> int:
        """Add to a counter of the store, and return what it is then."""
        with self._watched():
            return int(self._store.add(key, amount))

    def put(self, key: str, text: str) -> None:
        """Put a text into the store."""
        with self._watched():
            self._store.set(key, text)

    def get(self, key: str) -> str:
        """Wait for a text of the store."""
        self.wait(lambda: bool(self._store.check([key])))
        with self._watched():
            return bytes(self._store.get(key)).decode()

    def wait(self, until: Callable[[], bool]) -> None:
        """Return when ``until`` does; it asks the store, ever less often."""
        pause = 0.0005
        with self._watched():
            while not until():
                if self._lifeline.failure is not None:  # even this rank's own, in a thread that has not failed
                    raise _raised(self._lifeline.failure)
                time.sleep(pause)
                pause = min(1.3 * pause, 0.02)

    @contextmanager
    def _all_here(self) -> Iterator[None]:
        """Run a collective once all ranks have come to it: nothing ends a wait inside of one while the peer lives."""
        self.meet("collective")
        with self._watched():
            yield

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Turn what a collective says when a peer is gone into which one that is, and why."""
        self.check()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = self._lifeline.wait_for_failure(GRACE)
            if failure is None:
                raise RankFailedError(f"the ranks lost each other ({first_line(error)})") from error
            raise _raised(failure) from error

    def _tell(self, error: BaseException) -> None:
        if not self._told and not isinstance(error, RankFailedError):
            self._told = True
            self._lifeline.report(_reason(error))


def _raised(failure: Failure) -> BaseException:
    """Return what a failure of another rank raises in this one; Ctrl-C in one is Ctrl-C in all."""
    return KeyboardInterrupt() if failure.reason == _INTERRUPTED else RankFailedError(str(failure))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    return str(error) if isinstance(error, FisherkitError) else f"{type(error).__name__}: {first_line(error)}"
