"""What README.md shows runs: the forked backbone through all stages, the library example, the flags of its commands."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from stage import prepare

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = sorted(set(re.findall(r"python ((?:tests/)?\w+\.py)((?: [^\n`#|]+)?)", README)))

STAGES = """
import json, os, sys
import compose, finetune, hub, predict, pretrain, train_module, demo
shared = dict(data="demo", limit=24, quiet=True, cache="cache")
pretrain.run(pretrain.Config(**shared, sets="demo_forcefield", preset="tiny", backbone="schnet", epochs=1, batch_size=8))
for kind in ("full", "adapter"):
    for task in ("demo_gap", "demo_dielectric"):
        train_module.run(train_module.Config(**shared, task=task, kind=kind, name=f"{task}-{kind}", epochs=1, batch_size=8))
    compose.run(compose.Config(**shared, task="demo_optical_gap", kind=kind, bootstrap=0, output=f"composed_{kind}"))
    out = f"runs/{kind}"
    finetune.run(finetune.Config(task="demo_optical_gap", init=f"./composed_{kind}", epochs=1, quiet=True, output=out))
    demo.write_examples("new")
    done = predict.run(predict.Config(inputs=["new"], model=(out,), output=f"predictions_{kind}"))
    assert done["rows"] == 2 and hub.read_card(out)["architecture"]["backbone"] == "schnet"
finetune.run(finetune.Config(**shared, task="demo_optical_gap", init="scratch", epochs=1, output="runs/scratch"))
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


def test_the_library_example_predicts_structures(home, tmp_path, monkeypatch):
    from pymatgen.core import Structure

    example = next(block for block in BLOCKS if "from_structures" in block)
    crystals, _, _ = prepare(home.modules, home.arch)
    made = [Structure(crystals.cell[i], crystals.Z[i], crystals.pos[i], coords_are_cartesian=True) for i in range(4)]
    made[2][0] = "Na+"  # an oxidation state is no reason to leave a crystal out
    made[3].replace_species({next(iter(made[3].composition)): {"Na": 0.5, "K": 0.5}})  # disorder is
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home.root / "tuned", tmp_path / "runs/dielectric")
    names = {"structures": made, "labels": [1.0, 2.0, 3.0, 4.0]}
    exec(example, names)
    assert names["crystals"].y.tolist() == [1.0, 2.0, 3.0] and len(names["crystals"].skipped) == 1
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
