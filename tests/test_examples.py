"""The examples as they are written: they bundle, build and train; the demo does what it promises and ends it all."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.bundle import bundle
from coordinator.jobfile import read_job
from protos.jobspec import dump

ROOT = Path(__file__).parents[1]
DIRECTORIES = [ROOT / "examples" / "bert" / "bert.yaml"]  # whose model has no Python file
EXAMPLES = [path for path in sorted(ROOT.glob("examples/*/*.yaml")) if path not in DIRECTORIES]
HIVE = [sys.executable, "-m", "coordinator.cli.main"]

BUILD = """
import sys, json, torch
sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)
import model
net = getattr(model, sys.argv[2])(**json.loads(sys.argv[3]))
shape = json.loads(sys.argv[4])
rows = torch.zeros(shape, dtype=torch.long) if sys.argv[5] == "tokens" else torch.rand(shape)
print(json.dumps(list(net(rows).shape)))
"""

TRAIN = """
import json, sys, torch
from pathlib import Path
from protos.jobspec import parse
from strategies import model_torch
from strategies.data.opening import open_splits
torch.set_num_threads(1)
plan = json.loads(sys.argv[1]); folder = Path(plan["folder"]); spec = parse(plan["spec"])
model = model_torch.build(spec.model, folder, folder / spec.model.source, 0).train()
rows = open_splits(spec.data, None, folder, loss="cross_entropy").train
optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.optimizer.lr)
losses = []
for start in range(0, 32 * 24, 32):
    batch = rows.batch(torch.arange(start, start + 32).numpy())
    logits = model(**{name: torch.from_numpy(value) for name, value in batch.features.items()}).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.target))
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
print(json.dumps([sum(p.numel() for p in model.parameters()), sum(losses[:4]) / 4, sum(losses[-4:]) / 4]))
"""


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HIVE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_bundles_and_its_model_fits_its_data(path: Path) -> None:
    spec = read_job(path)
    made = bundle(spec, path.parent)
    assert made.code is not None and [entry.path for entry in made.code.files] == ["model.py"]
    shape, kind, expected = {
        "mlp.yaml": ([2, 64], "rows", [2, 10]),
        "cnn.yaml": ([2, 1, 8, 8], "rows", [2, 10]),
        "gpt.yaml": ([2, 128], "tokens", [2, 128, 256]),
        "regression.yaml": ([2, 10], "rows", [2, 1]),
    }[path.name]
    function = spec.model.source.partition(":")[2]
    arguments = [str(path.parent), function, json.dumps(spec.model.args), json.dumps(shape), kind]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *arguments], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
def test_bert_learns_its_topics_from_its_configuration_alone() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")
    made = bundle(read_job(DIRECTORIES[0]), DIRECTORIES[0].parent)
    assert made.code is not None and [entry.path for entry in made.code.files] == ["topics.py"]
    assert made.weights is not None and [entry.path for entry in made.weights.files] == ["config.json"]
    plan = {"spec": json.loads(dump(made.spec)), "folder": str(DIRECTORIES[0].parent)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(plan)], capture_output=True, text=True, timeout=90, env=environment()
    )
    assert done.returncode == 0, done.stderr
    parameters, before, after = json.loads(done.stdout)
    assert 900_000 < parameters < 1_100_000 and after < before - 0.1


def test_the_csv_is_what_its_generator_writes(tmp_path: Path) -> None:
    code = "import generate, pathlib, sys; generate.write(pathlib.Path(sys.argv[1]))"
    folder = ROOT / "examples" / "csv"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.csv")], cwd=folder, check=True, timeout=60)
    assert filecmp.cmp(tmp_path / "x.csv", folder / "diabetes.csv", shallow=False)


def processes_with(text: str) -> list[int]:
    """Pids whose command line names a text: this test's own folder, so nobody else's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_demo_trains_prints_lines_that_load_the_model_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = subprocess.run([*HIVE, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=115, env=environment())
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(None, 2)[0:3:2] for line in done.stdout.splitlines() if line.startswith("test"))
    assert float(facts["test"]) > 0.9
    model = tmp_path / "hive-demo" / "model" / "model.safetensors"
    assert f"model          {model}" in done.stdout
    lines = done.stderr.partition("load the model with plain torch:\n")[2].splitlines()[:3]
    program = "\n".join(line.strip() for line in lines) + "\nprint(sum(p.numel() for p in model.parameters()))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, timeout=60, env=environment()
    )
    assert loaded.returncode == 0, loaded.stderr
    assert int(loaded.stdout) == 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
def test_up_runs_the_other_examples_and_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    up = subprocess.Popen(
        [*HIVE, "up", "--nodes", "2", "--port", "0", "--session-port", "0", "--home", str(tmp_path), "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert up.stdout is not None
        said = json.loads(up.stdout.readline())["up"]
        assert said["nodes"] == ["local-1", "local-2"]
        here = environment(HIVE_HOME=str(tmp_path))
        for name, changes in (
            ("csv/regression.yaml", ()),
            ("textlm/gpt.yaml", ("--set", "data.args.limit_bytes=40000")),
        ):
            done = subprocess.run(
                [*HIVE, "submit", str(ROOT / "examples" / name), "--wait", "-o", "json", *changes],
                capture_output=True,
                text=True,
                timeout=100,
                env=here,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            job = json.loads(done.stdout)["job"]
            assert job["state"] == "SUCCEEDED"
            assert {"model.safetensors", "metrics.jsonl", "report.json"} <= {each["name"] for each in job["artifacts"]}
        fetched = subprocess.run(
            [*HIVE, "artifacts", "get", job["id"], str(tmp_path / "out")], capture_output=True, text=True, env=here
        )
        assert fetched.returncode == 0, fetched.stderr
        assert (tmp_path / "out" / "report.json").is_file()
    finally:
        up.send_signal(signal.SIGINT)
        _, errors = up.communicate(timeout=60)
    assert up.returncode == 0, errors
    assert processes_with(str(tmp_path)) == []
