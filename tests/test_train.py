"""The loop trains, resumes and repeats itself; modules are what their cards say; wrong input is refused before work."""

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TASK
from safetensors.torch import save
from torch import nn

import hub
import predict
import train_module as tm
from files import MissingError, UserError
from model import build_backbone, preset, training_defaults
from stage import prepare


@pytest.fixture(autouse=True)
def save_every_step(monkeypatch):
    monkeypatch.setattr(tm, "SAVE_SECONDS", -1e9)


# ---------------------------------------------------------------- the loop, on a line


class Line(nn.Module):
    """A stand-in: y = head(x), with a frozen part that has batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, batch):
        return self.head(self.frozen(batch["x"])).squeeze(-1)


X = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
Y = 5 * X[:, 0] - 3 * X[:, 1] + 40
MEAN, STD = float(Y[:32].mean()), float(Y[:32].std())


def line_settings(**changes):
    cfg = dict(lr=0.03, weight_decay=0.1, epochs=20, patience=0, ema=0.99, clip=10.0, resume=False, overwrite=False,
               quiet=True, seed=0)  # fmt: skip
    return SimpleNamespace(**cfg | changes)


def fit_line(folder, y=Y, stop_after=None, validate=None, settled=None, **changes):
    """Train a Line on 32 rows; stop_after: Ctrl-C before the step of that number. Returns the model and fit's result."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model, cfg, steps = Line(), line_settings(**changes), []

    def plan(epoch):
        return list(torch.randperm(32, generator=torch.Generator().manual_seed(epoch)).split(8))

    def load(plan):
        for i in plan:
            if len(steps) == stop_after:
                raise KeyboardInterrupt
            steps.append(1)
            yield {"x": X[i], "y": y[i], "index": i, "share": 1.0}

    def loss(model, batch):
        return (model(batch) - (batch["y"] - MEAN) / STD).abs().mean()

    @torch.no_grad()
    def error(model):
        model.eval()
        return {"val_mae": float((model({"x": X[32:]}) * STD + MEAN - y[32:]).abs().mean())}

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, amsgrad=True)
    rate, settled = partial(tm.lr_factor, epochs=cfg.epochs), min(tm.COSINE, cfg.epochs) if settled is None else settled
    names = lambda batch: [f"row{i}" for i in batch["index"].tolist()]  # noqa: E731
    how = dict(plan=plan, load=load, rate=rate, settled=settled, names=names)
    result = tm.fit(model, optimizer, loss, validate or error, cfg, folder, **how)
    return model, result


def rows_of(result):
    return list(csv.DictReader(result["history"].splitlines()))


def test_rate_rises_over_5_epochs_falls_to_a_tenth_at_32_and_shrinks_with_fewer_epochs():
    assert tm.lr_factor(0, 80) == pytest.approx(0.1)
    assert tm.lr_factor(2.5, 80) == pytest.approx(0.55)
    assert tm.lr_factor(5, 80) == pytest.approx(1.0)
    assert tm.lr_factor(18.5, 80) == pytest.approx(0.55)  # half way between 5 and 32
    assert [tm.lr_factor(e, 80) for e in (32, 50, 79)] == pytest.approx([0.1] * 3)
    for e in (0, 3, 7.5, 31.9):
        assert tm.lr_factor(e / 4, 8) == pytest.approx(tm.lr_factor(e, 80))


def test_rate_falls_on_a_plateau_only_after_the_cosine_and_by_torchs_rule(tmp_path):
    """Gains of 6e-5 are below the threshold one by one, but not together: torch's rule keeps the rate."""
    values = iter([1.0] * 12)
    _, flat = fit_line(tmp_path / "flat", validate=lambda model: {"val_mae": next(values)}, epochs=12, settled=2)
    lr = [float(r["lr"]) for r in rows_of(flat)]
    assert lr[3] == pytest.approx(lr[8]) and lr[9] == pytest.approx(0.1 * lr[8]), lr
    values = iter([1 - 6e-5 * i for i in range(30)])
    _, slow = fit_line(tmp_path / "slow", validate=lambda model: {"val_mae": next(values)}, epochs=30, settled=2)
    lr = [float(r["lr"]) for r in rows_of(slow)]
    assert lr[-1] == lr[3]


def test_normalizer_is_mean_and_standard_deviation_and_refuses_equal_labels():
    assert tm.normalizer(np.array([1.0, 3.0])) == (2.0, 1.0)
    with pytest.raises(UserError, match="all 2 training labels are 7"):
        tm.normalizer(np.array([7.0, 7.0]))


def test_fit_learns_and_leaves_the_best_averaged_weights_in_the_model(tmp_path):
    model, result = fit_line(tmp_path, epochs=40)
    with torch.no_grad():
        mae = (model({"x": X[32:]}) * STD + MEAN - Y[32:]).abs().mean()
    assert float(mae) == result["best"]
    rows = rows_of(result)
    assert len(rows) == 40 and min(float(r["val_mae"]) for r in rows) == result["best"] < 1.0  # y has a MAD of 4.7
    assert float(rows[result["best_epoch"] - 1]["val_mae"]) == result["best"]
    assert (tmp_path / "history.csv").read_text() == result["history"]


def test_frozen_parts_keep_their_values_and_their_evaluation_mode(tmp_path):
    model, _ = fit_line(tmp_path, epochs=2)
    assert model.frozen[0].running_mean.tolist() == [0.0, 0.0] and model.frozen[0].weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 4, 4 * 13, 4 * 13 + 2])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, steps):
    whole, result = fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "cut", stop_after=steps)
    again, resumed = fit_line(tmp_path / "cut", resume=True)
    assert save(again.state_dict()) == save(whole.state_dict())
    without_seconds = lambda text: [r.rsplit(",", 1)[0] for r in text.splitlines()]  # noqa: E731
    assert without_seconds(resumed["history"]) == without_seconds(result["history"])


def test_training_stops_when_patience_is_spent_and_resuming_does_not_go_on(tmp_path):
    y = torch.randn(48, generator=torch.Generator().manual_seed(3)) * 5 + 40  # nothing to learn
    _, result = fit_line(tmp_path, y, epochs=200, patience=4)
    assert result["epochs"] == result["best_epoch"] + 4 < 200
    assert fit_line(tmp_path, y, epochs=200, patience=4, resume=True)[1]["epochs"] == result["epochs"]


def test_a_loss_that_is_not_finite_stops_with_the_ids_of_the_batch(tmp_path):
    y = Y.clone()
    y[17] = math.inf
    with pytest.raises(UserError, match=r"epoch 1/20: the loss is not finite .*row17\b"):
        fit_line(tmp_path, y)


def test_saving_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    """A large model takes long to write: at most a twentieth of the time goes there."""
    writes = []
    monkeypatch.setattr(tm, "SAVE_SECONDS", 0)
    monkeypatch.setattr(tm, "write_atomic", lambda *args: (tm.time.sleep(0.02), writes.append(1)))
    _, result = fit_line(tmp_path, epochs=40)
    assert 0 < len(writes) <= 1 + result["seconds"] / 0.4


# ---------------------------------------------------------------- modules


def test_modules_are_in_the_hub_with_their_cards(home):
    assert hub.verify(home.hub) == []
    cards = hub.list_modules(home.hub)
    assert {name: card["kind"] for name, card in cards.items()} == {"full": "full", "adapter": "adapter"}
    theta = hub.read_card(home.hub / "backbone")["tensors_sha256"]
    for card in cards.values():
        assert card["backbone_sha256"] == theta and card["rows_used"] == 40
        assert card["split"] == {"train": 28, "val": 6, "test": 6}
        assert card["training"]["lr"] == training_defaults(preset("tiny"), card["kind"])["lr"]
        assert card["epochs_run"] == 3 and card["record"]["theta_0"] == theta
        assert str(home.root) not in json.dumps(card)


def test_the_card_holds_errors_that_the_module_and_its_head_repeat(home):
    crystals, dataset, splits = prepare(home.modules, preset("tiny"))
    train = crystals.y[splits["train"]]
    for name in ("full", "adapter"):  # adapters trained on stored features; here the backbone runs on the graphs
        [(model, card)] = predict.load_models(home.hub / name)
        assert (card["normalizer_mean"], card["normalizer_std"]) == (train.mean(), train.std())
        assert card["mad"] == pytest.approx(np.abs(crystals.y[splits["test"]] - train.mean()).mean())
        plan = tm.plan_batches(dataset.num_atoms, splits["test"], home.modules)
        batches = tm.loader(partial(tm.read_graphs, dataset), plan, home.modules)
        index, y, prediction = tm.predict_batches(model, batches, train.mean(), train.std(), home.modules)
        assert index.tolist() == splits["test"].tolist() and y.tolist() == crystals.y[index].tolist()
        assert np.abs(prediction - y).mean() == pytest.approx(card["test_mae"], rel=1e-5)


def test_checkpointing_trains_the_same_module_and_is_refused_where_there_are_no_blocks(home):
    tm.run(replace(home.modules, name="checkpointed", checkpointing=True))
    for file in ("module.safetensors", "head.safetensors"):
        assert (home.hub / "checkpointed" / file).read_bytes() == (home.hub / "full" / file).read_bytes()
    shutil.rmtree(home.hub / "checkpointed")
    with pytest.raises(UserError, match="--checkpointing: cgcnn has no blocks"):
        tm.set_checkpointing(build_backbone(preset("tiny", backbone="cgcnn")), SimpleNamespace(checkpointing=True))


def test_same_seed_same_bytes_and_a_cut_adapter_run_resumes_to_them(home, monkeypatch):
    cfg = replace(home.modules, kind="adapter", name="again")
    step, steps = tm.train_step, []

    def stop(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6:  # in the second epoch
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(tm, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        tm.run(cfg)
    assert not (home.hub / "again").exists()
    with pytest.raises(UserError, match="unfinished run; add --resume"):
        tm.run(cfg)
    with pytest.raises(UserError, match="--seed 0, now 1; --resume needs the same"):
        tm.run(replace(cfg, resume=True, seed=1))
    tm.run(replace(cfg, resume=True))
    for file in ("module.safetensors", "head.safetensors"):
        assert (home.hub / "again" / file).read_bytes() == (home.hub / "adapter" / file).read_bytes()
    shutil.rmtree(home.hub / "again")


def test_large_features_go_to_disk_and_are_the_same(home, tmp_path):
    theta_0 = hub.load_module(home.hub / "backbone")
    _, dataset, _ = prepare(home.modules, theta_0.card["architecture"])
    rows = np.arange(len(dataset))[::-1]
    encode = partial(tm.encode, theta_0.backbone, dataset, rows, home.modules)
    in_memory = encode(lambda shape: tm.scratch_array(tmp_path, shape))
    on_disk = encode(lambda shape: tm.scratch_array(tmp_path, shape, in_memory=0))
    assert isinstance(on_disk, np.memmap) and np.array_equal(on_disk, in_memory)
    assert list(tmp_path.iterdir()) == []


def test_a_module_made_with_the_same_settings_is_kept_and_others_are_refused(home, capsys, monkeypatch):
    before = (home.hub / "full" / "module.json").stat().st_mtime_ns
    same = replace(home.modules, name="full", quiet=False)
    assert tm.run(same) == hub.read_card(home.hub / "full") and "nothing to do" in capsys.readouterr().err
    for changes, words in [
        (dict(epochs=4), "--epochs 3, now 4"), (dict(kind="adapter"), "--kind 'full', now 'adapter'"),
        (dict(task="demo_gap"), "--task 'demo_refractive_index', now 'demo_gap'"), (dict(few_shot=9), "rows of train 28, now 9"),
        (dict(split_seed=1), "content of test"), (dict(transform="log"), "--transform 'none', now 'log'"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            tm.run(replace(same, **changes))
    card = hub.read_card(home.hub / "backbone")
    monkeypatch.setattr(hub, "load_module", lambda *args, **kwargs: replaced(card, *args, **kwargs))
    with pytest.raises(UserError, match="theta_0 '"):
        tm.run(same)
    assert (home.hub / "full" / "module.json").stat().st_mtime_ns == before


def replaced(card, path, *args, **kwargs):
    """hub.load_module of a hub whose theta_0 is another."""
    backbone = build_backbone(card["architecture"])
    return SimpleNamespace(card=card | {"tensors_sha256": "0" * 64}, backbone=backbone, adapters=None, head=None)


def test_what_a_module_cannot_start_from_is_refused(home, tmp_path):
    with pytest.raises(MissingError, match="copy hub/backbone there, or make one: `make backbone HUB="):
        tm.run(replace(home.modules, hub=str(tmp_path)))
    with pytest.raises(UserError, match="name"):
        tm.run(replace(home.modules, name="../out"))
    with pytest.raises(UserError, match="--task is missing"):
        tm.run(replace(home.modules, task="", data=""))


def write_split(path, **parts):
    path.write_text(json.dumps({"train": list(range(20)), "val": [20, 21], "test": [22, 23]} | parts))
    return str(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(split=dict(test=[])), "test"),
        (dict(split=dict(val=[])), "val"),
        (dict(name="Bad Name"), "name"),
        (dict(batch_size=0), "--batch-size 0: must be 1 or more"),
        (dict(taken=True), "exists and is no module"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_first_epoch(home, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(tm, "fit", None)
    if "split" in changes:
        changes = dict(split_file=write_split(tmp_path / "split.json", **changes["split"]))
    if changes.pop("taken", False):
        (home.hub / "taken").mkdir(exist_ok=True)
        (home.hub / "taken" / "mine.txt").write_text("mine")
    try:
        with pytest.raises(UserError, match=words):
            tm.run(replace(home.modules, **{"name": "taken", **changes}))
    finally:
        shutil.rmtree(home.hub / "taken", ignore_errors=True)


@pytest.mark.parametrize("unit", ["/cm", "mJ /m^2", "1/cm", "W/K/m/s", "log10(GPa)"])
def test_any_unit_can_be_shared(home, unit):
    card = tm.run(replace(home.modules, name="unit", unit=unit, epochs=1, overwrite=True))
    assert card["physical_unit"] == unit and hub.verify(home.hub, ["unit"]) == []
    shutil.rmtree(home.hub / "unit")


def test_an_empty_folder_is_no_module(home):
    (home.hub / "empty").mkdir()
    tm.run(replace(home.modules, name="empty", epochs=1))
    assert hub.verify(home.hub, ["empty"]) == []
    shutil.rmtree(home.hub / "empty")


def test_two_processes_reach_the_loss_of_one(home):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    c, out = home.modules, {}
    flags = ["--data", "demo", "--task", TASK, "--hub", c.hub, "--cache", c.cache, "--limit", "40", "--epochs", "2"]
    command = [sys.executable, str(ROOT / "train_module.py"), *flags, "--batch-size", "9", "--name", "two", "--quiet"]
    env["OMP_NUM_THREADS"] = "1"
    processes = [subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    tm.run(replace(c, epochs=2, batch_size=9, name="one"))
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    for name in ("one", "two"):
        out[name] = np.loadtxt(home.hub / name / "history.csv", delimiter=",", skiprows=1)[:, :5]
        shutil.rmtree(home.hub / name)
    np.testing.assert_allclose(out["two"], out["one"], rtol=2e-4)
