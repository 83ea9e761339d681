"""Errors in OpenAI's format, whatever goes wrong and wherever."""

import pytest

pytest.importorskip("fastapi")

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from whyrec.serve.errors import ServeError, TypedRoute, add_handlers, over_limit


class Body(BaseModel):
    number: int


@pytest.fixture
def client():
    router = APIRouter(route_class=TypedRoute)

    @router.post("/number")
    def number(body: Body) -> int:
        return body.number

    @router.get("/raise/{what}")
    def fail(what: str) -> None:
        raise {
            "ours": ServeError("too many", code="queue_limit", status=429, retry_after=2),
            "http": HTTPException(418, "teapot"),
            "bug": KeyError("private"),
        }[what]

    app = FastAPI()
    app.router.routes.extend(router.routes)
    add_handlers(app)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_every_error_has_the_same_four_fields(client) -> None:
    answers = [
        client.get("/raise/ours"),
        client.get("/raise/http"),
        client.get("/raise/bug"),
        client.get("/nowhere"),
        client.put("/number"),
        client.post("/number", json={"number": "x"}),
        client.post("/number", content=b"{"),
    ]
    assert [a.status_code for a in answers] == [429, 418, 500, 404, 405, 400, 400]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert "private" not in answer.text
    assert answers[0].headers["retry-after"] == "2"
    assert [answers[n].json()["error"]["type"] for n in (0, 1, 2)] == [
        "rate_limit_error",
        "invalid_request_error",
        "server_error",
    ]


def test_an_error_of_the_schema_names_the_field_and_repeats_little(client) -> None:
    error = client.post("/number", json={"number": "x" * 10_000}).json()["error"]
    assert error["param"] == "number" and len(error["message"]) < 400


def test_a_text_that_is_none_can_still_be_sent() -> None:
    body = ServeError("half of a pair: \ud800", code="x", param="\ud800").body
    assert body["error"]["message"].encode() and body["error"]["param"].encode()


def test_the_openai_client_knows_them(client) -> None:
    openai = pytest.importorskip("openai")
    asked = openai.OpenAI(api_key="x", base_url="http://test", max_retries=0, http_client=client)
    with pytest.raises(openai.RateLimitError) as caught:
        asked.get("/raise/ours", cast_to=object)
    assert caught.value.code == "queue_limit" and caught.value.type == "rate_limit_error"


def test_a_limit_is_named() -> None:
    error = over_limit("k", 5_000, 100, param="k")
    assert (error.status, error.code) == (400, "k_limit")
    assert "5,000" in error.message and "limit k of 100" in error.message
