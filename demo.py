"""The embedded crystals: toy data sets for `--data demo`, made on the spot from textbook prototypes and formulas.

    python demo.py                         prints every task with its unit and the spread of its labels

Ions with tabulated radii fill prototypes (rocksalt, fluorite, perovskite, ...) so that charges cancel; radii give the
cell size; the cells are then scaled, sheared and rattled at random. Every label is a closed formula of the structure,
none is DFT. The seed of a task is its name, no two tasks share crystals, and all is rounded:
every machine gets the same.

A: atoms of a crystal. P: directed atom pairs i -> j, periodic images included. Lengths A, energies eV, masses u.
"""

import functools
import zlib
from typing import NamedTuple

import files  # noqa: F401  (first: it says which package is missing)
import numpy as np
from scipy.special import erfc

COULOMB = 14.399645  # e^2 / (4 pi eps_0), eV A
BOND_MADELUNG = 1.747565 / 6  # rocksalt's Madelung constant M per bond

# element: Z, mass (u), charge, radius (A), electronegativity, polarisability (A^3), Born exponent
# Radii: Shannon 1976, six-fold; P and As from the bond lengths of III-V crystals. Electronegativities: Pauling.
# Electronic polarisabilities: rounded, after Tessman, Kahn, Shockley 1953; gaps filled from refractive indices. Born
# exponents: 5 7 9 10 12 for the cores of He Ne Ar Kr Xe.
IONS = {
    "Li": (3, 6.94, 1, 0.76, 0.98, 0.03, 5), "Na": (11, 22.990, 1, 1.02, 0.93, 0.41, 7),
    "K": (19, 39.098, 1, 1.38, 0.82, 1.33, 9), "Rb": (37, 85.468, 1, 1.52, 0.82, 1.98, 10),
    "Cs": (55, 132.905, 1, 1.67, 0.79, 3.34, 12), "Cu": (29, 63.546, 1, 0.77, 1.90, 1.60, 9),
    "Ag": (47, 107.868, 1, 1.15, 1.93, 2.40, 10),
    "Be": (4, 9.012, 2, 0.45, 1.57, 0.01, 5), "Mg": (12, 24.305, 2, 0.72, 1.31, 0.09, 7),
    "Ca": (20, 40.078, 2, 1.00, 1.00, 1.10, 9), "Sr": (38, 87.62, 2, 1.18, 0.95, 1.60, 10),
    "Ba": (56, 137.327, 2, 1.35, 0.89, 2.50, 12), "Mn": (25, 54.938, 2, 0.83, 1.55, 1.20, 9),
    "Fe": (26, 55.845, 2, 0.78, 1.83, 1.10, 9), "Co": (27, 58.933, 2, 0.745, 1.88, 1.00, 9),
    "Ni": (28, 58.693, 2, 0.69, 1.91, 0.90, 9), "Zn": (30, 65.38, 2, 0.74, 1.65, 0.80, 9),
    "Cd": (48, 112.414, 2, 0.95, 1.69, 1.80, 10), "Pb": (82, 207.2, 2, 1.19, 1.87, 3.60, 12),
    "Al": (13, 26.982, 3, 0.535, 1.61, 0.05, 7), "Sc": (21, 44.956, 3, 0.745, 1.36, 0.70, 9),
    "Cr": (24, 51.996, 3, 0.615, 1.66, 0.80, 9), "Ga": (31, 69.723, 3, 0.62, 1.81, 0.50, 9),
    "Y": (39, 88.906, 3, 0.90, 1.22, 1.00, 10), "In": (49, 114.818, 3, 0.80, 1.78, 1.20, 10),
    "La": (57, 138.905, 3, 1.032, 1.10, 1.50, 12),
    "Si": (14, 28.085, 4, 0.40, 1.90, 0.02, 7), "Ti": (22, 47.867, 4, 0.605, 1.54, 1.20, 9),
    "Ge": (32, 72.630, 4, 0.53, 2.01, 0.30, 9), "Zr": (40, 91.224, 4, 0.72, 1.33, 1.00, 10),
    "Sn": (50, 118.710, 4, 0.69, 1.96, 0.90, 10), "Ce": (58, 140.116, 4, 0.87, 1.12, 2.20, 12),
    "Hf": (72, 178.49, 4, 0.71, 1.30, 0.90, 12), "Th": (90, 232.038, 4, 0.94, 1.30, 2.10, 12),
    "Nb": (41, 92.906, 5, 0.64, 1.60, 1.30, 10), "Ta": (73, 180.948, 5, 0.64, 1.50, 1.20, 12),
    "W": (74, 183.84, 6, 0.60, 2.36, 1.20, 12),
    "F": (9, 18.998, -1, 1.33, 3.98, 0.64, 7), "Cl": (17, 35.45, -1, 1.81, 3.16, 2.96, 9),
    "Br": (35, 79.904, -1, 1.96, 2.96, 4.16, 10), "I": (53, 126.904, -1, 2.20, 2.66, 6.43, 12),
    "O": (8, 15.999, -2, 1.40, 3.44, 1.60, 7), "S": (16, 32.06, -2, 1.84, 2.58, 5.00, 9),
    "Se": (34, 78.971, -2, 1.98, 2.55, 6.20, 10), "Te": (52, 127.60, -2, 2.21, 2.10, 8.50, 12),
    "N": (7, 14.007, -3, 1.46, 3.04, 2.60, 7), "P": (15, 30.974, -3, 1.88, 2.19, 6.20, 9),
    "As": (33, 74.922, -3, 1.98, 2.18, 7.30, 10),
}

THIRD, U = 1 / 3, 0.305  # U: the free parameter of rutile
FCC, SC = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], np.eye(3).tolist()
HEX = [[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 1]]
CUPT = [[2, 0, 0], [0, 1, 0], [0, 0, 1]]  # doubles a primitive fcc cell; the two cations alternate along [111]
CUAU = [[1, 1, 0], [-1, 1, 0], [0, 0, 1]]  # the same, along [001]

# name: share of the draws, lattice of unit length, c/a, sites (A, B cations, X anion, with fractional coordinates)
PROTOTYPES = {
    "rocksalt": (4, FCC, 1, [("A", 0, 0, 0), ("X", 0.5, 0.5, 0.5)]),
    "CsCl": (2, SC, 1, [("A", 0, 0, 0), ("X", 0.5, 0.5, 0.5)]),
    "zincblende": (3, FCC, 1, [("A", 0, 0, 0), ("X", 0.25, 0.25, 0.25)]),
    "wurtzite": (3, HEX, 1.633, [("A", THIRD, -THIRD, 0), ("A", -THIRD, THIRD, 0.5),
                                 ("X", THIRD, -THIRD, 0.375), ("X", -THIRD, THIRD, 0.875)]),
    "NiAs": (1, HEX, 1.55, [("A", 0, 0, 0), ("A", 0, 0, 0.5),
                            ("X", THIRD, -THIRD, 0.25), ("X", -THIRD, THIRD, 0.75)]),
    "HX": (1, HEX, 1.2, [("A", THIRD, -THIRD, 0.25), ("A", -THIRD, THIRD, 0.75),  # hexagonal MgO, five-fold
                         ("X", THIRD, -THIRD, 0.75), ("X", -THIRD, THIRD, 0.25)]),
    "fluorite": (3, FCC, 1, [("A", 0, 0, 0), ("X", 0.25, 0.25, 0.25), ("X", 0.75, 0.75, 0.75)]),
    "antifluorite": (2, FCC, 1, [("A", 0.25, 0.25, 0.25), ("A", 0.75, 0.75, 0.75), ("X", 0, 0, 0)]),
    "rutile": (3, SC, 0.65, [("A", 0, 0, 0), ("A", 0.5, 0.5, 0.5), ("X", U, U, 0), ("X", -U, -U, 0),
                             ("X", 0.5 + U, 0.5 - U, 0.5), ("X", 0.5 - U, 0.5 + U, 0.5)]),
    "CdI2": (1, HEX, 1.6, [("A", 0, 0, 0), ("X", THIRD, -THIRD, 0.25), ("X", -THIRD, THIRD, 0.75)]),
    "ReO3": (2, SC, 1, [("A", 0, 0, 0), ("X", 0.5, 0, 0), ("X", 0, 0.5, 0), ("X", 0, 0, 0.5)]),
    "perovskite": (12, SC, 1, [("A", 0.5, 0.5, 0.5), ("B", 0, 0, 0),
                              ("X", 0.5, 0, 0), ("X", 0, 0.5, 0), ("X", 0, 0, 0.5)]),
    "half-Heusler": (4, FCC, 1, [("A", 0.5, 0.5, 0.5), ("B", 0, 0, 0), ("X", 0.25, 0.25, 0.25)]),
    # ordered ones: the parent's sites in a doubled cell, the second cation is B
    "rocksalt-CuPt": (2, FCC, 1, CUPT), "rocksalt-CuAu": (2, FCC, 1, CUAU), "zincblende-CuAu": (1, FCC, 1, CUAU),
}
SUPERCELLS = [np.array(D) for D in (CUPT, np.diag([1, 2, 1]), np.diag([1, 1, 2]), CUAU, np.diag([2, 2, 1]),
                                    [[-1, 1, 1], [1, -1, 1], [1, 1, -1]])]  # the last: the cubic cell of fcc
COLUMNS = [("Z", int), ("mass", float), ("q", float), ("r", float), ("chi", float), ("alpha", float), ("born", float)]


class Crystal(NamedTuple):
    """ion: (A,) rows of IONS, so ion["q"] are the charges; pos: (A, 3) cartesian; cell: (3, 3), zeros for a cluster."""

    name: str
    ion: np.ndarray
    pos: np.ndarray
    cell: np.ndarray


# ------------------------------------------------------------------------------------------------------------ the tasks
def make(name, n=0):
    """One embedded data set, always the same for the same name: see TASKS. n: only its first n crystals.

    Returns dict(ids: list of str, Z: list of int64 (A,), pos: list of (A, 3), cell: list of (3, 3), pbc: bool (M,),
    y: (M,), forces: list of (A, 3) eV/A or None, unit, pooling). A name may leave out the prefix "demo_".
    """
    if name not in TASKS and f"demo_{name}" not in TASKS:
        raise ValueError(f"no embedded data set {name!r}; there are {', '.join(TASKS)}")
    name = name if name in TASKS else f"demo_{name}"
    task, rng = TASKS[name], np.random.default_rng(zlib.crc32(name.encode()))
    far = dict(rattle=0.3, closest=0.75) if task["role"] == "pretrain" else {}
    crystals, y, forces = [], [], []
    while len(y) < (n or task["n"]):
        c = draw(rng, task["anions"].split(), **far)
        c = cut_cluster(rng, c) if c is not None and name == "demo_clusters" else c
        if c is None:
            continue
        label = LABELS[name](c)
        energy, f = label if isinstance(label, tuple) else (label, None)
        if np.isfinite(energy):  # NaN: the formula does not hold for this crystal; the next takes its place
            crystals.append(c)
            y.append(float(f"{energy:.8g}"))
            forces.append(f)
    return dict(
        ids=[f"{name[5:]}-{i:04d}-{c.name}" for i, c in enumerate(crystals)],
        Z=[c.ion["Z"].astype(np.int64) for c in crystals],
        pos=[c.pos for c in crystals],
        cell=[c.cell for c in crystals],
        pbc=np.array([c.cell.any() for c in crystals]),
        y=np.array(y),
        forces=[f.round(8) for f in forces] if forces[0] is not None else None,
        unit=task["unit"],
        pooling=task["pooling"],
    )


def _task(unit, role, note, n=1000, pooling="mean", anions="F Cl Br I O S Se Te N P As"):
    return dict(unit=unit, pooling=pooling, role=role, n=n, anions=anions, note=note)


TASKS = {
    "demo_ewald": _task("eV/atom", "hub", "Madelung energy, Ewald sum, charges scaled to an rms of 1"),
    "demo_lattice_energy": _task("eV/atom", "hub", "Born-Lande: the same plus the bonds' repulsion d^-n"),
    "demo_volume": _task("A^3/atom", "hub", "volume"),
    "demo_density": _task("g/cm^3", "hub", "mass density"),
    "demo_dielectric": _task("relative permittivity", "hub", "electronic dielectric constant, Clausius-Mossotti"),
    "demo_gap": _task("eV", "hub", "band gap, Phillips-Van Vechten terms less a band width"),
    "demo_bulk": _task("GPa", "hub", "bulk modulus, Cohen's formula"),
    "demo_phonon": _task("THz", "hub", "rms phonon frequency of Born-Lande bonds"),
    "demo_refractive_index": _task(
        "dimensionless", "downstream", "n = sqrt(eps), oxides and fluorides only", n=120, anions="F O"
    ),
    "demo_optical_gap": _task(
        "eV", "downstream", "band gap less the exciton's binding energy, no F, O, N", n=110, anions="Cl Br I S Se Te"
    ),
    "demo_heat_capacity": _task(
        "J/(mol K)", "downstream", "Debye heat capacity at 150 K, chalcogenides only", n=100, anions="O S Se Te"
    ),
    "demo_forcefield": _task("eV", "pretrain", "total energy and forces of a pair potential", n=3000, pooling="sum"),
    "demo_clusters": _task("eV", "pretrain", "the same for neutral clusters, not periodic", n=1500, pooling="sum"),
}


# --------------------------------------------------------------------------------------------------------- the crystals
def draw(rng, anions, rattle=0.12, closest=0.83):
    """A random crystal, or None when the draw makes no sense.

    rattle: largest standard deviation of displacements, A. closest: shortest bond allowed, in sums of radii.
    """
    names = [p for p, row in PROTOTYPES.items() for _ in range(row[0])]
    name = names[rng.integers(len(names))]
    ions = choose_ions(rng, prototype(name)[0], anions)
    c = build(name, **ions) if ions else None
    if c is None:
        return None
    if rng.random() < 0.3:
        D = SUPERCELLS[rng.integers(len(SUPERCELLS))]
        if len(c.pos) * round(np.linalg.det(D)) <= 12:
            c = supercell(c, D)
    shear = rng.normal(0, 0.02, (3, 3))
    strain = np.exp(rng.normal(0, 0.03)) * (np.eye(3) + (shear + shear.T) / 2)
    noise = rng.normal(0, rattle * rng.random(), c.pos.shape)
    cell = (c.cell @ strain).round(6)
    frac = np.linalg.solve(cell.T, (c.pos @ strain + noise).T).T % 1
    c = c._replace(cell=cell, pos=(frac @ cell).round(6))
    i, j, _, d = neighbours(c, 4.0)
    q, d0, _ = pair(c, i, j)
    return c if (d > np.maximum(np.where(q < 0, closest, 0.6) * d0, 1.2)).all() else None


def choose_ions(rng, roles, anions):
    """{role: element}: a random anion, then random cations that balance its charge. None when there are none."""
    nA, nB, nX = (roles.count(r) for r in "ABX")
    X = anions[rng.integers(len(anions))]
    need = -nX * IONS[X][2]
    charges = [(a, b) for a in range(1, 7) for b in (range(1, 7) if nB else [0]) if nA * a + nB * b == need]
    if not charges:
        return None
    a, b = charges[rng.integers(len(charges))]
    A = [s for s in IONS if IONS[s][2] == a]
    A = A[rng.integers(len(A))]
    if not nB:
        return {"A": A, "X": X}
    B = [s for s in IONS if IONS[s][2] == b and s != A]
    return {"A": A, "B": B[rng.integers(len(B))], "X": X} if B else None


@functools.cache
def prototype(name):
    """roles (A,) of "A", "B", "X", fractional coordinates (A, 3) and cell (3, 3) at the scale of the table."""
    _, lattice, c_over_a, sites = PROTOTYPES[name]
    if "-Cu" not in name:
        return [s[0] for s in sites], np.array([s[1:] for s in sites], float), np.array(lattice) * [1, 1, c_over_a]
    roles, frac, cell = prototype(name.split("-")[0])
    T = lattice_points(sites)
    assert roles == ["A", "X"] and len(T) == 2
    return ["A", "B", "X", "X"], (frac[:, None] + T).reshape(-1, 3) @ np.linalg.inv(sites), sites @ cell


@functools.cache
def build(name, **ions):
    """The perfect crystal: build("rocksalt", A="Na", X="Cl") has a = 5.66 A. None: the ions do not fit.

    Bonds are sums of radii times (coordination / 6)^(1/8) (Goldschmidt: 0.95 and 1.036 for four- and eight-fold), on
    average over the bonds; longer where anions would else overlap by more than a tenth. Perovskites of a bad tolerance
    factor and small cations between large anions are left out.
    """
    roles, frac, cell = prototype(name)
    counts = [(ions[r], roles.count(r)) for r in sorted(ions)]
    divisor = np.gcd.reduce([k for _, k in counts])
    formula = "".join(s + (str(k // divisor) if k > divisor else "") for s, k in counts)
    c = Crystal(f"{formula}-{name}", np.array([IONS[ions[r]] for r in roles], COLUMNS), frac @ cell, cell)
    i, j, d, w = bonds(c, 1.5)
    of_cation = c.ion["q"][i] > 0
    i, j, d, w = i[of_cation], j[of_cation], d[of_cation], w[of_cation]
    ideal = (c.ion["r"][i] + c.ion["r"][j]) * (np.bincount(i, w)[i] / 6) ** 0.125
    scale = (w @ ideal) / (w @ d)
    misfit = np.abs(scale * d / ideal - 1)[w > 0.5].max()
    i, j, _, d = neighbours(c, 1.5)
    anions = (c.ion["q"][i] < 0) & (c.ion["q"][j] < 0)
    touching = (0.9 * (c.ion["r"][i] + c.ion["r"][j]) / d)[anions].max()
    if misfit > 0.12 or touching > 1.12 * scale:
        return None
    scale = max(scale, touching)
    return c._replace(pos=c.pos * scale, cell=c.cell * scale)


def supercell(c, D):
    """The same crystal in the cell D @ cell; D: (3, 3) integers, determinant > 0."""
    T = lattice_points(D)
    pos = (c.pos[:, None] + T @ c.cell).reshape(-1, 3)
    return c._replace(ion=np.repeat(c.ion, len(T)), pos=pos, cell=D @ c.cell)


def lattice_points(D):
    """The integer triples inside the cell with rows D: (det D, 3)."""
    T = box(np.abs(D).sum(axis=0))
    inside = T @ np.linalg.inv(D)
    return T[((inside > -1e-9) & (inside < 1 - 1e-9)).all(axis=1)]


def cut_cluster(rng, c):
    """A neutral cluster of 4 to 16 atoms: whole formula units, atom by atom the nearest to a random point."""
    T = box((2, 2, 2))
    pos, ion = (c.pos[:, None] + T @ c.cell).reshape(-1, 3), np.repeat(c.ion, len(T))  # the crystal, 125 cells of it
    d = np.linalg.norm(pos - rng.random(3) @ c.cell, axis=1)
    kinds, count = np.unique(c.ion["Z"], return_counts=True)
    unit = count // np.gcd.reduce(count)
    units = rng.integers(max(1, -(-4 // unit.sum())), max(1, 16 // unit.sum()) + 1)
    near = np.argsort(d, kind="stable")
    pick = np.concatenate([near[ion["Z"][near] == k][: units * m] for k, m in zip(kinds, unit)])
    return Crystal(c.name, ion[pick], (pos[pick] - pos[pick].mean(axis=0)).round(6), np.zeros((3, 3)))


# --------------------------------------------------------------------------------------------------------- the geometry
def neighbours(c, cutoff):
    """All atom pairs nearer than cutoff (A), both directions: i, j (P,), vectors i -> j (P, 3), distances (P,)."""
    shifts = np.zeros((1, 3))
    if c.cell.any():
        inverse = np.linalg.inv(c.cell)  # a column's length is 1 / the height of the cell
        shifts = box(cutoff * np.linalg.norm(inverse, axis=0) + np.ptp(c.pos @ inverse, axis=0)) @ c.cell
        shifts = shifts[(shifts**2).sum(axis=1) < (cutoff + np.linalg.norm(np.ptp(c.pos, axis=0))) ** 2]
    v = c.pos[None, :, None] - c.pos[:, None, None] + shifts  # (A, A, S, 3)
    d2 = np.einsum("ijsx,ijsx->ijs", v, v)
    i, j, s = np.nonzero((d2 < cutoff**2) & (d2 > 1e-12))
    return i, j, v[i, j, s], np.sqrt(d2[i, j, s])


def box(n):
    """All integer triples with |t_x| <= n_x; n: (3,) floats. Returns (S, 3)."""
    return integers(*map(int, n))


@functools.cache
def integers(n1, n2, n3):
    return np.mgrid[-n1 : n1 + 1, -n2 : n2 + 1, -n3 : n3 + 1].reshape(3, -1).T


def bonds(c, cutoff=7.0):
    """Pairs of opposite charge, i, j, d, w (P,), with Hoppe's weights (ECoN, 1979) w = exp(1 - (d / nearest of i)^6).

    The weights of atom i sum to its effective coordination number: 6 in rocksalt, 4 in zincblende.
    """
    i, j, _, d = neighbours(c, cutoff)
    opposite = c.ion["q"][i] * c.ion["q"][j] < 0
    i, j, d = i[opposite], j[opposite], d[opposite]
    nearest = np.full(len(c.pos), np.inf)
    np.minimum.at(nearest, i, d)
    return i, j, d, np.exp(1 - (d / nearest[i]) ** 6)


def volume(c):
    return abs(np.linalg.det(c.cell))


# ----------------------------------------------------------------------------------------------------------- the labels
def ewald(c, q, width=1.0):
    """Electrostatic energy of charges q (A,) that sum to zero, eV per cell (Ewald 1921).

    width: of the screening charges; the result does not depend on it.
    """
    A, V = len(c.pos), volume(c)
    a = np.sqrt(np.pi) * (A / V**2) ** (1 / 6) / width  # 1/A
    i, j, _, d = neighbours(c, 4.1 / a)
    real = (q[i] * q[j] * erfc(a * d) / d).sum() / 2
    reciprocal = 2 * np.pi * np.linalg.inv(c.cell).T  # rows
    k = box(8.2 * a * np.linalg.norm(c.cell, axis=1) / (2 * np.pi)) @ reciprocal  # (S, 3)
    k2 = (k**2).sum(axis=1)
    k, k2 = k[k2 > 1e-9], k2[k2 > 1e-9]
    S = np.exp(1j * k @ c.pos.T) @ q  # (S,) structure factors
    fourier = 2 * np.pi / V * (np.exp(-k2 / (4 * a**2)) / k2 * np.abs(S) ** 2).sum()
    return COULOMB * (real + fourier - a / np.sqrt(np.pi) * (q**2).sum())


def reduced_charges(c):
    """Formal charges scaled to a root mean square of 1: structure and bond length, not q^2, decide an energy."""
    q = c.ion["q"]
    return q / np.sqrt((q**2).mean())


def ewald_energy(c):
    """Madelung energy of the reduced charges, eV/atom."""
    return ewald(c, reduced_charges(c)) / len(c.pos)


def lattice_energy(c):
    """Born-Lande energy of the reduced charges, eV/atom: Ewald + (M / 6) e^2 |q_i q_j| d0^(n-1) / (n d^n) by bonds.

    d0: sum of the radii; n: mean Born exponent. Rocksalt at d = d0 gets the textbook's (1 - 1/n) of its Ewald energy.
    """
    i, j, _, d = neighbours(c, 6.0)
    q, d0, n = reduced_charges(c), *pair(c, i, j)[1:]
    repulsion = BOND_MADELUNG * np.maximum(-q[i] * q[j], 0) * d0 ** (n - 1) / (n * d**n)
    return ewald_energy(c) + COULOMB * repulsion.sum() / 2 / len(c.pos)


def pair(c, i, j):
    """Product of charges, sum of radii (A), mean Born exponent of pairs: (P,) each."""
    q, r, n = c.ion["q"], c.ion["r"], c.ion["born"]
    return q[i] * q[j], r[i] + r[j], (n[i] + n[j]) / 2


def volume_per_atom(c):
    """A^3/atom."""
    return volume(c) / len(c.pos)


def density(c):
    """g/cm^3."""
    return 1.660539 * c.ion["mass"].sum() / volume(c)


def dielectric(c):
    """Electronic dielectric constant: (eps - 1) / (eps + 2) = 4 pi sum(alpha) / (3 V), Clausius-Mossotti. NaN: > 12."""
    x = 4 * np.pi / 3 * c.ion["alpha"].sum() / volume(c)
    return (1 + 2 * x) / (1 - x) if x < 11 / 14 else np.nan


def gap(c):
    """Band gap, eV: sqrt(E_h^2 + C^2) averaged over the bonds, less a band width. NaN where bands overlap: no metals.

    Covalent part E_h = 39.74 d^-2.48 (Phillips 1970, Van Vechten 1969); ionic part C = 5.8 (difference of
    electronegativities) (d0 / d)^2 in place of their screened Coulomb term; width 1.6 hbar^2 / (m d^2)
    sqrt(coordination), the second moment of the hopping (Friedel), with hopping as in Harrison 1980.
    """
    i, j, d, w = bonds(c)
    E_h = 39.74 * d**-2.48
    C = 5.8 * np.abs(c.ion["chi"][i] - c.ion["chi"][j]) * (pair(c, i, j)[1] / d) ** 2
    width = 1.6 * np.sqrt(np.bincount(i, w * (7.62 / d**2) ** 2)).mean()  # hbar^2 / m = 7.62 eV A^2
    E = (w * np.hypot(E_h, C)).sum() / w.sum() - width
    return E if E > 0.1 else np.nan


def bulk_modulus(c):
    """Bulk modulus, GPa: (coordination / 4) (1971 - 220 lambda) d^-3.5 (Cohen 1985) with lambda = 4 - sqrt|q_i q_j|.

    That is his lambda of 1 for III-V and 2 for II-VI crystals.
    """
    i, j, d, w = bonds(c)
    q, _, _ = pair(c, i, j)
    return (w / 4 * (1971 - 220 * (4 - np.sqrt(-q))) * d**-3.5).sum() / len(c.pos)


def phonon_frequency(c):
    """Root mean square phonon frequency, THz: omega^2 is the mean over atoms of Tr(force constants) / (3 m).

    A bond's force constant is Born-Lande's curvature (n - 1) (M / 6) e^2 |q_i q_j| / d0^3 at d = d0, and falls with
    distance as the repulsion's, (d0 / d)^(n+2).
    """
    i, j, d, w = bonds(c)
    q, d0, n = pair(c, i, j)
    k = COULOMB * BOND_MADELUNG * (n - 1) * np.abs(q) / d0**3 * (d0 / d) ** (n + 2)  # eV/A^2
    omega2 = (w * k / (3 * c.ion["mass"][i])).sum() / len(c.pos)
    return 15.6333 * np.sqrt(omega2)  # sqrt(eV / (A^2 u)) = 98.227 rad/ps, over 2 pi


def refractive_index(c):
    """n = sqrt(eps)."""
    return np.sqrt(dielectric(c))


def optical_gap(c):
    """Band gap less the binding energy of a Mott-Wannier exciton, 13.606 m / eps^2 with m = E / (E + 20) (Kane), eV."""
    E = gap(c)
    return E - 13.606 * E / (E + 20) / dielectric(c) ** 2


def heat_capacity(c):
    """Debye's heat capacity at 150 K, J/(mol K) of atoms; k theta = h nu_rms sqrt(5/3) keeps the mean omega^2."""
    x = 47.9924 * phonon_frequency(c) * np.sqrt(5 / 3) / 150  # theta / T
    t = (np.arange(200) + 0.5) / 200 * x
    return 9 * 8.314463 / x**2 * (t**4 * np.exp(-t) / np.expm1(-t) ** 2).mean()


def pair_potential(c, cutoff=6.0, damping=0.2, rho=0.35, charge=0.5):
    """Total energy (eV) and forces (A, 3) (eV/A): Born-Mayer repulsion + damped Coulomb of half the formal charges.

    Every pair's v(d) is replaced by v(d) - v(R) - v'(R) (d - R), so energy and force vanish at the cutoff R (Wolf 1999;
    Fennell and Gezelter 2006). The repulsion balances a bond's share of the attraction at d = d0, the sum of the radii.
    """

    def v(d):
        attraction = np.exp(-((damping * d) ** 2)) * 2 * damping / np.sqrt(np.pi) / d
        repulsion = BOND_MADELUNG * np.abs(q) / d0**2 * np.exp((d0 - d) / rho)
        return (rho * repulsion + q * erfc(damping * d) / d, -repulsion - q * (erfc(damping * d) / d**2 + attraction))

    i, j, vec, d = neighbours(c, cutoff)
    q, d0, _ = pair(c, i, j)
    k = COULOMB * charge**2
    (e, de), (e_R, de_R) = v(d), v(cutoff)
    own = (erfc(damping * cutoff) / (2 * cutoff) + damping / np.sqrt(np.pi)) * (c.ion["q"] ** 2).sum()
    energy = k * ((e - e_R - de_R * (d - cutoff)).sum() / 2 - own)
    along = (k * (de - de_R) / d)[:, None] * vec  # dv/dd along i -> j is the force on i
    forces = np.stack([np.bincount(i, along[:, x], len(c.pos)) for x in range(3)], 1)
    return energy, forces


LABELS = {
    "demo_ewald": ewald_energy, "demo_lattice_energy": lattice_energy, "demo_volume": volume_per_atom,
    "demo_density": density, "demo_dielectric": dielectric, "demo_gap": gap, "demo_bulk": bulk_modulus,
    "demo_phonon": phonon_frequency, "demo_refractive_index": refractive_index, "demo_optical_gap": optical_gap,
    "demo_heat_capacity": heat_capacity, "demo_forcefield": pair_potential, "demo_clusters": pair_potential,
}


def write_examples(folder):
    """Two CIF files to predict, perfect crystals that no task holds: MgO and SrTiO3 at their measured cell sizes."""
    from pathlib import Path

    from pymatgen.core import Lattice, Structure

    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, group, a, species, frac in (
        ("MgO", 225, 4.212, ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        ("SrTiO3", 221, 3.905, ["Sr", "Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]),
    ):
        Structure.from_spacegroup(group, Lattice.cubic(a), species, frac).to(str(Path(folder) / f"{name}.cif"))


if __name__ == "__main__":
    for name, task in TASKS.items():
        s = make(name)
        spread = "".join(f"{y:9.3f}" for y in np.percentile(s["y"], [0, 50, 100]))
        print(f"{name:22}{len(s['y']):5} {spread} {task['unit']:22}{task['role']:11}{task['note']}")
