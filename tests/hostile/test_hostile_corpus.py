"""The whole hostile corpus through the real `identify` path: nothing runs, nothing hangs, nothing fills the memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_pickles import CONTAINERS, payloads
from make_corpus import CANARY, make

from coordinator.identify.confine import DEADLINE_S

ROOT = Path(__file__).parents[2]
REFUSED = "model_unusable"
CHILD_BYTES = 384 * 1024**2  # measured: 321 MiB, as docs/benchmarks.md says, so well below the limit that ends a child
GROWN_BYTES = 32 * 1024**2  # of the program that asks, measured: 6 MiB
PROFILES = {  # what is named all the same, by (format, trainable): nothing in it would run, or it is not looked into
    "dir-code": ("hugging_face", False),  # remote code: what is stored is counted, training it is refused
    "dir-code-inside": ("hugging_face", False),
    "dir-attention": ("hugging_face", False),
    "dir-quantised": ("hugging_face", False),
    "dir-adapter": ("hugging_face_adapter", False),
    "dir-pickled": ("hugging_face", True),  # from its configuration: the pickle beside it is never opened
    "hdf5-hard-link-loop": ("hdf5", False),
    "pickle-bare-build": ("pickle", False),  # of dictionaries alone
    "pickle-bare-persistent_id": ("unknown", False),  # a word that nobody asked for
    "pickle-torch_zip-persistent_id": ("pickled_module", False),
    "pickle-deep": ("pickle", False),
    "pickle-laughs": ("pickle", False),
    "pickle-memo": ("pickle", False),
    "pickle-shared-mappings-bare": ("pickle", False),
    "text-with-coding": ("python_source", False),
    "tflite-garbage": ("tflite", False),
    **dict.fromkeys(("zip-end-only", "zip-many-names", "zip-overlapping", "zip-parents"), ("zip", False)),
    **dict.fromkeys(
        ("json-long-number", "one-byte", "python-deep", "sparse-zeros", "utf16", "zlib-bomb"), ("unknown", False)
    ),
}


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
    assert answer["child_bytes"] <= CHILD_BYTES and answer["grown_bytes"] <= GROWN_BYTES
    for name, outcome in outcomes.items():
        assert outcome["seconds"] < DEADLINE_S, name
        if "code" in outcome:
            assert outcome["message"] and outcome["message"].isprintable(), name
            assert "without an answer" not in outcome["message"], name
    found = {
        name: outcome["code"] if "code" in outcome else (outcome["format"], outcome["trainable"])
        for name, outcome in outcomes.items()
    }
    assert found == dict.fromkeys(found, REFUSED) | PROFILES
    payloads_named = [
        name for name in found if name.startswith("pickle-") and "names " in outcomes[name].get("message", "")
    ]
    packed = [container for container in CONTAINERS if container.startswith("joblib_")]
    for container in ("bare", "torch_zip", "torch_legacy", "torchscript", "pt2", "sklearn", *packed):
        assert {f"pickle-{container}-protocol{protocol}" for protocol in range(6)} <= set(payloads_named), container


def test_the_payloads_would_fire(tmp_path: Path) -> None:
    """What the corpus proves nothing without: loaded, the same bytes do run."""
    for name in ("protocol0", "protocol2", "protocol4", "stack_global", "inst", "obj"):
        canary = tmp_path / name
        pickle.loads(payloads(canary)[name])  # noqa: S301
        assert canary.exists(), name
