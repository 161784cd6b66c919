"""`QuestionAnswerer`: answers from a trained reader, in Python, without DeepSpeed and without a launcher.

Called like the question-answering pipeline that Transformers had up to version 4, with the same results
(`qa/decode_pipeline.py` says where they differ; `old_pipeline.py` makes it as that was made); `n_best_size` adds n-best
list and null odds as `evaluate` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models import null_threshold
from qa_deepspeed.models.facts import ModelFacts, positions
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
    require_trained_head,
)
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.candidates import candidate_columns, normalizers
from qa_deepspeed.qa.decoding.exact import Candidates, DecodeSettings, decode
from qa_deepspeed.qa.decoding.pipeline import PipelineSettings, decode_like_pipeline
from qa_deepspeed.qa.decoding.predictions import NBEST_FIELDS
from qa_deepspeed.qa.features.batching import Batch, make_batch
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import family_of, model_columns
from qa_deepspeed.qa.features.in_memory import AnswerStore, FeatureMaker
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.progress import ProgressBar

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing since Python 3.11

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1_536, 49_152
"""Tokens of a forward pass where the caller names no number of rows: CPUs gain nothing from more, GPUs do."""

QUESTIONS_AT_ONCE = 4096
"""Of a stream of questions so many are read before they are sorted by length and answered."""

WITHOUT_EFFECT = {"padding", "num_workers"}
"""Arguments of the pipeline that have nothing left to say: rows are padded no further than their batch needs."""


class QuestionAnswerer:
    """A trained reader with its tokenizer, on one device.

    Attributes: model, tokenizer, device; threshold: the null odds above which the model gives no answer, stored in its
    config when they were tuned, else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        device: torch.device | str | int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """See `from_pretrained`; `model` is a Transformers model for question answering.

        Raises:
            UserError: the tokenizer cannot be used with this model, or the device or batch size not at all.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        self.device = _device(device)
        try:
            self.model: Any = model.to(self.device).eval()  # type: ignore[arg-type]
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"device {self.device} cannot be used: {str(error).splitlines()[0]}") from None
        self.tokenizer = tokenizer
        self.threshold: float | None = getattr(model.config, null_threshold.KEY, None)
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
        """The model of a folder or of the hub.

        Args:
            tokenizer: a tokenizer, or the folder or hub name of one; left out, the model's.
            device: as torch names it, or the number of a GPU, -1 for the CPU; left out, a GPU if there is one.
            dtype: such as torch.bfloat16 or "bfloat16"; left out, the one that the model was saved in.
            batch_size: windows of one forward pass; left out, as many as suit the device.
        Raises:
            UserError: no model of that name, or one without a trained question-answering head.
        """
        quiet_transformers(verbose=False)
        options = RunOptions(model_name_or_path=str(name))
        config = load_config(options)
        tokenizer = as_tokenizer(str(name) if tokenizer is None else tokenizer)
        model, fresh = load_model(options, config)
        require_trained_head(str(name), fresh)
        model = model.to(_dtype(dtype or config.dtype))
        return cls(cast(PreTrainedModel, model), tokenizer, device=device, batch_size=batch_size)

    def __call__(
        self,
        *inputs: Any,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        top_k: int = 1,
        handle_impossible_answer: bool | None = None,
        max_answer_len: int = 15,
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

        Give `question` and `context` (each a text or a list; one context serves a list of questions), or one input:
        a dict with these keys, a list of such dicts, or an iterator of them, which gives an iterator of results.

        Args:
            top_k: answers to give for each question.
            handle_impossible_answer: whether "" is an answer; left out, where the model's config holds a threshold.
            max_answer_len: longest answer in tokens.
            align_to_words: widen answers to whole words; leave it off for text that is written without blanks.
            max_seq_len: tokens of a window with the question; left out, what the model takes, at most 384.
            doc_stride: tokens that neighbouring windows of a long context share; left out, 128 or half a window.
            max_question_len: longest question in tokens; left out, as long as a window has room for.
            n_best_size: add to each result null_odds (the null score less the best span's) and nbest, a list of so many
                spans and the null entry with text, probability, start_logit, end_logit and start. Not with top_k.
            batch_size: windows of one forward pass.
            progress: whether to tell how far it is; left out, where the standard error stream is a terminal.
        Returns:
            For one question, a dict of score, start, end (characters of the context) and answer, or a list of such
            dicts, best first, where there are several answers; for a list of questions, a list of these.
        Raises:
            UserError: inputs or arguments that cannot be understood.
        """
        unknown = others.keys() - WITHOUT_EFFECT
        if unknown:
            raise TypeError(f"QuestionAnswerer takes no argument '{sorted(unknown)[0]}'")
        if top_k < 1 or max_answer_len < 1:
            raise UserError(f"top_k and max_answer_len must be at least 1, not {top_k} and {max_answer_len}")
        if n_best_size is not None and (n_best_size < 1 or top_k > 1):
            raise UserError("n_best_size must be at least 1, and goes with one answer to a question: leave top_k out")
        if handle_impossible_answer is None:
            handle_impossible_answer = self.threshold is not None
        settings = PipelineSettings(
            top_k,
            max_answer_len,
            handle_impossible_answer,
            align_to_words,
            self.threshold,
            self._head.null_score_is_odds,
        )
        windows = self._window_settings(max_seq_len, doc_stride, max_question_len)

        def answered(examples: list[Example]) -> Iterator[Any]:
            store = self._features.features(examples, windows)
            count = max(settings.spans_of_a_window, n_best_size or 0)
            found, normalizer = self._candidates(store, count, max_answer_len, batch_size, progress)
            results = decode_like_pipeline(found, normalizer, store, settings)
            if n_best_size is None:
                yield from (answers[0] if len(answers) == 1 else answers for answers in results)
                return
            odds = self._head.null_score_is_odds
            lists = decode(found, store, DecodeSettings(n_best_size, max_answer_len, True, null_score_is_odds=odds))
            for (answer,), prediction in zip(results, lists, strict=True):
                nbest = [dict(zip(NBEST_FIELDS, entry, strict=True)) for entry in prediction.nbest]
                yield {**answer, "null_odds": prediction.null_odds, "nbest": nbest}

        return _for_each(answered, inputs, question, context)

    def _window_settings(self, max_seq_len: int | None, doc_stride: int | None, longest: int | None) -> FeatureSettings:
        """Lengths as the pipeline has them; a question is cut only where a window could not go on past its overlap."""
        longest_row = positions(self.model.config) or self.tokenizer.model_max_length
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, longest_row, 384)
        if max_seq_len > longest_row:
            raise UserError(f"max_seq_len {max_seq_len} is more than the {longest_row} positions of the model")
        if doc_stride is None:
            doc_stride = min(max_seq_len // 2, 128)
        room = max_seq_len - self._features.template.special_tokens - doc_stride - 1
        if room < 1 or doc_stride < 0:
            raise UserError(
                f"doc_stride {doc_stride} leaves no room for a question in max_seq_len {max_seq_len}: "
                "lower the one or raise the other"
            )
        if longest is not None and longest < 1:
            raise UserError(f"max_question_len must be at least 1, not {longest}")
        return FeatureSettings(max_seq_len, doc_stride, "overlap", min(room, longest or room))

    def _candidates(
        self, store: AnswerStore, count: int, max_answer_len: int, rows: int | None, progress: bool | None
    ) -> tuple[Candidates, np.ndarray]:
        """The best spans of every window, and the normalizers of `decode_like_pipeline`, `[features]`."""
        kept: list[dict[str, np.ndarray]] = [_nothing(count)]
        batches = list(_batches(store.lengths, rows or self._batch_size, self.device))

        def answered(batch_rows: np.ndarray) -> dict[str, np.ndarray]:
            batch = make_batch(store.take, batch_rows, self._layout).to(self.device)
            return self._forward(batch, count, max_answer_len)

        with ProgressBar("answering", len(store), "window", progress is not False, lines=bool(progress)) as bar:
            at_once = self.device.type == "cpu" and not _changes_in_forward(self.model)
            for part in on_all_cores(answered, batches) if at_once else map(answered, batches):
                kept.append(part)
                bar.advance(len(part["feature_id"]))
        columns = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
        order = np.argsort(columns["feature_id"])
        columns = {name: values[order] for name, values in columns.items()}
        normalizer = columns.pop("normalizer")
        if not np.isfinite(normalizer).all():
            raise UserError("the model's logits are not finite numbers: its weights are damaged, or have diverged")
        return Candidates(**columns), normalizer

    @torch.inference_mode()
    def _forward(self, batch: Batch, count: int, max_answer_len: int) -> dict[str, np.ndarray]:
        outputs = self.model(**self._head.inputs(batch))
        starts = batch.context_begin, batch.context_end
        columns = candidate_columns(batch, self._head.best(outputs, batch, starts, count, max_answer_len), count)
        if self._head.null_score_is_odds:  # a beam head's scores are logarithms of probabilities already
            columns["normalizer"] = torch.zeros_like(columns["null_score"])
        else:
            columns["normalizer"] = normalizers(batch, outputs.start_logits, outputs.end_logits)
        return {name: values.cpu().numpy() for name, values in columns.items()}


def _changes_in_forward(model: torch.nn.Module) -> bool:
    """Whether a forward pass changes the model: rotary embeddings that fit their frequencies to the length do."""
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def as_tokenizer(given: Any) -> Any:
    """The tokenizer that is given, loaded where only its folder or hub name is."""
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
        raise UserError(f"there is no device '{device}'; say cpu, cuda or cuda:0")
    return found


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A config that names none means float32."""
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"there is no dtype '{dtype}'; say float32, bfloat16 or float16")
    return kind


def _nothing(count: int) -> dict[str, np.ndarray]:
    places, logits, none = np.zeros((0, count), np.int32), np.zeros((0, count), np.float32), np.zeros(0, np.float32)
    return {
        "feature_id": np.zeros(0, np.int64),
        "start": places,
        "end": places,
        "start_logit": logits,
        "end_logit": logits,
        "null_score": none,
        "normalizer": none,
    }


def _batches(lengths: np.ndarray, rows: int | None, device: torch.device) -> Iterator[np.ndarray]:
    """Windows of like length together, long ones first: so many rows, or so many tokens."""
    order = np.argsort(-lengths, kind="stable")
    tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    begin = 0
    while begin < len(order):
        size = rows or max(1, tokens // int(lengths[order[begin]]))
        yield order[begin : begin + size]
        begin += size


def _for_each(answered: Any, inputs: tuple[Any, ...], question: Any, context: Any) -> Any:
    """Results in the shape of the inputs: one for one, a list for a list, an iterator for an iterator."""
    if len(inputs) == 1 and isinstance(inputs[0], Iterator):
        return _streamed(answered, inputs[0])
    rows = _rows(inputs, question, context)
    results = list(answered([_example(number, row) for number, row in enumerate(rows)]))
    return results[0] if len(results) == 1 else results


def _streamed(answered: Any, rows: Iterator[Any]) -> Iterator[Any]:
    numbered = (_example(number, row) for number, row in enumerate(rows))
    while examples := list(islice(numbered, QUESTIONS_AT_ONCE)):
        yield from answered(examples)


def _rows(inputs: tuple[Any, ...], question: Any, context: Any) -> list[Any]:
    """The inputs as (question, context) dicts or Examples."""
    if inputs:
        if len(inputs) == 2 and all(isinstance(one, str) for one in inputs):
            return [{"question": inputs[0], "context": inputs[1]}]
        given = inputs[0] if len(inputs) == 1 else list(inputs)
        return list(given) if isinstance(given, Iterable) and not isinstance(given, (Mapping, str)) else [given]
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}]
    if isinstance(question, (list, tuple)) and isinstance(context, (str, list, tuple)):
        contexts = [context] * len(question) if isinstance(context, str) else context
        if len(contexts) != len(question):
            raise UserError(f"{len(question)} questions but {len(contexts)} contexts: give one context or one for each")
        return [{"question": one, "context": other} for one, other in zip(question, contexts, strict=True)]
    raise UserError("pass question= and context=, each a text or a list, or a dict with these keys, or a list of them")


def _example(number: int, row: Any) -> Example:
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise UserError(f"input {number} is a {type(row).__name__}, not a dict with the keys question and context")
    for name in ("question", "context"):
        text = row.get(name)
        if not isinstance(text, str) or not text:
            raise UserError(f"input {number} has no {name}: it must be a text that is not empty")
    return Example(str(row.get("id", number)), row["question"], row["context"])


MOST_AT_ONCE = 8
"""Parts that one process works on at the same time: of more, Python itself would take turns with the products."""


def on_all_cores(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """`work` of each part, in their order, as many parts at the same time as torch has threads (`MOST_AT_ONCE`).

    A core that has a forward pass to itself waits for no other core; cores that share every operation of one pass do.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(parts), MOST_AT_ONCE)
    if workers < 2:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads that are started later take over the number that was set last
