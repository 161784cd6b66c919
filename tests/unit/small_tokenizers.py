"""Small tokenizers of every type that Transformers makes, trained on a few sentences when they are first asked for."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from qa_deepspeed.qa.features.families import Family, family_of

SENTENCES = (
    "The Rhine rises in the Swiss canton of Graubünden and flows through Germany to the North Sea.",
    "Who wrote it, and when was it first printed? It was written in 1874 by a lady of Weimar.",
    "Naïve façades and coöperative cafés: what costs 3.50 € or $1,234.56 (or more) in São Paulo?",
    "北京是中国的首都。東京は日本の首都です。서울은 한국의 수도이다.",
    "القاهرة عاصمة مصر. תל אביב היא עיר גדולה. Москва — столица России.",
    "I don't know; you can't say \"it's\" isn't they're we've, e.g. U.S.A. and x_1 + y^2 = z.",
    "😀 smiles, 👩‍👩‍👧 is a family, 🇩🇪 a flag and e\u0301 an accent of its own.",
)


def _wordpiece(lowercase: bool, *special: str) -> dict[str, int]:
    """Special tokens, characters, halves of words and words. Not trained: training breaks ties at random."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    pieces = dict.fromkeys(special or ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    for sentence in SENTENCES:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)):
            half = len(word) // 2
            pieces.update(dict.fromkeys([*word[:1], word[: half + 1]] + ([word] if half % 2 else [])))
            pieces.update(dict.fromkeys(f"##{piece}" for piece in (*word, word[half:]) if piece))
    return {piece: number for number, piece in enumerate(pieces)}


def _byte_level(special: list[str]) -> dict[str, Any]:
    """Vocabulary and merges of a byte-level BPE, the special tokens in front."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _vocabulary_and_merges(tokenizer)


def _byte_fallback(special: list[str]) -> dict[str, Any]:
    """Vocabulary and merges of a BPE over words marked by ▁, with a token for each byte, as Llama has."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=[*special, *every_byte], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:3], trainer)
    return _vocabulary_and_merges(tokenizer)


def _vocabulary_and_merges(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {"vocab": tokenizer.get_vocab(), "merges": [tuple(pair) for pair in merges]}


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    """(piece, score) of a Unigram model over words marked by ▁, the special tokens in front."""
    pieces = dict.fromkeys(special, 0.0) | {"▁": -4.0} | dict.fromkeys("".join(special), -9.0)
    for sentence in SENTENCES:
        for word in sentence.replace(" ", " ▁").split():
            half = len(word) // 2
            pieces |= {piece: -9.0 for piece in word if piece not in pieces}
            parts = (word[: half + 1], word[half:], word)
            pieces |= {piece: -6.0 - len(piece) / 8 for piece in parts if len(piece) > 2}
    return list(pieces.items())


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_LIKE = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
XLNET = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]
BIG_BIRD = ["<pad>", "</s>", "<unk>", "<s>", "[MASK]", "[SEP]", "[CLS]"]


def _makers() -> dict[str, Any]:
    fast: Any = transformers
    return {
        "bert": lambda: fast.BertTokenizer(vocab=_wordpiece(True)),
        "bert-cased": lambda: fast.BertTokenizer(vocab=_wordpiece(False), do_lower_case=False),
        "distilbert": lambda: fast.DistilBertTokenizer(vocab=_wordpiece(True)),
        "electra": lambda: fast.ElectraTokenizer(vocab=_wordpiece(True)),
        "funnel": lambda: fast.FunnelTokenizer(vocab=_wordpiece(True, "<pad>", "<unk>", "<cls>", "<sep>", "<mask>")),
        "mpnet": lambda: fast.MPNetTokenizer(vocab=_wordpiece(True, "<s>", "<pad>", "</s>", "[UNK]", "<mask>")),
        "roberta": lambda: fast.RobertaTokenizer(**_byte_level(ROBERTA)),
        "roberta-prefix": lambda: fast.RobertaTokenizer(**_byte_level(ROBERTA), add_prefix_space=True),
        "bart": lambda: fast.BartTokenizer(**_byte_level(ROBERTA)),
        "longformer": lambda: fast.LongformerTokenizer(**_byte_level(ROBERTA)),
        "deberta": lambda: fast.DebertaTokenizer(**_byte_level(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])),
        "modernbert": _modernbert,
        "gpt2": lambda: fast.GPT2Tokenizer(**_byte_level(["<|endoftext|>"])),
        "qwen2": lambda: fast.Qwen2Tokenizer(**_byte_level(["<|endoftext|>"])),
        "llama": lambda: fast.LlamaTokenizer(**_byte_fallback(["<unk>", "<s>", "</s>"])),
        "llama-with-end": lambda: fast.LlamaTokenizer(**_byte_fallback(["<unk>", "<s>", "</s>"]), add_eos_token=True),
        "xlnet": lambda: fast.XLNetTokenizer(vocab=_unigram(XLNET)),
        "albert": lambda: fast.AlbertTokenizer(vocab=_unigram(BERT_LIKE), unk_id=1),
        "xlm-roberta": lambda: fast.XLMRobertaTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"])),
        "camembert": lambda: fast.CamembertTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"])),
        "t5": lambda: fast.T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0),
        "deberta-v2": lambda: fast.DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])),
        "big_bird": lambda: fast.BigBirdTokenizer(vocab=_unigram(BIG_BIRD)),
    }


def _modernbert() -> PreTrainedTokenizerFast:
    """A bare tokenizer file with a template, as ModernBERT ships one; no class of its own."""
    parts = _byte_level(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    backend = tokenizers.Tokenizer(models.BPE(**parts))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


NAMES = tuple(_makers())


@cache
def tokenizer(name: str) -> Any:
    """The small tokenizer of this name; one object per run of the tests."""
    return _makers()[name]()


@cache
def reference(name: str) -> Any:
    """The same tokenizer, whose model finds no special token in a text either, asked with `split_special_tokens`."""
    made = tokenizer(name)
    if not isinstance(made.backend_tokenizer.model, models.Unigram):
        return made
    made = _makers()[name]()
    model, special = json.loads(made.backend_tokenizer.to_str())["model"], set(made.all_special_tokens)
    vocabulary = [(piece, -1000.0 if piece in special else score) for piece, score in model["vocab"]]
    made.backend_tokenizer.model = models.Unigram(vocabulary, model["unk_id"], model["byte_fallback"])
    return made


def config(name: str) -> PretrainedConfig:
    """The configuration of the model that the tokenizer goes with, by Transformers' own defaults."""
    model_type = {"bert-cased": "bert", "roberta-prefix": "roberta", "llama-with-end": "llama"}.get(name, name)
    return transformers.AutoConfig.for_model(model_type)


def family(name: str) -> Family:
    """The family of the small tokenizer of this name."""
    return family_of(config(name), tokenizer(name))
