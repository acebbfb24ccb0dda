"""finetune.py and predict.py: a run's folder is what it says, rests on what was composed, and predicts."""

import csv
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TASK, is_picture
from safetensors.torch import load_file

import evaluate
import finetune
import hub
import predict
import train_module as tm
from files import MissingError, UserError
from model import PropertyModel, preset
from stage import parse, prepare


def test_a_run_folder_holds_what_its_metrics_say(home):
    folder = home.root / "tuned"
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader(open(folder / "predictions_test.csv")))
    y, p = (np.array([float(r[k]) for r in rows]) for k in ("target", "prediction"))
    test = metrics["test"]
    assert test["mae"] == pytest.approx(np.abs(y - p).mean()) and test["rows"] == len(rows) == 6
    assert test["r2"] == pytest.approx(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert test["mad_mae"] == pytest.approx(test["mad"] / test["mae"])
    seen, known = [r["seen"] for r in rows], metrics["leakage"] or {"test": 0, "unknown": len(rows)}
    assert (seen.count("1"), seen.count("")) == (known["test"], known["unknown"])
    names = {p.name for p in folder.iterdir()}
    wanted = "config.json model.safetensors module.json splits.json history.csv metrics.json predictions_val.csv"
    assert names >= {*wanted.split(), "predictions_test.csv", "skipped.csv"} and "last.pt" not in names
    assert is_picture(folder / "parity.png")
    card = hub.read_card(folder)
    assert card["parents"][0]["tensors_sha256"] == hub.read_card(home.hub / "full")["tensors_sha256"]
    assert card["backbone_sha256"] == hub.read_card(home.hub / "backbone")["tensors_sha256"]
    assert "epoch 3/3" in (home.root / ".runs/tuned/log.txt").read_text()


def test_config_and_splits_of_a_run_repeat_it_bit_for_bit(home, tmp_path):
    old, new = home.root / "tuned", tmp_path / "new"
    argv = ["--config", str(old / "config.json"), "--output", str(new), "--split-file", str(old / "splits.json")]
    finetune.run(parse(finetune.Config, finetune.__doc__, argv))
    assert (new / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()


def test_a_finished_run_is_kept_and_other_settings_are_refused_by_name(home):
    before = (home.root / "tuned/metrics.json").stat().st_mtime_ns
    assert finetune.run(home.runs)["task"] == TASK
    for changes, words in [
        (dict(epochs=9), "--epochs 3, now 9"), (dict(lr=0.01), "--lr 0.001, now 0.01"), (dict(train="head"), "--train"),
        (dict(init="backbone"), "init '"), (dict(few_shot=10), "rows of train 28, now 10"), (dict(seed=1), "--seed 0, now 1"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            finetune.run(replace(home.runs, **changes))
    assert (home.root / "tuned/metrics.json").stat().st_mtime_ns == before


def test_overwrite_replaces_at_the_end_and_not_before(home, tmp_path):
    cfg = replace(home.runs, output=str(tmp_path / "run"), epochs=1)
    finetune.run(cfg)
    old = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(MissingError):
        finetune.run(replace(cfg, overwrite=True, split_file=str(tmp_path / "missing.json")))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == old
    finetune.run(replace(cfg, overwrite=True, epochs=2))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["epochs"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run", ".runs"}


def test_a_damaged_result_is_not_passed_off_as_finished(home, tmp_path):
    cfg = replace(home.runs, output=str(tmp_path / "run"), epochs=1)
    finetune.run(cfg)
    for file in ("model.safetensors", "predictions_test.csv"):
        content = (tmp_path / "run" / file).read_bytes()
        (tmp_path / "run" / file).write_bytes(content[:100])
        with pytest.raises(UserError, match=f"{file}: damaged or changed"):
            finetune.run(cfg)
        (tmp_path / "run" / file).write_bytes(content)
    finetune.run(cfg)


def test_a_finished_run_says_its_result_again(home, capsys):
    finetune.run(home.runs)
    assert "test MAE" in capsys.readouterr().out


def test_few_shot_leaves_validation_and_test_alone(home, tmp_path):
    finetune.run(replace(home.runs, output=str(tmp_path / "run"), few_shot=7, epochs=1))
    few, full = (json.loads((p / "splits.json").read_text()) for p in (tmp_path / "run", home.root / "tuned"))
    assert len(few["train"]) == 7 and set(few["train"]) < set(full["train"])
    assert few["val"] == full["val"] and few["test"] == full["test"]


@pytest.mark.parametrize(
    "init, train, free",
    [
        ("full", "all", lambda k: True),
        ("full", "head", lambda k: k.startswith("head.")),
        ("full", "new-head", lambda k: k.startswith("head.")),
        ("full", "interactions", lambda k: "int_blocks" in k or k.startswith("head.")),
        ("adapter", "all", lambda k: k.startswith(("head.", "adapters."))),
        ("adapter", "new-head", lambda k: k.startswith("head.")),
    ],
)
def test_what_trains_is_what_the_flag_says(home, init, train, free):
    """--train interactions frees the interaction blocks and nothing else but the head (Devi et al. 2024)."""
    cfg = replace(home.runs, init=init, train=train)
    start = finetune.find_start(cfg, "any")
    origin = finetune.load_start(cfg, start)
    model = PropertyModel(origin.backbone, "mean", origin.adapters)
    finetune.choose_trained(model, train)
    found = {k for k, p in model.named_parameters() if p.requires_grad}
    assert found == {k for k, _ in model.named_parameters() if free(k)} and start.kind == init


def test_freezing_the_backbone_leaves_its_tensors_and_continues_the_head(home, tmp_path):
    finetune.run(replace(home.runs, train="head", output=str(tmp_path / "frozen"), epochs=1, lr=1e-9))
    tuned, module = load_file(tmp_path / "frozen/model.safetensors"), load_file(home.hub / "full/module.safetensors")
    assert all(torch.equal(tuned[f"backbone.{k}"], v) for k, v in module.items())
    head = load_file(home.hub / "full" / "head.safetensors")
    assert all(torch.allclose(tuned[f"head.{k}"], v, atol=1e-6) for k, v in head.items())


@pytest.mark.parametrize("changes", [dict(init="backbone", kind="adapter"), dict(init="scratch"),
                                     dict(init="scratch", backbone="cgcnn"), dict(init="backbone")])  # fmt: skip
def test_every_start_gives_a_model(home, tmp_path, changes):
    metrics = finetune.run(replace(home.runs, output=str(tmp_path / "run"), epochs=1, **changes))
    assert math.isfinite(metrics["test_mae"])
    [(model, card)] = predict.load_models(tmp_path / "run")
    crystals, _, splits = prepare(home.modules, home.arch)
    seen = {int(z) for i in splits["train"] for z in crystals.Z[i]}
    start = hub.read_card(home.hub / "backbone")["elements"] if changes["init"] == "backbone" else []
    assert set(card["elements"]) == seen | set(start)
    assert card["architecture"]["backbone"] == changes.get("backbone", "gemnet_oc")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(init="composed"), "python compose.py --task"),
        (dict(init="no_such"), "--init no_such: no module in"),
        (dict(init="scratch", kind="adapter"), "nothing is pre-trained"),
        (dict(init="full", kind="adapter"), "full is of the kind full; compose with --kind adapter"),
        (dict(init="backbone", train="head"), "no head to continue"),
        (dict(init="adapter", train="interactions"), "adapter modules never train them"),
        (dict(init="full", backbone="cgcnn"), "for --init scratch"),
        (dict(output="runs/backbone"), "theta_0's"),
        (dict(task="../../escaped"), "no name for a folder"),
        (dict(task="", data=""), "--task is missing"),
        (dict(output="HUB/full"), "is inside a hub or a module"),
        (dict(output="mine"), "exists and is no module"),
        (dict(split_seed=1, few_shot=99), "--few-shot 99"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused_before_the_first_epoch(home, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "fit", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    if "output" in changes:
        changes = {"output": changes["output"].replace("HUB", str(home.hub))}
    before = sorted(p.name for p in home.hub.rglob("*"))
    with pytest.raises(UserError, match=words):
        finetune.run(replace(home.runs, **changes))
    assert sorted(p.name for p in home.hub.rglob("*")) == before
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_one_test_row_and_equal_test_labels_have_errors_and_no_r2(home, tmp_path):
    folder = tmp_path / "data"
    crystals, _, _ = prepare(home.modules, preset("tiny"))
    write_structures(folder, crystals, range(20))
    parts = ["train"] * 14 + ["val"] * 3 + ["test"] * 3
    lines = [f"{crystals.ids[i]},{crystals.ids[i]}.json,{crystals.y[min(i, 17)]},{parts[i]}" for i in range(20)]
    for rows in (lines, lines[:18]):  # three equal labels; one row
        (folder / "targets.csv").write_text("id,file,target,split\n" + "\n".join(rows) + "\n")
        cfg = replace(home.runs, task="", data=str(folder), output=str(tmp_path / f"run{len(rows)}"), limit=None, epochs=1)
        test = finetune.run(cfg)["test"]
        assert test["r2"] is None and math.isfinite(test["mae"]) and test["rows"] == len(rows) - 17


def test_a_seed_does_not_pretend_to_split_what_a_column_splits(home, tmp_path):
    crystals, _, _ = prepare(home.modules, preset("tiny"))
    write_structures(tmp_path / "data", crystals, range(9))
    parts = ["train"] * 5 + ["val"] * 2 + ["test"] * 2
    lines = [f"{crystals.ids[i]},{crystals.ids[i]}.json,{i},{parts[i]}" for i in range(9)]
    (tmp_path / "data/targets.csv").write_text("\n".join(["id,file,target,split", *lines]) + "\n")
    cfg = replace(home.runs, task="", data=str(tmp_path / "data"), output=str(tmp_path / "run"), limit=None, epochs=1)
    with pytest.raises(UserError, match="--split-seed 3: the data have a column split"):
        finetune.run(replace(cfg, split_seed=3))
    finetune.run(cfg)
    renamed = [line.replace(crystals.ids[8], "another", 1) for line in lines]
    (tmp_path / "data/targets.csv").write_text("\n".join(["id,file,target,split", *renamed]) + "\n")
    with pytest.raises(UserError, match="--ids"):  # predictions_test.csv names the rows
        finetune.run(cfg)


def test_errors_that_are_not_finite_are_null_and_the_plot_is_drawn(tmp_path):
    from tasks import Task

    task, y = Task("t", unit="eV", transform="log"), np.array([0.0, 1.0, 2.0])
    wild = np.array([0.1, 1.1, 5000.0])  # its exponential is infinite
    with np.errstate(over="ignore"):
        found = evaluate.scores(np.exp(y), np.exp(wild), 1.0, "eV")
        assert found["mae"] is None and found["mad"] > 0 and json.loads(json.dumps(found, allow_nan=False)) == found
        metrics = {"test": evaluate.scores(y, wild, 1.0, "log(eV)")}
        assert evaluate.draw_parity(task, (None, y, wild), metrics)[:4] == b"\x89PNG"


def test_own_data_rewritten_in_place_is_read_again(home, tmp_path):
    """The same names, sizes and times, other labels: nothing old is used, and the finished run says what differs."""
    folder = tmp_path / "data"
    crystals, _, _ = prepare(home.modules, preset("tiny"))
    write_structures(folder, crystals, range(30))
    targets = folder / "targets.csv"

    def write(sign):
        targets.write_text("id,file,target\n" + "".join(f"{i},{i}.json,{sign}{1 + k % 7}\n" for k, i in enumerate(crystals.ids[:30])))
        os.utime(targets, ns=(10**18, 10**18))

    write("+")
    cfg = replace(home.runs, task="", data=str(folder), output=str(tmp_path / "run"), limit=None, epochs=1)
    first = finetune.run(cfg)
    write("-")
    with pytest.raises(UserError, match="content of test"):
        finetune.run(cfg)
    second = finetune.run(replace(cfg, output=str(tmp_path / "again")))
    read = lambda name: [float(r["target"]) for r in csv.DictReader(open(tmp_path / name / "predictions_test.csv"))]  # noqa: E731
    assert read("again") == [-y for y in read("run")] and first["test"]["mad"] == pytest.approx(second["test"]["mad"])


# ---------------------------------------------------------------- prediction


def write_structures(folder, crystals, index):
    from pymatgen.core import Structure

    folder.mkdir()
    for i in index:
        made = Structure(crystals.cell[i], crystals.Z[i], crystals.pos[i], coords_are_cartesian=True)
        (folder / f"{crystals.ids[i]}.json").write_text(made.to_json())


def table(folder):
    return {row[0]: row[1:] for row in csv.reader(open(folder / "predictions.csv"))}


def test_a_log_label_is_scored_in_both_units_and_predicted_in_the_physical_one(home, tmp_path):
    cfg = replace(home.runs, transform="log", unit="eV", output=str(tmp_path / "run"))
    metrics = finetune.run(cfg)
    rows = list(csv.DictReader(open(tmp_path / "run" / "predictions_test.csv")))
    y, p = (np.array([float(r[k]) for r in rows]) for k in ("target", "prediction"))
    assert metrics["unit"] == "log(eV)" and metrics["test_mae"] == pytest.approx(np.abs(np.log(y / p)).mean())
    assert metrics["test_physical"]["unit"] == "eV"
    assert metrics["test_physical"]["mae"] == pytest.approx(np.abs(y - p).mean())

    crystals, _, splits = prepare(replace(cfg, split_seed=0, few_shot=0), preset("tiny"))
    write_structures(tmp_path / "new", crystals, splits["test"])
    got = predict.run(predict.Config(inputs=[str(tmp_path / "new")], model=(str(tmp_path / "run"),), output=str(tmp_path / "p")))
    found = table(tmp_path / "p")
    assert got["exit_code"] == 0 and found.pop("id") == ["prediction (eV)", "neighbour_distance", "unseen_elements"]
    expected = {r["id"]: float(r["prediction"]) for r in rows}
    assert {k: float(v[0]) for k, v in found.items()} == pytest.approx(expected, rel=1e-4)


def test_prediction_reports_what_it_could_not_do_and_what_it_should_not_be_trusted_on(home, tmp_path, capsys):
    crystals, _, splits = prepare(home.modules, preset("tiny"))
    write_structures(tmp_path / "new", crystals, splits["train"][:1])
    from pymatgen.core import Lattice, Structure

    Structure(Lattice.cubic(3.9), ["Pu", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]]).to(filename=str(tmp_path / "puo.cif"))
    (tmp_path / "new" / "bad.cif").write_text("nothing")
    inputs = [str(tmp_path / "new"), str(tmp_path / "puo.cif")]
    for name in ("full", "adapter"):  # a module of the hub predicts its own property
        out = tmp_path / name
        result = predict.run(predict.Config(inputs=inputs, model=(str(home.hub / name),), output=str(out)))
        assert (result["rows"], result["skipped"], result["exit_code"]) == (2, 1, 1)
        assert "bad" in (out / "skipped.csv").read_text() and table(out)["puo"][-1] == "Pu"
        err = capsys.readouterr().err
        assert f"no intervals and no neighbour distances: {home.hub / name} holds no neighbours.npz" in err
        assert "warning: 1 of 2 crystals have elements the model never saw: Pu (1); do not trust puo" in err


def test_several_models_give_mean_and_spread(home, tmp_path):
    crystals, _, splits = prepare(home.modules, preset("tiny"))
    write_structures(tmp_path / "new", crystals, range(3))
    single = []
    for models in (["full"], ["adapter"], ["full", "adapter"]):
        folders = tuple(str(home.hub / m) for m in models)
        predict.run(predict.Config(inputs=[str(tmp_path / "new")], model=folders, output=str(tmp_path / "p")))
        found = table(tmp_path / "p")
        head = found.pop("id")
        single.append(np.array([[float(x) for x in v[:-1]] for v in found.values()]))
    assert [h.split()[0] for h in head] == ["prediction", "spread", "unseen_elements"]
    both = np.stack([single[0][:, 0], single[1][:, 0]])
    np.testing.assert_allclose(single[2], np.stack([both.mean(0), both.std(0)], 1), rtol=1e-6)
    tm.run(replace(home.modules, task="demo_gap", name="gap", epochs=1))
    with pytest.raises(UserError, match="an ensemble is of one property"):
        predict.load_models([home.hub / "full", home.hub / "gap"])
    shutil.rmtree(home.hub / "gap")


def test_ids_tell_inputs_apart(home, tmp_path):
    crystals, _, _ = prepare(home.modules, preset("tiny"))
    for folder in "ab":
        write_structures(tmp_path / folder, crystals, range(2))
    one = next((tmp_path / "a").iterdir())
    inputs = [str(tmp_path / "a"), str(tmp_path / "b"), str(one)]
    predict.run(predict.Config(inputs=inputs, model=(str(home.hub / "full"),), output=str(tmp_path / "p")))
    found = table(tmp_path / "p")
    assert len(found) == 1 + 5 and {f"{tmp_path}/{f}/{i}" for f in "ab" for i in crystals.ids[:2]} | {str(one)} < set(found)


def test_frames_without_forces_are_predicted(home, tmp_path):
    lines = ["2", 'Properties=species:S:1:pos:R:3:forces:R:3 energy=-1 pbc="F F F"', "H 0 0 0 0 0 0", "H 0.8 0 0 0 0 0"]
    lines += ["2", 'Properties=species:S:1:pos:R:3 pbc="F F F"', "H 0 0 0", "O 1 0 0"]
    (tmp_path / "frames.extxyz").write_text("\n".join(lines) + "\n")
    cfg = predict.Config(inputs=[str(tmp_path / "frames.extxyz")], model=(str(home.hub / "full"),), output=str(tmp_path / "p"))
    assert predict.run(cfg)["rows"] == 2


@pytest.mark.parametrize("inputs, model, words", [
    ([], "full", "no input"), (["nowhere"], "full", "nowhere: no such"), ([], "", "--model is missing"),
    ([str(ROOT)], "backbone", "has no head"), ([str(ROOT)], "nothing", "no model there")])  # fmt: skip
def test_wrong_input_of_predict_is_refused(home, tmp_path, inputs, model, words):
    cfg = predict.Config(inputs=inputs, model=(str(home.hub / model),) if model else (), output=str(tmp_path / "p"))
    with pytest.raises(UserError, match=words):
        predict.run(cfg)
    assert list(tmp_path.iterdir()) == []


def test_predictions_replace_only_predictions(home, tmp_path):
    crystals, _, _ = prepare(home.modules, preset("tiny"))
    write_structures(tmp_path / "new", crystals, range(2))
    cfg = predict.Config(inputs=[str(tmp_path / "new")], model=(str(home.hub / "full"),), output=str(tmp_path / "p"))
    for _ in range(2):
        assert predict.run(cfg)["rows"] == 2
    (tmp_path / "file").write_text("mine")
    for output in ("new", "file", "x.csv"):
        with pytest.raises(UserError, match="--output"):
            predict.run(replace(cfg, output=str(tmp_path / output)))
    for folder in (home.hub / "full", home.root / "tuned"):
        with pytest.raises(UserError, match="which predict.py has not written"):
            predict.run(replace(cfg, output=str(folder)))
    assert (tmp_path / "file").read_text() == "mine" and len(list((tmp_path / "new").iterdir())) == 2
    with pytest.raises(UserError, match="--output"):  # a path is what it means, also where a part of it is not there
        predict.run(replace(cfg, output=str(tmp_path / "nowhere/../new")))
    (tmp_path / "p/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt"):
        predict.run(cfg)
    assert (tmp_path / "p/notes.txt").read_text() == "mine" and len(list((tmp_path / "new").iterdir())) == 2


def test_all_of_a_folder_is_predicted_whatever_its_table_names(home, tmp_path):
    crystals, _, _ = prepare(home.modules, preset("tiny"))
    write_structures(tmp_path / "new", crystals, range(4))
    (tmp_path / "new/targets.csv").write_text(f"id,file,target\nfirst,{crystals.ids[0]}.json,1.5\n")
    cfg = predict.Config(inputs=[str(tmp_path / "new")], model=(str(home.hub / "full"),), output=str(tmp_path / "p"))
    assert predict.run(cfg)["rows"] == 4 and set(table(tmp_path / "p")) == {"id", "first", *crystals.ids[1:4]}


def test_structures_that_cannot_be_used_are_nan_and_none_is_none(home):
    assert predict.predict(home.hub / "full", []).shape == (0,)
    disordered = {"lattice": {"matrix": np.eye(3).tolist()}, "sites": [{"species": [{"element": "Na", "occu": 0.5}],
                                                                        "abc": [0, 0, 0]}]}  # fmt: skip
    assert np.isnan(predict.predict([home.hub / "full"], [disordered, disordered])).tolist() == [True, True]
