"""A model built from a Hugging Face directory by transformers' own classes, and the names of its weights.

Owns the import of transformers (seconds, so only when such a job comes), the configuration with the job's arguments in
it, and which tensor of the directory belongs to which of the model, as from_pretrained finds it. Never runs code of the
directory (no trust_remote_code), never asks a hub, reads safetensors only. Weights are computed in float32: precision
is train.precision's. A model without logits (a base model) gives the loss its last hidden state.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from protos.errors import Blame, ErrorCode, SpecError
from protos.jobspec import ModelSpec
from strategies.faults_torch import UserCodeError
from strategies.hugging_face import CONFIG_FILE, INDEX_FILE, NO_WEIGHTS, WEIGHTS_FILE, check_config, read_json
from strategies.weights_torch import Weights, address, some

TASKS = {
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "base": "MODEL_MAPPING",
}
_OWN = {"return_dict": True, "use_cache": False}  # a cache of keys is for generating
_FIXED = ("dtype", "torch_dtype", "model_type", "architectures", *_OWN)
_CODE = ErrorCode.MODEL_UNUSABLE


def library() -> ModuleType:
    """transformers, kept from asking a hub. Raises SpecError that blames the node when it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError:
        raise SpecError(
            "the model is a Hugging Face directory and this node lacks transformers",
            "on that node: pip install 'hive[hf]'; another node that has it is taken instead",
            code=_CODE,
            blame=Blame.NODE,
        ) from None
    module: ModuleType = transformers
    return module


def prepare(directory: Path, spec: ModelSpec) -> None:
    """Imports what building needs. Raises what `build` raises for a configuration that cannot be built."""
    _architecture(_config(directory, spec), spec)


def build(directory: Path, spec: ModelSpec, seed: int) -> nn.Module:
    """The module with initial values from the seed. Raises SpecError, or UserCodeError from a configuration whose
    values do not fit together."""
    config = _config(directory, spec)
    architecture = _architecture(config, spec)
    torch.manual_seed(seed)
    try:
        fake = isinstance(torch.empty(0), FakeTensor)
        with _without_values() if fake else nullcontext():
            model: Any = architecture(config)
        if fake:
            model.tie_weights()  # which belongs to what gives values
    except Exception as error:
        raise UserCodeError(f"building the model of {spec.source}") from error
    module: nn.Module = model
    module.register_forward_hook(_without_logits)
    return module


def _without_values() -> AbstractContextManager[None]:
    """For tensors without storage: giving them values takes long, and some ways to do it look at the values."""
    from transformers.initialization import no_init_weights

    context: AbstractContextManager[None] = no_init_weights()
    return context


def _without_logits(_: nn.Module, __: Any, output: Any) -> Tensor | None:
    """What the loss gets of an output that has no logits; other outputs stay as they are."""
    if hasattr(output, "logits") or not hasattr(output, "last_hidden_state"):
        return None
    hidden: Tensor = output.last_hidden_state
    return hidden


def weights_file(directory: Path, spec: ModelSpec) -> Path | None:
    """The file that open_weights reads; None when the job starts from the seed."""
    if spec.weights == NO_WEIGHTS:
        return None
    found = next((directory / name for name in (WEIGHTS_FILE, INDEX_FILE) if (directory / name).is_file()), None)
    if found is None:
        raise SpecError(
            f"{spec.source} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            f"fetch them, or give model.weights: {NO_WEIGHTS} to start from the seed",
            code=_CODE,
        )
    return found


def _config(directory: Path, spec: ModelSpec) -> Any:
    """The configuration with model.args in it. Raises SpecError."""
    document = read_json(directory / CONFIG_FILE)
    check_config(document)
    check_config({**spec.args, "model_type": document["model_type"]})
    transformers = library()
    try:
        kind = transformers.CONFIG_MAPPING[document["model_type"]]
    except KeyError:
        raise SpecError(
            f"transformers {transformers.__version__} does not know the model type {document['model_type']!r}",
            "give a Python function that builds the model: model.source: FILE.py:FUNCTION",
            code=_CODE,
        ) from None
    fields = {key: value for key, value in spec.args.items() if key != "task"}
    try:
        known = set(kind().to_dict())  # before the document: it may name anything
        known |= {key for key in document if key not in _FIXED}
        _check_fields(fields, known | {"num_labels"}, document["model_type"])
        content = {key: value for key, value in document.items() if key not in ("dtype", "torch_dtype", *_OWN)}
        config = kind.from_dict({**content, **fields})
    except SpecError:
        raise
    except Exception as error:
        raise UserCodeError(f"reading {spec.source}/{CONFIG_FILE}") from error
    for key, value in _OWN.items():
        setattr(config, key, value)
    return config


def _check_fields(fields: Mapping[str, Any], known: set[str], model_type: str) -> None:
    for name in fields:
        if name in _FIXED:
            why = "train.precision chooses the precision" if "dtype" in name else "hive sets it"
            raise SpecError(f"model.args: {name} cannot be given: {why}", "remove it", code=_CODE)
        if name not in known:
            near = difflib.get_close_matches(name, [*sorted(known), "task"], 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(
                f"model.args: {name!r} is no field of a {model_type} configuration{meant}",
                "model.args of a Hugging Face directory are task, num_labels and fields of its config.json",
                code=_CODE,
            )


def _architecture(config: Any, spec: ModelSpec) -> Callable[[Any], nn.Module]:
    """The class for the task that is asked for, or the one that the configuration names. Raises SpecError."""
    transformers = library()
    task = spec.args.get("task")
    if task is not None:
        return _of_task(transformers, config, task)
    named = next(iter(config.architectures or []), None)
    found = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        what = f"the architecture {str(named)[:80]!r}" if named else "no architecture"
        raise SpecError(
            f"{CONFIG_FILE} names {what}, which transformers {transformers.__version__} cannot build",
            f"give the task: model.args: {{task: sequence_classification}}, or one of {', '.join(TASKS)}",
            code=_CODE,
        )
    if not (isinstance(config, getattr(found, "config_class", None) or type(config)) or _is_mapped(config, found)):
        raise SpecError(
            f"{named} is not built from a {config.model_type} configuration", "correct architectures", code=_CODE
        )
    chosen: Callable[[Any], nn.Module] = found
    return chosen


def _is_mapped(config: Any, architecture: type) -> bool:
    """Whether an Auto class builds it from such a configuration: some types share the classes of another."""
    from transformers.models.auto import modeling_auto

    mappings = (getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING"))
    built = (mapping[type(config)] for mapping in mappings if type(config) in mapping)
    return any(architecture in (each if isinstance(each, (tuple, list)) else (each,)) for each in built)


def _of_task(transformers: ModuleType, config: Any, task: object) -> Callable[[Any], nn.Module]:
    if not isinstance(task, str) or task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"model.args: task {str(task)[:80]!r} is not built{meant}", f"what works: {', '.join(TASKS)}", code=_CODE
        )
    mapping = getattr(transformers, TASKS[task])
    try:
        found = mapping[type(config)]
    except KeyError:
        raise SpecError(
            f"transformers has no {task} model of type {config.model_type!r}",
            "choose another task, or leave it out to build what the configuration names",
            code=_CODE,
        ) from None
    chosen: Callable[[Any], nn.Module] = found[0] if isinstance(found, (tuple, list)) else found
    return chosen


def readers(model: Any, weights: Weights, what: str) -> dict[str, Callable[[], Tensor]]:
    """For entries of the model's state dict that the weights have, how to read each, in the file's own type.

    What the weights lack keeps its value from the seed (the head of a new task), what the model lacks is left out; both
    are said on stderr, the job's log. Raises SpecError for another shape, and when nothing fits.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    computed = {name for name, _ in model.named_buffers()}  # also those that are not saved (any more)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, Callable[[], Tensor]] = {}
    pieces: dict[str, list[tuple[str, str]]] = {}
    unexpected: list[str] = []
    prefix = model.base_model_prefix
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:  # an old name that is a new one too
            target, pattern = rename_source_key(name, [], [], prefix, own)
        if target not in own:
            if not computed & {target, f"{prefix}.{target}", target.removeprefix(f"{prefix}.")}:
                unexpected.append(name)
        elif pattern is None:
            _check_shape(name, weights.shape(name), tuple(own[target].shape))
            found[target] = partial(weights.__getitem__, name)
        elif len(of_pattern[pattern].target_patterns) != 1:
            raise SpecError(
                f"{what} stores {name} joined with others, in a layout that transformers takes apart while loading",
                "build the model in Python and give its state dict: model.source: FILE.py:FUNCTION and model.weights",
                code=_CODE,
            )
        else:
            pieces.setdefault(target, []).append((name, pattern))
            found[target] = partial(_joined, model, weights, target, of_pattern[pattern], pieces[target])
    if not found:
        raise SpecError(f"{what} has no tensor of {type(model).__name__}", "is it this model's file?", code=_CODE)
    by_address = {address(own[name]): read for name, read in found.items()}
    for name, tensor in own.items():  # tied tensors are stored once
        if name not in found and address(tensor) in by_address:
            found[name] = by_address[address(tensor)]
    _say(model, what, [name for name in own if name not in found], unexpected)
    return found


def _joined(model: Any, weights: Weights, target: str, converter: Any, pieces: list[tuple[str, str]]) -> Tensor:
    """A tensor that the file has in pieces (the experts of a layer)."""
    group = deepcopy(converter)
    for name, pattern in pieces:
        group.add_tensor(target, name, pattern, partial(weights.__getitem__, name))
    (value,) = group.convert(target, model=model, config=model.config).values()
    tensor: Tensor = value[0] if isinstance(value, list) else value
    _check_shape(target, tuple(tensor.shape), tuple(model.state_dict()[target].shape))
    return tensor


def _check_shape(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise SpecError(
            f"the weights do not fit the model: {name} is {list(given)}, the model has {list(wanted)}",
            "model.args changed a size (num_labels, hidden_size): leave it as it was, or start from the seed with "
            f"model.weights: {NO_WEIGHTS}",
            code=_CODE,
        )


def _say(model: Any, what: str, missing: list[str], unexpected: list[str]) -> None:
    def worth(names: list[str], ignored: Any) -> list[str]:
        patterns = [re.compile(pattern) for pattern in ignored or ()]
        return [name for name in names if not any(pattern.search(name) for pattern in patterns)]

    fresh = worth(missing, model._keys_to_ignore_on_load_missing)
    unused = worth(unexpected, model._keys_to_ignore_on_load_unexpected)
    if fresh:
        sys.stderr.write(f"not in {what}, initialised from the seed: {some(fresh)}\n")
    if unused:
        sys.stderr.write(f"in {what}, not used by {type(model).__name__}: {some(unused)}\n")
