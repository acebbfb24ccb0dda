"""The stages, chained on the embedded crystals through their command lines, for both kinds of modules."""

import csv
import importlib.util
import json
import math
import shutil

import pytest

import benchmark
import compose
import demo
import finetune
import hub
from stage import main
import predict
import pretrain
import train_module as tm

SMALL = ["--data", "demo", "--limit", "24", "--quiet"]


def call(stage, *argv):
    """python STAGE.py ARGV; the exit code."""
    with pytest.raises(SystemExit) as stop:
        main(stage.run, stage.Config, stage.__doc__, [*map(str, argv)])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub with a theta_0 pre-trained for an epoch, two full and two adapter modules."""
    root = tmp_path_factory.mktemp("stages")
    shared = [*SMALL, "--hub", root / "hub", "--cache", root / "cache", "--batch-size", "8"]
    sets = ["--sets", "demo_forcefield,demo_clusters", "--preset", "tiny"]
    assert call(pretrain, *sets, *shared, "--epochs", "1") == 0
    for kind in ("full", "adapter"):
        for task in ("demo_dielectric", "demo_gap"):
            name = ["--task", task, "--name", f"{task}-{kind}", "--kind", kind]
            assert call(tm, *name, *shared, "--epochs", "2") == 0
    return root, shared


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_task_goes_from_hub_to_predictions(home, kind, monkeypatch, capsys):
    root, shared = home
    work = root / f"work_{kind}"
    work.mkdir()
    monkeypatch.chdir(work)
    task = ["--task", "demo_refractive_index"]
    assert hub.verify(root / "hub") == []
    assert call(compose, *task, *shared, "--kind", kind, "--bootstrap", "5") == 0
    composed = work / "runs" / "composed" / "demo_refractive_index"  # where finetune.py looks without being told
    report = json.loads((composed / "composition.json").read_text())
    assert sum(m["weight"] for m in report["modules"].values()) == pytest.approx(1)
    assert hub.read_card(composed)["kind"] == kind

    assert call(finetune, *task, *shared, "--epochs", "3") == 0
    metrics = json.loads((work / "runs" / "demo_refractive_index" / "metrics.json").read_text())
    assert metrics["kind"] == kind and math.isfinite(metrics["test_mae"])
    assert f"test MAE {metrics['test_mae']:.4g}" in capsys.readouterr().out

    demo.write_examples("my_crystals")
    assert call(predict, "--model", "runs/demo_refractive_index", "my_crystals", "--quiet") == 0
    rows = list(csv.reader(open("runs/predictions/predictions.csv")))
    assert rows[0][0] == "id" and rows[0][1].startswith("prediction") and len(rows) >= 3
    assert [name.split()[0] for name in rows[0][1:4]] == ["prediction", "lower", "upper"]  # of five folds
    for _, *values, _ in rows[1:]:
        prediction, lower, upper = map(float, values[:3])
        assert all(math.isfinite(float(x)) for x in values) and lower < prediction < upper


def test_every_stage_repeats_itself_from_its_config_file(home, tmp_path):
    root, shared = home
    new = ["--hub", tmp_path / "hub"]
    assert call(pretrain, "--config", root / "hub" / ".runs" / "backbone" / "config.json", *new) == 0
    assert call(tm, "--config", root / "hub" / ".runs" / "demo_gap-full" / "config.json", *new) == 0
    for name in ("backbone", "demo_gap-full"):
        old, new = (hub.read_card(h / name)["tensors_sha256"] for h in (root / "hub", tmp_path / "hub"))
        assert old == new


def test_composition_prefers_the_module_that_shares_the_physics(tmp_path):
    """The optical gap is the band gap less a binding energy; neither volume nor the Madelung energy says as much."""
    shared = {"data": "demo", "hub": str(tmp_path / "hub"), "cache": str(tmp_path / "cache"), "quiet": True}
    pretrain.run(pretrain.Config(**shared, sets="demo_forcefield", limit=150, epochs=2, preset="tiny"))
    for task in ("demo_gap", "demo_volume", "demo_ewald"):
        tm.run(tm.Config(**shared, task=task, limit=250, epochs=5))
    found = compose.run(compose.Config(**shared, task="demo_optical_gap", bootstrap=0, output=str(tmp_path / "composed")))
    weights = {name: module["weight"] for name, module in found["modules"].items()}
    assert weights["demo_gap"] > 0.5, weights


def test_the_benchmark_runs_every_method_once_and_shows_a_table(home, tmp_path, capsys):
    root, _ = home
    argv = ["--task", "demo_optical_gap", "--data", "demo", "--limit", "40", "--hub", root / "hub", "--output", tmp_path]
    methods = [m for m in benchmark.METHODS if m != "chgnet-svr" or importlib.util.find_spec("chgnet")]
    argv += ["--epochs", "2", "--quiet"]
    assert call(benchmark, *argv, "--seeds", "0", "--methods", ",".join(methods)) == 0
    argv += ["--seeds", "0,1", "--methods", "scratch,theta0"]
    assert call(benchmark, *argv) == 0
    runs = sorted(tmp_path.glob("*/demo_optical_gap/seed*/metrics.json"))
    assert len(runs) == len(methods) + 2
    times = [p.stat().st_mtime_ns for p in runs]
    text = (tmp_path / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| demo_optical_gap (eV)"))
    scratch = [json.loads((tmp_path / f"scratch/demo_optical_gap/seed{i}/metrics.json").read_text()) for i in (0, 1)]
    assert f"{sum(m['test_mae'] for m in scratch) / 2:.4g} ±" in row and "| 28 / 6 |" in row
    capsys.readouterr()
    assert call(benchmark, "--table", "--output", tmp_path) == 0
    assert capsys.readouterr().out.count("| demo_optical_gap (eV)") == 1
    assert call(benchmark, *argv) == 0
    assert [p.stat().st_mtime_ns for p in runs] == times  # what is finished is not run again
    lines = list(csv.DictReader(open(tmp_path / "runs.csv")))
    assert {(r["method"], r["seed"]) for r in lines} == {(m, "0") for m in methods} | {("scratch", "1"), ("theta0", "1")}
    other = ["--seeds", "2", "--epochs", "1", "--methods", "theta0"]
    assert call(benchmark, *argv, *other) == 2  # means are of runs of one budget
    assert "runs of demo_optical_gap do not compare: epochs" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "theta0/demo_optical_gap/seed2")
    assert call(benchmark, *argv, "--epochs", "3") == 2  # and not passed off as what other settings gave
    assert "--epochs 2, now 3" in capsys.readouterr().err
    assert json.loads((runs[0].parent / "config.json").read_text())["epochs"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] != 3  # what was refused is not written down
    assert call(benchmark, "--table", "--output", tmp_path / "nothing") == 2
    (runs[0].parent / "metrics.json").write_text("{")
    assert call(benchmark, "--table", "--output", tmp_path) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 2 and "metrics.json: not the metrics of a run" in err[1]


def test_a_folder_with_another_programs_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "table.md").write_text("mine")
    assert call(benchmark, "--task", "demo_gap", "--data", "demo", "--output", tmp_path) == 2
    assert "holds a table.md of another program" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_runs_are_told_apart_by_their_seed_not_their_place(tmp_path):
    metrics = {"test": {"rows": 3, "mae": 1.0}, "val_mae": 1.0, "test_mae": 1.0, "unit": "eV", "best_epoch": 1}
    metrics |= {"epochs": 1, "seconds": 1.0, "budget": {"epochs": 2}}
    for method, seeds in (("theta0", (0, 2, 10)), ("scratch", (0, 1, 2, 10))):
        for seed in seeds:
            folder = tmp_path / method / "task" / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics | {"test_mae": float(seed)}))
            (folder / "splits.json").write_text(json.dumps({"train": [1, 2]}))
    found = benchmark.collect(tmp_path)
    assert {m: list(seeds) for m, seeds in found["task"].items()} == {"theta0": [0, 2, 10], "scratch": [0, 1, 2, 10]}
    rows = list(csv.DictReader(benchmark.runs_csv(found).splitlines()))
    assert all(float(r["test_mae"]) == float(r["seed"]) for r in rows) and "(3 seeds)" in benchmark.table(found)
