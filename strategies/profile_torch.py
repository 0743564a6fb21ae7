"""The identify task: what the user's model is and what the data are, found out in a worker without training.

The model is built and run once with fake tensors: shapes, FLOPs and saved bytes are exact, no weight is allocated. A
model that cannot run that way (it looks at values) is built and run for real on the CPU. A model that cannot run at all
is the user's to fix: MODEL_UNUSABLE with their own traceback. Weights are not read here, except those of a torch.export
file, which come with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.unflatten import UnflattenedModule
from torch.nn.parameter import is_lazy

from protos import documents
from protos.errors import ErrorCode, HiveError, SpecError
from protos.jobspec import JobSpec, entry_point
from protos.model import Family, LayerProfile, ModelProfile, Requirements, base_requirements, complexity_of
from protos.plan import DataProfile, Identification
from protos.states import AttemptState, Reason
from protos.work import Outcome
from strategies import cost, memory, model_torch
from strategies.batches_torch import MicroBatch, micro_batch, read
from strategies.context import TaskContext
from strategies.data import Batch, Dataset
from strategies.exported_torch import load_program
from strategies.faults_torch import DataUnusable, UserCodeError, fault_of
from strategies.graph_torch import quiet
from strategies.hang_watch import stack_shown_after
from strategies.loss_torch import Loss
from strategies.profile_cuts_torch import with_cuts, with_tensor
from strategies.profile_layers_torch import (
    Trace,
    layers,
    loss_bytes,
    parameter_bytes,
    parameter_count,
    trace,
    wanted_bytes,
)
from strategies.split_torch import Cuttable, trace_exported, trace_model
from strategies.train_loop_torch import open_data

BATCHES = (2, 4)
LAYERS_LIMIT = 4_000  # so that a profile stays far below the limit of a document
REAL_LIMIT_BYTES = 4 * 1024**3  # a model larger than this is never built for real just to be identified
_FLOPS_PER_CORE = 10e9  # an ordinary core, for the hours of a requirement; plans use measured rates
_STACK_BEFORE_S = 2.0  # the node ends what takes longer than its deadline
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ATTENTION = ("attention", "attn", "transformer")
_RECURRENT = ("mamba", "rwkv", "xlstm")  # state spaces and their like: one state is carried along the sequence
_GRAPH = ("gcn", "gatconv", "gatv2conv", "sageconv", "ginconv", "messagepassing", "graphconv")


@dataclass(frozen=True, slots=True)
class Built:
    """A model and its two traces. `program`: the torch.export file it is, when it is one."""

    model: nn.Module
    small: Trace
    large: Trace
    program: ExportedProgram | None = None

    @property
    def layers(self) -> tuple[LayerProfile, ...]:
        return layers(self.model, self.small, self.large, BATCHES)


def identify(context: TaskContext, look: Callable[[TaskContext], Identification] | None = None) -> Outcome:
    """Outcome.document is an Identification as JSON; a model or data that cannot be used is a fault. `look`: at what,
    in place of the model and its data."""
    code_dir = context.workspace.code_dir
    try:
        with stack_shown_after(max(context.task.deadline_s - _STACK_BEFORE_S, context.task.deadline_s / 2)):
            identification = look(context) if look is not None else describe(context, *open_data(context))
        return Outcome(AttemptState.DONE, document=documents.encode(identification).decode())
    except Exception as error:
        fault = fault_of(error, code_dir)
        if fault.reason is Reason.USER_CODE:
            data = isinstance(error, DataUnusable)
            fault = replace(fault, reason=Reason.DATA_UNUSABLE if data else Reason.MODEL_UNUSABLE)
        return Outcome(AttemptState.FAILED, fault=fault)


def describe(context: TaskContext, dataset: Dataset, test: Dataset | None) -> Identification:
    """Everything an Identification says. Raises SpecError or UserCodeError."""
    spec, code_dir = context.task.spec, context.workspace.code_dir
    rows = np.arange(max(BATCHES), dtype=np.int64) % max(dataset.rows, 1)
    batch = read(dataset, rows)
    built = run(spec, code_dir, batch, context.workspace.weights_path)
    shapes, dtypes = _named(dataset.feature_shapes), _named(dataset.feature_dtypes)
    data = DataProfile(
        digest=dataset.digest,
        rows=dataset.rows,
        bytes=context.task.data.bytes if context.task.data is not None else _bytes(dataset),
        test_rows=test.rows if test is not None else None,
    )
    single = dataset.feature_shapes if isinstance(dataset.feature_shapes, tuple) else None
    profile = profile_of(built, spec, data, single)
    found, why_not_cut = with_cuts(built.layers, spec, profile.parameters, lambda: cuttable(built, spec, batch))
    wanted = wanted_bytes(built.small, built.large, BATCHES)
    cuts, why_not_tensor = with_tensor(spec, profile, built.model, built.layers, wanted)
    profile = replace(
        profile,
        layers=condensed(found, LAYERS_LIMIT),
        why_not_cut=why_not_cut,
        tensor_cuts=cuts,
        why_not_tensor=why_not_tensor,
    )
    if context.task.code is not None and code_dir is not None:
        profile = replace(profile, digest=context.task.code.digest)
    return Identification(profile, data, shapes, dtypes, dataset.target_shape, dataset.target_dtype, dataset.classes)


def cuttable(built: Built, spec: JobSpec, batch: Batch) -> Cuttable:
    """The model traced for cutting. Raises CannotTrace."""
    if built.program is not None:
        return trace_exported(built.program, spec.train.precision)
    features = _first_rows(batch, BATCHES[0], Loss("mse", None), fake=False).features
    return trace_model(built.model, features, spec.train.precision)


def _named(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {"features": value}


def _bytes(dataset: Dataset) -> int:
    """Of sources without files: the rows as they are given to the model."""
    batch = dataset.batch(np.zeros(1, dtype=np.int64))
    arrays = list(batch.features.values()) if isinstance(batch.features, dict) else [batch.features]
    arrays += [batch.target] if batch.target is not None else []
    return dataset.rows * sum(int(array.nbytes) for array in arrays)


def run(spec: JobSpec, code_dir: Path | None, batch: Batch, weights_path: Path | None = None) -> Built:
    """The model built and traced at both batch sizes: with fake tensors, else for real."""
    loss = Loss(spec.train.loss, code_dir)
    file = model_torch.exported_file(spec.model, code_dir, weights_path)
    if file is not None:
        return _run_exported(load_program(file), spec, batch, loss)
    model_torch.prepare(spec.model, code_dir, weights_path)
    size = 0
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # what fails there is tried for real, and said
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model_torch.build_unloaded(spec.model, code_dir, weights_path, spec.train.seed)
            size = parameter_bytes(model) if not any(map(is_lazy, model.parameters())) else 0
            return _trace(model, spec, batch, loss, fake=True)
    except HiveError:
        raise
    except Exception as error:
        if size > REAL_LIMIT_BYTES:
            raise UserCodeError(f"the model of {size} bytes cannot be profiled without allocating it") from (
                error.__cause__ or error
            )
    model = model_torch.build_unloaded(spec.model, code_dir, weights_path, spec.train.seed)
    return _trace(model, spec, batch, loss, fake=False)


def _run_exported(program: ExportedProgram, spec: JobSpec, batch: Batch, loss: Loss) -> Built:
    """A file keeps which module each operation was in: its layers are those of the source."""
    with quiet():
        model = torch.export.unflatten(program)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return replace(_trace(model, spec, batch, loss, fake=True), program=program)


def _trace(model: nn.Module, spec: JobSpec, batch: Batch, loss: Loss, *, fake: bool) -> Built:
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise SpecError(
            "the model has lazy layers: their sizes are not known until data pass through",
            "give the sizes, e.g. nn.Linear(64, 10) instead of nn.LazyLinear(10)",
            code=ErrorCode.MODEL_UNUSABLE,
        )
    if not isinstance(model, UnflattenedModule):  # which has the mode it was exported in
        model.train()

    def at(size: int) -> Trace:
        piece = _first_rows(batch, size, loss, fake)

        def forward() -> Any:
            half = spec.train.precision == "bf16"
            with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
                try:
                    return model(**piece.features) if isinstance(piece.features, dict) else model(piece.features)
                except Exception as error:
                    raise UserCodeError(f"running the model on {_shapes(piece.features)}") from error

        return trace(model, forward, lambda output: loss(output, piece.target))

    return Built(model, at(BATCHES[0]), at(BATCHES[1]))


def _first_rows(batch: Batch, size: int, loss: Loss, fake: bool) -> MicroBatch:
    """A micro-batch as training would make it; a fake one has its shapes and types only."""
    with unset_fake_temporarily():
        target = batch.target[:size] if batch.target is not None else None
        features = batch.features
        rows = {k: v[:size] for k, v in features.items()} if isinstance(features, dict) else features[:size]
        real = micro_batch(Batch(rows, target), loss, torch.device("cpu"))
    if not fake:
        return real
    given = real.features
    inputs = {k: _like(v) for k, v in given.items()} if isinstance(given, dict) else _like(given)
    return real._replace(features=inputs, target=_like(real.target))


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _shapes(features: torch.Tensor | dict[str, torch.Tensor]) -> str:
    named = features if isinstance(features, dict) else {"features": features}
    return ", ".join(f"{name} {list(value.shape)} {dtype_name(value.dtype)}" for name, value in named.items())


def profile_of(built: Built, spec: JobSpec, data: DataProfile, input_shape: tuple[int, ...] | None) -> ModelProfile:
    """The profile of a model that ran. Requirements are layer arithmetic, not the table."""
    found = condensed(built.layers, LAYERS_LIMIT)
    parameters = parameter_count(built.model)
    family, confidence = family_of(found, built.small.attention)
    profile = ModelProfile(
        framework="pytorch",
        format=_format(built, spec),
        family=family,
        task=task_of(spec, found, family),
        parameters=parameters,
        bytes=parameter_bytes(built.model),
        trainable=True,
        dtypes=tuple(sorted({dtype_name(value.dtype) for value in built.model.parameters()})),
        input_shape=input_shape,
        complexity=complexity_of(parameters),
        layers=found,
        requirements=base_requirements(parameters, family),
        confidence=confidence,
        peak_activation_bytes_per_sample=sum(layer.activation_bytes_per_sample for layer in found)
        + loss_bytes(built.small, built.large, BATCHES),
    )
    return replace(profile, requirements=requirements_of(profile, spec, data))


def _format(built: Built, spec: JobSpec) -> str:
    if built.program is not None:
        return "pytorch_export"
    return "python_source" if entry_point(spec.model.source) else "hugging_face"


def requirements_of(profile: ModelProfile, spec: JobSpec, data: DataProfile) -> Requirements:
    """Weights, gradients, optimizer state and the activations of one batch; hours on ordinary cores."""
    table = base_requirements(profile.parameters, profile.family)
    need = memory.worker_bytes(profile, spec.train.optimizer, spec.train.batch_size, 1)
    samples = cost.assumed_steps(profile, spec.train, data) * spec.train.batch_size
    hours = samples * cost.TRAINING_FACTOR * profile.flops_per_sample / (table.cores * _FLOPS_PER_CORE) / 3600
    return Requirements(table.cores, need, need - memory.RESERVE_BYTES, hours, "layers", "table", "layers")


def condensed(found: tuple[LayerProfile, ...], limit: int) -> tuple[LayerProfile, ...]:
    """At most `limit` layers: neighbours are joined, sums kept, under the kind of the one that computes most."""
    if len(found) <= limit:
        return found
    run_length = -(-len(found) // limit)
    joined = []
    for start in range(0, len(found), run_length):
        part = found[start : start + run_length]
        joined.append(
            LayerProfile(
                name=f"{part[0].name}..{part[-1].name}",
                kind=max(part, key=lambda layer: layer.flops_per_sample).kind,
                parameters=sum(layer.parameters for layer in part),
                flops_per_sample=sum(layer.flops_per_sample for layer in part),
                activation_bytes_per_sample=sum(layer.activation_bytes_per_sample for layer in part),
                output_bytes_per_sample=part[-1].output_bytes_per_sample,
                output_shape=part[-1].output_shape,
                cut_bytes_per_sample=part[-1].cut_bytes_per_sample,
                borrowed_parameters=sum(layer.borrowed_parameters for layer in part),
            )
        )
    return tuple(joined)


def dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def family_of(found: tuple[LayerProfile, ...], attention: bool) -> tuple[Family, float]:
    """Family from the layers that ran, and how sure it is. Attention decides; then what does most of the work."""
    names = [layer.kind.lower() for layer in found]
    rules: tuple[tuple[Family, Callable[[str], bool]], ...] = (
        (Family.CNN, lambda name: "conv" in name),
        (Family.RNN, lambda name: any(kind in name for kind in ("lstm", "gru", "rnn"))),
    )
    if attention or any(map(attends, names)):
        return Family.TRANSFORMER, 1.0
    if any(mark in name for name in names for mark in _RECURRENT):
        return Family.RNN, 1.0
    if any(mark in name for name in names for mark in _GRAPH):
        return Family.GNN, 0.9
    embeds = any("embedding" in name for name in names)
    recurs = any(rules[1][1](name) for name in names)
    if embeds and not recurs and any(name.endswith(("layernorm", "rmsnorm")) for name in names):
        return Family.TRANSFORMER, 0.7
    work = {
        family: sum(layer.flops_per_sample or 1.0 for layer in found if is_kind(layer.kind.lower()))
        for family, is_kind in rules
    }
    best = max(work, key=lambda family: work[family])
    if work[best] > 0:
        return best, 1.0
    if embeds:
        return Family.EMBEDDING, 0.9
    linear = sum("linear" in name for name in names)
    if linear == 1 and len(found) == 1:
        return Family.LINEAR, 1.0
    if linear:
        return Family.MLP, 1.0
    return Family.UNKNOWN, 0.5


def attends(kind: str) -> bool:
    """Whether a class of that name computes attention: those that only call themselves so carry a state."""
    name = kind.lower()
    return any(mark in name for mark in _ATTENTION) and not any(mark in name for mark in _RECURRENT)


def task_of(spec: JobSpec, found: tuple[LayerProfile, ...], family: Family) -> str:
    """classification, regression or language_model, from the loss; of a loss of the user's own, from the output."""
    match spec.train.loss:
        case "causal_lm":
            return "language_model"
        case "cross_entropy" | "bce_with_logits":
            return "classification"
        case "mse" | "l1":
            return "regression"
    shape = found[-1].output_shape if found else ()
    if len(shape) == 2 and family in (Family.TRANSFORMER, Family.RNN):
        return "language_model"
    return "regression" if shape in ((), (1,)) else "classification"
