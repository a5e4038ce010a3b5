"""Guesses that are spans of the context: every guess is one, and equals the result of a search over
all spans."""

import json
import unicodedata
from pathlib import Path

import pytest
import regex
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from common.errors import UserError
from common.text import UNSPACED
from context_qa.answering import Answerer
from context_qa.spans import Spans, require_pieces
from mamba_lm.checkpoint import load_model_and_tokenizer, load_tokenizer
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.tokenizer import encode
from squad_utils import NO_ANSWER, answer_text, is_scored_as_empty, prompt_parts, read_examples

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"
NEOX = SHARED / "tokenizer/20B_tokenizer.json"
needs_data = pytest.mark.skipif(not NEOX.exists(), reason=f"real data not present: {NEOX}")
STRANGE = (
    "Bo (born 1990s) is \N{CAT FACE}\N{CAT FACE} in Ærøskøbing.\n\nAnn\u2028“Dee” \u0301e\u0301 "
    "日本語の文 I don't know, he said.\tNBSP:\u00a0x  y   z "
)


def span_texts(tokenizer, context: str, max_tokens: int, stop_ids=()) -> set[str]:
    """The texts of all spans of a context."""
    spans = Spans(tokenizer, context, max_tokens, stop_ids)
    return {
        spans.text(choice.token_ids[: n + 1])
        for choice in spans.sequences
        for n, may_end in enumerate(choice.may_end)
        if may_end
    }


@pytest.fixture(scope="module", params=["demo", pytest.param("neox", marks=needs_data)])
def tokenizer(request):
    return load_tokenizer(
        "", str(ROOT / "data/demo/tokenizer" if request.param == "demo" else NEOX)
    )


@pytest.mark.parametrize("max_tokens", [1, 3, 64])
@pytest.mark.parametrize(
    "context", ["Bo is a cat.", STRANGE, "x", "¡", " \n", "", "the, a ...", "b " * 300]
)
def test_every_span_is_in_the_context(tokenizer, context, max_tokens):
    texts = span_texts(tokenizer, context, max_tokens)
    assert all(text == text.strip() and text in context for text in texts)
    assert not any(map(is_scored_as_empty, texts))
    if is_scored_as_empty(context):
        assert not texts
    elif max_tokens > 3:  # " x" can be two tokens
        assert texts


def test_every_run_of_words_is_a_span(tokenizer):
    context = "Ann lives in Oslo, Ben (her brother) in Rome since 1999."
    texts = span_texts(tokenizer, context, 64)
    assert {"Ann", "lives", "in", "Oslo", "Ben", "her", "brother", "Rome", "1999"} <= texts
    assert {"Ann lives in Oslo", "Ben (her brother)", "in Rome since 1999.", context} <= texts
    assert "liv" not in texts and "es in Oslo" not in texts
    assert "Ann lives in Oslo" not in span_texts(tokenizer, context, 3)


def test_no_span_contains_a_stop(tokenizer):
    newlines = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    texts = span_texts(tokenizer, "Bo is\na cat.", 64, newlines)
    assert "Bo is" in texts and "a cat." in texts and not any("\n" in text for text in texts)


def test_no_span_ends_within_a_letter(tokenizer):
    """A letter can have several tokens: the text would be right, but not that of the tokens."""
    spans = Spans(tokenizer, "Bo 日本語 🐱🐱 Øst", 64)
    assert any(not all(choice.may_end) for choice in spans.sequences)
    for choice in spans.sequences:
        for n, may_end in enumerate(choice.may_end, start=1):
            if may_end:
                text = tokenizer.decode(choice.token_ids[:n])
                assert text.strip() == spans.text(choice.token_ids[:n])


# Whole answers


class Search:
    """Constrained greedy decoding by its definition: all spans as token sequences in one list, and
    all tokens read again for each new one."""

    def __init__(self, answerer: Answerer, context: str):
        self.answerer = answerer
        self.sequences: dict[tuple[int, ...], str] = {}
        tokenizer = answerer.tokenizer
        starts = [i for i in range(len(context)) if self._begins(context, i)]
        for start in starts:
            rest = " " + context[start:]
            encoded = tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            for count in range(1, min(len(ids), answerer.max_new_tokens) + 1):
                if ids[count - 1] in answerer.stop_ids:
                    break
                text = tokenizer.decode(ids[:count])
                # The same bytes as in the context: no incomplete letter.
                span = rest[: offsets[count - 1][1]]
                same = unicodedata.normalize("NFC", span) == text
                same = same and self._ends(answerer.span_borders, context, start + len(span) - 1)
                if same and not is_scored_as_empty(span):
                    self.sequences.setdefault(tuple(ids[:count]), span.strip())
        abstention = tuple(tokenizer(" " + NO_ANSWER, add_special_tokens=False)["input_ids"])
        self.sequences.setdefault(abstention, NO_ANSWER)

    @staticmethod
    def _begins(context: str, i: int) -> bool:
        is_word = context[i].isalnum() or context[i] == "_"
        was_word = i > 0 and (context[i - 1].isalnum() or context[i - 1] == "_")
        return not context[i].isspace() and not (is_word and was_word)

    @staticmethod
    def _ends(borders: str, context: str, end: int) -> bool:
        """Not before an accent; by words not between two of their characters."""
        before, after = context[end - 1], context[end : end + 1]
        if after and unicodedata.combining(after):
            return False
        inside = all(c.isalnum() and not UNSPACED.match(c) for c in (before, after or " "))
        return borders == "characters" or not inside

    @torch.no_grad()
    def guess(self, prompt: tuple[str, str]) -> str:
        answerer = self.answerer
        encode = answerer.tokenizer
        read = [t for part in prompt for t in encode(part, add_special_tokens=False)["input_ids"]]
        chosen: tuple[int, ...] = ()
        while True:
            logits = answerer.model(torch.tensor([read + list(chosen)]))[0][0, -1]
            n = len(chosen)
            tokens = {s[n] for s in self.sequences if s[:n] == chosen and len(s) > n}
            if chosen in self.sequences:
                tokens |= answerer.stop_ids
            best = max(tokens, key=lambda token: float(logits[token]))
            if best in answerer.stop_ids:
                return self.sequences[chosen]
            chosen = (*chosen, best)


def answers(answerer: Answerer, prompts, contexts) -> list[str]:
    found = {}
    for batch in answerer.answer(prompts, contexts):
        found |= {place: answer.text for place, answer in batch.items()}
    return [found[place] for place in range(len(prompts))]


@pytest.fixture(scope="module")
def wild() -> Answerer:
    """Random weights, whose guesses differ for each prompt, with the tokenizer of models/demo."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    config = MambaConfig(len(tokenizer), d_model=32, n_layer=2, d_state=4, tie_embeddings=False)
    model = MambaLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.backbone.embeddings.weight.normal_()
    return Answerer(model, tokenizer, max_new_tokens=12)


@pytest.mark.parametrize("borders", ["words", "characters"])
@pytest.mark.parametrize(("source", "count"), [("demo", 20), ("squad", 10)])
def test_guesses_are_those_of_a_search_over_all_spans(wild, source, count, borders):
    """On `count` contexts with a trained model, on as many others with random weights."""
    path = (
        ROOT / "data/demo/validation.jsonl" if source == "demo" else SHARED / "squad/dev-v1.1.json"
    )
    if not path.exists():
        pytest.skip(f"real data not present: {path}")
    by_context = {example.context: example for example in read_examples(str(path))}
    trained = Answerer(*load_model_and_tokenizer(str(ROOT / "models/demo")), max_new_tokens=12)
    seen = set()
    for answerer, first in ((trained, 0), (wild, count)):
        answerer = Answerer(answerer.model, answerer.tokenizer, 12, span_borders=borders)
        examples = list(by_context.values())[first : first + count]
        prompts = [prompt_parts(e.context, e.question) for e in examples]
        contexts = [e.context for e in examples]
        found = answers(answerer, prompts, contexts)
        for example, prompt, guess in zip(examples, prompts, found, strict=True):
            assert guess == Search(answerer, example.context).guess(prompt)
        seen |= set(found)
    assert len(seen) > count / 2


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 1.0])
def test_every_guess_on_strange_text_is_a_span_or_the_abstention(wild, threshold):
    contexts = [STRANGE, STRANGE[::-1], "x", "I don't know. I know.", "日本", "Bo\u0301 is."] * 3
    prompts = [prompt_parts(context, f"Who is {i}?") for i, context in enumerate(contexts)]
    answerer = Answerer(wild.model, wild.tokenizer, 5, no_answer_threshold=threshold)
    for context, guess in zip(contexts, answers(answerer, prompts, contexts), strict=True):
        assert guess in context or guess == NO_ANSWER
        if threshold == 0.0:
            assert guess == NO_ANSWER
        elif threshold == 1.0:
            assert not is_scored_as_empty(guess)


@needs_data
def test_every_guess_on_real_questions_is_a_span_or_the_abstention():
    rows = (SHARED / "squad/squad_val_1k.jsonl").read_text("utf-8").splitlines()
    examples = [json.loads(row) for row in rows[:300]]
    tokenizer = load_tokenizer("", str(NEOX))
    torch.manual_seed(0)
    config = MambaConfig(len(tokenizer), d_model=16, n_layer=1, d_state=4)
    model = MambaLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_()
    prompts = [prompt_parts(e["context"], e["prompt"]) for e in examples]
    contexts = [e["context"] for e in examples]
    found = answers(Answerer(model, tokenizer, 8), prompts, contexts)
    assert len(found) == 300
    assert all(guess == NO_ANSWER or guess in c for guess, c in zip(found, contexts, strict=True))
    assert len(set(found)) > 100


# Borders, and tokenizers whose tokens depend on the text around them

ACCENTED = [
    "Zoe\u0301 Bru\u0302le\u0301 runs it.",  # decomposed
    "Zoé Brûlé runs it.",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}\ufe0f codes, he\u0308lp",
    "नमस्ते दुनिया and नि",
    "각 word 한국어",  # Hangul as jamo and as syllables
    "e\u0301\u0323x 1\u20e3 ok",
]


def graphemes(text: str) -> set[int]:
    """The ends of graphemes."""
    return {match.end() for match in regex.finditer(r"\X", text)}


@pytest.mark.parametrize("borders", ["words", "characters"])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFD()], ids=str)
def test_a_span_never_ends_within_a_character(normalizer, borders):
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    for context in ACCENTED:
        spans = Spans(tokenizer, context, 40, borders=borders).items()
        assert spans
        for text, _ in spans:
            start = context.index(text)
            assert start + len(text) in graphemes(context)
            assert start == 0 or start in graphemes(context)
    texts = {text.strip() for text, _ in Spans(tokenizer, ACCENTED[0], 40, borders=borders).items()}
    assert "Zoe\u0301 Bru\u0302le\u0301" in texts and "Bru\u0302le\u0301" in texts


def test_a_span_ends_within_a_word_only_by_characters(wild):
    def texts(borders: str) -> set[str]:
        found = Spans(
            wild.tokenizer, "It is unfathomably 1234567 old.", 40, borders=borders
        ).items()
        return {text for text, _ in found}

    words, characters = texts("words"), texts("characters")
    assert words < characters
    assert "unfathomably" in words and "1234567" in words
    assert not any(text.endswith(("unf", "unfa", "12", "123")) for text in words)
    assert any("unfathomably".startswith(text) and text != "unfathomably" for text in characters)


def test_text_without_spaces_has_spans_of_its_parts(wild):
    texts = {text for text, _ in Spans(wild.tokenizer, "東京タワーは赤い。", 40).items()}
    assert {"東京", "東京タワー", "赤い"} <= texts


@needs_data
@pytest.mark.parametrize("name", ["demo", "neox"])
def test_every_span_has_the_tokens_of_an_answer_in_training(name):
    path = NEOX if name == "neox" else ROOT / "data/demo/tokenizer"
    tokenizer = load_tokenizer("", str(path))
    require_pieces(tokenizer)
    contexts = sorted({e.context for e in read_examples(str(SHARED / "squad/dev-v1.1.json"))})
    for borders in ("words", "characters"):
        spans = [
            s for c in contexts[::200] for s in Spans(tokenizer, c, 30, borders=borders).items()
        ]
        expected = encode(tokenizer, [answer_text(text) for text, _ in spans])
        assert len(spans) > 10_000
        assert [ids for _, ids in spans] == expected


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
@pytest.mark.parametrize("split", [True, False])
def test_a_tokenizer_whose_tokens_depend_on_their_place_is_refused(prepend, split, wild, tmp_path):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend, split=split)
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "</s>"], vocab_size=400, show_progress=False
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text("utf-8")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer("", str(tmp_path))
    answerer = Answerer(wild.model, loaded, max_new_tokens=4)
    text = "The Wild Swan has 12 rooms."
    try:
        answers(answerer, [(text, "Q")], [text])
    except UserError as error:
        assert "gives a text other tokens within a longer text" in str(error)
    else:  # spans have the tokens of answers in training
        spans = Spans(loaded, text, 30).items()
        assert [ids for _, ids in spans] == encode(loaded, [answer_text(t) for t, _ in spans])
        assert (prepend, split) == ("never", True)
    [batch] = answerer.answer([(text, "Q")])  # it may be used without the constraint
    assert len(batch) == 1


def test_a_space_that_is_a_token_of_its_own_ends_no_span(wild, tmp_path):
    """As with Falcon's tokenizer: the space before a digit is a token without offsets."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    parts.append(pre_tokenizers.Digits(individual_digits=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the Super Bowl 50 of 2016"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer("", str(tmp_path / "tokenizer.json"))
    require_pieces(loaded)
    spans = Spans(loaded, "He won the Super Bowl 50 in 2016.", 40).items()
    assert {"Super Bowl", "Super Bowl 50", "50", "2016"} <= {text for text, _ in spans}
    assert [ids for _, ids in spans] == encode(loaded, [answer_text(text) for text, _ in spans])
