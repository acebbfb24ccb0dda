"""Stage 2b: fine-tune the composed module g_D on its task (section 2.3): a model, its error, its predictions.

    python finetune.py --task dielectric

Starts from --init: the composed module of the task, whose labels, split and training rows are taken over; or
backbone (theta_0), scratch, a module of the hub, or a module's folder. The head is new. What trains, --train:

all: the whole of a full module; of an adapter module the adapters (atom features are computed once); and the head.
head: only the head, which continues that of --init.  new-head: only a new one.  interactions: the interaction blocks
and the head, while embeddings and outputs stay (the freed layers of Devi et al. 2024).

y: labels after the task's transform (the unit of mae, mad); predictions are written in the physical unit.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from files import MissingError, UserError, csv_text, output_path, png, read_json, recover, short
from stage import (Positive, Seed, Whole, barrier, check_settings, claim, compare, hints_of, main, number, prepare,
                   rank, rests_on, run_name, start, work_folder, written_by)

import numpy as np
import torch

import hub
from data import collate
from model import build_backbone, fit_scale_factors, preset, training_defaults
from tasks import inverse, unit_of
from train_module import SETTINGS, TrainConfig, finished, new_card, new_head, results, tensors_of, train


@dataclass
class Config(TrainConfig):
    init: str = "composed"  # composed, backbone, scratch, a name in the hub, or a folder
    train: Literal["all", "head", "new-head", "interactions"] = "all"  # interactions: these blocks and the head
    output: str = ""  # folder of the result [runs/TASK]
    kind: Literal["full", "adapter"] = "full"  # with --init backbone; a module has its own
    preset: str = ""  # with --init scratch [the hub's, or small]
    backbone: str = ""  # with --init scratch [the hub's, or gemnet_oc]
    epochs: Positive = 60  # B.2; below 32 the schedule shrinks
    batch_size: Positive = 32  # B.2
    patience: Whole = 10  # stop after so many epochs without a better val MAE; 0: never
    limit: Whole | None = None  # use this many random rows; 0: all
    split_seed: Seed | None = None  # of 70/15/15
    few_shot: Whole | None = None  # keep this many random training rows; 0: all


COMPOSED_FROM = ("data", "tasks", "target_column", "structure_column", "id_column", "unit", "transform", "pooling",
                 "limit", "on_error", "split_seed", "split_file", "few_shot")  # fmt: skip


def run(cfg):
    """Fine-tune, write the result's folder, return its metrics."""
    start(cfg)
    given, name = cfg, run_name(cfg)
    target = output_path(cfg.output or Path("runs") / name)
    check_output(target)
    path = init_folder(cfg, name)
    cfg = take_over(cfg, path)
    origin = start_from(cfg, path)
    arch = origin.card["architecture"]
    cfg = replace(cfg, kind=origin.kind, lr=cfg.lr or training_defaults(arch, "finetune")["lr"])

    crystals, dataset, splits = prepare(cfg, arch)
    rests = rests_on(crystals, splits)
    if "composition.json" in origin.card.get("files_sha256", {}):
        cure = "fine-tune on those, or compose again for these"
        compare(rests_of(origin.card["record"], rests), rests, f"{path} was composed on other rows or labels", cure)
    start_sha = origin.card.get("tensors_sha256") or json.dumps(arch, sort_keys=True)
    record = {"init": start_sha, "kind": cfg.kind, "train": cfg.train, **rests}
    record |= {k: getattr(cfg, k) for k in SETTINGS}
    record["ids"] = hashlib.sha256("\n".join(crystals.ids).encode()).hexdigest()  # predictions.csv names them
    if finished(cfg, target, record, "give another --output, or --overwrite"):
        return show(cfg, target)

    model = new_head(origin.backbone, origin.adapters, crystals.task.pooling, cfg.seed)
    if cfg.train == "head":
        model.head = origin.head
    choose_trained(model, cfg.train)
    if cfg.init == "scratch":
        first = np.random.default_rng(cfg.seed).permutation(splits["train"])[: cfg.batch_size]
        fit_scale_factors(model.backbone, collate([dataset[int(i)] for i in first]))
    card = new_card(cfg, origin.card, crystals, splits, record)
    card["elements"] = sorted({*card["elements"], *(origin.card.get("elements") or [])})  # what it starts from knows
    if cfg.init != "scratch":
        card |= {"parents": [{k: origin.card[k] for k in ("name", "tensors_sha256")}], "weights": [1.0]}
    hub.check_card(card, target, hub.MODEL)
    folder = work_folder(target)
    claim(folder, given, record)
    result, errors = train(cfg, folder, model, crystals, dataset, splits)
    if rank() == 0:
        card |= results(result, errors)
        write(cfg, target, model, card, result, crystals, splits, errors)
        (folder / "last.pt").unlink(missing_ok=True)
    barrier()
    return show(cfg, target)


def show(cfg, target):
    """Print the result in one line. Returns the metrics."""
    metrics = read_json(target / "metrics.json", "the metrics of a run")
    if rank() == 0:
        print(f"{metrics['task']}, {cfg.init}: test MAE {sentence(metrics)}; {target}")
    return metrics


def check_output(target):
    """A run is no module: its folder is not in a hub, whose modules are all composed, nor in a module."""
    if target.name == hub.BACKBONE:
        raise UserError(f"--output {target}: that name is theta_0's; choose another")
    if any((target.parent / name / "module.json").exists() for name in (hub.BACKBONE, ".")):
        raise UserError(f"--output {target}: is inside a hub or a module; choose a place outside")


def init_folder(cfg, name):
    """The module's folder that --init means; None for scratch."""
    if cfg.init == "scratch":
        return None
    if cfg.init == "composed":
        path = Path("runs") / "composed" / name
        source = f"--task {cfg.task}" if cfg.task else f"--data {cfg.data}"
        cure = f"make it with `python compose.py {source}`, or give its folder"
    elif "/" in cfg.init or (Path(cfg.init) / "module.json").exists():
        path, cure = Path(cfg.init), "give the folder of a module"
    else:
        path = hub.module_dir(cfg.hub, cfg.init)
        cure = "give composed, backbone, scratch, a module of --hub, or the folder of a module"
    recover(path)
    if not (path / "module.json").exists():
        raise MissingError(f"--init {cfg.init}: no module in {path}; {cure}")
    return path


def take_over(cfg, path):
    """What the command line leaves open: which labels and rows, as the composed module's own settings say."""
    taken, hints = {}, hints_of(Config)
    if path is not None and written_by(work_folder(path)) == "compose":
        file = work_folder(path) / "config.json"
        settings = read_json(file, "the settings of compose.py")
        taken = {k: settings[k] for k in COMPOSED_FROM if k in settings and getattr(cfg, k) in ("", None)}
        for k, value in taken.items():
            if type(value) is not hints[k][0]:
                raise UserError(f"{file}: {k} is {short(value)}, not {hints[k][0].__name__}; compose again")
    if taken.get("split_file"):
        taken["split_file"] = taken["split_file"].replace("{task}", cfg.task)
    empty = {k: 0 for k in ("limit", "split_seed", "few_shot") if getattr(cfg, k) is None}
    cfg = replace(cfg, **empty | taken)
    check_settings(cfg)
    return cfg


def rests_of(record, like):
    """The part of a record that says which labels and rows."""
    return {k: (record or {}).get(k) for k in like}


def start_from(cfg, path):
    """What training starts from: a hub.Module, or a fresh backbone."""
    if path is None:
        if cfg.kind == "adapter" or cfg.train != "all":
            raise UserError("--init scratch: nothing is pre-trained, so use --kind full --train all")
        arch = scratch_architecture(cfg)
        torch.manual_seed(cfg.seed)
        card = {"architecture": arch, "elements": []}
        return SimpleNamespace(card=card, kind="full", backbone=build_backbone(arch), adapters=None, head=None)
    card = hub.read_card(path)
    for key, wanted in (("preset", cfg.preset), ("backbone", cfg.backbone)):
        if wanted and wanted != card["architecture"][key]:
            found = card["architecture"][key]
            raise UserError(f"--{key} {wanted}: {path} is {found}; the flag is for --init scratch")
    kind = card["kind"] if card["kind"] in ("full", "adapter") else cfg.kind
    module = hub.load_module(path, cfg.hub, kind=kind)
    if cfg.train == "head" and module.head is None:
        raise UserError(f"--train head: {path} has no head to continue; use --train new-head")
    if cfg.train == "interactions" and kind == "adapter":
        raise UserError("--train interactions: adapter modules never train them; use all, head or new-head")
    if cfg.train == "interactions" and not module.backbone.interactions:
        name = card["architecture"]["backbone"]
        raise UserError(f"--train interactions: {name} does not name its interaction blocks")
    return SimpleNamespace(card=card, kind=kind, backbone=module.backbone, adapters=module.adapters, head=module.head)


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


def scores(y, prediction, mean, unit):
    """Errors of one split in the unit of y, null where undefined. mad: error of predicting the training mean."""
    error, spread = np.abs(prediction - y), ((y - y.mean()) ** 2).sum()
    found = {"mae": error.mean(), "rmse": np.sqrt((error**2).mean()), "mad": np.abs(y - mean).mean()}
    found |= {"mad_mae": found["mad"] / found["mae"] if found["mae"] else None}
    found |= {"r2": 1 - (error**2).sum() / spread if spread else None}
    defined = {k: float(v) if v is not None and np.isfinite(v) else None for k, v in found.items()}
    return defined | {"unit": unit, "rows": len(y)}


def write(cfg, target, model, card, result, crystals, splits, errors):
    """The result's folder, by one rename: model and card, metrics, predictions, splits, parity plot, settings."""
    task, unit, mean = crystals.task, unit_of(crystals.task), result["normalizer_mean"]
    metrics = {"task": task.name, "init": Path(cfg.init).name, "kind": cfg.kind, "epochs": result["epochs"]}
    files = {}
    for name, (index, y, prediction) in errors.items():
        metrics[name] = scores(y, prediction, mean, unit)
        if task.transform != "none":  # and as people say it
            y, prediction = inverse(task, y), inverse(task, prediction)
            metrics[f"{name}_physical"] = scores(y, prediction, inverse(task, mean), task.unit)
        rows = zip([crystals.ids[i] for i in index], y.tolist(), prediction.tolist(), strict=True)
        files[f"predictions_{name}.csv"] = csv_text(["id", "target", "prediction"], rows).encode()
    metrics |= {"val_mae": metrics["val"]["mae"], "test_mae": metrics["test"]["mae"], "unit": unit}
    metrics |= {"best_epoch": result["best_epoch"], "seconds": result["seconds"]}
    metrics["budget"] = {k: getattr(cfg, k) for k in ("epochs", "patience", "batch_size", "limit", "few_shot")}
    rows = {name: crystals.row[index].tolist() for name, index in splits.items()}
    settings = read_json(work_folder(target) / "config.json", "the settings of a run")
    for name, content in (("metrics", metrics), ("splits", rows), ("config", settings)):
        files[f"{name}.json"] = (json.dumps(content, indent=2) + "\n").encode()
    files["skipped.csv"] = csv_text(["id", "reason"], crystals.skipped).encode()
    files["parity.png"] = draw_parity(task, errors["test"], metrics)
    hub.save(target, tensors_of(model), card, history=result["history"], extra=files, overwrite=cfg.overwrite,
             main=hub.MODEL)  # fmt: skip


def sentence(metrics) -> str:
    """The errors of the test rows in words; what is undefined is left out."""
    test, physical = metrics["test"], metrics.get("test_physical")
    mae = f"{number(test['mae'])} {test['unit']}".strip()
    parts = [f"{mae} = {number(physical['mae'])} {physical['unit']}".strip() if physical else mae]
    forms = {"mad_mae": "MAD:MAE {:.3g}", "r2": "R2 {:.3f}"}
    parts += [form.format(test[k]) for k, form in forms.items() if test[k] is not None]
    verdict = ["no better than predicting the mean"] * ((test["mad_mae"] or 2) <= 1)
    return ", ".join([*parts, f"{test['rows']} crystals", *verdict])


def draw_parity(task, errors, metrics) -> bytes:
    """Predicted against true, test rows, a PNG: in physical units, on the axes of the transform."""
    from matplotlib.figure import Figure

    y, prediction = (inverse(task, v) for v in errors[1:])
    drawn = np.isfinite(prediction)  # the exponential of a prediction far off may not be
    y, prediction = y[drawn], prediction[drawn]
    score = metrics.get("test_physical", metrics["test"])
    fig = Figure(figsize=(4.2, 4.2), layout="constrained")
    ax = fig.subplots()
    ends = [f([*y, *prediction], default=1) for f in (min, max)]
    ax.plot(ends, ends, color="#999999", linewidth=1)
    ax.scatter(y, prediction, s=14, color="#4878a8", alpha=0.8, linewidths=0)
    if task.transform in ("log", "log10"):
        ax.set(xscale="log", yscale="log")
    unit = f" ({task.unit})" if task.unit else ""
    title = f"{task.name}\n{score['rows']} test crystals, MAE {number(score['mae'])} {task.unit}"
    ax.set(xlabel=f"true{unit}", ylabel=f"predicted{unit}", aspect="equal")
    ax.set_title(title, fontsize=9)
    return png(fig)


if __name__ == "__main__":
    main(run, Config, __doc__)
