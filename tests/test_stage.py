"""stage.py: the command line, records of what a result rests on, work folders."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from conftest import ROOT

import benchmark
import compose
import finetune
import predict
import pretrain
import stage
import train_module
from files import UserError
from stage import Range, claim, compare, last_state, main, parse
from train_module import normalizer

STAGES = (pretrain, train_module, compose, finetune, predict, benchmark)


@dataclass
class Settings:
    task: str = "a"  # name, 50% of it
    kind: Literal["full", "adapter"] = "full"
    batch_size: Annotated[int, Range(1)] = 4  # crystals
    lr: Annotated[float, Range(0, 1)] = 0.5
    limit: Annotated[int, Range(0)] | None = None  # rows
    model: tuple = ()  # folder
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    config: str = ""


DOC = "Do a thing.\n\n    python thing.py --task a\n\nMore words."


def test_flags_come_from_the_fields_with_hyphens_or_underscores():
    cfg = parse(Settings, DOC, ["--task", "b_c", "--batch_size=8", "--quiet", "--lr", "1e-3", "--limit", "0"])
    assert cfg == Settings("b_c", "full", 8, 1e-3, 0, (), quiet=True)
    assert parse(Settings, DOC, ["--batch-size", "9", "--no-quiet"]).batch_size == 9
    assert parse(Settings, DOC, []).limit is None
    assert parse(Settings, DOC, ["--model", "a", "--model", "b"]).model == ("a", "b")


@pytest.mark.parametrize("module", STAGES)
def test_help_fits_a_screen_of_100_columns_and_ends_with_the_example(module, capsys):
    with pytest.raises(SystemExit):
        parse(module.Config, module.__doc__, ["--help"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) <= 56 and max(map(len, lines)) <= 100, "\n".join(lines)
    assert lines[-1].startswith(f"    python {module.__name__}.py")


def test_help_shows_defaults_and_version_the_release(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, DOC, ["--help"])
    assert "crystals [4]" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        parse(Settings, DOC, ["--version"])
    assert stop.value.code == 0 and "torch" in capsys.readouterr().out


def test_config_file_gives_defaults_and_the_command_line_wins(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"task": "x", "lr": 1, "batch_size": 16, "model": ["a"], "limit": None}))
    cfg = parse(Settings, DOC, ["--config", str(path), "--task", "y"])
    assert (cfg.task, cfg.lr, cfg.batch_size, cfg.model, cfg.limit) == ("y", 1, 16, ("a",), None)
    assert parse(Settings, DOC, ["--config", str(path), "--model", "b"]).model == ("b",)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batchsize": 1}, "unknown setting 'batchsize'"),
        ({"batch_size": "8"}, "batch_size is '8', expected int"),
        ({"batch_size": None}, "batch_size is None, expected int"),
        ({"kind": "both"}, "kind is 'both', expected full or adapter"),
        ({"quiet": 1}, "quiet is 1, expected bool"),
        ({"lr": 2.0}, "--lr 2.0: must be 0 or more, at most 1"),
        ({"stage": "compose", "version": "1"}, "written by another command"),
        ([1], "not a JSON object"),
    ],
)
def test_config_file_with_a_wrong_setting_is_refused(tmp_path, settings, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=words):
        parse(Settings, DOC, ["--config", str(path)])


def exit_of(run, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(run, Settings, DOC, argv)
    return stop.value.code or 0, capsys.readouterr().err.strip()


def test_exit_codes_and_one_line_errors(capsys, tmp_path):
    assert exit_of(lambda cfg: {}, [], capsys) == (0, "")
    assert exit_of(lambda cfg: {"exit_code": 1}, [], capsys)[0] == 1
    wrong = [["--nope"], ["--lr", "x"], ["--lr", "1e308"], ["--lr", "nan"], ["--batch-size", "0"], ["--limit", "-1"]]
    wrong += [["--kind", "both"], ["extra"], ["--config", str(tmp_path / "none.json")]]
    for argv in wrong:
        code, err = exit_of(lambda cfg: {}, argv, capsys)
        assert code == 2 and len(err.splitlines()) == 1, (argv, err)
    code, err = exit_of(lambda cfg: normalizer(np.ones(3)), [], capsys)
    assert code == 2 and "nothing to learn" in err and len(err.splitlines()) == 1

    def interrupted(cfg):
        raise KeyboardInterrupt

    def full_disk(cfg):
        raise OSError(28, "No space left on device", "a/last.pt")

    code, err = exit_of(interrupted, [], capsys)
    assert code == 130 and "--resume" in err
    assert exit_of(full_disk, [], capsys) == (2, f"{os.path.basename(sys.argv[0])}: a/last.pt: No space left on device; "
                                                 "free space there, what stood there is unchanged")  # fmt: skip

    def full_disk_of_nothing(cfg):
        raise OSError(28, "No space left on device")

    code, err = exit_of(full_disk_of_nothing, [], capsys)
    assert code == 2 and "output: No space left on device" in err
    for bug in (ValueError, KeyError, OSError):  # a bug keeps its traceback
        with pytest.raises(bug):
            main(lambda cfg: (_ for _ in ()).throw(bug("ours")), Settings, DOC, [])


def test_a_reader_of_the_output_that_goes_away_leaves_no_traceback():
    code = "import stage, test_stage; stage.main(lambda cfg: print('x' * 10**6), test_stage.Settings, test_stage.DOC, [])"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" | head -c 1'], capture_output=True, text=True, env=env)
    assert done.stdout == "x" and done.stderr == ""


@pytest.mark.parametrize("flags", [["--split-seed", str(2**32)], ["--ema", "2"], ["--clip", "0"], ["--lr", "1e308"],
                                   ["--few-shot", "-1"], ["--epochs", "0"]])  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(flags):
    with pytest.raises(UserError, match=f"{flags[0]} .*must be"):
        parse(finetune.Config, finetune.__doc__, flags)
    with pytest.raises(UserError, match=f"{flags[0]} .*must be"):  # and in a call
        stage.start(finetune.Config(**{flags[0][2:].replace("-", "_"): float(flags[1]) if "." in flags[1] else int(float(flags[1]))}))


# ---------------------------------------------------------------- records


def test_compare_names_what_differs_and_the_way_out():
    old = {"epochs": 2, "rows": {"train": 3, "val": 1}, "content": {"train": "a" * 64}}
    compare(old, dict(old), "runs/x", "the cure")
    with pytest.raises(UserError, match=r"runs/x: made with --epochs 2, now 9; the cure"):
        compare(old, old | {"epochs": 9}, "runs/x", "the cure")
    with pytest.raises(UserError, match=r"rows of val 1, now 2; content of train 'aaaaaaaaaaaa', now 'bbbbbbbbbbbb'"):
        compare(old, {**old, "rows": {"train": 3, "val": 2}, "content": {"train": "b" * 64}}, "runs/x", "")
    with pytest.raises(UserError, match="does not say what it was made from"):
        compare(None, old, "runs/x", "the cure")


def test_hashes_that_differ_only_at_the_end_differ():
    with pytest.raises(UserError):
        compare({"sha": "a" * 63 + "b"}, {"sha": "a" * 64}, "x", "")


# ---------------------------------------------------------------- work folders


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    claim(tmp_path / "run", Settings(), {})
    other = f"import stage; from test_stage import Settings; stage.claim({str(tmp_path / 'run')!r}, Settings(), {{}})"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    result = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, env=env)
    assert result.returncode and "another run is working here" in result.stderr


def test_only_folders_that_are_new_empty_or_ours_are_worked_in(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new/deep", "empty", "empty"):
        claim(tmp_path / name, Settings(), {})
    assert json.loads((tmp_path / "empty/config.json").read_text())["stage"] == "test_stage"
    for name, content in (("notes.tmp", "mine"), ("config.json", '{"theirs": 1}'), ("config.json", "[")):
        folder = tmp_path / f"foreign{len(content)}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(UserError, match="holds files that no run has written"):
            claim(folder, Settings(), {})
        assert [p.read_text() for p in folder.iterdir()] == [content]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        claim(tmp_path / "file", Settings(), {})


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    claim(tmp_path, Settings(), {"lr": 0.5})
    torch.save({"state": 1}, tmp_path / "last.pt")
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match="add --resume"):
        claim(tmp_path, Settings(), {"lr": 0.5})
    with pytest.raises(UserError, match="--lr 0.5, now 0.1; --resume needs the same"):
        claim(tmp_path, Settings(resume=True), {"lr": 0.1})
    assert (tmp_path / "config.json").read_text() == before  # what was refused has changed nothing
    claim(tmp_path, Settings(resume=True, quiet=True), {"lr": 0.5})
    assert last_state(tmp_path, resume=True)["state"] == 1 and last_state(tmp_path, resume=False) is None
    claim(tmp_path, Settings(overwrite=True), {"lr": 0.1})
    assert last_state(tmp_path, resume=True) is None


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_state_is_one_line(tmp_path, content):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "last.pt")
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="last.pt: not the state of a run .*--overwrite"):
        last_state(tmp_path, resume=True)
