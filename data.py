"""Tasks, crystals, graphs, batches, splits (paper, sections 3.1 and B.1; the graphs of GemNet-OC).

    crystals = load(get_task("dielectric"))        # from matminer's data home, or MATMINER_DATA
    dataset = GraphDataset(crystals, GraphConfig())
    batch = collate([dataset[i] for i in range(32)])

M: crystals in a task. A: atoms. B: crystals in a batch. Lengths in Å; a label y is the task's column after its
transform, in `unit_of(task)`. Importing this file needs torch and numpy only.
"""

import contextlib
import csv
import difflib
import gzip
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """One property of one data set. dataset: a matminer name, a file, a folder, or "demo:<name>"."""

    name: str
    dataset: str = ""
    target_column: str = ""  # "": the table's only number, or "target", or "energy"
    structure_column: str = "structure"
    id_column: str = ""  # "": the first of ID_COLUMNS that the table has, else the row number
    unit: str = ""  # of the column, before the transform
    transform: str = "none"  # none, log (natural), log10, log1p
    pooling: str = "mean"  # mean, sum, max over atoms in the head
    role: str = "user"  # hub, downstream, pretrain, extra, user
    paper: str = ""  # the row's name in the paper's tables
    note: str = ""
    forces_column: str = ""  # (A, 3) eV/Å for pre-training; rows without are skipped
    subset: str = ""  # keep the rows whose column "subset" is one of these, separated by ";"
    license: str = ""  # of the data

    def __post_init__(self):
        for key, value, allowed in (("transform", self.transform, TRANSFORMS), ("pooling", self.pooling, POOLINGS)):
            if value not in allowed:
                raise ValueError(f"task {self.name}: {key} '{value}' is not one of {', '.join(allowed)}")


TRANSFORMS = {  # name: (label from raw value, raw value from label, the raw value must be above)
    "none": (lambda x: x, lambda y: y, -np.inf),
    "log": (np.log, np.exp, 0.0),
    "log10": (np.log10, lambda y: 10.0**y, 0.0),
    "log1p": (np.log1p, np.expm1, -1.0),
}
POOLINGS = ("mean", "sum", "max")
ID_COLUMNS = ("id", "material_id", "mpid", "jid", "qm9_index", "source_id", "likely_mpid", "task")
DERIVED = {f"dielectric {f}": [f"epsilon_{k} {f}" for k in "xyz"] for f in ("opt", "tbmbj")}  # column: mean of columns
MP, JARVIS = "CC BY 4.0 (Materials Project)", "NIST, free use (JARVIS-DFT)"  # licences
RICCI, EPS = "ricci_boltztrap_mp_tabular", "relative permittivity"


def _table(role, license, rows, **common):
    """Rows (name, paper's row, dataset, column, unit[, transform]) -> {name: Task}."""
    tasks = {}
    for name, paper, dataset, column, unit, *rest in rows:
        values = dict(unit=unit, transform=rest[0] if rest else "none", role=role, paper=paper, license=license)
        tasks[name] = Task(name, dataset, column, **values, **common)
    return tasks


FORCE_FIELD = Task("", "", "energy", unit="eV", pooling="sum", role="pretrain", forces_column="forces")

# Which targets are logged, and how, follows Chang et al. 2022, whose sets these are. For the JARVIS moduli, the JARVIS
# dielectric constant and the effective masses that is inferred from the published means.
TASKS = {
    **_table("hub", MP, [
        ("mp_eform", "MP Formation Energy", "matbench_mp_e_form", "e_form", "eV/atom"),
        ("mp_bandgap", "MP Band Gap", "matbench_mp_gap", "gap pbe", "eV"),
        ("mp_gvrh", "MP Shear Modulus", "matbench_log_gvrh", "log10(G_VRH)", "log10(GPa)"),
        ("mp_kvrh", "MP Bulk Modulus", "matbench_log_kvrh", "log10(K_VRH)", "log10(GPa)"),
        ("n_e_cond", "n-type Electrical Conductivity", RICCI, "σ.n [1/Ω/m/s]", "1/Ω/m/s", "log1p"),
        ("p_e_cond", "p-type Electrical Conductivity", RICCI, "σ.p [1/Ω/m/s]", "1/Ω/m/s", "log1p"),
        ("n_th_cond", "n-type Thermal Conductivity", RICCI, "κₑ.n [W/K/m/s]", "W/K/m/s", "log1p"),
        ("p_th_cond", "p-type Thermal Conductivity", RICCI, "κₑ.p [W/K/m/s]", "W/K/m/s", "log1p"),
        ("n_Seebeck", "n-type Seebeck Coefficient", RICCI, "S.n [µV/K]", "uV/K"),
        ("p_Seebeck", "p-type Seebeck Coefficient", RICCI, "S.p [µV/K]", "uV/K"),
        ("n_avg_eff_mass", "n-type Effective Mass", RICCI, "mₑᶜ.n.ε̄ [mₑ]", "electron masses", "log"),
        ("p_avg_eff_mass", "p-type Effective Mass", RICCI, "mₑᶜ.p.ε̄ [mₑ]", "electron masses", "log"),
    ]),
    **_table("hub", "CC BY (Castelli et al. 2012)", [
        ("castelli_eform", "Perovskite Formation Energy", "castelli_perovskites", "e_form", "eV/cell"),
    ]),
    **_table("hub", JARVIS, [
        ("jarvis_eform", "JARVIS Formation Energy", "jarvis_dft_3d", "e_form", "eV/atom"),
        ("jarvis_bandgap", "JARVIS Band Gap", "jarvis_dft_3d", "gap opt", "eV"),
        ("jarvis_dielectric_opt", "JARVIS Dielectric Constant", "jarvis_dft_3d", "dielectric opt", EPS, "log"),
        ("jarvis_gvrh", "JARVIS Shear Modulus", "jarvis_dft_3d", "shear modulus", "GPa", "log"),
        ("jarvis_kvrh", "JARVIS Bulk Modulus", "jarvis_dft_3d", "bulk modulus", "GPa", "log"),
    ]),
    **_table("downstream", "MIT (Chang et al. 2022; Kingsbury et al.)", [
        ("expt_bandgap", "Experimental Band Gap", "expt_gap_kingsbury", "expt_gap", "eV"),
        ("expt_eform", "Formation Enthalpy", "expt_formation_enthalpy_kingsbury", "expt_form_e", "eV/atom"),
    ]),
    **_table("downstream", JARVIS, [
        ("jarvis_2d_dielectric_opt", "2D Dielectric Constant", "jarvis_dft_2d", "dielectric opt", EPS),
        ("jarvis_2d_eform", "2D Formation Energy", "jarvis_dft_2d", "e_form", "eV/atom"),
        ("jarvis_2d_exfoliation", "Exfoliation Energy", "jarvis_dft_2d", "exfoliation_en", "meV/atom"),
        ("jarvis_2d_gap_opt", "2D Band Gap", "jarvis_dft_2d", "gap opt", "eV"),
        ("jarvis_3d_eps_tbmbj", "3D Poly Electronic", "jarvis_dft_3d", "dielectric tbmbj", EPS),
        ("jarvis_3d_gap_tbmbj", "3D Band Gap", "jarvis_dft_3d", "gap tbmbj", "eV"),
    ]),
    **_table("downstream", MP, [
        ("mp_dielectric", "Refractive Index", "matbench_dielectric", "n", "refractive index", "log"),
        ("mp_elastic_anisotropy", "Elastic Anisotropy", "elastic_tensor_2015", "elastic_anisotropy", ""),
        ("mp_eps_electronic", "Electronic Dielectric Constant", "phonon_dielectric_mp", "eps_electronic", EPS, "log"),
        ("mp_eps_total", "Dielectric Constant", "phonon_dielectric_mp", "eps_total", EPS, "log"),
        ("mp_phonons", "Phonons Mode Peak", "matbench_phonons", "last phdos peak", "1/cm", "log"),
        ("mp_poisson_ratio", "Poisson Ratio", "elastic_tensor_2015", "poisson_ratio", ""),
        ("mp_poly_electronic", "Poly Electronic", "dielectric_constant", "poly_electronic", EPS),
        ("mp_poly_total", "Poly Total", "dielectric_constant", "poly_total", EPS),
        ("piezoelectric_tensor", "Piezoelectric Modulus", "piezoelectric_tensor", "eij_max", "C/m^2", "log1p"),
    ]),
    **_table("hub", "published for free use (QM9)", [
        ("qm9_mu", "", "qm9", "mu", "D"),
        ("qm9_alpha", "", "qm9", "alpha", "a0^3"),
        ("qm9_homo", "", "qm9", "homo", "eV"),
        ("qm9_lumo", "", "qm9", "lumo", "eV"),
        ("qm9_gap", "", "qm9", "gap", "eV"),
        ("qm9_r2", "", "qm9", "r2", "a0^2"),
        ("qm9_zpve", "", "qm9", "zpve", "eV"),
        ("qm9_u0_atom", "", "qm9", "u0_atom", "eV"),
        ("qm9_u298_atom", "", "qm9", "u298_atom", "eV"),
        ("qm9_h298_atom", "", "qm9", "h298_atom", "eV"),
        ("qm9_g298_atom", "", "qm9", "g298_atom", "eV"),
        ("qm9_cv", "", "qm9", "cv", "cal/mol/K"),
    ], pooling="sum", structure_column="molecule"),
    **_table("extra", MP, [  # outside the paper's tables
        ("n_power_factor", "", "boltztrap_mp", "pf_n", "uW/cm/K^2"),
        ("p_power_factor", "", "boltztrap_mp", "pf_p", "uW/cm/K^2"),
        ("mp_megnet_eform", "", "mp_2018_megnet", "e_form", "eV/atom"),
        ("mp_megnet_gap", "", "mp_2018_megnet", "gap pbe", "eV"),
        ("mp_elastic_gvrh", "", "mp_elastic_2018", "log10(G_VRH)", "log10(GPa)"),
        ("mp_elastic_kvrh", "", "mp_elastic_2018", "log10(K_VRH)", "log10(GPa)"),
    ]),
    **_table("extra", JARVIS, [  # left out by the paper: 120 rows each
        ("jarvis_2d_gap_tbmbj", "", "jarvis_dft_2d", "gap tbmbj", "eV"),
        ("jarvis_2d_dielectric_tbmbj", "", "jarvis_dft_2d", "dielectric tbmbj", EPS),
        ("jarvis_2d_gap", "", "jarvis_2d_gap", "gap opt", "eV"),
    ]),
    **_table("pretrain", "", [  # energies without forces
        ("mp_2018_megnet", "", "mp_2018_megnet", "e_form", "eV/atom"),
        ("carbon_24", "", "carbon_24", "energy_per_atom", "eV/atom"),
    ]),
    **_table("pretrain", "", [("qm9", "", "qm9", "u0_atom", "eV")], pooling="sum", structure_column="molecule"),
    # Energies and forces. Rows of one task share a zero of energy (one code, functional and set of references).
    **{
        name: replace(FORCE_FIELD, name=name, dataset=dataset, structure_column=structure, subset=subset)
        for name, dataset, structure, subset in [
            ("ff_mattersim_benchmarks", "ff_mattersim_benchmarks", "structure", ""),  # all of it: PBE(+U), VASP
            ("ff_mptrj", "ff_mattersim_benchmarks", "structure", "mptrj-random-1k;mptrj-highest-stress-1k"),
            ("ff_alexandria", "ff_mattersim_benchmarks", "structure", "alexandria-random-1k"),
            ("ff_mattersim", "ff_mattersim_benchmarks", "structure", "mpf-TP;mpf-alkali-TP;random-TP"),
            ("ff_mad", "ff_mad", "structure", ""),
            ("ff_mlearn", "ff_mlearn", "structure", ""),
            ("ff_aspirin", "ff_molecules", "molecule", "aspirin_ccsd"),
            ("ff_ethanol", "ff_molecules", "molecule", "ethanol_ccsdt"),
            ("ff_solvents", "ff_molecules", "molecule", "solvent_gfn2xtb"),
        ]
    },
}  # fmt: skip
ALIASES = {"dielectric": "mp_eps_total"}


def get_task(name: str, tasks_file="", data="", **overrides) -> Task:
    """The task of that name: from tasks_file (JSON), from the embedded crystals (data="demo"), or from TASKS.

    data: a file or folder of one's own; a known name then lends its column, unit and transform, a new one makes a new
    task. overrides: fields of Task; empty ones are ignored. A name that the tasks file lacks is looked up in TASKS.
    """
    overrides = {k: v for k, v in overrides.items() if v not in ("", None)}
    if data == "demo":
        import demo

        name = name if name in demo.TASKS else f"demo_{name}"
        if name not in demo.TASKS:
            have = ", ".join(demo.TASKS)
            raise ValueError(f"--task {name[5:]}: the embedded crystals have no such task; they have {have}")
        known = {k: v for k, v in demo.TASKS[name].items() if k in Task.__dataclass_fields__}
        forces = "forces" if known["role"] == "pretrain" else ""
        return replace(Task(name, f"demo:{name}", "target", forces_column=forces, license="MIT", **known), **overrides)
    tasks = read_tasks(tasks_file) if tasks_file else {}
    if not name and not data:
        raise ValueError("--task is missing: a name in the task table (data.TASKS) or in --tasks FILE")
    name = ALIASES.get(name, name) if name not in tasks else name
    name = {k.lower(): k for k in [*TASKS, *tasks]}.get(name.lower(), name)  # modules of a hub have lower-case names
    known = tasks.get(name) or TASKS.get(name)
    if data:
        known = replace(known or Task(name or Path(data).name.split(".")[0]), dataset=str(data))
    elif known is None:
        offered = [*tasks, *TASKS, *ALIASES]
        near = ", ".join(difflib.get_close_matches(name, offered, 4, 0.4) or offered[:4])
        where = f"{tasks_file} and the task table" if tasks_file else "the task table"
        cure = "for data of your own pass --tasks FILE or --data PATH"
        raise ValueError(f"--task {name}: not in {where}; near names: {near}; {cure}")
    return replace(known, **overrides)


def read_tasks(path) -> dict:
    """{name: Task} from JSON {name: {"data": file, field of Task: value, ...}}; paths are relative to the file."""
    path, keys = Path(path), [f.name for f in fields(Task)][2:]
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--tasks {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"--tasks {path}: not JSON: {error}") from None
    tasks = {}
    for name, entry in entries.items() if isinstance(entries, dict) else [("", None)]:
        if not isinstance(entry, dict) or "data" not in entry:
            form = 'an object with "data": a file, a folder or a matminer name'
            raise ValueError(f"--tasks {path}: entry '{name}' should be {form}")
        strange = ", ".join(sorted(set(entry) - {"data", *keys}))
        if strange:
            raise ValueError(f"--tasks {path}: '{name}' has unknown keys {strange}; known: data, {', '.join(keys)}")
        known, source = TASKS.get(name, Task(name)), entry["data"]
        if (path.parent / source).exists() or "/" in source or "." in source:  # else a matminer name
            source = str(path.parent / source)
        values = {k: v for k, v in entry.items() if k != "data"}
        tasks[name] = Task(name, source, **{"paper": known.paper, "license": known.license, **values})
    return tasks


def task_names(role: str, tasks_file="", data="") -> list:
    """Names of the tasks of one role, of the embedded crystals, the tasks file or TASKS."""
    if data == "demo":
        import demo

        return [name for name, task in demo.TASKS.items() if task["role"] == role]
    return [name for name, task in (read_tasks(tasks_file) if tasks_file else TASKS).items() if task.role == role]


def unit_of(task: Task) -> str:
    """Unit of the label after the transform: "log(1/cm)" where the column is in 1/cm."""
    unit = task.unit or "1"
    return {"none": task.unit, "log1p": f"log(1 + {unit})"}.get(task.transform, f"{task.transform}({unit})")


def transform(task: Task, raw):
    """Raw values in task.unit -> labels in unit_of(task). Values without a logarithm become NaN."""
    forward, _, above = TRANSFORMS[task.transform]
    raw = np.asarray(raw, dtype=np.float64)
    usable = raw > above
    y = np.where(usable, forward(np.where(usable, raw, above + 1 if np.isfinite(above) else raw)), np.nan)
    return y if y.ndim else float(y)


def inverse(task: Task, y):
    """Labels in unit_of(task) -> values in task.unit."""
    raw = TRANSFORMS[task.transform][1](np.asarray(y, dtype=np.float64))
    return raw if np.ndim(raw) else float(raw)


# ---------------------------------------------------------------- crystals


@dataclass
class Crystals:
    """What every source becomes. Molecules have pbc False and a cell of zeros."""

    task: Task
    ids: list  # unique
    Z: list  # (A,) int64 each
    pos: list  # (A, 3) float64 each, cartesian, Å, inside the cell
    cell: list  # (3, 3) float64 each, rows are lattice vectors
    pbc: np.ndarray  # (M,) bool
    y: np.ndarray  # (M,) float64 in unit_of(task); NaN where there is no label and none was asked for
    row: np.ndarray  # (M,) int64 position in the source, skipped rows counted; split files hold these
    split: list | None = None  # "train", "val", "test" or "" of a targets.csv
    skipped: list = field(default_factory=list)  # [(id, reason)]
    forces: list | None = None  # (A, 3) float64 each, eV/Å
    fingerprint: str = ""  # sha256 over Z, pos, cell, y
    num_rows: int = 0  # rows of the source

    def __len__(self):
        return len(self.ids)

    def __post_init__(self):
        self.fingerprint = self.fingerprint or fingerprint(self.Z, self.pos, self.cell, self.y)
        self.num_rows = self.num_rows or len(self.ids)


def load(task: Task, limit=0, on_error="skip", need_target=True, quiet=False, cache_dir="") -> Crystals:
    """Read the task's source. Rows that cannot be used are skipped by rule and counted; on_error="stop" raises instead.

    limit: the first `limit` usable rows of a fixed random order, so that subsets are random and nested.
    need_target=False: for prediction; rows without a label stay, with y = NaN.
    """
    if on_error not in ("skip", "stop"):
        raise ValueError(f"--on-error {on_error}: 'skip' or 'stop'")
    task, source, rows = read_rows(task, cache_dir, quiet)
    problems = label_problems(task, source, rows, need_target)  # (R,) "" where the row is usable
    mine = np.arange(len(problems))
    if task.subset:
        wanted = [s.strip() for s in task.subset.split(";")]
        values = pick_column(rows, "subset", source)
        mine = np.flatnonzero(np.isin(values, wanted))
        if not len(mine):
            there = ", ".join(sorted(set(values.tolist()))[:12])
            raise ValueError(f"{source}: no row has subset {' or '.join(wanted)}; there are {there}")
    if limit:  # RandomState: its stream is frozen for good, unlike default_rng's
        mine = mine[np.random.RandomState(0).permutation(len(mine))]
        end = np.searchsorted(np.cumsum(problems[mine] == ""), limit) + 1
        mine = np.sort(mine[:end])
    bad = mine[problems[mine] != ""]
    keep = mine[problems[mine] == ""]
    ids = rows["id"]
    if len(bad) and on_error == "stop":
        i = bad[0]
        raise ValueError(f"{source}: row {i} (id {ids[i]}): {problems[i]}; --on-error skip leaves such rows out")
    if not len(keep):
        raise ValueError(f"{source}: none of {len(mine)} rows can be used ({count_reasons(problems[bad])})")
    start = np.concatenate([[0], np.cumsum(rows["count"])])
    parts = [slice(start[i], start[i + 1]) for i in keep]
    crystals = Crystals(
        task=task,
        ids=ids[keep].tolist(),
        Z=[rows["Z"][s] for s in parts],
        pos=[rows["pos"][s] for s in parts],
        cell=list(rows["cell"][keep]),
        pbc=rows["pbc"][keep],
        y=rows["y"][keep],
        row=keep,
        split=rows["column:split"][keep].tolist() if is_text(rows, "split") else None,
        skipped=[(str(ids[i]), str(problems[i])) for i in bad],
        forces=[rows["forces"][s] for s in parts] if task.forces_column else None,
        num_rows=len(problems),
    )
    if not quiet:
        print_summary(crystals, source, len(mine), rows["key"][keep])
    return crystals


def print_summary(crystals, source, num_read, keys):
    """What was read and what it looks like, on stderr."""
    task, y = crystals.task, crystals.y[np.isfinite(crystals.y)]
    reasons = count_reasons([reason for _, reason in crystals.skipped])
    atoms, symbols = [len(z) for z in crystals.Z], elements(crystals)
    names = f": {' '.join(symbols)}" if len(symbols) <= 20 else ""
    lines = [
        f"{task.name} ({source}): {num_read} rows read, {len(crystals)} kept, {len(crystals.skipped)} skipped"
        + (f": {reasons}" if reasons else ""),
        f"  {len(symbols)} elements{names}; atoms per cell: median {np.median(atoms):g}, max {max(atoms)}; "
        f"{len(keys) - len(set(keys))} duplicate structures" + ("; with forces" if crystals.forces else ""),
    ]
    if len(y):
        statistics = {"min": np.min, "median": np.median, "max": np.max, "mean": np.mean, "std": np.std}
        shown = ", ".join(f"{name} {statistic(y):.5g}" for name, statistic in statistics.items())
        lines.insert(1, f"  label {task.target_column} [{unit_of(task) or 'no unit'}]: {shown}")
    print("\n".join(lines), file=sys.stderr)


def count_reasons(reasons) -> str:
    """Rows by rule, which is what stands before the colon: "no label 12, disordered site 3"."""
    counts = Counter(str(r).split(":")[0] for r in reasons)
    return ", ".join(f"{rule} {n}" for rule, n in counts.most_common())


def elements(crystals) -> list:
    """Symbols of the elements that occur, by atomic number."""
    return [SYMBOLS[z] for z in np.unique(np.concatenate(crystals.Z))]


def subset(crystals: Crystals, idx) -> Crystals:
    """The crystals at positions idx, in that order."""
    idx = [int(i) for i in idx]

    def take(values):
        return None if values is None else values[idx] if isinstance(values, np.ndarray) else [values[i] for i in idx]

    picked = {f: take(getattr(crystals, f)) for f in ("ids", "Z", "pos", "cell", "pbc", "y", "row", "split", "forces")}
    return replace(crystals, **picked, fingerprint="")


def write_skipped(path, crystals):
    """skipped.csv: id, reason."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("id", "reason"), *crystals.skipped])


def fingerprint(Z, pos, cell, y=None) -> str:
    digest = hashlib.sha256(np.array([len(z) for z in Z], dtype="<i8").tobytes())
    for arrays, kind in ((Z, "<i8"), (pos, "<f8"), (cell, "<f8"), ([] if y is None else [y], "<f8")):
        for a in arrays:
            digest.update(np.ascontiguousarray(a, dtype=kind).tobytes())
    return digest.hexdigest()


def structure_hash(Z, pos, cell) -> str:
    """Key of one structure's exact content, atom order included."""
    return fingerprint([Z], [pos], [cell])


def duplicate_key(Z, pos, cell) -> str:
    """Equal for two structures with the same cell and atoms within 1e-4 Å, in any order of atoms, wrapped or not."""
    if np.any(cell):
        edge = np.linalg.norm(cell, axis=1)
        grid = np.rint(pos @ np.linalg.inv(cell) * edge / 1e-4).astype(np.int64) % np.rint(edge / 1e-4).astype(np.int64)
    else:
        grid = np.rint(pos / 1e-4).astype(np.int64)
    atoms = np.column_stack([Z, grid])
    atoms = atoms[np.lexsort(atoms.T[::-1])]
    box = np.rint(np.asarray(cell) / 1e-4).astype(np.int64)
    return hashlib.blake2b(atoms.tobytes() + box.tobytes(), digest_size=12).hexdigest()


# ---------------------------------------------------------------- from a source to rows


class Skip(Exception):
    """A row that cannot be used. Its text is "rule: detail"."""


def read_rows(task: Task, cache_dir="", quiet=False):
    """Every row of the task's source, through the cache. Returns the task, its columns filled in; the source; the rows.

    rows: id (R,) str; count (R,) atoms, 0 where the structure is unusable; reason (R,) str; Z, pos, forces over all
    atoms; cell (R, 3, 3); pbc (R,); key (R,) duplicate_key; "column:NAME" (R,) for every column of numbers or words.
    """
    embedded = task.dataset.removeprefix("demo:") if task.dataset.startswith("demo:") else ""
    path = Path(importlib.util.find_spec("demo").origin) if embedded else find_source(task)
    wanted = [embedded, task.structure_column, task.id_column, task.forces_column or bool(task.target_column)]
    key = [CACHE_VERSION, str(path.resolve()), path_state(path), *wanted]
    cached = cache_folder(cache_dir) / f"rows-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npz"
    rows = None
    if cached.exists():
        try:
            with np.load(cached, allow_pickle=False) as stored:
                rows = dict(stored)
        except DAMAGED:
            rows = None  # damaged: read the source again
    if rows is None:
        rows = collect(demo_rows(embedded) if embedded else source_rows(path, task), task, quiet)
        store_rows(cached, rows)
    return resolve_target(task, rows), task.dataset if embedded else str(path), rows


DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what reading half a cache file can raise
CACHE_VERSION = 1  # raise when collect() or build_graphs() writes something else


def cache_folder(cache_dir="") -> Path:
    """Where parsed rows and graphs are kept; safe to delete at any time."""
    return Path(cache_dir or os.environ.get("MOMA_CACHE") or ".cache")


def store_rows(path: Path, rows):
    """Atomic. A cache that cannot be written costs time only, so that is said and not raised."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as f:
                np.savez(f, **rows)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        cure = "set MOMA_CACHE to a folder that can be written"
        print(f"{path.parent}: the parsed rows cannot be cached ({error.strerror}); {cure}", file=sys.stderr)


def path_state(path: Path) -> str:
    """Size and time of a file and, where it is a folder or a list of files, of every structure file in it."""
    files = [path]
    if path.is_dir() or path.suffix == ".csv":
        files += [p for p, _ in source_rows(path, None) if p.is_file()]
    return ";".join(f"{p.name},{s.st_size},{s.st_mtime_ns}" for p in files for s in [p.stat()])


def collect(stream, task, quiet=False):
    """A stream of (structure, values) -> rows. structure: what to_arrays takes; values: {column: number, word or list}.

    One row at a time, so memory holds the arrays and nothing else.
    """
    Z, pos, cell, forces, pbc, reasons, keys, table, names = [], [], [], [], [], [], [], [], {}
    for structure, values in progress(stream, "reading", quiet):
        if not table and not task.target_column and values.get("forces") is not None:
            task = replace(task, forces_column="forces")  # an xyz file with energies and forces needs no flags
        try:
            z, x, box = to_arrays(structure)
            f = read_forces(values.get(task.forces_column), len(z)) if task.forces_column else None
            reasons.append("")
            keys.append(duplicate_key(z, x, box))
            pbc.append(bool(box.any()))
        except Skip as error:
            z, x, box, f = np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros((3, 3)), np.zeros((0, 3))
            reasons.append(" ".join(str(error).split())[:300])
            keys.append("")
            pbc.append(False)
        Z.append(z), pos.append(x), cell.append(box), forces.append(f)
        scalars = {k: v for k, v in values.items() if is_number(v) or isinstance(v, str) and len(v) <= 200}
        names.update(dict.fromkeys(scalars))
        table.append(scalars)
    rows = {
        "count": np.array([len(z) for z in Z], dtype=np.int64),
        "Z": np.concatenate([np.zeros(0, np.int64), *Z]).astype(np.int64),
        "pos": np.concatenate([np.zeros((0, 3)), *pos]),
        "cell": np.array(cell).reshape(-1, 3, 3),
        "pbc": np.array(pbc, dtype=bool),
        "reason": np.array(reasons, dtype=str),
        "key": np.array(keys, dtype=str),
    }
    if task.forces_column:
        rows["forces"] = np.concatenate([np.zeros((0, 3)), *forces])
    for name in names:
        column = [r.get(name) for r in table]
        if all(is_number(v) for v in column):
            rows[f"column:{name}"] = np.array([np.nan if v is None else v for v in column], dtype=np.float64)
        else:
            rows[f"column:{name}"] = np.array(["" if v is None else str(v) for v in column], dtype=str)
    column = task.id_column or next((c for c in ID_COLUMNS if c in names), "")
    if task.id_column and task.id_column not in names:
        raise ValueError(f"{task.dataset}: no column '{task.id_column}' for the ids (columns: {', '.join(names)})")
    ids, seen = [], Counter()
    for i, r in enumerate(table):
        value = r.get(column)
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        value = str(i) if value is None or value != value or value == "" else str(value)  # value != value: NaN
        seen[value] += 1
        ids.append(value if seen[value] == 1 else f"{value}#{i}")
    rows["id"] = np.array(ids, dtype=str)
    return rows


def is_number(value) -> bool:
    """Or missing, which is NaN in a column of numbers."""
    return value is None or isinstance(value, (int, float))


def read_forces(values, num_atoms):
    try:
        forces = np.asarray(values if values is not None else [], dtype=np.float64)
    except (TypeError, ValueError):
        raise Skip("no forces: not a table of numbers") from None
    if forces.shape != (num_atoms, 3):
        raise Skip(f"no forces: shape {forces.shape} for {num_atoms} atoms")
    if not np.isfinite(forces).all():
        raise Skip("no forces: not finite")
    return forces


def columns_of(rows) -> list:
    return [k.removeprefix("column:") for k in rows if k.startswith("column:")]


def is_text(rows, name) -> bool:
    return f"column:{name}" in rows and rows[f"column:{name}"].dtype.kind == "U"


def pick_column(rows, name, source):
    """(R,) values of one column; some are means of others (DERIVED) where the table lacks them."""
    if f"column:{name}" in rows:
        return rows[f"column:{name}"]
    parts = DERIVED.get(name, [])
    if parts and all(f"column:{p}" in rows for p in parts):
        return np.mean([as_numbers(rows[f"column:{p}"]) for p in parts], axis=0)
    there = ", ".join(columns_of(rows))
    raise ValueError(f"{source}: no column '{name}' (columns: {there}); --target-column or the tasks file names it")


def as_numbers(values):
    """(R,) floats; NaN where a word is no number."""
    if values.dtype.kind == "f":
        return values

    def number(word):
        try:
            return float(word)
        except ValueError:
            return np.nan

    return np.array([number(v) for v in values], dtype=np.float64)


def resolve_target(task, rows):
    """Fill an empty target_column where the table leaves no doubt."""
    if task.target_column:
        return task
    names = columns_of(rows)
    numbers = [n for n in names if not is_text(rows, n) and n not in ID_COLUMNS]
    choice = next((n for n in ("target", "energy") if n in names), numbers[0] if len(numbers) == 1 else "")
    forces = "forces" if "forces" in rows else ""
    if choice == "energy" and not task.unit:
        task = replace(task, unit="eV", pooling="sum")
    return replace(task, target_column=choice, forces_column=forces)


def label_problems(task, source, rows, need_target):
    """Put labels into rows["y"] and return (R,) reasons, "" where a row is usable."""
    problems = rows["reason"].astype(object)
    try:
        if not task.target_column:
            names = ", ".join(columns_of(rows)) or "no columns"
            raise ValueError(f"{source}: which column is the label? there are {names}; name it with --target-column")
        values = pick_column(rows, task.target_column, source)
    except ValueError:
        if need_target:
            raise
        rows["y"] = np.full(len(problems), np.nan)
        return problems
    raw = as_numbers(values)
    with np.errstate(all="ignore"):
        rows["y"] = transform(task, raw)
    if need_target:
        for i in np.flatnonzero(~np.isfinite(rows["y"])):
            if problems[i]:
                continue
            empty = np.isnan(raw[i]) and (values.dtype.kind == "f" or values[i].strip().lower() in ("", "nan", "none"))
            if empty:
                problems[i] = "no label"
            elif not np.isfinite(raw[i]):
                problems[i] = f"label is not a number: {values[i]}"
            else:
                problems[i] = f"no logarithm: {task.transform} of {raw[i]:g}"
    else:
        rows["y"][~np.isfinite(rows["y"])] = np.nan
    return problems


def progress(iterable, what, quiet=False, total=None):
    """A bar on stderr, only where stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=what, total=total, disable=True if quiet else None, leave=False, file=sys.stderr)


# ---------------------------------------------------------------- sources


def find_source(task: Task) -> Path:
    """The file or folder that holds the task's rows; a matminer name is looked up in its data home, then fetched."""
    name = task.dataset
    if not name:
        raise ValueError(f"task {task.name}: no data; name a matminer data set, a file or a folder")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.name != name or path.suffix in (".json", ".gz", ".csv", ".cif", ".xyz", ".extxyz", ".vasp"):
        raise FileNotFoundError(f"{name}: no such file or folder (task {task.name})")
    home = os.environ.get("MATMINER_DATA")
    if not home:  # matminer's default, without the seconds that importing it takes
        spec = importlib.util.find_spec("matminer")
        home = Path(spec.origin).parent / "datasets" if spec and spec.origin else Path(".")
    home = Path(home).expanduser()
    for suffix in (".json.gz", ".json"):
        if (home / (name + suffix)).exists():
            return home / (name + suffix)
    why = fetch(name, home / f"{name}.json.gz")
    if not why:
        return home / f"{name}.json.gz"
    here = home / "tasks.json"
    offered = here.exists() and task.name in read_tasks(here)
    raise FileNotFoundError(
        f"data set '{name}' is not in {home} and cannot be downloaded ({why}); put {name}.json.gz there, set "
        "MATMINER_DATA to a folder that has it, or use the embedded crystals (--data demo, make demo)"
        + (f"; {here} offers {task.name} from another file: pass --tasks {here}" if offered else "")
    )


def fetch(name, path: Path) -> str:
    """Download a matminer data set by matminer's own address and hash. Returns "" or why it did not work."""
    try:
        from matminer.datasets import get_dataset_attribute
    except ImportError:
        return "matminer is not installed"
    try:
        url, sha256 = get_dataset_attribute(name, "url"), get_dataset_attribute(name, "hash")
    except (ValueError, KeyError):
        return "matminer does not know it"
    import http.client
    import urllib.request

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        print(f"fetching {name} from {url}", file=sys.stderr)
        digest = hashlib.sha256()
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
        with urllib.request.urlopen(request, timeout=15) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as f:
                while block := response.read(1 << 20):
                    digest.update(block)
                    f.write(block)
        if digest.hexdigest() != sha256:
            return f"{url} does not have the hash that matminer expects"
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {getattr(error, 'reason', None) or error}"
    finally:
        part.unlink(missing_ok=True)
    return ""


def source_rows(path: Path, task):
    """(structure, values) of every row of a file or folder."""
    if path.is_dir():
        for name in ("targets.csv", "id_prop.csv"):
            if (path / name).exists():
                return csv_rows(path / name)
        return folder_rows(path)
    name = path.name.lower()
    if name.endswith(".csv"):
        return csv_rows(path)
    if name.endswith((".json", ".json.gz")):
        return table_rows(path, task)
    if name.endswith((".xyz", ".extxyz", ".xyz.gz", ".extxyz.gz")):
        return extxyz_rows(path)
    return iter([(path, {"id": structure_name(path)})])


def demo_rows(name):
    """The embedded crystals."""
    import demo

    made = demo.make(name)
    for i, identity in enumerate(made["ids"]):
        values = {"id": identity, "target": float(made["y"][i])}
        if made["forces"] is not None:
            values["forces"] = made["forces"][i]
        yield (made["Z"][i], made["pos"][i], made["cell"][i], np.full(3, made["pbc"][i])), values


def csv_rows(path: Path):
    """targets.csv (id, file, target[, split], ...) or CGCNN's headerless id_prop.csv (id, target), beside the files."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            lines = [line for line in csv.reader(f) if any(cell.strip() for cell in line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as CSV in UTF-8 ({error}); save it again in that form") from None
    if path.name == "id_prop.csv":
        header = ["id", "target"]
    else:
        header, lines = [c.strip() for c in lines[0]] if lines else [], lines[1:]
        if not {"id", "file"} & set(header):
            first = ",".join(header)
            raise ValueError(f"{path}: the first line is '{first}'; it should name the columns id,file,target[,split]")
    for line in lines:
        values = {k: v.strip() for k, v in zip(header, line)}
        name = values.get("file") or values.get("id", "")
        values.setdefault("id", structure_name(Path(name)))
        values = {k: number_or_word(v) if k not in ("id", "file", "split") else v for k, v in values.items()}
        yield find_structure(path.parent, name), values


def number_or_word(text):
    try:
        return float(text) if text else None
    except ValueError:
        return text


STRUCTURE_SUFFIXES = (".cif", ".vasp", ".poscar", ".json", ".xyz")


def find_structure(folder: Path, name: str) -> Path:
    """folder/name, or the first of name + a known ending that exists; CIF where none does (skipped later)."""
    paths = [folder / name, *(folder / (name + suffix) for suffix in STRUCTURE_SUFFIXES)]
    return next((p for p in paths if p.is_file()), paths[0] if paths[0].suffix else paths[1])


def is_poscar(path: Path) -> bool:
    return path.suffix.lower() in (".vasp", ".poscar") or path.name.upper().startswith(("POSCAR", "CONTCAR"))


def structure_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in STRUCTURE_SUFFIXES else path.name


def folder_rows(folder: Path):
    """A bare folder of structure files, without labels."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in STRUCTURE_SUFFIXES or is_poscar(p))
    if not paths:
        raise ValueError(f"{folder}: no structures (CIF, POSCAR, JSON, xyz) and no targets.csv in it")
    for path in paths:
        yield path, {"id": structure_name(path)}


def extxyz_rows(path: Path):
    """extxyz through ASE: energy and forces if they are there, and every number or word of the comment line."""
    try:
        import ase.io
    except ImportError:
        raise ValueError(f"{path}: reading xyz files needs ASE (pip install ase)") from None
    frames = ase.io.iread(str(path), index=":")
    while True:
        try:
            atoms = next(frames, None)
        except Exception as error:  # ASE's readers raise many kinds
            raise ValueError(f"{path}: not a readable xyz file ({type(error).__name__}: {error})") from None
        if atoms is None:
            return
        results = dict(atoms.calc.results) if atoms.calc else {}
        values = {k: v.item() if isinstance(v, np.generic) else v for k, v in {**atoms.info, **results}.items()}
        values |= {k: v for k, v in atoms.arrays.items() if k == "forces"}
        periodic = np.asarray(atoms.pbc, dtype=bool)
        yield (atoms.numbers, atoms.positions, np.array(atoms.cell), periodic), values


def table_rows(path: Path, task):
    """A json or json.gz table: pandas orient="split" (matminer, Matbench) or records, or one pymatgen structure."""
    columns = None
    for kind, value in json_stream(path):
        if kind == "columns":
            columns = value
            continue
        if kind == "whole":
            if "sites" not in value:
                raise ValueError(f"{path}: neither a table (pandas orient='split' or 'records') nor a structure")
            yield value, {"id": structure_name(Path(path.name.removesuffix(".gz")))}
            continue
        if isinstance(value, dict) and "sites" in value:  # a list of bare structures
            yield value, {}
            continue
        values = value if isinstance(value, dict) else dict(zip(columns, value))
        column = task.structure_column
        if column not in values and column == "structure" and "molecule" in values:
            column = "molecule"
        if column not in values:
            there = ", ".join(values)
            cure = "name it with --structure-column"
            raise ValueError(f"{path}: no column '{column}' with structures (columns: {there}); {cure}")
        yield values.pop(column), values


def json_stream(path: Path, block=1 << 22):
    """("columns", list) and ("row", list or dict) of a table, one row in memory at a time; else ("whole", dict)."""
    decoder = json.JSONDecoder()
    damaged = f"{path}: not a whole JSON table (damaged or cut short?); fetch it again, or write pandas orient='split'"
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as f:
        text, at = "", 0

        def peek(skip=" \t\r\n"):  # the next character that is not in `skip`
            nonlocal text, at
            while True:
                while at < len(text) and text[at] in skip:
                    at += 1
                if at < len(text):
                    return text[at]
                text, at = f.read(block), 0
                if not text:
                    raise ValueError(damaged)

        def take():  # the next value; lists, objects and strings only, whose end cannot be mistaken
            nonlocal text, at
            while True:
                try:
                    value, at = decoder.raw_decode(text, at)
                    return value
                except json.JSONDecodeError:
                    more = f.read(block)
                    if not more or len(text) - at > 64 * block:
                        raise ValueError(damaged) from None
                    text, at = text[at:] + more, 0

        def items():
            nonlocal at
            at += 1
            while peek(" \t\r\n,") != "]":
                yield take()
            at += 1

        try:
            if peek() == "[":
                for value in items():
                    yield "row", value
                return
            at += 1
            columns = False
            while peek(" \t\r\n,") != "}":
                key = take()
                peek(" \t\r\n:")
                if key == "data" and columns:
                    for value in items():
                        yield "row", value
                elif key in ("columns", "index"):
                    value = take()
                    if key == "columns":
                        columns = True
                        yield "columns", value
                else:  # no table
                    f.seek(0)
                    yield "whole", json.load(f)
                    return
        except (EOFError, OSError, zlib.error, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(damaged) from None


# ---------------------------------------------------------------- one structure


SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl "
    "Mc Lv Ts Og"
).split()
NUMBER = {symbol: z for z, symbol in enumerate(SYMBOLS) if z} | {"D": 1, "T": 1}  # deuterium and tritium are hydrogen
VACUUM = 50.0  # Å, more than twice any cutoff


def to_arrays(structure):
    """(Z, pos, cell): wrapped and checked. structure: a path, a pymatgen dictionary, or (Z, pos, cell, periodic).

    A direction without periodicity in an otherwise periodic cell (a slab, a wire) becomes a vector across VACUUM.
    Raises Skip.
    """
    if isinstance(structure, Path):
        structure = read_structure(structure)
    try:
        Z, pos, cell, periodic = structure if isinstance(structure, tuple) else from_dict(structure)
        Z, pos = np.asarray(Z, dtype=np.int64).reshape(-1), np.asarray(pos, dtype=np.float64).reshape(-1, 3)
        cell, periodic = np.asarray(cell, dtype=np.float64).reshape(3, 3), np.asarray(periodic, dtype=bool).reshape(3)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Skip(f"unreadable structure: {type(error).__name__} {error}") from None
    if len(Z) == 0 or len(pos) != len(Z):
        raise Skip(f"unreadable structure: {len(Z)} atoms, {len(pos)} positions")
    if not (np.isfinite(pos).all() and np.isfinite(cell).all()):
        raise Skip("unreadable structure: a coordinate or cell that is not finite")
    outside = (Z < 1) | (Z > 118)
    if outside.any():
        raise Skip(f"element outside 1..118: {Z[outside][0]}")
    if not periodic.any():
        cell = np.zeros((3, 3))
    else:
        if not periodic.all():
            cell = add_vacuum(pos, cell, periodic)
        lengths = np.linalg.norm(cell, axis=1)
        volume = abs(np.linalg.det(cell))
        if volume < 1e-2 or volume < 1e-5 * lengths.prod():
            raise Skip(f"cell of zero volume: {volume:.2g} A^3")
        pos = wrap(pos @ np.linalg.inv(cell)) @ cell
    check_distances(pos, cell)
    return Z, pos, cell


def wrap(frac):
    """Fractional coordinates into [0, 1); what is within 1e-9 of 1 is 0: rounding puts no atom on the far side."""
    frac = frac - np.floor(frac)
    frac[frac > 1 - 1e-9] = 0.0
    return frac


def add_vacuum(pos, cell, periodic):
    """Lattice vectors that are not periodic become perpendicular ones, the atoms' extent + VACUUM long."""
    cell = cell.copy()
    normals = np.linalg.svd(cell[periodic])[2][periodic.sum() :]  # orthonormal, perpendicular to the periodic vectors
    for k, normal in zip(np.flatnonzero(~periodic), normals):
        cell[k] = normal * (np.ptp(pos @ normal) + VACUUM)
    return cell


def check_distances(pos, cell, closest=0.1):
    """Raises Skip where two atoms, periodic images included, are closer than `closest` Å."""
    A = len(pos)
    shifts, inverse_cell = np.zeros((1, 3)), None
    if cell.any():
        inverse_cell = np.linalg.inv(cell)
        # a difference that short has |f_k| <= closest / height_k; 1 / height_k is the norm of column k of the inverse
        reach = np.floor(closest * np.linalg.norm(inverse_cell, axis=0) + 0.5).astype(int)
        if reach.any():
            if reach.max() > 20:
                raise Skip("cell of zero volume: lattice planes are much closer than the atoms could be")
            images = np.meshgrid(*(np.arange(-n, n + 1.0) for n in reach), indexing="ij")
            shifts = np.stack(images, -1).reshape(-1, 3) @ cell
    elif A == 1:
        return
    step = max(1, (1 << 20) // (A * len(shifts)))  # rows at a time: memory stays flat for large cells
    for i in range(0, A, step):
        d = pos[None, :, :] - pos[i : i + step, None, :]  # (step, A, 3)
        if inverse_cell is not None:
            f = d @ inverse_cell
            d = (f - np.rint(f)) @ cell
        d = d[:, :, None, :] + shifts
        r2 = np.einsum("ijsk,ijsk->ijs", d, d)
        rows = np.arange(len(r2))
        r2[rows, i + rows, len(shifts) // 2] = np.inf  # an atom and itself, image 0
        if r2.min() < closest**2:
            raise Skip(f"atoms closer than {closest} A: {np.sqrt(r2.min()):.3f} A")


def from_dict(structure):
    """(Z, pos, cell, periodic) from a pymatgen Structure's or Molecule's as_dict(), without building the object."""
    if isinstance(structure, str):
        structure = json.loads(structure)
    if not isinstance(structure, dict):
        raise Skip("no structure")
    sites, lattice = structure["sites"], structure.get("lattice")
    Z = []
    for site in sites:
        species = site["species"]
        if len(species) != 1 or abs(species[0].get("occu", 1) - 1) > 1e-3:
            raise Skip("disordered site: " + " ".join(f"{s['element']}{s.get('occu', 1):g}" for s in species))
        symbol = species[0]["element"]
        if symbol not in NUMBER:
            raise Skip(f"element outside 1..118: {symbol}")
        Z.append(NUMBER[symbol])
    if not lattice:
        return Z, [s["xyz"] for s in sites], np.zeros((3, 3)), np.zeros(3, dtype=bool)
    cell = np.array(lattice["matrix"], dtype=np.float64)
    pos = np.array([s["abc"] for s in sites], dtype=np.float64).reshape(-1, 3) @ cell
    return Z, pos, cell, np.array(lattice.get("pbc", [True, True, True]), dtype=bool)


def read_structure(path: Path):
    """One structure file -> a pymatgen dictionary, or arrays for xyz."""
    if not path.is_file():
        raise Skip(f"unreadable structure: no file {path.name}")
    try:
        if path.suffix.lower() == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix.lower() in (".xyz", ".extxyz"):
            return next(extxyz_rows(path))[0]
        from pymatgen.core import Structure

        with warnings.catch_warnings():  # pymatgen warns of rounded coordinates and the like
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Elements in POSCAR cannot be determined")  # it would invent some
            if is_poscar(path):
                from pymatgen.io.vasp import Poscar

                return Poscar.from_file(path, check_for_potcar=False).structure.as_dict(verbosity=0)
            return Structure.from_file(path).as_dict(verbosity=0)
    except Exception as error:  # pymatgen's parsers raise many kinds; whatever it is, this file is not a structure
        text = (str(error).splitlines() or [""])[0]
        raise Skip(f"unreadable structure: {path.name} {type(error).__name__} {text}") from None


# ---------------------------------------------------------------- splits and batches


def make_splits(crystals: Crystals, split_seed=0, split_file="") -> dict:
    """{"train", "val", "test"}: positions into `crystals`. From a file, a split column, or 70/15/15 at random.

    split_file: JSON with a list for each part, of row numbers in the source or of ids. Rows that were skipped (or left
    out by a limit) are dropped from it and counted on stderr.
    """
    M, name = len(crystals), crystals.task.dataset
    if split_file:
        return read_split(crystals, Path(split_file))
    if crystals.split and any(crystals.split):
        names = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
        parts = {"train": [], "val": [], "test": []}
        for i, part in enumerate(crystals.split):
            if part and part.lower() not in names:
                raise ValueError(f"{name}: split '{part}' of id {crystals.ids[i]} is not train, val or test")
            if part:
                parts[names[part.lower()]].append(i)
        return checked({k: np.array(v, dtype=np.int64) for k, v in parts.items()}, f"{name}, column split")
    if M < 3:
        raise ValueError(f"task {crystals.task.name}: {M} usable rows; three parts need at least 3")
    order = np.random.RandomState(split_seed).permutation(M)
    n = max(1, round(0.15 * M))
    return {"train": np.sort(order[2 * n :]), "val": np.sort(order[:n]), "test": np.sort(order[n : 2 * n])}


def read_split(crystals, path: Path):
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = {k: stored[k] for k in ("train", "val", "test")}
    except FileNotFoundError:
        raise FileNotFoundError(f"--split-file {path}: no such file") from None
    except (ValueError, KeyError, TypeError):
        form = '{"train": [...], "val": [...], "test": [...]}'
        raise ValueError(f"--split-file {path}: should be JSON {form}") from None
    by_id = any(isinstance(v, str) for part in stored.values() for v in part)
    at = {key: i for i, key in enumerate(crystals.ids if by_id else crystals.row.tolist())}
    if not by_id:
        beyond = [r for part in stored.values() for r in part if not 0 <= r < crystals.num_rows]
        if beyond:
            table = f"the {crystals.num_rows} rows of {crystals.task.dataset}"
            raise ValueError(f"--split-file {path}: row {beyond[0]} is not among {table}; it is for another table")
    splits = {k: np.array([at[r] for r in part if r in at], dtype=np.int64) for k, part in stored.items()}
    dropped = sum(map(len, stored.values())) - sum(map(len, splits.values()))
    if dropped:
        print(f"{path}: {dropped} of its rows were skipped or not loaded, and are left out", file=sys.stderr)
    return checked(splits, f"--split-file {path}")


def checked(splits, source):
    for name in ("train", "val"):
        if not len(splits[name]):
            raise ValueError(f"{source}: no usable row in part '{name}'")
    everything = np.concatenate(list(splits.values()))
    if len(np.unique(everything)) < len(everything):
        raise ValueError(f"{source}: a row is listed twice, so the parts overlap")
    return splits


def report_duplicates(crystals, splits) -> int:
    """How many val and test rows are the same structure as a row of an earlier part; one line on stderr if any."""
    seen, total, lines = {}, 0, []
    for name, part in splits.items():
        keys = [duplicate_key(crystals.Z[i], crystals.pos[i], crystals.cell[i]) for i in part]
        found = Counter(seen[k] for k in keys if k in seen)
        lines += [f"{n} of {name} in {other}" for other, n in found.items()]
        total += sum(found.values())
        for k in keys:
            seen.setdefault(k, name)
    if total:
        where = ", ".join(lines)
        print(f"{crystals.task.name}: {total} structures occur in two parts of the split ({where})", file=sys.stderr)
    return total


def batch_indices(num_atoms, indices, batch_size: int, max_atoms=0, generator=None) -> list:
    """Positions in batches of at most batch_size crystals and max_atoms atoms (0: no bound), in order.

    num_atoms: (M,) atoms of every crystal, or edges for a budget of edges. A crystal above the budget is a batch of its
    own. generator: torch.Generator, shuffles first.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if generator is not None:
        indices = indices[torch.randperm(len(indices), generator=generator).numpy()]
    batches, atoms = [], 0
    for i in indices.tolist():
        n = int(num_atoms[i])
        if not batches or len(batches[-1]) == batch_size or max_atoms and atoms + n > max_atoms:
            batches.append([])
            atoms = 0
        batches[-1].append(i)
        atoms += n
    return batches


def to_device(batch: dict, device) -> dict:
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ---------------------------------------------------------------- graphs


@dataclass(frozen=True)
class GraphConfig:
    """The four graphs of GemNet-OC. Cutoffs in angstrom; max_neighbors per receiving atom.

    main: edges that carry messages, symmetric. a2ee2a: neighbours for the atom-edge interactions. qint: the middle edge
    of quadruplets. a2a: the long-range atom graph. The other three are selections of the a2a graph.
    """

    cutoff: float = 12.0
    cutoff_a2ee2a: float = 12.0
    cutoff_qint: float = 12.0
    cutoff_a2a: float = 12.0
    max_neighbors: int = 30
    max_neighbors_a2ee2a: int = 20
    max_neighbors_qint: int = 8
    max_neighbors_a2a: int = 1000
    graph_rule: str = "symmetric"  # or "published": exactly k, and of a pair only the lower-numbered atom chooses
    a2ee2a: bool = True  # whether the model reads the graph at all
    qint: bool = True
    a2a: bool = True


TIE = 1e-3  # angstrom: neighbours this close to the k-th nearest count as equally near


def radius_graph(pos, cell, periodic, r):
    """Every pair of atoms of one structure within r of each other, periodic images included.

    pos (A, 3), cell (3, 3) with lattice vectors as rows; float64, angstrom; any atom may lie outside the cell. Returns
    src, dst (E,), offset (E, 3) and d (E,): the image of src displaced by offset @ cell lies within r of dst. Sorted by
    dst, then src, then offset with the third axis fastest.
    """
    A, r2 = len(pos), (r + 1e-8) ** 2
    offsets = torch.zeros(1, 3, dtype=torch.long)
    if periodic:
        inverse = torch.linalg.inv(cell)
        frac = pos @ inverse
        reach = r * inverse.norm(dim=0) + 1e-9  # r / height, height being the distance between opposite faces
        low, high = frac.amin(0) - reach, frac.amax(0) + reach  # where an image must lie to be near some atom
        first, last = (low - frac.amax(0)).ceil().int(), (high - frac.amin(0)).floor().int()
        axes = [torch.arange(a, b + 1) for a, b in zip(first, last)]
        offsets = torch.cartesian_prod(*axes)
    src, n = torch.arange(A).repeat_interleave(len(offsets)), offsets.repeat(A, 1)
    if periodic:
        f = frac[src] + n
        near = torch.nonzero(((f >= low) & (f <= high)).all(1)).squeeze(1)
        src, n = src[near], n[near]
    image = (pos[src] + n.to(pos.dtype) @ cell).T.contiguous()  # (3, J)
    d2 = sum((image[i] - pos[:, i : i + 1]).square_() for i in range(3))  # (A, J)
    dst, j = torch.nonzero((d2 <= r2) & (d2 > 1e-4), as_tuple=True)  # 1e-4: an atom is not its own neighbour
    return src[j], dst, n[j], d2[dst, j].sqrt()


def kth_distance(d, dst, order, first, count, k):
    """Distance of every atom's k-th nearest neighbour; inf where it has no more than k. order sorts by (dst, d)."""
    at = (first + k - 1).clamp(max=max(len(d) - 1, 0))
    return torch.where(count > k, d[order[at]] if len(d) else math.inf, math.inf)


def build_graphs(structures, graph):
    """[(Z, pos, cell, pbc)] -> one record of numpy arrays for each: what the cache stores and `collate` reads.

    The nearest k neighbours of an atom are all those within TIE of the k-th, so that shells of equal distance are kept
    whole. An undirected main edge exists when either end chose it; only one direction of it is stored. With
    graph_rule="published": exactly k (equal distances in the order of the list), chosen by the receiving atom only.
    """
    num_atoms = torch.tensor([len(Z) for Z, *_ in structures])
    pos = torch.from_numpy(np.concatenate([p for _, p, *_ in structures]))
    cell = torch.from_numpy(np.stack([c for _, _, c, _ in structures]))
    pbc = [bool(p) for *_, p in structures]
    others = [getattr(graph, f"cutoff_{g}") for g in ("a2ee2a", "qint", "a2a") if getattr(graph, g)]
    radius = max([graph.cutoff, *others])
    first_atom = (torch.cumsum(num_atoms, 0) - num_atoms).tolist()
    atoms = [pos[i : i + n] for i, n in zip(first_atom, num_atoms.tolist())]
    found = [radius_graph(x, c, p, radius) for x, c, p in zip(atoms, cell, pbc)]
    src, dst, offset, d = (torch.cat(column) for column in zip(*found))
    edges = torch.tensor([len(f[0]) for f in found])
    structure = torch.repeat_interleave(torch.arange(len(found)), edges)
    shift = torch.repeat_interleave(torch.tensor(first_atom), edges)
    src, dst = src + shift, dst + shift
    A = len(pos)
    count = torch.bincount(dst, minlength=A)
    first = torch.cumsum(count, 0) - count
    order = torch.argsort(dst * (radius + 1) + d, stable=True) if len(d) else dst
    published = graph.graph_rule == "published"
    rank = torch.empty_like(dst)
    rank[order] = torch.arange(len(dst)) - first[dst[order]]

    def nearest(name):
        """Which edges the receiving atom chooses: (E,) bool, and the distance up to which it chooses: (A,)."""
        suffix = "" if name == "main" else f"_{name}"
        k, r = getattr(graph, f"max_neighbors{suffix}"), getattr(graph, f"cutoff{suffix}")
        if published:
            return (rank < k) & (d <= r), None
        up_to = (kth_distance(d, dst, order, first, count, k) + TIE).clamp(max=r + 1e-8)
        return d <= up_to[dst], up_to

    half = (src < dst) | ((src == dst) & lexicographically_negative(offset))
    chosen, up_to = nearest("main")
    if not published:
        chosen = d <= torch.maximum(up_to[src], up_to[dst])
    picked = {"main": chosen & half}
    picked |= {name: nearest(name)[0] for name in ("a2ee2a", "qint", "a2a") if getattr(graph, name)}

    records = [{"Z": np.asarray(Z, np.int16), "pos": p, "cell": c} for Z, p, c, _ in structures]
    for name, mask in picked.items():
        e = torch.nonzero(mask).squeeze(1)
        index = torch.stack([src[e] - shift[e], dst[e] - shift[e]], dim=1).to(torch.int16).numpy()
        n = offset[e].to(torch.int16).numpy()
        ends = torch.cumsum(torch.bincount(structure[e], minlength=len(structures)), 0).tolist()
        for record, start, end in zip(records, [0, *ends], ends):
            record[f"{name}.index"], record[f"{name}.offset"] = index[start:end], n[start:end]
    return records


def lexicographically_negative(n):
    """(E, 3) -> (E,): the first non-zero component is negative."""
    x, y, z = n.unbind(1)
    return (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))


def edge_vectors(batch, name, dtype=torch.float32):
    """Distances (E,) and unit vectors from source to target (E, 3) of one graph. Differentiable in pos and cell.

    Computed in the precision of pos (float64), returned in `dtype`.
    """
    if f"{name}.d" in batch:  # given, not computed: parity with stored graphs
        return batch[f"{name}.d"], batch[f"{name}.V"]
    pos, src, dst = batch["pos"], batch[f"{name}.src"], batch[f"{name}.dst"]
    cell = batch["cell"].index_select(0, batch["batch"].index_select(0, dst))
    shift = torch.bmm(batch[f"{name}.offset"].to(pos.dtype)[:, None], cell).squeeze(1)
    v = pos.index_select(0, dst) - pos.index_select(0, src) - shift
    d = v.square().sum(1).sqrt()
    return d.to(dtype), (v / d[:, None]).to(dtype)


def collate(records, edge_dropout=0.0, generator=None):
    """Records of a GraphDataset -> one batch, a dict of tensors. Their y and index, where they have them, become (B,).

    edge_dropout: probability of leaving out an edge (both directions of a main edge), for pre-training.
    """
    num_atoms = torch.tensor([len(r["Z"]) for r in records])
    first = (torch.cumsum(num_atoms, 0) - num_atoms).numpy()
    join = lambda key: torch.from_numpy(np.concatenate([r[key] for r in records]))  # noqa: E731
    batch = {
        "Z": join("Z").long(),
        "pos": join("pos"),
        "cell": torch.from_numpy(np.stack([r["cell"] for r in records])),
        "batch": torch.repeat_interleave(torch.arange(len(records)), num_atoms),
        "num_atoms": num_atoms,
    }
    for key in ("y", "index"):
        if key in records[0]:
            batch[key] = torch.as_tensor(np.array([r[key] for r in records]))
    if "forces" in records[0]:
        batch["forces"] = join("forces")  # (A, 3)
    for name in ("main", "a2ee2a", "qint", "a2a"):
        if f"{name}.index" not in records[0]:
            continue
        counts = torch.tensor([len(r[f"{name}.index"]) for r in records])
        shift = torch.repeat_interleave(torch.from_numpy(first), counts)
        src, dst = (join(f"{name}.index").long() + shift[:, None]).unbind(1)
        offset = join(f"{name}.offset").long()
        if edge_dropout > 0:
            keep = torch.rand(len(src), generator=generator) >= edge_dropout
            src, dst, offset = src[keep], dst[keep], offset[keep]
        if name == "main":  # each stored edge, then its reverse
            src, dst, offset = torch.cat([src, dst]), torch.cat([dst, src]), torch.cat([offset, -offset])
            batch["main.swap"] = torch.arange(len(src)).roll(len(src) // 2)
        batch |= {f"{name}.src": src, f"{name}.dst": dst, f"{name}.offset": offset}
    if edge_dropout > 0:
        batch["edge_dropout"] = edge_dropout  # sums over edges are divided by 1 - p in the output blocks
    return batch | tables(batch)


def incoming(dst, num_atoms):
    """Padded table of the edges into every atom, (A, K), padding E; and every edge's place in it, (E,)."""
    E = len(dst)
    count = torch.bincount(dst, minlength=num_atoms)
    K = int(count.max()) if E else 0
    order = torch.argsort(dst, stable=True)
    rank = torch.arange(E) - (torch.cumsum(count, 0) - count)[dst[order]]
    slot = torch.empty(E, dtype=torch.long)
    slot[order] = dst[order] * K + rank
    table = torch.full((num_atoms * K,), E)
    table[slot] = torch.arange(E)
    return table.view(num_atoms, K), slot


def tables(batch):
    """Per-atom tables of edges, and masks of the pairs of edges that make a triplet or a quadruplet.

    Two edges into an atom come from the same image when source and offset are equal. Both are packed in one integer, so
    that the offsets of a chain of edges add up: key(d -> b) + key(b -> a) tells which image of d is seen from a.
    """
    A = len(batch["Z"])
    out = {}
    main, slot = incoming(batch["main.dst"], A)
    out |= {"main.table": main, "main.slot": slot}
    K = main.shape[1]
    wide = 2 * 2 * (1 + max(int(batch[k].abs().max()) if len(batch[k]) else 0 for k in batch if k.endswith(".offset")))
    place = torch.tensor([wide * wide, wide, 1])

    def pad(values, table, fill):
        return torch.cat([values, values.new_tensor([fill])])[table]

    there = [name for name in ("main", "a2ee2a", "qint") if f"{name}.src" in batch]
    shift = {name: (batch[f"{name}.offset"] * place).sum(1) for name in there}
    key = {name: batch[f"{name}.src"] * wide**3 + shift[name] for name in shift}
    main_key = pad(key["main"], main, -(wide**4))  # (A, K)
    main_real = main < len(key["main"])
    out["e2e.mask"] = main_real[:, :, None] & main_real[:, None, :] & ~torch.eye(K, dtype=torch.bool)
    if "a2ee2a" in key:
        table, _ = incoming(batch["a2ee2a.dst"], A)
        a2ee2a_key = pad(key["a2ee2a"], table, -1)
        real = main_real[:, :, None] & (table < len(key["a2ee2a"]))[:, None, :]
        out |= {"a2ee2a.table": table, "a2e.mask": real & (main_key[:, :, None] != a2ee2a_key[:, None, :])}
    if "a2a.src" in batch:
        src, dst = batch["a2a.src"], batch["a2a.dst"]
        pairs, pair = torch.unique(dst * A + src, return_inverse=True)
        table, _ = incoming(pairs // A, A)
        out |= {"a2a.pair": pair, "a2a.pair_src": pairs % A, "a2a.table": table}
        out["a2a.table_src"] = pad(pairs % A, table, A)
    if "qint" in key:
        src, dst = batch["qint.src"], batch["qint.dst"]  # b -> a
        table, _ = incoming(dst, A)
        qint_key = pad(key["qint"], table, -1)
        real = main_real[:, :, None] & (table < len(src))[:, None, :]
        out |= {"qint.table": table, "qint.mask": real & (main_key[:, :, None] != qint_key[:, None, :])}  # c is not b
        seen_from_a = main_key[src] + shift["qint"][:, None]  # (Q, Kd): image of d relative to a
        d_real = main_real[src] & (seen_from_a != (dst * wide**3)[:, None])  # d is not a
        not_c = main_key[dst][:, :, None] != seen_from_a[:, None, :]  # (Q, Kc, Kd): d is not c
        out["quad.mask"] = d_real[:, None, :] & main_real[dst][:, :, None] & not_c
    return out


# ---------------------------------------------------------------- graphs on disk


class GraphDataset:
    """Graphs of all crystals, built once into one memory-mapped folder and read back one record at a time.

    The folder's name is the hash of the structures and the graph settings (labels play no part), so tasks on the same
    structures share it. dataset[i] is build_graphs' record with index, y and, where there are any, forces.
    """

    def __init__(self, crystals: Crystals, graph, cache_dir="", quiet=False):
        self.crystals, self.ids, self.y = crystals, crystals.ids, crystals.y
        self.num_atoms = np.array([len(z) for z in crystals.Z])
        self.hashes = [structure_hash(*s) for s in zip(crystals.Z, crystals.pos, crystals.cell)]
        settings = json.dumps({"version": CACHE_VERSION, **asdict(graph)}, sort_keys=True)
        key = hashlib.sha256(("\n".join(self.hashes) + settings).encode()).hexdigest()[:24]
        self.folder = cache_folder(cache_dir) / f"graphs-{key}"
        self._open_or_build(graph, quiet)
        self.edges = 2 * np.diff(self.starts["main.index"])  # an undirected edge is stored once

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        i = range(len(self))[i]
        record = {}
        for name, flat in self.fields.items():
            a, b = self.starts[name][i : i + 2]
            value = np.array(flat[a:b])
            record[name] = value[0] if self.meta[name]["scalar"] else value
        record["index"], record["y"] = i, self.y[i]
        if self.crystals.forces is not None:
            record["forces"] = self.crystals.forces[i]
        return record

    def __getstate__(self):  # a worker process maps the files again: pickling a memory map would copy it
        return {k: v for k, v in self.__dict__.items() if k != "fields"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.fields = self._map()

    def _open_or_build(self, graph, quiet):
        if self._open():
            return
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with lock(self.folder.with_suffix(".lock")) as alone:  # a second process waits here, then finds the folder
                if self._open():
                    return
                killed = self.folder.parent.glob(f"{self.folder.name}.*.part") if alone else ()
                for part in killed:  # left by a run that was killed
                    shutil.rmtree(part, ignore_errors=True)
                part = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.part")
                try:
                    part.mkdir()
                    self._build(part, graph, quiet)
                    if not self._open():
                        shutil.rmtree(self.folder, ignore_errors=True)  # a damaged one
                        os.replace(part, self.folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            why, cure = error.strerror or error, "free space there or set MOMA_CACHE to another folder"
            raise ValueError(f"{self.folder.parent}: graphs cannot be stored ({why}); {cure}") from None
        assert self._open(), self.folder

    def _build(self, folder: Path, graph, quiet):
        crystals, meta, counts = self.crystals, {}, {}
        with contextlib.ExitStack() as stack:
            files = {}
            for chunk in progress(list(chunks(self.num_atoms)), "graphs", quiet):
                structures = [(crystals.Z[i], crystals.pos[i], crystals.cell[i], bool(crystals.pbc[i])) for i in chunk]
                for record in build_graphs(structures, graph):
                    record = {k: np.asarray(v) for k, v in record.items()}
                    if not meta:
                        for name, value in record.items():
                            meta[name] = {"dtype": value.dtype.str, "shape": value.shape[1:], "scalar": value.ndim == 0}
                            files[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
                            counts[name] = []
                    assert record.keys() == meta.keys(), (record.keys(), meta.keys())
                    for name, value in record.items():
                        value = value.reshape(1) if value.ndim == 0 else value
                        assert value.shape[1:] == meta[name]["shape"], (name, value.shape, meta[name])
                        files[name].write(np.ascontiguousarray(value, dtype=meta[name]["dtype"]).tobytes())
                        counts[name].append(len(value))
        starts = {name: np.concatenate([[0], np.cumsum(c)]).astype(np.int64) for name, c in counts.items()}
        assert all(len(s) == len(self) + 1 for s in starts.values())
        np.savez(folder / "starts.npz", **starts)
        (folder / "meta.json").write_text(json.dumps(meta))

    def _open(self) -> bool:
        """Map the folder's files. False where it is missing or not whole."""
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            with np.load(self.folder / "starts.npz") as stored:
                self.starts = dict(stored)
            self.fields = self._map()
        except DAMAGED:
            return False
        return True

    def _map(self):
        fields = {}
        for name, m in self.meta.items():
            shape = (int(self.starts[name][-1]), *m["shape"])
            path, size = self.folder / f"{name}.bin", int(np.prod(shape)) * np.dtype(m["dtype"]).itemsize
            if path.stat().st_size != size:
                raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {size}")
            if size:
                fields[name] = np.memmap(path, dtype=m["dtype"], mode="r", shape=shape)
            else:  # an empty file cannot be mapped
                fields[name] = np.zeros(shape, dtype=m["dtype"])
        return fields


def chunks(num_atoms, most=512):
    """Consecutive positions, about `most` atoms at a time."""
    chunk, atoms = [], 0
    for i, n in enumerate(num_atoms):
        if chunk and atoms + n > most:
            yield chunk
            chunk, atoms = [], 0
        chunk.append(i)
        atoms += n
    if chunk:
        yield chunk


@contextlib.contextmanager
def lock(path: Path):
    """Held by one process at a time and freed by the system however that process ends. Yields whether it holds."""
    with open(path, "w") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, some network drives: two processes build twice, a waste and no harm
            yield False
        else:
            yield True
