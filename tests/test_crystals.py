"""crystals.py: sources, skip rules, the rows cache."""

import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import crystals as module
import sources
from conftest import crystal, load_table, many, site, table_of, write_table
from crystals import (
    VACUUM,
    check_distances,
    elements,
    from_structures,
    load_crystals,
    structure_hash,
    subset,
    to_arrays,
    wrap,
)
from data import make_splits
from files import UserError, write_skipped
from sources import Skip, fetch, find_source, json_rows, table_rows
from tasks import TASKS, Task, get_task, unit_of

REAL = Path(os.environ.get("MATMINER_DATA") or Path(module.__file__).parent.parent / "shared/matminer")
SPLITS = REAL.parent / "splits"
real = pytest.mark.skipif(
    not (REAL / "tasks.json").exists(), reason=f"no real data in {REAL} (set MATMINER_DATA)"
)


# ---------------------------------------------------------------- sources


def test_a_table_becomes_arrays(tmp_path):
    crystals = load_table(table_of(tmp_path, [crystal(), crystal(a=5.0)]))
    assert (
        crystals.ids == ["n0", "n1"] and crystals.row.tolist() == [0, 1] and crystals.y.tolist() == [1.0, 2.0]
    )
    assert crystals.Z[0].tolist() == [11, 17] and crystals.Z[0].dtype == np.int64
    np.testing.assert_allclose(crystals.pos[1], [[0, 0, 0], [2.5, 2.5, 2.5]])
    np.testing.assert_allclose(crystals.cell[1], 5 * np.eye(3))
    assert crystals.pbc.tolist() == [True, True] and elements(crystals) == ["Na", "Cl"]


def test_tables_read_the_same_in_small_blocks_as_records_and_uncompressed(tmp_path):
    rows = [[crystal(a=3.0 + i), float(i), f'quo"te{i}'] for i in range(30)]
    split = {"columns": ["structure", "y", "word"], "index": list(range(30)), "data": rows}
    (tmp_path / "t.json").write_text(json.dumps(split, indent=1))
    records = [dict(zip(split["columns"], r)) for r in rows]
    assert [list(json_rows(tmp_path / "t.json", block)) for block in (1, 100, 1 << 22)] == 3 * [records]
    (tmp_path / "r.json").write_text(json.dumps(records))
    (tmp_path / "late.json").write_text(json.dumps({k: split[k] for k in ("index", "data", "columns")}))
    for name in ("t.json", "r.json", "late.json"):
        assert load_crystals(get_task("", data=tmp_path / name), quiet=True).y.tolist() == list(range(30))


def test_the_only_number_is_the_label_and_two_numbers_are_a_question(tmp_path):
    path = write_table(
        tmp_path / "t.json.gz", ["mpid", "structure", "a", "b"], [["mp-1", crystal(), 1.0, 2.0]]
    )
    with pytest.raises(ValueError, match="which column is the label.*mpid, a, b.*--target-column"):
        load_crystals(get_task("own", data=path), quiet=True)
    crystals = load_crystals(get_task("own", data=path, target_column="b"), quiet=True)
    assert crystals.y.tolist() == [2.0] and crystals.ids == ["mp-1"]
    with pytest.raises(ValueError, match=r"no column 'c' \(columns: mpid, a, b\)"):
        load_crystals(get_task("own", data=path, target_column="c"), quiet=True)
    with pytest.raises(
        ValueError,
        match="no column 'geometry' with structures .columns: mpid, structure, a, b.*--structure-column",
    ):
        load_crystals(get_task("own", data=path, target_column="b", structure_column="geometry"), quiet=True)
    with pytest.raises(ValueError, match="no column 'jid' for the ids"):
        load_crystals(get_task("own", data=path, target_column="b", id_column="jid"), quiet=True)


def test_a_dielectric_column_is_the_mean_of_its_three_directions(tmp_path):
    path = write_table(
        tmp_path / "t.json.gz",
        ["structure", *(f"epsilon_{k} opt" for k in "xyz")],
        [[crystal(), 1.0, 2.0, 6.0]],
    )
    assert load_crystals(
        get_task("own", data=path, target_column="dielectric opt"), quiet=True
    ).y.tolist() == [3.0]


@pytest.mark.parametrize(
    "given, ids",
    [
        (["a", "a", None, 1234567], ["a", "a#2", "2", "1234567"]),
        (["a#2", "a", "a"], ["a#2", "a", "a#3"]),
        (["a", "a", "a#2", "1"], ["a", "a#3", "a#2", "1"]),
        (["x" * 300, "x" * 300 + "y"], ["x" * 300, "x" * 300 + "y"]),
        (["caf\ud8e9", "é"], ["caf\\ud8e9", "é"]),
    ],
)
def test_ids_are_kept_unique_and_can_be_written_and_missing_ones_are_the_row(tmp_path, given, ids):
    path = write_table(tmp_path / "t.json.gz", ["id", "structure", "y"], [[i, crystal(), 1.0] for i in given])
    crystals = load_crystals(get_task("own", data=path, target_column="y"), quiet=True)
    assert crystals.ids == ids
    write_skipped(tmp_path / "skipped.csv", [(i, "") for i in crystals.ids])


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[1, 2], [3, 4]]", "none of 2 rows can be used .no structure 2"),
        ("[1, 23, null]", "none of 3 rows can be used .no structure 3"),
        ('{"data": [[1]], "index": [0]}', "neither a table .* nor a structure"),
        ('{"data": 5, "columns": ["structure"]}', "not a table in JSON .*'5' where '.' should be"),
        ('{"columns": ["structure", "y", "y"], "data": []}', "names the column 'y' twice"),
        ('{"columns": 5, "data": []}', "the header should be a list of names"),
        ('{"columns": ["structure", "y"], "data": [5, [1]]}', "none of 2 rows can be used .no structure 2"),
        ('"words"', "not a table in JSON .*where '{' should be"),
        ("", "not a table in JSON .*ends too early"),
        ("[" * 100000, "not a table in JSON .RecursionError"),
        ('[{"structure": ' + "[" * 100000, "not a table in JSON .RecursionError"),
        ('{"sites": []}\n{"sites": []}\n', "not a table in JSON .*'{' after its end"),  # JSON lines
        ('[{"structure": null}]\n5', "not a table in JSON .*'5' after its end"),
    ],
)
def test_json_of_another_shape_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_crystals(
            get_task("own", data=tmp_path / "t.json", target_column="y"), need_target=False, quiet=True
        )
    assert "\n" not in str(error.value)


def test_a_row_of_another_shape_hurts_itself_only(tmp_path):
    good = {"structure": crystal(), "y": 1.0}
    rows = [
        good,
        {"y": 2.0},
        5,
        {"structure": crystal(), "y": 10**400},
        {"structure": "[" * 100000, "y": 3.0},
        good,
    ]
    rows += [{"structure": crystal(), "y": [1.0]}]
    (tmp_path / "t.json").write_text(json.dumps(rows).replace(str(10**400), "1" + "0" * 5000))
    crystals = load_crystals(get_task("own", data=tmp_path / "t.json"), quiet=True)
    assert crystals.row.tolist() == [0, 5]
    rules = ["no structure", "no structure", "label is not a number", "unreadable structure", "no label"]
    assert [r.split(":")[0] for _, r in crystals.skipped] == rules


def test_one_huge_value_is_refused_before_memory_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST", 1 << 20)
    for name, start in (
        ("row.json.gz", b"[["),
        ("word.json.gz", b'["'),
        ("whole.json.gz", b'{"a": 1, "sites":['),
    ):
        (tmp_path / name).write_bytes(gzip.compress(start + b"1," * (16 << 20), 1))
    (tmp_path / "x.cif.gz").write_bytes(gzip.compress(b"#" * (32 << 20), 1))
    for path in tmp_path.glob("*.gz"):
        tracemalloc.start()
        with pytest.raises(UserError, match="larger than 1 MiB|of more than 1 MiB"):
            read_folder(path)
        assert (
            tracemalloc.get_traced_memory()[1] < 32 << 20
        )  # a block of text and its list; the file has 33 million
        tracemalloc.stop()


@pytest.mark.parametrize("cut", [40, 200])
def test_a_table_cut_short_is_an_error(tmp_path, cut):
    path = table_of(tmp_path, [crystal()] * 50)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_table(path)


def test_json_that_is_no_table_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text('{"structure": {"0": 1}}')
    with pytest.raises(ValueError, match="neither a table .* nor a structure"):
        load_crystals(get_task("x", data=tmp_path / "x.json"), quiet=True)


def cif_and_poscar(folder):
    from pymatgen.core import Lattice, Structure

    salt = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    salt.to(filename=str(folder / "salt.cif"))
    salt.to(filename=str(folder / "POSCAR_salt"), fmt="poscar")
    (folder / "plain.json").write_text(salt.to(fmt="json"))
    return salt


def test_folder_with_targets_csv(tmp_path, capsys):
    cif_and_poscar(tmp_path)
    (tmp_path / "targets.csv").write_text(
        "id,file,target,split\n001,salt.cif,1.5,train\nb,POSCAR_salt,2.5,val\nc,plain.json,3.5,test\nd,gone.cif,4.5,train\ne,salt.cif,,train\nf,salt.cif,abc,train\n"
    )
    crystals = load_crystals(get_task("own", data=tmp_path, unit="eV"))
    assert (
        crystals.ids == ["001", "b", "c"]
        and crystals.y.tolist() == [1.5, 2.5, 3.5]
        and crystals.split == ["train", "val", "test"]
    )
    assert [i for i, _ in crystals.skipped] == ["d", "e", "f"]
    assert [r.split(":")[0] for _, r in crystals.skipped] == [
        "unreadable structure",
        "no label",
        "label is not a number",
    ]
    for pos in crystals.pos:
        np.testing.assert_allclose(pos, [[0, 0, 0], [2, 2, 2]], atol=1e-6)
    screen = capsys.readouterr().err
    assert (
        "6 rows read, 3 kept, 3 skipped: unreadable structure 1, no label 1, label is not a number 1"
        in screen
    )
    assert "label target [eV]: min 1.5, median 2.5, max 3.5" in screen
    assert "2 elements: Na Cl; atoms per cell: median 2, max 2; 2 duplicate structures" in screen
    assert {k: v.tolist() for k, v in make_splits(crystals).items()} == {
        "train": [0],
        "val": [1],
        "test": [2],
    }
    write_skipped(tmp_path / "skipped.csv", crystals.skipped)
    with open(tmp_path / "skipped.csv", newline="") as f:
        assert list(csv.reader(f)) == [["id", "reason"], *map(list, crystals.skipped)]


def test_cgcnn_id_prop_csv(tmp_path):
    cif_and_poscar(tmp_path)
    (tmp_path / "id_prop.csv").write_text("salt,-1.25\nplain,2\n")
    crystals = load_crystals(get_task("own", data=tmp_path), quiet=True)
    assert crystals.ids == ["salt", "plain"] and crystals.y.tolist() == [-1.25, 2.0]


def test_targets_csv_without_its_header_is_an_error(tmp_path):
    (tmp_path / "targets.csv").write_text("salt.cif,1\n")
    with pytest.raises(
        ValueError, match="the first line is 'salt.cif,1'; it should name the columns id,file,target"
    ):
        load_crystals(get_task("own", data=tmp_path), quiet=True)


@pytest.mark.parametrize("name", ["targets.csv", "plain.json"])
def test_a_file_changed_in_place_is_read_again_though_size_and_time_stay(tmp_path, name):
    folder = tmp_path / "own"  # beside the cache
    folder.mkdir()
    cif_and_poscar(folder)
    (folder / "targets.csv").write_text("id,file,target\na,plain.json,1\n")
    task = get_task("own", data=folder)
    assert load_crystals(task, quiet=True).Z[0].tolist() == [11, 17]
    old, new = {"targets.csv": (",1\n", ",2\n"), "plain.json": ('"Cl"', '"Br"')}[name]
    file, times = folder / name, os.stat(folder / name)
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_size == times.st_size and os.stat(file).st_mtime_ns == times.st_mtime_ns
    crystals = load_crystals(task, quiet=True)
    assert (crystals.Z[0].tolist(), crystals.y.tolist()) == (
        ([11, 17], [2.0]) if name == "targets.csv" else ([11, 35], [1.0])
    )


def test_a_folder_that_moved_is_read_from_the_cache(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    cif_and_poscar(tmp_path / "a")
    first = read_folder(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(module, "to_arrays", None)
    assert read_folder(tmp_path / "b").fingerprint == first.fingerprint


def test_a_bare_folder_or_file_is_for_prediction(tmp_path):
    cif_and_poscar(tmp_path)
    (tmp_path / "notes.txt").write_text("not a structure")
    crystals = load_crystals(get_task("own", data=tmp_path), need_target=False, quiet=True)
    assert crystals.ids == ["POSCAR_salt", "plain", "salt"] and np.isnan(crystals.y).all()
    for name in ("salt.cif", "POSCAR_salt", "plain.json"):
        assert load_crystals(get_task("own", data=tmp_path / name), need_target=False, quiet=True).Z[
            0
        ].tolist() == [
            11,
            17,
        ]
    with pytest.raises(ValueError, match="which column is the label.*--target-column"):
        load_crystals(get_task("own", data=tmp_path), quiet=True)


def test_a_folder_without_structures_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no structures .CIF, POSCAR, JSON, xyz. and no targets.csv"):
        load_crystals(get_task("own", data=tmp_path / "empty"), need_target=False, quiet=True)


@pytest.mark.parametrize(
    "elements, problem",
    [("", "BadPoscarWarning: Elements"), ("Na Cl Br\n", "3 elements and 2 numbers of atoms")],
)
def test_a_poscar_that_pymatgen_would_guess_at_is_skipped(tmp_path, elements, problem):
    (tmp_path / "POSCAR").write_text(
        f"x\n1\n4 0 0\n0 4 0\n0 0 4\n{elements}1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"
    )
    with pytest.raises(UserError, match=f"unreadable structure: POSCAR: not a POSCAR .*{problem}"):
        read_folder(tmp_path / "POSCAR")


# ---------------------------------------------------------------- nothing is left out without a line


def read_folder(path, **kwargs):
    return load_crystals(get_task("own", data=path), need_target=False, quiet=True, **kwargs)


def read_csv(folder, text):
    (folder / "targets.csv").write_text(text)
    return load_crystals(get_task("own", data=folder), quiet=True)


def test_a_stray_quote_hurts_its_own_row_only(tmp_path):
    cif_and_poscar(tmp_path)
    rows = [f"n{i},salt.cif,{i},ok" for i in range(30)]
    rows[10], rows[20] = 'n10,salt.cif,10,"5 inch', 'n20,salt.cif,20,"6 inch"x'
    crystals = read_csv(tmp_path, "id,file,target,note\n" + "\n".join(rows))
    assert len(crystals) == 28 and [i for i, _ in crystals.skipped] == ["n10", "n20"]
    assert crystals.skipped[0][1].startswith("not CSV: line 12: unexpected end of data; a stray quote?")
    assert crystals.skipped[1][1].startswith("not CSV: line 22")


def test_csv_cells_that_would_be_read_as_something_else_are_skipped(tmp_path):
    cif_and_poscar(tmp_path)
    rows = [
        "a,salt.cif,1,5",
        "b,salt.cif,2,,",
        "c,salt.cif,1_5",
        "d,salt.cif,9e999",
        'e,salt.cif,"1,5"',
        "f,salt.cif",
    ]
    crystals = read_csv(tmp_path, "id,file,target\n" + "\n".join(rows))
    assert crystals.ids == ["b"] and crystals.y.tolist() == [2.0]
    assert dict(crystals.skipped) == {
        "a": "not CSV: line 2: cell '5' is beyond the 3 columns of the header; a decimal comma?",
        "c": "label is not a number: 1_5",
        "d": "label is not a number: inf",
        "e": "label is not a number: 1,5",
        "f": "no label",
    }


def test_a_blank_split_cell_is_a_reason_where_others_are_given(tmp_path):
    cif_and_poscar(tmp_path)
    crystals = read_csv(
        tmp_path, "id,file,target,split\na,salt.cif,1,train\nb,salt.cif,2,\nc,salt.cif,3,val\n"
    )
    assert crystals.split == ["train", "val"]
    assert crystals.skipped == [("b", "no split: the cell is blank where others name one")]
    assert len(read_csv(tmp_path, "id,file,target,split\na,salt.cif,1,\nb,salt.cif,2,\n")) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,file,target,target\na,salt.cif,1,2\n", "names the column 'target' twice"),
        ('id,file,"target\na,salt.cif,1\n', "targets.csv: not CSV .*unexpected end of data"),
        ("id;file;target\na;salt.cif;1\n", "the first line is 'id;file;target'; it should name the columns"),
        ("", "the first line is ''"),
        ("id,file,target\n", "which column is the label. there are none"),
    ],
)
def test_a_csv_that_cannot_be_understood_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_csv(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_csv_that_is_not_utf8_is_refused_in_one_line(tmp_path):
    (tmp_path / "targets.csv").write_bytes("id,file,target\né,salt.cif,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="targets.csv: not CSV in UTF-8"):
        load_crystals(get_task("own", data=tmp_path), quiet=True)


def test_file_names_that_cannot_exist_hurt_their_own_row_only(tmp_path):
    cif_and_poscar(tmp_path)
    names = ["salt.cif", "x" * 300 + ".cif", "nul\0.cif", "notes.txt", "", "gone.cif", "salt"]
    (tmp_path / "notes.txt").write_text("words")
    crystals = read_csv(tmp_path, "id,file,target\n" + "".join(f"i{k},{n},1\n" for k, n in enumerate(names)))
    assert crystals.ids == ["i0", "i6"]
    assert [r.split(":")[0] for _, r in crystals.skipped] == 2 * ["unreadable structure"] + [
        "file kind"
    ] + 2 * ["unreadable structure"]


def test_file_names_that_are_not_utf8_are_read_and_written_as_escapes(tmp_path):
    cif_and_poscar(tmp_path)
    os.rename(tmp_path / "salt.cif", os.fsencode(tmp_path) + b"/caf\xe9.cif")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("")
    crystals = read_folder(tmp_path)
    assert crystals.ids == ["POSCAR_salt", "caf\\udce9", "plain"] and crystals.skipped[0][0] == "\\udcff.txt"
    write_skipped(tmp_path / "skipped.csv", crystals.skipped)


def cif(
    name="x",
    atoms="Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5\n",
    columns="label type_symbol fract_x fract_y fract_z",
    extra="",
):
    cell = "".join(f"_cell_length_{e} 4.0\n" for e in "abc") + "".join(
        f"_cell_angle_{e} 90\n" for e in ("alpha", "beta", "gamma")
    )
    keys = "".join(f"_atom_site_{c}\n" for c in columns.split())
    return f"data_{name}\n{cell}{extra}loop_\n{keys}{atoms}"


def test_every_block_frame_and_subfolder_of_a_folder_is_a_row(tmp_path):
    ase = pytest.importorskip("ase")
    from ase.io import write

    blocks = [cif("same"), cif("same", "Na1 Na 0 0 0\nF1 F 0.5 0.5 0.5\n"), cif("third", "Vac1 Vac 0 0 0\n")]
    (tmp_path / "many.cif").write_text("# words\ndata_global\n_journal_year 2020\n" + "".join(blocks))
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/one.mcif").write_text(cif())
    (tmp_path / "deep/one.cif.gz").write_bytes(gzip.compress(cif().encode()))
    frames = [
        ase.Atoms("NaCl", [[0, 0, 0], [2, 2, 2 + 0.1 * i]], cell=4 * np.eye(3), pbc=True) for i in range(3)
    ]
    write(tmp_path / "md.xyz", frames, format="extxyz")
    write(tmp_path / "one.extxyz", frames[:1], format="extxyz")
    (tmp_path / "two.json.gz").write_bytes(gzip.compress(json.dumps([crystal(), crystal(a=5.0)]).encode()))
    (tmp_path / "MgO.json").write_text(json.dumps(crystal()))
    (tmp_path / "MgO.cif").write_text(cif())
    (tmp_path / "empty.cif").write_text("data_x\n_cell_length_a 1\n")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.cif").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    os.mkfifo(tmp_path / "pipe.cif")
    crystals = read_folder(tmp_path)
    assert crystals.ids == [
        "MgO.cif", "MgO.json", "deep/er/one", "deep/one", "many", "many#2", "md", "md#2", "md#3", "one", "two", "two#2",
    ]  # fmt: skip
    assert crystals.Z[5].tolist() == [11, 9]
    assert {i: r.split(":")[0] for i, r in crystals.skipped} == {
        "empty": "unreadable structure",
        "link": "file kind",
        "many#3": "CIF read otherwise than written",
        "notes.txt": "file kind",
        "pipe": "file kind",
    }


def test_a_csv_row_takes_a_file_of_one_structure(tmp_path):
    (tmp_path / "two.cif").write_text(cif("a") + cif("b"))
    (tmp_path / "one.cif").write_text("data_global\n_journal_year 2020\n" + cif("a"))
    crystals = read_csv(tmp_path, "id,file,target\na,two.cif,1\nb,one.cif,2\n")
    assert crystals.ids == ["b"]
    assert crystals.skipped == [("a", "several structures: 2 in two.cif; a row takes a file of one")]


def test_a_file_that_breaks_off_keeps_its_first_structures_and_says_so(tmp_path):
    pytest.importorskip("ase")
    frame = "2\nProperties=species:S:1:pos:R:3\nNa 0 0 0\nCl 2 2 2\n"
    (tmp_path / "cut.xyz").write_text(frame + frame + frame[:-9])
    (tmp_path / "blank.xyz").write_text(frame + "\n" + frame)  # ASE stops there without a word
    crystals = read_folder(tmp_path)
    assert crystals.ids == ["blank", "cut", "cut#2"]
    reasons = dict(crystals.skipped)
    assert "blank.xyz: not an xyz file (ValueError: a blank line, and text after it)" in reasons["blank#2"]
    assert "cut.xyz: cannot be read (ase.io.extxyz: Frame has 1 atoms, expected 2)" in reasons["cut#3"]


CHANGED = {  # what pymatgen reads without an error, but not as it is written
    "Missing elements H": dict(extra="_chemical_formula_sum 'Na Cl H2'\n"),
    "Incorrect stoichiometry": dict(extra="_chemical_formula_sum 'Na Cl3'\n"),
    "symmetry operation x,y,w": dict(extra="loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, w'\n"),
    "symmetry operation x,y[)]": dict(extra="loop_\n_symmetry_equiv_pos_as_xyz\n'x, y'\n"),
    "symmetry operation x,y,x[+]z-x": dict(extra="loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, x+z-x'\n"),
    "symmetry operation x,y,1/2[+]z-1/2": dict(extra="loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, 1/2+z-1/2'\n"),
    "does not keep volumes": dict(extra="loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, 2z'\n"),
    "symmetry f4-3q is not used": dict(extra="_symmetry_space_group_name_H-M 'F 4 -3 q'\n"),
    "Possible issue in CIF file at line: m": dict(extra="_symmetry_space_group_name_H-M F m -3 m\n"),
    "atom Vac, which is no element": dict(atoms="Na1 Na 0 0 0\nV1 Vac 0.5 0.5 0.5\n"),
    "atom Ow, which is no element": dict(atoms="Na1 Na 0 0 0\nO1 Ow 0.5 0.5 0.5\n"),
    "atom NO3, which is no element": dict(atoms="Na 0 0 0\nNO3 0.5 0.5 0.5\n", columns="label fract_x fract_y fract_z"),
    "Structure has implicit hydrogens": dict(atoms="Na1 Na 0 0 0\nO1 Wat 0.5 0.5 0.5\n"),
    "atom [?], which is no element": dict(atoms="Na1 Na 0 0 0\nN1 ? 0.5 0.5 0.5\n"),
    "atom HO1, which is no element": dict(atoms="O1 0 0 0\nHO1 0.5 0.5 0.5\n", columns="label fract_x fract_y fract_z"),
    "the atoms are not in a loop": dict(atoms="", extra="".join(
        f"_atom_site_{k} {v}\n" for k, v in dict(label="Fe", fract_x="0.0", fract_y="0.0", fract_z="0.0").items()
    )),
    "an atom without coordinates": dict(atoms="Na1 Na 0.1 0 0\nCl1 Cl . . .\n"),
    "an atom of occupancy 0": dict(
        atoms="Na1 Na 0 0 0 1\nNa2 Na 0.5 0.5 0.5 0.0\n", columns="label type_symbol fract_x fract_y fract_z occupancy"
    ),
    "implicit hydrogens": dict(
        atoms="Na1 Na 0 0 0 0\nO1 O 0.5 0.5 0.5 1\n",
        columns="label type_symbol fract_x fract_y fract_z attached_hydrogens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", CHANGED)
def test_a_cif_that_pymatgen_reads_otherwise_than_written_is_skipped(tmp_path, problem):
    text = cif(**CHANGED[problem])
    if problem == "the atoms are not in a loop":
        text = text[: text.index("loop_")]
    (tmp_path / "x.cif").write_text(text)
    (tmp_path / "y.cif").write_text(cif())
    crystals = read_folder(tmp_path)
    assert crystals.ids == ["y"]
    with pytest.raises(UserError, match=f"CIF read otherwise than written: .*{problem}"):
        read_folder(tmp_path / "x.cif")


HARMLESS = {
    "rounded coordinates": dict(atoms="Na1 Na 0 0 0\nCl1 Cl 0.3333 0.6667 0.5\n"),
    "no symmetry": dict(),
    "one operation": dict(extra="_symmetry_equiv_pos_as_xyz 'x, y, z'\n_symmetry_space_group_name_H-M 'P 1'\n"),
    "a space group by name": dict(extra="_symmetry_space_group_name_H-M 'P m -3 m'\n"),
    "a space group by number": dict(extra="_space_group_IT_number 221\n"),
    "operations": dict(extra="loop_\n_space_group_symop_operation_xyz\n'x, y, z'\n'-x,-y,-1.0+Z'\n"),
    "a formula": dict(extra="_chemical_formula_sum 'Cl4 Na4'\n"),
    "no formula": dict(extra="_chemical_formula_sum ?\n"),
    "charges": dict(atoms="Na1 Na1+ 0 0 0\nCl1 CL1- 0.5 0.5 0.5\n"),
    "labels alone": dict(atoms="Na1A 0 0 0\nCl12 0.5 0.5 0.5\n", columns="label fract_x fract_y fract_z"),
    "capitals and a formula": dict(
        atoms="NA1 0 0 0\nCL1 0.5 0.5 0.5\n", columns="label fract_x fract_y fract_z",
        extra="_chemical_formula_sum 'Na Cl'\n",
    ),
    "a printer's minus": dict(atoms="Na1 Na 0 0 0\nCl1 Cl \u22120.5 0.5 0.5\n"),
    "a name of two words": dict(name="salt of the sea"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_cif_whose_warnings_change_no_atom_is_read(tmp_path, kind):
    (tmp_path / "x.cif").write_text(cif(**HARMLESS[kind]))
    crystals = read_folder(tmp_path)
    assert sorted(crystals.Z[0].tolist()) == [11, 17]


def test_without_labels_forces_are_ignored(tmp_path):
    pytest.importorskip("ase")
    frame = "2\nProperties=species:S:1:pos:R:3:forces:R:3\nNa 0 0 0 0 0 1\nCl 2 2 2 0 0 -1\n"
    bare = "2\nProperties=species:S:1:pos:R:3\nNa 0 0 0\nCl 2 2 2\n"
    (tmp_path / "md.xyz").write_text(frame + bare)
    crystals = read_folder(tmp_path / "md.xyz")
    assert len(crystals) == 2 and crystals.forces is None and not crystals.skipped


# ---------------------------------------------------------------- other sources


def test_extxyz_gives_energies_and_forces(tmp_path):
    ase = pytest.importorskip("ase")
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    frames = []
    for i in range(3):
        atoms = ase.Atoms(
            "NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.4 + 0.05 * i]], cell=4 * np.eye(3), pbc=True
        )
        atoms.calc = SinglePointCalculator(atoms, energy=-float(i), forces=np.full((2, 3), 0.1 * i))
        frames.append(atoms)
    write(tmp_path / "md.extxyz", frames)
    crystals = load_crystals(get_task("md", data=tmp_path / "md.extxyz"), quiet=True)
    assert (
        crystals.y.tolist() == [0.0, -1.0, -2.0]
        and unit_of(crystals.task) == "eV"
        and crystals.task.pooling == "sum"
    )
    np.testing.assert_allclose(crystals.forces[2], 0.2)
    assert crystals.task.target_column == "energy" and crystals.pbc.all()


def test_a_slab_gets_vacuum_where_it_is_not_periodic():
    cell = np.array([[3.0, 0, 0], [1.0, 3.0, 0], [0, 0, 0]])
    Z, pos, full = to_arrays(
        (np.array([6, 6]), np.array([[0, 0, 0], [0, 0, 2.0]]), cell, np.array([True, True, False]))
    )
    np.testing.assert_allclose(full[:2], cell[:2])
    np.testing.assert_allclose(np.abs(full[2]), [0, 0, 2.0 + VACUUM], atol=1e-12)
    step = (pos[1] - pos[0]) @ np.linalg.inv(full)
    np.testing.assert_allclose(np.abs((step - np.rint(step)) @ full), [0, 0, 2.0], atol=1e-9)


def test_a_molecule_has_no_cell(tmp_path):
    water = {
        "sites": [
            {"species": [{"element": e, "occu": 1}], "xyz": x}
            for e, x in (("O", [9, 0, 0]), ("H", [9, 0.96, 0]), ("D", [9.3, -0.9, 0]))
        ]
    }
    path = write_table(tmp_path / "t.json.gz", ["molecule", "u0"], [[water, -3.0]])
    crystals = load_crystals(get_task("own", data=path), quiet=True)
    assert not crystals.pbc[0] and not crystals.cell[0].any() and crystals.Z[0].tolist() == [8, 1, 1]


def test_force_columns_and_subsets(tmp_path):
    zeros, rows = [[0.0, 0, 0], [0, 0, 0.5]], []
    for subset, forces in (("a", zeros), ("b", zeros), ("a", [[0.0, 0, 0]]), ("a", None)):
        rows.append([crystal(), -1.0, forces, subset])
    path = write_table(tmp_path / "ff.json.gz", ["structure", "energy", "forces", "subset"], rows)
    task = get_task("ff", data=path, target_column="energy", forces_column="forces", subset="a")
    crystals = load_crystals(task, quiet=True)
    assert crystals.row.tolist() == [0] and crystals.forces[0][1, 2] == 0.5
    assert [r.split(":")[0] for _, r in crystals.skipped] == ["no forces", "no forces"]
    with pytest.raises(ValueError, match="no row has subset z; there are a, b"):
        load_crystals(get_task("ff", data=path, target_column="energy", subset="z"), quiet=True)


# ---------------------------------------------------------------- rows that cannot be used


BAD = {
    "disordered site": crystal(site("Na", (0, 0, 0), 0.5)),
    "element outside 1..118": crystal(site("Xx", (0, 0, 0))),
    "unreadable structure": {"lattice": {"matrix": [[1, 0], [0, 1]]}, "sites": [site("Na", (0, 0, 0))]},
    "no structure": None,
    "atoms closer than 0.1 A": crystal(
        site("Na", (0.99, 0, 0)), site("Cl", (0.005, 0, 0))
    ),  # through the face of the cell
    "cell of zero volume": {
        "lattice": {"matrix": [[4, 0, 0], [0, 4, 0], [4, 4, 0]]},
        "sites": [site("Na", (0, 0, 0))],
    },
    "cell too skewed": {  # another cell of a simple cubic crystal
        "lattice": {"matrix": [[3, 45, 87], [-6, -87, -210], [0, 0, 3]]},
        "sites": [site("Po", (0, 0, 0))],
    },
}


@pytest.mark.parametrize("rule", BAD)
def test_an_unusable_structure_is_skipped_by_rule(tmp_path, rule):
    path = table_of(tmp_path, [crystal(), BAD[rule], crystal()])
    crystals = load_table(path)
    assert crystals.row.tolist() == [0, 2] and crystals.num_rows == 3
    assert [(i, r.split(":")[0]) for i, r in crystals.skipped] == [("n1", rule)]
    with pytest.raises(ValueError, match=rf"row 1 \(id n1\): {rule}.*--on-error skip"):
        load_crystals(get_task("own", data=path, id_column="name"), on_error="stop", quiet=True)


def test_a_label_that_cannot_be_used_is_skipped_by_rule(tmp_path):
    path = table_of(tmp_path, [crystal()] * 6, [2.0, None, float("nan"), -3.0, 0.0, float("inf")])
    crystals = load_table(path, transform="log")
    assert crystals.y.tolist() == [np.log(2.0)]
    reasons = [r for _, r in crystals.skipped]
    assert reasons == [
        "no label",
        "no label",
        "no logarithm: log of -3",
        "no logarithm: log of 0",
        "label is not a number: inf",
    ]
    assert len(load_table(path).y) == 3
    everything = load_crystals(get_task("own", data=path, transform="log"), need_target=False, quiet=True)
    assert len(everything) == 6 and np.isfinite(everything.y).sum() == 1


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 rows can be used \(no label 2\)"):
        load_table(table_of(tmp_path, [crystal()] * 2, [None, None]), target_column="y")


def test_close_atoms_agree_with_all_images_in_skewed_cells():
    rng = np.random.default_rng(0)
    images = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3), -1).reshape(-1, 3)
    seen = set()
    for _ in range(300):
        cell = rng.normal(size=(3, 3)) * rng.choice([0.3, 1.0, 3.0])
        if abs(np.linalg.det(cell)) < 0.02:
            continue
        frac = rng.random((2, 3))
        frac[1] = frac[0] + (rng.normal(size=3) * 0.06) @ np.linalg.inv(cell) + rng.integers(-1, 2, 3)
        pos = wrap(frac) @ cell
        shift = images @ cell
        between = np.linalg.norm(pos[1] - pos[0] + shift, axis=1).min()
        itself = np.sort(np.linalg.norm(shift, axis=1))[1]
        nearest = min(between, itself)
        try:
            check_distances(pos, cell)
            refused = False
        except Skip:
            refused = True
        assert refused == (nearest < 0.1), nearest
        seen.add(refused)
    assert seen == {True, False}


def test_large_cells_are_checked_in_pieces():
    n = 1200
    pos = np.column_stack([np.arange(n), np.zeros(n), np.zeros(n)])
    check_distances(pos, np.zeros((3, 3)))
    with pytest.raises(Skip, match="atoms closer than 0.1 A: 0.050 A"):
        check_distances(np.vstack([pos, [[n - 1.05, 0, 0]]]), np.diag([2.0 * n, 50, 50]))


def test_wrapping_leaves_no_atom_on_the_far_face():
    frac = np.array([[1.0, -1e-17, 1 - 1e-12], [-0.25, 2.5, 1e-12], [-1e-10, 3.0, 0.999]])
    wrapped = wrap(frac)
    np.testing.assert_allclose(wrapped, [[0, 0, 0], [0.75, 0.5, 0], [0, 0, 0.999]], atol=1e-11)
    assert (wrapped >= 0).all() and (wrapped < 1).all()


def test_a_limit_takes_nested_random_subsets_of_usable_rows(tmp_path):
    labels = [None if i % 2 else float(i) for i in range(40)]
    path = table_of(tmp_path, [crystal(a=3.0 + i) for i in range(40)], labels)
    five, ten = (load_table(path, limit=n, target_column="y").row for n in (5, 10))
    assert len(five) == 5 and len(ten) == 10 and set(five) < set(ten) and (np.diff(ten) > 0).all()
    assert ten.tolist() != list(range(0, 20, 2))


# ---------------------------------------------------------------- structures in memory


def test_structures_in_memory_are_read_by_the_same_rules(tmp_path):
    from pymatgen.core import Lattice, Molecule, Structure

    salt = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    water = Molecule(["O", "H", "H"], [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    mixed = Structure(Lattice.cubic(4.0), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    given = [salt, water, mixed, salt.as_dict(), None, salt]
    crystals = from_structures(
        given, [1.0, 2.0, 3.0, None, 5.0, -1.0], list("abcdef"), transform="log", unit="eV"
    )
    assert (
        crystals.ids == ["a", "b"]
        and crystals.y.tolist() == [0.0, np.log(2.0)]
        and crystals.row.tolist() == [0, 1]
    )
    assert (
        unit_of(crystals.task) == "log(eV)"
        and crystals.num_rows == 6
        and crystals.pbc.tolist() == [True, False]
    )
    rules = [("c", "disordered site"), ("d", "no label"), ("e", "no structure"), ("f", "no logarithm")]
    assert [(i, r.split(":")[0]) for i, r in crystals.skipped] == rules
    table = load_crystals(
        get_task("own", data=table_of(tmp_path, [salt.as_dict(), water.as_dict()]), transform="log"),
        quiet=True,
    )
    assert table.fingerprint == crystals.fingerprint
    unlabelled = from_structures(np.array(given, dtype=object))
    assert unlabelled.ids == ["0", "1", "3", "5"] and np.isnan(unlabelled.y).all()


def test_ase_atoms_are_structures():
    ase = pytest.importorskip("ase")
    atoms = ase.Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=4 * np.eye(3), pbc=True)
    crystals = from_structures([atoms, ase.Atoms("He")], np.array([1.0, 2.0]), pooling="sum")
    assert crystals.pbc.tolist() == [True, False] and crystals.Z[0].tolist() == [11, 17]
    assert crystals.fingerprint == from_structures([crystal(), ase.Atoms("He")], [1.0, 2.0]).fingerprint


def test_structures_and_labels_must_match():
    with pytest.raises(UserError, match="target: 2 values for 1 structures"):
        from_structures([crystal()], y=[1.0, 2.0])
    with pytest.raises(UserError, match="one dict; give a list"):
        from_structures(crystal())
    with pytest.raises(UserError, match="none of 0 rows can be used .there is none"):
        from_structures([])


# ---------------------------------------------------------------- data sets that are not there


def test_a_data_set_that_is_nowhere_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(sources, "fetch", lambda name, path: "no network")
    with pytest.raises(FileNotFoundError) as error:
        load_crystals(get_task("mp_phonons"))
    text = str(error.value)
    for part in (
        "'matbench_phonons'",
        str(tmp_path),
        "no network",
        "MATMINER_DATA",
        "--data demo",
    ):
        assert part in text
    assert "\n" not in text
    (tmp_path / "tasks.json").write_text('{"mp_phonons": {"data": "other.json.gz", "target_column": "y"}}')
    with pytest.raises(
        FileNotFoundError, match="tasks.json offers mp_phonons from another file: pass --tasks"
    ):
        load_crystals(get_task("mp_phonons"))


def test_data_sets_are_looked_for_in_what_is_named_then_in_the_repository_then_in_matminer(
    tmp_path, monkeypatch
):
    homes = [tmp_path / name for name in ("named", "repository/datasets", "matminer/datasets")]
    monkeypatch.setattr(sources, "SHIPPED", homes[1])
    spec = type("Spec", (), {"origin": str(tmp_path / "matminer/__init__.py")})
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sources, "fetch", lambda name, path: f"would write {path}")
    monkeypatch.setenv("MATMINER_DATA", str(homes[0]))
    monkeypatch.chdir(tmp_path)
    task = get_task("mp_phonons")
    with pytest.raises(FileNotFoundError, match=f"would write {homes[0]}/matbench_phonons.json.gz"):
        find_source(task)
    for home in reversed(homes):
        home.mkdir(parents=True)
        (home / "matbench_phonons.json.gz").write_text("")
        assert find_source(task).parent == home
    (tmp_path / "matbench_phonons").mkdir()
    assert find_source(task) == Path("matbench_phonons")


def test_a_data_set_that_matminer_does_not_know_is_not_fetched(tmp_path):
    pytest.importorskip("matminer")
    assert fetch("no_such_data_set", tmp_path / "x.json.gz") == "matminer does not know it"


@pytest.mark.parametrize("content, kept", [(b"good", True), (b"bad", False)])
def test_a_download_is_kept_only_with_the_right_hash(tmp_path, monkeypatch, content, kept):
    matminer = pytest.importorskip("matminer.datasets")
    import hashlib

    (tmp_path / "server").write_bytes(content)
    attributes = {"url": (tmp_path / "server").as_uri(), "hash": hashlib.sha256(b"good").hexdigest()}
    monkeypatch.setattr(matminer, "get_dataset_attribute", lambda name, key: attributes[key])
    why = fetch("matbench_phonons", tmp_path / "home/x.json.gz")
    assert (why == "") == kept == (tmp_path / "home/x.json.gz").exists()
    assert len(list((tmp_path / "home").iterdir())) == kept


def test_a_missing_file_is_not_taken_for_a_data_set(tmp_path):
    for name in ("gone.json.gz", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match="gone.*no such file or folder"):
            load_crystals(get_task("own", data=name))


def test_the_content_key_sees_every_atom():
    Z, pos, cell = np.array([1, 2]), np.zeros((2, 3)), np.eye(3)
    moved = pos.copy()
    moved[1, 2] = 1e-12
    assert structure_hash(Z, pos, cell) == structure_hash(Z.copy(), pos.copy(), cell.copy())
    assert (
        len(
            {
                structure_hash(*s)
                for s in ((Z, pos, cell), (Z[::-1], pos, cell), (Z, moved, cell), (Z, pos, 2 * cell))
            }
        )
        == 4
    )


def test_a_subset_keeps_rows_together(tmp_path):
    crystals = many(tmp_path, 10)
    part = subset(crystals, [7, 2])
    assert part.ids == ["n7", "n2"] and part.row.tolist() == [7, 2] and part.y.tolist() == [8.0, 3.0]
    assert part.num_rows == 10 and part.fingerprint != crystals.fingerprint
    assert subset(crystals, range(10)).fingerprint == crystals.fingerprint


# ---------------------------------------------------------------- caches


def test_the_second_load_reads_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    path = table_of(tmp_path, [crystal(), BAD["disordered site"]])
    first = load_table(path)
    parse, calls = to_arrays, []
    monkeypatch.setattr(module, "to_arrays", lambda s: calls.append(1) or parse(s))
    again = load_table(path)
    assert not calls and again.fingerprint == first.fingerprint and again.skipped == first.skipped
    table_of(tmp_path, [crystal(), crystal(), crystal()])
    assert len(load_table(path)) == 3 and len(calls) == 3
    for file in (tmp_path / "cache").glob("rows-*/rows.npz"):  # damaged: read the source again
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert len(load_table(path)) == 3 and len(calls) == 6


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="the cache cannot be written.*--cache or MOMA_CACHE"):
        load_table(table_of(tmp_path, [crystal()]))


# ---------------------------------------------------------------- the real data

PUBLISHED = {  # results.md 1.2: mean and std of the label, over the rows of the published splits
    "expt_bandgap": (1.0411, 1.6101),  # 30 of 2481 rows are missing here
    "expt_eform": (-1.0935, 1.0065),
    "jarvis_2d_dielectric_opt": (6.2065, 6.7591),
    "jarvis_2d_eform": (-0.8437, 0.8199),
    "jarvis_2d_exfoliation": (112.48, 134.17),
    "jarvis_2d_gap_opt": (1.3974, 1.3779),
    "mp_eps_electronic": (1.7882, 0.7685),
    "mp_eps_total": (2.6116, 0.7440),
    "mp_phonons": (6.1058, 0.7093),
    "mp_poly_electronic": (7.2500, 13.055),
    "mp_poly_total": (14.782, 19.435),
}
SIZES = {
    "mp_phonons": (885, 189, 189),
    "mp_eps_total": (907, 194, 194),
    "jarvis_2d_eform": (443, 94, 94),
    "mp_poly_total": (739, 158, 158),
    "expt_eform": (1196, 257, 256),
}


@real
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_target_statistics(name):
    mean, std = PUBLISHED[name]
    crystals = load_crystals(get_task(name, REAL / "tasks.json"), quiet=True)
    tolerance = 0.01 if name == "expt_bandgap" else 2e-4
    kept = crystals.y
    if (SPLITS / name).exists():  # the published numbers leave out the up to two rows that are in no part
        splits = make_splits(crystals, split_file=SPLITS / name / "seed0.json")
        assert sum(map(len, splits.values())) > 0.99 * len(crystals)
        if name in SIZES:
            assert tuple(map(len, splits.values())) == SIZES[name]
        kept = crystals.y[np.concatenate(list(splits.values()))]
    assert abs(kept.mean() - mean) < tolerance * std and abs(kept.std() / std - 1) < tolerance


@real
def test_hub_targets_are_near_the_published_statistics():
    for name, mean, std in (("mp_gvrh", 1.5536, 0.3716), ("castelli_eform", 1.4709, 0.7425)):
        y = load_crystals(get_task(name, REAL / "tasks.json"), quiet=True).y
        assert abs(y.mean() - mean) < 0.02 and abs(y.std() - std) < 0.02


@real
def test_force_field_tables_have_forces(monkeypatch):
    monkeypatch.setenv("MATMINER_DATA", str(REAL))
    for name, rows in (("ff_aspirin", 1000), ("ff_ethanol", 1000), ("ff_solvents", 400), ("ff_mad", 898)):
        crystals = load_crystals(get_task(name), quiet=True)
        assert len(crystals) == rows and all(
            f.shape == p.shape for f, p in zip(crystals.forces, crystals.pos)
        )
        assert crystals.pbc.all() == (name == "ff_mad")


@real
def test_fast_reading_equals_pymatgen():
    pymatgen = pytest.importorskip("pymatgen.core")
    for i, (structure, _) in enumerate(
        table_rows(REAL / "dielectric_constant.json.gz", TASKS["mp_poly_total"])
    ):
        Z, pos, cell = to_arrays(structure)
        built = pymatgen.Structure.from_dict(structure)
        assert Z.tolist() == list(built.atomic_numbers)
        np.testing.assert_allclose(cell, built.lattice.matrix, atol=1e-12)
        step = (pos - built.cart_coords) @ np.linalg.inv(cell)
        np.testing.assert_allclose(step, np.rint(step), atol=1e-6)
        if i == 50:
            break


def test_a_total_energy_is_summed_over_atoms_unless_the_user_says_otherwise(tmp_path):
    (tmp_path / "a.xyz").write_text('1\nProperties=species:S:1:pos:R:3 energy=-1.5 pbc="F F F"\nH 0 0 0\n')
    task = lambda **fields: load_crystals(Task("t", str(tmp_path / "a.xyz"), **fields), quiet=True).task  # noqa: E731
    assert (task().pooling, task().unit) == ("sum", "eV") and task(pooling="mean").pooling == "mean"
    assert task(unit="eV/atom").pooling == "mean"
    assert (task(unit="meV").pooling, task(unit="meV").unit) == ("sum", "meV")  # a total in another unit
    assert load_crystals(Task("t", f"{tmp_path}/a.xyz", "energy"), quiet=True).task.pooling == "mean"
