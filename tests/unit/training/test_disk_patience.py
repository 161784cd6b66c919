"""A full disk at the end of a run: it is tried again for a time, then the run asks for the same command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qa_deepspeed.runs.requeue import REQUEUE_FILE, REQUEUE_STATUS
from qa_deepspeed.training import disk_patience
from qa_deepspeed.training.disk_patience import DiskPatience, requeue_on_disk_failure
from qa_deepspeed.utils.errors import StorageError, UserError
from qa_deepspeed.utils.files import write_json


class Disk:
    """Full for some attempts; time passes only by sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: int) -> None:
        self.full, self.slept = full, 0.0
        monkeypatch.setattr(disk_patience.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def save(self) -> str:
        self.full -= 1
        if self.full >= 0:
            raise StorageError("cannot write out: No space left on device")
        return "saved"


def test_a_save_is_repeated_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(monkeypatch, full=3)
    assert DiskPatience(600).call(disk.save) == "saved" and disk.slept == 45
    assert capsys.readouterr().out.count("trying again for 600 s (--save_retry): make room") == 1


def test_all_saves_together_take_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, patience = Disk(monkeypatch, full=1), DiskPatience(20)
    assert patience.call(disk.save) == "saved"
    disk.full = 100
    with pytest.raises(StorageError):
        patience.call(disk.save)
    assert disk.slept == 20
    with pytest.raises(UserError, match="a mistake"):
        patience.call(lambda: (_ for _ in ()).throw(UserError("a mistake")))


@pytest.mark.parametrize(("steps", "words"), [((), "trains again"), ((5, 10), "resumes from checkpoint-10")])
def test_a_run_ends_with_a_requeue_and_says_what_the_same_command_does(
    tmp_path: Path, steps: tuple[int, ...], words: str
) -> None:
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    stops = SimpleNamespace(ask_for_requeue=lambda reason: write_json(tmp_path / REQUEUE_FILE, {"reason": reason}))
    inside = requeue_on_disk_failure(tmp_path, stops)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=words) as caught, inside:
        raise OSError(28, "No space left on device")
    assert caught.value.status == REQUEUE_STATUS
    assert json.loads((tmp_path / REQUEUE_FILE).read_text()) == {"reason": "the disk is full or fails"}
