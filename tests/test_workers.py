"""Work in several processes gives what work in one gives."""

import os

import pytest

from whyrec.workers import in_processes


@pytest.mark.parametrize("cores", [1, 8])
def test_results_are_in_order_however_many_processes(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    offset = 7
    found = in_processes(lambda n: (n + offset, os.getpid()), 1000)
    assert [value for value, _ in found] == [n + offset for n in range(1000)]
    assert (len({process for _, process in found}) > 1) == (cores > 1)
    assert in_processes(lambda n: n, 0) == []


def test_an_error_in_a_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with pytest.raises(ZeroDivisionError):
        in_processes(lambda n: 1 // (n - 500), 1000)
