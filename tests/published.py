"""Files of the published structure, with values of our own: the published ones are not ours to hand out.

    python tests/published.py parity tests/parity_small.pt     our own numbers in the form of a parity file
    python tests/published.py jmp large jmp-l.pt               a JMP checkpoint of preset base or large
    python tests/published.py moma large modules               the 18 modules

The key lists come from `model.py`; test_import.py holds them to shared/reference/gemnet_oc_state_dict.json.
"""

import copy
import functools
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import import_published
import model as moma
from conftest import make_crystals

TASKS = ("oc20", "oc22", "ani1x", "transition1x")
NARROW = dict(
    num_blocks=2, num_radial=8, num_spherical=3, emb_size_atom=8, emb_size_edge=12, emb_size_trip_in=4,
    emb_size_trip_out=6, emb_size_quad_in=3, emb_size_quad_out=5, emb_size_aint_in=4, emb_size_aint_out=7,
    emb_size_rbf=5, emb_size_cbf=3, emb_size_sbf=4, num_before_skip=1, num_after_skip=2, num_concat=1,
    num_atom=2,
    num_output_afteratom=1, num_atom_emb_layers=1, num_global_out_layers=1,
)  # fmt: skip
RADIAL_COPIES = ("cbf_basis_qint.radial_basis", "sbf_basis_qint.radial_basis", "radial_basis_aeaint",
                 "cbf_basis_aeint.radial_basis", "cbf_basis_eaint.radial_basis", "radial_basis_aint",
                 "cbf_basis_tint.radial_basis")  # fmt: skip


@functools.cache
def skeleton(arch, tasks):
    """The model without values; arch as JSON."""
    arch = json.loads(arch)
    with torch.device("meta"):
        return moma.PretrainModel(moma.build_backbone(arch), dict.fromkeys(tasks, arch["forces"]))


def random_model(arch, tasks=TASKS, seed=0):
    """A pre-training model with random values, scale factors included; cheap even for the large sizes."""
    model = copy.deepcopy(skeleton(json.dumps(arch), tuple(tasks))).to_empty(device="cpu")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if ".rbf." in name:
                fresh = moma.Gaussians(arch["num_radial"], 12.0).rbf
                t.copy_(getattr(fresh, name.split(".")[-1]))
            elif name.endswith("scale_factor"):
                t.uniform_(0.5, 2.0, generator=g)
            else:
                t.normal_(0, t.shape[-1] ** -0.5, generator=g)
    return model


def published_state(model):
    """{published key: tensor}, repetitions included, in the published order."""
    state = {}
    tasks = list(model.out_energy)
    for name, t in model.state_dict().items():
        name = name.replace("backbone.embedding.weight", "embedding.atom_embedding.weight")
        name = re.sub(r"^(out_\w+)\.(\w+)", lambda m: f"output.{m[1]}.{tasks.index(m[2])}", name)
        if name == "backbone.bases.mlp_rbf_qint.linear.weight":  # after the first basis come its copies
            for copy in RADIAL_COPIES:
                for field in ("rbf.offset", "rbf.temps"):
                    state[f"backbone.bases.{copy}.{field}"] = state[f"backbone.bases.radial_basis.{field}"]
        if found := re.fullmatch(r"(backbone\.out_blocks\.\d+\.)seq_energy2\.0\.dense_mlp\.0\..+", name):
            layers = {k: v for k, v in state.items() if k.startswith(found[1] + "layers.")}
            state |= {k.replace(".layers.", ".seq_energy_pre."): v for k, v in layers.items()}
        state[name] = t
    metric = "task_steps._module_dict._typed_moduledict_{}.sum_value"
    return state | {metric.format(task): torch.tensor(0.0) for task in tasks}


def jmp_checkpoint(arch, seed=0):
    """A Lightning-style checkpoint: raw weights; in the optimiser's state, by position, nearly equal EMA."""
    model = random_model(arch | {"forces": True}, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    ema = tuple(p.detach() * (1 + 0.01 * torch.rand((), generator=g)) for p in model.parameters())
    return {
        "state_dict": published_state(model), "optimizer_states": [{"ema": ema, "decay": 0.99, "state": {}}],
        "hyper_parameters": {"backbone": {"num_blocks": arch["num_blocks"]}}, "epoch": 1, "loops": {},
    }  # fmt: skip


def moma_checkpoint(arch, seed=0, prefix="module.module."):
    """A released module: backbone without the force branch, and the head of its task."""
    model = random_model(arch | {"forces": False}, tasks=("y",), seed=seed)
    state = published_state(model).items()
    state = {prefix + k.replace("output.out_energy.0.", "output.module_dict.y."): v for k, v in state}
    return {"state_dict": {k: v for k, v in state.items() if "task_steps" not in k}, "epoch": 80}


def parity_file(names=("rattled NaCl", "triclinic", "water")):
    """Inputs, weights, edges, every intermediate value of a narrow model, in the form of the original's."""
    import parity

    arch = moma.preset("base", forces=True,
                       graph=dict(cutoff=6.0, cutoff_a2ee2a=6.0, cutoff_qint=5.0, cutoff_a2a=6.0,
                       max_neighbors=6, max_neighbors_a2ee2a=5, max_neighbors_qint=3), **NARROW)  # fmt: skip
    model, tasks = random_model(arch, TASKS[:2]), TASKS[:2]
    head = random_model(arch, ["y"], seed=1).out_energy["y"]
    crystals = make_crystals()
    chosen = [crystals[name] for name in names]
    batch = data.collate(data.build_graphs(chosen, data.GraphConfig(**arch["graph"])))
    graphs = {}
    for name in ("main", "a2a", "a2ee2a", "qint"):
        d, V = data.edge_vectors(batch, name, torch.float64)
        graphs[name] = {"edge_index": torch.stack([batch[f"{name}.src"], batch[f"{name}.dst"]]),
                        "cell_offset": batch[f"{name}.offset"], "distance_float64": d, "vector_float64": V,
                        "distance_float32": d.float(), "vector_float32": V.float()}  # fmt: skip
    graphs["main"]["id_swap"] = batch["main.swap"]
    file = {
        "name": "our own numbers, not the original's",
        "config": {k: arch[k] for k in moma.GEMNET} | {"absolute_rbf_cutoff": arch["rbf_cutoff"]},
        "output_head": {"tasks": list(tasks)},
        "state_dict": published_state(model),
        "matbench_head_state_dict": {f"ft_mlp_y.out_mlp.{k}": v for k, v in head.state_dict().items()},
        "inputs": {"pos": batch["pos"], "cell": batch["cell"], "atomic_numbers": batch["Z"],
                   "batch": batch["batch"],
                   "natoms": batch["num_atoms"]},
        "graphs": graphs, "outputs": {}, "param_grad_norms": {}, "reference_float32_vs_float64": {},
    }  # fmt: skip
    for bits in ("float64", "float32"):
        file["outputs"][bits], norms = parity.run(file, getattr(torch, bits))
        file["param_grad_norms"][bits] = {k: float(v) for k, v in norms.items()}
    for name, exact in file["outputs"]["float64"].items():
        off, most = (file["outputs"]["float32"][name] - exact).abs().max(), exact.abs().max()
        file["reference_float32_vs_float64"][name] = {"max_abs_diff": float(off), "max_abs": float(most)}
    return file


def main(what, *args):
    if what == "parity":
        torch.save(parity_file(), args[0])
    elif what == "jmp":
        torch.save(jmp_checkpoint(moma.preset(args[0])), args[1])
    else:
        Path(args[1]).mkdir()
        for i, name in enumerate(import_published.MOMA):
            torch.save(moma_checkpoint(moma.preset(args[0]), seed=i), Path(args[1]) / f"{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else print(__doc__)
