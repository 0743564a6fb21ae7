"""Every configuration type of transformers that an AutoModel class builds, identified as a node does it.

    python -m bench.identify_transformers                 all types, about a quarter of an hour on two cores
    python -m bench.identify_transformers --only bert,t5
    python -m bench.identify_transformers --json result.json

Each type's default configuration is made small where that is possible (fewer layers), saved as a directory without
weights, and identified by strategies/profile_model_torch.py. Beside it the same configuration is built by AutoModel on
the meta device and counted anew: parameters, and which modules hold how many. Families are compared with FAMILIES,
which is written by hand from the papers: what is not in it is a transformer. The exit code is 1 when a type that was
built differs, and when of all types fewer than LEAST_COMPARED could be built.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from protos.ids import Fence, JobId
from protos.jobspec import DataSpec, JobSpec, ModelSpec
from protos.model import Family, ModelProfile
from protos.work import Task, TaskKind
from strategies.context import TaskContext, Workspace
from strategies.data.source import MODEL_ALONE
from strategies.profile_model_torch import describe_model

TYPE_LIMIT_S = 60  # for building it, in both ways, and identifying it
LEAST_COMPARED = 300
LAYER_FIELDS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth", "vision_layers", "text_layers", "num_blocks",
)  # fmt: skip
SMALL_LAYERS = 2
# few of many layers attend, at fixed places, which a cut would miss
AS_THEY_ARE = (
    "jamba",
    "nemotron_h",
    "recurrent_gemma",
    "zamba",
    "zamba2",
)
_CNN = """
    bit convnext convnextv2 dac dinov3_convnext efficientnet encodec focalnet glm_image_vqmodel hgnet_v2 mobilenet_v1
    mobilenet_v2 muse_spark_audio poolformer pp_lcnet pp_lcnet_v3 pp_lcnet_v4 pp_ocrv5_mobile_det pp_ocrv5_mobile_rec
    pp_ocrv5_server_det pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec
    regnet resnet rt_detr_resnet superpoint textnet univnet upernet uvdoc uvdoc_backbone vibevoice_acoustic_tokenizer
    vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder
"""
_RNN = "falcon_mamba granitemoehybrid mamba mamba2 rwkv xlstm"  # of granitemoehybrid the default has no attention
FAMILIES = (
    dict.fromkeys(_CNN.split(), Family.CNN) | dict.fromkeys(_RNN.split(), Family.RNN) | {"patchtsmixer": Family.MLP}
)


@dataclass
class Result:
    model_type: str
    architecture: str = ""
    parameters: int = 0
    expected: int = 0
    family: str = ""
    expected_family: str = ""
    layers: int = 0
    problem: str = ""  # of what differs
    skipped: str = ""  # why it could not be built, here or there
    seconds: float = 0.0


def auto_mappings() -> dict[str, Any]:
    """Model type -> the first mapping of an AutoModel class that has it, AutoModel's own before others."""
    names = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING")]
    names.sort(key=lambda name: (name != "MODEL_MAPPING", name))
    found: dict[str, Any] = {}
    for name in names:
        mapping = getattr(modeling_auto, name)
        for model_type in mapping._model_mapping:
            found.setdefault(model_type, mapping)
    return found


def small(config: Any) -> Any:
    """The same configuration with few layers, one of each kind at least; also of the configurations inside."""
    kinds = getattr(config, "layer_types", None)
    kinds = kinds if isinstance(kinds, list) else []
    few = max([SMALL_LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))])
    for field in LAYER_FIELDS:
        value = getattr(config, field, None)
        if type(value) is int and value > few:
            with contextlib.suppress(Exception):
                setattr(config, field, few)
    if len(kinds) > few:
        with contextlib.suppress(Exception):
            config.layer_types = kinds[:few]
    for inner in vars(config).values():
        if isinstance(inner, transformers.PretrainedConfig):
            small(inner)
    return config


def on_meta(config: Any, architecture: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = architecture._from_config(config)
    return model


def counted(model: nn.Module) -> dict[str, int]:
    """Parameters by the module that holds them; a shared one at its first holder."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        own = [value for value in module._parameters.values() if value is not None and id(value) not in seen]
        seen.update(map(id, own))
        if total := sum(value.numel() for value in own):
            found[name or "model"] = total
    return found


def identified(directory: Path) -> ModelProfile:
    spec = JobSpec(model=ModelSpec(source=directory.name, weights="none"), data=DataSpec(source=MODEL_ALONE))
    task = Task(TaskKind.IDENTIFY, JobId("sweep"), Fence(0), 0, 1, "single_node", spec, (1,))
    workspace = Workspace(None, None, None, directory, directory, directory)
    context = TaskContext(task, workspace, None, "", 1, "cpu", "bench")  # type: ignore[arg-type]
    return describe_model(context).profile


def examined(model_type: str, mapping: Any, folder: Path) -> Result:
    result = Result(model_type, expected_family=FAMILIES.get(model_type, Family.TRANSFORMER).value)
    try:
        kind = CONFIG_MAPPING[model_type]
        architecture = mapping[kind]
        architecture = architecture[0] if isinstance(architecture, (tuple, list)) else architecture
        result.architecture = architecture.__name__
        config, model = _buildable(kind, architecture)
    except Exception as error:
        result.skipped = f"transformers does not build its default: {_line(error)}"
        return result
    expected = counted(model)
    result.expected = sum(expected.values())
    config.architectures = [architecture.__name__]
    directory = folder / model_type
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    try:
        profile = identified(directory)
    except Exception as error:
        result.problem = f"not identified: {_line(error)}"
        return result
    result.parameters, result.family, result.layers = profile.parameters, profile.family.value, len(profile.layers)
    result.problem = difference(profile, expected, result)
    return result


def _buildable(kind: Any, architecture: Any) -> tuple[Any, nn.Module]:
    """The small configuration, or the default one where the small one does not fit together; and its model."""
    try:
        config = kind()
        config = kind.from_dict((config if config.model_type in AS_THEY_ARE else small(config)).to_dict())
        return config, on_meta(config, architecture)
    except Exception:
        config = kind.from_dict(kind().to_dict())
        return config, on_meta(config, architecture)


def difference(profile: ModelProfile, expected: dict[str, int], result: Result) -> str:
    if profile.parameters != result.expected:
        return f"{profile.parameters:,} parameters, not {result.expected:,}"
    if sum(layer.parameters for layer in profile.layers) != result.expected:
        return "the layers' parameters do not add up"
    single = {layer.name: layer.parameters for layer in profile.layers if ".." not in layer.name}
    strange = [name for name, count in single.items() if count and not _holds(name, count, expected)]
    if strange:
        return f"layer {strange[0]} holds {single[strange[0]]:,} parameters, which no module does"
    return f"family {result.family}" if result.family != result.expected_family else ""


def _holds(name: str, count: int, expected: dict[str, int]) -> bool:
    """Whether a module of that name has so many, its own or with those of modules in it that never ran themselves."""
    inside = sum(own for other, own in expected.items() if name == "model" or f"{other}.".startswith(f"{name}."))
    return expected.get(name, 0) <= count <= inside


def _line(error: BaseException) -> str:
    cause = error.__cause__ or error
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {first}"[:160]


class OutOfTime(BaseException):
    """No Exception: what transformers raises is caught while a model is built, this must not be."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise OutOfTime(f"over {seconds} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    mappings = auto_mappings()
    wanted = options.only.split(",") if options.only else sorted(mappings)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model_type in wanted:
            started = time.monotonic()
            try:
                with at_most(TYPE_LIMIT_S):
                    result = examined(model_type, mappings[model_type], Path(folder))
            except OutOfTime as error:
                result = Result(model_type, problem=str(error))
            result.seconds = time.monotonic() - started
            results.append(result)
            sys.stderr.write(f"{result.seconds:6.1f} s  {model_type}  {result.problem or result.skipped}\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return report(results, at_least=0 if options.only else LEAST_COMPARED)


def report(results: list[Result], at_least: int = 0) -> int:
    """Prints what differs; 1 when something does, or when fewer than `at_least` types could be compared."""
    built = [result for result in results if not result.skipped]
    differing = [result for result in built if result.problem]
    print(f"types tried {len(results)}, built by transformers {len(built)}, exact {len(built) - len(differing)}")
    for result in differing:
        print(f"  differs  {result.model_type} ({result.architecture}): {result.problem}")
    for result in results:
        if result.skipped:
            print(f"  skipped  {result.model_type} ({result.architecture}): {result.skipped}")
    if len(built) < at_least:
        print(f"only {len(built)} types were compared, at least {at_least} are needed")
    return 1 if differing or len(built) < at_least else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.exit(130)
