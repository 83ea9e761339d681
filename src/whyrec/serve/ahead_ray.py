"""Think-Ahead over many machines: Ray Data hands out users, actors with the model prepare them.

The driver gets what they made, batch by batch, and is the one that writes to the store, so that a
SQLite file will do and an interrupted run goes on with whom it has not written.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from whyrec.serve.ahead_worker import AheadSettings, AheadWorker

_USERS_A_BATCH = 64

Made = tuple[str, list[list[int]], list[list[list[int]]]]


class RayWorker:
    """An actor of `map_batches`: it loads the model once and prepares batch after batch.

    Args:
        folder: the model folder, seen by every machine under this path.
        settings: how to prepare.
    """

    def __init__(self, folder: str, settings: AheadSettings) -> None:
        from whyrec.decode.recommender import Recommender

        self._worker = AheadWorker(Recommender.from_pretrained(folder), settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Columns `user`, `key`, `history` to the columns `user` and `made`, which is JSON."""
        histories = [json.loads(text) for text in batch["history"]]
        keys = [int(key) for key in batch["key"]]
        found: list[str] = [""] * len(keys)
        for places in self._worker.batches(histories):
            made = self._worker.prepare(
                [histories[n] for n in places], keys=[keys[n] for n in places]
            )
            for place, one in zip(places, made, strict=True):
                found[place] = json.dumps(one)
        return {"user": [str(user) for user in batch["user"]], "made": found}


def prepare_on_ray(
    rows: Sequence[tuple[str, int, list[int]]],
    *,
    folder: Path,
    settings: AheadSettings,
    address: str,
) -> Iterator[list[Made]]:
    """User, thoughts and prefixes of some users, a batch after the other, in no order.

    One actor for each GPU of the cluster, or for each two CPUs where it has none.

    Args:
        rows: of each user the id, a number that the thoughts depend on, and the history as item
            indices.
        folder: the model folder, on every machine.
        settings: how to prepare.
        address: of the cluster; `local` starts one on this machine.

    Raises:
        ValueError: when the package `ray` is missing, or there is nothing at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError(
            "--ray needs the package ray; run `pip install 'whyrec[ray]'` on every machine"
        ) from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ValueError(f"no Ray cluster answers at {address!r} ({error})") from error
    if not rows:
        return
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actors = gpus or max(int(resources.get("CPU", 1)) // 2, 1)
    table = ray.data.from_items(
        [{"user": u, "key": key, "history": json.dumps(history)} for u, key, history in rows]
    )
    made = table.repartition(max(-(-len(rows) // _USERS_A_BATCH), 1)).map_batches(
        RayWorker,
        fn_constructor_args=(str(folder.resolve()), settings),
        batch_size=_USERS_A_BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    for batch in made.iter_batches(batch_size=_USERS_A_BATCH, batch_format="numpy"):
        yield [
            (str(user), *json.loads(str(one)))
            for user, one in zip(batch["user"], batch["made"], strict=True)
        ]
