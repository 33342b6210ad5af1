"""Which rank finishes which parameters of a group: it gets their sums, rounds, counts and writes them."""

from collections.abc import Collection, Sequence

from fisherkit.engine.model.plan import Plan, inseparable
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.kernels.deal import deal


def owners_of(
    skeleton: Skeleton, plan: Plan, blocks: Sequence[int | None], names: Collection[str], size: int
) -> list[int]:
    """Return the rank that owns each of these parameters, of about as many weights for each.

    Parameters that make up one tensor of the checkpoint together have one owner.

    Args:
        skeleton: the model.
        plan: its targets.
        blocks: that the parameters lie in.
        names: of the parameters: those of whole parts, see parts_of.
        size: number of ranks.
    """
    atoms = [atom for atom in inseparable(skeleton, plan, blocks) if atom[0][0] in names]
    dealt = deal([weights for _, weights in atoms], size)
    owner = {name: rank for rank, own in enumerate(dealt) for number in own for name in atoms[number][0]}
    return [owner[name] for name in names]
