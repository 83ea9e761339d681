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
unconstrained, and its own code compiled and graphed as vLLM likes unless `--eager`.

`legal` is the share of our beams that are items, all different, as many as were asked for. The
reference is `whyrec.decode` on the Hugging Face model, on the same device, in the same precision:
`same_items` is the share of items that both found, `same_best` of users whose best item is the
same, `score_error` the greatest difference of a shared item's score. With `--exact` both run in
float32, where ranks must be equal.

On a CPU three states are timed, width by width: `cold` (a user never seen, with a thought), `warm`
(the user's prompt was seen, the thought of 32 tokens is new: the case after a thought), `repeat`
(all of it was seen); `serve_cpu/UxW/ms` is warm.

`serve/trie_step_overhead_10m` is the time of everything that asks the trie in one decoding step
(children, leaf ranges, what is permitted) with 10 million random items, over the time of a step of
the beam of the same size. `serve/constraint_step_overhead_10m` is the time of the logits processor
for 64 requests that are all inside a SID, over a step of the engine that decodes 64 texts.
"""

import argparse
import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import PACKAGED, load_backbone
from whyrec.decode.beam import BeamDecoder
from whyrec.decode.model_folder import SETTINGS_FILE, name_weights, read_settings
from whyrec.evaluation.results import record
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary
from whyrec.stage import write_json

LEVEL_SIZES, ITEMS, PROMPT_TOKENS, THOUGHT_TOKENS = (256,) * 4, 12_000, 160, 32
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


def random_trie(num_items: int, *, seed: int) -> Trie:
    """Distinct random SIDs."""
    generator = np.random.default_rng(seed)
    keys = np.unique(generator.integers(0, 2**32, size=int(num_items * 1.01) + 9))
    keys = generator.permutation(keys)[:num_items]
    codes_NL = keys[:, None] >> np.array([24, 16, 8, 0]) & 255
    return Trie.build(torch.from_numpy(codes_NL), level_sizes=LEVEL_SIZES)


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
        first = timed(lambda: self.ours(self.prompts(users), width))  # captures the graph
        self.figures[f"{key}/first_ms"] = first
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
        shared, best, ranks, errors = 0, 0, 0, [0.0]
        for (items, scores), theirs, their_scores in zip(
            found, beams.items_UW.tolist(), beams.scores_UW.tolist(), strict=True
        ):
            mine = dict(zip(items, scores, strict=True))
            both = [(i, s) for i, s in zip(theirs, their_scores, strict=True) if i in mine]
            errors += [abs(mine[item] - score) for item, score in both]
            shared += len(both)
            best += items[0] == theirs[0]
            ranks += sum(a == b for a, b in zip(items, theirs, strict=False))
        total = users * min(width, self.info["num_items"])
        self.figures["serve/check/same_items"] = shared / total
        self.figures["serve/check/same_ranks"] = ranks / total
        self.figures["serve/check/same_best"] = best / users
        self.figures["serve/check/score_error"] = max(errors)
        if self.options.dtype == "float32":
            assert max(errors) < 1e-2, f"scores differ by up to {max(errors)}"
        del model, decoder
        gc.collect()

    def engine_step_ms(self, requests: int = 64, steps: int = 64) -> float:
        """A decoding step of the engine with so many ordinary texts."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": [*p[:31], 100]} for p in self.prompts(requests)]

        def run(tokens: int) -> float:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
            return timed(lambda: self.llm.generate(asked, params, use_tqdm=False))

        run(steps)
        return (run(steps + 1) - run(1)) / steps


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
        depths.append(torch.randint(low, high, (users, width), device=device))

    def ask() -> None:
        for level, nodes_UW in enumerate(depths):
            children_UWK = trie.children(nodes_UW, level=level)
            low_UWK, high_UWK = trie.leaf_range(children_UWK, level=level + 1)
            children_UWK.masked_fill(~permitted.any_between(low_UWK, high_UWK), -1)

    run = ask
    if device.type == "cuda":
        for _ in range(3):
            ask()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ask()
        run = graph.replay
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times)) / trie.num_levels


def constraint_ms(trie: Trie, vocabulary: SidVocabulary, rows: int, repeats: int) -> float:
    """The logits processor for rows that are all inside a SID, the mean over levels."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from whyrec.serve.constraint import V1Constraint
    from whyrec.serve.tries import ServedTrie, Shelf

    host = trie.to("cpu")
    served = ServedTrie(trie, host.first_child.numpy(), host.code.numpy())
    shelf = Shelf(Path(), trie.device, vocabulary, torch.zeros(0, dtype=torch.long), {0: served})
    model = SimpleNamespace(model="", get_vocab_size=lambda: vocabulary.stop)
    config: Any = SimpleNamespace(model_config=model)
    processor = V1Constraint(config, trie.device, False)
    processor._shelf = shelf
    logits_BV = torch.randn(rows, vocabulary.stop, device=trie.device)
    leaves = np.random.default_rng(0).integers(0, trie.num_items, size=rows)
    sids = []
    for leaf in leaves:  # from the leaf upwards
        node, codes = host.num_internal + int(leaf), list[int]()
        while node:
            codes.append(int(host.code[node]))
            node = int(np.searchsorted(served.first_child, node, side="right")) - 1
        sids.append([vocabulary.begin, *vocabulary.encode(codes[::-1])])
    times = []
    for level in range(trie.num_levels):
        added = [(row, SamplingParams(), [], sid[: level + 1]) for row, sid in enumerate(sids)]
        processor.update_state(BatchUpdate(rows, [], added, []))
        for turn in range(repeats + 3):
            start = time.perf_counter()
            processor.apply(logits_BV.clone())
            if trie.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


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
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    options.dtype = options.dtype or ("bfloat16" if on_gpu and not options.exact else "float32")
    sizes = [(int(u), int(w)) for u, w in (size.split("x") for size in options.sizes)]
    theirs = [*options.theirs, *[0] * len(sizes)]

    from vllm import LLM

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if options.model:
            link_folder(folder, options.model)
        else:
            make_folder(folder, options.backbone, seed=options.seed)
        installed = any(e.name == "whyrec" for e in entry_points(group="vllm.logits_processors"))
        if on_gpu:  # so that what vLLM compiles takes the largest batch of prompts too
            more = {"max_num_batched_tokens": 16_384}
        else:
            more = {"block_size": 32, "kv_cache_memory_bytes": 1 << 30}
        llm = LLM(
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
        bench = Bench(llm, folder, options)
        for (users, width), their_repeats in zip(sizes, theirs, strict=False):
            if on_gpu:
                bench.on_gpu(users, width, options.repeats, their_repeats)
            else:
                bench.on_cpu(users, width, options.repeats)
            print({k: round(v, 3) for k, v in bench.figures.items()}, file=sys.stderr, flush=True)
        bench.reference(folder, *sizes[min(1, len(sizes) - 1)])
        if not options.no_millions and len(bench.vocabulary.level_sizes) == len(LEVEL_SIZES):
            users, width = sizes[min(1, len(sizes) - 1)]
            trie = random_trie(MILLIONS, seed=options.seed).to("cuda" if on_gpu else "cpu")
            beam_step = bench.figures[f"serve{'' if on_gpu else '_cpu'}/{users}x{width}/ms"]
            beam_step /= trie.num_levels
            asked = trie_step_ms(trie, users, width, 50)
            processed = constraint_ms(trie, bench.vocabulary, 64, 20)
            step = bench.engine_step_ms()
            bench.figures |= {
                "serve/trie_step_ms_10m": asked,
                "serve/trie_step_overhead_10m": asked / beam_step,
                "serve/constraint_ms_10m": processed,
                "serve/engine_step_ms": step,
                "serve/constraint_step_overhead_10m": processed / step,
            }
    figures = {key: round(float(value), 6) for key, value in sorted(bench.figures.items())}
    for key, value in figures.items():
        print(f"{key:44s} {value:.6g}")
    if options.json:
        record(
            options.json,
            name="serve",
            command=shlex.join(["python", *sys.argv]),
            seed=options.seed,
            figures=figures,
        )


if __name__ == "__main__":
    main()
