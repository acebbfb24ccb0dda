"""data.py: splits, duplicates, batches, graphs on disk."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import data
from conftest import crystal, load_table, many, site, table_of
from crystals import Crystals, structure_hash, subset
from files import UserError

# ---------------------------------------------------------------- splits, duplicates, batches


def test_random_splits_are_70_15_15_and_follow_the_seed(tmp_path):
    crystals = many(tmp_path)
    a, b, c = (data.make_splits(crystals, seed) for seed in (0, 0, 1))
    assert {k: len(v) for k, v in a.items()} == {"train": 70, "val": 15, "test": 15}
    assert sorted(np.concatenate(list(a.values()))) == list(range(100))
    assert all((a[k] == b[k]).all() for k in a) and not all((a[k] == c[k]).all() for k in a)
    with pytest.raises(ValueError, match="2 usable rows; three parts need at least 3"):
        data.make_splits(subset(crystals, [0, 1]))


def test_split_files_count_rows_of_the_source(tmp_path, capsys):
    path = table_of(tmp_path, [crystal()] * 6, [1.0, None, 3.0, 4.0, 5.0, 6.0])
    crystals = load_table(path, target_column="y")
    split = tmp_path / "split.json"
    split.write_text('{"train": [0, 1, 2], "val": [3], "test": [5, 4]}')
    splits = data.make_splits(crystals, split_file=split)
    assert {k: crystals.y[v].tolist() for k, v in splits.items()} == {
        "train": [1.0, 3.0],
        "val": [4.0],
        "test": [6.0, 5.0],
    }
    assert "1 of its rows were skipped or not loaded" in capsys.readouterr().err
    split.write_text('{"train": ["n0", "n2"], "val": ["n3"], "test": ["n5"]}')
    assert {k: v.tolist() for k, v in data.make_splits(crystals, split_file=split).items()} == {
        "train": [0, 1],
        "val": [2],
        "test": [4],
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"train": [0]}', 'not JSON {"train"'),
        ("x", 'not JSON {"train"'),
        ('[["train", [0]]]', 'not JSON {"train"'),
        ('{"train": 5, "val": [1], "test": [2]}', 'not JSON {"train"'),
        ('{"train": "012", "val": [1], "test": [2]}', 'not JSON {"train"'),
        ('{"train": [0, [3]], "val": [1], "test": [2]}', r"\[3\] is listed"),
        ('{"train": [[0]], "val": [1], "test": [2]}', r"\[0\] is listed"),
        ('{"train": [0, true], "val": [1], "test": [2]}', "True is listed"),
        ('{"train": [true], "val": [1], "test": [2]}', "True is listed"),
        ('{"train": [0, 3.0], "val": [1], "test": [2]}', "3.0 is listed"),
        ('{"train": [0, 1e400], "val": [1], "test": [2]}', "inf is listed"),
        ('{"train": [0, null], "val": [1], "test": [2]}', "None is listed"),
        ('{"train": ["n0", 3], "val": ["n1"], "test": ["n2"]}', "3 is listed"),
        ('{"train": [0], "val": [1], "test": [1%s]}' % ("0" * 400), "row 10000[0]* is not among the 6 rows"),
        ('{"train": [0], "val": [1], "test": [1%s]}' % ("0" * 5000), 'not JSON {"train"'),
        ("[" * 100000, 'not JSON {"train"'),
        ("\udcff", 'not JSON {"train"'),
        ('{"train": [0], "val": [6], "test": [2]}', "row 6 is not among the 6 rows"),
        ('{"train": [0], "val": [-1], "test": [2]}', "row -1 is not among the 6 rows"),
        ('{"train": [0, 1], "val": [1], "test": [2]}', "listed twice"),
        ('{"train": [], "val": [], "test": []}', "no usable row in part 'train'"),
        ('{"train": [0], "val": [], "test": [2]}', "no usable row in part 'val'"),
        ('{"train": [0], "val": [1], "test": []}', "no usable row in part 'test'"),
        ('{"train": ["n0"], "val": ["n1"], "test": ["elsewhere"]}', "no usable row in part 'test'"),
    ],
)
def test_a_wrong_split_file_is_refused_in_one_line(tmp_path, text, message):
    crystals = many(tmp_path, 6)
    (tmp_path / "split.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message) as error:
        data.make_splits(crystals, split_file=tmp_path / "split.json")
    assert "split.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_split_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        data.make_splits(many(tmp_path, 6), split_file=tmp_path / "none.json")


def test_split_columns_need_all_three_parts(tmp_path):
    crystals = many(tmp_path, 6)
    named = replace(crystals, split=["Train", "valid", "validation ", "test", "VAL", "train"])
    splits = data.make_splits(named)
    assert {k: v.tolist() for k, v in splits.items()} == {"train": [0, 5], "val": [1, 2, 4], "test": [3]}
    for missing in ("train", "val", "test"):
        others = [part for part in ("train", "val", "test") if part != missing]
        with pytest.raises(UserError, match=f"column split: no usable row in part '{missing}'"):
            data.make_splits(replace(crystals, split=others * 3))
    for word in ("dev", ""):
        with pytest.raises(UserError, match=f"'{word}' of id n1 is not train, val or test"):
            data.make_splits(replace(crystals, split=["train", word, "val", "test", "val", "test"]))


def test_few_shot_rows_are_sorted_nested_and_repeatable():
    rows = np.arange(100, 200)[::-1]
    some = [data.few_shot(rows, n, seed=1) for n in (1, 10, 30, 100)]
    assert [len(few) for few in some] == [1, 10, 30, 100] and all((np.diff(few) > 0).all() for few in some)
    assert all(set(few) < set(more) for few, more in zip(some, some[1:]))
    assert (
        data.few_shot(rows, 10, seed=1).tolist()
        == some[1].tolist()
        != data.few_shot(rows, 10, seed=2).tolist()
    )
    assert data.few_shot(rows, 0, seed=1).tolist() == rows.tolist()
    for n in (101, -1):
        with pytest.raises(UserError, match=f"--few-shot {n}: the training split has 100 rows"):
            data.few_shot(rows, n, seed=1)


def test_split_fingerprints_identify_content_not_row_numbers(tmp_path):
    crystals = many(tmp_path, 12)
    splits = {"train": np.array([0, 1, 2]), "val": np.array([3]), "test": np.array([4, 5])}
    plain = data.split_fingerprint(crystals, splits)
    assert (
        plain.keys() == splits.keys()
        and all(len(v) == 64 for v in plain.values())
        and len({*plain.values()}) == 3
    )
    turned = subset(crystals, range(11, -1, -1))
    elsewhere = {part: 11 - rows for part, rows in splits.items()}
    assert data.split_fingerprint(turned, elsewhere) == plain
    relabelled = replace(crystals, y=np.where(np.arange(12) == 3, 0.5, crystals.y))
    other = data.split_fingerprint(relabelled, splits)
    assert {part for part in plain if plain[part] != other[part]} == {"val"}
    moved = data.split_fingerprint(crystals, {**splits, "test": np.array([4, 6])})
    assert {part for part in plain if plain[part] != moved[part]} == {"test"}


def test_duplicates_across_a_split_are_reported(tmp_path, capsys):
    twin = crystal(site("Cl", (0.5, 0.5, -0.5)), site("Na", (1 - 1e-7, 2, 0)))  # other order, other images
    crystals = load_table(table_of(tmp_path, [crystal(), twin, crystal(a=4.1), crystal()]))
    splits = {"train": np.array([0]), "val": np.array([1, 2]), "test": np.array([3])}
    assert data.report_duplicates(crystals, splits) == 2
    assert (
        "2 structures occur in two parts of the split (1 of val in train, 1 of test in train)"
        in capsys.readouterr().err
    )
    assert data.report_duplicates(crystals, {"train": np.array([0]), "val": np.array([2])}) == 0


def test_batches_keep_the_budget_of_atoms():
    atoms = np.array([3, 4, 300, 2, 2, 2, 2, 2])
    assert data.batch_indices(atoms, range(8), 4, max_atoms=8) == [[0, 1], [2], [3, 4, 5, 6], [7]]
    assert data.batch_indices(atoms, [5, 1], 1) == [[5], [1]]
    assert data.batch_indices(atoms, [], 4) == []


def test_shuffled_batches_hold_every_crystal_once_and_follow_the_seed():
    a, b = (
        data.batch_indices(np.ones(50), range(50), 8, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert a == b and sorted(sum(a, [])) == list(range(50)) and sum(a, []) != list(range(50))


# ---------------------------------------------------------------- graphs on disk


@dataclass(frozen=True)
class Settings:
    cutoff: float = 6.0


def stand_in(calls=None):
    """A build_graphs with fields of several shapes: per atom, per edge (none for one-atom cells)."""

    def build(structures, graph):
        records = []
        for Z, pos, cell, _ in structures:
            if calls is not None:
                calls.append(len(Z))
            n = len(Z)
            edges = np.arange(2 * n * (n - 1), dtype=np.int16).reshape(-1, 2)
            records.append(
                {
                    "Z": Z.astype(np.int16),
                    "pos": pos,
                    "main.index": edges,
                    "main.d": edges[:, 0] * graph.cutoff,
                }
            )
        return records

    return build


def one_to_four_atoms(tmp_path, n=12):
    def some(i):
        return crystal(*[site("Na", (0.2 * k, 0, 0)) for k in range(1 + i % 4)], a=5.0 + 0.1 * i)

    return load_table(table_of(tmp_path, [some(i) for i in range(n)]))


def test_graphs_are_stored_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "build_graphs", stand_in())
    crystals = one_to_four_atoms(tmp_path)
    dataset = data.GraphDataset(crystals, Settings(), quiet=True)
    assert len(dataset) == 12 and dataset.num_atoms.tolist() == [1, 2, 3, 4] * 3
    expected = stand_in()(list(zip(crystals.Z, crystals.pos, crystals.cell, crystals.pbc)), Settings())
    for i in (0, 3, 11):
        record = dataset[i]
        assert (record.pop("index"), record.pop("y")) == (i, crystals.y[i])
        assert record.keys() == expected[i].keys()
        for key, value in record.items():
            np.testing.assert_array_equal(value, expected[i][key])
            assert np.asarray(value).dtype == np.asarray(expected[i][key]).dtype
    assert dataset.hashes[2] == structure_hash(crystals.Z[2], crystals.pos[2], crystals.cell[2])
    with pytest.raises(IndexError):
        dataset[12]


def test_graphs_are_built_once_for_the_same_structures_and_settings(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(data, "build_graphs", stand_in(calls))
    crystals = one_to_four_atoms(tmp_path)
    data.GraphDataset(crystals, Settings(), quiet=True)
    relabelled = Crystals(
        crystals.task,
        crystals.ids,
        crystals.Z,
        crystals.pos,
        crystals.cell,
        crystals.pbc,
        crystals.y + 1,
        crystals.row,
    )
    dataset = data.GraphDataset(relabelled, Settings(), quiet=True)
    assert len(calls) == 12 and dataset[0]["y"] == crystals.y[0] + 1
    data.GraphDataset(crystals, Settings(cutoff=7.0), quiet=True)
    data.GraphDataset(subset(crystals, range(6)), Settings(), quiet=True)
    assert len(calls) == 12 + 12 + 6


def graph_folders(tmp_path):
    """Folders of graphs in the cache, hidden ones too."""
    return [p for p in (tmp_path / "cache").iterdir() if p.is_dir() and "graphs" in p.name]


def test_a_build_that_dies_leaves_nothing(tmp_path, monkeypatch):
    crystals = one_to_four_atoms(tmp_path)

    def dies(structures, graph):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "build_graphs", dies)
    with pytest.raises(KeyboardInterrupt):
        data.GraphDataset(crystals, Settings(), quiet=True)
    assert not graph_folders(tmp_path)


def test_what_a_killed_build_left_is_swept_by_the_next(tmp_path, monkeypatch):
    import multiprocessing

    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    monkeypatch.setattr(data, "build_graphs", stand_in())
    crystals = one_to_four_atoms(tmp_path)
    folder = data.GraphDataset(crystals, Settings(), quiet=True).folder
    folder.rename(folder.with_name(f".{folder.name}.{ended.pid}.part"))
    assert len(data.GraphDataset(crystals, Settings(), quiet=True)) == 12
    assert graph_folders(tmp_path) == [folder]


def cut(content):
    return content[:-3]


def flip(content):
    return (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 64])
        + content[len(content) // 2 + 1 :]
    )


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["meta.json", "starts.npz", "pos.bin", "main.index.bin", "sums.json"])
def test_a_damaged_graph_cache_is_built_again(tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr(data, "build_graphs", stand_in())
    crystals = one_to_four_atoms(tmp_path)
    first = data.GraphDataset(crystals, Settings(), quiet=True)
    record, file = first[3], first.folder / name
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = data.GraphDataset(crystals, Settings(), quiet=True)[3]
    assert all(np.array_equal(again[key], record[key]) for key in record)
    assert name == "starts.npz" or file.read_bytes() == whole  # a zip holds the time


def test_a_crystal_too_dense_for_a_graph_is_named(tmp_path, monkeypatch):
    crystals = one_to_four_atoms(tmp_path)
    monkeypatch.setattr(data, "DENSE", 0)
    monkeypatch.setattr(data, "MAX_PAIRS", 10)
    with pytest.raises(
        UserError,
        match="own.json.gz, id n0 to n11: .*too dense for a graph.* 10 at most; are lengths in angstrom",
    ):
        data.GraphDataset(crystals, data.GraphConfig(cutoff=6.0), quiet=True)
    assert not graph_folders(tmp_path)


def build_in_a_process(crystals):
    data.build_graphs = stand_in()
    return data.GraphDataset(crystals, Settings(), quiet=True)[11]["main.index"].tolist()


def test_two_processes_share_one_build(tmp_path):
    import multiprocessing

    crystals = one_to_four_atoms(tmp_path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        a, b = pool.map(build_in_a_process, [crystals, crystals], chunksize=1)
    assert a == b and len(graph_folders(tmp_path)) == 1


def test_a_dataset_travels_to_a_worker_without_its_files(tmp_path, monkeypatch):
    import pickle

    monkeypatch.setattr(data, "build_graphs", stand_in())
    dataset = data.GraphDataset(one_to_four_atoms(tmp_path), Settings(), quiet=True)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[5]["pos"], dataset[5]["pos"])


def test_a_graph_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "build_graphs", stand_in())
    crystals = one_to_four_atoms(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the cache cannot be written.*MOMA_CACHE"):
        data.GraphDataset(crystals, Settings(), cache_dir=tmp_path / "file", quiet=True)
