"""The console of the two prompt scripts: read a context, answer questions, print."""

import contextlib
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.errors import warn
from common.json_text import json_line
from context_qa.answering import Answerer
from context_qa.arguments import MAX_NEW_TOKENS
from context_qa.console.explanation import (
    Explanation,
    find_answer,
    to_printable,
    token_strengths,
)
from context_qa.console.streamed_answer import StreamedAnswer, stream_answer
from context_qa.console.terminal import Screen
from context_qa.data_warnings import model_warnings
from mamba_lm.checkpoint import NOTE, load_model_and_tokenizer
from mamba_lm.choosers import Chooser, make_chooser
from mamba_lm.delta import DeltaNorms, delta_layers
from mamba_lm.device import choose_device, choose_dtype
from mamba_lm.models.state import MambaState
from mamba_lm.tokenizer import require_offsets
from squad_utils import abstains, prompt_parts

READ_AT_ONCE = 512  # tokens: larger pieces are no faster, and update the progress bar less often


class ReadContext(NamedTuple):
    """A context that has been read, and the state after it."""

    text: str
    state: MambaState
    num_tokens: int
    seconds: float
    strengths: list[tuple[int, int, float]] | None  # start, end, Δ of each token, to explain


class Console:
    """Reads a context once and answers questions from the state after it.

    layers: the layers whose Δ explains answers, none by default. show_prompt: also print what the
    model reads.
    """

    def __init__(
        self,
        answerer: Answerer,
        chooser: Chooser | None = None,
        as_json: bool = False,
        layers: Sequence[int] = (),
        show_prompt: bool = False,
    ):
        self.answerer, self.chooser, self.as_json = answerer, chooser, as_json
        self.layers, self.show_prompt = layers, show_prompt
        self.screen = Screen(as_json)
        self.context: ReadContext | None = None
        self.first: StreamedAnswer | None = None  # answer on this context
        self.last: StreamedAnswer | None = None

    def read(self, text: str) -> None:
        """Read a context; questions that follow are about it."""
        tokenizer, model = self.answerer.tokenizer, self.answerer.model
        if self.show_prompt:
            self.screen.print_status(text)
        started = time.perf_counter()
        [ids] = self.answerer.tokens.encode([text])
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=len(ids), unit="token", delay=5, leave=False))
            deltas = stack.enter_context(DeltaNorms(model, self.layers)) if self.layers else None
            state = self.answerer.read_prefixes([ids], bar.update)
        seconds = time.perf_counter() - started
        strengths = token_strengths(tokenizer, text, deltas.by_layer()) if deltas else None
        self.context = ReadContext(text, state, len(ids), seconds, strengths)
        self.first = self.last = None
        self.screen.print_status(
            f"read {len(ids):,} tokens in {seconds:.2f} s into a state of "
            f"{state.num_bytes / 1e3:,.0f} kB"
        )

    def ask(self, question: str, label: str = "") -> None:
        """Print the answer to a question on the context: as JSON, or as text after a label, token
        by token. Raises UserError if the model computes NaN."""
        text, state, num_tokens, *_ = self.context
        suffix = prompt_parts(text, question)[1]
        if self.show_prompt:
            self.screen.print_status(suffix)
        [suffix_ids] = self.answerer.tokens.encode([suffix])
        if self.as_json:
            answer = stream_answer(self.answerer, state, suffix_ids, num_tokens, self.chooser)
            print(json_line(self._record(question, answer)), flush=True)
        else:
            self.screen.print_answer(label)
            try:
                answer = stream_answer(
                    self.answerer,
                    state,
                    suffix_ids,
                    num_tokens,
                    self.chooser,
                    self.screen.print_answer,
                )
            except KeyboardInterrupt:
                self.screen.print_answer(" ...\n")
                raise
            self.screen.print_answer(
                f"{'' if answer.text else '(nothing)'}   ({_format_confidence(answer)})\n", "dim"
            )
            if self.context.strengths:
                self.screen.print_explanation(self._explanation(answer))
        self.first, self.last = self.first or answer, answer

    def _record(self, question: str, answer: StreamedAnswer) -> dict:
        """The JSON of an answer. The time of the first on a context includes reading it, as in
        evaluation."""
        reading_seconds = 0.0 if self.first else self.context.seconds
        seconds = reading_seconds + answer.seconds
        record = {
            "question": question,
            "answer": answer.text,
            "confidence": answer.confidence,
            "no_answer_probability": answer.no_answer_probability,
            "time": seconds,
            "time_to_first_token": reading_seconds + answer.seconds_to_first_token,
            "num_tokens": answer.num_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "tokens_per_sec": answer.num_new_tokens / seconds,
        }
        if self.context.strengths:
            explanation = self._explanation(answer)
            record |= {"spans": explanation.spans, "delta": explanation.tokens}
        return record

    def _explanation(self, answer: StreamedAnswer) -> Explanation:
        text = self.context.text
        return Explanation(text, self.context.strengths, find_answer(text, answer.text))


def _format_confidence(answer: StreamedAnswer) -> str:
    """The confidence, and the probability of an abstention; of an answer if the model abstains."""
    confidence, no_answer = answer.confidence, answer.no_answer_probability
    if abstains(answer.text):
        return f"confidence {confidence:.2f}, an answer {1 - no_answer:.2f}"
    return f"confidence {confidence:.2f}, no answer {no_answer:.2f}"


@dataclass(frozen=True)
class ConsoleSettings:
    """The settings of a console.

    model: a local folder or a Hub name. tokenizer: a folder, file or Hub name; the model's own by
    default. temperature, top_k, top_p and seed: see `choosers.make_chooser`. as_json: print answers
    as JSON. explain: print with each answer how much of each token of the context the model let
    into its state, by Δ. show_prompt: also print what the model reads.
    """

    model: str
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    as_json: bool = False
    explain: bool = False
    show_prompt: bool = False


def load_console(settings: ConsoleSettings) -> Console:
    """Load the model of the settings, print its note on stderr, and return a console. Raises
    UserError if the model, its tokenizer or a setting cannot be used."""
    chooser = make_chooser(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    model, tokenizer = load_model_and_tokenizer(settings.model, settings.tokenizer, device, dtype)
    for warning in model_warnings(settings.model):
        warn(warning)
    if settings.explain:
        require_offsets(tokenizer)
    layers = delta_layers(settings.model, model.config.n_layer) if settings.explain else ()
    note = Path(settings.model) / NOTE
    if note.is_file():
        text = note.read_text(encoding="utf-8", errors="replace").strip()
        print(to_printable(text), file=sys.stderr)
    answerer = Answerer(model, tokenizer, settings.max_new_tokens, READ_AT_ONCE)
    _load_kernels(answerer)
    return Console(answerer, chooser, settings.as_json, layers, settings.show_prompt)


def _load_kernels(answerer: Answerer) -> None:
    """Kernels are loaded, or compiled, at their first use: use them before the first answer."""
    short = copy.copy(answerer)
    short.max_new_tokens, short.stop_ids = 1, set()
    ids = short.no_answer_ids  # any tokens
    stream_answer(short, short.read_prefixes([ids]), ids, len(ids))
