"""How long `make demo` takes from a clean clone, and how much memory.

Clones the repository's HEAD into a temporary folder with an empty cache, runs `make demo` there,
installation included, and records the seconds and the peak memory of the largest process.

    python eval/bench/demo.py --json eval/results/ml-100k/demo/cpu.json
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from whyrec.evaluation.results import record

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("eval/results/ml-100k/demo/cpu.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment = os.environ | {"WHYREC_CACHE": str(Path(scratch) / "cache")}
        # A virtual environment of ours must not reach into the one that the demo makes.
        environment["PATH"] = os.pathsep.join(
            entry
            for entry in environment["PATH"].split(os.pathsep)
            if not entry.startswith(sys.prefix)
        )
        started = time.monotonic()
        subprocess.run(["make", "demo"], cwd=clone, env=environment, check=True)
        seconds = time.monotonic() - started
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    figures = {"demo/seconds": round(seconds, 1), "demo/peak_gib": round(peak_kib / 2**20, 3)}
    record(
        options.json,
        name="make demo from a clean clone",
        command=f"python eval/bench/demo.py --json {options.json}",
        seed=0,
        figures=figures,
    )
    print(figures)


if __name__ == "__main__":
    main()
