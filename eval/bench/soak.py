"""`whyrec serve` under load: many clients on one machine, for two minutes, on a tiny model.

    python eval/bench/soak.py --json eval/results/serve/soak/cpu.json

A random two-layer model over a made-up catalogue of 500 items is served by vLLM, and 64 clients ask
for recommendations after the histories of 256 made-up users: half of the requests think first, some
are streamed, and of those some are left in the middle. Beside them items are added and retired, and
plain completions run. No answer may hold an item whose retirement had been acknowledged when it
was asked for (`soak/retired_seen`), and every completion's SID must be of the catalogue.

Memory is the proportional share (PSS) of all processes of the server, sampled every second after a
warm-up in which every user asks, all clients ask at once and items change: `soak/memory_growth` is
the median of the last fifth of the samples over that of the first fifth, less 1.

Then SIGTERM comes while all clients wait for answers: `soak/drained_failed` counts those that got
none, new ones that are told 503 or find nobody listening aside. At last a second server's engine is
killed under load, and all clients go on asking: every request must end with 200 or 503
(`soak/killed/neither_200_nor_503`), `/health` must turn red, and the server start its engine again
(`soak/killed/seconds_to_recover`).
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from plugin_folder import plugins_on_path
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import load_backbone, packaged_backbone
from whyrec.catalog.prepare import PrepareRecipe, prepare
from whyrec.decode.model_folder import Settings, save_model_folder
from whyrec.decode.think import ThoughtSettings
from whyrec.evaluation.results import record
from whyrec.serve.client import Client, ServerError
from whyrec.serve.server import _for_device
from whyrec.sid.index import IndexRecipe, index

ITEMS, USERS, LEVEL_SIZES = 500, 256, [16, 16, 16]
START_SECONDS, SAMPLE_SECONDS = 600, 1.0


def made_up_run(run: Path, recipe: IndexRecipe, *, items: int, events: int, seed: int) -> None:
    """A run folder of a made-up catalogue, whose users each had so many events."""
    generator = np.random.default_rng(seed)
    raw = run.with_name("raw")
    raw.mkdir()
    rows = [
        f'{{"item_id": "i{n}", "title": "Thing {n}", "brand": "B{n % 7}"}}' for n in range(items)
    ]
    (raw / "items.jsonl").write_text("\n".join(rows) + "\n")
    walks = [generator.choice(items, events, replace=False) for _ in range(USERS)]
    for user, walk in enumerate(walks):  # nobody's items would be left out of the catalogue
        walk[:2] = [2 * user % items, (2 * user + 1) % items]
    lines = [f"u{u} " + " ".join(f"i{n}" for n in walk) for u, walk in enumerate(walks)]
    (raw / "sequential_data.txt").write_text("\n".join(lines) + "\n")
    prepare(run, PrepareRecipe(source=str(raw), format="sequences", k_core=1))
    index(run, recipe, load_backbone=load_backbone)


def tiny_model(folder: Path, *, seed: int, level_sizes: list[int] = LEVEL_SIZES) -> Path:
    """A model folder of random weights over a made-up catalogue."""
    run = folder / "run"
    recipe = IndexRecipe(level_sizes=level_sizes, collaborative_dim=0, iterations=5)
    made_up_run(run, recipe, items=ITEMS, events=12, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(packaged_backbone())
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.3,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    extend_vocabulary(model, tokenizer, level_sizes=level_sizes)
    thoughts = ThoughtSettings(samples=1, max_tokens=12, temperature=1.0)
    model_folder = folder / "tiny"
    save_model_folder(
        model_folder,
        model=model,
        tokenizer=tokenizer,
        settings=Settings("activated", "tiny", level_sizes, 12, thoughts),
        dataset_folder=run / "dataset",
        sids_folder=run / "sids",
    )
    return model_folder


@dataclass
class Server:
    """A running `whyrec serve`."""

    process: subprocess.Popen[bytes]
    url: str

    def processes(self) -> list[int]:
        """Ids of the server's processes: of ours, and all below it."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
        found, queue = [], [self.process.pid]
        while queue:
            found.append(queue.pop())
            queue += parents.get(found[-1], [])
        return found

    def engine(self) -> int:
        """The process of vLLM's engine."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        raise RuntimeError("the server has no engine process")

    def memory(self) -> int:
        """Bytes of all processes, shared pages counted once."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total


@contextlib.contextmanager
def serving(
    folder: Path, log: Path, *more: str, plain: bool = False, seconds: float = START_SECONDS
) -> Iterator[Server]:
    """Start a server, wait until it is well, and end it.

    Args:
        folder: what it serves.
        log: its messages are put behind what is there.
        more: further options.
        plain: vLLM alone.
        seconds: how long its start may take.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = dict(os.environ)
    if plain:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
                   str(folder), "--served-model-name", folder.name, "--host", "127.0.0.1",
                   *_for_device()]  # fmt: skip
        environment |= {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
        if not torch.cuda.is_available():
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    else:
        command = [sys.executable, "-m", "whyrec.cli", "serve", str(folder)]
    command += ["--port", port, "--max-num-seqs", "64", *more]
    if not torch.cuda.is_available():
        command.append("--enforce-eager")
    stack = contextlib.ExitStack()
    environment |= stack.enter_context(plugins_on_path())
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        client, end = Client(server.url, timeout=5), time.monotonic() + seconds
        while not client.healthy():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3_000:]}")
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.terminate()  # the second time it does not wait
                process.wait(60)
        stack.close()


@dataclass
class Load:
    """Clients that ask until they are stopped, and what became of it."""

    url: str
    seed: int
    retired: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    pause: float = 0.0  # seconds after a refusal
    changes: int = 0
    retired_seen: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, number: int) -> None:
        """One client."""
        generator = np.random.default_rng((self.seed, number))
        client = Client(self.url, timeout=120)
        while not self.stop.is_set():
            kind = str(generator.choice(["plain", "think", "stream", "left", "completion"],
                                        p=[0.45, 0.25, 0.15, 0.05, 0.1]))  # fmt: skip
            self.one(client, kind, user=int(generator.integers(USERS)))

    def one(self, client: Client, kind: str, *, user: int) -> None:
        """One request, counted."""
        history = [f"i{n}" for n in np.random.default_rng(user).choice(ITEMS, 8, replace=False)]
        gone = set(self.retired)
        start = time.monotonic()
        try:
            found: list[str] = []
            if kind in ("plain", "think"):
                answer = client.recommend(history, k=10, think=kind == "think")
                found = [item["id"] for item in answer["items"]]
                assert len(found) == 10, answer
            elif kind == "stream":
                *_, (name, answer) = client.stream(history, k=10, think=True)
                assert name == "recommendations"
                found = [item["id"] for item in answer["items"]]
            elif kind == "left":
                events = client.stream(history, k=10, think=True)
                next(events)
                events.close()
            else:
                self.complete(client)
            outcome = "200"
        except ServerError as error:
            outcome, found = f"{error.status} {error.code}", []
            self.stop.wait(self.pause)
        except (OSError, HTTPException) as error:
            outcome, found = type(error).__name__, []
        with self.lock:
            self.outcomes[outcome if outcome == "200" else f"{outcome} ({kind})"] += 1
            self.retired_seen += bool(gone & set(found))
            if outcome == "200":
                self.seconds.setdefault(kind, []).append(time.monotonic() - start)

    def complete(self, client: Client) -> None:
        """A plain completion behind `<|sid_begin|>`: its codes must be an item's."""
        body = {"model": "tiny", "prompt": "<|sid_begin|>", "max_tokens": 4, "temperature": 1.5}
        text = client._call("POST", "/v1/completions", body)["choices"][0]["text"]
        assert text.count("<s_") == 3 and text.endswith("<|sid_end|>"), text

    def change_items(self) -> None:
        """Items come, and others go."""
        client = Client(self.url, timeout=120)
        while not self.stop.wait(2.0):
            n = self.changes
            try:
                client.add_items([{"item_id": f"new-{n}", "title": f"New thing {n}"}])
                gone = [f"i{n}", f"new-{n}"]
                client.retire_items(gone)
                self.retired.update(gone)
                self.changes += 1
            except (ServerError, OSError, HTTPException) as error:
                with self.lock:
                    self.outcomes[f"items {error}"] += 1

    @contextlib.contextmanager
    def running(self, clients: int, *, changes: bool) -> Iterator[None]:
        """All clients, and what changes items beside them."""
        threads = [threading.Thread(target=self.ask, args=(n,)) for n in range(clients)]
        if changes:
            threads.append(threading.Thread(target=self.change_items))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


def wait_for(condition, seconds: float) -> bool:
    """Whether it became so in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def gauge(server: Server, name: str) -> float:
    """A value of `/metrics`."""
    from urllib.request import urlopen

    text = urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


def soak(server: Server, options: argparse.Namespace) -> dict[str, float]:
    """The load, then SIGTERM in the middle of it."""
    warm = Load(server.url, options.seed)
    for user in tqdm(range(USERS), desc="warm up", unit="user"):
        for kind in ("plain", "think"):
            warm.one(Client(server.url, timeout=120), kind, user=user)
    assert set(warm.outcomes) == {"200"}, warm.outcomes
    with warm.running(options.clients, changes=True):  # the first change loads the text encoder
        wait_for(lambda: warm.changes >= 2, 60)
    assert set(warm.outcomes) == {"200"}, warm.outcomes
    load, samples = Load(server.url, options.seed, retired=set(warm.retired), changes=10), []
    with load.running(options.clients, changes=True):
        start = time.monotonic()
        bar = tqdm(total=int(options.seconds), desc="soak", unit="s")
        while (elapsed := time.monotonic() - start) < options.seconds:
            time.sleep(SAMPLE_SECONDS)
            samples.append(server.memory())
            bar.update(min(int(elapsed), bar.total) - bar.n)
        bar.close()
    for busy in ("whyrec_active", "vllm:num_requests_running", "vllm:num_requests_waiting"):
        freed = wait_for(lambda: gauge(server, busy) == 0, 30)  # noqa: B023
        assert freed, f"{busy}: requests of clients that left were not freed"
    fifth = max(len(samples) // 5, 1)
    growth = np.median(samples[-fifth:]) / np.median(samples[:fifth]) - 1
    figures = {
        "soak/seconds": elapsed,
        "soak/clients": options.clients,
        "soak/requests": load.outcomes.total(),
        "soak/failed": load.outcomes.total() - load.outcomes["200"],
        "soak/retired_seen": load.retired_seen,
        "soak/items_retired": len(load.retired),
        "soak/legal": gauge(server, "whyrec_legal_share"),
        "soak/memory_growth": growth,
        "soak/memory_gib": max(samples) / 2**30,
        "soak/requests_per_s": load.outcomes["200"] / elapsed,
    }
    for kind, seconds in load.seconds.items():
        for percent in (50, 95, 99):
            figures[f"soak/{kind}/p{percent}_ms"] = float(np.percentile(seconds, percent)) * 1e3
    print(f"outcomes: {dict(load.outcomes)}")

    last = Load(server.url, options.seed)
    with last.running(options.clients, changes=False):
        wait_for(lambda: gauge(server, "whyrec_active") >= options.clients // 2, 10)
        server.process.send_signal(signal.SIGTERM)
        last.stop.set()  # each client ends with the request that it waits for
    figures["soak/drained_failed"] = sum(
        count
        for outcome, count in last.outcomes.items()
        if not outcome.startswith(("200", "503 stopping", "ConnectionRefusedError"))
    )
    figures["soak/exit_after_sigterm"] = server.process.wait(120)
    print(f"after SIGTERM: {dict(last.outcomes)}")
    return figures


def killed(server: Server, options: argparse.Namespace) -> dict[str, float]:
    """The engine's process is killed under load, which goes on until it is back."""
    load = Load(server.url, options.seed, pause=0.2)
    client = Client(server.url, timeout=5)
    with load.running(options.clients, changes=False):
        time.sleep(2)
        os.kill(server.engine(), signal.SIGKILL)
        start = time.monotonic()
        red = wait_for(lambda: not client.healthy(), 15)
        back = wait_for(client.healthy, START_SECONDS)
        recovered = time.monotonic() - start
        good = load.outcomes["200"]
        answers = wait_for(lambda: load.outcomes["200"] > good, 60)
        load.stop.set()
    print(f"engine killed: {dict(load.outcomes)}")
    told = sum(count for what, count in load.outcomes.items() if what.startswith("503 "))
    return {
        "soak/killed/health_red": red,
        "soak/killed/recovered": back and answers,
        "soak/killed/seconds_to_recover": recovered,
        "soak/killed/answered_200": load.outcomes["200"],
        "soak/killed/answered_503": told,
        "soak/killed/neither_200_nor_503": load.outcomes.total() - load.outcomes["200"] - told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("eval/results/serve/soak/cpu.json"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the servers' messages here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_model(Path(scratch), seed=options.seed)
        log = options.log or Path(scratch) / "log.txt"
        with serving(folder, log, "--max-model-len", "256") as server:
            figures = soak(server, options)
        with serving(folder, log, "--max-model-len", "256") as server:
            figures |= killed(server, options)
    figures = {key: round(float(value), 6) for key, value in sorted(figures.items())}
    for key, value in figures.items():
        print(f"{key:40s} {value:.6g}")
    record(
        options.json,
        name="soak",
        command=shlex.join(["python", *sys.argv]),
        seed=options.seed,
        figures=figures,
    )


if __name__ == "__main__":
    main()
