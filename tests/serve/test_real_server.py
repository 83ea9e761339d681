"""`whyrec serve` as a user starts it: vLLM on the CPU, a tiny model, OpenAI's client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm")
if not any(found.name == "whyrec" for found in entry_points(group="vllm.endpoint_plugins")):
    pytest.skip("install whyrec again: its entry points are missing", allow_module_level=True)

import openai
from random_requests import send_random
from served_models import make_served

from conftest import NUM_ITEMS
from whyrec import Recommender
from whyrec.serve.client import Client, ServerError

pytestmark = pytest.mark.timeout(600)
HISTORY = ["item003", "item004", "item005"]
THOUGHTS = {"samples": 1, "max_tokens": 200, "temperature": 0.0}


@pytest.fixture(scope="module")
def folder(prepared_run, tokenizer, tmp_path_factory) -> Path:
    """A tiny model that thinks."""
    folder = make_served(tmp_path_factory.mktemp("served") / "tiny", prepared_run, tokenizer)
    settings = json.loads((folder / "whyrec.json").read_text()) | {"thoughts": THOUGHTS}
    (folder / "whyrec.json").write_text(json.dumps(settings))
    return folder


class Server:
    """The command, in a process of its own."""

    def __init__(self, folder: Path, log: Path, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "whyrec.cli", "serve", str(folder), "--port", str(port)]
        options = ["--enforce-eager", "--max-model-len", "384", "--max-num-seqs", "16", *more]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as file:
            self.process = subprocess.Popen([*command, *options], stdout=file, stderr=file)
        self.client = Client(self.url, timeout=120)
        end = time.monotonic() + 300
        while not Client(self.url, timeout=5).healthy():
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()[-4_000:]
            time.sleep(0.5)

    def wait_until_busy(self, number: int) -> None:
        """Until so many recommendations are under way."""
        end = time.monotonic() + 60
        while f"whyrec_active {number}.0" not in urlopen(f"{self.url}/metrics").read().decode():
            assert time.monotonic() < end, "they were not under way together"

    def engine(self) -> int:
        """The engine's process, a grandchild of ours."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                named = b"EngineCore" in (entry / "cmdline").read_bytes()
                if named and self.process.pid in self._ancestors(int(entry.name)):
                    return int(entry.name)
        raise AssertionError("no engine")

    def _ancestors(self, pid: int) -> list[int]:
        found = []
        while pid > 1:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            pid = int(fields[1])
            found.append(pid)
        return found

    def ask_together(self, number: int, **asked: object) -> tuple[list[threading.Thread], Counter]:
        """Many clients, one request each; what becomes of them."""
        outcomes: Counter[int] = Counter()

        def ask() -> None:
            try:
                self.client.recommend(HISTORY, **asked)
                outcomes[200] += 1
            except ServerError as error:
                outcomes[error.status] += 1

        threads = [threading.Thread(target=ask) for _ in range(number)]
        for thread in threads:
            thread.start()
        return threads, outcomes


@pytest.fixture
def server(folder, tmp_path):
    server = Server(folder, tmp_path / "log.txt")
    yield server
    for _ in range(2):
        if server.process.poll() is None:
            server.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(60)


def test_it_answers_and_ends_when_it_is_told_to(server, folder) -> None:
    recommender = Recommender.from_pretrained(folder, device="cpu")
    for asked in ({"k": 5}, {"k": 8, "exclude": []}, {"k": 4, "think": True}):
        wanted = recommender.recommend(HISTORY, **asked)
        answer = server.client.recommend(HISTORY, **asked)
        assert [item["id"] for item in answer["items"]] == [e.item_id for e in wanted]
        scores = [item["score"] for item in answer["items"]]
        assert scores == pytest.approx([e.score for e in wanted], abs=1e-3)
        assert answer["trace"] == wanted.trace
    *words, (_, last) = server.client.stream(HISTORY, k=4, think=True)
    assert "".join(data["text"] for _, data in words) == last["trace"] == wanted.trace

    plain = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    said = plain.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
    )
    assert said.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as caught:
        plain.post("/recommendations", body={"history": ["nope"]}, cast_to=object)
    assert caught.value.code == "unknown_item"

    server.client.retire_items(["item000", "item001"])
    left = {item.sid for item in recommender.recommend([], k=NUM_ITEMS)
            if item.item_id not in ("item000", "item001")}  # fmt: skip
    spelt = plain.completions.create(
        model="tiny", prompt="<|sid_begin|>", n=64, max_tokens=4, temperature=2.0
    )
    texts = {f"<|sid_begin|>{choice.text}" for choice in spelt.choices}
    assert texts <= left and len(texts) > 3
    answer = server.client.recommend(["item000"], k=NUM_ITEMS, exclude=[])
    assert len(answer["items"]) == NUM_ITEMS - 2

    threads, outcomes = server.ask_together(8, think=True)
    server.wait_until_busy(8)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert outcomes == {200: 8}  # all that were under way have ended well
    assert server.process.wait(90) == 0, server.log.read_text()[-3_000:]
    assert "item003" not in server.log.read_text()


def test_random_requests_find_no_5xx_and_who_leaves_is_not_worked_for(server) -> None:
    openapi = json.loads(urlopen(f"{server.url}/openapi.json").read())
    # This model's codebooks were fitted to made-up vectors, which the server's encoder cannot make.
    del openapi["paths"]["/v1/items"]["post"], openapi["paths"]["/v1/items/encode"]
    assert len(send_random(openapi, server.url, examples=5)) == 7
    assert server.client.healthy()

    def running() -> float:
        text = urlopen(f"{server.url}/metrics").read().decode()
        named = ("whyrec_active ", "vllm:num_requests_running{", "vllm:num_requests_waiting{")
        lines = [line for line in text.splitlines() if line.startswith(named)]
        assert len(lines) == 3
        return sum(float(line.split()[-1]) for line in lines)

    streams = [server.client.stream(HISTORY, k=4, think=True) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert running() > 0
    for stream in streams:
        stream.close()
    end = time.monotonic() + 10
    while running() > 0:
        assert time.monotonic() < end, "they go on for nobody"
        time.sleep(0.05)


def test_a_killed_engine_is_told_to_all_and_started_again(server) -> None:
    threads, outcomes = server.ask_together(8, think=True)
    server.wait_until_busy(8)
    os.kill(server.engine(), signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert outcomes[503] > 0 and outcomes[200] + outcomes[503] == 8
    assert not server.client.healthy()
    end = time.monotonic() + 120
    while not server.client.healthy():
        try:
            server.client.recommend(HISTORY)
        except ServerError as error:
            assert error.status == 503 and error.code in ("engine_stopped", "loading")
        else:
            assert server.client.healthy()  # it came back between the two questions
        assert server.process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    assert len(server.client.recommend(HISTORY, k=5)["items"]) == 5


def test_plain_vllm_keeps_to_the_catalogue_too(folder, tmp_path) -> None:
    """`vllm serve MODEL`, where whyrec is installed: its entry point alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port,
               "--enforce-eager", "--max-model-len", "384", "--max-num-seqs", "16",
               "--dtype", "float32", "--block-size", "32"]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                                "VLLM_PLUGINS": ""}  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
    try:
        client, end = Client(f"http://127.0.0.1:{port}", timeout=60), time.monotonic() + 300
        while not client.healthy():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4_000:]
            time.sleep(0.5)
        plain = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        spelt = plain.completions.create(
            model="tiny", prompt="<|sid_begin|>", n=64, max_tokens=4, temperature=2.0
        )
        recommender = Recommender.from_pretrained(folder, device="cpu")
        real = {item.sid for item in recommender.recommend([], k=NUM_ITEMS)}
        texts = {f"<|sid_begin|>{choice.text}" for choice in spelt.choices}
        assert texts <= real and len(texts) > 3
    finally:
        process.terminate()
        process.wait(60)
