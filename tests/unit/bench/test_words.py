"""Prompts as text: the tokenizer reads the tokens again that were meant."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.words import read_words

MODEL = Path(__file__).resolve().parents[3] / "configs" / "models" / "mini"


def test_words_are_read_as_they_were_drawn() -> None:
    words = read_words(str(MODEL))
    assert len(words.token_ids) > 100
    drawn = random.Random(1).choices(words.token_ids, k=500)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.encode(words.text(drawn)).ids == drawn


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        read_words(str(tmp_path))
