"""Stage 0: pre-train theta_0, the backbone that every module of a hub starts from (appendix B.2).

    python pretrain.py --hub my_hub --teacher chgnet --taught mp_eform,mp_gvrh,jarvis_eform
    python pretrain.py --hub my_hub --sets demo_forcefield,demo_clusters --data demo --preset tiny

Two recipes, alone or together. --sets, JMP's: several sets at once (crystals, molecules; energies with or without
forces), one energy and one force head each. --teacher, distillation: an open potential (teachers.py) labels the crystals
of --taught with its energy and its features of every atom; linear layers on the atoms' representation learn both.
No label of those tables is used, and what occurs in --leave-out, the downstream tasks, is left out.

With E the total energy of a structure in eV and N its number of atoms,  E = sum_z n_z r_z + sigma * (sum of the head's
atoms). r: linear per-element references, fitted per set; a teacher's are its energies of the elements themselves, so
that it teaches formation energies. sigma: residual per atom, eV. M: rows of a set. B, A: of a batch. C: the teacher's
features of an atom.
"""

import hashlib
import math
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from files import UserError, write_skipped
from stage import (Above, CommonConfig, LearningRate, Range, Seed, Share, Whole, all_sum, barrier, claim,
                   first_process_first, hardware, main, pick_device, rank, say, start, work_folder)

import numpy as np
import torch

import hub
from crystals import SYMBOLS, Crystals, count_reasons, load_crystals, prototypes, subset
from data import GraphConfig, GraphDataset, batch_indices, collate, to_device
from model import (BACKBONES, PretrainModel, build_backbone, fit_scale_factors, new_adapters, pool, preset,
                   shapes_only, training_defaults)
from tasks import Task, get_task, task_names, unit_of
from teachers import TEACHERS, distorted, teach
from train_module import EPOCH_SEED, finished, fit, is_public, loader, set_checkpointing, tensors_of

TABLES = "mp_eform,mp_gvrh,castelli_eform,jarvis_eform,mp_bandgap,n_Seebeck"  # of --taught: matminer has them
EV = {"eV": 1.0, "meV": 1e-3, "Ha": 27.211386245988, "kcal/mol": 0.0433641153, "kJ/mol": 0.0103642697}


@dataclass
class Config(CommonConfig):
    sets: str = ""  # tasks or files with energies: a,b,c
    teacher: Literal["", *TEACHERS] = ""  # the potential that labels the crystals of --taught
    taught: str = ""  # tasks, files; no label is used [six open tables]
    copies: Whole = 0  # strained and displaced copies of each of these crystals
    leave_out: str = "downstream"  # what occurs in these tasks: a,b,c; "none"
    data: str = ""  # "demo": the embedded crystals
    tasks: str = ""  # JSON file with more tasks
    limit: Whole = 0  # use this many random rows of each set; 0: all
    on_error: Literal["skip", "stop"] = "skip"  # at a row that cannot be used
    split_seed: Seed = 0
    val_fraction: Annotated[float, Range(0, 0.9, above=True)] = 0.05  # of each set
    hub: str = "hub"  # theta_0 becomes HUB/backbone
    cache: str = ""  # folder of parsed rows, graphs and embeddings [.cache]
    preset: str = "small"
    backbone: str = "gemnet_oc"
    seed: Seed = 0
    epochs: Whole = 0  # each row of the largest set once; 0: the preset's, or JMP's 2
    batch_size: Annotated[int, Range(1)] = 32
    max_atoms: Whole = 1000  # in a batch; 0: no limit
    lr: LearningRate = 0.0  # 0: the preset's, or JMP-L's 3e-4
    weight_decay: Share = 0.1
    warmup_steps: Whole = 2000  # from 0.2 lr; at most a tenth of the run
    clip: Above = 1.0  # norm of the gradient
    ema: Share = 0.99  # decay of the averaged weights; shorter in the first 900 steps
    edge_dropout: Annotated[float, Range(0, 0.9)] = 0.1  # of --sets
    force_weight: str = "1"  # against the energy per atom; one number, or one a set
    energy_weight: Above = 0.3  # of a teacher's energies, against its features
    teacher_forces: Annotated[float, Range(0)] = 0.0  # weight of its forces; small without --copies
    temperature: Annotated[float, Range(1)] = 2.0  # of the sampling: shares (rows)^(1/T)
    max_force: Above = 30.0  # leave out structures with a larger force on an atom, eV/A
    max_energy: Above = 15.0  # and with a residual energy beyond so many spreads
    time_limit: Annotated[float, Range(0)] = 0.0  # stop after so many minutes, and write theta_0 as it is; 0: none
    author: str = ""  # of the weights, for the card
    license: str = ""  # that you give the weights, for the card
    store_hashes: Literal["auto", "yes", "no"] = "auto"  # of the training structures; auto: where all sets are public
    bf16: bool = False  # autocast: faster where layers are wide, about two digits
    checkpointing: bool = False  # less memory, more time, the same numbers
    resume: bool = False  # go on from last.pt where there is one
    overwrite: bool = False  # replace the hub's backbone


def run(cfg):
    """Pre-train and write HUB/backbone. Returns its card."""
    start(cfg)
    began, given = time.monotonic(), cfg
    target = hub.module_dir(cfg.hub, hub.BACKBONE)
    folder = work_folder(target)
    arch = preset(cfg.preset, backbone=cfg.backbone)
    defaults = training_defaults(arch, "pretrain")
    cfg = replace(cfg, lr=cfg.lr or defaults["lr"], epochs=cfg.epochs or defaults["epochs"])
    cfg = replace(cfg, taught=(cfg.taught or TABLES) if cfg.teacher else "")
    sets = load_sets(cfg, arch)
    record = {"sets": {s.name: s.crystals.fingerprint for s in sets.values()}, "architecture": arch}
    record |= {k: getattr(cfg, k) for k in SETTINGS} | {"teacher": cfg.teacher and TEACHERS[cfg.teacher].name}
    cure = "give another --hub, or --overwrite, after which every module has to be trained again"
    unfinished = (folder / "last.pt").exists()  # by --time-limit, which leaves a theta_0 too
    if not unfinished and (card := finished(cfg, target, record, cure)):
        return card
    refuse_if_used(target, cfg)

    net = make_net(cfg, arch, sets)
    card = new_card(cfg, arch, sets, record)
    hub.check_card(card, target)
    claim(folder, given, record)
    net.to(pick_device(cfg.device))
    set_checkpointing(net.backbone, cfg)
    if rank() == 0:
        skipped = [(f"{s.name}: {i}", why) for s in sets.values() for i, why in s.skipped]
        write_skipped(folder / "skipped.csv", skipped)
    steps = cfg.epochs * len(plan_epoch(sets, cfg, 0))
    rate = partial(lr_factor, warmup=min(0.1, cfg.warmup_steps / steps), epochs=cfg.epochs)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    read = partial(read_batch, sets, cfg.edge_dropout)
    result = fit(
        net, optimizer, partial(loss_of, sets), partial(validate, sets=sets, cfg=cfg), cfg, folder,
        plan=partial(plan_epoch, sets, cfg), load=partial(loader, read, cfg=cfg),
        rate=rate, settled=cfg.epochs, keep="last", until=began + 60 * (cfg.time_limit or math.inf),
        names=lambda batch: [sets[batch["task"]].crystals.ids[i] for i in batch["index"].tolist()],
    )  # fmt: skip
    errors = validate(net, sets, cfg)
    if rank() == 0:
        refuse_if_used(target, cfg)  # modules may have been trained meanwhile
        card["training"] |= training_of(sets, errors, result["step"])
        card["seconds"] = result["seconds"]
        plain = build_backbone(card["architecture"])  # without the force branch, which has served
        tensors = {k: v for k, v in tensors_of(net.backbone).items() if k in plain.state_dict()}
        adapters = tensors_of(new_adapters(plain, cfg.seed))
        hub.save(target, tensors, card, adapters_init=adapters, history=result["history"],
                 extra=seen_file(cfg, sets), overwrite=True)  # fmt: skip
        print(f"{target}: {result['step']} steps, {describe(errors)}")
        if result["stopped"]:
            say(cfg, f"stopped by --time-limit after {result['epochs']} of {cfg.epochs} epochs; --resume goes on")
        else:
            (folder / "last.pt").unlink(missing_ok=True)
    barrier()
    return hub.read_card(target)


SETTINGS = ("seed", "split_seed", "val_fraction", "epochs", "batch_size", "max_atoms", "lr", "weight_decay",
            "warmup_steps", "clip", "ema", "edge_dropout", "force_weight", "energy_weight", "teacher_forces",
            "temperature", "max_force", "max_energy", "bf16")  # fmt: skip


TAUGHT = ("limit", "taught", "copies", "leave_out")  # for the card; the record has the rows' fingerprints


def refuse_if_used(target, cfg):
    """Modules merge only when they start from one theta_0, so one that is in use is not replaced unasked."""
    if cfg.overwrite or not (target / "module.json").exists():
        return
    sha = hub.read_card(target)["tensors_sha256"]
    users = [name for name, card in hub.list_modules(cfg.hub).items() if card["backbone_sha256"] == sha]
    if users:
        names = ", ".join(users[:3]) + (f" and {len(users) - 3} more" if len(users) > 3 else "")
        why = "start from it and would not merge with later modules"
        raise UserError(f"{target}: {names} {why}; give another --hub, or --overwrite and train them again")


def make_net(cfg, arch, sets):
    """The net to train: force heads for sets with forces, and a force branch where the backbone can have one."""
    torch.manual_seed(cfg.seed)
    backbone = build_backbone(with_force_branch(arch))
    taught = {s.name: s.crystals.teacher[0].shape[1] for s in sets.values() if s.crystals.teacher}
    net = PretrainModel(backbone, {s.name: s.crystals.forces is not None for s in sets.values()}, taught)
    first = {s: batch_indices(s.dataset.num_atoms, s.train, 16, max_atoms=128)[0] for s in sets.values()}
    own = ("forces", "teacher")  # not of every set
    sample = [{k: v for k, v in s.dataset[i].items() if k not in own} for s, rows in first.items() for i in rows]
    fit_scale_factors(backbone, collate(sample))
    divide_shared_gradients(backbone)
    return net


def with_force_branch(arch):
    """The architecture with edge features for force heads, which pre-training alone has, if its backbone can."""
    return arch | BACKBONES[arch["backbone"]].force_arguments


def divide_shared_gradients(backbone):
    """A layer that n blocks share collects the gradients of n; JMP divides by n, before clipping."""
    parameters = dict(backbone.named_parameters())
    for name, n in backbone.shared_gradient_divisors().items():
        parameters[name].register_hook(lambda gradient, n=n: gradient / n)


def new_card(cfg, arch, sets, record):
    """The card's fields that are known before training; hub.save adds hashes and signature."""
    fingerprints = " ".join(s.crystals.fingerprint for s in sets.values())
    names = [s.crystals.task.dataset if s.crystals.teacher else s.name for s in sets.values()]
    return {
        "kind": hub.BACKBONE, "architecture": arch, "graph": arch["graph"], "property": property_of(sets),
        "record": record, "dataset": ", ".join(names),
        "dataset_fingerprint": hashlib.sha256(fingerprints.encode()).hexdigest(),
        "rows_used": sum(len(s.crystals) for s in sets.values()),
        "rows_skipped": sum(len(s.skipped) for s in sets.values()),
        "elements": sorted({int(z) for s in sets.values() for i in s.train for z in s.crystals.Z[i]}),
        "seed": cfg.seed, "split_seed": cfg.split_seed,
        "split": {k: sum(len(getattr(s, k)) for s in sets.values()) for k in ("train", "val")},
        "training": {k: getattr(cfg, k) for k in (*SETTINGS, *TAUGHT)}, "hardware": hardware(cfg), "license_code": "MIT",
        "author": cfg.author or None, "license_weights": cfg.license or None,
        "license_data": "; ".join(sorted({s.crystals.task.license for s in sets.values()} - {""})) or None,
        "parents": [], "weights": [],
    }  # fmt: skip


def seen_file(cfg, sets):
    """{file: bytes}: hashes of the training structures, as of modules; {} where one set is not to be stored."""
    if cfg.store_hashes == "no" or cfg.store_hashes == "auto" and not all(s.public for s in sets.values()):
        return {}
    found = [s.compounds or prototypes(subset(s.crystals, s.train), cfg.cache, cfg.quiet) for s in sets.values()]
    return hub.seen_file([key for keys in found for key in keys])


def property_of(sets):
    """What theta_0 has learned, in words."""
    taught = [f"energies and atom features of {TEACHERS[s.name].name}" for s in sets.values() if s.crystals.teacher]
    return " and ".join([*taught, *["energies and forces"] * (len(sets) > len(taught))])


def training_of(sets, errors, steps):
    """What training found out: {"steps", "sets": {name: rows, references, scales, validation errors}}."""
    about = {}
    for s in sets.values():
        seen = np.unique(np.concatenate([s.crystals.Z[i] for i in s.train]))
        about[s.name] = {
            "rows_train": len(s.train), "rows_val": len(s.val), "rows_skipped": len(s.skipped),
            "references_ev": {SYMBOLS[z]: round(float(s.reference[z]), 6) for z in seen},
            "energy_scale_ev_per_atom": s.sigma, "force_scale_ev_per_angstrom": s.force_scale or None,
            "force_weight": s.force_weight if s.force_scale else None,
            "val_mae_mev_per_atom": errors[f"{s.name} meV/atom"],
            "val_mae_mev_per_angstrom": errors[f"{s.name} meV/A"] if s.force_scale else None,
            "val_mae_features": errors[f"{s.name} features"] if s.crystals.teacher else None,
        }  # fmt: skip
    return {"steps": steps, "sets": about}


def describe(errors):
    return "val MAE " + ", ".join(f"{column} {e:.4g}" for column, e in errors.items() if e == e)


# ---------------------------------------------------------------- rate, loss, validation


def lr_factor(epoch, warmup, epochs):
    """Rate relative to --lr after so many epochs: 0.2 -> 1 in the part `warmup` of the run, then a cosine to 0.1."""
    progress = epoch / epochs
    if progress < warmup:
        return 0.2 + 0.8 * progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def loss_of(sets, net, batch):
    """L1 of the energy per atom, plus the losses of forces and of a teacher's features; all of normalised values."""
    energy, forces, features = net(batch, batch["task"])
    s = sets[batch["task"]]
    loss = s.energy_weight * ((energy.float() - batch["y"].float()) / batch["num_atoms"]).abs().mean()
    if forces is not None:
        loss = loss + s.force_weight * structure_wise(forces.float() - batch["forces"].float(), batch)
    if features is not None:
        error = (features.float() - batch["teacher"].float()).abs().mean(dim=1, keepdim=True)  # (A, 1)
        loss = loss + pool(error, batch, "mean").mean()
    return loss


def structure_wise(error, batch):
    """JMP's force loss: norms of the atoms' errors (A, 3), their mean over a structure's atoms, then over structures."""
    return pool(torch.linalg.vector_norm(error, dim=1), batch, "mean").mean()


@torch.no_grad()
def validate(net, sets, cfg):
    """{"SET meV/atom": MAE of the energy, "SET meV/A": MAE of the force components, NaN without forces}; of a teacher's
    features, "SET features", the MAE in standard deviations."""
    net.eval()
    device, errors = next(net.parameters()).device, {}
    for s in sets.values():
        sums = np.zeros(6)  # energy errors, structures, force errors, components, feature errors, features
        batches = batch_indices(s.dataset.num_atoms, s.val, cfg.batch_size, cfg.max_atoms)
        plan = [(rows, s.name, None) for rows in batches]
        for batch in loader(partial(read_batch, sets, 0.0), plan, cfg):
            if batch["share"]:
                batch = to_device(batch, device)
                energy, forces, features = net(batch, s.name)
                off = ((energy - batch["y"]) / batch["num_atoms"]).abs()
                sums[:2] += off.sum().item() * s.sigma, len(off)
                if forces is not None:
                    off = (forces - batch["forces"]).abs()
                    sums[2:4] += off.sum().item() * s.force_scale, off.numel()
                if features is not None:
                    off = (features - batch["teacher"]).abs()
                    sums[4:] += off.sum().item(), off.numel()
        e, n, f, m, x, k = all_sum(sums.tolist())
        errors |= {f"{s.name} features": x / k} if k else {}
        errors |= {f"{s.name} meV/atom": 1e3 * e / n, f"{s.name} meV/A": 1e3 * f / m if m else math.nan}
    return errors


# ---------------------------------------------------------------- sampling and batches


def epoch_counts(sizes, temperature=2.0):
    """Rows of each set in an epoch: shares (n_i / n)^(1/T), reached by repeating smaller sets so that none shrinks."""
    sizes = np.asarray(sizes, dtype=float)
    share = (sizes / sizes.sum()) ** (1 / temperature)
    return np.rint(share * (sizes / share).max()).astype(int)


def plan_epoch(sets, cfg, epoch):
    """The batches of an epoch, [(rows, name, seed of the edge dropout)]: a function of --seed and the epoch alone.

    A batch is of one set: one head, one kind of structures (little padding). The optimiser's memory mixes the sets.
    """
    generator = torch.Generator().manual_seed(cfg.seed * EPOCH_SEED + epoch)
    plan, counts = [], epoch_counts([len(s.train) for s in sets.values()], cfg.temperature)
    for s, count in zip(sets.values(), counts, strict=True):
        passes = [torch.randperm(len(s.train), generator=generator) for _ in range(-(-count // len(s.train)))]
        rows = s.train[torch.cat(passes)[:count].numpy()]  # whole passes, the last one cut short
        batches = batch_indices(s.dataset.num_atoms, rows, cfg.batch_size, cfg.max_atoms, generator)
        plan += [(batch, s.name) for batch in batches]
    seeds = torch.randint(2**62, (len(plan),), generator=generator).tolist()
    return [(*plan[i], seeds[i]) for i in torch.randperm(len(plan), generator=generator).tolist()]


def read_batch(sets, edge_dropout, rows, name, seed):
    """Crystals of one set as a batch; y (B,) and forces (A, 3) are normalised."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    dropout = 0.0 if sets[name].crystals.teacher else edge_dropout  # the teacher's features follow from all edges
    return {"task": name} | collate([sets[name].dataset[i] for i in rows], dropout, generator)


# ---------------------------------------------------------------- sets: energies, references, scales


@dataclass(eq=False)
class EnergySet:
    name: str
    crystals: Crystals  # y: (E - sum_z n_z r_z) / sigma; forces: / force_scale; teacher: mean 0, variance 1
    reference: np.ndarray  # (119,) r_z, eV
    sigma: float  # root mean square of the residual per atom, eV/atom
    force_scale: float  # root mean square of the components, eV/A; 0 without forces
    train: np.ndarray  # positions in crystals
    val: np.ndarray
    skipped: list  # [(id, reason)]
    force_weight: float = 1.0
    energy_weight: float = 1.0
    public: bool = False  # publicly known structures
    compounds: list = None  # prototypes of the training rows, where they are known
    dataset: GraphDataset = None


def load_sets(cfg, arch):
    """The sets of --sets and what --teacher labels, normalised, with their graphs: {name: EnergySet}."""
    names = words(cfg.sets)
    if not names and not cfg.teacher:
        raise UserError("nothing to learn from: give --teacher chgnet, or --sets with energies, or both")
    weights, sets, quiet = cfg.force_weight.split(","), {}, cfg.quiet or rank() > 0
    weights *= len(names) if len(weights) == 1 else 1
    if len(weights) != len(names) or not all(re.fullmatch(r"\s*\d+(\.\d*)?\s*", w) for w in weights):
        raise UserError(f"--force-weight {cfg.force_weight}: give one number, or one for each of {len(names)} sets")
    for text, weight in zip(names, weights, strict=True):
        task = find_task(text, cfg)
        if task.name in sets:
            raise UserError(f"--sets {cfg.sets}: {task.name} is named twice; give each set once")
        for _ in first_process_first():
            crystals = load_crystals(task, cfg.limit, cfg.on_error, quiet=quiet, cache_dir=cfg.cache)
            if shapes_only(with_force_branch(arch)).edge_width is None:
                crystals.forces = None  # a backbone without edge features learns from the energies alone
            s = normalise(task.name, crystals, cfg)
            s.dataset = GraphDataset(s.crystals, GraphConfig(**arch["graph"]), cfg.cache, quiet)
            s.force_weight, s.public = float(weight), is_public(task)
        sets[task.name] = s
    if cfg.teacher:
        if cfg.teacher_forces and shapes_only(with_force_branch(arch)).edge_width is None:
            raise UserError(f"--teacher-forces: {arch['backbone']} has no features of edges for forces; leave it out")
        for _ in first_process_first():
            sets[cfg.teacher] = s = taught_set(cfg, quiet)
            s.dataset = GraphDataset(s.crystals, GraphConfig(**arch["graph"]), cfg.cache, quiet)
    return sets


def words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def taught_set(cfg, quiet):
    """The crystals of --taught with --copies of each, labelled by the teacher; each compound once."""
    seen, kept, compound, alone, skipped, tasks = left_out(cfg), {}, {}, [], [], []
    for text in words(cfg.taught):
        task = find_task(text, cfg)
        crystals = load_crystals(replace(task, forces_column=""), cfg.limit, cfg.on_error, False, quiet, cfg.cache)
        tasks.append(task)
        skipped += [(f"{task.name}: {i}", why) for i, why in crystals.skipped]
        for i, key in enumerate(prototypes(crystals, cfg.cache, quiet)):
            name, structure = f"{task.name}: {crystals.ids[i]}", (crystals.Z[i], crystals.pos[i], crystals.cell[i])
            alone += [structure] * (len(set(structure[0])) == 1)
            if key in seen:
                skipped.append((name, f"occurs before: in {seen[key]}"))
            else:
                seen[key] = task.name
                kept[name], compound[name] = structure, key
    if not kept:
        why = count_reasons(why for _, why in skipped) or "there is none"
        raise UserError(f"--taught {cfg.taught}: no crystal is left ({why}); name other tables, or --leave-out none")
    copies = [(f"{name}, copy {k}", distorted(*s, k)) for k in range(1, cfg.copies + 1) for name, s in kept.items()]
    group = np.tile(np.arange(len(kept)), 1 + cfg.copies)  # a crystal and its copies
    ids, structures = zip(*kept.items(), *copies, strict=True)
    Z, pos, cell = map(list, zip(*structures, strict=True))
    licenses = {part for t in tasks for part in t.license.split("; ")} | {TEACHERS[cfg.teacher].license}
    about = Task(cfg.teacher, ", ".join(t.name for t in tasks), "energy", unit="eV",
                 pooling="sum", license="; ".join(sorted(licenses - {""})))  # fmt: skip
    crystals = Crystals(about, list(ids), Z, pos, cell, np.array([np.any(c) for c in cell]), np.zeros(len(ids)),
                        np.arange(len(ids)), skipped=skipped)  # fmt: skip
    labels = teach(cfg.teacher, crystals, cfg.cache, cfg.num_workers, quiet, forces=cfg.teacher_forces > 0)
    good = np.array([not isinstance(x, str) for x in labels])
    skipped += [(ids[i], labels[i]) for i in np.flatnonzero(~good)]
    if not good.any():
        why = count_reasons(x for x in labels if isinstance(x, str))
        raise UserError(f"--taught {cfg.taught}: {cfg.teacher} can label none of {len(ids)} crystals ({why})")
    energy, features, *forces = map(list, zip(*(labels[i] for i in np.flatnonzero(good)), strict=True))
    crystals = replace(subset(crystals, np.flatnonzero(good)), y=np.array(energy), teacher=features, fingerprint="")
    crystals.forces = forces[0] if forces else None
    say(cfg, f"  {cfg.teacher}: {len(kept)} compounds, {len(crystals)} crystals with copies; {len(skipped)} left out")
    s = normalise(cfg.teacher, crystals, cfg, group[good], energies_of_elements(cfg, alone, quiet))
    s.energy_weight, s.force_weight, s.public = cfg.energy_weight, cfg.teacher_forces, all(map(is_public, tasks))
    s.compounds = [compound[s.crystals.ids[i].split(", copy ")[0]] for i in s.train]
    return s


def energies_of_elements(cfg, structures, quiet):
    """{Z: the teacher's lowest energy per atom, eV} of crystals of one element, left out of training or not."""
    Z, pos, cell = zip(*structures) if structures else ([], [], [])
    labels, lowest = teach(cfg.teacher, SimpleNamespace(Z=Z, pos=pos, cell=cell), cfg.cache, 0, quiet), {}
    for z, label in zip(Z, labels, strict=True):
        if not isinstance(label, str):
            lowest[int(z[0])] = min(label[0] / len(z), lowest.get(int(z[0]), math.inf))
    return lowest


def left_out(cfg):
    """{prototype: task} of the crystals of --leave-out; tasks whose data are not here are named."""
    names, found, missing = words(cfg.leave_out), {}, []
    if names == ["downstream"]:
        names = dict.fromkeys(n for file in ("", cfg.tasks) for n in task_names("downstream", file, cfg.data))
    for name in () if names == ["none"] else names:
        try:
            crystals = load_crystals(get_task(name, cfg.tasks, cfg.data), quiet=True, cache_dir=cfg.cache)
        except UserError:  # not here, or without structures, as matminer's two experimental tables
            missing.append(name)
            continue
        found |= dict.fromkeys(prototypes(crystals, cfg.cache, True), name)
    if missing:
        say(cfg, f"  not left out, for their structures are not here: {', '.join(missing)}")
    return found


def find_task(text, cfg):
    """The task of a name or a file. Embedded force fields and extxyz files that have them keep forces in `forces`."""
    if "/" not in text and "." not in text:
        task = get_task(text, cfg.tasks, cfg.data)
        embedded = task.dataset.startswith("demo:") and task.role == "pretrain"
        return replace(task, forces_column="forces") if embedded else task
    forces = ""
    if text.endswith(".extxyz") and Path(text).exists():
        with open(text) as f:
            first = f.readline() + f.readline()  # of the first frame: number of atoms, comment
        forces = "forces" if "forces:R:3" in first else ""
    return get_task(re.sub(r"\W", "_", Path(text).stem), cfg.tasks, text, unit="eV", forces_column=forces)


def normalise(name, crystals, cfg, group=None, elements=None):
    """Leave out outliers and split; references and scales come from the training rows alone.

    group (M,): rows of one number are in one part. elements: {Z: eV}, references that are known.

    sigma is the root mean square of the residual PER ATOM, and the loss divides by N. JMP divides totals by the standard
    deviation of totals, fine for molecules of one size. With cells of 1 to 100 atoms that (and a square root of N, too)
    would let the size of the cell decide how much a structure counts: a supercell more than its cell.
    """
    energy, N = total_energies(name, crystals), np.array([len(z) for z in crystals.Z])
    group, skipped = np.arange(len(N)) if group is None else group, list(crystals.skipped)
    numbers = 1 + max(group, default=-1)
    order = np.random.RandomState(cfg.split_seed).permutation(numbers)
    is_val, keep = np.isin(group, order[: max(1, round(cfg.val_fraction * numbers))]), np.ones(len(N), dtype=bool)
    if crystals.forces is not None:
        keep = np.array([np.linalg.norm(f, axis=1).max() for f in crystals.forces]) <= cfg.max_force
        why = f"force above {cfg.max_force:g} eV/A (--max-force)"
        skipped += [(crystals.ids[i], why) for i in np.flatnonzero(~keep)]
    if keep.any():
        _, residual = reference_residuals(crystals, energy, np.flatnonzero(keep), elements)
        off = np.abs(residual - np.median(residual[keep]))
        far = keep & (off > cfg.max_energy * (np.quantile(off[keep], 0.9) / 1.645 + 1e-3))  # 1.645: for a Gaussian
        why = f"energy beyond {cfg.max_energy:g} spreads (--max-energy)"
        skipped += [(crystals.ids[i], why) for i in np.flatnonzero(far)]
        keep &= ~far
    train = np.flatnonzero(keep & ~is_val)
    if len(train) < 2 or not (keep & is_val).any():
        raise UserError(f"--sets {name}: {keep.sum()} usable rows are too few; raise --limit or --val-fraction")
    r, residual = reference_residuals(crystals, energy, train, elements)
    sigma, scale, forces = math.sqrt(np.mean(residual[train] ** 2)) + 1e-6, 0.0, None
    if crystals.forces is not None:
        scale = math.sqrt(np.mean(np.concatenate([crystals.forces[i] for i in train]) ** 2)) + 1e-6
        forces = [f / scale for f, k in zip(crystals.forces, keep, strict=True) if k]
    teacher = None
    if crystals.teacher is not None:
        known = np.concatenate([crystals.teacher[i] for i in train]).astype(np.float32)
        mean, std = known.mean(axis=0), known.std(axis=0) + 1e-6
        teacher = [((x - mean) / std).astype(np.float16) for x, k in zip(crystals.teacher, keep, strict=True) if k]
    if len(skipped) > len(crystals.skipped):
        reasons = count_reasons([why for _, why in skipped[len(crystals.skipped) :]])
        say(cfg, f"  {name}: {keep.sum()} rows used; left out: {reasons}")
    train, val = np.flatnonzero(~is_val[keep]), np.flatnonzero(is_val[keep])
    normalised = replace(subset(crystals, np.flatnonzero(keep)), y=(N * residual)[keep] / sigma, forces=forces)
    normalised.teacher = teacher
    return EnergySet(name, normalised, r, sigma, scale, train, val, skipped)


def total_energies(name, crystals):
    """Labels -> total energies (M,) in eV; labels per atom are first multiplied by the number of atoms."""
    task = crystals.task
    factor = EV.get(task.unit.removesuffix("/atom").removesuffix("/cell"))
    if factor is None or task.transform != "none":
        known = ", ".join(EV)
        found = unit_of(task) or "no unit"
        raise UserError(f"--sets {name}: label in {found}, but pre-training needs energies ({known}, or /atom)")
    return crystals.y * factor * ([len(z) for z in crystals.Z] if task.unit.endswith("/atom") else 1)


def reference_residuals(crystals, energy, rows, elements=None):
    """References and what they leave over in all rows, per atom: (119,) eV and (M,) eV/atom.

    They are fitted on `rows`; those of `elements` are known, and then all are shifted by the median of the residual.
    """
    r = fit_references([crystals.Z[i] for i in rows], energy[rows])
    for z, e in (elements or {}).items():
        r[z] = e
    residual = np.array([(e - r[z].sum()) / len(z) for e, z in zip(energy, crystals.Z, strict=True)])
    shift = np.median(residual[rows]) if elements else 0.0
    return r + shift, residual - shift


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


if __name__ == "__main__":
    main(run, Config, __doc__)
