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
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
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


COMMANDS = {"list": show_list, "show": show_card, "verify": show_problems}  # -> exit code


def main(argv=None) -> int:
    doc, example = __doc__, "show mp_eform"
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=raw, epilog=f"example: python hub.py {example}")
    p.add_argument("command", choices=list(COMMANDS))
    p.add_argument("name", nargs="*", help="show: the module; verify: only these modules; import: the path")
    p.add_argument("--hub", default="hub", help="the hub's folder (default: hub)")
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
