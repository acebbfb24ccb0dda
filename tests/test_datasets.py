"""datasets/ and hub/: the tables that come with the code, their published splits, the default; and the modules."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import benchmark
import compose
import hub
from conftest import ROOT, many
from crystals import load_crystals, subset
from data import make_splits, published_split
from sources import SHIPPED, find_source
from tasks import TASKS, get_task

ROWS = {  # usable rows of each task, and how many the published parts have
    "jarvis_2d_dielectric_opt": (522, 365, 78, 79), "jarvis_2d_dielectric_tbmbj": (120, 84, 18, 18),
    "jarvis_2d_eform": (633, 443, 94, 94), "jarvis_2d_exfoliation": (636, 445, 95, 95),
    "jarvis_2d_gap_opt": (522, 365, 78, 78), "jarvis_2d_gap_tbmbj": (120, 84, 18, 18),
    "mp_eps_electronic": (1296, 907, 194, 194), "mp_eps_total": (1296, 907, 194, 194),
    "mp_phonons": (1265, 885, 189, 189), "mp_poly_electronic": (1056, 739, 158, 158),
    "mp_poly_total": (1056, 739, 158, 158),
}  # fmt: skip
SMALL = "jarvis_2d_gap_tbmbj"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.delenv("MATMINER_DATA", raising=False)


@pytest.mark.parametrize("name", ROWS)
def test_every_shipped_task_is_found_without_a_flag_and_has_its_published_numbers(name, shared_cache):
    crystals = load_crystals(get_task(name), quiet=True, cache_dir=shared_cache)
    assert find_source(crystals.task).parent == SHIPPED and len(crystals) == ROWS[name][0]
    for seed in range(5):
        parts = make_splits(crystals, seed, quiet=True)
        stored = json.loads((SHIPPED / "splits" / name / f"seed{seed}.json").read_text())
        assert {k: crystals.row[v].tolist() for k, v in parts.items()} == stored
        assert tuple(map(len, parts.values())) == ROWS[name][1:]
        everything = np.concatenate(list(parts.values()))
        assert len(set(everything.tolist())) == len(everything) >= len(crystals) - 2
        if name in benchmark.STD and seed == 0:  # the published ones are of the rows that are in a part
            assert crystals.y[everything].std() == pytest.approx(benchmark.STD[name], rel=2e-4)


def test_the_readme_of_the_tables_names_each_with_its_rows():
    text = (SHIPPED / "README.md").read_text()
    tables = {path.name.removesuffix(".json.gz") for path in SHIPPED.glob("*.json.gz")}
    assert tables == {TASKS[name].dataset for name in ROWS}
    for table in tables:
        assert f"| `{table}` |" in text
    for name, (rows, *parts) in ROWS.items():
        line = next(line for line in text.split("\n") if f"| `{name}`" in line)
        assert line.endswith(f"| {rows:,} | {' / '.join(map(str, parts))} |")
        assert TASKS[name].license.split()[0] == ("NIST," if "jarvis" in name else "CC")
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.*")) < 2e6


def test_the_published_split_is_said_and_what_is_not_published_is_random_and_said(shared_cache, capsys, tmp_path):
    crystals = load_crystals(get_task(SMALL), quiet=True, cache_dir=shared_cache)
    make_splits(crystals)
    assert capsys.readouterr().err == f"{SMALL}: the published split of seed 0\n"
    make_splits(crystals, quiet=True)
    assert capsys.readouterr().err == ""
    random = make_splits(crystals, 7)
    said = f"{SMALL}: a random split of seed 7; "
    assert capsys.readouterr().err == f"{said}splits are published for the seeds 0 to 4\n"
    assert tuple(map(len, random.values())) == (84, 18, 18)
    some = load_crystals(get_task(SMALL), limit=20, quiet=True, cache_dir=shared_cache)
    assert list(map(len, make_splits(some, 7).values())) == [14, 3, 3]
    assert capsys.readouterr().err == f"{said}published splits are for all rows (--limit 0)\n"
    assert published_split(subset(crystals, range(100)))[0] is None
    other = load_crystals(get_task(SMALL, target_column="e_form"), quiet=True, cache_dir=shared_cache)
    path, why = published_split(other, 1)
    assert path is None and why.endswith("split of seed 1; published splits are for the column gap tbmbj")
    file = SHIPPED / "splits" / SMALL / "seed1.json"
    make_splits(crystals, 7, split_file=file)  # what is named decides
    assert capsys.readouterr().err == ""
    make_splits(many(tmp_path, 10))  # no split is published: nothing to say
    assert capsys.readouterr().err == ""


def test_published_splits_are_for_the_shipped_table_and_no_other_of_its_name(shared_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    table = shutil.copy(SHIPPED / "jarvis_dft_2d.json.gz", tmp_path)
    task = get_task(SMALL)
    crystals = load_crystals(task, quiet=True, cache_dir=shared_cache)
    assert str(find_source(task)) == table and published_split(crystals, 1)[0].name == "seed1.json"  # an exact copy
    with open(table, "ab") as f:
        f.write(b"\0")
    path, why = published_split(crystals, 1)
    assert path is None and why.endswith(f"are for the table in {SHIPPED}, not for {table}")


def test_own_structures_have_no_published_split(tmp_path):
    own = many(tmp_path, 6)
    for name in ("", ".", "..", "mp_phonons"):
        for dataset in ("", own.task.dataset):
            made = replace(own, task=replace(own.task, name=name, dataset=dataset))
            assert published_split(made)[0] is None


def test_compose_runs_on_the_shipped_table_under_its_alias(home, tmp_path, capsys):
    cfg = compose.Config(task="dielectric", hub=str(home.hub), limit=30, folds=0, bootstrap=0, kind="full",
                         output=str(tmp_path / "composed"))  # fmt: skip
    found = compose.run(cfg)
    assert found["task"] == "mp_eps_total" and (tmp_path / "composed" / "module.json").exists()
    assert "mp_eps_total: a random split of seed 0; published" in capsys.readouterr().err


def test_the_benchmark_takes_the_published_split_of_each_seed(tmp_path):
    out = tmp_path / "out"
    benchmark.run(benchmark.Config(task=SMALL, methods="magpie", seeds="0,3", output=str(out), quiet=True))
    for seed in (0, 3):
        stored = (ROOT / "datasets" / "splits" / SMALL / f"seed{seed}.json").read_text()
        assert json.loads((out / f"magpie/{SMALL}/seed{seed}/splits.json").read_text()) == json.loads(stored)


# ---------------------------------------------------------------- the shipped hub


def test_the_hub_is_in_order_and_its_readme_is_of_its_cards(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert hub.verify("hub") == []
    cards = hub.list_modules("hub")
    for kind in {card["kind"] for card in cards.values()}:
        hub.check_compatible({name: card for name, card in cards.items() if card["kind"] == kind}, "hub")
    assert hub.main(["readme", "--hub", "hub"]) == 0
    assert capsys.readouterr().out == (ROOT / "hub/README.md").read_text()
    files = [path for path in (ROOT / "hub").rglob("*") if path.is_file() and ".runs" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 60e6


def test_every_shipped_module_says_whose_it_is_and_is_better_than_the_mean():
    cards = hub.list_modules(ROOT / "hub")
    kinds = [card["kind"] for card in cards.values()]
    assert kinds.count("full") >= 14 and kinds.count("adapter") >= 14
    tasks = json.loads((ROOT / "hub/tasks.json").read_text())
    known = {name.lower(): about["data"] for name, about in tasks.items()}
    for name, card in cards.items():
        assert card["license_weights"] == "MIT" and card["author"] and card["version"], name
        assert known[name.removesuffix("-adapter")] == card["dataset"], name
        assert "CHGNet" in card["license_data"] and not any(x in card["license_data"] for x in ("NC", "unknown")), name
        assert card["val_mae"] < 0.95 * card["mad"], name
        assert hub.read_seen(ROOT / "hub" / name) is not None, name
