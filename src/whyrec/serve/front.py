"""The socket that clients reach. It outlives the server behind it, so nobody is left unanswered.

Bytes go to and from vLLM's Unix socket as they are, one connection there for each one here. Where
that socket is not there, or closes before it has answered, the client gets a 503 in OpenAI's error
format, whose code says why: `loading`, `engine_stopped` or `stopping`.

    front = Front("/tmp/private/socket")
    await front.listen("127.0.0.1", 8000)
    front.state = "engine_stopped"
    await front.close()

The standard library alone: this runs in the supervising process, which is to stay small.
"""

import asyncio
import contextlib
import json
from typing import Any, Literal

State = Literal["loading", "engine_stopped", "stopping"]
MESSAGES: dict[State, str] = {
    "loading": "the model is being loaded; try again",
    "engine_stopped": "the engine has stopped; ask again when /health is green",
    "stopping": "this server is stopping; ask another one",
}
_KEPT_BYTES = 2 << 20  # of a request that may have to be sent again
_LAST_SECONDS = 2.0  # for a client to read its 503
_BACKLOG = 2_048
_LOOK_SECONDS = 1.0


def refusal(state: State) -> bytes:
    """The 503 as it is sent."""
    error = {
        "message": MESSAGES[state],
        "type": "server_error",
        "param": None,
        "code": state,
    }
    body = json.dumps({"error": error}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


class Front:
    """Listens, and answers for a server that cannot.

    Args:
        path: the server's Unix socket.
        encrypted: the bytes are TLS that the server ends itself; a 503 cannot be put among them, so
            such a connection is only closed.

    Attributes:
        state: why there is nobody behind the socket, when there is nobody.
        reached: connections to the server that were made since it was last set to 0.
    """

    def __init__(self, path: str, *, encrypted: bool = False) -> None:
        self.path, self.encrypted = path, encrypted
        self.state: State = "loading"
        self.reached = 0
        self.clients: set[_Client] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        return self._server.sockets[0].getsockname()[1]

    async def listen(self, host: str, port: int) -> None:
        """Begin.

        Raises:
            OSError: when the address is in use, or not this machine's.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Client(self), host or None, port, backlog=_BACKLOG
        )

    async def wait_until_up(self) -> None:
        """Look every second, until there is a server behind the socket."""
        while not self.reached:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_unix_connection(self.path)
                writer.close()
                self.reached += 1
            await asyncio.sleep(_LOOK_SECONDS)

    async def close(self) -> None:
        """End, once every client has what there is for it."""
        end = asyncio.get_running_loop().time() + _LAST_SECONDS
        while self.clients and asyncio.get_running_loop().time() < end:
            for client in list(self.clients):
                client.end()
            await asyncio.sleep(0.05)
        if self._server is not None:
            self._server.close()


class _Half(asyncio.Protocol):
    """One side of a connection; a slow reader on it slows the writer on the other."""

    transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def other(self) -> "_Half | None":
        raise NotImplementedError

    def pause_writing(self) -> None:
        other = self.other()
        if other is not None and other.transport is not None:
            other.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self.other()
        if other is not None and other.transport is not None:
            other.transport.resume_reading()


class _Client(_Half):
    """A client's connection."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._backend: _Backend | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unanswered = bytearray()  # since the server last said something
        self._again = True  # whether what is unanswered may be sent once more
        self._over = False

    def other(self) -> _Half | None:
        return self._backend

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._front.clients.add(self)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return  # it was refused; what it still sends is read, lest it is reset
        self._unanswered += data
        if self._backend is not None:
            self._backend.transport.write(data)
        elif self._connecting is None:
            self._connecting = asyncio.ensure_future(self._connect())
        if len(self._unanswered) > _KEPT_BYTES and self._backend is not None:
            self._again = False
            del self._unanswered[1:]  # that there is something is enough

    def connection_lost(self, error: Exception | None) -> None:
        self._over = True
        self._front.clients.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        if self._backend is not None:
            self._backend.transport.close()  # frees what the server does for it

    def answered(self, data: bytes) -> None:
        """The server says something."""
        self._unanswered.clear()
        self._again = True
        if not self._over:
            self.transport.write(data)

    def left(self) -> None:
        """The server has closed its side."""
        self._backend = None
        if self._over:
            return
        if not self._unanswered:  # an idle connection, or a whole answer, or a broken one
            self._over = True
            self.transport.close()
        elif self._again:  # closed as idle just when a request came
            self._again = False
            self._connecting = asyncio.ensure_future(self._connect())
        else:
            self._refuse()

    def end(self) -> None:
        """Refuse what is unanswered, close what is idle."""
        if not self._over and self._backend is None and self._connecting is None:
            if self._unanswered:
                self._refuse()
            else:
                self._over = True
                self.transport.close()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, backend = await loop.create_unix_connection(lambda: _Backend(self), self._front.path)
        except OSError:
            self._refuse()
            return
        finally:
            self._connecting = None
        self._front.reached += 1
        self._backend = backend
        backend.transport.write(bytes(self._unanswered))

    def _refuse(self) -> None:
        if self._over:
            return
        self._over = True
        if self._front.encrypted:
            self.transport.close()
            return
        self.transport.write(refusal(self._front.state))
        # To close now, with something unread, would reset the connection and lose the answer.
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(_LAST_SECONDS, self.transport.close)


class _Backend(_Half):
    """The server's side of a client's connection."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    def other(self) -> _Half | None:
        return self._client

    def data_received(self, data: bytes) -> None:
        self._client.answered(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.left()
