"""The loss of another rank is recognised by the messages of gloo and NCCL, in training as in evaluation."""

import contextlib

import pytest

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import LostRankError

MESSAGES = {
    "closed by peer": "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:2541",
    "connection reset": "[../gloo/transport/tcp/pair.cc:513] Read error [10.0.0.2]:4188: Connection reset by peer",
    "connection refused": "[../gloo/transport/tcp/pair.cc:234] SO_ERROR: Connection refused, remote=[10.0.0.2]:4188",
    "broken pipe": "[../gloo/transport/tcp/pair.cc:434] writev [10.0.0.2]:12733: Broken pipe",
    "timed out": "[../gloo/transport/tcp/buffer.cc:81] Timed out waiting 15000ms for recv operation to complete",
    "timeout": "wait timeout after 1800000ms, keys: /worker/attempt_0/default_pg/0//cuda//0",
    "failed to recv, got 0 bytes": "failed to recv, got 0 bytes",
    "failed to send": "failed to send, errno 32",
    "connection closed by remote peer": "NCCL WARN socketProgress: Connection closed by remote peer node2<41235>",
    "remote process exited": "ncclRemoteError: A call failed, possibly by a network error or a remote process exited",
    "socket error": "ncclSystemError: System call failed. Last error: Call to recv failed: socket error",
    "watchdog": "[PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception",
    "communicator was aborted": "NCCL communicator was aborted on rank 1.",
}
"""One message of the libraries for each text that is looked for."""


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_every_text_has_its_message() -> None:
    assert set(MESSAGES) == set(dist.LOST_RANK_TEXTS)


@pytest.mark.parametrize("text", MESSAGES)
def test_a_lost_rank_is_explained_in_one_line(text: str, two_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function that training asks, and in the block that evaluation stands in."""
    monkeypatch.setattr(dist, "_stage", "step 7")
    monkeypatch.setattr(dist, "LOST_RANK_TEXTS", (text,))
    said = dist.explain_lost_rank(RuntimeError(f"{MESSAGES[text]}\nException raised from run"))
    assert said is not None and said.startswith("rank 1 waited in step 7 for a rank that has ended or hangs")
    assert MESSAGES[text] in said and "\n" not in said
    with pytest.raises(LostRankError, match="rank 1 waited in the evaluation for a rank"):  # noqa: SIM117
        with dist.explain_collective_errors("the evaluation"):
            raise RuntimeError(MESSAGES[text])
    assert dist.explain_lost_rank(RuntimeError(text)).startswith("rank 1 waited in step 7")  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [None, RuntimeError("closed by peer"), ValueError("no number")])
def test_after_a_stage_that_is_explained_the_one_before_is_named_again(
    error: Exception | None, two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "_stage", "step 7")
    with contextlib.suppress(LostRankError, ValueError), dist.explain_collective_errors("the evaluation"):
        if error is not None:
            raise error
    assert dist.explain_lost_rank(RuntimeError("closed by peer")).startswith("rank 1 waited in step 7")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "message",
    ["mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", "CUDA error: the launch timed out and was terminated"],
)
def test_other_errors_stay_what_they_are(message: str, two_ranks: None) -> None:
    assert dist.explain_lost_rank(RuntimeError(message)) is None
    with pytest.raises(RuntimeError, match="multiplied|launch"), dist.explain_collective_errors("the evaluation"):
        raise RuntimeError(message)


def test_a_run_of_one_rank_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert dist.explain_lost_rank(RuntimeError("Connection closed by peer")) is None
