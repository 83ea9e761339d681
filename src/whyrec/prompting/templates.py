"""The sentences that the LLM is shown, as YAML files in `prompts/`, shipped inside the wheel."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).resolve()
# In a wheel the templates lie beside the packages; in a checkout, at the top.
_FOLDERS = (_HERE.parents[1] / "prompts", _HERE.parents[3] / "prompts")


def template_file(name: str, folder: Path | None = None) -> Path:
    """The file `NAME.yaml`: `recommend`, `align` or `general`.

    Args:
        name: which templates.
        folder: where to look; the packaged ones when None. A model folder carries its own.

    Raises:
        ValueError: when it is not there.
    """
    folders = (folder,) if folder else _FOLDERS
    for candidate in folders:
        if (candidate / f"{name}.yaml").exists():
            return candidate / f"{name}.yaml"
    raise ValueError(f"there is no template file {name}.yaml in {folders[-1]}")


@cache
def load_templates(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Templates by key, from `template_file`."""
    return yaml.safe_load(template_file(name, folder).read_text(encoding="utf-8"))
