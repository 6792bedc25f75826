"""Owns prompts as text: tokens of a tokenizer that are read again as they were written, wherever they stand."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from engine.vocabulary import read_vocabulary


@dataclass(frozen=True)
class Words:
    """`token_ids` are of single words with the space before them."""

    token_ids: tuple[int, ...]
    _tokenizer: Tokenizer

    def text(self, token_ids: Sequence[int]) -> str:
        """Which the tokenizer reads as these tokens again, if they are all of `token_ids`."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)


def read_words(model: str) -> Words:
    """Of a folder with a tokenizer.json, or a Hugging Face id. Raises ValueError if it has no such tokens."""
    vocabulary = read_vocabulary(model)
    tokenizer, plain = vocabulary.tokenizer, vocabulary.plain
    texts = tokenizer.decode_batch([[id] for id in plain], skip_special_tokens=False)
    likely = [(id, text) for id, text in zip(plain, texts, strict=True) if text[:1] == " " and text[1:].isalpha()]
    read = tokenizer.encode_batch([text for _, text in likely], add_special_tokens=False)
    words = Words(tuple(id for (id, _), found in zip(likely, read, strict=True) if found.ids == [id]), tokenizer)
    if not words.token_ids or tokenizer.encode(words.text(words.token_ids), add_special_tokens=False).ids != list(
        words.token_ids
    ):
        raise ValueError(f"the tokenizer of {model} reads no words as they were written; send token ids")
    return words
