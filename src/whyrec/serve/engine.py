"""What the HTTP layer calls: thoughts and beams of a vLLM engine, batched and checked.

It lives in the API server's process beside vLLM's `EngineClient`. Beams go to the worker by one RPC
at a time: while one runs, the next batch gathers. Where vLLM has several replicas (`replicas.py`),
each takes batches of its own: those that are free share what waits.

    engine = ServingEngine(client)
    info = await engine.start()
    found = await engine.beam(BeamRequest(prompt, width=20, k=10))
    async for tokens in engine.think(prompt, max_tokens=48, temperature=1.0, seed=0,
                                     request_id="a"): ...
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.sampling_params import RequestOutputKind

from whyrec.decode.model_folder import read_settings
from whyrec.serve.beam_request import BeamRequest, CatalogueInfo, check_beam, check_ids
from whyrec.serve.permit import TEXT_ONLY
from whyrec.serve.replicas import ask_replica, count_replicas


@dataclass(eq=False)
class _Waiting:
    request: BeamRequest
    version: int
    answer: asyncio.Future[list[tuple[int, float]]]


class ServingEngine:
    """Thoughts and beams of one vLLM engine.

    Args:
        client: vLLM's, started with `--worker-extension-cls whyrec.serve.worker.BeamWorker`.
        max_batch: requests of one RPC.
        wait_ms: how long the first request of a batch waits for others.
    """

    def __init__(self, client: EngineClient, *, max_batch: int = 64, wait_ms: float = 2.0) -> None:
        self._client = client
        self._max_batch, self._wait_s = max_batch, wait_ms / 1_000
        self._infos: dict[int, CatalogueInfo] = {}
        self._newest = -1
        self._uses: Counter[int] = Counter()  # pins and queued beams of each version
        self._starting, self._changing = asyncio.Lock(), asyncio.Lock()
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []  # one a replica
        self._busy: set[int] = set()  # replicas with a batch
        self._retired: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> CatalogueInfo:
        """Of the newest catalogue."""
        assert self._infos, "start the engine first"
        return self._infos[self._newest]

    @property
    def queued(self) -> int:
        """Beams that wait for their RPC."""
        return len(self._waiting)

    async def start(self) -> CatalogueInfo:
        """Load the trie in the workers; again, it only says what there is.

        Raises:
            ValueError: when the model cannot be served: it is no WhyRec model, or more than plain
                attention, or spread over devices in a way that beams cannot follow.
        """
        async with self._starting:
            if not self._infos:
                loaded = (await self._call("whyrec_load"))[0]
                settings = read_settings(Path(self._client.model_config.model))
                assert settings.level_sizes == loaded["level_sizes"]
                num_levels = len(settings.level_sizes)
                max_prompt = self._client.model_config.max_model_len - num_levels
                self._newest = loaded["version"]
                known = {name: loaded[name] for name in ("version", "num_items", "vocab_size")}
                self._infos[self._newest] = CatalogueInfo(
                    **known, level_sizes=settings.level_sizes, max_prompt=max_prompt
                )
        if all(loop.done() for loop in self._loops):
            self._loops = [
                asyncio.get_running_loop().create_task(self._run(replica))
                for replica in range(count_replicas(self._client))
            ]
        return self.info

    @contextmanager
    def pin(self) -> Iterator[int]:
        """Keep the newest catalogue for as long as this lasts; its version."""
        version = self.info.version
        self._uses[version] += 1
        try:
            yield version
        finally:
            self._leave(version)

    async def beam(self, request: BeamRequest) -> list[tuple[int, float]]:
        """The k best items and their log-probabilities, best first; fewer if no more may come.

        Raises:
            ValueError: for what the worker must not see.
        """
        await self.start()
        version = self._newest if request.catalogue is None else request.catalogue
        check_beam(request, self._info(version))
        answer = asyncio.get_running_loop().create_future()
        self._uses[version] += 1
        try:
            self._waiting.append(_Waiting(request, version, answer))
            self._arrived.set()
            return await answer
        finally:
            self._leave(version)

    async def beam_tree(self, request: BeamRequest) -> list[dict[str, Any]]:
        """The tree that `beam` searches: branches as in `evaluation.beam_tree`, as dictionaries.

        It is an RPC of its own, for people who look into one recommendation.

        Raises:
            ValueError: for what the worker must not see.
        """
        await self.start()
        version = self._newest if request.catalogue is None else request.catalogue
        check_beam(request, self._info(version))
        rule = [request.excluded, request.allowed, request.prefixes]
        self._uses[version] += 1
        try:
            arguments = (version, request.prompt_ids, request.width, rule)
            return await ask_replica(self._client, 0, "whyrec_beam_tree", arguments)
        finally:
            self._leave(version)

    async def think(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        request_id: str,
    ) -> AsyncIterator[list[int]]:
        """Sample a thought: its token ids as they come, without `</think>`.

        Text alone is sampled. A caller that stops early, or is cancelled, frees the request.

        Args:
            prompt_ids: ending in `<think>`.
            max_tokens: budget, `</think>` included.
            temperature: 0 takes the best token.
            seed: of the draws; None draws differently every time.
            request_id: unique among those running.

        Raises:
            ValueError: for what vLLM must not see.
        """
        info = await self.start()
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        check_ids("prompt", prompt_ids, stop=info.vocab_size)
        room = info.max_prompt - len(prompt_ids)
        if not prompt_ids or room < 1:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens; this server takes 1 to "
                f"{info.max_prompt - 1}"
            )
        stop = self._think_end
        params = SamplingParams(
            max_tokens=min(max_tokens, room),
            temperature=temperature,
            seed=seed,
            stop_token_ids=[stop],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={TEXT_ONLY: True},
        )
        stream = self._client.generate({"prompt_token_ids": prompt_ids}, params, request_id)
        async with aclosing(stream) as outputs:
            async for output in outputs:
                tokens = [token for token in output.outputs[0].token_ids if token != stop]
                if tokens:
                    yield tokens

    async def reload_catalogue(self, folder: Path) -> None:
        """Serve the trie of `folder` from now on; requests in flight finish on the old one.

        Raises:
            ValueError: when its SIDs are not of this model's levels; the old one then stays.
        """
        await self.start()
        async with self._changing:
            old, version = self.info, max(self._infos) + 1
            num_items = (await self._call("whyrec_add_catalogue", str(folder), version))[0]
            self._infos[version] = CatalogueInfo(
                version, num_items, old.level_sizes, old.vocab_size, old.max_prompt
            )
            self._newest = version
            self._drop_unused()

    async def statistics(self) -> dict[str, int]:
        """Tokens of prompts that beams asked for, and how many of them were known."""
        await self.start()
        asked = [
            ask_replica(self._client, replica, "whyrec_statistics", ())
            for replica in range(len(self._loops))
        ]
        found = await asyncio.gather(*asked)
        return {name: sum(one[name] for one in found) for name in found[0]}

    async def healthy(self) -> bool:
        """Whether the engine lives."""
        try:
            await self._client.check_health()
        except Exception:
            return False
        return not self._client.errored

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        """An RPC to all workers; what is wrong with the arguments or the model is a ValueError."""
        try:
            return await self._client.collective_rpc(method, args=arguments)
        except Exception as error:
            if self._client.errored or type(error).__name__ == "EngineDeadError":
                raise
            raise ValueError(_reason(error)) from error

    @cached_property
    def _think_end(self) -> int:
        tokenizer = self._client.renderer.get_tokenizer()
        return int(tokenizer.convert_tokens_to_ids("</think>"))

    def _info(self, version: int) -> CatalogueInfo:
        if version not in self._infos:
            raise ValueError(f"catalogue {version} is gone; the newest is {self._newest}")
        return self._infos[version]

    async def _run(self, replica: int) -> None:
        """Gather beams and send them to a replica, one batch after the other, for ever."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self._wait_s)
            batch = self._take()
            if batch:
                self._busy.add(replica)
                try:
                    await self._send(replica, batch[0].version, batch)
                finally:
                    self._busy.discard(replica)

    def _take(self) -> list[_Waiting]:
        """A free replica's share of the beams that wait, all of one catalogue."""
        version = self._waiting[0].version if self._waiting else self._newest
        same = [one for one in self._waiting if one.version == version]
        free = len(self._loops) - len(self._busy)
        batch = same[: min(-(-len(same) // free), self._max_batch)]
        self._waiting = [one for one in self._waiting if one not in batch]
        if not self._waiting:
            self._arrived.clear()
        return [one for one in batch if not one.answer.done()]  # whose caller still waits

    async def _send(self, replica: int, version: int, batch: list[_Waiting]) -> None:
        requests = [one.request for one in batch]
        rules = [[one.excluded, one.allowed, one.prefixes] for one in requests]
        try:
            results = await ask_replica(
                self._client,
                replica,
                "whyrec_recommend",
                (
                    version,
                    [one.prompt_ids for one in requests],
                    [one.width for one in requests],
                    rules,
                ),
            )
        except Exception as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, (items, scores) in zip(batch, results, strict=True):
            if not one.answer.done():
                found = list(zip(items, scores, strict=True))
                one.answer.set_result(found[: one.request.k])

    def _leave(self, version: int) -> None:
        self._uses[version] -= 1
        if not self._uses[version] and version != self._newest:
            self._drop_unused()

    def _drop_unused(self) -> None:
        """Let the workers forget the versions that nobody uses any more."""
        for version in [v for v in self._infos if v != self._newest and not self._uses[v]]:
            del self._infos[version]
            task = asyncio.ensure_future(self._forget(version))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)

    async def _forget(self, version: int) -> None:
        await self._client.collective_rpc("whyrec_drop_catalogue", args=(version,))


def _reason(error: Exception) -> str:
    """What a worker said, out of the words that vLLM wraps it in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "ValueError:" in line]
    return said[-1].split("ValueError:", 1)[1].strip() if said else (lines or [repr(error)])[-1]
