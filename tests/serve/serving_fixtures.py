"""A real decoder behind the routes: what they need of an engine, in this process, without vLLM.

`LocalEngine` answers with `whyrec.decode` on the tiny model of the model folder, and counts what is
under way, so that tests can see it freed. Its thoughts are those of `Recommender`. A test module
takes the fixtures with `pytest_plugins = ("serving_fixtures",)`.
"""

import asyncio
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from conftest import Extended, save_model, text_vectors
from whyrec import Recommender
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.model_folder import ModelFolder, load_model_folder
from whyrec.decode.permitted import Rule
from whyrec.decode.think import Thinker
from whyrec.evaluation.beam_tree import beam_tree
from whyrec.serve.app import make_app
from whyrec.serve.engine import BeamRequest
from whyrec.serve.settings import Limits, ServeSettings
from whyrec.sid import index as index_module
from whyrec.sid.trie import Trie

THOUGHTS = {"samples": 2, "max_tokens": 12, "temperature": 1.0}


class LocalEngine:
    """`whyrec.serve.engine_calls.Engine` on a model of this process."""

    def __init__(self, parts: ModelFolder) -> None:
        self.parts = parts
        self.tries = {0: parts.trie}
        self.pins: Counter[int] = Counter()
        self.info = SimpleNamespace(version=0)
        self.alive = True
        self.delay = 0.0  # seconds a token
        self.thinking = self.beaming = 0
        self.asked: list[BeamRequest] = []
        self.says: list[int] = []  # token ids, in place of what the model would think
        self.hold: asyncio.Event | None = None  # a beam waits for it
        self.thinker = Thinker(self._decoder(0), parts.encoder)

    def _decoder(self, version: int) -> BeamDecoder:
        return BeamDecoder(
            self.parts.model, vocabulary=self.parts.vocabulary, trie=self.tries[version]
        )

    @contextmanager
    def pin(self) -> Iterator[int]:
        version = self.info.version
        self.pins[version] += 1
        try:
            yield version
        finally:
            self.pins[version] -= 1

    async def beam(self, request: BeamRequest) -> list[tuple[int, float]]:
        self._check()
        self.asked.append(request)
        self.beaming += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
            await asyncio.sleep(0)
            assert request.catalogue is not None and self.pins[request.catalogue] > 0
            decoder = self._decoder(request.catalogue)
            rule = Rule(request.excluded, request.allowed, request.prefixes)
            beams = decoder.search(
                decoder.prefill([request.prompt_ids], width=request.width),
                width=request.width,
                permitted=decoder.permitted([rule]),
            )
            pairs = zip(beams.items_UW[0].tolist(), beams.scores_UW[0].tolist(), strict=True)
            return [(item, score) for item, score in pairs if item >= 0][: request.k]
        finally:
            self.beaming -= 1

    async def beam_tree(self, request: BeamRequest) -> list[dict[str, Any]]:
        assert request.catalogue is not None and self.pins[request.catalogue] > 0
        rule = Rule(request.excluded, request.allowed, request.prefixes)
        _, branches = beam_tree(
            self._decoder(request.catalogue), request.prompt_ids, width=request.width, rule=rule
        )
        return [asdict(branch) for branch in branches]

    async def think(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        request_id: str,
    ) -> AsyncIterator[list[int]]:
        self._check()
        assert seed is not None
        self.thinking += 1
        try:
            drawn = self.thinker.think(
                [prompt_ids],
                samples=seed + 1,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=0,
            )
            for token in self.says or drawn.thought(0, seed):
                await asyncio.sleep(self.delay)
                self._check()
                yield [token]
        finally:
            self.thinking -= 1

    async def reload_catalogue(self, folder: Path) -> None:
        version = self.info.version + 1
        self.tries[version] = Trie.load(folder / "trie.safetensors")
        await asyncio.sleep(0)
        self.info.version = version
        for old in [v for v in self.tries if v != version and not self.pins[v]]:
            del self.tries[old]

    async def healthy(self) -> bool:
        return self.alive

    def _check(self) -> None:
        if not self.alive:
            raise RuntimeError("the engine is dead")


@pytest.fixture(scope="session")
def thinking_model(
    prepared_run: Path, extended: Extended, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model, as one that has learnt to think; not to be changed."""
    folder = save_model(tmp_path_factory.mktemp("models") / "activated", prepared_run, extended)
    settings = json.loads((folder / "whyrec.json").read_text())
    settings |= {"stage": "activated", "thoughts": THOUGHTS}
    (folder / "whyrec.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def folder(thinking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may change; texts become vectors as they did for the run."""
    monkeypatch.setattr(index_module, "embed_texts", text_vectors)
    return Path(shutil.copytree(thinking_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def parts(thinking_model: Path) -> ModelFolder:
    """The same, loaded."""
    return load_model_folder(thinking_model, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def recommender(parts: ModelFolder) -> Recommender:
    """What the answers must equal."""
    return Recommender(parts)


@pytest.fixture
def engine(parts: ModelFolder) -> LocalEngine:
    return LocalEngine(parts)


@pytest.fixture
def make(folder: Path, engine: LocalEngine) -> Callable[..., FastAPI]:
    """A function that makes the application with some settings."""

    def make(**settings: object) -> FastAPI:
        return make_app(engine, folder, settings=ServeSettings(**settings))  # type: ignore[arg-type]

    return make


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a socket of this machine, in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until it is so; an AssertionError when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def client(make: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def steady(thinking_model: Path, parts: ModelFolder) -> Iterator[TestClient]:
    """A client of an application that many tests share: they ask, and change nothing."""
    limits = Limits(k=40, beam_width=50, history=60, listed=50)
    app = make_app(LocalEngine(parts), thinking_model, settings=ServeSettings(limits=limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
