"""Owns the start of `python -m bench COMMAND`."""

from bench.interrupts import end_at_once


def main() -> None:
    end_at_once()
    # This imports what all commands need, which takes long enough to be interrupted.
    from bench.commands.app import app

    app()


if __name__ == "__main__":
    main()
