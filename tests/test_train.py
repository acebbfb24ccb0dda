"""The loop trains, resumes and repeats itself; wrong input is refused in one line; runs are what their files say."""

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

import finetune
import hub
import model as moma
from files import write_atomic
from stage import claim, main, parse
import predict
import train_module as tm

ROOT = Path(tm.__file__).resolve().parent
TASK = "demo_refractive_index"


@pytest.fixture(autouse=True)
def save_every_epoch(monkeypatch):
    monkeypatch.setattr(tm, "SAVE_SECONDS", 0)


# ---------------------------------------------------------------- the loop, on a line


class Line(nn.Module):
    """A stand-in: y = head(x), with a frozen part that has batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, batch):
        return self.head(self.frozen(batch["x"])).squeeze(-1)


def line_batches(y=None, stop_at=None):
    x = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
    y = 5 * x[:, 0] - 3 * x[:, 1] + 40 if y is None else y

    def batches(index):
        return [{"x": x[i], "y": y[i], "index": i} for i in index.split(8)]

    def train(epoch):
        if epoch == stop_at:
            raise KeyboardInterrupt
        return batches(torch.randperm(32, generator=torch.Generator().manual_seed(epoch)))

    return {"train": train, "val": lambda: batches(torch.arange(32, 48)), "ids": [f"row{i}" for i in range(48)]}


def line_settings(**changes):
    cfg = dict(lr=0.03, weight_decay=0.1, epochs=20, patience=0, ema=0.99, clip=10.0, resume=False, quiet=True, seed=0)
    return SimpleNamespace(**cfg | changes)


def fit_line(folder, batches=None, **changes):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = Line()
    batches = batches or line_batches()
    y = torch.cat([b["y"] for b in line_batches()["train"](0)]).numpy()
    result = tm.fit(model, batches, line_settings(**changes), folder, *tm.normalizer(y))
    return model, result


def test_rate_rises_over_5_epochs_falls_to_a_tenth_at_32_and_shrinks_with_fewer_epochs():
    assert tm.lr_factor(0, 80) == pytest.approx(0.1)
    assert tm.lr_factor(2.5, 80) == pytest.approx(0.55)
    assert tm.lr_factor(5, 80) == pytest.approx(1.0)
    assert tm.lr_factor(18.5, 80) == pytest.approx(0.55)  # half way between 5 and 32
    assert [tm.lr_factor(e, 80) for e in (32, 50, 79)] == pytest.approx([0.1] * 3)
    for e in (0, 3, 7.5, 31.9):
        assert tm.lr_factor(e / 4, 8) == pytest.approx(tm.lr_factor(e, 80))


def test_rate_falls_on_a_plateau_only_after_the_cosine():
    state = {"epoch": 32, "plateau": 1.0, "plateau_best": math.inf, "plateau_bad": 0}
    for epoch in range(20, 33):
        tm.reduce_on_plateau(state | {"epoch": epoch}, 1.0, 80)
    factors = []
    for state["epoch"] in range(33, 47):
        tm.reduce_on_plateau(state, 1.0, 80)
        factors.append(state["plateau"])
    assert factors == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 2)


def test_normalizer_is_mean_and_standard_deviation_and_refuses_equal_labels():
    assert tm.normalizer(np.array([1.0, 3.0])) == (2.0, 1.0)
    with pytest.raises(ValueError, match="all 2 training labels are 7"):
        tm.normalizer(np.array([7.0, 7.0]))


def test_fit_learns_and_leaves_the_best_averaged_weights_in_the_model(tmp_path):
    model, result = fit_line(tmp_path, epochs=40)
    batches = line_batches()
    y = torch.cat([b["y"] for b in batches["train"](0)]).numpy()
    assert tm.mean_error(model, batches["val"](), *tm.normalizer(y), line_settings()) == result["val_mae"]
    rows = list(csv.DictReader(result["history"].splitlines()))
    assert len(rows) == 40 and min(float(r["val_mae"]) for r in rows) == result["val_mae"] < 1.0  # y has a MAD of 4.7
    assert float(rows[result["best_epoch"] - 1]["val_mae"]) == result["val_mae"]
    assert (tmp_path / "history.csv").read_text() == result["history"]


def test_frozen_parts_keep_their_values_and_their_evaluation_mode(tmp_path):
    model, _ = fit_line(tmp_path, epochs=2)
    assert model.frozen[0].running_mean.tolist() == [0.0, 0.0] and model.frozen[0].weight.tolist() == [1.0, 1.0]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    whole, result = fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "cut", line_batches(stop_at=13))
    again, resumed = fit_line(tmp_path / "cut", resume=True)
    assert save(again.state_dict()) == save(whole.state_dict())
    without_seconds = lambda text: [r.rsplit(",", 1)[0] for r in text.splitlines()]
    assert without_seconds(resumed["history"]) == without_seconds(result["history"])


def test_training_stops_when_patience_is_spent_and_resuming_does_not_go_on(tmp_path):
    batches = line_batches(y=torch.randn(48, generator=torch.Generator().manual_seed(3)) * 5 + 40)  # nothing to learn
    _, result = fit_line(tmp_path, batches, epochs=200, patience=4)
    assert result["epochs"] == result["best_epoch"] + 4 < 200
    assert fit_line(tmp_path, batches, epochs=200, patience=4, resume=True)[1]["epochs"] == result["epochs"]


def test_a_loss_that_is_not_finite_stops_with_the_ids_of_the_batch(tmp_path):
    y = torch.full((48,), 40.0)
    y[17] = math.inf
    with pytest.raises(ValueError, match=r"epoch 1: the loss is not finite .*row17\b"):
        fit_line(tmp_path, line_batches(y=y))


# ---------------------------------------------------------------- command line and run folders


@dataclass
class Settings:
    task: str = "a"  # name, 50% of it
    kind: Literal["full", "adapter"] = "full"
    batch_size: int = 4  # crystals
    lr: float = 0.5
    quiet: bool = False
    config: str = ""


DOC = "Do a thing.\n\n    python thing.py --task a\n\nMore words."


def test_flags_come_from_the_fields_with_hyphens_or_underscores():
    cfg = parse(Settings, DOC, ["--task", "b_c", "--batch_size=8", "--quiet", "--lr", "1e-3"])
    assert cfg == Settings("b_c", "full", 8, 1e-3, True)
    assert parse(Settings, DOC, ["--batch-size", "9", "--no-quiet"]).batch_size == 9


def test_help_fits_a_screen_and_ends_with_the_example(capsys):
    for Config, doc in ((Settings, DOC), (tm.Config, tm.__doc__), (finetune.Config, finetune.__doc__)):
        with pytest.raises(SystemExit):
            parse(Config, doc, ["--help"])
        lines = capsys.readouterr().out.rstrip().splitlines()
        assert len(lines) <= 55 and max(map(len, lines)) <= 120
        assert lines[-1].startswith("    python")
    with pytest.raises(SystemExit):
        parse(Settings, DOC, ["--help"])
    assert "[4] crystals" in capsys.readouterr().out


def test_config_file_gives_defaults_and_the_command_line_wins(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"task": "x", "lr": 2, "batch_size": 16}))
    cfg = parse(Settings, DOC, ["--config", str(path), "--task", "y"])
    assert (cfg.task, cfg.lr, cfg.batch_size) == ("y", 2, 16)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batchsize": 1}, "unknown setting 'batchsize'"),
        ({"batch_size": "8"}, "batch_size is '8', expected int"),
        ({"kind": "both"}, "kind is 'both', expected full or adapter"),
        ({"quiet": 1}, "quiet is 1, expected bool"),
        ([1], "not a JSON object"),
    ],
)
def test_config_file_with_a_wrong_setting_is_refused(tmp_path, settings, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words):
        parse(Settings, DOC, ["--config", str(path)])


def exit_of(run, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(run, Settings, DOC, argv)
    return stop.value.code or 0, capsys.readouterr().err.strip()


def test_exit_codes_and_one_line_errors(capsys, tmp_path):
    assert exit_of(lambda cfg: {}, [], capsys) == (0, "")
    assert exit_of(lambda cfg: {"exit_code": 1}, [], capsys)[0] == 1
    for argv in (["--nope"], ["--lr", "x"], ["--kind", "both"], ["extra"], ["--config", str(tmp_path / "none.json")]):
        code, err = exit_of(lambda cfg: {}, argv, capsys)
        assert code == 2 and len(err.splitlines()) == 1, (argv, err)
    code, err = exit_of(lambda cfg: tm.normalizer(np.ones(3)), [], capsys)
    assert code == 2 and "nothing to learn" in err and len(err.splitlines()) == 1

    def interrupted(cfg):
        raise KeyboardInterrupt

    code, err = exit_of(interrupted, [], capsys)
    assert code == 130 and "--resume" in err
    with pytest.raises(ValueError):  # raised inside a library: a bug keeps its traceback
        main(lambda cfg: np.zeros(3).reshape(2, 2), Settings, DOC, [])


def test_a_second_run_into_a_folder_is_refused(tmp_path):
    claim(tmp_path, Settings())
    other = f"import train_module as tm; from test_train import Settings; claim({str(tmp_path)!r}, Settings())"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    result = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, env=env)
    assert result.returncode and "another run is writing here" in result.stderr


def test_two_processes_may_write_one_file_and_leave_nothing_else(tmp_path):
    """Two benchmarks side by side share the tables of their folder; claiming a folder clears what a kill left."""
    other = f"import train_module as tm; write_text({str(tmp_path / 'table.md')!r}, 'theirs')"

    def write(f):
        f.write(b"mine")
        subprocess.run([sys.executable, "-c", other], cwd=ROOT, check=True)
        assert (tmp_path / "table.md").read_text() == "theirs"

    write_atomic(tmp_path / "table.md", write)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"table.md": "mine"}
    (tmp_path / "last.pt.1.tmp").write_text("half")
    claim(tmp_path, Settings())
    assert not list(tmp_path.glob("*.tmp"))


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    claim(tmp_path, Settings())
    (tmp_path / "last.pt").touch()
    with pytest.raises(ValueError, match="--resume"):
        claim(tmp_path, Settings())
    with pytest.raises(ValueError, match="--lr was 0.5, now 0.1"):
        claim(tmp_path, Settings(lr=0.1), resume=True)
    claim(tmp_path, Settings(quiet=True), resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["quiet"] is True


# ---------------------------------------------------------------- modules


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub with a random theta_0, and its settings: 40 crystals, 3 epochs."""
    root = tmp_path_factory.mktemp("home")
    arch = moma.preset("tiny")
    torch.manual_seed(0)
    backbone = moma.build_backbone(arch)
    card = {"kind": "backbone", "architecture": arch, "graph": arch["graph"], "elements": [8]}
    hub.save(root / "hub" / "backbone", backbone.state_dict(), card, adapters_init=moma.new_adapters(arch).state_dict())
    shared = dict(data="demo", hub=str(root / "hub"), cache=str(root / "cache"), limit=40, epochs=3, batch_size=8)
    shared["quiet"] = True
    modules = tm.Config(task=TASK, **shared)
    for kind in ("full", "adapter"):
        tm.run(replace(modules, kind=kind, name=kind, output=str(root / f"run_{kind}")))
    runs = finetune.Config(task=TASK, init="full", **shared)
    finetune.run(replace(runs, output=str(root / "tuned")))
    return SimpleNamespace(root=root, hub=root / "hub", modules=modules, runs=runs)


def test_modules_are_in_the_hub_with_their_cards(home):
    assert hub.verify(home.hub) == []
    cards = hub.list_modules(home.hub)
    assert {name: card["kind"] for name, card in cards.items()} == {"full": "full", "adapter": "adapter"}
    theta = hub.read_card(home.hub / "backbone")["tensors_sha256"]
    for card in cards.values():
        assert card["backbone_sha256"] == theta and card["rows_used"] == 40
        assert card["split"] == {"train": 28, "val": 6, "test": 6}
        assert card["training"]["lr"] == tm.LR["tiny", card["kind"]] and card["training"]["epochs_run"] == 3
        assert str(home.root) not in json.dumps(card)


def test_the_card_holds_errors_that_the_module_and_its_head_repeat(home):
    crystals, dataset, splits = tm.prepare(home.modules, moma.preset("tiny"))
    train = crystals.y[splits["train"]]
    for name in ("full", "adapter"):  # adapters trained on stored features; here the backbone runs on the graphs
        model, card = predict.load_model(home.hub / name)
        assert (card["normalizer_mean"], card["normalizer_std"]) == (train.mean(), train.std())
        assert card["mad"] == pytest.approx(np.abs(crystals.y[splits["test"]] - train.mean()).mean())
        batches = tm.loader(dataset, splits["test"], home.modules)
        index, y, prediction = tm.predict_batches(model, batches, card["normalizer_mean"], card["normalizer_std"])
        assert index.tolist() == splits["test"].tolist() and y.tolist() == crystals.y[index].tolist()
        assert np.abs(prediction - y).mean() == pytest.approx(card["test_mae"], rel=1e-5)


def test_checkpointing_trains_the_same_module_and_is_refused_where_there_are_no_blocks(home):
    tm.run(replace(home.modules, name="checkpointed", output=str(home.root / "checkpointed"), checkpointing=True))
    for file in ("module.safetensors", "head.safetensors"):
        assert (home.hub / "checkpointed" / file).read_bytes() == (home.hub / "full" / file).read_bytes()
    shutil.rmtree(home.hub / "checkpointed")
    with pytest.raises(ValueError, match="--checkpointing: cgcnn has no blocks"):
        tm.set_checkpointing(moma.build_backbone(moma.preset("tiny", backbone="cgcnn")), SimpleNamespace(checkpointing=True))


def test_same_seed_same_bytes_and_a_cut_adapter_run_resumes_to_them(home, monkeypatch):
    cfg = replace(home.modules, kind="adapter", name="again", output=str(home.root / "again"))
    step, steps = tm.train_step, []

    def stop(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6:  # in the second epoch
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(tm, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        tm.run(replace(cfg))
    assert not (home.hub / "again").exists()
    tm.run(replace(cfg, resume=True))
    for file in ("module.safetensors", "head.safetensors"):
        assert (home.hub / "again" / file).read_bytes() == (home.hub / "adapter" / file).read_bytes()
    shutil.rmtree(home.hub / "again")


def test_large_features_go_to_disk_and_are_the_same(home, tmp_path):
    backbone, card = tm.load_backbone(home.hub)
    _, dataset, _ = tm.prepare(home.modules, card["architecture"])
    in_memory = tm.FeatureDataset(backbone, dataset, home.modules, tmp_path)
    on_disk = tm.FeatureDataset(backbone, dataset, home.modules, tmp_path, in_memory=0)
    assert isinstance(on_disk.features, np.memmap) and np.array_equal(on_disk.features, in_memory.features)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_exists_is_left_alone(home, capsys):
    before = (home.hub / "full" / "module.json").stat().st_mtime_ns
    tm.run(replace(home.modules, name="full", quiet=False))
    assert "nothing to do" in capsys.readouterr().err
    assert (home.hub / "full" / "module.json").stat().st_mtime_ns == before


def test_what_a_module_cannot_start_from_is_refused(home, tmp_path):
    with pytest.raises(FileNotFoundError, match="make backbone"):
        tm.run(replace(home.modules, hub=str(tmp_path)))
    with pytest.raises(ValueError, match="--preset small: the backbone of .* is tiny"):
        tm.run(replace(home.modules, name="other", preset="small"))
    with pytest.raises(ValueError, match="module name"):
        tm.run(replace(home.modules, name="../out"))
    with pytest.raises(ValueError, match="--task"):
        tm.run(replace(home.modules, task="", name="other"))


def test_two_processes_reach_the_loss_of_one(home, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    c, out = home.modules, {}
    flags = ["--data", "demo", "--task", TASK, "--hub", c.hub, "--cache", c.cache, "--limit", "40", "--epochs", "2"]
    for n in (1, 2):
        name, folder = f"processes{n}", tmp_path / str(n)
        own = ["--batch-size", "9", "--name", name, "--output", str(folder), "--quiet"]
        command = [sys.executable, str(ROOT / "train_module.py"), *flags, *own]
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
        env["OMP_NUM_THREADS"] = "1"
        processes = [subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(n)]
        assert [p.wait(timeout=300) for p in processes] == [0] * n
        out[n] = np.loadtxt(folder / "history.csv", delimiter=",", skiprows=1)[:, :4]
        shutil.rmtree(home.hub / name)
    np.testing.assert_allclose(out[2], out[1], rtol=2e-4)


# ---------------------------------------------------------------- fine-tuning and prediction


def test_a_run_folder_holds_what_its_metrics_say(home):
    folder = home.root / "tuned"
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader(open(folder / "predictions_test.csv")))
    y, p = (np.array([float(r[k]) for r in rows]) for k in ("target", "prediction"))
    test = metrics["test"]
    assert test["mae"] == pytest.approx(np.abs(y - p).mean()) and test["rows"] == len(rows) == 6
    assert test["r2"] == pytest.approx(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert test["mad_mae"] == pytest.approx(test["mad"] / test["mae"])
    names = {p.name for p in folder.iterdir()}
    wanted = "config.json model.safetensors module.json splits.json history.csv metrics.json predictions_val.csv"
    assert names >= {*wanted.split(), "predictions_test.csv", "skipped.csv", "parity.png"} and "last.pt" not in names
    card = hub.read_card(folder)
    assert card["parents"][0]["tensors_sha256"] == hub.read_card(home.hub / "full")["tensors_sha256"]
    assert card["backbone_sha256"] == hub.read_card(home.hub / "backbone")["tensors_sha256"]


def test_config_and_splits_of_a_run_repeat_it_bit_for_bit(home, tmp_path):
    old = home.root / "tuned"
    new = tmp_path / "new"
    argv = ["--config", str(old / "config.json"), "--output", str(new), "--split-file", str(old / "splits.json")]
    finetune.run(parse(finetune.Config, finetune.__doc__, argv))
    assert (new / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()


def test_a_finished_run_is_kept(home):
    with pytest.raises(ValueError, match="finished run"):
        finetune.run(replace(home.runs, output=str(home.root / "tuned")))
    assert finetune.run(replace(home.runs, output=str(home.root / "tuned"), resume=True))["task"] == TASK


@pytest.mark.parametrize(
    "init, freeze, free",
    [
        ("full", "none", lambda k: True),
        ("full", "head", lambda k: k.startswith("head.")),
        ("full", "new-head", lambda k: k.startswith("head.")),
        ("full", "interactions", lambda k: "int_blocks" not in k),
        ("adapter", "none", lambda k: k.startswith(("head.", "adapters."))),
        ("adapter", "new-head", lambda k: k.startswith("head.")),
    ],
)
def test_freezing_trains_what_it_says(home, init, freeze, free):
    backbone, adapters, card, head = finetune.start(cfg := replace(home.runs, init=init, freeze=freeze))
    finetune.freeze(backbone, adapters, freeze)
    model = moma.PropertyModel(backbone, "mean", adapters)
    fixed = ("scale_factor",)  # buffers of a sort: never trained
    found = {k for k, p in model.named_parameters() if p.requires_grad}
    assert found == {k for k, p in model.named_parameters() if free(k) and not k.endswith(fixed)}
    assert (head is not None) == (freeze == "head") and cfg.kind == init


def test_freezing_the_backbone_leaves_its_tensors_and_continues_the_head(home):
    out = home.root / "frozen"
    finetune.run(replace(home.runs, freeze="head", output=str(out), epochs=1, lr=1e-9))
    tuned, module = load_file(out / "model.safetensors"), load_file(home.hub / "full" / "module.safetensors")
    assert all(torch.equal(tuned[f"backbone.{k}"], v) for k, v in module.items())
    head = load_file(home.hub / "full" / "head.safetensors")
    assert all(torch.allclose(tuned[f"head.{k}"], v, atol=1e-6) for k, v in head.items())


@pytest.mark.parametrize("changes", [dict(init="backbone", kind="adapter"), dict(init="scratch"),
                                     dict(init="scratch", backbone="cgcnn"), dict(init="backbone")])  # fmt: skip
def test_every_start_gives_a_model(home, tmp_path, changes):
    metrics = finetune.run(replace(home.runs, output=str(tmp_path / "run"), epochs=1, **changes))
    assert math.isfinite(metrics["test_mae"])
    model, card = predict.load_model(tmp_path / "run")
    assert card["architecture"]["backbone"] == changes.get("backbone", "gemnet_oc")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(init="composed"), "python compose.py --task"),
        (dict(init="no_such"), "--init no_such: no module in"),
        (dict(init="scratch", kind="adapter"), "nothing is pre-trained"),
        (dict(init="backbone", freeze="head"), "no head to continue"),
        (dict(init="adapter", freeze="interactions"), "adapter modules never train them"),
        (dict(init="full", backbone="cgcnn"), "for --init scratch"),
        (dict(output="runs/backbone"), "theta_0's"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(home, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        finetune.run(replace(home.runs, **changes))
    assert not (tmp_path / "runs").exists()


def write_structures(folder, crystals, index):
    from pymatgen.core import Structure

    folder.mkdir()
    for i in index:
        made = Structure(crystals.cell[i], crystals.Z[i], crystals.pos[i], coords_are_cartesian=True)
        (folder / f"{crystals.ids[i]}.json").write_text(made.to_json())


def table(text):
    return {row[0]: row[1] for row in csv.reader(text.splitlines())}


def test_a_log_label_is_scored_in_both_units_and_predicted_in_the_physical_one(home, tmp_path):
    cfg = replace(home.runs, transform="log", unit="eV", output=str(tmp_path / "run"))
    metrics = finetune.run(cfg)
    rows = list(csv.DictReader(open(tmp_path / "run" / "predictions_test.csv")))
    y, p = (np.array([float(r[k]) for r in rows]) for k in ("target", "prediction"))
    assert metrics["unit"] == "log(eV)" and metrics["test_mae"] == pytest.approx(np.abs(np.log(y / p)).mean())
    assert metrics["test_physical"]["unit"] == "eV"
    assert metrics["test_physical"]["mae"] == pytest.approx(np.abs(y - p).mean())

    crystals, _, splits = tm.prepare(cfg, moma.preset("tiny"))
    write_structures(tmp_path / "new", crystals, splits["test"])
    out = tmp_path / "p.csv"
    got = predict.run(predict.Config([str(tmp_path / "new")], str(tmp_path / "run"), str(out), quiet=True))
    found = table(out.read_text())
    assert got["exit_code"] == 0 and found.pop("id") == "prediction (eV)"
    expected = {r["id"]: float(r["prediction"]) for r in rows}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-4)


def test_prediction_reports_what_it_could_not_do_and_what_it_should_not_be_trusted_on(home, tmp_path, capsys):
    crystals, _, splits = tm.prepare(home.runs, moma.preset("tiny"))
    write_structures(tmp_path / "new", crystals, splits["train"][:1])
    from pymatgen.core import Lattice, Structure

    Structure(Lattice.cubic(3.9), ["Pu", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]]).to(filename=str(tmp_path / "puo.cif"))
    (tmp_path / "new" / "bad.cif").write_text("nothing")
    inputs = [str(tmp_path / "new"), str(tmp_path / "puo.cif")]
    for name in ("full", "adapter"):  # a module of the hub predicts its own property
        out = tmp_path / name / "p.csv"
        result = predict.run(predict.Config(inputs, str(home.hub / name), str(out), quiet=True))
        assert (result["rows"], result["skipped"], result["exit_code"]) == (2, 1, 1)
        assert "bad" in out.with_name("skipped.csv").read_text() and "puo" in out.read_text()
        err = capsys.readouterr().err
        assert "warning: 1 of 2 crystals have elements the model never saw: Pu (1); do not trust puo" in err


@pytest.mark.parametrize("inputs, model, words", [
    ([], "full", "no input"), (["nowhere"], "full", "nowhere: no such"), ([], "", "--model is missing"),
    ([str(ROOT)], "backbone", "has no head"), ([str(ROOT)], "nothing", "no model there")])  # fmt: skip
def test_wrong_input_of_predict_is_refused(home, tmp_path, inputs, model, words):
    cfg = predict.Config(inputs, str(home.hub / model) if model else "", str(tmp_path / "p.csv"), quiet=True)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        predict.run(cfg)
    assert list(tmp_path.iterdir()) == []
