"""The model: physics its predictions obey, parts of GemNet-OC, numbers and names of the original code.

What every backbone owes is in test_contract.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as M
from data import GraphConfig, build_graphs, collate
from files import UserError
from test_contract import CHANGES, EVERY, batch_of, ready, reordered, rotated, rotation, supercell

WIDTHS = dict(emb_size_atom=24, emb_size_edge=16, emb_size_trip_in=6, emb_size_trip_out=5, emb_size_quad_in=4)
WIDTHS |= dict(emb_size_quad_out=3, emb_size_aint_in=6, emb_size_aint_out=5)  # mostly unlike each other
WIDTHS |= dict(emb_size_rbf=4, emb_size_cbf=5, emb_size_sbf=6)
ARCHITECTURES = {
    "tiny": M.preset("tiny"),
    "small": M.preset("small"),
    "small with quadruplets": M.preset("small", quad_interaction=True, graph={"qint": True}),
    "base, narrow": M.preset("base", num_blocks=2, **WIDTHS),  # all interactions, 12 Å, 30 / 20 / 8 / 1000
    "cgcnn": M.preset("base", backbone="cgcnn"),
}
INTERACTIONS = [f"{kind}_interaction" for kind in ("trip", "quad", "atom_edge", "edge_atom", "atom")]


@torch.no_grad()
def predict(model, structures):
    return model(batch_of(structures, model.backbone.arch))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def property_model(request, crystals):
    return M.PropertyModel(ready(ARCHITECTURES[request.param], crystals), "mean").eval()


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_predictions_are_invariant_to_1e5(property_model, crystals, change):
    structures = [crystals[k] for k in EVERY]
    for pooling in ("mean", "max"):
        property_model.pooling = pooling
        y = predict(property_model, structures)
        assert y.std() > 0.05 * y.abs().max(), "the crystals must not all be predicted alike"
        for seed in range(2):
            changed = predict(property_model, [change(*s, seed) for s in structures])
            assert float((changed - y).abs().max()) <= 1e-5 * float(y.abs().max())
    property_model.pooling = "mean"


@pytest.mark.parametrize("name", ["base, narrow", "cgcnn"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_in_float64_they_are_invariant_to_1e9(crystals, name, change):
    model = M.PropertyModel(ready(ARCHITECTURES[name], crystals, torch.float64), "mean").eval().double()
    structures = [crystals[k] for k in EVERY]
    y, changed = predict(model, structures), predict(model, [change(*s, 1) for s in structures])
    assert float((changed - y).abs().max()) <= 1e-9 * float(y.abs().max())


def test_sum_pooling_grows_with_the_cell(property_model, crystals):
    property_model.pooling = "sum"
    one = predict(property_model, [crystals["triclinic"]])
    four = predict(property_model, [supercell(*crystals["triclinic"], 2)])
    property_model.pooling = "mean"
    torch.testing.assert_close(four, 4 * one, rtol=1e-5, atol=0)


def test_a_crystal_scores_the_same_alone_and_in_a_batch(property_model, crystals):
    structures = [crystals[k] for k in [*EVERY, "60 atoms"]]
    together = predict(property_model, structures)
    alone = torch.cat([predict(property_model, [s]) for s in structures])
    assert torch.isfinite(together).all()
    assert float((together - alone).abs().max()) <= 1e-5 * float(together.abs().max())


def test_moving_one_atom_changes_the_prediction(property_model, crystals):
    Z, pos, cell, periodic = crystals["triclinic"]
    moved = pos + np.eye(7)[:, [3]] * [0.02, 0.01, 0]
    a, b = predict(property_model, [(Z, pos, cell, periodic), (Z, moved, cell, periodic)])
    assert abs(a - b) > 1e-5 * abs(a)


def permutation_error(crystals, rule):
    """Largest relative change of the prediction of perfect SrTiO3 over orders of its atoms."""
    torch.manual_seed(1)
    arch = M.preset("base", num_blocks=2, **WIDTHS, graph={"graph_rule": rule})
    backbone = M.build_backbone(arch)
    orders = [reordered(*crystals["SrTiO3"], seed) for seed in range(6)]
    M.fit_scale_factors(backbone, batch_of([crystals[k] for k in EVERY], arch))
    y = predict(M.PropertyModel(backbone, "mean"), orders)
    return float((y - y[0]).abs().max() / y.abs().max())


def test_keeping_whole_shells_makes_perfect_srtio3_independent_of_atom_order(crystals):
    assert permutation_error(crystals, "symmetric") < 1e-5
    assert permutation_error(crystals, "published") > 0.01  # exactly k, and the order decides who chooses


@pytest.mark.parametrize("name", ["tiny", "small with quadruplets"])
def test_nothing_jumps_as_an_atom_crosses_the_cutoff(crystals, name):
    arch = ARCHITECTURES[name]
    model = M.PropertyModel(ready(arch, crystals, torch.float64), "sum").double()
    r = arch["graph"]["cutoff"]
    place = lambda x: np.array([[0, 0, 0], [1.2, 0, 0], [0.3, x, 0]])  # noqa: E731
    at = lambda x: (np.array([8, 8, 7]), place(x), np.zeros((3, 3)), False)  # noqa: E731
    inside, outside, near = predict(model, [at(r - 1e-4), at(r + 1.3), at(r - 2.0)])
    assert abs(inside - outside) < 1e-8 < 1e-4 * abs(inside) < abs(inside - near)


def test_crystals_of_one_two_and_three_atoms_and_molecules_train(crystals):
    for name, arch in ARCHITECTURES.items():
        for structures in (
            ["bcc Fe"],
            ["NaCl"],
            ["thin"],
            ["isolated atom"],
            ["water"],
            ["isolated atom"] * 2,
            ["bcc Fe", "water"],
        ):
            model = M.PropertyModel(ready(arch, crystals), "mean").train()
            y = model(batch_of([crystals[k] for k in structures], arch))
            y.sum().backward()
            assert y.shape == (len(structures),), name
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), (
                name,
                structures,
            )


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "on", [*itertools.product([False, True], repeat=5)], ids=lambda on: "".join("01"[i] for i in on)
)
def test_every_combination_of_interactions_builds_trains_and_uses_what_it_builds(crystals, on):
    arch = M.preset(
        "base", num_blocks=2, **WIDTHS, **dict(zip(INTERACTIONS, on)), graph=dict(cutoff=5.0, cutoff_a2a=5.0)
    )
    backbone = M.build_backbone(arch)
    assert {n.split(".")[2] for n, _ in backbone.named_parameters() if "_interaction" in n} == {
        n for n, wanted in zip(INTERACTIONS, on) if wanted
    }
    batch = batch_of([crystals["rattled SrTiO3"], crystals["water"]], arch)
    M.fit_scale_factors(backbone, batch)
    backbone(batch).square().sum().backward()
    useless = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not useless


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(UserError, match="medium.*tiny"):
        M.preset("medium")
    with pytest.raises(UserError, match="no such backbone: use one of gemnet_oc, cgcnn"):
        M.preset("small", backbone="no such backbone")
    with pytest.raises(UserError, match="num_block\\b"):
        M.preset("small", num_block=3)
    with pytest.raises(UserError, match="graph.qint is false"):
        M.preset("small", quad_interaction=True)
    with pytest.raises(UserError, match="median"):
        batch = {"batch": torch.zeros(2, dtype=torch.long), "num_atoms": torch.tensor([2])}
        M.pool(torch.ones(2, 1), batch, "median")


def test_pooling_by_hand():
    batch = {"batch": torch.tensor([0, 0, 1]), "num_atoms": torch.tensor([2, 1])}
    x = torch.tensor([[1.0, -2.0], [3.0, -4.0], [-5.0, 6.0]])
    assert M.pool(x, batch, "mean").tolist() == [[2.0, -3.0], [-5.0, 6.0]]
    assert M.pool(x, batch, "sum").tolist() == [[4.0, -6.0], [-5.0, 6.0]]
    assert M.pool(x, batch, "max").tolist() == [[3.0, -2.0], [-5.0, 6.0]]
    assert M.pool(x[:, 0], batch, "max").tolist() == [3.0, -5.0]
    many = {"batch": torch.zeros(257, dtype=torch.long), "num_atoms": torch.tensor([257])}
    assert M.pool(torch.ones(257, 1, dtype=torch.bfloat16), many, "mean").tolist() == [[1.0]]  # 257 is no bf16


def test_the_envelope_and_its_slope_vanish_at_the_cutoff():
    basis = M.Gaussians(16, 6.0).double()
    d = torch.tensor([0.5, 6.0 - 1e-6, 6.0, 7.0], dtype=torch.float64, requires_grad=True)
    value = basis(d).sum(1)
    (slope,) = torch.autograd.grad(value.sum(), d)
    assert value[0] > 0.5 and bool((value[1:].abs() < 1e-15).all()) and bool((slope[1:].abs() < 1e-10).all())


def test_legendre_functions_equal_scipys():
    from scipy.special import eval_legendre

    z = torch.linspace(-1, 1, 21, dtype=torch.float64)
    expected = [math.sqrt((2 * l + 1) / (4 * math.pi)) * eval_legendre(l, z.numpy()) for l in range(7)]
    np.testing.assert_allclose(M.legendre(z, 7, 0), expected, atol=1e-14)


@pytest.mark.parametrize("name", ["small", "small with quadruplets", "base, narrow"])
def test_fitted_scale_factors_keep_variances_near_one(crystals, name):
    arch, variances = ARCHITECTURES[name], {}
    names = ["rattled NaCl", "rattled SrTiO3", "triclinic", "thin", "60 atoms", "water"]
    structures = [crystals[k] for k in names]
    torch.manual_seed(2)
    backbone, batch = M.build_backbone(arch), batch_of(structures, arch)
    M.fit_scale_factors(backbone, batch)
    factors = {n: f for n, f in backbone.named_modules() if isinstance(f, M.ScaleFactor)}
    assert all(0.01 < float(f.scale_factor) < 100 for f in factors.values())
    for n, factor in factors.items():
        keep = lambda _, args, out, n=n: variances.__setitem__(n, float(out.var(dim=0).mean()))  # noqa: E731
        factor.register_forward_hook(keep)
    with torch.no_grad():
        for h, m, x_E, _, _ in backbone.states(batch):
            assert all(0.1 < float(x.var(dim=0).mean()) < 6 for x in (h, m, x_E))
    sums = [v for n, v in variances.items() if n.endswith("bf_sum")]  # the sums of an interaction: to one
    assert len(sums) >= 4 and all(0.8 < v < 1.2 for v in sums)
    assert all(0.05 < v < 10 for v in variances.values())  # the others: to the variance of what came in


@pytest.mark.parametrize(
    "names", [["isolated atom"], ["bcc Fe"], ["NaCl"], ["isolated atom", "bcc Fe"]], ids=" and ".join
)
def test_scale_factors_fitted_on_too_little_stay_usable(crystals, names):
    """No edges, or all atoms alike: a variance that is 0 or undefined becomes no factor of 1e6 or NaN."""
    arch = ARCHITECTURES["base, narrow"]
    backbone = M.build_backbone(arch)
    M.fit_scale_factors(backbone, batch_of([crystals[k] for k in names], arch))
    factors = {n: float(b) for n, b in backbone.named_buffers() if n.endswith("scale_factor")}
    assert all(0 <= v < 1000 for v in factors.values()), factors
    assert torch.isfinite(predict(M.PropertyModel(backbone, "mean"), [crystals["triclinic"]])).all()


def test_scale_factors_travel_with_the_weights(crystals):
    arch = ARCHITECTURES["small"]
    fitted, fresh = ready(arch, crystals), M.build_backbone(arch).eval()
    batch = batch_of([crystals["triclinic"]], arch)
    fresh(batch)  # has already run without factors
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(batch), fitted(batch))


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["small", "base, narrow", "cgcnn"])
def test_a_fresh_adapter_changes_the_representation_only_slightly(crystals, name):
    backbone = ready(ARCHITECTURES[name], crystals)
    adapters = M.new_adapters(backbone).eval()
    batch = batch_of([crystals[k] for k in EVERY], backbone.arch)
    with torch.no_grad():
        plain, adapted = backbone(batch), backbone(batch, adapters)
        assert 0 < float((adapted - plain).norm() / plain.norm()) < 0.1
        for up in adapters.up:
            up.weight.zero_()
        torch.testing.assert_close(backbone(batch, adapters), plain, rtol=0, atol=1e-6)


def test_all_adapters_of_a_hub_start_equal(crystals):
    arch = ARCHITECTURES["small"]
    torch.manual_seed(5)
    expected = torch.rand(3)
    first = M.new_adapters(arch).state_dict()
    torch.manual_seed(5)
    second = M.new_adapters(arch).state_dict()
    assert torch.equal(torch.rand(3), expected)  # and they leave the random numbers of training alone
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    other = M.new_adapters(arch, seed=1).state_dict()
    assert not torch.equal(other["up.0.weight"], first["up.0.weight"])
    assert float(first["up.0.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert all(not v.any() for k, v in first.items() if k.endswith("bias"))


@pytest.mark.parametrize("name", ["small", "cgcnn"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_stored_features_give_the_same_prediction_and_gradients(crystals, name, pooling):
    backbone = ready(ARCHITECTURES[name], crystals).requires_grad_(False)
    model = M.PropertyModel(backbone, pooling, M.new_adapters(backbone)).eval()
    batch = batch_of([crystals[k] for k in EVERY], backbone.arch)
    with torch.no_grad():
        stored = {k: batch[k] for k in ("batch", "num_atoms")} | {"features": backbone.atom_features(batch)}
    results = []
    for b in (batch, stored):
        model.zero_grad()
        y = model(b)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(p.grad is None for p in backbone.parameters())


# ---------------------------------------------------------------- forces


def forces_and_differences(model, batch, directions=3, h=1e-6):
    """Gradient of the summed prediction (A, 3); slopes along random displacements, and by differences."""
    pos = batch["pos"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(batch | {"pos": pos}).sum(), pos)
    slopes = []
    for seed in range(directions):
        v = torch.randn(pos.shape, generator=torch.Generator().manual_seed(seed), dtype=pos.dtype)
        with torch.no_grad():
            plus, minus = (model(batch | {"pos": batch["pos"] + s * h * v}).sum() for s in (1, -1))
        slopes.append((float((gradient * v).sum()), float((plus - minus) / (2 * h))))
    return gradient, slopes


@pytest.mark.parametrize("name", ["base, narrow", "small with quadruplets", "cgcnn"])
@pytest.mark.parametrize(
    "names",
    [["water"], ["rattled SrTiO3"], ["bcc Fe", "triclinic"], ["rattled NaCl", "thin"]],
    ids=" and ".join,
)
def test_gradient_forces_equal_finite_differences(crystals, name, names):
    """The images of an atom are collinear, so crystals have straight angles however they are rattled."""
    model = M.PropertyModel(ready(ARCHITECTURES[name], crystals, torch.float64), "sum").double()
    batch = batch_of([crystals[k] for k in names], model.backbone.arch)
    gradient, slopes = forces_and_differences(model, batch)
    scale = float(gradient.norm())
    assert scale > 1e-6
    for by_autograd, by_difference in slopes:
        assert by_autograd == pytest.approx(by_difference, abs=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_bounded_where_different_atoms_are_in_line(crystals, dtype):
    """Perfect cubic crystals and acetylene, in any orientation. Forces vanish by symmetry in the crystals."""
    model = M.PropertyModel(ready(ARCHITECTURES["base, narrow"], crystals, dtype), "sum").to(dtype)
    acetylene = (
        np.array([1, 6, 6, 1]),
        np.array([[-1.66], [-0.6], [0.6], [1.66]]) * [1.0, 0, 0],
        np.zeros((3, 3)),
        False,
    )

    def gradient(structure):
        batch = batch_of([structure], model.backbone.arch)
        pos = batch["pos"].requires_grad_()
        return torch.autograd.grad(model(batch).sum(), pos)[0]

    scale = float(gradient(crystals["rattled SrTiO3"]).abs().max())
    bound = 1e-3 if dtype == torch.float32 else 1e-6  # a straight angle's cosine is noise of 1e-7 there
    for seed in range(3):
        for name in ("NaCl", "SrTiO3", "bcc Fe"):
            forces = gradient(rotated(*crystals[name], seed))
            assert float(forces.abs().max()) < bound * scale, name
        along = gradient(rotated(*acetylene, seed)) @ torch.from_numpy(rotation(seed)).T
        torch.testing.assert_close(along, gradient(acetylene), rtol=0, atol=1e-3 * scale)


def test_direct_forces_rotate_with_the_molecule(crystals):
    torch.manual_seed(0)
    backbone = M.build_backbone(M.preset("base", num_blocks=2, **WIDTHS, forces=True))
    structures = [crystals[k] for k in ("water", "rattled SrTiO3", "isolated atom")]
    M.fit_scale_factors(backbone, batch_of(structures, backbone.arch))
    model = M.PretrainModel(backbone, {"with": True, "without": False}).double()
    with torch.no_grad():
        energy, forces, _ = model(batch_of(structures, backbone.arch), "with")
        turned = model(batch_of([rotated(*s, 4) for s in structures], backbone.arch), "with")
        assert model(batch_of(structures, backbone.arch), "without")[1] is None
    assert energy.shape == (3,) and forces.shape == (9, 3) and float(forces[-1].abs().max()) == 0
    torch.testing.assert_close(turned[0], energy, rtol=1e-9, atol=0)
    torch.testing.assert_close(turned[1], forces @ torch.from_numpy(rotation(4)), rtol=0, atol=1e-9)
    assert float(forces.abs().max()) > 1e-3


# ---------------------------------------------------------------- the original's numbers


@pytest.mark.parametrize("given_edges", [True, False], ids=["edges given", "edges built"])
def test_energies_and_gradient_forces_of_the_original_from_positions(parity_file, given_edges):
    """Distances recomputed here, in float64; the edges the file's, or our builder's by the published rule."""
    from parity import given_batch, load

    model, _, tasks = load(parity_file, torch.float64)
    given = given_batch(parity_file, torch.float64)
    if given_edges:
        batch = {k: v for k, v in given.items() if not k.endswith((".d", ".V"))}
    else:
        n = given["num_atoms"].tolist()
        parts = zip(given["Z"].split(n), given["pos"].split(n), given["cell"], strict=True)
        structures = [(Z.numpy(), pos.numpy(), cell.numpy(), True) for Z, pos, cell in parts]
        batch = collate(build_graphs(structures, GraphConfig(graph_rule="published")))
    batch["pos"].requires_grad_()
    energy, *_ = model(batch, tasks[0])
    (gradient,) = torch.autograd.grad(energy.sum(), batch["pos"])
    reference = parity_file["outputs"]["float64"]
    torch.testing.assert_close(energy.detach(), reference["energy"][:, 0], rtol=1e-9, atol=0)
    expected = reference["forces_gradient_task0"]
    assert float((-gradient - expected).abs().max()) <= 1e-7 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["NaCl", "SrTiO3", "bcc Fe", "rattled NaCl", "thin", "water"])
def test_dihedrals_equal_the_published_formula_where_angles_are_straight_too(crystals, name, monkeypatch):
    def published(u, w):
        U, W = torch.broadcast_tensors(u[:, :, None], w[:, None])
        sine = torch.linalg.cross(U, W).norm(dim=-1).clamp(min=1e-9)
        return torch.cos(torch.atan2(sine, (U * W).sum(-1)))

    backbone = ready(ARCHITECTURES["base, narrow"], crystals, torch.float64)
    batch = batch_of([crystals[name]], backbone.arch)
    with torch.no_grad():
        ours = backbone(batch)
        monkeypatch.setattr(M, "cos_dihedral", published)
        theirs = backbone(batch)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-11


# ---------------------------------------------------------------- memory, speed, precision: the same numbers


def test_recomputed_products_have_the_right_gradients_and_second_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((5, 3), (5, 2), (3, 2))]
    inputs[2] = (inputs[0][:3] * 2)[:, :2]  # an input that depends on another one

    def product(x, r, W):
        return M.Recompute.apply(lambda x, r, W: x.sin() * (r @ W.T), x, r, W)

    leaves = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(product, leaves)
    assert torch.autograd.gradgradcheck(product, leaves)
    kept = inputs[0].sin() * (inputs[1] @ inputs[2].T)
    wanted = torch.autograd.grad(kept.square().sum(), inputs[:2], retain_graph=True)
    given = torch.autograd.grad(product(*inputs).square().sum(), inputs[:2])
    torch.testing.assert_close(given, wanted)


def saved_bytes(model, batch):
    """What the forward pass keeps for the backward pass, apart from the parameters; and the gradient."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(batch)
    y.sum().backward()
    return sum(kept.values()), y.detach(), [p.grad for p in model.parameters()]


def test_checkpointing_keeps_less_and_changes_no_number(crystals):
    arch = M.preset("small", num_blocks=3)
    model = M.PropertyModel(ready(arch, crystals), "mean")
    batch = batch_of([crystals[k] for k in EVERY], arch)
    before, y, gradient = saved_bytes(model, batch)
    model.backbone.checkpointing = True
    after, y2, gradient2 = saved_bytes(model, batch)
    assert after < before / 2
    assert torch.equal(y, y2) and all(torch.equal(a, b) for a, b in zip(gradient, gradient2, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["small with quadruplets", "base, narrow"])
def test_bf16_is_off_by_a_few_percent_but_not_in_the_angles(crystals, name, checkpointing):
    model = M.PropertyModel(ready(ARCHITECTURES[name], crystals), "mean")
    model.backbone.checkpointing = checkpointing
    batch = batch_of([crystals[k] for k in EVERY], ARCHITECTURES[name])
    _, y, gradient = saved_bytes(model, batch)
    (*_, exact), *_ = model.backbone.states(batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, low, low_gradient = saved_bytes(model, batch)
        (*_, lowered), *_ = model.backbone.states(batch)
    for basis in ("e2e", "quad"):
        for a, b in zip(exact[basis], lowered[basis], strict=True):
            assert torch.equal(a.to(torch.bfloat16), b)
    assert 0 < (low - y).norm() < 0.03 * y.norm()
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (gradient, low_gradient))
    assert (a - b).norm() < 0.1 * a.norm()


class NothingReadBack(TorchDispatchMode):
    """Refuses the operations that make a GPU wait: reading a value, and shapes that depend on values."""

    WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "bincount"}
    WAIT |= {"_unique2", "unique_dim", "unique_consecutive"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = tree_leaves(args[1:]) if name == "index" else []
        masks = [t for t in indices if torch.is_tensor(t) and t.dtype == torch.bool]
        assert name not in self.WAIT and not masks, f"{func} waits for the device"
        known = name != "repeat_interleave" or (kwargs or {}).get("output_size") is not None
        assert known, "repeat_interleave waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_forward_and_a_backward_pass_read_nothing_back(crystals, name, monkeypatch):
    arch = ARCHITECTURES[name]
    batch = batch_of([crystals[k] for k in EVERY], arch)
    batch["y"] = torch.arange(len(EVERY), dtype=torch.float64)
    model = M.PropertyModel(ready(arch, crystals), "mean").train()

    def refused(*args):
        raise AssertionError("waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", refused)  # these two are no operations
    monkeypatch.setattr(torch.Tensor, "numpy", refused)
    with NothingReadBack():
        loss = (model(batch) - batch["y"]).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        with pytest.raises(AssertionError, match="waits"):
            float(loss.detach())
