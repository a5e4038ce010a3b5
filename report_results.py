"""Show a results file as one HTML page: scores, charts, and every question with its context.

    python report_results.py results/demo.jsonl
    python report_results.py results/demo.jsonl --output report.html

The page is one file that needs no network: open it in a browser, send it to a colleague. Its table
of all questions can be searched, sorted and filtered; a click on a row shows the context with the
guess marked. The same results give the same page, byte for byte.
"""

from common.script import exit_on_signal, run_script

import argparse
from pathlib import Path

from common.command_line import Parser
from common.errors import printable
from common.output_files import (
    check_inputs_not_overwritten,
    check_output,
    require_writable,
    write_output,
)
from context_qa.results.reading import read_objects, results_rows
from context_qa.results.summary import read_summary, summary_path


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("results", metavar="RESULTS", help="JSONL, of an evaluation")
    about = "the page to write (default: RESULTS with the suffix .html)"
    parser.add_argument("--output", metavar="FILE", help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace another page there")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    objects, is_torn = read_objects(args.results)
    rows = results_rows(objects, args.results)
    output = args.output or str(Path(args.results).with_suffix(".html"))
    check_inputs_not_overwritten([output], [args.results, summary_path(args.results)])
    require_writable(output)
    summary = read_summary(args.results, warns=True)
    with exit_on_signal():
        from context_qa.results.report import PAGE, report_page

        check_output(output, PAGE, overwrite=True)  # anything but a page is refused before drawing
        page = report_page(rows, summary, Path(args.results).name, is_torn)
    write_output(output, page, PAGE, args.overwrite)
    print(printable(output))


if __name__ == "__main__":
    run_script(main, parse_args)
