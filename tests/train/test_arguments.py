"""Trackers: those that are there are named, the others refused before anything is trained."""

import sys
from pathlib import Path

import pytest

from whyrec.train.arguments import tracked

LOGS = Path("runs/tiny/logs/aligned/mix")


@pytest.mark.parametrize("report_to", ["tensorboard", "none"])
def test_a_run_has_a_name_in_its_tracker(report_to: str) -> None:
    assert tracked(LOGS, report_to) == {"report_to": report_to, "run_name": "tiny-aligned-mix"}


def test_a_tracker_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no tracker 'wendb'; choose of .*wandb, .*none"):
        tracked(LOGS, "wendb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"'wandb' cannot be used: .*pip install wandb"):
        tracked(LOGS, "wandb")
