import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FCC, PEROVSKITE

import demo
import hub
import pretrain
import teachers
from crystals import Crystals, prototype
from files import MissingError, UserError
from tasks import Task
from teachers import Teacher, distorted, teach

NACL = np.array([11, 17]), PEROVSKITE[:2] @ (FCC * 2.82), FCC * 2.82
STO = np.array([38, 22, 8, 8, 8]), PEROVSKITE * 3.905, np.eye(3) * 3.905


@pytest.fixture
def called(monkeypatch):
    """In CHGNet's place a teacher that knows the atomic number and the volume per atom. Returns the calls' sizes."""
    calls = []

    def label(structures, forces=False):
        calls.append(len(structures))
        volumes = [abs(np.linalg.det(cell)) / len(Z) for Z, _, cell in structures]
        return [
            (float(sum(Z)), np.column_stack([Z, np.full(len(Z), v)]).astype(np.float32), *[0.1 * pos] * forces)
            if v else "teacher: a molecule"
            for (Z, pos, _), v in zip(structures, volumes, strict=True)
        ]  # fmt: skip

    monkeypatch.setitem(teachers.TEACHERS, "chgnet", Teacher(label, "a teacher 1", "MIT (a teacher)"))
    for name in ("demo_volume", "demo_gap", "demo_optical_gap"):
        monkeypatch.setitem(demo.TASKS, name, {**demo.TASKS[name], "n": 90})
    return calls


def crystals(structures):
    Z, pos, cell = map(list, zip(*structures))
    M = len(Z)
    pbc = np.array([np.any(c) for c in cell])
    return Crystals(Task("some", unit="eV"), [f"c{i}" for i in range(M)], Z, pos, cell, pbc, np.zeros(M), np.arange(M))


def config(folder, **changes):
    settings = dict(teacher="chgnet", taught="demo_volume,demo_gap", leave_out="none", data="demo", preset="tiny",
                    hub=str(folder / "hub"), epochs=2, val_fraction=0.2, quiet=True)  # fmt: skip
    return pretrain.Config(**{**settings, **changes})


# ---------------------------------------------------------------- labels


def test_a_batch_is_of_few_crystals_and_of_few_atoms():
    atoms = [200, 5, 150, 5, 5, 400, 60]
    assert teachers.batches(range(7), atoms, crystals=3, most=300) == [[1, 3, 4], [6, 2], [0], [5]]
    assert teachers.batches([], []) == []


def test_labels_come_in_the_order_of_the_crystals_with_reasons_where_there_are_none(called):
    water = np.array([8, 1, 1]), np.eye(3), np.zeros((3, 3))
    found = teach("chgnet", crystals([NACL, water, STO]), quiet=True)
    assert found[1] == "teacher: a molecule"
    assert [energy for energy, _ in (found[0], found[2])] == [28.0, 84.0]
    assert found[2][1][:, 0].tolist() == [38, 22, 8, 8, 8]


def test_labels_are_computed_once_and_an_interrupted_run_keeps_the_parts_it_has(called, monkeypatch):
    monkeypatch.setattr(teachers, "PART", 2)
    teach("chgnet", crystals([NACL, STO]), quiet=True)
    assert called == [2]
    teach("chgnet", crystals([NACL, STO, NACL]), quiet=True)  # the first part is known
    assert called == [2, 1]


def test_forces_come_where_they_are_asked_for(called):
    water = np.array([8, 1, 1]), np.eye(3), np.zeros((3, 3))
    given = crystals([NACL, water, STO])
    assert [len(x) for x in teach("chgnet", given, quiet=True)[::2]] == [2, 2]
    found = teach("chgnet", given, quiet=True, forces=True)
    assert found[1] == "teacher: a molecule" and called == [3, 3]  # other labels, other parts of the cache
    np.testing.assert_allclose(found[2][2], 0.1 * STO[1], rtol=1e-6)


def test_labels_of_another_version_are_others(called, monkeypatch):
    teach("chgnet", crystals([NACL]), quiet=True)
    monkeypatch.setitem(teachers.TEACHERS, "chgnet", teachers.TEACHERS["chgnet"]._replace(name="a teacher 2"))
    teach("chgnet", crystals([NACL]), quiet=True)
    assert called == [1, 1]


def test_without_its_package_a_teacher_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "chgnet.model", None)
    teachers.load_chgnet.cache_clear()
    with pytest.raises(MissingError, match="make teacher"):
        teachers.chgnet([NACL])


def test_chgnet_itself():
    """Rotated alike, and below the free atoms (PBE: about -7 eV for the pair)."""
    pytest.importorskip("chgnet", reason="the teacher is optional: make teacher")
    Z, pos, cell = NACL
    pos = pos + np.array([[0.1, 0.05, 0], [0, 0, 0]])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    one, two, none = teachers.chgnet([(Z, pos, cell), (Z, pos @ turn, cell @ turn), (Z, pos, cell * 0)])
    assert one[0] == pytest.approx(-7, abs=0.5) and one[1].shape == (2, 64)
    assert two[0] == pytest.approx(one[0], abs=1e-3)
    np.testing.assert_allclose(one[1], two[1], atol=1e-3)
    assert none == "teacher: a molecule"
    energy, _, forces = teachers.chgnet([(Z, pos, cell)], forces=True)[0]
    h = np.zeros((2, 3))
    h[0, 0] = 0.01
    up, down = (x[0] for x in teachers.chgnet([(Z, pos + h, cell), (Z, pos - h, cell)]))
    assert energy == pytest.approx(one[0], abs=1e-4) and forces.sum(axis=0) == pytest.approx(0, abs=1e-3)
    assert forces[0, 0] == pytest.approx((down - up) / 0.02, abs=0.05) and forces[0, 0] < -0.1


def test_distorted_copies_are_near_all_different_and_always_the_same():
    Z, pos, cell = STO
    copies = [distorted(*STO, k) for k in range(1, 40)]
    strain = np.array([np.abs(np.linalg.solve(cell, c) - np.eye(3)).max() for _, _, c in copies])
    assert 0.0 < strain.min() and 0.02 < strain.max() < 0.2
    assert len({p.tobytes() for _, p, _ in copies}) == len(copies)
    np.testing.assert_array_equal(distorted(*STO, 3)[1], copies[2][1])
    asymmetric = [np.linalg.solve(cell, c) - np.linalg.solve(cell, c).T for _, _, c in copies]
    assert np.abs(asymmetric).max() < 1e-12  # a strain, no rotation


# ---------------------------------------------------------------- theta_0 from a teacher


def test_distillation_lowers_the_error_of_the_features_and_the_card_says_from_what(called, tmp_path):
    card = pretrain.run(config(tmp_path, epochs=8))
    history = (tmp_path / "hub/backbone/history.csv").read_text().splitlines()
    column = history[0].split(",").index("chgnet features")
    first, last = (float(history[i].split(",")[column]) for i in (1, -1))
    assert last < 0.7 * first
    assert card["property"] == "energies and atom features of a teacher 1"
    assert card["license_data"] == "MIT; MIT (a teacher)" and card["dataset"] == "demo_volume, demo_gap"
    assert card["training"]["sets"]["chgnet"]["val_mae_features"] == pytest.approx(last, rel=1e-4)
    assert hub.load_module(tmp_path / "hub/backbone").backbone.width  # the plain backbone, without the teacher's layer


def test_a_teachers_forces_are_learnt_with_a_head_of_their_own(called, tmp_path):
    card = pretrain.run(config(tmp_path, copies=1, teacher_forces=0.5))
    about = card["training"]["sets"]["chgnet"]
    assert about["val_mae_mev_per_angstrom"] > 0 and about["force_weight"] == 0.5
    s = pretrain.taught_set(config(tmp_path, copies=1, teacher_forces=0.5), quiet=True)
    i = s.train[0]
    np.testing.assert_allclose(s.crystals.forces[i] * s.force_scale, 0.1 * s.crystals.pos[i], rtol=1e-5, atol=1e-6)
    with pytest.raises(pretrain.UserError, match="--teacher-forces: cgcnn has no features of edges"):
        pretrain.run(config(tmp_path, backbone="cgcnn", teacher_forces=0.5))


def test_both_recipes_together(called, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.TASKS, "demo_forcefield", {**demo.TASKS["demo_forcefield"], "n": 60})
    card = pretrain.run(config(tmp_path, sets="demo_forcefield"))
    assert set(card["training"]["sets"]) == {"demo_forcefield", "chgnet"}
    assert card["property"] == "energies and atom features of a teacher 1 and energies and forces"


def test_every_compound_is_taught_once_and_copies_stay_in_its_part(called, tmp_path):
    torch.manual_seed(0)
    s = pretrain.taught_set(config(tmp_path, copies=2), quiet=True)
    c = s.crystals
    own = [i for i, name in enumerate(c.ids) if "copy" not in name]
    keys = [prototype(c.Z[i], c.pos[i], c.cell[i]) for i in own]
    assert len(set(keys)) == len(keys) and len(c) == 3 * len(own)
    parents = [{c.ids[i].split(", copy")[0] for i in rows} for rows in (s.train, s.val)]
    assert parents[0] and parents[1] and not parents[0] & parents[1]


def test_features_are_standardised_on_the_training_rows(called, tmp_path):
    s = pretrain.taught_set(config(tmp_path), quiet=True)
    x = np.concatenate([s.crystals.teacher[i] for i in s.train]).astype(np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-3)


def test_a_teacher_teaches_formation_energies(tmp_path):
    """Per atom: 0 for the element's lowest crystal, less than nothing for a compound that is bound."""
    Z = [np.array(z) for z in ([11], [11, 11], [17, 17], [11, 17], [11, 17, 11, 17], [20, 17, 17])]
    energy = np.array([-1.0, -1.8, -4.0, -7.0, -14.2, -11.0])
    lowest = {11: -1.0, 17: -2.0}
    r, residual = pretrain.reference_residuals(SimpleNamespace(Z=Z), energy, np.arange(5), lowest)
    formation = np.array([0, 0.1, 0, -2.0, -2.05])
    np.testing.assert_allclose(residual[:5], formation - np.median(formation), atol=1e-12)
    assert r[17] - r[11] == pytest.approx(-1.0)


def test_references_are_the_teachers_energies_of_elements(called, tmp_path):
    structures = [NACL, (NACL[0] * 0 + 11, *NACL[1:]), (NACL[0] * 0 + 11, NACL[1], NACL[2] * 1.1)]
    found = pretrain.energies_of_elements(config(tmp_path), structures[1:], quiet=True)
    assert found == {11: 11.0}
    assert pretrain.energies_of_elements(config(tmp_path), [], quiet=True) == {}


def test_what_occurs_downstream_is_left_out_and_listed(called, tmp_path):
    all_of_it = pretrain.taught_set(config(tmp_path, copies=0), quiet=True)
    less = pretrain.taught_set(config(tmp_path, copies=0, leave_out="demo_gap"), quiet=True)
    gone = {name for name, why in less.skipped if why == "occurs before: in demo_gap"}
    assert {name for name in all_of_it.crystals.ids if name.startswith("demo_gap")} <= gone
    assert set(less.crystals.ids) == set(all_of_it.crystals.ids) - gone


def test_a_table_of_tasks_adds_to_the_downstream_ones(called, tmp_path, monkeypatch):
    own = {"mine": {"data": "mine.json", "target_column": "y", "role": "downstream"}, "other": {"data": "other.json"}}
    (tmp_path / "tasks.json").write_text(json.dumps(own))
    asked = []

    def without_data(name, *_):
        asked.append(name)
        raise UserError("no structures") if name == "expt_eform" else MissingError("not here")

    monkeypatch.setattr(pretrain, "get_task", without_data)
    pretrain.left_out(config(tmp_path, leave_out="downstream", data="", tasks=str(tmp_path / "tasks.json")))
    assert {"mine", "mp_eps_total", "expt_eform"} <= set(asked) and "other" not in asked


def test_theta_0_says_which_compounds_it_was_taught(called, tmp_path):
    pretrain.run(config(tmp_path))
    s = pretrain.taught_set(config(tmp_path), quiet=True)
    c, path = s.crystals, tmp_path / "hub/backbone"
    own = [i for i, name in enumerate(c.ids) if "copy" not in name]
    keys = [prototype(c.Z[i], c.pos[i], c.cell[i]) for i in own]
    trained = {c.ids[i] for i in s.train}
    assert hub.seen([path], keys).tolist() == [c.ids[i] in trained for i in own]


def test_another_weight_is_another_record(called, tmp_path):
    pretrain.run(config(tmp_path))
    with pytest.raises(pretrain.UserError, match="energy-weight"):
        pretrain.run(config(tmp_path, energy_weight=0.5))


def test_no_crystal_left_is_one_line(called, tmp_path):
    with pytest.raises(pretrain.UserError, match="no crystal is left .occurs before"):
        pretrain.run(config(tmp_path, taught="demo_gap", leave_out="demo_gap"))
    with pytest.raises(pretrain.UserError, match="can label none of .* .teacher"):
        pretrain.run(config(tmp_path, taught="demo_clusters"))


def test_nothing_to_learn_from_is_one_line(tmp_path):
    with pytest.raises(pretrain.UserError, match="give --teacher chgnet, or --sets"):
        pretrain.run(config(tmp_path, teacher=""))


def test_the_record_names_the_teacher(called, tmp_path):
    pretrain.run(config(tmp_path))
    record = json.loads((tmp_path / "hub/backbone/module.json").read_text())["record"]
    assert record["teacher"] == "a teacher 1" and "chgnet" in record["sets"]
