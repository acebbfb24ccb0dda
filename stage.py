"""What every stage shares: its command line, its data, its work folder, its processes (torchrun).

A stage is a file with a docstring, a dataclass `Config` (one flag a field) and run(cfg) -> dict, which a test can call;
its last line is `main(run, Config, __doc__)`. A run works in the hidden folder .runs/NAME beside its result NAME:
settings as given (config.json), log.txt, history.csv, skipped.csv and, until it is done, last.pt to resume from.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import platform
import re
import sys
import textwrap
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from files import (FULL, VERSION, UserError, check_name, read_json, reading, short, sweep, take_lock,
                   write_json)  # first: before torch

import torch
import torch.distributed as dist

from crystals import load_crystals
from data import (GraphConfig, GraphDataset, few_shot, make_folds, make_splits, published_split, report_duplicates,
                  split_fingerprint)  # fmt: skip
from tasks import get_task

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Range:
    """Of a number: from `least` (or above it) to `most`."""

    least: float = 0
    most: float = math.inf
    above: bool = False

    def __contains__(self, x):
        return (x > self.least if self.above else x >= self.least) and x <= self.most

    def __str__(self):
        most = "" if self.most == math.inf else f", at most {self.most:g}"
        return (f"above {self.least:g}" if self.above else f"{self.least:g} or more") + most


FOLDS, MANY = 5, 1000  # so many folds for fewer rows than this: where one split leaves few rows for testing

Whole = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Above = Annotated[float, Range(0, above=True)]
LearningRate = Annotated[float, Range(0, 1)]


@dataclass
class CommonConfig:
    """Settings of every stage that runs a model."""

    batch_size: Positive = 64
    max_atoms: Whole = 2000  # in a batch; 0: no limit
    num_workers: Whole = 0  # processes that load batches
    device: Literal["auto", "cpu", "cuda"] = "auto"
    config: str = ""  # a run's config.json as defaults
    quiet: bool = False  # print the result only


@dataclass
class TaskConfig(CommonConfig):
    """Settings of every stage that reads one task: which crystals, which labels, which rows."""

    hub: str = "hub"  # folder of the modules and of backbone/, their theta_0
    cache: str = ""  # folder of parsed rows, graphs and embeddings [.cache]
    seed: Seed = 0
    task: str = ""  # a name in the task table, or in --tasks
    data: str = ""  # folder, file or "demo" [the task's own data set]
    tasks: str = ""  # JSON file with more tasks
    target_column: str = ""  # of the labels, in --data
    structure_column: str = ""
    id_column: str = ""
    unit: str = ""  # of the labels
    transform: Literal["", "none", "log", "log10", "log1p"] = ""
    pooling: Literal["", "mean", "sum", "max"] = ""
    limit: Whole = 0  # use this many random rows; 0: all
    on_error: Literal["", "skip", "stop"] = ""  # at a row that cannot be used [skip]
    split_seed: Seed = 0  # of the published split, where the task has one, else of 70/15/15
    split_file: str = ""  # or JSON: {"train": [row, ...], "val": [], "test": []}
    few_shot: Whole = 0  # keep this many random training rows; 0: all


def run_name(cfg: TaskConfig) -> str:
    """Name of the run's folders: the task as it was given, or the name of one's own data."""
    if not (cfg.task or cfg.data):
        raise UserError("--task is missing: a name in the task table (tasks.py) or in --tasks FILE; or give --data")
    own = re.sub(r"[^a-z0-9_-]+", "_", Path(cfg.data).name.split(".")[0].lower()).strip("_-")
    name = cfg.task.lower() or own
    check_name(name, f"--task {cfg.task}" if cfg.task else f"--data {cfg.data}")
    return name


def prepare(cfg: TaskConfig, arch):
    """The task's crystals, data.GraphDataset of their graphs, {"train", "val", "test": positions}."""
    crystals, dataset = read_task(cfg, arch)
    return crystals, dataset, split_rows(cfg, crystals)


def read_task(cfg: TaskConfig, arch):
    """The task's crystals, data.GraphDataset of their graphs."""
    run_name(cfg)
    names = ("target_column", "structure_column", "id_column", "unit", "transform", "pooling")
    task = get_task(cfg.task, cfg.tasks, cfg.data, **{k: getattr(cfg, k) for k in names if getattr(cfg, k)})
    quiet = cfg.quiet or rank() > 0
    for _ in first_process_first():
        crystals = load_crystals(task, cfg.limit, cfg.on_error or "skip", quiet=quiet, cache_dir=cfg.cache)
        dataset = GraphDataset(crystals, GraphConfig(**arch["graph"]), cache_dir=cfg.cache, quiet=quiet)
    return crystals, dataset


def split_rows(cfg: TaskConfig, crystals):
    """{"train", "val", "test": positions}: one split of the rows."""
    held_out = {k: getattr(cfg, k) for k in ("held_out",) if hasattr(cfg, k)}  # of modules
    file = cfg.split_file.replace("{task}", crystals.task.name)
    splits = make_splits(crystals, cfg.split_seed, file, cfg.quiet or rank() > 0, **held_out)
    splits["train"] = few_shot(splits["train"], cfg.few_shot, cfg.split_seed)
    if not (cfg.quiet or rank() > 0):
        report_duplicates(crystals, splits)
    return splits


def fold_rows(cfg: TaskConfig, crystals) -> list:
    """[{"train", "val", "test": positions}] for each fold, or [] where `split_rows` gives the one split.

    cfg.folds: how many, 0 or 1 for one split; None: FOLDS below MANY rows that nothing divides, else one split.
    """
    column = bool(crystals.split and any(word.strip() for word in crystals.split))
    published, why = published_split(crystals, cfg.split_seed)
    divided = cfg.split_file or column or published
    if cfg.folds and cfg.folds > 1 and (cfg.split_file or column):
        why = f"{'the column split' if column else f'--split-file {cfg.split_file}'} says which rows are for testing"
        raise UserError(f"--folds {cfg.folds}: {why}; leave one of the two out")
    K = (0 if divided or len(crystals) >= MANY else FOLDS) if cfg.folds is None else cfg.folds
    found = make_folds(crystals, K, cfg.split_seed) if K > 1 else []
    if found and why:
        say(cfg, f"{crystals.task.name}: {K} folds in place of {why}")
    for splits in found:
        splits["train"] = few_shot(splits["train"], cfg.few_shot, cfg.split_seed)
    return found


# ---------------------------------------------------------------- what a result rests on


def rests_on(crystals, splits) -> dict:
    """The part of a record that says which labels and rows: names, and fingerprints of their content."""
    task = crystals.task
    label = {k: getattr(task, k) for k in ("target_column", "unit", "transform", "pooling")}
    rows = {k: len(v) for k, v in splits.items()}
    return {"task": task.name, **label, "rows": rows, "content": split_fingerprint(crystals, splits)}


def compare(old: dict | None, new: dict, where, cure: str):
    """Raise UserError that names what differs between the record of what stands in `where` and that of this run."""
    if old is None:
        raise UserError(f"{where}: does not say what it was made from; {cure}")
    old, new = flat(old), flat(json.loads(json.dumps(new)))
    differ = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k)]
    differ.sort(key=lambda k: (k.startswith("content"), k))  # hashes tell a person least
    if differ:
        shown = [f"{named(k)} {short(old.get(k))}, now {short(new.get(k))}" for k in differ[:4]]
        shown += [f"{len(differ) - 4} more"] * (len(differ) > 4)
        raise UserError(f"{where}: made with {'; '.join(shown)}; {cure}")


def named(key: str) -> str:
    """A setting by its flag, "rows.train" as rows of train."""
    return " of ".join(key.split(".", 1)) if "." in key or key in ("theta_0", "init") else flag(key)


def flat(record, prefix="") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found = {}
    for k, v in record.items():
        found |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return found


# ---------------------------------------------------------------- work folders

LOCKS = {}  # {folder: open lock file} of this process, held until it ends
LOG = []  # the open log.txt of the run, and of its fold


def work_folder(result) -> Path:
    return Path(result).parent / ".runs" / Path(result).name


def claim(folder, cfg, record):
    """Make the work folder ours: new, empty or an earlier run's, and locked against a second run.

    An unfinished run in it is gone on with (--resume) if its record is the same, or given up (--overwrite), or refused.
    Then config.json is written: the settings as given, and the record.
    """
    folder = Path(folder)
    if rank() > 0:
        return
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; remove it, or name another output")
    if folder.exists() and not written_by(folder) and any(p.name != ".lock" for p in folder.iterdir()):
        raise UserError(f"{folder}: holds files that no run has written; name another output")
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() not in LOCKS:
        lock = take_lock(folder / ".lock", wait=False)
        if lock is None:
            raise UserError(f"{folder}: another run is working here; wait for it, or name another output")
        LOCKS[folder.resolve()] = lock
    last, resume = folder / "last.pt", getattr(cfg, "resume", False)
    if last.exists() and resume:
        old = read_json(folder / "config.json", "the settings of a run").get("record")
        compare(old, record, folder, "--resume needs the same; --overwrite instead starts again")
    elif last.exists() and not cfg.overwrite:
        raise UserError(f"{folder}: holds an unfinished run; add --resume to go on, or --overwrite to start again")
    elif last.exists():
        last.unlink()
    for file in ("last.pt", "config.json", "history.csv", "skipped.csv"):
        sweep(folder / file)
    settings = {"stage": stage_of(cfg), "version": VERSION, "record": record, **asdict(cfg)}
    write_json(folder / "config.json", settings)
    for log in LOG:
        if Path(log.name).parent not in folder.parents:  # a fold is part of its run, whose log goes on
            log.close()
    LOG[:] = [log for log in LOG if not log.closed]
    LOG.append(open(folder / "log.txt", "a", buffering=1))


def written_by(folder) -> str:
    """The stage whose config.json is in the folder; "" where there is none of ours."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text())
        return found["stage"] if "version" in found else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def stage_of(cfg) -> str:
    return Path(inspect.getfile(cfg if isinstance(cfg, type) else type(cfg))).stem


def last_state(folder, resume: bool):
    """What last.pt of the work folder holds, if the run is to go on from it; else None."""
    last = Path(folder) / "last.pt"
    if not resume or not last.exists():
        return None
    with reading(last, "the state of a run", "--overwrite instead of --resume starts again"):
        return torch.load(last, map_location="cpu", weights_only=True)


def say(cfg, line):
    """For people, on stderr and in the run's log."""
    if rank() == 0:
        if not cfg.quiet:
            print(line, file=sys.stderr)
        for log in LOG:
            with contextlib.suppress(OSError):  # a full disk: what matters will say so
                print(line, file=log)


def silent(cfg) -> bool:
    """Whether to draw no progress bars."""
    return cfg.quiet or rank() > 0 or not sys.stderr.isatty()


def number(x) -> str:
    return "-" if x is None else f"{x:.4g}"


# ---------------------------------------------------------------- device and processes


def pick_device(name="auto"):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def hardware(cfg) -> str:
    device = pick_device(cfg.device)
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return f"{world()} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}"


def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=getattr(cfg, "bf16", False))


def start(cfg):
    """The first line of every run: check the settings; join torchrun's process group if there is one."""
    check_settings(cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        device = pick_device(cfg.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # building graphs takes long


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def first_process_first():
    """`for _ in first_process_first():` the body runs in the first process, then in the others, which find its cache."""
    for first in (True, False):
        if (rank() == 0) == first:
            yield
        barrier()


def all_sum(values: list) -> list:
    """Sums of numbers over the processes."""
    if world() == 1:
        return values
    t = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(t)
    return t.tolist()


def reduce_gradients(params):
    """Sum of the gradients over the processes. One that none of them used has no gradient, as in one process."""
    if world() == 1:
        return
    used = params[0].new_tensor([float(p.grad is not None) for p in params])
    flat = torch.cat([used, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params)])
    dist.all_reduce(flat)
    used, *grads = flat.split([len(params), *(p.numel() for p in params)])
    for p, g, u in zip(params, grads, used.tolist(), strict=True):
        p.grad = g.view_as(p) if u else None


# ---------------------------------------------------------------- command line


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(hint):
    """(type, Range or None, choices) of a field's annotation; `T | None` counts as T."""
    if get_origin(hint) in (Union, type(int | None)):
        hint = next(h for h in get_args(hint) if h is not NoneType)
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
        return kind, limits, ()
    if get_origin(hint) is Literal:
        return str, None, get_args(hint)
    return get_origin(hint) or hint, None, ()


def hints_of(Config) -> dict:
    return {k: kind_of(h) for k, h in get_type_hints(Config, include_extras=True).items()}


def check_settings(cfg):
    """Every number in its range, every word among its choices."""
    for name, (_, limits, choices) in hints_of(type(cfg)).items():
        value = getattr(cfg, name)
        if limits is not None and value is not None and value not in limits:
            raise UserError(f"{flag(name)} {value}: must be {limits}")
        if choices and value is not None and value not in choices:
            raise UserError(f"{flag(name)} {value}: use {', '.join(c for c in choices if c)}")


def parse(Config, doc, argv=None):
    """One flag a field: its help is the comment beside it, its type and range come from the annotation, a list comes
    without a flag, the flag of a tuple may be repeated. --config FILE gives defaults."""
    parts = inspect.cleandoc(doc).split("\n\n")
    example = next((p for p in parts if p.startswith("    python")), "")
    script = (example.split() or ["", Path(sys.argv[0]).name])[1]
    p = argparse.ArgumentParser(
        usage=f"python {script} [--flag value ...]", description=textwrap.fill(parts[0], 100),
        epilog=f"example:\n{example}", allow_abbrev=False, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=100),
    )  # fmt: skip
    p.error = refuse
    notes, hints = comments(Config), hints_of(Config)
    for f in own_first(Config):
        note, (kind, _, choices) = notes.get(f.name, "").replace("%", "%%"), hints[f.name]
        if kind is list:
            p.add_argument(f.name, nargs="*", help=note)
        elif kind is tuple:
            note = f"{note} (may be given again)"
            p.add_argument(flag(f.name), action="append", metavar=f.name.upper(), help=note)
        elif kind is bool:
            p.add_argument(flag(f.name), action="store_true", default=f.default, help=note)
            p.add_argument(flag(f"no_{f.name}"), action="store_false", dest=f.name, help=argparse.SUPPRESS)
        else:
            shape = "|".join(c for c in choices if c) if choices else f.name.split("_")[-1].upper()
            if f.default not in ("", None):
                note = f"{note} [{f.default:g}]" if kind is float else f"{note} [{f.default}]"
            how = {"type": kind, "choices": choices or None, "metavar": shape, "help": note.strip()}
            p.add_argument(flag(f.name), default=f.default, **how)
    p.add_argument("--help", "-h", action="help", help="show this and exit")
    release = f"MoMa {VERSION} (torch {torch.__version__})"
    p.add_argument("--version", action="version", version=release, help="show it and exit")
    argv = sys.argv[1:] if argv is None else argv
    argv = [flag(a[2:].split("=")[0]) + a[len(a.split("=")[0]) :] if a.startswith("--") else a for a in argv]
    given, file = p.parse_args(argv), {}
    if given.config:
        file = read_config(given.config, Config, hints)
        p.set_defaults(**{k: v for k, v in file.items() if hints[k][0] is not tuple})
        given = p.parse_args(argv)
    for k in (k for k, (kind, _, _) in hints.items() if kind is tuple):
        setattr(given, k, tuple(getattr(given, k) or file.get(k, ())))
    cfg = Config(**vars(given))
    check_settings(cfg)
    return cfg


def own_first(Config) -> list:
    """Task and data, then the fields of the stage itself, then those that it shares with others."""
    classes = reversed([*enumerate(Config.__mro__[:-1])])
    place = {name: i for i, c in classes for name in inspect.get_annotations(c)}
    return sorted(fields(Config), key=lambda f: (f.name not in ("task", "data"), place[f.name]))


def read_config(path, Config, hints) -> dict:
    """Defaults from a run's config.json."""
    found = read_json(path, "the config.json of a run", "give the file that a run of this command wrote")
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: not a JSON object; give the config.json of a run")
    if found.pop("stage", stage_of(Config)) != stage_of(Config):
        raise UserError(f"--config {path}: written by another command, not by {stage_of(Config)}.py")
    for k in ("version", "record"):
        found.pop(k, None)
    defaults = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    for k, v in found.items():
        if k not in hints:
            raise UserError(f"--config {path}: unknown setting {k!r}; known are {', '.join(hints)}")
        kind, _, choices = hints[k]
        fits = v in choices if choices else type(v) is kind or (kind, type(v)) in ((float, int), (tuple, list))
        if not (fits or v is None and defaults.get(k, "") is None):
            raise UserError(f"--config {path}: {k} is {v!r}, expected {' or '.join(choices) or kind.__name__}")
    return {k: v for k, v in found.items() if k not in ("config", "resume", "overwrite")}


def comments(Config) -> dict:
    """{field: the comment on its line}, for the dataclass and those it extends."""
    found = {}
    for c in reversed(Config.__mro__[:-1]):
        lines = [line.strip().partition(":") for line in inspect.getsource(c).splitlines()]
        found |= {name: rest.partition("  # ")[2] for name, _, rest in lines if name.isidentifier()}
    return found


def refuse(message):
    raise UserError(f"{message}; see --help")


def main(run, Config, doc, argv=None):
    """A script: exit 0 with the result made, 2 and one line for wrong input, 130 after Ctrl-C; a bug is a traceback."""
    script = Path(sys.argv[0]).name
    try:
        result = run(parse(Config, doc, argv))
    except KeyboardInterrupt:
        again = "--resume goes on from the last saving, if there was one (every two minutes)"
        again = again if "resume" in hints_of(Config) else "what was finished stays; the same command goes on"
        print(f"\n{script}: stopped; {again}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        wrong = "the GPU is out of memory; lower --batch-size or --max-atoms"
    except MemoryError:
        wrong = "out of memory; lower --batch-size, --max-atoms or --limit"
    except UserError as error:
        wrong = str(error)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if not error.filename and error.errno not in FULL:
            raise
        wrong = f"{error.filename or 'output'}: {error.strerror}"
        wrong += "; free space there, what stood there is unchanged" if error.errno in FULL else ""
    else:
        sys.exit(result.get("exit_code", 0) if isinstance(result, dict) else 0)
    with contextlib.suppress(OSError):
        print(f"{script}: {' '.join(wrong.split())}", file=sys.stderr)
    sys.exit(2)
