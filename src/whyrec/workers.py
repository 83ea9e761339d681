"""One function for many numbers, by several forked processes where that pays."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

T = TypeVar("T")
_BATCH, _MOST = 128, 16
_LEAST = 500  # numbers that are worth a process, which starts in about a tenth of a second


class _Calls(Dataset[Any]):
    """`function(0)`, `function(1)`, …"""

    def __init__(self, function: Callable[[int], Any], count: int) -> None:
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def in_processes(function: Callable[[int], T], count: int, *, progress: str = "") -> list[T]:
    """`[function(0), …, function(count - 1)]`.

    Args:
        function: of a number; what it reads is shared with the processes as it is now, what it
            writes is lost. It must not touch a GPU.
        count: how many numbers.
        progress: a label for the progress bar; none is shown when it is empty.
    """
    workers = min((os.cpu_count() or 1) // 2, count // _LEAST, _MOST)
    bar = tqdm(total=count, desc=progress, disable=not progress, file=sys.stderr)
    found: list[T] = []
    if workers < 2:
        for index in range(count):
            found.append(function(index))
            bar.update()
    else:
        batches = DataLoader(
            _Calls(function, count),
            batch_size=_BATCH,
            num_workers=workers,
            collate_fn=list,
            multiprocessing_context="fork",
        )
        for batch in batches:
            found += batch
            bar.update(len(batch))
    bar.close()
    return found
