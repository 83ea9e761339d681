"""What a large catalogue costs a server on the host: memory and time, by number of items.

    python eval/bench/serve_catalogue.py --json eval/results/serve/catalogue-cpu.json

Items have an id, a title of six words, a brand, and a category; SIDs are random, 4 levels of 256.

* `catalogue/N/load_s`, `bytes_per_item`: the API server reads the catalogue (names, histories'
  prompts, filters), and how much its memory grows by it. A change of items reads it again beside
  the old one.
* `catalogue/N/search_ms`: one search by words of a title that few items have.
* `served_trie/N/load_s`, `file_bytes_per_item`, `bytes_per_item`: the worker reads the trie and
  checks it; what lies on disk, and on the device.
"""

import argparse
import gc
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from serve_trie import LEVEL_SIZES, random_trie
from soak import tiny_model

from whyrec.catalog.dataset import Item, write_items
from whyrec.evaluation.results import record
from whyrec.serve.catalogue import Catalogue
from whyrec.serve.tries import ServedTrie
from whyrec.sid.index import write_sids

WORDS = ["red", "blue", "small", "large", "quiet", "bright", "old", "new", "plain", "fine"]


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def write_catalogue(folder: Path, number: int, *, seed: int) -> None:
    """So many made-up items in place of a folder's own."""
    generator = np.random.default_rng(seed)
    words = generator.choice(WORDS, size=(number, 4))
    items = (
        Item(f"item-{n:09d}", f"{' '.join(row)} thing {n}", f"Brand {n % 997}", (f"Kind {n % 61}",))
        for n, row in enumerate(words.tolist())
    )
    write_items(folder / "items.parquet", items)
    keys = generator.permutation(2 * number)[:number].astype(np.int64) * 2_147_483_629 % 2**32
    codes_NL = torch.from_numpy(keys[:, None] >> np.array([24, 16, 8, 0]) & 255)
    write_sids(folder / "sids.parquet", [f"item-{n:09d}" for n in range(number)], codes_NL)


def catalogue_figures(folder: Path, number: int) -> dict[str, float]:
    gc.collect()
    before, start = resident(), time.perf_counter()
    catalogue = Catalogue.load(folder)
    took = time.perf_counter() - start
    gc.collect()
    grown = resident() - before
    times = []
    for n in range(5):
        start = time.perf_counter()
        assert len(catalogue.search(f"thing {number - 1 - n}", limit=20)) == 1
        times.append(time.perf_counter() - start)
    return {
        f"catalogue/{number}/load_s": took,
        f"catalogue/{number}/bytes_per_item": grown / number,
        f"catalogue/{number}/search_ms": float(np.median(times)) * 1e3,
    }


def trie_figures(folder: Path, number: int, *, seed: int) -> dict[str, float]:
    random_trie(number, seed=seed).save(folder / "trie.safetensors")
    gc.collect()
    start = time.perf_counter()
    served = ServedTrie.load(folder, torch.device("cpu"))
    return {
        f"served_trie/{number}/load_s": time.perf_counter() - start,
        f"served_trie/{number}/bytes_per_item": served.trie.nbytes / number,
        f"served_trie/{number}/file_bytes_per_item": (folder / "trie.safetensors").stat().st_size
        / number,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--trie-items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_model(Path(scratch), seed=options.seed, level_sizes=list(LEVEL_SIZES))
        Catalogue.load(folder)  # what is imported on the way is not the items' memory
        for number in options.items:
            write_catalogue(folder, number, seed=options.seed)
            figures |= catalogue_figures(folder, number)
        for number in options.trie_items:
            figures |= trie_figures(folder, number, seed=options.seed)
    figures = {key: round(float(value), 6) for key, value in sorted(figures.items())}
    for key, value in figures.items():
        print(f"{key:44s} {value:.6g}")
    if options.json:
        record(
            options.json,
            name="catalogue of a server",
            command=shlex.join(["python", *sys.argv]),
            seed=options.seed,
            figures=figures,
        )


if __name__ == "__main__":
    main()
