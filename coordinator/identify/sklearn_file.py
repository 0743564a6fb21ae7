"""A scikit-learn estimator as records: its chain of classes, its family and task, and its parameters counted exactly.

A parameter is a learned number that prediction needs: the elements of the attributes in LEARNED, and of each tree two
per inner node (feature and threshold) and the values of each leaf. Words, categories, copies of training options and
the state of solvers are none. An estimator that keeps what it learned elsewhere makes "parameters" unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from coordinator.identify.layers import Description, Layer, describe
from coordinator.identify.pickle_values import Array, Mapping, Object
from coordinator.identify.pickle_walk import Walked
from coordinator.identify.sklearn_names import FOREIGN_LIBRARIES, LIBRARIES, family_of, task_of
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, unusable
from protos.model import ModelProfile

LEARNED = frozenset({
    "coef_", "intercept_", "coefs_", "intercepts_",  # linear models, support vectors with a linear kernel, perceptrons
    "theta_", "var_", "class_prior_", "feature_log_prob_", "class_log_prior_",  # naive Bayes
    "support_vectors_", "dual_coef_", "offset_", "_baseline_prediction", "estimator_weights_", "X_train_", "alpha_",
    "cluster_centers_", "subcluster_centers_", "centroids_", "means_", "covariances_", "weights_", "components_",
    "mean_", "scale_", "min_", "center_", "statistics_", "lambdas_", "idf_", "_idf_diag", "scalings_", "rotations_",
    "location_", "covariance_", "_fit_X", "_y", "a_", "b_", "X_thresholds_", "y_thresholds_",
})  # fmt: skip
_COVARIANCES = ("EllipticEnvelope", "EmpiricalCovariance", "MinCovDet", "LedoitWolf", "OAS", "ShrunkCovariance")
_ONLY_HERE = {  # attributes that are learned in some classes and something else in others
    "var_": ("GaussianNB", "BayesianGaussianMixture"),
    "weights_": ("GaussianMixture", "BayesianGaussianMixture"),
    "alpha_": ("GaussianProcessRegressor",),
    "means_": ("GaussianMixture", "BayesianGaussianMixture", "QuadraticDiscriminantAnalysis"),
    "scalings_": ("QuadraticDiscriminantAnalysis",),
    "a_": ("_SigmoidCalibration",),
    "b_": ("_SigmoidCalibration",),
    "location_": _COVARIANCES,
    "covariance_": _COVARIANCES,
    "offset_": ("OneClassSVM", "SGDOneClassSVM", "IsolationForest", "EllipticEnvelope", "LocalOutlierFactor"),
    "scale_": ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler"),
    "mean_": ("StandardScaler", "PCA", "IncrementalPCA", "FactorAnalysis", "FastICA"),
}
_MAX_DEPTH = 40
_MAX_VISITS = 2_000_000
_AGAIN = "save it again from a fitted estimator, e.g. with skops.io.dump"
_WHY_NOT = (
    "scikit-learn's estimators are not trained by hive, and a pickle of one is never loaded, because loading it would "
    "run code. A linear model or a perceptron is written as torch.nn layers in a few lines; trees have no gradients. "
)


def is_estimator(value: Any) -> bool:
    """An estimator, or a list or dict that has one in it."""
    return any(True for _ in _entries(value))


def profile(walked: Walked, file_format: str, size: int) -> ModelProfile:
    """The profile of a walked estimator. Raises SpecError for one that is nested without end or lies about its size."""
    entries = list(_entries(walked.value))
    count = _Count()
    chains = []
    for name, estimator in entries:
        chains.append(_chain(estimator))
        count.add(name, estimator)
    main = _last(entries[-1][1])
    family, confidence = family_of(main.type, main.attributes, _members(main))
    task = task_of(main.type, main.attributes)
    notes = [f"architecture: {', '.join(chains)}"[:400], *count.notes()]
    if strange := [str(name) for name in walked.foreign.values() if name.module.partition(".")[0] not in LIBRARIES]:
        notes.append(f"it also names {', '.join(strange[:5])[:200]}, which no estimator of scikit-learn needs")
    return describe(
        Description(
            framework=FOREIGN_LIBRARIES.get(main.type.module.partition(".")[0], "scikit-learn"),
            file_format=file_format,
            file_bytes=size,
            why_not=_WHY_NOT + WHAT_HIVE_TRAINS,
            layers=count.layers or [Layer("model", main.type.name, 0)],
            parameters=count.parameters,
            dtypes=count.dtypes,
            family=(family, confidence),
            task=task,
            input_shape=_input_shape(entries[0][1]),
            unknown=["parameters"] if count.elsewhere or (count.fitted and not count.parameters) else [],
            notes=notes,
        )
    )


def _entries(value: Any) -> Iterator[tuple[str, Object]]:
    """The estimators of a saved value by name; the value itself is named "model"."""
    if _is_one(value):
        yield "model", value
    elif isinstance(value, Mapping):
        for name, item in value.items.items():
            if _is_one(item):
                yield str(name)[:100], item
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value[:1000]):
            if _is_one(item):
                yield str(index), item


def _is_one(value: Any) -> bool:
    if not isinstance(value, Object) or value.type.name[:1] == "_":
        return False
    root = value.type.module.partition(".")[0]
    if root in FOREIGN_LIBRARIES:
        return value.type.name not in ("DMatrix", "Dataset")
    if root == "sklearn":
        return value.type.module.split(".")[1:2] not in (["utils"], ["metrics"], ["_loss"])
    return "_sklearn_version" in value.attributes


def _steps(estimator: Object) -> list[tuple[str, Object]]:
    """The parts of an estimator that only chains others: pipelines, unions, column transformers."""
    attributes = estimator.attributes
    found = attributes.get("steps", attributes.get("transformers_", attributes.get("transformer_list")))
    steps = []
    for step in found if isinstance(found, list) else []:
        if isinstance(step, tuple) and len(step) >= 2 and isinstance(step[0], str) and _is_one(step[1]):
            steps.append((step[0][:100], step[1]))
    return steps


def _chain(estimator: Object, depth: int = 0) -> str:
    steps = _steps(estimator) if depth < 4 else []
    inner = ", ".join(_chain(step, depth + 1) for _, step in steps[:20])
    if not steps and depth < 4 and isinstance(base := estimator.attributes.get("estimator"), Object) and _is_one(base):
        inner = _chain(base, depth + 1)
    name = estimator.type.name.encode("ascii", "replace").decode()[:100]
    return f"{name}({inner})" if inner else name


def _last(estimator: Object) -> Object:
    """The estimator that predicts: the last of a pipeline, the best of a search."""
    for _ in range(_MAX_DEPTH):
        best = estimator.attributes.get("best_estimator_")
        if isinstance(best, Object):
            estimator = best
        elif estimator.type.name == "Pipeline" and (steps := _steps(estimator)):
            estimator = steps[-1][1]
        else:
            break
    return estimator


def _members(estimator: Object) -> list[Object]:
    """The estimators that an ensemble votes with."""
    found = estimator.attributes.get("estimators_", estimator.attributes.get("calibrated_classifiers_"))
    listed = found.objects if isinstance(found, Array) else found
    return [item for item in listed if isinstance(item, Object)][:10] if isinstance(listed, list) else []


def _input_shape(estimator: Object) -> tuple[int, ...] | None:
    for _ in range(_MAX_DEPTH):
        attributes = estimator.attributes
        features = attributes.get("n_features_in_", attributes.get("_n_features", attributes.get("n_features_")))
        if type(features) is int and 0 < features < 2**40:
            return (features,)
        coefficients = attributes.get("coef_")
        if isinstance(coefficients, Array) and coefficients.shape:
            return (coefficients.shape[-1],)  # versions before 0.24 do not say it
        steps = _steps(estimator)
        if not steps or "vocabulary_" in steps[0][1].attributes:
            return None
        estimator = steps[0][1]
    return None


@dataclass(slots=True)
class _Count:
    """Parameters of estimators and of all that are in them, each counted once."""

    layers: list[Layer] = field(default_factory=list)
    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)
    elsewhere: list[str] = field(default_factory=list)
    fitted: bool = False
    words: int = 0
    seen: set[int] = field(default_factory=set)

    def add(self, name: str, estimator: Object, depth: int = 0) -> None:
        """One layer for every part of a chain, one for any other estimator with all that is in it."""
        if depth > _MAX_DEPTH:
            raise unusable("the estimators in the file are nested without end", _AGAIN)
        steps = _steps(estimator)
        if steps:
            for inner, step in steps:
                self.add(inner if name == "model" else f"{name}.{inner}", step, depth + 1)
        elif estimator.attributes.get("coefs_"):
            self._perceptron(name, estimator)
        else:
            found = self._within(estimator)
            self.parameters += found
            if found:
                self.layers.append(Layer(name, estimator.type.name, found))

    def notes(self) -> Iterator[str]:
        if not self.fitted and not self.elsewhere:
            yield "it is not fitted: it has learned nothing yet"
        if self.words:
            yield f"its vocabulary of {self.words} words is not counted"
        if self.elsewhere:
            yield f"what {', '.join(dict.fromkeys(self.elsewhere))} learned is not kept in attributes that are counted"

    def _perceptron(self, name: str, estimator: Object) -> None:
        weights, biases = (estimator.attributes.get(key) for key in ("coefs_", "intercepts_"))
        self.fitted = True
        for index, weight in enumerate(weights if isinstance(weights, list) else []):
            bias = biases[index] if isinstance(biases, list) and index < len(biases) else None
            found = self._numbers(weight) + self._numbers(bias)
            self.parameters += found
            shape = weight.shape[-1:] if isinstance(weight, Array) else ()
            self.layers.append(Layer(f"{name}.{index}", "Linear", found, output_shape=shape))

    def _within(self, estimator: Object) -> int:
        """Of an estimator and everything it holds, without recursion: a file can nest as deep as it likes."""
        total = 0
        waiting: list[Any] = [estimator]
        visits = 0
        while waiting:
            item = waiting.pop()
            visits += 1
            if visits > _MAX_VISITS:
                raise unusable("the estimators in the file hold too much", _AGAIN)
            if not isinstance(item, Object):
                waiting += _inside(item)
                continue
            if id(item) in self.seen:
                continue
            self.seen.add(id(item))
            tree = self._tree(item)
            total += self._own(item) if tree is None else tree
            waiting += [value for name, value in item.attributes.items() if not _counted(item, name)]
        return total

    def _own(self, item: Object) -> int:
        attributes = item.attributes
        total = 0
        learned = [name for name in attributes if _counted(item, name)]
        for name in learned:
            total += self._numbers(attributes[name])
        if isinstance(words := attributes.get("vocabulary_"), Mapping):
            self.words += len(words.items)
        if learned or any(isinstance(name, str) and _is_result(name) for name in attributes):
            self.fitted = True
        if item.type.name in ("Booster", "NDArrayWrapper", "ZNDArrayWrapper") or attributes.get("_Booster") is not None:
            self.elsewhere.append(item.type.name)
        return total

    def _tree(self, item: Object) -> int | None:
        """Of one decision tree; every inner node has two children, so the leaves are one more than the inner nodes."""
        if item.type.name not in ("Tree", "TreePredictor"):
            return None
        nodes, values = item.attributes.get("nodes"), item.attributes.get("values")
        if not isinstance(nodes, Array) or len(nodes.shape) != 1:
            return 0
        count = nodes.shape[0]
        inner = max(0, count - 1) // 2
        per_leaf = 1
        if isinstance(values, Array):
            per_leaf = values.elements // max(count, 1)
        self.fitted = True
        self.dtypes.add("F64")
        return 2 * inner + (count - inner) * per_leaf

    def _numbers(self, value: Any) -> int:
        """How many numbers an attribute holds: of an array, a list of arrays, a sparse matrix, or one number."""
        if isinstance(value, Array):
            if value.objects is not None:
                return sum(self._numbers(item) for item in value.objects if isinstance(item, Array))
            if value.dtype is not None and value.dtype.code[:1] in "fiubc":
                self.dtypes.add(value.dtype.name)
                return value.elements
            return 0
        if isinstance(value, list):
            return sum(self._numbers(item) for item in value[:_MAX_VISITS] if isinstance(item, Array))
        if isinstance(value, Object):  # a sparse matrix of scipy's
            data = value.attributes.get("data")
            if not isinstance(data, Array):
                self.elsewhere.append(value.type.name)
            return self._numbers(data) if isinstance(data, Array) else 0
        return 1 if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        inside = value.items.values()
    elif isinstance(value, list | tuple):
        inside = value  # type: ignore[assignment]
    elif isinstance(value, Array):
        inside = value.objects or ()  # type: ignore[assignment]
    else:
        return []
    return [item for item in inside if isinstance(item, Object | Mapping | list | tuple | Array)]


def _counted(item: Object, name: Any) -> bool:
    if name not in LEARNED:
        return False
    only = _ONLY_HERE.get(name)
    return only is None or item.type.name in only


def _is_result(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")
