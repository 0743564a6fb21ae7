"""Train the small GPT on the cluster, fetch it, and print what it writes: `python examples/textlm/run.py`."""

import sys
import tempfile
from pathlib import Path

import safetensors.torch

import hive

here = Path(__file__).parent
sys.path.insert(0, str(here))
from model import gpt, sample  # noqa: E402

job = hive.submit(here / "gpt.yaml")
print(f"job {job.id}: follow it with hive wait {job.id}")
job.wait()
print({key: job.metrics()[-1][key] for key in ("step", "stage", "loss", "accuracy")})

with tempfile.TemporaryDirectory() as folder:
    job.artifacts(folder)
    model = gpt()
    safetensors.torch.load_model(model, Path(folder) / "model.safetensors")
print(sample(model))
