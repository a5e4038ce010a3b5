"""The training engine: a loss module on batches that share prefixes, by transformers' `Trainer`.

An optimizer step, in this order; whatever names nothing below is the Trainer's own code:

    batch           `get_train_dataloader`: lists of examples, made items by `tokenize`, collated
    forward, loss   `training_step`, `compute_loss`: the loss module, by default `PrefixSuffixLM`
    backward        the Trainer; it takes gradient_accumulation_steps batches up to here
    clip            the Trainer, to max_grad_norm; `_get_grad_norm`: loss and norm must be finite
    update          the Trainer: the optimizer, then the learning rate
    log             `log`, if due; `TrainingLog` writes it, `Progress` shows it
    evaluate        `evaluate`, if due: `score`; `_determine_best_metric` compares evaluations
    save            `_save_checkpoint`, if due: by save_steps, the clock, a signal, a best score

Whether a log, an evaluation or a checkpoint is due, callbacks say after the update: the Trainer's
`DefaultFlowCallback`, and `SafeStop`.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from common.errors import UserError, warn
from mamba_lm.adapters import has_adapter
from mamba_lm.checkpoint import load_weights, read_model_weights, save_model
from mamba_lm.foreign_files import parsing, require_plain
from mamba_lm.formats.weights import writing_tensors
from mamba_lm.models.interface import LanguageModel
from mamba_lm.training.arguments import reporting_arguments
from mamba_lm.training.checkpoints import (
    find_damage,
    partial_folder,
    publish_checkpoint,
    remove_old_checkpoints,
    require_intact,
)
from mamba_lm.training.prefix_suffix import IGNORED, Item, PrefixSuffixLM, collate
from mamba_lm.training.progress import LOG, PLOT, Progress, TrainingLog, plot, write_log
from mamba_lm.training.sharding import gather_shards, load_optimizer_state, shard, shard_like
from mamba_lm.training.stopping import SafeStop
from mamba_lm.training.trainer_state import (
    STATE,
    find_best_evaluation,
    fits_optimizer,
    has_ended,
    has_form_of,
    read_state,
    read_tensors,
    read_unlogged,
)

MAX_IDS = 64  # of examples that one message names


class _Tokenized(Dataset[Item]):
    """What a sampler yields, tokenized when it is read."""

    def __init__(self, length: int, tokenize: Callable[[Any], Item]):
        self.length, self.tokenize = length, tokenize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, example: Any) -> Item:
        return self.tokenize(example)


class _Batches(DataLoader):
    """A DataLoader that announces each epoch to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batch_sampler, "set_epoch"):
            self.batch_sampler.set_epoch(epoch)


class _Start(TrainerCallback):
    """Calls a function once everything is ready for the first step."""

    def __init__(self, start: Callable[[], None]):
        self.start = start

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start()


def _ignore_signals(worker: int) -> None:
    """A signal to all of a run's processes is for the one that saves a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate_with_ids(items: Sequence[Item]) -> dict[str, Tensor | list[str]]:
    return collate(items) | {"ids": [item.id for item in items]}


class PrefixSuffixTrainer(Trainer):
    """Trains a language model with a loss module. Beyond the Trainer: batches as a sampler makes
    them; no weight decay of the SSM's own parameters; an error that names the examples where the
    loss or the gradients are not finite; checkpoints that are complete or absent, one of them
    before a signal ends the run. On a CPU, a resumed run gives the same bits as one that was never
    interrupted.

    Private methods of the Trainer are overridden only where no public one or callback exists: the
    docstring of each says why, and tests/mamba_lm/training/test_private_methods.py checks them.
    """

    def __init__(
        self,
        model: LanguageModel,
        arguments: TrainingArguments,
        batches: Sampler[list],
        tokenize: Callable[[Any], Item],
        tokenizer,
        score: Callable[[LanguageModel, Callable[[], None]], Mapping[str, float]] | None = None,
        patience: int = 5,
        sharded: bool = False,
        loss_module: nn.Module | None = None,
    ):
        """model: what is saved and scored.
        batches: lists of the examples themselves, in any form that `tokenize` understands; only
        those of this process, as many as in every other one. Its optional set_epoch(epoch) is
        called before each epoch.
        score(model, poll): the figures of an evaluation, the same in every process, each of which
        calls poll() now and then, as often as the others. If the best model is kept, training ends
        after `patience` evaluations without a better one (see `find_best_evaluation`).
        sharded: each process keeps a shard of the weights and of the optimizer's state.
        loss_module: a module that contains the model and maps a collated batch to {"loss": ...},
        default `PrefixSuffixLM(model)`. Entries whose names end in "lengths" stay on the CPU. With
        `accepts_loss_kwargs` it is also given num_items_in_batch, the labels of the whole step.
        Raises UserError if arguments are wrong for this process, ValueError without a score that
        they need.
        """
        self.language_model, self.batches, self.score = model, batches, score
        self.patience = patience
        evaluates = arguments.eval_strategy != IntervalStrategy.NO or arguments.eval_on_start
        if score is None and (evaluates or arguments.metric_for_best_model is not None):
            raise ValueError("evaluation and metric_for_best_model need a score function")
        if has_adapter(model):  # its first checkpoint would fail, and the training be lost
            raise UserError("training a model with an adapter is not supported yet; merge it first")
        if sharded and arguments.world_size < 2:
            raise UserError("fully_shard needs two processes or more; start them with torchrun")
        self._output = Path(arguments.output_dir)
        self._checkpoint: Path | None = None  # the newest, read or written
        self._saved: tuple[Path, int] | None = None  # and the length of the log at that time
        self._unlogged: tuple[float, int] | None = None  # see `read_unlogged`
        self._unlogged_name = f"loss_{arguments.process_index}.json"
        self.kept_step: int | None = None  # of the best model, if that was loaded in the end
        self._step_losses: list[tuple[list[str], Tensor]] = []  # ids and loss of each batch
        self._lengths: dict[str, Tensor] = {}  # of the batch that is being read
        self._num_examples = self._num_tokens = 0  # since the last log
        self._logged_at: float | None = None  # since when they count, without evaluations
        module = PrefixSuffixLM(model) if loss_module is None else loss_module
        if sharded:
            layers = list(model.blocks)
            shard(module.to(arguments.device), layers, arguments.device.type)
        with reporting_arguments():
            super().__init__(
                module,
                arguments,
                train_dataset=_Tokenized(len(batches) * arguments.train_batch_size, tokenize),
                eval_dataset=[] if score is not None else None,  # the Trainer requires one
                data_collator=_collate_with_ids,
                processing_class=tokenizer,
            )
        self.is_distributed_loading_by_transformers = sharded  # so that it wraps no module
        self.safe_stop = SafeStop(arguments.device)
        self._progress = Progress()
        self.add_callback(_Start(self._start))
        self.add_callback(self.safe_stop)
        self.add_callback(TrainingLog())
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self._progress)

    def train(
        self,
        resume_from_checkpoint: str | Path | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the end, from a checkpoint if one is given; if it is in the output folder and
        the run had ended, only its weights are loaded. begin is called once arguments and
        checkpoint are known to be right, before anything is written. SIGINT, SIGTERM and SIGHUP
        save a checkpoint first."""
        self._begin = begin
        if resume_from_checkpoint is not None:
            require_intact(resume_from_checkpoint)
            self._checkpoint = Path(resume_from_checkpoint)
            self.args.eval_on_start = False
            state = read_state(self._checkpoint)
            is_ours = self._checkpoint.parent.resolve() == self._output.resolve()
            if has_ended(state) and is_ours and not self._evaluation_is_due(state):
                self._finish_again(state)
                return
            path = self._checkpoint / self._unlogged_name
            if path.exists():
                self._unlogged = read_unlogged(path)
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._require_finite_weights()
        try:
            with self.safe_stop:
                super().train(resume_from_checkpoint)
        finally:
            self._progress.close()  # or an error message would follow the bar on its line
        if self.args.load_best_model_at_end:
            self._load_best()

    # The order of a step: batch

    def get_train_dataloader(self) -> DataLoader:
        """Our batches as they are: the Trainer would make its own, and repeat examples so that
        every process has as many."""
        return _Batches(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )

    # Forward, loss, backward

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        ids = inputs.pop("ids")
        if not (inputs["labels"] != IGNORED).any():
            raise UserError(f"a batch without any label, of the examples {_list_ids(ids)}")
        if self._logged_at is None:
            self._logged_at = time.monotonic()
        self._lengths = {n: inputs.pop(n) for n in list(inputs) if n.endswith("lengths")}
        self._num_examples += len(ids)
        self._num_tokens += sum(int(lengths.sum()) for lengths in self._lengths.values())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_losses.append((ids, loss))
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args, **kwargs):
        """With the lengths, which stayed on the CPU: encoding need not wait for the GPU."""
        return super().compute_loss(model, inputs | self._lengths, *args, **kwargs)

    # Clip

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """The norm of a step's gradients; UserError if that or the loss is not finite.

        Overridden because the norm is known only here: callbacks get gradients that are clipped,
        in which an infinite norm no longer shows.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        batches, self._step_losses = self._step_losses, []
        if isinstance(grad_norm, Tensor):
            grad_norm = gather_shards(grad_norm).item()
        is_finite = math.isfinite(grad_norm) and all(torch.isfinite(loss) for _, loss in batches)
        if self.args.world_size > 1:  # all processes stop, or none
            is_finite = all(gather_object([is_finite]))
        if not is_finite:
            raise UserError(self._describe_divergence(batches, grad_norm))
        return grad_norm

    def _describe_divergence(self, batches: list[tuple[list[str], Tensor]], grad_norm: float):
        losses = [(ids, loss.item()) for ids, loss in batches]
        if self.args.world_size > 1:
            losses = gather_object(losses)
        infinite = [(ids, loss) for ids, loss in losses if not math.isfinite(loss)]
        what, value = ("loss", infinite[0][1]) if infinite else ("norm of the gradients", grad_norm)
        ids = [each for batch_ids, _ in infinite or losses for each in batch_ids]
        return (
            f"the {what} became {value} at step {self.state.global_step + 1}, on the examples "
            f"{_list_ids(ids)}; look at these or lower the learning rate; "
            f"{self._describe_last_checkpoint()}"
        )

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Sharded, before the last batch of a step: gradients are not reduced yet.

        Overridden because the Trainer's asks the model for a configuration of its own sharding.
        """
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    # Update

    def create_optimizer(self, *args, **kwargs):
        with reporting_arguments():
            return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but A_log, D, norms and biases, as in Mamba's own training."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and not name.endswith("A_log")
        ]

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the examples and tokens per second since the last log: of all processes, if their
        batches are alike. A token counts each time it is read. The Trainer's summary at the end is
        dropped: it knows neither our batches nor the time before a run was resumed."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            seconds = time.monotonic() - self._logged_at
            logs["examples_per_second"] = self._num_examples * self.args.world_size / seconds
            logs["tokens_per_second"] = self._num_tokens * self.args.world_size / seconds
            self._num_examples = self._num_tokens = 0
            self._logged_at = time.monotonic()
        super().log(logs, start_time)

    # Evaluate

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        started = time.monotonic()
        try:
            with self.safe_stop.without_delay():
                model = self.language_model
                if self.is_distributed_loading_by_transformers:
                    weights = gather_shards(model.state_dict())
                    model = model.config.build().to(self.args.device)
                    load_weights(model, weights, Path("the shards"))
                scores = self.score(model.eval(), self.safe_stop.poll)
        except BaseException:
            if self.safe_stop.is_requested:
                self._save_checkpoint(self.model)  # without the evaluation: see `_catch_up`
            raise
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self._logged_at is not None:
            self._logged_at += time.monotonic() - started
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether the model is to be saved: as the best so far, or as the last.

        Overridden because the Trainer's knows no ties, which the loss decides here, and because
        save_strategy=best saves by its result; callbacks are called before it.
        """
        if self.args.metric_for_best_model is None:
            return self.control.should_save
        name = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        if name not in metrics:
            known = ", ".join(name.removeprefix("eval_") for name in metrics)
            raise UserError(f"metric_for_best_model: choose from {known}")
        best = find_best_evaluation(self.state.log_history, name, self.args.greater_is_better)
        is_best = best is not None and best.step == self.state.global_step
        if is_best:
            self.state.best_metric = metrics[name]
        if self.args.load_best_model_at_end and best and best.num_since_better >= self.patience:
            self.control.should_training_stop = True
        if self.args.save_strategy != SaveStrategy.NO:
            if is_best:
                self.state.best_global_step = self.state.global_step
            self.control.should_save |= is_best or self.control.should_training_stop
        return self.control.should_save

    # Save

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """Write a checkpoint into another folder, which is then renamed.

        Overridden because the Trainer's writes file by file into the checkpoint's own folder, and
        no callback can take its place: on_step_end comes before the log and the evaluation.
        """
        checkpoint = self._output / f"checkpoint-{self.state.global_step}"
        saved = (checkpoint, len(self.state.log_history))
        if saved == self._saved:  # for another reason, a moment ago
            return
        started = time.monotonic()
        partial = partial_folder(self._output)
        folder, best = partial / checkpoint.name, self._best_checkpoint()
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(folder, best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_checkpoint(folder, checkpoint)
                remove_old_checkpoints(checkpoint, self.args.save_total_limit, best)
        except OSError as error:
            raise UserError(
                f"{checkpoint}: cannot be written ({error}); {self._describe_last_checkpoint()}"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        self._checkpoint, self._saved = checkpoint, saved
        self.safe_stop.note_save(time.monotonic() - started)

    def _write_checkpoint(self, folder: Path, best: Path | None) -> None:
        """All that a run needs to resume: weights, optimizer and learning rate, which do not depend
        on sharding; random numbers and the losses since the last log, of each process; the state.
        """
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        optimizer = gather_shards(self.optimizer.state_dict(), keep=self.args.should_save)
        unlogged = json.dumps([self._tr_loss.item(), self._globalstep_last_logged])
        with writing_tensors():
            if self.args.should_save:
                torch.save(optimizer, folder / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self._save_rng_state(str(folder))
        (folder / self._unlogged_name).write_text(unlogged)
        if self.args.should_save:
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            # The figures of the log keep their order, in which TrainerState would sort them.
            state = dataclasses.asdict(self.state) | {"best_model_checkpoint": best and str(best)}
            (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the language model and its tokenizer, by default to the output folder. UserError if
        a weight is not finite."""
        self._require_finite_weights()
        weights = gather_shards(self.language_model.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_model(self.language_model, folder, self.processing_class, weights=weights)

    def _best_checkpoint(self) -> Path | None:
        """That of the best evaluation in the output folder, from which it may have been removed;
        or the one that is being written."""
        step = self.state.best_global_step
        if not step:
            return None
        best = self._output / f"checkpoint-{step}"
        return best if best.is_dir() or step == self.state.global_step else None

    # Resume

    def _start(self) -> None:
        """Before the first step: everything is made, checked and loaded."""
        self._begin()
        # It is kept in checkpoints only: given one, the Trainer would remove the others at the end,
        # also the one from which an interrupted run is to resume.
        self.state.best_model_checkpoint = None
        if self._checkpoint is not None:
            self._catch_up()

    def _catch_up(self) -> None:
        """Do what the resumed run had left to do of the step that it had reached."""
        self._saved = (self._checkpoint, len(self.state.log_history))
        if self._unlogged is not None:
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss += loss
        self.control.should_training_stop = self.state.global_step >= self.state.max_steps
        if self._evaluation_is_due(self.state):
            self._determine_best_metric(self._evaluate(None, None), None)
            self._save_checkpoint(self.model)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _run_epoch(self, **kwargs) -> None:
        """An epoch, unless the resumed run has ended.

        Overridden because the Trainer takes a step before it asks whether training is to stop.
        """
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _evaluation_is_due(self, state: TrainerState) -> bool:
        """Whether the run was stopped in the evaluation of the step it had reached, or before."""
        args, in_steps = self.args, self.args.eval_strategy == IntervalStrategy.STEPS
        if args.eval_strategy == IntervalStrategy.NO:
            return False
        on_time = (state.global_step % state.eval_steps if in_steps else state.epoch % 1) == 0
        is_last = state.global_step >= state.max_steps
        is_delayed = args.eval_delay > (state.global_step if in_steps else state.epoch)
        rows = [row for row in state.log_history if row["step"] == state.global_step]
        is_done = any(name.startswith("eval_") for row in rows for name in row)
        return (on_time or is_last) and not is_delayed and not is_done

    def _finish_again(self, state: TrainerState) -> None:
        """Load the model of a run that had ended; write again what may be missing beside it."""
        self._begin()
        self.state = state
        if self.args.should_save:
            shutil.rmtree(partial_folder(self._output), ignore_errors=True)
            write_log(state.log_history, self._output / LOG)
            plot(state.log_history, self._output / PLOT)
        if not (self.args.load_best_model_at_end and self._load_best()):
            self._load_from_checkpoint(self._checkpoint)

    def _load_best(self) -> bool:
        """Load the best model; False, with a warning, if its checkpoint is missing or damaged."""
        best, step = self._best_checkpoint(), self.state.best_global_step
        problem = "it is missing" if best is None else find_damage(best)
        if problem is not None:
            if step:
                warn(f"checkpoint-{step} was best, but {problem}: the last model is kept")
            return False
        self._load_from_checkpoint(best)
        self.kept_step = step
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model=None) -> None:
        """Load the weights.

        Overridden because the Trainer's loads them into the loss module, with its names, and
        ignores what is missing.
        """
        folder = Path(resume_from_checkpoint)
        own = self.language_model.state_dict()
        read, _ = read_model_weights(folder, self.language_model.config)
        weights = {
            name: shard_like(weight, own[name]) if name in own else weight
            for name, weight in read.items()
        }
        load_weights(self.language_model, weights, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, and find out whether the rest can be loaded, before anything is written.

        Overridden because the Trainer's loads nothing where a file is missing, cannot shard, and
        fails with a traceback on files that do not fit.
        """
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = read_tensors(folder / "optimizer.pt")
        if not fits_optimizer(state, self.optimizer):
            raise UserError(f"{folder / 'optimizer.pt'}: not the state of this run's optimizer")
        load_optimizer_state(self.optimizer, state)
        path = folder / "scheduler.pt"
        state = read_tensors(path)
        if not has_form_of(state, self.lr_scheduler.state_dict()):
            raise UserError(f"{path}: not the state of this run's learning rate scheduler")
        self.lr_scheduler.load_state_dict(state)
        suffix = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        path = folder / f"rng_state{suffix}.pth"
        if path.is_file():
            require_plain(path, "random state", has_arrays=True)
        with parsing(
            lambda reason: f"{checkpoint}: the state of random numbers cannot be read ({reason})"
        ):
            self._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing. Overridden because the Trainer's would read a file that no run here writes: fp16
        is refused."""

    def _require_finite_weights(self) -> None:
        if not all(torch.isfinite(weight).all() for weight in self.model.parameters()):
            step = self.state.global_step
            after = (
                f"after step {step}: lower the learning rate; {self._describe_last_checkpoint()}"
            )
            when = after if step else "before training"
            raise UserError(f"the model has weights that are not finite {when}")

    def _describe_last_checkpoint(self) -> str:
        if self._checkpoint is None:
            return "no checkpoint has been written"
        return f"the last good checkpoint is {self._checkpoint}"


def _list_ids(ids: Sequence[str]) -> str:
    named = ", ".join(ids[:MAX_IDS])
    return named if len(ids) <= MAX_IDS else f"{named} and {len(ids) - MAX_IDS} more"
