"""Thoughts in advance, and beams over the first SID levels behind them, on one model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import batches
from whyrec.decode.recommender import Recommender
from whyrec.decode.think import Thinker, ThoughtSettings
from whyrec.sid.trie import Trie


@dataclass(frozen=True)
class AheadSettings:
    """How thoughts are prepared.

    Attributes:
        thoughts: how many for each user, how long, how warm.
        width: prefixes a thought.
        levels: codes of a prefix.
    """

    thoughts: ThoughtSettings
    width: int
    levels: int

    @classmethod
    def of(
        cls, recommender: Recommender, *, thoughts: int | None, width: int, levels: int | None
    ) -> "AheadSettings":
        """The model's own settings, but for what is given.

        Raises:
            ValueError: when the model has not learnt to think, or a setting makes no sense.
        """
        settings = recommender.thoughts
        if thoughts is not None:
            settings = replace(settings, samples=thoughts)
        num_levels = recommender.decoder.trie.num_levels
        levels = max(num_levels - 1, 1) if levels is None else levels
        if settings.samples < 1 or width < 1 or not 1 <= levels <= num_levels:
            raise ValueError(
                "--thoughts and --width must be at least 1, and --levels between 1 and "
                f"{num_levels}"
            )
        return cls(settings, width, levels)

    def dumps(self) -> str:
        """As a store's entry remembers it."""
        how = self.thoughts
        return json.dumps([how.samples, how.max_tokens, how.temperature, self.width, self.levels])


class AheadWorker:
    """Prepares users on one model, over the trie of its catalogue cut off after some levels."""

    def __init__(self, recommender: Recommender, settings: AheadSettings) -> None:
        self._how = settings.thoughts
        self._recommender = recommender
        full, levels = recommender.decoder, settings.levels
        codes_NL = torch.tensor(
            [recommender.encoder.item(item) for item in range(len(recommender.items))]
        ) - torch.tensor(full.vocabulary.offsets)
        # The codes that may follow a prefix are those of the whole trie, so the scores are too.
        self._prefixes_PL = torch.unique(codes_NL[:, :levels], dim=0)
        sizes = full.vocabulary.level_sizes[:levels]
        self._decoder = BeamDecoder(
            full.model,
            vocabulary=replace(
                full.vocabulary, level_sizes=sizes, offsets=full.vocabulary.offsets[:levels]
            ),
            trie=Trie.build(self._prefixes_PL, level_sizes=sizes),
        )
        self._width = min(settings.width, len(self._prefixes_PL))
        self._thinker = Thinker(self._decoder, recommender.encoder)

    def batches(self, histories: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of histories that are prepared together, as much as the device holds."""
        rows = [
            self._how.samples * (self._how.max_tokens + len(self._prompt(history)))
            for history in histories
        ]
        device = self._recommender.decoder.device.type
        return [list(batch) for batch in batches(rows, device=device)] if rows else []

    def prepare(
        self, histories: Sequence[Sequence[int]], *, keys: Sequence[int]
    ) -> list[tuple[list[list[int]], list[list[list[int]]]]]:
        """The thoughts of each user, and the prefixes behind each thought.

        Args:
            histories: item indices, oldest first.
            keys: a number of each user, which the thoughts depend on.
        """
        samples = self._how.samples
        drawn = self._thinker.think(
            [self._prompt(history) for history in histories],
            samples=samples,
            max_tokens=self._how.max_tokens,
            temperature=self._how.temperature,
            seed=0,
            keys=list(keys),
        )
        beams = self._decoder.search(
            self._thinker.answer(drawn, width=self._width), width=self._width
        )
        found = []
        for user in range(len(histories)):
            rows = beams.items_UW[user * samples : (user + 1) * samples].tolist()
            prefixes = [
                [self._prefixes_PL[place].tolist() for place in row if place >= 0] for row in rows
            ]
            found.append(([drawn.thought(user, g) for g in range(samples)], prefixes))
        return found

    def _prompt(self, history: Sequence[int]) -> list[int]:
        newest = list(history)[-self._recommender.settings.max_history :]
        return self._recommender.encoder.thinking_prompt(newest)
