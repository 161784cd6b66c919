"""Tiny XLNet and XLM models with beam heads, and questions that they can memorize."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from qa_deepspeed.cli.data.sample import make_corpora

QUESTIONS = 32
SPECIAL = {
    "xlnet": ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"],
    "xlm": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
}


def write_questions(path: Path) -> None:
    """The first 32 questions of a generated corpus, answerable and unanswerable ones, as a SQuAD v2.0 file."""
    corpus, _ = make_corpora(5, 8, 1)
    left = QUESTIONS
    for article in corpus["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = paragraph["qas"][:left]
            left -= len(paragraph["qas"])
    path.write_text(json.dumps(corpus))


def texts(path: Path) -> list[str]:
    """Every context and question of a SQuAD file."""
    paragraphs = [p for article in json.loads(path.read_text())["data"] for p in article["paragraphs"]]
    return [p["context"] for p in paragraphs] + [qa["question"] for p in paragraphs for qa in p["qas"]]


def make_model(kind: str, questions: Path) -> tuple[torch.nn.Module, object]:
    """An untrained model of `kind` ("xlnet" or "xlm") with a beam head, and a tokenizer that knows the words asked for.

    XLM's own tokenizer needs a package that is not installed here; the model takes any.
    """
    words = sorted(
        {
            word
            for text in texts(questions)
            for word in text.lower().replace(".", " . ").replace("?", " ? ").replace(",", " , ").split()
        }
    )
    torch.manual_seed(1)
    if kind == "xlnet":
        letters = sorted({letter for text in texts(questions) for letter in text})
        pieces = dict.fromkeys([*SPECIAL[kind], "▁"], 0.0)
        pieces |= dict.fromkeys(letters, -9.0)
        pieces |= dict.fromkeys([f"▁{word}" for text in texts(questions) for word in text.split()], -4.0)
        tokenizer = transformers.XLNetTokenizer(vocab=list(pieces.items()))
        config = transformers.XLNetConfig(
            vocab_size=len(pieces),
            d_model=64,
            n_layer=2,
            n_head=4,
            d_inner=128,
            dropout=0.0,
            initializer_range=0.06,
        )
        return transformers.XLNetForQuestionAnswering(config), tokenizer
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL[kind], *words]))}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    config = transformers.XLMConfig(
        vocab_size=len(vocabulary),
        emb_dim=64,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        max_position_embeddings=256,
        pad_index=0,
        n_langs=1,
        embed_init_std=0.3,
        init_std=0.08,
    )
    return transformers.XLMForQuestionAnswering(config), tokenizer


def save_model(kind: str, questions: Path, folder: Path) -> None:
    """`make_model`, saved as Transformers saves it."""
    model, tokenizer = make_model(kind, questions)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
