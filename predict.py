"""Predict a property of crystals with fine-tuned models, or with a module of a hub (which keeps its own head).

    python predict.py --model runs/dielectric my_crystals/ more.cif

Inputs: folders of CIF, POSCAR or JSON files, single files, tables (json.gz), extxyz; no label is needed. Several --model
make an ensemble: its mean, and its standard deviation as the column spread. Writes a folder: predictions.csv in the
physical unit, skipped.csv, config.json. Exit code 1: something could not be predicted.
"""

import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from files import (VERSION, MissingError, UserError, csv_text, output_path, recover, whole_folder, write_json, write_skipped,
                   write_text)
from stage import CommonConfig, check_settings, main, pick_device, stage_of, written_by

import numpy as np

import hub
from card import physical_unit
from crystals import SYMBOLS, Crystals, NoneUsable, from_structures, load_crystals, unique
from data import GraphConfig, GraphDataset
from model import PropertyModel
from tasks import Task, inverse
from train_module import loader, plan_batches, predict_batches, read_graphs


@dataclass
class Config(CommonConfig):
    inputs: list = field(default_factory=list)  # folders, structure files, tables, extxyz
    model: tuple = ()  # folder of a fine-tuned run, or of a module in a hub
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
    y[place] = predict_all(loaded, crystals, Config(quiet=True, **settings)).mean(axis=0)
    return y


def load_models(folders):
    """[(model, card)] of fine-tuned runs or modules that predict the same property in the same unit."""
    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    if not folders:
        raise UserError("--model is missing: the folder of a fine-tuned run, such as runs/dielectric")
    found = []
    for path in map(Path, folders):
        recover(path)
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
    """(number of models, M) predictions in the physical unit, in the order of crystals."""
    check_settings(cfg)
    device, found = pick_device(cfg.device), []
    with tempfile.TemporaryDirectory() as cache:  # what is predicted leaves no copy behind
        for model, card in models:
            graph = GraphConfig(**card["architecture"]["graph"])
            dataset = GraphDataset(crystals, graph, cache_dir=cache, quiet=cfg.quiet)
            plan = plan_batches(dataset.num_atoms, np.arange(len(crystals)), cfg)
            batches = loader(partial(read_graphs, dataset), plan, cfg)
            mean, std = card["normalizer_mean"], card["normalizer_std"]
            _, _, y = predict_batches(model.to(device), batches, mean, std, cfg)
            found.append(inverse(task_of(card), y))
    return np.stack(found)


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


def warn_unseen(crystals, cards):
    """Name the crystals with elements that neither training nor fine-tuning has seen."""
    seen = set.intersection(*(set(card["elements"] or []) for card in cards))
    unseen = {i: sorted(set(Z.tolist()) - seen) for i, Z in zip(crystals.ids, crystals.Z)}
    if unseen := {i: elements for i, elements in unseen.items() if elements}:
        count = Counter(SYMBOLS[z] for elements in unseen.values() for z in elements)
        names = ", ".join(list(unseen)[:5]) + (", ..." if len(unseen) > 5 else "")
        which = ", ".join(f"{s} ({n})" for s, n in count.items())
        print(f"warning: {len(unseen)} of {len(crystals)} crystals have elements the model never saw: {which}; "
              f"do not trust {names}", file=sys.stderr)  # fmt: skip


WRITES = {"predictions.csv", "skipped.csv", "config.json"}


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
    with tempfile.TemporaryDirectory() as cache:
        crystals, skipped = read_inputs(cfg, card, cache)
    warn_unseen(crystals, [card for _, card in models])
    found = predict_all(models, crystals, cfg)
    y, spread, unit = found.mean(axis=0), found.std(axis=0), physical_unit(card)
    finite = np.isfinite(y)
    skipped += [(i, "the prediction is not finite") for i, good in zip(crystals.ids, finite) if not good]
    columns = ["prediction", "spread"][: min(len(models), 2)]
    head = ["id", *(f"{c} ({unit})" if unit else c for c in columns)]
    values = zip(crystals.ids, y.tolist(), spread.tolist(), finite)
    rows = [row[: len(head)] for *row, good in values if good]
    check_output(output)  # again: it may have changed meanwhile
    with whole_folder(output, replace=True) as part:
        write_text(part / "predictions.csv", csv_text(head, rows))
        write_skipped(part / "skipped.csv", skipped)
        write_json(part / "config.json", {"stage": stage_of(cfg), "version": VERSION, **asdict(cfg)})
    of = card["property"] + (f" in {unit}" if unit else "")
    print(f"{output}/predictions.csv: {len(rows)} predictions of {of}")
    lost = sum(not reason.startswith("file kind") for _, reason in skipped)  # a README among CIF files is no loss
    if skipped:
        first = f"{skipped[0][0]}: {skipped[0][1]}"
        print(f"{output}/skipped.csv: {len(skipped)} not predicted, the first {first}", file=sys.stderr)
    return {"rows": len(rows), "skipped": len(skipped), "output": str(output), "exit_code": int(lost > 0)}


if __name__ == "__main__":
    main(run, Config, __doc__)
