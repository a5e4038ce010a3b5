"""The one training engine: loss on suffixes that go on from shared prefixes, by `Trainer`.

A batch holds each prefix once, however many suffixes share it. One forward reads the prefixes,
forks their states into the suffixes, reads those and takes the loss; gradients flow back through
the forked states, so that the result is that of independent examples.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments

from errors import UserError
from mamba_lm.checkpoint import load_weights, read_weights, save_model
from mamba_lm.model import MambaLM, at_least_float32, right_pad

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Token ids of one training example: loss falls on `target`, read after prefix and prompt."""

    prefix: Sequence[int]
    prompt: Sequence[int]
    target: Sequence[int]

    def __post_init__(self):
        if not self.prompt or not self.target:
            raise ValueError("a continuation needs a prompt and a target of one token at least")


def collate(examples: Iterable[Continuation]) -> dict[str, Tensor]:
    """A batch for `PrefixSuffixLM`: equal prefixes are read once.

    prefixes (c, l_c) and their lengths (c,); suffixes (q, l_q), prompt and target without its last
    token, and their lengths (q,); prefix_index (q,); labels (q, l_q), the next token of each
    position where there is loss and IGNORED elsewhere.
    """
    places: dict[tuple[int, ...], int] = {}
    index, suffixes, labels = [], [], []
    for example in examples:
        index.append(places.setdefault(tuple(example.prefix), len(places)))
        suffixes.append([*example.prompt, *example.target[:-1]])
        labels.append([IGNORED] * (len(example.prompt) - 1) + list(example.target))
    prefixes, prefix_lengths = right_pad(list(places))
    padded, suffix_lengths = right_pad(suffixes)
    return {
        "prefixes": prefixes,
        "prefix_lengths": prefix_lengths,
        "suffixes": padded,
        "suffix_lengths": suffix_lengths,
        "prefix_index": torch.tensor(index),
        "labels": right_pad(labels, value=IGNORED)[0],
    }


class PrefixSuffixLM(nn.Module):
    """A language model with the loss that the Trainer asks for."""

    accepts_loss_kwargs = True  # the Trainer then counts the labels of a whole optimiser step

    def __init__(self, model: MambaLM):
        super().__init__()
        self.model = model

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """A batch as `collate` makes it. Returns loss: the sum of cross-entropy over the labels /
        num_items_in_batch, by default the labels of this batch."""
        losses, _ = self.token_losses(labels=labels, **batch)
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / count}

    def token_losses(
        self,
        prefixes: Tensor,
        prefix_lengths: Tensor,
        suffixes: Tensor,
        suffix_lengths: Tensor,
        prefix_index: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy (k,) at each of a batch's k labels, and the suffix (k,) it belongs to."""
        state = None
        if prefixes.shape[1] > 0:
            _, state = self.model.encode(prefixes, lengths=prefix_lengths)
            state = state.fork(prefix_index)
        hidden, _ = self.model.encode(suffixes, state, suffix_lengths, keep_state=False)
        # Logits only where there is loss; index_select, because its gradient is reproducible.
        at = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        logits = at_least_float32(self.model.lm_head(hidden.flatten(0, 1).index_select(0, at)))
        losses = F.cross_entropy(logits, labels.flatten()[at], reduction="none")
        return losses, at // labels.shape[1]


class _Tokenized(Dataset[Continuation]):
    """What a sampler yields, made token ids when it is asked for."""

    def __init__(self, length: int, tokenize: Callable[[Any], Continuation]):
        self.length, self.tokenize = length, tokenize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, example: Any) -> Continuation:
        return self.tokenize(example)


class _Batches(DataLoader):
    """A DataLoader that tells its batch sampler of a new epoch."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batch_sampler, "set_epoch"):
            self.batch_sampler.set_epoch(epoch)


class PrefixSuffixTrainer(Trainer):
    """Trainer for `PrefixSuffixLM`: our batches, our checkpoints, no decay of the SSM's own."""

    def __init__(
        self,
        model: MambaLM,
        arguments: TrainingArguments,
        batches: Sampler[list],
        tokenize: Callable[[Any], Continuation],
        tokenizer,
    ):
        """batches yields lists of the examples themselves, in any form that `tokenize` understands:
        this process's, as many as every other process gets. Its optional set_epoch(epoch) is called
        before each epoch."""
        self.language_model = model
        self.batches = batches
        super().__init__(
            PrefixSuffixLM(model),
            arguments,
            # Its length is for the Trainer's count of examples a second.
            train_dataset=_Tokenized(len(batches) * arguments.train_batch_size, tokenize),
            data_collator=collate,
            processing_class=tokenizer,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Our batches as they are: the Trainer would cut its own, and repeat examples to give every
        process as many."""
        return _Batches(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the GPU, but for the lengths: `MambaLM.encode` then need not wait for them."""
        on_host = {name: value for name, value in inputs.items() if name.endswith("lengths")}
        return super()._prepare_inputs(inputs) | on_host

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but A_log, D, norms and biases, as in Mamba's own training."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and not name.endswith("A_log")
        ]

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}: "
                "lower --learning_rate or look at the data of that step"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_model(self.language_model, output_dir or self.args.output_dir, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        load_weights(self.language_model, read_weights(folder), folder)


def training_arguments(
    output: str, device: torch.device, overrides: Sequence[str] = (), **settings
) -> TrainingArguments:
    """TrainingArguments with this project's defaults.

    settings: fields of TrainingArguments. overrides: "KEY=VALUE" strings for any other field, the
    value as JSON or plain text. UserError on a field that TrainingArguments does not have.
    """
    fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or key not in fields:
            raise UserError(f"--trainer {override}: give KEY=VALUE, a field of TrainingArguments")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
        if isinstance(fields[key], int | float) and isinstance(settings[key], str):
            raise UserError(f"training arguments: {override}: give a number, true or false")
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": 20,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",  # autocast; the weights stay in float32
    }
    try:
        arguments = TrainingArguments(output_dir=output, **(defaults | settings))
    except (ValueError, TypeError) as error:
        raise UserError(f"training arguments: {error}") from error
    if arguments.train_batch_size < 1:
        raise UserError("training arguments: per_device_train_batch_size must be 1 or more")
    # Without torchrun the Trainer would split our batches over several GPUs with nn.DataParallel,
    # whose prefix_index would then point into another GPU's prefixes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
