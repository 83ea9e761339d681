"""Two replicas of a tiny model behind one client: vLLM's data parallelism on the CPU."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served_models import one_served, sids_in, started_client

from whyrec import Recommender
from whyrec.sid.trie import Trie

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'whyrec[serve-cpu]'")
pytestmark = [pytest.mark.serve, pytest.mark.xdist_group("replicas")]

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
    with started_client(run, served_folder, data_parallel_size=2) as client:
        yield client


@pytest.fixture(scope="module")
def engine(run: Run, client: Any) -> Any:
    from whyrec.serve.engine import ServingEngine

    engine = ServingEngine(client, wait_ms=5.0)
    assert run(engine.start()).num_items == 30
    return engine


def best(recommender: Recommender, prompt: list[int]) -> list[int]:
    decoder = recommender.decoder
    beams = decoder.search(decoder.prefill([prompt], width=30), width=30)
    return beams.items_UW[0].tolist()


async def ask_both(client: Any, method: str, *arguments: Any) -> list[Any]:
    from whyrec.serve.replicas import ask_replica, count_replicas

    assert count_replicas(client) == 2
    return [await ask_replica(client, replica, method, arguments) for replica in (0, 1)]


def test_the_free_share_what_waits(run, engine, client, recommender) -> None:
    from whyrec.serve.engine import BeamRequest

    prompts = [recommender.encoder.recommendation_prompt([n, n + 1]) for n in range(16)]

    async def together() -> list[Any]:
        asked = [BeamRequest(prompt, width=30, k=30) for prompt in prompts]
        return await asyncio.gather(*(engine.beam(one) for one in asked))

    for prompt, found in zip(prompts, run(together()), strict=True):
        assert [item for item, _ in found] == best(recommender, prompt)
    shares = [one["prompt_tokens"] for one in run(ask_both(client, "whyrec_statistics"))]
    assert sum(shares) == run(engine.statistics())["prompt_tokens"] > 0
    assert max(shares) < 0.7 * sum(shares)


def test_one_after_the_other_is_right_too(run, engine, recommender) -> None:
    from whyrec.serve.engine import BeamRequest

    for n in range(5):
        prompt = recommender.encoder.recommendation_prompt([n])
        found = run(engine.beam(BeamRequest(prompt, width=30, k=30)))
        assert [item for item, _ in found] == best(recommender, prompt)
    branches = run(engine.beam_tree(BeamRequest(prompt, width=4, k=4)))
    assert branches


def test_a_catalogue_changes_in_both(run, engine, client, recommender, tmp_path) -> None:
    from vllm import SamplingParams

    vocabulary, codes_NL = recommender.encoder.vocabulary, recommender._codes_NL
    trie = Trie.build(codes_NL[12:], level_sizes=vocabulary.level_sizes)
    trie.save(tmp_path / "trie.safetensors")
    prompt = recommender.encoder.recommendation_prompt([1])
    rules = [[[], None, None]]

    async def text(number: int) -> list[int]:
        params = SamplingParams(max_tokens=3, temperature=2.0, seed=number)
        asked = {"prompt_token_ids": [*recommender.encoder.text("Take"), vocabulary.begin]}
        async for output in client.generate(asked, params, f"text-{number}"):
            found = output.outputs[0].token_ids
        return [vocabulary.begin, *found]

    async def change() -> None:
        old = engine.info.version
        await engine.reload_catalogue(tmp_path)
        asked = (engine.info.version, [prompt], [30], rules)
        for ((items, _),) in await ask_both(client, "whyrec_recommend", *asked):
            assert sorted(items) == list(range(18))
        texts = await asyncio.gather(*map(text, range(40)))
        left = {tuple(codes) for codes in codes_NL[12:].tolist()}
        assert {sids_in(ids, vocabulary)[0] for ids in texts} <= left
        for _ in range(100):  # the old one is forgotten by and by
            try:
                await ask_both(client, "whyrec_recommend", old, [prompt], [30], rules)
            except Exception:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the old catalogue is still there")

    run(change())


def test_a_vllm_that_cannot_ask_one_replica_is_refused() -> None:
    from whyrec.serve.replicas import count_replicas

    core = SimpleNamespace(core_engines=[b"0", b"1"])
    client: Any = SimpleNamespace(engine_core=core)
    with pytest.raises(ValueError, match="leave --data-parallel-size out"):
        count_replicas(client)
    assert count_replicas(SimpleNamespace()) == 1  # type: ignore[arg-type]
