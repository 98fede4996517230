"""``epsdpo audit RUN``, ``epsdpo report RUN [RUN …]``; ``python -m epsdpo_kernels`` does the same."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="epsdpo", description="Checks and draws the record of a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        from .record import audit, report

        for command in (audit, report):
            command.add_command(commands)
        given = parser.parse_args(arguments)
        return given.run_command(given)
    except ModuleNotFoundError as problem:
        print(f"error: {problem}; pip install 'epsdpo_kernels[record]'", file=sys.stderr)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
