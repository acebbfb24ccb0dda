"""What README.md shows runs: the forked backbone through all stages, the library example, the flags of its commands."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import finetune
from stage import prepare

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = sorted(set(re.findall(r"python ((?:tests/)?\w+\.py)((?: [^\n`#|]+)?)", README)))

STAGES = """
import json, os, sys
import compose, finetune, hub, predict, pretrain, train_module, demo
for task in demo.TASKS.values():
    task["n"] = 60  # quicker to make
shared = dict(data="demo", limit=24, quiet=True, cache="cache")
pretrain.run(pretrain.Config(**shared, sets="demo_forcefield", preset="tiny", backbone="schnet", epochs=1, batch_size=8))
for kind in ("full", "adapter"):
    for task in ("demo_gap", "demo_dielectric"):
        train_module.run(train_module.Config(**shared, task=task, kind=kind, name=f"{task}-{kind}", epochs=1, batch_size=8))
    composed, out = f"composed_{kind}", f"runs/{kind}"
    compose.run(compose.Config(**shared, task="demo_optical_gap", kind=kind, bootstrap=0, folds=0, output=composed))
    start = dict(init=f"./{composed}", output=out, epochs=1, compare=False)
    finetune.run(finetune.Config(**start, task="demo_optical_gap", quiet=True))
    demo.write_examples("new")
    done = predict.run(predict.Config(inputs=["new"], model=(out,), output=f"predictions_{kind}"))
    assert done["rows"] == 2 and hub.read_card(out)["architecture"]["backbone"] == "schnet"
scratch = dict(init="scratch", epochs=1, folds=0, compare=False, output="runs/scratch")
finetune.run(finetune.Config(**shared, **scratch, task="demo_optical_gap"))
assert hub.verify("hub") == []
print("all stages ran")
"""


def test_the_forked_backbone_runs_through_all_stages(tmp_path):
    """SchNet has what the contract lists and nothing else, so the stages use nothing else."""
    fork = next(block for block in BLOCKS if "class SchNet" in block)
    assert len(fork.strip().splitlines()) <= 45
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "schnet.py").write_text(fork)
    with open(tmp_path / "model.py", "a") as f:
        f.write("import schnet\n")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", STAGES], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "all stages ran" in done.stdout, done.stderr


def test_the_library_example_trains_and_predicts_structures(home, tmp_path, monkeypatch):
    from pymatgen.core import Structure

    example = next(block for block in BLOCKS if "from predict import" in block)
    crystals, _, _ = prepare(home.modules, home.arch)
    made = [Structure(crystals.cell[i], crystals.Z[i], crystals.pos[i], coords_are_cartesian=True) for i in range(4)]
    made[2][0] = "Na+"  # an oxidation state is no reason to leave a crystal out
    made[3].replace_species({next(iter(made[3].composition)): {"Na": 0.5, "K": 0.5}})  # disorder is
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home.root / "tuned", tmp_path / "runs/my_folder")
    monkeypatch.setattr(finetune, "run", lambda cfg: {"of": cfg.data})  # what it makes is in place
    names = {"structures": made}
    exec(example, names)
    assert names["metrics"] == {"of": "my_folder"}
    assert np.isfinite(names["values"]).tolist() == [True, True, True, False]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_the_commands_of_the_readme_have_these_flags(script, flags):
    assert (ROOT / script).exists()
    asked = {f.split("=")[0] for f in flags.split() if f.startswith("--")} - {"--help"}
    if script.startswith("tests/") or not asked:
        return
    stage = importlib.import_module(script.removesuffix(".py"))
    if hasattr(stage, "Config"):
        known = {"--" + name.replace("_", "-") for name in stage.Config.__dataclass_fields__}
        assert asked <= known, asked - known
    else:
        shown = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True).stdout
        assert all(flag in shown for flag in asked), asked


@pytest.mark.parametrize("name", re.findall(r"`(\w+\.py)`", README))
def test_files_named_in_the_readme_exist(name):
    assert (ROOT / name).exists() or (ROOT / "tests" / name).exists() or name == "schnet.py"


def test_the_readme_is_short_and_what_it_shows_is_there():
    assert len(README.split()) <= 2000
    for file in re.findall(r"\]\(([\w./]+)\)|`((?:results|datasets|examples|docs)/[\w.]+)`", README):
        path = ROOT / next(name for name in file if name)
        assert path.is_file() and path.stat().st_size < 100_000, path


def test_the_demos_examples_are_what_make_demo_says_of_them():
    from pymatgen.core import Structure

    from crystals import load_crystals
    from tasks import get_task

    examples = {path.stem: Structure.from_file(path) for path in sorted((ROOT / "examples").iterdir())}
    assert {name: s.composition.reduced_formula for name, s in examples.items()} == {"CaF2": "CaF2", "MgO": "MgO"}
    assert examples["CaF2"].density == pytest.approx(3.18, abs=0.01)  # g/cm^3, fluorite and periclase
    assert examples["MgO"].density == pytest.approx(3.58, abs=0.01)
    crystals = load_crystals(get_task("dielectric"), quiet=True)
    of = lambda *Z: [i for i, z in enumerate(crystals.Z) if sorted(set(z.tolist())) == list(Z)]  # noqa: E731
    (row,) = of(9, 20)
    assert np.exp(crystals.y[row]) == pytest.approx(8.06, abs=0.005) and of(8, 12) == []
    split = json.loads((ROOT / "datasets/splits/mp_eps_total/seed0.json").read_text())
    assert crystals.row[row] in split["val"]


@pytest.mark.skipif(not shutil.which("make"), reason="without make")
def test_make_hub_has_a_target_for_each_task_of_the_shipped_hub_and_of_the_paper():
    def made(**settings):
        words = [f"{k}={v}" for k, v in settings.items()]
        command = ["make", "-n", "hub", "VENV=nowhere", *words]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "pretrain.py --teacher chgnet" in shown
        return re.findall(r"train_module.py --task (\S+) --name \S+ --kind full", shown), shown

    known = [name.lower() for name in json.loads((ROOT / "hub/tasks.json").read_text())]
    tasks, shown = made(HUB="nohub", TASKS="hub/tasks.json")
    assert tasks == known and shown.count("--tasks hub/tasks.json") == len(known) + 1
    papers, shown = made(HUB="nohub")
    assert len(papers) == 18 and {"n_seebeck", "jarvis_kvrh"} <= set(papers) and "--tasks" not in shown
