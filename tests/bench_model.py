"""Speed and memory of GemNet-OC at the published settings, beside the machine's own rates measured in the same run.

    python tests/bench_model.py                 forward, forward + backward, peak memory; graphs
    python tests/bench_model.py --profile 4x64 5 (or JMP-S 20)    where the time of one training step goes, by part
    python tests/bench_model.py --options JMP-S 5                 bf16, checkpointing, torch.compile: time, memory, error
    python tests/bench_model.py --growth results                  cost against atoms, crystals, neighbours: csv and plot
    ... --device cuda                                             the first three on a GPU

Rattled SrTiO3 and supercells, batch of 8 equal crystals, cutoff 12 A, caps 30 / 20 / 8 / 1000, property head, float32.
"original" are numbers of the published code on two cores where a 2048^3 float32 product ran at 240 GFLOP/s and a copy at
21.7 GB/s (read + write). ratio: original time / time here, after scaling by the rate of the matrix product (all times are
measured with the same number of threads, OMP_NUM_THREADS). Memory: the peak of the process on a CPU (1 GB = 10^9 bytes;
the interpreter and libraries, 0.27 GB, are in it), of the allocated arrays on a GPU. Each row runs in its own process.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

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
SUPERCELLS = {5: (1, 1, 1), 10: (2, 1, 1), 20: (2, 2, 1), 40: (2, 2, 2), 60: (3, 2, 2), 80: (4, 2, 2), 140: (7, 2, 2),
              200: (5, 4, 2)}  # fmt: skip


def crystal(atoms, seed=0):
    """Rattled SrTiO3, or a supercell of it."""
    rng, n = np.random.default_rng(seed), np.array(SUPERCELLS[atoms])
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    shifts = np.stack(np.meshgrid(*[np.arange(k) for k in n], indexing="ij"), -1).reshape(-1, 3)
    pos = (shifts[:, None] + frac).reshape(-1, 3) * 3.905
    Z = np.tile([38, 22, 8, 8, 8], len(shifts))
    return Z, pos + rng.normal(size=pos.shape) * 0.05, np.diag(n * 3.905), True


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def best(f, repeats=8):
    """Seconds of the fastest of some runs, after one to warm up."""
    f()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        f()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(device="cpu"):
    """GFLOP/s of a 2048^3 float32 product, GB/s of a 256 MB copy (read + write)."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    x = torch.zeros(64 * 2**20, device=device)
    y = torch.empty_like(x)
    return 2 * 2048**3 / best(lambda: a @ b) / 1e9, 2 * 4 * x.numel() / best(lambda: y.copy_(x)) / 1e9


def peak(device):
    """GB, of this process since it started (not of its parent, as ru_maxrss is), or of the GPU's arrays."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024 / 1e9


def prepare(name, atoms, crystals=8, device="cpu", **graph):
    """Model and batch. graph: other caps."""
    arch = moma.preset("base", **ARCHITECTURES[name], graph=graph)
    records = data.build_graphs([crystal(atoms, seed) for seed in range(crystals)], data.GraphConfig(**arch["graph"]))
    torch.manual_seed(0)
    model = moma.PropertyModel(moma.build_backbone(arch), "mean").to(device)
    return model, data.to_device(data.collate(records), device)


def step(model, batch):
    model.zero_grad()
    model(batch).abs().mean().backward()


def own_process(*args):
    """What another run of this file printed, as JSON."""
    run = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout)


def markdown(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


# ------------------------------------------------------------------------------------------------------------ the table


def one(name, atoms, device, crystals=8, **graph):
    """Times in ms a crystal, peak memory in GB."""
    model, batch = prepare(name, atoms, crystals, device, **graph)
    result = {"both": best(lambda: step(model, batch)) * 1e3 / crystals, "memory": peak(device)}
    with torch.no_grad():
        result["forward"] = best(lambda: model(batch)) * 1e3 / crystals
    gflops, copy = machine(device)
    sizes = {"edges": len(batch["main.src"]), "degree": batch["main.table"].shape[1]}
    return result | sizes | {"gflops": gflops, "copy": copy}


def table(device):
    rows = []
    for (name, atoms), (_, original, memory) in ORIGINAL.items():
        r = own_process("--one", name, atoms, "--device", device)
        ratio = original / r["both"] * 240 / r["gflops"]
        rate = f"{r['gflops']:.0f} GFLOP/s, {r['copy']:.0f} GB/s"
        times = f"{r['forward']:.1f}", f"{r['both']:.1f}", original, f"{ratio:.1f}"
        rows.append((name, atoms, *times, f"{r['memory']:.2f}", memory, rate))
    head = ("configuration", "atoms", "forward, ms", "forward + backward, ms", "original", "ratio", "peak GB", "original")
    markdown((*head, "machine"), rows)
    graph = data.GraphConfig(**moma.preset("base")["graph"])
    for atoms, original in ORIGINAL_GRAPHS.items():
        crystals = [crystal(atoms, seed) for seed in range(8)]
        ms = best(lambda: data.collate(data.build_graphs(crystals, graph))) / 8e-3
        print(f"graphs and tables, {atoms} atoms: {ms:.1f} ms a crystal; original {original}")


# ---------------------------------------------------------------------------------------------------- where the time goes

PARTS = {
    "bases": moma.Bases, "edge to edge (e2e)": moma.TripletInteraction, "quadruplets": moma.QuadrupletInteraction,
    "atom to edge (a2e)": moma.AtomEdgeInteraction, "edge to atom (e2a)": moma.EdgeAtomInteraction,
    "atom to atom (a2a)": moma.AtomInteraction, "output blocks": moma.OutputBlock, "atom updates": moma.AtomUpdate,
    "edge embeddings": moma.EdgeEmbedding, "dense and residual layers between": (moma.Dense, moma.Residual),
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each for itself; views move none."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return out


def calls(model, batch):
    """[(part, module, inputs)] of one forward pass: the outermost modules of PARTS."""
    found, inside = [], []

    def before(module, inputs):
        if not inside:
            part = next(p for p, kinds in PARTS.items() if isinstance(module, kinds))
            found.append((part, module, tree_map(detached, inputs)))
        inside.append(module)

    def after(module, inputs, output):
        inside.pop()

    kinds = tuple(k for v in PARTS.values() for k in (v if isinstance(v, tuple) else (v,)))
    hooks = []
    for module in model.modules():
        if isinstance(module, kinds):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


def detached(x):
    return x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x


def profile(name, atoms, device):
    """Each part alone, forward + backward, on the inputs it has in a step; beside what it must compute and move."""
    model, batch = prepare(name, atoms, 8, device)
    gflops, copy = machine(device)
    whole = best(lambda: step(model, batch)) / 8e-3
    parts = {}
    for part, module, inputs in calls(model, batch):

        def both():
            out = [x for x in tree_leaves(module(*inputs)) if torch.is_tensor(x) and x.requires_grad]
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

        seconds = best(both)
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            both()
        row = parts.setdefault(part, np.zeros(3))
        row += seconds / 8e-3, flops.get_total_flops() / 8e9, traffic.total / 8e9
    print(f"{name}, {atoms} atoms, a crystal: whole step {whole:.1f} ms; {gflops:.0f} GFLOP/s, copy {copy:.1f} GB/s")
    rows = []
    parts = dict(sorted(parts.items(), key=lambda item: -item[1][0])) | {"sum of the parts": sum(parts.values())}
    for part, (ms, gflop, gb) in parts.items():
        floors = gflop / gflops * 1e3, gb / copy * 1e3
        rows.append((part, f"{ms:.1f}", f"{gflop:.2f}", f"{floors[0]:.1f}", f"{gb * 1e3:.0f}", f"{floors[1]:.1f}"))
    markdown(("part", "ms", "GFLOP", "ms at the rate of products", "MB read + written", "ms at the rate of copies"), rows)


# ------------------------------------------------------------------------------------------------------------- options


def option(how, name, atoms, device):
    """Time, memory, and the error of predictions and gradient against float64, relative to the largest value."""
    model, batch = prepare(name, atoms, 8, device)
    moma.fit_scale_factors(model.backbone, batch)
    model.backbone.checkpointing = how == "checkpointing"
    run = torch.compile(model) if how == "torch.compile" else model

    def both():
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=how == "bf16"):
            y = run(batch)
        y.float().abs().mean().backward()

    result = {"ms": best(both, 3) / 8e-3, "memory": peak(device)}
    exact = copy.deepcopy(model).double()
    step(exact, batch)
    with torch.no_grad():
        truth = exact(batch)
        with torch.autocast(device, torch.bfloat16, enabled=how == "bf16"):
            y = run(batch).double()
    gradient, true = (torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (model, exact))
    errors = {"y": (y - truth).abs().max() / truth.abs().max(), "gradient": (gradient - true).norm() / true.norm()}
    return result | {key: float(value) for key, value in errors.items()}


def options(name, atoms, device):
    print(f"{name}, {atoms} atoms, {device}, forward + backward a crystal")
    rows = []
    for how in ("float32", "bf16", "checkpointing", "torch.compile"):
        r = own_process("--option", how, "--one", name, atoms, "--device", device)
        rows.append((how, f"{r['ms']:.1f}", f"{r['memory']:.2f}", f"{r['y']:.1e}", f"{r['gradient']:.1e}"))
    markdown(("", "ms", "peak GB", "error of y", "error of the gradient"), rows)


# --------------------------------------------------------------------------------------------------------- cost growth

GROWTH = {  # what varies: [(atoms, crystals, main cap)]; a2ee2a and qint keep their ratio to the main cap
    "atoms in a cell": [(5, 1, 30), (10, 1, 30), (20, 1, 30), (40, 1, 30), (80, 1, 30), (140, 1, 30), (200, 1, 30)],
    "crystals in a batch": [(5, 1, 30), (5, 4, 30), (5, 8, 30), (5, 16, 30), (5, 32, 30), (5, 48, 30)],
    "neighbours (main cap)": [(20, 2, 6), (20, 2, 12), (20, 2, 18), (20, 2, 24), (20, 2, 30), (20, 2, 45), (20, 2, 60)],
}  # fmt: skip


def growth(folder, name="4x64"):
    """results of GROWTH into growth.csv and growth.png, each series with a fitted constant + power law."""
    from matplotlib.figure import Figure
    from scipy.optimize import curve_fit

    fig = Figure(figsize=(11, 5.6), layout="constrained")
    axes, lines = fig.subplots(2, 3), ["series,atoms,crystals,cap,edges,degree,ms,gb"]
    for column, (series, points) in enumerate(GROWTH.items()):
        which = ("atoms", "crystals", "cap").index(series.split()[0].replace("neighbours", "cap"))
        x = np.array([p[which] for p in points])
        runs = [own_process("--one", name, a, "--crystals", n, "--cap", cap) for a, n, cap in points]
        ms = np.array([r["both"] * n for r, (_, n, _) in zip(runs, points)])
        gb = np.array([r["memory"] for r in runs])
        lines += [f"{series},{a},{n},{c},{r['edges']},{r['degree']},{t:.1f},{m:.3f}"
                  for (a, n, c), r, t, m in zip(points, runs, ms, gb)]  # fmt: skip
        for ax, y, unit in ((axes[0][column], ms, "ms, forward + backward"), (axes[1][column], gb, "peak GB")):
            law = lambda x, c, a, p: c + a * (x / points[-1][which]) ** p  # noqa: E731
            c, a, p = curve_fit(law, x, y, (y[0], y[-1], 1), sigma=y, bounds=(0, np.inf))[0]
            text = f"{c:.2g} + {a:.3g} (x / {x[-1]})^{p:.2f}"
            print(f"{series}: {text} {unit}", flush=True)
            ax.plot(x, y, "o", color="#1f4e79")
            dense = np.geomspace(x[0], x[-1], 50)
            ax.plot(dense, law(dense, c, a, p), color="#c55a11", label=text)
            ax.set(xlabel=series, ylabel=unit, xlim=(0, None), ylim=(0, None))
            ax.legend(frameon=False)
    Path(folder, "growth.csv").write_text("\n".join(lines) + "\n")
    fig.savefig(Path(folder, "growth.png"), dpi=80)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--profile", nargs=2, metavar=("NAME", "ATOMS"))
    p.add_argument("--options", nargs=2, metavar=("NAME", "ATOMS"))
    p.add_argument("--growth", metavar="FOLDER")
    p.add_argument("--device", default="cpu")
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # one row, in a process of its own for its peak memory
    p.add_argument("--option", help=argparse.SUPPRESS)
    p.add_argument("--crystals", type=int, default=8, help=argparse.SUPPRESS)
    p.add_argument("--cap", type=int, default=30, help=argparse.SUPPRESS)
    a = p.parse_args()
    name, atoms = a.one or a.profile or a.options or ("", 0)
    if a.option:
        print(json.dumps(option(a.option, name, int(atoms), a.device)))
    elif a.one:
        caps = {"max_neighbors": a.cap, "max_neighbors_a2ee2a": a.cap * 2 // 3, "max_neighbors_qint": a.cap * 4 // 15}
        print(json.dumps(one(name, int(atoms), a.device, a.crystals, **caps)))
    elif a.profile:
        profile(name, int(atoms), a.device)
    elif a.options:
        options(name, int(atoms), a.device)
    elif a.growth:
        growth(a.growth)
    else:
        table(a.device)


if __name__ == "__main__":
    main()
