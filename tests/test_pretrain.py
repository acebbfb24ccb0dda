import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import demo
import hub
import pretrain
import train_module
from crystals import Crystals
from files import UserError
from stage import main
from tasks import Task

SETS = "demo_forcefield,demo_clusters"


@pytest.fixture(autouse=True)
def small_and_private(monkeypatch, tmp_path):
    """Few embedded crystals, and caches of our own."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MOMA_CACHE", str(tmp_path / "cache"))
    for name, n in (("demo_forcefield", 160), ("demo_clusters", 60)):
        monkeypatch.setitem(demo.TASKS, name, {**demo.TASKS[name], "n": n})


def config(folder, **changes):
    settings = dict(sets=SETS, data="demo", hub=str(folder / "hub"), preset="tiny", epochs=2, val_fraction=0.2, quiet=True)
    return pretrain.Config(**{**settings, **changes})


def crystals(Z, y, unit="eV", forces=None, **task):
    """Molecules of the given atomic numbers, atoms 1 A apart on a line."""
    M = len(Z)
    pos = [np.arange(len(z))[:, None] * np.array([1.0, 0.0, 0.0]) for z in Z]
    return Crystals(
        Task("made_up", unit=unit, **task), [f"m{i}" for i in range(M)], [np.array(z) for z in Z], pos,
        [np.zeros((3, 3))] * M, np.zeros(M, dtype=bool), np.array(y, dtype=float), np.arange(M), forces=forces,
    )  # fmt: skip


# ---------------------------------------------------------------- energies


def test_references_recover_an_exactly_linear_energy():
    rng = np.random.default_rng(0)
    Z = [rng.choice([1, 6, 8], rng.integers(1, 9)) for _ in range(60)]
    true = {1: -13.6, 6: -1030.0, 8: -2040.0}  # eV
    r = pretrain.fit_references(Z, np.array([sum(true[z] for z in z) for z in Z]))
    np.testing.assert_allclose([r[1], r[6], r[8]], list(true.values()), atol=1e-3)


def test_references_of_one_composition_give_its_mean_and_unseen_elements_get_the_mean_per_atom():
    r = pretrain.fit_references([np.array([1, 8, 1])] * 4, np.array([-30.0, -30.3, -29.7, -30.0]))
    np.testing.assert_allclose(r[1] * 2 + r[8], -30.0, atol=1e-4)
    np.testing.assert_allclose(r[26], -10.0, atol=1e-9)


def test_labels_per_atom_become_total_energies():
    Z = [[1, 1], [8, 8, 8]]
    np.testing.assert_allclose(pretrain.total_energies("s", crystals(Z, [-1.0, 2.0], "eV/atom")), [-2.0, 6.0])
    np.testing.assert_allclose(pretrain.total_energies("s", crystals(Z, [-1.0, 2.0], "eV")), [-1.0, 2.0])
    np.testing.assert_allclose(pretrain.total_energies("s", crystals(Z, [-1.0, 2.0], "meV/atom")), [-0.002, 0.006])


@pytest.mark.parametrize("unit, transform", [("GPa", "none"), ("eV", "log"), ("", "none")])
def test_labels_that_are_no_energies_are_refused(unit, transform):
    with pytest.raises(ValueError, match="--sets s: .* energies"):
        pretrain.total_energies("s", crystals([[1]], [1.0], unit, transform=transform))


def test_normalise_leaves_out_outliers_and_says_why():
    rng = np.random.default_rng(0)
    Z = [[1] * n for n in rng.integers(1, 5, 50)]
    y = [-3.0 * len(z) + 0.1 * len(z) * rng.normal() for z in Z]
    y[7] += 100.0
    forces = [np.full((len(z), 3), 0.5) for z in Z]
    forces[9] = forces[9] + 1000.0
    s = pretrain.normalise("s", crystals(Z, y, forces=forces), pretrain.Config(quiet=True, val_fraction=0.2))
    assert {i: why.split()[0] for i, why in s.skipped} == {"m9": "force", "m7": "energy"}
    assert len(s.crystals) == 48 and len(s.train) + len(s.val) == 48 and not set(s.train) & set(s.val)
    N = np.array([len(z) for z in s.crystals.Z])
    per_atom = (s.crystals.y / N)[s.train]
    np.testing.assert_allclose(np.mean(per_atom**2), 1.0, rtol=1e-3)  # the residual per atom has size 1
    np.testing.assert_allclose(s.sigma, 0.1, rtol=0.5)  # eV/atom, the noise put in
    np.testing.assert_allclose(s.force_scale, 0.5, rtol=1e-4)
    np.testing.assert_allclose(s.crystals.forces[0], 1.0, rtol=1e-4)


# ---------------------------------------------------------------- sampling, loss, schedule


def test_sampling_shares_are_square_roots_and_no_set_shrinks():
    assert pretrain.epoch_counts([10_000, 100, 2500]).tolist() == [10_000, 1000, 5000]
    assert pretrain.epoch_counts([10_000, 100], temperature=1.0).tolist() == [10_000, 100]
    assert pretrain.epoch_counts([7]).tolist() == [7]


def test_an_epoch_repeats_small_sets_evenly_and_follows_from_the_seed():
    class Sized:
        def __init__(self, n):
            self.num_atoms = np.ones(n, dtype=int)

    def energy_set(name, n):
        return pretrain.EnergySet(name, None, None, 1.0, 0.0, np.arange(n), np.arange(0), [], dataset=Sized(n))

    sets = {"large": energy_set("large", 90), "small": energy_set("small", 10)}
    cfg = pretrain.Config(batch_size=8)
    plan = pretrain.plan_epoch(sets, cfg, epoch=3)
    rows = {name: np.bincount([i for batch, n, _ in plan if n == name for i in batch]) for name in sets}
    assert rows["large"].tolist() == [1] * 90  # every row once
    assert rows["small"].tolist() == [3] * 10  # sqrt(90 * 10) = 30 rows
    assert max(len(batch) for batch, _, _ in plan) == 8
    assert plan == pretrain.plan_epoch(sets, cfg, epoch=3) and plan != pretrain.plan_epoch(sets, cfg, epoch=4)


def test_force_loss_is_structure_wise():
    error = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    batch = {"batch": torch.tensor([0, 0, 1]), "num_atoms": torch.tensor([2, 1])}
    assert pretrain.structure_wise(error, batch).item() == pytest.approx(((5 + 1) / 2 + 2) / 2)


def test_energy_loss_is_per_atom():
    batch = {"batch": torch.tensor([0, 0, 1]), "num_atoms": torch.tensor([2, 1]), "y": torch.tensor([1.0, 1.0])}
    batch["forces"] = torch.zeros(3, 3)
    batch["task"] = "s"
    energy = torch.tensor([3.0, 1.5])  # off by 2 with two atoms, and by 0.5 with one
    forces = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    sets = {"s": SimpleNamespace(force_weight=10.0, energy_weight=1.0)}
    loss = pretrain.loss_of(sets, lambda batch, task: (energy, None, None), batch)
    assert loss.item() == pytest.approx((2 / 2 + 0.5) / 2)
    loss = pretrain.loss_of(sets, lambda batch, task: (energy, forces, None), batch)
    assert loss.item() == pytest.approx(0.75 + 10 * (1 + 1) / 2)


def test_loss_of_a_teachers_features_is_structure_wise():
    batch = {"batch": torch.tensor([0, 0, 1]), "num_atoms": torch.tensor([2, 1]), "y": torch.tensor([1.0, 1.0])}
    batch |= {"task": "s", "teacher": torch.zeros(3, 2)}
    features = torch.tensor([[1.0, 3.0], [0.0, 4.0], [-5.0, 5.0]])  # errors of the atoms: 2, 2, 5
    sets = {"s": SimpleNamespace(energy_weight=0.5)}
    loss = pretrain.loss_of(sets, lambda batch, task: (torch.tensor([3.0, 1.0]), None, features), batch)
    assert loss.item() == pytest.approx(0.5 * (2 / 2 + 0) / 2 + (2 + 5) / 2)


def test_the_rate_rises_from_a_fifth_and_falls_to_a_tenth():
    rates = [pretrain.lr_factor(20 * p, 0.1, epochs=20) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    np.testing.assert_allclose(rates, [0.2, 0.6, 1.0, 0.55, 0.1], atol=1e-12)


def test_gradients_of_shared_layers_are_divided():
    net = torch.nn.Linear(2, 1)
    net.shared_gradient_divisors = lambda: {"weight": 4}
    pretrain.divide_shared_gradients(net)
    (net(torch.ones(1, 2)) / 2 + net(torch.ones(1, 2)) / 2).backward()  # used twice, divided once
    assert net.weight.grad.tolist() == [[0.25, 0.25]] and net.bias.grad.tolist() == [1.0]


# ---------------------------------------------------------------- whole runs


def history(folder):
    rows = [line.split(",") for line in (folder / "hub/backbone/history.csv").read_text().splitlines()]
    return {name: [float(r[i] or "nan") for r in rows[1:]] for i, name in enumerate(rows[0])}


def two_springs(task, *args, **kwargs):
    """Stands in for load_crystals: dimers with a spring (energies and forces) and one-atom cells that resist compression."""
    d = np.random.default_rng(0).uniform(2.0, 3.0, 100)  # A; bond length, edge of the cell; 3 is relaxed
    if task.name == "dimers":
        c = crystals([[1, 8]] * 100, -20 + 4 * (d - 3) ** 2)
        c.forces = [np.array([[f, 0, 0], [-f, 0, 0]]) for f in 8 * (d - 3)]  # atom 0 is pushed towards -x
        c.pos = [np.array([[0.0, 0, 0], [x, 0, 0]]) for x in d]
        return c
    c = crystals([[29]] * 100, -3 + 4 * (d - 3) ** 2, "eV/atom")
    c.cell, c.pbc = [x * np.eye(3) for x in d], np.ones(100, dtype=bool)
    return c


def test_a_run_lowers_the_error_of_both_sets_and_writes_theta_0(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "find_task", lambda name, cfg: Task(name))
    monkeypatch.setattr(pretrain, "load_crystals", two_springs)
    card = pretrain.run(config(tmp_path, sets="dimers,cells", epochs=8, batch_size=8))
    h = history(tmp_path)
    for column in ("dimers meV/atom", "dimers meV/A", "cells meV/atom"):
        assert h[column][-1] < 0.75 * h[column][0], (column, h[column])
    dimers, cells = (card["training"]["sets"][name] for name in ("dimers", "cells"))
    assert dimers["val_mae_mev_per_angstrom"] == pytest.approx(h["dimers meV/A"][-1])
    assert cells["val_mae_mev_per_atom"] == pytest.approx(h["cells meV/atom"][-1])
    assert cells["val_mae_mev_per_angstrom"] is None
    assert cells["references_ev"].keys() == {"Cu"} and card["elements"] == [1, 8, 29]
    assert card["kind"] == "backbone" and card["architecture"]["forces"] is False
    backbone = hub.load_module(tmp_path / "hub/backbone").backbone  # exactly the tensors of the architecture
    assert not any("out_mlp_F" in k for k in backbone.state_dict())
    assert hub.load_tensors(tmp_path / "hub/backbone", "adapters.safetensors")
    assert hub.verify(tmp_path / "hub") == []


def test_two_processes_agree_when_to_save(tmp_path):
    """Reading the loss is a sum over the processes, so all must do it at once, whatever their clocks say."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    c, processes = config(tmp_path), []
    flags = ["--sets", c.sets, "--data", c.data, "--hub", c.hub, "--preset", c.preset, "--epochs", "1", "--limit", "48"]
    for rank, seconds in enumerate((-1e9, 1e9)):
        code = f"import sys, demo, train_module, pretrain, stage; train_module.SAVE_SECONDS = {seconds}; "
        code += "[t.update(n=60) for t in demo.TASKS.values()]; "  # quicker to make
        code += "stage.main(pretrain.run, pretrain.Config, pretrain.__doc__, sys.argv[1:])"
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen([sys.executable, "-c", code, *flags, "--quiet"], env=dict(env)))
    try:
        assert [p.wait(timeout=300) for p in processes] == [0, 0]
    finally:
        for p in processes:
            p.kill()
    assert hub.verify(tmp_path / "hub") == []


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = pretrain.run(config(tmp_path / "a"))
    step, calls = train_module.train_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:  # in the middle of an epoch; the state of step 3 is on the disk
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_module, "train_step", killed)
    monkeypatch.setattr(train_module, "SAVE_SECONDS", -1e9)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config(tmp_path / "b"))
    monkeypatch.setattr(train_module, "train_step", step)
    assert (tmp_path / "b/hub/.runs/backbone/last.pt").exists()
    with pytest.raises(UserError, match="--resume"):
        pretrain.run(config(tmp_path / "b"))
    with pytest.raises(UserError, match="--seed 0, now 1"):
        pretrain.run(config(tmp_path / "b", resume=True, seed=1))
    resumed = pretrain.run(config(tmp_path / "b", resume=True))
    assert resumed["tensors_sha256"] == whole["tensors_sha256"]
    losses = [history(tmp_path / x)["train_loss"] for x in "ab"]
    assert losses[0] == losses[1]
    assert not (tmp_path / "b/hub/.runs/backbone/last.pt").exists()


def test_a_time_limit_writes_the_backbone_and_resume_finishes_it(tmp_path):
    whole = pretrain.run(config(tmp_path / "a", epochs=1))
    early = pretrain.run(config(tmp_path / "b", epochs=1, time_limit=1e-9))
    assert early["training"]["steps"] < whole["training"]["steps"]
    with pytest.raises(UserError, match="unfinished run; add --resume"):
        pretrain.run(config(tmp_path / "b", epochs=1))
    late = pretrain.run(config(tmp_path / "b", epochs=1, resume=True))
    assert late["tensors_sha256"] == whole["tensors_sha256"] != early["tensors_sha256"]


def test_a_backbone_made_with_the_same_settings_is_kept_and_one_in_use_is_not_replaced(tmp_path):
    cfg = config(tmp_path, epochs=1, limit=40)
    card = pretrain.run(cfg)
    assert pretrain.run(cfg) == card
    with pytest.raises(UserError, match="--seed 0, now 1; give another --hub, or --overwrite"):
        pretrain.run(replace(cfg, seed=1))
    with pytest.raises(UserError, match="sets of demo_forcefield"):
        pretrain.run(replace(cfg, limit=41))
    tensors = hub.load_tensors(tmp_path / "hub/backbone")
    module = {**card, "kind": "full", "backbone_sha256": card["tensors_sha256"]}
    hub.save(tmp_path / "hub/some_module", tensors, module)
    with pytest.raises(UserError, match="some_module start"):
        pretrain.refuse_if_used(tmp_path / "hub/backbone", cfg)
    new = pretrain.run(replace(cfg, seed=1, overwrite=True))
    assert new["tensors_sha256"] != card["tensors_sha256"]


def test_a_set_may_be_called_what_a_card_may_not_hold(tmp_path):
    """The name of a set is no private field: refused neither before the first epoch nor after the last."""
    lines = []
    for x in np.linspace(-0.1, 0.1, 20):
        lines += ["2", f'Properties=species:S:1:pos:R:3 energy={-30 + x:.6f} pbc="F F F"', "H 0 0 0", f"H {0.74 + x:.6f} 0 0"]
    (tmp_path / "structures.extxyz").write_text("\n".join(lines) + "\n")
    card = pretrain.run(config(tmp_path, sets=f"{tmp_path}/structures.extxyz", data="", epochs=1))
    assert list(card["training"]["sets"]) == ["structures"] and hub.verify(tmp_path / "hub") == []


def test_files_with_and_without_forces(tmp_path):
    lines = []
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(scale=0.1)
        lines += ["2", f'Properties=species:S:1:pos:R:3:forces:R:3 energy={-30 + x:.6f} pbc="F F F"']
        lines += [f"H 0 0 0 {x:.6f} 0 0", f"H {0.74 + x:.6f} 0 0 {-x:.6f} 0 0"]
    (tmp_path / "dimers.extxyz").write_text("\n".join(lines) + "\n")
    table = {"plain": {"data": "dimers.extxyz", "target_column": "energy", "unit": "eV"}}
    (tmp_path / "tasks.json").write_text(json.dumps(table))
    sets = f"{tmp_path}/dimers.extxyz,plain"
    card = pretrain.run(config(tmp_path, sets=sets, data="", tasks=str(tmp_path / "tasks.json"), epochs=1))
    about = card["training"]["sets"]
    assert about["dimers"]["val_mae_mev_per_angstrom"] > 0 and about["plain"]["val_mae_mev_per_angstrom"] is None
    assert str(tmp_path) not in json.dumps(card)


def test_cgcnn_learns_from_the_energies_alone(tmp_path):
    card = pretrain.run(config(tmp_path, backbone="cgcnn", epochs=1))
    assert card["training"]["sets"]["demo_forcefield"]["val_mae_mev_per_angstrom"] is None


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--sets", "demo_forcefild"], "demo_forcefild"),
        (["--force-weight", "1,2,3"], "--force-weight 1,2,3"),
        (["--sets", "demo_bulk"], "energies"),
        (["--sets", "demo_clusters,demo_clusters"], "twice"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, capsys, flags, says):
    argv = ["--data", "demo", "--sets", SETS, "--hub", str(tmp_path / "hub"), "--preset", "tiny", "--quiet", *flags]
    with pytest.raises(SystemExit) as stop:
        main(pretrain.run, pretrain.Config, pretrain.__doc__, argv)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and says in line and line.count("\n") == 1
