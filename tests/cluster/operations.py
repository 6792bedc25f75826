"""Owns the commands of docs/operations.md, so that tests run what operators are told to."""

import shlex
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def documented(section: str, *beginning: str) -> list[list[str]]:
    """The words of each command of a section that begins so, as a shell would split them."""
    (text,) = [part.partition("\n")[2] for part in TEXT.split("\n## ") if part.partition("\n")[0] == section]
    code = "\n".join(line for line in text.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [words for words in commands if words[: len(beginning)] == list(beginning)]


def exported(section: str) -> dict[str, str]:
    """The variables that a section's commands export."""
    words = [word for _, *words in documented(section, "export") for word in words]
    return {name: value for name, _, value in (word.partition("=") for word in words)}
