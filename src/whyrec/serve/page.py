"""The page at `/`, the trace inspector, and what it asks beside the other routes.

Its files lie in `static/`: HTML, CSS and JavaScript modules that the browser runs as they are. They
ask nothing of any other host, which the policy below makes sure of; it also keeps text from
becoming markup or a script.
"""

import asyncio
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.types import Scope

from whyrec.serve.errors import ERRORS, TypedRoute
from whyrec.serve.schema import CatalogueItem
from whyrec.serve.service import service_of

FOLDER = Path(__file__).with_name("static")
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # without a policy that may make them: no innerHTML
    "trusted-types 'none'",
)
_HEADERS = {
    "content-security-policy": "; ".join(_POLICY),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # the browser asks whether a file has changed
}

router = APIRouter(route_class=TypedRoute)


class KnownUser(BaseModel):
    """A user of the run: what they did, oldest first, the newest events where there are many."""

    object: Literal["user"] = "user"
    id: str
    events: int = Field(description="in all")
    history: list[CatalogueItem]


class AskedLimits(BaseModel):
    """The most that a request may ask for."""

    k: int
    beam_width: int
    history: int


class About(BaseModel):
    """What this server's model can do, for those who write requests by hand."""

    object: Literal["about"] = "about"
    model: str
    items: int = Field(description="that can be recommended now")
    thoughts: int = Field(description="written before an answer with `think`; 0: it cannot think")
    max_history: int = Field(description="newest items of a history that the model reads")
    users: bool = Field(description="whether users are known by their ids")
    limits: AskedLimits


class Files(StaticFiles):
    """The page's files, with the policy."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return FileResponse(FOLDER / "index.html", headers=_HEADERS)


@router.get("/v1/about", response_model=About, responses=ERRORS, summary="What may be asked")
async def about(request: Request) -> About:
    """What this server's model can do, and within which limits."""
    service = service_of(request)
    catalogue, limits = service.catalogues.newest, service.limits
    return About(
        model=service.model,
        items=catalogue.num_live,
        thoughts=0 if service.thoughts is None else service.thoughts.samples,
        max_history=catalogue.max_history,
        users=service.users.any_known,
        limits=AskedLimits(k=limits.k, beam_width=limits.beam_width, history=limits.history),
    )


@router.get(
    "/v1/users/{user_id:path}", response_model=KnownUser, responses=ERRORS, summary="One user"
)
async def user(request: Request, user_id: str) -> KnownUser:
    """What a user of the run did; no more events than a request's history may have."""
    service = service_of(request)
    catalogue = service.catalogues.newest
    history = service.users.known(user_id, catalogue)
    newest = history[-service.limits.history :]
    items = await asyncio.to_thread(lambda: [catalogue.item(n) for n in newest])
    return KnownUser(id=user_id, events=len(history), history=items)
