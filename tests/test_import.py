"""Published weights come into a hub whole, or not at all and with one line that says why.

The files are made by `published.py`: the published structure with our own values.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
import hub
import import_published
import model as moma
from tasks import TASKS, unit_of
import parity
import published

TINY = moma.preset("base", **published.NARROW, graph={"graph_rule": "published"}) | {"preset": "custom"}
DENSE = "backbone.int_blocks.1.dense_ca.linear.weight"


@pytest.fixture(scope="module")
def checkpoint():
    return published.jmp_checkpoint(TINY)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder of the 18 files, and what is in them."""
    folder = tmp_path_factory.mktemp("released")
    contents = {}
    for i, name in enumerate(import_published.MOMA):
        contents[name] = published.moma_checkpoint(TINY, seed=i, prefix="module." * (1 + i % 2))
        torch.save(contents[name], folder / f"{name}.pt")
    return folder, contents


@pytest.fixture
def run(tmp_path, capsys):
    """run(path, ...) with --hub tmp_path/hub -> exit code, stdout, stderr."""
    def call(*args):
        code = import_published.main([*map(str, args), "--hub", str(tmp_path / "hub")])
        return code, *capsys.readouterr()

    return call


def saved(tmp_path, checkpoint, **changes):
    """The checkpoint as a file. changes: keys of its state dict, to another value or to None (left out)."""
    state = checkpoint["state_dict"] | changes
    path = tmp_path / "jmp.pt"
    torch.save(checkpoint | {"state_dict": {k: v for k, v in state.items() if v is not None}}, path)
    return path


def refused(run, *args):
    """The command must write nothing, exit 2 and say why in one line, which is returned."""
    code, out, err = run(*args)
    assert code == 2 and not out and err.count("\n") == 1 and "Traceback" not in err, (code, out, err)
    return err


# ---------------------------------------------------------------- a backbone


def test_a_checkpoint_becomes_theta_0_with_its_averaged_weights(run, checkpoint, tmp_path):
    path = saved(tmp_path, checkpoint)
    code, out, err = run(path, "--name", "jmp-x")
    assert (code, err) == (0, "")
    module = hub.load_module(
        tmp_path / "hub" / "backbone", kind="adapter"
    )  # all names and shapes must fit the card's
    theta, card = module.backbone, module.card
    assert card["source"] == "jmp-x" and card["source_sha256"] == hub.sha256(path) and hub.sha256(path) in out
    named = dict(published.random_model(TINY | {"forces": True}).named_parameters())
    order = [n for n in named if n.startswith("backbone.")]
    ema = dict(zip(order, checkpoint["optimizer_states"][0]["ema"]))
    raw, _ = import_published.rename_published(checkpoint["state_dict"])
    for name, t in theta.state_dict().items():
        assert torch.equal(t, ema.get(f"backbone.{name}", raw[f"backbone.{name}"])), name
    assert not torch.equal(theta.embedding.weight, raw["backbone.embedding.weight"])
    assert hub.verify(tmp_path / "hub") == []
    assert card["graph"] == vars(data.GraphConfig(graph_rule="published")) and card["architecture"] == TINY
    assert card["license_weights"] == "CC BY-NC 4.0" and card["dataset"] == ", ".join(published.TASKS)
    assert "license: \"cc-by-nc-4.0\"" in (tmp_path / "hub/backbone/README.md").read_text()
    fresh = moma.new_adapters(theta).state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in module.adapters.state_dict().items())


def test_every_key_is_counted_once(run, checkpoint, tmp_path):
    _, out, _ = run(saved(tmp_path, checkpoint))
    used = int(out.split("used: ")[1].split()[0])
    ignored = [part.split(" ", 1) for part in out.split("ignored: ")[1].splitlines()[0].split(", ")]
    assert used + sum(int(n) for n, _ in ignored) == len(checkpoint["state_dict"])
    assert {group for _, group in ignored} == {"force branch", "repeated layers", "repeated radial bases",
                                               "pre-training heads", "metric states"}  # fmt: skip


def test_raw_weights_and_forces_on_request(run, checkpoint, tmp_path):
    assert run(saved(tmp_path, checkpoint), "--no-ema", "--keep-forces")[0] == 0
    module = hub.load_module(tmp_path / "hub" / "backbone")
    theta, card = module.backbone, module.card
    raw, _ = import_published.rename_published(checkpoint["state_dict"])
    ours = {f"backbone.{n}": t for n, t in theta.state_dict().items()}
    assert card["architecture"]["forces"] and card["training"] == {"weights": "raw"}
    assert ours.keys() == {n for n in raw if n.startswith("backbone.")}
    assert all(torch.equal(t, raw[n]) for n, t in ours.items())


def test_half_precision_is_stored_as_single(run, checkpoint, tmp_path):
    half = {k: t.half() for k, t in checkpoint["state_dict"].items()}
    assert run(saved(tmp_path, checkpoint, **half), "--no-ema")[0] == 0
    tensors = hub.load_tensors(tmp_path / "hub/backbone")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["embedding.weight"], half["embedding.atom_embedding.weight"].float())


@pytest.mark.parametrize(("changes", "said"), [
    ({DENSE: None}, DENSE),
    ({"embedding.atom_embedding.weight": None}, "embedding.atom_embedding.weight"),
    ({DENSE: None, DENSE + "s": torch.ones(12, 12)}, f"1 unexpected: {DENSE}s; 1 missing: {DENSE}"),
    ({DENSE: torch.ones(12, 11)}, f"{DENSE} (12, 11), not (12, 12)"),
    ({DENSE: torch.ones(12, 12, dtype=torch.int64)}, f"not real numbers: {DENSE}"),
    ({DENSE: "text"}, f"not real numbers: {DENSE}"),
    ({"optimizer.step": torch.ones(1)}, "1 unexpected: optimizer.step"),
    ({"backbone.embedding.weight": torch.ones(120, 8)}, "1 unexpected: backbone.embedding.weight"),
    ({"backbone.out_blocks.9.seq_energy_pre.0.linear.weight": torch.ones(1)}, "out_blocks.9.seq_energy_pre"),
    ({"a\nb": torch.ones(1)}, "1 unexpected: a?b"),
    ({DENSE: torch.full((12, 12), torch.nan)}, f"{DENSE!r} has 144 NaN"),
    ({"backbone.int_blocks.0.atom_update.scale_sum.scale_factor": torch.tensor(torch.inf)},
     "scale_factor' has 1 NaN"),
    ({"output.module_dict.y.0.weight": torch.ones(8, 8)}, "with --released-moma"),
    ({k: torch.ones(1).expand(5) for k in ["x.y"]}, "unexpected: x.y"),
])  # fmt: skip
def test_wrong_keys_and_values_are_refused_by_name(run, checkpoint, tmp_path, changes, said):
    err = refused(run, saved(tmp_path, checkpoint, **changes))
    assert said in err and "jmp.pt" in err
    assert not (tmp_path / "hub/backbone").exists()


def test_widths_are_read_by_majority_so_the_odd_tensor_is_named(run, checkpoint, tmp_path):
    for key, t in checkpoint["state_dict"].items():
        wrong = import_published.place(key)[0] == "backbone" and t.dim() == 2 and ".int_blocks.0." in key
        if wrong and key.endswith(("dense_ca.linear.weight", "before_skip.0.dense_mlp.1.linear.weight")):
            err = refused(run, saved(tmp_path, checkpoint, **{key: torch.ones(len(t) + 1, t.shape[1])}))
            assert f"(1 of other shape: {key} " in err, err


def test_a_copy_that_is_none_is_mentioned(run, checkpoint, tmp_path):
    key = "backbone.bases.radial_basis_aint.rbf.temps"
    code, _, err = run(saved(tmp_path, checkpoint, **{key: torch.zeros(8)}))
    assert code == 0 and key in err and err.count("\n") == 1


def test_ema_that_does_not_fit_is_refused(run, checkpoint, tmp_path):
    ema = checkpoint["optimizer_states"][0]["ema"]
    for other, said in [({"optimizer_states": []}, "no EMA"),
                        ({"optimizer_states": [{"ema": ema[:-1]}]}, "EMA weights for"),
                        ({"optimizer_states": [{"ema": ema[1:] + ema[:1]}]}, "EMA weight 0 "),
                        ({"optimizer_states": [{"ema": dict(enumerate(ema))}]},
                         "EMA weight 0 ")]:  # fmt: skip
        err = refused(run, saved(tmp_path, checkpoint | other))
        assert said in err and "--no-ema" in err
    bad = tuple(torch.full_like(t, torch.nan) if i == 1 else t for i, t in enumerate(ema))
    assert "NaN" in refused(run, saved(tmp_path, checkpoint | {"optimizer_states": [{"ema": bad}]}))


def test_ema_in_another_order_is_noticed(run, checkpoint, tmp_path):
    ema = list(checkpoint["optimizer_states"][0]["ema"])
    i, j = [i for i, t in enumerate(ema) if t.shape == (12, 12)][:2]
    ema[i], ema[j] = ema[j], ema[i]
    _, _, err = run(saved(tmp_path, checkpoint | {"optimizer_states": [{"ema": tuple(ema)}]}))
    assert "is unlike its raw weight" in err and "--no-ema" in err


class Surprise:
    """Unpickling one writes a file."""

    def __reduce__(self):
        return exec, ("import pathlib, os; pathlib.Path(os.environ['SURPRISE']).touch()",)


def test_pickled_objects_are_refused_by_name_until_trusted(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SURPRISE", str(tmp_path / "ran"))
    err = refused(run, saved(tmp_path, checkpoint | {"callbacks": Surprise()}))
    assert "pickled builtins.exec" in err or "exec" in err
    assert "--trust-pickle" in err and not (tmp_path / "ran").exists()
    err = refused(run, saved(tmp_path, checkpoint | {"hyper_parameters": argparse.Namespace(lr=1.0)}))
    assert "pickled argparse.Namespace" in err
    code, _, err = run(tmp_path / "jmp.pt", "--trust-pickle")
    assert code == 0 and "may run any code" in err and (tmp_path / "hub/backbone").exists()


def test_trusted_objects_of_a_missing_package_are_skipped(run, checkpoint, tmp_path, monkeypatch):
    Config = type("Config", (), {"__module__": "absent_package", "__qualname__": "Config"})
    package = type(sys)("absent_package")
    package.Config = Config
    monkeypatch.setitem(sys.modules, "absent_package", package)
    config = Config()
    config.path = "somewhere"
    path = saved(tmp_path, checkpoint | {"hyper_parameters": config})
    monkeypatch.delitem(sys.modules, "absent_package")
    assert "absent_package.Config" in refused(run, path)
    assert run(path, "--trust-pickle")[0] == 0


def test_other_files_are_refused(run, checkpoint, tmp_path):
    path = saved(tmp_path, checkpoint)
    whole = path.read_bytes()
    assert "no such file" in refused(run, tmp_path / "absent.pt")
    for n in (0, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:n])
        assert "cut off" in refused(run, path)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert "not a zip file" in refused(run, path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"garbage")
        z.writestr("archive/version", b"3")
    assert "not readable" in refused(run, path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a", b"b")
    assert "not readable" in refused(run, path)
    torch.save([1, 2], path)
    assert "has no 'state_dict' but list" in refused(run, path)
    torch.save({"model": {}}, path)
    assert "has no 'state_dict' but model" in refused(run, path)
    torch.save({"state_dict": {}}, path)
    assert "missing" in refused(run, path)
    assert not (tmp_path / "hub").exists()


def test_weights_with_flipped_bits_are_never_imported(checkpoint, tmp_path):
    path = saved(tmp_path, checkpoint)
    whole = path.read_bytes()
    refusals = 0
    for position in range(7, len(whole), len(whole) // 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            state = import_published.read_checkpoint(path)["state_dict"]
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
        else:  # a bit between the members
            assert all(torch.equal(state[k], t) for k, t in checkpoint["state_dict"].items())
    assert refusals > 30


def test_a_zip_bomb_is_refused_before_it_is_unpacked(run, checkpoint, tmp_path, monkeypatch):
    path = saved(tmp_path, checkpoint)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("jmp/data/9999", bytes(2**24))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    assert "jmp.pt: compressed" in refused(run, path)


def test_the_graph_rule_is_the_published_one_unless_ours_is_asked_for(run, modules, checkpoint, tmp_path):
    path, one = saved(tmp_path, checkpoint), (modules[0], "mp_eform", "--released-moma")
    assert run(path)[0] == 0 and run(*one)[0] == 0
    for name in "backbone", "mp_eform":
        card = hub.read_card(tmp_path / "hub" / name)
        assert card["graph"]["graph_rule"] == card["architecture"]["graph"]["graph_rule"] == "published"
    ours = ("--graph-rule", "symmetric", "--hub", tmp_path / "ours")
    assert import_published.main([*map(str, (path, *ours))]) == 0
    assert hub.read_card(tmp_path / "ours" / "backbone")["graph"]["graph_rule"] == "symmetric"
    assert import_published.main([*map(str, (*one, "--hub", tmp_path / "ours"))]) == 2  # the two do not mix
    assert import_published.main([*map(str, (*one, *ours))]) == 0
    (tmp_path / "hub" / "backbone").rename(tmp_path / "away")
    assert "holds another module, or one of another --graph-rule" in run(*one, "--graph-rule", "symmetric")[2]
    assert hub.verify(tmp_path / "ours") == []


def test_an_existing_backbone_stays(run, checkpoint, tmp_path):
    path = saved(tmp_path, checkpoint)
    assert run(path)[0] == 0
    before = (tmp_path / "hub/backbone/module.json").read_bytes()
    assert "exists already" in refused(run, path)
    assert (tmp_path / "hub/backbone/module.json").read_bytes() == before


def test_usage_errors_take_one_line(run, tmp_path):
    assert "--help" in refused(run)
    assert "no such folder" in refused(run, tmp_path / "absent", "--released-moma")
    assert "no EMA" in refused(run, tmp_path, "--released-moma", "--no-ema")
    assert "module name" in refused(run, tmp_path / "x.pt", "--name", "../x")


def test_help_fits_a_screen_and_says_what_trust_risks(capsys):
    with pytest.raises(SystemExit):
        import_published.main(["--help"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 50 and max(map(len, out.splitlines())) <= 100
    assert "RUNS ANY CODE" in out and "CC BY-NC 4.0" in out


# ---------------------------------------------------------------- released modules


def test_the_released_modules_become_a_hub(run, modules, tmp_path):
    folder, contents = modules
    code, out, err = run(folder, "--released-moma")
    assert (code, err) == (0, "")
    cards = hub.list_modules(tmp_path / "hub")
    assert list(cards) == sorted(n.lower() for n in import_published.MOMA) and len(cards) == 18
    hub.check_compatible(cards, tmp_path / "hub")
    assert {c["backbone_sha256"] for c in cards.values()} == {import_published.DECLARED}
    for name, content in contents.items():
        card, task = cards[name.lower()], TASKS[name]
        assert (card["property"], card["transform"], card["pooling"]) == (name, task.transform, "mean")
        assert card["unit"] == unit_of(task) and task.role == "hub"
        assert (card["normalizer_mean"], card["normalizer_std"]) == import_published.MOMA[name]
        assert card["license_weights"] == "CC BY-NC-SA 4.0"
        assert card["source_sha256"] == hub.sha256(folder / f"{name}.pt")
        raw, _ = import_published.rename_published(content["state_dict"])
        tensors = hub.load_tensors(tmp_path / "hub" / name.lower())
        assert tensors.keys() == moma.build_backbone(TINY).state_dict().keys()
        assert all(torch.equal(t, raw[f"backbone.{n}"]) for n, t in tensors.items())
        head = hub.load_tensors(tmp_path / "hub" / name.lower(), "head.safetensors")
        hub.load_tensors_into(moma.mlp(TINY["emb_size_atom"]), head, name)
        last = [t for k, t in content["state_dict"].items() if k.endswith("module_dict.y.8.weight")]
        assert torch.equal(head["8.weight"], last[0])
    assert "cc-by-nc-sa-4.0" in (tmp_path / "hub/mp_eform/README.md").read_text()
    assert out.count("SHA-256") == 18 and run(folder, "--released-moma")[1].count("imported already") == 18


def test_modules_and_their_theta_0_agree_in_either_order(run, modules, checkpoint, tmp_path):
    path, two = saved(tmp_path, checkpoint), (modules[0], "mp_eform", "n_seebeck", "--released-moma")
    for order in (((path,), two), (two, (path,))):
        for command in order:
            assert run(*command)[0] == 0
        cards = hub.list_modules(tmp_path / "hub")
        assert list(cards) == ["mp_eform", "n_seebeck"]
        hub.check_compatible(cards, tmp_path / "hub")
        theta = hub.read_card(tmp_path / "hub/backbone")
        assert {c["backbone_sha256"] for c in cards.values()} == {theta["tensors_sha256"]}
        assert hub.verify(tmp_path / "hub") == []
        (tmp_path / "hub").rename(tmp_path / f"hub{len(list(tmp_path.iterdir()))}")


def test_modules_and_a_theta_0_of_other_sizes_do_not_mix(run, modules, checkpoint, tmp_path, capsys):
    path, two = saved(tmp_path, checkpoint), (modules[0], "mp_eform", "mp_gvrh", "--released-moma")
    assert run(path, "--keep-forces")[0] == 0
    assert "not an imported JMP of these sizes" in refused(run, *two)
    (tmp_path / "hub").rename(tmp_path / "old")
    assert run(*two)[0] == 0
    assert "has other tensors" in refused(run, path, "--keep-forces")
    card = hub.read_card(tmp_path / "old/backbone") | {
        "architecture": TINY
    }  # the right sizes, but trained here
    tensors, _ = import_published.rename_published(modules[1]["mp_eform"]["state_dict"])
    tensors = {n.removeprefix("backbone."): t for n, t in tensors.items()}
    hub.save(
        tmp_path / "own/backbone", tensors, {k: v for k, v in card.items() if not k.startswith("source")}
    )
    code = import_published.main([str(two[0]), "mp_eform", "--released-moma", "--hub", str(tmp_path / "own")])
    assert code == 2 and "not an imported JMP" in capsys.readouterr().err


def test_missing_stray_and_odd_modules_are_named(run, modules, checkpoint, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for name in list(import_published.MOMA)[:3]:
        (folder / f"{name}.pt").write_bytes((modules[0] / f"{name}.pt").read_bytes())
    assert "has no mp_kvrh.pt, n_e_cond.pt, p_e_cond.pt and 12 more" in refused(
        run, folder, "--released-moma"
    )
    assert "other_task: not a released module" in refused(run, folder, "other_task", "--released-moma")
    torch.save(published.moma_checkpoint(TINY | {"emb_size_edge": 13}), folder / "mp_gvrh.pt")
    err = refused(run, folder, "mp_eform", "mp_bandgap", "mp_gvrh", "--released-moma")
    assert "module mp_gvrh: architecture.emb_size_edge is 13, but 12 in mp_eform and 1 more" in err
    torch.save(checkpoint, folder / "mp_gvrh.pt")
    assert "without --released-moma" in refused(run, folder, "mp_gvrh", "--released-moma")
    assert not (tmp_path / "hub").exists()
    (folder / "notes.pt").touch()
    assert "notes: not a released module" in refused(run, folder, "--released-moma")


def test_a_head_of_another_form_is_left_out_aloud(run, modules, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    content = modules[1]["mp_eform"]
    state = {k: v for k, v in content["state_dict"].items() if not k.endswith(("y.2.weight", "y.2.bias"))}
    torch.save({"state_dict": state}, folder / "mp_eform.pt")
    code, out, err = run(folder, "mp_eform", "--released-moma")
    assert code == 0 and "head has other layers" in err and "7 task head" in out
    assert not (tmp_path / "hub/mp_eform/head.safetensors").exists()
    hub.check_compatible(hub.list_modules(tmp_path / "hub"), tmp_path / "hub")


# ---------------------------------------------------------------- sizes, structure and parity


@pytest.mark.parametrize(("preset", "listed"), [("base", "JMP-S"), ("large", "JMP-L")])
def test_the_files_made_here_have_the_listed_keys(preset, listed):
    path = Path(__file__).resolve().parents[2] / "shared/reference/gemnet_oc_state_dict.json"
    if not path.is_file():
        pytest.skip("../shared/reference/gemnet_oc_state_dict.json is not here")
    listed = json.loads(path.read_text())[listed]
    model = published.skeleton(json.dumps(moma.preset(preset, forces=True)), published.TASKS)
    state = published.published_state(model)
    assert {k: list(t.shape) for k, t in state.items()} == {k["key"]: k["shape"] for k in listed["keys"]}
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    _, keys = import_published.rename_published(state, published.TASKS)
    assert [keys[names[id(p)]] for p in model.parameters()] == listed["parameter_order"]
    assert sum(p.numel() for p in model.parameters()) == listed["parameter_counts"]["all"]
    divisors = {f"backbone.{k}": v for k, v in model.backbone.shared_gradient_divisors().items()}
    assert divisors == listed["gradient_divisors_for_shared_parameters"]


def test_presets_and_other_sizes_are_recognised():
    tiny = moma.preset("base", **published.NARROW) | {"preset": "custom"}
    for arch in (moma.preset("base"), moma.preset("large"), moma.preset("base", forces=True), tiny,
                 tiny | {"emb_size_edge": tiny["emb_size_atom"]}):  # fmt: skip
        assert import_published.architecture_of(import_published.shapes_of(json.dumps(arch))) == arch
    arch = moma.preset("base", quad_interaction=False, graph={"qint": False})
    assert import_published.architecture_of(import_published.shapes_of(json.dumps(arch))) == arch | {
        "preset": "custom"
    }


def test_full_size_jmp_s_in_little_memory(tmp_path):
    """44 M numbers, twice; the import holds about one model. The peak is printed, and bounded loosely."""
    torch.save(published.jmp_checkpoint(moma.preset("base")), tmp_path / "jmp-s.pt")
    peak = (
        "[int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0]"
    )
    script = f"import import_published, torch._refs; a = {peak}; code = import_published.main()\n"
    script += f"print('MiB', a, {peak}); exit(code)"
    command = [sys.executable, "-c", script, "jmp-s.pt", "--name", "jmp-s", "--hub", "hub"]
    env = {"PYTHONPATH": str(Path(hub.__file__).parent), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    before, after = map(int, done.stdout.splitlines()[-1].split()[1:])
    card = hub.read_card(tmp_path / "hub/backbone")
    assert (
        card["architecture"] == moma.preset("base", graph={"graph_rule": "published"})
        and card["num_parameters"] > 28_600_000
    )
    model = (tmp_path / "hub/backbone/module.safetensors").stat().st_size / 2**20
    assert after - before < 3 * model, (before, after, model)
    (tmp_path / "jmp-s.pt").unlink()


def test_parity_with_our_own_numbers(capsys, tmp_path):
    path = Path(__file__).with_name("parity_small.pt")
    assert path.stat().st_size < 300_000
    assert parity.main([path]) == 0
    assert capsys.readouterr().out.count("ok") == 30
    file = torch.load(path, weights_only=True)
    file["outputs"]["float64"]["x_E"][0, 0] *= 1 + 1e-6
    torch.save(file, tmp_path / "off.pt")
    assert parity.main([tmp_path / "off.pt"]) == 1


def test_forces_that_are_zero_by_symmetry_are_judged_on_the_scale_of_their_terms():
    file = published.parity_file(["bcc Fe"])
    forces = file["outputs"]["float64"]["forces_direct"]
    terms = file["outputs"]["float64"]["edge_force_scalar"].abs().max()
    assert forces.abs().max() < 1e-12 * terms
    forces += 1e-14 * terms  # the rounding of another order of summation
    assert all(off <= allowed for _, _, off, allowed in parity.compare(file))
    forces += 1e-7 * terms
    wrong = [name for name, bits, off, allowed in parity.compare(file) if off > allowed]
    assert wrong == ["forces_direct"]


def test_parity_with_the_original(parity_file, capsys):
    assert parity.main([Path(__file__).resolve().parents[2] / "shared/reference/gemnet_oc_parity.pt"]) == 0
