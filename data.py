"""Crystal graphs, per-atom tables, batches, splits, graphs on disk (paper, B.1; the graphs of GemNet-OC).

    dataset = GraphDataset(crystals, GraphConfig())
    batch = collate([dataset[i] for i in range(32)])

M: crystals in a task. A: atoms. B: crystals in a batch. E: edges. Lengths in Å. Importing this file needs
torch and numpy only.
"""

import filecmp
import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from crystals import MAX_ATOMS, Crystals, duplicate_key, structure_hash
from crystals import from_structures as from_structures  # users call it as data.from_structures
from files import UserError, cache_folder, cached_folder, progress, read_json
from sources import SHIPPED, find_source
from tasks import TASKS

# ---------------------------------------------------------------- splits and batches


PARTS = ("train", "val", "test")
SPLIT_FORM = 'JSON {"train": [...], "val": [...], "test": [...]} with row numbers, or ids, in the lists'


def make_splits(crystals: Crystals, split_seed=0, split_file="", quiet=False, held_out=0.3) -> dict:
    """{"train", "val", "test"}: positions into `crystals`, from a file, a column, as published or 70/15/15 at random.

    split_file: JSON with a list for each part, of row numbers in the source or of ids; what was skipped
    (or left out by a limit) is dropped and counted on stderr. Raises UserError where a part is empty.
    held_out: the share of the rows that a random split keeps for val and test, half each.
    """
    if split_file:
        return read_split(crystals, Path(split_file))
    if crystals.split and any(word.strip() for word in crystals.split):
        if split_seed:
            why = "the data have a column split, which decides; leave the flag out, or remove the column"
            raise UserError(f"--split-seed {split_seed}: {why}")
        return split_by_column(crystals)
    M = len(crystals)
    if M < 3:
        raise UserError(f"task {crystals.task.name}: {M} usable rows; three parts need at least 3")
    published, choice = published_split(crystals, split_seed)
    if choice and not quiet:
        print(f"{crystals.task.name}: {choice}", file=sys.stderr)
    if published:
        return read_split(crystals, published)
    order = np.random.RandomState(split_seed).permutation(M)
    n = max(1, round(held_out / 2 * M))
    return {"train": np.sort(order[2 * n :]), "val": np.sort(order[:n]), "test": np.sort(order[n : 2 * n])}


def published_split(crystals, seed=0):
    """The file of the split that Chang et al. 2022 published under this seed, or None; and why, in words.

    They are for the tables in datasets/, so all rows of these and no other table. ("" where none is published at all.)
    """
    task, folder = crystals.task, SHIPPED / "splits" / crystals.task.name
    seeds = sorted(int(path.stem.removeprefix("seed")) for path in folder.glob("seed*.json"))
    if not seeds or not task.dataset:
        return None, ""
    source = find_source(task)
    shipped = SHIPPED / source.name
    if not shipped.is_file() or not filecmp.cmp(source, shipped, shallow=False):
        why = f"published splits are for the table in {SHIPPED}, not for {source}"
    elif task.target_column != TASKS[task.name].target_column:
        why = f"published splits are for the column {TASKS[task.name].target_column}"
    elif len(crystals) + len(crystals.skipped) < crystals.num_rows:
        why = "published splits are for all rows (--limit 0)"
    elif seed not in seeds:
        why = f"splits are published for the seeds {seeds[0]} to {seeds[-1]}"
    else:
        return folder / f"seed{seed}.json", f"the published split of seed {seed}"
    return None, f"a random split of seed {seed}; {why}"


def split_by_column(crystals):
    source = f"{crystals.task.dataset}, column split"
    names = {part: part for part in PARTS} | {"valid": "val", "validation": "val"}
    parts = {part: [] for part in PARTS}
    for i, word in enumerate(crystals.split):
        name = names.get(word.strip().lower())
        if not name:
            raise UserError(f"{source}: '{word}' of id {crystals.ids[i]} is not train, val or test")
        parts[name].append(i)
    return checked(parts, source)


def read_split(crystals, path: Path):
    source = f"--split-file {path}"
    stored = read_json(path, SPLIT_FORM)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part), list) for part in PARTS):
        raise UserError(f"{source}: not {SPLIT_FORM}")
    listed = [row for part in PARTS for row in stored[part]]
    kind = type(listed[0]) if listed else int
    wrong = [row for row in listed if type(row) is not kind or kind not in (int, str)]
    if wrong:
        raise UserError(f"{source}: {wrong[0]!r:.60} is listed; not {SPLIT_FORM}")
    beyond = [row for row in listed if kind is int and not 0 <= row < crystals.num_rows]
    if beyond:
        table = f"the {crystals.num_rows} rows of {crystals.task.dataset}"
        raise UserError(f"{source}: row {beyond[0]!r:.60} is not among {table}; it is for another table")
    at = {key: i for i, key in enumerate(crystals.row.tolist() if kind is int else crystals.ids)}
    parts = {part: [at[row] for row in stored[part] if row in at] for part in PARTS}
    dropped = len(listed) - sum(map(len, parts.values()))
    if dropped:
        print(f"{path}: {dropped} of its rows were skipped or not loaded, and are left out", file=sys.stderr)
    return checked(parts, source)


def checked(parts, source):
    for name, rows in parts.items():
        if not rows:
            raise UserError(f"{source}: no usable row in part '{name}'; training needs all three")
    everything = sum(parts.values(), [])
    if len(set(everything)) < len(everything):
        raise UserError(f"{source}: a row is listed twice, so the parts overlap")
    return {name: np.array(rows, dtype=np.int64) for name, rows in parts.items()}


def make_folds(crystals: Crystals, K: int, seed=0) -> list:
    """K-fold cross-validation: [{"train", "val", "test"}] of positions (ascending), one for each fold.

    The test parts are disjoint and together are all rows. Of the others a sixth is val (for early stopping), the
    rest train. Rows of one structure (equal `duplicate_key`) are never in two parts. The same arguments give the
    same folds. Raises UserError where a part would be empty.
    """
    keys = [duplicate_key(*s) for s in zip(crystals.Z, crystals.pos, crystals.cell)]
    group = np.unique(keys, return_inverse=True)[1]  # (M,) which structure
    G, M, random = group.max() + 1, len(crystals), np.random.RandomState(seed)
    if not 2 <= K <= G or K == 2 and G < 4:
        least = max(K, 4 if K == 2 else 3)
        why = f"{G} different structures; {K} folds need at least {least}, and there are no fewer folds than 2"
        raise UserError(f"--folds {K}: task {crystals.task.name} has {why}; lower it, or --folds 0 for one split")
    size, fold = np.bincount(group), np.zeros(G, np.int64)  # (G,) rows and fold of every structure
    order, filled = random.permutation(G), np.zeros(K, np.int64)
    for g in order[np.argsort(-size[order], kind="stable")]:  # the largest first, each to the emptiest fold
        fold[g] = filled.argmin()
        filled[fold[g]] += size[g]
    found = []
    for k in range(K):
        others = random.permutation(np.flatnonzero(fold != k))
        enough = max(1, round((M - filled[k]) / 6))
        n = 1 + np.searchsorted(size[others].cumsum(), enough)
        val = np.isin(group, others[: min(n, len(others) - 1)])
        test = fold[group] == k
        parts = {"train": ~test & ~val, "val": val, "test": test}
        found.append({name: np.flatnonzero(rows) for name, rows in parts.items()})
    return found


def few_shot(rows, n: int, seed: int):
    """n random training rows, sorted; 0: all. Those of a smaller n are among those of a larger one."""
    if not 0 <= n <= len(rows):
        raise UserError(f"--few-shot {n}: the training split has {len(rows)} rows; 0 takes them all")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:n]) if n else np.asarray(rows)


def split_fingerprint(crystals, splits) -> dict:
    """{part: sha256} over the structures and labels of its rows, whatever their order, numbers or ids."""
    structures = list(zip(crystals.Z, crystals.pos, crystals.cell))
    found = {}
    for part, rows in splits.items():
        content = sorted(f"{structure_hash(*structures[i])} {float(crystals.y[i]).hex()}" for i in rows)
        found[part] = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return found


def by_structure(crystals, rows) -> list:
    """The rows in an order that their structures alone decide, whatever their numbers or ids: of the hashes."""
    return sorted(map(int, rows), key=lambda i: structure_hash(crystals.Z[i], crystals.pos[i], crystals.cell[i]))


def report_duplicates(crystals, splits) -> int:
    """How many val and test rows are the structure of a row of an earlier part; a line on stderr if any."""
    structures = list(zip(crystals.Z, crystals.pos, crystals.cell))
    part_of, found = {}, Counter()
    for part, rows in splits.items():
        keys = [duplicate_key(*structures[i]) for i in rows]
        found.update((part, part_of[k]) for k in keys if k in part_of)
        part_of = dict.fromkeys(keys, part) | part_of
    if found:
        where = ", ".join(f"{n} of {part} in {other}" for (part, other), n in found.items())
        what = f"{found.total()} structures occur in two parts of the split ({where})"
        print(f"{crystals.task.name}: {what}", file=sys.stderr)
    return found.total()


def batch_indices(num_atoms, indices, batch_size: int, max_atoms=0, generator=None) -> list:
    """Positions in batches of at most batch_size crystals and max_atoms atoms (0: no bound), in order.

    num_atoms: (M,) atoms of every crystal. One above the budget is a batch of its own. generator: shuffles.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if generator is not None:
        indices = indices[torch.randperm(len(indices), generator=generator).numpy()]
    batches, atoms = [], 0
    for i in indices.tolist():
        n = int(num_atoms[i])
        if not batches or len(batches[-1]) == batch_size or max_atoms and atoms + n > max_atoms:
            batches.append([])
            atoms = 0
        batches[-1].append(i)
        atoms += n
    return batches


def to_device(batch: dict, device) -> dict:
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ---------------------------------------------------------------- graphs


@dataclass(frozen=True)
class GraphConfig:
    """The four graphs of GemNet-OC. Cutoffs in angstrom; max_neighbors per receiving atom.

    main: edges that carry messages, symmetric. a2ee2a: neighbours for the atom-edge interactions. qint: the
    middle edge of quadruplets. a2a: the long-range atom graph, of which the other three are selections.
    """

    cutoff: float = 12.0
    cutoff_a2ee2a: float = 12.0
    cutoff_qint: float = 12.0
    cutoff_a2a: float = 12.0
    max_neighbors: int = 30
    max_neighbors_a2ee2a: int = 20
    max_neighbors_qint: int = 8
    max_neighbors_a2a: int = 1000
    graph_rule: str = "symmetric"  # or "published": exactly k, of a pair only the lower-numbered atom chooses
    a2ee2a: bool = True  # whether the model reads the graph at all
    qint: bool = True
    a2a: bool = True


GRAPHS = ("main", "a2ee2a", "qint", "a2a")
CACHE_VERSION = 3  # raise when build_graphs() writes something else
TIE = 1e-3  # angstrom: neighbours this close to the k-th nearest count as equally near
DENSE = 1 << 21  # pairs: up to here computing every distance is faster than bins; beyond it memory would grow
MAX_PAIRS = 1 << 29  # looked at in bins; diamond has half as many in MAX_ATOMS atoms at 12 Å


def radius_graph(pos, cell, periodic, r):
    """Every pair of atoms of one structure within r of each other, periodic images included.

    pos (A, 3), cell (3, 3) with lattice vectors as rows; float64, Å; any atom may lie outside the cell.
    Returns src, dst (E,), offset (E, 3) and d (E,): the image of src displaced by offset @ cell lies within r
    of dst. Sorted by dst, then src, then offset, third axis fastest. Raises UserError beyond MAX_PAIRS.
    """
    src, offset = torch.arange(len(pos)), torch.zeros(len(pos), 3, dtype=torch.long)
    image = pos
    if periodic:
        src, offset = images(pos, cell, r)
        image = pos[src] + offset.to(pos.dtype) @ cell
    search = pairs_of_all if len(pos) * len(image) <= DENSE else pairs_of_bins
    dst, j, d2 = search(pos.T.contiguous(), image.T.contiguous(), r + 1e-8)
    return src[j], dst, offset[j], d2.sqrt()


def images(pos, cell, r):
    """The periodic images that can be within r of an atom: source (J,) and offset (J, 3), sorted by both.

    Those inside the box of the atoms' fractional coordinates, r wider on every side.
    """
    inverse = torch.linalg.inv(cell)
    frac = pos @ inverse
    reach = r * inverse.norm(dim=0) + 1e-9  # r / height, height being the distance between opposite faces
    low, high = frac.amin(0) - reach, frac.amax(0) + reach
    first, last = (low - frac.amax(0)).ceil().long(), (high - frac.amin(0)).floor().long()
    offset = torch.cartesian_prod(*(torch.arange(a, b + 1) for a, b in zip(first, last)))
    image = frac[:, None] + offset  # (A, offsets, 3)
    src, which = torch.nonzero(((image >= low) & (image <= high)).all(2), as_tuple=True)
    return src, offset[which]


def pairs_of_all(pos, image, r):
    """Pairs within r, from the distances of all: pos (3, A), image (3, J) -> dst (E,), j (E,) and d² (E,)."""
    d2 = sum((x[None, :] - y[:, None]).square_() for x, y in zip(image, pos))  # (A, J)
    dst, j = torch.nonzero(between(d2, r), as_tuple=True)
    return dst, j, d2[dst, j]


def pairs_of_bins(pos, image, r, block=1 << 20):
    """As pairs_of_all, from the images in an atom's bin and the 26 around it: linear in the atoms.

    Bins are cubes with sides of r, or wider where atoms are so far apart that their numbers would not fit. A
    bin's number is (x, y, z) in one integer, so three bins along z are one stretch of the sorted images, and
    nine stretches are what an atom has to look at. `block` of those pairs are in memory at a time.
    """
    low = image.amin(1, keepdim=True)
    side = ((image.amax(1, keepdim=True) - low) / 2**19).clamp(min=1.001 * r)
    place = torch.tensor([1 << 42, 1 << 21, 1])
    number, order = torch.sort(((image - low) / side).long().T @ place)
    columns = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)) @ place[:2]
    middle = (((pos - low) / side).long().T @ place)[:, None] + columns  # (A, 9)
    begin, end = torch.searchsorted(number, middle - 1), torch.searchsorted(number, middle + 1, right=True)
    count = end - begin
    total = count.sum(1).cumsum(0)
    if int(total[-1]) > MAX_PAIRS:
        what = f"{pos.shape[1]} atoms are too dense for a graph of {r:.1f} A"
        pairs = f"{int(total[-1])} pairs to look at, {MAX_PAIRS} at most"
        raise UserError(f"{what}: {pairs}; are lengths in angstrom?")
    found = []
    blocks = torch.unique_consecutive(total // block, return_counts=True)[1].tolist()
    for atoms in torch.arange(pos.shape[1]).split(blocks):
        start, n = begin[atoms].flatten(), count[atoms].flatten()
        dst = atoms.repeat_interleave(len(columns)).repeat_interleave(n)
        j = order[torch.arange(len(dst)) + (start - n.cumsum(0) + n).repeat_interleave(n)]
        d2 = sum((x[j] - y[dst]).square_() for x, y in zip(image, pos))
        near = torch.nonzero(between(d2, r)).squeeze(1)
        near = near[torch.argsort(dst[near] * image.shape[1] + j[near])]
        found.append((dst[near], j[near], d2[near]))
    return tuple(torch.cat(column) for column in zip(*found))


def between(d2, r):
    return (d2 <= r**2) & (d2 > 1e-4)  # 1e-4: an atom is not its own neighbour


def all_edges(structures, radius):
    """The radius graphs of all structures as one, atoms numbered through; and what `nearest` needs of it.

    src, dst, offset, d: as in radius_graph. structure (E,), shift (E,): an edge's structure, and its first
    atom. order (E,) sorts by dst, then d; rank (E,) is the place among the edges into dst; count, first (A,)
    are how many an atom has, and where they begin in `order`.
    """
    num_atoms = torch.tensor([len(Z) for Z, *_ in structures])
    arrays = [(torch.from_numpy(pos), torch.from_numpy(cell), bool(pbc)) for _, pos, cell, pbc in structures]
    found = [radius_graph(*a, radius) for a in arrays]
    num_edges = torch.tensor([len(f[0]) for f in found])
    src, dst, offset, d = (torch.cat(column) for column in zip(*found))
    shift = torch.repeat_interleave(num_atoms.cumsum(0) - num_atoms, num_edges)
    src, dst = src + shift, dst + shift
    count = torch.bincount(dst, minlength=int(num_atoms.sum()))
    first = count.cumsum(0) - count
    order = torch.argsort(dst * (radius + 1) + d, stable=True)
    rank = torch.empty_like(dst)
    rank[order] = torch.arange(len(dst)) - first[dst[order]]
    structure = torch.repeat_interleave(torch.arange(len(found)), num_edges)
    edges = {"src": src, "dst": dst, "offset": offset, "d": d, "structure": structure, "shift": shift}
    return edges | {"order": order, "rank": rank, "count": count, "first": first}


def nearest(edges, k, cutoff, graph_rule, either_end=False):
    """(E,) bool: the edges from the k nearest neighbours of an atom; with either_end, of one of the two.

    The nearest k are all those within TIE of the k-th, so that shells of equal distance are kept whole. With
    graph_rule="published": exactly k (equal distances in order of the list), chosen by the receiving atom.
    """
    d, dst = edges["d"], edges["dst"]
    if graph_rule == "published":
        return (edges["rank"] < k) & (d <= cutoff)
    up_to = torch.full(edges["count"].shape, cutoff + 1e-8, dtype=d.dtype)  # (A,) how far every atom chooses
    more = torch.nonzero(edges["count"] > k).squeeze(1)
    kth = d[edges["order"][edges["first"][more] + k - 1]]
    up_to[more] = (kth + TIE).clamp(max=cutoff + 1e-8)
    return d <= (torch.maximum(up_to[edges["src"]], up_to[dst]) if either_end else up_to[dst])


def build_graphs(structures, graph):
    """[(Z, pos, cell, pbc)] -> a record of numpy arrays for each: what the cache stores and `collate` reads.

    Atoms Z (A,), pos (A, 3); cell (3, 3); for every graph GRAPH.index (E, 2), source and target, GRAPH.offset
    (E, 3). An undirected main edge exists when either end chose it; only one direction of it is stored.
    """
    assert all(len(Z) <= MAX_ATOMS for Z, *_ in structures)
    wanted = {"main": (graph.max_neighbors, graph.cutoff)}
    for name in GRAPHS[1:]:
        if getattr(graph, name):
            wanted[name] = (getattr(graph, f"max_neighbors_{name}"), getattr(graph, f"cutoff_{name}"))
    edges = all_edges(structures, max(cutoff for _, cutoff in wanted.values()))
    src, dst, offset = edges["src"], edges["dst"], edges["offset"]
    records = [{"Z": np.asarray(Z, np.int16), "pos": pos, "cell": cell} for Z, pos, cell, _ in structures]
    for name, (k, cutoff) in wanted.items():
        mask = nearest(edges, k, cutoff, graph.graph_rule, either_end=name == "main")
        if name == "main":
            mask &= (src < dst) | ((src == dst) & lexicographically_negative(offset))
        e = torch.nonzero(mask).squeeze(1)
        ends = torch.bincount(edges["structure"][e], minlength=len(structures)).cumsum(0).tolist()
        index = (torch.stack([src[e], dst[e]], dim=1) - edges["shift"][e, None]).to(torch.int16).numpy()
        n = offset[e].to(torch.int16).numpy()
        for record, start, end in zip(records, [0, *ends], ends):
            record[f"{name}.index"], record[f"{name}.offset"] = index[start:end], n[start:end]
    return records


def lexicographically_negative(n):
    """(E, 3) -> (E,): the first non-zero component is negative."""
    x, y, z = n.unbind(1)
    return (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))


def edge_vectors(batch, name, dtype=torch.float32):
    """Distances (E,) and unit vectors from source to target (E, 3) of a graph, differentiable in pos, cell.

    Computed in the precision of pos (float64), returned in `dtype`.
    """
    if f"{name}.d" in batch:  # given, not computed: parity with stored graphs
        return batch[f"{name}.d"], batch[f"{name}.V"]
    pos, src, dst = batch["pos"], batch[f"{name}.src"], batch[f"{name}.dst"]
    cell = batch["cell"].index_select(0, batch["batch"].index_select(0, dst))
    shift = torch.bmm(batch[f"{name}.offset"].to(pos.dtype)[:, None], cell).squeeze(1)
    v = pos.index_select(0, dst) - pos.index_select(0, src) - shift
    d = v.square().sum(1).sqrt()
    return d.to(dtype), (v / d[:, None]).to(dtype)


def collate(records, edge_dropout=0.0, generator=None):
    """Records of a GraphDataset -> one batch, a dict of tensors; y and index, where they are given, (B,).

    edge_dropout: probability of leaving out an edge (both directions of a main edge), for pre-training. A
    backbone multiplies sums over edges by batch["edge_scale"], 1 / (1 - edge_dropout), so the mean stays.
    """
    assert 0 <= edge_dropout < 1
    num_atoms = torch.tensor([len(r["Z"]) for r in records])
    first = torch.cumsum(num_atoms, 0) - num_atoms

    def join(key):
        return torch.from_numpy(np.concatenate([r[key] for r in records]))

    batch = {
        "Z": join("Z").long(),
        "pos": join("pos"),
        "cell": torch.from_numpy(np.stack([r["cell"] for r in records])),
        "batch": torch.repeat_interleave(torch.arange(len(records)), num_atoms),
        "num_atoms": num_atoms,
        "edge_scale": 1 / (1 - edge_dropout),
    }
    for key in ("y", "index"):
        if key in records[0]:
            batch[key] = torch.as_tensor(np.array([r[key] for r in records]))
    for key in ("forces", "teacher"):  # of atoms: (A, 3), (A, C)
        if key in records[0]:
            batch[key] = join(key)
    for name in GRAPHS:
        if f"{name}.index" not in records[0]:
            continue
        counts = torch.tensor([len(r[f"{name}.index"]) for r in records])
        shift = torch.repeat_interleave(first, counts)
        src, dst = (join(f"{name}.index").long() + shift[:, None]).unbind(1)
        offset = join(f"{name}.offset").long()
        if edge_dropout > 0:
            keep = torch.rand(len(src), generator=generator) >= edge_dropout
            src, dst, offset = src[keep], dst[keep], offset[keep]
        if name == "main":  # each stored edge, then its reverse
            src, dst, offset = torch.cat([src, dst]), torch.cat([dst, src]), torch.cat([offset, -offset])
            batch["main.swap"] = torch.arange(len(src)).roll(len(src) // 2)
        batch |= {f"{name}.src": src, f"{name}.dst": dst, f"{name}.offset": offset}
    return batch | tables(batch)


# ---------------------------------------------------------------- tables: the edges of every atom


def tables(batch):
    """Per-atom tables of edges, and masks of those pairs of edges that make a triplet or a quadruplet.

    A table has a row for every atom with the numbers of the edges into it, padded with the number of edges; a
    mask is true for pairs that count, never for padding. K, K2, Kq: most edges into one atom in the graphs
    main, a2ee2a, qint; N: most atoms that one atom sees in a2a; Q: qint edges. `model.Bases` reads them all.
    """
    key, shift, atom = image_keys(batch)
    out = main_table(batch)
    main = out["main.table"]
    if "a2ee2a.src" in batch:
        out["a2ee2a.table"], out["a2e.mask"] = triplet_table(batch, "a2ee2a", main, key)
    if "a2a.src" in batch:
        out |= a2a_table(batch)
    if "qint.src" in batch:
        out["qint.table"], out["qint.mask"] = triplet_table(batch, "qint", main, key)
        out["quad.mask"] = quadruplet_mask(batch, main, key["main"], shift["qint"], atom)
    return out


def image_keys(batch):
    """One integer for every edge that says which image of its source it comes from. Returns key, shift, atom.

    key[graph] (E,) = src w³ + shift; shift[graph] (E,) = n_x w² + n_y w + n_z of the offset n. Two edges into
    one atom come from the same image where their keys are equal. Offsets of a chain add up, and so do these:
    key(d -> b) + shift(b -> a) is the image of d seen from a. atom (A,) is every atom's own key, at offset 0.
    A sum of two offsets and a third differ by less than w = 4 (1 + largest |n|): no digit runs into the next.
    """
    names = [name for name in GRAPHS[:3] if f"{name}.src" in batch]
    offsets = torch.cat([batch[f"{name}.offset"].flatten() for name in names])
    A, w = len(batch["Z"]), 4 * (1 + (int(offsets.abs().max()) if len(offsets) else 0))
    assert (A + 1) * w**3 < 2**63
    shift = {name: (batch[f"{name}.offset"] * torch.tensor([w * w, w, 1])).sum(1) for name in names}
    key = {name: batch[f"{name}.src"] * w**3 + shift[name] for name in names}
    return key, shift, torch.arange(A) * w**3


def incoming(dst, num_atoms):
    """Table (A, K) of the edges into every atom, padded with E; each edge's place in the flat table, (E,)."""
    E = len(dst)
    count = torch.bincount(dst, minlength=num_atoms)
    K = int(count.max()) if E else 0
    order = torch.argsort(dst, stable=True)
    rank = torch.arange(E) - (torch.cumsum(count, 0) - count)[dst[order]]
    slot = torch.empty(E, dtype=torch.long)
    slot[order] = dst[order] * K + rank
    table = torch.full((num_atoms * K,), E)
    table[slot] = torch.arange(E)
    return table.view(num_atoms, K), slot


def look_up(values, table, fill=0):
    """values[table], with `fill` for the padding."""
    return torch.cat([values, values.new_tensor([fill])])[table]


def main_table(batch):
    """main.table (A, K); main.slot (E,), an edge's place in it. e2e.mask (A, K, K): c -> a, other b -> a."""
    table, slot = incoming(batch["main.dst"], len(batch["Z"]))
    real = table < len(batch["main.dst"])
    other = ~torch.eye(table.shape[1], dtype=torch.bool)
    return {"main.table": table, "main.slot": slot, "e2e.mask": real[:, :, None] & real[:, None, :] & other}


def triplet_table(batch, name, main, key):
    """Table (A, K2) of a2ee2a or qint; mask (A, K, K2): main edge c -> a, edge b -> a of it, two images."""
    table, _ = incoming(batch[f"{name}.dst"], len(batch["Z"]))
    real = (main < len(key["main"]))[:, :, None] & (table < len(key[name]))[:, None, :]
    return table, real & (look_up(key["main"], main)[:, :, None] != look_up(key[name], table)[:, None, :])


def a2a_table(batch):
    """Pairs of atoms, whatever images: a2a.pair (E,), an edge's pair; a2a.pair_src (P,), that one's source.

    a2a.table (A, N): pairs into every atom, padded with P; a2a.table_src (A, N): the sources, padded with A.
    """
    A = len(batch["Z"])
    pairs, pair = torch.unique(batch["a2a.dst"] * A + batch["a2a.src"], return_inverse=True)
    table, _ = incoming(pairs // A, A)
    src = pairs % A
    out = {"a2a.pair": pair, "a2a.pair_src": src}
    return out | {"a2a.table": table, "a2a.table_src": look_up(src, table, A)}


def quadruplet_mask(batch, main, main_key, qint_shift, atom):
    """(Q, K, K): for a qint edge b -> a the main edges c -> a and d -> b, d being neither a nor c.

    That c is not b is in qint.mask.
    """
    b, a = batch["qint.src"], batch["qint.dst"]
    real, image = main < len(main_key), look_up(main_key, main)  # (A, K)
    d = image[b] + qint_shift[:, None]  # (Q, Kd): the image of d seen from a
    d_counts = real[b] & (d != atom[a][:, None])
    not_c = image[a][:, :, None] != d[:, None, :]  # (Q, Kc, Kd)
    return d_counts[:, None, :] & real[a][:, :, None] & not_c


# ---------------------------------------------------------------- graphs on disk


class GraphDataset:
    """Graphs of all crystals, built once into one memory-mapped folder and read back one record at a time.

    The folder's name is the hash of the structures and the graph settings (labels play no part), so tasks on
    the same structures share it. dataset[i] is build_graphs' record with index, y and, if given, forces and teacher.
    """

    def __init__(self, crystals: Crystals, graph, cache_dir="", quiet=False):
        self.crystals, self.y = crystals, crystals.y
        self.num_atoms = np.array([len(z) for z in crystals.Z])
        self.hashes = [structure_hash(*s) for s in zip(crystals.Z, crystals.pos, crystals.cell)]
        settings = json.dumps({"version": CACHE_VERSION, **asdict(graph)}, sort_keys=True)
        key = hashlib.sha256(("\n".join(self.hashes) + settings).encode()).hexdigest()[:24]
        self.folder = cache_folder(cache_dir) / f"graphs-{key}"
        cached_folder(self.folder, lambda folder: self._build(folder, graph, quiet))

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        i = range(len(self))[i]
        record = {
            name: np.array(flat[start[i] : start[i + 1]]) for name, (flat, start) in self.fields.items()
        }
        record["index"], record["y"] = i, self.y[i]
        for name in ("forces", "teacher"):
            if (labels := getattr(self.crystals, name)) is not None:
                record[name] = labels[i]
        return record

    def __getstate__(self):  # a worker process maps the files again: pickling a memory map would copy it
        return {k: v for k, v in self.__dict__.items() if k != "fields"}

    @cached_property
    def fields(self):
        """{name: (its values of all crystals in order, (M + 1,) where each crystal's begin)}."""
        fields = {}
        with np.load(self.folder / "starts.npz") as starts:
            for name, (dtype, *shape) in json.loads((self.folder / "meta.json").read_text()).items():
                start = starts[name]
                shape = (int(start[-1]), *shape)
                if 0 in shape:  # an empty file cannot be mapped
                    flat = np.zeros(shape, dtype)
                else:
                    flat = np.memmap(self.folder / f"{name}.bin", dtype, mode="r", shape=shape)
                fields[name] = flat, start
        return fields

    def _build(self, folder: Path, graph, quiet):
        """NAME.bin: a field of all crystals in order; starts.npz: where each begins; meta.json: its type."""
        c, meta, counts = self.crystals, {}, {}
        chunks = batch_indices(self.num_atoms, range(len(self)), len(self), max_atoms=512)
        for chunk in progress(chunks, "graphs", quiet):
            try:
                records = build_graphs([(c.Z[i], c.pos[i], c.cell[i], bool(c.pbc[i])) for i in chunk], graph)
            except UserError as error:
                ids = " to ".join(dict.fromkeys([c.ids[chunk[0]], c.ids[chunk[-1]]]))
                raise UserError(f"{c.task.dataset}, id {ids}: {error}") from None
            for name, first in records[0].items():
                values = [record[name] for record in records]
                with open(folder / f"{name}.bin", "ab") as f:
                    f.writelines(v.tobytes() for v in values)
                meta[name] = [first.dtype.str, *first.shape[1:]]
                counts.setdefault(name, [0]).extend(map(len, values))
        np.savez(folder / "starts.npz", **{name: np.cumsum(count) for name, count in counts.items()})
        (folder / "meta.json").write_text(json.dumps(meta))
