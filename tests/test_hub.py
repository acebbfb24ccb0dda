"""The hub refuses what is damaged, foreign or private by name, and never holds half a module."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hub
import model
from card import all_licences, physical_unit
from files import UserError

ARCHITECTURE = model.preset("tiny")


def tensors(seed=0, width=4):
    g = torch.Generator().manual_seed(seed)
    return {"atom.weight": torch.randn(3, width, generator=g), "atom.bias": torch.randn(width, generator=g),
            "scale": torch.tensor(1.5), "count": torch.arange(2)}


def card(**changes):
    return {"kind": "full", "architecture": ARCHITECTURE, "graph": ARCHITECTURE["graph"],
            "property": "formation energy", "unit": "eV/atom", "transform": "none", "pooling": "mean",
            "normalizer_mean": -1.25, "normalizer_std": 0.5,
            "dataset": "matbench_mp_e_form", "rows_used": 1000, "val_mae": 0.125, "mad": 0.5,
            "elements": [11, 17], "split": "70/15/15", "training": {"lr": 5e-4, "epochs": 80},
            "license_weights": "CC-BY-4.0", **changes}


def make(folder, names=("mp_eform", "mp_gvrh", "jarvis_eform")):
    """A small hub: theta_0 and full modules that start from it."""
    root = folder / "hub"
    theta = hub.save(root / "backbone", tensors(), card(kind="backbone"),
                     adapters_init={"down": torch.zeros(2, 4)})
    for i, name in enumerate(names):
        hub.save(root / name, tensors(i + 1), card(backbone_sha256=theta["tensors_sha256"]),
                 head={"out.weight": torch.ones(1, 4)}, history="epoch,val_mae\n1,0.125\n")
    return root


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Names of what was flushed to the disk, in order; the tests need not wait for the disk."""
    names = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    return names


def flip_byte(file, position=-1):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def edit_card(path, **changes):
    file = path / "module.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(match, function, *args, **kwargs):
    """The call must fail with one line that says `match`."""
    with pytest.raises(UserError, match=match) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def in_child(function, *args):
    """Run function in a process of its own. Returns its exit code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            function(*args)
            os._exit(0)
        except BaseException as error:
            Path(os.environ["SAID"]).write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def run(capsys):
    """run("list", ...) -> exit code, lines of stdout, lines of stderr."""
    def call(*args):
        code = hub.main([*map(str, args)])
        out = capsys.readouterr()
        return code, out.out.splitlines(), out.err.splitlines()

    return call


# ---------------------------------------------------------------- writing and reading back


def test_a_module_comes_back_bit_for_bit_with_its_card(tmp_path):
    mine = card(backbone_sha256="0" * 64, seed=np.int64(3), seconds=np.float32(1.5), parents=None)
    written = hub.save(tmp_path / "mp_eform", tensors(), mine, head={"out": torch.ones(4)},
                       history="epoch\n1\n",
                       extra={"composition.json": {"parents": {"a": "0" * 64}}})
    read = hub.read_card(tmp_path / "mp_eform")
    assert read == written and set(hub.CARD) <= set(read)
    assert {k: read[k] for k in mine} == mine
    assert (read["name"], read["num_parameters"], read["format_version"]) == ("mp_eform", 12 + 4 + 1 + 2, 1)
    for name, t in hub.load_tensors(tmp_path / "mp_eform").items():
        assert t.dtype == tensors()[name].dtype and torch.equal(t, tensors()[name])
    assert torch.equal(hub.load_tensors(tmp_path / "mp_eform", "head.safetensors")["out"], torch.ones(4))
    with hub.open_tensors(tmp_path / "mp_eform") as handle:
        assert torch.equal(handle.get_tensor("scale"), torch.tensor(1.5))
    assert sorted(os.listdir(tmp_path / "mp_eform")) == [
        "README.md", "composition.json", "head.safetensors", "history.csv", "module.json",
        "module.safetensors"]


def test_the_same_module_saved_twice_is_the_same_bytes(tmp_path):
    for root in "a", "b":
        make(tmp_path / root)
    for file in (tmp_path / "a").rglob("*.*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


def test_tied_and_strided_tensors_are_all_stored(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    hub.save(tmp_path / "m", {"w": w, "tied": w, "part": w[1:], "turned": w.T}, card())
    read = hub.load_tensors(tmp_path / "m")
    assert all(torch.equal(read[k], v) for k, v in {"w": w, "tied": w, "part": w[1:], "turned": w.T}.items())


def test_changing_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    root = make(tmp_path)
    hub.load_tensors(root / "mp_eform")["atom.weight"].zero_()
    assert hub.verify(root) == []


def test_files_are_readable_by_those_who_can_read_the_folder(tmp_path):
    old = os.umask(0o027)
    try:
        hub.save(tmp_path / "m", tensors(), card())
    finally:
        os.umask(old)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()} == {0o640}


def test_the_readme_has_the_front_matter_of_the_card(tmp_path):
    hub.save(tmp_path / "m", tensors(), card(parents=["mp_eform", "mp_gvrh"], license_weights="My own"))
    front = (tmp_path / "m" / "README.md").read_text().split("---\n")[1].splitlines()
    assert front == ['license: "other"', 'license_name: "my-own"', 'library_name: "moma"',
                     'tags: ["materials", "crystals", "moma", "gemnet_oc", "full"]',
                     'datasets: ["matbench_mp_e_form"]',
                     'metrics: ["mae"]', 'base_model: ["mp_eform", "mp_gvrh"]']


def test_signature_depends_on_names_shapes_and_dtypes_only(tmp_path):
    one = tensors()
    other_order = dict(reversed(list(tensors(seed=5).items())))
    assert hub.signature(one) == hub.signature(other_order)
    hub.save(tmp_path / "m", one, card())
    assert hub.signature(hub.read_header(tmp_path / "m")) == hub.signature(one)
    changed = [{**one, "scale": one["scale"].double()}, {**one, "scale": torch.ones(1)},
               {**one, "more": torch.ones(1)}]
    assert len({hub.signature(t) for t in [one, *changed]}) == 4


# ---------------------------------------------------------------- names and links


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../out", "a/b", "a..b", ".hidden", "-flag", "mp eform", "é", "a\n", "a" * 101])
def test_names_that_could_leave_the_hub_are_refused(tmp_path, name):
    refused("module name", hub.module_dir, tmp_path / "hub", name)


def test_save_checks_the_name(tmp_path):
    refused("module name '..'", hub.save, tmp_path / "hub" / "..", tensors(), card())
    assert os.listdir(tmp_path) == []


def test_an_upper_case_name_is_told_its_lower_case_form():
    refused("use 'n_seebeck'", hub.check_name, "n_Seebeck")


def test_links_are_refused(tmp_path):
    root = make(tmp_path)
    os.rename(root / "mp_gvrh", tmp_path / "elsewhere")
    (root / "mp_gvrh").symlink_to(tmp_path / "elsewhere")
    refused("mp_gvrh: a link", hub.module_dir, root, "mp_gvrh")
    refused("mp_gvrh: a link", hub.list_modules, root)
    file = root / "mp_eform" / "module.safetensors"
    os.rename(file, tmp_path / "tensors")
    file.symlink_to(tmp_path / "tensors")
    refused("mp_eform/module.safetensors: a link", hub.load_tensors, root / "mp_eform")
    assert len(hub.verify(root)) == 2


def test_a_hub_may_itself_be_a_link(tmp_path):
    make(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "hub")
    assert list(hub.list_modules(tmp_path / "linked")) == ["jarvis_eform", "mp_eform", "mp_gvrh"]


def test_only_theta_0_is_named_backbone(tmp_path):
    refused("backbone/module.json: kind is full, not backbone", hub.save, tmp_path / "backbone", tensors(),
            card())
    refused("m/module.json: kind is backbone, not full or adapter", hub.save, tmp_path / "m", tensors(),
            card(kind="backbone"))


# ---------------------------------------------------------------- refused on writing


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    w = torch.tensor([1.0, bad])
    refused("m/module.safetensors: tensor 'w' has 1 NaN", hub.save, tmp_path / "m", {**tensors(), "w": w},
            card())
    refused("head.safetensors: tensor 'h'", hub.save, tmp_path / "m", tensors(), card(),
            head={"h": torch.tensor(bad)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("private", [
    {"dataset": "/data/alice/x.csv"}, {"dataset": "~/x.csv"}, {"dataset": "C:\\Users\\alice"},
    {"dataset": "../x"},
    {"training": {"data": "/data/x"}}, {"training": ["--data /home/alice/x"]}, {"training": {"/data/x": 1}},
    {"dataset": "file:///x"}, {"dataset": Path("/data/x")}, {"split": {"ids": ["mp-1"]}}, {"labels": [0.5]},
    {"split": list(range(200))}, {"user": "alice"}])
def test_a_card_with_private_values_is_refused(tmp_path, private):
    text = refused("module.json.*leave it out", hub.save, tmp_path / "m", tensors(), card(**private))
    assert next(iter(private)) in text
    assert os.listdir(tmp_path) == []
    refused("composition.json", hub.save, tmp_path / "m", tensors(), card(),
            extra={"composition.json": private})


@pytest.mark.parametrize(
    "value", ["log(1/cm)", "eV/atom", "S / m", "https://doi.org/10.1", "CC BY-NC 4.0 (see a/b)", "n/a", "~5"])
def test_addresses_are_not_taken_for_paths(value):
    hub.check_private({"property": value})


@pytest.mark.parametrize("unit", ["/cm", "mJ /m^2", "1/cm", "W/K/m/s", "log10(/cm)", "/cm/K", "log(1/cm)"])
def test_no_unit_is_taken_for_a_path(tmp_path, unit):
    record = {"tasks": [{"label_unit": unit}]}
    saved = hub.save(tmp_path / "m", tensors(), card(unit=unit, physical_unit=unit, record=record),
                     extra={"composition.json": {"unit": unit}})
    assert hub.read_card(tmp_path / "m") == saved and hub.verify(tmp_path) == []
    refused("looks like a local path", hub.check_private, {"dataset": "/cm"})


@pytest.mark.parametrize("name", ["structures", "rows", "labels", "user"])
def test_a_data_set_may_be_called_as_a_private_field_is(name):
    about = {"rows_train": 80, "references_ev": {"Na": -1.0}, "rows_skipped": 0}
    hub.check_private(card(training={"sets": {name: about}}))
    refused(f"field {name!r} may not be shared", hub.check_private,
            {name: "alice" if name == "user" else {"mp-1": {"a": 1}}})


@pytest.mark.parametrize("changes, match", [
    ({"val_mae": float("nan")}, "null for NaN"), ({"val_mae": "0.1"}, "'val_mae'"),
    ({"architecture": None}, "'architecture'"), ({"training": object()}, "not writable"),
    ({"kind": "half"}, "kind is half, not full or adapter")])
def test_a_card_that_no_reader_would_accept_is_not_written(tmp_path, changes, match):
    refused(match, hub.save, tmp_path / "m", tensors(), card(**changes))
    assert os.listdir(tmp_path) == []


HEADED = {"head": {"out": torch.ones(4)}}  # a module that predicts


@pytest.mark.parametrize("changes, match", [
    ({"normalizer_mean": None}, "normalizer_mean is -, not a number"),
    ({"normalizer_std": None}, "normalizer_std is -"),
    ({"normalizer_std": 0}, "normalizer_std is 0, not a number above 0"),
    ({"normalizer_std": 10**400}, "'normalizer_std' is missing or of the wrong form"),
    ({"normalizer_mean": True}, "'normalizer_mean' is missing or"),
    ({"elements": ["Na"]}, "elements is .*atomic numbers"),
    ({"elements": [0]}, "elements is"), ({"elements": 11}, "'elements'"),
    ({"pooling": "median"}, "mean or sum or max"),
    ({"pooling": None}, "pooling is -"), ({"transform": "sqrt"}, "none or log or"), ({"unit": 5}, "'unit'"),
    ({"parents": [{"tensors_sha256": "0"}]}, "parents is"), ({"record": []}, "'record'"),
    ({"architecture": {}}, "module.json: .*backbone None"), ({"architecture": [1]}, "'architecture'"),
    ({"architecture": {**ARCHITECTURE, "backbone": "nonesuch"}}, "backbone 'nonesuch'.*gemnet_oc, cgcnn"),
    ({"architecture": {**ARCHITECTURE, "num_blocks": 10**6}}, "num_blocks is 1000000"),
    ({"architecture": {**ARCHITECTURE, "num_blocks": "two"}}, "num_blocks is 'two'"),
    ({"architecture": {**ARCHITECTURE, "width": 4}}, "no argument 'width'"),
    ({"architecture": {k: v for k, v in ARCHITECTURE.items() if k != "emb_size_atom"}},
     "lacks 'emb_size_atom'"),
    ({"architecture": {**ARCHITECTURE, "graph": {**ARCHITECTURE["graph"], "cutoff": 1e9}}}, "cutoff is"),
    ({"graph": {}}, "graph is {}, not that of the architecture"),
    ({"training": json.loads('{"a":' * 40 + "1" + "}" * 40)}, "'training'")])
def test_a_card_that_a_stage_would_stumble_over_is_refused_by_every_reader(tmp_path, changes, match):
    if "graph" not in changes:
        changes = {**changes, "graph": None}
    hub.save(tmp_path / "m", tensors(), card(), **HEADED)
    edit_card(tmp_path / "m", **changes)
    assert str(tmp_path / "m" / "module.json") in refused(match, hub.read_card, tmp_path / "m")
    assert [p for p in hub.verify(tmp_path) if "module.json" in p]
    refused(match, hub.save, tmp_path / "new", tensors(), card(**changes), **HEADED)
    assert os.listdir(tmp_path) == ["m"]


def test_a_card_of_nan_is_refused(tmp_path):
    hub.save(tmp_path / "m", tensors(), card(), **HEADED)
    edit_card(tmp_path / "m", normalizer_mean=float("nan"))
    refused("'normalizer_mean' is missing or of the wrong form", hub.read_card, tmp_path / "m")


def test_what_is_only_composed_needs_no_normaliser_and_no_pooling(tmp_path):
    none = dict.fromkeys(["normalizer_mean", "normalizer_std", "pooling", "transform"])
    hub.save(tmp_path / "m", tensors(), card(**none))
    assert hub.verify(tmp_path) == []


def test_a_card_from_before_a_field_existed_is_read_with_null_and_verified(tmp_path):
    hub.save(tmp_path / "m", tensors(), card(), **HEADED)
    file = tmp_path / "m" / "module.json"
    old = json.loads(file.read_text())
    for field in "physical_unit", "record", "author", "version":
        del old[field]
    old["card_sha256"] = hub.card_sha256(old)
    file.write_text(json.dumps(old))
    read = hub.read_card(tmp_path / "m")
    assert (read["physical_unit"], read["record"], read["author"], read["version"]) == (None,) * 4
    assert hub.verify(tmp_path) == []


def test_the_physical_unit_is_never_that_of_the_transformed_label():
    known = {"unit": "log10(GPa)", "physical_unit": "GPa", "transform": "log10"}
    assert physical_unit(known) == "GPa"
    assert physical_unit({**known, "physical_unit": None}) == ""
    assert physical_unit({"unit": "eV", "physical_unit": None, "transform": "none"}) == "eV"


def test_check_card_refuses_before_the_first_epoch_what_save_refuses_after_the_last(tmp_path):
    hub.check_card(card(normalizer_mean=None, normalizer_std=None), tmp_path / "hub" / "m")
    hub.check_card(card(), tmp_path / "runs" / "n_Seebeck", main=hub.MODEL)
    for changes, match in [({"dataset": "/data/alice"}, "local path"), ({"unit": 3}, "'unit'"),
                           ({"user": "alice"}, "'user'"),
                           ({"training": {"a": object()}}, "not writable"), ({"unit": "\udcff"}, "JSON"),
                           ({"val_mae": float("nan")}, "null for NaN"),
                           ({"architecture": {**ARCHITECTURE, "backbone": "x"}}, "'x'")]:
        refused(match, hub.check_card, card(**changes), tmp_path / "hub" / "m")
    for name in "Upper", "..", "a b":
        refused("module name", hub.check_card, card(), tmp_path / "hub" / name)
    refused("only theta_0", hub.check_card, card(), tmp_path / "hub" / "backbone")
    refused("not the name of a folder", hub.check_card, card(), ".", main=hub.MODEL)
    assert os.listdir(tmp_path) == []


def test_the_licences_of_all_count_and_an_edited_module_cannot_free_its_theta_0():
    theta, module = {"license_weights": "CC BY-NC 4.0"}, {"license_weights": "MIT"}
    assert all_licences([module, theta], "license_weights") == "CC BY-NC 4.0; MIT"
    composed = {"license_weights": "CC BY-NC 4.0; MIT"}
    assert all_licences([composed, module, {"license_weights": "CC BY 4.0"}], "license_weights") == (
        "CC BY-NC 4.0; CC BY 4.0; MIT")
    assert all_licences([theta, {"license_weights": None}], "license_weights") == "unknown; CC BY-NC 4.0"


def test_a_module_without_tensors_is_refused(tmp_path):
    refused("m/module.safetensors: no tensors", hub.save, tmp_path / "m", {}, card())


def test_extra_files_stay_in_the_folder(tmp_path):
    for file in "../x.json", "module.json", "last.pt", "history.csv":
        refused("extra files", hub.save, tmp_path / "m", tensors(), card(), extra={file: {}})


# ---------------------------------------------------------------- all or nothing


def test_everything_is_on_the_disk_before_the_module_appears(tmp_path, synced):
    hub.save(tmp_path / "m", tensors(), card(), head={"h": torch.ones(1)}, history="epoch\n")
    files, (part, parent) = synced[:-2], synced[-2:]
    assert sorted(files) == sorted(os.listdir(tmp_path / "m"))
    assert part == f".m.{os.getpid()}.part" and parent == tmp_path.name


@pytest.mark.parametrize("step", ["write_tensors", "write_bytes", "readme", "sync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_in_the_middle_of_save_leaves_what_was_there(tmp_path, monkeypatch, step, overwrite):
    if overwrite:
        hub.save(tmp_path / "m", tensors(1), card())
    place = os if step == "rename" else hub
    original, calls = getattr(place, step), []
    last = {"readme": 1, "rename": 1 + overwrite}.get(step, 2)  # the call that does not return

    def crash(*args, **kwargs):
        calls.append(args)
        if len(calls) == last:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(place, step, crash)
    with pytest.raises(KeyboardInterrupt):
        hub.save(tmp_path / "m", tensors(2), card(), head={"h": torch.ones(1)}, history="epoch\n",
                 overwrite=overwrite)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"] * overwrite
    if overwrite:
        assert torch.equal(hub.load_tensors(tmp_path / "m")["atom.weight"], tensors(1)["atom.weight"])


def test_a_failed_rename_brings_the_old_module_back(tmp_path, monkeypatch):
    hub.save(tmp_path / "m", tensors(1), card())
    rename = os.rename

    def fail(a, b):
        if str(a).endswith(".part"):
            raise OSError(28, "No space left on device")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail)
    refused("m: could not be put in place .No space left", hub.save, tmp_path / "m", tensors(2), card(),
            overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    assert torch.equal(hub.load_tensors(tmp_path / "m")["atom.weight"], tensors(1)["atom.weight"])


def test_a_name_in_use_is_replaced_only_on_request_and_then_as_a_whole(tmp_path):
    hub.save(tmp_path / "m", tensors(1), card(), head={"h": torch.ones(1)}, extra={"composition.json": {}})
    refused("m: exists already", hub.save, tmp_path / "m", tensors(2), card())
    assert torch.equal(hub.load_tensors(tmp_path / "m")["atom.weight"], tensors(1)["atom.weight"])
    hub.save(tmp_path / "m", tensors(2), card(), overwrite=True)
    assert torch.equal(hub.load_tensors(tmp_path / "m")["atom.weight"], tensors(2)["atom.weight"])
    assert sorted(os.listdir(tmp_path / "m")) == ["README.md", "module.json", "module.safetensors"]
    assert os.listdir(tmp_path) == ["m"]


def test_of_two_processes_saving_one_name_the_second_is_refused(tmp_path, monkeypatch):
    written = hub.readme

    def other_was_quicker(card):
        monkeypatch.setattr(hub, "readme", written)
        assert in_child(hub.save, tmp_path / "m", tensors(1), card) == 0
        return written(card)

    monkeypatch.setattr(hub, "readme", other_was_quicker)
    refused("m: could not be put in place", hub.save, tmp_path / "m", tensors(2), card())
    assert os.listdir(tmp_path) == ["m"]
    assert torch.equal(hub.load_tensors(tmp_path / "m")["atom.weight"], tensors(1)["atom.weight"])


def kill_in_rename(number, path, *args, **kwargs):
    """save, in a process that is killed as it renames for the `number`-th time."""
    rename, calls = os.rename, []

    def killed(a, b):
        calls.append(a)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)

    os.rename = killed
    hub.save(path, *args, **kwargs, overwrite=True)


@pytest.mark.parametrize("read", [
    lambda path: hub.load_tensors(path), lambda path: hub.read_card(path),
    lambda path: hub.list_modules(path.parent),
    lambda path: hub.check_place(path, overwrite=True)])
def test_a_kill_between_the_two_renames_loses_no_module(tmp_path, read):
    hub.save(tmp_path / "m", tensors(1), card())
    assert in_child(lambda: kill_in_rename(2, tmp_path / "m", tensors(2), card())) == -signal.SIGKILL
    assert "m" not in os.listdir(tmp_path)
    assert read(tmp_path / "m")
    assert torch.equal(hub.load_tensors(tmp_path / "m")["atom.weight"], tensors(1)["atom.weight"])


def test_leftovers_of_a_kill_are_named_by_verify_and_swept_by_the_next_save(tmp_path):
    hub.save(tmp_path / "m", tensors(1), card())
    assert in_child(lambda: kill_in_rename(1, tmp_path / "m", tensors(2), card())) == -signal.SIGKILL
    left, = hub.verify(tmp_path)
    assert ".part: left by a save that was killed" in left
    hub.save(tmp_path / "m", tensors(3), card(), overwrite=True)
    assert os.listdir(tmp_path) == ["m"] and hub.verify(tmp_path) == []


@pytest.mark.parametrize("limit, extra", [(200, {}), (20_000, {"weights.png": bytes(30_000)})])
def test_a_full_disk_is_one_error_with_the_path_and_nothing_has_changed(tmp_path, monkeypatch, limit, extra):
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    hub.save(tmp_path / "hub" / "m", tensors(1), card())

    def save(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        hub.save(path, tensors(2), card(), extra=extra, overwrite=True)

    for name in "m", "new":
        assert in_child(save, tmp_path / "hub" / name) == 1
        said = (tmp_path / "said").read_text()
        assert said == f"OSError: [Errno 27] File too large: '{tmp_path / 'hub' / name}'"
    assert os.listdir(tmp_path / "hub") == ["m"] and hub.verify(tmp_path / "hub") == []
    assert torch.equal(hub.load_tensors(tmp_path / "hub" / "m")["atom.weight"], tensors(1)["atom.weight"])


def test_an_empty_folder_is_filled_and_one_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    hub.save(tmp_path / "m", tensors(), card())
    for name, files in {"mine": ["notes.txt"], "other": ["module.json"],
                        "deep": ["module.json", "composed/x"]}.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "deep" / "module.json").write_bytes((tmp_path / "m" / "module.json").read_bytes())
    (tmp_path / "file").write_text("text")
    for name in "mine", "other", "deep", "file":
        refused(f"{name}: .* not replaced", hub.save, tmp_path / name, tensors(), card(), overwrite=True)
        refused(f"{name}: .* not replaced", hub.check_place, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").exists() and (tmp_path / "deep" / "composed" / "x").exists()
    assert not hub.check_place(tmp_path / "new") and hub.check_place(tmp_path / "m", overwrite=True)


def test_what_people_put_into_a_modules_folder_is_never_deleted_and_that_is_said_before_training(tmp_path):
    hub.save(tmp_path / "m", tensors(), card(), head={"h": torch.ones(1)}, extra={"composition.json": {}})
    (tmp_path / "m" / "notes.txt").write_text("mine")
    refused("m: holds notes.txt.* not replaced", hub.save, tmp_path / "m", tensors(2), card(), overwrite=True)
    refused("m: holds notes.txt.* not replaced", hub.check_card, card(), tmp_path / "m")
    os.remove(tmp_path / "m" / "notes.txt")
    hub.save(tmp_path / "m", tensors(2), card(), overwrite=True)


def test_a_damaged_module_may_be_replaced(tmp_path):
    hub.save(tmp_path / "m", tensors(), card())
    edit_card(tmp_path / "m", kind="half")
    hub.save(tmp_path / "m", tensors(2), card(), overwrite=True)
    assert hub.verify(tmp_path) == []


# ---------------------------------------------------------------- refused on reading


@pytest.mark.parametrize("file", ["module.safetensors", "head.safetensors"])
def test_one_flipped_byte_is_refused_on_every_load(tmp_path, file):
    path = make(tmp_path) / "mp_eform"
    flip_byte(path / file)
    for load in hub.load_tensors, hub.open_tensors:
        assert "retrain" in refused(f"mp_eform/{file}: damaged or changed", load, path, file)


def test_a_flipped_byte_in_the_header_is_refused(tmp_path):
    path = make(tmp_path) / "mp_eform"
    flip_byte(path / "module.safetensors", 8)
    refused("mp_eform/module.safetensors: damaged", hub.load_tensors, path)
    refused("mp_eform/module.safetensors: not a safetensors file", hub.read_header, path)


def test_missing_files_and_modules_are_named(tmp_path):
    root = make(tmp_path)
    os.remove(root / "mp_eform" / "module.safetensors")
    refused("mp_eform/module.safetensors: missing", hub.load_tensors, root / "mp_eform")
    refused("lists no adapters.safetensors", hub.load_tensors, root / "mp_gvrh", "adapters.safetensors")
    refused("mp_x: no such module", hub.load_tensors, root / "mp_x")
    refused("no such hub", hub.list_modules, tmp_path / "none")


def test_foreign_nan_weights_with_a_matching_hash_are_refused(tmp_path):
    path = make(tmp_path) / "mp_eform"
    hub.save_file({**tensors(), "scale": torch.tensor(float("nan"))}, path / "module.safetensors")
    edit_card(path, tensors_sha256=hub.sha256(path / "module.safetensors"))
    refused("mp_eform/module.safetensors: tensor 'scale' has 1 NaN", hub.load_tensors, path)
    refused("mp_eform/module.safetensors: tensor 'scale' has 1 NaN", hub.open_tensors, path)
    assert refused("scale", hub.load_tensors, path) in hub.verify(path.parent)


@pytest.mark.parametrize("text, match", [
    ("{", "not a card"), ("\xff", "not a card"), ("[" * 100000, "not a card"),
    ("[]", "format_version is -"), ('{"format_version": 2}', "format_version is 2"),
    (json.dumps({"format_version": "x" * 5000}), "format_version is x{80}, not 1"),
    ('{"format_version": 1}', "'name' is missing"), (" " * (2**24 + 1), "16 MiB")])
def test_a_bad_card_is_refused_in_one_line(tmp_path, text, match):
    path = make(tmp_path) / "mp_eform"
    (path / "module.json").write_text(text, encoding="latin-1")
    refused(f"mp_eform/module.json: .*{match}", hub.read_card, path)


def test_a_card_cannot_name_files_outside_its_folder(tmp_path):
    path = make(tmp_path) / "mp_eform"
    edit_card(path, files_sha256={"../mp_gvrh/head.safetensors": "0" * 64})
    refused("module.json: files_sha256 is .*not of files in its folder", hub.read_card, path)


# ---------------------------------------------------------------- compatibility


def test_compatible_modules_pass_without_any_tensor_being_read(tmp_path, monkeypatch):
    root = make(tmp_path)

    class HeaderOnly:
        def __init__(self, *args):
            self.file = opened(*args)

        def __getattr__(self, name):
            assert name in ("keys", "get_slice"), f"{name} reads a tensor"
            return getattr(self.file, name)

        __enter__, __exit__ = (lambda self: self), (lambda self, *args: None)

    opened = hub.safe_open
    monkeypatch.setattr(hub, "safe_open", HeaderOnly)
    monkeypatch.setattr(hub, "sha256", None)
    hub.check_compatible(hub.list_modules(root), root)


@pytest.mark.parametrize("changes, match", [
    ({"kind": "adapter"}, "kind is adapter, but full"),
    ({"graph": None, "architecture": model.preset("tiny", graph={"cutoff": 5.0})},
     "graph.cutoff is 5, but 6"),
    ({"architecture": {**ARCHITECTURE, "num_radial": 8}, "graph": None},
     "architecture.num_radial is 8, but 16"),
    ({"backbone_sha256": "f" * 64}, "backbone_sha256 is fff"), ({"signature": "e" * 64}, "signature is eee")])
def test_the_odd_one_out_is_named_against_the_majority(tmp_path, changes, match):
    root = make(tmp_path)
    edit_card(root / "mp_eform", **changes)
    text = refused(match, hub.check_compatible, hub.list_modules(root))
    assert text.startswith("module mp_eform: ") and "in jarvis_eform and 1 more" in text


def test_a_number_that_another_program_wrote_without_its_point_is_the_same_setting(tmp_path):
    root = make(tmp_path)
    graph = {**ARCHITECTURE["graph"], "cutoff": int(ARCHITECTURE["graph"]["cutoff"])}
    edit_card(root / "mp_eform", graph=graph, architecture={**ARCHITECTURE, "graph": graph})
    hub.check_compatible(hub.list_modules(root), root)


def test_a_foreign_architecture_is_refused_by_its_header_whatever_its_card_says(tmp_path):
    root = make(tmp_path)
    sha = hub.read_card(root / "backbone")["tensors_sha256"]
    hub.save(root / "foreign", tensors(width=8), card(backbone_sha256=sha))
    refused("module foreign: signature", hub.check_compatible, hub.list_modules(root), root)
    edit_card(root / "foreign", signature=hub.read_card(root / "mp_eform")["signature"])
    hub.check_compatible(hub.list_modules(root))
    refused("foreign/module.safetensors: its names", hub.check_compatible, hub.list_modules(root), root)


def test_adapters_must_belong_to_the_theta_0_of_the_hub(tmp_path):
    root = make(tmp_path, names=())
    sha = hub.read_card(root / "backbone")["tensors_sha256"]
    hub.save(root / "a", {"down": torch.ones(2, 4)}, card(kind="adapter", backbone_sha256=sha))
    hub.check_compatible(hub.list_modules(root), root)
    theta = hub.save(root / "backbone", tensors(9), card(kind="backbone"),
                     adapters_init={"down": torch.zeros(2, 4)},
                     overwrite=True)
    refused("a: starts from another theta_0", hub.check_compatible, hub.list_modules(root), root)
    hub.save(root / "b", {"down": torch.ones(3, 4)},
             card(kind="adapter", backbone_sha256=theta["tensors_sha256"]))
    refused("b: its tensors are not those", hub.check_compatible, {"b": hub.read_card(root / "b")}, root)


# ---------------------------------------------------------------- modules as networks


def states(*parts):
    """The tensors of networks, under the names of a fine-tuned run."""
    return {f"{name}.{k}": v for name, part in parts for k, v in part.state_dict().items()}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(1)
    backbone = model.build_backbone(ARCHITECTURE)
    return backbone, model.new_adapters(backbone, seed=2), model.mlp(backbone.width)


@pytest.fixture
def filled(tmp_path, networks):
    """A hub with theta_0, a full module and adapters, and a run of each kind."""
    backbone, adapters, head = networks
    root, initial = tmp_path / "hub", model.new_adapters(backbone)
    theta = hub.save(root / "backbone", backbone.state_dict(), card(kind="backbone"),
                     adapters_init=initial.state_dict())
    start = {"backbone_sha256": theta["tensors_sha256"]}
    hub.save(root / "full", {k: v + 1 for k, v in backbone.state_dict().items()}, card(**start),
             head.state_dict())
    hub.save(root / "adapter", adapters.state_dict(), card(kind="adapter", **start), head.state_dict())
    whole = states(("backbone", backbone), ("head", head))
    hub.save(tmp_path / "runs" / "full", whole, card(**start), main=hub.MODEL)
    whole = states(("backbone", backbone), ("adapters", adapters), ("head", head))
    hub.save(tmp_path / "runs" / "adapter", whole, card(kind="adapter", **start), main=hub.MODEL)
    return tmp_path


def same(part, other, shift=0):
    mine, theirs = part.state_dict(), other.state_dict()
    assert not part.training and mine.keys() == theirs.keys()
    return all(torch.equal(mine[k], theirs[k] + shift) for k in mine)


def test_any_module_comes_back_as_networks_with_its_weights(filled, networks):
    backbone, adapters, head = networks
    theta = hub.load_module(filled / "hub" / "backbone")
    assert same(theta.backbone, backbone) and theta.adapters is theta.head is None
    begin = hub.load_module(filled / "hub" / "backbone", kind="adapter")
    assert same(begin.backbone, backbone) and same(begin.adapters, model.new_adapters(backbone))
    full = hub.load_module(filled / "hub" / "full", kind="adapter")  # the kind is for theta_0
    assert same(full.backbone, backbone, 1) and full.adapters is None and same(full.head, head)
    for path in filled / "hub" / "adapter", filled / "runs" / "adapter":
        adapted = hub.load_module(path)
        assert same(adapted.backbone, backbone) and same(adapted.adapters, adapters)
        assert same(adapted.head, head)
    run = hub.load_module(filled / "runs" / "full")
    assert same(run.backbone, backbone) and run.adapters is None and same(run.head, head)


def test_adapters_find_their_theta_0_beside_them_or_in_the_hub_named_and_no_other(filled):
    shutil.move(filled / "hub" / "adapter", filled / "elsewhere" / "adapter")
    path = filled / "elsewhere" / "adapter"
    assert "give --hub" in refused("adapter: needs its theta_0, but there is no", hub.load_module, path)
    assert hub.load_module(path, filled / "hub").adapters is not None
    theta = hub.read_card(filled / "hub" / "backbone")
    hub.save(filled / "other" / "backbone", {"w": torch.ones(1)}, {**theta, "parents": None})
    refused("adapter: starts from another theta_0 than .*other/backbone", hub.load_module, path,
            filled / "other")


def test_tensors_of_another_architecture_are_named(filled, tmp_path):
    hub.save(tmp_path / "m", tensors(), card())
    refused("m/module.safetensors: tensor atom.bias is .*, the model has none", hub.load_module,
            tmp_path / "m")
    layer = torch.nn.Linear(2, 3)
    refused("here: tensor bias is missing, the model has", hub.load_tensors_into, layer,
            {"weight": torch.ones(3, 2)}, "here")
    wrong = {"bias": torch.ones(3), "weight": torch.ones(2, 3)}
    refused("here: tensor weight is .2, 3., the model has .3, 2.", hub.load_tensors_into, layer, wrong,
            "here")


def test_a_run_is_written_and_verified_as_a_module_is_but_may_keep_its_ids(tmp_path, networks):
    whole, path = states(("head", networks[2])), tmp_path / "runs" / "dielectric"
    results = {"metrics.json": {"test_mae": 0.5},
               "splits.json": b"[%s]" % b",".join(b"%d" % i for i in range(200)),
               "config.json": b'{"data": "/data/alice"}', "predictions_test.csv": b"id,target\nmp-1,1\n",
               "parity.png": b"PNG"}
    written = hub.save(path, whole, card(), history="epoch\n1\n", extra=results, main=hub.MODEL)
    assert sorted(os.listdir(path)) == sorted([*results, "README.md", "history.csv", "model.safetensors",
                                               "module.json"])
    assert all((path / name).read_bytes() == x for name, x in results.items() if isinstance(x, bytes))
    assert results.keys() < written["files_sha256"].keys() and hub.read_card(path) == written
    assert hub.verify(path.parent, [path.name]) == []
    flip_byte(path / "parity.png")
    assert len(hub.verify(path.parent)) == 1
    refused("parity.png: damaged", hub.checked_file, path, "parity.png")
    refused("metrics.json: .*local path", hub.save, path, whole, card(),
            extra={"metrics.json": {"a": "/data/x"}},
            main=hub.MODEL, overwrite=True)
    refused("normalizer_std", hub.save, path, whole, card(normalizer_std=None), main=hub.MODEL,
            overwrite=True)
    refused("exists already", hub.save, path, whole, card(), main=hub.MODEL)
    hub.save(path.with_name("n_Seebeck"), whole, card(), main=hub.MODEL)  # a run may be called as its task is
    hub.save(path, whole, card(), main=hub.MODEL, overwrite=True)
    assert sorted(os.listdir(path)) == ["README.md", "model.safetensors", "module.json"]


# ---------------------------------------------------------------- verify and the CLI


def test_verify_names_every_problem(tmp_path):
    root = make(tmp_path)
    assert hub.verify(root) == []
    flip_byte(root / "mp_eform" / "head.safetensors")
    (root / "mp_eform" / "history.csv").write_text("epoch\n")
    (root / "mp_eform" / "last.pt").write_bytes(b"")
    os.remove(root / "mp_gvrh" / "README.md")
    edit_card(root / "mp_gvrh", backbone_sha256="f" * 64, dataset="/data/alice")
    shutil.copytree(root / "jarvis_eform", root / "copy")
    (root / "empty").mkdir()
    (root / ".m.999999999.part").mkdir()
    starts = [
        "copy: the card's name is 'jarvis_eform'",
        "empty/module.json: missing",
        "mp_eform/head.safetensors: damaged",
        "mp_eform/history.csv: damaged",
        "mp_eform/last.pt: not listed",
        "mp_gvrh/module.json: dataset: '/data/alice'",
        "mp_gvrh/README.md: missing",
        "mp_gvrh/module.json: damaged or edited",
        "mp_gvrh: starts from another theta_0",
        ".m.999999999.part: left by a save",
    ]
    found = [p.removeprefix(f"{root}/") for p in hub.verify(root)]
    assert [p[: len(s)] for p, s in zip(found, starts, strict=True)] == starts
    assert len(hub.verify(root, ["jarvis_eform"])) == 1  # the left-over only


@pytest.mark.parametrize("file", ["module.safetensors", "head.safetensors", "module.json", "history.csv"])
def test_verify_finds_any_flipped_byte(tmp_path, file):
    root = make(tmp_path, names=["m"])
    size = (root / "m" / file).stat().st_size
    for position in range(0, size, max(1, size // 30)):
        flip_byte(root / "m" / file, position)
        assert hub.verify(root), position
        flip_byte(root / "m" / file, position)
    assert hub.verify(root) == []


def test_a_module_copied_alone_is_verified_and_what_could_not_be_checked_is_said(tmp_path, run):
    root = make(tmp_path)
    shutil.copytree(root / "mp_eform", tmp_path / "alone" / "mp_eform")
    code, lines, err = run("verify", "mp_eform", "--hub", tmp_path / "alone")
    assert (code, err, len(lines)) == (0, [], 2)
    assert "all in order" in lines[0] and "no backbone, so not checked" in lines[1]
    flip_byte(tmp_path / "alone" / "mp_eform" / "module.safetensors")
    assert run("verify", "--hub", tmp_path / "alone")[0] == 1
    code, _, err = run("verify", "--hub", tmp_path / "alone" / "mp_eform")
    assert code == 2 and "the folder of one module, not a hub" in err[0]


def test_list_prints_one_row_a_module(tmp_path, run):
    code, rows, err = run("list", "--hub", make(tmp_path))
    assert (code, err, len(rows)) == (0, [], 5)
    assert rows[0].split() == ["name", "property", "unit", "kind", "rows", "val", "MAE", "MAE/MAD", "size"]
    assert rows[3].split()[:-2] == ["mp_eform", "formation", "energy", "eV/atom", "full", "1000", "0.125",
                                    "0.25"]


def test_list_goes_on_past_a_broken_card_and_exits_1(tmp_path, run):
    root = make(tmp_path)
    (root / "mp_eform" / "module.json").write_text("{")
    code, rows, err = run("list", "--hub", root)
    assert (code, len(rows), len(err)) == (1, 4, 1) and "mp_eform/module.json" in err[0]


def test_show_prints_the_card_one_line_a_field(tmp_path, run):
    root = make(tmp_path)
    edit_card(root / "mp_eform", property="a\x1b[2J\nb")
    code, rows, err = run("show", "mp_eform", "--hub", root)
    assert (code, err) == (0, []) and "property            a?[2J?b" in rows
    assert [row.split()[0] for row in rows[len(hub.CARD):]] == sorted(os.listdir(root / "mp_eform"))


def test_verify_exits_1_and_names_what_is_wrong(tmp_path, run):
    root = make(tmp_path)
    assert run("verify", "--hub", root) == (0, [f"{root}: all in order"], [])
    flip_byte(root / "mp_eform" / "module.safetensors")
    code, rows, err = run("verify", "--hub", root)
    assert (code, len(rows), err) == (1, 1, []) and "mp_eform/module.safetensors: damaged" in rows[0]
    assert run("verify", "mp_gvrh", "--hub", root)[0] == 0


@pytest.mark.parametrize("args", [["list"], ["show"], ["show", "../x"], ["show", "none"], ["verify", "none"],
                                  ["lst"],
                                  [], ["list", "--what"], ["list", "--hub", "none"]])
def test_wrong_input_is_one_line_on_stderr_and_exit_2(tmp_path, args, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    if args != ["list"]:
        make(tmp_path)
    code, out, err = run(*args)
    assert (code, out, len(err)) == (2, [], 1)


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        hub.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 100


def test_the_command_ends_with_the_exit_code(tmp_path):
    command = [sys.executable, hub.__file__, "verify", "--hub", tmp_path / "no"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert (out.returncode, out.stdout, len(out.stderr.splitlines())) == (2, "", 1)


# ---------------------------------------------------------------- for people


def test_the_readme_of_a_hub_is_its_table(tmp_path, run):
    root = make(tmp_path)
    hub.save(root / "mp_gvrh", tensors(), card(author="A. Author", license_data="CC BY 4.0 (Materials Project)",
             backbone_sha256=hub.read_card(root / "backbone")["tensors_sha256"]), overwrite=True)
    code, out, err = run("readme", "--hub", root)
    assert (code, err) == (0, []) and out[0] == "# A hub of MoMa modules" and out[2].startswith("3 modules")
    head, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out if line.startswith("|")]
    assert [row[0].split("]")[0][1:] for row in rows] == ["backbone", "jarvis_eform", "mp_eform", "mp_gvrh"]
    found = dict(zip(head, rows[-1], strict=True))
    assert {k: found[k] for k in ("property", "rows", "unit", "val MAE", "MAE/MAD", "kind", "author")} == {
        "property": "formation energy", "rows": "1000", "unit": "eV/atom", "val MAE": "0.125", "MAE/MAD": "0.25",
        "kind": "full", "author": "A. Author"}
    assert found["licence of the data"] == "CC BY 4.0 (Materials Project)"
    assert any("python hub.py verify" in line for line in out)
    (root / "README.md").write_text("\n".join(out))
    assert hub.verify(root) == [] and list(hub.list_modules(root)) == ["jarvis_eform", "mp_eform", "mp_gvrh"]


def test_the_readme_of_a_module_begins_with_what_a_person_asks_first(tmp_path):
    about = card(author="A. Author", license_data="CC BY 4.0", split={"train": 700, "val": 150, "test": 150})
    hub.save(tmp_path / "m", tensors(), about)
    text = (tmp_path / "m" / "README.md").read_text()
    for line in ["| property | formation energy |", "| rows | 1000 (train 700, val 150, test 150) |",
                 "| validation MAE | 0.125 eV/atom |", "| MAE/MAD (1: no better than the mean) | 0.25 |",
                 "| licence of the data | CC BY 4.0 |", "| author of the weights | A. Author |",
                 "| licence of the weights | CC-BY-4.0 |", "| trained from | backbone |"]:
        assert line in text.split("| field | value |")[0].splitlines(), line
    hub.save(tmp_path / "bare", tensors(), card(val_mae=None, mad=None, parents=["m"], rows_used=None))
    text = (tmp_path / "bare" / "README.md").read_text()
    assert "validation MAE" not in text and "| merged from | m |" in text and "| author of the weights | unknown |" in text


SHIPPED = Path(__file__).resolve().parents[1] / "hub"


@pytest.mark.skipif(not (SHIPPED / "backbone").is_dir(), reason="no hub beside the code")
def test_the_hub_beside_the_code_is_in_order():
    assert hub.verify(SHIPPED) == []
    cards = hub.list_modules(SHIPPED)
    for kind in {card["kind"] for card in cards.values()}:
        hub.check_compatible({name: card for name, card in cards.items() if card["kind"] == kind}, SHIPPED)
