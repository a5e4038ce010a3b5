"""Score a model on a file of questions: what the two evaluation scripts share."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch._dynamo  # else in the midst of a run, which cannot be stopped for seconds then
from accelerate import PartialState
from tqdm import tqdm

from common.errors import UserError, printable, say_loading, warn
from common.files import check_output, keep_inputs
from common.processes import disconnect, from_first, in_step
from common.provenance import describe_run, sha256
from context_qa.answering import Answerer
from context_qa.arguments import MAX_BATCH_TOKENS, MAX_NEW_TOKENS, SLIDING_WINDOW, Data
from context_qa.data_warnings import data_warnings, model_warnings
from context_qa.negatives import make_negatives
from context_qa.results.metrics import PARTS, SCORES, tuned_threshold
from context_qa.results.reading import RESULTS
from context_qa.results.results_file import ResultsFile
from context_qa.results.rows import Answer, result_row
from context_qa.results.summary import SUMMARY, summary_path
from context_qa.sliding_window import sliding_window_answers
from context_qa.spans import SPAN_BORDERS
from mamba_lm.checkpoint import load_model_and_tokenizer, model_hashes
from mamba_lm.device import choose_device, choose_dtype
from squad_utils import Example, same_question

Prompt = Callable[[Example], tuple[str, str]]


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation is asked to do.

    model: a local folder, a Hub name or `SLIDING_WINDOW`, a baseline. data: a file or Hub data set;
    limit: its first questions only. output: the results file, which overwrite allows to replace.
    tokenizer: a folder, file or Hub name, the model's own by default. max_batch_tokens: see
    `Answerer`. prompt_order: recorded with the results. negatives: the kind of unanswerable
    examples that are added. constrain_to_context: guesses are spans of the context.
    no_answer_threshold: see `Answerer`; tune_on: other data whose best threshold is used.
    """

    model: str
    data: str
    output: str
    prompt_order: str
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = MAX_NEW_TOKENS
    max_batch_tokens: int = MAX_BATCH_TOKENS
    limit: int | None = None
    overwrite: bool = False
    negatives: str | None = None
    constrain_to_context: bool = False
    no_answer_threshold: float | None = None
    tune_on: str | None = None


def evaluate(settings: EvaluationSettings, data: Data, prompt: Prompt) -> None:
    """Answer every example of the data by its prompt (prefix, suffix); write, score and print. data
    has the examples of each file that the settings name. Raises UserError.

    Under torchrun the processes share the work, and the first one writes.
    """
    _check_outputs(settings)
    has_threshold = settings.no_answer_threshold is not None or settings.tune_on is not None
    is_baseline = settings.model == SLIDING_WINDOW
    if is_baseline and (has_threshold or settings.constrain_to_context):
        raise UserError(
            f"{SLIDING_WINDOW}: this baseline has no probabilities and always answers with a span; "
            "leave out no_answer_threshold, tune_on and constrain_to_context"
        )
    device = choose_device(settings.device)
    processes = PartialState(cpu=device.type == "cpu")
    if processes.num_processes > 1:
        device = processes.device
    run = _Run(settings, data, prompt, processes, device)
    questions = run.read(settings.data, settings.limit)
    threshold = settings.no_answer_threshold
    if settings.tune_on:
        threshold = run.tune(settings.tune_on, questions)
    summary, _ = run.answer(questions, settings.output, threshold)
    if processes.is_main_process:
        print_summary(summary)
    disconnect()


def _check_outputs(settings: EvaluationSettings) -> None:
    """UserError, before anything is computed, where a file that is no result would be lost."""
    results = [settings.output, *([_tuning(settings.output)] if settings.tune_on else [])]
    summaries = list(map(summary_path, results))
    keep_inputs(
        [*results, *summaries],
        [settings.data, settings.tune_on, settings.model, settings.tokenizer],
    )
    if settings.tune_on:  # or `ResultsFile` would look at OUTPUT once the threshold is tuned
        for path in results:
            check_output(path, RESULTS, overwrite=True)
    for summary in summaries:
        check_output(summary, SUMMARY, overwrite=True)


def _tuning(output: str) -> str:
    return f"{output}.tuning.jsonl"


class _Questions(NamedTuple):
    """What is asked: the questions of a file, then their unanswerable copies, if there are any."""

    source: str
    examples: list[Example]
    first_negative: int | None

    def own(self) -> list[Example]:
        return self.examples[: self.first_negative]

    def keys(self) -> set[tuple[str, str]]:
        return {same_question(e.context, e.question) for e in self.examples}


class _Run:
    """One command: a model that answers one file, or two where a threshold is tuned."""

    def __init__(
        self,
        settings: EvaluationSettings,
        data: Data,
        prompt: Prompt,
        processes: PartialState,
        device: torch.device,
    ):
        self.settings, self.data, self.prompt = settings, data, prompt
        self.processes, self.device = processes, device
        self.dtype = choose_dtype(settings.dtype, device)

    def read(self, source: str, limit: int | None = None) -> _Questions:
        examples = self.data[source][:limit]
        if self.settings.negatives is None:
            return _Questions(source, examples, None)
        copies = make_negatives(examples, self.settings.negatives)
        return _Questions(source, examples + copies, len(examples))

    def tune(self, source: str, scored: _Questions) -> float:
        """The threshold that is best on another file, whose results are written beside OUTPUT."""
        questions = self.read(source)
        common = questions.keys() & scored.keys()
        if common:
            raise UserError(
                f"tune_on {source}: {len(common)} of its questions are scored too; tune the "
                "threshold on other questions"
            )
        if len({example.is_answerable for example in questions.examples}) < 2:
            raise UserError(
                f"tune_on {source}: needs answerable and unanswerable questions; negatives adds "
                "unanswerable ones"
            )
        output = _tuning(self.settings.output)
        _, rows = self.answer(questions, output, threshold=1.0)  # none is to abstain
        threshold = from_first(tuned_threshold(rows) if rows else None)
        if self.processes.is_main_process:
            print(f"no-answer threshold {threshold:.6g}, tuned on {printable(source)}")
        return threshold

    def answer(
        self, questions: _Questions, output: str, threshold: float | None
    ) -> tuple[dict, list[dict]]:
        """Results at `output`, resumed where they were cut off: summary and rows, in the first
        process; nothing in others."""
        examples = questions.examples
        is_main = self.processes.is_main_process
        with contextlib.ExitStack() as stack:
            results = None
            if is_main:
                record = self._record(questions, threshold)
                file = ResultsFile(output, examples, record, self.settings.overwrite)
                results = stack.enter_context(file)
            done = from_first(results.done if results else None)
            if len(done) < len(examples):
                answerer = self._answerer(threshold)
                if results is not None:
                    results.record["warnings"] = self._warn(questions, answerer)
                batches = self._answers(answerer, examples, done)
                progress = tqdm(
                    total=len(examples), initial=len(done), unit="question", disable=not is_main
                )
                stack.enter_context(progress)
                for step in in_step(batches):
                    if results is not None:
                        rows = [
                            result_row(idx, examples[idx], answer)
                            for batch in step
                            for idx, answer in batch.items()
                            if idx not in done
                        ]
                        results.write(rows)
                        progress.update(len(rows))
            return (self._finished(results), results.rows) if results else ({}, [])

    def _record(self, questions: _Questions, threshold: float | None) -> dict:
        source = questions.source
        record = self._made_with | {"data_sha256": sha256(source)}
        chosen = ("max_new_tokens", "prompt_order", "negatives", "constrain_to_context")
        decisive = {
            "model": record["model_sha256"] or self.settings.model,
            "tokenizer": record["tokenizer_sha256"],
            "data": record["data_sha256"] or source,
            "limit": self.settings.limit if source == self.settings.data else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "no_answer_threshold": threshold,
        }
        decisive |= {name: getattr(self.settings, name) for name in chosen}
        if self.settings.constrain_to_context:
            decisive["span_borders"] = SPAN_BORDERS[0]  # earlier versions ended spans anywhere
        return {"settings": decisive, "first_negative": questions.first_negative} | record

    @functools.cached_property
    def _made_with(self) -> dict:
        """What is the same for both files: weights are many bytes to hash."""
        settings = self.settings
        if settings.model == SLIDING_WINDOW:
            hashes = {"model_sha256": None, "tokenizer_sha256": None}
        else:
            hashes = model_hashes(settings.model, settings.tokenizer)
        return describe_run(asdict(settings)) | hashes

    def _answerer(self, threshold: float | None) -> Answerer | None:
        """None for a baseline."""
        settings = self.settings
        if settings.model == SLIDING_WINDOW:
            return None
        return Answerer(
            *self._model_and_tokenizer,
            settings.max_new_tokens,
            settings.max_batch_tokens,
            threshold,
        )

    def _warn(self, questions: _Questions, answerer: Answerer | None) -> list[str]:
        """What makes the scores mean less than they seem to, printed, and kept with them."""
        warnings = [] if answerer is None else [*model_warnings(self.settings.model)]
        warnings += data_warnings(
            questions.source,
            questions.own(),
            answerer and answerer.tokenizer,
            self.settings.max_new_tokens,
            self.settings.constrain_to_context,
        )
        for warning in warnings:
            warn(warning)
        return warnings

    def _answers(
        self, answerer: Answerer | None, examples: list[Example], done: set[int]
    ) -> Iterator[dict[int, Answer]]:
        """This process's share of the batches that are not done."""
        part, parts = self.processes.process_index, self.processes.num_processes
        if answerer is None:
            return sliding_window_answers(examples, done) if part == 0 else iter(())
        prompts = [self.prompt(example) for example in examples]
        contexts = [e.context for e in examples] if self.settings.constrain_to_context else None
        return answerer.answer(prompts, contexts, done, part, parts)

    @functools.cached_property
    def _model_and_tokenizer(self):
        say_loading(self.settings.model)
        torch.manual_seed(0)  # for the weights, should MODEL be a config file
        return load_model_and_tokenizer(
            self.settings.model, self.settings.tokenizer, self.device, self.dtype
        )

    def _finished(self, results: ResultsFile) -> dict:
        measured = {"device": str(self.device), "processes": self.processes.num_processes}
        if self.device.type == "cuda":
            measured["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return results.finish(**measured)


def print_summary(summary: Mapping) -> None:
    """The scores as tables on standard output, 80 characters wide."""
    scores, intervals = summary["scores"], summary["intervals"]
    print(f"{'percent':16}{'questions':>9}   {'exact match':21}{'F1':21}raw match")
    for prefix, title in PARTS.items():
        if f"{prefix}num_questions" in scores:
            exact_match, f1, is_correct = (scores[prefix + metric] for metric in SCORES)
            print(
                f"{title:16}{scores[prefix + 'num_questions']:9,}   "
                f"{exact_match:5.1f} {_interval(intervals, prefix + 'exact_match'):15}"
                f"{f1:5.1f} {_interval(intervals, prefix + 'f1'):15}{is_correct:5.1f}"
            )
    if "folded_exact_match" in summary:
        print(
            f"exact match, Unicode forms and accents folded: {summary['folded_exact_match']:.1f} "
            "(the official script compares characters as they are written)"
        )
    over = summary["intervals_over"]
    if intervals:
        print(f"in parentheses: 95 % intervals, bootstrap over {over}")
    else:
        print(f"no 95 % intervals: {over} cannot be resampled")
    print()
    parts = [part for part in ("abstention", "abstention_with_negatives") if part in summary]
    print(f"{'':32}" + "".join(f"{part.replace('_', ' '):>27}" for part in parts).rstrip())
    for name in dict.fromkeys(name for part in parts for name in summary[part]):
        values = (summary[part].get(name) for part in parts)
        print(f"{name.replace('_', ' '):32}" + "".join(f"{_figure(v):>27}" for v in values))
    for warning in summary.get("warnings", ()):
        print(f"warning: {printable(str(warning))}")


def _interval(intervals: Mapping, name: str) -> str:
    return "({:.1f}-{:.1f})".format(*intervals[name]) if name in intervals else ""


def _figure(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} %" if isinstance(value, float) else f"{value:,}"
