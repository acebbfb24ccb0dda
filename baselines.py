"""What one would use instead of MoMa, on the same rows: Magpie trees, and a support vector machine on frozen CHGNet.

    X = magpie_features(crystals)  # (M, F), no labels
    prediction = magpie_trees(X, crystals.y, splits["train"], seed=0)[splits["test"]]

Both learn from the training rows alone. M: crystals. F: features. y: (M,) labels in unit_of(task), as predictions are.
"""

import hashlib
import itertools
import warnings
from collections import Counter
from importlib.metadata import version
from math import gcd

from files import UserError, cache_folder, cached_folder

import numpy as np

import teachers
from crystals import fingerprint
from sources import SYMBOLS

TREES = 300
GRID = {"C": (1, 3, 10, 30, 100), "epsilon": (0.01, 0.03, 0.1), "gamma": (0.1, 0.3, 1)}  # gamma: times 1 / F


# ---------------------------------------------------------------- Magpie trees


def magpie_features(crystals, cache="") -> np.ndarray:
    """(M, 133): Magpie (Ward et al. 2016), statistics of element properties over the composition, as matminer has it,
    and the volume per atom in Å^3; a molecule has no cell and 0 there.

    A property that matminer's tables lack for an element is its mean over the others. cache: folder that keeps them.
    """
    content = [fingerprint(crystals.Z, crystals.pos, crystals.cell), version("matminer")]
    key = hashlib.sha256(str(content).encode()).hexdigest()[:24]
    folder = cache_folder(cache) / f"magpie-{key}"
    cached_folder(folder, lambda part: np.save(part / "X.npy", compute_magpie(crystals)))
    return np.load(folder / "X.npy")


def compute_magpie(crystals) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what matminer imports, and of elements without an electronegativity
        from matminer.featurizers.composition import ElementProperty
        from pymatgen.core import Composition

        magpie = ElementProperty.from_preset("magpie", impute_nan=True)
        formulas = [reduced_formula(Z) for Z in crystals.Z]
        of = {formula: magpie.featurize(Composition(dict(formula))) for formula in set(formulas)}
    volume = [abs(np.linalg.det(cell)) / len(Z) for Z, cell in zip(crystals.Z, crystals.cell)]
    return np.column_stack([[of[formula] for formula in formulas], volume])


def reduced_formula(Z) -> tuple:
    """Atomic numbers (A,) -> (("Ga", 1), ("As", 1)), by atomic number."""
    counts = Counter(map(int, Z))
    units = gcd(*counts.values())
    return tuple((SYMBOLS[z], n // units) for z, n in sorted(counts.items()))


def magpie_trees(X, y, train, seed, cache="") -> np.ndarray:
    """Extremely randomised trees (Geurts et al. 2006) on the labels y[train]. train: positions in X (M, F) and y (M,).
    Predictions of all rows, (M,). cache: folder that keeps them."""
    from sklearn.ensemble import ExtraTreesRegressor

    trees = ExtraTreesRegressor(TREES, random_state=seed, n_jobs=1)
    content = [X.shape, np.asarray(train).tolist(), y[train].tolist(), repr(trees), version("scikit-learn")]
    key = hashlib.sha256(str(content).encode() + X.tobytes()).hexdigest()[:24]
    folder = cache_folder(cache) / f"trees-{key}"
    cached_folder(folder, lambda part: np.save(part / "y.npy", trees.fit(X[train], y[train]).predict(X)))
    return np.load(folder / "y.npy")


# ---------------------------------------------------------------- frozen CHGNet


def chgnet_features(crystals, cache="") -> np.ndarray:
    """(M, 128): mean and standard deviation over the atoms of CHGNet's 64 features of an atom.

    Raises MissingError without the package chgnet, UserError at a crystal that CHGNet cannot read.
    """
    rows = []
    for name, label in zip(crystals.ids, teachers.teach("chgnet", crystals, cache, quiet=True), strict=True):
        if isinstance(label, str):
            raise UserError(f"{crystals.task.name}: CHGNet has no features of {name} ({label}); leave that method out")
        x = np.asarray(label[1], dtype=np.float64)  # (A, 64)
        rows.append(np.concatenate([x.mean(axis=0), x.std(axis=0)]))
    return np.stack(rows)


def support_vector_regression(X, y, train, val, test) -> np.ndarray:
    """Radial basis functions on standardised features and labels; of GRID what has the lowest error on the validation
    rows. Positions and result as in magpie_trees."""
    from sklearn.svm import SVR

    mean, std = X[train].mean(axis=0), X[train].std(axis=0)
    X = (X - mean) / np.where(std > 0, std, 1)
    center, scale = y[train].mean(), y[train].std() or 1.0
    best, error = None, np.inf
    for C, epsilon, gamma in itertools.product(*GRID.values()):
        model = SVR(C=C, epsilon=epsilon, gamma=gamma / X.shape[1]).fit(X[train], (y[train] - center) / scale)
        mae = np.abs(model.predict(X[val]) * scale + center - y[val]).mean()
        if mae < error:
            best, error = model, mae
    return best.predict(X[test]) * scale + center
