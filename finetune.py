"""Stage 2b: fine-tune the composed module g_D on its task (section 2.3): model, error, predictions.

    python finetune.py --task dielectric
    python finetune.py --data my_folder

Starts from --init: auto, what compose.py recommends for the task (the composed module, a single one, or theta_0), or
composed, whose labels, rows and split are taken over; or backbone (theta_0), scratch, a module of the hub, or a
module's folder. The head is new. What trains, --train:

all: the whole of a full module; of an adapter module the adapters (atom features are computed once); and the head.
head: only the head, which continues that of --init.  new-head: only a new one.  interactions: the interaction blocks
and the head, while embeddings and outputs stay (the freed layers of Devi et al. 2024).

--hints: from a module of compose.py --select hinted, the loss is mean |y - ŷ| / std + hints · mean |T - (W z + b)|: from
the network's representation z of a training crystal, a linear layer has to read T, what the averaged modules say of it.
The layer begins as compose.py fitted it, trains along, and is left out of the model.

With --folds K, K models: each is tested on the K-th part of the rows that it has not seen, so together on all rows, and
predict.py takes their mean. The folder of such a run holds fold0, fold1, ..., each what a run without folds writes.

y: labels after the task's transform (the unit of mae, mad); predictions are written in the physical unit.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from files import MissingError, UserError, output_path, read_json, recover, short
from stage import (Positive, Range, Seed, Whole, barrier, check_settings, claim, compare, fold_rows, hints_of, main,
                   number, rank, read_task, rests_on, run_name, say, split_rows, start, work_folder, written_by)

import numpy as np
import torch
from torch import nn

import hub
from data import by_structure, collate, split_fingerprint
from evaluate import FOLDED, finished_folds, sentence, write, write_folds
from model import BACKBONES, build_backbone, fit_scale_factors, preset, training_defaults
from train_module import SETTINGS, TrainConfig, finished, new_card, new_head, results, train


@dataclass
class Config(TrainConfig):
    init: str = "auto"  # compose.py's choice; or composed, backbone, scratch, a module
    train: Literal["all", "head", "new-head", "interactions"] = "all"  # interactions: these blocks and the head
    output: str = ""  # folder of the result [runs/TASK]
    kind: Literal["", "full", "adapter"] = ""  # with --init backbone [full]; a module has its own
    preset: str = ""  # with --init scratch [the hub's, or small]
    backbone: str = ""  # with --init scratch [the hub's, or gemnet_oc]
    epochs: Positive = 60  # B.2; below 32 the schedule shrinks
    batch_size: Positive = 32  # B.2
    patience: Whole = 10  # stop after so many epochs without a better val MAE; 0: never
    limit: Whole | None = None  # use this many random rows; 0: all
    split_seed: Seed | None = None  # of the published split, where the task has one, else of 70/15/15
    few_shot: Whole | None = None  # keep this many random training rows; 0: all
    hints: Annotated[float, Range(0, 10)] | None = None  # weight in the loss [0.3 after --select hinted]; 0: none
    folds: Whole | None = None  # of cross-validation [5 below 1,000 rows without a split of their own]
    compare: bool = True  # with Magpie trees on the same rows; --no-compare leaves it out


COMPOSED_FROM = ("data", "tasks", "target_column", "structure_column", "id_column", "unit", "transform", "pooling",
                 "limit", "on_error", "split_seed", "split_file", "few_shot")  # fmt: skip


def run(cfg):
    """Fine-tune, write the result's folder, return its metrics."""
    start(cfg)
    given, name = cfg, run_name(cfg)
    target = output_path(cfg.output or Path("runs") / name)
    check_output(target)
    origin = find_start(cfg, name)
    cfg = take_over(cfg, origin)
    crystals, dataset = read_task(cfg, origin.card["architecture"])
    folds = fold_rows(cfg, crystals)
    check_form(target, len(folds))
    splits = None if folds else split_rows(cfg, crystals)
    check_start(origin, crystals, splits)
    if folds:
        run_folds(given, cfg, target, crystals, dataset, folds)
    else:
        fine_tune(given, cfg, target, origin, crystals, dataset, splits)
    return show(target)


def check_start(origin, crystals, splits):
    """A start that was fine-tuned on this very table, labels included, must not have seen the rows to be tested."""
    tuned = hub.MODEL in origin.card.get("files_sha256", {})
    if not tuned or origin.card["dataset_fingerprint"] != crystals.fingerprint:
        return
    tested = ((origin.card["record"] or {}).get("content") or {}).get("test")
    if splits is None or tested != split_fingerprint(crystals, splits)["test"]:
        why = "was trained on labels of this table that this run tests"
        raise UserError(f"--init {origin.path}: {why}; start from the composed module or theta_0, or give its split")


def fine_tune(given, cfg, target, origin, crystals, dataset, splits):
    """One model, from its start to the whole folder `target`. given: the settings before any was filled in."""
    cfg, rests = settled(cfg, origin), rests_on(crystals, splits)
    if origin.composition:
        cure, found = "fine-tune on those, or compose again for these", hub.read_card(origin.composition)["record"]
        compare(rests_of(found, rests), rests, f"{origin.composition} was composed on other rows or labels", cure)
    hints = hints_sha(cfg, origin)
    record = record_of(cfg, crystals, start_sha(origin), rests, hints)
    if finished(cfg, target, record, "give another --output, or --overwrite"):
        return
    say(cfg, f"start: {origin.why}")
    begin = load_start(cfg, origin)
    model = new_head(begin.backbone, begin.adapters, crystals.task.pooling, cfg.seed)
    if cfg.train == "head":
        model.head = begin.head
    choose_trained(model, cfg.train)
    if hints:
        model.hints = Hints(origin.path, hints_weight(cfg), crystals, splits["train"])
    if cfg.init == "scratch":
        first = np.random.default_rng(cfg.seed).permutation(splits["train"])[: cfg.batch_size]
        fit_scale_factors(model.backbone, collate([dataset[int(i)] for i in first]))
    card = new_card(cfg, origin.card, crystals, splits, record)
    card["elements"] = sorted({*card["elements"], *(origin.card.get("elements") or [])})  # what it starts from knows
    if cfg.init != "scratch":
        card |= {"parents": [{k: origin.card[k] for k in ("name", "tensors_sha256")}], "weights": [1.0]}
    card["training"] |= {"hints": hints_weight(cfg)} if hints else {}
    hub.check_card(card, target, hub.MODEL)
    folder = work_folder(target)
    claim(folder, given, record)
    result, errors = train(cfg, folder, model, crystals, dataset, splits)
    model.hints = None
    if rank() == 0:
        card |= results(result, errors)
        write(cfg, target, origin, model, card, result, crystals, dataset, splits, errors)
        (folder / "last.pt").unlink(missing_ok=True)
    barrier()


def run_folds(given, cfg, target, crystals, dataset, folds):
    """A model for each fold in the work folder; then all of them, and what they say together, in `target`."""
    origins = [find_start(cfg, run_name(cfg), k) for k in range(len(folds))]
    init = {f"fold{k}": start_sha(origin) for k, origin in enumerate(origins)}
    rests = rests_on(crystals, {"all": np.arange(len(crystals))})
    hints = {f"fold{k}": hints_sha(cfg, origin) for k, origin in enumerate(origins)}
    record = record_of(settled(cfg, origins[0]), crystals, init, rests, hints if any(hints.values()) else "")
    record |= {"folds": len(folds), "split_seed": cfg.split_seed, "few_shot": cfg.few_shot}
    if finished_folds(cfg, target, record):
        return
    work = work_folder(target)
    claim(work, given, record)
    if rank() == 0 and cfg.overwrite and not cfg.resume:
        clear(work)
    barrier()
    one = replace(cfg, overwrite=False, compare=False)
    for k, (origin, splits) in enumerate(zip(origins, folds, strict=True)):
        say(cfg, f"--- fold {k + 1} of {len(folds)}")
        fine_tune(given, one, work / f"fold{k}", origin, crystals, dataset, splits)
    if rank() == 0:
        write_folds(cfg, target, record, origins, crystals, folds)
        clear(work)
    barrier()


def clear(work):
    """Delete the models of the folds, finished or not, from the work folder."""
    for folder in [work / ".runs", *work.glob("fold[0-9]*")]:
        shutil.rmtree(folder, ignore_errors=True)


def show(target):
    """Print the result: errors, then how they compare. Returns the metrics."""
    metrics = read_json(target / "metrics.json", "the metrics of a run")
    if rank() == 0:
        print(f"{metrics['task']}, {metrics['init']}: test MAE {sentence(metrics)}; {target}")
        if metrics.get("verdict"):
            print(metrics["verdict"])
        seen = metrics.get("leakage") or {"test": 0}
        if seen["test"]:
            rest = f"MAE of the others {number(seen['test_mae_unseen'])} {metrics['unit']}".strip()
            print(f"{seen['test']} of the test crystals were in the training of the start, with some label; {rest}")
    return metrics


def check_output(target):
    """A run is no module: its folder is not in a hub, whose modules are all composed, nor in a module."""
    if target.name == hub.BACKBONE:
        raise UserError(f"--output {target}: that name is theta_0's; choose another")
    if any((target.parent / name / "module.json").exists() for name in (hub.BACKBONE, ".")):
        raise UserError(f"--output {target}: is inside a hub or a module; choose a place outside")


def check_form(target, folds):
    """A run of folds and one of one split hold different files: they do not replace each other."""
    recover(target)
    there = "folds" if (target / FOLDED).exists() else "one split" if (target / "module.json").exists() else ""
    if there and (there == "folds") != bool(folds):
        new = f"{folds} folds" if folds else "one split"
        raise UserError(f"{target}: holds a run of {there}, this one is of {new}; give another --output, or delete it")


# ---------------------------------------------------------------- the start, and the settings that come with it


def find_start(cfg, name, fold=None):
    """What --init means, before any tensor is read: path (None: scratch), card, kind, name and why, for people, and the
    folder of the composition behind it, or None. fold: its number, for the module composed without its test labels."""
    if cfg.init == "scratch":
        if cfg.kind == "adapter" or cfg.train != "all":
            raise UserError("--init scratch: nothing is pre-trained, so use --kind full --train all")
        card = {"architecture": scratch_architecture(cfg), "elements": []}
        return SimpleNamespace(path=None, card=card, kind="full", name="scratch", why="scratch", composition=None)
    if cfg.init in ("auto", "composed"):
        path = Path("runs") / "composed" / name
        source = f"--task {cfg.task}" if cfg.task else f"--data {cfg.data}"
        cure = f"make it with `python compose.py {source}`, or give --init backbone"
    elif "/" in cfg.init or (Path(cfg.init) / "module.json").exists():
        path, cure = Path(cfg.init), "give the folder of a module"
    else:
        path = hub.module_dir(cfg.hub, cfg.init)
        cure = "give auto, composed, backbone, scratch, a module of --hub, or the folder of a module"
    recover(path)
    if not (path / "module.json").exists():
        raise MissingError(f"--init {cfg.init}: no module in {path}; {cure}")
    card = hub.read_card(path)
    composition = path if "composition.json" in card["files_sha256"] else None
    chosen = "composed" if composition else path.name
    if composition and fold is not None:
        path = composition = path / hub.FOLDS / str(fold)
        if not path.is_dir():
            cure = "compose with the same --folds, or give --init backbone"
            raise MissingError(f"{path}: no module composed without the labels that fold {fold + 1} tests; {cure}")
        card = hub.read_card(path)
    kind, why = card["kind"] if card["kind"] != hub.BACKBONE else cfg.kind or "full", str(path)
    if cfg.kind and cfg.kind != kind:
        raise UserError(f"--kind {cfg.kind}: {path} is of the kind {kind}; compose with --kind {cfg.kind}")
    if cfg.init == "auto":
        path, chosen, why = recommended(cfg, path)
        card = hub.read_card(path)
    for key, wanted in (("preset", cfg.preset), ("backbone", cfg.backbone)):
        if wanted and wanted != card["architecture"][key]:
            found = card["architecture"][key]
            raise UserError(f"--{key} {wanted}: {path} is {found}; the flag is for --init scratch")
    if cfg.train == "head" and not {hub.HEAD, hub.MODEL} & card["files_sha256"].keys():
        raise UserError(f"--train head: {path} has no head to continue; use --train new-head")
    if cfg.train == "interactions" and kind == "adapter":
        raise UserError("--train interactions: adapter modules never train them; use all, head or new-head")
    if cfg.train == "interactions" and not BACKBONES[card["architecture"]["backbone"]].interactions:
        which = card["architecture"]["backbone"]
        raise UserError(f"--train interactions: {which} does not name its interaction blocks")
    return SimpleNamespace(path=path, card=card, kind=kind, name=chosen, why=why, composition=composition)


def recommended(cfg, composition):
    """The start with the best leave-one-out error, as compose.py found it: its folder, its name, and the numbers."""
    hub.checked_file(composition, "composition.json")
    report = read_json(composition / "composition.json", "the report of a composition")
    name, errors = report.get("recommended"), report["errors"]
    if not name:
        cure = "compose again with --overwrite, or give --init composed"
        raise UserError(f"{composition}: an earlier release composed it, which recommends no start; {cure}")
    theta_0 = Path(cfg.hub) / hub.BACKBONE
    path = {"composed": composition, "theta_0": theta_0}.get(name) or hub.module_dir(cfg.hub, name)
    if not (path / "module.json").exists():
        raise MissingError(f"--init auto: {composition} recommends {name}, but there is no {path}; give its --hub")
    if name != "composed":
        known = report["backbone_sha256"] if name == "theta_0" else report["modules"][name]["tensors_sha256"]
        if hub.read_card(path)["tensors_sha256"] != known:
            why = f"is not the {name} that {composition} was composed with"
            raise UserError(f"--init auto: {path} {why}; give its --hub, or compose again")
    of = {"composed": "composed", f"best module {report['best_single']}": "best_single", "theta_0": "theta_0"}
    known = ", ".join(f"{what} {errors[key]:.3f}" for what, key in of.items() if errors[key] is not None)
    return path, name, f"{name}, recommended by {composition} (leave-one-out error: {known})"


def take_over(cfg, origin):
    """What the command line leaves open: which labels and rows, as the composed module's own settings say."""
    taken, types, path = {}, hints_of(Config), origin.composition
    if path is not None and written_by(work_folder(path)) == "compose":
        file = work_folder(path) / "config.json"
        settings = read_json(file, "the settings of compose.py")
        taken = {k: settings[k] for k in COMPOSED_FROM if k in settings and getattr(cfg, k) in ("", None)}
        for k, value in taken.items():
            if type(value) is not types[k][0]:
                raise UserError(f"{file}: {k} is {short(value)}, not {types[k][0].__name__}; compose again")
    if path is not None and cfg.folds is None:
        taken["folds"] = hub.read_card(path).get("folds") or 0
    empty = {k: 0 for k in ("limit", "split_seed", "few_shot") if getattr(cfg, k) is None}
    cfg = replace(cfg, **empty | taken)
    check_settings(cfg)
    return cfg


def settled(cfg, origin):
    """The settings with what depends on the start."""
    stage = "finetune_adapter" if origin.kind == "adapter" else "finetune" if origin.path else "scratch"
    lr = cfg.lr or training_defaults(origin.card["architecture"], stage)["lr"]
    return replace(cfg, kind=origin.kind, lr=lr)


class Hints(nn.Module):
    """hints(z, index) -> (), the loss weight · mean |T - (W z + b)| of representations z (B, C) of the crystals `index`.

    path: the composed module with T (of its training crystals, sorted by structure), W and b (compose.hints)."""

    def __init__(self, path, weight, crystals, train):
        super().__init__()
        with np.load(hub.checked_file(path, hub.HINTS)) as file:
            found = {k: torch.from_numpy(file[k]) for k in ("targets", "weight", "bias")}
        rows, T = by_structure(crystals, train), found.pop("targets")
        if len(rows) != len(T):
            raise UserError(f"{path / hub.HINTS}: of {len(T)} training rows, not {len(rows)}; compose again")
        self.register_buffer("targets", T.new_zeros(len(crystals), T.shape[1]), persistent=False)
        self.targets[rows] = T
        self.weight, self.read = weight, nn.Linear(*found["weight"].shape[::-1])
        self.read.load_state_dict(found)

    def forward(self, z, index):
        with torch.autocast(z.device.type, enabled=False):  # bf16 would lose what little differs
            return self.weight * (self.read(z.float()) - self.targets[index]).abs().mean()


def hints_sha(cfg, origin) -> str:
    """Hash of the hints to learn: of a composed module that has some, while its network trains. Else nothing."""
    learns = origin.name == "composed" and cfg.train in ("all", "interactions") and cfg.hints != 0
    sha = origin.card["files_sha256"].get(hub.HINTS, "") if learns else ""
    if cfg.hints and not sha:
        why = "are for a module of `compose.py --select hinted`, with --train all or interactions"
        raise UserError(f"--hints {cfg.hints:g}: {origin.name} has none, they {why}")
    return sha


def hints_weight(cfg) -> float:
    return 0.3 if cfg.hints is None else cfg.hints


def record_of(cfg, crystals, init, rests, hints):
    """What a result follows from. init: hash of the start, hints: of what it learns beside the labels; or {fold: hash}."""
    record = {"init": init, "kind": cfg.kind, "train": cfg.train, **rests}
    record |= {k: getattr(cfg, k) for k in SETTINGS}
    record["ids"] = hashlib.sha256("\n".join(crystals.ids).encode()).hexdigest()  # predictions.csv names them
    record |= {"hints": hints_weight(cfg), "hints_sha256": hints} if hints else {}
    return record | {"compare": True} if cfg.compare else record


def start_sha(origin) -> str:
    return origin.card.get("tensors_sha256") or json.dumps(origin.card["architecture"], sort_keys=True)


def rests_of(record, like):
    """The part of a record that says which labels and rows."""
    return {k: (record or {}).get(k) for k in like}


def load_start(cfg, origin):
    """What training starts from, as networks: a hub.Module, or a fresh backbone."""
    if origin.path is None:
        torch.manual_seed(cfg.seed)
        return SimpleNamespace(backbone=build_backbone(origin.card["architecture"]), adapters=None, head=None)
    return hub.load_module(origin.path, cfg.hub, kind=origin.kind)


def scratch_architecture(cfg):
    """The hub's architecture, so that a comparison is fair; --preset and --backbone choose another."""
    theta_0 = Path(cfg.hub) / hub.BACKBONE
    known = (theta_0 / "module.json").exists()
    arch = hub.read_card(theta_0)["architecture"] if known else {"preset": "small", "backbone": "gemnet_oc"}
    name, backbone = cfg.preset or arch["preset"], cfg.backbone or arch["backbone"]
    same = known and (name, backbone) == (arch["preset"], arch["backbone"])
    return arch if same else preset(name, backbone)


def choose_trained(model, what):
    """Set requires_grad as --train says (see the top of the file)."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if what in ("all", "interactions"):
        (model.adapters or model.backbone).requires_grad_(True)
    if what == "interactions":
        for name, p in model.backbone.named_parameters():
            p.requires_grad_(name.startswith(tuple(model.backbone.interactions)))


if __name__ == "__main__":
    main(run, Config, __doc__)
