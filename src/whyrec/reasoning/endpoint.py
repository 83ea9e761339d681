"""Any OpenAI-compatible endpoint as the writer of rationales.

Requests run in threads; answers go into an append-only log, so that a killed run goes on and pays
for nothing twice. Timeouts, dropped connections, 429 and 5xx are tried again with exponential
backoff, or after the time that `Retry-After` names. Junk answers are counted and passed over. A
budget of requests or tokens, counted over the whole log, ends the run quietly; an endpoint that is
down or refuses ends it with one sentence, and what is done is kept.

    settings = EndpointSettings(url="http://127.0.0.1:8000/v1", model="teacher", max_requests=9_000)
    report = write_with_endpoint(steps, items=items, vectors_ND=vectors_ND, settings=settings,
                                 log=folder / "endpoint.jsonl")
"""

import email.utils
import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from whyrec.catalog.dataset import Item
from whyrec.reasoning.asking import AnswerLog, Question, Step, question, tidy

_WORDS = 30
_LONGEST_WAIT_S = 600.0
_PATIENCE = 3  # requests in a row that fail for good before the endpoint counts as down


@dataclass(frozen=True)
class EndpointSettings:
    """Which endpoint, and how to ask it.

    Attributes:
        url: its base, up to and with `/v1`.
        model: the model's name there.
        key_variable: environment variable that holds the key; none is sent where it is unset.
        threads: requests at once.
        timeout_s: of one request.
        retries: how often a request is tried again.
        backoff_s: wait before the first retry; doubled each time.
        max_requests: budget of requests, retries included; None for no limit.
        max_total_tokens: budget of tokens as the endpoint counts them; no request is sent once it
            is reached. None for no limit.
        max_tokens: of an answer.
        temperature: of the sampling.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    threads: int = 8
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    max_requests: int | None = None
    max_total_tokens: int | None = None
    max_tokens: int = 96
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: {self.url!r} must begin with http:// or https://")
        if self.threads < 1 or self.retries < 0:
            raise ValueError("threads must be at least 1, and retries at least 0")


@dataclass(frozen=True)
class EndpointReport:
    """What became of the steps.

    Attributes:
        answers: by (user, position); None where the answer was of no use. Earlier runs' included.
        counts: of this run: already written, written, junk, failed, requests, tokens, and the
            steps left over when the budget was spent.
    """

    answers: dict[tuple[int, int], str | None]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Reply:
    """The outcome of one step: a text, junk, or a failure, hopeless after all retries."""

    question: Question
    text: str | None = None
    junk: str = ""
    failure: str = ""
    hopeless: bool = False
    requests: int = 0
    tokens: int = 0


class _Refused(Exception):
    """The endpoint will not serve us at all."""


class _Budget:
    """Requests and tokens that may still be spent; threads share it."""

    def __init__(self, settings: EndpointSettings, *, requests: int, tokens: int) -> None:
        self._settings, self._lock = settings, threading.Lock()
        self.requests, self.tokens = requests, tokens

    def take(self) -> bool:
        """Take one request, if there is one left."""
        most_requests, most_tokens = self._settings.max_requests, self._settings.max_total_tokens
        with self._lock:
            if most_requests is not None and self.requests >= most_requests:
                return False
            if most_tokens is not None and self.tokens >= most_tokens:
                return False
            self.requests += 1
            return True

    def spend(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens


def write_with_endpoint(
    steps: Iterable[Step],
    *,
    items: Sequence[Item],
    vectors_ND: np.ndarray,
    settings: EndpointSettings,
    log: Path,
    pruned: int = 10,
) -> EndpointReport:
    """Ask the endpoint for each step that the log has no answer for.

    Args:
        steps: training steps.
        items: the catalogue.
        vectors_ND: item vectors of length 1.
        settings: which endpoint, and how to ask.
        log: the JSONL file of answers.
        pruned: k, history items that the endpoint is shown.

    Raises:
        ValueError: when the endpoint cannot be reached, refuses the key or does not know the model,
            or when the log belongs to other questions.
    """
    asked = {"model": settings.model, "temperature": settings.temperature, "pruned": pruned}
    answers = AnswerLog(log, asked=asked | {"max_tokens": settings.max_tokens})
    done = answers.answers()
    steps = list(steps)
    left = [step for step in steps if step.key not in done]
    questions = (
        question(step, items, vectors_ND=vectors_ND, words=_WORDS, k=pruned) for step in left
    )
    counts: Counter[str] = Counter({"already written": len(steps) - len(left)})
    spent = _Budget(
        settings,
        requests=sum(row.get("requests", 0) for row in answers.rows),
        tokens=sum(row.get("tokens", 0) for row in answers.rows),
    )
    failures = 0
    bar = tqdm(total=len(left), desc="rationales", unit="step", file=sys.stderr)
    try:
        for reply in _replies(questions, settings, spent):
            failures = failures + 1 if reply.hopeless else 0
            _note(reply, answers, counts)
            bar.update()
            if failures >= _PATIENCE:
                raise _Refused(f"does not answer ({reply.failure})")
    except _Refused as reason:
        raise ValueError(
            f"the endpoint {settings.url} {reason}; {len(answers.answers())} answers are kept in "
            f"{log}: mend it and run the same command again to go on"
        ) from None
    finally:
        bar.close()
    reached = counts["written"] + counts["junk"] + counts["failed"]
    counts["left over"] = len(left) - reached
    return EndpointReport(answers.answers(), dict(counts))


def _note(reply: _Reply, log: AnswerLog, counts: Counter[str]) -> None:
    spent = {"requests": reply.requests, "tokens": reply.tokens}
    counts.update(spent)
    if reply.failure:
        counts["failed"] += 1
        log.add(reply.question.key, failed=reply.failure, **spent)
    elif reply.text is None:
        counts["junk"] += 1
        log.add(reply.question.key, text=None, junk=reply.junk, **spent)
    else:
        counts["written"] += 1
        log.add(reply.question.key, text=reply.text, **spent)


def _replies(
    questions: Iterator[Question], settings: EndpointSettings, budget: _Budget
) -> Iterator[_Reply]:
    """Replies in the order in which they come, `threads` requests at a time."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(settings.threads)
    running: set[Future[_Reply | None]] = set()
    try:
        spent = False
        while True:
            while not spent and len(running) < settings.threads:
                one = next(questions, None)
                if one is None:
                    break
                running.add(pool.submit(_ask, one, settings, budget, stop))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                reply = future.result()
                spent = spent or reply is None
                if reply is not None:
                    yield reply
    finally:
        stop.set()  # threads that wait for their next try wake up and go
        pool.shutdown(cancel_futures=True)


def _ask(
    one: Question, settings: EndpointSettings, budget: _Budget, stop: threading.Event
) -> _Reply | None:
    """Ask one question until it is answered or the retries are used up; None: no budget left."""
    failure, requests = "", 0
    for attempt in range(settings.retries + 1):
        if stop.is_set() or not budget.take():
            return _Reply(one, failure=failure, requests=requests) if requests else None
        requests += 1
        pause = settings.backoff_s * 2**attempt * random.uniform(0.75, 1.25)
        try:
            text, junk, tokens = _read(_post(one, settings))
            budget.spend(tokens)
            return _Reply(one, text, junk, requests=requests, tokens=tokens)
        except urllib.error.HTTPError as error:
            failure = f"HTTP {error.code}{_message(error)}"
            if error.code < 400 or error.code in (401, 403, 404, 405):
                raise _Refused(
                    f"refuses ({failure}; check url, model {settings.model!r} and the key in "
                    f"{settings.key_variable})"
                ) from None
            if error.code < 500 and error.code not in (408, 425, 429):
                break  # it will not like this request any better another time
            pause = _retry_after(error) if error.headers.get("Retry-After") else pause
        except (OSError, http.client.HTTPException) as error:
            failure = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt < settings.retries:
            stop.wait(min(pause, _LONGEST_WAIT_S))
    return _Reply(one, failure=failure, hopeless=True, requests=requests)


def _post(one: Question, settings: EndpointSettings) -> bytes:
    body = {
        "model": settings.model,
        "messages": one.messages(),
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(settings.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        settings.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=settings.timeout_s) as response:
        return response.read()


def _read(body: bytes) -> tuple[str | None, str, int]:
    """Text (None for junk), what is wrong with it, and the tokens that it cost."""
    try:
        answer: Any = json.loads(body)
        usage = answer.get("usage") or {}
        tokens = int(usage.get("total_tokens") or 0)
        choice = answer["choices"][0]
        content = choice["message"]["content"]
        text = tidy(content)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None, "not a chat completion", 0
    if not text:
        return None, "empty answer", tokens
    if choice.get("finish_reason") == "length":
        return None, "cut off", tokens
    return text, "", tokens


def _message(error: urllib.error.HTTPError) -> str:
    """What the endpoint says of an error, shortly."""
    try:
        said = json.loads(error.read())
        message = (
            said["error"]["message"] if isinstance(said.get("error"), dict) else said["message"]
        )
        return f": {' '.join(str(message).split())[:160]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException):
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds to wait: `Retry-After` as seconds or as a date."""
    value = error.headers["Retry-After"].strip()
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 1.0
