"""What rules out every plan over several nodes, whatever the strategy, and the groups of nodes that are left."""

from __future__ import annotations

from strategies.base import Inputs
from strategies.links import Apart, TrustedGroup, joined_by_quick_links, ranks_of, trusted_groups

REACH = "can connect to each other"
NOBODY: Apart = {}
_NAMED = 3


def groups(inputs: Inputs) -> list[TrustedGroup]:
    """Nodes of one trusted network, enough of them, and one that holds the newest state among them."""
    holding = inputs.holding
    return [
        group
        for group in trusted_groups(inputs.eligible, inputs.cluster.apart)
        if len(group.nodes) >= inputs.spec.nodes.min
        and (not holding or any(node.node_id in holding for node in group.nodes))
    ]


def close_groups(inputs: Inputs) -> list[TrustedGroup]:
    """The groups, and in each the nodes that are joined by quick links: one collective is as slow as its slowest link,
    so a quick node behind a slow one would hold up all others."""
    holding = inputs.holding
    return [
        TrustedGroup(group.network, members)
        for group in groups(inputs)
        for members in joined_by_quick_links(inputs.cluster, group.nodes)
        if len(members) >= inputs.spec.nodes.min
        and sum(map(ranks_of, members)) > 1
        and (not holding or any(node.node_id in holding for node in members))
    ]


def group_reasons(inputs: Inputs) -> tuple[str, ...]:
    """One clause; empty when there is a group to look at."""
    nodes, eligible = inputs.spec.nodes, inputs.eligible
    if not inputs.profile.trainable:
        return (inputs.profile.why_not or "the model cannot be trained",)
    if nodes.max < 2:
        return ("nodes.max is 1",)
    if len(eligible) < nodes.min or sum(map(ranks_of, eligible)) < 2:
        others = f" ({', '.join(inputs.excluded)})" if inputs.excluded else ""
        return (f"needs {max(2, nodes.min)} usable nodes, there {_are(len(eligible))}{others}",)
    if groups(inputs):
        return ()
    wanted = "two" if nodes.min <= 2 else str(nodes.min)
    if not any(len(group.nodes) >= nodes.min for group in trusted_groups(eligible)):
        return (
            f"no {wanted} of the {len(eligible)} usable nodes share a trusted network: start the nodes of one LAN with "
            "`hive-node start --trusted-lan IFACE|CIDR`",
        )
    if not any(len(group.nodes) >= nodes.min for group in trusted_groups(eligible, inputs.cluster.apart)):
        return (f"no {wanted} of the {len(eligible)} usable nodes {REACH}: {_said(_why_apart(inputs))}",)
    return ("no trusted network reaches a node that has the newest state of the job",)


def left_out(inputs: Inputs) -> tuple[str, ...]:
    """One clause on the eligible nodes that are in no group because others cannot connect to them."""
    if not inputs.cluster.apart:
        return ()
    eligible = inputs.eligible
    joined, wanted = (
        {node.node_id for group in trusted_groups(eligible, apart) for node in group.nodes}
        for apart in (inputs.cluster.apart, NOBODY)
    )
    names = [node.name for node in eligible if node.node_id in wanted - joined]
    return (f"without {', '.join(names)}: {_said(_why_apart(inputs))}",) if names else ()


def _why_apart(inputs: Inputs) -> tuple[str, ...]:
    ids = {node.node_id for node in inputs.eligible}
    return tuple(dict.fromkeys(why for pair, why in inputs.cluster.apart.items() if ids.issuperset(pair)))


def _said(reasons: tuple[str, ...]) -> str:
    more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return "; ".join(reasons[:_NAMED]) + more


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count or 'none'}"
