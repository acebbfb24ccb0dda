"""Teachers: what an open foundation potential knows of every atom of a crystal (stage 0, pretrain.py --teacher).

    labels = teach("chgnet", crystals)  # [(energy in eV, features (A, C)) or the reason why there are none]

A teacher is one function, structures -> (energy, features of the atoms), and forces (A, 3) in eV/A where they are asked
for, of each; another is one more entry of TEACHERS. It is needed to train theta_0 and never to use it. A: atoms. C: the
teacher's features of an atom. M: crystals.
"""

import contextlib
import functools
import hashlib
from functools import partial
from typing import NamedTuple

from files import MissingError, cache_folder, cached_folder, progress

import numpy as np
from torch.utils.data import DataLoader

from crystals import structure_hash

PART = 256  # crystals whose labels are kept together: what an interrupted run computes again


class Teacher(NamedTuple):
    label: callable  # [(Z, pos, cell)], forces=False -> [(energy, features[, forces]) or a reason], in order
    name: str  # and version: labels of another version are others
    license: str  # of its weights


@functools.cache
def load_chgnet():
    try:
        from chgnet.model import CHGNet
    except ImportError:
        raise MissingError("--teacher chgnet: the package chgnet is missing; `make teacher` installs it") from None
    with contextlib.redirect_stdout(None):  # it prints its size
        return CHGNet.load(use_device="cpu", verbose=False).eval()


def batches(some, atoms, crystals=16, most=200):
    """The numbers `some` by size, in lists of at most that many crystals and, if not of one alone, `most` atoms.

    atoms: of each number. Forces keep every layer's activations: about 20 MB an atom."""
    found = [[]]
    for i in sorted(some, key=lambda i: atoms[i]):
        if found[-1] and (len(found[-1]) == crystals or sum(atoms[j] for j in found[-1]) + atoms[i] > most):
            found.append([])
        found[-1].append(i)
    return found if some else []


def chgnet(structures, forces=False):
    """CHGNet 0.3.0 (Deng et al. 2023): its energy, and the 64 features of an atom before the readout; its forces."""
    import torch
    from pymatgen.core import Structure

    model, graphs, found = load_chgnet(), {}, [None] * len(structures)
    for i, (Z, pos, cell) in enumerate(structures):
        try:
            if not np.any(cell):
                raise ValueError("a molecule")
            graphs[i] = model.graph_converter(Structure(cell, Z, pos, coords_are_cartesian=True))
        except (ValueError, IndexError) as error:  # an isolated atom, an element beyond 94
            found[i] = f"teacher: {error}"
    for some in batches(graphs, [len(Z) for Z, _, _ in structures]):
        with torch.set_grad_enabled(forces):  # forces are derivatives
            out = model([graphs[i] for i in some], task="ef" if forces else "e", return_atom_feas=True)
        parts = [out["e"].tolist(), out["atom_fea"], *([out["f"]] if forces else [])]
        for i, energy, features, *more in zip(some, *parts, strict=True):
            found[i] = energy * len(features), *(x.detach().numpy().copy() for x in (features, *more))
        del out, parts, features, more  # with what forces were derived through, before the next
    return found


TEACHERS = {"chgnet": Teacher(chgnet, "CHGNet 0.3.0", "Modified BSD (CHGNet)")}


def teach(name, crystals, cache_dir="", num_workers=0, quiet=False, forces=False) -> list:
    """The teacher's labels of every crystal, in order, or the reason why it has none: (energy in eV, features (A, C)
    float16) and, if they are asked for, forces (A, 3) in eV/A.

    Through the cache, part by part. num_workers: processes that label parts at the same time.
    """
    structures = list(zip(crystals.Z, crystals.pos, crystals.cell))
    parts = [structures[i : i + PART] for i in range(0, len(structures), PART)]
    label = partial(label_part, name, cache_dir, forces)
    folders = DataLoader(parts, batch_size=None, collate_fn=label, num_workers=num_workers)
    found = []
    for folder in progress(folders, f"labels of {name}", quiet, len(parts)):
        with np.load(folder / "labels.npz") as saved:
            ends = np.cumsum(saved["count"])[:-1]
            of_atoms = [np.split(saved[k], ends) for k in ("features", "forces") if k in saved]
            labels = zip(saved["energy"].tolist(), *of_atoms, saved["reason"].tolist(), strict=True)
            found += [why or tuple(label) for *label, why in labels]
    return found


def label_part(name, cache_dir, forces, part):
    """The cached folder of the labels of some structures; made if it is missing."""
    teacher = TEACHERS[name]
    parts = [teacher.name, *["with forces"] * forces, *(structure_hash(*s) for s in part)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]

    def build(folder):
        found = teacher.label(part, forces)
        reasons = [x if isinstance(x, str) else "" for x in found]
        width = next((x[1].shape[1] for x in found if not isinstance(x, str)), 0)
        none = np.nan, np.zeros((0, width)), np.zeros((0, 3))
        labels = [none[: 2 + forces] if why else x for x, why in zip(found, reasons, strict=True)]
        energies, features, *more = zip(*labels, strict=True)
        np.savez(
            folder / "labels.npz", energy=np.array(energies), features=np.concatenate(features).astype(np.float16),
            count=[len(x) for x in features], reason=np.array(reasons),
            **({"forces": np.concatenate(*more).astype(np.float32)} if forces else {}),
        )  # fmt: skip

    return cached_folder(cache_folder(cache_dir) / f"teacher-{key}", build)


def distorted(Z, pos, cell, copy):
    """A strained and displaced copy (Z, pos, cell) of a crystal, a function of the crystal and the number `copy`.

    A strain of normal entries and normal displacements, both of one random size: up to 4 % and 0.12 Å.
    """
    rng = np.random.default_rng([copy, int(structure_hash(Z, pos, cell)[:8], 16)])
    size, strain = rng.uniform(), rng.normal(size=(3, 3))
    deformation = np.eye(3) + 0.04 * size * (strain + strain.T) / 2
    return Z, pos @ deformation + 0.12 * size * rng.normal(size=pos.shape), cell @ deformation
