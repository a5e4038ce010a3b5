"""What the user can mend, told in one line: raised anywhere, printed once, exit code 2."""

import sys


class UserError(Exception):
    """Bad input, a missing file, an unusable setting. The message names the thing and the mend."""


def run_script(main, parse_args) -> None:
    """Run a script's `main(parse_args())`: exit 2 with one line on a UserError, 130 on Ctrl-C."""
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(_report(f"error: {error}", code=2))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted", code=130))


def _report(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
