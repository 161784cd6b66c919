"""Where caches go, also for users without a home folder."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from qa_deepspeed.utils.home import ensure_home, user_cache


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user whom neither HOME nor an account gives a home; the temporary folder that takes its place."""

    def expanded(path: str) -> str:
        return path.replace("~", os.environ["HOME"], 1) if "HOME" in os.environ else path

    monkeypatch.setenv("HOME", "")  # so that monkeypatch puts back what ensure_home sets
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", expanded)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_known_home_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert ensure_home() is None
    assert user_cache() == tmp_path / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert user_cache() == tmp_path / "elsewhere"


def test_a_user_without_a_home_gets_a_private_folder(homeless: Path) -> None:
    home = ensure_home()
    assert home is not None and home.parent == homeless
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert user_cache() == home / ".cache"
    assert ensure_home() is None
    del os.environ["HOME"]
    assert ensure_home() == home  # other processes of the user share it


def test_a_folder_that_somebody_else_made_is_not_used(homeless: Path) -> None:
    taken = homeless / f"qa_deepspeed-home-{os.getuid()}"
    (homeless / "target").mkdir(mode=0o700)
    taken.symlink_to(homeless / "target")
    home = ensure_home()
    assert home is not None and home != taken and home.is_dir()
