"""The Think-Ahead store: thoughts and SID prefixes that were prepared for each user.

`whyrec think-ahead` fills it offline, `think: "ahead"` reads it online. A SQLite file by default;
a `redis://` URL where several servers share one. It holds what users did, so keep it as you keep
your log. Entries of another model are never found: the key begins with the model's fingerprint.

    store = open_store("runs/ml-100k/ahead.sqlite")
    store.put([entry], model=fingerprint)
    store.get("196", model=fingerprint)
"""

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from whyrec.decode.model_folder import SETTINGS_FILE

_BUSY_SECONDS = 30.0
LATELY = 1_024  # entries that are kept decoded, of users who asked lately


@dataclass(frozen=True)
class Prepared:
    """What was prepared for one user.

    Attributes:
        user: the user's id.
        made_at: when, in seconds since 1970.
        history: item ids that the thoughts were written after, oldest first.
        thoughts: token ids of each thought, without brackets.
        prefixes: for each thought, the best SID prefixes after it, as codes.
        settings: how it was made; other settings make it again.
    """

    user: str
    made_at: float
    history: list[str]
    thoughts: list[list[int]]
    prefixes: list[list[list[int]]]
    settings: str = ""

    def dumps(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def loads(cls, text: str | bytes) -> "Prepared":
        return cls(**json.loads(text))


# The same text gives the same object: nobody may change it.
_decoded = lru_cache(maxsize=LATELY)(Prepared.loads)


class SqliteStore:
    """A file; any number of readers beside one writer, from any thread.

    Args:
        path: made when it is missing, with its folder.

    Raises:
        ValueError: when the file is something else.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        self._impatient: sqlite3.Connection | None = None  # for those who cannot wait for a lock
        try:
            self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
            with self._database as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS prepared (model TEXT, user TEXT, entry TEXT, "
                    "PRIMARY KEY (model, user)) WITHOUT ROWID"
                )
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{path} cannot be used as a Think-Ahead store ({error}); name another file"
            ) from None

    def get(self, user: str, *, model: str) -> Prepared | None:
        """What was prepared for a user; None when nothing was."""
        with self._lock:
            return _read(self._database, user, model)

    async def ask(self, user: str, *, model: str) -> Prepared | None:
        """`get` for an event loop.

        A look into the file takes some twenty microseconds. A thread would wait for the
        interpreter's lock, up to five milliseconds under load, and all others behind it.
        """
        try:
            if self._impatient is None:
                self._impatient = sqlite3.connect(self._path, timeout=0, check_same_thread=False)
            return _read(self._impatient, user, model)
        except sqlite3.OperationalError:  # it is locked
            return await asyncio.to_thread(self.get, user, model=model)

    def put(self, entries: Sequence[Prepared], *, model: str) -> None:
        """Keep some entries, all or none of them."""
        rows = [(model, entry.user, entry.dumps()) for entry in entries]
        with self._lock, self._database as database:
            database.executemany("INSERT OR REPLACE INTO prepared VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()
        if self._impatient is not None:
            self._impatient.close()


class RedisStore:
    """A Redis server, shared by several of ours.

    Args:
        url: e.g. `redis://:password@host:6379/0`.
        client: a client that is connected already, in place of one for the URL.

    Raises:
        ValueError: when the package `redis` is missing.
    """

    def __init__(self, url: str, *, client: Any = None) -> None:
        if client is None:
            try:
                import redis
            except ImportError:
                raise ValueError(
                    "a redis:// store needs the package redis; run `pip install redis`"
                ) from None
            client = redis.Redis.from_url(url)
        self._client = client

    def get(self, user: str, *, model: str) -> Prepared | None:
        """What was prepared for a user; None when nothing was."""
        found = self._client.get(_key(model, user))
        return _decoded(found) if found else None

    async def ask(self, user: str, *, model: str) -> Prepared | None:
        """`get` for an event loop."""
        return await asyncio.to_thread(self.get, user, model=model)

    def put(self, entries: Sequence[Prepared], *, model: str) -> None:
        """Keep some entries, all or none of them."""
        if entries:
            self._client.mset({_key(model, entry.user): entry.dumps() for entry in entries})

    def close(self) -> None:
        self._client.close()


Store = SqliteStore | RedisStore


def open_store(place: str) -> Store:
    """The store at a `redis://` (or `rediss://`) URL, or in a SQLite file.

    Raises:
        ValueError: when it cannot be opened.
    """
    if place.startswith(("redis://", "rediss://")):
        return RedisStore(place)
    if "://" in place:
        raise ValueError(f"{place} is neither a file nor a redis:// URL; give one of the two")
    return SqliteStore(Path(place))


def model_fingerprint(folder: Path) -> str:
    """A short name of a model's weights and settings; the catalogue may change under it."""
    digest = hashlib.sha256()
    for name in (SETTINGS_FILE, "config.json", "stage.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.exists() else b"\0")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("model"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _read(database: sqlite3.Connection, user: str, model: str) -> Prepared | None:
    row = database.execute(
        "SELECT entry FROM prepared WHERE model = ? AND user = ?", (model, user)
    ).fetchone()
    return _decoded(row[0]) if row else None


def _key(model: str, user: str) -> str:
    return f"whyrec:ahead:{model}:{user}"
