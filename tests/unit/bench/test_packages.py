"""Programs of others in environments of their own: what is installed, once, and what is said when it cannot be."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.packages import CACHE_VARIABLE, InstallFailed, Package, executable

PACKAGE = Package("loader", "1.2", before=("torch==9",))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Sequence[str]]:
    """What would have been run. An environment that is made has a folder."""
    ran: list[Sequence[str]] = []

    def run(command: Sequence[str], **_options: Any) -> None:
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return ran


def test_a_package_is_installed_once_after_what_has_to_be_before_it(
    commands: list[Sequence[str]], tmp_path: Path
) -> None:
    assert executable(PACKAGE) == executable(PACKAGE) == tmp_path / "loader-1.2" / "bin" / "loader"
    assert [command[-1] for command in commands] == [str(tmp_path / "loader-1.2"), "torch==9", "loader==1.2"]


def test_what_was_not_installed_whole_is_installed_anew_and_the_failure_says_what_to_do(
    commands: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Sequence[str], **_options: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="no such version")

    with monkeypatch.context() as broken:
        broken.setattr(subprocess, "run", fail)
        with pytest.raises(InstallFailed, match=f"cannot install loader==1.2 .* {CACHE_VARIABLE}") as failure:
            executable(PACKAGE)
        assert failure.value.log_tail == "no such version"
    executable(PACKAGE)
    assert len(commands) == 3
