"""What the stages may rely on, of every backbone in BACKBONES and of the one that the README adds."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import model as M
from crystals import wrap
from data import GraphConfig, build_graphs, collate
from files import UserError

ROOT = Path(__file__).resolve().parents[1]
EVERY = ["NaCl", "SrTiO3", "bcc Fe", "rattled NaCl", "rattled SrTiO3", "triclinic", "thin"]
EVERY += ["isolated atom", "water"]
FEW = [["bcc Fe"], ["isolated atom"], ["water"], ["isolated atom"] * 2, ["bcc Fe", "water"]]


def example_of_the_readme():
    """The fork that the README prints."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    found = [block for block in blocks if "class SchNet(" in block]
    assert len(found) == 1, "README.md, Forking: should hold the file schnet.py as one block"
    return found[0]


@pytest.fixture(scope="module", params=[*M.BACKBONES, "schnet"])
def name(request):
    name = request.param
    if name in M.BACKBONES:
        yield name
        return
    try:
        exec(compile(example_of_the_readme(), "schnet.py", "exec"), {"__name__": "schnet"})
        yield name
    finally:
        M.BACKBONES.pop(name, None)
        M.PRESETS.pop(name, None)


@pytest.fixture(scope="module")
def arch(name):
    return M.preset("tiny", backbone=name)


@pytest.fixture(scope="module")
def backbone(arch, crystals):
    return ready(arch, crystals, torch.float64)


@pytest.fixture
def batch(arch, crystals):
    return batch_of([crystals[k] for k in EVERY], arch)


def batch_of(structures, arch):
    return collate(build_graphs(structures, GraphConfig(**arch["graph"])))


def ready(arch, crystals, dtype=torch.float32, seed=1):
    """A backbone with fitted scale factors, in evaluation mode."""
    torch.manual_seed(seed)
    backbone = M.build_backbone(arch)
    M.fit_scale_factors(backbone, batch_of([crystals[k] for k in EVERY], arch))
    return backbone.eval().to(dtype)


def without_gradients(backbone):
    backbone.zero_grad()
    return backbone


# ---------------------------------------------------------------- changes that are none


def rotation(seed):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return Q  # or rotation and mirror: the models see angles only


def into_cell(pos, cell, periodic):
    return wrap(pos @ np.linalg.inv(cell)) @ cell if periodic else pos


def rotated(Z, pos, cell, periodic, seed):
    return Z, pos @ rotation(seed), cell @ rotation(seed), periodic


def translated(Z, pos, cell, periodic, seed):
    return Z, into_cell(pos + np.random.default_rng(seed).normal(size=3) * 5, cell, periodic), cell, periodic


def reordered(Z, pos, cell, periodic, seed):
    i = np.random.default_rng(seed).permutation(len(Z))
    return Z[i], pos[i], cell, periodic


def in_another_cell(Z, pos, cell, periodic, seed):
    lattices = [
        [[1, 1, 0], [0, 1, 0], [0, -1, 1]],
        [[1, 0, 0], [2, 1, 0], [0, 0, 1]],
        [[0, 1, 0], [1, 0, 0], [0, 1, 1]],
    ]
    cell = np.array(lattices[seed % 3]) @ cell  # the same lattice
    return Z, into_cell(pos, cell, periodic), cell, periodic


def supercell(Z, pos, cell, periodic, seed):
    if not periodic:
        return Z, pos, cell, periodic
    n = np.array([[2, 1, 1], [1, 1, 3], [2, 1, 2]][seed % 3])
    shifts = np.stack(np.meshgrid(*map(np.arange, n), indexing="ij"), -1).reshape(-1, 3) @ cell
    return np.tile(Z, len(shifts)), (pos + shifts[:, None]).reshape(-1, 3), cell * n[:, None], periodic


CHANGES = [rotated, translated, reordered, in_another_cell, supercell]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_crystal_is_represented_alike_however_it_is_written_down(backbone, arch, crystals, change):
    structures = [crystals[k] for k in EVERY]
    with torch.no_grad():
        x = backbone.embed(batch_of(structures, arch))
        changed = backbone.embed(batch_of([change(*s, 1) for s in structures], arch))
    assert float(x.std(0).max()) > 0.01 * float(x.abs().max()), "the crystals must not all look alike"
    assert float((changed - x).abs().max()) <= 1e-9 * float(x.abs().max())


def test_moving_an_atom_and_changing_an_element_change_the_representation(backbone, arch, crystals):
    Z, pos, cell, periodic = crystals["triclinic"]
    moved, other = pos + np.eye(7)[:, [3]] * [0.02, 0.01, 0], np.where(np.arange(7) == 3, Z % 50 + 10, Z)
    structures = [crystals["triclinic"], (Z, moved, cell, periodic), (other, pos, cell, periodic)]
    with torch.no_grad():
        x = backbone.embed(batch_of(structures, arch))
    assert float((x[1:] - x[0]).abs().amax(1).min()) > 1e-6 * float(x.abs().max())


def test_a_crystal_is_represented_alike_alone_and_in_a_batch(backbone, arch, crystals):
    structures = [crystals[k] for k in [*EVERY, "60 atoms"]]
    with torch.no_grad():
        together = backbone.embed(batch_of(structures, arch))
        alone = torch.cat([backbone.embed(batch_of([s], arch)) for s in structures])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- shapes, names, numbers


def test_features_readout_and_embedding_have_the_shapes_of_the_contract(backbone, batch):
    A, L = len(batch["Z"]), backbone.num_features
    with torch.no_grad():
        features, x, embedded = backbone.atom_features(batch), backbone(batch), backbone.embed(batch)
        assert torch.equal(backbone.readout(features), x)
        assert torch.equal(backbone.atom_features(batch), features)
        few = backbone.readout(features[3:5])  # each atom by itself
    assert features.shape == (A, L, backbone.adapter_width) and x.shape == (A, backbone.width)
    torch.testing.assert_close(few, x[3:5], rtol=1e-9, atol=1e-12)
    means = [atoms.mean(0) for atoms in x.split(batch["num_atoms"].tolist())]
    torch.testing.assert_close(embedded, torch.stack(means))


def test_the_architecture_on_a_card_rebuilds_the_backbone(backbone, arch, batch):
    assert backbone.arch == arch == json.loads(json.dumps(arch))
    again = M.build_backbone(json.loads(json.dumps(arch))).double().eval()
    again.load_state_dict(backbone.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(batch), backbone(batch))
        assert torch.equal(copy.deepcopy(again)(batch), backbone(batch))


def test_every_preset_is_accepted_and_has_the_same_arguments_and_training_for_every_stage(name):
    assert {"tiny", "small"} <= M.PRESETS[name].keys()
    for size, preset in M.PRESETS[name].items():
        arch = M.preset(size, backbone=name)
        M.check_architecture(arch)
        like = next(iter(M.PRESETS[name].values())).arch
        assert {k: type(v) for k, v in preset.arch.items()} == {k: type(v) for k, v in like.items()}
        for stage in ("pretrain", "full", "adapter", "finetune", "finetune_adapter", "scratch"):
            defaults = M.training_defaults(arch, stage)
            assert 0 < defaults["lr"] < 0.1 and ("epochs" in defaults) == (stage == "pretrain")


def test_an_architecture_with_a_setting_missing_added_or_wrong_is_refused_by_name(arch):
    for where, settings in (("", arch), ("graph", arch["graph"])):
        nested = (lambda found: arch | {"graph": found}) if where else (lambda found: found)
        for key, value in settings.items():
            if key == "graph":
                continue
            wrong = [[], {}, None, "x" * 65, -1, 10**400, float("nan")] + [10**6] * (type(value) is int)
            refused(nested({k: v for k, v in settings.items() if k != key}), key)
            for bad in wrong:
                refused(nested(settings | {key: bad}), key)
        refused(nested(settings | {"not_an_argument": 1}), "not_an_argument")
    for bad in (None, [], "text", 3, {}, arch | {"backbone": "no such"}, arch | {"backbone": []}):
        refused(bad, "backbone")
    for bad in (None, [], "text", 3):
        refused(arch | {"graph": bad}, "graph")


def refused(arch, pattern):
    with pytest.raises(UserError, match=pattern) as error:
        M.check_architecture(arch, "module.json")
    assert str(error.value).startswith("module.json: ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_names_that_the_backbone_gives_are_names_of_its_parameters(backbone):
    names = dict(backbone.named_parameters())
    blocks = [n for n in names if n.startswith(backbone.interactions)] if backbone.interactions else []
    assert bool(blocks) == bool(backbone.interactions) and len(blocks) < len(names)
    divisors = backbone.shared_gradient_divisors()
    assert divisors.keys() <= names.keys() and all(divisor >= 1 for divisor in divisors.values())


class Recorded(dict):
    """A batch that remembers what was asked of it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


def test_a_backbone_reads_only_what_the_contract_lists_of_the_graphs_it_names(backbone, batch):
    recorded = Recorded(batch)
    with torch.no_grad():
        backbone(recorded)
    listed = set(re.findall(r"[A-Za-z0-9_.]+", M.__doc__))
    pairs = {"e2e": "main", "a2e": "a2ee2a", "quad": "qint"}  # the graph of a mask's second edge
    for key in recorded.read:
        graph, dot, rest = key.rpartition(".")
        assert key in listed or dot and f"G.{rest}" in listed, f"{key} is not in the contract"
        assert not dot or pairs.get(graph, graph) in backbone.graphs, f"{key} is of no graph in .graphs"
    assert recorded.read >= {"Z", "pos", "edge_scale", "main.src", "main.dst"}


def test_a_graph_that_the_backbone_reads_must_be_built(backbone, arch):
    for graph in set(backbone.graphs) - {"main"}:
        refused(arch | {"graph": arch["graph"] | {graph: False}}, graph)


# ---------------------------------------------------------------- what training needs


@pytest.mark.parametrize("names", FEW, ids=" and ".join)
def test_crystals_of_one_atom_molecules_and_batches_without_edges_train(arch, crystals, names):
    backbone = ready(arch, crystals).train()
    x = backbone(batch_of([crystals[k] for k in names], arch))
    x.square().sum().backward()
    assert torch.isfinite(x).all() and len(x) == sum(len(crystals[k][0]) for k in names)
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)


def test_gradients_reach_every_parameter(backbone, batch):
    without_gradients(backbone)(batch).square().sum().backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_slopes_along_positions_are_those_of_finite_differences(backbone, arch, crystals):
    batch = batch_of([crystals["rattled SrTiO3"], crystals["water"]], arch)
    energy = lambda pos: backbone(batch | {"pos": pos}).square().sum()  # noqa: E731
    pos = batch["pos"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(pos), pos)
    v = torch.randn(pos.shape, generator=torch.Generator().manual_seed(0), dtype=pos.dtype)
    with torch.no_grad():
        difference = (energy(batch["pos"] + 1e-6 * v) - energy(batch["pos"] - 1e-6 * v)) / 2e-6
    scale = float(gradient.norm())
    assert scale > 0 and float((gradient * v).sum()) == pytest.approx(float(difference), abs=1e-6 * scale)


def test_edge_scale_makes_up_for_edges_that_dropout_took(backbone, arch, crystals):
    """Of the first features that sum over edges: their mean over draws is nearer to that of all edges."""
    p, structures = 0.3, [crystals[k] for k in ("rattled SrTiO3", "triclinic", "60 atoms")]
    records = build_graphs(structures, GraphConfig(**arch["graph"]))
    seeds = [torch.Generator().manual_seed(seed) for seed in range(12)]
    draws = [collate(records, edge_dropout=p, generator=seed) for seed in seeds]
    off = {}
    with torch.no_grad():
        whole = backbone.atom_features(collate(records))
        for scale in (1.0, 1 / (1 - p)):
            found = sum(backbone.atom_features(batch | {"edge_scale": scale}) for batch in draws) / len(draws)
            off[scale] = (found - whole).norm(dim=(0, 2))  # of each of the L features
    first = int((off[1.0] > 0).nonzero()[0])
    assert off[1 / (1 - p)][first] < 0.6 * off[1.0][first]


def test_the_sum_over_edges_of_all_draws_is_that_of_all_edges(crystals):
    batch = batch_of([crystals["triclinic"], crystals["water"]], M.preset("tiny"))
    x = torch.randn(len(batch["main.dst"]), 3, dtype=torch.float64)
    kept = torch.rand(len(x)) < 0.5
    part = lambda k: batch | {"main.dst": batch["main.dst"][k], "edge_scale": 2.0}  # noqa: E731
    sums = [M.sum_edges(x[k], part(k)) for k in (kept, ~kept)]  # two draws of p = 1/2 that make all
    torch.testing.assert_close(sum(sums) / 2, M.sum_edges(x, batch))


def test_fresh_adapters_change_little_learn_and_follow_from_the_architecture(backbone, arch, batch):
    adapters = M.new_adapters(backbone).double().eval()
    from_card = M.new_adapters(arch).double().state_dict()
    assert all(torch.equal(v, from_card[k]) for k, v in adapters.state_dict().items())
    plain, adapted = backbone(batch), backbone(batch, adapters)
    assert 0 < (adapted - plain).norm() < 0.1 * plain.norm()
    adapted.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapters.parameters())
    for up in adapters.up:
        up.weight.data.zero_()
    torch.testing.assert_close(backbone(batch, adapters), plain, rtol=0, atol=1e-9)


def test_forces_if_there_are_any_turn_with_the_crystal_and_add_only_parameters(name, arch, crystals):
    trained = arch | M.BACKBONES[name].force_arguments
    M.check_architecture(trained)
    backbone = ready(trained, crystals, torch.float64)
    if backbone.edge_width is None:
        assert not M.BACKBONES[name].force_arguments
        return
    kept, shapes = M.build_backbone(arch).state_dict(), backbone.state_dict()
    assert all(v.shape == shapes[k].shape for k, v in kept.items())  # theta_0 leaves the force branch out
    structures = [crystals["water"], crystals["rattled SrTiO3"]]
    model = M.PretrainModel(backbone, {"set": True}).double()
    with torch.no_grad():
        batch = batch_of(structures, trained)
        x, f, V = backbone.edge_features(batch)
        torch.testing.assert_close(x, backbone(batch))
        energy, forces, _ = model(batch, "set")
        e, turned, _ = model(batch_of([rotated(*s, 4) for s in structures], trained), "set")
    E = len(batch["main.src"])
    assert f.shape == (E, backbone.edge_width) and V.shape == (E, 3)
    torch.testing.assert_close(e, energy, rtol=1e-9, atol=0)
    torch.testing.assert_close(turned, forces @ torch.from_numpy(rotation(4)), rtol=0, atol=1e-9)


def test_checkpointing_where_there_is_any_changes_no_number(backbone, batch):
    if not backbone.can_checkpoint:
        assert not backbone.checkpointing
        return
    results = []
    for backbone.checkpointing in (False, True):
        x = without_gradients(backbone)(batch)
        x.square().sum().backward()
        results.append([x.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)])
    backbone.checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- what all backbones share


def test_an_unknown_preset_gets_the_papers_training_and_each_call_its_own_copy():
    arch = M.preset("tiny") | {"preset": "custom"}
    assert M.training_defaults(arch, "pretrain") == {"lr": 3e-4, "epochs": 2}
    assert M.training_defaults(arch, "adapter") == {"lr": 5e-4}
    assert M.training_defaults(arch, "finetune") == {"lr": 8e-5}
    M.training_defaults(arch, "full")["lr"] = 1.0
    assert M.training_defaults(arch, "full") == M.training_defaults(M.preset("base"), "full") == {"lr": 5e-4}
    assert M.training_defaults(M.preset("tiny"), "pretrain") == {"lr": 5e-3, "epochs": 20}
    assert M.training_defaults(M.preset("small"), "full") == {"lr": 5e-4}


def test_an_architecture_of_more_parameters_than_can_be_meant_is_refused_without_memory():
    huge = M.preset("large") | {"emb_size_edge": 65536}
    refused(huge, "parameters; at most 2,000,000,000")
    refused(M.preset("tiny") | {"num_blocks": 10**6}, "num_blocks is 1000000; should be from 1 to 100")


def test_a_backbone_whose_constructor_fails_is_refused_in_one_line(monkeypatch):
    class Divides(M.Backbone):
        def __init__(self, arch):
            super().__init__(arch)
            raise AssertionError(f"{arch['channels']} channels\nand 3 heads")

    graph = GraphConfig(a2ee2a=False, qint=False, a2a=False)
    monkeypatch.setitem(M.BACKBONES, "divides", Divides)
    monkeypatch.setitem(M.PRESETS, "divides", {"tiny": M.Preset({"channels": 4}, graph, M.PAPER)})
    with pytest.raises(UserError, match="divides cannot be built.*4 channels and 3 heads"):
        M.preset("tiny", backbone="divides")


def test_graph_settings_are_the_presets_own_whatever_its_arguments_are_called(monkeypatch):
    class Plain(M.Backbone):
        graphs = ("main", "a2a")

    graph = GraphConfig(cutoff=5.0, cutoff_a2a=9.0, max_neighbors=7, a2ee2a=False, qint=False, a2a=True)
    monkeypatch.setitem(M.BACKBONES, "plain", Plain)
    monkeypatch.setitem(M.PRESETS, "plain", {"tiny": M.Preset({"channels": 4}, graph, M.PAPER)})
    assert GraphConfig(**M.preset("tiny", backbone="plain")["graph"]) == graph


def test_the_smallest_architecture_that_is_accepted_gives_numbers(crystals):
    arch = M.preset("base", num_blocks=1, forces=True)
    for key, value in arch.items():
        if type(value) is int and key != "num_elements":
            arch[key] = next(n for n in (0, 1, 2) if accepted(arch | {key: n}))
    batch = batch_of([crystals["triclinic"], crystals["water"], crystals["isolated atom"]], arch)
    backbone = M.build_backbone(arch)
    M.fit_scale_factors(backbone, batch)
    assert torch.isfinite(backbone(batch)).all()


def accepted(arch):
    try:
        M.check_architecture(arch)
    except UserError:
        return False
    return True
