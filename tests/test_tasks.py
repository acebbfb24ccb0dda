"""tasks.py: names, units, transforms, tasks files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from conftest import crystal, table_of
from crystals import load_crystals
from files import UserError
from tasks import TASKS, TRANSFORMS, Task, get_task, inverse, task_names, transform, unit_of


def test_the_paper_has_18_hub_and_17_downstream_tasks_and_qm9_adds_12():
    roles = {r: [n for n, t in TASKS.items() if t.role == r] for r in ("hub", "downstream")}
    qm9 = [n for n in roles["hub"] if n.startswith("qm9_")]
    assert (len(roles["hub"]) - len(qm9), len(qm9), len(roles["downstream"])) == (18, 12, 17)
    assert all(TASKS[n].pooling == "sum" for n in qm9)
    assert all(TASKS[n].paper for n in roles["downstream"])
    assert all(name == task.name for name, task in TASKS.items())
    assert task_names("downstream") == roles["downstream"]


def test_dielectric_is_the_paper_row_dielectric_constant():
    assert get_task("dielectric") == TASKS["mp_eps_total"]
    assert get_task("dielectric").paper == "Dielectric Constant"


@pytest.mark.parametrize(
    "name, unit", [("none", "GPa"), ("log", "log(GPa)"), ("log10", "log10(GPa)"), ("log1p", "log(1 + GPa)")]
)
def test_inverse_undoes_the_transform_and_the_unit_says_it(name, unit):
    task = Task("t", unit="GPa", transform=name)
    raw = np.array([1e-3, 0.5, 1.0, 250.0])
    np.testing.assert_allclose(inverse(task, transform(task, raw)), raw, rtol=1e-12)
    assert unit_of(task) == unit
    assert isinstance(inverse(task, 1.0), float) and isinstance(transform(task, 1.0), float)


def test_log_is_natural_and_has_no_value_at_or_below_zero():
    task = Task("t", transform="log")
    assert transform(task, np.e) == 1.0
    assert np.isnan(transform(task, [0.0, -1.0])).all()
    assert transform(Task("t", transform="log1p"), 0.0) == 0.0


def test_unknown_task_lists_near_names():
    with pytest.raises(ValueError, match=r"--task mp_phonon: .*mp_phonons.*--data PATH"):
        get_task("mp_phonon")


def test_unknown_transform_lists_the_known_ones():
    with pytest.raises(ValueError, match="transform 'ln' is not one of none, log, log10, log1p"):
        get_task("mp_phonons", transform="ln")


def test_tasks_file_paths_are_relative_to_the_file(tmp_path):
    table_of(tmp_path, [crystal(), crystal()])
    (tmp_path / "tasks.json").write_text(
        json.dumps({"own": {"data": "own.json.gz", "target_column": "y", "unit": "eV"}})
    )
    task = get_task("own", str(tmp_path / "tasks.json"), pooling="sum", transform="")
    assert task == Task("own", str(tmp_path / "own.json.gz"), "y", unit="eV", pooling="sum")
    assert load_crystals(task, quiet=True).y.tolist() == [1.0, 2.0]
    assert get_task("mp_phonons", str(tmp_path / "tasks.json")) == TASKS["mp_phonons"]  # not in the file
    assert task_names("user", tmp_path / "tasks.json") == ["own"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "t.json: not a tasks file, .* .JSONDecodeError"),
        ("[" * 100000, "t.json: not a tasks file, .* .RecursionError"),
        ("[]", "t.json: not a tasks file, "),
        ("5", "t.json: not a tasks file, "),
        ('{"a": 5}', "entry 'a' should be an object with \"data\""),
        ('{"a": {"data": ["x"]}}', r"'a' has data \['x'\]; it should be a word in quotes"),
        ('{"a": {"data": "x.csv", "unit": null}}', "'a' has unit None; it should be a word in quotes"),
        ('{"a": {"data": "' + "x" * 300 + '"}}', "t.json: cannot be read .File name too long"),
        ('{"a": {"unit": "eV"}}', "entry 'a' should be an object with \"data\""),
        ('{"a": {"data": "x.csv", "colum": 1}}', "'a' has unknown keys colum; known: data, target_column"),
        ('{"a": {"data": "x.csv", "pooling": "median"}}', "pooling 'median'"),
    ],
)
def test_a_wrong_tasks_file_is_named(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        get_task("a", tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_a_missing_tasks_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such.json: no such file"):
        get_task("a", tmp_path / "no-such.json")


@pytest.mark.parametrize("name", ["mp_phonons", "dielectric", "n_seebeck"])
def test_a_tasks_file_entry_under_a_known_name_inherits_all_fields_as_data_does(tmp_path, name):
    (tmp_path / "t.json").write_text(json.dumps({name: {"data": "own.csv", "target_column": "y"}}))
    known = get_task(name, data=str(tmp_path / "own.csv"), target_column="y")
    task = get_task(name, tmp_path / "t.json")
    assert task == replace(known, name=name) and task.paper and task.role != "user"
    assert task.transform == {"n_seebeck": "none"}.get(name, "log")
    (tmp_path / "t.json").write_text(json.dumps({name: {"data": "own.csv", "transform": "none", "unit": ""}}))
    assert (get_task(name, tmp_path / "t.json").transform, get_task(name, tmp_path / "t.json").unit) == (
        "none",
        "",
    )


def test_the_unit_of_a_label_without_one_is_the_transform():
    assert [unit_of(Task("t", transform=t)) for t in TRANSFORMS] == ["", "log", "log10", "log1p"]


def test_a_folder_lends_its_name_to_its_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_task("", data=".").name == get_task("", data=str(tmp_path)).name == tmp_path.name


def test_own_data_under_a_known_name_keeps_its_column_and_transform(tmp_path):
    task = get_task("mp_phonons", data=str(tmp_path))
    assert (task.dataset, task.target_column, task.transform) == (str(tmp_path), "last phdos peak", "log")


def test_embedded_crystals_load_like_any_source():
    name = task_names("downstream", data="demo")[0]
    task = get_task(name, data="demo")
    crystals = load_crystals(task, limit=10, quiet=True)
    assert (task.dataset, task.role, len(crystals)) == (f"demo:{name}", "downstream", 10) and unit_of(task)
    assert get_task(name.removeprefix("demo_"), data="demo") == task
    with pytest.raises(ValueError, match="the embedded crystals have no such task; they have demo_"):
        get_task("nothing", data="demo")


def test_embedded_force_field_has_forces():
    crystals = load_crystals(get_task("demo_clusters", data="demo"), limit=5, quiet=True)
    assert [f.shape for f in crystals.forces] == [p.shape for p in crystals.pos]
    assert not crystals.pbc.any() and not np.any(crystals.cell)
