"""Where the model is inside what torch.save wrote: a state dict, a checkpoint with training state, or modules.

Owns the choice of the model's part and what is said of the rest: the optimizer by the keys of its groups, epoch and
step, copies such as an EMA. Only the model's part is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from coordinator.identify.pickle_values import Mapping, Object, Tensor
from coordinator.identify.pytorch_module import is_module
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, MAX_TENSORS, unusable

_MODEL_KEYS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network", "weights")
_TRAINING_WORDS = ("optim", "scheduler", "scaler")
_COPY_WORDS = ("ema", "averag", "swa", "teacher", "target")
_PROGRESS = ("epoch", "epochs", "global_step", "step", "steps", "iteration", "iter", "n_iter")
_MAX_DEPTH = 6
_MAX_VISITS = 1_000_000
_PARALLEL = "module."
_DAMAGED = "the file is damaged: write it again with torch.save(model.state_dict(), PATH)"

_OPTIMIZERS: tuple[tuple[str, frozenset[str]], ...] = (  # the first whose keys are all there
    ("nadam", frozenset({"betas", "momentum_decay"})),
    ("adam or adamw", frozenset({"betas", "amsgrad"})),
    ("radam", frozenset({"betas", "eps", "decoupled_weight_decay"})),
    ("adamax", frozenset({"betas", "eps"})),
    ("lion", frozenset({"betas"})),
    ("sgd", frozenset({"momentum", "dampening", "nesterov"})),
    ("rmsprop", frozenset({"alpha", "centered"})),
    ("asgd", frozenset({"lambd", "t0"})),
    ("rprop", frozenset({"etas", "step_sizes"})),
    ("adadelta", frozenset({"rho"})),
    ("adagrad", frozenset({"lr_decay", "initial_accumulator_value"})),
    ("adagrad", frozenset({"lr_decay", "eps"})),
    ("adafactor", frozenset({"beta2_decay"})),
    ("lbfgs", frozenset({"max_iter", "history_size"})),
)


@dataclass(slots=True)
class Content:
    """`tensors` by the names the model gives them, or the `module` that was pickled whole."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    module: Object | None = None
    is_checkpoint: bool = False
    notes: list[str] = field(default_factory=list)


def content_of(value: Any) -> Content | None:
    """The model's part of a saved value; None when it holds no named tensors and no module."""
    if is_module(value):
        return Content(module=value)
    if isinstance(value, Object) and value.items is not None:
        value = value.items  # a dict with a class of its own
    if not isinstance(value, Mapping):
        return None
    found = _part(value, 0)
    if found is not None:
        found.notes += _notes(value)
        _without_parallel(found)
    return found


def _part(value: Mapping, depth: int) -> Content | None:
    beside = any(_is_training_state(key, item) for key, item in value.items.items())
    inner: dict[str, Content] = {}
    for key, item in value.items.items():
        if isinstance(key, str) and not _is_training_state(key, item):
            if is_module(item):
                inner[key] = Content(module=item, is_checkpoint=True)
            elif isinstance(item, Mapping):
                inner[key] = Content(dict(flatten(item)), is_checkpoint=True)
    inner = {key: part for key, part in inner.items() if part.tensors or part.module is not None}
    for key in _MODEL_KEYS:
        if key in inner:
            part, item = inner[key], value.items[key]
            within = _part(item, depth + 1) if depth < _MAX_DEPTH and _is_checkpoint(item) else None
            return _beside(within or part, key, inner)
    if beside or any(not isinstance(item, Tensor | Mapping) for item in value.items.values()):
        own = _bytes({key: item for key, item in value.items.items() if isinstance(item, Tensor)})
        key = max(inner, key=lambda name: _bytes(inner[name].tensors), default="")
        if key and _bytes(inner[key].tensors) >= own:
            return _beside(inner[key], key, inner)
    model = {key: item for key, item in value.items.items() if not _is_training_state(key, item)}
    direct = dict(flatten(Mapping(model)))
    if not direct:
        return None
    return Content(direct, is_checkpoint=beside or not _is_nested_state_dict(value))


def _is_nested_state_dict(value: Mapping) -> bool:
    return all(isinstance(item, Tensor | Mapping) for item in value.items.values())


def _beside(part: Content, key: str, inner: dict[str, Content]) -> Content:
    """The chosen part, with what was not chosen said."""
    others = [name for name in inner if name != key]
    copies = [name for name in others if any(word in name.lower() for word in _COPY_WORDS)]
    if others:
        what = "copies of the model" if copies == others else "other tensors"
        names = ", ".join(name[:40] for name in others[:5])
        part.notes.append(f"only {key[:40]!r} is counted; beside it there are {what}: {names}")
    return part


def _is_checkpoint(item: Any) -> bool:
    """Whether a mapping below "model" is again one with a state dict and more around it."""
    return isinstance(item, Mapping) and any(
        isinstance(item.items.get(key), Mapping) for key in _MODEL_KEYS if key not in ("module", "net", "network")
    )


def _without_parallel(found: Content) -> None:
    if found.tensors and all(name.startswith(_PARALLEL) for name in found.tensors):
        found.tensors = {name.removeprefix(_PARALLEL): tensor for name, tensor in found.tensors.items()}
        found.notes.append("saved from inside DataParallel: the names start with 'module.', which is left out here")


def _is_training_state(key: Any, item: Any) -> bool:
    """A tensor never is: its name is the model's, which may call a layer `upscaler`."""
    if isinstance(item, Tensor):
        return False
    named = isinstance(key, str) and any(word in key.lower() for word in _TRAINING_WORDS)
    return named or (isinstance(item, Mapping) and _groups(item) is not None)


def _bytes(tensors: dict[Any, Tensor]) -> int:
    return sum(tensor.info(str(name)).bytes for name, tensor in tensors.items())


def flatten(value: Mapping) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a mapping and the mappings in it, by dotted names. Raises SpecError for what never ends."""
    visits = 0
    waiting: list[tuple[str, Mapping, int]] = [("", value, 0)]
    while waiting:
        prefix, mapping, depth = waiting.pop()
        if len(mapping.items) > MAX_TENSORS:
            raise unusable(f"a mapping of {len(mapping.items)} entries is over the limit of {MAX_TENSORS}")
        below: list[tuple[str, Mapping, int]] = []
        for key, item in mapping.items.items():
            visits += 1
            if visits > _MAX_VISITS:
                raise unusable("the mappings in the file repeat each other without end", _DAMAGED)
            if isinstance(item, Tensor | Mapping):
                name = f"{prefix}{key}"
                if len(name) > MAX_NAME_CHARACTERS:
                    raise unusable(f"a tensor name is over the limit of {MAX_NAME_CHARACTERS} characters", _DAMAGED)
                if isinstance(item, Tensor):
                    yield name, item
                elif depth < _MAX_DEPTH:
                    below.append((f"{name}.", item, depth + 1))
        waiting += reversed(below)


def _notes(value: Mapping) -> Iterator[str]:
    for key, item in value.items.items():
        for optimizer in _optimizers(item):
            yield f"holds the state of an optimizer ({optimizer}), which is not counted"
        if isinstance(key, str) and key in _PROGRESS and type(item) is int:
            yield f"{key} {item}" if abs(item) < 10**12 else f"{key} is out of range"
        if key in ("pytorch-lightning_version", "lightning_version") and isinstance(item, str):
            yield f"written by Lightning {item[:20]}"


def _optimizers(item: Any) -> list[str]:
    """The optimizers whose state this is, or, in a list or dict of several, each of them."""
    several = item if isinstance(item, list) else list(item.items.values()) if isinstance(item, Mapping) else []
    return [
        _optimizer(groups)
        for state in [item, *several[:10]]
        if isinstance(state, Mapping) and (groups := _groups(state)) is not None
    ]


def _groups(state: Mapping) -> list[Any] | None:
    groups = state.items.get("param_groups")
    return groups if isinstance(groups, list) and "state" in state.items else None


def _optimizer(groups: list[Any]) -> str:
    options = groups[0].items if groups and isinstance(groups[0], Mapping) else {}
    name = next((name for name, keys in _OPTIMIZERS if keys <= options.keys()), "of an unknown kind")
    if name == "adam or adamw" and "decoupled_weight_decay" in options:
        name = "adamw" if options["decoupled_weight_decay"] is True else "adam"
    rate = options.get("lr")
    return f"{name}, learning rate {rate:g}" if isinstance(rate, float) else name
