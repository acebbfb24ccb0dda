"""What composition starts from: kNN errors of starting points theta_0 (or of any modules) on training rows.

    python tests/bench_theta0.py hub other_hub hub/mp_gvrh

Leave-one-out kNN error (K = 5, temperature 0.2) on the training rows of the published splits, mean squared error over
variance of the label, mean over the seeds. A hub stands for its backbone.

--whiten P: also of (X - mean) covariance^(-P/2), mean and covariance of the task's own crystals, or of --statistics.
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


def whiten(X, of, p):
    """(X - mean) covariance^(-p/2), mean and covariance of the representations `of`; axes of noise stay small."""
    mean, (variance, axes) = of.mean(axis=0), np.linalg.eigh(np.cov(of.T, dtype=np.float64))
    deviation = np.sqrt(np.maximum(variance, 0))
    return (X - mean) @ (axes * (deviation + 1e-3 * deviation[-1]) ** -p @ axes.T)


def load(name, args, arch, limit=0):
    crystals = load_crystals(get_task(name, args.table), limit, quiet=True)
    return crystals, GraphDataset(crystals, GraphConfig(**arch["graph"]), quiet=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="PLACE", help="a hub, or a module of one")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--table", default="", help="JSON file with more tasks")
    parser.add_argument("--splits", default=ROOT / "datasets/splits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--whiten", type=float, nargs="*", default=[], metavar="P", help="0: only less the mean")
    parser.add_argument("--statistics", default="", help="tasks a,b,c: 700 crystals of each")
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    print("| theta_0 | " + " | ".join(tasks) + " |\n|" + "---|" * (1 + len(tasks)))
    for place in map(Path, args.places):
        folder = place if (place / "module.json").exists() else place / hub.BACKBONE
        module, cells = hub.load_module(folder, hub=folder.parent), {p: [] for p in (None, *args.whiten)}
        arch, embed_all = module.card["architecture"], partial(embed, module.backbone.eval(), module.adapters)
        others = [embed_all(load(name, args, arch, 700)[1]) for name in args.statistics.split(",") if name]
        for name in tasks:
            crystals, dataset = load(name, args, arch)
            X = embed_all(dataset)
            at = {int(row): i for i, row in enumerate(crystals.row)}
            for p in cells:
                Z, errors = X if p is None else whiten(X, np.concatenate(others) if others else X, p), []
                for seed in range(args.seeds):
                    split = json.loads(Path(args.splits, name, f"seed{seed}.json").read_text())
                    rows = [at[row] for row in split["train"] if row in at]
                    y = crystals.y[rows]
                    errors.append(((knn_estimate(Z[rows], y) - y) ** 2).mean() / y.var())
                cells[p].append(f"{np.mean(errors):.3f}")
        for p, line in cells.items():
            print(f"| {place}{'' if p is None else f', whitened, p = {p:g}'} | " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
