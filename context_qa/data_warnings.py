"""What makes training or scores mean something else than they seem to, in words."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from mamba_lm.checkpoint import find_model
from mamba_lm.tokenizer import encode
from squad_utils import Example, answer_text, exact_match, folded_answer, normalize_answer


def data_warnings(
    examples: Sequence[Example],
    tokenizer=None,
    stop_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """A line for each kind of doubtful rows: ids that are there twice, references that the official
    script takes for no answer, and, given a tokenizer, references that no guess can match, since
    decoding would stop before their end or writes them in another way."""
    yield from _repeated_ids(examples)
    yield from _empty_references(examples)
    if tokenizer is not None:
        yield from _unreachable_references(examples, tokenizer, stop_ids, max_new_tokens)


def model_warnings(model: str) -> Iterator[str]:
    """A line if a model of this name has not been trained."""
    if find_model(model).is_random:
        yield (
            f"{model} is a config file: the weights are RANDOM, and answers and scores say nothing "
            "about a trained model"
        )


def _repeated_ids(examples: Sequence[Example]) -> Iterator[str]:
    counts = Counter(example.id for example in examples)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        yield f"{len(repeated):,} ids are there more than once, such as {repeated[0]!r:.40}"


def _empty_references(examples: Sequence[Example]) -> Iterator[str]:
    empty = [e for e in examples if e.answers and not any(map(normalize_answer, e.answers))]
    if empty:
        yield (
            f"{len(empty):,} questions have no reference but articles and punctuation, such as "
            f"{empty[0].answers[0]!r:.40} (id {empty[0].id!r:.40}): the official script scores "
            "them as if to abstain was right"
        )


def _unreachable_references(
    examples: Sequence[Example], tokenizer, stop_ids: Collection[int], max_new_tokens: int | None
) -> Iterator[str]:
    answers = list(dict.fromkeys(answer for example in examples for answer in example.answers))
    if not answers:
        return
    ids = encode(tokenizer, [answer_text(answer) for answer in answers])
    said = [_until_stop(row, stop_ids)[:max_new_tokens] for row in ids]
    written = dict(zip(answers, map(str.strip, tokenizer.batch_decode(said)), strict=True))
    in_other_form, unreachable = [], []
    for example in examples:
        guesses = [written[answer] for answer in example.answers]
        if not guesses or any(exact_match(guess, example.answers) for guess in guesses):
            continue
        references = set(map(folded_answer, example.answers))
        is_same = not references.isdisjoint(map(folded_answer, guesses))
        (in_other_form if is_same else unreachable).append(example)
    if in_other_form:
        yield (
            f"{_such_as(in_other_form, written)}: the tokenizer writes other Unicode characters. "
            "Exact match and F1 count them as wrong; folded_exact_match does not"
        )
    if unreachable:
        yield (
            f"{_such_as(unreachable, written)}: decoding ends at a line's end, at --max_new_tokens "
            "or at end-of-text, or the tokenizer has no such characters. No guess can match them"
        )


def _until_stop(ids: Sequence[int], stop_ids: Collection[int]) -> Sequence[int]:
    return ids[: next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))]


def _such_as(examples: Sequence[Example], written: dict[str, str]) -> str:
    example = examples[0]
    answer = example.answers[0]
    return (
        f"{len(examples):,} questions have no reference that a guess can be, such as "
        f"{answer!r:.60} (id {example.id!r:.40}), of which it can be {written[answer]!r:.60}"
    )
