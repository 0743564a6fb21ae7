"""Family and task of scikit-learn's estimators, and of xgboost's, lightgbm's and catboost's, from their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.identify.pickle_values import Global, Object
from protos.model import Family

FOREIGN_LIBRARIES = {"xgboost": "xgboost", "lightgbm": "lightgbm", "catboost": "catboost"}
LIBRARIES = frozenset(
    {"sklearn", "numpy", "scipy", "joblib", "builtins", "copyreg", "collections", "_codecs", "functools", "dtype"}
    | {"storage", "datetime", "pandas", "_loss", *FOREIGN_LIBRARIES}
)
_LINEAR_AREAS = ("linear_model", "naive_bayes", "discriminant_analysis", "cross_decomposition")
_TREES = ("Forest", "GradientBoosting", "Tree", "IsolationForest")
_REGRESSION = (
    "Regressor", "LinearRegression", "SVR", "Ridge", "RidgeCV", "Lasso", "LassoCV", "LassoLars", "LassoLarsCV",
    "LassoLarsIC", "ElasticNet", "ElasticNetCV", "Lars", "LarsCV", "BayesianRidge", "ARDRegression", "KernelRidge",
    "IsotonicRegression", "OrthogonalMatchingPursuit", "MultiTaskLasso", "MultiTaskElasticNet", "PLSRegression", "CCA",
)  # fmt: skip
_CLASSIFICATION = (
    "Classifier", "ClassifierCV", "SVC", "LogisticRegression", "LogisticRegressionCV", "NB", "DiscriminantAnalysis",
    "Perceptron", "NearestCentroid", "LabelPropagation", "LabelSpreading",
)  # fmt: skip
_OUTLIERS = ("IsolationForest", "OneClassSVM", "EllipticEnvelope", "LocalOutlierFactor")
_CLUSTERING = ("KMeans", "DBSCAN", "OPTICS", "MeanShift", "Birch", "Clustering", "Mixture", "AffinityPropagation")
_TRANSFORM_AREAS = (
    "preprocessing", "decomposition", "feature_extraction", "feature_selection", "impute", "manifold", "compose",
    "random_projection", "kernel_approximation",
)  # fmt: skip


def family_of(found: Global, attributes: Mapping[Any, Any], members: Sequence[Object] = ()) -> tuple[Family, float]:
    """Family and how sure it is; an ensemble is what its members are."""
    root, _, rest = found.module.partition(".")
    area = rest.partition(".")[0]
    if root in FOREIGN_LIBRARIES:
        linear = attributes.get("booster") == "gblinear" or attributes.get("linear_tree") is True
        return (Family.LINEAR, 0.9) if linear else (Family.TREE, 0.9)
    if root != "sklearn":
        return Family.UNKNOWN, 0.3
    if area == "tree" or (area == "ensemble" and any(word in found.name for word in _TREES)):
        return Family.TREE, 1.0
    if area == "neural_network" and found.name.startswith("MLP"):
        return Family.MLP, 1.0
    if area in _LINEAR_AREAS:
        return Family.LINEAR, 1.0
    if area == "svm":
        is_linear = found.name.startswith("Linear") or attributes.get("kernel") == "linear"
        return (Family.LINEAR, 1.0) if is_linear else (Family.UNKNOWN, 0.5)
    if members:
        first = members[0]
        inner = first.attributes.get("estimator", first.attributes.get("base_estimator"))
        known = inner if isinstance(inner, Object) else first
        return family_of(known.type, known.attributes)
    return Family.UNKNOWN, 0.5


def task_of(found: Global, attributes: Mapping[Any, Any]) -> str:
    """classification, regression, ranking, clustering, outlier_detection or transform; "" when it cannot be told."""
    name = found.name
    if name.endswith(_OUTLIERS):
        return "outlier_detection"
    if name.endswith(_REGRESSION):
        return "regression"
    if name.endswith(_CLASSIFICATION):
        return "classification"
    if name.endswith("Ranker"):
        return "ranking"
    if any(word in name for word in _CLUSTERING):
        return "clustering"
    if "classes_" in attributes:
        return "classification"
    return "transform" if found.module.split(".")[1:2] and found.module.split(".")[1] in _TRANSFORM_AREAS else ""
