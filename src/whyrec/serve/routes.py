"""The routes: `/v1/recommendations`, `/v1/items`, `/health`, and `/metrics` where vLLM has none.

Those of the page at `/` stand in `page.py`.

    attach(app, settings)            # the routes; once there is an engine:
    app.state.whyrec = Service(engine, folder, settings=settings, metrics=Metrics())

A streamed answer is a sequence of server-sent events: `event: thought` with `{"sample", "text"}` as
words come, `event: recommendations` with the whole answer, then `data: [DONE]`. What goes wrong
after the first event comes as `event: error`, in the format of every other error, beside the
`status` that it would have had.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from whyrec.serve import page
from whyrec.serve.errors import ERRORS, ServeError, TypedRoute, engine_stopped, fault, over_limit
from whyrec.serve.guard import Guard
from whyrec.serve.schema import (
    Answer,
    CatalogueItem,
    Health,
    ItemsAnswer,
    ItemsRequest,
    RecommendationRequest,
    RetireRequest,
)
from whyrec.serve.service import Service, service_of
from whyrec.serve.settings import ServeSettings
from whyrec.serve.thoughts import Words

T = TypeVar("T")
log = logging.getLogger("whyrec.serve")

_GONE = 499  # nginx's number for a client that did not wait; it is only counted, never sent
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
_TRACE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not wait

router = APIRouter(route_class=TypedRoute)


def attach(app: FastAPI, settings: ServeSettings) -> None:
    """Add the routes and what guards them to an application that has not started yet."""
    # One by one, so that ours can replace vLLM's /health.
    app.router.routes.extend([*router.routes, *page.router.routes])
    app.mount("/static", page.Files(directory=page.FOLDER), name="whyrec-page")

    async def healthy() -> bool:
        service = getattr(app.state, "whyrec", None)
        return service is None or await service.calls.healthy()

    limit = settings.limits.body_bytes
    app.add_middleware(Guard, api_key=settings.api_key, body_bytes=limit, healthy=healthy)


@router.post(
    "/v1/recommendations",
    response_model=Answer,
    responses=ERRORS | _STREAM,
    summary="Recommend items of the catalogue to a user",
)
async def recommendations(request: Request, body: RecommendationRequest) -> Response:
    """Say why, if asked to, and then name the items that come next for a user."""
    service = service_of(request)
    request_id = f"rec-{uuid.uuid4().hex}"
    facts: dict[str, object] = {
        "request": request_id,
        "think": body.mode,
        "k": body.k,
        "history": len(body.history or []) + len(body.since),
        "stream": body.stream,
    }
    events = service.recommend(body, request_id=request_id)
    try:
        await _unless_gone(request, anext(events))  # what cannot be answered is known by now
        if body.stream:
            return StreamingResponse(
                _stream(service, events, facts),
                media_type="text/event-stream",
                headers=_TRACE_HEADERS,
            )
        answer = await _unless_gone(request, _last(events))
    except BaseException as error:
        await events.aclose()
        known = _counted(service, error, facts)
        if known is error:
            raise
        raise known from error
    _count(service, answer, facts)
    return JSONResponse(answer.model_dump())


@router.get("/v1/items", response_model=ItemsAnswer, responses=ERRORS, summary="Search titles")
async def items(
    request: Request,
    title: Annotated[str, Query(max_length=200, description="words of the title, or an id")] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ItemsAnswer:
    """Items whose titles hold all the words, in the order of the catalogue."""
    catalogue = service_of(request).catalogues.newest
    found = await asyncio.to_thread(catalogue.search, title, limit=limit)
    return ItemsAnswer(items=[catalogue.item(n) for n in found], catalogue=catalogue.num_live)


@router.get(
    "/v1/items/{item_id:path}", response_model=CatalogueItem, responses=ERRORS, summary="One item"
)
async def item(request: Request, item_id: str) -> CatalogueItem:
    """What the catalogue says of an item, retired ones too."""
    catalogue = service_of(request).catalogues.newest
    return catalogue.item(catalogue.index(item_id, param="item_id"))


@router.post("/v1/items", response_model=ItemsAnswer, responses=ERRORS, summary="Add items")
async def add_items(request: Request, body: ItemsRequest) -> ItemsAnswer:
    """Give new items SIDs, or bring retired ones back; they can be recommended at once."""
    service = service_of(request)
    _check_edit(service, len(body.items), "items")
    return await _edited(service, "items_added", service.catalogues.add(body.items))


@router.post(
    "/v1/items/encode", response_model=ItemsAnswer, responses=ERRORS, summary="Encode items again"
)
async def encode_items(request: Request, body: ItemsRequest) -> ItemsAnswer:
    """Replace what is known of items, and give them the SIDs that it asks for."""
    service = service_of(request)
    _check_edit(service, len(body.items), "items")
    return await _edited(service, "items_encoded", service.catalogues.encode(body.items))


@router.post(
    "/v1/items/retire", response_model=ItemsAnswer, responses=ERRORS, summary="Retire items"
)
async def retire_items(request: Request, body: RetireRequest) -> ItemsAnswer:
    """Recommend some items no more; histories may still hold them."""
    service = service_of(request)
    _check_edit(service, len(body.ids), "ids")
    return await _edited(service, "items_retired", service.catalogues.retire(body.ids))


@router.get("/health", response_model=Health, responses={503: ERRORS[503]}, summary="Is it well?")
async def health(request: Request) -> Health:
    """200 while requests are answered; 503 once the engine has died or the server is stopping."""
    service = service_of(request)
    if service.admission.draining:
        raise ServeError("this server is stopping", code="stopping", status=503)
    if not await service.calls.healthy():
        raise engine_stopped()
    return Health(model=service.model, items=service.catalogues.newest.num_live)


async def metrics(request: Request) -> Response:
    """`/metrics` for an application that is not vLLM's."""
    registry = service_of(request).metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _check_edit(service: Service, number: int, param: str) -> None:
    if number > service.limits.edited:
        raise over_limit("edited", number, service.limits.edited, param=param)


async def _edited(service: Service, what: str, change: Awaitable[list[int]]) -> ItemsAnswer:
    try:
        found = await change
    except ServeError as error:
        service.metrics.done(what, error.status, code=error.code)
        raise
    catalogue = service.catalogues.newest
    service.metrics.done(what, 200, items=len(found), catalogue=catalogue.num_live)
    return ItemsAnswer(items=[catalogue.item(n) for n in found], catalogue=catalogue.num_live)


async def _last(events: AsyncIterator[Words | Answer | None]) -> Answer:
    answer = None
    async for event in events:
        answer = event
    assert isinstance(answer, Answer)
    return answer


async def _stream(service: Service, events: Any, facts: dict[str, object]) -> AsyncIterator[str]:
    """Events as text. A client that goes away cancels this, and with it thoughts and beams."""
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Words):
                    yield _event("thought", {"sample": event.sample, "text": event.text})
                elif event is not None:
                    _count(service, event, facts)
                    yield _event("recommendations", event.model_dump())
    except (Exception, asyncio.CancelledError) as error:
        known = _counted(service, error, facts)
        if not isinstance(known, ServeError):
            raise
        yield _event("error", known.body | {"status": known.status})
    yield "data: [DONE]\n\n"


def _event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _count(service: Service, answer: Answer, facts: dict[str, object]) -> None:
    service.metrics.done(
        "recommendations",
        200,
        **facts,
        done=answer.think,
        items=len(answer.items),
        ms=answer.timings_ms.model_dump(),
    )


def _counted(service: Service, error: BaseException, facts: dict[str, object]) -> BaseException:
    """The error as the client is to see it, counted and logged."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        service.metrics.done("recommendations", _GONE, **facts)
        return error
    if not isinstance(error, ServeError):
        log.error("a request failed", exc_info=error)
        error = fault()
    service.metrics.done("recommendations", error.status, code=error.code, **facts)
    return error


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; it is cancelled when the client has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServeError("the client has gone", code="client_gone", status=_GONE)
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
