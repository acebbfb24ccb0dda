"""Predict a property of crystals with fine-tuned models, or with a module of a hub (which keeps its own head).

    python predict.py --model runs/dielectric my_crystals/ more.cif

Inputs: folders of CIF, POSCAR or JSON files, single files, tables (json.gz), extxyz; no label is needed. A run of
folds, or several --model, make an ensemble: its mean, and its standard deviation as the column spread. Writes a folder:
predictions.csv in the physical unit, skipped.csv, config.json. Exit code 1: something could not be predicted.

lower, upper: with 90 % probability the true value lies between, for crystals like those trained on (conformal.py; of
one run). neighbour_distance: how far the nearest training crystal is in the model's eyes, as a percentile of how far
training crystals are from each other; 100: farther than all of those. unseen_elements: do not trust the row.
--next N ranks the crystals to label next (next.csv): where the models of the folds disagree, and far from what is
labelled or already picked. Meant for the worst errors; not shown to beat as many crystals at random.

M: crystals. C: channels. K: models.
"""

import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from files import (VERSION, MissingError, UserError, csv_text, output_path, read_json, recover, whole_folder,
                   write_json, write_skipped, write_text)  # fmt: skip
from stage import CommonConfig, Whole, check_settings, main, pick_device, stage_of, written_by

import numpy as np

import hub
from card import physical_unit
from conformal import CALIBRATION, NEIGHBOURS, difficulty, distance, interval, percentile, read_neighbours
from crystals import SYMBOLS, Crystals, NoneUsable, from_structures, load_crystals, subset, unique
from data import GraphConfig, GraphDataset
from evaluate import FOLDED
from model import PropertyModel
from tasks import Task, inverse, transform, unit_of
from train_module import loader, plan_batches, predict_batches, read_graphs


@dataclass
class Config(CommonConfig):
    inputs: list = field(default_factory=list)  # folders, structure files, tables, extxyz
    model: tuple = ()  # folder of a fine-tuned run, or of a module in a hub
    next: Whole = 0  # rank so many crystals to label next, in next.csv
    save_embeddings: bool = False  # embeddings.npz: ids and representations (M, C), for your plots
    output: str = "runs/predictions"  # a folder; one that predict.py wrote is replaced
    structure_column: str = ""  # of a table
    id_column: str = ""
    bf16: bool = False  # autocast: faster where layers are wide, about two digits


def predict(models, structures, **settings):
    """Predictions (M,) in the physical unit of `models`, the folder of a run or module, or a list of them (the mean).

    structures: a list of pymatgen Structures, ASE Atoms or dictionaries, or data.Crystals. NaN where a structure cannot
    be used; `from_structures(structures).skipped` says why. settings: fields of Config, such as device="cuda".
    """
    loaded, given = load_models(models), isinstance(structures, Crystals)
    structures = structures if given else list(structures)
    y = np.full(len(structures), np.nan)
    try:
        crystals = structures if given else from_structures(structures)
    except NoneUsable:
        return y
    place = np.arange(len(y)) if given else crystals.row
    y[place] = physical(loaded, predict_all(loaded, crystals, Config(quiet=True, **settings))[0]).mean(axis=0)
    return y


def model_folders(folders):
    """The folder of every model: of a run of folds, those of its folds."""
    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    if not folders:
        raise UserError("--model is missing: the folder of a fine-tuned run, such as runs/dielectric")
    found = []
    for path in map(Path, folders):
        recover(path)
        folded = (path / FOLDED).exists()
        found += sorted(path.glob("fold[0-9]*"), key=lambda p: int(p.name[4:])) if folded else [path]
    return found


def load_models(folders):
    """[(model, card)] of fine-tuned runs or modules that predict the same property in the same unit."""
    found = []
    for path in (folders := model_folders(folders)):
        if not (path / "module.json").exists():
            raise MissingError(f"--model {path}: no model there; give the folder of a finished run or of a module")
        module = hub.load_module(path)
        if module.head is None:
            raise UserError(f"--model {path}: has no head; fine-tune it first: python finetune.py --init {path}")
        model = PropertyModel(module.backbone, module.card["pooling"], module.adapters)
        model.head = module.head
        found.append((model.eval(), module.card))
        for what, of in (("property", lambda card: card["property"]), ("unit", physical_unit)):
            if of(module.card) != of(found[0][1]):
                what = f"{what} {of(module.card)!r}, not {of(found[0][1])!r} as {folders[0]}"
                raise UserError(f"--model {path}: predicts {what}; an ensemble is of one property")
    return found


def predict_all(models, crystals, cfg):
    """Predictions (K, M), each in the unit of its model's labels, and representations, K times (M, C)."""
    check_settings(cfg)
    device, found = pick_device(cfg.device), []
    with tempfile.TemporaryDirectory() as cache:  # what is predicted leaves no copy behind
        for model, card in models:
            graph = GraphConfig(**card["architecture"]["graph"])
            dataset = GraphDataset(crystals, graph, cache_dir=cache, quiet=cfg.quiet)
            plan = plan_batches(dataset.num_atoms, np.arange(len(crystals)), cfg)
            batches = loader(partial(read_graphs, dataset), plan, cfg)
            mean, std = card["normalizer_mean"], card["normalizer_std"]
            found.append(predict_batches(model.to(device), batches, mean, std, cfg, embed=True)[2:])
    y, X = zip(*found, strict=True)
    return np.stack(y), X


def physical(models, y):
    """(K, M) predictions in the physical unit."""
    return np.stack([inverse(task_of(card), values) for (_, card), values in zip(models, y, strict=True)])


def task_of(card, **fields):
    """The card's property as a task: unit and transform of its labels."""
    label = {"unit": physical_unit(card), "transform": card["transform"], "pooling": card["pooling"]}
    return Task(card["property"], **label, **fields)


def read_inputs(cfg, card, cache):
    """All inputs as one data.Crystals, and what could not be read: [(id, reason)]. Ids that two inputs share get their
    input's path in front."""
    if not cfg.inputs:
        raise UserError("no input: name folders or files of structures; see --help")
    for path in cfg.inputs:
        if not Path(path).exists():
            raise MissingError(f"{path}: no such file or folder")
    parts, skipped = [], []
    columns = {"structure_column": cfg.structure_column or "structure", "id_column": cfg.id_column}
    for path in cfg.inputs:
        try:
            task = task_of(card, dataset=path, **columns)
            crystals = load_crystals(task, need_target=False, quiet=True, cache_dir=cache)
            parts.append((path, crystals))
            skipped += [(path, *row) for row in crystals.skipped]
        except UserError as error:  # nothing in this input can be used; the others are predicted
            skipped.append((path, Path(path).stem, str(error)))
    count = Counter(i for path, c in parts for i in c.ids) + Counter(i for _, i, _ in skipped)

    def name(path, i):
        if max(count.values()) == 1:
            return i
        return f"{path}/{i}" if Path(path).is_dir() else path

    skipped = [(name(path, i), reason) for path, i, reason in skipped]
    if not parts:
        raise UserError(f"nothing could be read: {skipped[0][0]}: {skipped[0][1]}")
    joined = {k: [x for _, c in parts for x in getattr(c, k)] for k in ("Z", "pos", "cell")}
    joined |= {k: np.concatenate([getattr(c, k) for _, c in parts]) for k in ("pbc", "y", "row")}
    joined["ids"] = unique([name(path, i) for path, c in parts for i in c.ids])
    first = parts[0][1]
    return replace(first, **joined, split=None, forces=None, skipped=skipped, fingerprint="", num_rows=0), skipped


def unseen_elements(crystals, cards):
    """Of every crystal, the elements that no model has seen, in training or fine-tuning."""
    seen = set.union(*(set(card["elements"] or []) for card in cards))
    return [sorted(set(Z.tolist()) - seen) for Z in crystals.Z]


def warn_unseen(crystals, cards):
    """Name the crystals with such elements."""
    unseen = dict(zip(crystals.ids, unseen_elements(crystals, cards), strict=True))
    if unseen := {i: elements for i, elements in unseen.items() if elements}:
        count = Counter(SYMBOLS[z] for elements in unseen.values() for z in elements)
        names = ", ".join(list(unseen)[:5]) + (", ..." if len(unseen) > 5 else "")
        which = ", ".join(f"{s} ({n})" for s, n in count.items())
        print(f"warning: {len(unseen)} of {len(crystals)} crystals have elements the model never saw: {which}; "
              f"do not trust {names}", file=sys.stderr)  # fmt: skip


def trust(cfg, folders, models, y_hat, X):
    """{column: (M,)} of how far to trust the predictions, and each crystal's distance (M,) to the training rows; both
    empty where a model does not say. y_hat: (M,) the ensemble's predictions in the physical unit."""
    known = [read_neighbours(path) for path in folders]
    if missing := [path for path, k in zip(folders, known, strict=True) if k is None]:
        which = f"{missing[0]} holds no {NEIGHBOURS} (a module of a hub, or fine-tuned by an earlier release)"
        if cfg.next:
            raise UserError(f"--next: {which}; fine-tune again")
        print(f"no intervals and no neighbour distances: {which}", file=sys.stderr)
        return {}, None
    d = [distance(x, k) for x, k in zip(X, known, strict=True)]
    columns = {"neighbour_distance": np.mean([percentile(*pair) for pair in zip(d, known, strict=True)], axis=0)}
    if len(cfg.model) > 1:
        print("no intervals: they are calibrated for one run, and several --model were given", file=sys.stderr)
        return columns, np.mean(d, axis=0)
    stored = read_calibration(Path(cfg.model[0]))
    if stored["q"] is None:
        why = f"{cfg.model[0]} has only {stored['rows']} held-out rows for them"
        print(f"no intervals: {why}; fine-tune with --folds", file=sys.stderr)
        return columns, np.mean(d, axis=0)
    task, sigma = task_of(models[0][1]), difficulty(np.mean(d, axis=0))
    lower, upper = interval(task, transform(task, y_hat), sigma, stored["q"])
    return {"lower": lower, "upper": upper, **columns}, np.mean(d, axis=0)


def read_calibration(path):
    """{"q": number or None, "rows"} of a run, after comparing its hash."""
    if (path / FOLDED).exists():
        sums = read_json(path / FOLDED, "what a run of folds was made from")["files_sha256"]
        if hub.sha256(path / CALIBRATION) != sums[CALIBRATION]:
            raise UserError(f"{path / CALIBRATION}: damaged or changed; fine-tune again")
    else:
        hub.checked_file(path, CALIBRATION)
    return read_json(path / CALIBRATION, "the calibration of a run")


def next_to_label(X, d, spread, N):
    """N crystals whose labels would teach the model most, greedily: [(position, distance)].

    X: (M, C), in units in which d (M,) is the distance to the nearest labelled crystal. spread: (M,) disagreement of
    the models, or None. Each pick has the largest distance to what is labelled or picked, times spread; so crystals
    that resemble each other are not picked together.
    """
    d, picks = d.copy(), []
    weight = np.ones(len(d)) if spread is None else spread
    for _ in range(min(N, len(d))):
        score = d * weight
        score[[i for i, _ in picks]] = -np.inf
        i = int(np.argmax(score))
        picks.append((i, float(d[i])))
        d = np.minimum(d, np.linalg.norm(X - X[i], axis=1))
    return picks


def next_csv(cfg, card, crystals, folders, X, d, y):
    """next.csv. card: of one of the models. y: (K, M) predictions in the unit of the labels, as spread is."""
    scale = [max(read_neighbours(path)["usual"].mean(dtype=float), 1e-12) for path in folders]
    Z = np.hstack([x / s for x, s in zip(X, scale, strict=True)]) / len(X) ** 0.5
    spread = y.std(axis=0) if len(y) > 1 else None
    unit, rows = unit_of(task_of(card)), []
    for rank, (i, far) in enumerate(next_to_label(Z, d, spread, cfg.next), start=1):
        why = f"{far:.2g} x as far from labelled and picked crystals as training crystals from each other"
        if spread is not None:
            why = f"models disagree {spread[i] / max(spread.mean(), 1e-300):.2g} x the mean; {why}"
        rows.append([rank, crystals.ids[i], "" if spread is None else float(spread[i]), far, why])
    head = ["rank", "id", f"spread ({unit})" if unit else "spread", "distance", "why"]
    return csv_text(head, rows)


WRITES = {"predictions.csv", "skipped.csv", "config.json", "next.csv", "embeddings.npz"}


def check_output(output):
    """Only a folder that is new, empty, or holds what predict.py has written and nothing else is replaced."""
    if output.is_symlink() or output.exists() and not output.is_dir() or output.suffix == ".csv":
        raise UserError(f"--output {output}: should be a folder, which gets predictions.csv; name one")
    inside = {p.name for p in output.iterdir()} if output.exists() else set()
    foreign = sorted(inside if written_by(output) != "predict" else inside - WRITES)
    if foreign:
        raise UserError(f"--output {output}: holds {foreign[0]}, which predict.py has not written; name another folder")


def run(cfg):
    """Predict; returns {"rows", "skipped", "output", "exit_code"}."""
    check_settings(cfg)
    output = output_path(cfg.output or "runs/predictions")
    check_output(output)
    models = load_models(cfg.model)
    card = models[0][1]
    if cfg.next and len({unit_of(task_of(card)) for _, card in models}) > 1:
        raise UserError("--next: some of the models learnt logarithms and some did not; give models of one transform")
    with tempfile.TemporaryDirectory() as cache:
        crystals, skipped = read_inputs(cfg, card, cache)
    warn_unseen(crystals, [card for _, card in models])
    labels, X = predict_all(models, crystals, cfg)
    finite = np.isfinite(physical(models, labels)).all(axis=0)
    skipped += [(i, "the prediction is not finite") for i, good in zip(crystals.ids, finite) if not good]
    if not finite.any():
        raise UserError(f"none of the predictions of {', '.join(map(str, cfg.model))} is finite; train it again")
    crystals, labels, X = subset(crystals, np.flatnonzero(finite)), labels[:, finite], [x[finite] for x in X]
    found, folders, unit = physical(models, labels), model_folders(cfg.model), physical_unit(card)
    y = found.mean(axis=0)
    ends, d = trust(cfg, folders, models, y, X)
    columns = {"prediction": y, **{k: ends.pop(k) for k in ("lower", "upper") if k in ends}}
    columns |= {"spread": found.std(axis=0)} if len(models) > 1 else {}
    head = ["id", *(f"{c} ({unit})" if unit else c for c in columns), *ends, "unseen_elements"]
    unseen = [" ".join(SYMBOLS[z] for z in Z) for Z in unseen_elements(crystals, [card for _, card in models])]
    rows = list(zip(crystals.ids, *(x.tolist() for x in (columns | ends).values()), unseen, strict=True))
    check_output(output)  # again: it may have changed meanwhile
    with whole_folder(output, replace=True) as part:
        write_text(part / "predictions.csv", csv_text(head, rows))
        write_skipped(part / "skipped.csv", skipped)
        if cfg.next:
            write_text(part / "next.csv", next_csv(cfg, card, crystals, folders, X, d, labels))
        if cfg.save_embeddings:
            names = ["X"] if len(X) == 1 else [f"X_{k}" for k in range(len(X))]
            np.savez(part / "embeddings.npz", ids=np.array(crystals.ids), **dict(zip(names, X, strict=True)))
        write_json(part / "config.json", {"stage": stage_of(cfg), "version": VERSION, **asdict(cfg)})
    if cfg.next:
        print(f"{output}/next.csv: {min(cfg.next, len(crystals))} crystals to label next")
    of = card["property"] + (f" in {unit}" if unit else "")
    print(f"{output}/predictions.csv: {len(rows)} predictions of {of}")
    lost = sum(not reason.startswith("file kind") for _, reason in skipped)  # a README among CIF files is no loss
    if skipped:
        first = f"{skipped[0][0]}: {skipped[0][1]}"
        print(f"{output}/skipped.csv: {len(skipped)} not predicted, the first {first}", file=sys.stderr)
    return {"rows": len(rows), "skipped": len(skipped), "output": str(output), "exit_code": int(lost > 0)}


if __name__ == "__main__":
    main(run, Config, __doc__)
