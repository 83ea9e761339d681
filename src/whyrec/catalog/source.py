"""Raw files as they are downloaded: finding, opening and sniffing them, and counting bad rows.

Files may be plain or gzip (told by their first bytes, not by their names). A file that cannot be
read at all ends in a `ValueError`; a row that cannot be read is counted in `BadRows`.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

_SHOWN = 5  # bad rows that the card quotes
_SNIFFED_BYTES = 1 << 18


@dataclass(frozen=True)
class Files:
    """The files of one data set: the interaction log and, if there is one, the item file."""

    log: Path
    items: Path | None


@dataclass
class BadRows:
    """Rows that were left out, counted by reason, the first few quoted with file and line."""

    by_reason: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.by_reason.total()

    def add(self, path: Path, line: int, reason: str, row: object) -> None:
        self.by_reason[reason] += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{path.name}:{line}: {reason}: {str(row).strip()[:120]}")


def list_files(source: Path) -> list[Path]:
    """The files of a folder (not of its subfolders), sorted by name, without hidden ones.

    Raises:
        ValueError: when there is no such folder or it holds no file.
    """
    if not source.exists():
        raise ValueError(f"there is no file or folder {source}; download or unpack the data first")
    if source.is_file():
        return sorted(p for p in source.parent.iterdir() if _is_data(p) or p == source)
    files = sorted(path for path in source.iterdir() if _is_data(path))
    if not files:
        folders = sorted(p.name for p in source.iterdir() if p.is_dir())
        inside = f"; give one of its subfolders: {', '.join(folders[:5])}" if folders else ""
        raise ValueError(f"the folder {source} holds no files{inside}")
    return files


def bare_name(path: Path) -> str:
    """The lower-case name without `.gz`."""
    return path.name.lower().removesuffix(".gz")


def read_lines(path: Path, decode: Callable[[bytes], str] = bytes.decode) -> Iterator[str]:
    """The lines of a text file, plain or gzip, with their line ends, a progress bar on long ones.

    Raises:
        ValueError: for truncated or damaged gzip, other archives, and bytes that `decode` refuses.
    """
    with (
        path.open("rb") as raw,
        _text_stream(path, raw) as stream,
        tqdm(
            total=path.stat().st_size,
            desc=f"reading {path.name}",
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
        ) as progress,
    ):
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if number % 10_000 == 0:
                    progress.update(raw.tell() - progress.n)
                yield decode(line)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} line {number} has bytes that are not {error.encoding.upper()} "
                f"({error.object[error.start : error.start + 4]!r}); convert the file to UTF-8"
            ) from None
        except EOFError:
            raise ValueError(
                f"{path} is a truncated gzip file (it ends after line {number}); download it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged gzip ({error}); download it again") from None


def check_readable(path: Path) -> None:
    """Raise the ValueError that says what is wrong with a file from which `head` got nothing."""
    for _ in read_lines(path):
        pass


def utf8_or_latin1(line: bytes) -> str:
    """MovieLens releases are one or the other without saying so."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def head(path: Path, lines: int = 3) -> list[str]:
    """The first non-blank lines of a file, for guessing its format; [] for binary files."""
    with path.open("rb") as raw:
        data = raw.read(_SNIFFED_BYTES)
    if data.startswith(b"\x1f\x8b"):
        try:
            data = zlib.decompressobj(wbits=31).decompress(data, _SNIFFED_BYTES)
        except zlib.error:
            data = b""  # check_readable says what is wrong with it
    if b"\0" in data:
        return []
    text = data.decode(errors="replace").removeprefix("\ufeff")
    found = (line.rstrip("\r\n") for line in text.splitlines())
    return [line for line in found if line.strip()][:lines]


def head_object(path: Path) -> dict[str, Any] | None:
    """The first line as a JSON object, or None when it is something else."""
    first = head(path, 1)
    if not first or not first[0].lstrip().startswith("{"):
        return None
    try:
        found = json.loads(first[0])
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def read_objects(path: Path, bad: BadRows) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a JSON-lines file as (line number, line, object)."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            bad.add(path, number, "not a JSON object", line)
            continue
        if isinstance(found, dict):
            yield number, line, found
        else:
            bad.add(path, number, "not a JSON object", line)


def _is_data(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _text_stream(path: Path, raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(raw)  # type: ignore[return-value]
    for start, kind in ((b"PK\3\4", "zip"), (b"\xfd7zX", "xz"), (b"PAR1", "Parquet")):
        if magic.startswith(start):
            hint = "name --format parquet" if kind == "Parquet" else "unpack it first"
            raise ValueError(f"{path} is a {kind} file, not text; {hint}")
    return raw


def pick(
    candidates: list[Path],
    *,
    named: str,
    among: list[Path],
    key: str,
    prefer: Callable[[Path], bool] = lambda path: False,
) -> Path | None:
    """The one file meant: the one that the recipe names, the preferred one, or the only one.

    None when there is no candidate, or when the named file is none.

    Raises:
        ValueError: when the named file is not there, or several could be meant.
    """
    if named:
        for path in among:
            if named in (path.name, str(path)):
                return path if path in candidates else None
        raise ValueError(
            f"{key}={named}: there is no such file; "
            f"there are {', '.join(path.name for path in among)}"
        )
    preferred = [path for path in candidates if prefer(path)]
    found = preferred if len(preferred) == 1 else candidates
    if len(found) > 1:
        raise ValueError(
            f"several files in {found[0].parent} could be meant "
            f"({', '.join(path.name for path in found)}); name one with --set {key}=NAME"
        )
    return found[0] if found else None
