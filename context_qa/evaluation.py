"""Evaluation: read data, load a model, answer the questions, write results, summarise them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm

from common.errors import UserError, printable, report_loading, warn
from common.output_files import check_inputs_not_overwritten, check_output
from common.processes import broadcast, disconnect, gather_batches
from common.provenance import describe_run, sha256
from context_qa.answering import Answerer
from context_qa.arguments import MAX_BATCH_TOKENS, MAX_NEW_TOKENS, SLIDING_WINDOW, Data
from context_qa.data_warnings import data_warnings, model_warnings
from context_qa.negatives import make_negatives
from context_qa.results.metrics import tuned_threshold
from context_qa.results.reading import RESULTS
from context_qa.results.results_file import ResultsFile
from context_qa.results.rows import Answer, result_row
from context_qa.results.score_table import print_summary
from context_qa.results.summary import SUMMARY, summary_path
from context_qa.sliding_window import sliding_window_answers
from context_qa.spans import SPAN_BORDERS
from mamba_lm.checkpoint import load_model_and_tokenizer, model_hashes
from mamba_lm.device import choose_device, choose_dtype
from squad_utils import Example, same_question

Prompt = Callable[[Example], tuple[str, str]]


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation.

    model: a local folder, a Hub name, or `SLIDING_WINDOW` for the baseline.
    data: a file or a Hub data set.
    output: the results file.
    prompt_order: the name of the prompt's layout, which the results record.
    tokenizer: a folder, a file or a Hub name (default: the model's own).
    max_new_tokens, max_batch_tokens, no_answer_threshold: see `Answerer`.
    limit: only the first questions of the data.
    overwrite: restart, and replace the results at output.
    negatives: the kind of negatives that are added (default: none).
    constrain_to_context: guesses are spans of the context.
    tune_on: other data, on which the no_answer_threshold with the best F1 is chosen.
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
    """Answer all examples, write the results and their summary, and print the scores.

    data: the examples of each source that the settings name. prompt: makes the (prefix, suffix) of
    an example. Under torchrun the processes share the work, and rank 0 writes. Raises UserError.
    """
    _check_settings(settings)
    _check_outputs(settings)
    device = choose_device(settings.device)
    processes = PartialState(cpu=device.type == "cpu")
    if processes.num_processes > 1:
        device = processes.device
    run = _Run(settings, data, prompt, processes, device)
    questions = run.select_questions(settings.data, settings.limit)
    threshold = settings.no_answer_threshold
    if settings.tune_on:
        threshold = run.tune_threshold(settings.tune_on, questions)
    summary, _ = run.write_results(questions, settings.output, threshold)
    if processes.is_main_process:
        print_summary(summary)
    disconnect()


def _check_settings(settings: EvaluationSettings) -> None:
    if settings.model != SLIDING_WINDOW:
        return
    has_threshold = settings.no_answer_threshold is not None or settings.tune_on is not None
    if has_threshold or settings.constrain_to_context:
        raise UserError(
            f"{SLIDING_WINDOW}: this baseline has no probabilities and always answers with a span; "
            "do not set no_answer_threshold, tune_on or constrain_to_context"
        )


def _check_outputs(settings: EvaluationSettings) -> None:
    """UserError, before anything is computed, if a file that is not results would be lost."""
    is_tuned = bool(settings.tune_on)
    results = [settings.output, *([_tuning_path(settings.output)] if is_tuned else [])]
    summaries = list(map(summary_path, results))
    check_inputs_not_overwritten(
        [*results, *summaries],
        [settings.data, settings.tune_on, settings.model, settings.tokenizer],
    )
    if is_tuned:  # `ResultsFile` looks at the output only after tuning
        for path in results:
            check_output(path, RESULTS, overwrite=True)
    for summary in summaries:
        check_output(summary, SUMMARY, overwrite=True)


def _tuning_path(output: str) -> str:
    return f"{output}.tuning.jsonl"


class _Questions(NamedTuple):
    """The examples of a source, then their negatives, if there are any."""

    source: str
    examples: list[Example]
    first_negative: int | None

    @property
    def own(self) -> list[Example]:
        """Those of the source."""
        return self.examples[: self.first_negative]

    @property
    def keys(self) -> set[tuple[str, str]]:
        return {same_question(e.context, e.question) for e in self.examples}


class _Run:
    """One command: a model that answers one source, or two where a threshold is tuned."""

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

    def select_questions(self, source: str, limit: int | None = None) -> _Questions:
        examples = self.data[source][:limit]
        if self.settings.negatives is None:
            return _Questions(source, examples, None)
        negatives = make_negatives(examples, self.settings.negatives)
        return _Questions(source, examples + negatives, len(examples))

    def tune_threshold(self, source: str, scored: _Questions) -> float:
        """The best threshold on another source, whose results are written beside the output."""
        questions = self.select_questions(source)
        common = questions.keys & scored.keys
        if common:
            raise UserError(
                f"tune_on {source}: {len(common)} of its questions are scored too; tune the "
                "threshold on other questions"
            )
        if len({example.is_answerable for example in questions.examples}) < 2:
            raise UserError(
                f"tune_on {source}: needs answerable and unanswerable questions; set negatives to "
                "add unanswerable ones"
            )
        output = _tuning_path(self.settings.output)
        _, rows = self.write_results(questions, output, threshold=1.0)  # never abstain
        threshold = broadcast(tuned_threshold(rows) if rows else None)
        if self.processes.is_main_process:
            print(f"no-answer threshold {threshold:.6g}, tuned on {printable(source)}")
        return threshold

    def write_results(
        self, questions: _Questions, output: str, threshold: float | None
    ) -> tuple[dict, list[dict]]:
        """Write the results at `output`, resuming those of an interrupted run. Rank 0 gets the
        summary and the rows, other ranks get nothing."""
        with contextlib.ExitStack() as stack:
            results = None
            if self.processes.is_main_process:
                record = self._make_record(questions, threshold)
                file = ResultsFile(output, questions.examples, record, self.settings.overwrite)
                results = stack.enter_context(file)
            done = broadcast(results.done if results else None)
            if len(done) < len(questions.examples):
                self._write_answers(results, questions, done, threshold)
            if results is None:
                return {}, []
            return self._finish(results), results.rows

    def _write_answers(
        self,
        results: ResultsFile | None,
        questions: _Questions,
        done: set[int],
        threshold: float | None,
    ) -> None:
        """Answer the questions that are not done; rank 0, which has `results`, writes the rows."""
        examples = questions.examples
        answerer = self._load_answerer(threshold)
        if results is not None:
            results.record["warnings"] = self._print_warnings(questions, answerer)
        batches = self._answer_batches(answerer, examples, done)
        is_silent = results is None
        with tqdm(
            total=len(examples), initial=len(done), unit="question", disable=is_silent
        ) as progress:
            for step in gather_batches(batches):
                if results is None:
                    continue
                rows = [
                    result_row(idx, examples[idx], answer)
                    for batch in step
                    for idx, answer in batch.items()
                    if idx not in done
                ]
                results.write(rows)
                progress.update(len(rows))

    def _load_answerer(self, threshold: float | None) -> Answerer | None:
        """None for the baseline."""
        settings = self.settings
        if settings.model == SLIDING_WINDOW:
            return None
        return Answerer(
            *self._model_and_tokenizer,
            settings.max_new_tokens,
            settings.max_batch_tokens,
            threshold,
        )

    @functools.cached_property
    def _model_and_tokenizer(self):
        report_loading(self.settings.model)
        torch.manual_seed(0)  # for the random weights of a model that is a config file
        return load_model_and_tokenizer(
            self.settings.model, self.settings.tokenizer, self.device, self.dtype
        )

    def _print_warnings(self, questions: _Questions, answerer: Answerer | None) -> list[str]:
        """Print what limits the meaning of the scores; the warnings are recorded with them."""
        warnings = [] if answerer is None else [*model_warnings(self.settings.model)]
        warnings += data_warnings(
            questions.source,
            questions.own,
            answerer and answerer.tokenizer,
            self.settings.max_new_tokens,
            self.settings.constrain_to_context,
        )
        for warning in warnings:
            warn(warning)
        return warnings

    def _answer_batches(
        self, answerer: Answerer | None, examples: list[Example], done: set[int]
    ) -> Iterator[dict[int, Answer]]:
        """This rank's share of the answers, by place in the examples, as they are computed."""
        rank, world_size = self.processes.process_index, self.processes.num_processes
        if answerer is None:
            return sliding_window_answers(examples, done) if rank == 0 else iter(())
        prompts = [self.prompt(example) for example in examples]
        contexts = [e.context for e in examples] if self.settings.constrain_to_context else None
        return answerer.answer(prompts, contexts, done, rank, world_size)

    def _make_record(self, questions: _Questions, threshold: float | None) -> dict:
        """What is recorded beside the results; its "settings" are those that decide the rows."""
        source = questions.source
        record = self._provenance | {"data_sha256": sha256(source)}
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
    def _provenance(self) -> dict:
        """Computed once, since hashing the weights is slow."""
        settings = self.settings
        if settings.model == SLIDING_WINDOW:
            hashes = {"model_sha256": None, "tokenizer_sha256": None}
        else:
            hashes = model_hashes(settings.model, settings.tokenizer)
        return describe_run(asdict(settings)) | hashes

    def _finish(self, results: ResultsFile) -> dict:
        measured = {"device": str(self.device), "processes": self.processes.num_processes}
        if self.device.type == "cuda":
            measured["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return results.finish(**measured)
