"""Where crystals come from: finds the source of a task and reads what is in it, one structure at a time.

Readers yield (structure, {column: value}); where one cannot be read, a Skip, the reason, stands in its place.
A structure is a pymatgen dictionary or (Z, pos, cell, periodic). Nothing is left out without a Skip.
"""

import contextlib
import csv
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from files import MissingError, UserError, reading, write_atomic
from tasks import Task, read_tasks

SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr "
    "Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()
NUMBER = {symbol: z for z, symbol in enumerate(SYMBOLS) if z} | {"D": 1, "T": 1}  # heavy hydrogen is hydrogen
SHIPPED = Path(__file__).resolve().parent / "datasets"  # tables that come with the code, and their published splits


class Skip(Exception):
    """Why a row cannot be used: "rule: detail". Readers yield it in a structure's place."""


# ---------------------------------------------------------------- where they are


def find_source(task: Task, download=True) -> Path:
    """The file or folder that holds the task's rows. Looked for in this order: the path that the task names,
    MATMINER_DATA, datasets/ beside this file, matminer's own folder, and with `download` matminer's address."""
    name = task.dataset
    if name.startswith("demo:"):
        return Path(importlib.util.find_spec("demo").origin)
    if not name:
        raise UserError(f"task {task.name}: no data; name a matminer data set, a file or a folder")
    with reading(name, "the name of a file or a folder", "name another"):
        path = Path(name).expanduser()
        if path.exists():
            return path
    if path.name != name or Path(path.name.removesuffix(".gz")).suffix in {*READERS, ".csv"}:
        raise MissingError(f"{name}: no such file or folder (task {task.name})")
    homes = data_homes()
    for home in homes:
        for path in (home / f"{name}.json.gz", home / f"{name}.json"):
            if path.exists():
                return path
    home = homes[0] if os.environ.get("MATMINER_DATA") else homes[-1]
    path = home / f"{name}.json.gz"
    why = fetch(name, path) if download else "not asked to"
    if not why:
        return path
    here, other = home / "tasks.json", ""
    with contextlib.suppress(UserError):
        if task.name in read_tasks(here):
            other = f"; {here} offers {task.name} from another file: pass --tasks {here}"
    where = " or ".join(map(str, homes))
    raise MissingError(
        f"no file or folder '{name}' here; as a data set it is not in {where} and was not downloaded ({why}); "
        f"put {path.name} there, set MATMINER_DATA to a folder that has it, or use the embedded crystals (--data demo){other}"
    )


def data_homes() -> list:
    """Folders that hold data sets by matminer's names, the first that has one is taken."""
    named = os.environ.get("MATMINER_DATA")
    spec = importlib.util.find_spec("matminer")  # without the seconds that importing it takes
    own = Path(spec.origin).parent / "datasets" if spec and spec.origin else Path(".")
    return [*([Path(named).expanduser()] if named else []), *([SHIPPED] if SHIPPED.is_dir() else []), own]


def fetch(name, path: Path) -> str:
    """Download a matminer data set by matminer's own address and hash. Returns "" or why it did not work."""
    try:
        from matminer.datasets import get_dataset_attribute

        url, sha256 = get_dataset_attribute(name, "url"), get_dataset_attribute(name, "hash")
    except ImportError:
        return "matminer is not installed"
    except (ValueError, KeyError):
        return "matminer does not know it"
    import urllib.request

    def download(file):
        digest = hashlib.sha256()
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
        with reading(url, "a data set"), urllib.request.urlopen(request, timeout=15) as response:
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            raise UserError(f"{url} does not have the hash that matminer expects")

    print(f"fetching {name} from {url}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, download)
    except (OSError, UserError) as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- files and folders

LARGEST = 2**25  # bytes of a structure's file, unpacked, or of a table's row: 1 kB for each of 32,000 atoms


def reader(path: Path):
    """The function of READERS for a file of that name, packed or not; None for all others."""
    name = path.name.lower().removesuffix(".gz")
    return READERS.get(Path(name).suffix, poscar_rows if name.startswith(("poscar", "contcar")) else None)


def structure_name(path: Path) -> str:
    """The file's name without the endings that reader() knows."""
    name = path.name.removesuffix(".gz") if reader(path) else path.name
    return name.removesuffix(Path(name).suffix) if Path(name).suffix.lower() in READERS else path.name


def open_text(path: Path, errors="strict"):
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", encoding="utf-8", errors=errors)


def file_text(path: Path) -> str:
    """The text of a file of one structure. Its size is bounded before memory is spent."""
    with open_text(path, errors="replace") as f:
        text = f.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise UserError(f"{path}: larger than {LARGEST >> 20} MiB, too large for one structure")
    return text


TABLES = ("targets.csv", "id_prop.csv")  # of a folder


def list_files(path: Path, everything: bool = False):
    """The path, or that of targets.csv or id_prop.csv in it, and [(file or Skip, values)] of the files that
    it names or holds. values: the row of the table, or the "id" alone. everything: a folder's files that its
    table does not name, too."""
    table = next((path / n for n in TABLES if (path / n).is_file()), None) if path.is_dir() else None
    if table:
        named, other = csv_files(table), []
        if everything:
            known = {file for file, _ in named} | {path / n for n in TABLES}
            other = [row for row, file in zip(folder_files(path), walk(path), strict=True) if file not in known]
        return table, named + other
    if path.is_dir():
        return path, folder_files(path)
    if path.suffix.lower() == ".csv":
        return path, csv_files(path)
    return path, [(readable(path), {"id": structure_name(path)})]


def source_rows(path: Path, listed, task):
    """(structure or Skip, values) of every row. path, listed: of list_files."""
    if task.dataset.startswith("demo:"):
        yield from demo_rows(task.dataset.removeprefix("demo:"))
    elif path.is_file() and reader(path) in (table_rows, xyz_rows):  # a table by itself
        yield from reader(path)(path, task)
    else:
        for file, values in listed:
            structures = structures_in(file, task)
            if path.suffix.lower() == ".csv":
                structures = [only_one(structures, file)]
            yield from ((structure, values) for structure in structures)


def structures_in(file, task):
    """Every structure of a file; a Skip in place of each that cannot be read, at least one in all."""
    if isinstance(file, Skip):
        yield file
        return
    found = False
    try:
        for structure, _ in reader(file)(file, task):
            found = True
            yield structure
        if not found:
            yield Skip(f"unreadable structure: none in {file.name}")
    except UserError as error:
        yield unreadable(file, error)


def only_one(structures, file):
    """The structure of a file that a row of a table names."""
    first, more = next(structures), sum(1 for _ in structures)
    if more:
        return Skip(f"several structures: {1 + more} in {file.name}; a row takes a file of one")
    return first


def unreadable(file: Path, error) -> Skip:
    return Skip(f"unreadable structure: {str(error).removeprefix(f'{file.parent}/')}")


def readable(file: Path):
    """The file, or a Skip where it is none that a reader knows."""
    if not file.is_file():
        return Skip(f"file kind: {'a link to a folder' if file.is_dir() else 'not a regular file'}")
    ending = file.suffix or file.name
    return file if reader(file) else Skip(f"file kind: {ending} is not CIF, POSCAR, JSON or xyz")


def demo_rows(name):
    """The embedded crystals."""
    import demo

    made = demo.make(name)
    for i, identity in enumerate(made["ids"]):
        values = {"id": identity, "target": float(made["y"][i])}
        if made["forces"] is not None:
            values["forces"] = made["forces"][i]
        yield (made["Z"][i], made["pos"][i], made["cell"][i], np.full(3, made["pbc"][i])), values


def folder_files(folder: Path):
    """[(file or Skip, values)] of all that is in a bare folder and the folders in it, hidden ones aside."""
    paths = list(walk(folder))
    if not any(map(reader, paths)):
        raise UserError(f"{folder}: no structures (CIF, POSCAR, JSON, xyz) and no targets.csv in it")
    names = [path.relative_to(folder) for path in paths]
    short = [str(name.with_name(structure_name(name))) for name in names]
    times = Counter(short)  # MgO.cif and MgO.vasp keep their endings
    return [(readable(p), {"id": s if times[s] == 1 else str(n)}) for p, n, s in zip(paths, names, short)]


def walk(folder: Path):
    with reading(folder, "a folder"):
        paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from walk(path)
        elif not path.name.startswith("."):
            yield path


def csv_files(path: Path):
    """[(file or Skip, values)] of targets.csv (id, file, target[, split], ...) or of CGCNN's id_prop.csv (id,
    target, no header). Every line is parsed by itself: an open quote hurts its own row and no other.
    """
    with reading(path, "CSV in UTF-8", "save it again in that form"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip(" \t,")]
    header = ["id", "target"]
    if path.name != "id_prop.csv":
        first, numbered = numbered[0][1] if numbered else "", numbered[1:]
        with reading(path, "CSV", "mend its first line"):
            header = column_names(cells_of(first), path)
        if not {"id", "file"} & set(header):
            form = "it should name the columns id,file,target[,split]"
            raise UserError(f"{path}: the first line is '{first}'; {form}")
    return [csv_row(path.parent, header, n, line) for n, line in numbered]


def cells_of(line: str) -> list:
    return [cell.strip() for cell in next(csv.reader([line], strict=True), [])]


def to_number(word: str):
    """The number "1.5", None for ""; other words stay, "1_5" too, which Python would read as 15."""
    try:
        return word if "_" in word else float(word) if word else None
    except ValueError:
        return word


def csv_row(folder, header, number, line):
    """(file or Skip, values) of one line."""
    try:
        cells = cells_of(line)
    except csv.Error as error:
        name = line.split(",")[0].strip(' "')
        return Skip(f"not CSV: line {number}: {error}; a stray quote?"), {"id": name}
    values = dict(zip(header, cells + [""] * len(header)))
    name = values.get("file") or values.get("id", "")
    values["id"] = values.get("id") or structure_name(Path(name))
    beyond = next((cell for cell in cells[len(header) :] if cell), "")
    if beyond:
        why = f"cell '{beyond}' is beyond the {len(header)} columns of the header; a decimal comma?"
        return Skip(f"not CSV: line {number}: {why}"), {"id": values["id"]}
    words = ("id", "file", "split")
    values = {k: v if k in words else to_number(v) for k, v in values.items() if k}
    return find_structure(folder, name), values


def column_names(names, path) -> list:
    """The header of a table as words, without empty ones at its end; no column may be named twice."""
    if not isinstance(names, list) or any(isinstance(n, (list, dict)) for n in names):
        raise UserError(f"{path}: the header should be a list of names")
    names = [str(n) for n in names]
    while names and not names[-1]:
        names.pop()
    twice = next((n for n, times in Counter(names).items() if n and times > 1), None)
    if twice:
        raise UserError(f"{path}: names the column '{twice}' twice; rename one of them")
    return names


def find_structure(folder: Path, name: str):
    """folder/name, or the first of name + a known ending that is a file; else a Skip."""
    endings = ["", *READERS, *(f"{ending}.gz" for ending in READERS)] if name else []
    try:
        found = [folder / (name + ending) for ending in endings if (folder / (name + ending)).is_file()]
    except (OSError, ValueError) as error:  # longer than names can be, or with a character they cannot have
        return Skip(f"unreadable structure: no file {name[:60]}: {getattr(error, 'strerror', None) or error}")
    if not found:
        return Skip(f"unreadable structure: no file {name or 'named'}")
    return next(filter(reader, found), None) or readable(found[0])


def xyz_rows(path: Path, task=None):
    """xyz and extxyz through ASE: energy, forces, and every number or word of the comment line."""
    if importlib.util.find_spec("ase") is None:
        raise UserError(f"{path}: reading xyz files needs ASE (pip install ase)")
    import ase.io

    with reading(path, "an xyz file"), open_text(path) as f:
        for atoms in ase.io.iread(f, index=":", format="extxyz"):
            results = dict(atoms.calc.results) if atoms.calc else {}
            values = {**atoms.info, **results}
            yield in_memory(atoms), values | {k: v for k, v in atoms.arrays.items() if k == "forces"}
        if any(line.strip() for line in f):
            raise ValueError("a blank line, and text after it")


def table_rows(path: Path, task):
    """A table in JSON: pandas orient="split" (matminer, Matbench) or records; or pymatgen structures."""
    column = None  # the one with structures
    for row in json_rows(path):
        if not isinstance(row, dict):
            yield row if isinstance(row, Skip) else Skip(f"no structure: {str(row)[:40]}"), {}
            continue
        if "sites" in row:
            yield row, {"id": row["id"]} if "id" in row else {}
            continue
        if column is None:
            column = task.structure_column
            if column == "structure" and column not in row and "molecule" in row:
                column = "molecule"
            if column not in row:
                there = f"columns: {', '.join(row)}"
                cure = "name it with --structure-column"
                raise UserError(f"{path}: no column '{column}' with structures ({there}); {cure}")
        yield row.pop(column, None), row


def json_rows(path: Path, block=1 << 22, columns=None):
    """Every row of a table as a dictionary, or what stands there; of one structure, itself, its name as "id".

    columns: given on a second pass, for a table that has its data before them.
    """
    cure = "is it damaged or cut short? fetch it again, or write pandas orient='split'"
    with reading(path, "a table in JSON", cure), open_text(path) as f:
        text, structure, late = JsonText(f, block), {}, False
        if text.peek() == "[":
            yield from text.items()
            text.end()
            return
        text.pass_by("{")
        while text.peek(" \t\r\n,") != "}":
            key = text.take()
            text.pass_by(":")
            if key == "columns":
                columns = column_names(text.take(), path)
            elif key in ("index", "data"):
                late = late or key == "data" and columns is None
                for row in text.items():
                    if key == "data" and columns is not None:
                        yield as_row(columns, row)
            else:
                value = text.take()
                structure |= {key: value} if key in ("sites", "lattice") else {}
        text.pass_by("}")
        text.end()
        if "sites" in structure:
            yield structure | {"id": structure_name(path)}
        elif columns is None:
            raise UserError(f"{path}: neither a table (pandas orient='split' or 'records') nor a structure")
    if late:
        yield from json_rows(path, block, columns)


def as_row(columns, cells):
    if not isinstance(cells, list) or len(cells) != len(columns):
        return Skip(f"no structure: the row is not a list of {len(columns)} cells")
    return dict(zip(columns, cells))


DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))


class JsonText:
    """The values of a JSON text one after another; no more than one of them and a block are in memory."""

    def __init__(self, file, block):
        self.file, self.block, self.text, self.at = file, block, "", 0

    def more(self) -> bool:
        rest = len(self.text) - self.at
        if rest >= LARGEST:
            raise ValueError(f"a value of more than {LARGEST >> 20} MiB, or one without an end")
        new = self.file.read(min(max(self.block, rest), LARGEST - rest))
        self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def peek(self, skip=" \t\r\n") -> str:
        """The next character that is not in `skip`."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in skip:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                raise EOFError("it ends too early")

    def pass_by(self, character):
        if self.peek() != character:
            raise ValueError(f"'{self.peek()}' where '{character}' should be")
        self.at += 1

    def end(self):
        """Raises ValueError where there is more."""
        with contextlib.suppress(EOFError):
            raise ValueError(f"'{self.peek()}' after its end; one table or structure a file")

    def take(self):
        """The next value. What ends with the text in memory may go on in the file."""
        self.peek()
        while True:
            with contextlib.suppress(json.JSONDecodeError):
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text):
                    self.at = end
                    return value
            if not self.more():
                value, self.at = DECODER.raw_decode(self.text, self.at)
                return value

    def items(self):
        """The values of the list that comes next."""
        self.pass_by("[")
        while self.peek(" \t\r\n,") != "]":
            yield self.take()
        self.at += 1


def poscar_rows(path: Path, task=None):
    from pymatgen.io.vasp import Poscar

    with reading(path, "a POSCAR"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Elements in POSCAR cannot be determined")  # it invents some
        text = file_text(path)
        structure = Poscar.from_str(text, read_velocities=False).structure.as_dict(verbosity=0)
        names, counts = (line.split() for line in text.splitlines()[5:7])
        if all(count.isdigit() for count in counts) and len(names) > len(counts):  # it leaves out the rest
            raise ValueError(f"{len(names)} elements and {len(counts)} numbers of atoms")
    yield structure, {}


def cif_rows(path: Path, task=None):
    """Every data block of a CIF that has a cell or atoms."""
    with reading(path, "a CIF"):
        text = file_text(path).replace("\u2212", "-")  # a printer's minus, which pymatgen would drop
    for block in re.split(r"^[ \t]*data_", text, flags=re.MULTILINE | re.IGNORECASE)[1:]:
        name, _, body = block.partition("\n")
        if "powder_pattern" in name or not re.search("_atom_site_|_cell_length_", body):
            continue
        try:
            with reading(path, "a CIF"):
                structure = read_cif(f"data_block\n{body}")
        except UserError as error:
            structure = unreadable(path, error)
        yield structure, {}


def read_cif(text: str):
    """One data block as a pymatgen dictionary; a Skip where pymatgen read something else than is written."""
    from pymatgen.io import cif

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parser = cif.CifParser.from_str(text)
        try:
            structure = parser.parse_structures(primitive=False, on_error="raise")[0]
        except ValueError as error:
            raise error.__cause__ or error from None
    said = [*parser.warnings, *(str(w.message) for w in caught if w.filename == cif.__file__)]
    problem = cif_problem(*parser.as_dict().values(), said, parser.symmetry_operations)
    return Skip(f"CIF read otherwise than written: {problem}") if problem else structure.as_dict(verbosity=0)


HARMLESS = (  # what CifParser warns of and no atom depends on, or what cif_problem looks at itself
    "fractional coordinates rounded to ideal values", "A 1-line symmetry op P1", "Spacegroup from",
    "Defaulting to P1", "using primitive symmetry", "Keys changed to match", "Pauling file corrections",
    " parsed as ", "Skipping relative stoichiometry check", "Cannot determine chemical composition",
)  # fmt: skip
TERM = r"[+-]?(?:[xyz]|\d+(?:\.\d*)?(?:/\d+)?|\.\d+)"  # of a symmetry operation
NO_SYMMETRY = {"", "?", ".", "1", "p1", "x,y,z", "x,y,z,+1", "x,y,z,1"}


def cif_problem(block: dict, said, operations) -> str:
    """What pymatgen made of one block that is not what it says; "" if nothing.

    block: {key: word or list of words}. said: its warnings. operations: the symmetry operations it applied.
    """
    for text in said:
        if not any(harmless in text for harmless in HARMLESS):
            return text
    symbols = block.get("_atom_site_type_symbol", block["_atom_site_label"])
    occupancies = block.get("_atom_site_occupancy", [])
    coordinates = [block[f"_atom_site_fract_{axis}"] for axis in "xyz"]
    if not all(isinstance(column, list) for column in (symbols, occupancies, *coordinates)):
        return "the atoms are not in a loop"
    formula = block.get("_chemical_formula_sum") and not any("Cannot determine" in text for text in said)
    sure = formula or "_atom_site_type_symbol" in block  # else HO1 may be holmium or a hydrogen
    read_as = dict(text.rsplit(" parsed as ", 1) for text in said if " parsed as " in text)
    for symbol in symbols:
        element = re.match("[A-Za-z]*", symbol)[0].capitalize()
        understood = element in NUMBER and read_as.get(symbol, element) == element
        if not understood or not (sure or symbol.startswith(element)):
            return f"atom {symbol}, which is no element"
    if any("." in column for column in coordinates):
        return "an atom without coordinates"
    if any(re.fullmatch(r"-.*|\.|0*\.?0*(\(.*)?", occupancy) for occupancy in occupancies):
        return "an atom of occupancy 0 is left out"
    return symmetry_problem(block, said, operations)


def symmetry_problem(block: dict, said, operations) -> str:
    """The same for the symmetry operations: unread, or none used although the block names some."""
    values = {k: [v] if isinstance(v, str) else v for k, v in block.items()}
    values = {k: [re.sub(r"[\s'\"_]", "", v).lower() for v in words] for k, words in values.items()}
    written = [v for k, words in values.items() if re.search(r"(equiv_pos|symop).*xyz", k) for v in words]
    for operation in written:
        *parts, last = operation.split(",")
        parts += [] if len(parts) == 3 and re.fullmatch(r"[+-]?1", last) else [last]  # +1, -1: time reversal
        terms = [re.findall(TERM, part) for part in parts]
        kinds = [[t[-1] if t[-1] in "xyz" else "1" for t in part] for part in terms]
        twice = any(len(set(k)) < len(k) for k in kinds)  # it would take the last
        if twice or len(parts) != 3 or ["".join(t) for t in terms] != parts:
            return f"symmetry operation {operation}"
    if any(abs(abs(np.linalg.det(o.rotation_matrix)) - 1) > 1e-6 for o in operations):
        return "a symmetry operation that does not keep volumes"
    group = re.compile("_(name_h|it_number|int_tables)", re.IGNORECASE)
    named = [v for k, words in values.items() if group.search(k) for v in words]
    unused = any("Defaulting to P1" in text or "using primitive symmetry" in text for text in said)
    if unused and not {*written, *named} <= NO_SYMMETRY:
        return f"symmetry {({*written, *named} - NO_SYMMETRY).pop()} is not used"
    return ""


READERS = {
    ".cif": cif_rows, ".vasp": poscar_rows, ".poscar": poscar_rows, ".json": table_rows, ".xyz": xyz_rows,
    ".extxyz": xyz_rows, ".mcif": cif_rows,
}  # fmt: skip


def in_memory(structure):
    """What to_arrays takes, of a pymatgen or an ASE object; a Skip for what is neither."""
    if hasattr(structure, "get_positions"):
        return structure.numbers, structure.positions, np.array(structure.cell), np.array(structure.pbc)
    if hasattr(structure, "as_dict"):
        return structure.as_dict()
    known = isinstance(structure, (dict, tuple))
    return structure if known else Skip(f"no structure: a {type(structure).__name__}")
