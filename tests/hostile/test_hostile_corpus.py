"""The whole hostile corpus through the real `identify` path: nothing runs, nothing hangs, nothing fills the memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_pickles import payloads
from make_corpus import CANARY, make

from coordinator.identify.child import MEMORY_BYTES
from coordinator.identify.confine import DEADLINE_S

ROOT = Path(__file__).parents[2]
PROFILES = ("dir-code", "dir-code-inside", "dir-attention", "dir-quantised", "dir-pickled", "text-with-coding")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_gets_a_typed_refusal_or_a_profile_and_none_is_run(tmp_path: Path) -> None:
    paths = make(tmp_path)
    program = [sys.executable, str(Path(__file__).parent / "identify_corpus.py"), str(tmp_path / "corpus")]
    done = subprocess.run(program, capture_output=True, check=False, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    answer = json.loads(done.stdout)
    outcomes = {outcome["name"]: outcome for outcome in answer["outcomes"]}
    assert set(outcomes) == {path.name for path in paths}
    assert not (tmp_path / CANARY).exists()
    assert answer["peak_bytes"] <= MEMORY_BYTES
    for name, outcome in outcomes.items():
        assert outcome["seconds"] < DEADLINE_S, name
        if "code" in outcome:
            assert outcome["code"] == "model_unusable", name
            assert outcome["message"] and outcome["message"].isprintable(), name
        else:
            assert outcome["format"] not in ("pytorch_state_dict", "pytorch_checkpoint", "safetensors"), name
    for name in PROFILES:
        assert "format" in outcomes[name], outcomes[name]
    assert not any(outcomes[name]["trainable"] for name in PROFILES[:4])
    assert not any("without an answer" in outcome.get("message", "") for outcome in outcomes.values())


def test_the_payloads_would_fire(tmp_path: Path) -> None:
    """What the corpus proves nothing without: loaded, the same bytes do run."""
    for name in ("protocol0", "protocol2", "protocol4", "stack_global", "inst", "obj"):
        canary = tmp_path / name
        pickle.loads(payloads(canary)[name])  # noqa: S301
        assert canary.exists(), name
