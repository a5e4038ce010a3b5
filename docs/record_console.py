"""Record a console session as an SVG image: docs/console.svg, the picture of the README.

    python -m docs.record_console

Runs the console on the demo model in a pseudo-terminal, types two questions and draws the screen.
Needs pexpect and pyte of requirements-dev.txt.
"""

from common.script import run_script

import argparse
import sys
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.text import Text

from common.command_line import Parser

COMMAND = "prompt_mamba_with_context.py models/demo --context_file data/demo/passage.txt"
QUESTIONS = (
    "Tell me the name of the owner of the Bright Feather Hotel.",
    "What number of rooms does the Wild Swan Hotel have?",
)
COLUMNS, ROWS = 88, 24


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/console.svg"), help="the image")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text(f"$ python {COMMAND}", style="bold"))
    for line in record():
        style = "bold" if line.startswith("Q:") else "green" if line.startswith("A:") else ""
        console.print(Text(line, style=style))
    console.save_svg(str(args.output), title="Mamba Dive")


def record() -> list[str]:
    """The lines of the screen after the questions have been answered."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    process = pexpect.spawn(
        sys.executable, COMMAND.split(), dimensions=(ROWS, COLUMNS), env=None, timeout=120
    )
    process.expect("Ctrl-D ends")
    seen = process.before + process.after
    for question in QUESTIONS:
        process.sendline(question)
        process.expect(r"\(confidence [^)]*\)")
        seen += process.before + process.after
    process.terminate(force=True)
    stream.feed(seen)
    return [line.rstrip() for line in screen.display if line.strip()]


if __name__ == "__main__":
    run_script(main, parse_args)
