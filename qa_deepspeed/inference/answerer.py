"""`QuestionAnswerer`: answers from a trained model in Python, without DeepSpeed and without a launcher.

It is called like the question-answering pipeline of Transformers 4 and gives the same results, with the differences
that `qa/decoding/pipeline.py` lists; `inference/pipeline.py` creates it as that pipeline was created. `n_best_size`
adds the n-best list and the null odds of `evaluate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.inference.documents import Contexts, for_all_documents
from qa_deepspeed.inference.forward import WindowForward, chosen_device, chosen_dtype
from qa_deepspeed.inference.inputs import (
    IGNORED_ARGUMENTS,
    for_each_question,
    require_known_arguments,
    require_truth,
    require_whole_number,
)
from qa_deepspeed.inference.onnx_model import OnnxModel, holds_onnx_model, load_onnx_model, onnx_device
from qa_deepspeed.inference.settings import SPELLINGS, ModelLimits, under_pipeline_names, window_settings
from qa_deepspeed.models import null_threshold
from qa_deepspeed.models.facts import ModelFacts, positions
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
from qa_deepspeed.qa.decoding.exact import DecodeSettings, decode
from qa_deepspeed.qa.decoding.pipeline import PipelineSettings, decode_like_pipeline
from qa_deepspeed.qa.decoding.predictions import NBEST_FIELDS
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import family_of, model_columns
from qa_deepspeed.qa.features.in_memory import AnswerStore, FeatureMaker
from qa_deepspeed.utils.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing since Python 3.11


@dataclass(frozen=True)
class _Call:
    """Settings of one call."""

    decoding: PipelineSettings
    windows: FeatureSettings
    n_best_size: int | None
    batch_size: int | None
    progress: bool | None


class QuestionAnswerer:
    """A trained model with its tokenizer, on one device.

    Attributes:
        model: the Transformers model, or the `OnnxModel` that onnxruntime runs in its place.
        tokenizer: its tokenizer.
        device: the model's device.
        threshold: null odds above which the answer is "", from the model's config; None where it was not tuned.
        windows: the forward passes over windows.
    """

    def __init__(
        self,
        model: PreTrainedModel | OnnxModel,
        tokenizer: Any,
        *,
        device: torch.device | str | int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Use a loaded model for question answering; the arguments are those of `from_pretrained`.

        Raises:
            UserError: the tokenizer does not fit the model, or device or batch_size is not valid.
        """
        require_whole_number("batch_size", batch_size, 1)
        exported = isinstance(model, OnnxModel)
        self.device = onnx_device(device) if exported else chosen_device(device)
        try:
            self.model: Any = model.to(self.device).eval()  # type: ignore[arg-type]
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"device {self.device} cannot be used: {str(error).splitlines()[0]}") from None
        self.tokenizer = tokenizer
        self.threshold: float | None = getattr(model.config, null_threshold.KEY, None)
        self._trained = stored_settings(model.config)
        family = family_of(model.config, tokenizer)
        self._features = FeatureMaker(tokenizer, family)
        columns = model.columns if isinstance(model, OnnxModel) else model_columns(model, model.config)
        layout = ModelFacts(model.config, tokenizer, family).layout(columns, 0)
        self.windows = WindowForward(self.model, layout, self.device, batch_size, parallel=not exported)

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
        """Load a model from a folder or the hub; a folder that `export --format onnx` made is run by onnxruntime.

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
        if holds_onnx_model(str(name)):
            if dtype is not None and chosen_dtype(dtype) != torch.float32:
                raise UserError(f"{name} is an ONNX export, whose dtype is fixed: leave dtype out")
            return cls(load_onnx_model(str(name), config), tokenizer, device=device, batch_size=batch_size)
        model, fresh = load_model(options, config)
        require_trained_weights(str(name), model, fresh)
        model = model.to(chosen_dtype(dtype or config.dtype))
        return cls(cast(PreTrainedModel, model), tokenizer, device=device, batch_size=batch_size)

    def __call__(
        self,
        *inputs: Any,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        contexts: Contexts | None = None,
        top_k: int = 1,
        handle_impossible_answer: bool | None = None,
        max_answer_len: int | None = None,
        align_to_words: bool = True,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        doc_stride_is: str | None = None,
        max_question_len: int | None = None,
        n_best_size: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **others: Any,
    ) -> Any:
        """Answer questions about contexts.

        Lengths that are not given are those the model was trained with, if its config holds them
        (`models.trained_settings`), else the pipeline's. The names of training and evaluation (max_seq_length,
        max_answer_length, max_query_length, per_gpu_eval_batch_size, version_2_with_negative) are accepted too;
        `describe` says what a call uses.

        Pass `question` and `context` (each a string or a list; one context serves a list of questions), or one input:
        a dict with these keys, a list of such dicts, or an iterator of them, which gives an iterator of results. Or
        pass a question and `contexts`, all of which are searched.

        Args:
            contexts: documents to search: texts, `(name, text)` pairs, or a dict of texts by name.
            top_k: answers per question; with `contexts`, documents per question.
            handle_impossible_answer: whether "" is an answer; default: if the model's config holds a threshold, or was
                trained on unanswerable questions.
            max_answer_len: longest answer in tokens; default: 15.
            align_to_words: widen answers to whole words; pass False for text that is written without blanks.
            max_seq_len: tokens of a window, question included; default: the model's maximum, at most 384.
            doc_stride: tokens by which neighbouring windows of a long context overlap; default: 128 or half a window.
            doc_stride_is: "overlap", or "step" from window to window; default: as the model was trained, else overlap.
            max_question_len: longest question in tokens; default: what a window has room for.
            n_best_size: adds to each result `null_odds` (null score minus the best span's score) and `nbest`, a list of
                this many spans and the null entry (text "", logits of the null position), each with text, probability,
                start_logit, end_logit and start. Cannot be combined with top_k.
            batch_size: windows per forward pass.
            progress: whether to show progress; default: if the standard error stream is a terminal.
        Returns:
            For one question, a dict of score, start, end (characters of the context) and answer, or a list of such
            dicts, best first, where there are several answers; for a list of questions, a list of these. With
            `contexts`, each dict has also `document`, its name or number, and `null_odds` (`documents.best_documents`).
        Raises:
            UserError: an input or the value of an argument is not valid; the message names it.
            TypeError: an unknown argument.
        """
        require_known_arguments("QuestionAnswerer", others, call_arguments(), IGNORED_ARGUMENTS)
        call = self._call(
            others,
            top_k=top_k,
            handle_impossible_answer=handle_impossible_answer,
            max_answer_len=max_answer_len,
            align_to_words=align_to_words,
            max_seq_len=max_seq_len,
            doc_stride=doc_stride,
            doc_stride_is=doc_stride_is,
            max_question_len=max_question_len,
            n_best_size=n_best_size,
            batch_size=batch_size,
            progress=progress,
        )
        if contexts is None:
            return for_each_question(lambda examples: self._answers(examples, call), inputs, question, context)
        if context is not None or n_best_size is not None:
            raise UserError("contexts are searched by themselves: leave out context and n_best_size")
        alone = replace(call.decoding, top_k=1, handle_impossible_answer=False)
        one_each = replace(call, decoding=alone, n_best_size=1)
        threshold = (self.threshold or 0.0) if call.decoding.handle_impossible_answer else None
        return for_all_documents(
            lambda examples: self._answers(examples, one_each), inputs, question, contexts, top_k, threshold
        )

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        name = f" '{self.model.name_or_path}'" if self.model.name_or_path else ""
        threshold = "" if self.threshold is None else f", null threshold {self.threshold:g}"
        return (
            f"QuestionAnswerer({type(self.model).__name__}{name}, {size:,} parameters, {self.model.dtype} on "
            f"{self.device}{threshold})"
        )

    def describe(self, **arguments: Any) -> str:
        """The settings that a call with these arguments uses, in one line, under the names of training."""
        require_known_arguments("describe", arguments, call_arguments(), set())
        call = self._call(arguments, **{"top_k": 1, **{k: v for k, v in arguments.items() if k not in SPELLINGS}})
        windows, decoding = call.windows, call.decoding
        odds = 0.0 if self.threshold is None else self.threshold
        impossible = f"null_score_diff_threshold {odds:g}" if decoding.handle_impossible_answer else "always an answer"
        return (
            f"max_seq_length {windows.max_seq_length}, doc_stride {windows.doc_stride} ({windows.doc_stride_is}), "
            f"max_query_length {windows.max_query_length}, max_answer_length {decoding.max_answer_len}, {impossible}"
        )

    def _call(self, others: Mapping[str, Any], **given: Any) -> _Call:
        """The checked settings of a call; `others` may have arguments under their other spelling."""
        values = {**dict.fromkeys(call_arguments()), "align_to_words": True, **given}
        values = under_pipeline_names(values, others)
        for name in ("top_k", "max_answer_len", "n_best_size", "batch_size"):
            require_whole_number(name, values[name], 1, optional=name != "top_k")
        for name in ("handle_impossible_answer", "align_to_words"):
            require_truth(name, values[name])
        top_k, impossible = values["top_k"], values["handle_impossible_answer"]
        if values["n_best_size"] is not None and top_k > 1:
            raise UserError("n_best_size gives one answer per question: omit top_k")
        if impossible is None:
            impossible = self.threshold is not None or self._trained.get("version_2_with_negative", False)
        longest_answer: int = values["max_answer_len"] or self._trained.get("max_answer_length", 15)
        decoding = PipelineSettings(
            top_k,
            longest_answer,
            impossible,
            values["align_to_words"],
            self.threshold,
            self.windows.head.null_score_is_odds,
        )
        windows = self._window_settings(
            values["max_seq_len"], values["doc_stride"], values["max_question_len"], values["doc_stride_is"]
        )
        return _Call(decoding, windows, values["n_best_size"], values["batch_size"], values["progress"])

    def _answers(self, examples: list[Example], call: _Call) -> Iterator[Any]:
        """The results of some questions, in their order."""
        decoding, n_best_size = call.decoding, call.n_best_size
        store = self._features.features(examples, call.windows)
        count = max(decoding.spans_of_a_window, n_best_size or 0)
        found, normalizer = self.windows.candidates(
            store, count, decoding.max_answer_len, call.batch_size, call.progress
        )
        results = decode_like_pipeline(found, normalizer, store, decoding)
        if n_best_size is None:
            yield from (answers[0] if len(answers) == 1 else answers for answers in results)
            return
        odds = self.windows.head.null_score_is_odds
        lists = decode(
            found, store, DecodeSettings(n_best_size, decoding.max_answer_len, True, null_score_is_odds=odds)
        )
        for (best,), prediction in zip(results, lists, strict=True):
            nbest = [dict(zip(NBEST_FIELDS, entry, strict=True)) for entry in prediction.nbest]
            yield {**best, "null_odds": prediction.null_odds, "nbest": nbest}

    def features(self, examples: Iterable[Example]) -> AnswerStore:
        """The windows of these questions, as a call without other arguments makes them."""
        return self._features.features(examples, self._window_settings(None, None, None))

    def _window_settings(
        self,
        max_seq_len: int | None,
        doc_stride: int | None,
        max_question_len: int | None,
        doc_stride_is: str | None = None,
    ) -> FeatureSettings:
        tokenizer_limit = self.tokenizer.model_max_length
        longest_row = positions(self.model.config) or tokenizer_limit
        limits = ModelLimits(longest_row, tokenizer_limit, self._features.template.special_tokens)
        return window_settings(max_seq_len, doc_stride, doc_stride_is, max_question_len, self._trained, limits)


def call_arguments() -> set[str]:
    """Names of the arguments of `QuestionAnswerer.__call__`, in both spellings."""
    own = set(inspect.signature(QuestionAnswerer.__call__).parameters) - {"self", "inputs", "others"}
    return own | SPELLINGS.keys()


def as_tokenizer(given: Any) -> Any:
    """`given` itself, or the tokenizer of that folder or hub name."""
    return load_tokenizer(RunOptions(model_name_or_path=given)) if isinstance(given, str) else given
