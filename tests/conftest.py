"""Shared by all tests: the repository on the path, one thread, crystals as (Z, pos, cell, periodic) in Å."""

import gzip
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import demo
from crystals import load_crystals
from tasks import get_task

torch.set_num_threads(1)
MAKE, MADE = demo.make, {}


def make_once(name, n=0):
    """demo.make, whose result no test changes: seconds for each of the large sets."""
    key = name, n, repr(demo.TASKS.get(name))
    if key not in MADE:
        MADE[key] = MAKE(name, n)
    return MADE[key]


demo.make = make_once


def pytest_configure(config):
    config.addinivalue_line("markers", "drawn: draws its pictures, which most tests only compose")


def is_picture(path) -> bool:
    """Whether a file is a PNG of more than 100 pixels a side and of more than one colour."""
    image = imread(path)
    return image.ndim == 3 and min(image.shape[:2]) > 100 and image.std() > 0


@pytest.fixture(autouse=True)
def quick_files(request, monkeypatch):
    """Pictures are composed but not drawn, and files not forced to the disk: a third of the time of the slowest tests.
    Not where a test is marked `drawn`, or looks at fsync itself. Fixtures shared by several tests draw."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(Figure, "savefig", lambda figure, out, **_: out.write(b"\x89PNG"))
    monkeypatch.setattr(os, "fsync", lambda fd: None)


FCC = np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
BCC = np.array([[-1.0, 1, 1], [1, -1, 1], [1, 1, -1]])
PEROVSKITE = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
NO_CELL = np.zeros((3, 3))


def make_crystals():
    """{name: (Z (A,), pos (A, 3), cell (3, 3), periodic)}, coordinates inside the cell."""
    rng = np.random.default_rng(7)
    sto, nacl = np.array([38, 22, 8, 8, 8]), np.array([11, 17])
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3) / 4
    sixty = rng.permutation(grid)[:60] + rng.uniform(0.02, 0.1, size=(60, 3))  # a 4 x 4 x 4 grid with four holes
    triclinic = np.array([[4.1, 0, 0], [-1.3, 4.6, 0], [1.7, 2.0, 5.2]])
    thin = np.array([[2.9, 0, 0], [1.1, 3.2, 0], [0, 0, 16.0]])
    seven = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]) / 2
    sandwich = np.array([[0.1, 0.2, 0.3], [0.4, 0.6, 0.4], [0.7, 0.1, 0.21]])
    off_center = np.array([[0.05, 0.11, 0.07], [2.9, 2.7, 2.85]])
    water = np.array([[0.0, 0, 0.12], [0, 0.76, -0.47], [0, -0.76, -0.47]])
    return {
        "NaCl": (nacl, PEROVSKITE[:2] @ (FCC * 2.82), FCC * 2.82, True),
        "SrTiO3": (sto, PEROVSKITE * 3.905, np.eye(3) * 3.905, True),
        "bcc Fe": (np.array([26]), np.zeros((1, 3)), BCC * 1.435, True),
        "rattled NaCl": (nacl, off_center, FCC * 2.82 + 0.025 * triclinic, True),
        "rattled SrTiO3": (sto, (PEROVSKITE + rng.uniform(0.01, 0.06, (5, 3))) * 3.905, np.eye(3) * 3.905, True),
        "triclinic": (rng.integers(1, 90, 7), (seven + rng.uniform(0, 0.2, (7, 3))) @ triclinic, triclinic, True),
        "thin": (np.array([42, 16, 16]), sandwich @ thin, thin, True),
        "60 atoms": (rng.integers(1, 90, 60), sixty @ (np.eye(3) * 9.6 + 0.4), np.eye(3) * 9.6 + 0.4, True),
        "isolated atom": (np.array([2]), np.zeros((1, 3)), NO_CELL, False),
        "water": (np.array([8, 1, 1]), water, NO_CELL, False),
    }


@pytest.fixture(scope="session")
def crystals():
    return make_crystals()


@pytest.fixture(scope="session")
def parity_file():
    """The original code's numbers on three rattled crystals, from the folder beside the repository."""
    path = ROOT.parent / "shared" / "reference" / "gemnet_oc_parity.pt"
    if not path.is_file():
        pytest.skip("the parity file ../shared/reference/gemnet_oc_parity.pt is not here")
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------- tables of crystals


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOMA_CACHE", str(tmp_path / "cache"))


def site(element, abc, occu=1):
    return {"species": [{"element": element, "occu": occu}], "abc": list(abc)}


def crystal(*sites, a=4.0):
    """A cubic pymatgen dictionary; rocksalt-like pair without arguments."""
    return {
        "lattice": {"matrix": (a * np.eye(3)).tolist()},
        "sites": list(sites or (site("Na", (0, 0, 0)), site("Cl", (0.5, 0.5, 0.5)))),
    }


def write_table(path, columns, rows):
    with gzip.open(path, "wt") as f:
        json.dump({"index": list(range(len(rows))), "columns": columns, "data": rows}, f)
    return path


def table_of(tmp_path, structures, labels=None):
    labels = labels if labels is not None else [float(i + 1) for i in range(len(structures))]
    return write_table(
        tmp_path / "own.json.gz",
        ["name", "structure", "y"],
        [[f"n{i}", s, y] for i, (s, y) in enumerate(zip(structures, labels))],
    )


def load_table(path, **fields):
    limit = fields.pop("limit", 0)
    return load_crystals(get_task("own", data=str(path), id_column="name", **fields), limit=limit, quiet=True)


def many(tmp_path, n=100, **kwargs):
    return load_table(table_of(tmp_path, [crystal(a=3.0 + 0.1 * i) for i in range(n)]), **kwargs)


# ---------------------------------------------------------------- a hub

TASK = "demo_refractive_index"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A hub with a random theta_0, one full and one adapter module, a fine-tuned run; and their settings: 40 crystals,
    3 epochs."""
    import finetune
    import hub
    import train_module
    from model import build_backbone, new_adapters, preset

    root, arch = tmp_path_factory.mktemp("home"), preset("tiny")
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    card = {"kind": "backbone", "architecture": arch, "graph": arch["graph"], "elements": [8, 94]}
    adapters = new_adapters(backbone).state_dict()
    hub.save(root / "hub" / "backbone", backbone.state_dict(), card, adapters_init=adapters)
    shared = dict(task=TASK, data="demo", hub=str(root / "hub"), cache=str(root / "cache"), limit=40, epochs=3,
                  batch_size=8, quiet=True)  # fmt: skip
    modules = train_module.Config(**shared)
    for kind in ("full", "adapter"):
        train_module.run(replace(modules, kind=kind, name=kind))
    runs = finetune.Config(**shared, init="full", folds=0, compare=False, output=str(root / "tuned"))
    finetune.run(runs)
    return SimpleNamespace(root=root, hub=root / "hub", modules=modules, runs=runs, arch=arch)
