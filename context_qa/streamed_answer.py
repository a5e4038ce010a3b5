"""An answer that is told while it comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream

from context_qa.answering import Answerer, as_probability
from context_qa.results import Answer
from mamba_lm.generate import read_and_score
from mamba_lm.model import MambaState
from mamba_lm.streaming import Sampler, Stream
from mamba_lm.tokenizer import token_ids


@dataclass(frozen=True)
class StreamedAnswer(Answer):
    """seconds_to_first_token: from the question to its first token, or to the stop if that came
    first. confidence: of the tokens that were said, be they the likeliest or drawn."""

    seconds_to_first_token: float


@torch.inference_mode()
def stream_answer(
    answerer: Answerer,
    state: MambaState,
    suffix: str,
    prefix_length: int,
    sampler: Sampler | None = None,
    show: Callable[[str], object] = lambda text: None,
) -> StreamedAnswer:
    """The answer to a suffix from a state of one row, as `Answerer.ask` gives it without a
    threshold, or drawn by the sampler; `show` gets its text in pieces, each as soon as it is known.
    """
    started = time.perf_counter()
    tokenizer = answerer.tokenizer
    ids = token_ids(tokenizer, suffix)
    model, stop_ids, vocab_size = answerer.model, answerer.stop_ids, answerer.vocab_size
    reading, no_answer = read_and_score(
        model, ids, state, answerer.no_answer_ids, stop_ids, vocab_size
    )
    stream = Stream(model, reading, stop_ids, answerer.max_new_tokens, vocab_size, sampler)
    text, said, first_at = _Text(tokenizer), [], None
    for token in stream:
        first_at = first_at or time.perf_counter()
        said.append(token)
        show(text.add(token))
    ended = time.perf_counter()
    answer = StreamedAnswer(
        text=tokenizer.decode(said).strip(),
        confidence=as_probability(stream.log_prob),
        no_answer_probability=as_probability(no_answer),
        seconds=ended - started,
        num_tokens=prefix_length + len(ids),
        num_new_tokens=len(said),
        seconds_to_first_token=(first_at or ended) - started,
    )
    show(answer.text[text.num_shown :])  # half a character, if it ends in one
    return answer


class _Text:
    """The text of tokens as they come: whole characters, without the blanks at both ends."""

    def __init__(self, tokenizer):
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None)  # a slow one has none
        self._stream = DecodeStream(skip_special_tokens=False)
        self._blanks = ""
        self.num_shown = 0  # characters

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        if self._tokenizer is None:
            return ""
        text = self._blanks + (self._stream.step(self._tokenizer, token) or "")
        text = text if self.num_shown else text.lstrip()
        visible = text.rstrip()
        self._blanks = text[len(visible) :]
        self.num_shown += len(visible)
        return visible
