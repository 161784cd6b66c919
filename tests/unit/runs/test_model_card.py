"""The model card as the hub parses it, and the upload to a local endpoint, with failures in one line."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.runs.hub_upload import check_upload, upload
from qa_deepspeed.runs.model_card import model_card, training_command, write_model_card
from qa_deepspeed.utils.errors import UserError

OPTIONS = RunOptions(
    null_score_diff_threshold="auto",
    model_name_or_path="bert-base-uncased",
    dataset_name="rajpurkar/squad_v2",
    version_2_with_negative=True,
    learning_rate=3e-5,
    given=frozenset({"model_name_or_path", "dataset_name", "learning_rate"}),
)
RECORD: dict[str, Any] = {
    "metrics": {"exact": 71.25, "f1": 74.5, "total": 11873, "HasAns_f1": 70.0, "null_score_diff_threshold": -1.5},
    "identity": {"steps": 100, "global_batch_size": 32, "precision": "bf16"},
    "seconds": {"training": 1234.5},
    "data": {"train": {"questions": {"usable": 130000, "rejected": {"empty question": 2}}}},
    "software": {"versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "commit": None},
    "hardware": {"ranks": 8, "gpus": ["NVIDIA H100"] * 8, "processor": "x", "cores": 4},
}
INTERVALS = {"exact": [70.0, 72.0], "f1": [73.4, 75.6]}


def test_header_is_parsed_by_the_hub_library() -> None:
    card = huggingface_hub.ModelCard(model_card("squad-reader", OPTIONS, RECORD, INTERVALS))
    data = card.data
    found = {name: data.to_dict()[name] for name in ("base_model", "pipeline_tag", "library_name")}
    assert found == {
        "base_model": "bert-base-uncased",
        "pipeline_tag": "question-answering",
        "library_name": "transformers",
    }
    assert data.datasets == ["rajpurkar/squad_v2"] and data.model_name == "squad-reader"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["f1"].metric_value == 74.5 and results["exact_match"].metric_value == 71.25
    assert results["f1"].dataset_type == "rajpurkar/squad_v2" and results["f1"].dataset_split == "validation"


def test_text_has_scores_threshold_training_and_loading() -> None:
    text = model_card("squad-reader", OPTIONS, RECORD, INTERVALS)
    for part in (
        "| F1 | 74.50 | 73.40 to 75.60 |",
        "null odds exceed -1.5",
        "8 x NVIDIA H100",
        "torch 2.13.0",
        'QuestionAnswerer.from_pretrained("squad-reader")',
        "130,000 usable questions, 2 left out",
        "--learning_rate 3e-05",
    ):
        assert part in text
    untuned = dataclasses.replace(OPTIONS, null_score_diff_threshold="0.0")
    assert "null odds exceed" not in model_card("x", untuned, RECORD, INTERVALS)  # the model's config has none
    assert "Not evaluated" in model_card("x", OPTIONS, {**RECORD, "metrics": {}}, {})


def test_card_names_no_local_folder(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    options = RunOptions(
        model_name_or_path=str(tmp_path),
        train_file=str(tmp_path / "train.json"),
        output_dir="secret/place",
        predict_file=str(tmp_path / "train.json"),
        given=frozenset({"model_name_or_path", "train_file", "output_dir"}),
    )
    text = model_card("reader", options, RECORD, INTERVALS)
    assert str(tmp_path) not in text and "secret" not in text and "base_model" not in text
    assert training_command(options).endswith("--train_file train.json --output_dir OUTPUT_DIR")


def test_card_of_a_pushed_model_uses_its_hub_name(tmp_path: Path) -> None:
    """It also says how many training questions were sampled, and no split of a local file."""
    options = dataclasses.replace(OPTIONS, push_to_hub="somebody/reader", predict_file="dev.json")
    train = {**RECORD["data"]["train"], "features": {"examples": 1600}}
    assert write_model_card(tmp_path, options, {**RECORD, "data": {"train": train}}, INTERVALS)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "reader" and '.from_pretrained("somebody/reader")' in card.text
    assert "1,600 of 130,000 usable questions" in card.text
    assert all(result.dataset_split is None and result.dataset_name == "dev.json" for result in card.data.eval_results)


def test_hand_written_card_is_not_overwritten(tmp_path: Path) -> None:
    assert write_model_card(tmp_path, OPTIONS, RECORD, {})
    assert write_model_card(tmp_path, OPTIONS, RECORD, INTERVALS)
    assert "73.40" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# my own words\n")
    assert not write_model_card(tmp_path, OPTIONS, RECORD, INTERVALS)
    assert (tmp_path / "README.md").read_text() == "# my own words\n"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that an upload of small files uses."""

    asked: list[str] = []
    committed: list[dict[str, Any]] = []
    refuses = False

    def do_POST(self) -> None:  # noqa: N802 (the name that http.server calls)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Hub.asked.append(self.path)
        answer: dict[str, Any] = {}
        if Hub.refuses:
            self._answer(403, {"error": "no such right"})
            return
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/somebody/reader", "name": "somebody/reader"}
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in self.path:
            Hub.committed += [json.loads(line) for line in body.splitlines()]
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/somebody/reader/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        self._answer(200, answer)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(200, {"id": "somebody/reader", "sha": "0" * 40, "siblings": []})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        payload = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *values: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=endpoint, token="hf_test"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.asked, Hub.committed, Hub.refuses = [], [], False
    yield endpoint
    server.shutdown()


def test_only_model_files_are_uploaded(hub: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "README.md", "predictions.json", "run.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text("{}")
    assert upload(tmp_path, "reader") == f"{hub}/somebody/reader"
    paths = {line["value"]["path"] for line in Hub.committed if line["key"] == "file"}
    assert paths == {"config.json", "tokenizer.json", "README.md"}


def test_refused_upload_is_a_one_line_error(hub: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    Hub.refuses = True
    with pytest.raises(UserError, match="could not be uploaded to somebody/reader: ") as raised:
        upload(tmp_path, "somebody/reader")
    assert "\n" not in str(raised.value)


def test_upload_problems_are_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is no name of a repository"):
        check_upload("a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_upload("somebody/reader")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a login"):
        check_upload("somebody/reader")
