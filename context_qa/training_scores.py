"""Scores of a model while it is trained, by the answering loop of evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from accelerate import PartialState
from tqdm import tqdm

from context_qa.answering import Answerer
from context_qa.metrics import abstention
from context_qa.negatives import unanswerable_copies
from context_qa.processes import in_step
from context_qa.results import result_row
from mamba_lm.model import MambaLM
from squad_utils import Example, prompt_parts, same_question

SCORES = (
    "exact_match",
    "f1",
    "answerable_exact_match",
    "unanswerable_exact_match",
    "abstention_f1",
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
    examples: Sequence[Example], tokenizer, prompt_order: str
) -> Callable[[MambaLM, Callable[[], None]], dict[str, float]]:
    """A function (model, poll) that answers the examples, greedily, and returns their scores in
    percent: `training_scores`. All processes take part, and all get them; poll is called after each
    batch."""
    prompts = [prompt_parts(e.context, e.question, prompt_order) for e in examples]
    state = PartialState()

    def score(model: MambaLM, poll: Callable[[], None] = lambda: None) -> dict[str, float]:
        answers = Answerer(model, tokenizer).answer(
            prompts, part=state.process_index, parts=state.num_processes
        )
        rows = []
        with tqdm(
            total=len(examples), unit="question", desc="scoring", leave=False,
            disable=not state.is_main_process,
        ) as progress:  # fmt: skip
            for step in in_step(answers):
                for batch in step:
                    rows += [result_row(idx, examples[idx], a) for idx, a in batch.items()]
                progress.update(len(rows) - progress.n)
                poll()
        return training_scores(sorted(rows, key=lambda row: row["idx"]))

    return score


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
