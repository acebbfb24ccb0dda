"""Crystal graphs, per-atom tables, batches, splits, graphs on disk (paper, B.1; the graphs of GemNet-OC).

    dataset = GraphDataset(crystals, GraphConfig())
    batch = collate([dataset[i] for i in range(32)])

M: crystals in a task. A: atoms. B: crystals in a batch. E: edges. Lengths in Å. Importing this file needs torch and
numpy only.
"""

import contextlib
import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from crystals import Crystals, duplicate_key, structure_hash
from files import cache_folder, cached_folder, progress

# ---------------------------------------------------------------- splits and batches


def make_splits(crystals: Crystals, split_seed=0, split_file="") -> dict:
    """{"train", "val", "test"}: positions into `crystals`. From a file, a split column, or 70/15/15 at random.

    split_file: JSON with a list for each part, of row numbers in the source or of ids. Rows that were skipped (or left
    out by a limit) are dropped from it and counted on stderr.
    """
    M, name = len(crystals), crystals.task.dataset
    if split_file:
        return read_split(crystals, Path(split_file))
    if crystals.split and any(crystals.split):
        names = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
        parts = {"train": [], "val": [], "test": []}
        for i, part in enumerate(crystals.split):
            if part and part.lower() not in names:
                raise ValueError(f"{name}: split '{part}' of id {crystals.ids[i]} is not train, val or test")
            if part:
                parts[names[part.lower()]].append(i)
        return checked({k: np.array(v, dtype=np.int64) for k, v in parts.items()}, f"{name}, column split")
    if M < 3:
        raise ValueError(f"task {crystals.task.name}: {M} usable rows; three parts need at least 3")
    order = np.random.RandomState(split_seed).permutation(M)
    n = max(1, round(0.15 * M))
    return {"train": np.sort(order[2 * n :]), "val": np.sort(order[:n]), "test": np.sort(order[n : 2 * n])}


def read_split(crystals, path: Path):
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = {k: stored[k] for k in ("train", "val", "test")}
    except FileNotFoundError:
        raise FileNotFoundError(f"--split-file {path}: no such file") from None
    except (ValueError, KeyError, TypeError):
        form = '{"train": [...], "val": [...], "test": [...]}'
        raise ValueError(f"--split-file {path}: should be JSON {form}") from None
    by_id = any(isinstance(v, str) for part in stored.values() for v in part)
    at = {key: i for i, key in enumerate(crystals.ids if by_id else crystals.row.tolist())}
    if not by_id:
        beyond = [r for part in stored.values() for r in part if not 0 <= r < crystals.num_rows]
        if beyond:
            table = f"the {crystals.num_rows} rows of {crystals.task.dataset}"
            raise ValueError(f"--split-file {path}: row {beyond[0]} is not among {table}; it is for another table")
    splits = {k: np.array([at[r] for r in part if r in at], dtype=np.int64) for k, part in stored.items()}
    dropped = sum(map(len, stored.values())) - sum(map(len, splits.values()))
    if dropped:
        print(f"{path}: {dropped} of its rows were skipped or not loaded, and are left out", file=sys.stderr)
    return checked(splits, f"--split-file {path}")


def checked(splits, source):
    for name in ("train", "val"):
        if not len(splits[name]):
            raise ValueError(f"{source}: no usable row in part '{name}'")
    everything = np.concatenate(list(splits.values()))
    if len(np.unique(everything)) < len(everything):
        raise ValueError(f"{source}: a row is listed twice, so the parts overlap")
    return splits


def report_duplicates(crystals, splits) -> int:
    """How many val and test rows are the same structure as a row of an earlier part; one line on stderr if any."""
    seen, total, lines = {}, 0, []
    for name, part in splits.items():
        keys = [duplicate_key(crystals.Z[i], crystals.pos[i], crystals.cell[i]) for i in part]
        found = Counter(seen[k] for k in keys if k in seen)
        lines += [f"{n} of {name} in {other}" for other, n in found.items()]
        total += sum(found.values())
        for k in keys:
            seen.setdefault(k, name)
    if total:
        where = ", ".join(lines)
        print(f"{crystals.task.name}: {total} structures occur in two parts of the split ({where})", file=sys.stderr)
    return total


def batch_indices(num_atoms, indices, batch_size: int, max_atoms=0, generator=None) -> list:
    """Positions in batches of at most batch_size crystals and max_atoms atoms (0: no bound), in order.

    num_atoms: (M,) atoms of every crystal, or edges for a budget of edges. A crystal above the budget is a batch of its
    own. generator: torch.Generator, shuffles first.
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

    main: edges that carry messages, symmetric. a2ee2a: neighbours for the atom-edge interactions. qint: the middle edge
    of quadruplets. a2a: the long-range atom graph. The other three are selections of the a2a graph.
    """

    cutoff: float = 12.0
    cutoff_a2ee2a: float = 12.0
    cutoff_qint: float = 12.0
    cutoff_a2a: float = 12.0
    max_neighbors: int = 30
    max_neighbors_a2ee2a: int = 20
    max_neighbors_qint: int = 8
    max_neighbors_a2a: int = 1000
    graph_rule: str = "symmetric"  # or "published": exactly k, and of a pair only the lower-numbered atom chooses
    a2ee2a: bool = True  # whether the model reads the graph at all
    qint: bool = True
    a2a: bool = True


CACHE_VERSION = 2  # raise when build_graphs() writes something else
TIE = 1e-3  # angstrom: neighbours this close to the k-th nearest count as equally near


def radius_graph(pos, cell, periodic, r):
    """Every pair of atoms of one structure within r of each other, periodic images included.

    pos (A, 3), cell (3, 3) with lattice vectors as rows; float64, angstrom; any atom may lie outside the cell. Returns
    src, dst (E,), offset (E, 3) and d (E,): the image of src displaced by offset @ cell lies within r of dst. Sorted by
    dst, then src, then offset with the third axis fastest.
    """
    A, r2 = len(pos), (r + 1e-8) ** 2
    offsets = torch.zeros(1, 3, dtype=torch.long)
    if periodic:
        inverse = torch.linalg.inv(cell)
        frac = pos @ inverse
        reach = r * inverse.norm(dim=0) + 1e-9  # r / height, height being the distance between opposite faces
        low, high = frac.amin(0) - reach, frac.amax(0) + reach  # where an image must lie to be near some atom
        first, last = (low - frac.amax(0)).ceil().int(), (high - frac.amin(0)).floor().int()
        axes = [torch.arange(a, b + 1) for a, b in zip(first, last)]
        offsets = torch.cartesian_prod(*axes)
    src, n = torch.arange(A).repeat_interleave(len(offsets)), offsets.repeat(A, 1)
    if periodic:
        f = frac[src] + n
        near = torch.nonzero(((f >= low) & (f <= high)).all(1)).squeeze(1)
        src, n = src[near], n[near]
    image = (pos[src] + n.to(pos.dtype) @ cell).T.contiguous()  # (3, J)
    d2 = sum((image[i] - pos[:, i : i + 1]).square_() for i in range(3))  # (A, J)
    dst, j = torch.nonzero((d2 <= r2) & (d2 > 1e-4), as_tuple=True)  # 1e-4: an atom is not its own neighbour
    return src[j], dst, n[j], d2[dst, j].sqrt()


def kth_distance(d, dst, order, first, count, k):
    """Distance of every atom's k-th nearest neighbour; inf where it has no more than k. order sorts by (dst, d)."""
    at = (first + k - 1).clamp(max=max(len(d) - 1, 0))
    return torch.where(count > k, d[order[at]] if len(d) else math.inf, math.inf)


def build_graphs(structures, graph):
    """[(Z, pos, cell, pbc)] -> one record of numpy arrays for each: what the cache stores and `collate` reads.

    The nearest k neighbours of an atom are all those within TIE of the k-th, so that shells of equal distance are kept
    whole. An undirected main edge exists when either end chose it; only one direction of it is stored. With
    graph_rule="published": exactly k (equal distances in the order of the list), chosen by the receiving atom only.
    """
    num_atoms = torch.tensor([len(Z) for Z, *_ in structures])
    pos = torch.from_numpy(np.concatenate([p for _, p, *_ in structures]))
    cell = torch.from_numpy(np.stack([c for _, _, c, _ in structures]))
    pbc = [bool(p) for *_, p in structures]
    others = [getattr(graph, f"cutoff_{g}") for g in ("a2ee2a", "qint", "a2a") if getattr(graph, g)]
    radius = max([graph.cutoff, *others])
    first_atom = (torch.cumsum(num_atoms, 0) - num_atoms).tolist()
    atoms = [pos[i : i + n] for i, n in zip(first_atom, num_atoms.tolist())]
    found = [radius_graph(x, c, p, radius) for x, c, p in zip(atoms, cell, pbc)]
    src, dst, offset, d = (torch.cat(column) for column in zip(*found))
    edges = torch.tensor([len(f[0]) for f in found])
    structure = torch.repeat_interleave(torch.arange(len(found)), edges)
    shift = torch.repeat_interleave(torch.tensor(first_atom), edges)
    src, dst = src + shift, dst + shift
    A = len(pos)
    count = torch.bincount(dst, minlength=A)
    first = torch.cumsum(count, 0) - count
    order = torch.argsort(dst * (radius + 1) + d, stable=True) if len(d) else dst
    published = graph.graph_rule == "published"
    rank = torch.empty_like(dst)
    rank[order] = torch.arange(len(dst)) - first[dst[order]]

    def nearest(name):
        """Which edges the receiving atom chooses: (E,) bool, and the distance up to which it chooses: (A,)."""
        suffix = "" if name == "main" else f"_{name}"
        k, r = getattr(graph, f"max_neighbors{suffix}"), getattr(graph, f"cutoff{suffix}")
        if published:
            return (rank < k) & (d <= r), None
        up_to = (kth_distance(d, dst, order, first, count, k) + TIE).clamp(max=r + 1e-8)
        return d <= up_to[dst], up_to

    half = (src < dst) | ((src == dst) & lexicographically_negative(offset))
    chosen, up_to = nearest("main")
    if not published:
        chosen = d <= torch.maximum(up_to[src], up_to[dst])
    picked = {"main": chosen & half}
    picked |= {name: nearest(name)[0] for name in ("a2ee2a", "qint", "a2a") if getattr(graph, name)}

    records = [{"Z": np.asarray(Z, np.int16), "pos": p, "cell": c} for Z, p, c, _ in structures]
    for name, mask in picked.items():
        e = torch.nonzero(mask).squeeze(1)
        index = torch.stack([src[e] - shift[e], dst[e] - shift[e]], dim=1).to(torch.int16).numpy()
        n = offset[e].to(torch.int16).numpy()
        ends = torch.cumsum(torch.bincount(structure[e], minlength=len(structures)), 0).tolist()
        for record, start, end in zip(records, [0, *ends], ends):
            record[f"{name}.index"], record[f"{name}.offset"] = index[start:end], n[start:end]
    return records


def lexicographically_negative(n):
    """(E, 3) -> (E,): the first non-zero component is negative."""
    x, y, z = n.unbind(1)
    return (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))


def edge_vectors(batch, name, dtype=torch.float32):
    """Distances (E,) and unit vectors from source to target (E, 3) of one graph. Differentiable in pos and cell.

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
    """Records of a GraphDataset -> one batch, a dict of tensors. Their y and index, where they have them, become (B,).

    edge_dropout: probability of leaving out an edge (both directions of a main edge), for pre-training.
    """
    num_atoms = torch.tensor([len(r["Z"]) for r in records])
    first = (torch.cumsum(num_atoms, 0) - num_atoms).numpy()
    join = lambda key: torch.from_numpy(np.concatenate([r[key] for r in records]))  # noqa: E731
    batch = {
        "Z": join("Z").long(),
        "pos": join("pos"),
        "cell": torch.from_numpy(np.stack([r["cell"] for r in records])),
        "batch": torch.repeat_interleave(torch.arange(len(records)), num_atoms),
        "num_atoms": num_atoms,
    }
    for key in ("y", "index"):
        if key in records[0]:
            batch[key] = torch.as_tensor(np.array([r[key] for r in records]))
    if "forces" in records[0]:
        batch["forces"] = join("forces")  # (A, 3)
    for name in ("main", "a2ee2a", "qint", "a2a"):
        if f"{name}.index" not in records[0]:
            continue
        counts = torch.tensor([len(r[f"{name}.index"]) for r in records])
        shift = torch.repeat_interleave(torch.from_numpy(first), counts)
        src, dst = (join(f"{name}.index").long() + shift[:, None]).unbind(1)
        offset = join(f"{name}.offset").long()
        if edge_dropout > 0:
            keep = torch.rand(len(src), generator=generator) >= edge_dropout
            src, dst, offset = src[keep], dst[keep], offset[keep]
        if name == "main":  # each stored edge, then its reverse
            src, dst, offset = torch.cat([src, dst]), torch.cat([dst, src]), torch.cat([offset, -offset])
            batch["main.swap"] = torch.arange(len(src)).roll(len(src) // 2)
        batch |= {f"{name}.src": src, f"{name}.dst": dst, f"{name}.offset": offset}
    if edge_dropout > 0:
        batch["edge_dropout"] = edge_dropout  # sums over edges are divided by 1 - p in the output blocks
    return batch | tables(batch)


def incoming(dst, num_atoms):
    """Padded table of the edges into every atom, (A, K), padding E; and every edge's place in it, (E,)."""
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


def tables(batch):
    """Per-atom tables of edges, and masks of the pairs of edges that make a triplet or a quadruplet.

    Two edges into an atom come from the same image when source and offset are equal. Both are packed in one integer, so
    that the offsets of a chain of edges add up: key(d -> b) + key(b -> a) tells which image of d is seen from a.
    """
    A = len(batch["Z"])
    out = {}
    main, slot = incoming(batch["main.dst"], A)
    out |= {"main.table": main, "main.slot": slot}
    K = main.shape[1]
    wide = 2 * 2 * (1 + max(int(batch[k].abs().max()) if len(batch[k]) else 0 for k in batch if k.endswith(".offset")))
    place = torch.tensor([wide * wide, wide, 1])

    def pad(values, table, fill):
        return torch.cat([values, values.new_tensor([fill])])[table]

    there = [name for name in ("main", "a2ee2a", "qint") if f"{name}.src" in batch]
    shift = {name: (batch[f"{name}.offset"] * place).sum(1) for name in there}
    key = {name: batch[f"{name}.src"] * wide**3 + shift[name] for name in shift}
    main_key = pad(key["main"], main, -(wide**4))  # (A, K)
    main_real = main < len(key["main"])
    out["e2e.mask"] = main_real[:, :, None] & main_real[:, None, :] & ~torch.eye(K, dtype=torch.bool)
    if "a2ee2a" in key:
        table, _ = incoming(batch["a2ee2a.dst"], A)
        a2ee2a_key = pad(key["a2ee2a"], table, -1)
        real = main_real[:, :, None] & (table < len(key["a2ee2a"]))[:, None, :]
        out |= {"a2ee2a.table": table, "a2e.mask": real & (main_key[:, :, None] != a2ee2a_key[:, None, :])}
    if "a2a.src" in batch:
        src, dst = batch["a2a.src"], batch["a2a.dst"]
        pairs, pair = torch.unique(dst * A + src, return_inverse=True)
        table, _ = incoming(pairs // A, A)
        out |= {"a2a.pair": pair, "a2a.pair_src": pairs % A, "a2a.table": table}
        out["a2a.table_src"] = pad(pairs % A, table, A)
    if "qint" in key:
        src, dst = batch["qint.src"], batch["qint.dst"]  # b -> a
        table, _ = incoming(dst, A)
        qint_key = pad(key["qint"], table, -1)
        real = main_real[:, :, None] & (table < len(src))[:, None, :]
        out |= {"qint.table": table, "qint.mask": real & (main_key[:, :, None] != qint_key[:, None, :])}  # c is not b
        seen_from_a = main_key[src] + shift["qint"][:, None]  # (Q, Kd): image of d relative to a
        d_real = main_real[src] & (seen_from_a != (dst * wide**3)[:, None])  # d is not a
        not_c = main_key[dst][:, :, None] != seen_from_a[:, None, :]  # (Q, Kc, Kd): d is not c
        out["quad.mask"] = d_real[:, None, :] & main_real[dst][:, :, None] & not_c
    return out


# ---------------------------------------------------------------- graphs on disk


class GraphDataset:
    """Graphs of all crystals, built once into one memory-mapped folder and read back one record at a time.

    The folder's name is the hash of the structures and the graph settings (labels play no part), so tasks on the same
    structures share it. dataset[i] is build_graphs' record with index, y and, where there are any, forces.
    """

    def __init__(self, crystals: Crystals, graph, cache_dir="", quiet=False):
        self.crystals, self.ids, self.y = crystals, crystals.ids, crystals.y
        self.num_atoms = np.array([len(z) for z in crystals.Z])
        self.hashes = [structure_hash(*s) for s in zip(crystals.Z, crystals.pos, crystals.cell)]
        settings = json.dumps({"version": CACHE_VERSION, **asdict(graph)}, sort_keys=True)
        key = hashlib.sha256(("\n".join(self.hashes) + settings).encode()).hexdigest()[:24]
        self.folder = cache_folder(cache_dir) / f"graphs-{key}"
        cached_folder(self.folder, lambda folder: self._build(folder, graph, quiet))
        self.meta = json.loads((self.folder / "meta.json").read_text())
        with np.load(self.folder / "starts.npz") as stored:
            self.starts = dict(stored)
        self.fields = self._map()
        self.edges = 2 * np.diff(self.starts["main.index"])  # an undirected edge is stored once

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        i = range(len(self))[i]
        record = {}
        for name, flat in self.fields.items():
            a, b = self.starts[name][i : i + 2]
            value = np.array(flat[a:b])
            record[name] = value[0] if self.meta[name]["scalar"] else value
        record["index"], record["y"] = i, self.y[i]
        if self.crystals.forces is not None:
            record["forces"] = self.crystals.forces[i]
        return record

    def __getstate__(self):  # a worker process maps the files again: pickling a memory map would copy it
        return {k: v for k, v in self.__dict__.items() if k != "fields"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.fields = self._map()

    def _build(self, folder: Path, graph, quiet):
        crystals, meta, counts = self.crystals, {}, {}
        with contextlib.ExitStack() as stack:
            files = {}
            for chunk in progress(list(chunks(self.num_atoms)), "graphs", quiet):
                structures = [(crystals.Z[i], crystals.pos[i], crystals.cell[i], bool(crystals.pbc[i])) for i in chunk]
                for record in build_graphs(structures, graph):
                    record = {k: np.asarray(v) for k, v in record.items()}
                    if not meta:
                        for name, value in record.items():
                            meta[name] = {"dtype": value.dtype.str, "shape": value.shape[1:], "scalar": value.ndim == 0}
                            files[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
                            counts[name] = []
                    assert record.keys() == meta.keys(), (record.keys(), meta.keys())
                    for name, value in record.items():
                        value = value.reshape(1) if value.ndim == 0 else value
                        assert value.shape[1:] == meta[name]["shape"], (name, value.shape, meta[name])
                        files[name].write(np.ascontiguousarray(value, dtype=meta[name]["dtype"]).tobytes())
                        counts[name].append(len(value))
        starts = {name: np.concatenate([[0], np.cumsum(c)]).astype(np.int64) for name, c in counts.items()}
        assert all(len(s) == len(self) + 1 for s in starts.values())
        np.savez(folder / "starts.npz", **starts)
        (folder / "meta.json").write_text(json.dumps(meta))

    def _map(self):
        fields = {}
        for name, m in self.meta.items():
            shape = (int(self.starts[name][-1]), *m["shape"])
            path = self.folder / f"{name}.bin"
            if np.prod(shape):
                fields[name] = np.memmap(path, dtype=m["dtype"], mode="r", shape=shape)
            else:  # an empty file cannot be mapped
                fields[name] = np.zeros(shape, dtype=m["dtype"])
        return fields


def chunks(num_atoms, most=512):
    """Consecutive positions, about `most` atoms at a time."""
    chunk, atoms = [], 0
    for i, n in enumerate(num_atoms):
        if chunk and atoms + n > most:
            yield chunk
            chunk, atoms = [], 0
        chunk.append(i)
        atoms += n
    if chunk:
        yield chunk


