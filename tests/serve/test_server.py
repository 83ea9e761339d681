"""`whyrec serve`: the command line it writes, and how it looks after the process it starts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from whyrec.cli import main
from whyrec.serve.server import launch

BARE = {"PATH": os.environ["PATH"]}


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_serves_this_folder_on_this_machine(model_folder) -> None:
    process = launch(model_folder, environment=BARE)
    assert process.command[:2] == [sys.executable, "-m"]
    assert option(process.command, "--model") == str(model_folder)
    assert (process.host, process.port) == ("127.0.0.1", 8000)
    assert option(process.command, "--worker-extension-cls") == "whyrec.serve.worker.BeamWorker"
    assert "--disable-uvicorn-access-log" in process.command
    assert process.environment["VLLM_PLUGINS"] == "whyrec"
    assert json.loads(process.environment["WHYREC_SERVE"])["parent"] == os.getpid()
    assert "VLLM_API_KEY" not in process.environment
    assert (model_folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_another_address_needs_a_key(model_folder, host) -> None:
    with pytest.raises(ValueError, match="API key"):
        launch(model_folder, host=host, environment=BARE)
    process = launch(model_folder, host=host, environment=BARE | {"WHYREC_API_KEY": "secret"})
    assert process.environment["VLLM_API_KEY"] == "secret"
    assert not any("secret" in part for part in process.command)
    assert "secret" not in process.environment["WHYREC_SERVE"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_this_machine_needs_none(model_folder, host) -> None:
    assert launch(model_folder, host=host, environment=BARE).host == host


def test_other_options_go_to_vllm_and_win(model_folder) -> None:
    rest = ["--tensor-parallel-size", "2", "--block-size", "64"]
    process = launch(model_folder, rest=rest, environment=BARE | {"VLLM_PLUGINS": "mine"})
    assert process.command[-4:] == rest
    assert process.environment["VLLM_PLUGINS"] == "mine,whyrec"
    for refused in (["--model", "x"], ["--worker-extension-cls=x"], ["--api-server-count", "4"],
                    ["--uds", "x"]):  # fmt: skip
        with pytest.raises(ValueError, match="leave it out"):
            launch(model_folder, rest=refused, environment=BARE)


def test_the_command_line_hands_them_on(model_folder, monkeypatch) -> None:
    seen = {}

    def become(program: str, command: list[str], environment: dict[str, str]) -> None:
        seen.update(command=command, settings=environment["WHYREC_SERVE"])

    monkeypatch.setattr(os, "execve", become)
    monkeypatch.setattr("whyrec.serve.server.check_installed", lambda: None)
    main(["serve", str(model_folder), "--port", "81", "--max-k", "7", "--ahead", "a.sqlite",
          "--drain", "9", "--tensor-parallel-size", "2", "--no-enable-prefix-caching"])  # fmt: skip
    assert seen["command"][1:6] == ["-m", "whyrec.serve.supervise", "9.0", "127.0.0.1", "81"]
    assert seen["command"][-3:] == ["--tensor-parallel-size", "2", "--no-enable-prefix-caching"]
    settings = json.loads(seen["settings"])
    assert settings["limits"]["k"] == 7 and settings["ahead"] == "a.sqlite"
    assert main(["serve", str(model_folder), "--max-queue", "0"]) == 2


def test_other_commands_still_refuse_what_they_do_not_know(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["add-items", "model", "items.csv", "--tensor-parallel-size", "2"])
    assert ended.value.code == 2 and "unrecognized" in capsys.readouterr().err


def test_what_is_no_model_folder_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="not a WhyRec model folder"):
        launch(tmp_path, environment=BARE)


CHILD = """
import os, signal, sys, time
def drain(*_):
    time.sleep(0.3)
    print("drained", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGUSR1, drain)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ready", flush=True)
{then}
"""


def supervised(then: str) -> subprocess.Popen[str]:
    """A process that supervises a child which does this once it is ready."""
    child = [sys.executable, "-c", CHILD.format(then=then)]
    return subprocess.Popen(
        [sys.executable, "-m", "whyrec.serve.supervise", "5", "127.0.0.1", "0", *child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains_and_ends_with_0(number) -> None:
    process = supervised("time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert out == "drained\n" and process.returncode == 0


@pytest.mark.parametrize(("then", "status"), [("sys.exit(0)", 1), ("sys.exit(7)", 7)])
def test_a_server_that_ends_unasked_is_a_failure(then, status) -> None:
    process = supervised(then)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and "unasked" in err


def test_a_killed_server_is_a_failure() -> None:
    process = supervised("os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=20)
    assert process.returncode == 1


def test_asked_twice_it_does_not_wait() -> None:
    process = supervised("signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
