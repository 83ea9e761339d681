"""How long it takes to rank the catalogue for all users of a split, and what the time goes to.

    python eval/bench/evaluate.py runs/beauty/model/aligned --run runs/beauty \\
        --json eval/results/evaluate/h100.json

Timed after loading, and after a first ranking for some of the users, which compiles kernels and
fills the memory pools. Tokens are those of prompts, without padding.

    evaluate/users, evaluate/prompt_tokens        users, and tokens of a prompt on average
    evaluate/prompts/seconds                      writing the prompts
    evaluate/excluded/…                           ranking them, without items of the history
    evaluate/both/…                               the same, and once more with those items
    evaluate/whole/…                              prompts and the first ranking: an evaluation
        seconds, users_per_s, tokens_per_s
    evaluate/PHASE/kernel_ms/GROUP                one middle batch by groups of kernels, `GROUPS`
    evaluate/PHASE/{kernels,wall_ms}              how many kernels that is, and time on the clock
    evaluate/plain/…                              some users by the model's own forward
        same_items                                share of items that are the same, rank by rank
        score_error                               the greatest difference where they are
        seconds, lean_seconds                     time of both, one after the other

PHASE is `prefill` or `search`. On a CPU, where the model's own forward runs in any case, operators
stand in the place of kernels.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from whyrec.backbone import lean_blocks
from whyrec.catalog.dataset import Dataset
from whyrec.decode.ranking import Ranking, batches, rank_prompts, written
from whyrec.decode.recommender import Recommender
from whyrec.evaluation.results import record
from whyrec.stage import fingerprint

T = TypeVar("T")
WARM_UP, TOP = 2_000, 12
GROUPS = {  # by what is in a kernel's name; the first that fits
    "attention": ("flash", "fmha", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "splitk", "aten::mm", "addmm", "bmm"),
    "norm": ("norm",),
    "rotation": ("rotate",),
    "gate": ("gate_kernel", "silu"),
    "copies": ("memcpy", "memset", "copy", "fill", "cat"),
    "other": ("",),
}


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call that leaves nothing for the GPU to do, and its answer."""
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def finished(call: Callable[[], T]) -> T:
    """The answer of a call, the GPU's work done."""
    answer = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return answer


def kernel_figures(phase: str, call: Callable[[], T]) -> tuple[dict[str, float], T]:
    """Time of each group of kernels in a call; the longest are printed."""
    on_gpu = torch.cuda.is_available()
    wall, _ = timed(lambda: finished(call))
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        answer = finished(call)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [
        (event.key, event.count, (event.self_device_time_total or event.self_cpu_time_total) / 1e3)
        for event in found.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    figures = dict.fromkeys((f"evaluate/{phase}/kernel_ms/{group}" for group in GROUPS), 0.0)
    for name, _, ms in events:
        group = next(g for g, parts in GROUPS.items() if any(p in name.lower() for p in parts))
        figures[f"evaluate/{phase}/kernel_ms/{group}"] += ms
    figures[f"evaluate/{phase}/kernels"] = sum(count for _, count, _ in events)
    figures[f"evaluate/{phase}/wall_ms"] = 1e3 * wall
    print(f"{phase} of a middle batch: {sum(ms for *_, ms in events):.1f} ms in kernels")
    for name, count, ms in sorted(events, key=lambda event: -event[2])[:TOP]:
        print(f"  {ms:8.2f} ms {count:6d} x {name[:90]}")
    return figures, answer


def batch_figures(
    recommender: Recommender,
    prompts: Sequence[Sequence[int]],
    histories: Sequence[np.ndarray],
    *,
    width: int,
) -> dict[str, float]:
    """Where the time of the middle one of all batches goes."""
    decoder = recommender.decoder
    found = batches([len(prompt) for prompt in prompts], device=decoder.device.type)
    batch = found[len(found) // 2]
    chosen, had = [prompts[i] for i in batch], [histories[i].tolist() for i in batch]
    compact = decoder.device.type == "cpu"
    figures, prefilled = kernel_figures("prefill", lambda: decoder.prefill(chosen, width=width))

    def search() -> None:
        prefilled.forget_beams()
        decoder.search(prefilled, width=width, excluded=had, compact=compact)

    print(f"{len(batch)} users of {len(prompts)}, {len(found)} batches")
    return figures | kernel_figures("search", search)[0]


def plain_figures(rank: Callable[[], list[Ranking]]) -> dict[str, float]:
    """The model's own forward beside ours."""
    lean_s, (lean,) = timed(rank)
    with patch.object(lean_blocks, "is_lean", lambda _: False):
        rank()
        plain_s, (plain,) = timed(rank)
    same_EW = lean.items_EW == plain.items_EW
    both_EW = same_EW & (plain.items_EW >= 0)
    error_EW = np.abs(lean.scores_EW - plain.scores_EW, where=both_EW, out=np.zeros(both_EW.shape))
    return {
        "evaluate/plain/same_items": float(same_EW.mean()),
        "evaluate/plain/score_error": float(error_EW.max()),
        "evaluate/plain/seconds": plain_s,
        "evaluate/plain/lean_seconds": lean_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--run", type=Path, required=True, help="run folder with the data set")
    parser.add_argument("--split", choices=["valid", "test"], default="valid")
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--users", type=int, default=0, help="a subset of so many; 0 for all")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    examples = Dataset.load(options.run / "dataset").examples(options.split)
    examples = examples.at_most(options.users)
    recommender = Recommender.from_pretrained(options.model)
    histories, max_history = examples.histories, recommender.settings.max_history

    prompts_s, prompts = timed(
        lambda: written(
            histories, recommender.encoder.recommendation_prompt, max_history=max_history
        )
    )
    num_tokens = sum(map(len, prompts))
    figures: dict[str, float] = {
        "evaluate/users": len(prompts),
        "evaluate/prompt_tokens": num_tokens / len(prompts),
        "evaluate/prompts/seconds": prompts_s,
    }

    # Users of all kinds: the longest prompts decide how much memory there must be.
    some = np.random.default_rng(0).permutation(len(prompts))[:WARM_UP]

    def rank_some() -> list[Ranking]:
        return rank_prompts(
            recommender.decoder,
            [prompts[i] for i in some],
            [histories[i] for i in some],
            width=options.beams,
        )

    def rank(exclude_history: Sequence[bool]) -> float:
        return timed(
            lambda: rank_prompts(
                recommender.decoder,
                prompts,
                histories,
                width=options.beams,
                exclude_history=exclude_history,
            )
        )[0]

    rank_some()
    excluded_s, both_s = rank([True]), rank([True, False])
    for name, seconds in {
        "excluded": excluded_s,
        "both": both_s,
        "whole": prompts_s + excluded_s,
    }.items():
        figures |= {
            f"evaluate/{name}/seconds": seconds,
            f"evaluate/{name}/users_per_s": len(prompts) / seconds,
            f"evaluate/{name}/tokens_per_s": num_tokens / seconds,
        }
        print(f"{name}: {seconds:.2f} s, {num_tokens / seconds:,.0f} tokens/s", flush=True)
    figures |= batch_figures(recommender, prompts, histories, width=options.beams)
    figures |= plain_figures(rank_some)

    figures = {key: round(float(value), 6) for key, value in figures.items()}
    for key, value in figures.items():
        print(f"{key:44s} {value:.6g}")
    if options.json:
        record(
            options.json,
            name="evaluate",
            command=shlex.join(["python", *sys.argv]),
            seed=0,
            figures=figures,
            data_sha256=fingerprint(options.run / "dataset"),
        )


if __name__ == "__main__":
    main()
