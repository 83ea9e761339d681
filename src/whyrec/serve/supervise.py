"""The process that stays in front of vLLM: it passes on what it is told, and says how it ended.

    python -m whyrec.serve.supervise 30 python -m vllm.entrypoints.openai.api_server …

SIGTERM and Ctrl-C become SIGUSR1, on which the plugin lets the running requests end before it stops
vLLM. When vLLM ends by itself, as it does when its engine dies, so does this, with a status other
than 0, for whatever restarts services to see. Nothing large is imported: this lives for long.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence

_AFTER_DRAIN_SECONDS = 30.0


def supervise(command: Sequence[str], *, drain_seconds: float) -> int:
    """Run a server to its end; the exit status: 0 after SIGTERM or Ctrl-C, else not 0.

    Args:
        command: the server's.
        drain_seconds: how long its running requests may take when it is told to stop.
    """
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        if asked:
            child.terminate()  # asked twice: do not wait
            return
        asked = True
        # Before it has loaded, it has nothing to drain and does not know this signal: it ends.
        child.send_signal(signal.SIGUSR1)

    # A session of its own: Ctrl-C reaches us alone, and we pass it on.
    child = subprocess.Popen(command, start_new_session=True)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while child.poll() is None:
            patience = 2 * drain_seconds + _AFTER_DRAIN_SECONDS if asked else 0.5
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                if patience > 0.5:
                    child.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        return 0
    status = child.wait()
    print(
        f"whyrec: vLLM has ended with status {status}, unasked; its messages above say why",
        file=sys.stderr,
    )
    return status if 0 < status < 128 else 1


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], drain_seconds=float(sys.argv[1])))
