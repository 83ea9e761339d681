"""`Recommender`: a trained model folder as a Python object.

from whyrec import Recommender

recommender = Recommender.from_pretrained("runs/ml-100k/model/aligned")
for item in recommender.recommend(history=["1", "50", "181"], k=10):
    print(item.title, item.score)

An activated model also tells why, if it is asked to think first:

found = Recommender.from_pretrained("runs/ml-100k/model/activated").recommend(["1"], think=True)
print(found.trace)
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from whyrec.catalog.dataset import nearest_ids
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.model_folder import ModelFolder, load_model_folder
from whyrec.decode.ranking import Ranking, rank_histories
from whyrec.decode.think import Thinker, ThoughtSettings
from whyrec.decode.thought_ranking import (
    ThoughtRanking,
    by_thought,
    fuse,
    rank_thinking,
    speaks_most,
)
from whyrec.sid.vocabulary import sid_text


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id: the catalogue's id.
        title: the catalogue's title.
        score: log-probability of the item's SID, given the history.
        sid: the semantic ID as text.
    """

    item_id: str
    title: str
    score: float
    sid: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Recommendations(list[Recommendation]):
    """Recommended items, best first.

    Attributes:
        trace: the thought that speaks most for the first item; empty without thinking.
    """

    def __init__(self, items: Iterable[Recommendation] = (), *, trace: str = "") -> None:
        super().__init__(items)
        self.trace = trace


class Recommender:
    """Recommends items of one catalogue. Make it with `Recommender.from_pretrained`."""

    def __init__(self, parts: ModelFolder) -> None:
        self.items = parts.items
        self.settings = parts.settings
        self.encoder = parts.encoder
        self.decoder = BeamDecoder(parts.model, vocabulary=parts.vocabulary, trie=parts.trie)
        self._codes_NL = parts.codes_NL
        self._index = {item.item_id: index for index, item in enumerate(parts.items)}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> "Recommender":
        """Load a model folder, e.g. `runs/NAME/model/aligned`.

        Args:
            folder: what `whyrec align` or a later stage wrote.
            device: `cpu`, `cuda`, …; the GPU if there is one.
            dtype: of the weights; bf16 on a GPU and float32 on a CPU.

        Raises:
            ValueError: when it is no model folder.
        """
        return cls(load_model_folder(Path(folder), device=device, dtype=dtype))

    def recommend(
        self,
        history: Sequence[str],
        *,
        k: int = 10,
        exclude: Sequence[str] | None = None,
        width: int | None = None,
        think: bool = False,
    ) -> Recommendations:
        """Recommend the next items after a history.

        Args:
            history: item ids, oldest first; may be empty.
            k: how many items.
            exclude: item ids that must not come; None excludes the history itself, an empty
                list excludes nothing.
            width: beam width; at least k, 2 k by default.
            think: write a thought first, which the result's `trace` holds. The same history gives
                the same thoughts.

        Returns:
            At most k items, best first (fewer when the catalogue has no more).

        Raises:
            ValueError: for an unknown item id (with the nearest known ones), a k below 1, or
                thinking with a model that has not learnt to.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        indices = np.asarray(self.indices(history), dtype=np.int64)
        barred = indices.tolist() if exclude is None else self.indices(exclude)
        width = min(max(width or 2 * k, k), len(self.items))
        shown = indices[-self.settings.max_history :].tolist()
        if think:
            ranking, trace = self._think(shown, width=width, barred=barred)
        else:
            prompt = self.encoder.recommendation_prompt(shown)
            prefilled = self.decoder.prefill([prompt], width=width)
            beams = self.decoder.search(prefilled, width=width, excluded=[barred])
            (ranking,), trace = by_thought(beams, samples=1), ""
        pairs = zip(ranking.items_EW[0].tolist(), ranking.scores_EW[0].tolist(), strict=True)
        found = [self._recommendation(item, score) for item, score in pairs if item >= 0]
        return Recommendations(found[:k], trace=trace)

    def rank(
        self,
        histories: Sequence[np.ndarray],
        *,
        width: int,
        exclude_history: Sequence[bool] = (True,),
        progress: str = "",
    ) -> list[Ranking]:
        """Rank the catalogue for many histories of item indices; see `rank_histories`."""
        return rank_histories(
            self.decoder,
            self.encoder,
            histories,
            width=width,
            max_history=self.settings.max_history,
            exclude_history=exclude_history,
            progress=progress,
        )

    def rank_thinking(
        self,
        histories: Sequence[np.ndarray],
        *,
        width: int,
        settings: ThoughtSettings | None = None,
        exclude_history: Sequence[bool] = (True,),
        keys: Sequence[int] | None = None,
        progress: str = "",
    ) -> ThoughtRanking:
        """Think, then rank, for many histories; see `thought_ranking.rank_thinking`.

        Raises:
            ValueError: when the model has not learnt to think.
        """
        return rank_thinking(
            self.thinker,
            histories,
            settings=settings or self.thoughts,
            width=width,
            max_history=self.settings.max_history,
            exclude_history=exclude_history,
            keys=keys,
            progress=progress,
        )

    @cached_property
    def thinker(self) -> Thinker:
        """Samples this model's thoughts."""
        return Thinker(self.decoder, self.encoder)

    @property
    def thoughts(self) -> ThoughtSettings:
        """How this model thinks; ValueError when it has not learnt to."""
        if self.settings.thoughts is None:
            raise ValueError(
                f"this model is {self.settings.stage} and has not learnt to think; train it with "
                "`whyrec activate`, or leave thinking off"
            )
        return self.settings.thoughts

    def _think(self, history: list[int], *, width: int, barred: list[int]) -> tuple[Ranking, str]:
        """The ranking after thoughts on one history, and the thought that speaks most for it."""
        settings = self.thoughts
        drawn = self.thinker.think(
            [self.encoder.thinking_prompt(history)],
            samples=settings.samples,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=0,
        )
        beams = self.decoder.search(
            self.thinker.answer(drawn, width=width),
            width=width,
            excluded=[barred] * settings.samples,
        )
        rankings = by_thought(beams, samples=settings.samples)
        mixed = fuse(rankings, weights=[1] * settings.samples, width=width)
        best = drawn.thought(0, speaks_most(rankings, mixed))
        return mixed, self.encoder.tokenizer.decode(best)

    def indices(self, item_ids: Sequence[str]) -> list[int]:
        """Item indices of ids.

        Raises:
            ValueError: for an unknown id, with the nearest known ones.
        """
        if isinstance(item_ids, str):
            raise ValueError(f"give item ids as a list, [{item_ids!r}], not as one text")
        for item_id in item_ids:
            if item_id not in self._index:
                near = nearest_ids(str(item_id), self._index)
                known = ", ".join(near or list(self._index)[:3])
                what = "the nearest known ids are" if near else "known ids are like"
                raise ValueError(f"unknown item {item_id!r}; {what} {known}")
        return [self._index[item_id] for item_id in item_ids]

    def _recommendation(self, item: int, score: float) -> Recommendation:
        entry = self.items[item]
        return Recommendation(
            entry.item_id, entry.title, score, sid_text(self._codes_NL[item].tolist())
        )
