"""Scores of a model while it is trained, by the answering loop of evaluation, and its loss."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate import PartialState
from tqdm import tqdm

from common.errors import UserError
from common.processes import gather_batches
from context_qa.answering import Answerer
from context_qa.negatives import unanswerable_copies
from context_qa.results.metrics import abstention
from context_qa.results.rows import Answer, result_row
from mamba_lm.models.mamba import MambaLM, MambaState
from mamba_lm.tokenizer import token_ids
from mamba_lm.training.prefix_suffix import Continuation, collate, suffix_losses
from squad_utils import Example, answer_text, prompt_parts, same_question

LOSS = "loss"
SCORES = (  # in the order in which they are shown
    "exact_match",
    "f1",
    "answerable_exact_match",
    "unanswerable_exact_match",
    "abstention_f1",
    LOSS,
)


def examples_to_score(examples: Sequence[Example], negatives: str | None) -> list[Example]:
    """The examples; with unanswerable copies of this kind where none is unanswerable, for else the
    best model would be one that never abstains."""
    if negatives is None or not examples or not all(e.is_answerable for e in examples):
        return list(examples)
    return [*examples, *unanswerable_copies(examples, negatives)]


def doubts(scored: Sequence[Example], trained: Sequence[Example]) -> Iterator[str]:
    """Why scores on these examples may choose a bad model, a line each; trained is learnt from."""
    if not scored:
        return
    num_answerable = sum(example.is_answerable for example in scored)
    if num_answerable == 0:
        yield "no question of --eval_data has an answer: the best model will be one that abstains"
    if num_answerable == len(scored):
        yield "all of --eval_data have answers: the best model will be one that never abstains"
    known = {same_question(example.context, example.question) for example in trained}
    if num_known := sum(same_question(e.context, e.question) in known for e in scored):
        yield f"{num_known:,} of {len(scored):,} questions of --eval_data are also trained on"


def scorer(
    examples: Sequence[Example], tokenizer, prompt_order: str, metric: str | None = None
) -> Callable[[MambaLM, Callable[[], None]], dict[str, float]]:
    """A function (model, poll) that answers the examples, greedily, and returns their scores in
    percent, `training_scores`, and the loss: the mean cross-entropy of what training would teach on
    them, in nats a token. All processes take part, and all get them; poll is called after each
    batch. UserError if `metric`, by which models will be compared, is none of these."""
    known = _names(examples)
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(f"metric_for_best_model={metric}: choose from {', '.join(known)}")
    prompts = [prompt_parts(e.context, e.question, prompt_order) for e in examples]
    state = PartialState()

    def continuations(places: Sequence[int]) -> list[Continuation]:
        """Without their prefixes."""
        return [
            Continuation(
                prefix=(),
                prompt=token_ids(tokenizer, prompts[place][1]),
                target=[
                    *token_ids(tokenizer, answer_text(examples[place].target)),
                    tokenizer.eos_token_id,
                ],
            )
            for place in places
        ]

    def score(model: MambaLM, poll: Callable[[], None] = lambda: None) -> dict[str, float]:
        losses: dict[int, tuple[float, int]] = {}  # sum and number of tokens

        def note_losses(places: Sequence[int], forked: MambaState) -> None:
            losses.update(zip(places, _losses(model, forked, continuations(places)), strict=True))

        answers = Answerer(model, tokenizer).answer(
            prompts, part=state.process_index, parts=state.num_processes, on_state=note_losses
        )
        found: dict[int, tuple[Answer, tuple[float, int]]] = {}
        with tqdm(
            total=len(examples), unit="question", desc="scoring", leave=False,
            disable=not state.is_main_process,
        ) as progress:  # fmt: skip
            for step in gather_batches(
                {i: (a, losses[i]) for i, a in batch.items()} for batch in answers
            ):
                for batch in step:
                    found |= batch
                progress.update(len(found) - progress.n)
                poll()
        rows = [result_row(idx, examples[idx], found[idx][0]) for idx in sorted(found)]
        sums, counts = zip(*(loss for _, loss in found.values()), strict=True)
        loss = math.fsum(sums) / sum(counts)  # the same for any division among processes
        if not math.isfinite(loss):
            raise UserError(f"the loss on --eval_data became {loss}; lower --learning_rate")
        return training_scores(rows) | {LOSS: loss}

    return score


@torch.inference_mode()
def _losses(
    model: MambaLM, state: MambaState, examples: Sequence[Continuation]
) -> list[tuple[float, int]]:
    """Of each, read from its row of a state: the sum of cross-entropy over its target's tokens, and
    their number."""
    device = state.device
    batch = collate(examples)
    losses, rows = suffix_losses(
        model,
        state,
        batch["suffixes"].to(device),
        batch["suffix_lengths"],
        batch["labels"].to(device),
    )
    sums = torch.zeros(len(examples), dtype=torch.float64)
    sums.index_add_(0, rows.cpu(), losses.double().cpu())
    return [(total, len(e.target)) for total, e in zip(sums.tolist(), examples, strict=True)]


def _names(examples: Sequence[Example]) -> list[str]:
    """Of the figures that there will be of these examples."""
    is_mixed = len({example.is_answerable for example in examples}) == 2
    return [name for name in SCORES if is_mixed or name in ("exact_match", "f1", LOSS)]


def training_scores(rows: Sequence[Mapping]) -> dict[str, float]:
    """Exact match and F1 of all questions; exact match of those with and without an answer; F1 of
    abstention. What there is no question for is left out."""
    answerable = [row for row in rows if row["answers"]]
    unanswerable = [row for row in rows if not row["answers"]]

    def mean(metric: str, of: Sequence[Mapping]) -> float:
        return 100 * sum(row[metric] for row in of) / len(of)

    found = {"exact_match": mean("exact_match", rows), "f1": mean("f1", rows)}
    if answerable and unanswerable:
        found["answerable_exact_match"] = mean("exact_match", answerable)
        found["unanswerable_exact_match"] = mean("exact_match", unanswerable)
        found["abstention_f1"] = abstention(rows)["f1"]
    return found
