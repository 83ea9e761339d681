"""What a trie of many items costs a decoding step: for `serve.py`."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary

LEVEL_SIZES = (256,) * 4


def random_trie(num_items: int, *, seed: int) -> Trie:
    """Distinct random SIDs."""
    generator = np.random.default_rng(seed)
    keys = np.unique(generator.integers(0, 2**32, size=int(num_items * 1.01) + 9))
    keys = generator.permutation(keys)[:num_items]
    codes_NL = keys[:, None] >> np.array([24, 16, 8, 0]) & 255
    return Trie.build(torch.from_numpy(codes_NL), level_sizes=LEVEL_SIZES)


def trie_step_ms(trie: Trie, users: int, width: int, repeats: int) -> float:
    """What one level of a beam asks the trie, the mean over levels, launched as in the beam."""
    from whyrec.decode.permitted import Permitted, Rule

    device = trie.device
    permitted = Permitted.of(
        [Rule()] * users, trie=trie.to("cpu"), ranks_N=np.zeros(trie.num_items), intervals=64
    ).to(device)
    depths = []
    for level in range(trie.num_levels):
        low, high = trie.offsets[level : level + 2]
        beams = width if level else 1
        depths.append(torch.randint(low, high, (users, beams), device=device))

    def ask() -> None:
        for level, nodes_UW in enumerate(depths):
            children_UWK = trie.children(nodes_UW, level=level)
            low_UWK, high_UWK = trie.leaf_range(children_UWK, level=level + 1)
            children_UWK.masked_fill(~permitted.any_between(low_UWK, high_UWK), -1)

    run, runs = ask, 1
    if device.type == "cuda":
        runs = 20  # behind one another, as a beam's steps are
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                ask()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ask()
        run = graph.replay
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(runs):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / runs)
    return float(np.median(times)) / trie.num_levels


def constraint_ms(
    trie: Trie, vocabulary: SidVocabulary, rows: int, repeats: int
) -> dict[str, float]:
    """The logits processor for rows that are all inside a SID, which grows a code a step.

    Returns:
        Medians over steps: `ms` of the whole call, the device's work included, and `host_ms` of
            finding each row's node, before anything is given to the device.
    """
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from whyrec.serve.constraint import V1Constraint
    from whyrec.serve.tries import ServedTrie, Shelf

    host, on_gpu = trie.to("cpu"), trie.device.type == "cuda"
    served = ServedTrie.of(host, trie.device)
    shelf = Shelf(Path(), trie.device, vocabulary, torch.zeros(0, dtype=torch.long), {0: served})
    model = SimpleNamespace(model="", get_vocab_size=lambda: vocabulary.stop)
    config: Any = SimpleNamespace(model_config=model)
    processor = V1Constraint(config, trie.device, on_gpu)
    processor._shelf = shelf
    logits_BV = torch.randn(rows, vocabulary.stop, device=trie.device)
    leaves = np.random.default_rng(0).integers(0, trie.num_items, size=rows)
    sids = []
    for leaf in leaves:  # from the leaf upwards
        node, codes = host.num_internal + int(leaf), list[int]()
        while node:
            codes.append(int(host.code[node]))
            node = int(np.searchsorted(host.first_child, node, side="right")) - 1
        sids.append([vocabulary.begin, *vocabulary.encode(codes[::-1])])
    times: dict[str, list[float]] = {"ms": [], "host_ms": []}
    for turn in range(2 * repeats + 4):
        texts: list[list[int]] = [[] for _ in range(rows)]
        added = [(row, SamplingParams(), [5] * 9, text) for row, text in enumerate(texts)]
        processor.update_state(BatchUpdate(rows, [], added, []))
        for level in range(trie.num_levels):
            for text, sid in zip(texts, sids, strict=True):
                text.append(sid[level])
            asked_BV = logits_BV.clone()
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            if turn % 2:
                processor._spans(shelf)
            else:
                processor.apply(asked_BV)
                if on_gpu:
                    torch.cuda.synchronize()
            if turn >= 4:
                took = (time.perf_counter() - start) * 1e3
                times["host_ms" if turn % 2 else "ms"].append(took)
    return {name: float(np.median(values)) for name, values in times.items()}
