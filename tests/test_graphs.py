"""Neighbour lists, the four graphs and their tables: against pymatgen, brute force, the original's."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data
from crystals import MAX_ATOMS, Skip, check_distances, to_arrays, wrap
from data import GraphConfig, build_graphs, collate, edge_vectors, radius_graph

PERIODIC = ["NaCl", "SrTiO3", "bcc Fe", "rattled NaCl", "rattled SrTiO3", "triclinic", "thin", "60 atoms"]
EVERY = [*PERIODIC, "isolated atom", "water"]
DEEP = settings(max_examples=60, deadline=None, derandomize=True)


# ---------------------------------------------------------------- the radius graph


def edges(Z, pos, cell, periodic, r):
    """radius_graph of one structure: {(src, dst, offset): d}."""
    src, dst, offset, d = (
        x.tolist() for x in radius_graph(torch.from_numpy(pos), torch.from_numpy(cell), periodic, r)
    )
    found = {(s, t, *n): x for s, t, n, x in zip(src, dst, offset, d)}
    assert len(found) == len(src), "an edge is listed twice"
    return found


def edges_by_pymatgen(Z, pos, cell, pbc, r):
    from pymatgen.core import Lattice, Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements without an electronegativity
        structure = Structure(Lattice(cell), Z, pos, coords_are_cartesian=True)
    center, point, offset, d = structure.get_neighbor_list(r)
    return {
        (s, t, *map(int, n)): x
        for s, t, n, x in zip(point.tolist(), center.tolist(), offset.tolist(), d.tolist())
    }


def assert_same_edges(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[e] for e in expected], list(expected.values()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PERIODIC)
@pytest.mark.parametrize("r", [1.0, 4.3, 12.0])  # shorter than any bond, within one cell, many cells
def test_radius_graph_equals_pymatgens_neighbour_list(crystals, name, r):
    if name == "60 atoms":
        r = min(r, 8.0)
    assert_same_edges(edges(*crystals[name], r), edges_by_pymatgen(*crystals[name], r))


@st.composite
def random_cells(draw):
    """Any cell: flat, long, skewed, left-handed; 1 to 6 atoms anywhere in it, or outside it."""
    a, b, c = (draw(st.floats(2.2, 14)) for _ in range(3))
    xy, xz, yz = (draw(st.floats(-1.5, 1.5)) for _ in range(3))
    cell = np.array([[a, 0, 0], [xy * b, b, 0], [xz * c, yz * c, c]])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    cell = cell[rng.permutation(3)] @ rotation
    frac = rng.uniform(size=(draw(st.integers(1, 6)), 3)) + draw(
        st.sampled_from([0, 0, 1, 3])
    ) * rng.integers(-1, 2, 3)
    return rng.integers(1, 90, len(frac)), frac @ cell, cell, True


@DEEP
@given(random_cells(), st.sampled_from([3.0, 5.5, 7.0]))
def test_radius_graph_equals_pymatgens_in_random_cells(structure, r):
    expected = edges_by_pymatgen(*structure, r)
    assume(min(expected.values(), default=1) > 0.05 and all(abs(d - r) > 1e-7 for d in expected.values()))
    assert_same_edges(edges(*structure, r), expected)


@pytest.mark.parametrize("r", [0.9, 1.2, 5.0])
def test_radius_graph_of_molecules_equals_brute_force(r):
    rng = np.random.default_rng(3)
    molecules = [
        (np.ones(n, int), rng.uniform(0, 3, (n, 3)) + 100 * n, np.zeros((3, 3)), False) for n in (1, 2, 3, 9)
    ]
    for molecule in molecules:
        d = np.linalg.norm(molecule[1][:, None] - molecule[1][None], axis=2)
        expected = {(s, t, 0, 0, 0): d[s, t] for s, t in zip(*np.nonzero((d <= r) & (d > 0)))}
        assert_same_edges(edges(*molecule, r), expected)


def test_wrapping_or_not_changes_only_offsets(crystals):
    Z, pos, cell, _ = crystals["triclinic"]
    moved = np.array([[0, 0, 0], [1, 0, 0], [0, -2, 0], [0, 0, 3], [5, 5, 5], [-1, 1, 0], [0, 0, 0]])
    wrapped = wrap((pos + moved @ cell) @ np.linalg.inv(cell)) @ cell
    np.testing.assert_allclose(wrapped, pos, atol=1e-12)
    shifted = {
        (s, t, *(np.array(n) - moved[s] + moved[t]).tolist()): d
        for (s, t, *n), d in edges(*crystals["triclinic"], 6.0).items()
    }
    assert_same_edges(edges(Z, pos + moved @ cell, cell, True, 6.0), shifted)


def test_an_atom_exactly_at_the_cutoff_is_a_neighbour():
    cubic = (np.array([84]), np.zeros((1, 3)), np.eye(3) * 3.0, True)
    assert len(edges(*cubic, 6.0)) == 6 + 12 + 8 + 6
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert len(edges(cubic[0], cubic[1], cubic[2] @ turned, True, 6.0)) == 32


# ---------------------------------------------------------------- large cells: bins


def brute_force(pos, cell, periodic, r):
    """[(dst, src, offset, d)] sorted, from a loop that knows no boxes and no bins."""
    reach = [0, 0, 0]
    if periodic:
        inverse = np.linalg.inv(cell)
        reach = np.ceil(r * np.linalg.norm(inverse, axis=0) + np.ptp(pos @ inverse, axis=0)).astype(int)
    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), -1).reshape(-1, 3)
    found = []
    for n in offsets:
        d = np.linalg.norm(pos[None] + n @ cell - pos[:, None], axis=2)  # (dst, src)
        for dst, src in zip(*np.nonzero((d <= r) & (d > 0.01))):
            found.append((int(dst), int(src), *n.tolist(), d[dst, src]))
    return sorted(found)


@st.composite
def any_structure(draw):
    """Skewed cells, slabs with vacuum, molecules; up to 30 atoms, inside or outside, crowded or far apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind, n = draw(st.sampled_from(["cell", "slab", "molecule", "far"])), draw(st.integers(1, 30))
    if kind in ("molecule", "far"):
        pos = rng.uniform(-8, 8, (n, 3)) * draw(st.sampled_from([0.3, 1.0, 4.0]))
        if kind == "far":
            pos[: n // 2] += 1e7 * rng.normal(size=3)
        return pos, np.zeros((3, 3)), False
    _, _, cell, _ = draw(random_cells())
    frac = rng.uniform(size=(n, 3))
    if kind == "slab":
        cell[2] *= 4
        frac[:, 2] /= 4
    return (frac + draw(st.sampled_from([0, 1])) * rng.integers(-2, 3, (n, 3))) @ cell, cell, True


@DEEP
@given(any_structure(), st.sampled_from([0.8, 3.0, 5.5]), st.sampled_from([1, 50, 1 << 20]))
def test_bins_and_all_pairs_find_the_same_as_brute_force(structure, r, block):
    pos, cell, periodic = structure
    expected = brute_force(pos, cell, periodic, r + 1e-8)
    assume(all(abs(e[-1] - r) > 1e-7 and e[-1] > 0.011 for e in expected))
    images = (torch.arange(len(pos)), torch.zeros(len(pos), 3, dtype=torch.long))
    pos, cell = torch.from_numpy(pos), torch.from_numpy(cell)
    src, offset = data.images(pos, cell, r) if periodic else images
    image = (pos[src] + offset.double() @ cell).T
    for found in (
        data.pairs_of_bins(pos.T, image, r + 1e-8, block),
        data.pairs_of_all(pos.T, image, r + 1e-8),
    ):
        dst, j, d2 = found
        listed = torch.column_stack([dst, src[j], offset[j]]).tolist()
        assert listed == [[*e[:-1]] for e in expected]  # in the same order
        np.testing.assert_allclose(d2.sqrt(), [e[-1] for e in expected], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_graphs_built_with_bins_equal_those_built_without(crystals, name, monkeypatch):
    plain = build_graphs([crystals[name]], GraphConfig())[0]
    monkeypatch.setattr(data, "DENSE", 0)
    binned = build_graphs([crystals[name]], GraphConfig())[0]
    assert all(np.array_equal(plain[key], binned[key]) for key in plain)


BIG = """
import sys
sys.modules |= dict.fromkeys("pymatgen ase matminer pandas scipy tqdm safetensors".split())  # not to be had
import numpy as np
from data import GraphConfig, build_graphs, collate
from crystals import to_arrays
from model import preset
n, a = 16000, 2.4
grid = np.stack(np.meshgrid(*[np.arange(26)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
pos = a * grid + np.random.default_rng(0).uniform(0, 0.4, (n, 3))
Z, pos, cell = to_arrays((np.full(n, 14), pos, 26 * a * np.eye(3), [True] * 3))
batch = collate(build_graphs([(Z, pos, cell, True)], GraphConfig(**preset("small")["graph"])))
assert len(batch["a2a.src"]) > 60 * n and len(batch["main.src"]) > 12 * n
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_16000_atoms_take_less_than_4_gb_a_minute_and_no_package_but_torch_and_numpy():
    root = Path(data.__file__).parent
    ran = subprocess.run([sys.executable, "-c", BIG], cwd=root, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 4 * 2**20  # KiB


def test_more_atoms_than_a_graph_can_number_are_skipped():
    pos = np.zeros((MAX_ATOMS + 1, 3))
    pos[:, 0] = np.arange(len(pos))
    assert len(to_arrays((np.full(MAX_ATOMS, 6), pos[1:], np.zeros((3, 3)), [False] * 3))[0]) == MAX_ATOMS
    with pytest.raises(Skip, match="too many atoms: 32769; the most is 32768"):
        to_arrays((np.full(len(pos), 6), pos, np.zeros((3, 3)), [False] * 3))
    last = build_graphs(
        [(np.full(MAX_ATOMS, 6), pos[1:], np.zeros((3, 3)), False)], GraphConfig(cutoff=1.5, a2a=False)
    )
    assert last[0]["main.index"].max() == MAX_ATOMS - 1 and last[0]["main.index"].min() == 0


@settings(DEEP, max_examples=20)
@given(any_structure(), st.booleans())
def test_close_atoms_are_found_in_large_cells_as_in_small_ones(structure, close):
    pos, cell, periodic = structure
    rng = np.random.default_rng(len(pos))
    many = np.vstack([pos, rng.uniform(-1, 1, (70, 3)) @ (cell if periodic else 30 * np.eye(3))])
    if close:
        image = rng.integers(-1, 2, 3) @ cell
        many[-1] = many[0] + image + 0.09 * np.array([0.6, -0.64, 0.48])
    d = brute_force(many, cell, periodic, 0.2)
    nearest = min((e[-1] for e in d), default=1.0)
    assume(abs(nearest - 0.1) > 1e-6 and nearest > 0.011)
    if nearest < 0.1:
        with pytest.raises(Skip, match="atoms closer than 0.1 A"):
            check_distances(many, cell)
    else:
        check_distances(many, cell)


def test_coincident_atoms_are_refused_at_once_however_many():
    for cell in (np.zeros((3, 3)), 5 * np.eye(3)):
        with pytest.raises(Skip, match="atoms closer than 0.1 A: 0.000 A"):
            check_distances(np.ones((20000, 3)), cell)


# ---------------------------------------------------------------- caps


def graph_of(structures, **settings):
    """build_graphs and collate: the batch as the model gets it."""
    return collate(build_graphs(structures, GraphConfig(**settings)))


def edge_set(batch, name="main"):
    """{(src, dst, offset)}; fails where an edge is there twice."""
    rows = torch.cat(
        [batch[f"{name}.src"][:, None], batch[f"{name}.dst"][:, None], batch[f"{name}.offset"]], 1
    ).tolist()
    assert len({*map(tuple, rows)}) == len(rows)
    return {*map(tuple, rows)}


def degrees(batch, name="main"):
    return torch.bincount(batch[f"{name}.dst"], minlength=len(batch["Z"])).tolist()


def reverse(edge):
    s, t, *n = edge
    return (t, s, *(-x for x in n))


def test_a_cap_keeps_whole_shells(crystals):
    # rocksalt shells: 6, 12, 8, 6, 24 neighbours; bcc: 8, 6, 12
    batch = graph_of([crystals["NaCl"]], max_neighbors=30, max_neighbors_a2ee2a=20, max_neighbors_qint=8)
    assert (
        degrees(batch) == [32, 32]
        and degrees(batch, "a2ee2a") == [26, 26]
        and degrees(batch, "qint") == [18, 18]
    )
    batch = graph_of([crystals["bcc Fe"]], max_neighbors=9, max_neighbors_a2ee2a=8, max_neighbors_qint=1)
    assert degrees(batch) == [14] and degrees(batch, "a2ee2a") == [8] and degrees(batch, "qint") == [8]


@pytest.mark.parametrize("k", [1, 7, 20])
def test_without_ties_a_cap_keeps_the_k_nearest(crystals, k):
    structure = crystals["triclinic"]
    batch = graph_of([structure], cutoff_a2ee2a=9.0, max_neighbors_a2ee2a=k)
    d = edges(*structure, 9.0)
    expected = set()
    for atom in range(len(structure[0])):
        incoming = sorted((e for e in d if e[1] == atom), key=d.get)
        assert d[incoming[k]] - d[incoming[k - 1]] > 1e-3
        expected |= {*incoming[:k]}
    assert edge_set(batch, "a2ee2a") == expected


def test_neighbours_within_a_thousandth_of_the_kth_are_kept_and_others_are_not():
    line = lambda *x: (np.ones(len(x), int), np.array([[v, 0, 0] for v in x]), np.zeros((3, 3)), False)  # noqa: E731
    near = graph_of([line(0, 1.0, -1.0009)], max_neighbors_qint=1)
    far = graph_of([line(0, 1.0, -1.0011)], max_neighbors_qint=1)
    assert degrees(near, "qint")[0] == 2 and degrees(far, "qint")[0] == 1


def test_the_cap_counts_only_neighbours_within_the_cutoff(crystals):
    batch = graph_of([crystals["NaCl"]], cutoff=4.0, max_neighbors=30, cutoff_a2ee2a=3.0, cutoff_qint=2.0)
    assert (
        degrees(batch) == [18, 18] and degrees(batch, "a2ee2a") == [6, 6] and degrees(batch, "qint") == [0, 0]
    )


def test_an_undirected_edge_exists_when_either_end_chose_it():
    # 2 and 3 are close; 1 chooses 2 (nearest), 0 chooses 1; neither is chosen back
    pos = np.array([[0.0, 0, 0], [3.0, 0, 0], [5.0, 0, 0], [6.0, 0, 0]])
    batch = graph_of([(np.ones(4, int), pos, np.zeros((3, 3)), False)], max_neighbors=1)
    pairs = {(s, t) for s, t, *_ in edge_set(batch)}
    assert pairs == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)}


@pytest.mark.parametrize("name", PERIODIC)
def test_main_edges_are_the_chosen_ones_and_their_reverses(crystals, name):
    k = {"max_neighbors": 11, "max_neighbors_a2ee2a": 11, "cutoff": 7.0, "cutoff_a2ee2a": 7.0}
    batch = graph_of([crystals[name]], **k)
    chosen = edge_set(batch, "a2ee2a")  # the same cap and cutoff, directed
    assert edge_set(batch) == chosen | {*map(reverse, chosen)}


def test_swap_is_an_involution_that_reverses_every_edge(crystals):
    batch = graph_of([crystals[k] for k in EVERY], cutoff=6.0)
    swap, E = batch["main.swap"], len(batch["main.src"])
    assert torch.equal(swap[swap], torch.arange(E)) and bool((swap != torch.arange(E)).all())
    assert torch.equal(batch["main.src"][swap], batch["main.dst"])
    assert torch.equal(batch["main.offset"][swap], -batch["main.offset"])
    d, V = edge_vectors(batch, "main", torch.float64)
    torch.testing.assert_close(d[swap], d, rtol=0, atol=1e-12)
    torch.testing.assert_close(V[swap], -V, rtol=0, atol=1e-12)


def test_edge_vectors_point_from_the_source_image_to_the_target(crystals):
    batch = graph_of([crystals["triclinic"]], cutoff=6.0)
    listed = edges(*crystals["triclinic"], 6.0)
    d, V = edge_vectors(batch, "main", torch.float64)
    keys = torch.cat(
        [batch["main.src"][:, None], batch["main.dst"][:, None], batch["main.offset"]], 1
    ).tolist()
    np.testing.assert_allclose(d, [listed[tuple(k)] for k in keys], atol=1e-12)
    Z, pos, cell, _ = crystals["triclinic"]
    s, t, *n = keys[5]
    np.testing.assert_allclose(d[5] * V[5], pos[t] - (pos[s] + n @ cell), atol=1e-12)
    assert all(x.dtype == torch.float32 for x in edge_vectors(batch, "main"))


def test_the_published_rule_keeps_exactly_k_and_lets_the_higher_numbered_atom_choose(crystals):
    structures = [crystals["NaCl"], crystals["SrTiO3"], crystals["60 atoms"]]
    batch = graph_of(structures, graph_rule="published", max_neighbors_a2ee2a=30)
    assert degrees(batch, "a2ee2a") == [30] * 67 and degrees(batch, "qint") == [8] * 67
    chosen = {e for e in edge_set(batch, "a2ee2a") if e[0] < e[1] or (e[0] == e[1] and e[2:] < (0, 0, 0))}
    assert edge_set(batch) == chosen | {*map(reverse, chosen)}


def permuted(structure, seed):
    i = np.random.default_rng(seed).permutation(len(structure[0]))
    return (structure[0][i], structure[1][i], *structure[2:]), i


@pytest.mark.parametrize("name", ["SrTiO3", "rattled SrTiO3", "60 atoms"])
def test_the_symmetric_graph_is_the_same_in_another_order_of_the_atoms(crystals, name):
    plain = graph_of([crystals[name]])
    other, i = permuted(crystals[name], 2)
    renamed = graph_of([other])
    for graph in ("main", "a2ee2a", "qint"):
        assert edge_set(plain, graph) == {(i[s], i[t], *n) for s, t, *n in edge_set(renamed, graph)}


def test_the_published_graph_is_not(crystals):
    other, i = permuted(crystals["rattled SrTiO3"], 2)
    plain, renamed = (
        edge_set(graph_of([s], graph_rule="published")) for s in (crystals["rattled SrTiO3"], other)
    )
    assert plain != {(i[s], i[t], *n) for s, t, *n in renamed}


def test_unwanted_graphs_are_not_built(crystals):
    batch = graph_of([crystals["NaCl"]], cutoff=6.0, a2ee2a=False, qint=False, a2a=False)
    assert not [k for k in batch if k.startswith(("a2", "qint", "quad"))]


# ---------------------------------------------------------------- against the original's own edges


def stored(file, name):
    graph = file["graphs"][name]
    rows = torch.cat([graph["edge_index"].T, graph["cell_offset"]], dim=1).tolist()
    return {*map(tuple, rows)}


def parity_structures(file):
    pos, Z, cell, n = (file["inputs"][k] for k in ("pos", "atomic_numbers", "cell", "natoms"))
    return [
        (z.numpy(), p.double().numpy(), c.double().numpy(), True)
        for z, p, c in zip(Z.split(n.tolist()), pos.split(n.tolist()), cell)
    ]


@pytest.mark.parametrize("rule", ["symmetric", "published"])
def test_edges_equal_the_originals_where_nothing_is_tied(parity_file, rule):
    batch = graph_of(parity_structures(parity_file), graph_rule=rule)
    for name in ("a2a", "a2ee2a", "qint"):
        assert edge_set(batch, name) == stored(parity_file, name)


def test_the_published_rule_gives_the_originals_main_graph(parity_file):
    batch = graph_of(parity_structures(parity_file), graph_rule="published")
    assert edge_set(batch) == stored(parity_file, "main")


def test_the_symmetric_rule_adds_to_it_what_only_the_other_end_chose(parity_file):
    chosen = stored(parity_file, "main_before_symmetrisation")
    found = edge_set(graph_of(parity_structures(parity_file)))
    assert found == chosen | {*map(reverse, chosen)}
    assert found > stored(parity_file, "main")


# ---------------------------------------------------------------- tables


def list_edges(batch, name):
    """Edges of one graph as (src, dst, offset), and the positions of those into each atom."""
    src, dst, offset = (batch[f"{name}.{k}"].tolist() for k in ("src", "dst", "offset"))
    into = {}
    for e, t in enumerate(dst):
        into.setdefault(t, []).append(e)
    return list(zip(src, dst, map(tuple, offset))), into


def add(n, m):
    return tuple(x + y for x, y in zip(n, m))


def triplets(batch, out, inp, same_graph=False):
    """{(output edge c -> a, input edge b -> a)}, listed: all pairs but the same edge, or the same image."""
    out_edges, _ = list_edges(batch, out)
    in_edges, into = list_edges(batch, inp)
    return {
        (i, j)
        for i, (c, a, n) in enumerate(out_edges)
        for j in into.get(a, [])
        if (i != j if same_graph else (c, n) != (in_edges[j][0], in_edges[j][2]))
    }


def quadruplets(batch):
    """{(c -> a, b -> a, d -> b)}, listed by the definition."""
    main, into_main = list_edges(batch, "main")
    qint, into_qint = list_edges(batch, "qint")
    found = set()
    for i, (c, a, n_ca) in enumerate(main):
        for j in into_qint.get(a, []):
            b, _, n_ba = qint[j]
            if (b, n_ba) == (c, n_ca):
                continue
            for k in into_main.get(b, []):
                d, _, n_db = main[k]
                n_da = add(n_db, n_ba)
                if (d, n_da) not in ((a, (0, 0, 0)), (c, n_ca)):
                    found.add((i, j, k))
    return found


def pairs_of(mask, rows, columns):
    """Mask (A, K, K2) over two tables of edges, (A, K) and (A, K2), as a set of pairs."""
    atom, i, j = mask.nonzero().T
    return {*zip(rows[atom, i].tolist(), columns[atom, j].tolist())}


def quadruplets_of(batch):
    main, qint = batch["main.table"], batch["qint.table"]
    q, c, d = batch["quad.mask"].nonzero().T
    a, b = batch["qint.dst"][q], batch["qint.src"][q]
    found = set(zip(main[a, c].tolist(), q.tolist(), main[b, d].tolist()))
    allowed = pairs_of(batch["qint.mask"], main, qint)
    return {(i, j, k) for i, j, k in found if (i, j) in allowed}


@pytest.fixture(scope="module")
def mixed(crystals):
    """Small caps, unlike each other, and ties; molecules and atoms without edges among the crystals."""
    names = ["NaCl", "isolated atom", "triclinic", "water", "thin", "bcc Fe", "rattled SrTiO3"]
    return graph_of(
        [crystals[k] for k in names],
        max_neighbors=6,
        max_neighbors_a2ee2a=9,
        max_neighbors_qint=4,
        cutoff_a2a=5.0,
    )


def test_tables_hold_every_edge_once_at_its_target(mixed):
    for name in ("main", "a2ee2a", "qint"):
        dst, table = mixed[f"{name}.dst"], mixed[f"{name}.table"]
        real = table < len(dst)
        assert sorted(table[real].tolist()) == list(range(len(dst)))
        assert torch.equal(dst[table[real]], real.nonzero()[:, 0])
        assert table.shape[1] == max(degrees(mixed, name))
    assert torch.equal(
        mixed["main.table"].flatten()[mixed["main.slot"]], torch.arange(len(mixed["main.dst"]))
    )


def test_triplet_masks_equal_the_listed_triplets(mixed):
    main, a2ee2a = mixed["main.table"], mixed["a2ee2a.table"]
    assert pairs_of(mixed["e2e.mask"], main, main) == triplets(mixed, "main", "main", same_graph=True)
    assert pairs_of(mixed["a2e.mask"], main, a2ee2a) == triplets(mixed, "main", "a2ee2a")
    assert pairs_of(mixed["a2e.mask"].transpose(1, 2), a2ee2a, main) == triplets(mixed, "a2ee2a", "main")
    assert pairs_of(mixed["qint.mask"], main, mixed["qint.table"]) == triplets(mixed, "main", "qint")


def test_quadruplet_masks_equal_the_listed_quadruplets(mixed):
    assert quadruplets_of(mixed) == quadruplets(mixed)


@settings(DEEP, max_examples=15)
@given(random_cells())
def test_quadruplet_masks_in_random_cells(structure):
    batch = graph_of([structure], max_neighbors=3, max_neighbors_a2ee2a=2, max_neighbors_qint=2, a2a=False)
    assume(len(batch["main.src"]) < 150)
    assert quadruplets_of(batch) == quadruplets(batch)
    assert pairs_of(batch["a2e.mask"], batch["main.table"], batch["a2ee2a.table"]) == triplets(
        batch, "main", "a2ee2a"
    )


def test_numbers_of_triplets_and_quadruplets_equal_the_originals(parity_file):
    from parity import given_batch

    batch, indices = given_batch(parity_file, torch.float64), parity_file["indices"]
    counts = indices["counts"]
    assert int(batch["e2e.mask"].sum()) == counts["e2e"]
    assert int(batch["a2e.mask"].sum()) == counts["a2e"] == counts["e2a"]
    assert int(batch["qint.mask"].sum()) == counts["quad_triplet_out"]
    slot = batch["main.slot"]
    assert torch.equal(batch["e2e.mask"].sum(2).flatten()[slot], indices["e2e_per_main_edge"])
    assert torch.equal(batch["a2e.mask"].sum(2).flatten()[slot], indices["a2e_per_main_edge"])
    assert torch.equal(batch["qint.mask"].sum(2).flatten()[slot], indices["quad_triplet_out_per_main_edge"])
    listed = quadruplets_of(batch)
    per_edge = np.bincount([i for i, _, _ in listed], minlength=len(slot))
    assert len(listed) == counts["quadruplets"]
    assert per_edge.tolist() == indices["quadruplets_per_main_edge"].tolist()


def test_pairs_of_the_atom_graph_gather_all_images(mixed):
    src, dst, pair = mixed["a2a.src"], mixed["a2a.dst"], mixed["a2a.pair"]
    assert torch.equal(mixed["a2a.pair_src"][pair], src)
    expected = {*zip(src.tolist(), dst.tolist())}
    table, real = mixed["a2a.table"], mixed["a2a.table"] < len(mixed["a2a.pair_src"])
    atom = real.nonzero()[:, 0]
    assert {*zip(mixed["a2a.table_src"][real].tolist(), atom.tolist())} == expected
    assert torch.equal(mixed["a2a.pair_src"][table[real]], mixed["a2a.table_src"][real])
    assert bool((mixed["a2a.table_src"][~real] == len(mixed["Z"])).all())
    by_pair = torch.empty(len(mixed["a2a.pair_src"]), dtype=torch.long)
    by_pair[table[real]] = atom
    assert torch.equal(by_pair[pair], dst)


def test_crystals_without_edges_make_legal_batches(crystals):
    for structures in ([crystals["isolated atom"]], [crystals["isolated atom"]] * 3):
        batch = graph_of(structures)
        assert degrees(batch) == [0] * len(structures) and len(batch["main.swap"]) == 0
        assert batch["main.table"].shape == (len(structures), 0) and batch["quad.mask"].numel() == 0


def test_graphs_do_not_depend_on_what_else_is_in_the_batch(crystals):
    config, names = GraphConfig(cutoff_a2a=6.0), EVERY
    together = build_graphs([crystals[k] for k in names], config)
    for name, record in zip(names, together, strict=True):
        alone = build_graphs([crystals[name]], config)[0]
        assert record.keys() == alone.keys()
        assert all(np.array_equal(record[k], alone[k]) for k in record)


def test_collate_numbers_atoms_through(crystals):
    names = ["water", "NaCl", "isolated atom", "SrTiO3"]
    batch = graph_of([crystals[k] for k in names])
    assert (
        batch["num_atoms"].tolist() == [3, 2, 1, 5]
        and batch["batch"].tolist() == [0] * 3 + [1] * 2 + [2] + [3] * 5
    )
    assert batch["Z"].tolist() == [z for k in names for z in crystals[k][0]]
    assert torch.equal(batch["batch"][batch["main.src"]], batch["batch"][batch["main.dst"]])


def test_edge_dropout_takes_both_directions_of_an_edge(crystals):
    records = build_graphs([crystals["60 atoms"]], GraphConfig(cutoff_a2a=6.0))
    draw = lambda seed: collate(records, edge_dropout=0.3, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    batch, full = draw(0), collate(records)
    kept = edge_set(batch)
    assert kept == {*map(reverse, kept)} and kept < edge_set(full)
    assert 0.6 < len(kept) / len(edge_set(full)) < 0.8
    assert edge_set(draw(0)) == kept != edge_set(draw(1))


def test_the_batch_says_by_what_sums_over_edges_are_scaled(crystals):
    records = build_graphs([crystals["NaCl"]], GraphConfig(cutoff=6.0))
    assert collate(records)["edge_scale"] == 1.0
    assert collate(records, edge_dropout=0.2)["edge_scale"] == pytest.approx(1.25)
