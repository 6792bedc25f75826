"""Owns other people's programs that a benchmark runs beside its own, each in a virtual environment of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "BATON_BENCH_CACHE"
_INSTALL_TIMEOUT_S = 900.0


class InstallFailed(RuntimeError):
    """A package that could not be installed; `log_tail` is the end of what pip wrote."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


@dataclass(frozen=True)
class Package:
    """A package with a program of the same name. What is in `before` is installed first, so that pip does not choose
    another build of it for the package's sake."""

    name: str
    version: str
    before: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def executable(package: Package) -> Path:
    """The package's program; its environment is made if it is not there yet. Raises InstallFailed."""
    default = Path.home() / ".cache" / "baton" / "bench"
    venv = Path(os.environ.get(CACHE_VARIABLE) or default) / f"{package.name}-{package.version}"
    complete = venv / "complete"
    if not complete.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(venv)], package, venv)
        for requirement in (*package.before, package.requirement):
            _run([str(venv / "bin" / "pip"), "install", "--quiet", requirement], package, venv)
        complete.touch()
    return venv / "bin" / package.name


def _run(command: Sequence[str], package: Package, venv: Path) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise InstallFailed(f"installing {package.name} took over {error.timeout:g} s; check pip's index") from error
    except subprocess.CalledProcessError as error:
        raise InstallFailed(
            f"cannot install {package.requirement} into {venv}; check pip's index, or set {CACHE_VARIABLE} to another "
            "folder",
            error.stderr[-2000:],
        ) from error
