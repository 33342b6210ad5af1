"""Which rank finishes which parameters of a group: it gets their sums, rounds, counts and writes them."""

from collections.abc import Mapping

from torch import Tensor

from fisherkit.engine.model.plan import Plan
from fisherkit.kernels.deal import deal


def owners_of(plan: Plan, sums: Mapping[str, Tensor], size: int) -> list[int]:
    """Return the rank that owns each of these parameters, of about as many weights for each.

    Parameters that make up one tensor of the checkpoint together have one owner.

    Args:
        plan: targets.
        sums: by parameter.
        size: number of ranks.
    """
    first: dict[str, str] = {}  # tensor -> a parameter that it is made of
    leader = {name: name for name in sums}
    for own in plan.targets.values():
        for name in [name for name in own if name in sums]:
            for tensor in own[name]:
                other = leader[first.setdefault(tensor.name, name)]
                leader = {one: other if led == leader[name] else led for one, led in leader.items()}
    leaders = list(dict.fromkeys(leader.values()))
    sizes = [sum(sums[name].numel() for name in sums if leader[name] == one) for one in leaders]
    owner = {leaders[number]: rank for rank, numbers in enumerate(deal(sizes, size)) for number in numbers}
    return [owner[leader[name]] for name in sums]
