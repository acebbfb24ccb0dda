"""Stage 1: train one MoMa module g_j on one task (section 2.2, appendix B.2). Owns the training loop of all stages.

    python train_module.py --task mp_eform --hub my_hub --kind full

full: all backbone parameters are the module. adapter: the backbone is frozen, the data are encoded once, and adapters
and head train on the stored features. Both start from theta_0 = HUB/backbone (a copy of hub/backbone, say)
and end as one folder of the hub.

B: crystals, A: atoms, L: outputs that an adapter follows (blocks + 1), C: channels. y: labels after the task's
transform. The loss is L1 on (y - mean) / std, both of the training labels; errors are printed in the unit of y.
"""

import contextlib
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from files import UserError, csv_text, new_array, recover, write_atomic, write_skipped, write_text
from stage import (Above, LearningRate, Positive, Range, Share, TaskConfig, Whole, all_sum, autocast, barrier, claim,
                   compare, hardware, last_state, main, number, pick_device, prepare, rank, reduce_gradients,
                   rests_on, say, silent, stage_of, start, work_folder, world)

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

import hub
from card import all_licences
from crystals import prototypes
from data import batch_indices, collate, to_device
from model import PropertyModel, training_defaults
from tasks import TASKS, unit_of

WARMUP, COSINE = 5, 32  # epochs: the rate rises from 0.1 during the first, falls to 0.1 until the second (B.2)
SAVE_SECONDS = 120  # between two writings of last.pt, which take at most a twentieth of the time
EPOCH_SEED = 1_000_003  # everything random follows from (seed, epoch) or (seed, step), so a resumed run repeats it


@dataclass
class TrainConfig(TaskConfig):
    """Settings of modules and of fine-tuning."""

    epochs: Positive = 80  # B.2; below 32 the schedule shrinks
    lr: LearningRate = 0.0  # 0: the preset's, or B.2's
    weight_decay: Share = 0.1
    ema: Share = 0.99  # decay of the averaged weights; shorter in the first 900 steps
    clip: Above = 10.0  # norm of the gradient
    patience: Whole = 0  # stop after so many epochs without a better val MAE; 0: never
    bf16: bool = False  # autocast: faster where layers are wide, about two digits
    checkpointing: bool = False  # less memory, more time, the same numbers
    author: str = ""  # of the weights, for the card
    license: str = ""  # that you give the weights, for the card
    resume: bool = False  # go on from last.pt where there is one
    overwrite: bool = False  # replace what stands there, once the new result is whole


@dataclass
class Config(TrainConfig):
    name: str = ""  # of the module: HUB/NAME [the task]
    kind: Literal["full", "adapter"] = "full"
    held_out: Annotated[float, Range(0, 0.9, above=True)] = 0.3  # share of the rows for validation and test, half each
    store_hashes: Literal["auto", "yes", "no"] = "auto"  # of the training structures; auto: of public data sets only


SETTINGS = ("seed", "epochs", "batch_size", "max_atoms", "lr", "weight_decay", "ema", "clip", "patience", "bf16")


def run(cfg):
    """Train one module and put it into the hub. Returns its card."""
    start(cfg)
    theta_0 = hub.load_module(Path(cfg.hub) / hub.BACKBONE, kind=cfg.kind)
    arch = theta_0.card["architecture"]
    crystals, dataset, splits = prepare(cfg, arch)
    target = hub.module_dir(cfg.hub, cfg.name or crystals.task.name.lower())
    given, cfg = cfg, replace(cfg, lr=cfg.lr or training_defaults(arch, cfg.kind)["lr"])
    record = {"kind": cfg.kind, "theta_0": theta_0.card["tensors_sha256"], **rests_on(crystals, splits)}
    record |= {k: getattr(cfg, k) for k in SETTINGS}
    if card := finished(cfg, target, record, "give another --name, or --overwrite to train again"):
        return show(card, target)

    theta_0.backbone.requires_grad_(cfg.kind == "full")
    model = new_head(theta_0.backbone, theta_0.adapters, crystals.task.pooling, cfg.seed)
    card = new_card(cfg, theta_0.card, crystals, splits, record)
    hub.check_card(card, target)  # what would be refused when it is saved is refused now
    folder = work_folder(target)
    claim(folder, given, record)
    result, errors = train(cfg, folder, model, crystals, dataset, splits)
    if rank() == 0:
        card |= results(result, errors)
        module = theta_0.adapters or theta_0.backbone
        hub.save(target, tensors_of(module), card, tensors_of(model.head), history=result["history"],
                 extra=seen_file(cfg, crystals, splits["train"]), overwrite=cfg.overwrite)  # fmt: skip
        write_skipped(folder / "skipped.csv", crystals.skipped)
        (folder / "last.pt").unlink(missing_ok=True)  # the module stands: nothing to resume
    barrier()
    return show(hub.read_card(target), target)


def show(card, target):
    """Print the result in one line. Returns the card."""
    if rank() == 0:
        found = ", ".join(f"{k.replace('_', ' ')} {number(card[k])}" for k in ("val_mae", "test_mae", "mad"))
        print(f"{target}: {found} {card['unit']}")
    return card


def finished(cfg, target, record, cure):
    """The card of `target` if this stage made it from the same record; None if nothing is there; else UserError."""
    recover(target)
    if not (target / "module.json").exists():
        if target.is_symlink() or target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target}: exists and is no module; name another")
        return None
    card = hub.read_card(target)
    if (maker := made_by(card)) != stage_of(cfg):
        raise UserError(f"{target}: holds what {maker}.py made; name another")
    if cfg.overwrite:
        return None
    compare(card["record"], record, target, cure)
    for file in (hub.main_file(card), *card["files_sha256"]):
        hub.checked_file(target, file)
    if problems := hub.verify_folds(target, card):
        raise UserError(problems[0])
    say(cfg, f"{target} is finished; nothing to do (--overwrite makes it again)")
    return card


def made_by(card) -> str:
    """The stage that wrote a card."""
    if card["kind"] == hub.BACKBONE:
        return "pretrain"
    files = card["files_sha256"]
    return "finetune" if hub.MODEL in files else "compose" if "composition.json" in files else "train_module"


def new_head(backbone, adapters, pooling, seed):
    """The model to train. The head is new, and the same whatever the backbone is."""
    torch.manual_seed(seed)
    return PropertyModel(backbone, pooling, adapters)


def new_card(cfg, origin, crystals, splits, record):
    """The card as known before training; hub.save adds hashes and signature. origin: the card of what it starts from.

    No paths, row ids or labels: a module may be shared when its data may not.
    """
    arch = origin["architecture"]
    seen = {int(z) for i in splits["train"] for z in crystals.Z[i]}
    return {
        "kind": cfg.kind, "architecture": arch, "graph": arch["graph"], "record": record,
        "backbone_sha256": origin.get("backbone_sha256") or origin.get("tensors_sha256"),
        **label_card(crystals), "rows_used": len(crystals.y),
        "elements": sorted(seen),
        "seed": cfg.seed, "split_seed": cfg.split_seed, "split": {k: len(v) for k, v in splits.items()},
        "training": {k: getattr(cfg, k) for k in SETTINGS}, "license_code": "MIT", "author": cfg.author or None,
        **licences(origin, {"license_weights": cfg.license, "license_data": crystals.task.license}),
        "hardware": hardware(cfg),
    }  # fmt: skip


def licences(origin, own):
    """Those of what training starts from hold for the result too, "unknown" where one is not given."""
    cards = [own, origin] if "tensors_sha256" in origin else [own]  # a fresh backbone has none
    return {k: all_licences(cards, k) for k in own}


def seen_file(cfg, crystals, rows):
    """{file: bytes}: hashes of the training structures, which tell others what this module has seen. {}: not stored."""
    if cfg.store_hashes == "no" or cfg.store_hashes == "auto" and not is_public(crystals.task):
        return {}
    names = prototypes(crystals, cfg.cache, cfg.quiet)
    return hub.seen_file([names[i] for i in rows])


def is_public(task) -> bool:
    """Whether the structures are publicly known: those of the task table are."""
    return task.dataset.startswith("demo:") or task.dataset in {known.dataset for known in TASKS.values()}


def label_card(crystals):
    """The card's fields on the labels, and on the data that they come from."""
    task = crystals.task
    return {
        "property": task.name, "unit": unit_of(task), "physical_unit": task.unit, "transform": task.transform,
        "pooling": task.pooling, "dataset": Path(task.dataset).name, "dataset_fingerprint": crystals.fingerprint,
        "rows_skipped": len(crystals.skipped),
    }  # fmt: skip


def results(result, errors):
    """The card's fields that training finds out. mad: error of predicting the mean of the training labels."""
    mae = {f"{k}_mae": float(np.abs(p - y).mean()) for k, (_, y, p) in errors.items()}
    return mae | {k: result[k] for k in ("normalizer_mean", "normalizer_std", "mad", "seconds")} | {
        "epochs_run": result["epochs"], "best_epoch": result["best_epoch"]}  # fmt: skip


def train(cfg, folder, model, crystals, dataset, splits):
    """Fit what requires a gradient in `model` to the task. A frozen backbone encodes the data once. model.hints, where
    there are any, add to the loss.

    Returns what `fit` found and, in the first process, {split: (positions, y, prediction)}.
    """
    began, device = time.monotonic(), pick_device(cfg.device)
    mean, std = normalizer(crystals.y[splits["train"]])
    model.to(device)
    set_checkpointing(model.backbone, cfg)
    read = partial(read_graphs, dataset)
    if not any(p.requires_grad for p in model.backbone.parameters()):
        rows = np.arange(len(crystals))
        features = encode(model.backbone, dataset, rows, cfg, partial(scratch_array, folder))
        read = Features(features, dataset.num_atoms, dataset.y).read
    encoding = time.monotonic() - began

    def batches(name, epoch=None):
        return plan_batches(dataset.num_atoms, splits[name], cfg, epoch)

    def loss(model, batch):
        target = ((batch["y"].double() - mean) / std).float()
        if model.hints is None:
            return (model(batch).float() - target).abs().mean()
        y, z = model(batch, embed=True)
        return (y.float() - target).abs().mean() + model.hints(z, batch["index"])

    def validate(model):
        _, y, prediction = predict_batches(model, loader(read, batches("val"), cfg), mean, std, cfg)
        total, count = all_sum([float(np.abs(prediction - y).sum()), len(y)])
        return {"val_mae": total / count}

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, amsgrad=True)
    result = fit(
        model, optimizer, loss, validate, cfg, folder, unit=unit_of(crystals.task),
        plan=partial(batches, "train"), load=partial(loader, read, cfg=cfg),
        rate=partial(lr_factor, epochs=cfg.epochs), settled=min(COSINE, cfg.epochs),
        names=lambda batch: [crystals.ids[i] for i in batch["index"].tolist()],
    )  # fmt: skip
    errors = {}
    if rank() == 0:
        for name in ("val", "test"):
            errors[name] = predict_batches(model, loader(read, batches(name), cfg, share=False), mean, std, cfg)
        mad = float(np.abs(errors["test"][1] - mean).mean())
        result |= {"normalizer_mean": mean, "normalizer_std": std, "mad": mad}
    return result | {"seconds": round(result["seconds"] + encoding, 1)}, errors


def normalizer(y):
    """Mean and standard deviation of the training labels."""
    mean, std = float(np.mean(y)), float(np.std(y))
    if not std > 1e-12 * abs(mean):
        raise UserError(f"all {len(y)} training labels are {mean:g}: nothing to learn; check the target column")
    return mean, std


def set_checkpointing(backbone, cfg):
    if cfg.checkpointing and not backbone.can_checkpoint:
        raise UserError(f"--checkpointing: {backbone.arch['backbone']} has no blocks to compute again; leave it out")
    backbone.checkpointing = cfg.checkpointing


# ---------------------------------------------------------------- the loop


def fit(model, optimizer, loss, validate, cfg, folder, *, plan, load, rate, settled, names=None, unit="",
        keep="best", until=math.inf):  # fmt: skip
    """Train what requires a gradient; leave the best averaged weights (keep="last": the last ones) in `model`.

    loss(model, batch): of this process's share. validate(model): {column: error}, the first decides what is best.
    folder: the work folder, for last.pt and history.csv.
    plan(epoch): the epoch's batches, a list. load(part of it): yields them, each with its "share" in this process.
    rate(epoch): factor on cfg.lr after so many epochs, fractional, up to `settled`; then a tenth on every plateau.
    names(batch): of its crystals, for errors. until: time.monotonic() at which to save and stop.
    Returns {"best", "best_epoch", "epochs", "step", "seconds", "history" (CSV text), "stopped"}.
    """
    params = nn.ParameterList([p for p in model.parameters() if p.requires_grad])
    frozen = {k for k, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    live = {k: v for k, v in model.state_dict().items() if k not in frozen}  # shares memory with the model
    state = {"epoch": 0, "done": 0, "step": 0, "losses": [], "best": math.inf, "best_epoch": 0, "seconds": 0.0,
             "history": []}  # fmt: skip
    plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=5)

    def average(means, values, _):
        decay = min(cfg.ema, (1 + state["step"]) / (10 + state["step"]))  # a task of 70 crystals has few steps
        torch._foreach_lerp_(means, values, 1 - decay)

    ema, best = AveragedModel(params, multi_avg_fn=average), clone(live)
    ema.update_parameters(params)  # the first time copies
    if saved := last_state(folder, cfg.resume):
        state = saved["state"]
        copy_(live, saved["model"])
        copy_(best, saved["best"])
        for part, key in ((ema, "ema"), (optimizer, "optimizer"), (plateau, "plateau")):
            part.load_state_dict(saved[key])
        say(cfg, f"resumed in epoch {state['epoch'] + 1}, after {state['step']} steps")

    waiting, clock, written, took, stop, due = [], time.monotonic(), time.monotonic(), 0.0, False, False

    def tick():
        nonlocal clock
        state["seconds"] += time.monotonic() - clock
        clock = time.monotonic()

    def read_waiting(left):
        """Read the losses of all but the last `left` steps; learn whether a process wants to stop, or to save."""
        nonlocal stop, due
        while len(waiting) > left:
            now = time.monotonic()
            wish = rank() == 0 and now - written > max(SAVE_SECONDS, 20 * took)
            value, over, wished = read_loss(*waiting.pop(0), names, [float(now > until), float(wish)])
            state["losses"].append(value)
            stop, due = stop or over > 0, due or wished > 0

    def save():
        nonlocal written, took, due
        tick()
        if rank() == 0:
            parts = {"model": live, "best": best, "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            parts |= {"plateau": plateau.state_dict(), "state": state}
            write_atomic(Path(folder) / "last.pt", lambda f: torch.save(parts, f))
        took, written, due = time.monotonic() - clock, time.monotonic(), False

    while state["epoch"] < cfg.epochs and not stop and not spent(state, cfg):
        todo, name = plan(state["epoch"]), f"epoch {state['epoch'] + 1}/{cfg.epochs}"
        train_mode(model)
        for batch in tqdm(load(todo[state["done"] :]), name, len(todo), initial=state["done"], leave=False,
                          disable=silent(cfg)):  # fmt: skip
            torch.manual_seed((cfg.seed * EPOCH_SEED + state["step"]) * world() + rank())  # dropout
            progress = state["epoch"] + state["done"] / len(todo)
            for group in optimizer.param_groups if progress <= settled else ():
                group["lr"] = cfg.lr * rate(progress)
            waiting.append((train_step(model, params, batch, loss, cfg), batch, name))
            optimizer.step()
            state["step"] += 1
            state["done"] += 1
            ema.update_parameters(params)
            read_waiting(left=1)
            if (stop or due) and state["done"] < len(todo):
                read_waiting(left=0)
                save()
                if stop:
                    break
        read_waiting(left=0)
        if state["done"] < len(todo):
            break
        if world() > 1:
            for b in model.buffers():  # batch norm: every process goes on with those of the first
                dist.broadcast(b, 0)

        with averaged(params, ema):
            errors = validate(model)
            value = next(iter(errors.values()))
            if value < state["best"]:
                state["best"], state["best_epoch"] = value, state["epoch"] + 1
                copy_(best, live)
        if not math.isfinite(value):
            raise UserError(f"{name}: the validation error is not finite; lower --lr")
        tick()
        mean_loss, lr = sum(state["losses"]) / len(state["losses"]), optimizer.param_groups[0]["lr"]
        row = {"epoch": state["epoch"] + 1, "step": state["step"], "train_loss": mean_loss, **errors, "lr": lr,
               "seconds": round(state["seconds"], 3)}  # fmt: skip
        state |= {"epoch": state["epoch"] + 1, "done": 0, "losses": [], "history": [*state["history"], row]}
        if state["epoch"] > settled:
            plateau.step(value)
        if rank() == 0:
            write_text(Path(folder) / "history.csv", history_csv(state["history"]))
        if state["epoch"] % max(1, cfg.epochs // 5) == 0 or not cfg.quiet and not silent(cfg):
            say(cfg, f"{name}: {', '.join(f'{k} {v:.4g}' for k, v in errors.items())} {unit}")
        if stop or due:
            save()

    if keep == "best":
        copy_(live, best)
    else:
        with torch.no_grad():
            torch._foreach_copy_(list(params), list(ema.module))
    model.eval()
    tick()
    kept = {k: state[k] for k in ("best", "best_epoch", "step")}
    return kept | {"epochs": state["epoch"], "seconds": round(state["seconds"], 1), "stopped": stop,
                   "history": history_csv(state["history"])}  # fmt: skip


def spent(state, cfg):
    """Whether patience is: so many epochs without a better one."""
    return bool(getattr(cfg, "patience", 0)) and state["epoch"] - state["best_epoch"] >= cfg.patience


def history_csv(rows):
    """rows: [{column: value}]. A value that is not a number (a set without forces) is left blank."""
    columns = list(rows[0]) if rows else []
    return csv_text(columns, [["" if r[c] != r[c] else r[c] for c in columns] for r in rows])


def lr_factor(progress, epochs):
    """Rate relative to --lr after `progress` (fractional) epochs: 0.1 -> 1, then a cosine down to 0.1 (B.2)."""
    shrink = min(1.0, epochs / COSINE)
    warmup, end = WARMUP * shrink, COSINE * shrink
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (progress - warmup) / (end - warmup)))


def train_mode(model):
    """Training mode, but for what is frozen: its features are constants, so no dropout and no batch statistics."""
    model.train()
    for part in model.modules():
        if {p.requires_grad for p in part.parameters()} == {False}:
            part.eval()


def train_step(model, params, batch, loss, cfg):
    """Gradient of the batch's loss, over all processes, clipped. Returns (loss, norm) for `read_loss`."""
    for p in params:
        p.grad = None
    value = params[0].new_zeros(())
    if batch["share"]:
        batch = to_device(batch, params[0].device)
        with autocast(cfg, params[0].device):
            value = batch["share"] * loss(model, batch)
        value.backward()
    reduce_gradients(list(params))
    return torch.stack([value.detach(), nn.utils.clip_grad_norm_(params, cfg.clip)])


def read_loss(result, batch, where, names=None, wishes=()):
    """The loss of a step and the sums of `wishes`, over all processes. Asked for one step later, so that a GPU never
    waits to be read."""
    loss, norm = result.tolist()
    loss, *wishes = all_sum([loss, *wishes])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        of = ", ".join(names(batch)) if names and batch["share"] else "another process"
        raise UserError(f"{where}: the loss is not finite for the batch of {of}; look at these or lower --lr")
    return loss, *wishes


@contextlib.contextmanager
def averaged(params, ema):
    """The averaged weights stand in the model for a while."""
    own = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(list(params), list(ema.module))
        yield
        torch._foreach_copy_(list(params), own)


def tensors_of(module):
    return {k: v.detach().cpu() for k, v in module.state_dict().items()}


def clone(tensors):
    return {k: v.detach().clone() for k, v in tensors.items()}


def copy_(into, source):
    for k, v in source.items():
        into[k].copy_(v)


# ---------------------------------------------------------------- batches


def plan_batches(num_atoms, rows, cfg, epoch=None):
    """[(rows of a batch,)]: shuffled by (seed, epoch), or without an epoch by size, so that little is padded."""
    generator = None
    if epoch is None:
        rows = np.asarray(rows)[np.argsort(np.asarray(num_atoms)[rows], kind="stable")]
    else:
        generator = torch.Generator().manual_seed(cfg.seed * EPOCH_SEED + epoch)
    return [(batch,) for batch in batch_indices(num_atoms, rows, cfg.batch_size, cfg.max_atoms, generator)]


def loader(read, plan, cfg, share=True):
    """The batches that read(rows, ...) makes of the plan's entries (rows, ...), this process's share of the rows."""
    split = partial(read_share, read, rank() if share else 0, world() if share else 1)
    own = torch.Generator()  # seeds of the workers: drawn from here, so that num_workers leaves dropout alone
    return DataLoader(plan, batch_size=None, collate_fn=split, num_workers=cfg.num_workers, generator=own)


def read_share(read, rank, world, entry):
    rows, *rest = entry
    mine = rows[rank::world]
    return {"share": len(mine) / len(rows), **(read(mine, *rest) if mine else {})}


def read_graphs(dataset, rows):
    return collate([dataset[i] for i in rows])


class Features:
    """What adapters read in place of graphs: the frozen backbone's atom features of crystals, x (A, L, C)."""

    def __init__(self, x, num_atoms, y=None):
        self.x, self.y, self.num_atoms = x, y, np.asarray(num_atoms)
        self.end = np.cumsum(self.num_atoms)

    def read(self, rows):
        n = torch.as_tensor(self.num_atoms[rows])
        x = np.concatenate([self.x[self.end[i] - self.num_atoms[i] : self.end[i]] for i in rows])
        batch = {"features": torch.from_numpy(x), "num_atoms": n, "index": torch.as_tensor(rows)}
        if self.y is not None:
            batch["y"] = torch.as_tensor(self.y[rows])
        return batch | {"batch": torch.repeat_interleave(torch.arange(len(rows)), n)}


@torch.no_grad()
def encode(backbone, dataset, rows, cfg, new):
    """The backbone's atom features of the crystals `rows`, one crystal after the other, in new((A, L, C))."""
    device, num_atoms = next(backbone.parameters()).device, np.asarray(dataset.num_atoms)
    end, place = np.cumsum(num_atoms[rows]), {int(row): i for i, row in enumerate(rows)}
    x = new((end[-1], backbone.num_features, backbone.adapter_width))
    backbone.eval()
    batches = loader(partial(read_graphs, dataset), plan_batches(num_atoms, rows, cfg), cfg, share=False)
    for batch in tqdm(batches, "encode", leave=False, disable=silent(cfg)):
        with autocast(cfg, device):
            features = backbone.atom_features(to_device(batch, device)).float().cpu().numpy()
        parts = np.split(features, np.cumsum(batch["num_atoms"].numpy())[:-1])
        for row, part in zip(batch["index"].tolist(), parts, strict=True):
            i = place[row]
            x[end[i] - len(part) : end[i]] = part
    return x


def scratch_array(folder, shape, in_memory=2**29):
    """An array for this run alone; a large one lies on the disk."""
    if 4 * math.prod(map(int, shape)) <= in_memory:  # bytes
        return np.empty(shape, np.float32)
    path = Path(folder) / f"features{rank()}.npy"
    x = new_array(path, shape)
    path.unlink()  # so the space is free when the run ends, however it ends
    return x


@torch.no_grad()
def predict_batches(model, batches, mean, std, cfg, embed=False):
    """Positions in the dataset, ascending, labels (NaN where there are none), predictions, each (M,); in y's unit.

    embed: and the crystals' representations, (M, C) float32.
    """
    model.eval()
    device = next(model.parameters()).device
    found = [(np.empty(0, np.int64), np.empty(0), np.empty(0), np.empty((0, model.backbone.width), np.float32))]
    for batch in batches:
        if batch["share"]:
            batch = to_device(batch, device)
            with autocast(cfg, device):
                out, X = model(batch, embed=True)
            out, X = out.double().cpu().numpy() * std + mean, X.float().cpu().numpy()
            y = batch["y"].double().cpu().numpy() if "y" in batch else np.full(len(out), np.nan)
            found.append((batch["index"].cpu().numpy(), y, out, X))
    index, *values = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.argsort(index)
    return index[order], *(x[order] for x in values[: 3 if embed else 2])


if __name__ == "__main__":
    main(run, Config, __doc__)
