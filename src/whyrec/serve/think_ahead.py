"""`whyrec think-ahead`: each user's thoughts, and the beam over the first SID levels, offline.

    whyrec think-ahead MODEL --run runs/ml-100k
    whyrec serve       MODEL --run runs/ml-100k --ahead runs/ml-100k/ahead.sqlite

After OneRec-Think's Think-Ahead (arXiv 2510.11639): reasoning and the first codes change slowly and
may be prepared; the last codes are decoded online, after the newest history. For each user of the
run, T thoughts are sampled after all that the user has done, and behind each the best prefixes of
`levels` codes are kept. Users whose entry was made from the same history with the same settings are
left alone, so that a run that was interrupted goes on and a later one does only what is new.

What this is worth is measured by `ahead_quality.py`.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from whyrec.catalog.dataset import Dataset
from whyrec.decode.recommender import Recommender
from whyrec.serve.ahead import Prepared, Store, model_fingerprint, open_store
from whyrec.serve.ahead_ray import prepare_on_ray
from whyrec.serve.ahead_worker import AheadSettings, AheadWorker


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
    ray: str = "",
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
        ray: address of a Ray cluster, such as `ray://head:10001` or `auto`, whose machines prepare
            the users with Ray Data; they see the model folder under the same path. This process
            alone writes to the store. Empty prepares all in this process.

    Raises:
        ValueError: when the model has not learnt to think, a setting makes no sense, or there is
            no Ray.
    """
    recommender = Recommender.from_pretrained(folder, device=device)
    settings = AheadSettings.of(recommender, thoughts=thoughts, width=width, levels=levels)
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
    model, made_with = model_fingerprint(folder), settings.dumps()
    opened = open_store(store or str(run / "ahead.sqlite"))
    try:
        todo = _not_done(opened, histories, model=model, made_with=made_with)
        rows = [(u, dataset.user_index[u], recommender.indices(histories[u])) for u in todo]
        if ray:
            prepared = prepare_on_ray(rows, folder=folder, settings=settings, address=ray)
        else:
            prepared = _prepare_here(rows, AheadWorker(recommender, settings))
        bar = tqdm(total=len(histories), desc="think ahead", unit="user", file=sys.stderr)
        bar.update(len(histories) - len(todo))
        for batch in prepared:
            now = time.time()
            entries = [
                Prepared(user, now, histories[user], drawn, prefixes, made_with)
                for user, drawn, prefixes in batch
            ]
            opened.put(entries, model=model)
            bar.update(len(batch))
        bar.close()
    finally:
        opened.close()
    return len(todo)


def _prepare_here(
    rows: Sequence[tuple[str, int, list[int]]], worker: AheadWorker
) -> Iterator[list[tuple[str, list[list[int]], list[list[list[int]]]]]]:
    """User, thoughts and prefixes, a batch after the other, of users, their keys and histories."""
    for batch in worker.batches([history for _, _, history in rows]):
        made = worker.prepare([rows[n][2] for n in batch], keys=[rows[n][1] for n in batch])
        yield [(rows[n][0], *found) for n, found in zip(batch, made, strict=True)]


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
