"""How the cost of a question grows: with the questions per context and with the context's length.

    python -m benchmarks.bench_growth --plot growth.png     # mamba-130m's shape
    python -m benchmarks.bench_growth --quick

Random weights and tokens; ours with each context read once ("shared") and once per question.
Questions have 20 tokens, answers 16. `seconds` is a question's, `ratio` is to shared in the same
setting; tokens are those read and generated.
"""

from common.script import run_script

from pathlib import Path

import torch

from benchmarks.timing import Contender, new_file, parse_benchmark_args, report, rows_per_item
from benchmarks.workloads import VOCABULARY, WIDTH
from common.command_line import positive_int
from common.errors import UserError
from common.output_files import check_inputs_not_overwritten, check_output
from mamba_lm.generate import decode, prefill, read
from mamba_lm.models.mamba import MambaConfig, MambaLM

QUESTION, ANSWER = 20, 16
# Contexts, questions on each of them, their tokens.
BY_QUESTIONS = [(10 // questions, questions, 160) for questions in (1, 2, 5, 10)]
BY_LENGTH = [(1, 5, length) for length in (128, 512, 2048, 8192)]
MAX_BATCH_TOKENS = 8192
WAYS = ("shared", "unshared")


def parse_args():
    parser = parse_benchmark_args(__doc__)
    parser.add_argument("--n_layer", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--rounds", type=positive_int, default=3, help="default: 3")
    parser.add_argument(
        "--plot",
        type=new_file,
        metavar="FILE",
        help="also draw it, in a new file; needs matplotlib",
    )
    return parser.parse_args()


def main(args) -> None:
    by_length = BY_LENGTH
    if args.quick:
        args.n_layer, args.rounds, by_length = 2, 1, BY_LENGTH[:-1]
    check_inputs_not_overwritten(filter(None, (args.json, args.plot)), [])
    if args.plot is not None:
        plt = pyplot()
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(VOCABULARY, WIDTH, args.n_layer)).eval()
    rows = []
    for setting in [*BY_QUESTIONS, *by_length]:
        contenders = {
            name(setting, way): contender(model, *setting, way == WAYS[0]) for way in WAYS
        }
        rows += rows_per_item(contenders, next(iter(contenders)), args.rounds, patience=20)
    report(
        f"questions x tokens of a context, d_model {WIDTH}, {args.n_layer} layers, float32",
        rows,
        args.json,
    )
    if args.plot is not None:
        draw(plt, {row["name"]: row["seconds"] for row in rows}, by_length, args.plot)


def name(setting: tuple[int, int, int], way: str) -> str:
    _, questions, length = setting
    return f"{questions} x {length}, {way}"


def contender(model: MambaLM, count: int, questions: int, length: int, shared: bool) -> Contender:
    """Questions on `count` contexts of `length` tokens each."""
    contexts = torch.randint(VOCABULARY, (count, length)).tolist()
    if not shared:
        contexts = [context for context in contexts for _ in range(questions)]
    asked_of_each = questions if shared else 1
    suffixes = torch.randint(VOCABULARY, (len(contexts) * asked_of_each, QUESTION)).tolist()
    index = torch.arange(len(contexts)).repeat_interleave(asked_of_each)

    @torch.inference_mode()
    def answer():
        state = prefill(model, contexts, MAX_BATCH_TOKENS).fork(index)
        return decode(model, read(model, suffixes, state), set(), ANSWER)

    tokens = len(contexts) * length + len(suffixes) * (QUESTION + ANSWER)
    return Contender(answer, len(suffixes), tokens)


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")  # draws into files, where there is no screen
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(plt, seconds: dict[str, float], by_length, path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, settings, axis, label in (
        (left, BY_QUESTIONS, 1, f"questions on each context of {BY_QUESTIONS[0][2]} tokens"),
        (right, by_length, 2, f"tokens of a context with {by_length[0][1]} questions"),
    ):
        for way in WAYS:
            values = [seconds[name(setting, way)] for setting in settings]
            axes.plot([setting[axis] for setting in settings], values, marker="o", label=way)
        axes.set(xlabel=label, ylabel="seconds a question")
        axes.legend()
    left.set_ylim(bottom=0)
    right.set(xscale="log", yscale="log")
    lengths = [length for *_, length in by_length]
    right.set_xticks(lengths, [str(length) for length in lengths])
    right.minorticks_off()
    check_output(path, None)  # a file may have come there meanwhile
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a format that it does not know
        raise UserError(f"{path}: cannot be written ({error})") from error


if __name__ == "__main__":
    run_script(main, parse_args)
