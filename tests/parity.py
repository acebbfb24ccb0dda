"""Hold model.py to the numbers of the original GemNet-OC on given graphs.

    python tests/parity.py FILE.pt [FILE.pt ...]

A parity file holds a small random model of the original code, crystals, their edges, and every intermediate
value. One line for each quantity: the largest deviation relative to the largest value (of forces: of their
terms, as symmetry can make the sum zero), in float64 and in float32. Exit status 1 if a float64 value is off
by more than 1e-9, or a float32 one by more than 1e-4 or three times the reference's own float32 error.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tables
from import_published import rename_published
from model import GEMNET, PretrainModel, PropertyModel, build_backbone, pool, sum_to

GRAPHS = ("main", "a2a", "a2ee2a", "qint")
TERMS = {"forces_direct": "edge_force_scalar"}  # a sum that symmetry can make zero: the sizes of its terms


def architecture(file):
    """Constructor arguments from the file's configuration (original names)."""
    c = file["config"]
    arch = {k: c[k] for k in GEMNET if k in c}
    arch |= {"backbone": "gemnet_oc", "rbf_cutoff": c["absolute_rbf_cutoff"], "trip_interaction": True}
    return arch | {"graph": {}, "forces": any(k.startswith("backbone.out_mlp_F") for k in file["state_dict"])}


def given_batch(file, dtype):
    """The file's graphs as a batch, distances and vectors included. Edges are in the file's order."""
    inputs, bits = file["inputs"], "float64" if dtype == torch.float64 else "float32"
    batch = {"Z": inputs["atomic_numbers"], "pos": inputs["pos"].double(), "batch": inputs["batch"]}
    batch["num_atoms"] = inputs["natoms"]
    cell = inputs.get("cell")
    batch["cell"] = torch.zeros(len(inputs["natoms"]), 3, 3).double() if cell is None else cell.double()
    for name in GRAPHS:
        graph = file["graphs"][name]
        batch[f"{name}.src"], batch[f"{name}.dst"] = graph["edge_index"]
        batch[f"{name}.offset"] = graph["cell_offset"].long()
        batch[f"{name}.d"] = graph[f"distance_{bits}"].to(dtype)
        batch[f"{name}.V"] = graph[f"vector_{bits}"].to(dtype)
    batch["main.swap"] = file["graphs"]["main"]["id_swap"]
    return batch | tables(batch)


def load(file, dtype):
    """The pre-training model (all heads) and the property head of the file."""
    backbone = build_backbone(architecture(file))
    tasks = [str(t) for t in file["output_head"]["tasks"]]
    model = PretrainModel(backbone, dict.fromkeys(tasks, backbone.arch["forces"]))
    named, _ = rename_published(file["state_dict"], tasks)
    model.load_state_dict(named)
    head = PropertyModel(backbone, "mean")
    tensors = file["matbench_head_state_dict"].items()
    head.head.load_state_dict({k.split("out_mlp.")[1]: v for k, v in tensors})
    return model.to(dtype), head.to(dtype), tasks


def run(file, dtype):
    """Every quantity of the file, computed here: {name: tensor}; {published parameter: gradient norm}."""
    model, head, tasks = load(file, dtype)
    batch = given_batch(file, dtype)
    backbone = model.backbone
    forces = backbone.arch["forces"]
    h, m, x_E, x_F, g = zip(*backbone.states(batch, with_edges=forces))
    out = {"h0": h[0], "m0": m[0], "h_blocks": torch.stack(h[1:]), "m_blocks": torch.stack(m[1:])}
    out |= {"x_E_blocks": torch.stack(x_E)}
    out["x_E"] = backbone.readout(torch.stack(x_E, dim=1))
    out["atom_energy"] = torch.cat([model.out_energy[t](out["x_E"]) for t in tasks], dim=1)
    out["energy"] = pool(out["atom_energy"], batch, "sum")
    loss = out["energy"].abs().mean()
    if forces:
        out["x_F"] = backbone.out_mlp_F.out_mlp(torch.cat(x_F, dim=1))
        out["edge_force_scalar"] = torch.cat([model.out_forces[t](out["x_F"]) for t in tasks], dim=1)
        along = out["edge_force_scalar"][:, None, :] * g[0]["V"][:, :, None]
        out["forces_direct"] = sum_to(along, batch["main.dst"], len(batch["Z"]))
        w = torch.linspace(0.5, 1.5, out["forces_direct"].numel(), dtype=dtype)
        loss = loss + (w * out["forces_direct"].flatten()).abs().mean()
    y = head.head(out["x_E"]).squeeze(1)
    out |= {f"matbench_y_{how}": pool(y, batch, how) for how in ("mean", "sum", "max")}
    loss.backward()
    _, published = rename_published(file["state_dict"], tasks)
    norms = {published[n]: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in out.items()}, norms


def compare(file):
    """Rows (quantity, precision, deviation, allowed)."""
    rows = []
    for bits, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        out, norms = run(file, dtype)
        for name, ours in out.items():
            reference = file["outputs"][bits].get(name)
            if reference is None:
                continue
            terms = file["outputs"][bits].get(TERMS.get(name), reference)
            scale = max(float(reference.abs().max()), float(terms.abs().max()), 1e-30)
            off = float((ours.reshape(reference.shape) - reference).abs().max()) / scale
            allowed = 1e-9
            if bits == "float32":
                own = file["reference_float32_vs_float64"].get(name, {"max_abs_diff": 0.0})
                allowed = max(1e-4, 3 * own["max_abs_diff"] / scale)
            rows.append((name, bits, off, allowed))
        reference = file["param_grad_norms"][bits]
        missing = sorted(set(reference) - set(norms))
        off = [abs(float(norms[k]) - float(v)) for k, v in reference.items() if k in norms]
        scale = max(float(v) for v in reference.values())
        allowed = 1e-9
        if bits == "float32":
            exact = file["param_grad_norms"]["float64"]
            own = max(abs(float(reference[k]) - float(exact[k])) for k in reference)
            allowed = max(1e-4, 3 * own / scale)
        rows.append((f"param_grad_norms ({len(off)})", bits, max(off) / scale, allowed))
        if missing:
            lost = f"no gradient for {missing[0]} and {len(missing) - 1} more"
            rows.append((lost, bits, float("inf"), 0.0))
    return rows


def main(paths):
    bad = 0
    for path in paths:
        file = torch.load(path, weights_only=True)
        print(f"{path}: {file.get('name', '')}")
        for name, bits, off, allowed in compare(file):
            ok = off <= allowed
            bad += not ok
            print(f"  {name:28} {bits}  {off:9.2e}  allowed {allowed:.1e}  {'ok' if ok else 'OFF'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
