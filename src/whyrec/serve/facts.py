"""What a trace says, fact by fact: whether it is so, and which items bear it out.

    facts = Facts(folder)
    facts.read(trace, catalogue, shown=shown, older=3, recommended=[5, 17])

Reading needs all facts of the catalogue; they are gathered when somebody first asks, and again
after the catalogue has changed. It takes a while, so call it from a thread.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

from whyrec.evaluation.trace_view import TraceReader
from whyrec.serve.catalogue import Catalogue
from whyrec.serve.schema import TraceFact

_MOST_ITEMS = 500_000  # the facts of more would take gigabytes, for one person who looks


class Facts:
    """Reads traces of one model.

    Args:
        folder: the model folder, whose own words the traces are in.
    """

    def __init__(self, folder: Path) -> None:
        self._prompts = folder / "prompts"
        self._lock = threading.Lock()
        self._known: tuple[Catalogue, TraceReader] | None = None

    def read(
        self,
        trace: str,
        catalogue: Catalogue,
        *,
        shown: Sequence[int],
        older: int,
        recommended: Sequence[int],
    ) -> list[TraceFact] | None:
        """The facts that a trace names, in its order; None where the catalogue is too large.

        Args:
            trace: the thought.
            catalogue: that it speaks of.
            shown: item indices of the history, as the prompt held them.
            older: how many events of the history stand before those.
            recommended: item indices, best first.
        """
        if len(catalogue.items) > _MOST_ITEMS:
            return None
        view = self._reader(catalogue).read(trace, shown, recommended)
        return [
            TraceFact(
                name=claim.name,
                clause=claim.clause,
                start=claim.start,
                end=claim.end,
                true=claim.true,
                history=[older + place for place in claim.places],
                ranks=list(claim.recommended),
            )
            for claim in view.claims
        ]

    def _reader(self, catalogue: Catalogue) -> TraceReader:
        with self._lock:
            if self._known is None or self._known[0] is not catalogue:
                reader = TraceReader(catalogue.items, template_folder=self._prompts)
                self._known = (catalogue, reader)
            return self._known[1]
