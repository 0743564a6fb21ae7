"""scikit-learn's estimators in every file they come in: named, counted as the fitted objects say, and never built."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import warnings
import zipfile
from typing import Any

import joblib
import numpy as np
import pytest
from lz4_writer import lz4

from coordinator.identify import joblib_stream, lz4_frame, parse
from protos.errors import SpecError
from protos.model import Family, ModelProfile

pytest.importorskip("sklearn")
from sklearn import (
    calibration,
    cluster,
    compose,
    datasets,
    decomposition,
    ensemble,
    linear_model,
    model_selection,
    naive_bayes,
    neighbors,
    neural_network,
    pipeline,
    preprocessing,
    svm,
    tree,
)

X, Y = (part[:150] for part in datasets.load_iris(return_X_y=True))


def identify(content: bytes) -> ModelProfile:
    return parse.identify(io.BytesIO(content))


def fitted(estimator: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimator.fit(X, Y)


def joblib_bytes(value: object, compress: Any = 0) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer, compress=compress)
    return buffer.getvalue()


def numbers_of_tree(found: Any) -> int:
    inner = int((found.feature >= 0).sum())
    return 2 * inner + (found.node_count - inner) * int(np.prod(found.value.shape[1:]))


def numbers(estimator: Any) -> int:
    """As the fitted object itself says: coefficients, or two per inner node and the values of each leaf."""
    if isinstance(estimator, pipeline.Pipeline):
        return sum(numbers(step) for _, step in estimator.steps)
    if hasattr(estimator, "tree_"):
        return numbers_of_tree(estimator.tree_)
    if hasattr(estimator, "_predictors"):
        nodes = [found.nodes for row in estimator._predictors for found in row]
        leaves = [int(each["is_leaf"].sum()) for each in nodes]
        inner = [len(each) - leaf for each, leaf in zip(nodes, leaves, strict=True)]
        return 2 * sum(inner) + sum(leaves) + estimator._baseline_prediction.size
    if hasattr(estimator, "coefs_"):
        return sum(array.size for array in [*estimator.coefs_, *estimator.intercepts_])
    if hasattr(estimator, "estimators_"):
        return sum(numbers(member) for member in np.ravel(np.array(estimator.estimators_, object)))
    names = ("coef_", "intercept_", "cluster_centers_", "components_", "mean_", "theta_", "var_", "class_prior_")
    if isinstance(estimator, preprocessing.StandardScaler):
        names = ("mean_", "scale_")
    found = [getattr(estimator, name) for name in names if hasattr(estimator, name)]
    return sum(np.asarray(array).size for array in found)


CASES: list[tuple[Any, Family, str]] = [
    (linear_model.LogisticRegression(max_iter=5), Family.LINEAR, "classification"),
    (linear_model.LinearRegression(), Family.LINEAR, "regression"),
    (linear_model.SGDClassifier(max_iter=5), Family.LINEAR, "classification"),
    (svm.LinearSVC(max_iter=5), Family.LINEAR, "classification"),
    (naive_bayes.GaussianNB(), Family.LINEAR, "classification"),
    (tree.DecisionTreeClassifier(), Family.TREE, "classification"),
    (ensemble.RandomForestRegressor(4), Family.TREE, "regression"),
    (ensemble.ExtraTreesClassifier(4), Family.TREE, "classification"),
    (ensemble.HistGradientBoostingClassifier(max_iter=3), Family.TREE, "classification"),
    (neural_network.MLPClassifier(hidden_layer_sizes=(7, 5), max_iter=2), Family.MLP, "classification"),
    (cluster.KMeans(3, n_init=1), Family.UNKNOWN, "clustering"),
    (decomposition.PCA(2), Family.UNKNOWN, "transform"),
    (ensemble.BaggingClassifier(linear_model.LogisticRegression(max_iter=5), 3), Family.LINEAR, "classification"),
    (
        pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.RidgeClassifier()),
        Family.LINEAR,
        "classification",
    ),
]


@pytest.mark.parametrize(("estimator", "family", "task"), CASES, ids=lambda value: type(value).__name__)
def test_family_task_and_exact_numbers(estimator: Any, family: Family, task: str) -> None:
    made = fitted(estimator)
    expected = numbers(made)
    assert expected > 0
    files = [(pickle.dumps(made, protocol), "sklearn_pickle") for protocol in range(6)]
    files += [(joblib_bytes(made), "joblib"), (joblib_bytes(made, 3), "joblib")]
    for content, file_format in files:
        profile = identify(content)
        assert (profile.framework, profile.format) == ("scikit-learn", file_format)
        assert (profile.parameters, profile.family, profile.task) == (expected, family, task)
        assert sum(layer.parameters for layer in profile.layers) == expected
        assert profile.input_shape == (X.shape[1],)
        assert profile.dtypes == ("F64",)
        assert "parameters" not in profile.unknown
        assert not profile.trainable and "torch.nn" in profile.why_not


def test_the_chain_of_a_pipeline_is_named_step_by_step() -> None:
    columns = compose.ColumnTransformer([("scale", preprocessing.StandardScaler(), [0, 1])], remainder="passthrough")
    made = fitted(pipeline.Pipeline([("columns", columns), ("model", ensemble.RandomForestClassifier(2))]))
    profile = identify(joblib_bytes(made))
    assert "Pipeline(ColumnTransformer(StandardScaler" in profile.notes[0]
    assert "RandomForestClassifier(DecisionTreeClassifier)" in profile.notes[0]
    assert [layer.name for layer in profile.layers] == ["columns.scale", "model"]
    assert profile.family is Family.TREE


def test_searches_and_calibration_are_what_they_found() -> None:
    search = fitted(model_selection.GridSearchCV(tree.DecisionTreeClassifier(), {"max_depth": [1, 2]}, cv=2))
    profile = identify(pickle.dumps(search))
    assert (profile.family, profile.task) == (Family.TREE, "classification")
    assert profile.parameters == numbers(search.best_estimator_)
    calibrated = fitted(calibration.CalibratedClassifierCV(svm.LinearSVC(max_iter=5), cv=2))
    profile = identify(pickle.dumps(calibrated))
    assert profile.family is Family.LINEAR
    assert profile.parameters == 2 * (15 + 2 * 3)  # coefficients, and a slope and an offset for each class


def test_a_perceptron_has_its_layers() -> None:
    made = fitted(neural_network.MLPRegressor(hidden_layer_sizes=(7, 5), max_iter=2))
    profile = identify(pickle.dumps(made))
    assert [(layer.kind, layer.parameters, layer.output_shape) for layer in profile.layers] == [
        ("Linear", 35, (7,)),
        ("Linear", 40, (5,)),
        ("Linear", 6, (1,)),
    ]


def test_a_dictionary_of_estimators_is_looked_into() -> None:
    value = {"scaler": fitted(preprocessing.StandardScaler()), "model": fitted(linear_model.Ridge()), "version": 3}
    profile = identify(pickle.dumps(value))
    assert [(layer.name, layer.parameters) for layer in profile.layers] == [("scaler", 8), ("model", 5)]
    assert profile.task == "regression"


def test_what_is_not_fitted_or_kept_elsewhere_says_so() -> None:
    profile = identify(pickle.dumps(linear_model.LogisticRegression()))
    assert profile.parameters == 0
    assert "it is not fitted: it has learned nothing yet" in profile.notes
    found = identify(pickle.dumps(fitted(neighbors.KNeighborsClassifier())))
    assert found.parameters == X.size + Y.size  # what it learned is the data
    assert "parameters" in identify(pickle.dumps(fitted(preprocessing.QuantileTransformer(n_quantiles=5)))).unknown


FOREST = fitted(ensemble.RandomForestClassifier(3, random_state=0))


@pytest.mark.parametrize("compression", ["zlib", "gzip", "bz2", "lzma", "xz"])
def test_joblibs_compressions_are_unpacked_on_the_way(compression: str) -> None:
    content = joblib_bytes(FOREST, (compression, 3))
    profile = identify(content)
    assert (profile.format, profile.parameters) == ("joblib", numbers(FOREST))
    for length in range(10, len(content) * 9 // 10, len(content) // 20):
        try:
            assert identify(content[:length]).format in ("gzip", "bzip2", "xz", "unknown")  # nothing came out of it yet
        except SpecError as error:
            assert error.hint


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("checked", [False, True])
def test_lz4_frames_are_unpacked_without_a_library(linked: bool, checked: bool) -> None:
    data = joblib_bytes({"model": FOREST, "zeros": np.zeros(50_000)})
    frame = lz4(data, linked=linked, checked=checked)
    assert len(frame) < len(data) - 150_000
    assert b"".join(lz4_frame.blocks(io.BytesIO(frame))) == data
    assert identify(frame).parameters == numbers(FOREST)
    for length in range(1, len(frame) - 4, len(frame) // 20):
        with pytest.raises((EOFError, ValueError, IndexError)):
            list(lz4_frame.blocks(io.BytesIO(frame[:length])))
    assert identify(lz4(b"no pickle" * 100)).format == "lz4"


def test_a_file_that_unpacks_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib_stream, "MAX_UNPACKED_BYTES", 16 << 20)
    content = b"\x80\4B" + struct.pack("<I", 32 << 20) + bytes(32 << 20) + b"."
    with pytest.raises(SpecError, match="unpacks to more than"):
        identify(gzip.compress(content))


def test_other_compressed_files_are_only_named() -> None:
    profile = identify(gzip.compress(b"no model at all" * 100))
    assert (profile.format, profile.parameters) == ("gzip", 0)


def test_objects_in_joblibs_arrays_are_looked_into() -> None:
    boosted = fitted(ensemble.GradientBoostingRegressor(n_estimators=3))
    profile = identify(joblib_bytes(boosted))
    assert profile.parameters == sum(numbers_of_tree(row[0].tree_) for row in boosted.estimators_)


class _Own:
    """A class of the user's, in an attribute that no estimator has."""


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def test_a_payload_inside_an_estimator_is_refused_and_a_class_named(tmp_path: Any) -> None:
    made = fitted(linear_model.LogisticRegression(max_iter=5))
    made.callback = _Own()
    for content in (pickle.dumps(made), joblib_bytes(made), joblib_bytes(made, 3)):
        profile = identify(content)
        assert profile.parameters == 15
        assert any("_Own" in note for note in profile.notes if "no estimator" in note)
    made.callback = _Payload(str(tmp_path / "executed"))
    for content in (pickle.dumps(made), joblib_bytes(made), joblib_bytes(made, 3)):
        with pytest.raises(SpecError, match=r"names io\.open, .* nothing was executed"):
            identify(content)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name", "framework", "task"),
    [
        ("xgboost.sklearn", "XGBRegressor", "xgboost", "regression"),
        ("lightgbm.sklearn", "LGBMClassifier", "lightgbm", "classification"),
        ("catboost.core", "CatBoostClassifier", "catboost", "classification"),
    ],
)
def test_other_libraries_are_named(module: str, name: str, framework: str, task: str) -> None:
    content = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81}U\x08_BoosterU\x03abcsb."
    profile = identify(content)
    assert (profile.framework, profile.family, profile.task) == (framework, Family.TREE, task)
    assert "parameters" in profile.unknown and name in profile.notes[0]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def skops(**changes: Any) -> bytes:
    """A LogisticRegression as skops lays it out."""

    def plain(value: Any) -> dict[str, Any]:
        return {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": json.dumps(value)}

    def array(file: str) -> dict[str, Any]:
        return {
            "__class__": "ndarray",
            "__module__": "numpy",
            "__loader__": "NdArrayNode",
            "type": "numpy",
            "file": file,
        }

    attributes = {"coef_": array("1.npy"), "intercept_": array("2.npy"), "n_features_in_": plain(4)} | changes
    content = {"__class__": "dict", "__module__": "builtins", "__loader__": "DictNode", "content": attributes}
    schema = {
        "__class__": "LogisticRegression",
        "__module__": "sklearn.linear_model._logistic",
        "__loader__": "ObjectNode",
        "content": content,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.npy", npy(np.zeros((3, 4))))
        archive.writestr("2.npy", npy(np.zeros(3)))
        archive.writestr("schema.json", json.dumps({**schema, "protocol": 2}))
    return buffer.getvalue()


def test_skops_files_are_read_by_their_schema() -> None:
    profile = identify(skops())
    assert (profile.framework, profile.format, profile.parameters) == ("scikit-learn", "skops", 15)
    assert (profile.family, profile.task, profile.input_shape) == (Family.LINEAR, "classification", (4,))


def test_hostile_schemas_are_ordinary_errors() -> None:
    deep: dict[str, Any] = {"__loader__": "ListNode", "content": []}
    for _ in range(300):
        deep = {"__loader__": "ListNode", "content": [deep]}
    missing = {"__loader__": "NdArrayNode", "type": "numpy", "file": "../../etc/passwd"}
    for changes, message in (({"x": deep}, "nested too deeply"), ({"coef_": missing}, "missing from the archive")):
        with pytest.raises(SpecError, match=message):
            identify(skops(**changes))
    itself = {"__loader__": "CachedNode", "__id__": 7}
    assert identify(skops(x=itself, y=5, z=[], w={"__loader__": "Unheard", "content": 3})).parameters == 15
