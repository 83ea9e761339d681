"""The socket in front: a server that dies behind it leaves nobody without an answer."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

# A server in place of vLLM: it sleeps, streams, echoes, tells its id, or dies.
CHILD = """
import os, signal, socketserver, sys, threading, time
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer is one piece, which no death can cut
    def log_message(self, *_): pass
    def address_string(self): return ""
    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1.5)
        if self.path == "/die":
            os._exit(7)
        if self.path == "/stream":
            self.send_response(200)
            self.end_headers()
            try:
                for n in range(100):
                    self.wfile.write(b"word ")
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                print("left", flush=True)
            return
        self.answer(str(os.getpid()).encode())
    def do_POST(self):
        size = int(self.headers["content-length"])
        if self.path == "/die":
            os._exit(7)
        body = self.rfile.read(size)
        self.answer(body[::-1] if self.path == "/" else b"read")

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads, request_queue_size = True, 128

def drain(*_):
    threading.Thread(target=lambda: (time.sleep(1.0), os._exit(0))).start()

signal.signal(signal.SIGUSR1, drain)
time.sleep(float(sys.argv[1]))
Server(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


class Fronted:
    """The supervising process with such a server behind it."""

    def __init__(self, *, loads: float = 0.0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "whyrec.serve.supervise", "5", "127.0.0.1", str(self.port)]
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", CHILD, str(loads)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(self.listens)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def ask(self, path: str = "/", body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET" if body is None else "POST", path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def code(self) -> str | None:
        status, body = self.ask()
        return json.loads(body)["error"]["code"] if status == 503 else None


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@contextmanager
def fronted(**how: float) -> Iterator[Fronted]:
    front = Fronted(**how)
    try:
        yield front
    finally:
        for _ in range(2):
            front.process.terminate()
            time.sleep(0.05)
        front.process.communicate(timeout=20)


def test_bytes_pass_as_they_are() -> None:
    with fronted() as front:
        wait_for(lambda: front.ask()[0] == 200)
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=20)
        bodies = [os.urandom(size) for size in (1, 5_000, 3_000_000, 17)]
        for body in bodies:  # one connection for all of them
            connection.request("POST", "/", body)
            assert connection.getresponse().read() == body[::-1]
        connection.request("GET", "/stream")
        stream = connection.getresponse()
        began = time.monotonic()
        assert stream.read(5) == b"word " and time.monotonic() - began < 1
        stream.close()
        connection.close()
        assert front.process.stdout is not None
        assert front.process.stdout.readline() == "left\n"  # it noticed that nobody listens


def test_a_server_that_loads_and_one_that_stops_say_so() -> None:
    with fronted(loads=1.0) as front:
        assert front.code() == "loading"
        wait_for(lambda: front.code() is None)
        threads = [threading.Thread(target=front.ask, args=("/slow",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        front.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert front.process.wait(20) == 0


@pytest.mark.parametrize("how", ["killed", "dies"])
def test_a_dead_server_is_told_to_all_and_started_again(how: str) -> None:
    """Requests under way, new ones without a pause, and bodies that nobody reads."""
    outcomes: Counter[str] = Counter()
    with fronted(loads=0.5) as front:
        wait_for(lambda: front.code() is None)
        first, over = front.ask()[1], threading.Event()

        def ask(path: str, body: bytes | None) -> None:
            while not over.is_set():
                try:
                    outcomes[str(front.ask(path, body)[0])] += 1
                except (OSError, http.client.HTTPException) as error:
                    outcomes[type(error).__name__] += 1

        asked = [("/slow", None)] * 8 + [("/", None)] * 8 + [("/size", os.urandom(500_000))] * 4
        threads = [threading.Thread(target=ask, args=one) for one in asked]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        if how == "killed":
            os.kill(int(first), signal.SIGKILL)
        else:
            assert front.ask("/die", b"last words")[0] == 503
        wait_for(lambda: front.code() == "engine_stopped")
        wait_for(lambda: front.code() is None)
        over.set()
        for thread in threads:
            thread.join()
        assert front.ask()[1] != first
    assert set(outcomes) == {"200", "503"}, outcomes
    assert outcomes["503"] >= 8


def test_a_server_that_dies_again_and_again_is_given_up() -> None:
    front = Fronted()
    for _ in range(4):
        wait_for(lambda: front.code() is None)
        assert front.ask("/die")[0] == 503
    _, said = front.process.communicate(timeout=20)
    assert front.process.returncode == 7 and said.count("started again") == 3


def test_an_address_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "whyrec.serve.supervise", "5", "127.0.0.1", port, "false"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 2 and "cannot listen" in done.stderr
