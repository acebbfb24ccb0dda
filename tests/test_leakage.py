"""What a module has seen: hashes of its training structures, and what compose.py makes of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import compose
import hub
import train_module
from conftest import crystal, table_of
from crystals import load_crystals, prototype, prototypes
from files import UserError
from stage import prepare
from tasks import get_task


def test_seen_finds_just_the_structures_that_were_trained_on(home):
    crystals, _, splits = prepare(home.modules, home.arch)
    names, found = prototypes(crystals), hub.seen([home.hub / "full"], prototypes(crystals))
    trained = {names[i] for i in splits["train"]}
    assert found.tolist() == [name in trained for name in names]
    assert found[splits["train"]].all() and hub.verify(home.hub) == []


def test_a_supercell_is_seen_too(home):
    crystals, _, splits = prepare(home.modules, home.arch)
    i = int(splits["train"][0])
    Z, pos, cell = crystals.Z[i], crystals.pos[i], crystals.cell[i]
    twice = replace(crystals, ids=["twice"], Z=[np.tile(Z, 2)], pos=[np.concatenate([pos, pos + cell[0]])],
                    cell=[cell * [[2], [1], [1]]], pbc=np.array([True]), y=np.zeros(1), fingerprint="")  # fmt: skip
    assert hub.seen([home.hub / "full"], prototypes(twice)).tolist() == [True]


def test_the_file_is_small_and_a_hash_found_by_chance_is_rare(tmp_path, monkeypatch):
    names = [f"{i:016x}" for i in range(10_000)]
    assert len(hub.seen_file(names * 2)["seen.npy"]) < 51_000
    monkeypatch.setattr(hub, "read_seen", lambda path: np.unique(hub.digests(names)))
    assert not hub.seen([tmp_path], [f"{i:016x}" for i in range(10_000, 200_000)]).any()
    assert hub.seen([tmp_path], names).all()


def test_several_folders_count_together_and_one_that_does_not_say_makes_it_unknown(home, tmp_path):
    root = copied(home, tmp_path)
    resave(root / "adapter", hub.seen_file(["x"]))
    paths = [root / "full", root / "adapter"]
    assert hub.seen(paths, ["x", "y"]).tolist() == [True, False]
    merged = hub.joined_seen(paths)
    resave(root / "full", merged)
    assert hub.seen([root / "full"], ["x"]).tolist() == [True]
    resave(root / "adapter", {})
    assert hub.seen(paths, ["x"]) is None and hub.joined_seen(paths) == {}
    assert hub.read_seen(root / "adapter") is None


@pytest.mark.parametrize("flag, stored", [("auto", False), ("yes", True), ("no", False)])
def test_structures_of_ones_own_data_are_hashed_only_if_asked(home, tmp_path, flag, stored):
    table = table_of(tmp_path, [crystal(a=3.0 + 0.1 * i) for i in range(20)])
    cfg = replace(home.modules, task="mine", data=str(table), target_column="y", limit=0, store_hashes=flag, epochs=1)
    crystals = load_crystals(get_task("mine", data=str(table), target_column="y"), quiet=True)
    assert bool(train_module.seen_file(cfg, crystals, [0, 1])) is stored


def test_structures_of_public_tables_are_hashed_unless_refused(home):
    crystals, _, _ = prepare(home.modules, home.arch)
    public = replace(crystals, task=get_task("mp_eform"))
    for task_crystals in (crystals, public):
        assert train_module.seen_file(home.modules, task_crystals, [0])
        assert train_module.seen_file(replace(home.modules, store_hashes="no"), task_crystals, [0]) == {}
    lent = replace(crystals, task=get_task("mp_eform", data="mine.csv"))  # a public task's name for data of one's own
    assert train_module.seen_file(home.modules, lent, [0]) == {}


@pytest.mark.parametrize("content, words", [
    (b"nonsense", "not a list of hashes"), (None, "array of float64"), ("pickle", "not a list of hashes")])  # fmt: skip
def test_a_file_of_hashes_that_is_none_is_refused_in_one_line(home, tmp_path, content, words):
    import io

    root, out = copied(home, tmp_path), io.BytesIO()
    np.save(out, np.array([{}]) if content == "pickle" else np.zeros(3), allow_pickle=True)
    resave(root / "full", {"seen.npy": content if isinstance(content, bytes) else out.getvalue()})
    with pytest.raises(UserError, match=f"full/seen.npy: .*{words}"):
        hub.read_seen(root / "full")
    assert any("seen.npy" in problem for problem in hub.verify(root))


def test_a_changed_hash_is_found_by_verify(home, tmp_path):
    root = copied(home, tmp_path)
    file = root / "full/seen.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    (problem,) = hub.verify(root)
    assert "seen.npy: damaged or changed" in problem


def test_licences_of_what_training_starts_from_hold_for_its_result():
    own = {"license_weights": "MIT", "license_data": "CC BY 4.0 (Materials Project)"}
    theta_0 = {"tensors_sha256": "0", "license_weights": "MIT", "license_data": "CHGNet: Modified BSD; NIST"}
    assert train_module.licences(theta_0, own) == {
        "license_weights": "MIT", "license_data": "CC BY 4.0 (Materials Project); NIST; CHGNet: Modified BSD"
    }  # fmt: skip
    assert train_module.licences(theta_0, own | {"license_weights": ""})["license_weights"] == "unknown; MIT"
    strict = theta_0 | {"license_weights": "CC BY-NC 4.0"}
    assert train_module.licences(strict, own)["license_weights"] == "CC BY-NC 4.0; MIT"
    assert train_module.licences({"architecture": {}}, own) == own  # from scratch


# ------------------------------------------------------------------------------------------------------------- compose


def copied(home, tmp_path):
    shutil.copytree(home.hub, tmp_path / "hub")
    return tmp_path / "hub"


def resave(path, extra):
    """The module again, with other extra files."""
    card, adapters = hub.read_card(path), None
    if card["kind"] == "backbone":
        adapters = hub.load_tensors(path, hub.ADAPTERS)
    head = hub.load_tensors(path, hub.HEAD) if hub.HEAD in card["files_sha256"] else None
    hub.save(path, hub.load_tensors(path), card, head, adapters_init=adapters, extra=extra, overwrite=True)


def composed(home, tmp_path, **changes):
    cfg = dict(task="demo_optical_gap", data="demo", hub=str(tmp_path / "hub"), cache=str(home.root / "cache"), limit=30,
               kind="full", bootstrap=0, quiet=True, output=str(tmp_path / "composed"), folds=0)  # fmt: skip
    return compose.run(compose.Config(**cfg | changes))


def test_compose_counts_what_modules_and_theta_0_have_seen_and_keeps_the_union(home, tmp_path):
    root = copied(home, tmp_path)
    crystals = load_crystals(get_task("demo_optical_gap", data="demo"), 30, quiet=True)
    names, cfg = prototypes(crystals), compose.Config(limit=30)
    from data import make_splits

    splits = make_splits(crystals, cfg.split_seed)
    theta = [names[i] for i in [*splits["train"][:4], splits["test"][0]]]
    module = [names[i] for i in [splits["train"][5], splits["val"][0]]]
    resave(root / "backbone", hub.seen_file(theta))
    resave(root / "full", hub.seen_file(module))
    result = composed(home, tmp_path)
    n = lambda seen, part: sum(names[i] in seen for i in splits[part])  # noqa: E731
    assert result["leakage"] == {
        "theta_0": {"train": n(theta, "train"), "test": n(theta, "test")},
        "full": {"train": n(module, "train"), "test": n(module, "test")},
    }
    assert result["leakage"]["theta_0"]["train"] >= 4 and result["leakage"]["theta_0"]["test"] >= 1
    (note,) = [note for note in result["notes"] if note.startswith("seen in training before")]
    assert "of the crystals (22 in train and 4 in test): theta_0 " in note and ", full " in note
    assert hub.seen([tmp_path / "composed"], names).tolist() == [name in {*theta, *module} for name in names]

    folded = composed(home, tmp_path, folds=3, output=str(tmp_path / "folded"))
    total = sum(name in theta for name in names)
    assert folded["leakage"]["theta_0"] == {"train": total, "test": total}  # each row is tested in one of the folds
    of_fold = [json.loads((tmp_path / f"folded/folds/{k}/composition.json").read_text())["leakage"] for k in range(3)]
    assert sum(x["theta_0"]["test"] for x in of_fold) == total
    assert hub.seen([tmp_path / "folded/folds/2"], theta).all()


def test_modules_without_hashes_are_said_to_be_unknown(home, tmp_path):
    root = copied(home, tmp_path)
    result = composed(home, tmp_path)
    assert result["leakage"]["theta_0"] is None and result["leakage"]["full"]["train"] >= 0
    assert any(note.endswith("unknown for theta_0 (no seen.npy)") for note in result["notes"])
    assert hub.seen([tmp_path / "composed"], ["x"]) is None
    resave(root / "full", {})
    result = composed(home, tmp_path, output=str(tmp_path / "none"))
    assert result["leakage"] == {"theta_0": None, "full": None}
    assert "which crystals were seen before is unknown for theta_0, full (no seen.npy)" in result["notes"]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["NaCl", "SrTiO3", "bcc Fe"])
def test_a_supercell_a_rotation_and_a_slight_relaxation_are_the_same_compound(crystals, name, axis):
    Z, pos, cell, _ = crystals[name]
    doubled = cell.copy()
    doubled[axis] *= 2
    twice = np.concatenate([Z, Z]), np.concatenate([pos, pos + cell[axis]]), doubled
    turn = np.linalg.qr(np.random.default_rng(axis).normal(size=(3, 3)))[0]
    noise = np.random.default_rng(0).normal(scale=0.005, size=pos.shape)
    same = [(Z, pos, cell), twice, (Z, pos @ turn, cell @ turn), (Z, (pos + noise) * 1.01, cell * 1.01)]
    assert len({prototype(*s) for s in same}) == 1


def test_other_elements_and_other_structures_are_other_compounds(crystals):
    names = ["NaCl", "SrTiO3", "bcc Fe", "triclinic", "thin"]
    Z, pos, cell, _ = crystals["NaCl"]
    other = [(np.array([19, 17]), pos, cell), (Z, pos, cell @ np.diag([1, 1, 1.3]))]
    assert len({prototype(*s) for s in [*(crystals[n][:3] for n in names), *other]}) == len(names) + 2
