"""The hub H = {g_1 ... g_N}: a plain directory of MoMa modules (section 2.2, module centralisation).

    python hub.py list                   one line a module
    python hub.py show mp_eform          its card
    python hub.py verify                 every hash, every card; exit 1 names what is wrong
    python hub.py readme                 the table of the hub for people, as in hub/README.md

    hub/backbone/                        theta_0, which every module starts from
    hub/mp_eform/module.safetensors      parameters of backbone (full) or adapters (adapter)
                 head.safetensors        the source task's own head, never composed
                 module.json             the card: what it is, how it was made, all SHA-256
                 history.csv  README.md  the training curve; the card for people
                 seen.npy                which structures it was trained on, as hashes (`seen`)
                 composition.json        composed modules only; folds/0, 1, ...: one for each fold
                 hints.npz               those of compose.py --select hinted

A fine-tuned run is such a folder outside a hub, with its results and with model.safetensors
(backbone, adapters, head). Nothing here unpickles: tensors are safetensors, the rest is JSON, CSV,
PNG and plain arrays. Weights can carry traces of their data.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# before torch
from files import VERSION, MissingError, UserError, leftover, read_json, reading, recover, sync, whole_folder
from files import check_name as check_folder_name

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from card import (ADAPTERS, AGAIN, BACKBONE, CARD, FORMAT_VERSION, HEAD, MAIN, MODEL, card_sha256, cell,
                  check_private, hub_readme, parse_card, ratio, readme, to_json)  # fmt: skip
from model import build_backbone, mlp, new_adapters

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
SEEN = "seen.npy"
HINTS = "hints.npz"
FOLDS = "folds"  # the folder, in that of a composed module, of one for each fold


# ---------------------------------------------------------------- names and files


def check_name(name: str) -> None:
    """A module's name is its folder's; one in upper case is told its lower case form."""
    hint = f" (use {name.lower()!r})" if re.fullmatch("[A-Za-z0-9][A-Za-z0-9_]{,99}", name) else ""
    check_folder_name(name, f"module name {name!r}{hint}")


def module_dir(hub, name: str) -> Path:
    """Folder of one module, existing or not; refuses a name or a link that leads out of the hub."""
    check_name(name)
    if (Path(hub) / name).resolve() != Path(hub).resolve() / name:
        raise UserError(f"{Path(hub) / name}: a link that leads elsewhere; put the module's own folder there")
    return Path(hub) / name


def module_file(path, file: str) -> Path:
    """One file of a module's folder; refuses links and names what is missing."""
    path, file = Path(path), Path(path) / file
    recover(path)
    if not path.is_dir() and path.name == BACKBONE:
        cure = f"copy hub/backbone there, or make one: `make backbone HUB={path.parent}`"
        raise MissingError(f"{path}: no theta_0 to start from; {cure}")
    if not path.is_dir():
        raise MissingError(f"{path}: no such module; see python hub.py list --hub {path.parent}")
    if file.is_symlink():
        raise UserError(f"{file}: a link that may lead elsewhere; put the file itself there")
    if not file.is_file():
        raise MissingError(f"{file}: missing; {AGAIN}")
    return file


def sha256(file) -> str:
    """SHA-256 of a file, as hex."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------- writing


def save(path, tensors: dict, card: dict, head: dict | None = None, adapters_init: dict | None = None,
         history: str = "", extra: dict | None = None, overwrite: bool = False, main: str = MAIN, folds=()) -> dict:
    """Write one module (or theta_0): the whole folder appears, or nothing does. Returns the completed card.

    path: hub/NAME. tensors, head, adapters_init: {name: tensor}, any device. history: text of history.csv.
    extra: {"composition.json": json-able, "weights.png": bytes}; bytes are written as they are, not checked.
    overwrite: replace a module of that name as a whole. main: MODEL for a fine-tuned run, outside a hub.
    folds: (tensors, card, extra) of the module of every fold, made one after the other; they go into path/folds/K.
    Filled in here: name, versions, hashes, signature, number of parameters, null for what `card` leaves out.
    Raises UserError for what is given wrongly, OSError where the disk is full; then nothing has changed.
    """
    path, contents = Path(path), {}
    check_card(card, path, main)
    replace = check_place(path, overwrite)
    for file, content in (extra or {}).items():
        named = re.fullmatch(r"[a-z][a-z0-9_-]*\.(json|csv|png|npy|npz)", file)
        if not named or file in ("module.json", "history.csv"):
            raise UserError(f"{path / file}: extra files are named like composition.json")
        if not isinstance(content, bytes):
            check_private(content, str(path / file))
            content = to_json(content, path / file).encode()
        contents[file] = content
    if history:
        contents["history.csv"] = history.encode()
    groups = {main: tensors, HEAD: head, ADAPTERS: adapters_init}
    groups = {file: group for file, group in groups.items() if group is not None}
    try:
        with whole_folder(path, replace) as part:
            sums = {file: write_tensors(part / file, group, path / file) for file, group in groups.items()}
            sums |= {file: write_bytes(part / file, content) for file, content in contents.items()}
            for k, (g, about, files) in enumerate(folds):
                save(part / FOLDS / str(k), g, about, extra=files)
            card = complete(card, path, sums, tensors)
            write_bytes(part / "module.json", to_json(card, path).encode())
            write_bytes(part / "README.md", readme(card).encode())
    except UserError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return card


def check_card(card: dict, path, main: str = MAIN) -> None:
    """Refuse what `save` would refuse of a card and its place: before the first epoch, not after all."""
    path = Path(path)
    if main == MAIN:
        module_dir(path.parent, path.name)
    elif path.name in ("", ".."):
        raise UserError(f"{path}: not the name of a folder; give one")
    check_place(path, overwrite=True)
    complete(card, path, {MAIN: "0" * 64}, {})


def check_place(path, overwrite: bool = False) -> bool:
    """Refuse a path that is in use; with `overwrite`, one that holds what `save` has not written.

    Returns whether a folder is there, to be replaced. An empty one is.
    """
    path = Path(path)
    recover(path)
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise UserError(f"{path}: not a folder, so it is not replaced; remove it or name another")
    inside = sorted(path.iterdir()) if path.exists() else []
    if inside and not overwrite:
        raise UserError(f"{path}: exists already; delete it, name another, or give --overwrite")
    if inside and (found := foreign(path)):
        raise UserError(f"{path}: holds {found.relative_to(path)}, which no card lists: not replaced; name another")
    return path.exists()


def foreign(path: Path):
    """The first file or folder in a module's folder, or in those of its folds, that no card lists; None if all are."""
    ours = written_by_save(path)
    for p in sorted(path.iterdir()):
        if p.name not in ours or p.is_dir() != (p.name == FOLDS):
            return p
        for fold in sorted(p.iterdir()) if p.name == FOLDS else ():
            if found := foreign(fold) if fold.is_dir() else fold:
                return found
    return None


def written_by_save(path: Path) -> set:
    """Names of a module's files, by its card, damaged or not; none where there is no card."""
    try:
        card = read_json(path / "module.json", "a card", most=2**24)
        return {"module.json", "README.md", MAIN, *card["files_sha256"], *[FOLDS] * bool(card.get("folds"))}
    except (UserError, KeyError, TypeError, AttributeError):
        return set()


def complete(card: dict, path: Path, sums: dict, tensors: dict) -> dict:
    """The card as it is written to `path`. sums: {file: SHA-256}, that of `tensors` first."""
    file = path / "module.json"
    check_private(card, str(file))
    filled = {
        "format_version": FORMAT_VERSION, "version": VERSION, "name": path.name,
        "num_parameters": sum(t.numel() for t in tensors.values()), "signature": signature(tensors),
        "tensors_sha256": next(iter(sums.values())),
        "files_sha256": {name: digest for name, digest in sums.items() if name != MAIN},
    }  # fmt: skip
    text = to_json({**dict.fromkeys(CARD), **card, **filled}, file)  # plain numbers, lists for tuples
    card = parse_card(json.loads(text), file)
    return card | {"card_sha256": card_sha256(card)}


def write_tensors(file: Path, tensors: dict, shown: Path) -> str:
    """Write {name: tensor}, all finite, as safetensors. Returns the SHA-256. shown: the path in errors."""
    if not tensors:
        raise UserError(f"{shown}: no tensors to save")
    out, seen = {}, set()
    for name, t in tensors.items():
        check_finite(name, t, shown)
        t = t.detach().cpu().contiguous()
        memory = t.untyped_storage().data_ptr()
        out[name] = t.clone() if memory in seen else t  # tied tensors are stored under every name
        seen.add(memory)
    try:
        save_file(out, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the system's error is in its text only
        if not (found := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
    os.chmod(file, file.parent.stat().st_mode & 0o666)  # not private, but shared as its folder is
    sync(file)
    return sha256(file)


def write_bytes(file: Path, content: bytes) -> str:
    """Write through to the disk. Returns the SHA-256."""
    file.write_bytes(content)
    sync(file)
    return sha256(file)


# ---------------------------------------------------------------- reading


def read_card(path) -> dict:
    """The card of the module in folder `path`, checked; null for the fields that it lacks."""
    file = module_file(path, "module.json")
    return parse_card(read_json(file, "a card", AGAIN, most=2**24), file)


def main_file(card: dict) -> str:
    """The file whose tensors the card's signature and tensors_sha256 are of."""
    return MODEL if MODEL in card["files_sha256"] else MAIN


def checked_file(path, file: str) -> Path:
    """One file of a module, after comparing its SHA-256 with the card."""
    path, card = Path(path), read_card(path)
    digest = card["tensors_sha256"] if file == main_file(card) else card["files_sha256"].get(file)
    if digest is None:
        raise UserError(f"{path / 'module.json'}: lists no {file}; module {path.name} was saved without one")
    if sha256(module_file(path, file)) != digest:
        raise UserError(f"{path / file}: damaged or changed, its SHA-256 is not the card's; {AGAIN}")
    return path / file


def open_tensors(path, file: str = MAIN):
    """A safetensors handle (`keys()`, `get_tensor(name)`), the file's hash and values checked.

    It is memory-mapped: what it costs in memory is the tensors in use, whatever the size of the module.
    """
    file = checked_file(path, file)
    handle = open_safetensors(file)
    for name in handle.keys():
        check_finite(name, handle.get_tensor(name), file)
    return handle


def load_tensors(path, file: str = MAIN) -> dict:
    """{name: tensor} of one file of a module, on the CPU, after the same checks."""
    with open_tensors(path, file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}


def open_safetensors(file):
    with reading(file, "a safetensors file", AGAIN):
        return safe_open(file, "pt")  # checks the header: offsets, sizes, dtypes


def check_finite(name: str, t, shown, cure: str = "retrain it with a lower --lr") -> None:
    if t.is_floating_point() and not (finite := torch.isfinite(t)).all():
        count = int((~finite).sum())
        raise UserError(f"{shown}: tensor {name!r} has {count} NaN or infinite values; {cure}")


def read_header(path, file: str = MAIN) -> dict:
    """{name: {"dtype", "shape"}} of a module's safetensors file; reads no tensor."""
    with open_safetensors(module_file(path, file)) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: {"dtype": s.get_dtype(), "shape": s.get_shape()} for name, s in slices.items()}


def signature(tensors: dict) -> str:
    """SHA-256 over sorted names, dtypes and shapes of {name: tensor} or a header: equal, or no averaging."""
    rows = [(k, DTYPES[t.dtype], list(t.shape)) if torch.is_tensor(t) else (k, t["dtype"], list(t["shape"]))
            for k, t in sorted(tensors.items())]  # fmt: skip
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ---------------------------------------------------------------- what a module has seen


def seen_file(prototypes) -> dict:
    """{"seen.npy": bytes}, for `extra` of save: which structures were trained on. prototypes: of crystals.prototypes.

    Five bytes of a hash each, sorted: a table of 10,000 is 50 kB, in which a new structure is found by chance once in
    a hundred million times.
    """
    return hashes_file(digests(prototypes))


def hashes_file(hashes) -> dict:
    out = io.BytesIO()
    np.save(out, np.unique(hashes))
    return {SEEN: out.getvalue()}


def digests(prototypes):
    return np.array([hashlib.blake2b(p.encode(), digest_size=5).digest() for p in prototypes], dtype="S5")


def read_seen(path):
    """The hashes in the folder of one module; None where it was saved without."""
    if SEEN not in read_card(path)["files_sha256"]:
        return None
    file = checked_file(path, SEEN)
    with reading(file, "a list of hashes", AGAIN):
        found = np.load(file, allow_pickle=False)
        if found.dtype != "S5" or found.ndim != 1:
            raise ValueError(f"array of {found.dtype}, {found.ndim} dimensions")
    return found


def seen(paths, prototypes):
    """(M,) bool: which crystals the weights in these folders were trained on, under whatever label; None: not known.

    paths: folders that a start rests on: [a module, hub/backbone], [hub/backbone], or [a composed module], whose
    seen.npy has what its parents and theta_0 have seen. prototypes: (M,) words, of crystals.prototypes.
    Not known where one of the folders has no seen.npy (modules of private data, or of an older release).
    """
    found = [read_seen(path) for path in paths]
    return None if any(f is None for f in found) else np.isin(digests(prototypes), np.concatenate(found))


def joined_seen(paths) -> dict:
    """{"seen.npy": bytes} of what several folders have seen; {} where one of them does not say."""
    found = [read_seen(path) for path in paths]
    return {} if any(f is None for f in found) else hashes_file(np.concatenate(found))


# ---------------------------------------------------------------- modules as networks


@dataclass
class Module:
    """What a module's folder holds, as networks with weights, in evaluation mode on the CPU."""

    card: dict
    backbone: nn.Module
    adapters: nn.Module | None  # None: it has none
    head: nn.Module | None


def load_module(path, hub="", kind: str = "") -> Module:
    """Any folder of a module: theta_0, a full or adapter module, composed or not, a fine-tuned run.

    hub: where the theta_0 of adapters is; default: where the module is. kind: with "adapter", a theta_0 comes
    with the adapters that all modules of its hub start from. UserError: another theta_0, names, or shapes.
    """
    path, card = Path(path), read_card(path)
    theta, base, files = path, card, card["files_sha256"]
    if card["kind"] == "adapter" and MODEL not in files:
        theta = Path(hub or path.parent) / BACKBONE
        base = check_theta(path, card, theta)
    with_adapters = "adapter" in (card["kind"], kind if card["kind"] == BACKBONE else "")
    backbone = build_backbone(base["architecture"])
    adapters = new_adapters(backbone) if with_adapters else None
    head = mlp(backbone.width) if {HEAD, MODEL} & files.keys() else None
    parts = {"backbone": backbone, "adapters": adapters, "head": head}
    model = nn.ModuleDict({name: part for name, part in parts.items() if part is not None}).eval()
    if MODEL in files:
        load_tensors_into(model, load_tensors(path, MODEL), path / MODEL)
        return Module(card, **parts)
    own = ADAPTERS if card["kind"] == BACKBONE else MAIN
    sources = {"backbone": (theta, MAIN), "adapters": (path, own), "head": (path, HEAD)}
    for name, part in model.items():
        folder, file = sources[name]
        load_tensors_into(part, load_tensors(folder, file), folder / file)
    return Module(card, **parts)


def load_tensors_into(module: nn.Module, tensors: dict, where) -> None:
    """Load a state dict of just the module's names and shapes; UserError names the first that differs."""
    mine = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in tensors.items()}
    for k in sorted(mine.keys() | theirs.keys()):
        if mine.get(k) != theirs.get(k):
            found, wanted = theirs.get(k, "missing"), mine.get(k, "none of that name")
            raise UserError(f"{where}: tensor {k} is {found}, the model has {wanted}: another architecture's")
    module.load_state_dict(tensors)


def check_theta(path, card: dict, theta: Path) -> dict:
    """The module in `path` must start from theta_0 in the folder `theta`. Returns theta_0's card."""
    recover(theta)
    if not theta.is_dir():
        raise MissingError(f"{path}: needs its theta_0, but there is no {theta}; give --hub one that has it")
    base = read_card(theta)
    if card["backbone_sha256"] != base["tensors_sha256"]:
        raise UserError(f"{path}: starts from another theta_0 than {theta}; give its --hub, or retrain it")
    file = ADAPTERS if card["kind"] == "adapter" else MAIN
    if signature(read_header(theta, file)) != card["signature"]:
        raise UserError(f"{path}: its tensors are not those of {theta / file}; retrain it")
    return base


# ---------------------------------------------------------------- the hub as a whole


def list_modules(hub) -> dict:
    """{name: card} of every module, sorted by name."""
    names = [n for n in folder_names(hub) if n != BACKBONE and (Path(hub) / n / "module.json").exists()]
    return {name: read_card(module_dir(hub, name)) for name in names}


def folder_names(hub) -> list[str]:
    """Names of the folders of a hub, sorted; those that a killed `save` had put aside are brought back."""
    hub = Path(hub)
    if not hub.is_dir():
        raise MissingError(f"{hub}: no such hub; train modules with `make hub`, or give another --hub")
    if (hub / "module.json").exists():
        raise UserError(f"{hub}: the folder of one module, not a hub; name it, and give --hub {hub.parent}")
    for aside in filter(leftover, hub.glob(".*.old")):
        recover(hub / aside.name[1:].rsplit(".", 2)[0])
    return sorted(p.name for p in hub.iterdir() if p.is_dir() and not p.name.startswith("."))


def check_compatible(cards: dict, hub=None) -> None:
    """UserError unless the modules {name: card} may be averaged; names the odd one out against the majority.

    Reads no tensor. With `hub`, each file's header must agree with its card, and adapters with hub/backbone.
    """
    if not cards:
        raise UserError(f"{hub or 'hub'}: no modules to compose; train some with `make hub`")
    for field in "kind", "architecture", "backbone_sha256", "signature":
        values = [card[field] for card in cards.values()]
        usual = max(values, key=values.count)
        odd = [name for name, card in cards.items() if card[field] != usual]
        like = [name for name in cards if name not in odd]
        if odd:
            a, b, label = cards[odd[0]][field], usual, field
            while isinstance(a, dict) and isinstance(b, dict):  # down to the setting that differs
                key = next(k for k in [*a, *b] if a.get(k) != b.get(k))
                a, b, label = a.get(key), b.get(key), f"{label}.{key}"
            where = f"{like[0]} and {len(like) - 1} more" if len(like) > 1 else like[0]
            found = f"module {', '.join(odd[:5])}: {label} is {cell(a)[:60]}, but {cell(b)[:60]} in {where}"
            raise UserError(f"{found}; leave it out, or retrain it as the others, from the same theta_0")
    for name, card in cards.items() if hub else ():
        path = module_dir(hub, name)
        check_header(path, card)
        if card["kind"] == "adapter":
            check_theta(path, card, Path(hub) / BACKBONE)


def check_header(path, card: dict) -> None:
    """The header of the module's tensors must have the card's signature; reads no tensor."""
    file = main_file(card)
    if signature(read_header(path, file)) != card["signature"]:
        raise UserError(f"{Path(path) / file}: its names, shapes or dtypes are not the card's; {AGAIN}")


def verify(hub, names=()) -> list[str]:
    """Every problem of a hub, or of the modules named, one line each; [] when all is in order.

    Where the hub has no theta_0 (a module that was copied alone), whether its modules fit it is left open.
    """
    problems, theta = [], Path(hub) / BACKBONE

    def check(what, *args):
        try:
            return what(*args)
        except (UserError, OSError) as error:
            problems.append(one_line(error))

    for name in names or folder_names(hub):
        path = check(module_dir, hub, name)
        card = path and check(read_card, path)
        if not card:
            continue
        listed = {main_file(card): None, **card["files_sha256"]}
        for file in listed:
            check(open_tensors if file.endswith(".safetensors") else checked_file, path, file)
        check(check_header, path, card)
        check(read_seen, path)
        check(check_private, card, str(path / "module.json"))
        check(module_file, path, "README.md")
        if card_sha256(card) != card["card_sha256"]:
            problems.append(f"{path / 'module.json'}: damaged or edited since it was saved; {AGAIN}")
        if theta.is_dir() and name != BACKBONE and MODEL not in listed:
            check(check_theta, path, card, theta)
        if card["name"] != name:
            problems.append(f"{path}: the card's name is {card['name']!r}; rename the folder, or retrain it")
        problems += verify_folds(path, card)
        known = {"module.json", "README.md", *listed, *[FOLDS] * bool(card["folds"])}
        strange = [p for p in sorted(path.iterdir()) if p.name not in known]
        problems += [f"{p}: not listed in the card; delete it" for p in strange]
    left = filter(leftover, sorted(Path(hub).glob(".*")))
    problems += [f"{p}: left by a save that was killed; the next save of that name deletes it" for p in left]
    return list(dict.fromkeys(problems))


def verify_folds(path: Path, card: dict) -> list[str]:
    """Every problem of the modules in path/folds, as many as the card says."""
    names, inside = list(map(str, range(card["folds"] or 0))), path / FOLDS
    if not names:
        return []
    strange = [p for p in sorted(inside.glob("*")) if p.name not in names]
    return verify(inside, names) + [f"{p}: not listed in the card; delete it" for p in strange]


# ---------------------------------------------------------------- the command line


def show_list(args) -> int:
    """A table of the hub. Modules with an unreadable card go to stderr, and the exit code is 1."""
    rows, bad = [("name", "property", "unit", "kind", "rows", "val MAE", "MAE/MAD", "size")], 0
    for name in folder_names(args.hub):
        try:
            card = read_card(path := module_dir(args.hub, name))
        except (UserError, OSError) as error:
            print(one_line(error), file=sys.stderr)
            bad += 1
            continue
        task = [card[field] for field in ("property", "unit", "kind", "rows_used", "val_mae")]
        rows.append([cell(c) for c in (name, *task, ratio(card), size(path))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(c.rjust(w) if i > 3 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))))
    return 1 if bad else 0


def size(path: Path) -> str:
    return f"{sum(p.lstat().st_size for p in path.iterdir()) / 1e6:.1f} MB"


def show_readme(args) -> int:
    """README.md of the hub, with what a person wrote in SOURCES.md: python hub.py readme > hub/README.md."""
    cards, theta_0 = list_modules(args.hub), Path(args.hub) / BACKBONE
    cards = ({BACKBONE: read_card(theta_0)} if theta_0.is_dir() else {}) | cards
    print(hub_readme({name: (card, size(Path(args.hub) / name)) for name, card in cards.items()}))
    sources = Path(args.hub) / "SOURCES.md"
    if sources.exists():
        print("\n" + sources.read_text().replace("# ", "## ", 1).rstrip())
    return 0


def show_card(args) -> int:
    if len(args.name) != 1:
        raise UserError("show: name one module, as in: python hub.py show mp_eform")
    path = module_dir(args.hub, args.name[0])
    for field, value in read_card(path).items():
        print(f"{field:<20}{cell(value)}")
    for p in sorted(path.iterdir()):
        print(f"{p.name:<20}{p.lstat().st_size:,} bytes")
    return 0


def show_problems(args) -> int:
    found = folder_names(args.hub)
    if unknown := set(args.name) - set(found):
        raise UserError(f"{args.hub}: has no module {min(unknown)!r}; `python hub.py list` names those there")
    problems = verify(args.hub, args.name)
    print(*problems or [f"{args.hub}: {'all in order' if found else 'empty'}"], sep="\n")
    if found and BACKBONE not in found:
        print(f"{args.hub}: has no {BACKBONE}, so not checked: whether its modules start from one theta_0")
    return 1 if problems else 0


COMMANDS = {"list": show_list, "show": show_card, "verify": show_problems, "readme": show_readme}  # -> exit code


def main(argv=None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("hub.py", description=__doc__, formatter_class=raw)
    p.add_argument("command", choices=list(COMMANDS))
    p.add_argument("name", nargs="*", help="show: the module; verify: only these modules")
    p.add_argument("--hub", default="hub", help="the hub's folder (default: hub)")
    return run_command(p, lambda args: COMMANDS[args.command](args), argv)


def run_command(parser, run, argv=None) -> int:
    """run(arguments) -> exit code; wrong input is one line on stderr and 2."""

    def refuse(message):
        raise UserError(f"{message}; see python {parser.prog} --help")

    parser.error = refuse
    try:
        return run(parser.parse_intermixed_args(argv))
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 2


def one_line(error) -> str:
    """A UserError, or a system's error as "path: what"."""
    system = isinstance(error, OSError) and error.strerror and error.filename
    return " ".join((f"{error.filename}: {error.strerror}" if system else str(error)).split())


if __name__ == "__main__":
    sys.exit(main())
