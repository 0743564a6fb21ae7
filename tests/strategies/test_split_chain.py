"""A model cut into stages computes what the whole model does: output, loss, gradients, buffers, for any rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import split_models as models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from split_chain import Chain, close, initial, names_of, traced
from torch import nn

from protos.errors import ErrorCode, SpecError
from strategies.split_torch import CannotTrace, Cuttable, cut, stage_module, tied, trace_model


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def named(rows: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"attention_mask": mask, "input_ids": tokens(rows, 7)}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], Sequence[str]]] = {
    "mlp": (models.mlp, lambda n: values(n, 8), ("1", "4", "6")),
    "cnn": (models.cnn, lambda n: values(n, 1, 8, 8), ("0", "1", "3")),
    "gpt": (models.gpt, lambda n: tokens(n, 16), ("blocks.0.feed.2", "blocks.1.query_key_value", "norm")),
    "tied gpt": (lambda: models.TiedGPT(False), lambda n: tokens(n, 16), ("body.blocks.0.feed.2", "body.norm")),
    "tied gpt, function": (lambda: models.TiedGPT(True), lambda n: tokens(n, 16), ("body.blocks.1.project",)),
    "lstm": (models.LSTMClassifier, lambda n: tokens(n, 7), ("token", "first", "second")),
    "skips": (models.Skips, lambda n: values(n, 8), ("a", "b", "c")),
    "named inputs": (models.Encoder, named, ("token", "layers.0.norm1", "layers.0.norm2")),
    "other in evaluation": (models.OtherInEvaluation, lambda n: values(n, 8), ("first",)),
    "corners": (models.Corners, lambda n: values(n, 3, 8), ("first", "norm", "last", "frozen")),
}


@pytest.mark.parametrize("name", CASES)
def test_stages_in_a_row_are_the_whole_model(name: str) -> None:
    build, features, cut_after = CASES[name]
    chain = Chain(build, features(5), cut_after)
    assert len(chain.stages) == len(cut_after) + 1
    for rows in (5, 2, 1) if name not in ("cnn", "other in evaluation") else (5, 2):
        chain.check(features(rows))


def test_an_input_by_name_is_found_in_any_order() -> None:
    chain = Chain(models.Encoder, named(3), ())
    given_in_order = named(2)
    other = dict(reversed(given_in_order.items()))
    module = chain.modules[0].eval()
    close(module(**other), module(*(given_in_order[name] for name in chain.stages[0].features)), "output")


def test_tied_weights_are_on_both_stages_under_the_same_names() -> None:
    stages = cut(traced(lambda: models.TiedGPT(False), tokens(3, 16)), ("body.blocks.0.feed.2",))
    assert tied(stages) == {"body.token.weight": (0, 1)}
    for names in names_of(stages):
        assert {"body.token.weight", "body.head.weight"} <= set(names)
    torch.manual_seed(0)
    last = stage_module(stages[1], initial(models.TiedGPT(False), stages[1].names), torch.device("cpu"))
    assert last.get_parameter("body.head.weight") is last.get_parameter("body.token.weight")
    assert "body.head.weight" in last.state_dict() and "body.token.weight" in last.state_dict()


def test_parameters_are_on_one_stage_and_in_the_order_of_the_model() -> None:
    stages = cut(traced(models.mlp, values(3, 8)), ("1", "3"))
    assert names_of(stages) == [
        ("0.weight", "0.bias"),
        ("2.weight", "2.bias"),
        ("4.weight", "4.bias", "6.weight", "6.bias", "8.weight", "8.bias"),
    ]
    assert tied(stages) == {}
    assert [crossing.bytes_per_sample for stage in stages for crossing in stage.outputs] == [64.0, 48.0]


def test_causal_positions_are_computed_again_and_masks_are_sent_to_those_who_need_them() -> None:
    stages = cut(traced(models.gpt, tokens(3, 16)), ("token",))
    assert [crossing.name for crossing in stages[0].outputs] == ["embedding"]
    stages = cut(traced(models.Encoder, named(3)), ("layers.0.norm2",))
    assert torch.float32 in [crossing.dtype for crossing in stages[0].outputs]
    assert [crossing.requires_grad for crossing in stages[0].outputs].count(True) == 1


def test_the_place_of_fewest_bytes_is_taken() -> None:
    """After the projection lie the residual sum and nothing with parameters: one value crosses, not two."""
    stages = cut(traced(models.gpt, tokens(3, 16)), ("blocks.0.project",))
    assert [crossing.bytes_per_sample for crossing in stages[0].outputs] == [16 * 32 * 4.0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (models.Branching, "depends on the values of a tensor (split_models.py, line"),
        (models.OneBatchSize, "one batch size only"),
    ],
)
def test_what_cannot_be_traced_says_why(
    build: Callable[[], nn.Module], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CannotTrace) as caught:
        traced(build, values(4, 8))
    assert caught.value.message.startswith("the model cannot be traced: ") and words in caught.value.message
    assert caught.value.hint and caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("build", "layer", "words"),
    [
        (models.SharedNorm, "norm", "is written on one side and used on the other"),
        (models.WholeBatchValue, "b", "no batch dimension"),
        (models.mlp, "8", "no layer with parameters after it"),
        (models.mlp, "nothing", "is not a layer"),
    ],
)
def test_where_a_model_cannot_be_cut_is_said(build: Callable[[], nn.Module], layer: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        cut(traced(build, values(4, 8)), (layer,))
    assert f"after {layer}" in caught.value.message and words in caught.value.message


def test_cuts_come_in_the_order_of_the_model() -> None:
    model = traced(models.mlp, values(4, 8))
    with pytest.raises(SpecError, match="does not come after"):
        cut(model, ("4", "1"))
    with pytest.raises(SpecError, match="does not come after"):
        cut(model, ("0", "1"))  # one place: nothing with parameters lies between


def test_bf16_crosses_as_the_model_computes_it() -> None:
    torch.manual_seed(0)
    whole = models.mlp()
    stages = cut(trace_model(whole, values(3, 8), "bf16"), ("1",))
    assert [crossing.dtype for crossing in stages[0].outputs] == [torch.bfloat16]
    modules = [stage_module(stage, initial(whole, stage.names), torch.device("cpu")) for stage in stages]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (between,) = modules[0](values(3, 8))
        assert between.dtype == torch.bfloat16
        close(modules[1](between), whole(values(3, 8)), "output")


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    chain = Chain(build, values(3, 8), ("1",))
    first = chain.modules[0].train()
    assert (first(values(3, 8))[0] == 0).any()
    first.eval()
    assert not (first(values(3, 8))[0] == 0).any()


@pytest.fixture(scope="module")
def known() -> dict[str, Cuttable]:
    return {"mlp": traced(models.mlp, values(3, 8)), "gpt": traced(models.gpt, tokens(3, 16))}


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_computes_the_same(name: str, known: dict[str, Cuttable], data: st.DataObject) -> None:
    build, features, _ = CASES[name]
    points = known[name].training
    by_gap = {points.gap_after(layer): layer for layer in points.traced.calls}
    layers = [layer for gap, layer in sorted(by_gap.items()) if gap is not None and 0 <= gap < len(points.places)]
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(layers))), max_size=4)))
    rows = data.draw(st.integers(1, 4))
    chain = Chain(build, features(3), [layers[number] for number in chosen], known[name])
    chain.check(features(rows))
