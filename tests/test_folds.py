"""Runs of folds: every row is tested by a model that has not seen it, and predict.py takes the models together."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TASK, many
from test_finetune import table, write_structures

import compose
import data
import evaluate
import finetune
import hub
import predict
from crystals import duplicate_key, subset
from files import MissingError, UserError
from model import preset
from stage import fold_rows, prepare, read_task, work_folder


def parts_of(folds):
    return [{name: set(rows.tolist()) for name, rows in splits.items()} for splits in folds]


@pytest.mark.parametrize("M, K", [(3, 3), (4, 2), (7, 5), (100, 5), (100, 10)])
def test_folds_test_every_row_once_and_share_none(tmp_path, M, K):
    crystals = many(tmp_path, M)
    folds = parts_of(data.make_folds(crystals, K, seed=1))
    assert len(folds) == K and sorted(i for splits in folds for i in splits["test"]) == list(range(M))
    for splits in folds:
        assert all(splits.values()) and sum(map(len, splits.values())) == M
        assert splits["train"] | splits["val"] | splits["test"] == set(range(M))
        assert M // K <= len(splits["test"]) <= -(-M // K)
        assert len(splits["val"]) == max(1, round((M - len(splits["test"])) / 6))
    assert folds == parts_of(data.make_folds(crystals, K, seed=1))
    assert M < 7 or folds != parts_of(data.make_folds(crystals, K, seed=2))


def test_rows_of_one_structure_stay_together(tmp_path):
    crystals = many(tmp_path, 20)
    crystals = subset(crystals, [*range(20), *[3] * 6, *range(10)])  # seven or eight of one, pairs of ten
    for splits in data.make_folds(crystals, 4, seed=0):
        keys = {name: {duplicate_key(crystals.Z[i], crystals.pos[i], crystals.cell[i]) for i in rows}
                for name, rows in splits.items()}  # fmt: skip
        assert not keys["train"] & keys["test"] and not keys["val"] & (keys["train"] | keys["test"])
        assert 8 <= len(splits["test"]) <= 10


@pytest.mark.parametrize("M, K", [(4, 5), (3, 2), (1, 2)])
def test_too_few_structures_for_the_folds_are_one_line(tmp_path, M, K):
    with pytest.raises(UserError, match=f"--folds {K}: task .* has {M} different structures.*--folds 0 for one split"):
        data.make_folds(many(tmp_path, M), K)


def test_folds_are_the_default_for_few_rows_that_nothing_divides(tmp_path, home):
    crystals, cfg = many(tmp_path, 30), replace(home.runs, folds=None, split_seed=0, few_shot=0)
    assert len(fold_rows(cfg, crystals)) == 5 and len(fold_rows(replace(cfg, folds=3), crystals)) == 3
    assert fold_rows(replace(cfg, folds=0), crystals) == fold_rows(replace(cfg, folds=1), crystals) == []
    assert fold_rows(replace(cfg, split_file="mine.json"), crystals) == []
    assert fold_rows(cfg, replace(crystals, split=["train"] * 30)) == []
    assert fold_rows(cfg, subset(crystals, np.arange(1000) % 30)) == []
    with pytest.raises(UserError, match="--folds 3: --split-file mine.json"):
        fold_rows(replace(cfg, folds=3, split_file="mine.json"), crystals)
    few = fold_rows(replace(cfg, few_shot=4), crystals)
    assert [len(splits["train"]) for splits in few] == [4] * 5 and len(few[0]["test"]) == 6


@pytest.fixture(scope="module")
def folded(home, tmp_path_factory):
    """A run of three folds, of 40 crystals."""
    cfg = replace(home.runs, folds=3, epochs=2, output=str(tmp_path_factory.mktemp("folds") / "run"))
    return cfg, finetune.run(cfg)


def test_the_log_of_a_run_has_all_its_folds(folded):
    cfg, _ = folded
    log = (work_folder(cfg.output) / "log.txt").read_text()
    assert [f"--- fold {k} of 3" in log for k in (1, 2, 3)] == [True] * 3 and log.count("epoch 2/2") == 3


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_every_row_is_predicted_by_the_model_that_has_not_seen_it(folded, home):
    cfg, metrics = folded
    target = finetune.output_path(cfg.output)
    rows, crystals = read(target / "predictions.csv"), prepare(home.modules, preset("tiny"))[0]
    assert [r["id"] for r in rows] == crystals.ids and metrics["folds"] == 3
    folds = json.loads((target / "splits.json").read_text())["folds"]
    name = dict(zip(crystals.row.tolist(), crystals.ids))
    for k, splits in enumerate(folds):
        assert [r["id"] for r in rows if r["fold"] == str(k)] == [name[row] for row in splits["test"]]
        inner = {r["id"]: r["prediction"] for r in read(target / f"fold{k}/predictions_test.csv")}
        assert all(float(r["prediction"]) == float(inner[r["id"]]) for r in rows if r["fold"] == str(k))
        assert json.loads((target / f"fold{k}/splits.json").read_text()) == splits
        assert hub.read_card(target / f"fold{k}")["split"] == {name: len(part) for name, part in splits.items()}
    y, p = (np.array([float(r[k]) for r in rows]) for k in ("target", "prediction"))
    test = metrics["test"]
    assert test["mae"] == pytest.approx(np.abs(y - p).mean()) and test["rows"] == 40
    assert metrics["test_mae"] == test["mae"] and len(metrics["fold_mae"]) == 3
    assert not (target.parent / ".runs/run/fold0").exists()


def test_intervals_of_a_fold_rest_on_the_others_and_the_coverage_is_theirs(folded):
    cfg, metrics = folded
    rows = read(f"{cfg.output}/predictions.csv")
    y, p, low, high, fold, sigma = (
        np.array([float(r[k]) for r in rows]) for k in ("target", "prediction", "lower", "upper", "fold", "difficulty")
    )
    for k in range(3):
        others = np.sort((np.abs(y - p) / sigma)[fold != k])
        q = others[int(np.ceil((len(others) + 1) * 0.9)) - 1]
        np.testing.assert_allclose((high - p)[fold == k], (q * sigma)[fold == k])
    inside = (low <= y) & (y <= high)
    assert metrics["coverage"]["test"] == pytest.approx(inside.mean()) and metrics["coverage"]["level"] == 0.9
    assert metrics["coverage"]["mean_width"] == pytest.approx((high - low).mean()) and inside.mean() > 0.6


def test_predict_takes_the_models_of_the_folds_together(folded, home, tmp_path, capsys, monkeypatch):
    cfg, _ = folded
    crystals = prepare(home.modules, preset("tiny"))[0]
    write_structures(tmp_path / "new", crystals, range(6))
    asked = predict.Config(inputs=[str(tmp_path / "new")], model=(cfg.output,), output=str(tmp_path / "p"), next=4,
                           save_embeddings=True)  # fmt: skip
    predict.run(asked)
    found = table(tmp_path / "p")
    head = [h.split()[0] for h in found.pop("id")]
    assert head == ["prediction", "lower", "upper", "spread", "neighbour_distance", "unseen_elements"]
    single = np.stack([predict.predict(f"{cfg.output}/fold{k}", subset(crystals, range(6))) for k in range(3)])
    values = np.array([[float(x) for x in found[i][:-1]] for i in crystals.ids[:6]])
    np.testing.assert_allclose(values[:, 0], single.mean(0), rtol=1e-5)
    np.testing.assert_allclose(values[:, 3], single.std(0), rtol=1e-3, atol=1e-6)
    assert (values[:, 1] < values[:, 0]).all() and (values[:, 0] < values[:, 2]).all()
    q = json.loads(open(f"{cfg.output}/calibration.json").read())["q"]
    assert (values[:, 2] - values[:, 0] >= 0.5 * q - 1e-6).all()  # where a crystal is a training row: the offset
    assert ((0 <= values[:, 4]) & (values[:, 4] <= 100)).all()
    ranked = read(tmp_path / "p/next.csv")
    assert [r["rank"] for r in ranked] == ["1", "2", "3", "4"] and len({r["id"] for r in ranked}) == 4
    with np.load(tmp_path / "p/embeddings.npz") as arrays:
        assert arrays["ids"].tolist() == list(found) and arrays["X_0"].shape == (6, 32)
    some = hub.read_card(home.root / "tuned")
    monkeypatch.setattr(predict, "load_models", lambda _: [(None, {**some, "transform": t}) for t in ("none", "log")])
    with pytest.raises(UserError, match="--next: some of the models learnt logarithms"):
        predict.run(asked)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--next: .*full holds no neighbours.npz"):
        predict.run(replace(asked, model=(str(home.hub / "full"),)))
    capsys.readouterr()
    predict.run(replace(asked, model=(f"{cfg.output}/fold0", f"{cfg.output}/fold1"), next=0))
    assert "no intervals: they are calibrated for one run" in capsys.readouterr().err
    assert [h.split()[0] for h in table(tmp_path / "p")["id"]] == ["prediction", "spread", *head[4:]]


def test_a_crystal_without_a_finite_prediction_is_listed_and_the_others_keep_theirs(folded, home, tmp_path, monkeypatch):
    cfg, _ = folded
    crystals, predict_batches = prepare(home.modules, preset("tiny"))[0], predict.predict_batches
    write_structures(tmp_path / "new", crystals, range(4))
    asked = predict.Config(inputs=[str(tmp_path / "new")], model=(cfg.output,), output=str(tmp_path / "p"), next=2)
    predict.run(asked)
    whole = table(tmp_path / "p")
    broken = []

    def with_nan(*args, **kwargs):
        index, y, prediction, X = predict_batches(*args, **kwargs)
        for x in (prediction, X):
            x[broken] = np.nan
        return index, y, prediction, X

    monkeypatch.setattr(predict, "predict_batches", with_nan)
    broken.append(2)
    done = predict.run(asked)
    assert (done["rows"], done["skipped"], done["exit_code"]) == (3, 1, 1)
    skipped = (tmp_path / "p/skipped.csv").read_text()
    left = table(tmp_path / "p")
    (lost,) = whole.keys() - left.keys()
    assert f"{lost},the prediction is not finite" in skipped and left == {i: whole[i] for i in left}
    assert lost not in {r["id"] for r in read(tmp_path / "p/next.csv")}
    broken.extend(range(4))
    with pytest.raises(UserError, match="none of the predictions of .* is finite"):
        predict.run(asked)


def test_a_finished_run_of_folds_is_kept_and_another_is_refused(folded, tmp_path):
    cfg, metrics = folded
    before = (finetune.output_path(cfg.output) / "folds.json").stat().st_mtime_ns
    assert finetune.run(cfg) == metrics
    for changes, words in [(dict(epochs=3), "--epochs 2, now 3"), (dict(folds=4), "--folds 3, now 4"),
                           (dict(folds=0), "holds a run of folds, this one is of one split"),
                           (dict(init="backbone"), "init of fold0"),
                           (dict(split_seed=1), "--split-seed 0, now 1")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            finetune.run(replace(cfg, **changes))
    assert (finetune.output_path(cfg.output) / "folds.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a run of one split, this one is of 3 folds"):
        finetune.run(replace(cfg, output=f"{cfg.output}/fold0"))


def test_an_interrupted_run_goes_on_at_its_fold_and_ends_alike(folded, tmp_path, monkeypatch):
    cfg, metrics = replace(folded[0], output=str(tmp_path / "run")), folded[1]
    whole, count = finetune.train, []

    def stop_in_the_second_fold(*args):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(finetune, "train", stop_in_the_second_fold)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(cfg)
    assert not (tmp_path / "run").exists()
    again = finetune.run(cfg)
    assert len(count) == 4, "the fold that was finished is kept"
    assert again["test"] == metrics["test"] and again["coverage"] == metrics["coverage"]
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which finetune.py has not written"):
        finetune.run(replace(cfg, overwrite=True, epochs=1))
    (tmp_path / "run/notes.txt").unlink()
    assert finetune.run(replace(cfg, overwrite=True, epochs=1))["budget"]["epochs"] == 1
    (tmp_path / "run/predictions.csv").write_text("")
    with pytest.raises(UserError, match="predictions.csv: damaged or changed"):
        finetune.run(replace(cfg, epochs=1))


def test_magpie_trees_are_asked_on_the_same_rows(home, tmp_path, capsys):
    cfg = replace(home.runs, compare=True, output=str(tmp_path / "run"), epochs=1)
    metrics = finetune.run(cfg)
    assert metrics["verdict"] in capsys.readouterr().out and "on 6 crystals" in metrics["verdict"]
    crystals, _, splits = prepare(replace(cfg, split_seed=0, few_shot=0), preset("tiny"))
    expected = evaluate.magpie(cfg, crystals, [splits])[splits["test"]]
    assert metrics["magpie"]["mae"] == pytest.approx(np.abs(expected - crystals.y[splits["test"]]).mean())


@pytest.mark.parametrize("start", ["composed", "full", "theta_0"])
def test_auto_starts_from_what_compose_recommends(home, tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    shared = dict(task=TASK, data="demo", hub=str(home.hub), cache=str(home.root / "cache"), quiet=True)
    auto = finetune.Config(**shared, epochs=1, batch_size=8, compare=False)
    with pytest.raises(MissingError, match="--init auto: no module in .*python compose.py --task"):
        finetune.run(auto)
    compose.run(compose.Config(**shared, kind="full", limit=40, bootstrap=0, folds=3))
    for file in (tmp_path / "runs/composed").rglob("composition.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"recommended": start}))
    with pytest.raises(UserError, match="composition.json: damaged or changed"):
        finetune.run(auto)
    monkeypatch.setattr(hub, "checked_file", lambda path, file: finetune.Path(path) / file)
    metrics = finetune.run(auto)
    assert metrics["init"] == start and metrics["folds"] == 3 and metrics["test"]["rows"] == 40
    for k, why in enumerate(metrics["init_why"]):
        assert f"{start}, recommended by runs/composed/{TASK}/folds/{k}" in why
    where = {"full": home.hub / "full", "theta_0": home.hub / "backbone", "composed": None}[start]
    for k in range(3):
        parent = hub.read_card(where or tmp_path / f"runs/composed/{TASK}/folds/{k}")["tensors_sha256"]
        assert hub.read_card(tmp_path / f"runs/{TASK}/fold{k}")["parents"][0]["tensors_sha256"] == parent
    with pytest.raises(MissingError, match="fold 4 tests; compose with the same --folds|fold 1 tests"):
        finetune.run(replace(auto, folds=4, output="other"))


def test_what_a_start_has_seen_is_told_apart_in_the_error(home):
    error, known = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 1, 1, np.nan])
    assert evaluate.leakage(known, error) == {"test": 2, "unknown": 1, "test_mae_seen": 2.5, "test_mae_unseen": 1.0}
    assert evaluate.leakage(0 * error, error)["test_mae_seen"] is None
    assert evaluate.leakage(np.full(4, np.nan), error) is None
    crystals, _ = read_task(home.modules, preset("tiny"))
    scratch = finetune.find_start(replace(home.runs, init="scratch"), "x")
    assert not evaluate.seen_rows(home.runs, scratch, crystals).any()


def test_a_start_that_was_tuned_on_rows_to_be_tested_is_refused(home, tmp_path):
    one = replace(home.runs, folds=0, epochs=1, output=str(tmp_path / "one"))
    finetune.run(one)
    again = replace(one, init=str(tmp_path / "one"), output=str(tmp_path / "again"))
    for leaks in (dict(folds=3), dict(split_seed=7)):
        with pytest.raises(UserError, match="was trained on labels of this table that this run tests"):
            finetune.run(replace(again, **leaks))
    finetune.run(again)  # the same split: nothing that is tested was learnt
