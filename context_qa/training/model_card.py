"""README.md of a trained model: what it is, how it is used, what it was trained on, its limits."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from common.errors import printable
from common.output_files import Kind
from context_qa.training import TrainingSettings
from context_qa.training.data_report import DataReport
from context_qa.training.scores import LOSS
from squad_utils import PROMPT_ORDERS, prompt_parts

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mamba, context-question-answering, abstention]
---

# {name}

A Mamba language model that answers a question from a given context, and answers "I don't know."
where the context does not contain the answer. It was trained with Mamba Dive, from `{model}`.

## Use

With Mamba Dive, from its folder:

```
{commands}
```

It loads in `transformers.AutoModelForCausalLM`. The prompt ({prompt_order}) has two parts that are
tokenized separately, without special tokens:

```
{prefix!r}
{suffix!r}
```

The answer ends before end-of-text or the first token that contains a newline. Where a token
contains a punctuation mark and a newline, the mark is not part of the answer.

## Training

{data}
- from `{data_path}`; negatives: {negatives}, up to {negative_ratio:g} unanswerable examples for
  each answerable one
- {steps:,} optimizer steps of {batch_size} x {gradient_accumulation_steps} questions per process,
  {epochs:.2f} epochs, learning rate {learning_rate:g}; these are the weights
  after step {step_of_model:,}
- every argument, versions and hashes: `training_args.json`; the log: `training_log.jsonl`,
  `training_log.png`

## Scores

{scores}

## Limits

- It was trained to answer from the context alone, in few words, and to abstain; it still answers
  some questions wrongly, and some that the context does not answer.
- It has not been scored on anything else: other languages, other kinds of text, contexts longer
  than {longest:,} tokens, the longest example it has seen.
"""


_TRAINED_HERE = b"It was trained with Mamba Dive"
MODEL_CARD = Kind("the card of a trained model", lambda stream: _TRAINED_HERE in stream.read())


def make_model_card(
    settings: TrainingSettings,
    report: DataReport,
    steps: Mapping[str, float],
    scores: Mapping[str, float],
) -> str:
    """The card of a model trained with these settings. steps: `steps` and `epochs` of the run, and
    `step_of_model`; scores: in percent, on eval_data, if that was given."""
    if scores:
        lines = [f"On `{settings.eval_data}`, greedily, in percent:", "", "| | |", "|---|---|"]
        lines += [
            f"| {name.replace('_', ' ')} | {value:.1f} |"
            for name, value in scores.items()
            if name != LOSS
        ]
        if LOSS in scores:
            lines += [
                "",
                f"The loss on its reference answers is {scores[LOSS]:.3f} nats per token.",
            ]
    else:
        lines = ["None: it was trained without `--eval_data`."]
    prefix, suffix = prompt_parts("{context}", "{question}", settings.prompt_order)
    name = Path(settings.output).name
    commands = [f"python eval_mamba_with_context.py {settings.output} DATA results/{name}.jsonl"]
    if settings.prompt_order == PROMPT_ORDERS[0]:  # the one that the console speaks
        commands.insert(0, f"python prompt_mamba_with_context.py {settings.output}")
    card = _CARD.format(
        **dataclasses.asdict(settings) | steps,
        name=name,
        commands="\n".join(commands),
        prefix=prefix,
        suffix=suffix,
        data="\n".join(f"- {line}" for line in str(report).splitlines()),
        longest=report.longest,
        scores="\n".join(lines),
    )
    return printable(card, keep="\n")  # names and paths are foreign text
