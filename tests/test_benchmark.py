"""benchmark.py: runs without a network (test_stages.py runs those with one), and what the table says."""

import csv
import json

import numpy as np
import pytest
import torch

import baselines
import benchmark
import evaluate
import hub
from data import collate
from files import UserError
from stage import read_task

TASK = "demo_optical_gap"


def settings(tmp_path, **more):
    more = {"task": TASK, "data": "demo", "limit": 40, "seeds": "0,1", "methods": "magpie", "quiet": True} | more
    return benchmark.Config(output=str(tmp_path / "out"), **more)


def test_a_run_without_a_network_has_the_files_of_a_fine_tuned_one(home, tmp_path):
    found = benchmark.run(settings(tmp_path))
    folder = tmp_path / "out/magpie" / TASK / "seed1"
    tuned = home.root / "tuned"
    files = {"metrics.json", "splits.json", "config.json", "predictions_test.csv", "predictions_val.csv"}
    assert {path.name for path in folder.iterdir()} == files <= {path.name for path in tuned.iterdir()}
    metrics, other = (json.loads((path / "metrics.json").read_text()) for path in (folder, tuned))
    assert metrics.keys() <= other.keys() | {f"{part}_physical" for part in ("val", "test")}
    assert metrics["test"].keys() == other["test"].keys()
    rows = list(csv.DictReader(open(folder / "predictions_test.csv")))
    errors = [abs(float(row["prediction"]) - float(row["target"])) for row in rows]
    assert np.mean(errors) == pytest.approx(metrics["test_mae"]) and len(rows) == metrics["test"]["rows"] == 6
    assert found[TASK]["magpie"][1]["test_mae"] == metrics["test_mae"]


def test_a_finished_run_is_kept_and_what_rests_on_other_rows_is_refused(tmp_path):
    benchmark.run(settings(tmp_path))
    file = tmp_path / "out/magpie" / TASK / "seed0/metrics.json"
    made = file.stat().st_mtime_ns
    benchmark.run(settings(tmp_path, epochs=99))  # of networks
    assert file.stat().st_mtime_ns == made
    with pytest.raises(UserError, match="seed0: made with .*rows of train 28, now 22; .*; give another --output"):
        benchmark.run(settings(tmp_path, limit=30))
    with pytest.raises(UserError, match="runs of demo_optical_gap do not compare: limit .* in magpie, seed"):
        benchmark.run(settings(tmp_path, limit=30, seeds="0", overwrite=True))
    assert json.loads(file.read_text())["budget"] == {"limit": 30, "few_shot": 0}


def runs(*errors, **budget):
    budget = {"limit": 0, "few_shot": 0, **budget}
    return {seed: {"test": {"rows": 9, "mae": e}, "val_mae": e, "test_mae": e, "unit": "eV", "best_epoch": None,
                   "epochs": None, "seconds": 6.0, "budget": budget, "train_rows": 80, "coverage": None}
            for seed, e in enumerate(errors)}  # fmt: skip


def test_only_networks_are_compared_by_their_epochs():
    alike = [("magpie", runs(1)[0]), ("theta0", runs(1, epochs=5)[0]), ("scratch", runs(1, epochs=5)[0])]
    benchmark.check_alike("x", "t", alike)
    with pytest.raises(UserError, match="epochs 5 in theta0, but 6 in cgcnn"):
        benchmark.check_alike("x", "t", [*alike, ("cgcnn", runs(1, epochs=6)[0])])
    with pytest.raises(UserError, match="few_shot 0 in magpie, but 10 in chgnet-svr"):
        benchmark.check_alike("x", "t", [*alike, ("chgnet-svr", runs(1, few_shot=10)[0])])


def test_gains_are_means_over_tasks_of_the_seeds_that_both_have():
    found = {
        "a": {"moma-full": runs(0.5, 0.5, 9.0), "theta0": runs(1.0, 1.0)},  # half, on seeds 0 and 1
        "b": {"moma-full": runs(1.1), "theta0": runs(1.0), "magpie": runs(2.2)},
        "c": {"theta0": runs(1.0)},
    }
    assert benchmark.gains(found).split("\n") == [
        "- gain of moma-full over theta0: mean 20.0%, better on 1 of 2 tasks",
        "- gain of moma-full over magpie: mean 50.0%, better on 1 of 1 tasks",
    ]
    assert benchmark.gains({"c": found["c"]}) == ""
    frozen = {"a": {"moma-svr": runs(0.9), "theta0-svr": runs(1.2), "theta0": runs(1.0)}}
    line = "- gain of moma-svr over theta0-svr: mean 25.0%, better on 1 of 1 splits"
    assert benchmark.gains(frozen, "moma-svr", ["theta0-svr"]) == line


def test_of_several_methods_the_validation_error_chooses_split_by_split():
    full, other = runs(0.5, 0.6), runs(1.0, 0.5)
    full[0] |= {"test_mae": 0.8}  # chosen by validation, not by test
    other[0] |= {"test_mae": 0.1}
    found = {"a": {"moma-full": full, "moma-hinted": other, "moma-adapter": runs(0.1, 0.1), "theta0": runs(1, 1, 1)}}
    lines = benchmark.by_validation(found | {"b": {"moma-full": full, "theta0": runs(1, 1)}}).split("\n")
    assert len(lines) == 1 and "has the lower validation error, over theta0: mean 35.0%" in lines[0]  # (0.8 + 0.5) / 2
    assert "over 2 splits" in lines[0] and benchmark.by_validation({"b": {"moma-full": full}}) == ""


def test_of_one_task_the_gain_has_a_spread_over_its_splits_and_what_lies_inside_is_said_to_be_none():
    found = {"a": {"moma-full": runs(0.5, 0.6), "theta0": runs(1.0, 1.0), "magpie": runs(0.4, 1.0)}}
    assert benchmark.gains(found).split("\n") == [
        "- gain of moma-full over theta0: mean 45.0%, spread 7.1% over 2 splits, better on 2 of 2 splits",
        "- gain of moma-full over magpie: mean 7.5%, spread 46.0% over 2 splits (inside the spread: no difference"
        + " to speak of), better on 1 of 2 splits",
    ]


def test_errors_are_averaged_over_tasks_in_units_of_the_published_spread():
    std = benchmark.STD
    assert std.keys() == benchmark.PUBLISHED.keys()
    found = {
        "mine": {"moma-full": runs(7.0)},
        "mp_phonons": {"moma-full": runs(0.07093, 3 * 0.07093), "magpie": runs(0.7093)},
        "expt_eform": {"moma-full": runs(0.4 * 1.0065)},
    }
    last = benchmark.table(found).split("\n")[-1].split(" | ")
    assert last[:5] == ["| mean of MAE / std, 2 tasks", "", "0.3000", "1.0000 (1 tasks)", ""]
    paper = np.mean([0.0484 / 0.7093, 0.0839 / 1.0065])
    assert last[5].endswith(f", {paper:.4f} |")
    assert "mean of MAE" not in benchmark.table({"mine": found["mine"]})


def test_intervals_are_counted_over_the_runs_that_have_them():
    found = {"a": {"theta0": runs(1, 1), "magpie": runs(1)}, "b": {"theta0": runs(1)}}
    assert benchmark.coverage(found) == ""
    tuned = (*found["a"]["theta0"].values(), *found["b"]["theta0"].values())
    for run, share in zip(tuned, (0.8, 0.9, 1.0), strict=True):
        run["coverage"] = share
    assert benchmark.coverage(found) == "- in the 90 % intervals: theta0 90.0% (3 runs)"


def test_gains_on_unseen_crystals_are_of_rows_that_nothing_in_the_start_was_trained_on(tmp_path):
    """Two crystals a split, the first of them seen; labels are logarithms, files are not."""
    found = {"a": {"moma-full": runs(1, 1), "theta0": runs(1, 1), "magpie": runs(1)}}
    error = {"moma-full": 0.5, "theta0": 1.0, "magpie": 2.0}
    for m, seeds in found["a"].items():
        for seed in seeds:
            folder = tmp_path / m / "a" / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [f"x,1,{np.exp(9)},1", f"y,1,{np.exp(error[m])},0"]
            (folder / "predictions_test.csv").write_text("\n".join(["id,target,prediction,seen", *lines]) + "\n")
            (folder / "module.json").write_text('{"transform": "log"}')
    text = "- on 2 of 4 test crystals, which nothing in moma-full's start was trained on: mean gain 50.0% over theta0"
    assert benchmark.unseen(tmp_path, found) == text  # trees have run on one of the two splits: no mean
    for seed in (0, 1):
        path = tmp_path / f"moma-full/a/seed{seed}/predictions_test.csv"
        path.write_text(path.read_text().replace(",0\n", ",\n"))  # not known: not unseen
    assert benchmark.unseen(tmp_path, found) == ""
    path.write_text("id,target,prediction\nx,1,2\n")  # an earlier release's
    assert benchmark.unseen(tmp_path, found) == ""
    path.unlink()
    with pytest.raises(UserError, match="moma-full/a/seed1/predictions_test.csv"):
        benchmark.unseen(tmp_path, found)


def test_frozen_representations_are_those_of_the_network_in_the_folder(home, tmp_path):
    """moma-svr and theta0-svr: the mean over the atoms of what the head reads, crystal by crystal."""
    hub_folder = home.root / "hub"
    own = benchmark.TaskConfig(task=TASK, data="demo", limit=12, hub=str(hub_folder), cache=str(tmp_path), quiet=True)
    for name in (hub.BACKBONE, "full"):
        X = benchmark.representations(own, hub_folder / name)
        network = hub.load_module(hub_folder / name).backbone.eval()
        _, dataset = read_task(own, network.arch)
        with torch.no_grad():
            alone = torch.cat([network.embed(collate([dataset[i]])) for i in range(12)])
        np.testing.assert_allclose(X, alone.numpy(), rtol=1e-4, atol=1e-5)


def test_overwrite_composes_again_for_frozen_representations_too(home, tmp_path):
    own = dict(methods="moma-svr", seeds="0", hub=str(home.root / "hub"), cache=str(tmp_path / "cache"))
    benchmark.run(settings(tmp_path, **own))
    with pytest.raises(UserError, match="or --overwrite"):
        benchmark.run(settings(tmp_path, **own, limit=30))
    found = benchmark.run(settings(tmp_path, **own, limit=30, overwrite=True))
    assert found[TASK]["moma-svr"][0]["budget"]["limit"] == 30


def test_the_mixture_is_of_every_module_that_was_composed_side_by_side(home, tmp_path, monkeypatch):
    read_card, parents = hub.read_card, {"parents": [{"name": "full"}, {"name": hub.BACKBONE}]}
    monkeypatch.setattr(benchmark, "composed", lambda *args: {"output": "composed"})
    monkeypatch.setattr(hub, "read_card", lambda path: parents if str(path) == "composed" else read_card(path))
    own = dict(hub=str(home.root / "hub"), cache=str(tmp_path / "cache"))
    benchmark.run(settings(tmp_path, methods="mixture-svr", seeds="0", **own))
    task = benchmark.TaskConfig(task=TASK, data="demo", limit=40, quiet=True, **own)
    X = np.hstack([benchmark.representations(task, home.root / "hub" / name) for name in ("full", hub.BACKBONE)])
    crystals = benchmark.load_crystals(benchmark.get_task(TASK, "", "demo"), 40, quiet=True)
    at, folder = {int(row): i for i, row in enumerate(crystals.row)}, tmp_path / "out/mixture-svr" / TASK / "seed0"
    splits = [[at[row] for row in rows] for rows in json.loads((folder / "splits.json").read_text()).values()]
    expected = baselines.support_vector_regression(X, crystals.y, *map(np.array, splits))
    found = evaluate.read_columns(folder / "predictions_test.csv")["prediction"].astype(float)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
