"""An answer token by token is the answering loop's, and its pieces are its text."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from context_qa.answering import Answerer
from context_qa.streamed_answer import _Text, stream_answer
from errors import UserError
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.model import MambaConfig, MambaLM
from mamba_lm.streaming import Sampler
from squad_utils import prompt_parts

ROOT = Path(__file__).parents[2]
CONTEXT = "Bo is a cat. Ann lives in “Oslo” with Ben and Cy. " * 4
QUESTIONS = ("Who is Bo?", "Where does Ann live?", "Why?", "Is “Cy” there?")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("", str(ROOT / "data/demo/tokenizer"))


@pytest.fixture(scope="module")
def answerer(tokenizer) -> Answerer:
    """Random weights, sure enough of themselves that some answers stop and others do not."""
    torch.manual_seed(1)
    config = MambaConfig(len(tokenizer), d_model=16, n_layer=2, d_state=4, tie_embeddings=False)
    model = MambaLM(config).eval()
    answerer = Answerer(model, tokenizer, max_new_tokens=12)
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_()
        model.lm_head.weight.normal_()
        model.lm_head.weight[sorted(answerer.stop_ids)] *= 1.5
        for block in model.backbone.layers:
            block.mixer.in_proj.weight *= 2
            block.mixer.out_proj.weight *= 2
    return answerer


def test_answers_are_the_answering_loops_and_come_in_pieces(answerer):
    state, [length] = answerer.read_prefixes([CONTEXT])
    lengths = set()
    for question in QUESTIONS:
        suffix = prompt_parts(CONTEXT, question)[1]
        pieces: list[str] = []
        got = stream_answer(answerer, state, suffix, length, show=pieces.append)
        [wanted] = answerer.ask(state, [suffix], [length])
        assert (got.text, got.num_tokens) == (wanted.text, wanted.num_tokens)
        assert got.num_new_tokens == wanted.num_new_tokens
        assert got.confidence == pytest.approx(wanted.confidence, rel=1e-4, abs=0)
        assert got.no_answer_probability == pytest.approx(
            wanted.no_answer_probability, rel=1e-4, abs=0
        )
        assert "".join(pieces) == got.text
        assert len(pieces) == got.num_new_tokens + 1
        assert 0 < got.seconds_to_first_token <= got.seconds
        lengths.add(got.num_new_tokens)
    assert len(lengths) > 1 and 12 in lengths


def test_draws_differ_by_the_sampler_alone(answerer):
    state, [length] = answerer.read_prefixes([CONTEXT])
    suffix = prompt_parts(CONTEXT, QUESTIONS[0])[1]

    def draw(seed: int) -> str:
        return stream_answer(answerer, state, suffix, length, Sampler(5.0, seed=seed)).text

    assert draw(1) == draw(1) != draw(2)


def test_broken_weights_are_told(answerer):
    state, [length] = answerer.read_prefixes([CONTEXT])
    broken = state._replace(ssm=tuple(ssm * torch.nan for ssm in state.ssm))
    with pytest.raises(UserError, match="the model computes NaN"):
        stream_answer(answerer, broken, "\n\nQ: Why?\nA:", length)


@pytest.mark.parametrize(
    "text", [" Bo  Li ", "\t“Oslo”, é 日本 🙂 ", "  ", "", " a\u0301 b", "don't  know.  "]
)
def test_pieces_are_whole_characters_without_outer_blanks(tokenizer, text):
    pieces, stream = [], _Text(tokenizer)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.add(token))
    assert "".join(pieces) == text.strip()
    assert "\ufffd" not in "".join(pieces)
    assert stream.num_shown == len(text.strip())


def test_a_text_that_ends_in_half_a_character_is_told_at_the_end(answerer, tokenizer):
    half = tokenizer("日", add_special_tokens=False)["input_ids"][:1]
    said = [*tokenizer(" Bo", add_special_tokens=False)["input_ids"], *half]
    state, [length] = answerer.read_prefixes([CONTEXT])
    tokens = iter([*said, tokenizer.eos_token_id])
    pieces: list[str] = []
    answer = stream_answer(
        answerer, state, "\n\nQ: Why?\nA:", length, lambda log_probs: next(tokens), pieces.append
    )
    assert answer.text == "Bo\ufffd" == "".join(pieces)


def test_a_tokenizer_that_decodes_no_streams_is_shown_at_the_end(tokenizer):
    stream = _Text(SimpleNamespace())
    assert [stream.add(5), stream.add(6)] == ["", ""] and stream.num_shown == 0
