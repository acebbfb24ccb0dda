"""Stage 1: train one MoMa module g_j on one task (section 2.2, appendix B.2). Owns the training loop of all stages.

    python train_module.py --task mp_eform --hub hub --kind full

full: all backbone parameters are the module. adapter: the backbone is frozen, the data are encoded once, and adapters
and head train on the stored features. Both start from theta_0 = HUB/backbone and end as one folder of the hub.

B: crystals, A: atoms, L: outputs that an adapter follows (blocks + 1), C: channels. y: labels after the task's
transform. The loss is L1 on (y - mean) / std, both of the training labels; errors are printed in the unit of y.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import hub
import model as moma
from crystals import load_crystals
from files import csv_text, write_atomic, write_skipped, write_text
from stage import (all_sum, autocast, barrier, claim, hardware, main, number, pick_device, rank, reduce_gradients, say,
                   silent, start_processes, world)
from tasks import get_task, unit_of

WARMUP, COSINE = 5, 32  # epochs: lr rises from 0.1 during the first, falls to 0.1 until the second (B.2)
LR = {("tiny", "full"): 2e-3, ("tiny", "adapter"): 2e-3, ("small", "adapter"): 2e-3}  # the others: the paper's 5e-4
SAVE_SECONDS = 2  # last.pt is written after the epoch in which so much time has passed since the last writing
EPOCH_SEED = 1_000_003  # everything random in an epoch follows from (seed, epoch), so a resumed run repeats it


@dataclass
class Config:
    task: str = ""  # a name in TASKS or --tasks
    data: str = ""  # folder, file or "demo"; default: the task's own data set
    tasks: str = ""  # JSON file with more tasks
    target_column: str = ""  # of --data, as the five below
    structure_column: str = ""
    id_column: str = ""
    unit: str = ""
    transform: str = ""  # none, log, log10, log1p
    pooling: Literal["", "mean", "sum", "max"] = ""
    limit: int = 0  # use this many random rows; 0: all
    on_error: Literal["skip", "stop"] = "skip"  # at a row that cannot be used
    split_seed: int = 0  # of 70/15/15
    split_file: str = ""  # or row numbers: {"train": [], "val": [], "test": []}
    hub: str = "hub"  # has backbone/; the module becomes HUB/NAME
    name: str = ""  # default: the task
    output: str = ""  # run folder; default: HUB/.runs/NAME
    cache: str = ""  # folder of the built graphs
    kind: Literal["full", "adapter"] = "full"
    preset: str = ""  # only checked against the hub's backbone
    backbone: str = ""  # likewise
    seed: int = 0
    epochs: int = 80  # B.2; below 32, warm-up (5) and cosine (to 32) shrink in proportion
    batch_size: int = 64  # B.2
    max_atoms: int = 2000  # never more atoms in a batch; 0: no limit
    lr: float = 0.0  # 0: B.2's 5e-4, but 2e-3 for tiny and for small's adapters
    weight_decay: float = 0.1
    ema: float = 0.99  # averaged weights are validated and kept; the average is shorter in the first 900 steps
    clip: float = 10.0  # norm of the gradient
    patience: int = 0  # stop after so many epochs without a better val MAE; 0: never
    bf16: bool = False  # autocast: faster where layers are wide, about two digits (README, Speed)
    checkpointing: bool = False  # compute blocks again in the backward pass: less memory, more time, same numbers
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = 0  # processes that load batches
    resume: bool = False  # go on from last.pt where there is one
    overwrite: bool = False  # replace what is there
    config: str = ""  # a run's config.json as defaults
    quiet: bool = False


# ---------------------------------------------------------------- the loop


def fit(model, batches, cfg, folder, mean, std, unit=""):
    """Train what requires a gradient; leave the best averaged weights in `model`.

    batches: {"train": callable(epoch), "val": callable(), "ids": ids by batch["index"], optional}; both callables give
    something with len() that yields batches (None: this process has no share of the batch).
    model(batch) -> (B,) normalised. mean, std: of the training labels. folder: gets last.pt and history.csv.
    Returns {"val_mae" (label unit), "epochs", "best_epoch", "seconds", "history" (CSV text)}.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    frozen = {k for k, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    live = {k: v for k, v in model.state_dict().items() if k not in frozen}  # shares memory with the model
    names = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    averaged, buffers = [k for k in live if k in names], [v for k, v in live.items() if k not in names]
    fixed = [part for part in model.modules() if {p.requires_grad for p in part.parameters()} == {False}]
    still = {inner for part in fixed for inner in part.modules()}
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay, amsgrad=True)
    state = {"epoch": 0, "step": 0, "best": math.inf, "best_epoch": 0, "seconds": 0.0, "history": [],
             "plateau": 1.0, "plateau_best": math.inf, "plateau_bad": 0}  # fmt: skip
    ema, best, last = clone(live), clone(live), Path(folder) / "last.pt"
    if cfg.resume and last.exists():
        saved = torch.load(last, map_location="cpu", weights_only=True)
        state = saved["state"]
        for mine, key in ((live, "model"), (ema, "ema"), (best, "best")):
            copy_(mine, saved[key])
        optimizer.load_state_dict(saved["optimizer"])

    written = time.monotonic()
    while state["epoch"] < cfg.epochs and not (cfg.patience and state["epoch"] - state["best_epoch"] >= cfg.patience):
        start, epoch, losses, waiting = time.monotonic(), state["epoch"], [], None
        torch.manual_seed((cfg.seed * EPOCH_SEED + epoch) * world() + rank())  # dropout
        for part in model.modules():
            part.training = part not in still  # what is frozen stays in evaluation mode: its features are constants
        train = batches["train"](epoch)
        for i, batch in enumerate(tqdm(train, f"epoch {epoch + 1}/{cfg.epochs}", leave=False, disable=silent(cfg))):
            lr = cfg.lr * state["plateau"] * lr_factor(epoch + i / len(train), cfg.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            result = train_step(model, params, batch, cfg, mean, std)
            optimizer.step()
            state["step"] += 1
            decay = min(cfg.ema, (1 + state["step"]) / (10 + state["step"]))  # a task of 70 crystals has few steps
            torch._foreach_lerp_([ema[k] for k in averaged], [live[k] for k in averaged], 1 - decay)
            if waiting:
                losses.append(read_loss(*waiting))
            waiting = result, batch, f"epoch {epoch + 1}", batches.get("ids")
        losses.append(read_loss(*waiting))
        for b in buffers:  # batch norm: every process goes on with those of the first
            if world() > 1:
                dist.broadcast(b, 0)

        current = clone(live)
        copy_(live, {k: ema[k] for k in averaged})
        val = mean_error(model, batches["val"](), mean, std, cfg)
        if val < state["best"]:
            state["best"], state["best_epoch"] = val, epoch + 1
            copy_(best, live)
        copy_(live, current)
        if not math.isfinite(val):
            raise ValueError(f"epoch {epoch + 1}: the validation error is not finite; lower --lr")
        state["epoch"] += 1
        reduce_on_plateau(state, val, cfg.epochs)
        seconds = time.monotonic() - start
        state["seconds"] += seconds
        state["history"].append([epoch + 1, sum(losses) / len(losses), val, lr, round(seconds, 3)])
        if rank() == 0:
            write_text(Path(folder) / "history.csv", csv_text(HISTORY, state["history"]))
            if time.monotonic() - written >= SAVE_SECONDS:
                tensors = {"model": live, "ema": ema, "best": best, "optimizer": optimizer.state_dict()}
                write_atomic(last, lambda f: torch.save({"state": state, **tensors}, f))
                written = time.monotonic()
        if silent(cfg) and (epoch + 1) % max(1, cfg.epochs // 5) == 0:  # a log file gets five lines, not a bar
            say(cfg, f"epoch {epoch + 1}/{cfg.epochs}: val MAE {val:.4g} {unit}, best {state['best']:.4g}")

    copy_(live, best)
    model.eval()
    return {"val_mae": state["best"], "epochs": state["epoch"], "best_epoch": state["best_epoch"],
            "seconds": round(state["seconds"], 1), "history": csv_text(HISTORY, state["history"])}  # fmt: skip


def lr_factor(progress, epochs):
    """Rate relative to --lr after `progress` (fractional) epochs: 0.1 -> 1, then a cosine down to 0.1 (B.2)."""
    shrink = min(1.0, epochs / COSINE)
    warmup, end = WARMUP * shrink, COSINE * shrink
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (progress - warmup) / (end - warmup)))


def reduce_on_plateau(state, val, epochs, patience=5, factor=0.1):
    """After the cosine: a tenth of the rate once val MAE has not improved for more than `patience` epochs."""
    if state["epoch"] <= min(COSINE, epochs):
        return
    better = val < state["plateau_best"] * (1 - 1e-4)
    state["plateau_best"] = min(val, state["plateau_best"])
    state["plateau_bad"] = 0 if better else state["plateau_bad"] + 1
    if state["plateau_bad"] > patience:
        state["plateau"], state["plateau_bad"] = state["plateau"] * factor, 0


def train_step(model, params, batch, cfg, mean, std):
    """Gradient of the batch's L1 loss (normalised), clipped. Returns (loss, norm of the gradient) for `read_loss`."""
    for p in params:
        p.grad = None
    total, count = params[0].new_zeros(()), 0
    if batch is not None:
        batch = data.to_device(batch, params[0].device)
        with autocast(cfg, params[0].device):
            prediction = model(batch).float()
        target = (batch["y"].double() - mean) / std
        total, count = (prediction - target.float()).abs().sum(), len(target)
    loss = total / all_sum(count)
    if batch is not None:
        loss.backward()
    reduce_gradients(params)
    return torch.stack([loss.detach(), torch.nn.utils.clip_grad_norm_(params, cfg.clip)])


def read_loss(result, batch, where, ids=None):
    """The loss of a step, over all processes. Asked for one step later, so that a GPU never waits to be read."""
    loss, norm = result.tolist()
    loss = all_sum(loss)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        index = [] if batch is None else batch["index"].tolist()
        names = ", ".join(str(ids[i]) if ids else f"number {i}" for i in index) or "another process"
        raise ValueError(f"{where}: the loss is not finite for the batch of {names}; look at these or lower --lr")
    return loss


def mean_error(model, batches, mean, std, cfg):
    """MAE in the label's unit, over the shares of all processes."""
    _, y, prediction = predict_batches(model, batches, mean, std, cfg)
    return all_sum(float(np.abs(prediction - y).sum())) / all_sum(len(y))


@torch.no_grad()
def predict_batches(model, batches, mean, std, cfg=None):
    """Positions in the dataset, labels (NaN where there are none), predictions, each (M,); the last two in y's unit."""
    model.eval()
    device = next(model.parameters()).device
    found = [(np.empty(0, np.int64), np.empty(0), np.empty(0))]
    for batch in batches:
        if batch is not None:
            batch = data.to_device(batch, device)
            with autocast(cfg, device):
                out = model(batch).double().cpu().numpy() * std + mean
            y = batch["y"].double().cpu().numpy() if "y" in batch else np.full(len(out), np.nan)
            found.append((batch["index"].cpu().numpy(), y, out))
    return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def normalizer(y):
    """Mean and standard deviation of the training labels."""
    mean, std = float(np.mean(y)), float(np.std(y))
    if not std > 1e-12 * abs(mean):
        raise ValueError(f"all {len(y)} training labels are {mean:g}: nothing to learn; check the target column")
    return mean, std


# ---------------------------------------------------------------- data and models


def prepare(cfg, arch):
    """Load the task's crystals, build their graphs, split. Returns crystals, data.GraphDataset, {split: positions}."""
    names = ("target_column", "structure_column", "id_column", "unit", "transform", "pooling")
    given = {k: getattr(cfg, k) for k in names if getattr(cfg, k, "")}
    if not cfg.task:
        raise ValueError("--task is missing: a name in TASKS or in --tasks FILE")
    task = get_task(cfg.task, cfg.tasks, cfg.data, **given)
    quiet = cfg.quiet or rank() > 0
    for first in (True, False):  # the first process fills the cache, the others find it filled
        if (rank() == 0) == first:
            crystals = load_crystals(task, cfg.limit, cfg.on_error, quiet=quiet, cache_dir=cfg.cache)
            dataset = data.GraphDataset(crystals, data.GraphConfig(**arch["graph"]), cache_dir=cfg.cache, quiet=quiet)
        barrier()
    splits = data.make_splits(crystals, cfg.split_seed, cfg.split_file)
    if not quiet:
        data.report_duplicates(crystals, splits)
    return crystals, dataset, splits


def train(cfg, folder, backbone, adapters, crystals, dataset, splits, head=None):
    """Fit backbone (or adapters) and head. A frozen backbone encodes the data once. head: {name: tensor}; None: new.

    Returns the model, fit's result, mean, std and, in the first process, {split: (positions, y, prediction)}.
    """
    start, device, source = time.monotonic(), pick_device(cfg.device), dataset
    mean, std = normalizer(crystals.y[splits["train"]])
    backbone.to(device)
    set_checkpointing(backbone, cfg)
    if not any(p.requires_grad for p in backbone.parameters()):
        source = FeatureDataset(backbone, dataset, cfg, folder)
    torch.manual_seed(cfg.seed)  # the new head: the same whatever the backbone is
    model = moma.PropertyModel(backbone, crystals.task.pooling, adapters).to(device)
    if head is not None:
        load_tensors(model.head, head, "--freeze head")
    encoding = time.monotonic() - start
    batches = {"train": lambda epoch: loader(source, splits["train"], cfg, epoch),
               "val": lambda: loader(source, splits["val"], cfg), "ids": crystals.ids}  # fmt: skip
    result = fit(model, batches, cfg, folder, mean, std, unit_of(crystals.task))
    result["seconds"] = round(result["seconds"] + encoding, 1)
    errors = {}
    if rank() == 0:
        for name in ("val", "test"):
            errors[name] = predict_batches(model, loader(source, splits[name], cfg, share=False), mean, std, cfg)
    return model, result, mean, std, errors


def loader(dataset, indices, cfg, epoch=None, share=True):
    """Batches of `indices`: shuffled by (seed, epoch), or in order without epoch. Each process gets its part."""
    generator = None if epoch is None else torch.Generator().manual_seed(cfg.seed * EPOCH_SEED + epoch)
    chunks = data.batch_indices(dataset.num_atoms, indices, cfg.batch_size, cfg.max_atoms, generator)
    if share:
        chunks = [chunk[rank() :: world()] for chunk in chunks]
    own = torch.Generator()  # seeds of the workers: drawn from here, so that num_workers leaves dropout alone
    return DataLoader(dataset, batch_sampler=chunks, collate_fn=collate, num_workers=cfg.num_workers, generator=own)


def collate(records):
    """A batch of graphs or of stored features; None for an empty share."""
    if not records or "features" not in records[0]:
        return data.collate(records) if records else None
    num_atoms = torch.tensor([len(r["features"]) for r in records])
    batch = {k: torch.tensor([r[k] for r in records]) for k in ("y", "index")}
    batch["features"] = torch.from_numpy(np.concatenate([r["features"] for r in records]))  # (A, L, C)
    return batch | {"num_atoms": num_atoms, "batch": torch.repeat_interleave(torch.arange(len(records)), num_atoms)}


class FeatureDataset:
    """What adapters read, (A, L, C) for the atoms of a dataset, from one pass of the frozen backbone."""

    def __init__(self, backbone, dataset, cfg, folder, in_memory=2**29):
        self.num_atoms, self.y, self.features = np.asarray(dataset.num_atoms), dataset.y, None
        self.start = np.concatenate([[0], np.cumsum(self.num_atoms)])
        order = np.argsort(self.num_atoms, kind="stable")  # crystals of one size together
        device = next(backbone.parameters()).device
        backbone.eval()
        for batch in tqdm(loader(dataset, order, cfg, share=False), "encode", leave=False, disable=silent(cfg)):
            with torch.no_grad(), autocast(cfg, device):
                x = backbone.atom_features(data.to_device(batch, device)).float().cpu().numpy()
            if self.features is None:
                shape = (int(self.start[-1]), *x.shape[1:])
                if 4 * math.prod(shape) <= in_memory:  # bytes
                    self.features = np.empty(shape, np.float32)
                else:
                    path = Path(folder) / f"features{rank()}.tmp"
                    self.features = np.memmap(path, np.float32, "w+", shape=shape)
                    path.unlink()  # so the space is free when the run ends, however it ends
            parts = np.split(x, np.cumsum(batch["num_atoms"].cpu().numpy())[:-1])
            for i, part in zip(batch["index"].tolist(), parts, strict=True):
                self.features[self.start[i] : self.start[i + 1]] = part

    def __len__(self):
        return len(self.num_atoms)

    def __getitem__(self, i):
        return {"features": self.features[self.start[i] : self.start[i + 1]], "y": float(self.y[i]), "index": int(i)}


def load_backbone(folder):
    """theta_0 of a hub, and its card. folder: the hub."""
    path = Path(folder) / "backbone"
    if not (path / "module.json").exists():
        raise FileNotFoundError(f"{path}: no backbone to start from; make one: `make backbone` or `python pretrain.py`")
    card = hub.read_card(path)
    backbone = moma.build_backbone(card["architecture"])
    load_tensors(backbone, hub.load_tensors(path), path)
    return backbone, card


def load_tensors(module, tensors, where):
    """Load a state dict that must have exactly the names and shapes of the module."""
    mine = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in tensors.items()}
    for k in sorted(mine.keys() | theirs.keys()):
        if mine.get(k) != theirs.get(k):
            found, wanted = theirs.get(k, "missing"), mine.get(k, "none of that name")
            raise ValueError(f"{where}: tensor {k} is {found}, the model has {wanted}; it is from another architecture")
    module.load_state_dict(tensors)


def set_checkpointing(backbone, cfg):
    if cfg.checkpointing and not hasattr(backbone, "checkpointing"):
        raise ValueError(f"--checkpointing: {backbone.arch['backbone']} has no blocks to compute again; leave the flag out")
    backbone.checkpointing = cfg.checkpointing


def make_card(cfg, base, crystals, splits, result, mean, std, errors):
    """The fields of design 3 that training knows; hub.save adds hashes and signature. No paths, row ids or labels."""
    task, unit = crystals.task, unit_of(crystals.task)
    mae = {k: float(np.abs(p - y).mean()) for k, (_, y, p) in errors.items()}
    settings = ("epochs", "batch_size", "max_atoms", "lr", "weight_decay", "ema", "clip", "patience", "bf16")
    done = {"epochs_run": result["epochs"], "best_epoch": result["best_epoch"]}
    arch, y_test = base["architecture"], errors["test"][1]
    seen = sorted({int(z) for i in splits["train"] for z in crystals.Z[i]})
    return {
        "name": cfg.name, "kind": cfg.kind, "architecture": arch, "graph": arch["graph"],
        "backbone_sha256": base.get("tensors_sha256"), "property": task.name, "unit": unit, "physical_unit": task.unit,
        "transform": task.transform, "pooling": task.pooling, "normalizer_mean": mean, "normalizer_std": std,
        "dataset": Path(task.dataset).name, "dataset_fingerprint": crystals.fingerprint, "rows_used": len(crystals.y),
        "rows_skipped": len(crystals.skipped), "elements": seen,
        "seed": cfg.seed, "split_seed": cfg.split_seed, "split": {k: len(v) for k, v in splits.items()},
        "training": {k: getattr(cfg, k) for k in settings} | done, "val_mae": mae["val"], "test_mae": mae["test"],
        "mad": float(np.abs(y_test - mean).mean()),  # error of predicting the training mean
        "seconds": result["seconds"], "license_code": "MIT", "license_weights": base.get("license_weights"),
        "license_data": task.license or None, "hardware": hardware(cfg),
    }  # fmt: skip


def run(cfg):
    """Train one module and put it into the hub. Returns its card."""
    start_processes(cfg)
    cfg.name = cfg.name or get_task(cfg.task, cfg.tasks, cfg.data).name.lower()
    target = hub.module_dir(cfg.hub, cfg.name)
    if (target / "module.json").exists() and not cfg.overwrite:
        kind = hub.read_card(target)["kind"]
        if kind != cfg.kind:
            raise ValueError(f"{target}: holds a module of kind {kind}, not {cfg.kind}; give another --name, or --overwrite")
        say(cfg, f"{target} exists; nothing to do (--overwrite trains it again)")
        return hub.read_card(target)
    backbone, base = load_backbone(cfg.hub)
    arch = base["architecture"]
    for key, wanted in (("preset", cfg.preset), ("backbone", cfg.backbone)):
        if wanted and wanted != arch[key]:
            raise ValueError(f"--{key} {wanted}: the backbone of {cfg.hub} is {arch[key]}; give another --hub")
    cfg.lr = cfg.lr or LR.get((arch["preset"], cfg.kind), 5e-4)
    folder = Path(cfg.output or Path(cfg.hub) / ".runs" / cfg.name)
    claim(folder, cfg, cfg.resume)
    crystals, dataset, splits = prepare(cfg, arch)
    adapters = None
    if cfg.kind == "adapter":
        backbone.requires_grad_(False)
        adapters = moma.new_adapters(arch)
        load_tensors(adapters, hub.load_tensors(Path(cfg.hub) / "backbone", "adapters.safetensors"), "theta_0")
    model, result, mean, std, errors = train(cfg, folder, backbone, adapters, crystals, dataset, splits)
    if rank() == 0:
        card = make_card(cfg, base, crystals, splits, result, mean, std, errors)
        g, head = tensors_of(adapters or backbone), tensors_of(model.head)
        hub.save(target, g, card, head, history=result["history"], overwrite=cfg.overwrite)
        write_skipped(folder / "skipped.csv", crystals.skipped)
        (folder / "last.pt").unlink(missing_ok=True)  # the module stands: nothing to resume
        errors = ", ".join(f"{k.replace('_', ' ')} {number(card[k])}" for k in ("val_mae", "test_mae", "mad"))
        say(cfg, f"{target}: {errors} {card['unit']}")
    barrier()
    return hub.read_card(target)


HISTORY = ["epoch", "train_loss", "val_mae", "lr", "seconds"]


def tensors_of(module):
    return {k: v.detach().cpu() for k, v in module.state_dict().items()}


def clone(tensors):
    return {k: v.detach().clone() for k, v in tensors.items()}


def copy_(into, source):
    for k, v in source.items():
        into[k].copy_(v)


if __name__ == "__main__":
    main(run, Config, __doc__)
