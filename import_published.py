"""Bring published GemNet-OC weights into a hub.

    python import_published.py jmp-l.pt --name jmp-l     a JMP checkpoint -> HUB/backbone
    python import_published.py modules --released-moma   the 18 released MoMa modules -> HUB/NAME
    python import_published.py modules mp_eform n_e_cond --released-moma      only those named

Sizes are read from the shapes (preset base is JMP-S, large JMP-L). Every key of a file is used,
ignored as known, or an error. The graphs are built by the published rule, with which the weights
were trained: it breaks ties by the atoms' order; --graph-rule symmetric takes ours, which does not.
The weights stay under their authors' licence, written into the card and those of the modules
trained from them (JMP: CC BY-NC 4.0; MoMa modules: CC BY-NC-SA 4.0).

Files are read restricted to tensors and plain values; one with other objects is refused, by their
name. --trust-pickle reads it all the same, which RUNS ANY CODE the file holds, with your rights:
only for a file whose SHA-256 you compared with its source.
"""

import argparse
import functools
import hashlib
import json
import pickle
import re
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path

from files import MissingError, UserError, reading, write_text  # before torch

import torch

from card import BACKBONE, card_sha256, cell, readme, to_json
from hub import (check_compatible, check_finite, check_name, list_modules, module_dir, read_card, run_command,
                 save, sha256, signature)  # fmt: skip
from model import GEMNET, check_architecture, mlp, new_adapters, preset, shapes_only
from tasks import get_task, unit_of

GROUPS = {  # a published key: (its group, its name in PretrainModel or PropertyModel); the first that matches
    r"(?:backbone\.)?embedding\.(?:atom_embedding\.)?weight": ("backbone", "backbone.embedding.weight"),
    r"(?:backbone\.)?(out_blocks\.\d+\.)seq_energy_pre\.(.+)": ("repeated layers", r"backbone.\1layers.\2"),
    r"(?:backbone\.)?bases\.(?!radial_basis\.)[\w.]*radial_basis\w*\.(rbf\.offset|rbf\.temps)":
        ("repeated radial bases", r"backbone.bases.radial_basis.\1"),
    r"(?:backbone\.)?((?:bases|int_blocks|out_blocks|out_mlp_[EF])\..+)": ("backbone", r"backbone.\1"),
    r"output\.(out_energy|out_forces)\.(\w+)\.(\d+\.(?:weight|bias))": ("pre-training heads", r"\1.\2.\3"),
    r"task_steps\..+": ("metric states", ""),
    r"(?:.+\.)?_?module_dict\.y\.(?:.+\.)?(\d+)\.(weight|bias)": ("task head", r"head.\1.\2"),
}  # fmt: skip
COUNTS = {  # constructor argument of GemNetOC: what is numbered
    "num_blocks": "int_blocks", "num_before_skip": "layers_before_skip",
    "num_after_skip": "layers_after_skip", "num_concat": "residual_m", "num_atom": "atom_update.layers",
    "num_atom_emb_layers": "atom_emb_layers", "num_output_afteratom": "seq_energy2",
    "num_global_out_layers": "out_mlp_E.out_mlp",
}  # fmt: skip
JMP_LICENSE, MOMA_LICENSE = "CC BY-NC 4.0", "CC BY-NC-SA 4.0"
MOMA = {  # the released modules: mean and standard deviation of the target, after the transform of TASKS
    "mp_eform": (-1.4079, 1.1631), "mp_bandgap": (1.2143, 1.5990), "mp_gvrh": (1.5536, 0.3716),
    "mp_kvrh": (1.8804, 0.3693), "n_e_cond": (7.5000, 12.915), "p_e_cond": (14.944, 16.712),
    "n_th_cond": (28.286, 5.0472), "p_th_cond": (27.456, 5.5671), "n_Seebeck": (332.29, 281.29),
    "p_Seebeck": (417.42, 336.90), "n_avg_eff_mass": (1.1691, 1.1331), "p_avg_eff_mass": (2.0619, 1.1980),
    "castelli_eform": (1.4709, 0.7425), "jarvis_eform": (-1.1345, 1.0393), "jarvis_bandgap": (0.9713, 1.6289),
    "jarvis_dielectric_opt": (3.1159, 1.3123), "jarvis_gvrh": (3.4760, 0.8692),
    "jarvis_kvrh": (4.2609, 0.8152),
}  # fmt: skip
# The theta_0 of the released modules, as long as it is not in the hub: no file was hashed. `adopt` puts the
# hash of an imported one in its place.
DECLARED = hashlib.sha256(b"JMP-L, from which the released MoMa modules say they start").hexdigest()
GET_AGAIN = "get it again from where it is published"
OTHER_HUB = "give another --hub, or the --graph-rule of that import"


def import_weights(args) -> int:
    if not args.name:
        raise UserError("name a file, or a folder with --released-moma; see --help")
    if args.released_moma and (args.keep_forces or args.no_ema):
        raise UserError("--released-moma: the modules have no force branch, no EMA; leave out the other flag")
    if args.trust_pickle:
        print("--trust-pickle: the file may run any code, with your rights", file=sys.stderr)
    return (import_moma if args.released_moma else import_jmp)(args)


def import_jmp(args) -> int:
    """One JMP checkpoint -> HUB/backbone: EMA weights unless --no-ema; forces only with --keep-forces."""
    check_name(args.label)
    path, target = Path(args.name[0]), module_dir(args.hub, BACKBONE)
    if target.exists():
        raise UserError(f"{target}: exists already; delete it, or give another --hub")
    if len(args.name) > 1:
        raise UserError(f"{path}: one file is imported, not {args.name[1]!r} as well")
    p = read_published(path, args.trust_pickle, heads="pre-training heads")
    if args.keep_forces and not p.arch["forces"]:
        raise UserError(f"{path}: has no force branch; leave out --keep-forces")
    if not args.no_ema:
        take_ema(p)
    choose(p, args.keep_forces, args.graph_rule)
    cards = list_modules(args.hub) if Path(args.hub).is_dir() else {}
    for name, card in cards.items():
        if card["backbone_sha256"] == DECLARED and not p.alike(card):
            raise UserError(f"{args.hub}: module {name} has other tensors or graphs than {path}; {OTHER_HUB}")
    tasks = re.findall(r"_typed_moduledict_(\w+)\.", " ".join(p.groups.get("metric states", [])))
    card = {
        "kind": BACKBONE, "architecture": p.arch, "graph": p.arch["graph"], "property": "energies and forces",
        "dataset": ", ".join(dict.fromkeys(tasks)) or None, "license_code": "MIT",
        "license_weights": JMP_LICENSE, "training": {"weights": "raw" if args.no_ema else "EMA"},
        "source": args.label, "source_sha256": report(p),
    }  # fmt: skip
    save(target, p.tensors, card, adapters_init=new_adapters(shapes_only(p.arch)).state_dict())
    print(f"{target}: theta_0 from {args.label}, weights under {JMP_LICENSE}")
    adopt(args.hub)
    return 0


def import_moma(args) -> int:
    """A folder of released MoMa modules -> one folder each (lower-case names), once all keys are checked.

    They start from JMP-L, which is not among them: their backbone_sha256 is that of HUB/backbone where it was
    imported, and DECLARED, the same for all, where it was not.
    """
    files = find_released(Path(args.name[0]), args.name[1:])
    theta = read_card(Path(args.hub) / BACKBONE) if (Path(args.hub) / BACKBONE).exists() else {}
    found, cards = {}, {}
    for name, path in files.items():
        p = found[name.lower()] = read_published(path, args.trust_pickle, heads="task head")
        choose(p, False, args.graph_rule)
        p.head = property_head(p)
        task, (mean, std) = get_task(name), MOMA[name]
        cards[name.lower()] = {
            "kind": "full", "architecture": p.arch, "graph": p.arch["graph"], "signature": p.signature,
            "backbone_sha256": theta.get("tensors_sha256", DECLARED), "property": name, "unit": unit_of(task),
            "physical_unit": task.unit, "transform": task.transform, "pooling": "mean",
            "normalizer_mean": mean, "normalizer_std": std, "dataset": task.dataset, "license_code": "MIT",
            "license_weights": MOMA_LICENSE, "license_data": task.license,
            "training": {"theta_0": "JMP-L, as its authors say"},
            "source": f"released MoMa module {name}",
        }  # fmt: skip
    check_compatible(cards)
    if theta and not (p.alike(theta) and "source_sha256" in theta):
        target = Path(args.hub) / BACKBONE
        raise UserError(f"{target}: not an imported JMP of these sizes and graphs; {OTHER_HUB}")
    for name, card in cards.items():
        p, target = found.pop(name), module_dir(args.hub, name)
        card["source_sha256"] = report(p)
        old = read_card(target) if target.exists() else None
        if old and (old.get("source_sha256") != card["source_sha256"] or not p.alike(old)):
            raise UserError(f"{target}: holds another module, or one of another --graph-rule; delete it")
        if old:
            print(f"{target}: imported already")
        else:
            save(target, p.tensors, card, head=p.head)
            unit = card["unit"] or "no unit"
            print(f"{target}: {card['property']} in {unit}, weights under {MOMA_LICENSE}")
    adopt(args.hub)
    return 0


def find_released(folder: Path, names: list) -> dict:
    """{released name: its .pt file}: all of them, or those in `names`. Case does not count."""
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder; --released-moma takes that of the modules' .pt files")
    files = {p.stem.lower(): p for p in sorted(folder.glob("*.pt"))}
    wanted = {n.lower(): n for n in names or MOMA}
    released = {n.lower(): n for n in MOMA}
    if unknown := [n for n in (wanted if names else files) if n not in released]:
        raise UserError(f"{folder}: {some(unknown)}: not a released module; they are {', '.join(MOMA)}")
    if missing := [f"{wanted[n]}.pt" for n in wanted if n not in files]:
        raise UserError(f"{folder}: has no {some(missing)}; get it, or name the modules to import")
    return {released[n]: files[n] for n in wanted}


def read_checkpoint(path: Path, trust_pickle: bool = False) -> dict:
    """A foreign .pt file, memory-mapped: a tensor is read when it is used. Restricted unless trust_pickle."""
    check_zip(path)
    pickles = types.SimpleNamespace(Unpickler=Unpickler, __name__=__name__) if trust_pickle else None
    how = {"weights_only": not trust_pickle, "pickle_module": pickles}
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, **how)
    except Exception as e:  # a damaged or hostile file can raise anything
        named = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", str(e))
        if named and not trust_pickle:
            found = f"{path}: holds a pickled {named[1] or named[2]}, which could run code and is not read"
            raise UserError(f"{found}; if you trust the file, see --trust-pickle in --help") from None
        raise UserError(f"{path}: not readable ({type(e).__name__}); {GET_AGAIN}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        keys = some(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"{path}: has no 'state_dict' but {keys}; give a published checkpoint")
    return checkpoint


def check_zip(path: Path) -> None:
    """Refuse what is damaged, by its checksums, and what would take more memory than the file has bytes."""
    form = "a zip file as torch.save writes it, or cut off"
    with reading(path, form, GET_AGAIN), zipfile.ZipFile(path) as z:
        packed = any(m.compress_type != zipfile.ZIP_STORED for m in z.infolist())
        if packed or sum(m.file_size for m in z.infolist()) > path.stat().st_size:
            raise UserError(f"{path}: compressed, as torch.save never writes it; {GET_AGAIN}")
        if damaged := z.testzip():
            raise UserError(f"{path}: damaged, {cell(damaged)} has not its checksum; {GET_AGAIN}")


class Unpickler(pickle.Unpickler):
    """For --trust-pickle: a class that is not installed here becomes an empty placeholder."""

    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            ignore = lambda self, *args, **kwargs: None  # noqa: E731
            methods = ("__init__", "__setstate__", "append", "extend")
            return type(name, (dict,), dict.fromkeys(methods, ignore))


def read_published(path: Path, trust_pickle: bool, heads: str):
    """Read a published file and account for every key; UserError names what is unexpected, missing or odd.

    heads: the group of the heads that belong there. Returns a namespace: path, checkpoint, state
    {key: tensor}, arch, tensors {name in GemNetOC: tensor} in the model's order, published {that name: its
    key}, groups {group: keys}.
    """
    checkpoint = read_checkpoint(path, trust_pickle)
    state, groups = {str(k): t for k, t in checkpoint["state_dict"].items()}, {}
    named, keys = rename_published(state)
    for key in state:
        group, name = place(key)
        twice = group == "backbone" and keys[name] != key
        foreign = twice or "head" in group and group != heads
        lost = group.startswith("repeated") and name not in named
        groups.setdefault("unexpected" if foreign or lost else group, []).append(key)
    published = {n.removeprefix("backbone."): k for n, k in keys.items() if n.startswith("backbone.")}
    shapes = {n: tuple(state[k].shape) for n, k in published.items() if plain(state[k])}
    arch = architecture_of(shapes)
    check_architecture(arch, str(path))
    wanted = shapes_of(json.dumps(arch))
    other = [n for n, s in shapes.items() if wanted.get(n, s) != s]
    wrong = {
        "unexpected": groups.get("unexpected", []) + [k for n, k in published.items() if n not in wanted],
        "missing": [f"backbone.{n}".replace("backbone.embedding", "embedding.atom_embedding")
                    for n in wanted if n not in published],
        "of other shape": [f"{published[n]} {shapes[n]}, not {wanted[n]}" for n in other],
        "not real numbers": [k for n, k in published.items() if n not in shapes],
    }  # fmt: skip
    if any(wrong.values()):
        text = "; ".join(f"{len(v)} {what}: {some(v)}" for what, v in wrong.items() if v)
        swapped = any("head" in place(k)[0] for k in groups.get("unexpected", []))
        how = "without" if heads == "task head" else "with"
        cure = f"import it {how} --released-moma" if swapped else GET_AGAIN
        raise UserError(f"{path}: not the keys of a published file ({text}); {cure}")
    if sum(state[k].nbytes for k in published.values()) > path.stat().st_size:
        raise UserError(f"{path}: its tensors are larger than the file; {GET_AGAIN}")
    for key in groups.get("repeated layers", []) + groups.get("repeated radial bases", []):
        if not plain(state[key]) or not torch.equal(state[key].float(), named[place(key)[1]].float()):
            print(f"{path}: {key} differs from what it should repeat, which is used", file=sys.stderr)
    tensors = {n: state[published[n]] for n in wanted}
    return types.SimpleNamespace(path=path, checkpoint=checkpoint, state=state, arch=arch, tensors=tensors,
                                 published=published, groups=groups, note="")  # fmt: skip


def place(key: str) -> tuple[str, str]:
    """The group of a published key, and its name in our models. One or two leading `module.` do not count."""
    key = re.sub(r"^(module\.){1,2}", "", key)
    for pattern, (group, name) in GROUPS.items():
        if found := re.fullmatch(pattern, key):
            return group, found.expand(name)
    return "unexpected", key


def rename_published(state: dict, tasks=()) -> tuple[dict, dict]:
    """A published state dict without copies -> {name in PretrainModel: tensor}, {that name: published key}.

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
    """Architecture of the GemNet-OC of these {name: shape}, by majority. Preset: base, large or custom."""
    widths = ["num_elements", "num_radial", "num_spherical", *(k for k in GEMNET if k.startswith("emb_size"))]
    primes = [n for n in range(101, 200) if all(n % d for d in range(2, 15))]  # no sums or products of others
    argument = dict(zip(primes, widths))
    probe = shapes_of(json.dumps(preset("base") | dict(zip(widths, primes)) | dict.fromkeys(COUNTS, 1)))
    votes = {width: Counter() for width in widths}
    for name, shape in probe.items():
        for size, found in zip(shape, shapes.get(name, ())):
            if size in argument:
                votes[argument[size]][found] += 1
    sizes = {width: seen.most_common(1)[0][0] for width, seen in votes.items() if seen}
    for count, what in COUNTS.items():
        numbers = (re.fullmatch(rf"(?:.+\.)?{what}\.(\d+)\.(?:.+\.)?dense_mlp\..+", n) for n in shapes)
        sizes[count] = len({found[1] for found in numbers if found})
    sizes["num_blocks"] = max(1, sizes["num_blocks"])  # of none at all, the first is missing
    for part in ("quad", "atom_edge", "edge_atom", "atom"):
        sizes[f"{part}_interaction"] = any(f".{part}_interaction." in n for n in shapes)
    sizes["forces"] = any("out_mlp_F." in n for n in shapes)
    base, large = preset("base", forces=sizes["forces"]), preset("large", forces=sizes["forces"])
    for arch in (base, large):
        if all(arch[k] == v for k, v in sizes.items()):
            return arch
    near = sizes["atom_edge_interaction"] or sizes["edge_atom_interaction"]
    graph = {"qint": sizes["quad_interaction"], "a2a": sizes["atom_interaction"], "a2ee2a": near}
    return base | sizes | {"preset": "custom", "graph": base["graph"] | graph}


@functools.cache
def shapes_of(arch: str) -> dict:
    """{name: shape} of the backbone that the JSON text `arch` describes, in the model's order."""
    return {n: tuple(t.shape) for n, t in shapes_only(json.loads(arch)).state_dict().items()}


def take_ema(p) -> None:
    """Put the moving averages in place of the parameters; the optimiser has one for each, by position."""
    again = "--no-ema takes the raw weights"
    try:
        ema = list(p.checkpoint["optimizer_states"][0]["ema"])
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{p.path}: has no EMA weights in optimizer_states[0]['ema']; {again}") from None
    names = [n for n in p.tensors if not n.endswith((".scale_factor", ".rbf.offset", ".rbf.temps"))]
    keys = [p.published[n] for n in names] + p.groups.get("pre-training heads", [])
    if len(ema) != len(keys):
        raise UserError(f"{p.path}: {len(ema)} EMA weights for {len(keys)} parameters; {again}")
    for i, (key, t) in enumerate(zip(keys, ema)):
        if not plain(t) or t.shape != p.state[key].shape:
            raise UserError(f"{p.path}: EMA weight {i} has not the shape of parameter {i}, {key}; {again}")
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


def choose(p, keep_forces: bool, graph_rule: str) -> None:
    """Leave out the force branch, or keep it; settle by which rule the graphs are built."""
    p.arch = p.arch | {"forces": keep_forces, "graph": p.arch["graph"] | {"graph_rule": graph_rule}}
    ours = shapes_only(p.arch).state_dict()
    p.groups["force branch"] = [p.published[n] for n in p.tensors if n not in ours]
    p.tensors = {n: p.tensors[n] for n in ours}
    p.signature = signature(ours)
    p.alike = lambda card: (card["signature"], card["architecture"]) == (p.signature, p.arch)


def property_head(p) -> dict | None:
    """The head of a released module under the names of ours; None where its layers are others."""
    keys = sorted(p.groups.get("task head", []), key=lambda k: (int(k.split(".")[-2]), k.endswith("bias")))
    ours = mlp(p.arch["emb_size_atom"]).state_dict()
    if [plain(p.state[k]) and p.state[k].shape for k in keys] != [t.shape for t in ours.values()]:
        print(f"{p.path}: its head has other layers than ours and is left out", file=sys.stderr)
        return None
    p.groups["task head"] = []
    for key in keys:
        check_finite(key, p.state[key], p.path, GET_AGAIN)
    return {n: p.state[k].float() for n, k in zip(ours, keys)}


def report(p) -> str:
    """Check values, make them float32, print what is used and what is not. Returns the file's SHA-256."""
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
            write_text(module_dir(hub, name) / "README.md", readme(card))
            write_text(module_dir(hub, name) / "module.json", to_json(card, name))


def plain(t) -> bool:
    """Whether t is an ordinary tensor of real numbers, with values."""
    if not torch.is_tensor(t):
        return False
    return t.is_floating_point() and t.layout == torch.strided and t.device.type == "cpu"


def some(names) -> str:
    """The first three, and how many more; printable."""
    names = list(names)
    return cell(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def main(argv=None) -> int:
    form = functools.partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=30)
    p = argparse.ArgumentParser("import_published.py", description=__doc__, formatter_class=form)
    p.add_argument("name", nargs="*", help="the file, or the folder and the modules in it")
    p.add_argument("--hub", default="hub", help="the hub's folder (default: hub)")
    p.add_argument("--name", dest="label", metavar="LABEL", default="jmp", help="the source, on the card")
    p.add_argument("--graph-rule", choices=("published", "symmetric"), default="published",
                   help="how the graphs are built (default: published)")  # fmt: skip
    p.add_argument("--keep-forces", action="store_true", help="keep the force branch (default: drop it)")
    p.add_argument("--no-ema", action="store_true", help="the raw weights, not their moving average (EMA)")
    p.add_argument("--released-moma", action="store_true", help="the path is the folder of released modules")
    p.add_argument("--trust-pickle", action="store_true", help="unpickle any object: RUNS CODE of the file")
    return run_command(p, import_weights, argv)


if __name__ == "__main__":
    sys.exit(main())
