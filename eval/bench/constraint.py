"""What keeps sampled SIDs real, inside vLLM's V1 and V2 model runners: is it right, what it costs.

    python eval/bench/constraint.py --backbone FOLDER --json eval/results/serve/constraint-h100.json

The backbone gets four levels of 256 new tokens with random weights and a random catalogue of 10
million items. Each runner is a process with an engine of its own; both start at once, and are then
measured one after the other. On an H100 all of it is meant to take a minute.

`constraint/v1/sids` (`v2`) is how many SIDs were sampled, in a batch with twice as many requests
as the engine runs at once, hot and cold, some of them with penalties, some in the middle of a SID
from the start, some that write words; `legal` the share of them that the catalogue holds, where a
SID that its text's end cuts off counts as what it begins with. One that is not legal ends the run.

A step of `--rows` texts that write SIDs only, one behind the other: `inside_ms` with the logits
processor and `inside_without_ms` without; of as many that write words: `outside_ms` and
`outside_without_ms`. `inside_overhead` and `outside_overhead` are the differences' shares of a step
without. Each is the median of `--repeats` texts of 60 tokens (a time of one token taken off).

vLLM finds the processor by an entry point, as when whyrec is installed: where it is not, a folder
with that entry point alone is put on the path. vLLM before 0.28 has no way to add a processor to
its V2 runner: there it is hung behind the sampler's own biases, and `constraint/v2/grafted` is 1.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from plugin_folder import plugins_on_path
from serve_trie import random_trie

from serve import make_folder
from whyrec.backbone.load import PACKAGED
from whyrec.evaluation.results import record
from whyrec.sid.trie import Trie

RUNNERS = ("v1", "v2")
MARK = "figures "
STEPS = 60


class BiasThenSids:
    """Of vLLM before 0.28: the V2 sampler's own biases, and then the processor."""

    def __init__(self, biases: Any, processor: Any) -> None:
        self._biases, self._processor = biases, processor

    def add_request(self, req_idx: int, prompt_len: int, sampling_params: Any) -> None:
        self._biases.add_request(req_idx, prompt_len, sampling_params)
        self._processor.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        self._biases.apply_staged_writes()
        self._processor.apply_staged_writes()

    def apply_logit_bias(
        self, logits: Any, expanded_idx_mapping: Any, idx_mapping_np: Any, pos: Any
    ) -> None:
        self._biases.apply_logit_bias(logits, expanded_idx_mapping, idx_mapping_np, pos)
        context = SimpleNamespace(expanded_idx_mapping=expanded_idx_mapping, pos=pos)
        self._processor.apply(logits, context)


def graft(worker: Any) -> None:
    """Hang the processor into a V2 runner that takes none."""
    from whyrec.serve.constraint import V2Constraint

    runner = worker.model_runner
    processor = V2Constraint(worker.vllm_config, runner.req_states)
    runner.sampler.logit_bias_state = BiasThenSids(runner.sampler.logit_bias_state, processor)


@contextlib.contextmanager
def without_processor() -> Iterator[None]:
    """Every processor lets all tokens be."""
    from whyrec.serve.constraint import V1Constraint, V2Constraint

    kinds: list[Any] = [V1Constraint, V2Constraint]
    kept = [kind.apply for kind in kinds]
    for kind in kinds:
        kind.apply = lambda self, logits, *_: logits
    try:
        yield
    finally:
        for kind, apply in zip(kinds, kept, strict=True):
            kind.apply = apply


class Bench:
    """One engine in this process, its prompts, its figures."""

    def __init__(self, runner: str, folder: Path, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        from whyrec.decode.model_folder import read_settings
        from whyrec.serve.constraint import LogitsProcessorV2
        from whyrec.serve.tries import ServedTrie
        from whyrec.sid.vocabulary import SidVocabulary

        self.options, self.key = options, f"constraint/{runner}"
        self.figures: dict[str, float] = {}
        self.generator = np.random.default_rng(options.seed)
        on_gpu, rows = torch.cuda.is_available(), options.rows
        more: dict[str, Any] = {"block_size": 32}
        if on_gpu:  # decoding is one graph, and nothing is compiled, which would take a minute
            more = {
                "gpu_memory_utilization": 0.3,  # two engines start at once
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": sorted({1, rows // 2, rows}),
                },
            }
        grafted = runner == "v2" and LogitsProcessorV2 is None
        self.llm = LLM(
            model=str(folder),
            dtype="bfloat16" if on_gpu else "float32",
            max_model_len=256,
            max_num_seqs=rows,
            enforce_eager=options.eager or not on_gpu,
            kv_cache_memory_bytes=1 << 30,
            logits_processors=None if grafted else ["whyrec.serve.constraint:KeepTokenIds"],
            seed=options.seed,
            **more,
        )
        core = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        worker = core.model_executor.driver_worker.worker
        is_v2 = ".gpu.model_runner" in str(type(worker.model_runner).__mro__)
        assert is_v2 == (runner == "v2"), f"vLLM took {type(worker.model_runner)}"
        if runner == "v2":
            self.figures[f"{self.key}/grafted"] = float(grafted)
        if grafted:
            graft(worker)
        self.vocabulary = SidVocabulary.bind(
            AutoTokenizer.from_pretrained(folder), level_sizes=read_settings(folder).level_sizes
        )
        self.served = ServedTrie.of(Trie.load(folder / "trie.safetensors"), torch.device("cpu"))

    def words(self, length: int) -> list[int]:
        return self.generator.integers(100, 40_000, size=length).tolist()

    def a_sid(self) -> list[int]:
        """Tokens of a random item."""
        codes, node = list[int](), 0
        for _ in range(self.vocabulary.num_levels):
            first, stop = self.served.children(node)
            node = int(self.generator.integers(first, stop))
            codes.append(self.served.code[node])
        return [self.vocabulary.begin, *self.vocabulary.encode(codes)]

    def generate(self, prompts: list[list[int]], params: Any) -> list[list[int]]:
        """All texts; those of `n` side by side."""
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self.llm.generate(asked, params, use_tqdm=False)
        return [list(output.token_ids) for one in found for output in one.outputs]

    def legality(self) -> None:
        from vllm import SamplingParams

        begin, rows = self.vocabulary.begin, self.options.rows
        opens: dict[str, Any] = {"logit_bias": {begin: 100.0}, "ignore_eos": True, "max_tokens": 40}
        hows: list[dict[str, Any]] = [
            opens,
            opens | {"temperature": 0.0},
            opens | {"temperature": 2.0, "top_p": 0.3, "top_k": 5},
            opens | {"temperature": 1.5, "min_p": 0.2, "repetition_penalty": 3.0},
            opens | {"presence_penalty": 2.0, "frequency_penalty": -2.0, "min_tokens": 30},
            {"max_tokens": 17, "temperature": 0.0, "ignore_eos": True},
            {"max_tokens": 24, "ignore_eos": True},
        ]
        prompts, params = [], []
        for place in range(2 * rows):
            begun = self.a_sid()[: place % 6] if place % 2 else []
            prompts.append([*self.words(20 + place % 31), *begun])
            params.append(SamplingParams(**hows[place % len(hows)]))
        sids = cut = 0
        for prompt, ids in zip(prompts, self.generate(prompts, params), strict=True):
            whole, part = self.sids_in([*prompt, *ids])
            sids, cut = sids + whole, cut + part
        self.figures[f"{self.key}/sids"] = sids + cut
        self.figures[f"{self.key}/legal"] = 1.0
        assert sids > 4 * rows

    def sids_in(self, ids: list[int]) -> tuple[int, int]:
        """How many whole SIDs a text holds, and 1 if its end cuts one off; fails on any other."""
        known, whole, place = self.vocabulary, 0, 0
        while known.begin in ids[place:]:
            place = ids.index(known.begin, place) + 1
            inside = ids[place : place + known.num_levels]
            codes = [t - o for t, o in zip(inside, known.offsets, strict=False)]
            assert all(0 <= c < s for c, s in zip(codes, known.level_sizes, strict=False)), inside
            assert self.served.walk(codes) >= 0, f"no item begins {codes}"
            place += known.num_levels
            if place >= len(ids):
                return whole, 1
            assert ids[place] == known.end, "a SID is not closed"
            whole += 1
        return whole, 0

    def steps(self) -> None:
        from vllm import SamplingParams

        opens = {"logit_bias": {self.vocabulary.begin: 50.0}}
        for name, more in (("inside", opens), ("outside", {})):
            prompts = [self.words(32) for _ in range(self.options.rows)]

            def took(tokens: int, more: Any = more, prompts: Any = prompts) -> float:
                params = SamplingParams(
                    max_tokens=tokens, ignore_eos=True, detokenize=False, **more
                )
                start = time.perf_counter()
                self.generate(prompts, params)
                return time.perf_counter() - start

            times: dict[str, list[float]] = {"": [], "_without": []}
            for turn in range(self.options.repeats + 1):
                for which, state in (
                    ("", contextlib.nullcontext()),
                    ("_without", without_processor()),
                ):
                    with state:
                        step_ms = (took(STEPS + 1) - took(1)) * 1e3 / STEPS
                    if turn:  # the first warms up
                        times[which].append(step_ms)
            with_ms, without_ms = (float(np.median(found)) for found in times.values())
            key = f"{self.key}/{name}"
            self.figures |= {f"{key}_ms": with_ms, f"{key}_without_ms": without_ms}
            self.figures[f"{key}_overhead"] = with_ms / without_ms - 1
            say(f"{self.key}: {name} {with_ms:.3f} ms a step, without {without_ms:.3f} ms")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure(runner: str, options: argparse.Namespace) -> None:
    """In a process of its own: start, measure; what is told begins with a mark.

    It waits for a line before each of the two: until the folder is made, until the others are done.
    """
    import vllm  # noqa: F401 - which takes its time

    sys.stdin.readline()
    bench = Bench(runner, options.folder, options)
    print(f"{MARK}{{}}", flush=True)
    sys.stdin.readline()
    for part in (bench.legality, bench.steps):
        part()
        say(f"{runner}: {part.__name__} done")
        print(f"{MARK}{json.dumps(bench.figures)}", flush=True)


def takes_processors(runner: str) -> bool:
    """Whether this vLLM has a place for logits processors in a runner."""
    found = find_spec("vllm")
    assert found is not None and found.submodule_search_locations is not None
    package = Path(found.submodule_search_locations[0])
    return runner == "v1" or (package / "v1/worker/gpu/sample/logits_processor").exists()


@contextlib.contextmanager
def started(runner: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The process of one runner."""
    with plugins_on_path() as found:
        environment = os.environ | {
            "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
        if takes_processors(runner):  # else vLLM would not start beside them
            environment |= found
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", runner, "--folder", folder]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def let(process: subprocess.Popen[str]) -> None:
    """Let a process go on, if it has not ended."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        print("go on", file=process.stdin, flush=True)


def told(process: subprocess.Popen[str]) -> dict[str, float] | None:
    """The next figures that a process tells; None at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--backbone", default=PACKAGED, help="name or folder of the LLM")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=RUNNERS)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--rows", type=int, default=64, help="requests that run at once")
    parser.add_argument("--repeats", type=int, default=5, help="texts a figure")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs either")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options)
        return
    figures: dict[str, float] = {"constraint/items": options.items}
    failed = []
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made) / "model"
        processes = [stack.enter_context(started(r, folder)) for r in options.runners]
        make_folder(folder, options.backbone, seed=options.seed)
        random_trie(options.items, seed=options.seed).save(folder / "trie.safetensors")
        say(f"a model folder with {options.items} items is made")
        for process in processes:
            let(process)
        ready = [told(process) is not None for process in processes]
        for runner, process, is_ready in zip(options.runners, processes, ready, strict=True):
            say(f"{runner} {'is measured' if is_ready else 'did not start'}")
            if is_ready:
                let(process)
                while (found := told(process)) is not None:
                    figures |= {key: round(value, 6) for key, value in found.items()}
                    if options.json:
                        record(
                            options.json,
                            name="the logits processor in vLLM's model runners",
                            command=shlex.join(["python", *sys.argv]),
                            seed=options.seed,
                            figures=figures,
                        )
            if process.wait():
                failed.append(runner)
    for key, value in sorted(figures.items()):
        print(f"{key:44s} {value:.6g}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; its messages are above")


if __name__ == "__main__":
    main()
