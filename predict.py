"""Predict a property of crystals with a fine-tuned model, or with a module of a hub (which keeps its own head).

    python predict.py --model runs/dielectric my_crystals/ more.cif

Inputs: folders of CIF, POSCAR or JSON files, single files, tables (json.gz), extxyz; no label is needed. Writes a CSV
of id and prediction in the physical unit, with skipped.csv and the settings beside it. Exit code 1: something could not
be predicted.
"""

import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

import data
import hub
import model as moma
import train_module as tm
from crystals import SYMBOLS, load_crystals
from files import csv_text, write_skipped, write_text
from stage import main, pick_device, say
from tasks import Task, inverse


@dataclass
class Config:
    inputs: list = field(default_factory=list)  # folders, structure files, tables, extxyz
    model: str = ""  # folder of a fine-tuned run, or of a module in a hub
    output: str = "predictions.csv"  # skipped.csv is written beside it
    structure_column: str = ""  # of a table
    id_column: str = ""
    batch_size: int = 64
    max_atoms: int = 2000  # never more atoms in a batch; 0: no limit
    bf16: bool = False  # autocast: faster where layers are wide, about two digits (README, Speed)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = 0  # processes that load batches
    config: str = ""  # JSON file with settings
    quiet: bool = False


def predict(model, card, crystals, cfg, cache):
    """(M,) predictions in the physical unit, in the order of crystals."""
    graph = data.GraphConfig(**card["architecture"]["graph"])
    dataset = data.GraphDataset(crystals, graph, cache_dir=cache, quiet=cfg.quiet)
    order = np.argsort(dataset.num_atoms, kind="stable")  # crystals of one size together
    mean, std = card["normalizer_mean"], card["normalizer_std"]
    index, _, y = tm.predict_batches(model, tm.loader(dataset, order, cfg), mean, std, cfg)
    return inverse(task_of(card), y[np.argsort(index)])


def load_model(path):
    """The model in a run folder, or the module and head in a hub folder, and its card."""
    path = Path(path)
    if not (path / "module.json").exists():
        raise FileNotFoundError(f"--model {path}: no model there; give the folder of a finished run or of a module")
    card = hub.read_card(path)
    run = "model.safetensors" in card["files_sha256"]
    if not run and "head.safetensors" not in card["files_sha256"]:
        raise ValueError(f"--model {path}: has no head; fine-tune it first: python finetune.py --init {path}")
    if run or card["kind"] == "full":
        backbone, base = moma.build_backbone(card["architecture"]), None
    else:
        backbone, base = tm.load_backbone(path.parent)
        if base["tensors_sha256"] != card["backbone_sha256"]:
            raise ValueError(f"{path}: its adapters belong to another backbone than {path.parent / 'backbone'}")
    adapters = moma.new_adapters(card["architecture"]) if card["kind"] == "adapter" else None
    model = moma.PropertyModel(backbone, card["pooling"], adapters)
    if run:
        tm.load_tensors(model, hub.load_tensors(path, "model.safetensors"), path)
    else:
        tm.load_tensors(adapters or backbone, hub.load_tensors(path), path)
        tm.load_tensors(model.head, hub.load_tensors(path, "head.safetensors"), path)
    return model, card


def task_of(card, **fields):
    """The card's property as a task: unit and transform of its labels."""
    unit = card.get("physical_unit", card["unit"])
    return Task(card["property"], unit=unit, transform=card["transform"], pooling=card["pooling"], **fields)


def read(cfg, card, cache):
    """All inputs as one Crystals, and what could not be read: [(id, reason)]."""
    if not cfg.inputs:
        raise ValueError("no input: name folders or files of structures; see --help")
    for path in cfg.inputs:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    parts, skipped = [], []
    columns = {"structure_column": cfg.structure_column or "structure", "id_column": cfg.id_column}
    for path in cfg.inputs:
        try:
            task = task_of(card, dataset=path, **columns)
            parts.append(load_crystals(task, need_target=False, quiet=True, cache_dir=cache))
            skipped += parts[-1].skipped
        except ValueError as error:  # nothing in this input can be used; the others are predicted
            skipped.append((path, str(error)))
    if not parts:
        output = Path(cfg.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_skipped(output.with_name("skipped.csv"), skipped)
        raise ValueError(f"nothing could be read: {skipped[0][1]}")
    joined = {k: [x for p in parts for x in getattr(p, k)] for k in ("ids", "Z", "pos", "cell")}
    joined |= {k: np.concatenate([getattr(p, k) for p in parts]) for k in ("pbc", "y", "row")}
    return replace(parts[0], **joined, split=None, forces=None, skipped=skipped, fingerprint="", num_rows=0), skipped


def warn_unseen(crystals, card):
    """Name the crystals with elements that neither training nor fine-tuning has seen."""
    seen = set(card["elements"] or [])
    unseen = {i: sorted(set(Z.tolist()) - seen) for i, Z in zip(crystals.ids, crystals.Z) if set(Z.tolist()) - seen}
    if unseen:
        count = Counter(SYMBOLS[z] for elements in unseen.values() for z in elements)
        names = ", ".join(list(unseen)[:5]) + (", ..." if len(unseen) > 5 else "")
        which = ", ".join(f"{s} ({n})" for s, n in count.items())
        print(f"warning: {len(unseen)} of {len(crystals)} crystals have elements the model never saw: {which}; "
              f"do not trust {names}", file=sys.stderr)  # fmt: skip


def run(cfg):
    """Predict; returns {"rows", "skipped", "output", "exit_code"}."""
    if not cfg.model:
        raise ValueError("--model is missing: the folder of a fine-tuned run, such as runs/dielectric")
    model, card = load_model(cfg.model)
    model.to(pick_device(cfg.device))
    with tempfile.TemporaryDirectory() as cache:  # what is predicted leaves no copy behind
        crystals, skipped = read(cfg, card, cache)
        warn_unseen(crystals, card)
        y = predict(model, card, crystals, cfg, cache)
    output, unit = Path(cfg.output), task_of(card).unit
    output.parent.mkdir(parents=True, exist_ok=True)
    finite = np.isfinite(y)
    skipped += [(i, "the prediction is not finite") for i, good in zip(crystals.ids, finite) if not good]
    rows = [(i, value) for i, value, good in zip(crystals.ids, y.tolist(), finite) if good]
    write_text(output, csv_text(["id", f"prediction ({unit})" if unit else "prediction"], rows))
    write_skipped(output.with_name("skipped.csv"), skipped)
    settings = {k: v for k, v in asdict(cfg).items() if k != "inputs"}
    write_text(output.with_suffix(".config.json"), json.dumps(settings, indent=2) + "\n")
    say(cfg, f"{output}: {len(rows)} predictions of {card['property']}" + (f" in {unit}" if unit else ""))
    if skipped:
        where = output.with_name("skipped.csv")
        print(f"{where}: {len(skipped)} not predicted, the first {skipped[0][0]}: {skipped[0][1]}", file=sys.stderr)
    return {"rows": len(rows), "skipped": len(skipped), "output": str(output), "exit_code": int(bool(skipped))}


if __name__ == "__main__":
    main(run, Config, __doc__)
