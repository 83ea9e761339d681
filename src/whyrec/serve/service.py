"""A recommendation from request to answer: history → thoughts → beams → items.

The same steps as `Recommender.recommend`, on an engine that others use at the same time; the same
folder and the same input give the same answer (thoughts are the engine's own draws, so with
thinking that is so for equal thoughts). A request keeps one version of the catalogue to its end.

    async for event in service.recommend(request, request_id="rec-1"):
        ...        # None once the request is accepted, Words as thoughts come, the Answer

With `think: "ahead"` the thoughts and the first levels were prepared (`whyrec think-ahead`): the
prompt holds the history of today and the prepared thought, and the beam stays inside its prefixes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
from fastapi import Request

from whyrec.decode.model_folder import read_settings
from whyrec.decode.ranking import Ranking
from whyrec.decode.thought_ranking import fuse, speaks_most
from whyrec.serve.catalogues import Catalogues
from whyrec.serve.engine_calls import Engine, EngineCalls
from whyrec.serve.errors import ServeError, over_limit
from whyrec.serve.facts import Facts
from whyrec.serve.guard import Admission
from whyrec.serve.metrics import Metrics
from whyrec.serve.plan import Plan, make_plan, searches, wanted
from whyrec.serve.schema import Ahead, Answer, RecommendationRequest, RecommendedItem, Timings
from whyrec.serve.settings import ServeSettings
from whyrec.serve.thoughts import Words, write_thoughts
from whyrec.serve.users import Users


class Service:
    """Answers recommendations for one model folder. Make it on the event loop that it runs on.

    Args:
        engine: decodes; it is started already.
        folder: the model folder.
        settings: see `ServeSettings`.
        metrics: where it counts.

    Attributes:
        thoughts: how the model thinks; None when it has not learnt to.

    Raises:
        ValueError: when the folder, the run or the store cannot be read.
    """

    def __init__(
        self, engine: Engine, folder: Path, *, settings: ServeSettings, metrics: Metrics
    ) -> None:
        self.model = folder.resolve().name
        self.settings, self.limits, self.metrics = settings, settings.limits, metrics
        self.calls = EngineCalls(engine)
        self.catalogues = Catalogues(self.calls, folder, metrics=metrics)
        self.users = Users(folder, settings=settings)
        self._facts = Facts(folder)
        self.admission = Admission(concurrency=self.limits.concurrency, queue=self.limits.queue)
        metrics.watch(self.admission)
        self.thoughts = read_settings(folder).thoughts

    async def recommend(
        self, request: RecommendationRequest, *, request_id: str
    ) -> AsyncGenerator[Words | Answer | None, None]:
        """Answer one request: None once it is accepted, then its thoughts' words, then the answer.

        Closing the iterator before its end frees the thoughts and the beams.

        Raises:
            ServeError: before the first event for a request that cannot be answered; later when
                the engine fails.
        """
        self._check(request)
        began = time.monotonic()
        async with self.admission.place() as waited:
            with self.catalogues.pinned() as (version, catalogue):
                found = await self.users.history(request, catalogue)
                plan = make_plan(request, catalogue, version, found.history, limits=self.limits)
                yield None
                ahead = found.ahead
                thoughts: list[list[int]] = []
                prefixes: list[list[list[int]]] | None = None
                if request.mode == "on":
                    assert self.thoughts is not None
                    writing = write_thoughts(
                        self.calls,
                        catalogue.encoder,
                        catalogue.encoder.thinking_prompt(plan.shown),
                        how=self.thoughts,
                        into=thoughts,
                        request_id=request_id,
                    )
                    async with aclosing(writing):
                        async for words in writing:
                            yield words
                elif ahead is not None and ahead.used:
                    thoughts, prefixes = found.thoughts, found.prefixes
                thought_at = time.monotonic()
                rankings = await self._search(plan, thoughts, prefixes)
                ranking = self._mixed(plan, rankings)
                if prefixes is not None and _count(ranking) < wanted(plan):
                    # The prefixes hold too few items that this user may be shown.
                    thoughts = []
                    assert ahead is not None
                    ahead = Ahead(used=False, reason="too few items inside the prepared prefixes")
                    prefixes = None
                    rankings = await self._search(plan, thoughts, None)
                    ranking = self._mixed(plan, rankings)
                best = self._best(rankings, ranking)
                tree = None
                if request.tree:
                    asked = searches(plan, thoughts, prefixes)
                    told = await self.calls.beam_tree(asked[best]) if asked else []
                    tree = catalogue.branches(told)
                trace = self._text(plan, thoughts[best]) if thoughts else ""
                items = self._items(plan, ranking)
                facts = None
                if request.facts:
                    facts = await asyncio.to_thread(
                        self._facts.read,
                        trace,
                        catalogue,
                        shown=plan.shown,
                        older=len(found.history) - len(plan.shown),
                        recommended=[catalogue.index(item.id, param="items") for item in items],
                    )
                now = time.monotonic()
                seconds = {
                    "queue": waited,
                    "thought": thought_at - began - waited,
                    "beam": now - thought_at,
                    "total": now - began,
                }
                self.metrics.took(seconds)
                if ahead is not None:
                    result = "used" if ahead.used else (ahead.reason or "").split(":")[0]
                    self.metrics.ahead.labels(result).inc()
                mode = request.mode if ahead is None else ("ahead" if ahead.used else "off")
                yield Answer(
                    id=request_id,
                    created=int(time.time()),
                    model=self.model,
                    think=mode,
                    trace=trace,
                    items=items,
                    timings_ms=Timings(**{k: round(v * 1e3, 3) for k, v in seconds.items()}),
                    ahead=ahead,
                    facts=facts,
                    tree=tree,
                )

    async def close(self) -> None:
        """Stop watching the engine and close the store."""
        await self.calls.close()
        self.users.close()

    def _check(self, request: RecommendationRequest) -> None:
        """Whether a request stays within the limits, and asks for what this model can do."""
        asked = request.filter.items if request.filter and request.filter.items else []
        for name, value, param in (
            ("k", request.k, "k"),
            ("beam_width", request.beam_width or 0, "beam_width"),
            ("history", len(request.history or []) + len(request.since), "history"),
            ("listed", len(request.exclude or []), "exclude"),
            ("listed", len(asked), "filter.items"),
        ):
            if value > getattr(self.limits, name):
                raise over_limit(name, value, getattr(self.limits, name), param=param)
        if request.mode == "on" and self.thoughts is None:
            raise ServeError(
                "this model has not learnt to think; leave `think` off, or serve one that "
                "`whyrec activate` has trained",
                code="cannot_think",
                param="think",
            )

    async def _search(
        self,
        plan: Plan,
        thoughts: Sequence[Sequence[int]],
        prefixes: Sequence[list[list[int]]] | None,
    ) -> list[Ranking]:
        """What those beams find."""
        asked = searches(plan, thoughts, prefixes)
        answers = await asyncio.gather(*map(self.calls.beam, asked))
        rankings = []
        for answer in answers:
            legal = [(n, score) for n, score in answer if 0 <= n < plan.catalogue.num_live]
            self.metrics.decoded(beams=plan.width, items=len(answer), legal=len(legal))
            items_W = np.full((1, plan.width), -1, dtype=np.int64)
            scores_W = np.full((1, plan.width), -np.inf, dtype=np.float32)
            for place, (item, score) in enumerate(legal):
                items_W[0, place], scores_W[0, place] = item, score
            rankings.append(Ranking(items_W, scores_W))
        return rankings

    def _mixed(self, plan: Plan, rankings: Sequence[Ranking]) -> Ranking | None:
        """One ranking of several; None where there is nothing to rank."""
        if len(rankings) <= 1:
            return rankings[0] if rankings else None
        return fuse(rankings, weights=[1] * len(rankings), width=plan.width)

    def _best(self, rankings: Sequence[Ranking], ranking: Ranking | None) -> int:
        """Which thought speaks most for the first item."""
        return 0 if ranking is None else speaks_most(rankings, ranking)

    def _text(self, plan: Plan, thought: Sequence[int]) -> str:
        return plan.catalogue.encoder.tokenizer.decode(list(thought))

    def _items(self, plan: Plan, ranking: Ranking | None) -> list[RecommendedItem]:
        """The k best; without those that were retired while the request was under way."""
        if ranking is None:
            return []
        newest = self.catalogues.newest
        found: list[RecommendedItem] = []
        pairs = zip(ranking.items_EW[0].tolist(), ranking.scores_EW[0].tolist(), strict=True)
        for item, score in pairs:
            if len(found) == plan.k:
                break
            if item >= 0 and newest.is_live(plan.catalogue.items[item].item_id):
                found.append(plan.catalogue.recommended(item, score))
        return found


def _count(ranking: Ranking | None) -> int:
    return 0 if ranking is None else int((ranking.items_EW[0] >= 0).sum())


def service_of(request: Request) -> Service:
    """The service of a request's application.

    Raises:
        ServeError: 503 while the model is being loaded.
    """
    service = getattr(request.app.state, "whyrec", None)
    if service is None:
        raise ServeError("the model is being loaded; try again", code="loading", status=503)
    return service
