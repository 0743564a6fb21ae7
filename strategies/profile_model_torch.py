"""The identify task of a model alone, without data: what `hive models identify` asks a node.

Owns the guess of an input where the model itself says what it takes: a Hugging Face configuration, an exported program.
A model that runs on it has FLOPs and activations of every layer; of any other the layers and parameters are exact and
the rest is listed as unknown. Nothing is allocated: parameters and inputs are fake tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from protos.errors import ErrorCode, HiveError, SpecError
from protos.jobspec import entry_point
from protos.model import LayerProfile, ModelProfile, base_requirements, complexity_of, layer_requirements
from protos.plan import DataProfile, Identification
from strategies import model_torch
from strategies.context import TaskContext
from strategies.exported_torch import load_program
from strategies.graph_torch import quiet
from strategies.hugging_face import family_of_type, task_of
from strategies.profile_layers_torch import (
    Trace,
    kind_of,
    layers,
    own_parameters,
    parameter_bytes,
    parameter_count,
    tensors_in,
    trace,
)
from strategies.profile_torch import BATCHES, LAYERS_LIMIT, attends, condensed, dtype_name, family_of

_TOKENS = 32  # of a text, where the configuration allows as many: some models take them one by one
_TRACE_S = 15.0  # then the layers are known without their FLOPs
_IMAGE = 224
_UNTRACED = ("flops_per_sample", "activation_bytes_per_sample", "input_shape")

Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of one sample, by the argument's name


def describe_model(context: TaskContext) -> Identification:
    """The model as it is built. Raises SpecError or UserCodeError."""
    spec, code_dir, weights = context.task.spec.model, context.workspace.code_dir, context.workspace.weights_path
    file = model_torch.exported_file(spec, code_dir, weights)
    if file is not None:
        program = load_program(file)
        with quiet():
            model: nn.Module = torch.export.unflatten(program)
        profile = profile_of_model(model, _inputs_of_program(program), "pytorch_export")
    else:
        model_torch.prepare(spec, code_dir, weights)
        model = _built(context)
        config = getattr(model, "config", None)
        kind = "python_source" if entry_point(spec.source) else "hugging_face"
        profile = profile_of_model(model, _inputs_of_config(model, config), kind)
        if kind == "hugging_face":
            profile = _as_configured(profile, config)
    if context.task.code is not None:
        profile = replace(profile, digest=context.task.code.digest)
    return Identification(profile, DataProfile(digest="", rows=None, bytes=0), {}, {})


def _built(context: TaskContext) -> nn.Module:
    """With fake tensors; Python for real where that cannot be, as when it looks at values while it builds."""
    spec, workspace = context.task.spec, context.workspace
    arguments = (spec.model, workspace.code_dir, workspace.weights_path, spec.train.seed)
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # what fails there is tried for real, and said
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return model_torch.build_unloaded(*arguments)
    except SpecError:
        raise
    except Exception:
        if entry_point(context.task.spec.model.source) is None:
            with torch.device("meta"):  # a configuration may ask for any size
                return model_torch.build_unloaded(*arguments)
        return model_torch.build_unloaded(*arguments)


def profile_of_model(model: nn.Module, inputs: Inputs | None, file_format: str) -> ModelProfile:
    """Layers and parameters, with FLOPs and activations where the model runs on such inputs."""
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise SpecError(
            "the model has lazy layers: their sizes are not known until data pass through",
            "give the sizes, e.g. nn.Linear(64, 10) instead of nn.LazyLinear(10)",
            code=ErrorCode.MODEL_UNUSABLE,
        )
    traces = _traces(model, inputs) if inputs else None
    parameters = parameter_count(model)
    attention = any(attends(kind_of(module)) for module in model.modules())
    if traces is not None:
        every = layers(model, *traces, BATCHES)
        family, confidence = family_of(every, attention or traces[0].attention)
        requirements = layer_requirements(parameters, family, every)
    else:
        every = layers_as_built(model)
        family, confidence = family_of(every, attention)
        requirements = base_requirements(parameters, family)
    shape = next(iter(inputs.values()))[0] if inputs and len(inputs) == 1 else None
    known = traces is not None
    return ModelProfile(
        framework="pytorch",
        format=file_format,
        family=family,
        task="unknown",
        parameters=parameters,
        bytes=parameter_bytes(model),
        trainable=True,
        dtypes=tuple(sorted({dtype_name(value.dtype) for value in model.parameters()})),
        input_shape=shape if known else None,
        complexity=complexity_of(parameters),
        layers=condensed(every, LAYERS_LIMIT),
        requirements=requirements,
        confidence=confidence if known else min(confidence, 0.9),
        unknown=("task",) if known else ("task", *_UNTRACED),
        peak_activation_bytes_per_sample=sum(layer.activation_bytes_per_sample for layer in every),
    )


def layers_as_built(model: nn.Module) -> tuple[LayerProfile, ...]:
    """Every module that holds parameters itself, in the order of their definition; a shared one counts once."""
    held = own_parameters(model, tuple(name for name, _ in model.named_modules()))
    kinds = {name: kind_of(module) for name, module in model.named_modules()}
    return tuple(
        LayerProfile(name or "model", kinds[name], count, 0.0, 0.0, 0.0) for name, count in held.items() if count
    )


def _traces(model: nn.Module, inputs: Inputs) -> tuple[Trace, Trace] | None:
    """Of two batch sizes; None when the model does not run on such inputs."""

    def at(rows: int) -> Trace:
        made = {name: _example((rows, *shape), dtype) for name, (shape, dtype) in inputs.items()}
        single = made.pop("", None)
        return trace(model, lambda: model(single) if single is not None else model(**made), _scalar)

    try:
        with _at_most(_TRACE_S), FakeTensorMode(allow_non_fake_inputs=True):
            return at(BATCHES[0]), at(BATCHES[1])
    except HiveError:
        raise
    except Exception:
        return None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Ends a pass through a model that takes longer, at the next module that it enters."""
    end = time.monotonic() + seconds

    def check(module: nn.Module, arguments: Any) -> None:
        if time.monotonic() > end:
            raise TimeoutError

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _scalar(output: Any) -> object:
    """In place of a loss, of which nothing is known."""
    first = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
    return first.sum() if first is not None else None


def _inputs_of_program(program: ExportedProgram) -> Inputs | None:
    """Of an exported program: its own shapes, the first dimension being that of the rows."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    spec = program.call_spec.in_spec
    if spec is None or not spec.num_children:
        return None
    positional, named = spec.children()
    names = [str(key) for key in named.context] if named.num_children else [""] * positional.num_children
    found = {}
    for name, placeholder in zip(names, program.graph_signature.user_inputs, strict=False):
        value = placeholders[str(placeholder)].meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        found[name] = (tuple(_hint(size) for size in value.shape[1:]), value.dtype)
    return found if len(found) == len(names) else None


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 2)


def _inputs_of_config(model: nn.Module, config: Any) -> Inputs | None:
    """What a model of transformers takes first of all; None for a model that says nothing."""
    name = getattr(model, "main_input_name", None)
    if config is None or name not in ("input_ids", "pixel_values"):
        return None
    if name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or _TOKENS
        shape = (min(_TOKENS, longest) if isinstance(longest, int) else _TOKENS,)
        found = {"input_ids": (shape, torch.int64)}
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = (shape, torch.int64)
        return found
    size: Any = getattr(config, "image_size", None) or _IMAGE
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    channels: Any = getattr(config, "num_channels", 3)
    if not all(isinstance(number, int) and 0 < number <= 4096 for number in (channels, height, width)):
        return None
    return {"pixel_values": ((channels, height, width), torch.float32)}


def _as_configured(profile: ModelProfile, config: Any) -> ModelProfile:
    """Task and family as the configuration names them, where it does."""
    content = config.to_dict()
    task, family = task_of(content), family_of_type(str(content.get("model_type", "")))
    if task is not None:
        profile = replace(profile, task=task, unknown=tuple(name for name in profile.unknown if name != "task"))
    if family is not None and family is not profile.family:
        profile = replace(profile, family=family, confidence=1.0)
    return profile
