"""files.py: what is read is read or refused in one line; what is written is whole or not there."""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import files
from files import MissingError, UserError


def run_code(code, **kwargs):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, **kwargs)


def small_disk():
    """In a child process: no file may grow beyond 64 KiB, as on a disk without room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def dead_process():
    p = subprocess.Popen([sys.executable, "-c", ""])
    p.wait()
    return p.pid


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe", b"1" + b"0" * 10_000])
def test_json_that_cannot_be_parsed_is_one_line_with_the_files_name(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.json: not a card .*; the cure") as error:
        files.read_json(path, "a card", "the cure")
    assert "\n" not in str(error.value)


def test_what_is_missing_too_large_or_a_folder_is_named(tmp_path):
    with pytest.raises(MissingError, match="none.json: no such file"):
        files.read_json(tmp_path / "none.json", "a card")
    (tmp_path / "large.json").write_text('"' + 100 * "x" + '"')
    with pytest.raises(UserError, match="large.json: larger than"):
        files.read_json(tmp_path / "large.json", "a card", most=50)
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path, "a card")


def test_a_users_error_inside_a_parse_keeps_its_own_line(tmp_path):
    with pytest.raises(UserError, match="^row 3: no label$"), files.reading(tmp_path / "a", "a table"):
        raise UserError("row 3: no label")


def test_an_output_is_where_its_path_leads(tmp_path):
    assert files.output_path("a/../b/c") == files.Path("b/c") and files.output_path("nowhere/../b") == files.Path("b")
    for text in (".", "..", "a/..", "/"):
        with pytest.raises(UserError, match="names no new folder"):
            files.output_path(text)


@pytest.mark.parametrize("name", ["../x", "", "A", ".x", "a..b", "a/b", "x" * 101])
def test_names_of_folders_lead_nowhere_else(name):
    with pytest.raises(UserError, match="--task"):
        files.check_name(name, f"--task {name}")


# ---------------------------------------------------------------- one file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fails(f):
        f.write(b"half")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        files.write_atomic(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_only_regular_files_are_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(UserError, match="not a regular file"):
            files.write_text(tmp_path / name, "new")
    assert (tmp_path / "target").read_text() == "mine"


def test_two_processes_may_write_one_file_and_leave_nothing_else(tmp_path):
    """Two benchmarks side by side share the tables of their folder."""

    def write(f):
        f.write(b"mine")
        assert run_code(f"import files; files.write_text({str(tmp_path / 'table.md')!r}, 'theirs')").returncode == 0
        assert (tmp_path / "table.md").read_text() == "theirs"

    files.write_atomic(tmp_path / "table.md", write)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"table.md": "mine"}


@pytest.mark.parametrize(
    "write",
    [
        "files.write_text(path, 'x' * 10**6)",
        "files.write_atomic(path, lambda f: torch.save({'a': torch.zeros(10**6)}, f))",
        "files.new_array(path.with_suffix('.npy'), (10**6,))",
    ],
)
def test_a_disk_without_room_is_an_os_error_and_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = f"import files, torch, pathlib; path = pathlib.Path({str(path)!r})\ntry:\n    {write}\n"
    code += "except OSError as e:\n    print(e.errno in files.FULL, e.filename or '')"
    done = run_code(code, preexec_fn=small_disk)
    assert done.stdout.startswith("True"), done.stderr
    assert path.read_text() == "old" and not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_leftovers_of_dead_processes_alone_are_swept(tmp_path):
    dead, mine = dead_process(), os.getpid()
    for name in (f".a.txt.{dead}.tmp", f".a.txt.{mine}.tmp", "a.txt.tmp", ".a.txt.tmp", "b.tmp", f".b.txt.{dead}.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".a.txt.{dead}.part").mkdir()
    files.sweep(tmp_path / "a.txt")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {f".a.txt.{mine}.tmp", "a.txt.tmp", ".a.txt.tmp", "b.tmp", f".b.txt.{dead}.tmp"}


# ---------------------------------------------------------------- whole folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), files.whole_folder(tmp_path / "new") as part:
        (part / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with files.whole_folder(tmp_path / "new") as part:
        (part / "a").write_text("whole")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new/a").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "x").mkdir()
    with files.whole_folder(tmp_path / "x"):  # an empty folder is nobody's
        pass
    (tmp_path / "x/a").write_text("old")
    with pytest.raises(UserError, match="x: exists already"), files.whole_folder(tmp_path / "x"):
        pass
    with pytest.raises(KeyError), files.whole_folder(tmp_path / "x", replace=True):
        raise KeyError
    assert (tmp_path / "x/a").read_text() == "old"
    with files.whole_folder(tmp_path / "x", replace=True) as part:
        (part / "b").write_text("new")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_a_folder_put_aside_by_a_killed_process_is_brought_back(tmp_path):
    aside = tmp_path / f".x.{dead_process()}.old"
    aside.mkdir()
    (aside / "a").write_text("old")
    files.recover(tmp_path / "x")
    assert (tmp_path / "x/a").read_text() == "old" and not aside.exists()


def test_a_lock_is_held_by_one_process_and_changes_no_file(tmp_path):
    (tmp_path / "lock").write_text("content")
    held = files.take_lock(tmp_path / "lock", wait=False)
    code = f"import files; print(files.take_lock({str(tmp_path / 'lock')!r}, wait=False))"
    assert run_code(code).stdout.strip() == "None"
    held.close()
    assert run_code(code).stdout.strip() not in ("", "None") and (tmp_path / "lock").read_text() == "content"
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    with pytest.raises(OSError):
        files.take_lock(tmp_path / "link", wait=False)


# ---------------------------------------------------------------- the cache


def test_a_cache_entry_is_made_once_and_again_when_it_is_damaged(tmp_path):
    made = []

    def build(folder):
        made.append(1)
        np.save(folder / "x.npy", np.arange(1000))

    path = tmp_path / "cache/entry"
    for _ in range(2):
        assert files.cached_folder(path, build) == path and len(made) == 1
    content = bytearray((path / "x.npy").read_bytes())
    content[700] ^= 1
    (path / "x.npy").write_bytes(content)
    files.cached_folder(path, build)
    assert len(made) == 2 and np.load(path / "x.npy").sum() == 499500
    (path / "x.npy").unlink()
    files.cached_folder(path, build)
    assert len(made) == 3
    (path / "sums.json").write_text("[")
    files.cached_folder(path, build)
    assert len(made) == 4


def test_two_processes_make_a_cache_entry_once(tmp_path):
    code = f"""
import files, time, pathlib
def build(folder):
    time.sleep(0.5)
    print("made")
    (folder / "x").write_text("x")
files.cached_folder(pathlib.Path({str(tmp_path)!r}) / "entry", build)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    out = "".join(p.communicate(timeout=60)[0] for p in both)
    assert out.split() == ["made"] and [p.returncode for p in both] == [0, 0]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache cannot be written .*--cache or MOMA_CACHE"):
        files.cached_folder(tmp_path / "file" / "entry", lambda folder: None)


# ---------------------------------------------------------------- before torch is loaded


@pytest.mark.parametrize("given, spins", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(given, spins):
    code = "import files, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env | given, capture_output=True, text=True)
    assert done.stdout.strip() == str(spins)


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.py") if "__main__" in p.read_text()))
def test_without_its_packages_a_script_says_what_to_do_in_one_line(script, tmp_path):
    """-S: no site-packages, as with a Python outside the virtual environment."""
    done = subprocess.run([sys.executable, "-S", str(ROOT / script), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "make setup" in done.stderr, done.stderr
