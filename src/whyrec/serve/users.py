"""Whom a request is about: a history that it brings, or that of a user whom the server knows."""

import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whyrec.catalog.dataset import Dataset
from whyrec.serve.ahead import LATELY, Prepared, model_fingerprint, open_store
from whyrec.serve.catalogue import Catalogue
from whyrec.serve.errors import ServeError
from whyrec.serve.schema import Ahead, RecommendationRequest
from whyrec.serve.settings import ServeSettings


@dataclass(frozen=True)
class Found:
    """A history in item indices, and what was prepared for it.

    Attributes:
        history: oldest first.
        ahead: what came of the wish for prepared thoughts; None where nobody asked for them.
        thoughts, prefixes: of the store, where they are used.
    """

    history: list[int]
    ahead: Ahead | None = None
    thoughts: list[list[int]] = field(default_factory=list)
    prefixes: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Usable:
    """What one catalogue has of a prepared entry.

    Attributes:
        prepared: the entry.
        catalogue: whose indices these are; it may be gone.
        before: the history that the thoughts were written after.
        thoughts, prefixes: the thoughts some of whose prefixes are left, and those prefixes.
    """

    prepared: Prepared
    catalogue: "weakref.ref[Catalogue]"
    before: list[int]
    thoughts: list[list[int]]
    prefixes: list[list[list[int]]]


class Users:
    """The users of a run, and those with prepared thoughts.

    Args:
        folder: the model folder, for which thoughts were prepared.
        settings: names the run and the store.
    """

    def __init__(self, folder: Path, *, settings: ServeSettings) -> None:
        self._dataset = Dataset.load(Path(settings.run) / "dataset") if settings.run else None
        self._store = open_store(settings.ahead) if settings.ahead else None
        self._max_age = settings.ahead_max_age
        self._model = model_fingerprint(folder)
        self._usable: OrderedDict[str, _Usable] = OrderedDict()  # of users who asked lately

    async def history(self, request: RecommendationRequest, catalogue: Catalogue) -> Found:
        """A request's history, and the thoughts that were prepared for its user.

        Raises:
            ServeError: for an unknown item or an unknown user.
        """
        prepared = None
        if request.mode == "ahead" and self._store is not None:
            assert request.user is not None
            prepared = await self._store.ask(request.user, model=self._model)
        if request.history is not None:
            known = catalogue.history(request.history, param="history")
        else:
            assert request.user is not None
            known = self.known(request.user, catalogue, prepared=prepared)
        history = known + catalogue.history(request.since, param="since")
        if request.mode != "ahead":
            return Found(history)
        return self._with_prepared(prepared, history, catalogue)

    @property
    def any_known(self) -> bool:
        """Whether there is a run whose users are known."""
        return self._dataset is not None

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def known(
        self, user: str, catalogue: Catalogue, *, prepared: Prepared | None = None
    ) -> list[int]:
        """The history of a user of the run, or of one for whom something was prepared.

        Raises:
            ServeError: when nobody has that id.
        """
        if self._dataset is not None and user in self._dataset.user_index:
            sequence = self._dataset.sequences[self._dataset.user_index[user]]
            return _indices([self._dataset.items[i].item_id for i in sequence], catalogue)
        if prepared is not None:
            return _indices(prepared.history, catalogue)
        if self._dataset is None and self._store is None:
            raise ServeError(
                "this server knows no users; send a history, or start it with --run",
                code="no_users",
                param="user",
            )
        raise ServeError(
            "this server does not know that user; send the history too",
            code="unknown_user",
            status=404,
            param="user",
        )

    def _with_prepared(
        self, prepared: Prepared | None, history: list[int], catalogue: Catalogue
    ) -> Found:
        if self._store is None:
            return _unused(history, "no store: the server was started without --ahead")
        if prepared is None:
            return _unused(history, "nothing stored for this user")
        age = max(time.time() - prepared.made_at, 0.0)
        if age > self._max_age:
            reason = f"too old: {age:.0f} s, above the {self._max_age:.0f} s that are allowed"
            return _unused(history, reason)
        usable = self._usable_of(prepared, catalogue)
        if not usable.thoughts:
            return _unused(history, "no prepared prefix is in the catalogue any more")
        same = 0
        for then, now in zip(usable.before, history, strict=False):
            if then != now:
                break
            same += 1
        ahead = Ahead(used=True, age_seconds=round(age, 1), new_events=len(history) - same)
        return Found(history, ahead, usable.thoughts, usable.prefixes)

    def _usable_of(self, prepared: Prepared, catalogue: Catalogue) -> _Usable:
        """What the catalogue has of an entry; as it was found before, if neither has changed."""
        known = self._usable.pop(prepared.user, None)
        if known is None or known.prepared is not prepared or known.catalogue() is not catalogue:
            pairs = [
                (thought, kept)
                for thought, prefixes in zip(prepared.thoughts, prepared.prefixes, strict=True)
                if (kept := catalogue.prefixes(prefixes))
            ]
            known = _Usable(
                prepared,
                weakref.ref(catalogue),
                _indices(prepared.history, catalogue),
                [thought for thought, _ in pairs],
                [kept for _, kept in pairs],
            )
        self._usable[prepared.user] = known
        if len(self._usable) > LATELY:
            self._usable.popitem(last=False)
        return known


def _unused(history: list[int], reason: str) -> Found:
    return Found(history, Ahead(used=False, reason=reason))


def _indices(item_ids: Sequence[str], catalogue: Catalogue) -> list[int]:
    """Indices of a known history; what the model's catalogue never had is left out."""
    found = (catalogue.find(item_id) for item_id in item_ids)
    return [index for index in found if index is not None]
