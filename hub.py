"""The hub H = {g_1 ... g_N}: a plain directory of MoMa modules (section 2.2, module centralisation).

    python hub.py list                        one line a module
    python hub.py show mp_eform               its card
    python hub.py verify                      every hash, every card; exit 1 names what is wrong
    python hub.py import jmp-l.pt             published weights -> hub/backbone, or modules; see `import --help`

    hub/backbone/                             theta_0, which every module starts from (+ adapters.safetensors, theirs)
    hub/mp_eform/module.safetensors           tensors only: all backbone parameters (full) or the adapters' (adapter)
                 head.safetensors             the source task's own head, never composed
                 module.json                  the card: what it is, how it was made, SHA-256 of every file
                 history.csv  README.md       the training curve; the card for people
                 composition.json             composed modules only

Privacy: a module may be shared when its data may not, so a card holds no structures, labels, row ids, local paths or
user names; `save` refuses what looks like one. Weights can still carry traces of the data.
Nothing here unpickles but `import`, which is restricted: tensors are safetensors, the rest is JSON and CSV.
"""

import argparse
import functools
import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT_VERSION = 1
BACKBONE = "backbone"  # the folder of theta_0, which is not a module
MAIN, HEAD, ADAPTERS = "module.safetensors", "head.safetensors", "adapters.safetensors"
AGAIN = "copy the module's folder again, or retrain it"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}

NUMBER, TEXT, SOME = int | float | None, str | None, object
CARD = {  # every field of module.json; null where it does not apply; mean, std and errors are in `unit`
    "format_version": int, "name": str, "kind": str, "property": TEXT, "unit": TEXT, "transform": TEXT, "pooling": TEXT,
    "normalizer_mean": NUMBER, "normalizer_std": NUMBER, "val_mae": NUMBER, "test_mae": NUMBER, "mad": NUMBER,
    "architecture": dict, "graph": dict | None, "num_parameters": int, "signature": str, "backbone_sha256": TEXT,
    "tensors_sha256": str, "files_sha256": dict, "card_sha256": TEXT, "dataset": TEXT, "dataset_fingerprint": SOME,
    "rows_used": NUMBER, "rows_skipped": NUMBER, "elements": SOME, "seed": SOME, "split_seed": SOME, "split": SOME,
    "training": SOME, "seconds": NUMBER, "hardware": SOME, "license_code": TEXT, "license_weights": TEXT,
    "license_data": TEXT, "parents": SOME, "weights": SOME,
}


# ------------------------------------------------------------------------------------------------ names and files


def check_name(name: str) -> None:
    """A module's name is its folder's: lower case, so that it means the same on every file system."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name) or ".." in name:
        hint = f"; use {name.lower()!r}" if re.fullmatch(r"[A-Za-z0-9_]+", name) and name[0] != "_" else ""
        raise ValueError(f"module name {name!r}: takes a-z 0-9 . _ - only, a letter or digit first, no '..'{hint}")


def module_dir(hub, name: str) -> Path:
    """Folder of one module, existing or not; refuses a name or a link that leads out of the hub."""
    check_name(name)
    if (Path(hub) / name).resolve() != Path(hub).resolve() / name:
        raise ValueError(f"{Path(hub) / name}: a link that leads elsewhere; put the module's own folder into the hub")
    return Path(hub) / name


def module_file(path, file: str) -> Path:
    """One file of a module's folder; refuses links and names what is missing."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such module; `python hub.py list --hub {path.parent}` names those there")
    if (path / file).is_symlink():
        raise ValueError(f"{path / file}: a link that may lead elsewhere; put the file itself there")
    if not (path / file).is_file():
        raise FileNotFoundError(f"{path / file}: missing; {AGAIN}")
    return path / file


def sha256(file) -> str:
    """SHA-256 of a file, as hex."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------- writing


def save(path, tensors: dict, card: dict, head: dict | None = None, adapters_init: dict | None = None,
         history: str = "", extra: dict | None = None, overwrite: bool = False) -> dict:
    """Write one module (or theta_0): either the whole folder appears or nothing does. Returns the completed card.

    path: hub/NAME. tensors, head, adapters_init: {name: tensor} on any device. history: the text of history.csv.
    extra: {"composition.json": json-able}. overwrite: a folder of that name is replaced as a whole.
    Filled in here: name, format version, hashes, signature, number of parameters, null for what `card` leaves out.
    """
    path = Path(path)
    module_dir(path.parent, path.name)
    if path.exists() and not (overwrite and path.is_dir()):
        raise ValueError(f"{path}: exists already; delete it, choose another name, or allow it to be overwritten")
    for file in extra or {}:
        if not re.fullmatch(r"[a-z0-9_-]+\.json", file) or file == "module.json":
            raise ValueError(f"{path / file}: extra files are named like composition.json")
    for file, content in {"module.json": card, **(extra or {})}.items():  # before the work of writing tensors
        check_private(content, f"{path / file}")

    part = path.parent / f".{path.name}.part-{secrets.token_hex(4)}"  # a sibling: renaming stays in one file system
    try:
        part.mkdir(parents=True)
        hashes = {}
        for file, group in {MAIN: tensors, HEAD: head, ADAPTERS: adapters_init}.items():
            if group or file == MAIN:
                hashes[file] = write_tensors(part / file, group, shown=path / file)
        for file, content in (extra or {}).items():
            hashes[file] = write_text(part / file, to_json(content, path / file))
        if history:
            hashes["history.csv"] = write_text(part / "history.csv", history)
        card = write_card(part / "module.json", card, tensors, hashes, shown=path / "module.json")
        write_text(part / "README.md", readme(card))
        _sync(part)
        _move_into_place(part, path, overwrite)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card


def write_card(file: Path, card: dict, tensors: dict, hashes: dict, shown: Path | None = None) -> dict:
    """Complete and write a card. hashes: {file name: SHA-256}, that of `tensors` first. Returns what a reader gets."""
    shown = shown or file
    check_private(card, str(shown))
    filled = {"format_version": FORMAT_VERSION, "name": shown.parent.name, "signature": signature(tensors),
              "num_parameters": sum(t.numel() for t in tensors.values()), "tensors_sha256": next(iter(hashes.values())),
              "files_sha256": {name: h for name, h in hashes.items() if name != MAIN}}
    card = json.loads(to_json({**dict.fromkeys(CARD), **card, **filled}, shown))  # plain numbers, lists for tuples
    text = to_json({**card, "card_sha256": card_sha256(card)}, shown)
    card = parse_card(text, shown)
    write_text(file, text)
    return card


def card_sha256(card: dict) -> str:
    """SHA-256 of the card's other fields: `verify` finds a card that was edited, reading does not mind."""
    text = json.dumps({k: v for k, v in card.items() if k != "card_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _move_into_place(part: Path, path: Path, overwrite: bool) -> None:
    """Rename `part` to `path`. An old folder is first renamed aside, and brought back if anything goes wrong."""
    aside = path.parent / part.name.replace(".part-", ".old-")
    try:
        if overwrite and path.exists():
            os.rename(path, aside)
        os.rename(part, path)  # fails where another process was quicker: its folder has files
        _sync(path.parent)
    except OSError as e:
        raise ValueError(f"{path}: could not be put in place ({e.strerror}); is another process saving it?") from e
    finally:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(aside, ignore_errors=True)


def write_tensors(file: Path, tensors: dict, shown=None) -> str:
    """Write {name: tensor}, all finite, as safetensors. Returns the SHA-256. shown: the path that errors name."""
    if not tensors:
        raise ValueError(f"{shown or file}: no tensors to save")
    out, seen = {}, set()
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"{shown or file}: tensor {name!r} is {t.dtype}; save real numbers or integers")
        check_finite(name, t, shown or file)
        t = t.detach().cpu().contiguous()
        memory = t.untyped_storage().data_ptr()
        out[name] = t.clone() if memory in seen else t  # tied tensors are stored twice: every name is in the file
        seen.add(memory)
    save_file(out, file, metadata={"format": "pt"})
    os.chmod(file, file.parent.stat().st_mode & 0o666)  # safetensors makes it private; a hub is shared as its folder is
    _sync(file)
    return sha256(file)


def write_text(file: Path, text: str) -> str:
    """Write UTF-8 text through to the disk. Returns the SHA-256."""
    file.write_bytes(text.encode())
    _sync(file)
    return sha256(file)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def to_json(content, shown) -> str:
    try:  # numpy numbers and one-element tensors become plain numbers
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=lambda v: v.item()) + "\n"
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{shown}: not writable as JSON ({e}); use numbers, text, lists, and null for NaN") from None


PRIVATE_FIELDS = {"ids", "row_ids", "rows", "structures", "positions", "labels", "targets", "user", "username",
                  "hostname", "cwd"}
LOCAL_PATH = re.compile(r"""(^|[\s=,;("'\[])(~?/\w|~\w*/|\.\.?/|[A-Za-z]:[\\/]|\\\\\w|file:/)""")


def check_private(record, where: str = "card") -> None:
    """Refuse private field names, values that look like a local path, and long lists of integers (row numbers).

    A net, not a proof: a relative file name, or a user's name as such, is not recognised.
    """
    found = ""
    if isinstance(record, str | Path) and LOCAL_PATH.search(str(record)):
        found = f"{str(record)[:80]!r} looks like a local path"
    elif isinstance(record, list | tuple) and len(record) > 118 and all(isinstance(v, int) for v in record):
        found = f"{len(record)} integers look like row numbers"  # a list of elements is never that long
    elif isinstance(record, dict) and (fields := PRIVATE_FIELDS & {k for k, v in record.items() if v is not None}):
        found = f"field {min(fields)!r} may not be shared"
    if found:
        raise ValueError(f"{where}: {found}; leave it out, modules are shared when their data are not")
    if isinstance(record, dict):
        for key, value in record.items():
            check_private(str(key), f"{where}: a key")
            check_private(value, f"{where}: {key}")
    elif isinstance(record, list | tuple):
        for value in record:
            check_private(value, where)


# -------------------------------------------------------------------------------------------------------- reading


def read_card(path) -> dict:
    """The card of the module in folder `path`, checked for form."""
    file = module_file(path, "module.json")
    if file.stat().st_size > 2**24:
        raise ValueError(f"{file}: larger than 16 MiB, so not a card; {AGAIN}")
    return parse_card(file.read_bytes(), file)


def parse_card(text, file: Path) -> dict:
    """The card in `text`; `file` is the path it has or will have."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e}); {AGAIN}") from None
    version = card.get("format_version") if isinstance(card, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: format_version is {version!r}, not {FORMAT_VERSION}; use the release that wrote it")
    bad = [field for field, form in CARD.items() if not isinstance(card.get(field), form)]
    bad = bad or [f for f in ("tensors_sha256", "signature") if not re.fullmatch("[0-9a-f]{64}", card[f])]
    bad = bad or [f for f in card["files_sha256"] if not re.fullmatch(r"[A-Za-z0-9_-][\w.-]*", f)]
    if bad:
        raise ValueError(f"{file}: {bad[0]!r} is missing or of the wrong form; {AGAIN}")
    kinds = [BACKBONE] if file.parent.name == BACKBONE else ["full", "adapter"]
    if card["kind"] not in kinds:
        raise ValueError(f"{file}: kind is {card['kind']!r}, not {' or '.join(kinds)}; only theta_0 is in {BACKBONE!r}")
    return card


def checked_file(path, file: str) -> Path:
    """One file of a module, after comparing its SHA-256 with the card."""
    path, card = Path(path), read_card(path)
    expected = card["tensors_sha256"] if file == MAIN else card["files_sha256"].get(file)
    if expected is None:
        raise ValueError(f"{path / 'module.json'}: lists no {file}; module {path.name} was saved without one")
    if sha256(module_file(path, file)) != expected:
        raise ValueError(f"{path / file}: damaged or changed, its SHA-256 is not the card's; {AGAIN}")
    return path / file


def open_tensors(path, file: str = MAIN):
    """A safetensors handle (`keys()`, `get_tensor(name)`) for one tensor at a time, its hash and values checked.

    The file is memory-mapped: what it costs in memory is the tensors in use, whatever the size of the module.
    """
    file = checked_file(path, file)
    handle = _open(file)
    for name in handle.keys():
        check_finite(name, handle.get_tensor(name), file)
    return handle


def load_tensors(path, file: str = MAIN) -> dict:
    """{name: tensor} of one file of a module, on the CPU, after the same checks."""
    with open_tensors(path, file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}


def _open(file):
    try:
        return safe_open(file, "pt")  # checks the header: offsets, sizes, dtypes
    except SafetensorError as e:
        raise ValueError(f"{file}: not a safetensors file ({e}); {AGAIN}") from None


def check_finite(name: str, t, shown, cure: str = "retrain it with a lower --lr") -> None:
    if t.is_floating_point() and not (finite := torch.isfinite(t)).all():
        count = int((~finite).sum())
        raise ValueError(f"{shown}: tensor {name!r} has {count} NaN or infinite values; {cure}")


def read_header(path, file: str = MAIN) -> dict:
    """{name: {"dtype", "shape"}} of a module's safetensors file; reads no tensor."""
    with _open(module_file(path, file)) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: {"dtype": s.get_dtype(), "shape": s.get_shape()} for name, s in slices.items()}


def signature(tensors: dict) -> str:
    """SHA-256 over sorted names, dtypes and shapes of {name: tensor} or of a header: what averaging must agree on."""
    rows = [(k, DTYPES[t.dtype], list(t.shape)) if torch.is_tensor(t) else (k, t["dtype"], list(t["shape"]))
            for k, t in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- the hub as a whole


def list_modules(hub) -> dict:
    """{name: card} of every module, sorted by name."""
    names = [n for n in _folders(hub) if n != BACKBONE and (Path(hub) / n / "module.json").exists()]
    return {name: read_card(module_dir(hub, name)) for name in names}


def _folders(hub) -> list[str]:
    if not Path(hub).is_dir():
        raise FileNotFoundError(f"{hub}: no such hub; train modules with `make hub`, or name the folder with --hub")
    return sorted(p.name for p in Path(hub).iterdir() if p.is_dir() and not p.name.startswith("."))


def check_compatible(cards: dict, hub=None) -> None:
    """Raise ValueError unless the modules {name: card} may be averaged; names the odd one out against the majority.

    Reads no tensor. With `hub`, the header of each file must agree with its card, and adapters with hub/backbone.
    """
    if not cards:
        raise ValueError(f"{hub or 'hub'}: no modules to compose; train some with `make hub`")
    for field in "kind", "architecture", "graph", "backbone_sha256", "signature":
        value = {name: json.dumps(card.get(field), sort_keys=True) for name, card in cards.items()}
        usual = Counter(value.values()).most_common(1)[0][0]
        odd, like = [n for n in value if value[n] != usual], [n for n in value if value[n] == usual]
        if odd:
            a, b, label = cards[odd[0]].get(field), cards[like[0]].get(field), field
            while isinstance(a, dict) and isinstance(b, dict):  # down to the setting that differs
                key = next(k for k in [*a, *b] if a.get(k) != b.get(k) or (k in a) != (k in b))
                a, b, label = a.get(key), b.get(key), f"{label}.{key}"
            where = f"{like[0]} and {len(like) - 1} more" if len(like) > 1 else like[0]
            raise ValueError(f"module {', '.join(odd[:5])}: {label} is {_cell(a)[:60]}, but {_cell(b)[:60]} in {where};"
                             " leave it out, or retrain it as the others, from the same theta_0")
    for name, card in cards.items() if hub else ():
        check_header(module_dir(hub, name), card)
        if card["kind"] == "adapter":
            check_theta(hub, name, card, read_card(Path(hub) / BACKBONE))


def check_header(path, card: dict) -> None:
    """The header of module.safetensors must have the card's signature; reads no tensor."""
    if signature(read_header(path)) != card["signature"]:
        raise ValueError(f"{Path(path) / MAIN}: its names, shapes or dtypes are not the card's; {AGAIN}")


def check_theta(hub, name: str, card: dict, theta: dict) -> None:
    """The module must start from this hub's theta_0 (theta: its card) and have the same tensors."""
    if card["backbone_sha256"] != theta["tensors_sha256"]:
        raise ValueError(f"{Path(hub) / name}: starts from another theta_0 than {Path(hub) / BACKBONE}; retrain it")
    file = ADAPTERS if card["kind"] == "adapter" else MAIN
    if signature(read_header(Path(hub) / BACKBONE, file)) != card["signature"]:
        raise ValueError(f"{Path(hub) / name}: its tensors are not those of {Path(hub) / BACKBONE / file}; retrain it")


def verify(hub, names=()) -> list[str]:
    """Every problem of a hub, or of the modules named, one line each; [] when all is in order."""
    problems = []

    def check(what, *args):
        try:
            return what(*args)
        except (ValueError, OSError) as e:
            problems.append(str(e))

    folders = list(names) or _folders(hub)
    theta = check(read_card, Path(hub) / BACKBONE)
    for name in folders:
        path = check(module_dir, hub, name)
        card = path and check(read_card, path)
        if not card:
            continue
        for file in [MAIN, *card["files_sha256"]]:
            check(open_tensors if file.endswith(".safetensors") else checked_file, path, file)
        check(check_header, path, card)
        check(check_private, card, str(path / "module.json"))
        check(module_file, path, "README.md")
        if card_sha256(card) != card["card_sha256"]:
            problems.append(f"{path / 'module.json'}: damaged or edited since it was saved; {AGAIN}")
        if theta and name != BACKBONE:
            check(check_theta, hub, name, card, theta)
        if card["name"] != name:
            problems.append(f"{path}: the card's name is {card['name']!r}; rename the folder, or retrain it")
        listed = {MAIN, "module.json", "README.md", *card["files_sha256"]}
        problems += [f"{p}: not listed in the card; delete it" for p in sorted(path.iterdir()) if p.name not in listed]
    cut_off = [p for p in sorted(Path(hub).glob(".*")) if re.fullmatch(r"\..+\.(part|old)-[0-9a-f]{8}", p.name)]
    problems += [f"{p}: left by a save that was cut off; delete it (or rename a lone .old back)" for p in cut_off]
    return list(dict.fromkeys(problems))


# ---------------------------------------------------------------------------------------------- published weights in

IMPORT = """Bring published GemNet-OC weights into a hub.

    python hub.py import jmp-l.pt --name jmp-l     a JMP checkpoint -> HUB/backbone, theta_0 of the modules trained here
    python hub.py import modules --released-moma   the 18 released MoMa modules (modules/mp_eform.pt ...) -> HUB/NAME
    python hub.py import modules mp_eform n_e_cond --released-moma     only those named

Sizes are read from the shapes (preset base is JMP-S, large JMP-L); the graph settings are the published ones. Every key
of a file is used, ignored as known, or an error. The weights stay under their authors' licence, written into the card
and those of the modules trained from them (JMP: CC BY-NC 4.0; MoMa modules: CC BY-NC-SA 4.0).

Files are read restricted to tensors and plain values; one with other objects is refused, by their name. --trust-pickle
reads it all the same, which RUNS ANY CODE the file holds, with your rights: only for a file whose SHA-256 you compared
with its source. What is not installed here becomes an empty placeholder.
"""
GROUPS = {  # a published key: (its group, its name in model.PretrainModel or PropertyModel); the first that matches
    r"(?:backbone\.)?embedding\.(?:atom_embedding\.)?weight": ("backbone", "backbone.embedding.weight"),
    r"(?:backbone\.)?(out_blocks\.\d+\.)seq_energy_pre\.(.+)": ("repeated layers", r"backbone.\1layers.\2"),
    r"(?:backbone\.)?bases\.(?!radial_basis\.)[\w.]*radial_basis\w*\.(rbf\.offset|rbf\.temps)":
        ("repeated radial bases", r"backbone.bases.radial_basis.\1"),
    r"(?:backbone\.)?((?:bases|int_blocks|out_blocks|out_mlp_[EF])\..+)": ("backbone", r"backbone.\1"),
    r"output\.(out_energy|out_forces)\.(\w+)\.(\d+\.(?:weight|bias))": ("pre-training heads", r"\1.\2.\3"),
    r"task_steps\..+": ("metric states", ""),
    r"(?:.+\.)?_?module_dict\.y\.(?:.+\.)?(\d+)\.(weight|bias)": ("task head", r"head.\1.\2"),
}  # fmt: skip
FORCES = r"(out_mlp_F|out_blocks\.\d+\.(seq_forces|dense_rbf_F|scale_rbf_F))\..+"
COUNTS = {  # constructor argument of GemNetOC: what is numbered
    "num_blocks": "int_blocks", "num_before_skip": "layers_before_skip", "num_after_skip": "layers_after_skip",
    "num_concat": "residual_m", "num_atom": "atom_update.layers", "num_atom_emb_layers": "atom_emb_layers",
    "num_output_afteratom": "seq_energy2", "num_global_out_layers": "out_mlp_E.out_mlp",
}  # fmt: skip
JMP_LICENSE, MOMA_LICENSE = "CC BY-NC 4.0", "CC BY-NC-SA 4.0"
MOMA = {  # the released modules: mean and standard deviation of the target, after the transform of data.TASKS
    "mp_eform": (-1.4079, 1.1631), "mp_bandgap": (1.2143, 1.5990), "mp_gvrh": (1.5536, 0.3716),
    "mp_kvrh": (1.8804, 0.3693), "n_e_cond": (7.5000, 12.915), "p_e_cond": (14.944, 16.712),
    "n_th_cond": (28.286, 5.0472), "p_th_cond": (27.456, 5.5671), "n_Seebeck": (332.29, 281.29),
    "p_Seebeck": (417.42, 336.90), "n_avg_eff_mass": (1.1691, 1.1331), "p_avg_eff_mass": (2.0619, 1.1980),
    "castelli_eform": (1.4709, 0.7425), "jarvis_eform": (-1.1345, 1.0393), "jarvis_bandgap": (0.9713, 1.6289),
    "jarvis_dielectric_opt": (3.1159, 1.3123), "jarvis_gvrh": (3.4760, 0.8692), "jarvis_kvrh": (4.2609, 0.8152),
}  # fmt: skip
DECLARED = hashlib.sha256(b"JMP-L, from which the released MoMa modules say they start").hexdigest()  # their theta_0,
# as long as it is not in the hub: no file was hashed. `adopt` puts the hash of an imported theta_0 in its place.
GET_AGAIN = "get it again from where it is published"


def import_weights(args) -> int:
    if not args.name:
        raise ValueError("import: name a file, or a folder with --released-moma; see python hub.py import --help")
    if args.released_moma and (args.keep_forces or args.no_ema):
        raise ValueError("--released-moma: the modules have no force branch and no EMA; leave out the other flag")
    if args.trust_pickle:
        print("--trust-pickle: the file may run any code, with your rights", file=sys.stderr)
    return (import_moma if args.released_moma else import_jmp)(args)


def import_jmp(args) -> int:
    """One JMP checkpoint -> HUB/backbone: EMA weights unless --no-ema, the force branch only with --keep-forces."""
    import model as moma

    check_name(args.label)
    path, target = Path(args.name[0]), module_dir(args.hub, BACKBONE)
    if target.exists():
        raise ValueError(f"{target}: exists already; delete it, or give another --hub")
    if len(args.name) > 1:
        raise ValueError(f"import {path}: takes one file, not {args.name[1]!r} as well")
    p = read_published(path, args.trust_pickle, heads="pre-training heads")
    if args.keep_forces and not p.arch["forces"]:
        raise ValueError(f"{path}: has no force branch; leave out --keep-forces")
    if not args.no_ema:
        take_ema(p)
    choose(p, args.keep_forces)
    cards = list_modules(args.hub) if Path(args.hub).is_dir() else {}
    for name, card in cards.items():
        if card["backbone_sha256"] == DECLARED and card["signature"] != p.signature:
            raise ValueError(f"{args.hub}: module {name} there has other tensors than {path}; give another --hub")
    tasks = re.findall(r"_typed_moduledict_(\w+)\.", " ".join(p.groups.get("metric states", [])))
    card = {"kind": BACKBONE, "architecture": p.arch, "graph": p.arch["graph"], "property": "energies and forces",
            "dataset": ", ".join(dict.fromkeys(tasks)) or None, "license_code": "MIT", "license_weights": JMP_LICENSE,
            "training": {"weights": "raw" if args.no_ema else "EMA"}, "source": args.label,
            "source_sha256": report(p)}  # fmt: skip
    save(target, p.tensors, card, adapters_init=moma.new_adapters(p.arch).state_dict())
    print(f"{target}: theta_0 from {args.label}, weights under {JMP_LICENSE}")
    adopt(args.hub)
    return 0


def import_moma(args) -> int:
    """A folder of released MoMa modules -> one folder each (lower-case names), once the keys of all are checked.

    They start from JMP-L, which is not among them: their backbone_sha256 is that of HUB/backbone where it was imported,
    and DECLARED, the same for all, where it was not.
    """
    import data

    files = find_released(Path(args.name[0]), args.name[1:])
    theta = read_card(Path(args.hub) / BACKBONE) if (Path(args.hub) / BACKBONE).exists() else {}
    found, cards = {}, {}
    for name, path in files.items():
        p = found[name.lower()] = read_published(path, args.trust_pickle, heads="task head")
        choose(p, keep_forces=False)
        p.head = property_head(p)
        task, (mean, std) = data.get_task(name), MOMA[name]
        cards[name.lower()] = {
            "kind": "full", "architecture": p.arch, "graph": p.arch["graph"], "signature": p.signature,
            "backbone_sha256": theta.get("tensors_sha256", DECLARED), "property": name, "unit": data.unit_of(task),
            "physical_unit": task.unit, "transform": task.transform, "pooling": "mean", "normalizer_mean": mean,
            "normalizer_std": std, "dataset": task.dataset, "license_code": "MIT", "license_weights": MOMA_LICENSE,
            "license_data": task.license, "training": {"theta_0": "JMP-L, as its authors say"},
            "source": f"released MoMa module {name}",
        }  # fmt: skip
    check_compatible(cards)
    if theta and (theta["signature"] != p.signature or "source_sha256" not in theta):
        raise ValueError(f"{Path(args.hub) / BACKBONE}: not an imported JMP of these sizes; give another --hub")
    for name, card in cards.items():
        p, target = found.pop(name), module_dir(args.hub, name)
        card["source_sha256"] = report(p)
        if target.exists() and read_card(target).get("source_sha256") == card["source_sha256"]:
            print(f"{target}: imported already")
        else:
            save(target, p.tensors, card, head=p.head)
            print(f"{target}: {card['property']} in {card['unit'] or 'no unit'}, weights under {MOMA_LICENSE}")
    adopt(args.hub)
    return 0


def find_released(folder: Path, names: list) -> dict:
    """{released name: its .pt file}: all of them, or those in `names`. Case does not count."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --released-moma takes the folder of the modules' .pt files")
    files = {p.stem.lower(): p for p in sorted(folder.glob("*.pt"))}
    wanted = {n.lower(): n for n in names or MOMA}
    released = {n.lower(): n for n in MOMA}
    if unknown := [n for n in wanted if n not in released] or [n for n in files if n not in released and not names]:
        raise ValueError(f"{folder}: {some(unknown)}: not a released module; they are {', '.join(MOMA)}")
    if missing := [f"{wanted[n]}.pt" for n in wanted if n not in files]:
        raise ValueError(f"{folder}: has no {some(missing)}; get it, or name after the folder the modules to import")
    return {released[n]: files[n] for n in wanted}


def read_checkpoint(path: Path, trust_pickle: bool = False) -> dict:
    """A foreign .pt file, memory-mapped: a tensor is read when it is used. Restricted unless trust_pickle."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the checkpoint's .pt file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: cut off, or not a zip file as torch.save writes it; {GET_AGAIN}")
    how = {"weights_only": True}
    if trust_pickle:
        how = {"weights_only": False, "pickle_module": types.SimpleNamespace(Unpickler=Unpickler, __name__="hub")}
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, **how)
    except Exception as e:  # a damaged or hostile file can raise anything
        named = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", str(e))
        if named and not trust_pickle:
            raise ValueError(f"{path}: holds a pickled {named[1] or named[2]}, which could run code and is not read; "
                             "if you trust the file, see --trust-pickle in python hub.py import --help") from None
        detail = "damaged pickle" if isinstance(e, pickle.UnpicklingError) else _cell(str(e).split("\n")[0])[:100]
        raise ValueError(f"{path}: not readable ({detail}); {GET_AGAIN}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        keys = some(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path}: has no 'state_dict' but {keys}; give a published checkpoint")
    return checkpoint


class Unpickler(pickle.Unpickler):
    """For --trust-pickle: a class that is not installed here becomes an empty placeholder."""

    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            ignore = lambda self, *args, **kwargs: None  # noqa: E731
            return type(name, (dict,), dict.fromkeys(("__init__", "__setstate__", "append", "extend"), ignore))


def read_published(path: Path, trust_pickle: bool, heads: str):
    """Read a published file and account for every key; raises naming what is unexpected, missing or of another form.

    heads: the group of the heads that belong there. Returns a namespace: path, checkpoint, state {key: tensor}, arch,
    tensors {name in GemNetOC: tensor} in the model's order, published {that name: its key}, groups {group: keys}.
    """
    checkpoint = read_checkpoint(path, trust_pickle)
    state, groups = {str(k): t for k, t in checkpoint["state_dict"].items()}, {}
    named, keys = rename_published(state)
    for key in state:
        group, name = place(key)
        foreign = ("head" in group and group != heads) or (group == "backbone" and keys[name] != key)  # or given twice
        lost = group.startswith("repeated") and name not in named
        groups.setdefault("unexpected" if foreign or lost else group, []).append(key)
    published = {n.removeprefix("backbone."): k for n, k in keys.items() if n.startswith("backbone.")}
    shapes = {n: tuple(state[k].shape) for n, k in published.items() if plain(state[k])}
    arch = architecture_of(shapes)
    wanted = shapes_of(json.dumps(arch))
    wrong = {
        "unexpected": groups.get("unexpected", []) + [k for n, k in published.items() if n not in wanted],
        "missing": [f"backbone.{n}".replace("backbone.embedding", "embedding.atom_embedding")
                    for n in wanted if n not in published],
        "of other shape": [f"{published[n]} {s}, not {wanted[n]}" for n, s in shapes.items() if wanted.get(n, s) != s],
        "not real numbers": [k for n, k in published.items() if n not in shapes],
    }  # fmt: skip
    if any(wrong.values()):
        text = "; ".join(f"{len(v)} {what}: {some(v)}" for what, v in wrong.items() if v)
        swapped = any("head" in place(k)[0] for k in groups.get("unexpected", []))
        cure = f"import it {'without' if heads == 'task head' else 'with'} --released-moma" if swapped else GET_AGAIN
        raise ValueError(f"{path}: not the keys of a published file ({text}); {cure}")
    if sum(state[k].nbytes for k in published.values()) > path.stat().st_size:
        raise ValueError(f"{path}: its tensors are larger than the file; {GET_AGAIN}")
    for key in groups.get("repeated layers", []) + groups.get("repeated radial bases", []):
        if not plain(state[key]) or not torch.equal(state[key].float(), named[place(key)[1]].float()):
            print(f"{path}: {key} differs from what it should repeat, which is used", file=sys.stderr)
    return types.SimpleNamespace(path=path, checkpoint=checkpoint, state=state, arch=arch, published=published,
                                 tensors={n: state[published[n]] for n in wanted}, groups=groups, note="")  # fmt: skip


def place(key: str) -> tuple[str, str]:
    """The group of a published key, and its name in our models. One or two leading `module.` do not count."""
    key = re.sub(r"^(module\.){1,2}", "", key)
    for pattern, (group, name) in GROUPS.items():
        if found := re.fullmatch(pattern, key):
            return group, found.expand(name)
    return "unexpected", key


def rename_published(state: dict, tasks=()) -> tuple[dict, dict]:
    """A published state dict -> ({name in PretrainModel: tensor}, {that name: published key}), repetitions left out.

    tasks: names of the pre-training heads, which a file may number instead.
    """
    named, published = {}, {}
    for key, t in state.items():
        group, name = place(key)
        if group == "pre-training heads" and tasks:
            out, task, rest = name.split(".", 2)
            name = f"{out}.{tasks[int(task)] if task.isdigit() else task}.{rest}"
        if group in ("backbone", "pre-training heads") and name not in named:
            named[name], published[name] = t, key
    return named, published


def architecture_of(shapes: dict) -> dict:
    """The architecture of the GemNet-OC with these {name: shape}, by majority. Its preset is base, large or custom."""
    import model as moma

    widths = ["num_elements", "num_radial", "num_spherical", *(k for k in moma.GEMNET if k.startswith("emb_size"))]
    primes = [n for n in range(101, 200) if all(n % d for d in range(2, 15))]  # none is a sum or product of others
    argument = dict(zip(primes, widths))
    probe = shapes_of(json.dumps(moma.preset("base", **dict(zip(widths, primes)), **dict.fromkeys(COUNTS, 1))))
    votes = {width: Counter() for width in widths}
    for name, shape in probe.items():
        for size, found in zip(shape, shapes.get(name, ())):
            if size in argument:
                votes[argument[size]][found] += 1
    sizes = {width: seen.most_common(1)[0][0] for width, seen in votes.items() if seen}
    for count, what in COUNTS.items():
        numbers = (re.fullmatch(rf"(?:.+\.)?{what}\.(\d+)\.(?:.+\.)?dense_mlp\..+", n) for n in shapes)
        sizes[count] = len({found[1] for found in numbers if found})
    for part in ("quad", "atom_edge", "edge_atom", "atom"):
        sizes[f"{part}_interaction"] = any(f".{part}_interaction." in n for n in shapes)
    forces = any(re.fullmatch(FORCES, n) for n in shapes)
    for arch in (moma.preset("base", forces=forces), moma.preset("large", forces=forces)):
        if all(arch[k] == v for k, v in sizes.items()):
            return arch
    return moma.preset("base", forces=forces, **sizes) | {"preset": "custom"}


@functools.cache
def shapes_of(arch: str) -> dict:
    """{name: shape} of the backbone that the JSON text `arch` describes, in the model's order; makes no weights."""
    import model as moma

    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in moma.build_backbone(json.loads(arch)).state_dict().items()}


def take_ema(p) -> None:
    """Put the moving averages in place of the parameters; the optimiser holds one for each, heads last, by position."""
    again = "--no-ema takes the raw weights"
    try:
        ema = list(p.checkpoint["optimizer_states"][0]["ema"])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{p.path}: has no EMA weights in optimizer_states[0]['ema']; {again}") from None
    names = [n for n in p.tensors if not n.endswith((".scale_factor", ".rbf.offset", ".rbf.temps"))]
    keys = [p.published[n] for n in names] + p.groups.get("pre-training heads", [])
    if len(ema) != len(keys):
        raise ValueError(f"{p.path}: {len(ema)} EMA weights for {len(keys)} parameters; {again}")
    for i, (key, t) in enumerate(zip(keys, ema)):
        if not plain(t) or t.shape != p.state[key].shape:
            raise ValueError(f"{p.path}: EMA weight {i} has not the shape of parameter {i}, {key}; {again}")
    alike = {}  # cosine of a piece of each with the raw weights: close to 1 when the order is right
    for n, t in zip(names, ema):
        raw, mean = (x.flatten()[:4096].float() for x in (p.tensors[n], t))
        check_finite(p.published[n], raw, p.path, GET_AGAIN)
        alike[n] = float(torch.cosine_similarity(raw, mean, dim=0))
    n = min(alike, key=alike.get)
    p.note = f", EMA weights (cosine with the raw ones at least {alike[n]:.3f})"
    if alike[n] < 0.5:
        print(f"{p.path}: EMA weight of {p.published[n]} is unlike its raw weight; {again}", file=sys.stderr)
    p.tensors |= dict(zip(names, ema))


def choose(p, keep_forces: bool) -> None:
    """Leave out the force branch, or keep it."""
    p.groups["force branch"] = [p.published[n] for n in p.tensors if re.fullmatch(FORCES, n) and not keep_forces]
    p.tensors = {n: t for n, t in p.tensors.items() if keep_forces or not re.fullmatch(FORCES, n)}
    p.arch["forces"] = keep_forces
    p.signature = signature({n: {"dtype": "F32", "shape": t.shape} for n, t in p.tensors.items()})


def property_head(p) -> dict | None:
    """The head of a released module under the names of ours; None where its layers are others."""
    import model as moma

    keys = sorted(p.groups.get("task head", []), key=lambda k: (int(k.split(".")[-2]), k.endswith("bias")))
    with torch.device("meta"):
        ours = moma.mlp(p.arch["emb_size_atom"]).state_dict()
    if [plain(p.state[k]) and p.state[k].shape for k in keys] != [t.shape for t in ours.values()]:
        print(f"{p.path}: its head has other layers than ours and is left out; composing needs none", file=sys.stderr)
        return None
    p.groups["task head"] = []
    for key in keys:
        check_finite(key, p.state[key], p.path, GET_AGAIN)
    return {n: p.state[k].float() for n, k in zip(ours, keys)}


def report(p) -> str:
    """Check values, make them single precision, print what is used and what is not. Returns the file's SHA-256."""
    for name, t in p.tensors.items():
        check_finite(p.published[name], t, p.path, GET_AGAIN)
    p.tensors = {n: t.float() for n, t in p.tensors.items()}
    number, source = sum(t.numel() for t in p.tensors.values()) / 1e6, sha256(p.path)
    ignored = [f"{len(keys)} {group}" for group, keys in p.groups.items() if keys and group != "backbone"]
    print(f"{p.path}: SHA-256 {source}\n  used: {len(p.tensors)} keys, {number:.3g} M numbers, preset "
          f"{p.arch['preset']}{p.note}\n  ignored: {', '.join(ignored) or 'none'}")
    return source


def adopt(hub) -> None:
    """Released modules that only declared their theta_0 now name the one imported into their hub."""
    theta = Path(hub) / BACKBONE
    for name, card in list_modules(hub).items() if theta.exists() else ():
        if card["backbone_sha256"] == DECLARED:
            card["backbone_sha256"] = read_card(theta)["tensors_sha256"]
            card["card_sha256"] = card_sha256(card)
            for file, text in {"README.md": readme(card), "module.json": to_json(card, theta)}.items():
                part = module_dir(hub, name) / f".{file}.part"
                write_text(part, text)
                os.replace(part, part.with_name(file))


def plain(t) -> bool:
    """Whether t is an ordinary tensor of real numbers, with values."""
    return torch.is_tensor(t) and t.is_floating_point() and t.layout == torch.strided and t.device.type == "cpu"


def some(names) -> str:
    """The first three, and how many more; printable."""
    names = list(names)
    return _cell(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------ for people: README, CLI


def readme(card: dict) -> str:
    """README.md with the front matter of the Hugging Face hub, from the card alone."""
    licence = (card["license_weights"] or "unknown").lower().replace(" ", "-")
    known = ("unknown", "mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
             "cc-by-nc-sa-4.0")
    front = {"license": licence} if licence in known else {"license": "other", "license_name": licence}
    front["library_name"] = "moma"
    front["tags"] = ["materials", "crystals", "moma", str(card["architecture"].get("backbone", BACKBONE)), card["kind"]]
    front["datasets"] = card["dataset"].split(", ") if card["dataset"] else []
    front["metrics"] = ["mae"]
    parents = card["parents"] or ([] if card["kind"] == BACKBONE else [BACKBONE])
    front["base_model"] = [p["name"] if isinstance(p, dict) else p for p in parents]
    what = {BACKBONE: "theta_0, the starting point of every module of a MoMa hub", "full": "A full MoMa module",
            "adapter": "An adapter MoMa module"}[card["kind"]]
    table = "\n".join(f"| {field} | {_cell(v).replace('|', '/')} |" for field, v in card.items() if v is not None)
    yaml = "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in front.items())  # JSON values are YAML
    return (f"---\n{yaml}\n---\n\n# {card['name']}\n\n{what}. Generated from `module.json`.\n\n"
            f"| field | value |\n|---|---|\n{table}\n\nErrors, mean and standard deviation are in the unit above. "
            "No structures and no labels are in this folder;\ntrained weights can still carry traces of their data.\n")


def _cell(value) -> str:
    """One printable line: cards come from strangers."""
    text = value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
    return "".join(c if c.isprintable() else "?" for c in text) if value is not None else "-"


def show_list(args) -> int:
    """A table of the hub. Modules with an unreadable card go to stderr, and the exit code is 1."""
    rows, bad = [("name", "property", "unit", "kind", "rows", "val MAE", "MAE/MAD", "size")], []
    for name in _folders(args.hub):
        try:
            card = read_card(path := module_dir(args.hub, name))
        except (ValueError, OSError) as e:
            bad.append(str(e))
            continue
        mae, mad = card["val_mae"], card["mad"]
        ratio = f"{mae / mad:.2f}" if mae is not None and mad else None
        size = f"{sum(p.lstat().st_size for p in path.iterdir()) / 1e6:.1f} MB"
        task = [card[field] for field in ("property", "unit", "kind", "rows_used")]
        rows.append([_cell(c) for c in (name, *task, mae, ratio, size)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{c:{'>' if i > 3 else '<'}{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


def show_card(args) -> int:
    if len(args.name) != 1:
        raise ValueError("show: name one module, as in: python hub.py show mp_eform")
    path = module_dir(args.hub, args.name[0])
    for field, value in read_card(path).items():
        print(f"{field:<20}{_cell(value)}")
    for p in sorted(path.iterdir()):
        print(f"{p.name:<20}{p.lstat().st_size:,} bytes")
    return 0


def show_problems(args) -> int:
    if unknown := set(args.name) - set(_folders(args.hub)):
        raise ValueError(f"{args.hub}: has no module {min(unknown)!r}; `python hub.py list` names those there")
    problems = verify(args.hub, args.name)
    print(*problems or [f"{args.hub}: all in order"], sep="\n")
    return 1 if problems else 0


COMMANDS = {"list": show_list, "show": show_card, "verify": show_problems, "import": import_weights}  # -> exit code


def main(argv=None) -> int:
    importing = "import" in (sys.argv[1:] if argv is None else argv)
    doc, example = (IMPORT, "import jmp-l.pt --name jmp-l") if importing else (__doc__, "show mp_eform")
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=raw, epilog=f"example: python hub.py {example}")
    p.add_argument("command", choices=list(COMMANDS))
    p.add_argument("name", nargs="*", help="show: the module; verify: only these modules; import: the path")
    p.add_argument("--hub", default="hub", help="the hub's folder (default: hub)")
    if importing:
        p.add_argument("--name", dest="label", metavar="LABEL", default="jmp", help="what the card calls the source")
        p.add_argument("--keep-forces", action="store_true", help="keep the force branch (default: drop it)")
        p.add_argument("--no-ema", action="store_true", help="the raw weights, not their moving average (EMA)")
        p.add_argument("--released-moma", action="store_true", help="the path is the folder of released MoMa modules")
        p.add_argument("--trust-pickle", action="store_true", help="unpickle any object: RUNS CODE that the file holds")

    def error(message):
        raise ValueError(f"{message}; see python hub.py --help")

    p.error = error
    try:
        args = p.parse_intermixed_args(argv)
        return COMMANDS[args.command](args)
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
