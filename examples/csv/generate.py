"""Writes diabetes.csv again: scikit-learn's diabetes dataset (BSD), unscaled, rows in a fixed random order."""

import csv
import random
from pathlib import Path

from sklearn import datasets

COLUMNS = ["age", "sex", "bmi", "blood_pressure", "s1", "s2", "s3", "s4", "s5", "s6", "progression"]


def rows() -> list[list[float]]:
    features, target = datasets.load_diabetes(return_X_y=True, scaled=False)
    table = [[*map(float, row), float(value)] for row, value in zip(features, target, strict=True)]
    random.Random(0).shuffle(table)
    return table


def write(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[f"{value:.6g}" for value in row] for row in rows()])


if __name__ == "__main__":
    write(Path(__file__).with_name("diabetes.csv"))
