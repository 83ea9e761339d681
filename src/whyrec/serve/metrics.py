"""Prometheus metrics and one log line a request, neither of which says who asked for what.

`/metrics` shows vLLM's own beside these. A log line is JSON: when, how long each part took, how
many items were asked for and how it ended; no user, no item, no title, no address.
"""

import json
import logging
import sys
from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from whyrec.serve.guard import Admission

log = logging.getLogger("whyrec.serve")

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What the routes count.

    Args:
        registry: where `/metrics` reads; vLLM's when None.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        to = registry or REGISTRY
        self.registry = to
        self.seconds = Histogram(
            "whyrec_seconds",
            "Latency of the parts of a recommendation: queue, thought, beam, total.",
            ["part"],
            buckets=_SECONDS,
            registry=to,
        )
        self.requests = Counter(
            "whyrec_requests", "Requests by route and HTTP status.", ["route", "status"],
            registry=to,
        )  # fmt: skip
        self.beams = Counter("whyrec_beams", "Beams searched.", registry=to)
        self.items = Counter("whyrec_items", "Items decoded.", registry=to)
        self.legal_items = Counter(
            "whyrec_legal_items", "Decoded items that the catalogue has.", registry=to
        )
        self.legal_share = Gauge(
            "whyrec_legal_share", "Share of decoded items that the catalogue has.", registry=to
        )
        self.ahead = Counter(
            "whyrec_ahead", "Requests for prepared thoughts, by what came of it.", ["result"],
            registry=to,
        )  # fmt: skip
        self.queue = Gauge("whyrec_queue", "Requests that wait for a place.", registry=to)
        self.active = Gauge("whyrec_active", "Requests being answered.", registry=to)
        self.catalogue = Gauge("whyrec_catalogue_items", "Items of the catalogue.", registry=to)
        self.prompt_tokens = Gauge(
            "whyrec_prompt_tokens", "Tokens of the prompts that beams began with.", registry=to
        )
        self.prompt_tokens_known = Gauge(
            "whyrec_prompt_tokens_known", "Those that the prompt cache had.", registry=to
        )
        self._decoded = self._legal = 0

    def watch(self, admission: Admission) -> None:
        """Show an admission's queue."""
        self.queue.set_function(lambda: admission.waiting)
        self.active.set_function(lambda: admission.active)

    def cached(self, statistics: Mapping[str, int]) -> None:
        """Show what the engine says of its prompt cache."""
        self.prompt_tokens.set(statistics["prompt_tokens"])
        self.prompt_tokens_known.set(statistics["prompt_tokens_known"])

    def decoded(self, *, beams: int, items: int, legal: int) -> None:
        """Count what a search found."""
        self.beams.inc(beams)
        self.items.inc(items)
        self.legal_items.inc(legal)
        self._decoded += items
        self._legal += legal
        if self._decoded:
            self.legal_share.set(self._legal / self._decoded)

    def done(self, route: str, status: int, **facts: object) -> None:
        """Count a request and write its log line."""
        self.requests.labels(route, str(status)).inc()
        log.info(json.dumps({"event": route, "status": status, **facts}))

    def took(self, seconds: Mapping[str, float]) -> None:
        """Note how long each part took."""
        for part, value in seconds.items():
            self.seconds.labels(part).observe(value)


def log_to_stderr() -> None:
    """One JSON object a line, on stderr."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Json())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


class _Json(logging.Formatter):
    """Messages that are JSON objects get a time; others, such as tracebacks, become one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        facts = {"time": self.formatTime(record), "level": record.levelname.lower()}
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        return json.dumps(facts | (found if isinstance(found, dict) else {"message": text}))
