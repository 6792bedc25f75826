"""Owns which tokens of a model are plain text: what a simulated engine answers with, so that it can be read."""

from pathlib import Path

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def read_tokenizer(model: str) -> Tokenizer:
    """Of a folder with a tokenizer.json, or of a Hugging Face id. Raises ValueError if it has none."""
    try:
        if Path(model).is_dir():
            return Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        return Tokenizer.from_pretrained(model)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"cannot read the tokenizer of {model}: {error}; name a model, or a folder, that has a tokenizer.json"
        ) from error


def plain_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of all tokens that are text on their own: neither special ones nor parts of a character, ascending.

    Raises ValueError if there is none.
    """
    steering = tokenizer.get_added_tokens_decoder().keys()
    candidates = sorted(id for id in tokenizer.get_vocab().values() if id not in steering)
    texts = tokenizer.decode_batch([[id] for id in candidates], skip_special_tokens=False)
    plain = tuple(id for id, text in zip(candidates, texts, strict=True) if text and _UNFINISHED not in text)
    if not plain:
        raise ValueError("the model's tokenizer has no token that is plain text; name another model")
    return plain
