"""The one training engine: examples that share prefixes, by transformers' `Trainer`."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from errors import UserError
from mamba_lm.checkpoint import load_weights
from mamba_lm.model import MambaLM
from mamba_lm.prefix_suffix import IGNORED, Continuation, PrefixSuffixLM, collate
from mamba_lm.resumable_trainer import ResumableTrainer
from mamba_lm.sharding import shard, whole
from mamba_lm.training_progress import Progress, TrainingLog

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


def _named_batch(examples: Sequence[Continuation]) -> dict[str, Tensor | list[str]]:
    return collate(examples) | {"ids": [example.id for example in examples]}


class PrefixSuffixTrainer(ResumableTrainer):
    """Trainer for `PrefixSuffixLM`: our batches and scores, no decay of the SSM's own, and a stop
    where the loss or a gradient is no finite number."""

    def __init__(
        self,
        model: MambaLM,
        arguments: TrainingArguments,
        batches: Sampler[list],
        tokenize: Callable[[Any], Continuation],
        tokenizer,
        score: Callable[[MambaLM], Mapping[str, float]] | None = None,
        patience: int = 5,
        sharded: bool = False,
    ):
        """batches yields lists of the examples themselves, in any form that `tokenize` understands:
        this process's, as many as every other process gets. Its optional set_epoch(epoch) is called
        before each epoch. score gives the figures of an evaluation, the same in every process;
        after `patience` of them without a better one, training ends. Sharded, each of several
        processes keeps its part of the weights and of what the optimiser knows."""
        self.batches, self.score = batches, score
        if arguments.eval_strategy != IntervalStrategy.NO and score is None:
            raise UserError("training arguments: eval_strategy needs --eval_data")
        if sharded and arguments.world_size < 2:
            raise UserError("--fully_shard: needs two processes or more, by torchrun")
        module = PrefixSuffixLM(model)
        if sharded:
            shard(module.to(arguments.device), list(model.backbone.layers), arguments.device.type)
        try:
            super().__init__(
                model,
                module,
                arguments,
                # Its length is for the Trainer's count of examples a second.
                train_dataset=_Tokenized(len(batches) * arguments.train_batch_size, tokenize),
                eval_dataset=[] if score is not None else None,  # or it would ask for one
                data_collator=_named_batch,
                processing_class=tokenizer,
            )
        except (ImportError, RuntimeError, ValueError) as error:  # what to install, mostly
            raise UserError(f"training arguments: {str(error).splitlines()[0]}") from error
        self.is_distributed_loading_by_transformers = sharded  # it is not to wrap the module
        self.add_callback(TrainingLog())
        if arguments.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(patience))
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self._of_step: list[tuple[list[str], Tensor]] = []  # ids and loss of its batches
        self._num_examples = self._num_tokens = 0  # since the last line of the log
        self._logged_at = time.monotonic()

    # Batches and loss

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

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        ids = inputs.pop("ids")
        if not (inputs["labels"] != IGNORED).any():
            raise UserError(f"a batch without any token to learn, of the examples {_listed(ids)}")
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
        # With several processes the norm is that of all, and so are what is raised and when.
        if not math.isfinite(grad_norm) or not all(torch.isfinite(loss) for _, loss in of_step):
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
        try:
            with self.safe_stop.at_once():
                model = self.language_model
                if self.is_distributed_loading_by_transformers:
                    weights = whole(model.state_dict())
                    model = MambaLM(model.config).to(self.args.device)
                    load_weights(model, weights, Path("the shards"))
                scores = self.score(model.eval())
        except BaseException:
            if self.safe_stop.is_asked:
                self._save_checkpoint(self.model)  # as of before: `_catch_up` evaluates it
            raise
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._logged_at = time.monotonic()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the examples and tokens a second since the last time: of all processes, if their
        batches are alike. A token is counted each time it is read."""
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
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,  # one every 500 steps, and ten minutes: `SafeStop`
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",
        "disable_tqdm": False,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",  # autocast; the weights stay in float32
    }
    chosen = defaults | settings
    launched = (parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    if chosen.get("fsdp") or chosen.get("deepspeed") or any(launched):
        raise UserError(
            "the Trainer's own FSDP and DeepSpeed are not used here (on a CPU they would be plain "
            "data parallelism, silently); --fully_shard shards, on CPUs and GPUs"
        )
    if chosen.get("eval_strategy", "no") != "no":
        # The best checkpoint can be kept only where one is written with each evaluation.
        best = {"load_best_model_at_end": True, "greater_is_better": True}
        best["save_strategy"] = chosen["eval_strategy"]
        if "eval_steps" in chosen:
            best["save_steps"] = chosen["eval_steps"]
        chosen = best | chosen
    try:
        arguments = TrainingArguments(output_dir=output, **chosen)
    except (ValueError, TypeError) as error:
        raise UserError(f"training arguments: {error}") from error
    if arguments.train_batch_size < 1:
        raise UserError("training arguments: per_device_train_batch_size must be 1 or more")
    # Without torchrun the Trainer would split our batches over several GPUs with nn.DataParallel,
    # whose prefix_index would then point into another GPU's prefixes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
