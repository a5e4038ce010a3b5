"""An answer that is told while it comes."""

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
from mamba_lm.models.mamba import MambaState


@dataclass(frozen=True)
class StreamedAnswer(Answer):
    """seconds_to_first_token: from the question to its first token, or to the stop if that came
    first. confidence: of the tokens that were said, be they the likeliest or drawn."""

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
    """The answer to a suffix, given as token ids, from a state of one row: as `Answerer.ask` gives
    it without a threshold, or as the chooser chooses it. `show` is called with its text in pieces,
    each as soon as it is known.
    """
    started = time.perf_counter()
    tokenizer = answerer.tokenizer
    model, stop_ids, vocab_size = answerer.model, answerer.stop_ids, answerer.vocab_size
    reading, no_answer = read_and_score(
        model, suffix, state, answerer.no_answer_ids, stop_ids, vocab_size
    )
    decoder = Decoder(model, reading, stop_ids, answerer.max_new_tokens, vocab_size, chooser)
    text, said, first_at = _Text(tokenizer), [], None
    for token in decoder.stream():
        first_at = first_at or time.perf_counter()
        said.append(token)
        show(text.add(token))
    ended = time.perf_counter()
    answer = StreamedAnswer(
        text=tokenizer.decode(said).strip(),
        confidence=as_probability(decoder.log_probs.item()),
        no_answer_probability=as_probability(no_answer),
        seconds=ended - started,
        num_tokens=prefix_length + len(suffix),
        num_new_tokens=len(said),
        seconds_to_first_token=(first_at or ended) - started,
    )
    show(text.rest(answer.text))
    return answer


class _Text:
    """The text of tokens as they come, without the blanks at both ends. What has been shown stays
    as it is, whatever comes: it is the beginning of what the tokenizer makes of all of them."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._is_early = _decodes_from_the_left(tokenizer)
        self._is_cleaned = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._said: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        self._said.append(token)
        if not self._is_early or _may_be_a_byte(self._tokenizer.convert_ids_to_tokens(token)):
            return ""
        # All tokens again: answers are short, and no tokenizer decodes pieces as it does the whole.
        settled = self._settled(self._tokenizer.decode(self._said).strip())
        piece = settled[len(self._shown) :] if settled.startswith(self._shown) else ""
        self._shown += piece
        return piece

    def rest(self, text: str) -> str:
        """What of the answer has not been shown: all of it, on a line of its own, if it does not
        begin with what has."""
        return text[len(self._shown) :] if text.startswith(self._shown) else f"\n{text}"

    def _settled(self, text: str) -> str:
        """The text without its end, if that can still change: half a character, and blanks."""
        text = text.rstrip("\ufffd").rstrip()
        if self._is_cleaned:  # a blank is lost by up to three characters behind it: " n't"
            for _ in range(2):
                text = text[:-1].rstrip()
        return text


_BY_TOKEN = ("ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece")


def _decodes_from_the_left(tokenizer) -> bool:
    """Whether later tokens change no more than the end of the text: half a character, or a run of
    bytes. So it is unless a decoder looks at all of the text, or at which token is the last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow one
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
    """A run of <0x..> is one text, or none if its last character is not whole; an id without a
    token does not end it."""
    return token is None or re.fullmatch("<0x..>", token) is not None
