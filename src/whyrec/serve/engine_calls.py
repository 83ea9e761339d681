"""Calls to the engine that end when it dies: a clear 503 in place of waiting for ever.

`Engine` is what the routes need of one; `whyrec.serve.engine.ServingEngine` is it on vLLM, the
tests have one on `whyrec.decode`.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from whyrec.serve.beam_request import BeamRequest
from whyrec.serve.errors import ServeError, engine_stopped

T = TypeVar("T")
_WATCH_SECONDS = 1.0


class CatalogueInfo(Protocol):
    """What the engine says of its newest catalogue."""

    @property
    def version(self) -> int: ...


class Engine(Protocol):
    """Thoughts and beams on one model; see `whyrec.serve.engine`."""

    @property
    def info(self) -> CatalogueInfo: ...

    def pin(self) -> AbstractContextManager[int]: ...

    async def beam(self, request: BeamRequest) -> list[tuple[int, float]]: ...

    async def beam_tree(self, request: BeamRequest) -> list[dict[str, Any]]: ...

    def think(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        request_id: str,
    ) -> AsyncIterator[list[int]]: ...

    async def reload_catalogue(self, folder: Path) -> None: ...

    async def healthy(self) -> bool: ...


class EngineCalls:
    """An engine, watched.

    Args:
        engine: whose calls these are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._look_after())

    async def beam(self, request: BeamRequest) -> list[tuple[int, float]]:
        """`Engine.beam`."""
        return await self._while_alive(self.engine.beam(request))

    async def beam_tree(self, request: BeamRequest) -> list[dict[str, Any]]:
        """`Engine.beam_tree`."""
        return await self._while_alive(self.engine.beam_tree(request))

    async def think(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        request_id: str,
    ) -> AsyncGenerator[list[int], None]:
        """`Engine.think`; to stop listening frees what the engine holds for it."""
        pieces = self.engine.think(
            prompt_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            request_id=request_id,
        )
        try:
            while True:
                try:
                    yield await self._while_alive(anext(pieces))
                except StopAsyncIteration:
                    return
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()

    async def reload_catalogue(self, folder: Path) -> None:
        """`Engine.reload_catalogue`."""
        await self._while_alive(self.engine.reload_catalogue(folder))

    async def healthy(self) -> bool:
        """Whether the engine answers; asked again each time, until it has died."""
        if not self._dead.done() and not await self._is_healthy():
            self._note_death()
        return not self._dead.done()

    async def close(self) -> None:
        """Stop watching."""
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)

    async def _while_alive(self, call: Awaitable[T]) -> T:
        """The call's result, or a 503 if the engine dies first."""
        task = asyncio.ensure_future(call)
        either: set[asyncio.Future[Any]] = {task, self._dead}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise engine_stopped()
            return task.result()
        except (StopAsyncIteration, ServeError):
            raise
        except ValueError as error:
            raise ServeError(str(error), code="refused_by_engine") from error
        except Exception as error:
            if not await self.healthy():
                raise engine_stopped() from error
            raise
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _look_after(self) -> None:
        while await self.healthy():
            await asyncio.sleep(_WATCH_SECONDS)

    async def _is_healthy(self) -> bool:
        try:
            return await self.engine.healthy()
        except Exception:
            return False

    def _note_death(self) -> None:
        if not self._dead.done():
            self._dead.set_result(None)
