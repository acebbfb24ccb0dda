"""Adaptive Module Composition: the maths against numbers one can check, and the stage on a hub made in the test."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import is_picture
from pymatgen.core import Structure

import compose
import demo
import finetune
import hub
import report
import sources
import stage
from compose import Config, frank_wolfe_gap, knn_estimate, merge, select, solve_weights, standardise
from crystals import load_crystals
from data import by_structure
from files import UserError
from model import preset
from predict import predict
from tasks import get_task

# ------------------------------------------------------------------------------------------------ step 1, the estimate


def test_knn_estimate_leaves_the_crystal_itself_out():
    X = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]
    assert knn_estimate(X, [10.0, 20.0, 30.0], K=1).tolist() == [20.0, 10.0, 20.0]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_knn_estimate_by_hand(temperature):
    angle = np.deg2rad([0, 60, 90])  # cosines: 0-1 1/2, 0-2 0, 1-2 sqrt(3)/2
    X = np.stack([np.cos(angle), np.sin(angle)], axis=1) * [[1], [5], [0.1]]  # lengths do not matter
    a, b, c = np.exp(np.array([0.5, 0.0, np.sqrt(3) / 2]) / temperature)
    expected = [(a * 2 + b * 4) / (a + b), (a * 1 + c * 4) / (a + c), (b * 1 + c * 2) / (b + c)]
    np.testing.assert_allclose(knn_estimate(X, [1.0, 2.0, 4.0], K=2, temperature=temperature), expected, rtol=1e-9)


def test_equal_cosines_go_to_the_lower_index():
    X = np.array([[1.0, 2.0, 3.0]] * 6)
    assert knn_estimate(X, np.arange(6.0), K=2).tolist() == [1.5, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_k_is_at_most_the_number_of_other_crystals():
    X, y = np.random.default_rng(0).normal(size=(4, 3)), np.arange(4.0)
    np.testing.assert_array_equal(knn_estimate(X, y, K=50), knn_estimate(X, y, K=3))


def test_row_blocks_change_nothing():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(3000, 4)), rng.normal(size=3000)  # more than one block of 2**22 / 3000 rows
    S = (X / np.linalg.norm(X, axis=1, keepdims=True))
    for i in (0, 1397, 1398, 1399, 2999):
        s = S @ S[i]
        s[i] = -2
        nbr = np.argsort(-s)[:5]
        f = np.exp(s[nbr] / 0.2)
        assert knn_estimate(X, y)[i] == pytest.approx(f @ y[nbr] / f.sum(), rel=1e-9)


def test_one_crystal_is_an_error():
    with pytest.raises(ValueError, match="m=1"):
        knn_estimate([[1.0, 0.0]], [1.0])


@pytest.mark.parametrize("K, temperature", [(0, 0.2), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_neighbours_and_temperature_must_be_positive(K, temperature):
    with pytest.raises(ValueError, match="--neighbors"):
        knn_estimate(np.eye(3), np.arange(3.0), K, temperature)


# ------------------------------------------------------------------------------------------------- step 2, the weights


def test_all_weight_goes_to_a_module_that_predicts_perfectly():
    y = np.array([1.0, 2.0, 4.0])
    w, gap, _ = solve_weights(np.stack([y + 1, y, -y]), y)
    np.testing.assert_allclose(w, [0, 1, 0], atol=1e-5)
    assert gap < 1e-8


def test_opposite_errors_share_the_weight_as_their_sizes_say():
    y = np.array([0.0, 1.0, 2.0, 3.0])
    w, _, _ = solve_weights(np.stack([y + 3, y - 1, y + [7, 0, 9, 1]]), y)  # w = 1/4, 3/4, 0: no error
    np.testing.assert_allclose(w, [0.25, 0.75, 0], atol=1e-6)
    assert w[2] == 0  # exactly: a module of weight 0 is not read


def problem(m, N, seed):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=m)
    return y * rng.uniform(0.2, 1, (N, 1)) + rng.normal(size=(N, m)) * rng.uniform(0.3, 1, (N, 1)), y


@pytest.mark.parametrize("m, N, seed", [(50, 3, 0), (200, 8, 1), (30, 12, 2), (100, 18, 3)])
def test_weights_agree_with_slsqp(m, N, seed):
    from scipy.optimize import minimize

    Y_hat, y = problem(m, N, seed)
    D = standardise(Y_hat, y)
    G = D.T @ D / m
    other = minimize(lambda w: w @ G @ w, np.full(N, 1 / N), jac=lambda w: 2 * G @ w, method="SLSQP",
                     bounds=[(0, 1)] * N, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                     options={"ftol": 1e-15, "maxiter": 1000}).x
    w, gap, _ = solve_weights(Y_hat, y)
    np.testing.assert_allclose(w, other, atol=1e-5)
    assert gap == frank_wolfe_gap(D, w) < 1e-8
    assert abs(w.sum() - 1) < 1e-12 and (w >= 0).all()


@pytest.mark.parametrize("solve", [compose.solve_clarabel, compose.solve_nnls])
@pytest.mark.parametrize("seed", range(3))
def test_either_solver_reaches_the_optimum(solve, seed):
    D = standardise(*problem(120, 10, seed))
    w = solve(D)
    assert frank_wolfe_gap(D, w / w.sum()) < 1e-8


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_the_unit_of_the_label_does_not_matter(scale, offset):
    Y_hat, y = problem(200, 6, 4)
    w, _, _ = solve_weights((Y_hat + offset) * scale, (y + offset) * scale)
    np.testing.assert_allclose(w, solve_weights(Y_hat, y)[0], atol=1e-6)


def test_many_modules_go_to_the_active_set():
    Y_hat, y = problem(60, compose.DENSE + 1, 5)
    w, gap, solver = solve_weights(Y_hat, y)
    assert solver == "scipy nnls" and gap < 1e-8 and (w > 0).sum() <= 61


def test_a_solver_that_lies_is_not_believed(monkeypatch):
    Y_hat, y = problem(100, 5, 6)
    monkeypatch.setitem(compose.SOLVERS, liar := (lambda D: np.full(D.shape[1], 0.1)), "liar")
    monkeypatch.setattr(compose, "solve_clarabel", liar)
    assert solve_weights(Y_hat, y)[2] == "scipy nnls"
    monkeypatch.setattr(compose, "solve_nnls", liar)
    with pytest.raises(ValueError, match="no solver reached"):
        solve_weights(Y_hat, y)


def test_equal_labels_are_an_error():
    with pytest.raises(ValueError, match="all 4 training labels are 0.1"):
        solve_weights(np.full((2, 4), 0.1), np.full(4, 0.1))


def test_one_module_takes_all():
    assert solve_weights([[3.0, 1.0]], [1.0, 2.0])[0].tolist() == [1.0]


def test_fewer_rows_than_modules_and_twins_are_said_to_leave_the_weights_open():
    Y_hat, y = problem(50, 4, 7)
    assert compose.unique(standardise(Y_hat, y))
    assert not compose.unique(standardise(np.vstack([Y_hat, Y_hat[:1]]), y))
    assert not compose.unique(standardise(*problem(3, 8, 8)))


def test_stability_of_a_clear_choice():
    y = np.random.default_rng(0).normal(size=100)
    mean, sd, share = compose.stability(standardise(np.stack([y + 3, y]), y), 20, seed=0)
    np.testing.assert_allclose([mean, sd, share], [[0, 1], [0, 0], [0, 1]], atol=1e-9)


def test_select_is_the_papers_ablation():
    w = np.array([0.7, 0.0, 0.3, 0.0])
    assert select(w, "amc").tolist() == w.tolist()
    assert select(w, "average").tolist() == [0.5, 0, 0.5, 0]
    assert select(w, "all").tolist() == [0.25] * 4
    drawn = select(w, "random", seed=3)
    assert sorted(drawn.tolist()) == [0, 0, 0.5, 0.5] and drawn.tolist() == select(w, "random", seed=3).tolist()
    assert len({tuple(select(w, "random", seed=s)) for s in range(20)}) > 1
    assert select(w, "hinted").tolist() == w.tolist()
    with pytest.raises(ValueError, match="--select best"):
        select(w, "best")


def test_hints_are_read_from_g_D_by_the_linear_layer_beside_them():
    rng = np.random.default_rng(0)
    X_D = rng.normal(2, 3, (300, 6)).astype(np.float32)
    X = [X_D @ rng.normal(size=(6, 40)), 5 + 0.01 * X_D @ rng.normal(size=(6, 50))]  # all that they say, g_D knows
    found = compose.hints(X, X_D)
    T = found["targets"]
    assert T.shape == (300, compose.HINTS) and np.abs(T).mean() == pytest.approx(1, rel=1e-5)
    assert (np.diff(T.std(axis=0)) < 1e-4).all() and np.abs(T.mean(axis=0)).max() < 1e-4  # the leading ones first
    read = X_D @ found["weight"].T + found["bias"]
    assert np.abs(T - read).mean() < 0.05 and {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.abs(compose.hints([X[0], X[1] * 100 - 7], X_D)["targets"][:, 0]), np.abs(T[:, 0]),
                               rtol=1e-3)  # no module is louder than another  # fmt: skip
    unlike = compose.hints([rng.normal(size=(300, 40))], X_D)
    wide = unlike["targets"] - X_D @ unlike["weight"].T - unlike["bias"]
    assert unlike["targets"].shape[1] == 40 and np.abs(wide).mean() > 0.9
    same = compose.hints([np.ones((4, 3))], np.ones((4, 2)))  # crystals that no module tells apart
    assert all(np.isfinite(x).all() for x in same.values()) and not same["targets"].any()


def test_a_large_merge_gap_is_said_aloud():
    assert report.merge_verdict(merged=0.60, mixture=0.54, theta_0=0.67)[1] is False  # 0.06 of 0.13 is lost
    said, large = report.merge_verdict(merged=0.74, mixture=0.68, theta_0=0.76)  # 0.06 of 0.08
    assert large and said[0].startswith("merge gap +0.060") and said[1].startswith("LARGE")
    assert report.merge_verdict(merged=0.81, mixture=0.80, theta_0=0.80)[1] is False  # nothing to lose


# --------------------------------------------------------------------------------------------------- step 3, the merge

ARCH = preset("tiny")


def put(folder, name, tensors, kind="full"):
    """A module folder with these tensors; returns it."""
    hub.save(folder / name, tensors, {"kind": kind, "architecture": ARCH})
    return folder / name


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, 4, generator=g), "b": torch.randn(3, generator=g), "steps": torch.tensor([3, 4])}


@pytest.fixture
def three(tmp_path):
    return {name: put(tmp_path, name, tensors(i)) for i, name in enumerate(("one", "two", "three"))}


def test_weight_one_returns_the_module_bit_for_bit(three):
    merged = merge(three, [0, 1, 0])
    for k, x in tensors(1).items():
        assert torch.equal(merged[k], x) and merged[k].dtype == x.dtype


def test_merge_is_the_weighted_sum(three):
    merged = merge(three, [0.2, 0.3, 0.5])
    parents = [tensors(i) for i in range(3)]
    for k in "ab":
        torch.testing.assert_close(merged[k], 0.2 * parents[0][k] + 0.3 * parents[1][k] + 0.5 * parents[2][k])
        assert merged[k].dtype == torch.float32
    assert merged["steps"].tolist() == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_one_module_merge_to_it(tmp_path, dtype):
    x = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)}
    copies = {f"m{i}": put(tmp_path, f"m{i}", x) for i in range(7)}
    assert torch.equal(merge(copies, np.full(7, 1 / 7))["a"], x["a"])


def test_a_module_of_weight_zero_is_not_read_and_one_is_open_at_a_time(three, monkeypatch):
    events, real = [], hub.open_tensors

    class Spy:
        def __init__(self, path):
            self.path, self.handle = path, real(path)

        def __enter__(self):
            events.append(("open", self.path.name))
            return self.handle.__enter__()

        def __exit__(self, *error):
            events.append(("close", self.path.name))
            return self.handle.__exit__(*error)

    monkeypatch.setattr(hub, "open_tensors", Spy)
    merge(three, [0.5, 0, 0.5])
    assert events == [("open", "one"), ("close", "one"), ("open", "three"), ("close", "three")]


def test_counters_must_agree_but_for_batch_norms(tmp_path):
    a = put(tmp_path, "a", {"x": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(7)})
    b = put(tmp_path, "b", {"x": torch.ones(2), "bn.num_batches_tracked": torch.tensor(9)})
    merged = merge({"a": a, "b": b}, [0.25, 0.75])
    assert merged["x"].tolist() == [0.75, 0.75] and merged["bn.num_batches_tracked"].item() == 9
    c = put(tmp_path, "c", {"x": torch.zeros(2), "n": torch.tensor(7)})
    d = put(tmp_path, "d", {"x": torch.ones(2), "n": torch.tensor(9)})
    with pytest.raises(ValueError, match="module d: n holds integers unlike those of c"):
        merge({"c": c, "d": d}, [0.5, 0.5])


def test_compose_is_estimate_weigh_merge(three):
    rng = np.random.default_rng(0)
    y = rng.normal(size=60)
    angle = {"one": rng.normal(size=60), "two": np.argsort(np.argsort(y)) / 60, "three": rng.normal(size=60)}
    embed = lambda name: np.stack([np.cos(angle[name]), np.sin(angle[name])], axis=1)  # noqa: E731
    g_D, w, rest = compose.compose(three, embed, y)
    assert w[1] > 0.8 and rest["gap"] < 1e-8
    assert all(torch.equal(x, g_D[k]) for k, x in merge(three, w).items())
    _, w_all, rest_all = compose.compose(three, embed, y, choose=lambda w: select(w, "all"))
    assert w_all.tolist() == [1 / 3] * 3 and rest_all["w_amc"].tolist() == w.tolist()


def test_a_module_whose_representation_is_not_finite_is_named(three):
    embed = lambda name: np.full((9, 2), np.nan if name == "two" else 1.0)  # noqa: E731
    with pytest.raises(ValueError, match="module two: 9 of 9 crystals"):
        compose.compose(three, embed, np.arange(9.0))


# ------------------------------------------------------------------------------------------------------ the whole stage

TASK, N_ROWS = "demo_optical_gap", 40


@pytest.fixture(scope="module", params=["full", "adapter"])
def made(request, tmp_path_factory):
    """A hub of four untrained modules: theta_0 and noise. Returns (kind, hub, cache)."""
    import model

    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    arch = model.preset("tiny")
    torch.manual_seed(0)
    backbone, adapters = model.build_backbone(arch), model.new_adapters(arch)
    card = {"kind": "backbone", "architecture": arch, "graph": arch["graph"], "license_weights": "MIT"}
    saved = hub.save(folder / "hub/backbone", backbone.state_dict(), card, adapters_init=adapters.state_dict())
    start = (backbone if kind == "full" else adapters).state_dict()
    for i, name in enumerate(("a", "b", "c", "d")):
        g = torch.Generator().manual_seed(i)
        noise = {k: torch.randn(x.shape, generator=g) * x.std(correction=0) for k, x in start.items() if x.dim()}
        noise = {k: start[k] + 2 * x for k, x in noise.items()}
        card = {"kind": kind, "architecture": arch, "graph": arch["graph"], "backbone_sha256": saved["tensors_sha256"],
                "elements": [8, i + 1], "license_weights": "CC-BY-NC-4.0" if name == "b" else "MIT"}  # fmt: skip
        hub.save(folder / "hub" / name, start | noise, card)
    return kind, folder / "hub", folder / "cache"


def config(made, output, **changes):
    _, where, cache = made
    settings = {"task": TASK, "data": "demo", "limit": N_ROWS, "bootstrap": 10, "quiet": True, "device": "cpu", "folds": 0}
    return Config(hub=str(where), cache=str(cache), output=str(output), **(settings | changes))


@pytest.mark.drawn
def test_compose_writes_a_module_a_report_and_a_chart(made, tmp_path, capsys):
    kind, where, _ = made
    result = compose.run(config(made, tmp_path / "composed", quiet=False))
    card = hub.read_card(tmp_path / "composed")
    stored = json.loads((tmp_path / "composed/composition.json").read_text())
    assert stored == {k: v for k, v in result.items() if k != "output"}
    weights = {name: x["weight"] for name, x in stored["modules"].items()}
    assert list(weights) == ["a", "b", "c", "d"] and abs(sum(weights.values()) - 1) < 1e-9
    used = {name: w for name, w in weights.items() if w > 0}
    assert card["kind"] == kind and card["weights"] == list(used.values()) and card["property"] == TASK
    assert card["parents"] == [{"name": n, "tensors_sha256": hub.read_card(where / n)["tensors_sha256"]} for n in used]
    assert card["license_weights"].startswith("CC-BY-NC-4.0" if "b" in used else "MIT")
    expected = merge({name: where / name for name in weights}, list(weights.values()))
    found = hub.load_tensors(tmp_path / "composed")
    assert all(torch.equal(found[k], x) for k, x in expected.items())
    assert stored["frank_wolfe_gap"] < 1e-8 and stored["rows_used"] == 28 and stored["neighbors"] == 5
    e = stored["errors"]
    assert e["mixture"] <= min(e["best_single"], e["uniform"]) + 1e-8
    assert e["theta_0"] > 0 and e["mean"] == (28 / 27) ** 2
    assert stored["merge_gap"] == e["composed"] - e["mixture"]
    assert is_picture(tmp_path / "composed/weights.png")
    assert hub.verify(where) == []
    out = capsys.readouterr().out
    assert "mixture of predictions" in out and "merge gap" in out and "eV" in out


def test_composing_again_runs_no_network_and_gives_the_same(made, tmp_path, monkeypatch):
    first = compose.run(config(made, tmp_path / "composed"))
    names = [p.name for p in sorted((made[2] / "embeddings").iterdir())]
    monkeypatch.setattr(compose, "build_backbone", None)
    monkeypatch.setattr(compose, "encode", None)
    assert compose.run(config(made, tmp_path / "again")) == first | {"output": str(tmp_path / "again")}
    assert names == [p.name for p in sorted((made[2] / "embeddings").iterdir())]
    again = (tmp_path / "again" / "module.safetensors").read_bytes()
    assert again == (tmp_path / "composed" / "module.safetensors").read_bytes()


def test_labels_outside_the_training_split_do_not_matter(made, tmp_path, monkeypatch):
    import data

    first, load = compose.run(config(made, tmp_path / "composed")), load_crystals

    def other_labels(*args, **kwargs):
        crystals = load(*args, **kwargs)
        splits = data.make_splits(crystals, 0)
        crystals.y[np.concatenate([splits["val"], splits["test"]])] = 1e6
        return crystals

    monkeypatch.setattr(stage, "load_crystals", other_labels)
    second = compose.run(config(made, tmp_path / "again"))
    assert second["modules"] == first["modules"] and second["errors"] == first["errors"]
    assert second["label_std"] == first["label_std"]


def test_one_module_is_returned_bit_for_bit(made, tmp_path):
    result = compose.run(config(made, tmp_path / "composed", modules="c", bootstrap=0))
    assert (tmp_path / "composed/module.safetensors").read_bytes() == (made[1] / "c/module.safetensors").read_bytes()
    assert result["merge_gap"] == 0 and result["modules"]["c"]["weight"] == 1


@pytest.fixture
def all_weigh(monkeypatch):
    """Every module has weight, as untrained ones mostly have not."""
    monkeypatch.setattr(compose, "select", lambda w, *_: np.full(len(w), 1 / len(w)))


def test_hinted_is_the_module_of_amc_with_what_its_parents_say_of_the_training_rows(made, tmp_path, all_weigh):
    plain = compose.run(config(made, tmp_path / "plain"))
    found = compose.run(config(made, tmp_path / "hinted", select="hinted"))
    assert {n: x["weight"] for n, x in found["modules"].items()} == {n: x["weight"] for n, x in plain["modules"].items()}
    a, b = (hub.load_tensors(tmp_path / name) for name in ("plain", "hinted"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert hub.HINTS not in hub.read_card(tmp_path / "plain")["files_sha256"]
    crystals, kept = load_crystals(get_task(TASK, "", "demo"), N_ROWS, quiet=True), {}
    for name, where, folds in (("hinted", "hinted", 0), ("folds", "folds/folds/1", 3)):
        if folds:
            compose.run(config(made, tmp_path / name, select="hinted", folds=folds))
        with np.load(hub.checked_file(tmp_path / where, hub.HINTS)) as file:
            kept[name] = dict(file)
        report = json.loads((tmp_path / where / "composition.json").read_text())
        assert len(kept[name]["targets"]) == report["rows_used"] == report["split"]["train"] < len(crystals)
        assert report["recommended"] == "composed"
        width = hub.load_module(tmp_path / where, made[1]).backbone.width
        assert kept[name]["weight"].shape == (kept[name]["targets"].shape[1], width)
    assert kept["hinted"].keys() == {"targets", "weight", "bias"}  # no row, id or label
    alone = compose.run(config(made, tmp_path / "one", select="hinted", modules="c"))
    assert hub.HINTS not in hub.read_card(tmp_path / "one")["files_sha256"]
    assert any("so there are no hints" in note for note in alone["notes"])


def test_fine_tuning_learns_the_hints_and_writes_a_model_like_any_other(made, tmp_path, all_weigh):
    kind, where, cache = made
    shared = dict(task=TASK, data="demo", hub=str(where), cache=str(cache), limit=N_ROWS, epochs=3, patience=0, lr=1e-3,
                  batch_size=4, folds=0, quiet=True, compare=False)  # fmt: skip
    for select in ("amc", "hinted"):
        compose.run(config(made, tmp_path / "composed" / select, select=select))
    runs = {"amc": ("amc", None), "none": ("hinted", 0.0), "some": ("hinted", None), "more": ("hinted", 3.0)}
    for name, (start, weight) in runs.items():
        finetune.run(finetune.Config(**shared, init=str(tmp_path / "composed" / start), hints=weight, output=str(tmp_path / name)))
    tensors = {name: hub.load_tensors(tmp_path / name, hub.MODEL) for name in runs}
    assert len({tuple(x) for x in tensors.values()}) == 1  # no tensor of the hints
    alike = {name: all(torch.equal(x, tensors["amc"][k]) for k, x in tensors[name].items()) for name in runs}
    assert alike == {"amc": True, "none": True, "some": False, "more": False}
    cards = {name: hub.read_card(tmp_path / name) for name in runs}
    assert {name: card["training"].get("hints") for name, card in cards.items()} == {
        "amc": None, "none": None, "some": 0.3, "more": 3.0}  # fmt: skip
    with pytest.raises(UserError, match="--hints 0.3, now 1"):
        finetune.run(finetune.Config(**shared, init=str(tmp_path / "composed/hinted"), hints=1.0, output=str(tmp_path / "some")))


def test_hints_are_of_the_crystal_itself_in_whatever_order_a_table_has_them(tmp_path, monkeypatch):
    crystals = load_crystals(get_task(TASK, "", "demo"), 6, quiet=True)
    rows = by_structure(crystals, [1, 5, 2])
    arrays = {"targets": np.array([[1.0, 2], [3, 4], [5, 6]], np.float32), "bias": np.array([0.5, 0], np.float32),
              "weight": np.array([[1.0, 0, 0], [0, 2, 0]], np.float32)}  # fmt: skip
    (tmp_path / hub.HINTS).write_bytes(compose.npz_bytes(**arrays))
    monkeypatch.setattr(hub, "checked_file", lambda path, file: path / file)
    hints = finetune.Hints(tmp_path, 0.5, crystals, np.array([2, 1, 5]))
    z = torch.tensor([[1.0, 1, 9], [0, 0, 9]])  # read as (1.5, 2) and (0.5, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = hints(z, torch.tensor([rows[0], rows[1]]))
    assert loss.item() == pytest.approx(0.5 * (0.5 + 0 + 2.5 + 4) / 4) and loss.dtype == torch.float32
    assert {*hints.state_dict()} == {"read.weight", "read.bias"}
    turned = replace(crystals, **{k: getattr(crystals, k)[::-1] for k in ("Z", "pos", "cell")})
    other = finetune.Hints(tmp_path, 0.5, turned, np.array([0, 3, 4]))
    assert torch.equal(other.targets.flip(0), hints.targets)
    with pytest.raises(UserError, match="hints.npz: of 3 training rows, not 2; compose again"):
        finetune.Hints(tmp_path, 0.5, crystals, np.array([0, 1]))


def test_a_run_of_folds_with_hints_repeats_and_predicts(made, tmp_path, all_weigh):
    kind, where, cache = made
    compose.run(config(made, tmp_path / "composed", select="hinted", folds=3))
    shared = dict(task=TASK, data="demo", hub=str(where), cache=str(cache), limit=N_ROWS, epochs=2, batch_size=8, lr=1e-3,
                  init=str(tmp_path / "composed"), output=str(tmp_path / "run"), quiet=True, compare=False)  # fmt: skip
    finetune.run(finetune.Config(**shared))
    cards = [hub.read_card(tmp_path / f"run/fold{k}") for k in range(3)]
    assert [card["training"].get("hints") for card in cards] == [0.3] * 3
    made_at = (tmp_path / "run/metrics.json").stat().st_mtime_ns
    finetune.run(finetune.Config(**shared))
    assert (tmp_path / "run/metrics.json").stat().st_mtime_ns == made_at
    with pytest.raises(UserError, match="--hints 0.3, now 2"):
        finetune.run(finetune.Config(**shared, hints=2.0))
    demo.write_examples(tmp_path / "cif")
    values = predict(str(tmp_path / "run"), [Structure.from_file(path) for path in (tmp_path / "cif").iterdir()])
    assert values.shape == (2,) and np.isfinite(values).all()


@pytest.mark.parametrize("how", [dict(train="new-head"), dict(init="backbone")])
def test_hints_that_nothing_could_learn_are_refused(made, tmp_path, how, all_weigh):
    kind, where, cache = made
    compose.run(config(made, tmp_path / "composed", select="hinted"))
    shared = dict(task=TASK, data="demo", hub=str(where), cache=str(cache), limit=N_ROWS, epochs=1, folds=0, quiet=True,
                  output=str(tmp_path / "run"), compare=False, hints=0.3)  # fmt: skip
    with pytest.raises(UserError, match="--hints 0.3: .* has none, they are for a module of `compose.py --select"):
        finetune.run(finetune.Config(**shared, **dict(init=str(tmp_path / "composed")) | how))


def test_variants_few_shot_and_neighbours(made, tmp_path):
    result = compose.run(config(made, tmp_path / "all", select="all", few_shot=6, neighbors=50, temperature=1.0))
    assert [x["weight"] for x in result["modules"].values()] == [0.25] * 4
    assert result["rows_used"] == 6 and result["neighbors"] == 5 and result["temperature"] == 1.0
    assert any("K=5, not 50" in note for note in result["notes"])
    few = compose.run(config(made, tmp_path / "few", few_shot=2))
    assert not few["weights_unique"] and any("not unique" in note for note in few["notes"])


@pytest.mark.drawn
def test_several_tasks_make_a_heat_map(made, tmp_path):
    import demo

    result = compose.run(config(made, tmp_path, task="", all=True, limit=20, bootstrap=0))
    weights = json.loads((tmp_path / "heat_map.json").read_text())
    assert list(weights) == list(result["results"]) == [
        k for k in demo.TASKS if get_task(k, data="demo").role == "downstream"
    ]
    assert is_picture(tmp_path / "heat_map.png")
    assert (tmp_path / TASK / "module.json").exists()


def test_all_tasks_downloads_nothing_and_goes_on_after_a_table_that_cannot_be_used(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "fetch", lambda *_: pytest.fail("downloads"))
    monkeypatch.setattr(sources, "data_homes", lambda: [tmp_path])
    table = {"columns": ["formula", "expt_gap"], "index": [0], "data": [["NaCl", 5.0]]}  # no structures
    (tmp_path / "expt_gap_kingsbury.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="--all: none of .*expt_bandgap could be composed"):
        compose.run(config(made, tmp_path, task="", data="", all=True, quiet=False))
    said = capsys.readouterr().err
    assert "expt_bandgap left out: " in said and "mp_eps_total left out: no file or folder" in said


def test_totals_are_told_to_be_better_per_atom(made, tmp_path):
    said = compose.run(config(made, tmp_path, pooling="sum", limit=20, bootstrap=0, unit="eV"))["notes"]
    assert sum("better give them per atom" in note for note in said) == 1


@pytest.mark.parametrize("changes, error, message", [
    ({"modules": "a,zz"}, ValueError, "--modules zz: not in .*a, b, c, d"),
    ({"few_shot": 1}, ValueError, "m=1"),
    ({"few_shot": 29}, ValueError, "--few-shot 29: the training split has 28 rows"),
    ({"hub": "nowhere"}, FileNotFoundError, "nowhere: no such hub"),
    ({"split_file": "no/{task}.json"}, FileNotFoundError, "no/demo_optical_gap.json: no such file"),
    ({"task": "demo_optical_ga"}, ValueError, "demo_optical_ga:"),
])  # fmt: skip
def test_errors_say_what_where_and_the_cure(made, tmp_path, changes, error, message):
    cfg = config(made, tmp_path / "composed")
    for k, v in changes.items():
        setattr(cfg, k, v)
    with pytest.raises(error, match=message):
        compose.run(cfg)
    assert not (tmp_path / "composed").exists()


def test_a_folder_that_is_not_a_composed_module_is_left_alone(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="mine: exists and is no module"):
            compose.run(config(made, tmp_path / "mine", overwrite=overwrite))
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_full_and_adapter_modules_do_not_mix(tmp_path):
    put(tmp_path, "a", tensors(0)), put(tmp_path, "b", tensors(1), kind="adapter")
    with pytest.raises(ValueError, match="choose with --kind"):
        compose.candidates(Config(hub=str(tmp_path), modules="a,b"))
    assert list(compose.candidates(Config(hub=str(tmp_path)))) == ["a"]


def test_a_foreign_module_is_named_before_any_tensor_is_read(made, tmp_path, monkeypatch):
    kind, where, _ = made
    card = hub.read_card(where / "a") | {"backbone_sha256": "0" * 64}
    hub.save(where / "zz", hub.load_tensors(where / "a"), card)
    try:
        monkeypatch.setattr(hub, "open_tensors", None)
        with pytest.raises(ValueError, match="module zz: backbone_sha256"):
            compose.run(config(made, tmp_path / "composed"))
    finally:
        for p in (where / "zz").iterdir():
            p.unlink()
        (where / "zz").rmdir()


# ------------------------------------------------------------------------------------------------ what it rests on


def test_a_composition_made_with_the_same_settings_is_kept_and_others_are_refused(made, tmp_path, capsys, monkeypatch):
    cfg = config(made, tmp_path / "composed")
    first = compose.run(cfg)
    monkeypatch.setattr(compose, "compose", None)
    capsys.readouterr()
    assert compose.run(cfg) == first and "leave-one-out error mixture" in capsys.readouterr().out
    for changes, words in [
        (dict(few_shot=10), "rows of train 28, now 10"), (dict(split_seed=1), "content of train"),
        (dict(neighbors=3), "--neighbors 5, now 3"), (dict(modules="a,b"), "modules of c '.*', now None"),
        (dict(task="demo_gap"), "--task"), (dict(select="all"), "--select 'amc', now 'all'"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            compose.run(replace(cfg, **changes))


def tuned(made, tmp_path, **changes):
    cfg = dict(task=TASK, hub=str(made[1]), cache=str(made[2]), epochs=1, quiet=True, output=str(tmp_path / "run"),
               init=str(tmp_path / "composed"))  # fmt: skip
    return finetune.Config(**cfg | changes)


def test_fine_tuning_takes_over_labels_split_and_rows_of_the_composition(made, tmp_path):
    split = tmp_path / "demo_optical_gap.json"
    split.write_text(json.dumps({"train": list(range(12)), "val": [12, 13, 14], "test": [15, 16, 17]}))
    compose.run(config(made, tmp_path / "composed", few_shot=9, split_file=str(tmp_path / "{task}.json"), transform="log", split_seed=4, limit=0))
    finetune.run(tuned(made, tmp_path))  # nothing said but the task: all else is the composition's
    rows, card = json.loads((tmp_path / "run/splits.json").read_text()), hub.read_card(tmp_path / "run")
    assert len(rows["train"]) == 9 and set(rows["train"]) < set(range(12)) and rows["test"] == [15, 16, 17]
    assert card["transform"] == "log" and card["dataset"] == "demo:demo_optical_gap"
    composed = hub.read_card(tmp_path / "composed")["record"]
    assert {k: card["record"][k] for k in ("content", "rows", "transform")} == {
        k: composed[k] for k in ("content", "rows", "transform")
    }


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(few_shot=0), "rows of train 9, now 28"),
        (dict(split_seed=1), "content of test"),
        (dict(transform="log"), "--transform 'none', now 'log'"),
        (dict(limit=0), "rows of test 6, now"),
        (dict(task="demo_gap"), "--task 'demo_optical_gap', now 'demo_gap'"),
    ],
)
def test_fine_tuning_on_other_rows_or_labels_than_composed_on_is_refused(made, tmp_path, changes, words):
    compose.run(config(made, tmp_path / "composed", few_shot=9))
    with pytest.raises(UserError, match=f"was composed on other rows or labels.*{words}.*compose again for these"):
        finetune.run(tuned(made, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_only_what_compose_made_is_replaced_and_only_what_is_whole_is_kept(made, tmp_path):
    where = tmp_path / "hub"
    shutil.copytree(made[1], where)
    with pytest.raises(UserError, match="holds what train_module.py made"):
        compose.run(config(made, where / "a", overwrite=True))
    cfg = config(made, tmp_path / "composed")
    compose.run(cfg)
    report = json.loads((tmp_path / "composed/composition.json").read_text()) | {"notes": 3}
    (tmp_path / "composed/composition.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="composition.json: damaged or changed"):
        compose.run(cfg)
    compose.run(replace(cfg, overwrite=True))


def test_settings_of_a_composition_that_were_edited_are_refused_by_name(made, tmp_path):
    compose.run(config(made, tmp_path / "composed"))
    file = tmp_path / ".runs/composed/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_file": {"a": 1}}))
    with pytest.raises(UserError, match="split_file is .*, not str; compose again"):
        finetune.run(tuned(made, tmp_path))


def test_a_composition_no_better_than_the_mean_says_so(made, tmp_path):
    some = SimpleNamespace(task=get_task("mp_eform"))
    said = compose.notes(config(made, tmp_path), {}, some, np.eye(3), {"composed": 1.2, "mean": 1.1})
    assert any("no better than their mean" in note for note in said)
    assert not compose.notes(config(made, tmp_path), {}, some, np.eye(9)[:, :2], {"composed": 0.2, "mean": 1.1})


def test_without_the_settings_of_the_composition_its_card_still_tells_other_rows(made, tmp_path):
    compose.run(config(made, tmp_path / "elsewhere/composed"))
    shutil.copytree(tmp_path / "elsewhere/composed", tmp_path / "composed")
    with pytest.raises(UserError, match="composed on other rows"):
        finetune.run(tuned(made, tmp_path, data="demo"))
    finetune.run(tuned(made, tmp_path, data="demo", limit=N_ROWS))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_embeddings_are_computed_again(made, tmp_path, damage):
    first = compose.run(config(made, tmp_path / "composed", modules="a,b"))
    cache = tmp_path / "cache"
    shutil.copytree(made[2], cache)
    for file in cache.glob("embeddings/*/x.npy"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 64
        file.write_bytes(content if damage == "flip" else content[:-40])
    cfg = config(made, tmp_path / "again", modules="a,b")
    cfg.cache = str(cache)
    assert compose.run(cfg) == first | {"output": str(tmp_path / "again")}


def test_the_licence_of_theta_0_holds_for_what_is_composed(made, tmp_path, monkeypatch):
    read = hub.read_card
    theta = lambda path: read(path) | ({"license_weights": "CC BY-NC 4.0"} if path.name == "backbone" else {})  # noqa: E731
    monkeypatch.setattr(hub, "read_card", theta)
    compose.run(config(made, tmp_path / "composed", modules="c"))
    assert read(tmp_path / "composed")["license_weights"] == "CC BY-NC 4.0; MIT"


# ------------------------------------------------------------------------------------------- which start, which labels


def test_the_composed_module_is_recommended_unless_another_is_better_by_more_than_noise():
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 2, 400)
    noise = rng.normal(0, 0.5, 400)
    noise -= noise.mean()
    se = noise.std(ddof=1) / 20
    for gain, wanted in [(-0.1, "composed"), (1.9 * se, "composed"), (2.1 * se, "theta_0")]:
        found, compared = report.recommend({"composed": base, "theta_0": base - gain + noise})
        assert found == wanted
        assert compared["theta_0"] == pytest.approx({"difference": gain, "standard_error": se})
    both = {"composed": base, "one": base - 0.3, "theta_0": base - 0.5}
    assert report.recommend(both)[0] == "theta_0"
    assert report.recommend({"composed": base, "one": base})[0] == "composed"  # one module took all the weight


def test_the_recommended_start_is_said_with_its_numbers():
    compared = {"a": {"difference": -0.1, "standard_error": 0.1}, "theta_0": {"difference": 0.2, "standard_error": 0.05}}
    errors = {"composed": 0.5, "a": 0.6, "theta_0": 0.3}
    assert "composed module (error 0.500, against 0.600 of a and 0.300" in report.start_verdict("composed", compared, errors)
    said = report.start_verdict("theta_0", compared, errors)
    assert "recommended start: theta_0" in said and "0.300" in said and "0.200, standard error 0.050" in said


def test_a_large_merge_gap_names_the_alternative():
    said, _ = report.merge_verdict(0.74, 0.68, 0.76, "theta_0, error 0.700")
    assert said[1].endswith("lower here: theta_0, error 0.700, which --init auto takes if by more than noise")


@pytest.mark.parametrize("y, wanted", [
    (np.exp(np.linspace(-4, 4, 200)), True), (np.linspace(1, 50, 200), False), (np.exp(np.linspace(0, 3, 200)), False),
    (np.exp(np.linspace(-4, 4, 200)) - 0.1, False), (np.concatenate([np.ones(199), [1e6]]), False),
    (1000 - np.exp(np.linspace(-4, 6.9, 200)), False),
])  # fmt: skip
def test_labels_that_ask_for_a_logarithm_are_positive_and_skewed_by_orders_of_magnitude(y, wanted):
    assert report.skewed(y) == wanted


def test_a_logarithm_is_suggested_for_ones_own_labels_only(made, tmp_path):
    y, own = np.exp(np.linspace(-4, 4, 200)), get_task("", data="mine.csv", unit="GPa")
    (note,) = report.transform_note(config(made, tmp_path), own, y)
    assert "0.01984 to 50.4 GPa" in note and "--transform log" in note
    for task, flag in [(get_task("mp_eform"), ""), (own, "none"), (replace(own, transform="log"), "")]:
        assert report.transform_note(config(made, tmp_path, transform=flag), task, y) == []


# ---------------------------------------------------------------------------------------------------- cross-validation


def test_one_module_for_each_fold_is_composed_on_its_training_rows_alone(made, tmp_path, monkeypatch, capsys):
    import data

    cfg = config(made, tmp_path / "composed", folds=3, quiet=False)
    result = compose.run(cfg)
    out = capsys.readouterr().out
    assert result["rows_used"] == N_ROWS and result["split"] == {"seed": 0, "file": "", "train": N_ROWS, "folds": 3}
    assert "composed/folds: 3 folds; recommended starts: " in out and f"recommended start: {result['recommended']}" in out
    assert hub.read_card(tmp_path / "composed")["folds"] == 3 and hub.verify(tmp_path, ["composed"]) == []
    assert stage.written_by(tmp_path / ".runs/composed") == "compose"
    assert json.loads((tmp_path / ".runs/composed/config.json").read_text())["folds"] == 3
    crystals = load_crystals(get_task(TASK, data="demo"), N_ROWS, quiet=True)
    folds = data.make_folds(crystals, 3, 0)
    composed = [tmp_path / "composed/folds" / str(k) for k in range(3)]
    for path, splits in zip(composed, folds, strict=True):
        card, r = hub.read_card(path), json.loads((path / "composition.json").read_text())
        assert card["record"]["content"] == data.split_fingerprint(crystals, splits)
        assert r["rows_used"] == len(splits["train"]) and r["recommended"] in ("composed", "theta_0", *result["modules"])
        expected = merge({n: made[1] / n for n in r["modules"]}, [x["weight"] for x in r["modules"].values()])
        found = hub.load_tensors(path)
        assert all(torch.equal(found[k], x) for k, x in expected.items())
    capsys.readouterr()
    assert compose.run(cfg) == result and "3 folds" in capsys.readouterr().out

    load = load_crystals

    def other_labels(*args, **kwargs):
        crystals = load(*args, **kwargs)
        crystals.y[np.concatenate([folds[1]["val"], folds[1]["test"]])] += 7.0
        return crystals

    monkeypatch.setattr(stage, "load_crystals", other_labels)
    compose.run(replace(cfg, output=str(tmp_path / "again"), quiet=True))
    for k, same in [(0, False), (1, True), (2, False)]:
        old, new = (json.loads((tmp_path / x / f"folds/{k}/composition.json").read_text()) for x in ("composed", "again"))
        assert (old["errors"] == new["errors"]) is same and (old["label_std"] == new["label_std"]) is same


def test_every_module_runs_once_over_the_rows_whatever_the_folds(made, tmp_path):
    cfg = config(made, tmp_path / "composed", folds=3, bootstrap=0)
    cfg.cache = str(tmp_path / "cache")
    result = compose.run(cfg)
    merged = {json.dumps([x["weight"] for x in r["modules"].values()]) for r in [result, *(
        json.loads((tmp_path / f"composed/folds/{k}/composition.json").read_text()) for k in range(3))] if sum(
        x["weight"] > 0 for x in r["modules"].values()) > 1}  # fmt: skip
    kept = [p for p in (tmp_path / "cache/embeddings").iterdir() if not p.name.startswith(".")]
    assert len(kept) == 4 + 1 + len(merged) + (made[0] == "adapter")  # modules, theta_0, merged ones; atom features


def test_few_rows_that_nothing_divides_are_folded_and_others_are_not(made, tmp_path):
    assert compose.run(config(made, tmp_path / "five", folds=None, bootstrap=0, modules="a"))["split"]["folds"] == 5
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": list(range(20)), "val": [20, 21], "test": [22, 23]}))
    result = compose.run(config(made, tmp_path / "one", folds=None, split_file=str(split), limit=0, modules="a"))
    assert "folds" not in result["split"] and not (tmp_path / "one/folds").exists()
    assert json.loads((tmp_path / ".runs/one/config.json").read_text())["folds"] == 0


def test_other_folds_are_refused_and_replaced_as_a_whole(made, tmp_path):
    cfg = config(made, tmp_path / "composed", folds=3, bootstrap=0, modules="a")
    compose.run(cfg)
    for changes, words in [(dict(folds=4), "--folds 3, now 4"), (dict(folds=0), "rows of train 40, now 28"),
                           (dict(split_seed=1), "--split-seed 0, now 1")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            compose.run(replace(cfg, **changes))
    compose.run(replace(cfg, folds=2, overwrite=True))
    assert sorted(p.name for p in (tmp_path / "composed/folds").iterdir()) == ["0", "1"]
    shutil.rmtree(tmp_path / "composed/folds/1")
    with pytest.raises(UserError, match="folds/1: no such module"):
        compose.run(replace(cfg, folds=2))


def test_what_people_put_beside_the_folds_is_never_deleted(made, tmp_path):
    cfg = config(made, tmp_path / "composed", folds=2, bootstrap=0, modules="a", overwrite=True)
    compose.run(cfg)
    for place in ("folds/notes.txt", "folds/1/notes.txt"):
        (tmp_path / "composed" / place).write_text("mine")
        assert any(place in problem for problem in hub.verify(tmp_path, ["composed"]))
        with pytest.raises(UserError, match=f"holds {place}, which no card lists"):
            compose.run(cfg)
        (tmp_path / "composed" / place).unlink()
    compose.run(cfg)


def test_a_fold_that_cannot_be_composed_leaves_nothing(made, tmp_path, monkeypatch):
    real, calls = compose.compose_for, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise UserError("the second fold")
        return real(*args)

    monkeypatch.setattr(compose, "compose_for", fails)
    with pytest.raises(UserError, match="the second fold"):
        compose.run(config(made, tmp_path / "composed", folds=3, bootstrap=0))
    assert not (tmp_path / "composed").exists() and not list(tmp_path.glob(".composed*"))


def test_embeddings_are_saved_for_plots(made, tmp_path):
    result = compose.run(config(made, tmp_path / "composed", save_embeddings=True, select="all", few_shot=9))
    with np.load(tmp_path / "composed/embeddings.npz") as found:
        assert sorted(found) == ["X_a", "X_b", "X_c", "X_composed", "X_d", "ids", "y"]
        assert len(set(found["ids"])) == len(found["y"]) == len(found["X_composed"]) == 9
        D = standardise([knn_estimate(found["X_composed"], found["y"])], found["y"])
        assert result["errors"]["composed"] == pytest.approx(float((D**2).mean()), rel=1e-6)
    assert hub.verify(tmp_path, ["composed"]) == []
