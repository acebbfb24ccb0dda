"""What every stage shares: command line, run folder, processes (torchrun)."""

import argparse
import fcntl
import inspect
import json
import os
import platform
import sys
from dataclasses import MISSING, asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import get_args, get_type_hints

import torch
import torch.distributed as dist

from files import write_text

# ---------------------------------------------------------------- run folders

LOCKS = {}  # {folder: open lock file} of this process
# may change when a run is resumed
FREE = {"resume", "config", "quiet", "overwrite", "device", "num_workers", "checkpointing", "time_limit", "save_minutes"}


def claim(folder, cfg, resume=False):
    """Make the run folder ours: locked against a second run, an older one neither lost nor mixed in; config.json."""
    if rank() > 0:
        return
    folder, mine = Path(folder), asdict(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in LOCKS:
        LOCKS.pop(folder.resolve()).close()
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing here; wait for it or give another --output") from None
    LOCKS[folder.resolve()] = lock  # held until the process ends
    for left in folder.glob("*.tmp"):  # by a run that was killed
        left.unlink(missing_ok=True)
    path, last = folder / "config.json", folder / "last.pt"
    if getattr(cfg, "overwrite", False) and not resume:
        for old in (last, folder / "metrics.json", folder / "module.json"):
            old.unlink(missing_ok=True)
    if last.exists() and not resume:
        raise ValueError(f"{folder}: holds an unfinished run; add --resume, or --overwrite, or give another --output")
    if last.exists() and path.exists():
        old = json.loads(path.read_text())
        for k in sorted((old.keys() & mine.keys()) - FREE):
            if old[k] != mine[k]:
                raise ValueError(f"{folder}: {flag(k)} was {old[k]!r}, now {mine[k]!r}; --resume needs the same")
    write_text(path, json.dumps(mine, indent=2) + "\n")


def number(x):
    return "-" if x is None else f"{x:.4g}"





# ---------------------------------------------------------------- device and processes (torchrun)


def pick_device(name="auto"):
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def hardware(cfg):
    device = pick_device(cfg.device)
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return f"{world()} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}"


def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=getattr(cfg, "bf16", False))


def start_processes(cfg):
    """Join torchrun's process group if there is one. Every process takes its share of every batch."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        device = pick_device(cfg.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # building graphs takes long


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def all_sum(x):
    """Sum of a number over the processes."""
    if world() == 1:
        return x
    t = torch.tensor(x, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(t)
    return t.item()


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


def silent(cfg):
    return cfg.quiet or rank() > 0 or not sys.stderr.isatty()


def say(cfg, line):
    if not cfg.quiet and rank() == 0:
        print(line, file=sys.stderr)


# ---------------------------------------------------------------- command line


def parse(Config, doc, argv=None):
    """One flag per field: help from the comment beside it, choices from Literal; a list comes without a flag."""
    parts = inspect.cleandoc(doc).split("\n\n")
    example = next((p for p in parts if p.startswith("    python")), "")
    script = (example.split() or ["", Path(sys.argv[0]).name])[1]
    p = argparse.ArgumentParser(
        usage=f"python {script} [--flag value ...]", description=parts[0], epilog=f"example:\n{example}",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
    )  # fmt: skip
    p.error = refuse
    notes, hints = comments(Config), get_type_hints(Config)
    for f in fields(Config):
        note = f.metadata.get("help", notes.get(f.name, "")).replace("%", "%%")
        choices = f.metadata.get("choices") or get_args(hints[f.name]) or None
        if f.default is MISSING:
            p.add_argument(f.name, nargs="*", help=note)
        elif isinstance(f.default, bool):
            p.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, default=f.default, help=note)
        else:
            shape = "|".join(c for c in choices if c) if choices else f.name.split("_")[-1].upper()
            note = note if f.default == "" else f"[{f.default}] {note}"
            kind = {"type": type(f.default), "choices": choices, "metavar": shape}
            p.add_argument(flag(f.name), default=f.default, help=note, **kind)
    argv = sys.argv[1:] if argv is None else argv
    argv = [flag(a[2:].split("=")[0]) + a[len(a.split("=")[0]) :] if a.startswith("--") else a for a in argv]
    given = p.parse_args(argv)
    if getattr(given, "config", ""):
        p.set_defaults(**read_config(given.config, Config, hints))
        given = p.parse_args(argv)
    for name, value in vars(given).items():
        least = int(name == "batch_size")
        if isinstance(value, int | float) and not value >= least:
            raise ValueError(f"{flag(name)} {value}: must be {least} or more")
    return Config(**vars(given))


def read_config(path, Config, hints):
    """Defaults from a run's config.json."""
    try:
        found = dict(json.loads(Path(path).read_text()))
    except (TypeError, ValueError):
        raise ValueError(f"--config {path}: not a JSON object; give the config.json of a run") from None
    known = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    for k, v in found.items():
        if k not in known:
            raise ValueError(f"--config {path}: unknown setting {k!r}; known are {', '.join(known)}")
        choices, kind = get_args(hints[k]), type(known[k])
        if not (v in choices if choices else type(v) is kind or kind is float and type(v) is int):
            raise ValueError(f"--config {path}: {k} is {v!r}, expected {' or '.join(choices) or kind.__name__}")
    return {k: v for k, v in found.items() if k not in ("config", "resume", "overwrite")}


def comments(Config):
    """{field: the comment on its line}, for the dataclass and those it extends."""
    found = {}
    for c in reversed(Config.__mro__[:-1]):
        lines = [line.strip().partition(":") for line in inspect.getsource(c).splitlines()]
        found |= {name: rest.partition("  # ")[2] for name, _, rest in lines if name.isidentifier()}
    return found


def flag(name):
    return "--" + name.replace("_", "-")


def refuse(message):
    raise ValueError(f"{message}; see --help")


def main(run, Config, doc, argv=None):
    """A script: exit 0 with the result made, 2 and one line for wrong input, 130 after Ctrl-C; bugs: a traceback."""
    script = Path(sys.argv[0]).name
    try:
        result = run(parse(Config, doc, argv))
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; the same command with --resume goes on from the last saved epoch", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        print(f"{script}: the GPU is out of memory; lower --batch-size or --max-atoms", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        ours = Path(trace.tb_frame.f_code.co_filename).resolve().parent == Path(__file__).resolve().parent
        if isinstance(error, ValueError) and not ours:  # raised inside a library: our mistake, not the user's
            raise
        known = isinstance(error, OSError) and error.strerror and error.filename
        line = f"{error.filename}: {error.strerror}" if known else str(error)
        print(f"{script}: {' '.join(line.split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(result.get("exit_code", 0) if isinstance(result, dict) else 0)
