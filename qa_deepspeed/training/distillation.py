"""Teachers of a run: checked at its start; their logits over the training features are computed once and cached.

Distillation (Hinton et al. 2015; Sanh et al. 2019): a student learns the softened probabilities of trained models
beside the labels. No teacher is in memory while the student trains.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config, zero3_loading
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import evaluation_model
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.models.loading import head_kind, model_files, require_trained_weights, require_weights
from qa_deepspeed.qa.cache.key import InputDigests
from qa_deepspeed.qa.cache.teacher_logits import LogitsCache, SoftTargets, logits_key
from qa_deepspeed.qa.decoding.candidates import real_rows
from qa_deepspeed.qa.decoding.spans import answer_logits
from qa_deepspeed.qa.features.batching import Batch
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.features.sampler import evaluation_batches
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.training.evaluation.evaluation_forward import forward_and_gather
from qa_deepspeed.training.features import features_folder, load_features, look_up_features
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.progress import ProgressBar

ROWS_COMPARED = 4096
"""Features of two stores that are compared at a time."""


@dataclass(frozen=True)
class Teacher:
    """A trained model to learn from."""

    options: RunOptions
    """Those of the run, for this model."""
    facts: ModelFacts
    digest: str
    """Of its weights and config."""
    features: str
    """Fingerprint of the training features that its tokenizer makes."""

    @property
    def name(self) -> str:
        """Its folder or name on the hub."""
        return str(self.options.model_name_or_path)


LoadedTeacher = tuple[Teacher, FeatureStore]
"""A teacher, and the training features as it takes them."""


def find_teachers(options: RunOptions, facts: ModelFacts) -> list[Teacher]:
    """The teachers of a run, without their weights.

    Args:
        facts: of the student.
    Raises:
        UserError: one of them, or the student, cannot be used; each teacher needs the student's vocabulary.
    """
    if not options.teachers:
        return []
    if head_kind(facts.config, options.qa_head) != "span":
        raise UserError("a beam head has no logits of whole rows to learn: leave --teacher_model_name_or_path out")
    return [_find_teacher(name, options, facts) for name in options.teachers]


def _find_teacher(name: str, options: RunOptions, student: ModelFacts) -> Teacher:
    of_student = ("model_type", "config_name", "tokenizer_name", "qa_head", "student_layers", "lora_rank", "freeze")
    unset: dict[str, Any] = dict.fromkeys(of_student)
    own = dataclasses.replace(options, model_name_or_path=name, layerwise_lr_decay=1.0, **unset)
    facts = model_facts(own)
    require_weights(own)
    if head_kind(facts.config, None) != "span":
        raise UserError(f"teacher {name} has a beam head, which gives no logits of whole rows: use a span head")
    if facts.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise UserError(
            f"teacher {name} has another vocabulary than {options.model_name_or_path}, and both must cut text into the "
            "same tokens: use a teacher with the student's tokenizer"
        )
    files, of_hub = model_files(own)
    digests = InputDigests(features_folder(options)).of(tuple(map(str, files)))
    digest = hashlib.sha256(" ".join([*sorted(digests), of_hub or ""]).encode()).hexdigest()
    return Teacher(own, facts, digest, look_up_features(own, "train", facts)[0])


def load_teachers(options: RunOptions, facts: ModelFacts, store: FeatureStore) -> list[LoadedTeacher]:
    """The teachers of a run, each with the training features as it takes them: the same tokens and windows as `store`.

    Every rank calls this; no collective may be in progress.

    Raises:
        UserError: as `find_teachers`, or a teacher's tokenizer makes other tokens or windows.
    """
    return [(teacher, _features_of(teacher, options, store)) for teacher in find_teachers(options, facts)]


def _features_of(teacher: Teacher, options: RunOptions, store: FeatureStore) -> FeatureStore:
    """The student's features if the key is the same; else, as for a BERT's DistilBERT, which takes no token types, the
    teacher's own if all rows are equal."""
    if teacher.features == store.fingerprint:
        return store
    own = load_features(teacher.options, "train", teacher.facts)
    if not same_rows(own, store):
        raise UserError(
            f"teacher {teacher.name} cuts the training text into other tokens or windows than "
            f"{options.model_name_or_path}: use a student and a teacher with the same tokenizer"
        )
    return own


def same_rows(first: FeatureStore, second: FeatureStore) -> bool:
    """Whether two stores have the same tokens and contexts in every row; token types may differ."""
    if not np.array_equal(first.lengths, second.lengths):
        return False
    for begin in range(0, len(first), ROWS_COMPARED):
        rows = np.arange(begin, min(len(first), begin + ROWS_COMPARED))
        one, other = first.take(rows), second.take(rows)
        for name in ("input_ids", "null_position", "context_begin", "context_end"):
            if not np.array_equal(getattr(one, name), getattr(other, name)):
                return False
    return True


def soft_targets(
    teachers: Sequence[LoadedTeacher], store: FeatureStore, resolved: ResolvedConfig, device: torch.device
) -> SoftTargets | None:
    """The teachers' probabilities for the training rows, after computing what the cache lacks; None without teachers.

    Collective. When it returns, no teacher is in memory.

    Raises:
        UserError: a teacher has no trained head, or gives logits that are not finite.
        StorageError: the cache cannot be written.
    """
    if not teachers:
        return None
    options = resolved.options
    caches = []
    for teacher, own in teachers:
        key = logits_key(own.fingerprint, [teacher.digest], resolved.precision)
        cache = LogitsCache(features_folder(options), key, own, options.timeout)
        with dist.explain_collective_errors("the forward passes of a teacher"):
            _complete(cache, teacher, own, resolved, device)
            _copy_to_other_disks(cache)
        caches.append(cache)
    return SoftTargets(store, caches, options.distillation_temperature)


def _complete(
    cache: LogitsCache, teacher: Teacher, store: FeatureStore, resolved: ResolvedConfig, device: torch.device
) -> None:
    """Compute the parts that the cache lacks. Collective; rank 0 holds the lock and writes."""
    with contextlib.ExitStack() as held:

        def lock_if_incomplete() -> list[int]:
            if not resolved.options.overwrite_cache and not cache.missing(dist.log0):
                return []
            held.enter_context(cache.locked())
            if resolved.options.overwrite_cache:
                cache.discard()
            return cache.missing()  # another run may have computed them meanwhile

        parts = dist.run_on_rank_zero(lock_if_incomplete, no_timeout=True)
        if not parts:
            dist.log0(f"teacher {teacher.name}: logits of {len(store):,} features (from the cache)")
            return
        began = time.perf_counter()
        _compute(cache, parts, teacher, store, resolved, device)
        gc.collect()  # an engine has references in circles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = time.perf_counter() - began
        rows = sum(len(cache.rows(part)) for part in parts)
        dist.log0(f"teacher {teacher.name}: logits of {rows:,} features computed in {seconds:.1f} s, and cached")


def _copy_to_other_disks(cache: LogitsCache) -> None:
    """Give nodes whose cache is on a disk of their own what rank 0 has. Collective."""
    mine = set(cache.missing())
    lacking = dist.all_reduce_max([float(part in mine) for part in range(cache.parts)])
    if not any(lacking):
        return
    cache.folder.mkdir(parents=True, exist_ok=True)
    writes = dist.is_first_on_filesystem(cache.folder)
    for part in np.flatnonzero(lacking).tolist():
        texts = dist.run_on_rank_zero(functools.partial(_as_texts, cache, part))
        if writes and part in mine:
            cache.write(part, *(np.frombuffer(base64.b64decode(text), np.float16) for text in texts))
    dist.barrier()


def _as_texts(cache: LogitsCache, part: int) -> list[str]:
    """Start and end logits of a part, which JSON can hold."""
    return [base64.b64encode(column.tobytes()).decode() for column in cache.columns(part)]


def _compute(
    cache: LogitsCache,
    parts: Sequence[int],
    teacher: Teacher,
    store: FeatureStore,
    resolved: ResolvedConfig,
    device: torch.device,
) -> None:
    """Load the teacher and compute these parts, all ranks together. Collective."""
    options, config = teacher.options, teacher.facts.config
    own = dataclasses.replace(resolved, options=options)
    full = ds_config.finish(own, total_steps=1, hidden_size=ds_config.hidden_size(config))
    forward_only = {name: section for name, section in full.items() if name not in ("optimizer", "scheduler")}
    model, fresh = zero3_loading.load(options, config, forward_only)
    require_trained_weights(teacher.name, model, fresh)
    head = head_of(model, options.version_2_with_negative)
    layout = teacher.facts.layout(model_columns(model, config), options.lang_id)
    reader = evaluation_model(model, forward_only, own, device)
    place = options.per_gpu_eval_batch_size, dist.rank(), dist.world_size()
    batches = {
        part: [cache.rows(part)[rows] for rows in evaluation_batches(store.lengths[cache.rows(part)], *place)]
        for part in parts
    }
    total = sum(map(len, batches.values()))
    shown = dist.is_rank_zero()
    with contextlib.closing(reader), reader.evaluating(), ProgressBar("teacher", total, "batch", shown=shown) as bar:
        for part in parts:
            forward = functools.partial(
                forward_and_gather, reader.eval_forward, head, device, store, layout, batches[part], bar=bar
            )
            _compute_part(cache, part, forward, teacher.name)


def _compute_part(cache: LogitsCache, part: int, forward: Callable[..., Iterator[Any]], name: str) -> None:
    """Compute a part, all ranks together, and write it on rank 0. Collective.

    forward: `forward_and_gather` of the part, less `extract`.
    """
    counts = cache.counts(cache.rows(part))
    width = int(counts.max())

    def extract(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        where, real = (batch.context_begin, batch.context_end, batch.null_position), real_rows(batch)
        start, end = (answer_logits(one, *where, width) for one in (outputs.start_logits, outputs.end_logits))
        rows = torch.from_numpy(batch.feature_id[:real]).to(start.device)
        return {"feature_id": rows, "start": start[:real], "end": end[:real]}

    arrived = list(forward(extract=extract))

    def write() -> None:
        gathered = [one for one in arrived if one is not None]
        order = np.argsort(np.concatenate([one["feature_id"] for one in gathered]))
        assert len(order) == len(counts), "every row comes once"
        real = np.arange(width) < counts[:, np.newaxis]
        start, end = (np.concatenate([one[side] for one in gathered])[order][real] for side in ("start", "end"))
        if not (np.isfinite(start).all() and np.isfinite(end).all()):
            raise UserError(f"teacher {name} gives logits that are not finite: train it again, or use another")
        cache.write(part, start, end)

    dist.run_on_rank_zero(write)
