"""Recorder of the arguments that a model hands its decoder blocks, by stubs that stand in for them.

A stub notes the arguments that the model's own forward passes to its block, and returns the hidden states untouched.
No architecture is re-implemented: what a model does around its blocks, it does itself.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from fisherkit.engine.model.findings import Unreplayable
from fisherkit.engine.model.skeleton import Skeleton


@dataclass(frozen=True)
class TensorPlace:
    """Place of a recorded tensor among the arguments."""

    number: int


@dataclass(frozen=True)
class MappingPlace:
    """Place of a mapping that blocks may share among the arguments."""

    number: int


@dataclass(frozen=True)
class ExtraPlace:
    """Output of a block beside its hidden states, by its number; also its place among the next block's arguments."""

    number: int


@dataclass
class Record:
    """Arguments of every block for one batch, hidden states left out, every tensor kept once.

    The call of a block that the model skips (one that reads pictures, where there are none) is None.
    ``live`` numbers the tensors that depend on parameters outside the blocks that are being measured.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]] | None] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    mappings: list[tuple[type, dict[Any, Any]]] = field(default_factory=list)
    live: frozenset[int] = frozenset()

    def takes_extra(self, block: int) -> set[int]:
        """Return the numbers of the outputs of the block before this one that it is called with."""
        return {one.number for one in _places(self.calls[block], ExtraPlace)} if block < len(self.calls) else set()

    def needs(self, blocks: Sequence[int]) -> set[int]:
        """Numbers of the tensors that the given blocks are called with."""
        places = [self.calls[block] for block in blocks] + [content for _, content in self.mappings]
        return {one.number for one in _places(places, TensorPlace)}


class HiddenPlace:
    """Place of the hidden states among the arguments."""


HIDDEN = HiddenPlace()
Place = TypeVar("Place", TensorPlace, ExtraPlace)
MOST_EXTRAS = 3


class _Reached(Exception):  # noqa: N818 - leaves the model's forward at the last stub
    pass


class BlockStub(nn.Module):
    """Stands in for a block; reads of its attributes (``layer.attention_type``) reach the block itself."""

    def __init__(self, block: nn.Module, number: int, recorder: "BlockCallRecorder") -> None:
        super().__init__()
        self.__dict__.update(_block=block, _number=number, _recorder=recorder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the call to the recorder instead of computing anything."""
        return self.__dict__["_recorder"].handle(self.__dict__["_number"], args, kwargs)


class BlockCallRecorder:
    """Runs the model's own forward with stubs for blocks: to record the blocks' arguments, or to run head and loss."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.extras: int | None = None
        parent, _, self._attribute = skeleton.blocks_path.rpartition(".")
        self._parent = skeleton.model.get_submodule(parent)
        self._own = getattr(self._parent, self._attribute)
        self._stubs = nn.ModuleList(BlockStub(block, number, self) for number, block in enumerate(skeleton.blocks))
        self._handle: Callable[..., Tensor] = self._pass_on
        self._real: frozenset[int] = frozenset()
        self._final: Tensor | None = None
        self._first: Tensor | None = None
        self._last = len(self._stubs) - 1  # that is called

    def record(self, inputs: dict[str, Tensor]) -> tuple[Record, Tensor]:
        """Return the arguments that the model passes to each block, and the first hidden states.

        Under autograd when it is on, so that a caller can tell what depends on which parameters.

        Raises:
            Unreplayable: the model computes something between its blocks, or hands them a cache.
        """
        while True:
            try:
                return self._recorded(inputs)
            except Unreplayable:
                if self.extras == MOST_EXTRAS:
                    raise
            # Blocks of older models return tuples; how long ones, only the code that unpacks them says.
            self.extras = 0 if self.extras is None else self.extras + 1

    def logits(self, inputs: dict[str, Tensor], *, final: Tensor | None = None, real: Sequence[int] = ()) -> Tensor:
        """Return the logits [B, T, V] of the model, under autograd where it is on.

        Args:
            inputs: of the model's forward: token ids [B, T], and token types where it needs them.
            final: hidden states to put where the last block's output would be.
            real: blocks that run for real inside the model; all others pass their input on.
        """
        self._handle, self._final, self._real = self._pass_on, final, frozenset(real)
        with self._installed():
            logits: Tensor = self.skeleton.model(**inputs, use_cache=False).logits
        self._first = self._final = None
        return logits

    def outer(self, inputs: dict[str, Tensor], final: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run all but the blocks under autograd; return logits, first hidden states, and recorded tensors."""
        recorder = _Recorder(self._last, final=final)
        self._handle, self._real = recorder.note, frozenset()
        with self._installed():
            logits: Tensor = self.skeleton.model(**inputs, use_cache=False).logits
        assert self._first is not None
        first, self._first = self._first, None
        return logits, first, recorder.record.tensors

    def handle(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call of a stub: note its arguments, or pass the hidden states on."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise Unreplayable("its blocks do not take hidden states first")
        if self._first is None:
            self._first = hidden
        if number in self._real:
            return self.skeleton.blocks[number](*args, **kwargs)
        out = self._handle(number, hidden, args, kwargs)
        if self.extras is None:
            return out
        recording = self._handle != self._pass_on
        return (out, *(ExtraPlace(number) if recording else None for number in range(self.extras)))

    def _pass_on(self, number: int, hidden: Tensor, *_: Any) -> Tensor:
        return self._final if number == self._last and self._final is not None else hidden.view_as(hidden)

    def _recorded(self, inputs: dict[str, Tensor]) -> tuple[Record, Tensor]:
        recorder = _Recorder(len(self._stubs) - 1)
        self._handle, self._real, self._first = recorder.note, frozenset(), None
        try:
            with self._installed(), contextlib.suppress(_Reached):
                self.skeleton.model(**inputs, use_cache=False)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise Unreplayable(f"its forward does not run with stubs ({error})") from error
        calls = recorder.record.calls
        if self._first is None:
            raise Unreplayable("its forward calls none of its blocks")
        self._last = len(calls) - 1
        calls += [None] * (len(self._stubs) - len(calls))
        first, self._first = self._first, None
        return recorder.record, first

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        setattr(self._parent, self._attribute, self._stubs)
        try:
            yield
        finally:
            setattr(self._parent, self._attribute, self._own)


class _Recorder:
    """Notes one batch's calls. Each call gets hidden states of its own identity, which tells the calls apart."""

    def __init__(self, last: int, final: Tensor | None = None) -> None:
        self.record = Record()
        self._last = last
        self._final = final
        self._passed: list[Tensor] = []
        self._places: dict[int, tuple[Any, Any]] = {}  # id -> (object kept alive so that the id stays taken, place)
        self._hiddens = 0
        self._version = 0

    def note(self, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self.record.calls += [None] * (number - len(self.record.calls))  # skipped
        if number != len(self.record.calls):
            raise Unreplayable("its blocks are not called once each, in order")
        if self._passed and not (_same(hidden, self._passed[-1]) and hidden._version == self._version):
            raise Unreplayable("it computes something between its blocks")
        self._hiddens = 0
        packed_args = tuple(self._pack(item, hidden) for item in args)
        packed_kwargs = {key: self._pack(item, hidden) for key, item in kwargs.items()}
        if self._hiddens != 1:
            raise Unreplayable("it hands its blocks the hidden states twice")
        self.record.calls.append((packed_args, packed_kwargs))
        if number == self._last:
            if self._final is None:
                raise _Reached
            return self._final
        self._passed.append(hidden.view_as(hidden))
        self._version = hidden._version  # what is changed in place between blocks has another
        return self._passed[-1]

    def _pack(self, value: Any, hidden: Tensor) -> Any:
        """An argument with tensors and shared mappings replaced by their places in the record."""
        if value is hidden:
            self._hiddens += 1
            return HIDDEN
        if isinstance(value, Tensor):
            if any(value is passed for passed in self._passed):
                raise Unreplayable("it hands its blocks the hidden states of earlier blocks")
            return self._place(value, self.record.tensors, TensorPlace, lambda: value)
        if isinstance(value, ExtraPlace):
            return value
        if isinstance(value, MutableMapping):
            return self._place(
                value,
                self.record.mappings,
                MappingPlace,
                lambda: (type(value), {key: self._pack(item, hidden) for key, item in value.items()}),
            )
        if type(value) in (tuple, list):
            return type(value)(self._pack(item, hidden) for item in value)
        if hasattr(value, "get_seq_length"):
            raise Unreplayable("it hands its blocks a cache")
        return value

    def _place(self, value: Any, kept: list[Any], kind: type, content: Callable[[], Any]) -> Any:
        if id(value) not in self._places:
            kept.append(content())
            self._places[id(value)] = (value, kind(len(kept) - 1))
        return self._places[id(value)][1]


def _places(value: Any, kind: type[Place]) -> Iterator[Place]:
    """Yield all places of a kind in nested arguments."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        yield from _places(tuple(value.values()), kind)
    elif type(value) in (tuple, list):
        for item in value:
            yield from _places(item, kind)


def _same(value: Tensor, passed: Tensor) -> bool:
    """Return True for the same object, or a view that changes nothing (``hidden[:, 0:]``)."""
    return value is passed or (
        value.data_ptr() == passed.data_ptr() and value.shape == passed.shape and value.stride() == passed.stride()
    )
