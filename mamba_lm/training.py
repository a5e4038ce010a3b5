"""The one training engine: examples that share prefixes, by transformers' `Trainer`."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from errors import UserError
from mamba_lm.checkpoint import load_weights, read_weights, save_model, writing_tensors
from mamba_lm.model import MambaLM
from mamba_lm.prefix_suffix import IGNORED, Continuation, PrefixSuffixLM, collate
from mamba_lm.sharding import like, load_optimizer_state, shard, whole
from mamba_lm.training_checkpoints import partial_folder, require_whole, seal
from mamba_lm.training_progress import Progress, SafeStop, TrainingLog

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


class PrefixSuffixTrainer(Trainer):
    """Trainer for `PrefixSuffixLM`: our batches, our checkpoints, no decay of the SSM's own.

    It stops where the loss or a gradient is no finite number, writes checkpoints that are whole or
    not there, and saves one when it is asked to end, by Ctrl-C or SIGTERM. A resumed run gives the
    bits of one that was never stopped, on a CPU.
    """

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
        self.language_model, self.batches, self.score = model, batches, score
        self.sharded = sharded
        if arguments.eval_strategy != IntervalStrategy.NO and score is None:
            raise UserError("training arguments: eval_strategy needs --eval_data")
        if sharded and arguments.world_size < 2:
            raise UserError("--fully_shard: needs two processes or more, by torchrun")
        module = PrefixSuffixLM(model)
        if sharded:
            shard(module.to(arguments.device), list(model.backbone.layers), arguments.device.type)
        try:
            super().__init__(
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
        self.safe_stop = SafeStop()
        self.add_callback(self.safe_stop)
        self.add_callback(TrainingLog())
        if arguments.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(patience))
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self._checkpoint: Path | None = None  # the newest, read or written
        self._saved: tuple[Path, int] | None = None  # and the lines of the log when it was written
        self._run_dir = Path(arguments.output_dir)
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

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Sharded, before the last batch of a step: gradients stay where they are."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

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

    def _require_finite_weights(self) -> None:
        if not all(torch.isfinite(weight).all() for weight in self.model.parameters()):
            step = self.state.global_step
            when = f"after step {step}: lower --learning_rate; {self._last_good()}"
            raise UserError(f"weights are no finite numbers {when if step else 'to begin with'}")

    def _last_good(self) -> str:
        if self._checkpoint is None:
            return "no checkpoint has been written"
        return f"the last good checkpoint is {self._checkpoint}"

    # Scores and what is seen

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        try:
            with self.safe_stop.at_once():
                model = self.language_model
                if self.sharded:
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

    # Checkpoints

    def train(self, resume_from_checkpoint: str | Path | None = None) -> None:
        """Train to the end, from a checkpoint if one is given. A checkpoint of the end is only
        read. Ctrl-C and SIGTERM end it as ever, once a checkpoint is saved."""
        if resume_from_checkpoint is not None:
            require_whole(resume_from_checkpoint)
            self._checkpoint = Path(resume_from_checkpoint)
            state = TrainerState.load_from_json(str(self._checkpoint / "trainer_state.json"))
            ended = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
            if ended and not self._evaluation_is_due(state):
                self.state = state
                at_end = self.args.load_best_model_at_end and state.best_model_checkpoint
                self._load_from_checkpoint(at_end or resume_from_checkpoint)
                return
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._require_finite_weights()
        with self.safe_stop:
            super().train(resume_from_checkpoint)

    def _evaluation_is_due(self, state: TrainerState) -> bool:
        """Whether the run was cut off in the evaluation of the step it had come to, or before."""
        if self.args.eval_strategy == IntervalStrategy.STEPS:
            on_time = state.global_step % state.eval_steps == 0
        else:
            on_time = self.args.eval_strategy == IntervalStrategy.EPOCH and state.epoch % 1 == 0
        is_last = state.global_step >= state.max_steps
        rows = [row for row in state.log_history if row["step"] == state.global_step]
        is_done = any(name.startswith("eval_") for row in rows for name in row)
        return self.score is not None and (on_time or is_last) and not is_done

    def _catch_up(self, start_time: float) -> None:
        if self._checkpoint is not None and self._evaluation_is_due(self.state):
            self.control.should_evaluate = self.control.should_save = True
            self._maybe_log_save_evaluate(
                self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, start_time
            )
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True

    def _run_epoch(self, *, start_time: float, **kwargs) -> None:
        self._catch_up(start_time)
        if not self.control.should_training_stop:
            super()._run_epoch(start_time=start_time, **kwargs)

    def _finalize_training(self, trial, num_train_samples: float, start_time: float):
        self._catch_up(start_time)  # where no epoch was left
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _get_output_dir(self, trial) -> str:
        return str(self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """As the Trainer does it, in another folder, which is then made the checkpoint."""
        output = Path(self.args.output_dir)
        checkpoint = output / f"checkpoint-{self.state.global_step}"
        known = (checkpoint, len(self.state.log_history))
        if known == self._saved:  # a moment ago, for another reason
            return
        self._require_finite_weights()
        started = time.monotonic()
        self._run_dir = partial_folder(output)
        written = self._run_dir / checkpoint.name
        try:
            if self.args.should_save:
                shutil.rmtree(self._run_dir, ignore_errors=True)
                written.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                best = output / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
                seal(written, checkpoint)
                rotate_checkpoints(
                    self.args.output_dir,
                    self.args.save_total_limit,
                    self.state.best_model_checkpoint,
                )
        except OSError as error:
            raise UserError(
                f"{checkpoint}: cannot be written ({error}); {self._last_good()}"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = output
        self._checkpoint, self._saved = checkpoint, known
        self.safe_stop.saved(time.monotonic() - started)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        weights = whole(self.language_model.state_dict())
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_model(self.language_model, folder, self.processing_class, weights=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The same files, sharded or not: a run goes on in either way from them."""
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            with writing_tensors():
                torch.save(state, Path(output_dir) / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        with writing_tensors():
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        own = self.language_model.state_dict()
        weights = {
            name: like(own[name], weight) if name in own else weight
            for name, weight in read_weights(folder).items()
        }
        load_weights(self.language_model, weights, folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            read = functools.partial(torch.load, map_location="cpu", weights_only=True)
            load_optimizer_state(self.optimizer, read(Path(checkpoint) / "optimizer.pt"))
            self.lr_scheduler.load_state_dict(read(Path(checkpoint) / "scheduler.pt"))


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
        saves = {"save_strategy": chosen["eval_strategy"], "load_best_model_at_end": True}
        if "eval_steps" in chosen:
            saves["save_steps"] = chosen["eval_steps"]
        chosen = saves | {"greater_is_better": True} | settings
        chosen = defaults | chosen
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
