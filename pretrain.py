"""Stage 0: pre-train theta_0, the backbone that every module of a hub starts from (appendix B.2; JMP's recipe).

    python pretrain.py --sets ff_mattersim_benchmarks,mp_2018_megnet,carbon_24,qm9 --preset small --hub hub
    python pretrain.py --sets demo_forcefield,demo_clusters --data demo --preset tiny --hub hub

Several sets at once (crystals, molecules; energies with or without forces), one energy and one force head each. With E
the total energy of a structure in eV and N its number of atoms,  E = sum_z n_z r_z + sigma * (sum of the head's atoms).
r: linear per-element references, fitted per set. sigma: residual per atom, eV. M: rows of a set. B, A: of a batch.
"""

import copy
import hashlib
import math
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import hub
import model as moma
import train_module as tm
from crystals import Crystals, SYMBOLS, count_reasons, load_crystals, subset
from files import csv_text, write_atomic, write_skipped, write_text
from stage import all_sum, autocast, barrier, claim, hardware, main, pick_device, rank, reduce_gradients, say, silent, start_processes, world
from tasks import get_task, unit_of

ENERGY_UNITS = {"eV": 1.0, "meV": 1e-3, "Ha": 27.211386245988, "kcal/mol": 0.0433641153, "kJ/mol": 0.0103642697}  # in eV
LR = {"tiny": 5e-3, "small": 2e-3}  # small nets bear and need larger steps; all others train at JMP-L's 3e-4
EPOCHS = {"tiny": 20, "small": 40}  # JMP's 2 epochs are of 120 million structures


@dataclass
class Config:
    sets: str = "ff_mattersim_benchmarks,mp_2018_megnet,carbon_24,qm9"  # tasks or files with energies
    data: str = ""  # "demo": the embedded crystals
    tasks: str = ""  # JSON file with more tasks
    limit: int = 0  # use this many random rows of each set; 0: all
    on_error: Literal["skip", "stop"] = "skip"  # at a row that cannot be used
    split_seed: int = 0
    val_fraction: float = 0.05  # of each set
    hub: str = "hub"  # theta_0 becomes HUB/backbone
    output: str = ""  # run folder; default: HUB/.runs/backbone
    cache: str = ""  # folder of the built graphs
    preset: str = "small"
    backbone: str = "gemnet_oc"
    seed: int = 0
    epochs: int = 0  # each row of the largest set once; 0: by preset: tiny 20, small 40, else JMP's 2
    batch_size: int = 32
    max_atoms: int = 1000  # never more atoms in a batch; 0: no limit
    lr: float = 0.0  # 0: JMP-L's 3e-4, or by preset: tiny 5e-3, small 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 2000  # from 0.2 lr; at most a tenth of the run
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.99
    edge_dropout: float = 0.1
    force_weight: str = "1"  # against the energy (per atom); one number, or one a set. JMP: 15 to 80 (total energy)
    temperature: float = 2.0  # of the sampling: shares (rows)^(1/T)
    max_force: float = 30.0  # leave out structures with a larger force on an atom, eV/A
    max_energy: float = 15.0  # and with an energy residual per atom beyond so many times its spread
    time_limit: float = 0.0  # stop after so many minutes, save, and write the backbone as it is; 0: none
    save_minutes: float = 10.0  # between two writings of last.pt
    bf16: bool = False  # autocast: faster where layers are wide, about two digits (README, Speed)
    checkpointing: bool = False  # compute blocks again in the backward pass: less memory, more time, same numbers
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = 0  # processes that load batches
    resume: bool = False  # go on from last.pt where there is one
    overwrite: bool = False  # replace the hub's backbone
    config: str = ""  # a run's config.json as defaults
    quiet: bool = False


# ---------------------------------------------------------------- sets: energies, references, scales


@dataclass(eq=False)
class EnergySet:
    name: str
    crystals: Crystals  # y: (E - sum_z n_z r_z) / sigma; forces: / force_scale
    reference: np.ndarray  # (119,) r_z, eV
    sigma: float  # root mean square of the residual per atom, eV/atom
    force_scale: float  # root mean square of the components, eV/A; 0 without forces
    train: np.ndarray  # positions in crystals
    val: np.ndarray
    skipped: list  # [(id, reason)]
    force_weight: float = 1.0
    dataset: object = None  # data.GraphDataset


def load_sets(cfg, graph, use_forces=True):
    """The sets of --sets, normalised, with their graphs: {name: EnergySet}."""
    names = [s.strip() for s in cfg.sets.split(",") if s.strip()]
    weights, sets = cfg.force_weight.split(","), {}
    weights *= len(names) if len(weights) == 1 else 1
    if len(weights) != len(names) or not all(re.fullmatch(r"\s*\d+(\.\d*)?\s*", w) for w in weights):
        raise ValueError(f"--force-weight {cfg.force_weight}: give one number, or one for each of the {len(names)} sets")
    quiet = cfg.quiet or rank() > 0
    for text, weight in zip(names, weights, strict=True):
        task = find_task(text, cfg)
        if task.name in sets:
            raise ValueError(f"--sets {cfg.sets}: {task.name} is named twice; give each set once")
        for first in (True, False):  # the first process fills the cache, the others find it filled
            if (rank() == 0) == first:
                crystals = load_crystals(task, cfg.limit, cfg.on_error, quiet=quiet, cache_dir=cfg.cache)
                crystals.forces = crystals.forces if use_forces else None
                s = sets[task.name] = normalise(task.name, crystals, cfg)
                s.dataset = data.GraphDataset(s.crystals, graph, cfg.cache, quiet=quiet)
                s.force_weight = float(weight)
            barrier()
    return sets


def find_task(text, cfg):
    """The task of a name or a file. Embedded force fields and extxyz files that have them keep forces in `forces`."""
    if "/" not in text and "." not in text:
        task = get_task(text, cfg.tasks, cfg.data)
        return replace(task, forces_column="forces") if task.dataset.startswith("demo:") and task.role == "pretrain" else task
    forces = ""
    if text.endswith(".extxyz") and Path(text).exists():
        with open(text) as f:
            forces = "forces" if "forces:R:3" in f.readline() + f.readline() else ""  # the first frame's comment line
    return get_task(re.sub(r"\W", "_", Path(text).stem), cfg.tasks, text, unit="eV", forces_column=forces)


def normalise(name, crystals, cfg):
    """Leave out outliers and split; references and scales come from the training rows alone.

    sigma is the root mean square of the residual PER ATOM, and the loss divides by N. JMP divides totals by the standard
    deviation of totals, fine for molecules of one size. With cells of 1 to 100 atoms that (and a square root of N, too)
    would let the size of the cell decide how much a structure counts: a supercell more than its cell.
    """
    energy, N = total_energies(name, crystals), np.array([len(z) for z in crystals.Z])
    order, skipped = np.random.RandomState(cfg.split_seed).permutation(len(N)), list(crystals.skipped)
    is_val, keep = np.zeros(len(N), dtype=bool), np.ones(len(N), dtype=bool)
    is_val[order[: max(1, round(cfg.val_fraction * len(N)))]] = True
    if crystals.forces is not None:
        keep = np.array([np.linalg.norm(f, axis=1).max() for f in crystals.forces]) <= cfg.max_force
        skipped += [(crystals.ids[i], f"force above {cfg.max_force:g} eV/A (--max-force)") for i in np.flatnonzero(~keep)]
    if keep.any():
        _, residual = residuals(crystals, energy, np.flatnonzero(keep))
        off = np.abs(residual - np.median(residual[keep]))
        far = keep & (off > cfg.max_energy * (np.quantile(off[keep], 0.9) / 1.645 + 1e-3))  # 1.645: for a Gaussian
        skipped += [(crystals.ids[i], f"energy beyond {cfg.max_energy:g} spreads (--max-energy)") for i in np.flatnonzero(far)]
        keep &= ~far
    train = np.flatnonzero(keep & ~is_val)
    if len(train) < 2 or not (keep & is_val).any():
        raise ValueError(f"--sets {name}: {keep.sum()} usable rows are too few; raise --limit or --val-fraction")
    r, residual = residuals(crystals, energy, train)
    sigma, scale, forces = math.sqrt(np.mean(residual[train] ** 2)) + 1e-6, 0.0, None
    if crystals.forces is not None:
        scale = math.sqrt(np.mean(np.concatenate([crystals.forces[i] for i in train]) ** 2)) + 1e-6
        forces = [f / scale for f, k in zip(crystals.forces, keep, strict=True) if k]
    if len(skipped) > len(crystals.skipped):
        reasons = count_reasons([why for _, why in skipped[len(crystals.skipped) :]])
        say(cfg, f"  {name}: {keep.sum()} rows used; left out: {reasons}")
    train, val = np.flatnonzero(~is_val[keep]), np.flatnonzero(is_val[keep])
    normalised = replace(subset(crystals, np.flatnonzero(keep)), y=(N * residual)[keep] / sigma, forces=forces)
    return EnergySet(name, normalised, r, sigma, scale, train, val, skipped)


def total_energies(name, crystals):
    """Labels -> total energies (M,) in eV; labels per atom are first multiplied by the number of atoms."""
    task = crystals.task
    factor = ENERGY_UNITS.get(task.unit.removesuffix("/atom").removesuffix("/cell"))
    if factor is None or task.transform != "none":
        known = ", ".join(ENERGY_UNITS)
        raise ValueError(f"--sets {name}: label in {unit_of(task) or 'no unit'}, but pre-training needs energies ({known}, or /atom)")
    return crystals.y * factor * ([len(z) for z in crystals.Z] if task.unit.endswith("/atom") else 1)


def residuals(crystals, energy, rows):
    """References fitted on `rows` and what they leave over in all rows, per atom: (119,) eV and (M,) eV/atom."""
    r = fit_references([crystals.Z[i] for i in rows], energy[rows])
    return r, np.array([(e - r[z].sum()) / len(z) for e, z in zip(energy, crystals.Z, strict=True)])


def fit_references(Z, energy):
    """Per-element energies r (119,), eV: ridge regression of E/N = sum_z x_z r_z with x_z the atomic fractions.

    The ridge pulls towards the mean energy per atom, which elements that never occur get; a second fit sets it to the
    variance of the residual over that of r, so a rare element does not take the whole residual of its few rows.
    """
    counts = np.stack([np.bincount(z, minlength=119) for z in Z]).astype(float)  # (M, 119)
    N = counts.sum(1)
    seen, mean = counts.any(0), np.mean(energy / N)
    x, y, M, ridge = counts[:, seen] / N[:, None], energy / N - mean, len(N), 1e-6
    for _ in range(2):
        r = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
        ridge = max(ridge, ((y - x @ r) ** 2).sum() / max(M - x.shape[1], 1) / (r.var() + 1e-12))
    reference = np.full(119, mean)
    reference[seen] += r
    return reference


# ---------------------------------------------------------------- sampling and batches


def epoch_counts(sizes, temperature=2.0):
    """Rows of each set in an epoch: shares (n_i / n)^(1/T), reached by repeating smaller sets so that none shrinks."""
    sizes = np.asarray(sizes, dtype=float)
    share = (sizes / sizes.sum()) ** (1 / temperature)
    return np.rint(share * (sizes / share).max()).astype(int)


def plan_epoch(sets, cfg, epoch):
    """The batches of an epoch, [(name, rows, seed of the edge dropout)]: a function of --seed and the epoch alone.

    A batch is of one set: one head, one kind of structures (little padding). The optimiser's memory mixes the sets.
    """
    generator = torch.Generator().manual_seed(cfg.seed * tm.EPOCH_SEED + epoch)
    plan = []
    for s, count in zip(sets.values(), epoch_counts([len(s.train) for s in sets.values()], cfg.temperature), strict=True):
        passes = [torch.randperm(len(s.train), generator=generator) for _ in range(-(-count // len(s.train)))]
        rows = s.train[torch.cat(passes)[:count].numpy()]  # whole passes, the last one cut short
        batches = data.batch_indices(s.dataset.num_atoms, rows, cfg.batch_size, cfg.max_atoms, generator)
        plan += [(s.name, batch) for batch in batches]
    seeds = torch.randint(2**62, (len(plan),), generator=generator).tolist()
    return [(*plan[i], seeds[i]) for i in torch.randperm(len(plan), generator=generator).tolist()]


def loader(sets, plan, cfg):
    read = partial(make_batch, sets, cfg.edge_dropout)
    return DataLoader(plan, batch_size=None, collate_fn=read, num_workers=cfg.num_workers, generator=torch.Generator())


def make_batch(sets, edge_dropout, entry):
    """This process's share of a batch; y (B,) and forces (A, 3) are normalised."""
    name, rows, seed = entry
    mine = rows[rank() :: world()]
    batch = {"task": name, "share": len(mine) / len(rows)}
    if mine:
        dropout = 0.0 if seed is None else edge_dropout
        generator = torch.Generator().manual_seed(seed or 0)
        batch |= data.collate([sets[name].dataset[i] for i in mine], edge_dropout=dropout, generator=generator)
    return batch


# ---------------------------------------------------------------- loss, step, validation


def structure_wise(error, batch):
    """JMP's force loss: Euclidean norm of each atom's error (A, 3), mean over a structure's atoms, then over structures."""
    return moma.pool(torch.linalg.vector_norm(error, dim=1), batch, "mean").mean()


def loss_of(energy, forces, batch, force_weight):
    """L1 of the energy per atom plus the force loss, both of normalised values."""
    loss = ((energy.float() - batch["y"].float()) / batch["num_atoms"]).abs().mean()
    if forces is None:
        return loss
    return loss + force_weight * structure_wise(forces.float() - batch["forces"].float(), batch)


def lr_factor(progress, warmup):
    """Rate relative to --lr after a part `progress` of the run: 0.2 -> 1 until `warmup`, then a cosine down to 0.1."""
    if progress < warmup:
        return 0.2 + 0.8 * progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def train_step(net, ema, optimizer, batch, sets, cfg, lr):
    """One step by the recipe; returns (loss, norm of the gradient) for tm.read_loss."""
    params, s = list(net.parameters()), sets[batch["task"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = params[0].new_zeros(())
    if batch["share"]:
        batch = data.to_device(batch, params[0].device)
        with autocast(cfg, params[0].device):
            energy, forces = net(batch, s.name)
        loss = batch["share"] * loss_of(energy, forces, batch, s.force_weight)
        loss.backward()
    reduce_gradients(params)
    divide_shared_gradients(net.backbone)
    result = torch.stack([loss.detach(), torch.nn.utils.clip_grad_norm_(params, cfg.clip)])
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), params, 1 - cfg.ema)
        for mine, theirs in zip(ema.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)
    return result


def divide_shared_gradients(backbone):
    """A layer that n blocks share collects the gradients of n; JMP divides by n, before clipping."""
    divisors = backbone.shared_gradient_divisors() if hasattr(backbone, "shared_gradient_divisors") else {}
    for name, p in backbone.named_parameters():
        if p.grad is not None and name in divisors:
            p.grad /= divisors[name]


@torch.no_grad()
def validate(net, sets, cfg):
    """{name: (MAE of the energy, meV/atom; MAE of the force components, meV/A, or nan without forces)}."""
    net.eval()
    device, errors = next(net.parameters()).device, {}
    for s in sets.values():
        sums = np.zeros(4)  # energy errors, structures, force errors, components
        batches = data.batch_indices(s.dataset.num_atoms, s.val, cfg.batch_size, cfg.max_atoms)
        for batch in loader(sets, [(s.name, rows, None) for rows in batches], cfg):
            if batch["share"]:
                batch = data.to_device(batch, device)
                energy, forces = net(batch, s.name)
                off = ((energy - batch["y"]) / batch["num_atoms"]).abs()
                sums[:2] += off.sum().item() * s.sigma, len(off)
                if forces is not None:
                    off = (forces - batch["forces"]).abs()
                    sums[2:] += off.sum().item() * s.force_scale, off.numel()
        e, n, f, m = [all_sum(float(x)) for x in sums]
        errors[s.name] = (1e3 * e / n, 1e3 * f / m if m else math.nan)
    return errors


# ---------------------------------------------------------------- the stage


def run(cfg):
    """Pre-train and write HUB/backbone. Returns its card."""
    start_processes(cfg)
    began = time.monotonic()
    cfg.lr, cfg.epochs = cfg.lr or LR.get(cfg.preset, 3e-4), cfg.epochs or EPOCHS.get(cfg.preset, 2)
    target, folder = Path(cfg.hub) / hub.BACKBONE, Path(cfg.output or Path(cfg.hub) / ".runs" / hub.BACKBONE)
    resumed = cfg.resume and (folder / "last.pt").exists()
    if cfg.resume and not resumed and (target / "module.json").exists() and not cfg.overwrite:
        say(cfg, f"{target} is finished; nothing to resume (--overwrite trains it again)")
        return hub.read_card(target)
    refuse_overwrite(target, cfg, resumed)
    arch = moma.preset(cfg.preset, backbone=cfg.backbone)
    use_forces = "forces" in arch  # a backbone without edge features learns from the energies alone
    arch |= {"forces": True} if use_forces else {}
    claim(folder, cfg, cfg.resume)
    device = pick_device(cfg.device)
    sets = load_sets(cfg, data.GraphConfig(**arch["graph"]), use_forces)
    if rank() == 0:
        write_skipped(folder / "skipped.csv", [(f"{s.name}: {i}", why) for s in sets.values() for i, why in s.skipped])

    torch.manual_seed(cfg.seed)
    net = moma.PretrainModel(moma.build_backbone(arch), {s.name: s.crystals.forces is not None for s in sets.values()})
    first = {s: data.batch_indices(s.dataset.num_atoms, s.train, 16, max_atoms=128)[0] for s in sets.values()}
    sample = [{k: v for k, v in s.dataset[i].items() if k != "forces"} for s, rows in first.items() for i in rows]
    moma.fit_scale_factors(net.backbone, data.collate(sample))
    net.to(device)
    tm.set_checkpointing(net.backbone, cfg)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    state = {"epoch": 0, "done": 0, "step": 0, "losses": [], "seconds": 0.0, "history": []}  # done: steps of this epoch
    if resumed:
        saved = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
        state = saved["state"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    stop, errors = fit(parts, sets, state, cfg, folder, until=began + 60 * cfg.time_limit if cfg.time_limit else math.inf)
    if rank() == 0:
        refuse_overwrite(target, cfg, resumed=True)  # modules may have been trained meanwhile
        card = make_card(cfg, arch, sets, errors, state)
        kept = moma.build_backbone(card["architecture"]).state_dict().keys()  # the force branch has served
        tensors = {k: v for k, v in tm.tensors_of(ema.backbone).items() if k in kept}
        adapters = tm.tensors_of(moma.new_adapters(card["architecture"], cfg.seed))
        hub.save(target, tensors, card, adapters_init=adapters, history=history_csv(sets, state["history"]), overwrite=True)
        if not stop:
            (folder / "last.pt").unlink(missing_ok=True)
        print(f"{target}: {state['step']} steps, val MAE {describe(errors)}")
        if stop:
            say(cfg, f"stopped by --time-limit in epoch {state['epoch'] + 1} of {cfg.epochs}; --resume goes on")
    barrier()
    return hub.read_card(target)


def fit(parts, sets, state, cfg, folder, until):
    """Train parts["net"] from `state` to the last epoch or the time `until`. Returns whether time was up, and the errors."""
    stop, errors, clock = False, None, time.monotonic()
    net, ema, optimizer = parts.values()
    waiting = None

    def save():
        nonlocal clock
        now = time.monotonic()
        state["seconds"] += now - clock
        clock = now
        if rank() == 0:
            tensors = {name: part.state_dict() for name, part in parts.items()}
            write_atomic(folder / "last.pt", lambda f: torch.save({"state": state, **tensors}, f))

    while state["epoch"] < cfg.epochs and not stop:
        plan, name = plan_epoch(sets, cfg, state["epoch"]), f"epoch {state['epoch'] + 1}/{cfg.epochs}"
        warmup = min(0.1, cfg.warmup_steps / (cfg.epochs * len(plan)))
        for batch in tqdm(loader(sets, plan[state["done"] :], cfg), desc=name, leave=False, disable=silent(cfg)):
            lr = cfg.lr * lr_factor((state["epoch"] + state["done"] / len(plan)) / cfg.epochs, warmup)
            torch.manual_seed((cfg.seed * tm.EPOCH_SEED + state["step"]) * world() + rank())  # a fork may have dropout
            result = train_step(net, ema, optimizer, batch, sets, cfg, lr)
            if waiting:
                state["losses"].append(tm.read_loss(*waiting))
            waiting = result, batch if batch["share"] else None, batch["task"], sets[batch["task"]].crystals.ids
            state["step"] += 1
            state["done"] += 1
            stop = cfg.time_limit > 0 and all_sum(float(time.monotonic() > until)) > 0
            full = state["done"] == len(plan)
            due = rank() == 0 and time.monotonic() - clock > 60 * cfg.save_minutes  # one clock: all read, or none
            saving = full or stop or all_sum(float(due)) > 0
            if saving:
                state["losses"].append(tm.read_loss(*waiting))
                waiting = None
            if full:  # also when time is up
                errors = validate(ema, sets, cfg)
                row = [state["epoch"] + 1, state["step"], float(np.mean(state["losses"])), lr]
                row += [*(e for pair in errors.values() for e in pair), round(state["seconds"] + time.monotonic() - clock, 1)]
                state |= {"epoch": state["epoch"] + 1, "done": 0, "losses": [], "history": [*state["history"], row]}
                if rank() == 0:
                    write_text(folder / "history.csv", history_csv(sets, state["history"]))
                say(cfg, f"{name}: loss {row[2]:.4g}; val MAE {describe(errors)}")
            if saving:
                save()
            if stop:
                break
    return state["epoch"] < cfg.epochs, validate(ema, sets, cfg) if errors is None or state["done"] else errors


def refuse_overwrite(target, cfg, resumed):
    """Modules merge only when they start from the same theta_0, so an existing one is not replaced unasked."""
    if not (target / "module.json").exists() or cfg.overwrite:
        return
    sha = hub.read_card(target)["tensors_sha256"]
    users = [name for name, card in hub.list_modules(cfg.hub).items() if card["backbone_sha256"] == sha]
    if users:
        names = ", ".join(users[:3]) + (f" and {len(users) - 3} more" if len(users) > 3 else "")
        why = "start from it and would not merge with later modules"
        raise ValueError(f"{target}: {names} {why}; give another --hub, or --overwrite and train them again")
    if not resumed:
        raise ValueError(f"{target}: exists already; give another --hub, or --overwrite")


def make_card(cfg, arch, sets, errors, state):
    """The card's fields (design 3) that pre-training knows; hub.save adds hashes and signature."""
    about = {}
    for s in sets.values():
        seen = np.unique(np.concatenate([s.crystals.Z[i] for i in s.train]))
        about[s.name] = {
            "rows_train": len(s.train), "rows_val": len(s.val), "rows_skipped": len(s.skipped),
            "references_ev": {SYMBOLS[z]: round(float(s.reference[z]), 6) for z in seen},
            "energy_scale_ev_per_atom": s.sigma, "force_scale_ev_per_angstrom": s.force_scale or None,
            "force_weight": s.force_weight if s.force_scale else None, "val_mae_mev_per_atom": errors[s.name][0],
            "val_mae_mev_per_angstrom": errors[s.name][1] if s.force_scale else None,
        }  # fmt: skip
    keys = "epochs batch_size max_atoms lr weight_decay warmup_steps clip ema edge_dropout temperature max_force max_energy"
    arch = arch | ({"forces": False} if "forces" in arch else {})
    fingerprints = " ".join(s.crystals.fingerprint for s in sets.values())
    return {
        "kind": hub.BACKBONE, "architecture": arch, "graph": arch["graph"], "property": "energies and forces",
        "dataset": ", ".join(sets), "dataset_fingerprint": hashlib.sha256(fingerprints.encode()).hexdigest(),
        "rows_used": sum(len(s.crystals) for s in sets.values()), "rows_skipped": sum(len(s.skipped) for s in sets.values()),
        "elements": sorted({int(z) for s in sets.values() for i in s.train for z in s.crystals.Z[i]}),
        "seed": cfg.seed, "split_seed": cfg.split_seed,
        "split": {k: sum(a[f"rows_{k}"] for a in about.values()) for k in ("train", "val")},
        "training": {k: getattr(cfg, k) for k in keys.split()} | {"steps": state["step"], "sets": about},
        "seconds": round(state["seconds"], 1), "hardware": hardware(cfg), "license_code": "MIT",
        "license_weights": "", "license_data": "; ".join(sorted({s.crystals.task.license for s in sets.values()} - {""})),
        "parents": [], "weights": [],
    }  # fmt: skip


def describe(errors):
    return "; ".join(f"{name} {e:.4g} meV/atom" + (f", {f:.4g} meV/A" if f == f else "") for name, (e, f) in errors.items())


def history_csv(sets, rows):
    columns = [c for name in sets for c in (f"{name} meV/atom", f"{name} meV/A")]
    rows = [["" if x != x else x for x in row] for row in rows]  # nan: a set without forces
    return csv_text(["epoch", "step", "train_loss", "lr", *columns, "seconds"], rows)


if __name__ == "__main__":
    main(run, Config, __doc__)
