"""The asynchronous facade over a vLLM engine in a process of its own."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_models import one_served, started_client

from whyrec import Recommender
from whyrec.decode.permitted import Rule
from whyrec.decode.think import Thinker
from whyrec.sid.trie import Trie

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'whyrec[serve-cpu]'")
pytestmark = pytest.mark.serve

Run = Callable[[Any], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for the whole file: an engine belongs to the loop that made it."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def served_folder(prepared_run, tokenizer) -> Path:
    return one_served(prepared_run, tokenizer)


@pytest.fixture(scope="module")
def recommender(served_folder: Path) -> Recommender:
    return Recommender.from_pretrained(served_folder, device="cpu")


@pytest.fixture(scope="module")
def client(run: Run, served_folder: Path) -> Iterator[Any]:
    with started_client(run, served_folder) as client:
        yield client


@pytest.fixture(scope="module")
def engine(run: Run, client: Any) -> Any:
    from whyrec.serve.engine import ServingEngine

    engine = ServingEngine(client, wait_ms=5.0)
    info = run(engine.start())
    assert info.num_items == 30 and info.level_sizes == [4, 4, 4]
    return engine


def request(recommender: Recommender, history: list[int], **more: Any) -> Any:
    from whyrec.serve.engine import BeamRequest

    prompt = recommender.encoder.recommendation_prompt(history)
    return BeamRequest(**({"prompt_ids": prompt, "width": 8, "k": 5} | more))


def reference(recommender: Recommender, asked: Any) -> list[tuple[int, float]]:
    decoder = recommender.decoder
    permitted = decoder.permitted([Rule(asked.excluded, asked.allowed, asked.prefixes)])
    prefilled = decoder.prefill([asked.prompt_ids], width=asked.width)
    beams = decoder.search(prefilled, width=asked.width, permitted=permitted)
    pairs = zip(beams.items_UW[0].tolist(), beams.scores_UW[0].tolist(), strict=True)
    return [(item, score) for item, score in pairs if item >= 0][: asked.k]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [item for item, _ in found] == [item for item, _ in expected]
    scores = [score for _, score in expected]
    assert [score for _, score in found] == pytest.approx(scores, abs=1e-4)


def test_many_at_once_are_few_calls_and_each_is_right(run, engine, recommender) -> None:
    rng = np.random.default_rng(0)
    asked = [
        request(
            recommender,
            rng.integers(0, 30, 1 + n % 6).tolist(),
            width=3 + n % 3,
            k=1 + n % 3,
            excluded=rng.integers(0, 30, n % 5).tolist(),
            allowed=None if n % 4 else list(range(0, 30, 2)),
            prefixes=None if n % 5 else [[0], [1, 2], [3]],
        )
        for n in range(20)
    ]
    calls: list[int] = []
    client = engine._client

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        async def collective_rpc(self, method: str, **options: Any) -> Any:
            calls.append(len(options["args"][1]))
            return await client.collective_rpc(method, **options)

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.beam(one) for one in asked))

    engine._client = Counting()
    try:
        answers = run(together())
    finally:
        engine._client = client
    assert sum(calls) == 20 and len(calls) <= 3
    for one, found in zip(asked, answers, strict=True):
        same(found, reference(recommender, one))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt_ids": [10**6]}, "prompt holds 1000000, outside 0"),
        ({"prompt_ids": [-1]}, "prompt holds -1, outside 0"),
        ({"prompt_ids": []}, "prompt has 0 tokens"),
        ({"prompt_ids": [5] * 254}, "prompt has 254 tokens; this server takes 1 to 253"),
        ({"prompt_ids": ["x"]}, "whole numbers"),
        ({"width": 0}, "width must lie in 1"),
        ({"width": 5_000}, "width must lie in 1"),
        ({"k": 9}, "k must lie in 1 .. 8"),
        ({"excluded": [30]}, "excluded holds 30, outside 0 .. 29"),
        ({"allowed": [3, -2]}, "allowed holds -2"),
        ({"prefixes": [[4]]}, "prefixes holds 4, outside 0 .. 3"),
        ({"prefixes": [[0, 0, 0, 0]]}, "a SID has 3 codes"),
        ({"catalogue": 99}, "catalogue 99 is gone"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_worker_must_not_see(run, engine, recommender, more: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(engine.beam(request(recommender, [1], **more)))


def think(engine: Any, prompt: list[int], **options: Any) -> Any:
    usual = {"max_tokens": 12, "temperature": 0.0, "seed": 0, "request_id": "thought"}

    async def all_of_it() -> list[list[int]]:
        return [part async for part in engine.think(prompt, **(usual | options))]

    return all_of_it()


def test_a_greedy_thought_equals_the_offline_one(run, engine, recommender) -> None:
    thinker = Thinker(recommender.decoder, recommender.encoder)
    for n, history in enumerate(([1, 2, 3], [9], [4, 4])):
        prompt = recommender.encoder.thinking_prompt(history)
        offline = thinker.think([prompt], samples=1, max_tokens=12, temperature=0.0, seed=0)
        parts = run(think(engine, prompt, request_id=f"greedy-{n}"))
        assert len(parts) > 1 or len(parts[0]) <= 1  # it comes token by token
        assert [token for part in parts for token in part] == offline.thought(0, 0)


def test_sampled_thoughts_hold_text_alone_and_depend_on_the_seed(run, engine, recommender) -> None:
    encoder = recommender.encoder
    prompt, tokenizer = encoder.thinking_prompt([2, 7]), encoder.tokenizer
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    drawn = [
        [
            token
            for part in run(think(engine, prompt, temperature=1.0, seed=seed, request_id=f"s{n}"))
            for token in part
        ]
        for n, seed in enumerate((1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not control & {token for ids in drawn for token in ids}
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        run(think(engine, prompt, max_tokens=0))
    with pytest.raises(ValueError, match="prompt holds"):
        run(think(engine, [10**7]))


def unfinished(client: Any) -> int:
    return client.output_processor.get_num_unfinished_requests()


def test_leaving_a_thought_frees_its_request(run, engine, client, recommender) -> None:
    prompt = recommender.encoder.thinking_prompt([2])

    async def leave_early() -> None:
        stream = engine.think(prompt, max_tokens=150, temperature=1.0, seed=3, request_id="left")
        async for _ in stream:
            assert unfinished(client) == 1
            break
        await stream.aclose()

    async def cancelled() -> None:
        task = asyncio.ensure_future(think(engine, prompt, max_tokens=150, request_id="gone"))
        while not unfinished(client):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def settled() -> int:
        for _ in range(200):
            if not unfinished(client):
                break
            await asyncio.sleep(0.01)
        return unfinished(client)

    for leave in (leave_early, cancelled):
        run(leave())
        assert run(settled()) == 0


def test_a_cancelled_beam_leaves_the_others_alone(run, engine, recommender) -> None:
    async def one_leaves() -> Any:
        tasks = [asyncio.ensure_future(engine.beam(request(recommender, [n]))) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, gone, last = run(one_leaves())
    assert isinstance(gone, asyncio.CancelledError)
    same(first, reference(recommender, request(recommender, [0])))
    same(last, reference(recommender, request(recommender, [2])))
    assert engine.queued == 0


def test_a_catalogue_changes_under_requests(
    run, engine, recommender, served_folder, tmp_path
) -> None:
    fewer, broken = tmp_path / "fewer", tmp_path / "broken"
    for folder in (fewer, broken):
        folder.mkdir()
    sizes = recommender.decoder.trie.level_sizes
    Trie.build(recommender._codes_NL[6:], level_sizes=sizes).save(fewer / "trie.safetensors")
    Trie.build(recommender._codes_NL[:1, :2], level_sizes=sizes[:2]).save(
        broken / "trie.safetensors"
    )
    asked = request(recommender, [1], width=30, k=30)

    async def change() -> None:
        with engine.pin() as old:
            before = asyncio.ensure_future(engine.beam(asked))
            await asyncio.sleep(0)
            await engine.reload_catalogue(fewer)
            assert engine.info.num_items == 24 and engine.info.version != old
            same(await before, reference(recommender, asked))
            pinned = request(recommender, [1], width=30, k=30, catalogue=old)
            same(await engine.beam(pinned), reference(recommender, asked))
            new = await engine.beam(asked)
            assert sorted(item for item, _ in new) == list(range(24))
        with pytest.raises(ValueError, match="is gone"):
            await engine.beam(pinned)
        with pytest.raises(ValueError, match="the model's codebooks"):
            await engine.reload_catalogue(broken)
        assert engine.info.num_items == 24
        await engine.reload_catalogue(served_folder)
        same(await engine.beam(asked), reference(recommender, asked))

    run(change())


def test_a_model_that_is_not_ours_is_refused(run, client) -> None:
    from whyrec.serve.engine import ServingEngine

    class Elsewhere:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        async def collective_rpc(self, method: str, **options: Any) -> Any:
            raise Exception("Call to collective_rpc failed: ValueError: no whyrec.json here")

    with pytest.raises(ValueError, match=r"^no whyrec\.json here"):
        run(ServingEngine(Elsewhere()).start())


def test_health_follows_the_engine(run, client) -> None:
    """Last in the file: the engine's process is ended."""
    from whyrec.serve.engine import ServingEngine

    engine = ServingEngine(client)
    assert run(engine.healthy())
    client.shutdown()
    assert not run(engine.healthy())
