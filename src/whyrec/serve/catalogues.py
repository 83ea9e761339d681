"""The catalogue's versions: the newest one, and older ones for as long as a request needs them."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from whyrec.catalog.dataset import Item
from whyrec.serve.catalogue import Catalogue
from whyrec.serve.edit_items import change_items
from whyrec.serve.engine_calls import EngineCalls
from whyrec.serve.errors import ServeError, shown
from whyrec.serve.guard import Admission
from whyrec.serve.metrics import Metrics
from whyrec.serve.schema import NewItem

_WAITING_EDITS = 8


class Catalogues:
    """The model folder's catalogue, changed while it is served.

    A change is written to the folder, read from it, and given to the engine; only then do new
    requests see it, and they see all of it. Those under way end with what they began with.

    Args:
        calls: the engine.
        folder: the model folder.
        metrics: shows the catalogue's size.

    Attributes:
        newest: what new requests see.
        edits: lets one change at a time through.
    """

    def __init__(self, calls: EngineCalls, folder: Path, *, metrics: Metrics) -> None:
        self.newest = Catalogue.load(folder)
        self.edits = Admission(concurrency=1, queue=_WAITING_EDITS)
        self._calls, self._folder, self._metrics = calls, folder, metrics
        self._by_version = {calls.engine.info.version: self.newest}
        self._coming: Catalogue | None = None
        self._pins: Counter[int] = Counter()
        self._changing = asyncio.Lock()  # held to a change's end, even if its client has gone
        metrics.catalogue.set(self.newest.num_live)

    @contextmanager
    def pinned(self) -> Iterator[tuple[int, Catalogue]]:
        """The newest version, kept in the engine and here until the request is done."""
        with self._calls.engine.pin() as version:
            if version not in self._by_version:  # the engine has just switched; we are about to
                assert self._coming is not None
                self._by_version[version] = self._coming
            self._pins[version] += 1
            try:
                yield version, self._by_version[version]
            finally:
                self._pins[version] -= 1
                self._forget_old()

    async def add(self, items: Sequence[NewItem]) -> list[int]:
        """Add items, or bring retired ones back; their indices in the newest catalogue.

        Raises:
            ServeError: 409 for an item that is there already.
        """
        async with self.edits.place():
            for item in items:
                if self.newest.is_live(item.item_id):
                    raise ServeError(
                        f"the item {shown(item.item_id)} is in the catalogue already; "
                        "POST it to /v1/items/encode to change it",
                        code="item_exists",
                        status=409,
                        param="items",
                    )
            return await self._change([item.item_id for item in items], put=items)

    async def encode(self, items: Sequence[NewItem]) -> list[int]:
        """Replace what is known of live items and give them the SIDs of their new texts."""
        async with self.edits.place():
            self._all_live([item.item_id for item in items], "items")
            return await self._change([item.item_id for item in items], put=items)

    async def retire(self, ids: Sequence[str]) -> list[int]:
        """Recommend some items no more."""
        async with self.edits.place():
            self._all_live(ids, "ids")
            return await self._change(ids, retire=ids)

    def _all_live(self, ids: Sequence[str], param: str) -> None:
        for item_id in ids:
            self.newest.index(item_id, param=param)
            if not self.newest.is_live(item_id):
                raise ServeError(
                    f"the item {shown(item_id)} is retired; POST it to /v1/items to bring it back",
                    code="item_retired",
                    status=409,
                    param=param,
                )

    async def _change(
        self, ids: Sequence[str], *, put: Sequence[NewItem] = (), retire: Sequence[str] = ()
    ) -> list[int]:
        items = [
            Item(item.item_id, item.title, item.brand, tuple(item.categories), item.description)
            for item in put
        ]
        # A client that goes away must not leave the folder and the engine apart.
        await asyncio.shield(asyncio.create_task(self._apply(items, list(retire))))
        return [self.newest.index(item_id, param="items") for item_id in ids]

    async def _apply(self, put: list[Item], retire: list[str]) -> None:
        async with self._changing:
            try:
                await asyncio.to_thread(change_items, self._folder, put=put, retire=retire)
            except ValueError as error:
                raise ServeError(str(error), code="cannot_change_items", status=409) from error
            tokenizer = self.newest.encoder.tokenizer
            self._coming = await asyncio.to_thread(
                Catalogue.load, self._folder, tokenizer=tokenizer
            )
            await self._calls.reload_catalogue(self._folder)
            self._by_version[self._calls.engine.info.version] = self._coming
            self.newest, self._coming = self._coming, None
            self._metrics.catalogue.set(self.newest.num_live)
            self._forget_old()

    def _forget_old(self) -> None:
        newest = self._calls.engine.info.version
        for version in [v for v in self._by_version if v < newest and not self._pins[v]]:
            del self._by_version[version]
            self._pins.pop(version, None)
