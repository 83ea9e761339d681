"""How vLLM finds the plugins of a whyrec that is on the path and not installed: for benches."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

ENTRY_POINTS = """[vllm.logits_processors]
whyrec = whyrec.serve.constraint:SidConstraint

[vllm.endpoint_plugins]
whyrec = whyrec.serve.plugin:Plugin
"""


@contextlib.contextmanager
def plugins_on_path() -> Iterator[dict[str, str]]:
    """Variables for a process whose vLLM is to find whyrec; none where whyrec is installed.

    As much of an installed whyrec as vLLM asks for lies in a folder of its own while this lasts.
    """
    if any(found.name == "whyrec" for found in entry_points(group="vllm.endpoint_plugins")):
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "whyrec-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: whyrec\nVersion: 0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        path = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {"PYTHONPATH": os.pathsep.join(path)}
