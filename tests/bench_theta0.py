"""What composition starts from: kNN errors of starting points theta_0 (or of any modules) on training rows.

    python tests/bench_theta0.py hub other_hub hub/mp_gvrh

Leave-one-out kNN error (K = 5, temperature 0.2) on the training rows of the published splits, mean squared error over
variance of the label, mean over the seeds. A hub stands for its backbone.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import hub
from compose import knn_estimate
from crystals import load_crystals
from data import GraphConfig, GraphDataset, to_device
from stage import CommonConfig
from tasks import get_task
from train_module import loader, plan_batches, read_graphs

TASKS = "jarvis_2d_eform,mp_phonons,mp_eps_total"  # and, where MATMINER_DATA has it, expt_bandgap


@torch.no_grad()
def embed(backbone, adapters, dataset):
    """(M, C): the mean over the atoms of every crystal."""
    X, cfg = np.empty((len(dataset), backbone.width), np.float32), CommonConfig()
    rows = range(len(dataset))
    for batch in loader(partial(read_graphs, dataset), plan_batches(dataset.num_atoms, rows, cfg), cfg):
        X[batch["index"].numpy()] = backbone.embed(to_device(batch, "cpu"), adapters).numpy()
    return X


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="PLACE", help="a hub, or a module of one")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--table", default="", help="JSON file with more tasks")
    parser.add_argument("--splits", default=ROOT / "datasets/splits")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    print("| theta_0 | " + " | ".join(tasks) + " |\n|" + "---|" * (1 + len(tasks)))
    for place in map(Path, args.places):
        folder = place if (place / "module.json").exists() else place / hub.BACKBONE
        module, cells = hub.load_module(folder, hub=folder.parent), []
        for name in tasks:
            crystals = load_crystals(get_task(name, args.table), quiet=True)
            dataset = GraphDataset(crystals, GraphConfig(**module.card["architecture"]["graph"]), quiet=True)
            X, errors = embed(module.backbone.eval(), module.adapters, dataset), []
            at = {int(row): i for i, row in enumerate(crystals.row)}
            for seed in range(args.seeds):
                split = json.loads(Path(args.splits, name, f"seed{seed}.json").read_text())
                rows = [at[row] for row in split["train"] if row in at]
                y = crystals.y[rows]
                errors.append(((knn_estimate(X[rows], y) - y) ** 2).mean() / y.var())
            cells.append(f"{np.mean(errors):.3f}")
        print(f"| {place} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
