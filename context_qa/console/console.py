"""Asking questions at a prompt: what the two prompt scripts share."""

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.errors import warn
from common.json_text import json_line
from context_qa.answering import Answerer
from context_qa.console.explanation import Explanation, answer_spans, shown, token_strengths
from context_qa.console.streamed_answer import StreamedAnswer, stream_answer
from context_qa.console.terminal import Screen
from context_qa.data_warnings import model_warnings
from mamba_lm.checkpoint import NOTE, load_model_and_tokenizer
from mamba_lm.delta import DeltaNorms, delta_layers
from mamba_lm.device import choose_device, choose_dtype
from mamba_lm.models.state import MambaState
from mamba_lm.streaming import Sampler
from mamba_lm.tokenizer import require_offsets, token_ids
from squad_utils import NO_ANSWER, abstains, answer_text, prompt_parts

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
        sampler: Sampler | None = None,
        as_json: bool = False,
        layers: Sequence[int] = (),
        show_prompt: bool = False,
    ):
        self.answerer, self.sampler, self.as_json = answerer, sampler, as_json
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
        total = len(token_ids(tokenizer, text))
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=total, unit="token", delay=5, leave=False))
            deltas = stack.enter_context(DeltaNorms(model, self.layers)) if self.layers else None
            state, [num_tokens] = self.answerer.read_prefixes([text], bar.update)
        seconds = time.perf_counter() - started
        strengths = token_strengths(tokenizer, text, deltas.by_layer()) if deltas else None
        self.passage = Passage(text, state, num_tokens, seconds, strengths)
        self.first = self.last = None
        self.screen.say(
            f"read {num_tokens:,} tokens in {seconds:.2f} s into a state of "
            f"{state.num_bytes / 1e3:,.0f} kB"
        )

    def ask(self, question: str, label: str = "") -> None:
        """Answer a question on the passage that has been read; as text after a label, token by
        token. UserError if the model computes NaN."""
        text, state, num_tokens, *_ = self.passage
        suffix = prompt_parts(text, question)[1]
        if self.show_prompt:
            self.screen.say(suffix)
        if self.as_json:
            answer = stream_answer(self.answerer, state, suffix, num_tokens, self.sampler)
            print(json_line(self._record(question, answer)), flush=True)
        else:
            self.screen.write(label)
            try:
                answer = stream_answer(
                    self.answerer, state, suffix, num_tokens, self.sampler, self.screen.write
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


def load_console(
    args: argparse.Namespace, explain: bool = False, show_prompt: bool = False
) -> Console:
    """A console with the model that the command line names; the model's note goes to stderr.
    UserError where the model, its tokenizer or a flag is unfit."""
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer, device, dtype)
    for warning in model_warnings(args.model):
        warn(warning)
    if explain:
        require_offsets(tokenizer)
    layers = delta_layers(args.model, model.config.n_layer) if explain else ()
    note = Path(args.model) / NOTE
    if note.is_file():
        text = note.read_text(encoding="utf-8", errors="replace").strip()
        print(shown(text), file=sys.stderr)
    answerer = Answerer(model, tokenizer, args.max_new_tokens, READ_AT_ONCE)
    _load_kernels(answerer)
    return Console(answerer, sampler, args.json, layers, show_prompt)


def _load_kernels(answerer: Answerer) -> None:
    """They are loaded, or compiled, at their first use: now, not amid the first answer."""
    brief = copy.copy(answerer)
    brief.max_new_tokens, brief.stop_ids = 1, set()
    text = answer_text(NO_ANSWER)  # which has tokens; a newline may have none
    state, [length] = brief.read_prefixes([text])
    stream_answer(brief, state, text, length)
