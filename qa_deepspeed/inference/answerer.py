"""`QuestionAnswerer`: answers from a trained model in Python, without DeepSpeed and without a launcher.

It is called like the question-answering pipeline of Transformers 4 and gives the same results, with the differences
that `qa/decoding/pipeline.py` lists; `inference/pipeline.py` creates it as that pipeline was created. `n_best_size`
adds the n-best list and the null odds of `evaluate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.inference.inputs import (
    IGNORED_ARGUMENTS,
    for_each_question,
    require_known_arguments,
    require_whole_number,
)
from qa_deepspeed.models import null_threshold
from qa_deepspeed.models.facts import ModelFacts, positions
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.models.loading import (
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
    require_trained_weights,
)
from qa_deepspeed.models.trained_settings import stored_settings
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.candidates import candidate_columns, normalizers
from qa_deepspeed.qa.decoding.exact import Candidates, DecodeSettings, decode
from qa_deepspeed.qa.decoding.pipeline import PipelineSettings, decode_like_pipeline
from qa_deepspeed.qa.decoding.predictions import NBEST_FIELDS
from qa_deepspeed.qa.features.batching import Batch, make_batch
from qa_deepspeed.qa.features.build import FeatureSettings, check_settings
from qa_deepspeed.qa.features.families import family_of, model_columns
from qa_deepspeed.qa.features.in_memory import AnswerStore, FeatureMaker
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.progress import ProgressBar

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing since Python 3.11

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1_536, 49_152
"""Tokens per forward pass where no batch_size is given; larger batches speed up GPUs, but not CPUs."""

WINDOW_SETTINGS = {"max_seq_length", "doc_stride", "doc_stride_is", "max_query_length"}
"""Settings of the training that shape windows, if the model's config has all of them."""

MAX_PARALLEL_BATCHES = 8
"""Batches in progress at the same time on CPUs: with more, Python's interpreter lock limits the speed."""


class QuestionAnswerer:
    """A trained model with its tokenizer, on one device.

    Attributes:
        model: the Transformers model.
        tokenizer: its tokenizer.
        device: the model's device.
        threshold: null odds above which the answer is "", from the model's config; None where it was not tuned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        device: torch.device | str | int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Use a loaded Transformers model for question answering; the arguments are those of `from_pretrained`.

        Raises:
            UserError: the tokenizer does not fit the model, or device or batch_size is not valid.
        """
        require_whole_number("batch_size", batch_size, 1)
        self.device = _device(device)
        try:
            self.model: Any = model.to(self.device).eval()  # type: ignore[arg-type]
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"device {self.device} cannot be used: {str(error).splitlines()[0]}") from None
        self.tokenizer = tokenizer
        self.threshold: float | None = getattr(model.config, null_threshold.KEY, None)
        self._trained = stored_settings(model.config)
        self._batch_size = batch_size
        family = family_of(model.config, tokenizer)
        self._head = head_of(model, version_2_with_negative=True)
        self._features = FeatureMaker(tokenizer, family)
        self._layout = ModelFacts(model.config, tokenizer, family).layout(model_columns(model, model.config), 0)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        tokenizer: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """Load a model from a folder or the hub.

        Args:
            tokenizer: a tokenizer, or the folder or hub name of one; default: the model's.
            device: torch's name, or the number of a GPU, -1 for the CPU; default: a GPU if there is one.
            dtype: such as torch.bfloat16 or "bfloat16"; default: the one the model was saved in.
            batch_size: windows per forward pass; default: by the device and the windows' lengths.
        Raises:
            UserError: the model cannot be loaded, or has no trained question-answering head.
        """
        quiet_transformers(verbose=False)
        options = RunOptions(model_name_or_path=str(name))
        config = load_config(options)
        tokenizer = as_tokenizer(str(name) if tokenizer is None else tokenizer)
        check_vocabulary(str(name), config, tokenizer)
        model, fresh = load_model(options, config)
        require_trained_weights(str(name), model, fresh)
        model = model.to(_dtype(dtype or config.dtype))
        return cls(cast(PreTrainedModel, model), tokenizer, device=device, batch_size=batch_size)

    def __call__(
        self,
        *inputs: Any,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        top_k: int = 1,
        handle_impossible_answer: bool | None = None,
        max_answer_len: int | None = None,
        align_to_words: bool = True,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        max_question_len: int | None = None,
        n_best_size: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **others: Any,
    ) -> Any:
        """Answer questions about contexts.

        Lengths that are not given are those the model was trained with, if its config holds them
        (`models.trained_settings`), else the pipeline's.

        Pass `question` and `context` (each a string or a list; one context serves a list of questions), or one input:
        a dict with these keys, a list of such dicts, or an iterator of them, which gives an iterator of results.

        Args:
            top_k: answers per question.
            handle_impossible_answer: whether "" is an answer; default: if the model's config holds a threshold, or was
                trained on unanswerable questions.
            max_answer_len: longest answer in tokens; default: 15.
            align_to_words: widen answers to whole words; pass False for text that is written without blanks.
            max_seq_len: tokens of a window, question included; default: the model's maximum, at most 384.
            doc_stride: tokens by which neighbouring windows of a long context overlap; default: 128 or half a window.
            max_question_len: longest question in tokens; default: what a window has room for.
            n_best_size: adds to each result `null_odds` (null score minus the best span's score) and `nbest`, a list of
                this many spans and the null entry (text "", logits of the null position), each with text, probability,
                start_logit, end_logit and start. Cannot be combined with top_k.
            batch_size: windows per forward pass.
            progress: whether to show progress; default: if the standard error stream is a terminal.
        Returns:
            For one question, a dict of score, start, end (characters of the context) and answer, or a list of such
            dicts, best first, where there are several answers; for a list of questions, a list of these.
        Raises:
            UserError: an input or the value of an argument is not valid; the message names it.
            TypeError: an unknown argument.
        """
        require_known_arguments("QuestionAnswerer", others, call_arguments(), IGNORED_ARGUMENTS)
        require_whole_number("top_k", top_k, 1, optional=False)
        require_whole_number("max_answer_len", max_answer_len, 1)
        require_whole_number("n_best_size", n_best_size, 1)
        require_whole_number("batch_size", batch_size, 1)
        if n_best_size is not None and top_k > 1:
            raise UserError("n_best_size gives one answer per question: omit top_k")
        if handle_impossible_answer is None:
            handle_impossible_answer = self.threshold is not None or self._trained.get("version_2_with_negative", False)
        longest_answer: int = max_answer_len or self._trained.get("max_answer_length", 15)
        settings = PipelineSettings(
            top_k,
            longest_answer,
            handle_impossible_answer,
            align_to_words,
            self.threshold,
            self._head.null_score_is_odds,
        )
        windows = self._window_settings(max_seq_len, doc_stride, max_question_len)

        def answer(examples: list[Example]) -> Iterator[Any]:
            store = self._features.features(examples, windows)
            count = max(settings.spans_of_a_window, n_best_size or 0)
            found, normalizer = self._candidates(store, count, longest_answer, batch_size, progress)
            results = decode_like_pipeline(found, normalizer, store, settings)
            if n_best_size is None:
                yield from (answers[0] if len(answers) == 1 else answers for answers in results)
                return
            odds = self._head.null_score_is_odds
            lists = decode(found, store, DecodeSettings(n_best_size, longest_answer, True, null_score_is_odds=odds))
            for (best,), prediction in zip(results, lists, strict=True):
                nbest = [dict(zip(NBEST_FIELDS, entry, strict=True)) for entry in prediction.nbest]
                yield {**best, "null_odds": prediction.null_odds, "nbest": nbest}

        return for_each_question(answer, inputs, question, context)

    def _window_settings(
        self, max_seq_len: int | None, doc_stride: int | None, max_question_len: int | None
    ) -> FeatureSettings:
        """The settings that the model was trained with, or the pipeline's defaults.

        By the latter a question is truncated only where a window needs room for new context tokens.
        """
        require_whole_number("max_seq_len", max_seq_len, 1)
        require_whole_number("doc_stride", doc_stride, 0)
        require_whole_number("max_question_len", max_question_len, 1)
        longest_row = positions(self.model.config) or self.tokenizer.model_max_length
        trained = self._trained
        if max_seq_len is None and doc_stride is None and trained.keys() >= WINDOW_SETTINGS:
            settings = FeatureSettings(
                min(trained["max_seq_length"], longest_row),
                trained["doc_stride"],
                trained["doc_stride_is"],
                max_question_len or trained["max_query_length"],
            )
            check_settings(settings, self._features.template.special_tokens)
            return settings
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, longest_row, trained.get("max_seq_length", 384))
        if max_seq_len > longest_row:
            raise UserError(f"max_seq_len {max_seq_len} is more than the {longest_row} positions of the model")
        if doc_stride is None:
            doc_stride = min(max_seq_len // 2, 128)
        room = max_seq_len - self._features.template.special_tokens - doc_stride - 1
        if room < 1:
            raise UserError(
                f"doc_stride {doc_stride} leaves no room for a question in max_seq_len {max_seq_len}: "
                "lower doc_stride or raise max_seq_len"
            )
        return FeatureSettings(max_seq_len, doc_stride, "overlap", min(room, max_question_len or room))

    def _candidates(
        self, store: AnswerStore, count: int, max_answer_len: int, rows: int | None, progress: bool | None
    ) -> tuple[Candidates, np.ndarray]:
        """The top `count` spans of every window, and the normalizers for `decode_like_pipeline`, `[features]`."""
        parts: list[dict[str, np.ndarray]] = [_no_candidates(count)]
        batches = list(_batches(store.lengths, rows or self._batch_size, self.device))

        def forward(batch_rows: np.ndarray) -> dict[str, np.ndarray]:
            batch = make_batch(store.take, batch_rows, self._layout).to(self.device)
            return self._forward(batch, count, max_answer_len)

        with ProgressBar("answering", len(store), "window", progress is not False, lines=bool(progress)) as bar:
            parallel = self.device.type == "cpu" and not _changes_in_forward(self.model)
            for part in on_all_cores(forward, batches) if parallel else map(forward, batches):
                parts.append(part)
                bar.advance(len(part["feature_id"]))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(columns["feature_id"])
        columns = {name: values[order] for name, values in columns.items()}
        normalizer = columns.pop("normalizer")
        if not np.isfinite(normalizer).all():
            raise UserError("the model's logits are infinite or NaN: its weights are damaged, or its training diverged")
        return Candidates(**columns), normalizer

    @torch.inference_mode()
    def _forward(self, batch: Batch, count: int, max_answer_len: int) -> dict[str, np.ndarray]:
        """Candidates and normalizer of each row of a batch: columns `[rows, count]` and `[rows]`."""
        outputs = self.model(**self._head.inputs(batch))
        starts = batch.context_begin, batch.context_end
        columns = candidate_columns(batch, self._head.best(outputs, batch, starts, count, max_answer_len), count)
        if self._head.null_score_is_odds:  # a beam head's scores are log-probabilities already
            columns["normalizer"] = torch.zeros_like(columns["null_start_logit"])
        else:
            columns["normalizer"] = normalizers(batch, outputs.start_logits, outputs.end_logits)
        return {name: values.cpu().numpy() for name, values in columns.items()}


def call_arguments() -> set[str]:
    """Names of the arguments of `QuestionAnswerer.__call__`."""
    return set(inspect.signature(QuestionAnswerer.__call__).parameters) - {"self", "inputs", "others"}


def _changes_in_forward(model: torch.nn.Module) -> bool:
    """Whether a forward pass changes the model: some rotary embeddings adapt their frequencies to the row length."""
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def as_tokenizer(given: Any) -> Any:
    """`given` itself, or the tokenizer of that folder or hub name."""
    return load_tokenizer(RunOptions(model_name_or_path=given)) if isinstance(given, str) else given


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, int):
        return torch.device("cpu" if device < 0 else f"cuda:{device}")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise UserError(f"there is no device '{device}'; pass cpu, cuda or cuda:0")
    return found


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of this name; float32 for None, as in a config without a dtype."""
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"there is no dtype '{dtype}'; pass float32, bfloat16 or float16")
    return kind


def _no_candidates(count: int) -> dict[str, np.ndarray]:
    """The columns of `QuestionAnswerer._forward` without rows."""
    places, logits, scores = np.zeros((0, count), np.int32), np.zeros((0, count), np.float32), np.zeros(0, np.float32)
    return {
        "feature_id": np.zeros(0, np.int64),
        "start": places,
        "end": places,
        "start_logit": logits,
        "end_logit": logits,
        "null_start_logit": scores,
        "null_end_logit": scores,
        "normalizer": scores,
    }


def _batches(lengths: np.ndarray, rows: int | None, device: torch.device) -> Iterator[np.ndarray]:
    """Batches of windows of similar length, longest first: `rows` windows each, or by tokens for the device."""
    order = np.argsort(-lengths, kind="stable")
    tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    begin = 0
    while begin < len(order):
        size = rows or max(1, tokens // int(lengths[order[begin]]))
        yield order[begin : begin + size]
        begin += size


def on_all_cores(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """Yield `work(part)` of each part, in order; threads work on several parts at once, one per core.

    They are as many as torch has threads, at most `MAX_PARALLEL_BATCHES`. A core that runs a whole forward pass waits
    for no other core; cores that split every operation of one pass do.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(parts), MAX_PARALLEL_BATCHES)
    if workers < 2:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # new threads inherit the number that was set last
