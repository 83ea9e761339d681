"""`whyrec think-ahead`: each user's thoughts, and the beam over the first SID levels, offline.

    whyrec think-ahead MODEL --run runs/ml-100k
    whyrec serve       MODEL --run runs/ml-100k --ahead runs/ml-100k/ahead.sqlite

After OneRec-Think's Think-Ahead (arXiv 2510.11639): reasoning and the first codes change slowly and
may be prepared; the last codes are decoded online, after the newest history. For each user of the
run, T thoughts are sampled after all that the user has done, and behind each the best prefixes of
`levels` codes are kept. Users whose entry was made from the same history with the same settings are
left alone, so that a run that was interrupted goes on and a later one does only what is new.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from whyrec.catalog.dataset import Dataset
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.ranking import batches
from whyrec.decode.recommender import Recommender
from whyrec.decode.think import Thinker, ThoughtSettings
from whyrec.serve.ahead import Prepared, Store, model_fingerprint, open_store
from whyrec.sid.trie import Trie


def think_ahead(
    folder: Path,
    run: Path,
    *,
    store: str = "",
    thoughts: int | None = None,
    width: int = 50,
    levels: int | None = None,
    users: Sequence[str] = (),
    device: str | None = None,
) -> int:
    """Prepare the users of a run; how many were prepared now.

    Args:
        folder: a model folder that has learnt to think.
        run: the run folder that knows the users.
        store: a SQLite file or a `redis://` URL; `RUN/ahead.sqlite` when empty.
        thoughts: T, thoughts a user; the model's own number when None.
        width: prefixes a thought.
        levels: codes of a prefix; all but the last when None.
        users: ids of those to prepare; all when empty.
        device: as for `Recommender.from_pretrained`.

    Raises:
        ValueError: when the model has not learnt to think, or a setting makes no sense.
    """
    recommender = Recommender.from_pretrained(folder, device=device)
    settings = recommender.thoughts
    if thoughts is not None:
        settings = replace(settings, samples=thoughts)
    num_levels = recommender.decoder.trie.num_levels
    levels = max(num_levels - 1, 1) if levels is None else levels
    if settings.samples < 1 or width < 1 or not 1 <= levels <= num_levels:
        raise ValueError(
            f"--thoughts and --width must be at least 1, and --levels between 1 and {num_levels}"
        )
    dataset = Dataset.load(run / "dataset")
    known = {item.item_id for item in recommender.items}
    chosen = [dataset.user(user) for user in users] or range(len(dataset.user_ids))
    histories = {
        dataset.user_ids[u]: [
            item_id
            for item_id in (dataset.items[i].item_id for i in dataset.sequences[u])
            if item_id in known
        ]
        for u in chosen
    }
    model = model_fingerprint(folder)
    made_with = json.dumps([settings.samples, settings.max_tokens, settings.temperature, width,
                            levels])  # fmt: skip
    opened = open_store(store or str(run / "ahead.sqlite"))
    try:
        todo = _not_done(opened, histories, model=model, made_with=made_with)
        worker = _Worker(recommender, settings=settings, width=width, levels=levels)
        bar = tqdm(total=len(histories), desc="think ahead", unit="user", file=sys.stderr)
        bar.update(len(histories) - len(todo))
        newest = slice(-recommender.settings.max_history, None)
        prompts = [
            recommender.encoder.thinking_prompt(recommender.indices(histories[user])[newest])
            for user in todo
        ]
        rows = [settings.samples * (settings.max_tokens + len(prompt)) for prompt in prompts]
        for batch in batches(rows, device=recommender.decoder.device.type) if todo else []:
            names = [todo[place] for place in batch]
            keys = [dataset.user_index[user] for user in names]
            made = worker.prepare([prompts[place] for place in batch], keys=keys)
            now = time.time()
            entries = [
                Prepared(user, now, histories[user], drawn, prefixes, made_with)
                for user, (drawn, prefixes) in zip(names, made, strict=True)
            ]
            opened.put(entries, model=model)
            bar.update(len(batch))
        bar.close()
    finally:
        opened.close()
    return len(todo)


class _Worker:
    """Thoughts, and beams over prefixes: the trie of a catalogue cut off after some levels."""

    def __init__(
        self, recommender: Recommender, *, settings: ThoughtSettings, width: int, levels: int
    ) -> None:
        self._settings = settings
        full = recommender.decoder
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
        self._width = min(width, len(self._prefixes_PL))
        self._thinker = Thinker(self._decoder, recommender.encoder)

    def prepare(
        self, prompts: list[list[int]], *, keys: list[int]
    ) -> list[tuple[list[list[int]], list[list[list[int]]]]]:
        """The thoughts of each user, and the prefixes behind each thought."""
        samples = self._settings.samples
        drawn = self._thinker.think(
            prompts,
            samples=samples,
            max_tokens=self._settings.max_tokens,
            temperature=self._settings.temperature,
            seed=0,
            keys=keys,
        )
        beams = self._decoder.search(
            self._thinker.answer(drawn, width=self._width), width=self._width
        )
        found = []
        for user in range(len(prompts)):
            rows = beams.items_UW[user * samples : (user + 1) * samples].tolist()
            prefixes = [
                [self._prefixes_PL[place].tolist() for place in row if place >= 0] for row in rows
            ]
            found.append(([drawn.thought(user, g) for g in range(samples)], prefixes))
        return found


def _not_done(
    store: Store, histories: dict[str, list[str]], *, model: str, made_with: str
) -> list[str]:
    """Users whose entry is missing, or was made from another history or with other settings."""
    todo = []
    for user, history in histories.items():
        entry = store.get(user, model=model)
        if entry is None or entry.history != history or entry.settings != made_with:
            todo.append(user)
    return todo
