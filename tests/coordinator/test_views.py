"""Records as documents: what every reader takes, also of what another version wrote."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coordinator import views
from coordinator.records import Attempt, Job, TokenRecord
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, JobState, Reason

RECORD = Job(
    JobId("j-1"), "digits", "me (c-1)", JobState.RUNNING, Reason.TRAINING, b'{"model": {"source": "m.py:f"}}', 1.0, 1.0
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_whatever_is_shown_is_strict_json_and_only_what_is_no_number_is_changed(content: object) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(views.plain_json(content), parse_constant=refuse)
    assert read == _without_nonsense(content)


def _without_nonsense(content: object) -> object:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, list):
        return [_without_nonsense(each) for each in content]
    if isinstance(content, dict):
        return {key: _without_nonsense(value) for key, value in content.items()}
    return content


def test_a_job_shows_its_progress_while_it_runs_and_its_result_afterwards() -> None:
    running = replace(RECORD, started_s=10.0, plan_json=b'{"subtasks": [{"node_id": "n-1"}, {"node_id": "n-1"}]}')
    progress = {"loss": 0.5, "steps_total": 100, "epoch": 2, "samples_per_s": None}
    shown = views.job(running, {"n-1": "box"}, progress, 25.0, 7)
    assert (shown["seconds"], shown["metrics"], shown["steps_total"]) == (15.0, {"loss": 0.5}, 100)
    assert (shown["nodes"], shown["seq"], shown["message"]) == (["box"], 7, "training")
    result = {"metrics": {"accuracy": 0.97}, "artifacts": [{"name": "report.json"}], "last_lines": ["Traceback"]}
    ended = replace(
        running, state=JobState.SUCCEEDED, finished_s=30.0, result_json=json.dumps(result).encode(), message="finished"
    )
    shown = views.job(ended, {}, None, 1e9, 8)
    assert (shown["seconds"], shown["metrics"], shown["nodes"]) == (20.0, {"accuracy": 0.97}, ["n-1"])
    assert shown["artifacts"] == [{"name": "report.json"}] and shown["last_lines"] == ["Traceback"]


def test_a_record_that_says_little_is_shown_all_the_same() -> None:
    shown = views.job(replace(RECORD, spec_json=b"{}"), {}, None, 5.0, 0)
    assert (shown["seconds"], shown["strategy"], shown["nodes"], shown["model"]["source"]) == (None, "", [], "")
    row = Attempt(JobId("j-1"), Fence(1), 0, NodeId("n-1"), AttemptState.LOST, 1.0, 1.0)
    assert views.attempts([row], {"n-1": "box"}) == [
        {"fence": 1, "rank": 0, "node": "box", "state": "LOST", "outcome": None}
    ]


def test_a_token_is_shown_without_its_secret() -> None:
    shown = views.token(TokenRecord("t-1", "hash of the secret", "node", None, 5.0, 1.0))
    assert "hash" not in json.dumps(shown) and shown["id"] == "t-1"
