"""Why nobody works now, in words; and errors that carry the lines behind them."""

from __future__ import annotations

import pytest

from coordinator.cluster import JOIN_HINT, nobody
from coordinator.control.state import NodeStatus
from protos.errors import ErrorCode, SpecError, from_document
from protos.ids import NodeId
from protos.states import Activity, Eligibility, NodeLink


def node(name: str, link: NodeLink = NodeLink.CONNECTED, **values: object) -> NodeStatus:
    return NodeStatus(NodeId(name), name, link, **values)  # type: ignore[arg-type]


def test_without_members_the_hint_is_to_start_one() -> None:
    assert nobody([]) == ("no node has joined", JOIN_HINT)
    assert nobody([node("old", NodeLink.LEFT)]) == ("no node has joined", JOIN_HINT)


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (node("a", activity=Activity.PAUSED, reason="measuring how fast this machine is"), "a is measuring how fast"),
        (node("a", activity=Activity.PAUSED), "a is paused"),
        (node("a", eligibility=Eligibility.CORDONED), "a is cordoned"),
        (node("a", NodeLink.LOST, reason="not heard for 9 s"), "a is lost"),
    ],
)
def test_what_each_member_does_instead_is_said(member: NodeStatus, said: str) -> None:
    sentence, hint = nobody([member])
    assert sentence.startswith(f"no node takes work yet: {said}")
    assert "hive nodes" in hint


def test_only_a_few_are_named() -> None:
    sentence, _ = nobody([node(name, activity=Activity.PAUSED) for name in "abcde"])
    assert sentence.endswith("a is paused, b is paused, c is paused and 2 more")


def test_an_error_keeps_its_details_across_the_wire() -> None:
    error = SpecError("it broke", "mend it", code=ErrorCode.MODEL_UNUSABLE, details=("Traceback", "  line"))
    again = from_document(error.document())
    assert isinstance(again, SpecError)
    assert (again.message, again.hint, again.code, again.details) == (
        "it broke", "mend it", ErrorCode.MODEL_UNUSABLE, ("Traceback", "  line")
    )  # fmt: skip
    assert "details" not in SpecError("plain").document()
