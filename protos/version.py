"""Software and protocol versions, and who must upgrade when two sides differ."""

from __future__ import annotations

from dataclasses import dataclass

SOFTWARE = "0.1.0"
PROTOCOL = 1
MINIMUM_PROTOCOL = 1
SCHEMA = "hive/v1"


@dataclass(frozen=True, slots=True)
class Agreement:
    """`protocol` to speak, or None with the sentence that says which side to upgrade."""

    protocol: int | None
    reason: str


def negotiate(
    peer: str,
    peer_protocol: int,
    peer_minimum: int,
    ours: int = PROTOCOL,
    our_minimum: int = MINIMUM_PROTOCOL,
) -> Agreement:
    """The highest protocol both sides speak. `peer` names the other side in the sentence ("node lab-3", "the CLI")."""
    highest = min(peer_protocol, ours)
    if peer_protocol < our_minimum:
        return Agreement(
            None,
            f"{peer} speaks protocol {peer_protocol}, this coordinator needs at least {our_minimum}: "
            f"upgrade hive on {peer}",
        )
    if ours < peer_minimum:
        return Agreement(
            None,
            f"{peer} needs protocol {peer_minimum} or newer, this coordinator speaks {ours}: "
            "upgrade hive on the coordinator",
        )
    return Agreement(highest, f"protocol {highest}")
