"""Scores of a model while it is trained, by the answering loop of evaluation, and its loss."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate import PartialState
from tqdm import tqdm

from common.errors import UserError
from common.processes import gather_batches
from context_qa.answering import Answerer
from context_qa.negatives import make_negatives
from context_qa.prompts import PromptTokens
from context_qa.results.metrics import abstention
from context_qa.results.rows import Answer, result_row
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState
from mamba_lm.training.prefix_suffix import Item, collate, suffix_losses
from squad_utils import Example, prompt_parts, same_question

LOSS = "loss"
SCORES = (  # in the order in which they are shown
    "exact_match",
    "f1",
    "answerable_exact_match",
    "unanswerable_exact_match",
    "abstention_f1",
    LOSS,
)


def scored_examples(examples: Sequence[Example], negatives: str | None) -> list[Example]:
    """The examples; with negatives of this kind if all are answerable: without them the best model
    would be one that never abstains."""
    if negatives is None or not examples or not all(e.is_answerable for e in examples):
        return list(examples)
    return [*examples, *make_negatives(examples, negatives)]


def find_score_problems(scored: Sequence[Example], trained: Sequence[Example]) -> Iterator[str]:
    """Reasons why scores on these examples may choose a bad model, a line each; trained: those of
    the training data."""
    if not scored:
        return
    num_answerable = sum(example.is_answerable for example in scored)
    data = "questions of the evaluation data"
    if num_answerable == 0:
        yield f"none of the {data} has an answer: the best model will be one that abstains"
    if num_answerable == len(scored):
        yield f"all {data} have answers: the best model will never abstain"
    known = {same_question(example.context, example.question) for example in trained}
    if num_known := sum(same_question(e.context, e.question) in known for e in scored):
        yield f"{num_known:,} of {len(scored):,} {data} are trained on too"


def make_scorer(
    examples: Sequence[Example], tokenizer, prompt_order: str, metric: str | None = None
) -> Callable[[LanguageModel, Callable[[], None]], dict[str, float]]:
    """A function (model, poll) that answers the examples, greedily, and returns their scores in
    percent (`training_scores`) and their loss: the mean cross-entropy of the targets that training
    on them would have, in nats per token. All processes share the work, and all get the scores;
    poll is called after each batch. UserError if `metric`, by which models will be compared, is not
    one of the scores."""
    known = _score_names(examples)
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(f"metric_for_best_model={metric}: choose from {', '.join(known)}")
    prompts = [prompt_parts(e.context, e.question, prompt_order) for e in examples]
    state = PartialState()

    def make_items(suffixes: Mapping[int, Sequence[int]]) -> list[Item]:
        """Without their prefixes."""
        targets = PromptTokens(tokenizer).encode_targets([examples[n].target for n in suffixes])
        pairs = zip(suffixes.values(), targets, strict=True)
        return [Item.with_target(prefix=(), start=start, target=target) for start, target in pairs]

    def score(model: LanguageModel, poll: Callable[[], None] = lambda: None) -> dict[str, float]:
        losses: dict[int, tuple[float, int]] = {}  # sum and number of tokens

        def note_losses(suffixes: Mapping[int, Sequence[int]], forked: MambaState) -> None:
            found = _losses(model, forked, make_items(suffixes))
            losses.update(zip(suffixes, found, strict=True))

        answers = Answerer(model, tokenizer).answer(
            prompts, rank=state.process_index, world_size=state.num_processes, on_state=note_losses
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
        loss = math.fsum(sums) / sum(counts)  # the same for any number of processes
        if not math.isfinite(loss):
            raise UserError(
                f"the loss on the evaluation data became {loss}; lower the learning rate"
            )
        return training_scores(rows) | {LOSS: loss}

    return score


@torch.inference_mode()
def _losses(
    model: LanguageModel, state: MambaState, examples: Sequence[Item]
) -> list[tuple[float, int]]:
    """For each item, read from its row of a state: the sum of cross-entropy over its labels, and
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
    return [(total, e.num_labels) for total, e in zip(sums.tolist(), examples, strict=True)]


def _score_names(examples: Sequence[Example]) -> list[str]:
    """The names of the scores that these examples give."""
    is_mixed = len({example.is_answerable for example in examples}) == 2
    return [name for name in SCORES if is_mixed or name in ("exact_match", "f1", LOSS)]


def training_scores(rows: Sequence[Mapping]) -> dict[str, float]:
    """Exact match and F1 of all questions; if some have an answer and some have none, also exact
    match of either kind and F1 of abstention."""
    answerable = [row for row in rows if row["answers"]]
    unanswerable = [row for row in rows if not row["answers"]]

    def mean(metric: str, rows: Sequence[Mapping]) -> float:
        return 100 * sum(row[metric] for row in rows) / len(rows)

    found = {"exact_match": mean("exact_match", rows), "f1": mean("f1", rows)}
    if answerable and unanswerable:
        found["answerable_exact_match"] = mean("exact_match", answerable)
        found["unanswerable_exact_match"] = mean("exact_match", unanswerable)
        found["abstention_f1"] = abstention(rows)["f1"]
    return found


def scores_at(log: Sequence[Mapping], step: int) -> dict[str, float]:
    """The scores in a training log of the model as it was after a step; empty if it has none."""
    row = {name: value for each in log if each["step"] == step for name, value in each.items()}
    return {name: row[f"eval_{name}"] for name in SCORES if f"eval_{name}" in row}
