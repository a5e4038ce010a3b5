"""The one training engine: examples that share prefixes, by transformers' `Trainer`."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProgressCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from common.errors import UserError
from mamba_lm.checkpoint import load_weights
from mamba_lm.models.interface import LanguageModel
from mamba_lm.training.arguments import blaming_arguments
from mamba_lm.training.prefix_suffix import IGNORED, Continuation, PrefixSuffixLM, collate
from mamba_lm.training.progress import Progress, TrainingLog
from mamba_lm.training.resumable_trainer import ResumableTrainer
from mamba_lm.training.sharding import shard, whole

MAX_IDS = 64  # of examples that one message names


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


def _ignore_signals(worker: int) -> None:
    """What is sent to all of a run's processes is for the one that saves a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _named_batch(examples: Sequence[Continuation]) -> dict[str, Tensor | list[str]]:
    return collate(examples) | {"ids": [example.id for example in examples]}


class PrefixSuffixTrainer(ResumableTrainer):
    """Trainer for `PrefixSuffixLM`: our batches and scores, no decay of the SSM's own, and a stop
    where the loss or a gradient is no finite number."""

    def __init__(
        self,
        model: LanguageModel,
        arguments: TrainingArguments,
        batches: Sampler[list],
        tokenize: Callable[[Any], Continuation],
        tokenizer,
        score: Callable[[LanguageModel, Callable[[], None]], Mapping[str, float]] | None = None,
        patience: int = 5,
        sharded: bool = False,
    ):
        """batches yields lists of the examples themselves, in any form that `tokenize` understands:
        this process's, as many as every other process gets. Its optional set_epoch(epoch) is called
        before each epoch. score(model, poll) gives the figures of an evaluation, the same in every
        process, each of which calls poll() now and then, as often as the others; after `patience`
        evaluations without a better one, training ends. Sharded, each of several processes keeps
        its part of the weights and of what the optimiser knows."""
        self.batches, self.score = batches, score
        evaluates = arguments.eval_strategy != IntervalStrategy.NO or arguments.eval_on_start
        if evaluates and score is None:
            raise UserError("training arguments: evaluation needs --eval_data")
        if arguments.metric_for_best_model is not None and score is None:
            raise UserError("training arguments: metric_for_best_model needs --eval_data")
        if sharded and arguments.world_size < 2:
            raise UserError("--fully_shard: needs two processes or more, by torchrun")
        module = PrefixSuffixLM(model)
        if sharded:
            shard(module.to(arguments.device), list(model.blocks), arguments.device.type)
        with blaming_arguments():  # an integration that is not installed, mostly
            super().__init__(
                model,
                module,
                arguments,
                patience,
                train_dataset=_Tokenized(len(batches) * arguments.train_batch_size, tokenize),
                eval_dataset=[] if score is not None else None,  # or it would ask for one
                data_collator=_named_batch,
                processing_class=tokenizer,
            )
        self.is_distributed_loading_by_transformers = sharded  # it is not to wrap the module
        self.add_callback(TrainingLog())
        self._progress = Progress()
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self._progress)
        self._of_step: list[tuple[list[str], Tensor]] = []  # ids and loss of its batches
        self._num_examples = self._num_tokens = 0  # since the last line of the log
        self._logged_at: float | None = None  # since when they count; evaluations do not

    def train(self, *args, **kwargs) -> None:
        try:
            super().train(*args, **kwargs)
        finally:
            self._progress.close()  # or what went wrong would stand behind the bar

    # Batches and loss

    def get_train_dataloader(self) -> DataLoader:
        """Our batches as they are: the Trainer would cut its own, and repeat examples to give every
        process as many."""
        with blaming_arguments():
            return _Batches(
                self.train_dataset,
                batch_sampler=self.batches,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
                worker_init_fn=_ignore_signals,
            )

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the GPU, but for the lengths: `LanguageModel.encode` then need not wait for them."""
        on_host = {name: value for name, value in inputs.items() if name.endswith("lengths")}
        return super()._prepare_inputs(inputs) | on_host

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but A_log, D, norms and biases, as in Mamba's own training."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and not name.endswith("A_log")
        ]

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        ids = inputs.pop("ids")
        if not (inputs["labels"] != IGNORED).any():
            raise UserError(f"a batch without any token to learn, of the examples {_listed(ids)}")
        if self._logged_at is None:
            self._logged_at = time.monotonic()
        self._num_examples += len(ids)
        self._num_tokens += sum(
            int(inputs[name].sum()) for name in ("prefix_lengths", "suffix_lengths")
        )
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._of_step.append((ids, loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """The norm of a step's gradients; UserError if that or the loss is no finite number."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        of_step, self._of_step = self._of_step, []
        if isinstance(grad_norm, Tensor):
            grad_norm = whole(grad_norm).item()
        is_finite = math.isfinite(grad_norm) and all(torch.isfinite(loss) for _, loss in of_step)
        if self.args.world_size > 1:  # all go on or none does
            is_finite = all(gather_object([is_finite]))
        if not is_finite:
            raise UserError(self._what_became_of(of_step, grad_norm))
        return grad_norm

    def _what_became_of(self, of_step: list[tuple[list[str], Tensor]], grad_norm: float) -> str:
        batches = [(ids, loss.item()) for ids, loss in of_step]
        if self.args.world_size > 1:
            batches = gather_object(batches)
        spoilt = [(ids, loss) for ids, loss in batches if not math.isfinite(loss)]
        what, value = ("loss", spoilt[0][1]) if spoilt else ("norm of the gradients", grad_norm)
        ids = [each for of_batch, _ in spoilt or batches for each in of_batch]
        return (
            f"the {what} became {value} at step {self.state.global_step + 1}, on the examples "
            f"{_listed(ids)}; look at these or lower --learning_rate; {self._last_good()}"
        )

    # Scores and what is seen

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        started = time.monotonic()
        try:
            with self.safe_stop.at_once():
                model = self.language_model
                if self.is_distributed_loading_by_transformers:
                    weights = whole(model.state_dict())
                    model = model.config.build().to(self.args.device)
                    load_weights(model, weights, Path("the shards"))
                scores = self.score(model.eval(), self.safe_stop.poll)
        except BaseException:
            if self.safe_stop.is_asked:
                self._save_checkpoint(self.model)  # as of before: `_catch_up` evaluates it
            raise
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self._logged_at is not None:
            self._logged_at += time.monotonic() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the examples and tokens a second since the last time: of all processes, if their
        batches are alike. A token is counted each time it is read. The Trainer's summary is left
        out: it knows nothing of our batches, nor of what was before a run went on."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            seconds = time.monotonic() - self._logged_at
            logs["examples_per_second"] = self._num_examples * self.args.world_size / seconds
            logs["tokens_per_second"] = self._num_tokens * self.args.world_size / seconds
            self._num_examples = self._num_tokens = 0
            self._logged_at = time.monotonic()
        super().log(logs, start_time)


def _listed(ids: Sequence[str]) -> str:
    named = ", ".join(ids[:MAX_IDS])
    return named if len(ids) <= MAX_IDS else f"{named} and {len(ids) - MAX_IDS} more"
