"""Asking questions at a prompt: what the two prompt scripts share."""

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
from context_qa.console.explanation import Explanation, answer_spans, shown, token_strengths
from context_qa.console.streamed_answer import StreamedAnswer, stream_answer
from context_qa.console.terminal import Screen
from context_qa.data_warnings import model_warnings
from mamba_lm.checkpoint import NOTE, load_model_and_tokenizer
from mamba_lm.choosers import Chooser, make_chooser
from mamba_lm.delta import DeltaNorms, delta_layers
from mamba_lm.device import choose_device, choose_dtype
from mamba_lm.models.mamba import MambaState
from mamba_lm.tokenizer import require_offsets
from squad_utils import abstains, prompt_parts

READ_AT_ONCE = 512  # tokens: more at once is no faster, and tells less often how far it is


class Passage(NamedTuple):
    """What has been read: a text, the state after it and how it was read."""

    text: str
    state: MambaState
    num_tokens: int
    seconds: float
    strengths: list[tuple[int, int, float]] | None  # of its tokens, if they are to be explained


class Console:
    """Reads a passage once and answers question after question from the state after it.

    layers: those whose Δ explains answers, none by default. show_prompt: whether all that is sent
    to the model is shown too.
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
        self.passage: Passage | None = None
        self.first: StreamedAnswer | None = None  # answer on this passage
        self.last: StreamedAnswer | None = None

    def read(self, text: str) -> None:
        """Read a passage, from whose state questions are asked from now on."""
        tokenizer, model = self.answerer.tokenizer, self.answerer.model
        if self.show_prompt:
            self.screen.say(text)
        started = time.perf_counter()
        [ids] = self.answerer.tokens.encode([text])
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=len(ids), unit="token", delay=5, leave=False))
            deltas = stack.enter_context(DeltaNorms(model, self.layers)) if self.layers else None
            state = self.answerer.read_prefixes([ids], bar.update)
        seconds = time.perf_counter() - started
        strengths = token_strengths(tokenizer, text, deltas.by_layer()) if deltas else None
        self.passage = Passage(text, state, len(ids), seconds, strengths)
        self.first = self.last = None
        self.screen.say(
            f"read {len(ids):,} tokens in {seconds:.2f} s into a state of "
            f"{state.num_bytes / 1e3:,.0f} kB"
        )

    def ask(self, question: str, label: str = "") -> None:
        """Answer a question on the passage that has been read; as text after a label, token by
        token. UserError if the model computes NaN."""
        text, state, num_tokens, *_ = self.passage
        asked = prompt_parts(text, question)[1]
        if self.show_prompt:
            self.screen.say(asked)
        [suffix] = self.answerer.tokens.encode([asked])
        if self.as_json:
            answer = stream_answer(self.answerer, state, suffix, num_tokens, self.chooser)
            print(json_line(self._record(question, answer)), flush=True)
        else:
            self.screen.write(label)
            try:
                answer = stream_answer(
                    self.answerer, state, suffix, num_tokens, self.chooser, self.screen.write
                )
            except KeyboardInterrupt:
                self.screen.write(" ...\n")
                raise
            self.screen.write(
                f"{'' if answer.text else '(nothing)'}   ({_doubts(answer)})\n", "dim"
            )
            if self.passage.strengths:
                self.screen.explain(self._explanation(answer))
        self.first, self.last = self.first or answer, answer

    def _record(self, question: str, answer: StreamedAnswer) -> dict:
        """The first question on a passage bears the time of reading that, as in evaluation."""
        reading = 0.0 if self.first else self.passage.seconds
        seconds = reading + answer.seconds
        record = {
            "question": question,
            "answer": answer.text,
            "confidence": answer.confidence,
            "no_answer_probability": answer.no_answer_probability,
            "time": seconds,
            "time_to_first_token": reading + answer.seconds_to_first_token,
            "num_tokens": answer.num_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "tokens_per_sec": answer.num_new_tokens / seconds,
        }
        if self.passage.strengths:
            explanation = self._explanation(answer)
            record |= {"spans": explanation.spans, "delta": explanation.tokens}
        return record

    def _explanation(self, answer: StreamedAnswer) -> Explanation:
        text = self.passage.text
        return Explanation(text, self.passage.strengths, answer_spans(text, answer.text))


def _doubts(answer: StreamedAnswer) -> str:
    """How sure the model is; where it abstains, how likely an answer was."""
    confidence, no_answer = answer.confidence, answer.no_answer_probability
    if abstains(answer.text):
        return f"confidence {confidence:.2f}, an answer {1 - no_answer:.2f}"
    return f"confidence {confidence:.2f}, no answer {no_answer:.2f}"


@dataclass(frozen=True)
class ConsoleSettings:
    """What a console is asked to use and to show.

    model: a local folder or a Hub name; tokenizer: a folder, file or Hub name, the model's own by
    default. temperature, top_k, top_p and seed: see `choosers.make_chooser`. explain: with each
    answer, what the model let into its state of the context, by Δ. show_prompt: print all that the
    model reads.
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
    """A console with the model of the settings; the model's note is printed on stderr. Raises
    UserError where the model, its tokenizer or a setting cannot be used."""
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
        print(shown(text), file=sys.stderr)
    answerer = Answerer(model, tokenizer, settings.max_new_tokens, READ_AT_ONCE)
    _load_kernels(answerer)
    return Console(answerer, chooser, settings.as_json, layers, settings.show_prompt)


def _load_kernels(answerer: Answerer) -> None:
    """They are loaded, or compiled, at their first use: now, not amid the first answer."""
    brief = copy.copy(answerer)
    brief.max_new_tokens, brief.stop_ids = 1, set()
    ids = brief.no_answer_ids  # any tokens
    stream_answer(brief, brief.read_prefixes([ids]), ids, len(ids))
