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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import data
import hub
import model as moma
import train_module as tm

ENERGY_UNITS = {"eV": 1.0, "meV": 1e-3, "Ha": 27.211386245988, "kcal/mol": 0.0433641153, "kJ/mol": 0.0103642697}  # in eV
LR = {"tiny": 2e-3, "small": 1e-3}  # small nets bear and need larger steps; all others train at JMP-L's 3e-4
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
    epochs: int = 0  # 0: by preset: tiny 20, small 40, else JMP's 2. An epoch has every row of the largest set once
    batch_size: int = 32
    max_atoms: int = 1000  # never more atoms in a batch; 0: no limit
    lr: float = 0.0  # 0: JMP-L's 3e-4, or by preset: tiny 2e-3, small 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 2000  # from 0.2 lr; at most a tenth of the run
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.99
    edge_dropout: float = 0.1
    force_weight: str = "10"  # against the energy; one number, or one for each set. JMP: 73, 80, 15, 14
    temperature: float = 2.0  # of the sampling: shares (rows)^(1/T)
    max_force: float = 30.0  # leave out structures with a larger force on an atom, eV/A
    max_energy: float = 15.0  # and with a larger energy residual per atom, robust standard deviations
    time_limit: float = 0.0  # stop after so many minutes, save, and write the backbone as it is; 0: none
    save_minutes: float = 10.0  # between two writings of last.pt
    bf16: bool = False  # autocast, CUDA only
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = 0  # processes that load batches
    resume: bool = False  # go on from last.pt where there is one
    overwrite: bool = False  # replace the hub's backbone
    config: str = ""  # a run's config.json as defaults
    quiet: bool = False


# ---------------------------------------------------------------- sets: energies, references, scales


@dataclass
class EnergySet:
    name: str
    crystals: data.Crystals
    energy: np.ndarray  # (M,) normalised: (E - sum_z n_z r_z) / sigma
    reference: np.ndarray  # (119,) r_z, eV
    sigma: float  # eV/atom
    force_scale: float  # root mean square of the components, eV/A; 0 without forces
    train: np.ndarray  # positions in crystals
    val: np.ndarray
    skipped: list  # [(id, reason)]
    force_weight: float = 1.0
    dataset: object = None  # data.GraphDataset


def load_sets(cfg, graph, use_forces=True):
    """The sets of --sets, normalised, with their graphs: {name: EnergySet}."""
    sets = {}
    for text in filter(None, map(str.strip, cfg.sets.split(","))):
        is_file = Path(text).exists()
        name = re.sub(r"\W", "_", Path(text).stem) if is_file else text
        if name in sets:
            raise ValueError(f"--sets {cfg.sets}: two sets are named {name}; give each once")
        with tm.first_process_first():
            crystals = data.load(data.get_task(name, cfg.tasks, text if is_file else cfg.data), cfg.limit, cfg.on_error, quiet=cfg.quiet)
            sets[name] = s = normalise(name, crystals, cfg)
            s.dataset = data.GraphDataset(s.crystals, graph, cache_dir=cfg.cache, quiet=cfg.quiet)
        s.force_scale *= use_forces
    weights = [float(w) for w in cfg.force_weight.split(",")]
    if len(weights) not in (1, len(sets)):
        raise ValueError(f"--force-weight {cfg.force_weight}: {len(weights)} numbers for {len(sets)} sets; give one, or one a set")
    for s, weight in zip(sets.values(), weights * (len(sets) // len(weights)), strict=True):
        s.force_weight = weight
    return sets


def normalise(name, crystals, cfg):
    """Leave out outliers and split; references and scales come from the training rows alone.

    sigma is the root mean square of the residual PER ATOM, and the loss divides by N. JMP divides totals by the standard
    deviation of totals, fine for molecules of one size. With cells of 1 to 100 atoms that (and a square root of N, too)
    would let the size of the cell decide how much a structure counts: a supercell more than its cell.
    """
    energy, N = total_energies(name, crystals), np.array([len(z) for z in crystals.Z])
    rows, skipped = np.random.default_rng(cfg.split_seed).permutation(len(N)), list(crystals.skipped)
    is_val = np.zeros(len(N), dtype=bool)
    is_val[rows[: max(1, round(cfg.val_fraction * len(N)))]] = True
    keep = np.isfinite(energy)
    if crystals.forces is not None:
        keep &= np.array([np.linalg.norm(f, axis=1).max() for f in crystals.forces]) <= cfg.max_force
        skipped += [(crystals.ids[i], f"force above {cfg.max_force:g} eV/A (--max-force)") for i in np.flatnonzero(~keep)]
    for last in (False, True):  # once to find the outliers, once without them
        train = np.flatnonzero(keep & ~is_val)
        if len(train) < 2 or not (keep & is_val).any():
            raise ValueError(f"--sets {name}: {keep.sum()} usable rows are too few; raise --limit or --val-fraction")
        r = fit_references([crystals.Z[i] for i in train], energy[train])
        residual = energy - np.array([r[z].sum() for z in crystals.Z])
        if not last:
            off = np.abs(residual / N - np.median((residual / N)[train]))
            far = keep & (off > cfg.max_energy * (1.4826 * np.median(off[train]) + 1e-3))  # 1.4826: a Gaussian's sigma
            why = f"energy beyond {cfg.max_energy:g} robust standard deviations (--max-energy)"
            skipped += [(crystals.ids[i], why) for i in np.flatnonzero(far)]
            keep &= ~far
    sigma = math.sqrt(np.mean((residual / N)[train] ** 2)) + 1e-6
    scale = 0.0
    if crystals.forces is not None:
        scale = math.sqrt(np.mean(np.concatenate([crystals.forces[i] for i in train]) ** 2)) + 1e-6
    train, val = np.flatnonzero(~is_val[keep]), np.flatnonzero(is_val[keep])
    return EnergySet(name, data.subset(crystals, np.flatnonzero(keep)), residual[keep] / sigma, r, sigma, scale, train, val, skipped)


def total_energies(name, crystals):
    """Labels -> total energies (M,) in eV; labels per atom are first multiplied by the number of atoms."""
    task = crystals.task
    factor = ENERGY_UNITS.get(task.unit.removesuffix("/atom").removesuffix("/cell"))
    if factor is None or task.transform != "none":
        units = ", ".join(ENERGY_UNITS)
        raise ValueError(f"--sets {name}: label in {data.unit_of(task) or 'no unit'}, but energies are needed ({units}; /atom)")
    return crystals.y * factor * ([len(z) for z in crystals.Z] if task.unit.endswith("/atom") else 1)


def fit_references(Z, energy, ridge=1e-6):
    """Per-element energies r (119,), eV: least squares on E/N = sum_z x_z r_z with x_z the atomic fractions.

    The ridge pulls towards the mean energy per atom, which elements that never occur get; it makes sets of a single
    composition (carbon, aspirin) solvable.
    """
    counts = np.stack([np.bincount(z, minlength=119) for z in Z]).astype(float)  # (M, 119)
    N = counts.sum(1)
    seen, mean = counts.any(0), np.mean(energy / N)
    x, r = counts[:, seen] / N[:, None], np.full(119, mean)
    r[seen] += np.linalg.solve(x.T @ x + ridge * np.eye(seen.sum()), x.T @ (energy / N - mean))
    return r


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
    for s, count in zip(sets.values(), epoch_counts([len(s.train) for s in sets.values()], cfg.temperature)):
        passes = [torch.randperm(len(s.train), generator=generator) for _ in range(-(-count // len(s.train)))]
        rows = s.train[torch.cat(passes)[:count].numpy()]  # whole passes, the last one cut short
        batches = data.batch_indices(s.dataset.num_atoms, rows, cfg.batch_size, cfg.max_atoms, generator)
        plan += [(s.name, batch) for batch in batches]
    order = torch.randperm(len(plan), generator=generator).tolist()
    seeds = torch.randint(2**62, (len(plan),), generator=generator).tolist()
    return [(*plan[i], seed) for i, seed in zip(order, seeds)]


def loader(sets, plan, cfg):
    return torch.utils.data.DataLoader(
        plan, batch_size=None, collate_fn=partial(make_batch, sets, cfg.edge_dropout), num_workers=cfg.num_workers,
        generator=torch.Generator(),
    )  # fmt: skip


def make_batch(sets, edge_dropout, entry):
    """One entry of the plan -> this process's share of the batch with normalised labels `energy` (B,), `forces` (A, 3)."""
    name, rows, seed = entry
    s, total = sets[name], len(rows)
    rows = rows[tm.rank() :: tm.world()]
    if not len(rows):
        return {"task": name, "share": 0.0}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batch = data.collate([s.dataset[int(i)] for i in rows], edge_dropout=edge_dropout if generator else 0.0, generator=generator)
    batch |= {"task": name, "rows": list(rows), "share": len(rows) / total}
    batch["energy"] = torch.tensor(s.energy[rows], dtype=torch.float32)
    if s.force_scale:
        batch["forces"] = torch.tensor(np.concatenate([s.crystals.forces[i] for i in rows]) / s.force_scale, dtype=torch.float32)
    return batch


# ---------------------------------------------------------------- loss, step, validation


def structure_wise(error, batch):
    """JMP's force loss: Euclidean norm of each atom's error (A, 3), mean over a structure's atoms, then over structures."""
    return moma.pool(torch.linalg.vector_norm(error, dim=1), batch, "mean").mean()


def loss_of(energy, forces, batch, force_weight):
    """L1 of the energy per atom plus the force loss, both of normalised values."""
    loss = ((energy.float() - batch["energy"]) / batch["num_atoms"]).abs().mean()
    return loss if forces is None else loss + force_weight * structure_wise(forces.float() - batch["forces"], batch)


def lr_factor(progress, warmup):
    """Rate relative to --lr after a part `progress` of the run: 0.2 -> 1 until `warmup`, then a cosine down to 0.1."""
    if progress < warmup:
        return 0.2 + 0.8 * progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def train_step(net, ema, optimizer, batch, sets, cfg, lr):
    """One step by the recipe; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = torch.zeros(())
    params = list(net.parameters())
    if batch["share"]:
        batch = data.to_device(batch, params[0].device)
        with tm.autocast(cfg, params[0].device):
            energy, forces = net(batch, batch["task"])
        loss = batch["share"] * loss_of(energy, forces, batch, sets[batch["task"]].force_weight)
        loss.backward()
    tm.reduce_gradients(params)
    named = dict(net.backbone.named_parameters())
    for name, n in getattr(net.backbone, "shared_gradient_divisors", dict)().items():
        if named[name].grad is not None:  # a layer that n blocks share collects n gradients
            named[name].grad /= n
    norm = torch.nn.utils.clip_grad_norm_(params, cfg.clip)
    loss = tm.all_sum(loss.item())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ids = ", ".join(sets[batch["task"]].crystals.ids[i] for i in batch.get("rows", []))
        raise ValueError(f"{batch['task']}: the loss is not finite for the batch of {ids}; look at these or lower --lr")
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), params, 1 - cfg.ema)
        for mine, theirs in zip(ema.buffers(), net.buffers()):
            mine.copy_(theirs)
    return loss


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
                off = ((energy - batch["energy"]) / batch["num_atoms"]).abs().double()
                sums[:2] += off.sum().item() * s.sigma, len(off)
                if forces is not None:
                    off = (forces - batch["forces"]).abs().double()
                    sums[2:] += off.sum().item() * s.force_scale, off.numel()
        e, n, f, m = [tm.all_sum(float(x)) for x in sums]
        errors[s.name] = (1e3 * e / n, 1e3 * f / m if m else math.nan)
    return errors


# ---------------------------------------------------------------- the stage


def run(cfg):
    """Pre-train and write HUB/backbone. Returns its card."""
    tm.start_processes(cfg)
    began = time.monotonic()
    cfg.lr, cfg.epochs = cfg.lr or LR.get(cfg.preset, 3e-4), cfg.epochs or EPOCHS.get(cfg.preset, 2)
    target, folder = Path(cfg.hub) / hub.BACKBONE, Path(cfg.output or Path(cfg.hub) / ".runs" / hub.BACKBONE)
    last = folder / "last.pt"
    if (target / "module.json").exists() and cfg.resume and not last.exists() and not cfg.overwrite:
        tm.say(cfg, f"{target} is finished; nothing to resume (--overwrite trains it again)")
        return hub.read_card(target)
    refuse_overwrite(target, cfg, unfinished=cfg.resume and last.exists())
    arch = moma.preset(cfg.preset, backbone=cfg.backbone)
    if "forces" in arch:  # a backbone without edge features learns from the energies alone
        arch["forces"] = True
    tm.claim(folder, cfg, cfg.resume)
    device = tm.pick_device(cfg.device)
    sets = load_sets(cfg, data.GraphConfig(**arch["graph"]), use_forces=arch.get("forces", False))
    if tm.rank() == 0:
        tm.write_skipped(folder / "skipped.csv", [(f"{s.name}: {i}", why) for s in sets.values() for i, why in s.skipped])

    torch.manual_seed(cfg.seed)
    net = moma.PretrainModel(moma.build_backbone(arch), {s.name: s.force_scale > 0 for s in sets.values()})
    moma.fit_scale_factors(net.backbone, data.collate([s.dataset[int(i)] for s in sets.values() for i in s.train[:16]]))
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    state = {"epoch": 0, "done": 0, "step": 0, "losses": [], "seconds": 0.0, "history": []}  # done: steps of this epoch
    if cfg.resume and last.exists():
        saved = torch.load(last, map_location="cpu", weights_only=True)
        state = saved["state"]
        for part in ("net", "ema", "optimizer"):
            {"net": net, "ema": ema, "optimizer": optimizer}[part].load_state_dict(saved[part])

    def save():
        if tm.rank() == 0:
            parts = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            tm.write_atomic(last, lambda f: torch.save({"state": state, **parts}, f))

    errors, stop, clock = None, False, time.monotonic()
    while state["epoch"] < cfg.epochs and not stop:
        plan = plan_epoch(sets, cfg, state["epoch"])
        warmup = min(0.1, cfg.warmup_steps / (cfg.epochs * len(plan)))
        rest = plan[state["done"] :]
        name = f"epoch {state['epoch'] + 1}/{cfg.epochs}"
        for batch in tqdm(loader(sets, rest, cfg), desc=name, leave=False, disable=tm.silent(cfg)):
            factor = lr_factor((state["epoch"] + state["done"] / len(plan)) / cfg.epochs, warmup)
            # everything random in a step follows from its number, so a resumed run repeats it bit for bit
            torch.manual_seed((cfg.seed * tm.EPOCH_SEED + state["step"]) * tm.world() + tm.rank())
            state["losses"].append(train_step(net, ema, optimizer, batch, sets, cfg, cfg.lr * factor))
            state["step"] += 1
            state["done"] += 1
            now = time.monotonic()
            stop = bool(cfg.time_limit) and tm.all_sum(float(now - began > 60 * cfg.time_limit)) > 0
            if stop or now - clock > 60 * cfg.save_minutes:
                state["seconds"] += now - clock
                clock = now
                save()
            if stop:
                break
        if state["done"] == len(plan):
            errors = validate(ema, sets, cfg)
            state["seconds"] += time.monotonic() - clock
            clock = time.monotonic()
            state["epoch"] += 1
            row = [state["epoch"], state["step"], float(np.mean(state["losses"])), cfg.lr * factor]
            row += [e for pair in errors.values() for e in pair] + [round(state["seconds"], 1)]
            state |= {"done": 0, "losses": [], "history": [*state["history"], row]}
            if tm.rank() == 0:
                tm.write_text(folder / "history.csv", history_csv(sets, state["history"]))
            save()
            tm.say(cfg, f"{name}: loss {row[2]:.4g}; val MAE {describe(errors)}")

    errors = errors or validate(ema, sets, cfg)
    finished = state["epoch"] >= cfg.epochs
    if tm.rank() == 0:
        refuse_overwrite(target, cfg, unfinished=True)  # modules may have been trained meanwhile
        card = make_card(cfg, arch, sets, errors, state)
        kept = moma.build_backbone(card["architecture"]).state_dict().keys()  # the force branch has served
        tensors = {k: v for k, v in tm.tensors_of(ema.backbone).items() if k in kept}
        adapters = tm.tensors_of(moma.new_adapters(card["architecture"], cfg.seed))
        text = history_csv(sets, state["history"])
        hub.save(target, tensors, card, adapters_init=adapters, history=text, overwrite=True)
        if finished:
            last.unlink(missing_ok=True)
        print(f"{target}: {state['step']} steps, val MAE {describe(errors)}")
        if not finished:
            tm.say(cfg, f"stopped by --time-limit in epoch {state['epoch'] + 1} of {cfg.epochs}; --resume goes on")
    tm.barrier()
    return hub.read_card(target)


def refuse_overwrite(target, cfg, unfinished):
    """Modules merge only when they start from the same theta_0, so an existing one is not replaced unasked."""
    if not (target / "module.json").exists() or cfg.overwrite:
        return
    sha = hub.read_card(target)["tensors_sha256"]
    users = [name for name, card in hub.list_modules(cfg.hub).items() if card["backbone_sha256"] == sha]
    cure = "give another --hub, or --overwrite"
    if users:
        names = ", ".join(users[:3]) + (f" and {len(users) - 3} more" if len(users) > 3 else "")
        raise ValueError(f"{target}: {names} start from it and would not merge with later modules; {cure}")
    if not unfinished:
        raise ValueError(f"{target}: exists already; {cure}")


def make_card(cfg, arch, sets, errors, state):
    """The card's fields (design 3) that pre-training knows; hub.save adds hashes and signature."""
    keys = ("batch_size", "max_atoms", "lr", "weight_decay", "warmup_steps", "clip", "ema", "edge_dropout", "temperature")
    keys += ("epochs", "max_force", "max_energy", "val_fraction", "bf16")
    about = {}
    for s in sets.values():
        elements = sorted({int(z) for i in s.train for z in s.crystals.Z[i]})
        energy_mae, force_mae = errors[s.name]
        about[s.name] = {
            "rows_train": len(s.train),
            "rows_val": len(s.val),
            "rows_skipped": len(s.skipped),
            "references_ev": {str(z): round(float(s.reference[z]), 6) for z in elements},  # by atomic number
            "energy_scale_ev_per_atom": s.sigma,
            "force_scale_ev_per_angstrom": s.force_scale or None,
            "force_weight": s.force_weight if s.force_scale else None,
            "val_mae_mev_per_atom": energy_mae,
            "val_mae_mev_per_angstrom": force_mae if s.force_scale else None,
        }
    fingerprints = [s.crystals.fingerprint for s in sets.values()]
    arch = arch | ({"forces": False} if "forces" in arch else {})
    return {
        "kind": hub.BACKBONE,
        "architecture": arch,
        "graph": arch["graph"],
        "property": "energies and forces",
        "dataset": ", ".join(sets),
        "dataset_fingerprint": hashlib.sha256(" ".join(fingerprints).encode()).hexdigest(),
        "rows_used": sum(len(s.train) + len(s.val) for s in sets.values()),
        "rows_skipped": sum(len(s.skipped) for s in sets.values()),
        "elements": sorted({int(z) for a in about.values() for z in a["references_ev"]}),
        "seed": cfg.seed,
        "split_seed": cfg.split_seed,
        "split": {k: sum(a[f"rows_{k}"] for a in about.values()) for k in ("train", "val")},
        "training": {k: getattr(cfg, k) for k in keys} | {"steps": state["step"], "sets": about},
        "seconds": round(state["seconds"], 1),
        "hardware": tm.hardware(cfg),
        "license_code": "MIT",
        "license_weights": "",
        "license_data": "",
        "parents": [],
        "weights": [],
    }


def describe(errors):
    force = lambda f: "" if math.isnan(f) else f", {f:.4g} meV/A"
    return "; ".join(f"{name} {e:.4g} meV/atom{force(f)}" for name, (e, f) in errors.items())


def history_csv(sets, rows):
    columns = [c for name in sets for c in (f"{name} meV/atom", f"{name} meV/A")]
    return tm.csv_text(["epoch", "step", "train_loss", "lr", *columns, "seconds"], rows)


if __name__ == "__main__":
    tm.main(run, Config, __doc__)
