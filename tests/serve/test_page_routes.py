"""What the page asks of the server: its files, what the model can do, users, the beam as a tree."""

import math

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("vllm")  # the engine's requests lie beside what talks to vLLM

from starlette.testclient import TestClient

from conftest import NUM_ITEMS
from whyrec.catalog.dataset import Dataset
from whyrec.serve.page import FOLDER
from whyrec.serve.settings import Limits

pytest_plugins = ("serving_fixtures",)

ASK = "/v1/recommendations"
HISTORY = ["item003", "item004", "item005"]


def leaves(branches: list[dict], above: float = 0.0) -> dict[str, tuple[str, float]]:
    """Title and score of the items in a tree by id, the scores multiplied along the paths."""
    found = {}
    for branch in branches:
        total = above + math.log(branch["probability"])
        assert branch["log_prob"] == pytest.approx(total, abs=1e-4)
        below = leaves(branch["children"], total)
        assert branch["left"] == (branch["id"] is None and not below)
        found |= below
        if branch["id"] is not None:
            found[branch["id"]] = branch["title"], total
    return found


def test_the_files_are_there_for_everybody_with_a_strict_policy(make) -> None:
    with TestClient(make(api_key="secret")) as client:
        names = [path.name for path in FOLDER.iterdir()]
        for path in ("/", *(f"/static/{name}" for name in names)):
            answer = client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert client.get("/static/../page.py").status_code in (401, 404)
        for path in ("/v1/about", "/v1/users/u03", "/v1/items?title=film"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer secret"}).status_code != 401


def test_it_says_what_the_model_can_do(steady) -> None:
    assert steady.get("/v1/about").json() == {
        "object": "about",
        "model": "activated",
        "items": NUM_ITEMS,
        "thoughts": 2,
        "max_history": 8,
        "users": False,
        "limits": {"k": 40, "beam_width": 50, "history": 60},
    }


def test_users_of_the_run_are_told_with_their_history(make, prepared_run) -> None:
    dataset = Dataset.load(prepared_run / "dataset")
    ids = [dataset.items[n].item_id for n in dataset.sequences[dataset.user_index["u03"]]]
    with TestClient(make(run=str(prepared_run), limits=Limits(history=4))) as client:
        assert client.get("/v1/about").json()["users"] is True
        known = client.get("/v1/users/u03").json()
        assert (known["id"], known["events"]) == ("u03", len(ids))
        assert [item["id"] for item in known["history"]] == ids[-4:]
        error = client.get("/v1/users/nobody").json()["error"]
        assert error["code"] == "unknown_user"
    with TestClient(make()) as client:
        answer = client.get("/v1/users/u03")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_users")


@pytest.mark.parametrize("think", [False, True])
def test_the_tree_holds_the_items_and_their_scores(steady, think) -> None:
    asked = {"history": HISTORY, "think": think, "k": 5, "beam_width": 8}
    plain = steady.post(ASK, json=asked).json()
    answer = steady.post(ASK, json=asked | {"tree": True}).json()
    assert plain["tree"] is None and plain["items"] == answer["items"]
    assert plain["trace"] == answer["trace"]
    found = leaves(answer["tree"])
    assert len(found) == 8 and not set(HISTORY) & set(found)
    assert all(title == f"Film {int(item[4:])}" for item, (title, _) in found.items())
    if not think:  # with two thoughts the scores are those of their mixture
        for item in answer["items"]:
            assert found[item["id"]][1] == pytest.approx(item["score"], abs=1e-4)


def test_the_tree_keeps_to_the_filter(steady) -> None:
    asked = {"history": HISTORY, "tree": True, "filter": {"category": "Genre 1"}}
    found = leaves(steady.post(ASK, json=asked).json()["tree"])
    assert set(found) == {f"item{n:03d}" for n in range(1, NUM_ITEMS, 5)}
    nothing = {"items": ["item012"], "category": "Genre 1"}
    assert steady.post(ASK, json=asked | {"filter": nothing}).json()["tree"] == []


def test_facts_of_the_trace_are_told_with_who_bears_them(client, engine, parts) -> None:
    engine.says = parts.encoder.text("The history shares Genre 3; Genre 2. Next: Genre 4.")
    history = ["item000"] * 6 + ["item003", "item004", "item008"]  # the model reads 8 of 9
    asked = {"history": history, "think": True, "k": 3, "filter": {"category": "Genre 4"}}
    assert client.post(ASK, json=asked).json()["facts"] is None
    answer = client.post(ASK, json=asked | {"facts": True}).json()
    shared, untrue, announced = answer["facts"]
    assert answer["trace"][shared["start"] : shared["end"]] == shared["name"] == "Genre 3"
    assert (shared["clause"], shared["true"], shared["history"]) == ("evidence", True, [6, 8])
    assert (untrue["name"], untrue["true"], untrue["history"]) == ("Genre 2", False, [])
    assert (announced["clause"], announced["true"]) == ("next", True)
    assert announced["history"] == [7] and announced["ranks"] == [1, 2, 3]
    plain = client.post(ASK, json=asked | {"facts": True, "think": False}).json()
    assert plain["facts"] == []


def test_a_search_finds_ids_then_phrases_then_words(steady) -> None:
    def found(words: str) -> list[str]:
        answer = steady.get("/v1/items", params={"title": words, "limit": 4})
        return [item["title"] for item in answer.json()["items"]]

    assert found("item007") == ["Film 7"]
    assert found("FILM  2") == ["Film 2", "Film 20", "Film 21", "Film 22"]
    assert found("29 film") == ["Film 29"]
    assert found("film nothing") == []
