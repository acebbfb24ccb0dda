"""conformal.py, and what evaluate.py and predict.py make of it: intervals hold, distances mean what they say."""

import numpy as np
import pytest

import conformal as C
import evaluate
import predict
from tasks import Task


def test_the_quantile_is_the_smallest_score_that_keeps_the_promise():
    assert C.quantile(np.arange(1.0, 20)) == 18  # ceil(20 * 0.9), the 18th of 19
    assert C.quantile(np.arange(1.0, 10)) == 9 and C.quantile(np.arange(1.0, 9)) == np.inf
    assert C.quantile(np.arange(1.0, 10), level=0.5) == 5


@pytest.mark.parametrize("n", [19, 99, 999])
def test_new_rows_lie_inside_nine_times_in_ten(n):
    """Mean over many draws, for heavy-tailed errors that grow with the distance: ceil((n + 1) 0.9) / (n + 1)."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(40_000 // n + 20):
        d = rng.exponential(size=n + 200)
        y, sigma = rng.standard_t(2, n + 200) * d, C.difficulty(d)
        q = C.quantile(np.abs(y[:n]) / sigma[:n])
        inside.append(C.covered(y[n:], np.zeros(200), sigma[n:], q)["test"])
    assert np.mean(inside) == pytest.approx(np.ceil((n + 1) * 0.9) / (n + 1), abs=0.01)


def test_intervals_scaled_by_distance_hold_far_away_where_plain_ones_do_not():
    rng = np.random.default_rng(1)
    d = rng.exponential(size=4000)
    y, far = rng.normal(size=4000) * (0.5 + d), np.arange(4000) >= 2000
    far &= d > 2
    shares = []
    for sigma in (np.ones(4000), C.difficulty(d)):
        q = C.quantile(np.abs(y[:2000]) / sigma[:2000])
        shares.append(C.covered(y[far], np.zeros(far.sum()), sigma[far], q)["test"])
    assert shares[0] < 0.7 and shares[1] == pytest.approx(0.9, abs=0.04)


def test_an_interval_of_a_logarithm_never_reaches_zero():
    task = Task("t", unit="eV", transform="log")
    lower, upper = C.interval(task, np.array([-3.0, 0.0]), np.array([1.0, 4.0]), 2.0)
    np.testing.assert_allclose(lower, np.exp([-5.0, -8.0]))
    np.testing.assert_allclose(upper, np.exp([-1.0, 8.0]))


def test_distances_are_in_units_of_the_training_rows_own():
    known = C.neighbours(np.array([[0.0, 0], [0, 1], [0, 3], [0, 9]]))  # to the nearest other: 1 1 2 6, mean 2.5
    assert known["usual"].tolist() == [1, 1, 2, 6]
    d = C.distance(np.array([[0.0, 3], [5, 0], [0, 10.5]]), known)
    np.testing.assert_allclose(d, [0, 2, 0.6])
    assert C.percentile(d, known).tolist() == [0, 75, 50]
    assert C.difficulty(d).tolist() == [0.5, 2.5, 1.1]
    assert np.isfinite(C.distance(np.ones((2, 2)), C.neighbours(np.zeros((1, 2))))).all()  # one training row
    assert np.isfinite(C.distance(np.ones((2, 2)), C.neighbours(np.zeros((5, 2))))).all()  # all alike


def test_too_few_rows_give_no_interval_rather_than_a_wrong_one():
    assert b'"q": null' in C.calibration_file(np.ones(8))["calibration.json"]
    assert C.covered(np.ones(3), np.ones(3), np.ones(3), np.inf)["test"] is None


@pytest.mark.parametrize("ours, trees, mean, words", [
    (0.125, 0.25, 0.5, "75% below predicting the mean (0.5), 50% below Magpie trees (0.25): worth it"),
    (0.25, 0.125, 0.5, "50% below predicting the mean (0.5), 100% above Magpie trees (0.125): use those"),
    (0.25, 0.25, 0.5, "not distinguishable from Magpie trees (0.25; difference 0 +- 0, paired over 50 test rows)"),
    (0.5, 0.5, 0.5, "not distinguishable from predicting the mean"), (0.5, 0.25, 0.25, ": do not use it"),
])  # fmt: skip
def test_the_verdict_says_what_the_errors_say(ours, trees, mean, words):
    y = np.arange(50.0)
    found = evaluate.compared(y, y + ours, y + mean, y - trees, "eV")
    assert words in found["verdict"] and found["verdict"].startswith(f"test MAE {ours:g} eV on 50 crystals: ")
    assert found["magpie"]["mae"] == pytest.approx(trees) and found["magpie"]["gain"] == pytest.approx(trees - ours)


def test_a_difference_within_the_noise_is_no_difference():
    rng = np.random.default_rng(0)
    y = rng.normal(size=150)
    prediction, trees = y + rng.normal(0, 0.2, 150), y + rng.normal(0, 0.205, 150)
    assert "not distinguishable from Magpie trees" in evaluate.compared(y, prediction, 0 * y, trees, "")["verdict"]
    far = evaluate.compared(y, prediction, 0 * y, y + rng.normal(0, 0.4, 150), "")
    assert far["verdict"].endswith("worth it") and far["magpie"]["gain"] > 3 * far["magpie"]["standard_error"]


def test_one_test_row_decides_nothing():
    one = np.ones(1)
    found = evaluate.compared(one, one * 1.1, one * 3, one * 2, "eV")
    assert found["verdict"].count("not distinguishable") == 2 and found["magpie"]["standard_error"] is None


def test_the_next_to_label_are_far_from_what_is_known_and_from_each_other():
    X = np.array([[0.0], [10.0], [10.1], [-9.0], [1.0]])  # the labelled crystal is at 0
    picks = predict.next_to_label(X, np.abs(X[:, 0]), None, 3)
    assert [i for i, _ in picks] == [2, 3, 4] and [round(d, 3) for _, d in picks] == [10.1, 9.0, 1.0]
    spread = np.array([1.0, 0.1, 0.1, 1.0, 30.0])  # where the models disagree comes first
    assert [i for i, _ in predict.next_to_label(X, np.abs(X[:, 0]), spread, 9)][:2] == [4, 3]
    assert sorted(i for i, _ in predict.next_to_label(X, np.abs(X[:, 0]), spread, 9)) == [0, 1, 2, 3, 4]
