"""Files: what a user names is read or refused in one line; what is written is whole or not there.

Every other file stands on this one; it imports none of them. Scripts import it before torch: see the first lines.
"""

import contextlib
import csv
import errno
import fcntl
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

VERSION = "0.3.0"
# Read when torch is loaded: a thread that waits for another spins so many turns, then sleeps. On a busy machine
# libgomp's own 300,000 turns stop all progress, and sleeping at once is slow on a quiet one (tests/bench_threads.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
for package in ("numpy", "torch"):
    if importlib.util.find_spec(package) is None:
        sys.exit(f"{package} is not installed for {sys.executable}: run `make setup`, then .venv/bin/python FILE.py")

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room for what is written


class UserError(ValueError):
    """What a user gave cannot be used. One line: what, where, the cure; the scripts print it and exit with 2."""


class MissingError(UserError, FileNotFoundError):
    """What a user named is not there."""


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def reading(path, form: str, cure: str = "write it again in that form"):
    """`with reading(path, "a table in JSON"):` around the parsing of a file: whatever that raises is one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except (OSError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except Exception as error:  # parsers raise what they like, and whatever it is, the file is the cause
        what = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path}: not {form} ({type(error).__name__}: {what}); {cure}") from error


def read_json(path, form: str, cure: str = "write it again in that form", most: int = 2**28):
    """The content of a JSON file of at most `most` bytes."""
    with reading(path, form, cure):
        with open(path, "rb") as f:
            text = f.read(most + 1)
        if len(text) > most:
            raise UserError(f"{path}: larger than {most / 2**20:.0f} MiB, so not {form}")
        return json.loads(text)


def short(value) -> str:
    """A value or an error in one line of at most 60 letters; of a hash what a person compares."""
    if isinstance(value, str) and len(value) == 64:
        value = value[:12]
    text = " ".join((str if isinstance(value, Exception) else repr)(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- writing


def output_path(text, what="--output") -> Path:
    """A folder to write, as one names it; "a/../b" is b before anything looks at it, and "." names none."""
    path = Path(os.path.normpath(text))
    if path.name in ("", ".."):
        raise UserError(f"{what} {text}: names no new folder; give it a name")
    return path


def check_name(name: str, where: str):
    """Names of modules and runs are names of folders: alike on every file system, and none leads elsewhere."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name) or ".." in name:
        cure = "use a-z 0-9 . _ - only, a letter or digit first, no '..'"
        raise UserError(f"{where}: {name!r} is no name for a folder; {cure}")


class _Remember:
    """A file for writers that hide why writing failed (torch.save): keeps the system's error."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name):
        return getattr(self.file, name)


def write_atomic(path, write):
    """write(file) into a hidden sibling, then rename: a killed run leaves the old file or the new one, a full disk the
    old one, and of two processes that write one file (benchmarks side by side) the later wins."""
    path = Path(path)
    if path.is_symlink() or path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file, so it is not replaced; remove it or name another")
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as f:
            file = _Remember(f)
            try:
                write(file)
                f.flush()
            except Exception as error:
                raise file.error or error from None
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path, text: str):
    write_atomic(path, lambda f: f.write(text.encode()))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def csv_text(header, rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def write_skipped(path, skipped):
    """skipped.csv: what was left out and why. skipped: [(id, reason)]."""
    write_text(path, csv_text(["id", "reason"], skipped))


def png(figure) -> bytes:
    """A matplotlib figure as the content of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def new_array(path, shape, dtype="float32"):
    """A memory-mapped array in a new file. A disk without room for it says so now, not by SIGBUS when it is filled."""
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", dtype, tuple(map(int, shape)))
    with open(path, "r+b") as f:
        os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return array


def sync(path):
    """Through to the disk: the content of a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- whole folders


@contextlib.contextmanager
def whole_folder(path, replace: bool = False):
    """`with whole_folder(path) as part:` fill `part`; it becomes `path` by one rename, or nothing has happened.

    replace: a folder of that name is put aside by another rename and deleted; `recover` brings it back should the
    process be killed between the two.
    """
    path = Path(path)
    recover(path)
    if path.is_symlink() or path.exists() and not (path.is_dir() and (replace or not any(path.iterdir()))):
        raise UserError(f"{path}: exists already; delete it, name another, or give --overwrite")
    part, aside = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    try:
        part.mkdir()
        yield part
        sync(part)
        try:
            if replace and path.exists():
                os.rename(path, aside)
            os.rename(part, path)  # fails where another process was quicker: its folder has files
        except OSError as error:
            why = f"({error.strerror}); is another process saving it?"
            raise UserError(f"{path}: could not be put in place {why}") from None
        finally:
            recover(path)
        sync(path.parent)
    finally:
        for folder in (part, aside):
            shutil.rmtree(folder, ignore_errors=True)


def recover(path):
    """Bring back the folder that a process put aside and was killed before it put the new one in place."""
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        for aside in sorted(path.parent.glob(f".{path.name}.*.old")):
            if leftover(aside) or str(os.getpid()) in aside.name.split("."):
                os.rename(aside, path)
                return


def leftover(path) -> bool:
    """Whether .NAME.PROCESS.tmp, .part or .old, a file or folder, is one of ours whose process has ended."""
    found = re.fullmatch(r"\..+\.(\d+)\.(tmp|part|old)", path.name)
    if not found:
        return False
    try:
        os.kill(int(found[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def sweep(path):
    """Delete what killed processes left beside `path`, a file or folder, while they wrote it."""
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.*"):
        if leftover(left) and not left.is_symlink():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def take_lock(path, wait: bool):
    """The open lock file `path`, ours until it is closed or the process ends; None where another process has it and
    `wait` is false. Never changes what the file holds."""
    f = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        f.close()
        return None
    return f


# ---------------------------------------------------------------- the cache: what can be made again


def cache_folder(folder="") -> Path:
    """Where rows, graphs and embeddings are kept; safe to delete at any time."""
    return Path(folder or os.environ.get("MOMA_CACHE") or ".cache")


def cached_folder(path, build) -> Path:
    """The folder `path` as build(folder) fills it: made where it is missing or damaged, read where it is whole.

    Its name is the caller's hash of all that its content follows from; checksums of its files are in sums.json. A
    second process waits for the first and finds the folder made.
    """
    path = Path(path)
    if undamaged(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with take_lock(path.with_name(f".{path.name}.lock"), wait=True):
            if not undamaged(path):
                shutil.rmtree(path, ignore_errors=True)
                with whole_folder(path) as part:
                    build(part)
                    write_json(part / "sums.json", {p.name: checksum(p) for p in sorted(part.iterdir())})
    except UserError:  # of build: about what it reads
        raise
    except OSError as error:
        cure = "free space there, or name another folder (--cache or MOMA_CACHE; for predictions TMPDIR)"
        raise UserError(f"{path.parent}: the cache cannot be written ({error.strerror or error}); {cure}") from None
    return path


def undamaged(path: Path) -> bool:
    try:
        sums = json.loads((path / "sums.json").read_text())
        return sums == {p.name: checksum(p) for p in sorted(path.iterdir()) if p.name != "sums.json"}
    except (OSError, ValueError):
        return False


def checksum(file) -> int:
    """CRC-32: finds damage, at the speed of reading."""
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def progress(iterable, what: str, quiet: bool = False, total=None):
    """A bar on stderr, only where stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=what, total=total, disable=True if quiet else None, leave=False, file=sys.stderr)
