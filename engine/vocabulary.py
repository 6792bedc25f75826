"""Owns which tokens of a model are plain text: what a simulated engine answers with, so that it can be read."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Vocabulary:
    """`plain` are the ids of all tokens that are text on their own: neither special ones nor parts of a character,
    ascending."""

    tokenizer: Tokenizer
    plain: tuple[int, ...]


def read_vocabulary(model: str) -> Vocabulary:
    """`model` is a folder with a tokenizer.json, or a Hugging Face id. Raises ValueError if it has no tokenizer or no
    plain token."""
    file = Path(model) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if Path(model).is_dir() else Tokenizer.from_pretrained(model)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"cannot read the tokenizer of {model}: {error}; name a model, or a folder, that has a tokenizer.json"
        ) from error
    steering = tokenizer.get_added_tokens_decoder().keys()
    candidates = sorted(id for id in tokenizer.get_vocab().values() if id not in steering)
    texts = tokenizer.decode_batch([[id] for id in candidates], skip_special_tokens=False)
    plain = tuple(id for id, text in zip(candidates, texts, strict=True) if text and _UNFINISHED not in text)
    if not plain:
        raise ValueError(f"the tokenizer of {model} has no token that is plain text; name another model")
    return Vocabulary(tokenizer, plain)
