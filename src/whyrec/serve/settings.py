"""The server's settings and limits, and how they reach vLLM's process."""

import json
import os
from dataclasses import asdict, dataclass, field

SETTINGS_VARIABLE = "WHYREC_SERVE"  # how `whyrec serve` hands its settings to vLLM's process


@dataclass(frozen=True)
class Limits:
    """The most that one request, or all of them together, may ask for.

    Attributes:
        body_bytes: of a request's body.
        k: items of an answer.
        beam_width: beams of a search.
        history: events of a history, and those since.
        listed: item ids in `exclude` and in `filter.items`.
        edited: items that one call of `/v1/items` changes.
        concurrency: requests being answered at once.
        queue: requests that wait for one of those places; more are answered 429.
    """

    body_bytes: int = 1_048_576
    k: int = 100
    beam_width: int = 256
    history: int = 2_000
    listed: int = 20_000
    edited: int = 1_000
    concurrency: int = 64
    queue: int = 256


@dataclass(frozen=True)
class ServeSettings:
    """How the routes behave.

    Attributes:
        limits: see `Limits`.
        run: the run folder whose users are known by id; none are when empty.
        ahead: the Think-Ahead store, a file or a `redis://` URL; none when empty.
        ahead_max_age: seconds after which what it holds is no longer used.
        drain_seconds: how long running requests may take after SIGTERM.
        api_key: what clients must send as a bearer token; nothing is asked for when empty.
        parent: the process whose end is ours too; 0 for none.
    """

    limits: Limits = field(default_factory=Limits)
    run: str = ""
    ahead: str = ""
    ahead_max_age: float = 86_400.0
    drain_seconds: float = 30.0
    api_key: str = ""
    parent: int = 0

    def dumps(self) -> str:
        """As `from_environment` reads it; the key travels by itself, in vLLM's own variable."""
        values = asdict(self)
        del values["api_key"]
        return json.dumps(values)

    @classmethod
    def from_environment(cls) -> "ServeSettings":
        """The settings in `WHYREC_SERVE`, or the defaults; the key is vLLM's `VLLM_API_KEY`."""
        values = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
        limits = Limits(**values.pop("limits", {}))
        return cls(limits=limits, api_key=os.environ.get("VLLM_API_KEY", ""), **values)
