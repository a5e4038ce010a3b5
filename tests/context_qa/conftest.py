"""A console's model and its input."""

import io
import sys
from pathlib import Path

import pytest
import torch

from context_qa.answering import Answerer
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.choosers import Choice
from mamba_lm.models.mamba import MambaConfig, MambaLM
from squad_utils import prompt_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    config = MambaConfig(len(tokenizer), d_model=16, n_layer=2, d_state=4)
    answerer = Answerer(MambaLM(config).eval(), tokenizer, max_new_tokens=4)
    answerer.read_prefixes([[1, 2]])  # reports the backend, once
    return answerer


@pytest.fixture(scope="module")
def fresh_answer(answerer):
    """The answer to a question on a context that is read for it alone."""

    def answer(context: str, question: str):
        [answers] = answerer.answer([prompt_parts(context, question)])
        return answers[0]

    return answer


@pytest.fixture(scope="session")
def scripted():
    """A chooser of the tokens that a function returns."""

    class Scripted:
        is_capturable = False

        def __init__(self, next_token):
            self.next_token = next_token

        def choose(self, log_probs, stops, places) -> Choice:
            token_ids = torch.tensor([self.next_token()])
            return Choice(token_ids, log_probs[:, token_ids[0]], torch.isin(token_ids, stops))

    return Scripted


@pytest.fixture
def type_in(monkeypatch):
    """Make this text standard input, typed at a terminal or not."""

    def use(text: str, is_interactive: bool = False) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: is_interactive)

    return use
