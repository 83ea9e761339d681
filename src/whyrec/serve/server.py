"""`whyrec serve MODEL`: vLLM's OpenAI-compatible server with WhyRec in it.

This writes vLLM's command line; `supervise.py` then starts it, listens in front of it and looks
after it.

    whyrec serve runs/ml-100k/model/aligned --port 8000 --tensor-parallel-size 2
"""

import importlib.util
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from whyrec.decode.model_folder import name_weights, read_settings
from whyrec.serve.settings import SETTINGS_VARIABLE, ServeSettings

KEY_VARIABLE = "WHYREC_API_KEY"
_SERVER = "vllm.entrypoints.openai.api_server"
_WORKER = "whyrec.serve.worker.BeamWorker"
_CONSTRAINT = "whyrec.serve.constraint:KeepTokenIds"


@dataclass(frozen=True)
class Launch:
    """A process to start.

    Attributes:
        command: its arguments.
        environment: all of its variables.
        host, port: where clients reach it; it listens on a Unix socket behind that.
    """

    command: list[str]
    environment: dict[str, str]
    host: str
    port: int


def launch(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServeSettings | None = None,
    rest: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """The vLLM process that serves a model folder.

    Args:
        folder: what `whyrec align` or a later stage wrote.
        host, port: where it listens.
        settings: see `ServeSettings`; its key is that of `WHYREC_API_KEY` when empty.
        rest: vLLM's own options, such as `--tensor-parallel-size 2`; they come last and so win.
        environment: the variables of this process when None.

    Raises:
        ValueError: when the folder is no model folder, an address other than this machine's own
            has no key, or an option in `rest` is ours to give.
    """
    read_settings(folder)
    name_weights(folder)  # folders of earlier versions have no index, and vLLM needs one
    settings = settings or ServeSettings()
    variables = dict(os.environ if environment is None else environment)
    key = settings.api_key or variables.pop(KEY_VARIABLE, "") or variables.get("VLLM_API_KEY", "")
    if not key and not _is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines: give an API key with --api-key or in "
            f"{KEY_VARIABLE}, or listen on 127.0.0.1"
        )
    for option in ("--model", "--worker-extension-cls", "--api-server-count", "--uds"):
        if any(part == option or part.startswith(f"{option}=") for part in rest):
            raise ValueError(f"whyrec serve decides {option}; leave it out")
    for place in (settings.run, settings.ahead):
        if place and "://" not in place and not Path(place).parent.exists():
            raise ValueError(f"there is no folder {Path(place).parent}; check the path")
    command = [
        *(sys.executable, "-m", _SERVER),
        *("--model", str(folder), "--served-model-name", folder.resolve().name),
        *("--worker-extension-cls", _WORKER),
        *("--shutdown-timeout", str(int(settings.drain_seconds))),
        "--disable-uvicorn-access-log",  # it holds addresses; our log line says the rest
        *_for_device(),
        *rest,
    ]
    settings = replace(settings, parent=os.getpid())
    variables |= {
        SETTINGS_VARIABLE: settings.dumps(),
        "VLLM_PLUGINS": _with_ours(variables.get("VLLM_PLUGINS")),
        "VLLM_NO_USAGE_STATS": variables.get("VLLM_NO_USAGE_STATS", "1"),
    }
    variables.pop("VLLM_API_KEY", None)
    if key:  # in the environment and not on the command line, which `ps` shows to everybody
        variables["VLLM_API_KEY"] = key
    if not _has_gpu():
        variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM would take half of all
    return Launch(command, variables, host, port)


def serve(process: Launch, *, drain_seconds: float) -> NoReturn:
    """Become the process that looks after a server, and small again: see `supervise.py`."""
    address = [process.host, str(process.port)]
    command = [sys.executable, "-m", "whyrec.serve.supervise", str(drain_seconds), *address]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, *process.command], process.environment)


def check_installed() -> None:
    """ValueError with what to install when vLLM is missing."""
    missing = [n for n in ("vllm", "fastapi") if importlib.util.find_spec(n) is None]
    if missing:
        raise ValueError(
            f"serving needs {' and '.join(missing)}; install whyrec[serve] for CUDA, or "
            "whyrec[serve-cpu]"
        )


def _with_ours(plugins: str | None) -> str:
    names = [name for name in (plugins or "").split(",") if name]
    return ",".join(dict.fromkeys([*names, "whyrec"]))


def _for_device() -> list[str]:
    """Options that a CPU or a GPU needs; the user's own come after them."""
    if _has_gpu():
        return ["--logits-processors", _CONSTRAINT]
    # Small blocks, or short prompts share no prefix; bf16 is slow on most CPUs.
    return ["--dtype", "float32", "--block-size", "32"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
