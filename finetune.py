"""Stage 2b: fine-tune the composed module g_D on its task (section 2.3): a model, its error, its predictions.

    python finetune.py --task dielectric --init composed

The head is new; the backbone starts from --init. A full module trains everything, an adapter module its adapters and
the head (the backbone's atom features are computed once). --freeze, after Devi et al. 2024, leaves less to train:

none: all that the module's kind trains.  head: only the head, which continues that of --init (a module of the hub).
new-head: only the head, a new one.  interactions: all but the interaction blocks (embedding, outputs and head train).

y: labels after the task's transform (their unit is that of mae, mad); predictions are written in the physical unit.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import hub
import model as moma
import train_module as tm
from files import csv_text, write_atomic, write_skipped, write_text
from stage import barrier, claim, main, rank, say, start_processes
from tasks import inverse, unit_of

LR = {"tiny": 1e-3, "small": 1e-3}  # small nets bear and need larger steps; the others take the paper's 8e-5


@dataclass
class Config(tm.Config):
    hub: str = "hub"  # has backbone/ and the modules
    name: str = ""  # run folder is runs/NAME; default: the task
    init: str = "composed"  # composed (runs/TASK/composed), backbone, scratch, a name in the hub, or a folder
    freeze: Literal["none", "head", "new-head", "interactions"] = "none"  # see above
    output: str = ""  # or any other run folder
    kind: Literal["full", "adapter"] = "full"  # what to train with --init backbone; a module has its own kind
    preset: str = ""  # with --init scratch; default: the hub's, or small
    backbone: str = ""  # with --init scratch: gemnet_oc or cgcnn; default: the hub's
    epochs: int = 60  # B.2; below 32, warm-up (5) and cosine (to 32) shrink in proportion
    batch_size: int = 32  # B.2
    lr: float = 0.0  # 0: B.2's 8e-5, but 1e-3 for tiny and small
    patience: int = 10  # stop after so many epochs without a better val MAE; 0: never


def start(cfg):
    """What training starts from: (backbone, adapters or None, card of its origin, head tensors or None)."""
    if cfg.init == "scratch":
        if cfg.kind == "adapter" or cfg.freeze != "none":
            raise ValueError("--init scratch: nothing is pre-trained, so use --kind full --freeze none")
        arch = scratch_architecture(cfg)
        torch.manual_seed(cfg.seed)
        return moma.build_backbone(arch), None, {"architecture": arch, "elements": []}, None
    path = init_folder(cfg)
    card = hub.read_card(path)
    for key, wanted in (("preset", cfg.preset), ("backbone", cfg.backbone)):
        if wanted and wanted != card["architecture"][key]:
            raise ValueError(f"--{key} {wanted}: {path} is {card['architecture'][key]}; the flag is for --init scratch")
    cfg.kind = card["kind"] if card["kind"] in ("full", "adapter") else cfg.kind
    if cfg.freeze == "head" and "head.safetensors" not in card["files_sha256"]:
        raise ValueError(f"--freeze head: {path} has no head to continue; use --freeze new-head")
    head = hub.load_tensors(path, "head.safetensors") if cfg.freeze == "head" else None
    if cfg.kind == "full":
        backbone, adapters = moma.build_backbone(card["architecture"]), None
        tm.load_tensors(backbone, hub.load_tensors(path), path)
    else:
        backbone, base = tm.load_backbone(cfg.hub)
        if card["kind"] == "adapter" and card["backbone_sha256"] != base["tensors_sha256"]:
            raise ValueError(f"{path}: adapters of another backbone than that of {cfg.hub}; give the right --hub")
        adapters = moma.new_adapters(base["architecture"])
        file = hub.load_tensors(path) if card["kind"] == "adapter" else hub.load_tensors(path, "adapters.safetensors")
        tm.load_tensors(adapters, file, path)
    return backbone, adapters, card, head


def init_folder(cfg):
    """The module's folder that --init means."""
    if cfg.init == "composed":
        path = Path("runs") / cfg.task / "composed"
        cure = f"make it with `python compose.py --task {cfg.task}`, or give its folder"
    elif "/" in cfg.init or (Path(cfg.init) / "module.json").exists():
        path, cure = Path(cfg.init), "give the folder of a module"
    else:
        path = hub.module_dir(cfg.hub, cfg.init)
        cure = "give composed, backbone, scratch, a module of --hub, or the folder of a module"
    if not (path / "module.json").exists():
        raise FileNotFoundError(f"--init {cfg.init}: no module in {path}; {cure}")
    return path


def scratch_architecture(cfg):
    """The hub's architecture, so that a comparison is fair; --preset and --backbone choose another."""
    card = Path(cfg.hub) / "backbone" / "module.json"
    arch = hub.read_card(card.parent)["architecture"] if card.exists() else {"preset": "small", "backbone": "gemnet_oc"}
    preset, backbone = cfg.preset or arch["preset"], cfg.backbone or arch["backbone"]
    same = card.exists() and (preset, backbone) == (arch["preset"], arch["backbone"])
    return arch if same else moma.preset(preset, backbone)


def freeze(backbone, adapters, how):
    """Set what trains (see the top of the file). The head, made later, always does."""
    backbone.requires_grad_(adapters is None and how in ("none", "interactions"))
    if adapters is not None:
        adapters.requires_grad_(how == "none")
        if how == "interactions":
            raise ValueError("--freeze interactions: adapter modules never train them; use none, head or new-head")
    if how == "interactions":
        for name, p in backbone.named_parameters():
            p.requires_grad_(p.requires_grad and not name.startswith(backbone.interactions))


def scores(y, prediction, mean, unit):
    """Errors of one split in the unit of y. mad: error of predicting the training mean."""
    error, spread = np.abs(prediction - y), ((y - y.mean()) ** 2).sum()
    found = {"mae": error.mean(), "rmse": np.sqrt((error**2).mean()), "mad": np.abs(y - mean).mean()}
    found |= {"mad_mae": found["mad"] / found["mae"] if found["mae"] else None}
    found |= {"r2": 1 - (error**2).sum() / spread if spread else None}
    return {k: None if v is None else float(v) for k, v in found.items()} | {"unit": unit, "rows": len(y)}


def run(cfg):
    """Fine-tune, write the run folder, return its metrics."""
    start_processes(cfg)
    if not cfg.task:
        raise ValueError("--task is missing: a name in the task table (TASKS) or in --tasks FILE")
    cfg.name = cfg.name or cfg.task
    folder = Path(cfg.output or Path("runs") / cfg.name)
    if folder.name == hub.BACKBONE:
        raise ValueError(f"--output {folder}: that name is theta_0's; choose another")
    if (folder / "metrics.json").exists() and not cfg.overwrite:
        if not cfg.resume:
            raise ValueError(f"{folder}: holds a finished run; give another --output, or --overwrite")
        say(cfg, f"{folder} is finished; nothing to do")
        return json.loads((folder / "metrics.json").read_text())
    backbone, adapters, origin, head = start(cfg)
    arch = origin["architecture"]
    cfg.lr = cfg.lr or LR.get(arch["preset"], 8e-5)
    freeze(backbone, adapters, cfg.freeze)
    claim(folder, cfg, cfg.resume)
    crystals, dataset, splits = tm.prepare(cfg, arch)
    if cfg.init == "scratch":
        first = np.random.default_rng(cfg.seed).permutation(splits["train"])[: cfg.batch_size]
        moma.fit_scale_factors(backbone, data.collate([dataset[int(i)] for i in first]))
    model, result, mean, std, errors = tm.train(cfg, folder, backbone, adapters, crystals, dataset, splits, head)
    if rank() == 0:
        write(cfg, folder, model, result, origin, crystals, splits, mean, std, errors)
    barrier()
    return json.loads((folder / "metrics.json").read_text())


def write(cfg, folder, model, result, origin, crystals, splits, mean, std, errors):
    """Everything of a run folder (design 3), metrics.json last: where it stands, the run is complete."""
    task, unit = crystals.task, unit_of(crystals.task)
    metrics = {"task": task.name, "init": Path(cfg.init).name, "kind": cfg.kind, "epochs": result["epochs"]}
    for name, (index, y, prediction) in errors.items():
        metrics[name] = scores(y, prediction, mean, unit)
        if task.transform != "none":  # and as people say it
            y, prediction = inverse(task, y), inverse(task, prediction)
            metrics[f"{name}_physical"] = scores(y, prediction, inverse(task, mean), task.unit)
        rows = zip([crystals.ids[i] for i in index], y.tolist(), prediction.tolist(), strict=True)
        write_text(folder / f"predictions_{name}.csv", csv_text(["id", "target", "prediction"], rows))
    metrics |= {"val_mae": metrics["val"]["mae"], "test_mae": metrics["test"]["mae"], "unit": unit}
    metrics |= {"best_epoch": result["best_epoch"], "seconds": result["seconds"]}
    rows = {name: crystals.row[index].tolist() for name, index in splits.items()}
    write_text(folder / "splits.json", json.dumps(rows) + "\n")
    write_skipped(folder / "skipped.csv", crystals.skipped)
    draw_parity(folder / "parity.png", crystals, errors["test"], metrics["test"])
    card = tm.make_card(cfg, origin, crystals, splits, result, mean, std, errors)
    card["elements"] = sorted({*card["elements"], *(origin.get("elements") or [])})
    if cfg.init != "scratch":
        parent = {"name": origin["name"], "tensors_sha256": origin["tensors_sha256"]}
        card |= {"parents": [parent], "weights": [1.0]}
    if origin.get("kind") != "backbone":
        card["backbone_sha256"] = origin.get("backbone_sha256")
    save_model(folder, model, card)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    (folder / "last.pt").unlink(missing_ok=True)
    test = metrics.get("test_physical", metrics["test"])
    physical = f" = {test['mae']:.4g} {test['unit']}" if task.transform != "none" else ""
    line = "{mae:.4g} {unit}{}, MAD:MAE {mad_mae:.3g}, R2 {r2:.3f}, {rows} crystals"
    print(f"{task.name}, {cfg.init}: test MAE {line.format(physical, **metrics['test'])}; {folder}")


def save_model(folder, model, card):
    """model.safetensors (backbone, adapters, head) and the card, which carries its hash."""
    tensors, file, temporary = tm.tensors_of(model), folder / "model.safetensors", folder / "model.safetensors.tmp"
    digest = hub.write_tensors(temporary, tensors, shown=file)
    temporary.replace(file)
    hub.write_card(folder / "module.json", card, tensors, {file.name: digest})


def draw_parity(path, crystals, errors, score):
    """Predicted against true, test split, in the unit of y."""
    from matplotlib.figure import Figure

    _, y, prediction = errors
    fig = Figure(figsize=(4.2, 4.2), layout="constrained")
    ax = fig.subplots()
    ends = [min(y.min(), prediction.min()), max(y.max(), prediction.max())]
    ax.plot(ends, ends, color="#999999", linewidth=1)
    ax.scatter(y, prediction, s=14, color="#4878a8", alpha=0.8, linewidths=0)
    unit = f" ({score['unit']})" if score["unit"] else ""
    ax.set(xlabel=f"true{unit}", ylabel=f"predicted{unit}", title=f"{crystals.task.name}, test: MAE {score['mae']:.4g}")
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=150))


if __name__ == "__main__":
    main(run, Config, __doc__)
