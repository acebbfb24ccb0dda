"""baselines.py: Magpie features and trees, frozen features of CHGNet and a support vector machine."""

import importlib.util

import numpy as np
import pytest

import baselines
import teachers
from baselines import chgnet_features, magpie_features, magpie_trees, support_vector_regression
from conftest import FCC, NO_CELL, PEROVSKITE
from crystals import from_structures
from files import MissingError, UserError

NACL = ([11, 17], PEROVSKITE[:2] @ (FCC * 2.82), FCC * 2.82, [True] * 3)
DOUBLE = ([11, 11, 17, 17], np.vstack([PEROVSKITE[:2] @ (FCC * 2.82) + [0, 0, 5.64 * k] for k in (0, 1)])[[0, 2, 1, 3]],
          FCC * 2.82 * [[1, 1, 1], [1, 1, 1], [2, 2, 2]], [True] * 3)  # fmt: skip
WATER = ([8, 1, 1], [[0, 0, 0.12], [0, 0.76, -0.47], [0, -0.76, -0.47]], NO_CELL, [False] * 3)
CURIUM = ([96], [[0, 0, 0]], np.eye(3) * 3.0, [True] * 3)


def crystals_of(*structures):
    return from_structures(structures, y=np.arange(float(len(structures))))


def test_magpie_features_of_rock_salt_are_those_of_its_elements(capfd):
    X = magpie_features(crystals_of(NACL, WATER, CURIUM))
    assert X.shape == (3, 133) and np.isfinite(X).all()  # curium, which the tables lack, too
    np.testing.assert_allclose(X[0, :6], [11, 17, 6, 14, 3, 11])  # Number: min, max, range, mean, deviation, mode
    np.testing.assert_allclose(X[1, :6], [1, 8, 7, 10 / 3, 28 / 9, 1])
    assert X[0, -1] == pytest.approx(2.82**3) and X[1, -1] == 0 and X[2, -1] == pytest.approx(27)  # Å^3 an atom
    assert capfd.readouterr() == ("", "")


def test_a_supercell_has_the_features_of_the_cell():
    X = magpie_features(crystals_of(NACL, DOUBLE))
    np.testing.assert_allclose(X[0], X[1], rtol=1e-12)


def test_features_are_computed_once(monkeypatch):
    X = magpie_features(crystals_of(NACL, WATER))
    monkeypatch.setattr(baselines, "compute_magpie", None)
    np.testing.assert_array_equal(magpie_features(crystals_of(NACL, WATER)), X)
    with pytest.raises(TypeError):
        magpie_features(crystals_of(NACL, WATER, CURIUM))


def waves(M=160):
    X = np.random.default_rng(0).uniform(-2, 2, (M, 3))
    return X, 5 + np.sin(X[:, 0]) + 0.5 * X[:, 1], np.arange(100), np.arange(100, 130), np.arange(130, M)


def test_trees_learn_repeat_with_the_seed_and_see_no_other_rows(tmp_path):
    X, y, train, _, test = waves()
    prediction = magpie_trees(X, y, train, seed=0)
    assert np.abs((prediction - y)[test]).mean() < 0.3 * np.abs(y[train].mean() - y[test]).mean()
    assert y[train].min() <= prediction[test].min() and prediction[test].max() <= y[train].max()
    hidden = np.where(np.isin(np.arange(len(y)), train), y, np.nan)
    np.testing.assert_array_equal(magpie_trees(X, hidden, train, seed=0, cache=tmp_path), prediction)
    assert (magpie_trees(X, y, train, seed=1) != prediction).any()
    np.testing.assert_allclose(prediction[train], y[train])  # each tree sees all of them


def test_trees_are_fitted_once_to_the_same_rows_and_labels(tmp_path, monkeypatch):
    import sklearn.ensemble

    X, y, train, _, test = waves()
    first = magpie_trees(X, y, train, seed=0, cache=tmp_path)
    monkeypatch.setattr(sklearn.ensemble.ExtraTreesRegressor, "fit", None)
    np.testing.assert_array_equal(magpie_trees(X, y, train, seed=0, cache=tmp_path), first)
    for other in (dict(X=X + 1), dict(y=y + 1), dict(train=test), dict(seed=1)):
        with pytest.raises(TypeError):
            magpie_trees(**dict(X=X, y=y, train=train, seed=0, cache=tmp_path) | other)


def test_the_support_vector_machine_learns_in_any_unit_and_sees_no_test_labels():
    X, y, train, val, test = waves()
    hidden = y.copy()
    hidden[test] = np.nan
    prediction = support_vector_regression(X, hidden, train, val, test)
    assert np.abs(prediction - y[test]).mean() < 0.1 * np.abs(y[train].mean() - y[test]).mean()
    other = support_vector_regression(X * [1000, 1, 1] + 7, 1000 * y - 3, train, val, test)
    np.testing.assert_allclose(other, 1000 * prediction - 3, rtol=1e-3)  # its solver stops there
    same = support_vector_regression(np.ones((6, 2)), np.full(6, 2.5), [0, 1, 2], [3], [4, 5])
    np.testing.assert_allclose(same, 2.5)


def test_chgnet_features_are_mean_and_spread_over_the_atoms(monkeypatch):
    found = [(-6.0, np.arange(6.0).reshape(3, 2).astype(np.float16)), (-1.0, np.ones((1, 2), np.float16))]
    monkeypatch.setattr(teachers, "teach", lambda *args, **more: found)
    X = chgnet_features(crystals_of(DOUBLE, CURIUM))
    np.testing.assert_allclose(X, [[2, 3, np.sqrt(8 / 3), np.sqrt(8 / 3)], [1, 1, 0, 0]])


def test_what_chgnet_cannot_read_and_a_missing_package_are_named(monkeypatch):
    monkeypatch.setattr(teachers, "teach", lambda *args, **more: ["teacher: a molecule"])
    with pytest.raises(UserError, match="structures: CHGNet has no features of 0 .teacher: a molecule.; leave that"):
        chgnet_features(crystals_of(WATER))
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "chgnet.model", None)
    teachers.load_chgnet.cache_clear()
    with pytest.raises(MissingError, match="chgnet is missing; `make teacher` installs it"):
        chgnet_features(crystals_of(NACL))


@pytest.mark.skipif(not importlib.util.find_spec("chgnet"), reason="make teacher")
def test_chgnet_itself_gives_the_same_for_a_supercell(capfd):
    teachers.load_chgnet.cache_clear()
    X = chgnet_features(crystals_of(NACL, DOUBLE))
    assert X.shape == (2, 128) and capfd.readouterr().out == ""
    np.testing.assert_allclose(X[0], X[1], atol=5e-3)  # stored with 16 bits
