"""The model card as the hub parses it, and the upload to a local endpoint, with failures in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from qa_deepspeed.cli.main import Parser, main
from qa_deepspeed.cli.training.train import add_arguments
from qa_deepspeed.config.run_arguments import read_run_options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.runs.hub_upload import check_upload, upload
from qa_deepspeed.runs.model_card import local_name, model_card, training_command, write_model_card
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


def test_card_has_the_scores_of_several_files_and_the_weights() -> None:
    files = {"one/dev.json": {"exact": 60.0, "f1": 64.0, "total": 10}, "a|b.json": {"total": 0}}
    files["two/dev.json"] = {"exact": 80.0, "f1": 84.0, "total": 1990}
    metrics = {**RECORD["metrics"], "files": files, "macro_exact": 70.0, "macro_f1": 74.0}
    options = dataclasses.replace(
        OPTIONS,
        dataset_name=None,
        train_file="/there/squad/train.json=2,/there/news.json,/there/nq.json=0.5",
        predict_file="/there/one/dev.json,/there/two/dev.json",
        given=OPTIONS.given | {"train_file", "predict_file"},
    )
    text = model_card("reader", options, {**RECORD, "metrics": metrics}, INTERVALS)
    for line in (
        "| one/dev.json | 60.00 | 64.00 | 10 |",
        "| two/dev.json | 80.00 | 84.00 | 1,990 |",
        "| mean of the files | 70.00 | 74.00 | |",
        "--predict_file one/dev.json,two/dev.json --train_file squad/train.json=2,news.json,nq.json=0.5",
    ):
        assert line in text
    assert "a|b.json" not in text and "/there" not in text


def test_card_shows_no_path_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    options = RunOptions(
        model_name_or_path=str(tmp_path),
        train_file=str(tmp_path / "train.json"),
        output_dir="secret/place",
        predict_file=str(tmp_path / "train.json"),
        teacher_model_name_or_path=f"{tmp_path / 'large'},hub/teacher",
        given=frozenset({"model_name_or_path", "train_file", "output_dir", "teacher_model_name_or_path"}),
    )
    (tmp_path / "large").mkdir()
    text = model_card("reader", options, RECORD, INTERVALS)
    assert str(tmp_path.parent) not in text and "secret" not in text and "base_model" not in text
    assert "--teacher_model_name_or_path large,hub/teacher" in text
    assert f"--train_file {tmp_path.name}/train.json --output_dir OUTPUT_DIR" in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/there/bert-large/checkpoint-500", "bert-large/checkpoint-500"),
        ("/there/quickstart/model", "quickstart/model"),
        ("/there/minilm-l6-uncased", "minilm-l6-uncased"),
        ("/there/squad/train.json.gz", "squad/train.json.gz"),
        ("/there/squad/train-v2.0.json", "squad/train-v2.0.json"),
        ("/there/squad/*.json", "squad/*.json"),
        ("/there/squad/train_*.json", "squad/train_*.json"),
        ("/there/korquad-train.json", "korquad-train.json"),
        ("/model", "model"),
        ("~/model", "model"),
        ("dev.json", "dev.json"),
        ("../model", "model"),
    ],
)
def test_a_name_that_says_nothing_has_its_folder_before_it(path: str, name: str) -> None:
    assert local_name(path) == name


def test_base_model_and_data_are_named(tmp_path: Path) -> None:
    base = tmp_path / "small-reader" / "model"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384}')
    options = dataclasses.replace(
        OPTIONS,
        model_name_or_path=str(base),
        dataset_name=None,
        train_file="a/made/train.json",
        predict_file="b/dev.json",
    )
    text = model_card("reader", options, RECORD, INTERVALS)
    assert "the local checkpoint `small-reader/model` (bert, 6 layers of width 384)" in text
    assert "- data: made/train.json\n" in text and "questions of b/dev.json" in text
    (base / "config.json").write_text("[]")
    assert "the local checkpoint `small-reader/model`." in model_card("reader", options, RECORD, INTERVALS)
    assert "- data: rajpurkar/squad_v2\n" in model_card("reader", OPTIONS, RECORD, INTERVALS)


def parsed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """What a shell makes of the command: the words before `train`, and the options as the program reads them."""
    words = shlex.split(command)
    begin = words.index("train")
    with pytest.raises(SystemExit) as ended:
        main([*words[begin:], "--print_config"])
    assert ended.value.code == 0
    return words[:begin], yaml.safe_load(capsys.readouterr().out)


def test_command_of_the_card_is_read_as_the_options_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths with blanks, quotes and globs, a null in a YAML file, negative numbers, booleans, several data files."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my model's", "squad data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "zero.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("max_train_examples: null\nbf16: true\nevaluate_during_training: false\n")
    given = [
        *("--config", "run.yaml", "--model_name_or_path", str(tmp_path / "my model's"), "--cache_dir", "/secret"),
        *("--data_dir", str(tmp_path / "squad data"), "--train_file", "train-*.json,more $1.csv"),
        *("--null_score_diff_threshold", "-1.5", "--do_eval", "--max_time", "2h", "--push_to_hub", "ann/reader"),
        *(
            "--deepspeed_config",
            str(tmp_path / "zero.json"),
            "--output_dir",
            "/secret",
            "--resume_from_checkpoint",
            "never",
        ),
    ]
    parser = Parser()
    parser.set_defaults(command="train")
    add_arguments(parser)
    options = read_run_options(parser.parse_all(given))
    record = {**RECORD, "data": {"train": {}, "evaluate": {}}}
    launcher, read = parsed(training_command(options, record), capsys)
    assert launcher == ["deepspeed", "--quiet", "--num_accelerators", "8", "--module", "qa_deepspeed"]
    assert read == {
        "model_name_or_path": "my model's",
        "train_file": "squad data/train-*.json,more $1.csv",
        "predict_file": "squad data/dev-v1.1.json",
        "null_score_diff_threshold": -1.5,
        "do_eval": True,
        "bf16": True,
        "evaluate_during_training": False,
        "max_time": "2h",
        "deepspeed_config": "zero.json",
        "output_dir": "OUTPUT_DIR",
    }


def test_launcher_of_the_command_has_as_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"hardware": {**RECORD["hardware"], "ranks": 1, "ranks_per_node": 1}}
    assert parsed(training_command(OPTIONS, one), capsys)[0] == ["qa-deepspeed"]
    two_nodes = {"hardware": {**RECORD["hardware"], "ranks": 16, "ranks_per_node": 8}}
    assert parsed(training_command(OPTIONS, two_nodes), capsys)[0][:4] == [
        "deepspeed",
        "--quiet",
        "--hostfile",
        "HOSTFILE",
    ]


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


def test_a_data_file_whose_name_is_not_utf8_is_named_escaped(tmp_path: Path) -> None:
    named = frozenset({"train_file", "predict_file"})
    name = os.fsdecode(b"data-\xe9.json")
    options = dataclasses.replace(OPTIONS, dataset_name=None, train_file=name, predict_file=name, given=named)
    assert write_model_card(tmp_path, options, RECORD, INTERVALS)
    assert "data-\\udce9.json" in (tmp_path / "README.md").read_text(encoding="utf-8")
