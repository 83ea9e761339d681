"""What stands in front of the routes: the API key, the size of a body, a bounded queue."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whyrec.serve.errors import ServeError, engine_stopped, over_limit

# Probes and the page ask without a key. vLLM's own check covers /v1 and leaves /invocations,
# /tokenize and /metrics open; ours covers every other path.
_OPEN_PATHS = ("/", "/health")
_OPEN_PREFIX = "/static/"


class Guard:
    """ASGI middleware: refuses requests without the key, and bodies above the limit.

    A body is read up to the limit before the application sees it, whatever length it claims.

    vLLM's own routes answer 500 when the engine dies under them; here that becomes our 503.

    Args:
        app: what is guarded.
        api_key: the bearer token asked for; none when empty.
        body_bytes: limit of a body.
        healthy: whether the engine lives.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str,
        body_bytes: int,
        healthy: Callable[[], Awaitable[bool]],
    ) -> None:
        self.app, self.body_bytes, self._healthy = app, body_bytes, healthy
        self._key = _digest(api_key) if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._may_enter(scope, headers):
            error = ServeError(
                "this server asks for an API key; send `Authorization: Bearer KEY`",
                code="invalid_api_key",
                status=401,
            )
            await error.response()(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        claimed = headers.get("content-length", "")
        size = int(claimed) if claimed.isdecimal() and len(claimed) < 20 else 0
        if size <= self.body_bytes:
            body = bytearray()
            more = size > 0 or "transfer-encoding" in headers
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return  # gone before the request was whole
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > self.body_bytes:
                    break
            size = len(body)
            if size <= self.body_bytes:
                answer = self._unless_dead(scope, receive, send)
                await self.app(scope, _replay(bytes(body), receive), answer)
                return
        error = over_limit("body_bytes", size, self.body_bytes, param="body", status=413)
        await error.response()(scope, receive, send)

    def _unless_dead(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """A `send` that replaces a fault by a 503 if it is the engine that is at fault."""
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return
            is_fault = message["type"] == "http.response.start" and message["status"] == 500
            if is_fault and not await self._healthy():
                replaced = True
                await engine_stopped().response()(scope, receive, send)
                return
            await send(message)

        return answer

    def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._key is None or path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(_digest(token), self._key)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what the client does next."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class Admission:
    """So many requests at once, so many that wait; the rest is told to come again.

    Attributes:
        active: requests being answered.
        waiting: requests in the queue.
        draining: no more are let in.
    """

    def __init__(self, *, concurrency: int, queue: int) -> None:
        self.concurrency, self.queue = concurrency, queue
        self.active = self.waiting = 0
        self.draining = False
        self._places = asyncio.Semaphore(concurrency)
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """One of the places, for as long as it is held; the seconds spent waiting for it.

        Raises:
            ServeError: 429 when the queue is full, 503 when the server is about to stop.
        """
        if self.draining:
            raise ServeError(
                "this server is stopping; ask another one", code="stopping", status=503
            )
        if self._places.locked() and self.waiting >= self.queue:
            raise ServeError(
                f"{self.concurrency} requests are being answered and {self.waiting} wait, which "
                f"is this server's limit queue of {self.queue}; try again in a second",
                code="queue_limit",
                status=429,
                retry_after=1,
            )
        start = time.monotonic()
        self.waiting += 1
        self._empty.clear()
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
            self._note_if_empty()
        self.active += 1
        self._empty.clear()
        try:
            yield time.monotonic() - start
        finally:
            self.active -= 1
            self._places.release()
            self._note_if_empty()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in any more and wait for those inside; whether all were done in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _note_if_empty(self) -> None:
        if self.active == 0 and self.waiting == 0:
            self._empty.set()
