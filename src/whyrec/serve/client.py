"""A thin client of `whyrec serve`, on the standard library alone.

    client = Client("http://127.0.0.1:8000")
    answer = client.recommend(["50", "172"], k=5)
    print(answer["trace"], [item["title"] for item in answer["items"]])

    for event, data in client.stream(["50", "172"], think="on"):
        print(data.get("text", ""), end="")           # the thought's words, then the answer

Chat completions and the like are OpenAI's API: use the `openai` client with the same address.
"""

import http.client
import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class ServerError(Exception):
    """An answer other than 2xx.

    Attributes:
        status: of HTTP.
        code: which error it is, e.g. `unknown_item` or `queue_limit`.
        param: the field of the request that is wrong.
    """

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {error.get('message', 'no message')}")
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")


class Client:
    """One server.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        api_key: where the server asks for one.
        timeout: seconds without a sign of life.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, api_key: str = "", timeout: float = 60.0
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address; write it as http://HOST:PORT")
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def recommend(
        self, history: Sequence[Any] | None = None, *, user: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Recommended items.

        Args:
            history: item ids, titles or events, oldest first.
            user: a user whom the server knows.
            options: k, think, exclude, filter, beam_width, since.

        Returns:
            The answer: `items` (id, title, score, sid), `trace`, `timings_ms` and the rest.

        Raises:
            ServerError: for any answer other than 2xx.
            OSError: when the server cannot be reached.
        """
        return self._call("POST", "/v1/recommendations", _asked(history, user, options))

    def stream(
        self, history: Sequence[Any] | None = None, *, user: str | None = None, **options: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """As `recommend`, event by event: ("thought", {"sample", "text"}) as words come, then
        ("recommendations", answer). To stop iterating tells the server to stop too."""
        body = _asked(history, user, options | {"stream": True})
        connection, response = self._open("POST", "/v1/recommendations", body)
        try:
            name = ""
            for raw in response:
                field, _, value = raw.decode("utf-8").rstrip("\r\n").partition(": ")
                if field == "event":
                    name = value
                elif field == "data" and value == "[DONE]":
                    return
                elif field == "data":
                    data = json.loads(value)
                    if name == "error":
                        raise ServerError(data["status"], data["error"])
                    yield name, data
        finally:
            response.close()
            connection.close()

    def items(self, title: str = "", *, limit: int = 20) -> list[dict[str, Any]]:
        """Items whose titles hold some words."""
        query = urllib.parse.urlencode({"title": title, "limit": limit})
        return self._call("GET", f"/v1/items?{query}")["items"]

    def item(self, item_id: str) -> dict[str, Any]:
        """One item."""
        return self._call("GET", f"/v1/items/{urllib.parse.quote(item_id, safe='')}")

    def add_items(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Add items: `item_id` and any of `title`, `brand`, `categories`, `description`."""
        return self._call("POST", "/v1/items", {"items": list(items)})["items"]

    def encode_items(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Replace what is known of items and give them the SIDs that it asks for."""
        return self._call("POST", "/v1/items/encode", {"items": list(items)})["items"]

    def retire_items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Recommend some items no more."""
        return self._call("POST", "/v1/items/retire", {"ids": list(ids)})["items"]

    def healthy(self) -> bool:
        """Whether the server answers requests."""
        try:
            self._call("GET", "/health")
        except (ServerError, OSError, http.client.HTTPException):
            return False
        return True

    def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        connection, response = self._open(method, path, body)
        try:
            return json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: object = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, data, self._headers)
            response = connection.getresponse()
            if response.status >= 300:
                raise ServerError(response.status, _error(response.read()))
        except BaseException:
            connection.close()
            raise
        return connection, response


def _asked(
    history: Sequence[Any] | None, user: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    body = dict(options)
    if history is not None:
        body["history"] = list(history)
    if user is not None:
        body["user"] = user
    return body


def _error(text: bytes) -> Mapping[str, Any]:
    """The error in a body; a proxy's page becomes a message."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        error = text[:200].decode("utf-8", "replace")
    return error if isinstance(error, Mapping) else {"message": str(error)}
