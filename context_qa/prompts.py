"""The tokens of prompts and answers: how their parts are tokenised, which tokens end an answer, and
which are the abstention. The text of prompts is defined in `squad_utils`."""

import functools
from collections.abc import Sequence

from common.errors import UserError
from mamba_lm.tokenizer import encode, vocabulary_bound
from squad_utils import NO_ANSWER, answer_text


class PromptTokens:
    """Token ids for one tokenizer. Each part of a prompt is tokenised separately, without special
    tokens, so that forking a state after a prefix never changes the ids of the suffix."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest token id plus one: larger ids are padded rows of an embedding."""
        return vocabulary_bound(self.tokenizer)

    def encode(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: the prefix or the suffix of a prompt."""
        return encode(self.tokenizer, parts)

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of each answer as it follows a prompt."""
        return encode(self.tokenizer, [answer_text(answer) for answer in answers])

    def encode_targets(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of each answer and end-of-text: the target of training."""
        end = self.tokenizer.eos_token_id
        return [[*ids, end] for ids in self.encode_answers(answers)]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens before which an answer ends: end-of-text, and all that contain a newline."""
        return _stop_ids(self.tokenizer)

    @functools.cached_property
    def no_answer_ids(self) -> list[int]:
        """Ids of NO_ANSWER as it follows a prompt. Raises UserError if it has none."""
        [ids] = self.encode_answers([NO_ANSWER])
        if not ids:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} has no tokens for {NO_ANSWER!r}; "
                "use another tokenizer"
            )
        return ids


@functools.lru_cache(maxsize=4)  # decoding every token takes a third of a second for 50,000
def _stop_ids(tokenizer) -> frozenset[int]:
    texts = tokenizer.batch_decode([[i] for i in range(vocabulary_bound(tokenizer))])
    newlines = (number for number, text in enumerate(texts) if "\n" in text)
    return frozenset((tokenizer.eos_token_id, *newlines))
