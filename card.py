"""The card of a MoMa module, module.json: its fields, what they must hold, and what may not be in them.

A module may be shared when its data may not, so a card holds no structures, labels, row ids, local paths or
user names. A card may come from a stranger: it is checked here, once, and no stage stumbles over it later.
"""

import hashlib
import json
import re
from pathlib import Path

from files import UserError
from model import check_architecture
from tasks import POOLINGS, TRANSFORMS

FORMAT_VERSION = 1
BACKBONE = "backbone"  # the folder of theta_0, which is not a module
MAIN, HEAD, ADAPTERS = "module.safetensors", "head.safetensors", "adapters.safetensors"
MODEL = "model.safetensors"  # of a fine-tuned run: backbone, adapters and head in one file
AGAIN = "copy the module's folder again, or retrain it"

NUMBER, TEXT, LIST, DICT = int | float | None, str | None, list | None, dict | None
CARD = {  # every field of module.json; null where it does not apply; mean, std and errors are in `unit`
    "format_version": int, "name": str, "kind": str, "property": TEXT, "unit": TEXT, "physical_unit": TEXT,
    "transform": TEXT, "pooling": TEXT, "normalizer_mean": NUMBER, "normalizer_std": NUMBER,
    "val_mae": NUMBER, "test_mae": NUMBER, "mad": NUMBER, "architecture": dict, "graph": DICT,
    "num_parameters": int, "signature": str, "backbone_sha256": TEXT, "tensors_sha256": str,
    "files_sha256": dict, "card_sha256": TEXT, "dataset": TEXT, "dataset_fingerprint": TEXT,
    "rows_used": NUMBER, "rows_skipped": NUMBER, "elements": LIST, "seed": NUMBER, "split_seed": NUMBER,
    "split": object, "training": DICT, "record": DICT, "seconds": NUMBER, "hardware": TEXT,
    "author": TEXT, "version": TEXT, "license_code": TEXT, "license_weights": TEXT, "license_data": TEXT,
    "parents": LIST, "weights": LIST, "folds": int | None,
}  # fmt: skip
LATER = ("physical_unit", "record", "author", "version", "folds")  # fields that the first cards of this format lack


def parse_card(card, file: Path) -> dict:
    """The content of the card `file`, null for the fields that it lacks; UserError names what is wrong."""
    version = card.get("format_version") if isinstance(card, dict) else None
    if version != FORMAT_VERSION:
        found = f"{file}: format_version is {cell(version)[:80]}, not {FORMAT_VERSION}"
        raise UserError(f"{found}; use the release that wrote it")
    card = {**dict.fromkeys(CARD), **card}
    if wrong := [k for k, v in card.items() if deep(v) or not is_form(v, CARD.get(k, object))]:
        raise UserError(f"{file}: {cell(wrong[0])!r} is missing or of the wrong form; {AGAIN}")
    kinds = (BACKBONE,) if file.parent.name == BACKBONE else ("full", "adapter")
    for field, (fits, wanted) in expected(card, kinds).items():
        if not fits:
            raise UserError(f"{file}: {field} is {cell(card[field])[:80]}, not {wanted}; {AGAIN}")
    check_architecture(card["architecture"], str(file))
    return card


def is_form(value, form) -> bool:
    """Whether a value of a card has its form. A number is finite, and no truth value."""
    if isinstance(value, bool) or isinstance(value, int | float) and not abs(value) < 1e300:
        return form is object
    return isinstance(value, form)


def deep(value, levels: int = 30) -> bool:
    """Whether lists and objects are nested so deeply that walking through them could fail."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(deep(v, levels - 1) for v in inner)


def expected(card: dict, kinds: tuple) -> dict:
    """{field: (whether it fits, what it should be)}, for the fields whose form does not say enough."""
    mean, std, files = card["normalizer_mean"], card["normalizer_std"], card["files_sha256"]
    silent = not {HEAD, MODEL} & files.keys()  # without a head it predicts nothing, so it needs no normaliser
    parents = [p.get("name") if isinstance(p, dict) else p for p in card["parents"] or []]
    return {
        **{k: (re.fullmatch("[0-9a-f]{64}", card[k]), "a SHA-256") for k in ("tensors_sha256", "signature")},
        "kind": (card["kind"] in kinds, f"{' or '.join(kinds)}: only theta_0 is in {BACKBONE!r}"),
        "transform": (card["transform"] in (*TRANSFORMS, *[None] * silent), " or ".join(TRANSFORMS)),
        "pooling": (card["pooling"] in (*POOLINGS, *[None] * silent), " or ".join(POOLINGS)),
        "normalizer_mean": (silent or mean is not None, "a number"),
        "normalizer_std": (silent if std is None else std > 0, "a number above 0"),
        "elements": (all(type(z) is int and 0 < z < 119 for z in card["elements"] or []), "atomic numbers"),
        "files_sha256": (all(re.fullmatch(r"[a-zA-Z_-][\w.-]*", f) for f in files), "of files in its folder"),
        "parents": (all(isinstance(name, str) for name in parents), "a list of modules"),
        "folds": ((card["folds"] or 0) in range(1000), "how many there are"),
        "graph": (card["graph"] in (None, card["architecture"].get("graph")), "that of the architecture"),
    }


def card_sha256(card: dict) -> str:
    """SHA-256 of the card's other fields: `verify` finds a card that was edited, reading does not mind."""
    kept = {k: v for k, v in card.items() if k != "card_sha256" and not (k in LATER and v is None)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def physical_unit(card: dict) -> str:
    """Unit of the property before its transform, which predictions have; "" where the card does not say."""
    return card["physical_unit"] or (card["transform"] == "none" and card["unit"]) or ""


def all_licences(cards, field: str) -> str:
    """Every licence in `field` of the cards (theta_0's and the parents'), the most restrictive first.

    One that is not known counts as that. So what is built on a theta_0 is never freer than it.
    """

    def rank(licence):
        words = re.split("[-_ ]", licence.upper())
        return [word in words for word in ("UNKNOWN", "ND", "NC", "SA", "GPL", "BY")], licence

    found = {licence for card in cards for licence in (card.get(field) or "unknown").split("; ")}
    return "; ".join(sorted(found, key=rank, reverse=True))


# ---------------------------------------------------------------- privacy

DATA_FIELDS = {"ids", "row_ids", "rows", "structures", "positions", "labels", "targets"}
PERSON_FIELDS = {"user", "username", "hostname", "cwd"}
LOCAL_PATH = re.compile(r"""(^|[\s=,;("'\[])(~?/\w|~\w*/|\.\.?/|[A-Za-z]:[\\/]|\\\\\w|file:/)""")


def check_private(record, where: str = "card", key: str = "") -> None:
    """Refuse private fields, values that look like a local path, and long lists of integers (row numbers).

    A net, not a proof: a relative file name, or a user's name as such, is not recognised. key: the field of
    `record`.
    """
    is_list, is_unit = isinstance(record, list | tuple), re.fullmatch("(.*_)?unit", key)
    inner = record.items() if isinstance(record, dict) else [(key, v) for v in record] if is_list else []
    table = is_list or inner and all(isinstance(v, list | tuple | dict) for _, v in inner)
    found = ""
    if isinstance(record, str | Path) and LOCAL_PATH.search(str(record)) and not is_unit:
        found = f"{str(record)[:80]!r} looks like a local path"  # while a unit may well be /cm
    elif is_list and len(record) > 118 and all(isinstance(v, int) for v in record):
        found = f"{len(record)} integers look like row numbers"  # a list of elements is never that long
    elif key in DATA_FIELDS and table or key in PERSON_FIELDS and isinstance(record, str):
        found = f"field {key!r} may not be shared"  # while a data set of that name, {"rows": 5, ...}, may
    if found:
        raise UserError(f"{where}: {found}; leave it out, modules are shared when their data are not")
    for k, value in inner:
        if isinstance(record, dict):
            check_private(str(k), f"{where}: a key")
        check_private(value, f"{where}: {k}" if isinstance(record, dict) else where, k)


# ---------------------------------------------------------------- as text, and for people


def to_json(content, shown) -> str:
    """shown: the path that an error names."""
    plain = lambda v: v.item()  # noqa: E731; numpy's numbers and one-element tensors
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=plain)
        text.encode()  # not of a command line that is not UTF-8
        return text + "\n"
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        cure = "use numbers, text, lists, and null for NaN"
        raise UserError(f"{shown}: not writable as JSON ({error}); {cure}") from None


def cell(value) -> str:
    """One printable line: cards come from strangers."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else "?" for c in text)


def ratio(card: dict) -> str | None:
    """Validation MAE over the mean absolute deviation of the labels: 0 is perfect, 1 no better than the mean."""
    mae, mad = card["val_mae"], card["mad"]
    return f"{mae / mad:.2f}" if mae is not None and mad else None


def readme(card: dict) -> str:
    """README.md with the front matter of the Hugging Face hub, from the card alone."""
    licence = (card["license_weights"] or "unknown").lower().replace(" ", "-")
    known = ("unknown", "mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
             "cc-by-nc-4.0", "cc-by-nc-sa-4.0")  # fmt: skip
    front = {"license": licence} if licence in known else {"license": "other", "license_name": licence}
    front["library_name"] = "moma"
    front["tags"] = ["materials", "crystals", "moma", card["architecture"]["backbone"], card["kind"]]
    front["datasets"] = card["dataset"].split(", ") if card["dataset"] else []
    front["metrics"] = ["mae"]
    parents = card["parents"] or ([] if card["kind"] == BACKBONE else [BACKBONE])
    front["base_model"] = [p["name"] if isinstance(p, dict) else p for p in parents]
    what = {BACKBONE: "theta_0, the starting point of every module of a MoMa hub",
            "full": "A full MoMa module", "adapter": "An adapter MoMa module"}[card["kind"]]  # fmt: skip
    split = card["split"] if isinstance(card["split"], dict) else {}
    parts = ", ".join(f"{k} {v}" for k, v in split.items() if k in ("train", "val", "test"))
    size = f"{cell(card['rows_used'])} ({parts})" if parts else card["rows_used"]
    error = f"{cell(card['val_mae'])} {cell(card['unit'] or '')}".strip() if card["val_mae"] is not None else None
    brief = {
        "property": card["property"], "unit of the label": card["unit"], "rows": size, "validation MAE": error,
        "MAE/MAD (1: no better than the mean)": ratio(card), "data": card["dataset"],
        "licence of the data": card["license_data"] or "unknown", "author of the weights": card["author"] or "unknown",
        "licence of the weights": card["license_weights"] or "unknown", "merged from": ", ".join(front["base_model"]),
    }  # fmt: skip
    if not card["parents"]:
        brief["trained from"] = brief.pop("merged from")
    brief, table = (
        "\n".join(f"| {cell(k)} | {cell(v).replace('|', '/')} |" for k, v in rows.items() if v not in (None, ""))
        for rows in (brief, card)
    )
    yaml = "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in front.items())  # JSON is YAML
    return f"""---
{yaml}
---

# {card["name"]}

{what}. Generated from `module.json`.

| | |
|---|---|
{brief}

Use the data under their licence and name their authors. Every field of the card:

| field | value |
|---|---|
{table}

Errors, mean and standard deviation are in the unit above. The card holds no structures and no labels;
trained weights can still carry traces of their data.
"""


def hub_readme(modules) -> str:
    """README.md of a hub. modules: {name: (card, size in words)}."""
    head = ["module", "property", "rows", "unit", "val MAE", "MAE/MAD", "kind", "size", "data", "licence of the data",
            "licence of the weights", "author"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for name, (card, size) in modules.items():
        about = [card["property"], card["rows_used"], card["unit"], card["val_mae"], ratio(card), card["kind"], size]
        about += [card[field] for field in ("dataset", "license_data", "license_weights", "author")]
        rows.append([f"[{name}]({name}/README.md)", *(cell(c).replace("|", "/") for c in about)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return HUB_README.format(table=table, count=len(modules) - (BACKBONE in modules))


HUB_README = """# A hub of MoMa modules

{count} modules for crystal properties and `backbone`, the starting point theta_0 that all of them share, so that they
can be averaged. Errors are of validation rows, in the unit given (that of the label after its transform); MAE/MAD:
over the error of always predicting the mean, so 1 is useless and 0 perfect. Each folder has a card, `module.json`,
that says how it was made.

{table}

**Use it.** `python compose.py --task dielectric` or, with crystals of your own,
`python compose.py --data my_folder --unit GPa`.

**Check it.** `python hub.py verify` compares every file with its SHA-256.

**Share a module.** A module is its folder: copy `hub/NAME` into another hub that has the same `backbone` and run
`python hub.py verify` there, which names what is damaged or starts from another theta_0. A folder holds no structures
and no labels; `seen.npy`, where there is one, lists the training structures as hashes, so that `compose.py` can say
which of your crystals a module has seen. A module of your own `--data` has none unless you ask (`--store-hashes yes`).
Trained weights can still carry traces of their data: mind its licence and name its authors, as the table does.

This file is generated: `python hub.py readme > hub/README.md`."""
