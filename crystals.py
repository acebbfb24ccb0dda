"""Any source of crystals -> `Crystals` (paper, B.1): matminer tables, folders of files, extxyz, lists.

    crystals = load_crystals(get_task("dielectric"))        # from MATMINER_DATA, datasets/ or matminer
    crystals = from_structures([structure, ...], y, unit="eV")    # pymatgen or ASE objects

M: crystals in a task. R: rows of a source, unusable ones included. A: atoms. Lengths in Å. What cannot be
used is in `skipped` with a reason, "rule: detail"; nothing is left out without one. Needs numpy only.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from files import UserError, cache_folder, cached_folder, progress
from sources import NUMBER, SYMBOLS, Skip, find_source, in_memory, list_files, source_rows, to_number
from tasks import DERIVED, ID_COLUMNS, Task, transform, unit_of


@dataclass
class Crystals:
    """What every source becomes. Molecules have pbc False and a cell of zeros."""

    task: Task
    ids: list  # unique; of the second structure of one name, "name#2"
    Z: list  # (A,) int64 each
    pos: list  # (A, 3) float64 each, cartesian, Å, inside the cell
    cell: list  # (3, 3) float64 each, rows are lattice vectors
    pbc: np.ndarray  # (M,) bool
    y: np.ndarray  # (M,) float64 in unit_of(task); NaN where there is no label and none was asked for
    row: np.ndarray  # (M,) int64 position in the source, skipped rows counted; split files hold these
    split: list | None = None  # "train", "val" or "test" of a table that has the column
    skipped: list = field(default_factory=list)  # [(id, reason)]
    forces: list | None = None  # (A, 3) float64 each, eV/Å
    teacher: list | None = None  # (A, C) each, a teacher's features of the atoms (teachers.py)
    fingerprint: str = ""  # sha256 over Z, pos, cell, y
    num_rows: int = 0  # rows of the source

    def __len__(self):
        return len(self.ids)

    def __post_init__(self):
        self.fingerprint = self.fingerprint or fingerprint(self.Z, self.pos, self.cell, self.y)
        self.num_rows = self.num_rows or len(self.ids)


def load_crystals(task: Task, limit=0, on_error="skip", need_target=True, quiet=False, cache_dir=""):
    """The Crystals of the task's source. Unusable rows are skipped by rule; on_error="stop" raises instead.

    limit: the first `limit` usable rows of a fixed random order, so that subsets are random and nested.
    need_target=False: for prediction; rows without a label stay, with y = NaN, and forces are ignored.
    """
    task, source, rows = read_rows(task, cache_dir, quiet, forces=need_target)
    crystals = pick_rows(task, source, rows, limit, on_error, need_target)
    if not quiet:
        print_summary(crystals, source)
    return crystals


class NoneUsable(UserError):
    """Every row of a source is skipped."""


def from_structures(structures, y=None, ids=None, name="structures", **fields) -> Crystals:
    """Structures in memory -> Crystals, by the rules of load_crystals: read `.skipped`.

    structures: a list of pymatgen Structures or Molecules, ASE Atoms, or as_dict() dictionaries.
    y: a label for each, before the transform; None for prediction, then NaN. ids: a name for each.
    fields: of Task, such as unit, transform, pooling. UserError where no structure can be used.
    """
    one = hasattr(structures, "as_dict") or hasattr(structures, "get_positions")
    if one or isinstance(structures, (dict, str)):
        raise UserError(f"structures: one {type(structures).__name__}; give a list, [structure]")
    structures = list(structures)
    columns = {"id": ids, "target": y}
    for what, values in columns.items():
        values = [None] * len(structures) if values is None else values
        columns[what] = values = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(values) != len(structures):
            raise UserError(f"{what}: {len(values)} values for {len(structures)} structures")
    if any(isinstance(value, (list, tuple, dict)) for value in columns["target"]):
        raise UserError("y: should be one number for each structure")
    task = Task(name, target_column="target", **{"pooling": "mean", **fields})
    values = [dict(zip(columns, row)) for row in zip(*columns.values())]
    rows = collect(zip(map(in_memory, structures), values), task, quiet=True)
    return pick_rows(task, name, rows, need_target=y is not None)


def pick_rows(task, source, rows, limit=0, on_error="skip", need_target=True) -> Crystals:
    """The usable rows as Crystals, the others with their reasons in `skipped`. rows: see read_rows."""
    y, problems = labels(task, source, rows, need_target)  # (R,) both
    mine = rows_of_subset(task, source, rows)
    if limit:  # RandomState: its stream is frozen for good, unlike default_rng's
        mine = mine[np.random.RandomState(0).permutation(len(mine))]
        end = np.searchsorted(np.cumsum(problems[mine] == ""), limit) + 1
        mine = np.sort(mine[:end])
    bad, keep = mine[problems[mine] != ""], mine[problems[mine] == ""]
    skipped = [(rows["id"][i], problems[i]) for i in bad]
    if skipped and on_error == "stop":
        name, why = skipped[0]
        raise UserError(f"{source}: row {bad[0]} (id {name}): {why}; --on-error skip leaves such rows out")
    if not len(keep):
        why = problems[bad[0]] if len(bad) == 1 else count_reasons(problems[bad]) or "there is none"
        raise NoneUsable(f"{source}: none of {len(mine)} rows can be used ({why})")
    end = np.cumsum(rows["count"])
    atoms = [slice(end[i] - rows["count"][i], end[i]) for i in keep]
    split = split_words(rows)
    return Crystals(
        task=task,
        ids=[rows["id"][i] for i in keep],
        Z=[rows["Z"][s] for s in atoms],
        pos=[rows["pos"][s] for s in atoms],
        cell=list(rows["cell"][keep]),
        pbc=rows["cell"][keep].any(axis=(1, 2)),
        y=y[keep],
        row=keep,
        split=[split[i] for i in keep] if split else None,
        skipped=skipped,
        forces=[rows["forces"][s] for s in atoms] if task.forces_column else None,
        num_rows=len(problems),
    )


def print_summary(crystals, source):
    """What was read and what it looks like, on stderr."""
    task, y = crystals.task, crystals.y[np.isfinite(crystals.y)]
    kept, skipped = len(crystals), len(crystals.skipped)
    reasons = count_reasons(reason for _, reason in crystals.skipped)
    read = f"{task.name} ({source}): {kept + skipped} rows read, {kept} kept, {skipped} skipped"
    print(read + (f": {reasons}" if reasons else ""), file=sys.stderr)
    if len(y):
        statistics = {"min": np.min, "median": np.median, "max": np.max, "mean": np.mean, "std": np.std}
        shown = ", ".join(f"{name} {statistic(y):.5g}" for name, statistic in statistics.items())
        print(f"  label {task.target_column} [{unit_of(task) or 'no unit'}]: {shown}", file=sys.stderr)
    atoms, symbols = [len(z) for z in crystals.Z], elements(crystals)
    named = f": {' '.join(symbols)}" if len(symbols) <= 20 else ""
    twins = kept - len({duplicate_key(*s) for s in zip(crystals.Z, crystals.pos, crystals.cell)})
    forces = "; with forces" if crystals.forces else ""
    cells = f"atoms per cell: median {np.median(atoms):g}, max {max(atoms)}"
    print(f"  {len(symbols)} elements{named}; {cells}; {twins} duplicate structures{forces}", file=sys.stderr)


def count_reasons(reasons) -> str:
    """Rows by rule, which is what stands before the colon: "no label 12, disordered site 3"."""
    counts = Counter(str(r).split(":")[0] for r in reasons)
    return ", ".join(f"{rule} {n}" for rule, n in counts.most_common())


def elements(crystals) -> list:
    """Symbols of the elements that occur, by atomic number."""
    return [SYMBOLS[z] for z in np.unique(np.concatenate(crystals.Z))]


def subset(crystals: Crystals, idx) -> Crystals:
    """The crystals at positions idx, in that order."""
    picked = {}
    for name in ("ids", "Z", "pos", "cell", "pbc", "y", "row", "split", "forces", "teacher"):
        values = getattr(crystals, name)
        if isinstance(values, np.ndarray):
            picked[name] = values[[int(i) for i in idx]]
        elif values is not None:
            picked[name] = [values[i] for i in idx]
    return replace(crystals, **picked, fingerprint="")


def fingerprint(Z, pos, cell, y=None) -> str:
    """SHA-256 of the content: a list of Z (A,), of pos (A, 3), of cell (3, 3), and the labels y (M,)."""
    digest = hashlib.sha256(np.array([len(z) for z in Z], dtype="<i8").tobytes())
    for arrays, kind in ((Z, "<i8"), (pos, "<f8"), (cell, "<f8"), ([] if y is None else [y], "<f8")):
        for a in arrays:
            digest.update(np.ascontiguousarray(a, dtype=kind).tobytes())
    return digest.hexdigest()


def structure_hash(Z, pos, cell) -> str:
    """Key of one structure's exact content, atom order included."""
    return fingerprint([Z], [pos], [cell])


def duplicate_key(Z, pos, cell) -> str:
    """Equal where cell and positions are, rounded to 1e-4 Å, in any order of atoms, wrapped or not."""
    if np.any(cell):
        edge = np.linalg.norm(cell, axis=1)
        grid = np.rint(pos @ np.linalg.inv(cell) * edge / 1e-4).astype(np.int64)
        grid %= np.rint(edge / 1e-4).astype(np.int64)
    else:
        grid = np.rint(pos / 1e-4).astype(np.int64)
    atoms = np.column_stack([Z, grid])
    atoms = atoms[np.lexsort(atoms.T[::-1])]
    box = np.rint(np.asarray(cell) / 1e-4).astype(np.int64)
    return hashlib.blake2b(atoms.tobytes() + box.tobytes(), digest_size=12).hexdigest()


def prototype(Z, pos, cell) -> str:
    """Which compound this is: equal for another choice of the cell, a supercell or a slight relaxation.

    Made of the space group within SYMPREC, of the orbits of the primitive cell (element, how often, site symmetry), and
    of whether it is a slab in vacuum. Polymorphs that agree in all of these count as one. Molecules are told apart by
    their geometry.
    """
    if not np.any(cell):
        return duplicate_key(Z, pos, cell)
    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # of cells for which a looser tolerance is tried first
    import spglib

    found = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for symprec in (SYMPREC, 0.01, 1e-4):
            with contextlib.suppress(spglib.SpglibError):
                found = found or spglib.get_symmetry_dataset((cell, pos @ np.linalg.inv(cell), Z), symprec=symprec)
    if found is None:  # atoms on top of each other: what is left is the formula
        parts = [int(z) for z in sorted(Z)]
    else:
        _, where = np.unique(found.mapping_to_primitive, return_index=True)  # one atom of the cell for each
        orbit, count = np.unique(found.crystallographic_orbits[where], return_counts=True)
        sites = ((int(Z[i]), int(n), found.site_symmetry_symbols[i]) for i, n in zip(orbit, count, strict=True))
        parts = [int(found.number), in_vacuum(pos, cell), *sorted(sites)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


SYMPREC, GAP = 0.1, 6.0  # Å
PROTOTYPE_VERSION = 2  # raise when prototype() makes something else


def in_vacuum(pos, cell) -> int:
    """Along how many lattice vectors the atoms leave a gap of more than GAP: 0 of a crystal, 1 of a layer."""
    frac = np.sort(pos @ np.linalg.inv(cell) % 1, axis=0)
    gaps = np.diff(frac, axis=0, append=frac[:1] + 1).max(axis=0)
    return int((gaps / np.linalg.norm(np.linalg.inv(cell), axis=0) > GAP).sum())


def prototypes(crystals, cache_dir="", quiet=False) -> list:
    """`prototype` of every crystal, through the cache."""
    structures = list(zip(crystals.Z, crystals.pos, crystals.cell))
    content = [str(PROTOTYPE_VERSION), *(structure_hash(*s) for s in structures)]
    key = hashlib.sha256("\n".join(content).encode()).hexdigest()[:24]

    def build(folder):
        found = [prototype(*s) for s in progress(structures, "prototypes", quiet)]
        (folder / "prototypes.json").write_text(json.dumps(found))

    folder = cached_folder(cache_folder(cache_dir) / f"prototypes-{key}", build)
    return json.loads((folder / "prototypes.json").read_text())


# ---------------------------------------------------------------- from a source to rows

CACHE_VERSION = 4  # raise when collect() makes something else


def read_rows(task: Task, cache_dir="", quiet=False, forces=True):
    """Every row of the task's source, through the cache. Returns task, its columns filled in; source; rows.

    rows: arrays count (R,) atoms, 0 where unusable; Z, pos, forces over all atoms; cell (R, 3, 3). Lists of R
    words: id and reason, "" where usable. columns: {name: R numbers, words or None}.
    The cache's key is the content of every file that is read. forces=False: for prediction,
    which reads every file of a folder and no forces.
    """
    task = task if forces else replace(task, forces_column="")
    path = find_source(task)
    embedded = task.dataset if task.dataset.startswith("demo:") else ""
    source = embedded or str(path)
    path, listed = list_files(path, everything=not forces)
    state = contents(path, listed)
    any_forces = forces and not task.target_column
    columns = [task.structure_column, task.id_column, task.forces_column]
    wanted = json.dumps([CACHE_VERSION, embedded, columns, any_forces, state])
    key = hashlib.sha256(wanted.encode()).hexdigest()[:24]

    def build(folder):
        rows = collect(source_rows(path, listed, task), task, quiet, any_forces)
        np.savez(folder / "rows.npz", **{k: v for k, v in rows.items() if isinstance(v, np.ndarray)})
        lists = {k: v for k, v in rows.items() if not isinstance(v, np.ndarray)}
        (folder / "rows.json").write_text(json.dumps(lists))
        if contents(path, listed) != state:
            raise UserError(f"{source}: changed while it was read; run again")

    folder = cached_folder(cache_folder(cache_dir) / f"rows-{key}", build)
    with np.load(folder / "rows.npz") as arrays:
        rows = dict(arrays) | json.loads((folder / "rows.json").read_text())
    return resolve_target(task, rows), source, rows


def contents(path: Path, listed) -> list:
    """[[id, name or Skip, SHA-256]] of the file that is read, and of all that it or the folder lists."""
    listed = [*([(path, {})] if path.is_file() else []), *listed]
    hashes = {file: sha256(file) for file in {file for file, _ in listed} if isinstance(file, Path)}
    return [[values.get("id"), getattr(file, "name", str(file)), hashes.get(file)] for file, values in listed]


def sha256(file) -> str:
    try:
        with open(file, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:  # its rows are skipped when they are read
        return str(error)


SCALARS = (str, int, float, np.integer, np.floating, np.bool_, type(None))  # what columns are made of


def collect(stream, task, quiet=False, any_forces=False):
    """A stream of (structure, values) -> rows. structure: what to_arrays takes; values: {column: any value}.

    any_forces: read those of an xyz file that has them without being told. One row at a time, so memory holds
    the arrays and nothing else.
    """
    read, table, column = [], [], task.forces_column
    for structure, values in progress(stream, "reading", quiet):
        if any_forces and not table and values.get("forces") is not None:
            column = "forces"
        read.append(read_one(structure, values.get(column), bool(column)))
        table.append({printable(str(k)): scalar(v) for k, v in values.items() if isinstance(v, SCALARS)})
    Z, pos, cell, f, reason = zip(*read) if read else [()] * 5
    names = dict.fromkeys(name for row in table for name in row)
    columns = {name: [row.get(name) for row in table] for name in names}
    rows = {
        "count": np.array([len(z) for z in Z], dtype=np.int64),
        "Z": np.concatenate([np.zeros(0, np.int64), *Z]),
        "pos": np.concatenate([np.zeros((0, 3)), *pos]),
        "cell": np.array(cell).reshape(-1, 3, 3),
        "id": unique_ids(columns, task, len(read)),
        "reason": reason,
        "columns": {k: [v[:200] if isinstance(v, str) else v for v in c] for k, c in columns.items()},
    }
    return rows | {"forces": np.concatenate([np.zeros((0, 3)), *f])} if column else rows


def read_one(structure, forces, wanted):
    """Z, pos, cell, forces, reason of one row; where it cannot be used, no atoms and a reason."""
    none = np.zeros((0, 3))
    try:
        Z, pos, cell = to_arrays(structure)
        return Z, pos, cell, read_forces(forces, len(Z)) if wanted else none, ""
    except Skip as error:
        reason = printable(" ".join(str(error).split()))[:300]
        return np.zeros(0, np.int64), none, np.zeros((3, 3)), none, reason


def read_forces(values, num_atoms):
    try:
        forces = np.asarray(values if values is not None else [], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise Skip("no forces: not a table of numbers") from None
    if forces.shape != (num_atoms, 3):
        raise Skip(f"no forces: shape {forces.shape} for {num_atoms} atoms")
    if not np.isfinite(forces).all():
        raise Skip("no forces: not finite")
    return forces


def scalar(value):
    """One of SCALARS as JSON can hold it."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int) and abs(value) >= 2**1023:  # beyond floats
        return math.copysign(math.inf, value)
    return printable(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """Bytes that are not UTF-8 (in the name of a file) as \\udcXX: what can be written anywhere."""
    return text.encode("utf-8", "backslashreplace").decode()


def unique_ids(columns, task, R) -> list:
    """(R,) words: the id column, else the row's number. The second row of one id is "id#2", and so on."""
    if task.id_column and task.id_column not in columns:
        there = ", ".join(columns)
        raise UserError(f"{task.dataset}: no column '{task.id_column}' for the ids (columns: {there})")
    name = task.id_column or next((c for c in ID_COLUMNS if c in columns), "")
    given = columns[name] if name else [None] * R
    given = [int(v) if isinstance(v, float) and v.is_integer() else v for v in given]
    given = [str(i if v is None or v != v or v == "" else v) for i, v in enumerate(given)]  # v != v: NaN
    return unique(given)


def unique(words) -> list:
    """The second of equal words is "word#2", and so on."""
    taken, times, found = set(words), Counter(), []
    for value in words:
        times[value] += 1
        number = times[value]
        while number > 1 and f"{value}#{number}" in taken:
            number += 1
        found.append(value if number == 1 else f"{value}#{number}")
        taken.add(found[-1])
    return found


def split_words(rows) -> list:
    """(R,) words of the column "split", "" where it is blank; [] where the table has no such words."""
    split = rows["columns"].get("split", [])
    return ["" if v is None else str(v) for v in split] if is_text(split) else []


def is_text(values) -> bool:
    return any(isinstance(v, str) for v in values)


def find_column(rows, name):
    """(R,) values of one column, or None; some are means of others (DERIVED) where the table lacks them."""
    columns = rows["columns"]
    parts = [columns.get(part) for part in DERIVED.get(name, [None])]
    if name in columns or None in parts:
        return columns.get(name)
    return np.mean([as_numbers(part) for part in parts], axis=0).tolist()


def pick_column(rows, name, source):
    values = find_column(rows, name)
    if values is None:
        there = ", ".join(rows["columns"]) or "none"
        cure = "--target-column or the tasks file names it"
        raise UserError(f"{source}: no column '{name}' (columns: {there}); {cure}")
    return values


def as_numbers(values):
    """(R,) floats; NaN where a word is no number."""
    numbers = [to_number(v) if isinstance(v, str) else v for v in values]
    return np.array([np.nan if isinstance(v, str) or v is None else v for v in numbers], dtype=np.float64)


def resolve_target(task, rows):
    """Fill an empty target_column where the table leaves no doubt, and an empty pooling."""
    if task.target_column:
        return replace(task, pooling=task.pooling or "mean")
    columns = rows["columns"]
    numbers = [name for name, values in columns.items() if not is_text(values) and name not in ID_COLUMNS]
    choice = next((n for n in ("target", "energy") if n in columns), numbers[0] if len(numbers) == 1 else "")
    total = choice == "energy" and not task.unit.endswith("/atom")
    unit, pooling = (task.unit or "eV", "sum") if total else (task.unit, "mean")
    forces = "forces" if "forces" in rows else ""
    return replace(task, target_column=choice, forces_column=forces, unit=unit, pooling=task.pooling or pooling)


def labels(task, source, rows, need_target):
    """y (R,) in unit_of(task), NaN where there is none, and reasons (R,), "" where a row is usable."""
    problems = np.array(rows["reason"], dtype=object)
    if not need_target and find_column(rows, task.target_column) is None:
        return np.full(len(problems), np.nan), problems
    if not task.target_column:
        there = ", ".join(rows["columns"]) or "none"
        raise UserError(
            f"{source}: which column is the label? there are {there}; name it with --target-column"
        )
    values = pick_column(rows, task.target_column, source)
    raw = as_numbers(values)
    y = transform(task, raw)
    y[~np.isfinite(y)] = np.nan
    split = split_words(rows)
    divided = any(word.strip() for word in split)
    for i in np.flatnonzero(problems == "") if need_target else []:
        if np.isnan(y[i]):
            problems[i] = why_no_label(task, values[i], raw[i])
        elif divided and not split[i].strip():
            problems[i] = "no split: the cell is blank where others name one"
    return y, problems


def why_no_label(task, value, raw) -> str:
    """value: as the table has it; raw: as a number."""
    if str(value).strip().lower() in ("", "nan", "none", "null"):
        return "no label"
    if not np.isfinite(raw):
        return f"label is not a number: {value}"
    return f"no logarithm: {task.transform} of {raw:g}"


def rows_of_subset(task, source, rows):
    """Positions of the rows of the subset that the task names, else of all."""
    if not task.subset:
        return np.arange(len(rows["id"]))
    wanted = [s.strip() for s in task.subset.split(";")]
    values = ["" if v is None else str(v) for v in pick_column(rows, "subset", source)]
    mine = np.flatnonzero(np.isin(values, wanted))
    if not len(mine):
        there = ", ".join(sorted(set(values))[:12])
        raise UserError(f"{source}: no row has subset {' or '.join(wanted)}; there are {there}")
    return mine


# ---------------------------------------------------------------- one structure

VACUUM = 50.0  # Å, more than twice any cutoff
MAX_ATOMS = 2**15  # in one structure: graphs on disk number its atoms with 16 bits
MAX_IMAGES = 2**24  # of a structure's atoms that can be neighbours; diamond of MAX_ATOMS has 100,000
ALONG = np.array(
    [0.6192, 0.5426, 0.5674]
)  # just shorter than 1; not along the normal of a common lattice plane


def to_arrays(structure):
    """(Z, pos, cell), wrapped and checked, of a pymatgen dictionary or (Z, pos, cell, periodic).

    A direction without periodicity in an otherwise periodic cell (a slab, a wire) becomes a vector across
    VACUUM. Raises Skip; a Skip in the structure's place is raised.
    """
    if isinstance(structure, Skip):
        raise structure
    try:
        Z, pos, cell, periodic = structure if isinstance(structure, tuple) else from_dict(structure)
        Z, pos = np.asarray(Z, dtype=np.int64).reshape(-1), np.asarray(pos, dtype=np.float64).reshape(-1, 3)
        cell = np.asarray(cell, dtype=np.float64).reshape(3, 3)
        periodic = np.asarray(periodic, dtype=bool).reshape(3)
    except Skip:
        raise
    except Exception as error:  # a dictionary of whatever shape
        raise Skip(f"unreadable structure: {type(error).__name__} {error}") from None
    if len(Z) == 0 or len(pos) != len(Z):
        raise Skip(f"unreadable structure: {len(Z)} atoms, {len(pos)} positions")
    if len(Z) > MAX_ATOMS:
        raise Skip(f"too many atoms: {len(Z)}; the most is {MAX_ATOMS}")
    if not (np.abs(pos) < 1e6).all() or not (np.abs(cell) < 1e6).all():
        raise Skip("unreadable structure: a coordinate or cell that is not finite, or beyond 1e6 A")
    outside = (Z < 1) | (Z > 118)
    if outside.any():
        raise Skip(f"element outside 1..118: {Z[outside][0]}")
    if not periodic.any():
        cell = np.zeros((3, 3))
    else:
        cell = add_vacuum(pos, cell, periodic)
        volume = abs(np.linalg.det(cell))
        if volume < 1e-2 or volume < 1e-5 * np.linalg.norm(cell, axis=1).prod():
            raise Skip(f"cell of zero volume: {volume:.2g} A^3")
        inverse = np.linalg.inv(cell)
        images = len(Z) * np.prod(1 + 24 * np.linalg.norm(inverse, axis=0))  # within 12 Å of the cell
        if images > MAX_IMAGES:
            raise Skip(f"cell too skewed: {images:.1g} images of its atoms to look at; give its reduced cell")
        pos = wrap(pos @ inverse) @ cell
    check_distances(pos, cell)
    return Z, pos, cell


def wrap(frac):
    """Fractional coordinates into [0, 1); what is within 1e-9 of 1 is 0: rounding moves no atom across."""
    frac = frac - np.floor(frac)
    frac[frac > 1 - 1e-9] = 0.0
    return frac


def add_vacuum(pos, cell, periodic):
    """Lattice vectors that are not periodic become perpendicular ones, the atoms' extent + VACUUM long."""
    cell = cell.copy()
    normals = np.linalg.svd(cell[periodic])[2][periodic.sum() :]  # orthonormal, perpendicular to the periodic
    for k, normal in zip(np.flatnonzero(~periodic), normals):
        cell[k] = normal * (np.ptp(pos @ normal) + VACUUM)
    return cell


def check_distances(pos, cell, closest=0.1):
    """Raises Skip where two atoms, periodic images included, are closer than `closest` Å."""
    if cell.any():
        inverse = np.linalg.inv(cell)
        margin = closest * np.linalg.norm(inverse, axis=0)  # `closest` in fractional coordinates
        frac = wrap(pos @ inverse)
        for k, m in enumerate(margin):  # images within reach of the cell, along one axis after the other
            shifts = np.arange(-int(m) - 1, int(m) + 2)[:, None] * np.eye(3)[k]
            images = (frac[:, None] + shifts).reshape(-1, 3)
            frac = images[(images[:, k] >= -m) & (images[:, k] <= 1 + m)]
        pos = frac @ cell
    pos = pos[np.argsort(pos @ ALONG)]
    for k in range(1, len(pos)):  # every atom and the k-th after it along ALONG, until all those are too far
        step = pos[k:] - pos[:-k]
        if (step @ ALONG).min() >= closest:
            return
        d = np.linalg.norm(step, axis=1).min()
        if d < closest:
            raise Skip(f"atoms closer than {closest} A: {d:.3f} A")


def from_dict(structure):
    """(Z, pos, cell, periodic) from as_dict() of a pymatgen Structure or Molecule, without building it."""
    if isinstance(structure, str):
        structure = json.loads(structure)
    if not isinstance(structure, dict):
        raise Skip("no structure")
    sites, lattice = structure["sites"], structure.get("lattice")
    Z = []
    for site in sites:
        species = site["species"]
        if len(species) != 1 or not abs(species[0].get("occu", 1) - 1) <= 1e-3:  # NaN too
            raise Skip("disordered site: " + " ".join(f"{s['element']}{s.get('occu', 1):g}" for s in species))
        symbol = species[0]["element"]
        if symbol not in NUMBER:
            raise Skip(f"element outside 1..118: {symbol}")
        Z.append(NUMBER[symbol])
    if not lattice:
        return Z, [s["xyz"] for s in sites], np.zeros((3, 3)), [False, False, False]
    cell = np.array(lattice["matrix"], dtype=np.float64)
    pos = np.array([s["abc"] for s in sites], dtype=np.float64).reshape(-1, 3) @ cell
    return Z, pos, cell, lattice.get("pbc", [True, True, True])
