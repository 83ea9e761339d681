"""The routes as an application of their own, on any engine: for tests, and where vLLM has no part.

app = make_app(engine, Path("runs/ml-100k/model/aligned"))
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from whyrec import __version__
from whyrec.serve.engine_calls import Engine
from whyrec.serve.errors import add_handlers
from whyrec.serve.metrics import Metrics
from whyrec.serve.routes import attach, metrics
from whyrec.serve.service import Service
from whyrec.serve.settings import ServeSettings


def make_app(engine: Engine, folder: Path, *, settings: ServeSettings | None = None) -> FastAPI:
    """An application with the routes, `/metrics` among them.

    Args:
        engine: decodes; started already.
        folder: the model folder.
        settings: the defaults when None.
    """
    settings = settings or ServeSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        counted = Metrics(CollectorRegistry())
        app.state.whyrec = Service(engine, folder, settings=settings, metrics=counted)
        yield
        await app.state.whyrec.close()

    app = FastAPI(title="WhyRec", version=__version__, lifespan=lifespan)
    add_handlers(app)
    attach(app, settings)
    app.router.add_api_route("/metrics", metrics, include_in_schema=False)
    return app
