"""The process that stays in front of vLLM: it holds the socket and looks after the server.

    python -m whyrec.serve.supervise 30 127.0.0.1 8000 \
        python -m vllm.entrypoints.openai.api_server …

The server listens on a private Unix socket; clients reach `front.py`, which tells them 503 while
there is no server. A server that ends after it has served, as vLLM does when its engine dies, is
started again, a few times; one that never came to serve, or dies again and again, ends this process
too, with a status other than 0, for whatever restarts services to see.

SIGTERM and Ctrl-C become SIGUSR1, on which the plugin lets the running requests end before it stops
vLLM. Nothing large is imported: this lives for long.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from whyrec.serve.front import Front

RESTARTS, WITHIN_SECONDS = 3, 600.0
_AFTER_DRAIN_SECONDS = 30.0


async def supervise(
    command: Sequence[str], *, host: str, port: int, drain_seconds: float, restarts: int = RESTARTS
) -> int:
    """Run a server to its end; the exit status: 0 after SIGTERM or Ctrl-C, else not 0.

    Args:
        command: the server's; `--uds PATH` is put behind it.
        host, port: where clients reach it.
        drain_seconds: how long its running requests may take when it is told to stop.
        restarts: how often it is started again within ten minutes.

    Raises:
        OSError: when nobody can listen there.
    """
    with tempfile.TemporaryDirectory(prefix="whyrec-") as private:
        path = Path(private) / "socket"
        encrypted = any(part.startswith("--ssl-") for part in command)
        front = Front(str(path), encrypted=encrypted)
        await front.listen(host, port)
        child = _Child([*command, "--uds", str(path)], front, drain_seconds=drain_seconds)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, child.stop)
        ends: list[float] = []
        while True:
            path.unlink(missing_ok=True)
            status = await child.run()
            if child.asked:
                break
            ends = [end for end in ends if end > time.monotonic() - WITHIN_SECONDS]
            ends.append(time.monotonic())
            again = front.reached > 0 and len(ends) <= restarts
            _say(
                f"vLLM has ended with status {status}, unasked; its messages above say why"
                + ("; it is started again" if again else "")
            )
            if not again:
                break
        await front.close()
    if child.asked:
        return 0
    return status if 0 < status < 128 else 1


class _Child:
    """The server's process, several times over if need be."""

    def __init__(self, command: Sequence[str], front: Front, *, drain_seconds: float) -> None:
        self._command, self._front = command, front
        self._patience = 2 * drain_seconds + _AFTER_DRAIN_SECONDS
        self._process: asyncio.subprocess.Process | None = None
        self.asked = False

    async def run(self) -> int:
        """Start it, and its status when it has ended."""
        self._front.reached = 0
        # A session of its own: Ctrl-C reaches us alone, and we pass it on.
        self._process = await asyncio.create_subprocess_exec(*self._command, start_new_session=True)
        if self.asked:
            self._tell(signal.SIGTERM)
        watch = asyncio.create_task(self._front.wait_until_up())
        status = await self._process.wait()
        watch.cancel()
        self._front.state = "stopping" if self.asked else "engine_stopped"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that hold memory
        return status

    def stop(self) -> None:
        """Let running requests end, then the process; asked twice, do not wait."""
        if self.asked:
            self._tell(signal.SIGTERM)
            return
        self.asked = True
        # Before it has loaded, it has nothing to drain and does not know this signal: it ends.
        self._tell(signal.SIGUSR1)
        asyncio.get_running_loop().call_later(self._patience, self._tell, signal.SIGKILL)

    def _tell(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _say(text: str) -> None:
    print(f"whyrec: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Supervise what the command line says; the exit status."""
    drain, host, port, *command = arguments
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # two files a client
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    try:
        return asyncio.run(
            supervise(command, host=host, port=int(port), drain_seconds=float(drain))
        )
    except OSError as error:
        _say(f"cannot listen on {host}:{port} ({error}); name another --host or --port")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
