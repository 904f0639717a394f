"""What scikit-learn makes of the same rows: a logistic regression and gradient-boosted trees, with bootstrap intervals.

Both learn from the training set that `prepare.py` wrote; to look at settings, parts of it are held out (`--validation`).

- logistic: one-hot of each id and of the logarithm's rounded down bucket of each integer, hashed to 2^18 columns.
- trees: HistGradientBoostingClassifier over the integers, how often each id is met, and the mean label of each id (by
  TargetEncoder, which makes a row's from other rows).

    python pipelines/criteo/baselines.py [--validation part-5 part-6]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prepare import INTEGERS, STRINGS
from scipy.sparse import csr_matrix
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.preprocessing import TargetEncoder

from embedshard.data.hashing import hash_integers
from embedshard.evaluate.label_metrics import LabelSums
from embedshard.evaluate.label_rows import LabelRows

BITS = 18
RESAMPLES = 1000
SEED = 7
METRICS = ["auc", "log_loss", "normalised_entropy", "calibration"]

Array = npt.NDArray[np.float64]


def main() -> None:
    """Parses arguments, fits, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("EMBEDSHARD_DATA") or "data") / "criteo"
    parser.add_argument("--data", type=Path, default=default, help="what prepare.py wrote (default: %(default)s)")
    parser.add_argument("--validation", nargs="+", default=[], help="training files to measure on, instead of the test set")
    parser.add_argument("--c", type=float, default=0.05, help="the regression's inverse penalty (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.05, help="the trees' learning rate (default: %(default)s)")
    parser.add_argument("--trees", type=int, default=150, help="how many (default: %(default)s)")
    parser.add_argument("--leaves", type=int, default=15, help="of each tree (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        files = sorted((arguments.data / "train").glob("*.parquet"))
        held_out = [file for file in files if file.stem in arguments.validation]
        train = read([file for file in files if file not in held_out])
        test = read(held_out or sorted((arguments.data / "test").glob("*.parquet")))
    except (OSError, ValueError) as error:
        sys.exit(f"baselines.py: {error}. First: python pipelines/criteo/prepare.py")
    trees = (arguments.rate, arguments.trees, arguments.leaves)
    for name, logits in (("logistic", logistic(train, test, arguments.c)), ("trees", boosted(train, test, *trees))):
        sums, rows = make_sums(), LabelRows(METRICS, make_sums)
        labels = torch.from_numpy(test["label"].to_numpy().astype(np.float64))
        for kept in (sums, rows):
            kept.update(torch.from_numpy(logits)[:, None], labels[:, None], torch.ones(len(labels), dtype=torch.float64))
        values, intervals = sums.result(), rows.intervals(RESAMPLES, SEED)
        print(
            f"{name}: " + ", ".join(f"{m} {values[m]:.4f} [{low:.4f}, {high:.4f}]" for m, (low, high) in intervals.items())
        )


def make_sums() -> LabelSums:
    """Returns sums of the one label, without a row."""
    return LabelSums(METRICS, "sigmoid", ["label"])


def read(files: Sequence[Path]) -> pa.Table:
    """Returns the rows of files, which there must be.

    Raises:
        ValueError: if there is none.
    """
    if not files:
        raise ValueError("there are no files")
    return pa.concat_tables([pq.read_table(file) for file in files])


def logistic(train: pa.Table, test: pa.Table, c: float) -> Array:
    """Returns the test rows' log odds."""
    model = LogisticRegression(C=c, solver="liblinear")
    model.fit(hashed(train), train["label"].to_numpy())
    return model.decision_function(hashed(test))


def hashed(rows: pa.Table) -> csr_matrix:
    """Returns ones at the hashed places of what each row holds, (rows, 2^18)."""
    places = []
    for number, name in enumerate((*INTEGERS, *STRINGS)):
        values = rows[name].to_numpy(zero_copy_only=False).astype(np.float64)
        if name in INTEGERS:
            values = np.sign(values) * np.floor(2 * np.log1p(np.abs(values)))
        known = np.where(np.isnan(values), -1e6, values).astype(np.int64)
        places.append(hash_integers(known, number) % np.uint64(2**BITS))
    columns = np.stack(places, axis=1).astype(np.int64).ravel()
    offsets = np.arange(0, len(columns) + 1, len(places))
    return csr_matrix((np.ones(len(columns)), columns, offsets), shape=(rows.num_rows, 2**BITS))


def boosted(train: pa.Table, test: pa.Table, rate: float, trees: int, leaves: int) -> Array:
    """Returns the test rows' log odds."""
    labels = train["label"].to_numpy()
    splits = KFold(n_splits=5, shuffle=True, random_state=SEED)
    encoder = TargetEncoder(target_type="binary", smooth=50.0, cv=splits)
    ids, other_ids = (np.stack([rows[name].fill_null(-1).to_numpy() for name in STRINGS], axis=1) for rows in (train, test))
    parts = [encoder.fit_transform(ids, labels)], [encoder.transform(other_ids)]
    for place in range(len(STRINGS)):
        known, counts = np.unique(ids[:, place], return_counts=True)
        for columns, values in zip(parts, (ids[:, place], other_ids[:, place]), strict=True):
            at = np.minimum(np.searchsorted(known, values), len(known) - 1)
            columns.append(np.where(known[at] == values, counts[at], 0)[:, None])
    for columns, rows in zip(parts, (train, test), strict=True):
        columns += [rows[name].to_numpy(zero_copy_only=False).astype(np.float64)[:, None] for name in INTEGERS]
    model = HistGradientBoostingClassifier(
        learning_rate=rate,
        max_iter=trees,
        max_leaf_nodes=leaves,
        min_samples_leaf=50,
        l2_regularization=10.0,
        random_state=SEED,
    )
    model.fit(np.concatenate(parts[0], axis=1), labels)
    return model.decision_function(np.concatenate(parts[1], axis=1))


if __name__ == "__main__":
    main()
