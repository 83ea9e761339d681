"""Beams inside vLLM beside `LLM.beam_search` of the same engine, in one run.

On a GPU (SmolLM2-135M with 4 levels x 256 new tokens, random weights for those, a random catalogue
of 12,000 items, prompts of 160 tokens, bf16):

    python eval/bench/serve.py --backbone FOLDER --json eval/results/serve/h100.json

On a CPU with a trained model folder, after a thought:

    python eval/bench/serve.py --model runs/ml-100k/model/aligned --sizes 1x20 \\
        --json eval/results/serve/cpu.json

Every call of ours is an RPC to the worker with prompts that it has not seen, from lists of token
ids to lists of items, so `serve/UxW/ms` is what a server waits for; `p95_ms` and `p99_ms` stand
beside the median. vLLM's beam search gets the same prompts (its last token is an ordinary one, so
that no SID is constrained), as many steps as an item has codes and nothing else to do; it is
unconstrained, and its own code compiled and graphed as vLLM likes unless `--eager`. On a GPU the
engine runs in this process, so that no message between processes counts on either side.

`legal` is the share of our beams that are items, all different, as many as were asked for. The
reference is `whyrec.decode` on the Hugging Face model, on the same device, in the same precision:
`same_items` is the share of items that both found, `same_best` of users whose best item is the
same, `score_error` the greatest difference of a shared item's score, `cut_gap` how far from the
last rank's score an item is at most that only one of both found: bf16 decides such ties either way.
With `--exact` both run in float32, where ranks must be equal. `serve/weights_copied` is what the
beam holds of the model's weights beside vLLM's own, as a share of them.

On a CPU three states are timed, width by width: `cold` (a user never seen, with a thought), `warm`
(the user's prompt was seen, the thought of 32 tokens is new: the case after a thought), `repeat`
(all of it was seen); `serve_cpu/UxW/ms` is warm.

`serve/trie_step_overhead_10m` is the time of everything that asks the trie in one decoding step
(children, leaf ranges, what is permitted) with 10 million random items, over the time of a step of
the beam of the same size (its whole time over its levels).
`serve/constraint_step_overhead_10m` is the time of the logits processor for 64 requests that are
all inside a SID, over a step of the engine that decodes 64 texts; it waits for the device before
and after, which the engine does not, so what it costs a step is less.

Figures are written after each part; a part that fails is told and the others go on.
"""

import argparse
import gc
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve_trie import LEVEL_SIZES, constraint_ms, random_trie, trie_step_ms
from tqdm import tqdm

from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import PACKAGED, load_backbone
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.model_folder import SETTINGS_FILE, name_weights, read_settings
from whyrec.evaluation.results import record
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary
from whyrec.stage import write_json

ITEMS, PROMPT_TOKENS, THOUGHT_TOKENS = 12_000, 160, 32
MILLIONS = 10_000_000


def make_folder(folder: Path, backbone: str, *, seed: int) -> None:
    """A model folder with a random catalogue, as far as serving reads it."""
    model, tokenizer = load_backbone(backbone)
    extend_vocabulary(model, tokenizer, level_sizes=LEVEL_SIZES, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "stage": "aligned",
        "backbone": backbone,
        "level_sizes": list(LEVEL_SIZES),
        "max_history": 50,
    }
    write_json(folder / SETTINGS_FILE, settings)
    random_trie(ITEMS, seed=seed).save(folder / "trie.safetensors")
    name_weights(folder)


def link_folder(folder: Path, model: Path) -> None:
    """A folder of links to a model folder, with an index of its weights."""
    for path in model.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    name_weights(folder)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def spread(times: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile."""
    low, mid, high = np.percentile(times, [50, 95, 99])
    return {"ms": float(low), "p95_ms": float(mid), "p99_ms": float(high)}


class Bench:
    """One engine, its prompts, its figures."""

    def __init__(self, llm: Any, folder: Path, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.llm, self.options = llm, options
        self.info = llm.collective_rpc("whyrec_load")[0]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocabulary = SidVocabulary.bind(
            self.tokenizer, level_sizes=read_settings(folder).level_sizes
        )
        self.generator = np.random.default_rng(options.seed)
        self.figures: dict[str, float] = {}
        if torch.cuda.is_available():  # on a CPU vLLM packs weights away
            copied = self.info["copied_bytes"] / self.info["weight_bytes"]
            self.figures["serve/weights_copied"] = copied

    def prompts(self, users: int, *, thought: int = 0) -> list[list[int]]:
        """Random words, `<|sid_begin|>` last."""
        words = self.generator.integers(100, 40_000, size=(users, PROMPT_TOKENS))
        words[:, -1] = self.vocabulary.begin
        return words.tolist()

    def ours(self, prompts: list[list[int]], width: int) -> list[tuple[list[int], list[float]]]:
        rules = [[[], None, None]] * len(prompts)
        widths = [width] * len(prompts)
        return self.llm.collective_rpc("whyrec_recommend", args=(0, prompts, widths, rules))[0]

    def theirs(self, prompts: list[list[int]], width: int) -> None:
        from vllm.sampling_params import BeamSearchParams

        asked = [{"prompt_token_ids": [*prompt[:-1], 100]} for prompt in prompts]
        params = BeamSearchParams(
            beam_width=width, max_tokens=self.vocabulary.num_levels, ignore_eos=True
        )
        self.llm.beam_search(asked, params)

    def on_gpu(self, users: int, width: int, repeats: int, their_repeats: int) -> None:
        """Median times of fresh prompts, ours and vLLM's."""
        key = f"serve/{users}x{width}"
        held = torch.cuda.memory_reserved()
        first = timed(lambda: self.ours(self.prompts(users), width))  # captures the graph
        self.figures[f"{key}/first_ms"] = first
        self.figures[f"{key}/graph_gib"] = (torch.cuda.memory_reserved() - held) / 2**30
        for _ in range(3):
            self.ours(self.prompts(users), width)
        batches = [self.prompts(users) for _ in range(repeats)]
        times, found = [], []
        for prompts in tqdm(batches, desc=f"{users} x {width}", unit="batch"):
            times.append(timed(lambda: found.extend(self.ours(prompts, width))))  # noqa: B023
        self.figures |= {f"{key}/{name}": value for name, value in spread(times).items()}
        self.figures[f"{key}/users_per_s"] = users * 1e3 / self.figures[f"{key}/ms"]
        self.legal(key, found, width)
        if their_repeats:
            self.theirs(self.prompts(users), 2)  # warms up
            theirs = [
                timed(lambda p=prompts: self.theirs(p, width))  # type: ignore[misc]
                for prompts in tqdm(batches[:their_repeats], desc="vLLM's", unit="batch")
            ]
            self.figures[f"{key}/vllm_beam_ms"] = float(np.median(theirs))
            self.figures[f"{key}/speedup_vs_vllm_beam"] = float(np.median(theirs)) / float(
                np.median(times)
            )

    def on_cpu(self, users: int, width: int, repeats: int) -> None:
        """Median times cold, after a thought, and again."""
        key = f"serve_cpu/{users}x{width}"
        closing = [self.vocabulary.think_end, self.vocabulary.begin]
        states: dict[str, list[float]] = {"cold": [], "warm": [], "repeat": []}
        found: list[Any] = []
        for _ in tqdm(range(repeats + 1), desc=f"{users} x {width}", unit="round"):
            begun = [[*p[:-1], self.vocabulary.think_begin] for p in self.prompts(users)]

            def thought(begun: list[list[int]] = begun) -> list[list[int]]:
                words = self.generator.integers(100, 40_000, size=(users, THOUGHT_TOKENS))
                return [[*p, *w, *closing] for p, w in zip(begun, words.tolist(), strict=True)]

            for name, prompts in (("cold", thought()), ("warm", fresh := thought())):
                states[name].append(timed(lambda p=prompts: found.extend(self.ours(p, width))))  # type: ignore[misc]
            states["repeat"].append(timed(lambda p=fresh: self.ours(p, width)))  # type: ignore[misc]
        for name, times in states.items():
            for figure, value in spread(times[1:]).items():  # the first round warms up
                self.figures[f"{key}/{name}_{figure}"] = value
        self.figures[f"{key}/ms"] = self.figures[f"{key}/warm_ms"]
        self.figures["serve_cpu/prompt_tokens"] = PROMPT_TOKENS + THOUGHT_TOKENS + 2
        self.figures["serve_cpu/thought_tokens"] = THOUGHT_TOKENS
        self.legal(key, found, width)

    def legal(self, key: str, found: list[tuple[list[int], list[float]]], width: int) -> None:
        """The share of beams that are items of the catalogue, each once."""
        num_items = self.info["num_items"]
        wanted = min(width, num_items) * len(found)
        good = sum(len({i for i in items if 0 <= i < num_items}) for items, _ in found)
        self.figures[f"{key}/legal"] = good / wanted

    def reference(self, folder: Path, users: int, width: int) -> None:
        """The same prompts by `whyrec.decode` on the Hugging Face model."""
        prompts = self.prompts(users)
        found = self.ours(prompts, width)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, self.options.dtype)
        model, _ = load_backbone(str(folder), dtype=dtype)
        trie = Trie.load(folder / "trie.safetensors")
        decoder = BeamDecoder(model.to(device).eval(), vocabulary=self.vocabulary, trie=trie)
        beams = decoder.search(decoder.prefill(prompts, width=width), width=width)
        shared, best, ranks, errors, gaps = 0, 0, 0, [0.0], [0.0]
        for (items, scores), theirs, their_scores in zip(
            found, beams.items_UW.tolist(), beams.scores_UW.tolist(), strict=True
        ):
            mine = dict(zip(items, scores, strict=True))
            both = [(i, s) for i, s in zip(theirs, their_scores, strict=True) if i in mine]
            errors += [abs(mine[item] - score) for item, score in both]
            gaps += [
                abs(s - scores[-1])
                for i, s in zip(theirs, their_scores, strict=True)
                if i not in mine
            ]
            gaps += [abs(mine[i] - their_scores[-1]) for i in mine if i not in set(theirs)]
            shared += len(both)
            best += items[0] == theirs[0]
            ranks += sum(a == b for a, b in zip(items, theirs, strict=False))
        total = users * min(width, self.info["num_items"])
        self.figures["serve/check/same_items"] = shared / total
        self.figures["serve/check/same_ranks"] = ranks / total
        self.figures["serve/check/same_best"] = best / users
        self.figures["serve/check/score_error"] = max(errors)
        self.figures["serve/check/cut_gap"] = max(gaps)
        if self.options.dtype == "float32":
            assert max(errors) < 1e-2, f"scores differ by up to {max(errors)}"
        del model, decoder
        gc.collect()

    def profile(self, path: Path, users: int, width: int) -> None:
        """A table of the GPU's kernels in one batch."""
        prompts = self.prompts(users)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.ours(prompts, width)
            torch.cuda.synchronize()
        averages = profiler.key_averages()
        path.write_text(averages.table(sort_by="cuda_time_total", row_limit=60))

    def millions(self, users: int, width: int) -> None:
        """What 10 million items cost a step of the beam, and of the engine."""
        device, kind = ("cuda", "serve") if torch.cuda.is_available() else ("cpu", "serve_cpu")
        trie = random_trie(MILLIONS, seed=self.options.seed).to(device)
        asked = trie_step_ms(trie, users, width, 50)
        beam_step = self.figures[f"{kind}/{users}x{width}/ms"] / trie.num_levels
        self.figures["serve/trie_step_ms_10m"] = asked
        self.figures["serve/trie_step_overhead_10m"] = asked / beam_step
        self.figures["serve/engine_step_ms"] = step = self.engine_step_ms()
        processed = constraint_ms(trie, self.vocabulary, 64, 20)
        self.figures["serve/constraint_ms_10m"] = processed["ms"]
        self.figures["serve/constraint_host_ms_10m"] = processed["host_ms"]
        self.figures["serve/constraint_step_overhead_10m"] = processed["ms"] / step

    def succeeds(self, name: str, part: Callable[[], None]) -> bool:
        """Run one part and write what is known by then."""
        try:
            part()
        except Exception:
            print(f"failed: {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return False
        print(f"{name}: {self.rounded()}", file=sys.stderr, flush=True)
        if self.options.json:
            record(
                self.options.json,
                name="serve",
                command=shlex.join(["python", *sys.argv]),
                seed=self.options.seed,
                figures=self.rounded(),
            )
        return True

    def rounded(self) -> dict[str, float]:
        return {key: round(float(value), 6) for key, value in sorted(self.figures.items())}

    def engine_step_ms(self, requests: int = 64, steps: int = 64) -> float:
        """A decoding step of the engine with so many ordinary texts."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": [*p[:31], 100]} for p in self.prompts(requests)]

        def run(tokens: int) -> float:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
            return timed(lambda: self.llm.generate(asked, params, use_tqdm=False))

        run(steps)
        return (run(steps + 1) - run(1)) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--backbone", default=PACKAGED, help="name or folder of the LLM")
    parser.add_argument("--model", type=Path, help="a trained model folder instead")
    parser.add_argument("--sizes", nargs="+", default=["1x50", "16x50", "64x50"])
    parser.add_argument("--repeats", type=int, default=30, help="batches of ours a size")
    parser.add_argument(
        "--theirs",
        type=int,
        nargs="+",
        default=[3, 1, 0],
        help="batches of vLLM's beam search a size; on a GPU only",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--exact", action="store_true", help="float32 on a GPU too")
    parser.add_argument("--eager", action="store_true", help="vLLM neither compiles nor graphs")
    parser.add_argument("--no-millions", action="store_true", help="leave the 10m trie out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="write where a replay's GPU time goes")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    options.dtype = options.dtype or ("bfloat16" if on_gpu and not options.exact else "float32")
    sizes = [(int(u), int(w)) for u, w in (size.split("x") for size in options.sizes)]
    theirs = [*options.theirs, *[0] * len(sizes)]
    middle = sizes[min(1, len(sizes) - 1)]

    if on_gpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if options.model:
            link_folder(folder, options.model)
        else:
            make_folder(folder, options.backbone, seed=options.seed)
        bench = Bench(start(folder, options, sizes), folder, options)
        parts: dict[str, Callable[[], None]] = {}
        for (users, width), their_repeats in zip(sizes, theirs, strict=False):
            asked = (users, width, options.repeats)
            parts[f"{users}x{width}"] = (
                partial(bench.on_gpu, *asked, their_repeats)
                if on_gpu
                else partial(bench.on_cpu, *asked)
            )
        parts["reference"] = partial(bench.reference, folder, *middle)
        if options.profile:
            parts["profile"] = partial(bench.profile, options.profile, *middle)
        if not options.no_millions and len(bench.vocabulary.level_sizes) == len(LEVEL_SIZES):
            parts["millions"] = partial(bench.millions, *middle)
        failed = [name for name, part in parts.items() if not bench.succeeds(name, part)]
    for key, value in bench.rounded().items():
        print(f"{key:44s} {value:.6g}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def start(folder: Path, options: argparse.Namespace, sizes: list[tuple[int, int]]) -> Any:
    """An engine of vLLM with the beams in it."""
    from vllm import LLM

    installed = any(e.name == "whyrec" for e in entry_points(group="vllm.logits_processors"))
    on_gpu = torch.cuda.is_available()
    more: dict[str, Any] = (
        # So that what vLLM compiles takes the largest batch of prompts too.
        {"max_num_batched_tokens": 16_384}
        if on_gpu
        else {"block_size": 32, "kv_cache_memory_bytes": 1 << 30}
    )
    return LLM(
        model=str(folder),
        dtype=options.dtype,
        max_model_len=1_024,
        max_logprobs=2 * max(width for _, width in sizes),
        enforce_eager=options.eager or not on_gpu,
        gpu_memory_utilization=0.5,
        worker_extension_cls="whyrec.serve.worker.BeamWorker",
        logits_processors=["whyrec.serve.constraint:KeepTokenIds"] if installed else None,
        seed=options.seed,
        **more,
    )


if __name__ == "__main__":
    main()
