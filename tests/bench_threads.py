"""What waiting threads cost: an epoch of pre-training on toy crystals, on a quiet machine and beside busy processes.

    python tests/bench_threads.py            seconds of an epoch

Two threads share every operation of a tiny net. A thread that waits for the other either spins, which takes the processor
from other programs, or sleeps, which takes time to wake: how many turns it spins first is GOMP_SPINCOUNT.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAITING = {
    "1,000 turns, as files.py sets it": {}, "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "300,000 turns, libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "none (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"}, "one thread": {"OMP_NUM_THREADS": "1"},
}  # fmt: skip
MOST = 60  # seconds to wait for a run


def epoch(folder, settings):
    """Seconds of an epoch, or what was not reached."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, str(ROOT / "pretrain.py"), "--sets", "demo_forcefield", "--data", "demo", "--limit", "600"]
    command += ["--preset", "small", "--epochs", "1", "--cache", f"{folder}/cache", "--hub", f"{folder}/hub", "--overwrite"]
    try:
        env |= {"OMP_NUM_THREADS": "2"} | settings
        subprocess.run([*command, "--quiet"], env=env, check=True, capture_output=True, timeout=MOST)
    except subprocess.TimeoutExpired:
        return f"not done after {MOST}"
    [row] = csv.DictReader(open(f"{folder}/hub/backbone/history.csv"))
    return f"{float(row['seconds']):.2f}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        epoch(folder, {"OMP_NUM_THREADS": "1"})  # builds the graphs
        for busy in (0, 2):
            print(f"beside {busy} busy processes")
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                for name, settings in WAITING.items():
                    print(f"  {name:34} {epoch(folder, settings)} s")
            finally:
                for p in others:
                    p.kill()
