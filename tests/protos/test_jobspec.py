"""A job file is a JobSpec or a sentence that names the wrong field; never anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import jobspec, limits
from protos.errors import SpecError
from protos.jobspec import JobSpec, dump, entry_point, parse, parse_text
from protos.optimizer_keywords import KEYWORDS

LEAST: dict[str, Any] = {"model": {"source": "model.py:build"}, "data": {"source": "builtin:digits"}}


def merged(**parts: Any) -> dict[str, Any]:
    return {**LEAST, **parts}


def refusal(document: object) -> str:
    with pytest.raises(SpecError) as refused:
        parse(document)
    assert refused.value.hint
    return refused.value.message


def test_the_least_job_file_has_defaults_for_the_rest() -> None:
    spec = parse(LEAST)
    assert (spec.train.epochs, spec.train.steps, spec.train.batch_size) == (1, None, 32)
    assert (spec.strategy, spec.nodes.min, spec.sync.mode) == ("auto", 1, "auto")


def test_the_job_file_of_the_design_is_understood() -> None:
    spec = parse_text(
        """
        name: mnist-mlp
        model: {source: model.py:build, args: {hidden: 256}}
        data: {source: train.npz, features: x, target: y, test: test.npz}
        train: {loss: cross_entropy, optimizer: {name: adamw, lr: 1.0e-3, weight_decay: 0.1}, batch_size: 256,
                epochs: 3, seed: 0, precision: fp32, accumulate: auto, clip_norm: null,
                schedule: {name: cosine, warmup_steps: 100}, evaluate_every: epoch}
        strategy: auto
        sync: {mode: auto, compression: auto}
        nodes: {min: 1, max: 8, require: {gpu: false}}
        checkpoint: {every_s: 60, keep: 2}
        """
    )
    assert spec.train.optimizer.model_dump()["weight_decay"] == 0.1
    assert spec.train.schedule.warmup_steps == 100


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (merged(modle={}), ["modle: unknown key", "'model'"]),
        (merged(train={"batchsize": 3}), ["train.batchsize: unknown key", "'batch_size'"]),
        (merged(train={"schedule": {"warmup": 3}}), ["train.schedule.warmup: unknown key", "'warmup_steps'"]),
        (merged(nodes={"require": {"gpus": True}}), ["nodes.require.gpus: unknown key", "'gpu'"]),
        (merged(data={"source": "a.csv", "colour": 1}), ["data.colour: unknown key"]),
        ({"data": LEAST["data"]}, ["model: missing"]),
        (merged(model={}), ["model.source: missing"]),
        (merged(train={"batch_size": 0}), ["train.batch_size", "greater than 0"]),
        (merged(train={"epochs": 1, "steps": 1}), ["train", "epochs or steps, not both"]),
        (merged(train={"loss": "cross_entopy"}), ["train.loss", "'cross_entropy'", "What works"]),
        (merged(train={"optimizer": {"name": "adamx"}}), ["train.optimizer.name", "'adam"]),
        (merged(train={"precision": "fp8"}), ["train.precision", "What works: fp32"]),
        (merged(nodes={"min": 3, "max": 2}), ["nodes", "max 2 is below min 3"]),
        (merged(nodes={"max": 9999}), ["nodes.max"]),
        (merged(strategy="data_paralel"), ["strategy", "'data_parallel'"]),
        (merged(strategy="federated"), ["strategy", "is not built", "auto"]),
        (merged(strategy={"pipeline_paralel": {}}), ["strategy", "did you mean 'pipeline_parallel'"]),
        (merged(strategy={"pipeline_parallel": {"stagez": 2}}), ["stagez: unknown key", "'stages'"]),
        (merged(strategy={"pipeline_parallel": {"ranks": 2}}), ["no option 'ranks'", "stages, replicas, microbatches"]),
        (merged(strategy={"data_parallel": {"stages": 2}}), ["no option 'stages'", "only pipeline_parallel and model"]),
        (merged(strategy={"pipeline_parallel": {"schedule": "zb"}}), ["schedule", "What works: 1f1b, gpipe"]),
        (merged(strategy={"model_parallel": {"kind": "tensors"}}), ["kind", "did you mean 'tensor'"]),
        (merged(strategy={"pipeline_parallel": {"stages": 1}}), ["stages", "greater than or equal to 2"]),
        (merged(strategy={"pipeline_parallel": {}, "auto": {}}), ["one name with its options"]),
        (merged(strategy={"pipeline_parallel": 3}), ["strategy_options"]),
        (merged(strategy_options={"stages": 2}), ["strategy auto has no option 'stages'"]),
        (merged(name="a\x1b[2J"), ["name: ", "\\x1b[2J", "control characters"]),
        (merged(name="abc\u202edef"), ["name: "]),
        (merged(train={"seed": 2**63}), ["train.seed: ", "less than or equal to"]),
        (merged(train={"steps": 2**31}), ["train.steps: "]),
        (merged(train={"clip_norm": float("inf")}), ["train.clip_norm: "]),
        (merged(train={"optimizer": {"lr": float("inf")}}), ["train.optimizer.lr: "]),
        (merged(train={"optimizer": {"lr": float("nan")}}), ["train.optimizer.lr: "]),
        (merged(checkpoint={"every_s": float("inf")}), ["checkpoint.every_s: "]),
        (merged(nodes={"require": {"memory_bytes": 2**63}}), ["nodes.require.memory_bytes: "]),
        (merged(train={"optimizer": {"foo": 3}}), ["train.optimizer: ", "adamw has no key 'foo'; It takes: amsgrad, "]),
        (merged(train={"optimizer": {"name": "sgd", "momentumm": 3}}), ["did you mean 'momentum'?"]),
        (merged(train={"optimizer": {"weight_decay": "little"}}), ["weight_decay must be a number"]),
        (merged(train={"optimizer": {"betas": [0.9]}}), ["betas must be a list of two numbers"]),
        (merged(train={"optimizer": {"amsgrad": 1}}), ["amsgrad must be true or false"]),
        (merged(train={"optimizer": {"eps": float("nan")}}), ["eps must be a number"]),
        (merged(nodes={"require": {"names": ["a", 3]}}), ["nodes.require.names.1: "]),
        (
            merged(data={"source": "a.csv", "features": 3}),
            ["data.features: Input should be a valid string, or a valid"],
        ),
        (merged(federated={"rounds": 3}), ["federated", "not built yet"]),
        (merged(sync={"mode": "swarm"}), ["sync.mode", "What works: auto, step"]),
        (merged(sync={"compression": "top_k"}), ["sync.compression", "fp16"]),
        ([], ["mapping"]),
        (None, ["mapping"]),
        ("text", ["mapping"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_field_is_named_with_what_was_meant(document: object, words: list[str]) -> None:
    message = refusal(document)
    for word in words:
        assert word in message


def test_a_field_of_several_kinds_is_named_once_and_as_the_job_file_has_it() -> None:
    message = refusal(merged(train={"evaluate_every": 0, "accumulate": -1}))
    assert message == (
        "train.accumulate: Input should be greater than 0, or 'auto'; "
        "train.evaluate_every: Input should be greater than 0, or 'epoch', 'end' or 'never'"
    )


def test_what_is_not_built_is_a_whole_sentence() -> None:
    assert "'zzzzz' is not built. What works: " in refusal(merged(train={"loss": "zzzzz"}))
    assert "did you mean 'l1'? What works: " in refusal(merged(train={"loss": "l11"}))


@pytest.mark.parametrize("optimizer", jobspec.BUILT_OPTIMIZERS)
def test_every_optimizer_takes_its_keywords(optimizer: str) -> None:
    spec = parse(merged(train={"optimizer": {"name": optimizer, "weight_decay": 0, "foreach": None, "maximize": True}}))
    assert parse_text(dump(spec)) == spec
    assert tuple(KEYWORDS) == jobspec.BUILT_OPTIMIZERS


def test_several_mistakes_are_told_at_once() -> None:
    message = refusal(merged(train={"batch_size": 0, "seed": -1}, nodes={"min": 0}))
    assert all(path in message for path in ("train.batch_size", "train.seed", "nodes.min"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "line 1"),
        ("a: 1\n b: 2\n", "line 2"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("name: 2024-99-99", "put it into quotes"),
        ("name: " + "9" * 5000, "put it into quotes"),
        ("", "mapping"),
        ("[" * 5000, ""),
    ],
)
def test_text_that_is_no_job_file_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_text(text)
    assert words in f"{refused.value.message} {refused.value.hint}"


def test_a_job_file_may_be_json_with_any_name() -> None:
    text = json.dumps(merged(name="\U0001f41d hive"))
    assert "\\ud83d" in text
    assert parse_text(text).name == "\U0001f41d hive"


def test_a_job_file_is_bounded() -> None:
    with pytest.raises(SpecError, match="over"):
        parse_text("#" * (limits.MAX_JOB_SPEC_BYTES + 1))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("model.py:build", ("model.py", "build")),
        ("nets/a.py:Net_2", ("nets/a.py", "Net_2")),
        ("model.safetensors", None),
        ("model.py", None),
        ("model.py:", None),
        ("model.py:2x", None),
        ("a:b.py:c", None),
        ("builtin:digits", None),
    ],
)
def test_an_entry_point_is_a_file_and_a_name(source: str, found: tuple[str, str] | None) -> None:
    assert entry_point(source) == found


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from([*JobSpec.model_fields, "federated", "source", "loss", "lr", "min", "max", "name"])
documents = st.dictionaries(
    fields | st.text(max_size=8), plain | st.dictionaries(fields, plain, max_size=4), max_size=6
)
anything = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@anything
@given(document=plain | documents | documents.map(lambda document: {**LEAST, **document}))
def test_any_document_is_a_job_spec_or_a_spec_error(document: object) -> None:
    try:
        spec = parse(document)
    except SpecError as error:
        assert error.message
        assert error.hint
    else:
        assert parse(json.loads(dump(spec))) == spec


@anything
@given(
    text=st.text(max_size=200) | plain.map(yaml.safe_dump) | st.text(alphabet="{}[]:,-&*!|>'\"#%@ \n\tab1", max_size=80)
)
def test_any_text_is_a_job_spec_or_a_spec_error(text: str) -> None:
    try:
        parse_text(text)
    except SpecError as error:
        assert error.message


@anything
@given(
    batch=st.integers(1, 10_000),
    lr=st.floats(1e-8, 10.0),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=100),
    strategy=st.sampled_from(["auto", *[strategy.value for strategy in jobspec.BUILT_STRATEGIES]]),
)
def test_a_job_spec_survives_json_and_yaml(batch: int, lr: float, name: str, strategy: str) -> None:
    spec = parse(merged(name=name, strategy=strategy, train={"batch_size": batch, "optimizer": {"lr": lr}}))
    assert parse(json.loads(dump(spec))) == spec
    assert parse_text(dump(spec)) == spec
    assert dump(parse(json.loads(dump(spec)))) == dump(spec)


@pytest.mark.parametrize(
    "strategy",
    [
        {"pipeline_parallel": {"stages": 2, "replicas": 2, "microbatches": 8, "schedule": "gpipe"}},
        {"model_parallel": {"kind": "sharded", "ranks": 3}},
        {"pipeline_parallel": None},
        {"data_parallel": {}},
    ],
)
def test_a_strategy_with_options_has_a_plain_name_and_survives_the_wire(strategy: dict[str, Any]) -> None:
    spec = parse(merged(strategy=strategy))
    ((name, options),) = strategy.items()
    assert spec.strategy == name
    given = spec.strategy_options.given if spec.strategy_options else ()
    assert {key: getattr(spec.strategy_options, key) for key in given} == (options or {})
    assert parse(json.loads(dump(spec))) == spec == JobSpec.model_validate_json(spec.model_dump_json())


def test_a_number_with_an_exponent_is_a_number_though_yaml_reads_text() -> None:
    spec = parse_text(
        "model: {source: a.py:b}\ndata: {source: x.npz}\n"
        "train: {optimizer: {name: adamw, lr: 1e-3, weight_decay: 1e-2, betas: [9e-1, 0.99]}}"
    )
    assert spec.train.optimizer.model_extra == {"weight_decay": 0.01, "betas": [0.9, 0.99]}
