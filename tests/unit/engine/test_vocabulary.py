"""Which tokens a simulated engine writes: text that stands on its own, and nothing that steers."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from engine.vocabulary import read_vocabulary

MODEL = Path(__file__).parents[3] / "configs" / "models" / "mini"


def test_the_shipped_models_plain_tokens_read_well_and_hold_no_special_one() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokens = read_vocabulary(str(MODEL)).plain
    assert len(tokens) > 1000
    assert list(tokens) == sorted(set(tokens))
    assert not set(tokens) & tokenizer.get_added_tokens_decoder().keys()
    text = tokenizer.decode(list(tokens), skip_special_tokens=False)
    assert "\N{REPLACEMENT CHARACTER}" not in text
    assert "<|" not in text


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot read the tokenizer of .*; name a model, or a folder, that has a tokenizer"
    ):
        read_vocabulary(str(tmp_path))


def test_a_tokenizer_without_plain_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"the tokenizer of {tmp_path} has no token that is plain text"):
        read_vocabulary(str(tmp_path))
