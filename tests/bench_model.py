"""Speed and memory of GemNet-OC at the published settings, beside the machine's own rates measured in the same run.

    python tests/bench_model.py                 the table: forward, forward + backward, peak memory; graphs
    python tests/bench_model.py --profile 4x64  where the time of one training step goes

Rattled SrTiO3 and supercells, batch of 8 equal crystals, cutoff 12 A, caps 30 / 20 / 8 / 1000, property head, float32.
"original" are numbers of the published code on two cores where a 2048^3 float32 product ran at 240 GFLOP/s and a copy at
21.7 GB/s (read + write). ratio: original time / time here, after scaling by the rate of the matrix product (all times are
measured with the same number of threads, OMP_NUM_THREADS).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import model as moma

WIDTHS_4X64 = dict(emb_size_atom=128, emb_size_edge=64, emb_size_trip_in=32, emb_size_trip_out=32, emb_size_quad_in=16,
                   emb_size_quad_out=16, emb_size_aint_in=32, emb_size_aint_out=32, emb_size_rbf=16, emb_size_cbf=16,
                   emb_size_sbf=16)  # fmt: skip
ARCHITECTURES = {"4x64": WIDTHS_4X64, "JMP-S": {}}
ORIGINAL = {  # ms a crystal: forward, forward + backward; GB
    ("4x64", 5): (48, 96, 1.06), ("4x64", 20): (214, 472, 2.1), ("JMP-S", 5): (94, 261, 1.9), ("JMP-S", 20): (323, 939, 5.6),
}  # fmt: skip
ORIGINAL_GRAPHS = {5: 16, 20: 37, 60: 111}  # ms a crystal, graphs and indices
SUPERCELLS = {5: (1, 1, 1), 20: (2, 2, 1), 60: (3, 2, 2)}


def crystal(atoms, seed=0):
    """Rattled SrTiO3, or a supercell of it."""
    rng, n = np.random.default_rng(seed), np.array(SUPERCELLS[atoms])
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    shifts = np.stack(np.meshgrid(*[np.arange(k) for k in n], indexing="ij"), -1).reshape(-1, 3)
    pos = (shifts[:, None] + frac).reshape(-1, 3) * 3.905
    Z = np.tile([38, 22, 8, 8, 8], len(shifts))
    return Z, pos + rng.normal(size=pos.shape) * 0.05, np.diag(n * 3.905), True


def best(f, repeats=5):
    f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def machine():
    """GFLOP/s of a 2048^3 float32 product, GB/s of a 256 MB copy (read + write)."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x = torch.zeros(64 * 2**20)
    y = torch.empty_like(x)
    return 2 * 2048**3 / best(lambda: a @ b) / 1e9, 2 * 4 * x.numel() / best(lambda: y.copy_(x)) / 1e9


def prepare(name, atoms):
    arch = moma.preset("base", **ARCHITECTURES[name])
    graph = data.GraphConfig(**arch["graph"])
    batch = data.collate(data.build_graphs([crystal(atoms, seed) for seed in range(8)], graph))
    torch.manual_seed(0)
    return moma.PropertyModel(moma.build_backbone(arch), "mean"), batch


def one(name, atoms):
    """Times in ms a crystal and the peak of this process's memory in GB."""
    net, batch = prepare(name, atoms)

    def step():
        net.zero_grad()
        net(batch).abs().mean().backward()

    with torch.no_grad():
        forward = best(lambda: net(batch))
    both = best(step)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gflops, _ = machine()
    return {"forward": forward / 8e-3, "both": both / 8e-3, "memory": memory, "gflops": gflops}


def profile(name, atoms=5):
    net, batch = prepare(name, atoms)
    net(batch).abs().mean().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        for _ in range(3):
            net(batch).abs().mean().backward()
    print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--profile", choices=list(ARCHITECTURES))
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # one row in a process of its own, for its peak memory
    args = p.parse_args()
    if args.profile:
        return profile(args.profile)
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]))))
        return
    gflops, copy = machine()
    print(f"{torch.get_num_threads()} threads: {gflops:.0f} GFLOP/s, copy {copy:.1f} GB/s")
    print("| configuration | atoms | forward, ms | forward + backward, ms | original | ratio | peak GB | original |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, atoms), (_, original, memory) in ORIGINAL.items():
        command = [sys.executable, __file__, "--one", name, str(atoms)]
        r = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        ratio = original / r["both"] * 240 / r["gflops"]
        cells = [name, atoms, f"{r['forward']:.0f}", f"{r['both']:.0f}", original, f"{ratio:.1f}", f"{r['memory']:.2f}", memory]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    graph = data.GraphConfig(**moma.preset("base")["graph"])
    for atoms, original in ORIGINAL_GRAPHS.items():
        crystals = [crystal(atoms, seed) for seed in range(8)]
        ms = best(lambda: data.collate(data.build_graphs(crystals, graph))) / 8e-3
        print(f"graphs and tables, {atoms} atoms: {ms:.1f} ms a crystal; original {original}")


if __name__ == "__main__":
    main()
