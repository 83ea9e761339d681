"""The endpoint writer against a real server on loopback that behaves badly."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from reasoning_catalogues import SHOP, vectors_of

from whyrec.reasoning.asking import AnswerLog, Step, question, tidy
from whyrec.reasoning.endpoint import EndpointReport, EndpointSettings, write_with_endpoint

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
STEPS = [Step(user, 3, [0, 2, 5], user % 8, []) for user in range(20)]


def completion(text: object, *, finish: str = "stop", tokens: int = 10) -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body = {"choices": [choice], "usage": {"total_tokens": tokens}}
    return 200, {}, json.dumps(body).encode()


class Teacher:
    """A server whose replies a test decides: `reply(n)` for the n-th request, from 0."""

    def __init__(self) -> None:
        self.reply: Callable[[int], Answer] = lambda n: completion(f"Reason {n}.")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        teacher, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(teacher.requests)
                    teacher.requests.append(body)
                    teacher.keys.append(self.headers.get("Authorization"))
                    teacher.times.append(time.monotonic())
                assert self.path == "/v1/chat/completions"
                status, headers, content = teacher.reply(number)
                if status == 0:  # drop the connection without a word
                    return
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client did not wait

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def write(self, log: Path, steps: list[Step] = STEPS, **options: Any) -> EndpointReport:
        usual = {"url": self.url, "model": "teacher", "threads": 4, "backoff_s": 0.01, "retries": 3}
        settings = EndpointSettings(**(usual | options))
        return write_with_endpoint(
            steps, items=SHOP, vectors_ND=vectors_of(SHOP), settings=settings, log=log
        )


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Teacher]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    one = Teacher()
    thread = threading.Thread(target=one.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "rationales" / "endpoint.jsonl"


def test_every_step_is_asked_once(
    teacher: Teacher, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    report = teacher.write(log, key_variable="TEACHER_KEY")
    assert report.counts["written"] == len(teacher.requests) == len(STEPS)
    assert set(report.answers) == {step.key for step in STEPS}
    assert set(report.answers.values()) == {f"Reason {n}." for n in range(len(STEPS))}
    assert set(teacher.keys) == {"Bearer secret"} and "secret" not in log.read_text()
    asked = teacher.requests[0]
    assert (asked["model"], asked["max_tokens"]) == ("teacher", 96)
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    # A second run asks nothing.
    again = teacher.write(log)
    assert again.answers == report.answers and len(teacher.requests) == len(STEPS)
    assert again.counts["already written"] == len(STEPS)


def test_the_question_shows_pruned_history_and_target() -> None:
    asked = question(STEPS[1], SHOP, vectors_ND=vectors_of(SHOP), words=25, k=2)
    text = asked.messages()[1]["content"]
    assert "OPI Nail Lacquer, Bubble Bath" in text and "25" in text
    assert "Big Apple Red" in text and "Shampoo" not in text  # the two nearest of three
    assert asked.messages()[0]["content"]


def test_braces_in_titles_are_only_text() -> None:
    items = [SHOP[0], SHOP[1].__class__("x", "{target} {0} %s", "", ())]
    step = Step(0, 1, [1], 0, [])
    asked = question(step, items, vectors_ND=vectors_of(items), words=9)
    assert "{target} {0} %s" in asked.messages()[1]["content"]


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_passing_trouble_is_tried_again(teacher: Teacher, log: Path, status: int) -> None:
    teacher.reply = lambda n: (status, {}, b"busy") if n % 3 == 0 else completion("Fine.")
    report = teacher.write(log, retries=8)
    assert report.counts["written"] == len(STEPS)
    assert report.counts["requests"] == len(teacher.requests) > len(STEPS)


def test_retry_after_is_honoured(teacher: Teacher, log: Path) -> None:
    teacher.reply = lambda n: (429, {"Retry-After": "0.4"}, b"") if n == 0 else completion("Fine.")
    teacher.write(log, STEPS[:1])
    assert teacher.times[1] - teacher.times[0] >= 0.39


def test_timeouts_are_tried_again(teacher: Teacher, log: Path) -> None:
    def slow(n: int) -> Answer:
        if n < 2:
            time.sleep(0.5)
        return completion("Fine.")

    teacher.reply = slow
    report = teacher.write(log, STEPS[:3], timeout_s=0.2)
    assert report.counts["written"] == 3 and report.counts["requests"] > 3


JUNK = [
    (200, {}, b"<html>502</html>"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b"[1, 2]"),
    (200, {}, b"\xff\xfe"),
    completion(None),
    completion("   "),
    completion("So they", finish="length"),
    completion("<think>only thoughts</think>"),
]


def test_junk_is_counted_and_passed_over(teacher: Teacher, log: Path) -> None:
    teacher.reply = lambda n: JUNK[n // 2] if n % 2 and n // 2 < len(JUNK) else completion("Fine.")
    report = teacher.write(log)
    assert report.counts["junk"] == len(JUNK)
    assert list(report.answers.values()).count(None) == len(JUNK)
    assert list(report.answers.values()).count("Fine.") == len(STEPS) - len(JUNK)
    # It is not paid for again.
    before = len(teacher.requests)
    teacher.write(log)
    assert len(teacher.requests) == before


def test_the_budget_of_requests_holds_over_runs(teacher: Teacher, log: Path) -> None:
    first = teacher.write(log, max_requests=7)
    assert (first.counts["written"], first.counts["left over"], len(teacher.requests)) == (7, 13, 7)
    second = teacher.write(log, max_requests=9)
    assert (second.counts["already written"], second.counts["written"]) == (7, 2)
    assert len(teacher.requests) == 9
    third = teacher.write(log)
    assert len(third.answers) == len(STEPS) and third.counts["left over"] == 0


def test_retries_are_in_the_budget(teacher: Teacher, log: Path) -> None:
    teacher.reply = lambda n: (500, {}, b"")
    report = teacher.write(log, max_requests=2, threads=1)
    assert len(teacher.requests) == 2 and report.answers == {}
    assert (report.counts["failed"], report.counts["left over"]) == (1, 19)


def test_the_budget_of_tokens(teacher: Teacher, log: Path) -> None:
    report = teacher.write(log, max_total_tokens=45, threads=1)
    assert report.counts["written"] == 5 and report.counts["tokens"] == 50


def test_a_killed_run_goes_on(teacher: Teacher, log: Path) -> None:
    teacher.write(log, STEPS[:6], threads=1)
    lines = log.read_bytes()
    log.write_bytes(lines[:-9])  # the kill fell into the sixth answer
    report = teacher.write(log, threads=1)
    assert report.counts["already written"] == 5
    assert len(report.answers) == len(STEPS) and len(teacher.requests) == 6 + 15
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 1 + len(STEPS)


def test_answers_of_another_model_are_not_mixed_in(teacher: Teacher, log: Path) -> None:
    teacher.write(log, STEPS[:1])
    with pytest.raises(ValueError, match="other questions"):
        teacher.write(log, model="another")


def one_sentence(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_nobody_there(log: Path, teacher: Teacher) -> None:
    with pytest.raises(ValueError) as error:
        teacher.write(log, url="http://127.0.0.1:9/v1")
    one_sentence(error, "http://127.0.0.1:9/v1 does not answer", "refused", str(log), "run")


def test_an_endpoint_that_dies_keeps_what_is_done(teacher: Teacher, log: Path) -> None:
    teacher.reply = lambda n: completion("Fine.") if n < 5 else (503, {}, b"")
    with pytest.raises(ValueError) as error:
        teacher.write(log, threads=1, retries=1)
    one_sentence(error, "HTTP 503", "5 answers are kept")
    teacher.reply = lambda n: completion("Fine.")
    report = teacher.write(log)
    assert report.counts["already written"] == 5 and len(report.answers) == len(STEPS)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "bad key"), (404, "no such model"), (307, ""), (400, "no such field")],
)
def test_refusals_end_at_once(teacher: Teacher, log: Path, status: int, said: str) -> None:
    body = json.dumps({"error": {"message": said}}).encode()
    teacher.reply = lambda n: (status, {}, body)
    with pytest.raises(ValueError) as error:
        teacher.write(log)
    one_sentence(error, f"HTTP {status}", said)
    assert len(teacher.requests) <= 8


def test_one_refused_prompt_does_not_end_the_run(teacher: Teacher, log: Path) -> None:
    teacher.reply = lambda n: (400, {}, b"") if n == 4 else completion("Fine.")
    report = teacher.write(log)
    assert (report.counts["failed"], report.counts["written"]) == (1, len(STEPS) - 1)
    assert len(teacher.write(log).answers) == len(STEPS)  # asked again the next time


@pytest.mark.parametrize("options", [{"url": "teacher:8000"}, {"threads": 0}, {"retries": -1}])
def test_settings_that_cannot_be(teacher: Teacher, log: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        teacher.write(log, **options)


def test_tidy() -> None:
    assert tidy(" a\n b\t ") == "a b"
    assert tidy("<think>x</think> y") == "y"


def test_the_log_passes_over_damage(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log.jsonl", asked={"model": "m"})
    log.add((1, 2), text="a")
    with log.path.open("ab") as file:
        file.write(b"\0\0\0\n[3]\n")
    log.add((1, 3), text="b")
    again = AnswerLog(log.path, asked={"model": "m"})
    assert again.answers() == {(1, 2): "a", (1, 3): "b"}
