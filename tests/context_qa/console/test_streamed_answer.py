"""A streamed answer equals that of the answering loop, and its pieces are its text."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from context_qa.answering import Answerer
from context_qa.console.streamed_answer import _StreamedText, stream_answer
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.choosers import Sampler
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.models.state import MambaState
from squad_utils import prompt_parts

ROOT = Path(__file__).parents[3]
CONTEXT = "Bo is a cat. Ann lives in “Oslo” with Ben and Cy. " * 4
QUESTIONS = ("Who is Bo?", "Where does Ann live?", "Why?", "Is “Cy” there?")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("", str(ROOT / "data/demo/tokenizer"))


@pytest.fixture(scope="module")
def answerer(tokenizer) -> Answerer:
    """Random weights with which some answers stop and others do not."""
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


def test_answers_equal_those_of_the_answering_loop(answerer):
    [context] = answerer.tokens.encode([CONTEXT])
    state, length = answerer.read_prefixes([context]), len(context)
    lengths = set()
    for question in QUESTIONS:
        [suffix] = answerer.tokens.encode([prompt_parts(CONTEXT, question)[1]])
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


def test_samples_depend_only_on_the_seed(answerer):
    [context] = answerer.tokens.encode([CONTEXT])
    state, length = answerer.read_prefixes([context]), len(context)
    [suffix] = answerer.tokens.encode([prompt_parts(CONTEXT, QUESTIONS[0])[1]])

    def sample(seed: int) -> str:
        return stream_answer(answerer, state, suffix, length, Sampler(5.0, seed=seed)).text

    assert sample(1) == sample(1) != sample(2)


def test_nan_is_an_error(answerer):
    [context] = answerer.tokens.encode([CONTEXT])
    state, length = answerer.read_prefixes([context]), len(context)
    broken = MambaState(tuple(tensor * torch.nan for tensor in state.tensors))
    with pytest.raises(UserError, match="the model computes NaN"):
        stream_answer(answerer, broken, context, length)


def pieces_of(tokenizer, token_ids: list[int]) -> list[str]:
    stream = _StreamedText(tokenizer)
    pieces = [stream.add(token) for token in token_ids]
    return [*pieces, stream.rest(tokenizer.decode(token_ids).strip())]


@pytest.mark.parametrize(
    "text", [" Bo  Li ", "\t“Oslo”, é 日本 🙂 ", "  ", "", " a\u0301 b", "don't  know.  "]
)
def test_pieces_are_whole_characters_without_outer_spaces(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == text.strip()
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


BYTES = [f"<0x{n:02X}>" for n in range(256)]
LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
SENTENCEPIECE = ["<unk>", "▁", "▁Bo", "▁▁", "o", ".", "▁日", "é", "\n", "\ufffd", *BYTES]
WORDS = [
    "Bo",
    "n",
    "'",
    "t",
    "##t",
    "s",
    "ve",
    "##ve",
    ".",
    ",",
    "!",
    "do",
    "not",
    "n't",
    "'s",
    "'m",
]
BLANKS = ["▁'", "▁", "▁n", "n", "'", "t", "▁.", "v", "e"]
KINDS = {  # vocabulary, decoder, whether spaces are cleaned up, whether pieces are shown early
    "Llama": (SENTENCEPIECE, decoders.Sequence(LLAMA), False, True),
    "bytes, then blanks": (
        SENTENCEPIECE,
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
        False,
        True,
    ),
    "Metaspace": (["▁", "▁Bo", "Bo", "▁▁", "o▁", "."], decoders.Metaspace(), False, True),
    "WordPiece": (WORDS, decoders.WordPiece(cleanup=False), False, True),
    "WordPiece, cleaned": (WORDS, decoders.WordPiece(cleanup=True), True, True),
    "cleaned blanks": (BLANKS, decoders.Metaspace(), True, True),
    "no decoder": (WORDS, None, False, True),
    "no decoder, cleaned": (WORDS, None, True, True),
    "CTC": (["<pad>", "|", "a", "b", "'"], decoders.CTC(), False, True),
    "ends of words": (["a", "a</w>", ".</w>", "b</w>c"], decoders.BPEDecoder(), False, False),
    "all of the text": (
        ["a", "b", "c", " "],
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        False,
        False,
    ),
    "its end": (
        ["a", "b", " "],
        decoders.Sequence([decoders.Fuse(), decoders.Strip("b", 0, 1)]),
        False,
        False,
    ),
}  # fmt: skip


def made(vocabulary: list[str], decoder, is_cleaned: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate(vocabulary)}, vocabulary[0])
    )
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=is_cleaned
    )


@pytest.mark.parametrize("kind", ["bytes of a character", *KINDS])
def test_pieces_of_random_tokens_are_the_decoded_text(tokenizer, kind):
    if kind in KINDS:
        *parts, is_early = KINDS[kind]
        tokenizer = made(*parts)
    else:
        is_early = True
    rng = random.Random(0)
    ids = list(tokenizer.get_vocab().values())
    num_early = 0
    for _ in range(2000):
        some = rng.sample(ids, min(len(ids), rng.randint(1, 12)))
        if kind in ("Llama", "bytes, then blanks"):  # characters of several bytes are more frequent
            some += tokenizer.convert_tokens_to_ids(["<0xE3>", "<0x81>", "<0x82>", "▁Bo"])
        token_ids = rng.choices(some, k=rng.randint(1, 12))
        if rng.random() < 0.1:
            token_ids.insert(0, max(ids) + 1)  # not the id of a token
        *pieces, last = pieces_of(tokenizer, token_ids)
        assert "".join(pieces) + last == tokenizer.decode(token_ids).strip(), token_ids
        num_early += any(pieces)
    assert (num_early > 500) == is_early and (is_early or not num_early)


def test_an_incomplete_last_character_is_shown_at_the_end(answerer, tokenizer, scripted):
    half = tokenizer("日", add_special_tokens=False)["input_ids"][:1]
    token_ids = [*tokenizer(" Bo", add_special_tokens=False)["input_ids"], *half]
    [context] = answerer.tokens.encode([CONTEXT])
    state, length = answerer.read_prefixes([context]), len(context)
    tokens = iter([*token_ids, tokenizer.eos_token_id])
    pieces: list[str] = []
    answer = stream_answer(
        answerer, state, context, length, scripted(lambda: next(tokens)), pieces.append
    )
    assert answer.text == "Bo\ufffd" == "".join(pieces)


def test_no_part_of_a_token_with_a_newline_is_in_an_answer(answerer, tokenizer, scripted):
    """As the model card says: text cut at the first newline would be "Bo?"."""
    ids = tokenizer(" Bo?\nA:", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[-1:]) == "?\nA:"
    [context] = answerer.tokens.encode([CONTEXT])
    state, length = answerer.read_prefixes([context]), len(context)
    tokens = iter(ids)
    assert (
        stream_answer(answerer, state, context, length, scripted(lambda: next(tokens))).text == "Bo"
    )


def test_the_text_of_a_slow_tokenizer_is_shown_at_the_end():
    stream = _StreamedText(SimpleNamespace())
    assert [stream.add(5), stream.add(6), stream.rest("Bo")] == ["", "", "Bo"]


def test_a_final_text_that_differs_is_shown_on_a_new_line(tokenizer):
    stream = _StreamedText(tokenizer)
    assert stream.add(tokenizer("Bo", add_special_tokens=False)["input_ids"][0]) != ""
    assert stream.rest("another") == "\nanother"
