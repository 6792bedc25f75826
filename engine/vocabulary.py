"""Owns which tokens of a model are plain text: what a simulated engine answers with, so that it can be read."""

from pathlib import Path

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def plain_tokens(model: str) -> tuple[int, ...]:
    """The ids of all tokens that are text on their own: neither special ones nor parts of a character, ascending.

    `model` is a folder with a tokenizer.json, or a Hugging Face id. Raises ValueError if it has no tokenizer or token.
    """
    file = Path(model) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if Path(model).is_dir() else Tokenizer.from_pretrained(model)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"cannot read the tokenizer of {model}: {error}; simulated engines need a model with a tokenizer.json"
        ) from error
    steering = tokenizer.get_added_tokens_decoder().keys()
    candidates = sorted(id for id in tokenizer.get_vocab().values() if id not in steering)
    texts = tokenizer.decode_batch([[id] for id in candidates], skip_special_tokens=False)
    plain = tuple(id for id, text in zip(candidates, texts, strict=True) if text and _UNFINISHED not in text)
    if not plain:
        raise ValueError(f"the tokenizer of {model} has no token that is plain text; set model.path to another")
    return plain
