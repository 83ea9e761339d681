"""The trie at 10 thousand, 1 million and 10 million items: size, building, and the next-code mask.

    python eval/bench/trie.py --json eval/results/trie/cpu.json

Each catalogue has random distinct SIDs of 4 levels x 256 codes. A sample of every trie is compared
with a binary search over the sorted SIDs before anything is timed. One call asks for 1,000 beams,
whose prefixes are those of random items. Times are medians over `--repeats` calls a depth, each on
the next of 32 inputs; the catalogues take turns, so that a busy machine disturbs them alike.
`mask_ms` and `children_ms` are means over the four depths; `mask_ms/D` is depth D alone.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from whyrec.evaluation.results import record
from whyrec.sid.trie import Trie

SIZES = {"10k": 10_000, "1m": 1_000_000, "10m": 10_000_000}
LEVEL_SIZES = (256, 256, 256, 256)
BEAMS = 1_000
INPUTS = 32


def random_catalogue(count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` distinct SIDs in random order, each packed into one number: int64 [count]."""
    keys = np.unique(generator.integers(0, 2**32, size=count + count // 50 + 10))
    keys_N = generator.permutation(keys)[:count]
    assert len(keys_N) == count
    return keys_N


def unpack(keys: np.ndarray) -> np.ndarray:
    """SIDs [..., 4] of packed numbers [...]."""
    return keys[..., None] >> np.array([24, 16, 8, 0]) & 255


def check(trie: Trie, keys_N: np.ndarray, generator: np.random.Generator) -> None:
    """Compare a sample of the trie's answers with a binary search over the sorted keys."""
    sample_B = generator.integers(0, len(keys_N), size=BEAMS)
    leaves_B = trie.walk(torch.from_numpy(unpack(keys_N[sample_B])))
    assert trie.leaf_items(leaves_B).tolist() == sample_B.tolist()
    sorted_N = np.sort(keys_N)
    strangers_B = generator.integers(0, 2**32, size=BEAMS)
    alive_B = trie.walk(torch.from_numpy(unpack(strangers_B))).numpy() >= 0
    assert np.array_equal(alive_B, np.isin(strangers_B, keys_N))
    for level in range(4):
        shift = 8 * (4 - level)
        nodes_B = trie.walk(torch.from_numpy(unpack(keys_N[sample_B])[:, :level]))
        mask_BK = trie.mask(nodes_B, level=level).numpy()
        for row, key in zip(mask_BK[:100], keys_N[sample_B[:100]], strict=True):
            first = key >> shift << shift
            low, high = np.searchsorted(sorted_N, [first, first + (1 << shift)])
            legal = np.unique(unpack(sorted_N[low:high])[:, level])
            assert np.array_equal(np.flatnonzero(row), legal)


def milliseconds(call: Callable[[Tensor], object], argument: Tensor) -> float:
    start = time.perf_counter()
    call(argument)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=320, help="calls a depth and size")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(options.seed)

    figures: dict[str, float] = {}
    tries: dict[str, Trie] = {}
    nodes: dict[tuple[str, int], list[Tensor]] = {}
    for name, count in SIZES.items():
        keys_N = random_catalogue(count, generator)
        codes_NL = torch.from_numpy(unpack(keys_N))
        start = time.perf_counter()
        trie = Trie.build(codes_NL, level_sizes=LEVEL_SIZES)
        figures[f"trie/{name}/build_s"] = round(time.perf_counter() - start, 4)
        figures[f"trie/{name}/bytes_per_item"] = round(trie.nbytes / count, 3)
        check(trie, keys_N, generator)
        tries[name] = trie
        for level in range(4):
            picks = generator.integers(0, count, size=(INPUTS, BEAMS))
            nodes[name, level] = list(trie.walk(codes_NL[torch.from_numpy(picks)][..., :level]))

    queries = {"mask": Trie.mask, "children": Trie.children}
    times: dict[tuple[str, str, int], list[float]] = {}
    for turn in tqdm(range(-3, options.repeats), desc="timing", unit="turn"):
        for query, method in queries.items():
            for (name, level), inputs in nodes.items():

                def call(nodes_B: Tensor) -> Tensor:
                    return method(tries[name], nodes_B, level=level)  # noqa: B023

                elapsed = milliseconds(call, inputs[turn % INPUTS])
                if turn >= 0:  # the first turns warm up
                    times.setdefault((query, name, level), []).append(elapsed)
    for query in queries:
        for name in SIZES:
            medians = [float(np.median(times[query, name, level])) for level in range(4)]
            figures[f"trie/{name}/{query}_ms"] = round(float(np.mean(medians)), 4)
            for level, median in enumerate(medians):
                figures[f"trie/{name}/{query}_ms/{level}"] = round(median, 4)
        ratio = figures[f"trie/10m/{query}_ms"] / figures[f"trie/10k/{query}_ms"]
        figures[f"trie/{query}_ratio_10m_to_10k"] = round(ratio, 3)
    figures["trie/threads"] = options.threads

    for key, value in sorted(figures.items()):
        print(f"{key:36s} {value:.6g}")
    if options.json:
        record(
            options.json,
            name="trie",
            command=shlex.join(["python", *sys.argv]),
            seed=options.seed,
            figures=figures,
        )


if __name__ == "__main__":
    main()
