"""WhyRec's routes inside vLLM's OpenAI-compatible server, by the group `vllm.endpoint_plugins`.

`whyrec serve` starts vLLM with it. By hand:

    VLLM_PLUGINS=whyrec python -m vllm.entrypoints.openai.api_server --model MODEL \\
        --worker-extension-cls whyrec.serve.worker.BeamWorker
"""

import asyncio
import contextlib
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from whyrec.serve.metrics import Metrics, log_to_stderr
from whyrec.serve.routes import attach
from whyrec.serve.service import Service
from whyrec.serve.settings import ServeSettings

_PARENT_SECONDS = 2.0
_CACHE_SECONDS = 15.0


class Plugin:
    """What vLLM asks of an endpoint plugin; see `vllm.plugins.endpoint_plugins`."""

    name = "whyrec"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._settings = ServeSettings.from_environment()
        self._tasks: list[asyncio.Task[None]] = []

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; they answer 503 until `init_state` has run."""
        attach(app, self._settings)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the engine's side, and read the catalogue.

        Raises:
            ValueError: when the model cannot be served, or the catalogue not be read.
        """
        from whyrec.serve.engine import ServingEngine

        assert engine_client is not None
        if getattr(args, "api_server_count", None) not in (None, 0, 1):
            raise ValueError(
                "WhyRec's routes need one API server a catalogue; leave --api-server-count out "
                "and start several servers behind a load balancer"
            )
        log_to_stderr()
        engine = ServingEngine(engine_client)
        await engine.start()
        service = Service(engine, Path(args.model), settings=self._settings, metrics=Metrics())
        state.whyrec = service
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError):  # not on the main thread
            loop.add_signal_handler(signal.SIGUSR1, lambda: loop.create_task(self._stop(service)))
        if self._settings.parent:
            self._tasks.append(loop.create_task(self._watch_parent(service)))
        self._tasks.append(loop.create_task(_watch_cache(engine, service.metrics)))

    async def _stop(self, service: Service) -> None:
        """Let the running requests end, then vLLM."""
        if service.admission.draining:
            return
        seconds = self._settings.drain_seconds
        await asyncio.gather(
            service.admission.drain(seconds), service.catalogues.edits.drain(seconds)
        )
        os.kill(os.getpid(), signal.SIGTERM)

    async def _watch_parent(self, service: Service) -> None:
        """Stop when `whyrec serve` was killed in a way that it could not pass on."""
        while os.getppid() == self._settings.parent:
            await asyncio.sleep(_PARENT_SECONDS)
        await self._stop(service)


async def _watch_cache(engine: Any, metrics: Metrics) -> None:
    """Ask the worker now and then how its prompt cache does, while it lives."""
    while await engine.healthy():
        with contextlib.suppress(Exception):  # the health of the engine is told elsewhere
            metrics.cached(await engine.statistics())
        await asyncio.sleep(_CACHE_SECONDS)
