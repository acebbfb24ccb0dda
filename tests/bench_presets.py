"""What preset `small` gives up: training speed and error of `small` and of richer variants, trained from scratch.

    python tests/bench_presets.py --task jarvis_eform --tasks hub/tasks.json --limit 2000 --epochs 12

Speed: training steps (forward, backward, AdamW) on batches of 32 crystals of 8 atoms, the best of five, float32,
threads as torch finds them (OMP_NUM_THREADS). Error: validation MAE after the epochs, same rows, seed and learning
rate for all.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import model as moma
import train_module as tm
from stage import prepare
from tasks import unit_of

VARIANTS = {
    "small": {},
    "small without a2e": {"atom_edge_interaction": False},
    "small with quadruplets": {"quad_interaction": True, "graph": {"qint": True}},
    "small with 4 blocks": {"num_blocks": 4},
    "small, edges twice as wide": {"emb_size_edge": 128},
}


def random_crystals(number, atoms=8, volume=18.0, seed=0):
    """Cells of `atoms` jittered grid points, `volume` A^3 an atom, random elements."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3) / side
    found = []
    for _ in range(number):
        cell = np.eye(3) * (atoms * volume) ** (1 / 3) + rng.normal(size=(3, 3)) * 0.2
        frac = (grid[rng.permutation(len(grid))[:atoms]] + rng.normal(size=(atoms, 3)) * 0.03) % 1
        found.append((rng.integers(1, 90, atoms), frac @ cell, cell, True))
    return found


def speed(arch, crystals=32):
    """Training steps on one batch: crystals a second."""
    batch = data.collate(data.build_graphs(random_crystals(crystals), data.GraphConfig(**arch["graph"])))
    torch.manual_seed(0)
    backbone = moma.build_backbone(arch)
    moma.fit_scale_factors(backbone, batch)
    net = moma.PropertyModel(backbone, "mean")
    optimizer, times = torch.optim.AdamW(net.parameters(), lr=1e-4), []
    for _ in range(6):
        start = time.perf_counter()
        optimizer.zero_grad()
        net(batch).abs().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return crystals / min(times[1:]), sum(p.numel() for p in net.parameters())


def error(arch, cfg):
    """Validation MAE after training from scratch, and the unit."""
    crystals, dataset, splits = prepare(cfg, arch)
    torch.manual_seed(cfg.seed)
    backbone = moma.build_backbone(arch)
    moma.fit_scale_factors(backbone, data.collate([dataset[int(i)] for i in splits["train"][:32]]))
    model = tm.new_head(backbone, None, crystals.task.pooling, cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        result = tm.results(*tm.train(cfg, Path(folder), model, crystals, dataset, splits, record={}))
    return result["val_mae"], unit_of(crystals.task)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", default="", help="compare errors on this task too; without it only the speed")
    p.add_argument("--data", default="", help='"demo" for the embedded crystals')
    p.add_argument("--tasks", default="")
    p.add_argument("--limit", type=int, default=2000)
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--lr", type=float, default=2e-3)
    args = p.parse_args()
    print(f"{torch.get_num_threads()} threads; crystals a second in training, 8 atoms, batch 32")
    for name, changes in VARIANTS.items():
        arch = moma.preset("small", **changes)
        rate, parameters = speed(arch)
        line = f"{name:28} {rate:5.0f} crystals/s  {parameters / 1e6:.2f} M parameters"
        if args.task:
            settings = {k: v for k, v in vars(args).items() if k in ("task", "data", "tasks", "limit", "epochs", "lr")}
            mae, unit = error(arch, tm.Config(**settings, quiet=True))
            line += f"  val MAE {mae:.4g} {unit}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
