"""How far to trust a prediction: intervals that hold 90 % of the true values, and the distance to what was learnt from.

    known = neighbours(X_train)                          # of one model, kept in its folder
    sigma = difficulty(distance(X, known))               # (M,) of any crystals
    q = quantile(np.abs(y - prediction) / sigma)         # of rows with labels that did not train the model
    prediction - q * sigma, prediction + q * sigma       # for new crystals

Split conformal prediction, normalised by a difficulty (Papadopoulos et al. 2008, Lei et al. 2018): of crystals drawn as
the rows behind q were, about 90 % lie inside; sigma makes intervals wide where training rows are far. Not exactly: the
validation rows behind the q of one split have chosen the epoch, and the mean of K models is not the one model behind
each residual of a run of folds. What it comes to is measured, "coverage" in metrics.json. For crystals unlike those
rows nothing is promised.

X: (M, C) representations of crystals under the fine-tuned model. n: training rows. y, intervals: labels after the
transform, so an interval of a logarithm is mapped back to positive values.
"""

import io
import json

from files import reading

import numpy as np

import hub
from tasks import inverse

LEVEL = 0.9
OFFSET = 0.5  # of the difficulty, in units of a usual distance: the error that remains next to a training row
NEIGHBOURS, CALIBRATION = "neighbours.npz", "calibration.json"  # in the folder of a model; of a run of folds the second


def neighbours(X) -> dict:
    """What distances need of the training rows X (n, C): these, and "usual" (n,), ascending, between them."""
    usual = nearest(X)(None) if len(X) > 1 else np.ones(1)
    return {"X": X.astype(np.float32), "usual": np.sort(usual).astype(np.float32)}


def nearest(X):
    """Returns f(other) -> (M,), Euclidean distances to the nearest row of X; f(None): of each row to another."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(X)
    return lambda other: search.kneighbors(other)[0][:, 0]


def distance(X, known):
    """(M,) distance to the nearest training row; 1 is the mean of the training rows' own to each other."""
    return nearest(known["X"])(X) / max(known["usual"].mean(dtype=float), 1e-12)


def percentile(d, known):
    """(M,) of distances, 0 to 100: how many of the training rows are nearer to their nearest neighbour than that."""
    usual = known["usual"] / max(known["usual"].mean(dtype=float), 1e-12)
    return 100 * np.searchsorted(usual, d) / len(usual)


def difficulty(d):
    """sigma (M,): how large the error may be, in relative terms, at a distance."""
    return OFFSET + d


def quantile(scores, level=LEVEL) -> float:
    """The ceil((n + 1) level)-th smallest of n scores; infinite where there are too few (under 9 for 90 %)."""
    k = int(np.ceil((len(scores) + 1) * level))
    return float(np.sort(scores)[k - 1]) if k <= len(scores) else float("inf")


def interval(task, y_hat, sigma, q):
    """Lower and upper ends (M,) in the physical unit; y_hat (M,) in unit_of(task)."""
    return inverse(task, y_hat - q * sigma), inverse(task, y_hat + q * sigma)


def covered(y, y_hat, sigma, q) -> dict:
    """How the intervals do on rows that neither model nor q has seen. q: a number or (M,). mean_width: in y's unit."""
    if not len(y) or not np.isfinite(q).all():
        return {"level": LEVEL, "test": None, "mean_width": None}
    inside = np.abs(y - y_hat) <= q * sigma
    return {"level": LEVEL, "test": float(inside.mean()), "mean_width": float((2 * q * sigma).mean())}


# ---------------------------------------------------------------- in the folder of a model


def files_of(known, scores) -> dict:
    """{file: bytes}. scores: |y - prediction| / sigma of the rows that q rests on."""
    out = io.BytesIO()
    np.savez(out, **known)
    return {NEIGHBOURS: out.getvalue(), **calibration_file(scores)}


def calibration_file(scores) -> dict:
    q = quantile(scores)
    content = {"level": LEVEL, "q": q if np.isfinite(q) else None, "rows": len(scores)}
    return {CALIBRATION: (json.dumps(content, indent=2) + "\n").encode()}


def read_neighbours(path):
    """`neighbours` of the model in folder `path`, its hash checked; None where it has none."""
    if NEIGHBOURS not in hub.read_card(path)["files_sha256"]:
        return None
    file = hub.checked_file(path, NEIGHBOURS)
    with reading(file, "what distances need", "fine-tune again"), np.load(file, allow_pickle=False) as arrays:
        return {k: arrays[k] for k in ("X", "usual")}
