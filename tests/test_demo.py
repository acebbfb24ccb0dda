"""The embedded crystals: formulas against textbook numbers, labels against each other, structures against pymatgen."""

import functools
import hashlib

import numpy as np
import pytest

import demo

HUB = [name for name, task in demo.TASKS.items() if task["role"] == "hub"]
DOWNSTREAM = [name for name, task in demo.TASKS.items() if task["role"] == "downstream"]
PRETRAIN = [name for name, task in demo.TASKS.items() if task["role"] == "pretrain"]
ROWS = {row[0]: row for row in demo.IONS.values()}

make = functools.cache(demo.make)  # nothing here changes what it is given


def crystals(s):
    """The demo.Crystal of every structure in a data set."""
    ions = (np.array([ROWS[z] for z in Z.tolist()], demo.COLUMNS) for Z in s["Z"])
    return [demo.Crystal("", *row) for row in zip(ions, s["pos"], s["cell"], strict=True)]


@pytest.mark.parametrize(
    "prototype, ions, madelung",
    [
        ("rocksalt", {"A": "Na", "X": "Cl"}, 1.747565),
        ("CsCl", {"A": "Cs", "X": "Cl"}, 1.762675),
        ("zincblende", {"A": "Cu", "X": "Cl"}, 1.638055),
        ("fluorite", {"A": "Ca", "X": "F"}, 5.038785),  # per formula unit
    ],
)
def test_ewald_gives_the_madelung_constant(prototype, ions, madelung):
    c = demo.build(prototype, **ions)
    d = demo.neighbours(c, 5.0)[3].min()
    assert -demo.ewald(c, c.ion["q"]) * d / demo.COULOMB == pytest.approx(madelung, abs=2e-6)


def test_ewald_does_not_depend_on_its_width_on_the_cell_or_on_the_origin():
    c = crystals(make("demo_ewald", 20))[7]
    E = demo.ewald(c, c.ion["q"])
    assert demo.ewald(c, c.ion["q"], width=1.4) == pytest.approx(E, rel=1e-7)
    moved = c._replace(pos=c.pos + [0.3, -1.7, 4.0])
    assert demo.ewald(moved, c.ion["q"]) == pytest.approx(E, rel=1e-7)
    double = demo.supercell(c, np.array(demo.CUAU))
    assert demo.ewald(double, double.ion["q"]) == pytest.approx(2 * E, rel=1e-7)


@pytest.mark.parametrize("name", HUB + DOWNSTREAM)
def test_labels_are_the_same_in_a_supercell_and_after_a_rotation(name):
    label = demo.LABELS[name]
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    for c in crystals(make(name, 20))[:3]:
        assert label(demo.supercell(c, np.diag([1, 1, 2]))) == pytest.approx(label(c), rel=1e-6)
        assert label(c._replace(pos=c.pos @ turn, cell=c.cell @ turn)) == pytest.approx(label(c), rel=1e-6)


def test_table_salt_has_the_textbook_values_of_every_formula():
    c = demo.build("rocksalt", A="Na", X="Cl")
    assert np.linalg.norm(c.cell[0]) * 2**0.5 == pytest.approx(5.66)  # 2 (1.02 + 1.81)
    assert demo.ewald_energy(c) == pytest.approx(-1.747565 * 14.399645 / 2.83 / 2, rel=1e-5)
    assert demo.lattice_energy(c) == pytest.approx(demo.ewald_energy(c) * (1 - 1 / 8), rel=0.005)  # n = (7 + 9) / 2
    assert demo.volume_per_atom(c) == pytest.approx(2.83**3)
    assert demo.density(c) == pytest.approx(58.44 / 6.02214e23 / (2 * 2.83e-8**3), rel=1e-4)
    x = 4 * np.pi / 3 * 3.37 / (2 * 2.83**3)
    assert demo.dielectric(c) == pytest.approx((1 + 2 * x) / (1 - x))
    bulk = 6 / 4 * (1971 - 220 * 3) * 2.83**-3.5
    assert demo.bulk_modulus(c) == pytest.approx(bulk, rel=2e-3)  # farther bonds weigh a little
    omega2 = 9648.53 * 6 * 14.399645 * 0.2912608 * 7 / 2.83**3 / 3 * (1 / 22.990 + 1 / 35.45) / 2  # ps^-2
    assert demo.phonon_frequency(c) == pytest.approx(omega2**0.5 / (2 * np.pi), rel=2e-3)


def test_heat_capacity_goes_from_debyes_cube_to_dulong_and_petit(monkeypatch):
    monkeypatch.setattr(demo, "phonon_frequency", lambda c: 0.01)
    assert demo.heat_capacity(None) == pytest.approx(3 * 8.314463, rel=1e-4)
    monkeypatch.setattr(demo, "phonon_frequency", lambda c: 100.0)
    x = 47.9924 * 100 * (5 / 3) ** 0.5 / 150
    assert demo.heat_capacity(None) == pytest.approx(12 * np.pi**4 / 5 * 8.314463 / x**3, rel=1e-3)


@pytest.mark.parametrize("name", PRETRAIN)
def test_forces_are_the_negative_gradient_of_the_energy(name):
    s = make(name, 30)
    for m in (2, 11, 29):
        c, h = crystals(s)[m], 1e-5
        for atom, x in ((0, 0), (len(c.pos) - 1, 2)):
            step = np.zeros_like(c.pos)
            step[atom, x] = h
            up, down = (demo.pair_potential(c._replace(pos=c.pos + sign * step))[0] for sign in (1, -1))
            assert s["forces"][m][atom, x] == pytest.approx(-(up - down) / (2 * h), rel=1e-5, abs=1e-5)
        assert np.abs(s["forces"][m].sum(axis=0)).max() < 1e-6


def test_energy_is_smooth_where_an_atom_crosses_the_cutoff():
    ion = np.array([demo.IONS["Na"], demo.IONS["Cl"]], demo.COLUMNS)
    pairs = [demo.Crystal("", ion, np.array([[0, 0, 0], [0, 0, z]]), np.zeros((3, 3))) for z in (5.999, 6.001)]
    (E, F), (E_beyond, F_beyond) = map(demo.pair_potential, pairs)
    assert E == pytest.approx(E_beyond, abs=1e-6)
    assert np.abs(F).max() < 1e-3 and np.abs(F_beyond).max() == 0


@pytest.mark.parametrize("name", demo.TASKS)
def test_every_data_set_is_complete_finite_and_without_outliers(name):
    s, task = make(name), demo.TASKS[name]
    M = task["n"]
    assert len(s["ids"]) == len(set(s["ids"])) == len(s["Z"]) == len(s["pos"]) == len(s["cell"]) == len(s["y"]) == M
    assert s["unit"] == task["unit"] and s["pooling"] == task["pooling"]
    assert np.isfinite(s["y"]).all() and s["y"].std() > 0
    y = s["y"] / np.array([len(Z) for Z in s["Z"]]) if s["pooling"] == "sum" else s["y"]
    assert np.abs(y - np.median(y)).max() < 7 * y.std()
    assert (s["forces"] is None) == (task["role"] != "pretrain")
    assert (s["pbc"] == (name != "demo_clusters")).all()
    for Z, pos, cell, periodic in zip(s["Z"], s["pos"], s["cell"], s["pbc"], strict=True):
        assert Z.dtype == np.int64 and pos.dtype == np.float64 and pos.shape == (len(Z), 3) and cell.shape == (3, 3)
        assert 2 <= len(Z) <= 16 and sum(ROWS[z][2] for z in Z.tolist()) == 0  # neutral
        if periodic:
            frac = pos @ np.linalg.inv(cell)
            assert np.linalg.det(cell) > 0 and frac.min() > -1e-5 and frac.max() < 1 + 1e-5
    if s["forces"]:
        F = np.linalg.norm(np.concatenate(s["forces"]), axis=1)
        assert 0.1 < np.median(F) < 2 and F.max() < 60


def test_sizes_and_counts_are_those_asked_for():
    assert len(HUB) >= 6 and len(DOWNSTREAM) >= 3 and all(demo.TASKS[name]["n"] == 1000 for name in HUB)
    assert all(100 <= demo.TASKS[name]["n"] <= 120 for name in DOWNSTREAM)
    sizes = np.array([len(Z) for Z in make("demo_volume")["Z"]])
    assert ((sizes >= 2) & (sizes <= 8)).mean() > 0.9 and sizes.max() == 12
    assert len({name.split("-", 3)[3] for name in make("demo_volume")["ids"]}) == len(demo.PROTOTYPES)


def test_the_same_crystals_come_back_every_time_and_on_every_machine():
    first, again = make("demo_gap"), demo.make("gap", n=50)
    assert again["ids"] == first["ids"][:50] and again["y"].tolist() == first["y"][:50].tolist()
    content = b"".join(x.tobytes() for x in again["pos"] + again["cell"]) + again["y"].tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "5a3487acf542660e"


def test_no_structure_is_in_two_data_sets():
    names = [*HUB, *DOWNSTREAM, *PRETRAIN]
    positions = [pos.tobytes() for name in names for pos in make(name)["pos"]]
    assert len(set(positions)) == len(positions)


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_a_downstream_label_follows_its_related_hub_label_and_no_other_as_closely(name):
    s = make(name)
    rank = lambda x: np.argsort(np.argsort(x))  # noqa: E731
    agreement = {}
    for hub in HUB:
        label = np.array([demo.LABELS[hub](c) for c in crystals(s)])
        known = np.isfinite(label)
        agreement[hub] = abs(np.corrcoef(rank(s["y"][known]), rank(label[known]))[0, 1])
    best, *others = sorted(agreement, key=agreement.get, reverse=True)
    assert best == {"demo_refractive_index": "demo_dielectric", "demo_optical_gap": "demo_gap"}.get(name, "demo_phonon")
    assert agreement[best] > 0.99 and agreement[others[0]] < 0.9


@pytest.mark.parametrize("name", HUB)
def test_composition_tells_much_of_a_label_but_not_all(name):
    """Ridge regression on element fractions and mean ion data, trained on 700 crystals and scored on 300."""
    s = make(name)
    elements = sorted(ROWS)
    fractions = np.array([[(Z == z).mean() for z in elements] for Z in s["Z"]])
    X = np.c_[fractions, fractions @ [ROWS[z][2:] for z in elements]]
    X, y = np.c_[(X - X.mean(0)) / np.maximum(X.std(0), 1e-9), np.ones(len(X))], s["y"]
    A, b = X[:700], y[:700]
    w = np.linalg.solve(A.T @ A + np.eye(A.shape[1]), A.T @ b)
    R2 = 1 - ((X[700:] @ w - y[700:]) ** 2).mean() / y[700:].var()
    assert 0.4 < R2 < 0.97


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="no embedded data set 'demo_gpa'; there are demo_ewald"):
        demo.make("demo_gpa")


def test_structures_are_valid_and_ewald_agrees_for_pymatgen():
    analysis = pytest.importorskip("pymatgen.analysis.ewald")
    from pymatgen.core import Element, Structure

    for symbol, row in demo.IONS.items():
        assert Element(symbol).Z == row[0]
        assert float(Element(symbol).atomic_mass) == pytest.approx(row[1], abs=0.05)
        assert Element(symbol).X == pytest.approx(row[4], abs=0.5 if symbol in ("Pb", "W") else 0.05)
    for name in HUB + DOWNSTREAM:
        s = make(name)
        for Z, pos, cell in list(zip(s["Z"], s["pos"], s["cell"], strict=True))[:100]:
            structure = Structure(cell, Z, pos, coords_are_cartesian=True)
            assert structure.is_valid(tol=1.2)
    s = make("demo_ewald")
    for m in (1, 2, 3):
        c = crystals(s)[m]
        structure = Structure(s["cell"][m], s["Z"][m], s["pos"][m], coords_are_cartesian=True)
        structure.add_oxidation_state_by_site(c.ion["q"].tolist())
        ours = demo.ewald(c, c.ion["q"])
        assert analysis.EwaldSummation(structure).total_energy == pytest.approx(ours, rel=1e-5)


def test_space_groups_of_the_perfect_crystals_are_the_textbook_ones():
    symmetry = pytest.importorskip("pymatgen.symmetry.analyzer")
    from pymatgen.core import Structure

    for prototype, ions, number in [
        ("rocksalt", "Na Cl", 225), ("CsCl", "Cs Cl", 221), ("zincblende", "Zn S", 216), ("wurtzite", "Zn S", 186),
        ("NiAs", "Fe S", 194), ("HX", "Mg O", 194), ("fluorite", "Ca F", 225), ("antifluorite", "Li O", 225),
        ("rutile", "Ti O", 136), ("CdI2", "Cd I", 164), ("ReO3", "W O", 221), ("perovskite", "Sr O Ti", 221),
        ("half-Heusler", "Li N Zn", 216), ("rocksalt-CuPt", "Na O In", 166), ("rocksalt-CuAu", "Li O Fe", 123),
        ("zincblende-CuAu", "Cu S In", 115),
    ]:  # fmt: skip
        c = demo.build(prototype, **dict(zip("AXB", ions.split())))
        structure = Structure(c.cell, c.ion["Z"], c.pos, coords_are_cartesian=True)
        assert symmetry.SpacegroupAnalyzer(structure, 1e-3).get_space_group_number() == number, prototype
