"""The plan that fits the memory there is: smaller groups first, then no reading ahead, then targets in parts."""

from dataclasses import replace

from fisherkit.engine.model.build import blocks_in_groups
from fisherkit.engine.model.needs import Estimate, Rooms
from fisherkit.engine.model.plan import Plan, inseparable
from fisherkit.engine.model.skeleton import Skeleton


def fit_plan(estimate: Estimate, skeleton: Skeleton, plan: Plan, group_size: int, rooms: Rooms) -> Plan:
    """Return the first plan whose needs fit; where none does, the one that needs least.

    Smaller groups come first, then no reading ahead, then a block's targets in parts.

    Args:
        estimate: of the model.
        skeleton: the model.
        plan: its targets.
        group_size: blocks of a group, at most.
        rooms: bytes that there are.
    """
    count = len(skeleton.blocks)
    for size in range(min(group_size, count), 0, -1):
        plan = replace(plan, groups=blocks_in_groups(count, size))
        if rooms.hold(estimate.needs(plan)):
            return plan
    return divide(estimate, skeleton, replace(plan, read_ahead=False), rooms)


def divide(estimate: Estimate, skeleton: Skeleton, plan: Plan, rooms: Rooms) -> Plan:
    """Return the plan with the fewest parts of each group's targets that fit; the most where none do.

    Args:
        estimate: of the model.
        skeleton: the model.
        plan: its groups stay.
        rooms: bytes that there are.
    """
    if rooms.hold(estimate.needs(plan)):
        return plan
    atoms = [size for group in plan.groups for _, size in inseparable(skeleton, plan, group)]
    whole = max(sum(size for _, size in inseparable(skeleton, plan, group)) for group in plan.groups)
    smallest = max(atoms, default=0)
    for count in range(2, max(2, -(-whole // max(smallest, 1))) + 1):
        most = max(smallest, -(-whole // count))
        plan = replace(plan, sums_at_once=most)
        if most == smallest or rooms.hold(estimate.needs(plan)):
            break
    return plan
