"""Any source of crystals -> `Crystals` (paper, B.1): matminer tables, folders of CIF or POSCAR files, extxyz, lists.

    crystals = load_crystals(get_task("dielectric"))        # from matminer's data home, or MATMINER_DATA

M: crystals in a task. R: rows of a source, unusable ones included. A: atoms. Lengths in Å.
"""

import csv
import gzip
import hashlib
import importlib.util
import json
import os
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from files import cache_folder, cached_folder, progress
from tasks import DERIVED, ID_COLUMNS, Task, read_tasks, transform, unit_of


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


def load_crystals(task: Task, limit=0, on_error="skip", need_target=True, quiet=False, cache_dir="") -> Crystals:
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
    name = f"rows-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"

    def build(folder):
        np.savez(folder / "rows.npz", **collect(demo_rows(embedded) if embedded else source_rows(path, task), task, quiet))

    with np.load(cached_folder(cache_folder(cache_dir) / name, build) / "rows.npz", allow_pickle=False) as stored:
        rows = dict(stored)
    return resolve_target(task, rows), task.dataset if embedded else str(path), rows


CACHE_VERSION = 2  # raise when collect() writes something else


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


