"""Typed errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

    raise ServeError("no item has the id '7'", code="unknown_item", param="history", status=404)

Clients of OpenAI's API know these: `openai.BadRequestError`, `NotFoundError`, `RateLimitError` and
`InternalServerError` follow from the status; `code` says which of our errors it is.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from whyrec.serve.schema import ErrorAnswer

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "the request is not well-formed, or above a limit, which `code` names",
        401: "no API key, or a wrong one",
        404: "an item or a user that the server does not know",
        409: "the catalogue is not in the state that the change asks for",
        413: "the body is above the limit",
        429: "too many requests wait; come again after `Retry-After` seconds",
        500: "a fault of the server",
        503: "the engine has stopped, or the server is about to",
    }.items()
}
_log = logging.getLogger("whyrec.serve")
_SHOWN = 200  # characters of somebody's value that an error repeats


class ServeError(Exception):
    """An answer other than 2xx.

    Args:
        message: one sentence that says what to do.
        code: which error it is, for programs.
        status: of HTTP.
        param: the field of the request that is wrong.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int = 400,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.status, self.param = message, code, status, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """What the client is sent."""
        if self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = self.message.encode("utf-8", "replace").decode()  # a lone surrogate is no text
        param = self.param and self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as an HTTP response."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return JSONResponse(self.body, status_code=self.status, headers=headers)


def over_limit(name: str, value: int, limit: int, *, param: str, status: int = 400) -> ServeError:
    """The error for a value above one of the server's limits, which it names."""
    return ServeError(
        f"{param} is {value:,}, above this server's limit {name} of {limit:,}; ask for less",
        code=f"{name}_limit",
        status=status,
        param=param,
    )


def fault() -> ServeError:
    """The error for what should not have happened; the log says what it was."""
    return ServeError("a fault of the server; its log says more", code="fault", status=500)


def engine_stopped() -> ServeError:
    """The error for all that a dead engine leaves unanswered."""
    return ServeError(
        "the engine has stopped; ask again when /health is green",
        code="engine_stopped",
        status=503,
    )


def shown(value: object) -> str:
    """A value of the request as an error repeats it: quoted, and not endlessly."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class TypedRoute(APIRoute):
    """A route whose request errors have our format, whatever the application's handlers say."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_typed(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _invalid(error.errors()).response()
            except ServeError as error:
                return error.response()
            except HTTPException as error:
                return _of_http(error).response()
            except Exception:
                _log.exception("a request failed")
                return fault().response()

        return handle_typed


def add_handlers(app: FastAPI) -> None:
    """Give an application of our own the same format for paths that do not exist."""

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _of_http(error).response()

    app.add_exception_handler(HTTPException, of_http)


def _of_http(error: HTTPException) -> ServeError:
    return ServeError(str(error.detail), code=f"http_{error.status_code}", status=error.status_code)


def _invalid(errors: Sequence[Any]) -> ServeError:
    """The first error of a request that does not follow the schema."""
    first = errors[0]
    # ("body", "history", 0, "Event", "timestamp"): which union member was tried is no field's name.
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    fields = [part for part in place if (part.isidentifier() and part.islower()) or part.isdigit()]
    fields = [part for part in fields if part not in ("str", "bool", "literal")]
    param = ".".join(fields) or None
    reason = f"{param or 'the body'}: {first['msg']}"
    if first["type"] not in ("json_invalid", "missing") and "input" in first:
        reason += f", not {shown(first['input'])}"
    return ServeError(reason, code="invalid_request", param=param)
