"""Recorded figures: one JSON a run, written by the program that measured it.

Every figure that a README, a model card or a note states lies under `eval/results/FOLDER/`:

    {"name": "...", "command": "...", "commit": "...", "date": "...", "device": "...", "seed": 0,
     "versions": {...}, "data_sha256": "...", "figures": {"MODEL/SPLIT/HISTORY/METRIC": 0.1, ...}}
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from whyrec import stage

_KEYS = ("name", "command", "commit", "date", "device", "seed", "versions", "data_sha256")


def record(
    path: Path,
    *,
    name: str,
    command: str,
    seed: int,
    figures: Mapping[str, float],
    data_sha256: str = "",
) -> None:
    """Write one run's figures to `path`, atomically; the folder is made when it is missing.

    Args:
        path: e.g. `eval/results/ml-100k/seed-0.json`.
        name: what was measured, in a few words.
        command: the command line that measures it again.
        seed: the run's random seed.
        figures: flat keys such as `sasrec/test/excluded/R@10` → finite numbers.
        data_sha256: `stage.fingerprint` of the data set, where there is one.

    Raises:
        ValueError: when a figure is not a finite number, which JSON cannot hold.
    """
    for key, value in figures.items():
        if not math.isfinite(value):
            raise ValueError(f"the figure {key!r} is {value}; only finite numbers are recorded")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage.write_json(
        path,
        {
            "name": name,
            "command": command,
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": _device(),
            "seed": int(seed),
            "versions": stage.versions(),
            "data_sha256": data_sha256,
            # numpy scalars become plain numbers; integers stay integers
            "figures": {
                key: getattr(value, "item", lambda v=value: v)() for key, value in figures.items()
            },
        },
    )


def read_results(folder: Path) -> list[dict]:
    """The records that lie directly in `folder`, by file name; [] for a missing folder.

    `folder` may also be one record's file.

    Raises:
        ValueError: when a file is not a record.
    """
    records = []
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path} is not valid JSON; measure it again or remove it") from None
        missing = [key for key in (*_KEYS, "figures") if key not in entry]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; measure it again or remove it")
        records.append(entry)
    return records


def _commit() -> str:
    """The checkout's commit, "-dirty" when files other than recorded results have changed."""
    here = Path(__file__).resolve().parent
    try:
        top = Path(_git(here, "rev-parse", "--show-toplevel").strip())
        commit = _git(top, "rev-parse", "HEAD").strip()
        changes = _git(top, "status", "--porcelain", "--", ".", ":(exclude)eval/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changes.strip() else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def _device() -> str:
    """The GPU's name, or the CPU's model name with the number of cores we may use."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return (
            f"{count} x {torch.cuda.get_device_name(0)}"
            if count > 1
            else torch.cuda.get_device_name(0)
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
