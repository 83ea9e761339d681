"""The thin client against a server on a socket."""

import http.server
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("vllm")

from serving_fixtures import listening, wait_for

from whyrec.serve.client import Client, ServerError

pytest_plugins = ("serving_fixtures",)
HISTORY = ["item003", "item004"]


@pytest.fixture
def server(make):
    with listening(make(api_key="secret")) as address:
        yield Client(address, api_key="secret")


def test_it_asks_for_recommendations(server, recommender) -> None:
    answer = server.recommend(HISTORY, k=4, exclude=[])
    wanted = recommender.recommend(HISTORY, k=4, exclude=[])
    assert [item["id"] for item in answer["items"]] == [entry.item_id for entry in wanted]


def test_it_streams_words_and_then_the_answer(server) -> None:
    events = list(server.stream(HISTORY, think="on", k=2))
    assert [name for name, _ in events[:-1]] == ["thought"] * (len(events) - 1)
    name, answer = events[-1]
    assert name == "recommendations" and len(answer["items"]) == 2
    said = {n: "".join(data["text"] for _, data in events[:-1] if data["sample"] == n)
            for n in (0, 1)}  # fmt: skip
    assert answer["trace"] in said.values()


def test_to_stop_listening_frees_the_thought(server, engine) -> None:
    engine.delay = 0.3
    events = server.stream(HISTORY, think="on")
    next(events)
    assert engine.thinking == 2
    events.close()
    wait_for(lambda: not engine.thinking)
    assert not engine.asked


def test_it_changes_items(server) -> None:
    (added,) = server.add_items([{"item_id": "a/b c?", "title": "Odd"}])
    assert server.item("a/b c?") == added
    assert server.items("odd") == [added]
    (gone,) = server.retire_items(["a/b c?"])
    assert gone["retired"] and server.items("odd") == []
    (encoded,) = server.encode_items([{"item_id": "item001", "title": "Other"}])
    assert encoded["title"] == "Other"


def test_errors_say_what_is_wrong(server) -> None:
    with pytest.raises(ServerError, match="no item 'nope'") as caught:
        server.recommend(["nope"])
    assert (caught.value.status, caught.value.code) == (404, "unknown_item")
    assert caught.value.param == "history.0"
    with pytest.raises(ServerError) as caught:
        next(server.stream(["nope"]))
    assert caught.value.status == 404


def test_health(server, engine) -> None:
    assert server.healthy()
    engine.alive = False
    assert not server.healthy()
    assert not Client("http://127.0.0.1:9", timeout=1).healthy()


def test_a_key_is_asked_for(make) -> None:
    with listening(make(api_key="secret")) as address:
        with pytest.raises(ServerError) as caught:
            Client(address).recommend([])
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_a_page_of_a_proxy_is_an_error_too() -> None:
    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(502, "no")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.handle_request, daemon=True).start()
        with pytest.raises(ServerError, match="502"):
            Client(f"http://127.0.0.1:{proxy.server_port}").recommend([])


def test_an_address_is_checked() -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Client("localhost:8000")
