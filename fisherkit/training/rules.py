"""Rules for one parameter: remembered before a step, enforced after it.

A rule knows its parameter and nothing of optimizers, models or files. ``remember`` returns what ``enforce`` needs to
undo the part of the update that is not allowed; ``on_gradient`` is what the papers do instead, before the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fisherkit.training.mask_input import Basis, Pull
from fisherkit.training.shards import flags_like, is_sharded, local, put, replicated_like, share_bytes

Rows = tuple[int, int, int] | None
"""Expert, first row and the row after the last of a part of a fused parameter; None for the whole of any parameter."""


class Rule(ABC):
    """Constraint on the updates of ``parameter``."""

    pace: float | None = None
    """Learning rate of the coming step as a share of its peak, said before it; None for a rule that does not ask."""

    is_anchored_here = False
    """True for a rule that goes back to the weight as it was when the rule was made."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @property
    def nbytes(self) -> int:
        """Bytes that are remembered from before a step to after it.

        Of a spread parameter as many in every process: what it decides has to be the same where enforcing is a
        collective, and one that holds no part of a parameter takes part all the same.
        """
        return share_bytes(self.parameter)

    @abstractmethod
    def remember(self) -> Tensor:
        """Return the parameter before the step, as far as it is needed after it."""

    @abstractmethod
    def enforce(self, before: Tensor) -> None:
        """Take back what the step must not have done."""

    @abstractmethod
    def on_gradient(self, gradient: Tensor) -> None:
        """Apply the rule to the gradient instead, which does not hold under every optimizer."""


def freeze(parameter: nn.Parameter, flags: Tensor) -> Rule | None:
    """Keep the bits of entries whose flag is False; None where there are none.

    Args:
        parameter: of any shape and dtype.
        flags: bool, broadcastable to it.
    """
    return None if bool(flags.all()) else _Freeze(parameter, flags)


def scale(parameter: nn.Parameter, factor: float) -> Rule | None:
    """Multiply updates by ``factor``, in float32 and rounded once; None where that is 1."""
    return None if factor == 1 else _Scale(parameter, factor)


def project(parameter: nn.Parameter, parts: Sequence[tuple[Rows, Basis]]) -> Rule:
    """Keep the update of a matrix, or of each expert in a parameter, out of the directions of its basis."""
    return _Project(parameter, parts)


def pull(parameter: nn.Parameter, parts: Sequence[tuple[Rows, Pull, Tensor | None]]) -> Rule:
    """Draw a matrix (or each expert in a parameter) back to where it began, in the directions of a pull.

    With D the change so far, every step ends with D q_j / (1 + p s_j) in place of D q_j, p being the pace; see
    kernels.pull. Nothing is remembered but where it began: W q_j, float32 [k, n] or [n, k] per matrix.

    Args:
        parameter: the weight, or a LoRA factor whose own directions are meant.
        parts: rows (see Rows), the pull, and the weight that it is drawn back to; None for the one that is there now.
    """
    return _Pull(parameter, parts)


def span(factor: nn.Parameter, basis: Tensor, over: int) -> Rule:
    """Keep a LoRA factor itself, not its update, out of the directions of a basis; it is projected now, too.

    Args:
        factor: B [out, r] or A [r, in].
        basis: orthonormal columns over the axis ``over`` of the factor.
        over: 0 or 1.
    """
    rule = _Span(factor, basis, over)
    with torch.no_grad():
        rule.enforce(rule.remember())
    return rule


class _Freeze(Rule):
    """Frozen entries; of whole rows only those are remembered, by number, the whole parameter otherwise."""

    def __init__(self, parameter: nn.Parameter, flags: Tensor) -> None:
        super().__init__(parameter)
        self._flags = flags_like(flags, parameter)
        shape = tuple(self._flags.shape)
        here = local(parameter)
        by_rows = len(shape) > 1 and shape[-1] == 1 and shape[:-1] == tuple(here.shape[:-1]) and here.is_contiguous()
        self._frozen = (~self._flags).reshape(-1).nonzero()[:, 0] if by_rows else None

    @property
    def nbytes(self) -> int:
        whole = share_bytes(self.parameter)
        if self._frozen is None or is_sharded(self.parameter):
            return whole
        return whole // max(self._flags.numel(), 1) * self._frozen.numel()

    def remember(self) -> Tensor:
        here = local(self.parameter.detach())
        return here.clone() if self._frozen is None else here.flatten(0, -2).index_select(0, self._frozen)

    def enforce(self, before: Tensor) -> None:
        here = local(self.parameter.detach())
        if self._frozen is None:
            torch.where(self._flags, here, before, out=here)
        else:
            here.flatten(0, -2).index_copy_(0, self._frozen, before)

    def on_gradient(self, gradient: Tensor) -> None:
        local(gradient).mul_(self._flags)


def _residual(parameter: nn.Parameter) -> Tensor | None:
    """Return room for what rounding to 16 bits keeps from a parameter, carried to the next step; None for float32.

    Without it the part of an update that a rule takes away, far below the spacing of bfloat16, would round back. It has
    the parameter's own type: in float32 it would carry 40 times more exactly, and what is saved would leak the same,
    since the weights at rest are rounded all the same (measured: benchmarks/training.py --only bfloat16).
    """
    return torch.zeros_like(parameter.detach()) if parameter.element_size() < 4 else None


def _settle(after: Tensor, exact: Tensor, residual: Tensor | None) -> None:
    """Put ``exact`` (float32) and the residual into ``after``, and what rounding keeps from it into the residual."""
    if residual is None:
        put(after, exact)
        return
    exact = exact + residual.float()
    put(after, exact)
    put(residual, exact - after.float())


class _Scale(Rule):
    def __init__(self, parameter: nn.Parameter, factor: float) -> None:
        super().__init__(parameter)
        self._factor = factor
        self._residual = _residual(parameter)

    def remember(self) -> Tensor:
        return local(self.parameter.detach()).clone()

    def enforce(self, before: Tensor) -> None:
        here = local(self.parameter.detach())
        exact = before.float() + self._factor * (here.float() - before.float())
        _settle(here, exact, None if self._residual is None else local(self._residual))

    def on_gradient(self, gradient: Tensor) -> None:
        gradient.mul_(self._factor)


class _Project(Rule):
    """Rounding puts a little of every update back: in float32 the next step takes that out, see also _residual."""

    def __init__(self, parameter: nn.Parameter, parts: Sequence[tuple[Rows, Basis]]) -> None:
        super().__init__(parameter)
        self._parts = [
            (rows, Basis(*(None if side is None else replicated_like(side, parameter) for side in basis)))
            for rows, basis in parts
        ]
        self._leaks: list[Basis | None] = [None] * len(parts)
        self._residual = _residual(parameter)

    def remember(self) -> Tensor:
        return self.parameter.detach().clone()

    def enforce(self, before: Tensor) -> None:
        for number, (rows, basis) in enumerate(self._parts):
            after, old = _part(self.parameter.detach(), rows), _part(before, rows).float()
            leak = self._leaks[number]
            residual = None if self._residual is None else _part(self._residual, rows)
            _settle(after, old + _outside(after.float() - old, basis, leak), residual)
            if residual is None:
                self._leaks[number] = _leaked(after.float() - old, basis, leak)

    def on_gradient(self, gradient: Tensor) -> None:
        for rows, basis in self._parts:
            part = _part(gradient, rows)
            put(part, _outside(part.float(), basis))


class _Pull(Rule):
    nbytes = 0
    pace = 1.0

    def __init__(self, parameter: nn.Parameter, parts: Sequence[tuple[Rows, Pull, Tensor | None]]) -> None:
        super().__init__(parameter)
        self._residual = _residual(parameter)
        self.is_anchored_here = any(start is None for _, _, start in parts)
        self._parts = []
        for rows, (directions, strengths, axis), start in parts:
            q, s = replicated_like(directions, parameter), replicated_like(strengths, parameter)
            weight = _part(parameter.detach(), rows) if start is None else replicated_like(start, parameter)
            self._parts.append((rows, q, s, axis, _turned(weight.float(), axis) @ q))

    def remember(self) -> Tensor:
        return self.parameter.new_empty(0)

    def enforce(self, before: Tensor) -> None:
        for rows, q, s, axis, start in self._parts:
            here = _part(self.parameter.detach(), rows)
            residual = None if self._residual is None else _part(self._residual, rows)
            whole = here.float() if residual is None else here.float() + residual.float()
            moved = _turned(whole, axis) @ q - start
            share = (s * self.pace) / (1 + s * self.pace)
            _settle(here, here.float() - _turned((moved * share) @ q.mT, axis), residual)
        self.pace = 0.0  # said anew before every step; where a step calls that of its base class, it is pulled once

    def on_gradient(self, gradient: Tensor) -> None:
        for rows, q, s, axis, _ in self._parts:
            part = _part(gradient, rows)
            inside = _turned(part.float(), axis) @ q
            put(part, part - _turned((inside * (s / (1 + s))) @ q.mT, axis).to(part.dtype))


def _turned(weight: Tensor, axis: int) -> Tensor:
    """Return a matrix with the directions' axis last."""
    return weight if axis == 1 else weight.mT


class _Span(Rule):
    nbytes = 0

    def __init__(self, factor: nn.Parameter, basis: Tensor, over: int) -> None:
        super().__init__(factor)
        basis = replicated_like(basis, factor)
        self._basis = Basis(basis, None) if over == 0 else Basis(None, basis)

    def remember(self) -> Tensor:
        return self.parameter.new_empty(0)

    def enforce(self, before: Tensor) -> None:
        factor = self.parameter.detach()
        put(factor, _outside(factor.float(), self._basis))

    def on_gradient(self, gradient: Tensor) -> None:
        put(gradient, _outside(gradient.float(), self._basis))


def _part(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[rows[0], rows[1] : rows[2]]


def _outside(update: Tensor, basis: Basis, leak: Basis | None = None) -> Tensor:
    """Return what of an update [..., a, b] lies outside of a basis, less what earlier updates leaked into it.

    With U^T D = left and D V = right for all updates so far, D, what is returned brings both to zero: they agree on
    what lies in both (U^T right = left V), so the second product does not undo the first.
    """
    u, v = basis
    left, right = leak or (None, None)
    if u is not None:
        inside = u.mT @ update
        update = update - u @ (inside if left is None else inside + left)
    if v is not None:
        inside = update @ v
        update = update - (inside if right is None else inside + right) @ v.mT
    return update


def _leaked(update: Tensor, basis: Basis, leak: Basis | None) -> Basis:
    """Return what all updates so far have in the directions of a basis: U^T D [..., k, b] and D V [..., a, k]."""
    (u, v), (left, right) = basis, leak or (None, None)
    if u is not None:
        left = u.mT @ update if left is None else left + u.mT @ update
    if v is not None:
        right = update @ v if right is None else right + update @ v
    return Basis(left, right)
