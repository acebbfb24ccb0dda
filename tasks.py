"""The task table: names, data sets, units, transforms (paper, section 3.1 and B.1).

    task = get_task("dielectric")

A label y is the task's column after its transform, in `unit_of(task)`.
"""

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from files import UserError, read_json, reading


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
    pooling: str = ""  # mean, sum or max over atoms in the head; "": mean, or sum for a total energy
    role: str = "user"  # hub, downstream, pretrain, extra, user
    paper: str = ""  # the row's name in the paper's tables
    note: str = ""
    forces_column: str = ""  # (A, 3) eV/Å for pre-training; rows without are skipped
    subset: str = ""  # keep the rows whose column "subset" is one of these, separated by ";"
    license: str = ""  # of the data

    def __post_init__(self):
        for key, allowed in (("transform", TRANSFORMS), ("pooling", ("", *POOLINGS))):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"task {self.name}: {key} '{value}' is not one of {', '.join(allowed)}")


TRANSFORMS = {  # name: (label from raw value, raw value from label, the raw value must be above)
    "none": (lambda x: x, lambda y: y, -np.inf),
    "log": (np.log, np.exp, 0.0),
    "log10": (np.log10, lambda y: 10.0**y, 0.0),
    "log1p": (np.log1p, np.expm1, -1.0),
}
POOLINGS = ("mean", "sum", "max")
ID_COLUMNS = ("id", "material_id", "mpid", "jid", "qm9_index", "source_id", "likely_mpid", "task")
DERIVED = {f"dielectric {f}": [f"epsilon_{k} {f}" for k in "xyz"] for f in ("opt", "tbmbj")}  # means
MP, JARVIS = "CC BY 4.0 (Materials Project)", "NIST, free use (JARVIS-DFT)"  # licences
RICCI, DFPT, J3D = "ricci_boltztrap_mp_tabular", "phonon_dielectric_mp", "jarvis_dft_3d"
PIEZO, EPS = "piezoelectric_tensor", "relative permittivity"


def _table(role, license, rows, **common):
    """Rows (name, paper's row, dataset, column, unit[, transform]) -> {name: Task}."""
    tasks = {}
    for name, paper, dataset, column, unit, *change in rows:
        values = dict(unit=unit, transform=change[0] if change else "none", role=role, paper=paper)
        tasks[name] = Task(name, dataset, column, license=license, **values, **common)
    return tasks


MOLECULES = {"pooling": "sum", "structure_column": "molecule"}
FORCE_FIELD = Task("", "", "energy", unit="eV", pooling="sum", role="pretrain", forces_column="forces")

# Which targets are logged, and how, follows Chang et al. 2022, whose sets these are. For the JARVIS moduli
# and dielectric constant and the effective masses that is inferred from the published means.
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
        ("jarvis_eform", "JARVIS Formation Energy", J3D, "e_form", "eV/atom"),
        ("jarvis_bandgap", "JARVIS Band Gap", J3D, "gap opt", "eV"),
        ("jarvis_dielectric_opt", "JARVIS Dielectric Constant", J3D, "dielectric opt", EPS, "log"),
        ("jarvis_gvrh", "JARVIS Shear Modulus", J3D, "shear modulus", "GPa", "log"),
        ("jarvis_kvrh", "JARVIS Bulk Modulus", J3D, "bulk modulus", "GPa", "log"),
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
        ("jarvis_3d_eps_tbmbj", "3D Poly Electronic", J3D, "dielectric tbmbj", EPS),
        ("jarvis_3d_gap_tbmbj", "3D Band Gap", J3D, "gap tbmbj", "eV"),
    ]),
    **_table("downstream", MP, [
        ("mp_dielectric", "Refractive Index", "matbench_dielectric", "n", "refractive index", "log"),
        ("mp_elastic_anisotropy", "Elastic Anisotropy", "elastic_tensor_2015", "elastic_anisotropy", ""),
        ("mp_eps_electronic", "Electronic Dielectric Constant", DFPT, "eps_electronic", EPS, "log"),
        ("mp_eps_total", "Dielectric Constant", DFPT, "eps_total", EPS, "log"),
        ("mp_phonons", "Phonons Mode Peak", "matbench_phonons", "last phdos peak", "1/cm", "log"),
        ("mp_poisson_ratio", "Poisson Ratio", "elastic_tensor_2015", "poisson_ratio", ""),
        ("mp_poly_electronic", "Poly Electronic", "dielectric_constant", "poly_electronic", EPS),
        ("mp_poly_total", "Poly Total", "dielectric_constant", "poly_total", EPS),
        ("piezoelectric_tensor", "Piezoelectric Modulus", PIEZO, "eij_max", "C/m^2", "log1p"),
    ]),
    **_table("hub", "published for free use (QM9)", [
        (f"qm9_{column}", "", "qm9", column, unit) for column, unit in [
            ("mu", "D"), ("alpha", "a0^3"), ("homo", "eV"), ("lumo", "eV"), ("gap", "eV"), ("r2", "a0^2"),
            ("zpve", "eV"), ("u0_atom", "eV"), ("u298_atom", "eV"), ("h298_atom", "eV"),
            ("g298_atom", "eV"), ("cv", "cal/mol/K"),
        ]
    ], **MOLECULES),
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
    **_table("pretrain", "", [("qm9", "", "qm9", "u0_atom", "eV")], **MOLECULES),
    # Energies and forces. Rows of one task share a zero of energy: one code, functional and references.
    **{
        name: replace(FORCE_FIELD, name=name, dataset=dataset, structure_column=structure, subset=subset)
        for name, dataset, structure, subset in [
            ("ff_mattersim_benchmarks", "ff_mattersim_benchmarks", "structure", ""),  # all: PBE(+U), VASP
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

    data: a file or folder of one's own; a known name then lends its column, unit and transform, a new one
    makes a new task. overrides: fields of Task; empty ones are ignored. What tasks_file lacks is in TASKS.
    """
    overrides = {k: v for k, v in overrides.items() if v not in ("", None)}
    if data == "demo":
        tasks = demo_tasks()
        known = tasks.get(name) or tasks.get(f"demo_{name}")
        if not known:
            have = ", ".join(tasks)
            raise UserError(f"--task {name}: the embedded crystals have no such task; they have {have}")
        return replace(known, **overrides)
    own = read_tasks(tasks_file) if tasks_file else {}
    known = known_task(name, TASKS | own)
    if data:
        known = replace(known or Task(name or Path(data).resolve().name.split(".")[0]), dataset=str(data))
    elif known is None:
        offered = [*own, *TASKS, *ALIASES]
        near = ", ".join(difflib.get_close_matches(name, offered, 4, 0.4) or offered[:4])
        where = f"{tasks_file} and the task table" if tasks_file else "the task table"
        cure = "for data of your own pass --tasks FILE or --data PATH"
        raise UserError(f"--task {name}: not in {where}; near names: {near}; {cure}")
    return replace(known, **overrides)


def known_task(name, tasks) -> Task | None:
    """The entry of `tasks` under a name, an alias, or its lower-case form, as modules are named."""
    lower = {key.lower(): task for key, task in tasks.items()}
    return tasks.get(name) or tasks.get(ALIASES.get(name)) or lower.get(name.lower())


def demo_tasks() -> dict:
    """{name: Task} of the embedded crystals."""
    import demo

    tasks = {}
    for name, row in demo.TASKS.items():
        forces = "forces" if row["role"] == "pretrain" else ""
        values = {key: row[key] for key in ("unit", "pooling", "role", "note")}
        tasks[name] = Task(name, f"demo:{name}", "target", forces_column=forces, license="MIT", **values)
    return tasks


def read_tasks(path) -> dict:
    """{name: Task} from JSON {name: {"data": file, field of Task: value, ...}}; paths are relative to it.

    An entry under a name of TASKS has that task's fields where it names no others.
    """
    form = 'a tasks file, {"name": {"data": a file, a folder or a matminer name, "unit": "eV", ...}}'
    entries = read_json(path, form)
    with reading(f"--tasks {path}", form):
        return {name: read_entry(name, entry, Path(path)) for name, entry in entries.items()}


def read_entry(name, entry, path: Path) -> Task:
    """One entry of the tasks file `path`."""
    if not isinstance(entry, dict) or not entry.get("data"):
        form = 'an object with "data": a file, a folder or a matminer name'
        raise UserError(f"--tasks {path}: entry '{name}' should be {form}")
    known = ["data", *(f.name for f in fields(Task) if f.name not in ("name", "dataset"))]
    for key, value in entry.items():
        if key not in known:
            raise UserError(f"--tasks {path}: '{name}' has unknown keys {key}; known: {', '.join(known)}")
        if not isinstance(value, str):
            raise UserError(f"--tasks {path}: '{name}' has {key} {value!r}; it should be a word in quotes")
    source = entry["data"]
    if (path.parent / source).exists() or "/" in source or "." in source:  # else a matminer name
        source = str(path.parent / Path(source).expanduser())
    values = {k: v for k, v in entry.items() if k != "data"}
    return replace(known_task(name, TASKS) or Task(name), name=name, dataset=source, **values)


def task_names(role: str, tasks_file="", data="") -> list:
    """Names of the tasks of one role, of the embedded crystals, the tasks file or TASKS."""
    tasks = demo_tasks() if data == "demo" else read_tasks(tasks_file) if tasks_file else TASKS
    return [name for name, task in tasks.items() if task.role == role]


def unit_of(task: Task) -> str:
    """Unit of the label after the transform: "log(1/cm)" for a column in 1/cm, "log" for one without."""
    if task.transform == "none" or not task.unit:
        return task.unit if task.transform == "none" else task.transform
    return f"log(1 + {task.unit})" if task.transform == "log1p" else f"{task.transform}({task.unit})"


def transform(task: Task, raw):
    """Raw values in task.unit -> labels in unit_of(task). Values without a logarithm become NaN."""
    forward, _, above = TRANSFORMS[task.transform]
    raw = np.asarray(raw, dtype=np.float64)
    with np.errstate(all="ignore"):
        y = np.where(raw > above, forward(raw), np.nan)
    return y if y.ndim else float(y)


def inverse(task: Task, y):
    """Labels in unit_of(task) -> values in task.unit."""
    raw = TRANSFORMS[task.transform][1](np.asarray(y, dtype=np.float64))
    return raw if np.ndim(raw) else float(raw)
