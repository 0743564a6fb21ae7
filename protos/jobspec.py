"""JobSpec: the one description of a job, the same pydantic model for YAML, JSON and SDK.

Unknown keys are an error that names the nearest valid one; a value whose engine is not built is refused with a sentence
naming what works, never ignored.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protos import limits
from protos.errors import ErrorCode, SpecError
from protos.optimizer_keywords import number_in, problem_of
from protos.printable import printable


class StrategyName(StrEnum):
    DATA_PARALLEL = "data_parallel"
    MODEL_PARALLEL = "model_parallel"
    PIPELINE_PARALLEL = "pipeline_parallel"
    FEDERATED = "federated"
    SINGLE_NODE = "single_node"


BUILT_STRATEGIES = (
    StrategyName.SINGLE_NODE,
    StrategyName.DATA_PARALLEL,
    StrategyName.PIPELINE_PARALLEL,
    StrategyName.MODEL_PARALLEL,
)
BUILT_LOSSES = ("cross_entropy", "mse", "l1", "bce_with_logits", "causal_lm")
BUILT_OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "adagrad")
BUILT_SCHEDULES = ("constant", "cosine", "linear", "step")
BUILT_COMPRESSIONS = ("auto", "none", "fp16")
BUILT_SYNC_MODES = ("auto", "step")
BUILT_PRECISIONS = ("fp32", "bf16")
BUILT_PIPELINE_SCHEDULES = ("1f1b", "gpipe")
BUILT_SHARDINGS = ("sharded", "tensor")
OPTIONS_OF = {
    StrategyName.PIPELINE_PARALLEL: ("stages", "replicas", "microbatches", "schedule"),
    StrategyName.MODEL_PARALLEL: ("kind", "ranks"),
}

_ENTRY_POINT = re.compile(r"^(?P<file>[^:]+\.py):(?P<name>[A-Za-z_][A-Za-z0-9_]*)$")


def entry_point(source: str) -> tuple[str, str] | None:
    """("model.py", "build") of "model.py:build", None when the source is not an entry point."""
    found = _ENTRY_POINT.match(source)
    return (found["file"], found["name"]) if found else None


# Every number has a bound: what comes later (torch, a database, a float) need not say what it cannot hold.
_Count = Annotated[int, Field(gt=0, le=limits.MAX_COUNT)]
_Bytes = Annotated[int, Field(gt=0, le=limits.MAX_INT64)]
_Rate = Annotated[float, Field(gt=0, le=limits.MAX_RATE)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(_Part):
    """`source`: FILE.py:FUNCTION returning an nn.Module (with `args`), or a model file; `weights` to start from."""

    source: str
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class DataSpec(_Part):
    source: str
    features: str | list[str] | None = None  # array or column name(s)
    target: str | None = None
    test: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None  # last rows of the source, when there is no test
    args: dict[str, Any] = Field(default_factory=dict)  # for data.py:fn and builtin:
    sequence_length: _Count | None = None  # text


class OptimizerSpec(_Part):
    """Keys beside `name` are the torch optimizer's own keyword arguments (lr, weight_decay, momentum, betas...)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "adamw"
    lr: _Rate = 1e-3

    @field_validator("name")
    @classmethod
    def _built(cls, name: str) -> str:
        return _one_of(name, BUILT_OPTIMIZERS, "optimizer")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, document: object) -> object:
        """YAML 1.1 reads 1e-3 as text: what is written like a number is one, as it already is for lr."""
        if not isinstance(document, dict):
            return document
        return {key: value if key == "name" else number_in(value) for key, value in document.items()}

    @model_validator(mode="after")
    def _keywords(self) -> OptimizerSpec:
        if problem := problem_of(self.name, self.model_extra or {}):
            raise ValueError(problem)
        return self


class ScheduleSpec(_Part):
    name: str = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=limits.MAX_COUNT)] = 0
    minimum_lr: Annotated[float, Field(ge=0, le=limits.MAX_RATE)] = 0.0
    every_steps: _Count | None = None  # step: multiply by factor every so many steps
    factor: _Rate = 0.1

    @field_validator("name")
    @classmethod
    def _built(cls, name: str) -> str:
        return _one_of(name, BUILT_SCHEDULES, "schedule")


class TrainSpec(_Part):
    loss: str = "cross_entropy"
    optimizer: OptimizerSpec = OptimizerSpec()
    batch_size: _Count = 32
    epochs: _Count | None = None
    steps: _Count | None = None
    seed: Annotated[int, Field(ge=0, le=limits.MAX_INT64)] = 0
    shuffle: bool = True
    precision: str = "fp32"
    accumulate: _Count | Literal["auto"] = "auto"
    clip_norm: _Rate | None = None
    schedule: ScheduleSpec = ScheduleSpec()
    evaluate_every: _Count | Literal["epoch", "end", "never"] = "epoch"

    @field_validator("loss")
    @classmethod
    def _loss(cls, loss: str) -> str:
        return loss if entry_point(loss) else _one_of(loss, BUILT_LOSSES, "loss", "FILE.py:FUNCTION")

    @field_validator("precision")
    @classmethod
    def _precision(cls, precision: str) -> str:
        return _one_of(precision, BUILT_PRECISIONS, "precision")

    @model_validator(mode="after")
    def _length(self) -> TrainSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        return self


class SyncSpec(_Part):
    mode: str = "auto"
    compression: str = "auto"

    @field_validator("mode")
    @classmethod
    def _mode(cls, mode: str) -> str:
        return _one_of(mode, BUILT_SYNC_MODES, "sync mode")

    @field_validator("compression")
    @classmethod
    def _compression(cls, compression: str) -> str:
        return _one_of(compression, BUILT_COMPRESSIONS, "compression")


class RequireSpec(_Part):
    gpu: bool = False
    memory_bytes: _Bytes | None = None
    names: list[str] = Field(default_factory=list)


class NodesSpec(_Part):
    min: Annotated[int, Field(gt=0, le=limits.MAX_NODES_PER_JOB)] = 1
    max: Annotated[int, Field(gt=0, le=limits.MAX_NODES_PER_JOB)] = 8
    require: RequireSpec = RequireSpec()

    @model_validator(mode="after")
    def _order(self) -> NodesSpec:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class CheckpointSpec(_Part):
    every_s: Annotated[float, Field(gt=0, le=limits.MAX_CHECKPOINT_S)] = 60.0
    keep: Annotated[int, Field(gt=0, le=10)] = 2


class StrategyOptions(_Part):
    """What a job file asks of the strategy it names; None is left to the planner. Each strategy has its own keys."""

    stages: Annotated[int, Field(ge=2, le=limits.MAX_NODES_PER_JOB)] | None = None
    replicas: Annotated[int, Field(ge=1, le=limits.MAX_NODES_PER_JOB)] | None = None
    microbatches: _Count | None = None
    schedule: str | None = None
    kind: str | None = None
    ranks: Annotated[int, Field(ge=2, le=limits.MAX_RANKS_PER_JOB)] | None = None

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, schedule: str | None) -> str | None:
        return schedule if schedule is None else _one_of(schedule, BUILT_PIPELINE_SCHEDULES, "pipeline schedule")

    @field_validator("kind")
    @classmethod
    def _kind(cls, kind: str | None) -> str | None:
        return kind if kind is None else _one_of(kind, BUILT_SHARDINGS, "kind of model_parallel")

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class JobSpec(_Part):
    name: Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME_CHARACTERS)] = "job"
    model: ModelSpec
    data: DataSpec
    train: TrainSpec = TrainSpec()
    strategy: str = "auto"
    strategy_options: StrategyOptions | None = None  # also written as strategy: {NAME: {KEY: VALUE}}
    sync: SyncSpec = SyncSpec()
    nodes: NodesSpec = NodesSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()

    @field_validator("name")
    @classmethod
    def _shown(cls, name: str) -> str:
        if printable(name) != name:
            raise ValueError(f"{name!r} holds characters that cannot be shown, such as control characters")
        return name

    @field_validator("strategy", mode="before")
    @classmethod
    def _strategy(cls, strategy: object) -> object:
        if isinstance(strategy, str) and strategy != "auto":
            return _one_of(strategy, tuple(name.value for name in BUILT_STRATEGIES), "strategy", "auto")
        return strategy

    @model_validator(mode="before")
    @classmethod
    def _with_options(cls, document: object) -> object:
        """{pipeline_parallel: {stages: 2}} is the strategy of that name, with options."""
        if not isinstance(document, dict):
            return document
        if document.get("federated") is not None:
            raise ValueError("federated: training is not built yet; remove the section and use strategy: auto")
        strategy = document.get("strategy")
        if not isinstance(strategy, dict):
            return document
        if len(strategy) != 1 or document.get("strategy_options") is not None:
            raise ValueError("strategy is a name, or one name with its options: {pipeline_parallel: {stages: 2}}")
        ((name, options),) = strategy.items()
        return {**document, "strategy": name, "strategy_options": options}

    @model_validator(mode="after")
    def _own_options(self) -> JobSpec:
        built = [name.value for name in OPTIONS_OF]
        keys = OPTIONS_OF.get(StrategyName(self.strategy), ()) if self.strategy != "auto" else ()
        for given in self.strategy_options.given if self.strategy_options else ():
            if given not in keys:
                known = f"it has {', '.join(keys)}" if keys else f"only {' and '.join(built)} have options"
                raise ValueError(f"strategy {self.strategy} has no option {given!r}: {known}")
        return self


def _one_of(value: str, built: tuple[str, ...], what: str, *also: str) -> str:
    if value in built:
        return value
    near = difflib.get_close_matches(value, built, 1)
    meant = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{what} {value!r} is not built{meant} What works: {', '.join((*built, *also))}")


def parse(document: object) -> JobSpec:
    """A JobSpec from plain dicts and lists. Raises SpecError with the path of the wrong field and the nearest key."""
    if not isinstance(document, dict):
        raise SpecError("a job file holds a mapping with at least model: and data:", "see examples/digits/mlp.yaml")
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError("; ".join(_sentences(error.errors())[:5]), "fix the job file; nothing was submitted") from None


def parse_text(text: str) -> JobSpec:
    """A JobSpec from YAML or JSON text, at most limits.MAX_JOB_SPEC_BYTES."""
    import yaml  # kept out of the import path of the daemon

    if len(text.encode()) > limits.MAX_JOB_SPEC_BYTES:
        raise SpecError(f"the job file is over {limits.MAX_JOB_SPEC_BYTES} bytes", "put data into a file of its own")
    try:
        return parse(_document(text))
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise SpecError(f"the job file is not valid YAML{place}: {problem}", "check indentation and colons") from None
    except ValueError as error:  # a date or number of YAML's own syntax that does not exist
        raise SpecError(f"the job file holds a value that cannot be: {error}", "put it into quotes") from None
    except RecursionError:
        raise SpecError("the job file is nested too deeply", "flatten it") from None


def _document(text: str) -> object:
    """JSON first: YAML reads nearly all of it, but not characters that JSON escapes as a pair."""
    import yaml

    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return yaml.safe_load(text)


def dump(spec: JobSpec) -> str:
    """Canonical JSON of a spec: equal specs give equal text."""
    return json.dumps(spec.model_dump(mode="json"), sort_keys=True)


def _sentences(problems: list[Any]) -> list[str]:
    """One per field: each kind of value that a field may have has a complaint of its own."""
    said: dict[str, list[str]] = {}
    for problem in problems:
        location = _field(problem["loc"])
        path = printable(".".join(location)) or "job"
        message = _message(problem, location)
        before = said.setdefault(path, [])
        before.append(message.removeprefix("Input should be ") if before else message)
    return [f"{path}: {', or '.join(messages)}" for path, messages in said.items()]


def _message(problem: Any, location: list[str]) -> str:
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _keys_beside(location), 1)
        return "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "missing":
        return "missing"
    return str(problem["msg"]).removeprefix("Value error, ")


def _field(location: tuple[str | int, ...]) -> list[str]:
    """The path as the job file has it: pydantic adds the name of each kind of value that a field may have."""
    model: type[BaseModel] | None = JobSpec
    for depth, part in enumerate(location):
        field = model.model_fields.get(str(part)) if model is not None else None
        if field is None:
            break
        model = _nested(field.annotation)
        if model is None:
            place = [part for part in location[depth + 1 :] if isinstance(part, int)]  # in a list
            return [str(part) for part in (*location[: depth + 1], *place)]
    return [str(part) for part in location]


def _nested(annotation: Any) -> type[BaseModel] | None:
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _keys_beside(location: list[str]) -> list[str]:
    model: type[BaseModel] = JobSpec
    for part in location[:-1]:
        field = model.model_fields.get(part)
        nested = _nested(field.annotation) if field is not None else None
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


__all__ = ["ErrorCode", "JobSpec", "StrategyName", "StrategyOptions", "dump", "entry_point", "parse", "parse_text"]
