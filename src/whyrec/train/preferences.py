"""Preference pairs for DPO: the best against the worst of what the model itself came up with.

For each training step the activated model thinks G times, and an exact beam follows each thought
(`rollouts.py`). A reply is a thought and an item:

* chosen: the thought with the highest reward, and the item that was really next;
* rejected: the thoughts with the lowest rewards, each with the best item of its beam that was not
  next; several of them, as in S-DPO (Chen et al. 2024, arXiv 2406.09215).

Where all thoughts earn the same there is no preference; such dead groups are counted and drawn
again for other steps. Pairs are sampled in shards, which are files, so that a kill loses at most
one, and processes share the shards.

    write_preferences(roller, model, chosen, negatives=3, shard=256, folder=…, file=…, state=…)
    preferences, report = read_preferences(file)
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel

from whyrec.catalog.dataset import write_table
from whyrec.stage import write_json
from whyrec.train.rollouts import Group, Roller


@dataclass(frozen=True)
class Preference:
    """One chosen reply and some rejected ones to the same prompt.

    Attributes:
        step: number of the training step.
        chosen: the words of the thought, `</think>` included where the model closed it.
        chosen_item: the item after it.
        rejected: the words of the other thoughts, worst first.
        rejected_items: the items after them.
        chosen_reward: of the chosen thought.
        rejected_reward: mean of the rejected ones.
    """

    step: int
    chosen: list[int]
    chosen_item: int
    rejected: list[list[int]]
    rejected_items: list[int]
    chosen_reward: float
    rejected_reward: float


_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("chosen", pa.list_(pa.int32())),
        ("chosen_item", pa.int32()),
        ("rejected", pa.list_(pa.list_(pa.int32()))),
        ("rejected_items", pa.list_(pa.int32())),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
    ]
)


def prefer(group: Group, *, negatives: int) -> Preference | None:
    """What a group says is better than what; None where all is the same.

    Args:
        group: thoughts and beams after one prompt.
        negatives: rejected replies at most.
    """
    if group.is_dead:
        return None
    order_G = np.argsort(group.totals_G, kind="stable")
    best = int(np.argmax(group.totals_G))
    rejected: list[tuple[int, int]] = []
    for place in order_G.tolist():
        wrong = [i for i in group.items_GW[place].tolist() if i not in (-1, group.target)]
        if group.totals_G[place] < group.totals_G[best] and wrong and len(rejected) < negatives:
            rejected.append((place, wrong[0]))
    if not rejected:
        return None
    return Preference(
        group.step,
        group.words[best],
        group.target,
        [group.words[place] for place, _ in rejected],
        [item for _, item in rejected],
        float(group.totals_G[best]),
        float(np.mean([group.totals_G[place] for place, _ in rejected])),
    )


def write_preferences(
    roller: Roller,
    model: PreTrainedModel,
    chosen: Sequence[int],
    *,
    negatives: int,
    shard: int,
    folder: Path,
    file: Path,
    state: PartialState,
) -> None:
    """Sample preferences for training steps; all processes of a run call it.

    Args:
        roller: makes the rollouts.
        model: the model that thinks, on this process's device.
        chosen: numbers of training steps.
        negatives: rejected replies of each at most.
        shard: steps of a shard.
        folder: of the shards; what lies there is not sampled again.
        file: Parquet file of all preferences, beside a report as JSON.
        state: this process among all.

    Raises:
        ValueError: when no group has a preference.
    """
    starts = range(0, len(chosen), shard)
    folder.mkdir(parents=True, exist_ok=True)
    mine = [n for n in range(len(starts)) if n % state.num_processes == state.process_index]
    for n in tqdm(mine, desc="preferences", unit="shard", disable=not state.is_main_process):
        if not (folder / f"{n:05}.parquet").exists():
            steps = chosen[starts[n] : starts[n] + shard]
            with torch.autocast(
                state.device.type, torch.bfloat16, enabled=state.device.type == "cuda"
            ):
                groups, dead, drawn = roller.live_groups(
                    model, steps, seed=roller.settings.seed + 7919 * n, share=(n, len(starts))
                )
            found = [prefer(group, negatives=negatives) for group in groups]
            kept = [asdict(preference) for preference in found if preference is not None]
            counts = {"groups": len(dead), "dead": sum(dead), "drawn": drawn}
            write_json(folder / f"{n:05}.json", counts)
            write_table(folder / f"{n:05}.parquet", pa.Table.from_pylist(kept, schema=_SCHEMA))
    if state.is_main_process:
        shards = [folder / f"{n:05}.parquet" for n in range(len(starts))]
        while not all(part.exists() for part in shards):  # a barrier would time out
            time.sleep(1)
        _join(shards, file)
    while not file.exists():
        time.sleep(1)
    state.wait_for_everyone()


def read_preferences(file: Path) -> tuple[list[Preference], dict[str, float]]:
    """What `write_preferences` found, and its report."""
    report = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return [Preference(**row) for row in pq.read_table(file).to_pylist()], report


def _join(shards: Sequence[Path], file: Path) -> None:
    table = pa.concat_tables([pq.read_table(part) for part in shards])
    counts = [json.loads(part.with_suffix(".json").read_text(encoding="utf-8")) for part in shards]
    summed = {name: sum(count[name] for count in counts) for name in counts[0]}
    if not len(table):
        raise ValueError(
            f"none of {summed['drawn']} groups of thoughts has a best and a worst one; choose "
            "rewards that differ more, more thoughts a prompt (samples) or a higher temperature"
        )
    columns = table.to_pydict()
    report = summed | {
        "kept": len(table),
        "dead_groups": round(summed["dead"] / summed["groups"], 4),
        "negatives": round(float(np.mean([len(items) for items in columns["rejected_items"]])), 3),
        "chosen_reward": round(float(np.mean(columns["chosen_reward"])), 4),
        "rejected_reward": round(float(np.mean(columns["rejected_reward"])), 4),
        "chosen_tokens": round(float(np.mean([len(words) for words in columns["chosen"]])), 2),
    }
    write_json(file.with_suffix(".json"), report)
    write_table(file, table)  # last: it says that all is done
