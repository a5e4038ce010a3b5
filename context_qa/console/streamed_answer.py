"""An answer whose text is printed while it is generated."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from context_qa.answering import Answerer, as_probability
from context_qa.results.rows import Answer
from mamba_lm.choosers import Chooser
from mamba_lm.generate import Decoder, read_and_score
from mamba_lm.models.state import MambaState


@dataclass(frozen=True)
class StreamedAnswer(Answer):
    """seconds_to_first_token: from the question to the first token, or to the stop if there is no
    token. confidence: of the generated tokens, greedy or sampled."""

    seconds_to_first_token: float


@torch.inference_mode()
def stream_answer(
    answerer: Answerer,
    state: MambaState,
    suffix: Sequence[int],
    prefix_length: int,
    chooser: Chooser | None = None,
    show: Callable[[str], object] = lambda text: None,
) -> StreamedAnswer:
    """Answer a suffix, given as token ids, from a state of one row: the answer of `Answerer.ask`
    without a threshold, or that of the chooser. `show` is called with the text in pieces, each as
    soon as it is known.
    """
    started = time.perf_counter()
    tokenizer = answerer.tokenizer
    model, stop_ids, vocab_size = answerer.model, answerer.stop_ids, answerer.vocab_size
    reading, no_answer = read_and_score(
        model, suffix, state, answerer.no_answer_ids, stop_ids, vocab_size
    )
    decoder = Decoder(model, reading, stop_ids, answerer.max_new_tokens, vocab_size, chooser)
    text, token_ids, first_at = _StreamedText(tokenizer), [], None
    for token in decoder.stream():
        first_at = first_at or time.perf_counter()
        token_ids.append(token)
        show(text.add(token))
    ended = time.perf_counter()
    answer = StreamedAnswer(
        text=tokenizer.decode(token_ids).strip(),
        confidence=as_probability(decoder.log_probs.item()),
        no_answer_probability=as_probability(no_answer),
        seconds=ended - started,
        num_tokens=prefix_length + len(suffix),
        num_new_tokens=len(token_ids),
        seconds_to_first_token=(first_at or ended) - started,
    )
    show(text.rest(answer.text))
    return answer


class _StreamedText:
    """The text of tokens that arrive one by one, without outer spaces. Text that has been shown
    never changes: it is the start of the decoded text of all tokens."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._is_early = _decodes_from_the_left(tokenizer)
        self._is_cleaned = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._token_ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """Add a token; return the text that can be shown now and could not before."""
        self._token_ids.append(token)
        if not self._is_early or _may_be_a_byte(self._tokenizer.convert_ids_to_tokens(token)):
            return ""
        # All tokens again: answers are short, and pieces may decode differently alone.
        settled = self._settled(self._tokenizer.decode(self._token_ids).strip())
        piece = settled[len(self._shown) :] if settled.startswith(self._shown) else ""
        self._shown += piece
        return piece

    def rest(self, text: str) -> str:
        """The part of the final text that has not been shown; all of it, on a new line, if it does
        not start with what has been shown."""
        return text[len(self._shown) :] if text.startswith(self._shown) else f"\n{text}"

    def _settled(self, text: str) -> str:
        """The text without an end that can still change: an incomplete character, and spaces."""
        text = text.rstrip("\ufffd").rstrip()
        if self._is_cleaned:  # three characters can remove the space before them: " n't"
            for _ in range(2):
                text = text[:-1].rstrip()
        return text


_BY_TOKEN = ("ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece")


def _decodes_from_the_left(tokenizer) -> bool:
    """Whether later tokens only change the end of the text: an incomplete character, or a run of
    bytes. Not so if a decoder depends on the whole text, or on which token is the last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer
        return False
    if backend.decoder is None:
        return True
    decoder = json.loads(backend.decoder.__getstate__())
    is_joined = False
    for part in decoder.get("decoders", [decoder]):
        if is_joined:
            if part["type"] != "Fuse" and (part["type"] != "Strip" or part["stop"]):
                return False
        elif part["type"] in ("Fuse", "ByteLevel"):
            is_joined = True
        elif part["type"] not in _BY_TOKEN:
            return False
    return True


def _may_be_a_byte(token: str | None) -> bool:
    """Whether a token may be part of a run of <0x..>. A run is decoded as one text, or as nothing
    if its last character is incomplete; an id without a token does not end it."""
    return token is None or re.fullmatch("<0x..>", token) is not None
