"""Kill a training at random moments, resume it each time, and compare with one that nobody killed.

    python tests/kill.py --kills 30

Weights must be equal to the last bit, and metrics.csv in every column but those of time. If not, the exit code is 1.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

RECIPE = ["--base_channels", "4", "--epochs_per_stage", "2", "--batch_sizes", "32:2,64:2,128:2,256:2", "--average",
          "0.9", "--save_minutes", "0.002", "--save_every", "1"]


def start(*arguments) -> subprocess.Popen:
    """Start `train_papsmear.py`, its output dropped."""
    return subprocess.Popen([sys.executable, "train_papsmear.py", *map(str, arguments)], cwd=PROJECT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def killed_run(data_root: Path, folder: Path, kills: int, longest: float, seed: int,
               how: signal.Signals = signal.SIGKILL) -> int:
    """Train into a folder, killed so many times at random moments; return how many kills came before the end."""
    rng, done = random.Random(seed), 0
    new = ["--data_root", data_root, "--output_dir", folder.parent, "--experiment_name", folder.name, *RECIPE]
    while True:
        saved = (folder / "last.pth").exists() or (folder / "previous.pth").exists()
        process = start(*(["--resume", folder] if saved else [*new, "--overwrite"]))
        if done < kills:
            try:
                process.wait(rng.uniform(0.5, 1) * longest)
            except subprocess.TimeoutExpired:
                process.send_signal(how)
                done += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            return done
        if process.returncode not in (-how, 128 + how):
            raise SystemExit(f"a resumed run ended with {process.returncode}:\n{errors}")


def differences(folder: Path, other: Path) -> list[str]:
    """Return what differs between two runs: names of tensors, and rows of metrics.csv."""
    import torch

    from checkpoints import load_checkpoint
    from conftest import metric_rows

    states = [load_checkpoint(run / "last.pth") for run in (folder, other)]
    found = [f"{field}: {name}" for field in ("model", "unborn") for name in states[0][field]
             if not torch.equal(states[0][field][name], states[1][field][name])]
    found += [f"averaged: {name}" for name in states[0]["averaged"]["model"]
              if not torch.equal(*(state["averaged"]["model"][name] for state in states))]
    return found + [f"metrics.csv: {a} {b}" for a, b in zip(metric_rows(folder), metric_rows(other), strict=True)
                    if a != b]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args(argv)
    from conftest import write_data_set

    with tempfile.TemporaryDirectory() as place:
        root, begin = write_data_set(Path(place) / "data", (12, 3, 3)), time.monotonic()
        killed_run(root, Path(place) / "whole", 0, 0, 0)
        whole = time.monotonic() - begin
        kills = runs = 0
        while kills < args.kills:
            runs += 1
            folder = Path(place) / f"killed_{runs}"
            kills += killed_run(root, folder, min(6, args.kills - kills), whole, args.seed + runs)
            if found := differences(folder, Path(place) / "whole"):
                print("\n".join(found))
                return 1
            print(f"{kills} kills in {runs} runs: weights, averages and metrics as without", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
