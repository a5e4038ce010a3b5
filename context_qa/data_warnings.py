"""Warnings about data and models that limit the meaning of training or of scores."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from context_qa.arguments import MAX_NEW_TOKENS
from context_qa.prompts import PromptTokens
from mamba_lm.checkpoint import find_model
from squad_utils import Example, exact_match, folded_answer, normalize_answer


def data_warnings(
    source: str,
    examples: Sequence[Example],
    tokenizer=None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    is_constrained: bool = False,
    is_training: bool = False,
) -> Iterator[str]:
    """A warning for each kind of problem in the rows: repeated ids, references that the official
    script scores as no answer, and, given a tokenizer, references that no guess can match, since
    decoding stops before their end or changes their characters.

    is_constrained: guesses are spans of the context. is_training: the model is trained on the first
    reference, which a guess must be able to match.
    """
    found = [*_repeated_ids(examples), *_empty_references(examples)]
    if tokenizer is not None:
        answers = list(dict.fromkeys(answer for e in examples for answer in e.answers))
        written = _as_decoded(answers, tokenizer, max_new_tokens)
        found += _unreachable_references(
            examples, written, max_new_tokens, is_constrained, is_training
        )
    yield from (f"{source}: {warning}" for warning in found)


def model_warnings(model: str) -> Iterator[str]:
    """A warning if the model has random weights."""
    if find_model(model).is_random:
        yield (
            f"{model} is a config file: the weights are RANDOM, and answers and scores say nothing "
            "about a trained model"
        )


def _repeated_ids(examples: Sequence[Example]) -> Iterator[str]:
    counts = Counter(example.id for example in examples)
    repeated = [name for name, count in counts.items() if count > 1]
    if len(repeated) == 1:
        yield f"1 id occurs more than once: {repeated[0]!r:.40}"
    elif repeated:
        yield f"{len(repeated):,} ids occur more than once, such as {repeated[0]!r:.40}"


def _empty_references(examples: Sequence[Example]) -> Iterator[str]:
    empty = [e for e in examples if e.answers and not any(map(normalize_answer, e.answers))]
    if empty:
        have, them = ("has", "it") if len(empty) == 1 else ("have", "them")
        yield (
            f"{_count(empty)} {have} no reference but articles and punctuation"
            f"{_give_example(empty)}. The official script scores {them} as if abstaining were right"
        )


def _as_decoded(
    answers: Sequence[str], tokenizer, max_new_tokens: int
) -> dict[str, tuple[str, bool]]:
    """For each answer the guess that decoding makes of it, and whether no token was cut off."""
    if not answers:
        return {}
    tokens = PromptTokens(tokenizer)
    stop_ids, ids = tokens.stop_ids, tokens.encode_answers(answers)
    ends = [next((n for n, token in enumerate(row) if token in stop_ids), len(row)) for row in ids]
    cut = [row[: min(end, max_new_tokens)] for row, end in zip(ids, ends, strict=True)]
    texts = map(str.strip, tokenizer.batch_decode(cut))
    return {
        answer: (text, len(row) == len(kept))
        for answer, text, row, kept in zip(answers, texts, ids, cut, strict=True)
    }


def _unreachable_references(
    examples: Sequence[Example],
    written: Mapping[str, tuple[str, bool]],
    max_new_tokens: int,
    is_constrained: bool,
    is_training: bool,
) -> Iterator[str]:
    in_other_form, unreachable = [], []
    for example in examples:
        answers = example.answers[:1] if is_training else example.answers
        if is_constrained:
            guesses = [a for a in answers if written[a][1] and _is_in_context(a, example.context)]
        else:
            guesses = [written[answer][0] for answer in answers]
        if not answers or any(exact_match(guess, example.answers) for guess in guesses):
            continue
        references = set(map(folded_answer, example.answers))
        is_same = not references.isdisjoint(map(folded_answer, guesses))
        (in_other_form if is_same else unreachable).append(example)
    for affected in filter(None, (in_other_form, unreachable)):
        one = len(affected) == 1
        what = (
            f"{'teaches' if one else 'teach'} an answer that no guess can be"
            if is_training
            else f"{'has' if one else 'have'} no reference that a guess can match"
        )
        guess = "" if is_constrained else written[affected[0].target][0]
        yield (
            f"{_count(affected)} {what}{_give_example(affected, guess)}. "
            f"{_reason(affected is in_other_form, is_constrained, max_new_tokens)}"
        )


def _is_in_context(answer: str, context: str) -> bool:
    """Whether some text within a line of the context is an exact match with the answer."""
    if answer.strip() in context:
        return True
    normalized = f" {normalize_answer(answer)} "
    return any(normalized in f" {normalize_answer(line)} " for line in context.split("\n"))


def _reason(is_in_other_form: bool, is_constrained: bool, max_new_tokens: int) -> str:
    if is_in_other_form:
        return (
            "The tokenizer writes other Unicode characters. Exact match and F1 count them as "
            "wrong; folded_exact_match does not"
        )
    last = "it is not in its context" if is_constrained else "the tokenizer has no such characters"
    return (
        "An answer is cut at the end of a line, at the end-of-text token or after "
        f"{max_new_tokens:,} tokens, or {last}"
    )


def _count(examples: Sequence[Example]) -> str:
    return f"{len(examples):,} question{'s' * (len(examples) > 1)}"


def _give_example(examples: Sequence[Example], guess: str = "") -> str:
    example = examples[0]
    of = ":" if len(examples) == 1 else ", such as"
    cut = f", of which a guess can be {_quote(guess)}" if guess else ""
    return f"{of} {_quote(example.target)} (id {example.id!r:.40}){cut}"


def _quote(text: str) -> str:
    """The text in quotes, a long one without its middle: what is cut is the end."""
    quoted = repr(text)
    return quoted if len(quoted) <= 60 else f"{quoted[:30]} ... {quoted[-25:]}"
