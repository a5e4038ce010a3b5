"""A Trainer whose runs go on where they were cut off, sharded or not."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from common.errors import UserError, warn
from mamba_lm.checkpoint import load_weights, read_model_weights, save_model
from mamba_lm.foreign_files import parsing
from mamba_lm.formats.pickles import require_plain
from mamba_lm.formats.weights import writing_tensors
from mamba_lm.models.interface import LanguageModel
from mamba_lm.training.arguments import blaming_arguments
from mamba_lm.training.checkpoints import fault, partial_folder, require_whole, rotate, seal
from mamba_lm.training.progress import LOG, PLOT, SafeStop, plot, write_log
from mamba_lm.training.sharding import like, load_optimizer_state, whole
from mamba_lm.training.trainer_state import (
    STATE,
    best_evaluation,
    fits_optimizer,
    has_ended,
    is_alike,
    read_state,
    read_tensors,
    read_unlogged,
)


class ResumableTrainer(Trainer):
    """Writes checkpoints that are whole or not there, one of them when it is asked to end, by
    Ctrl-C or SIGTERM. A resumed run gives the bits of one that was never stopped, on a CPU."""

    def __init__(
        self,
        model: LanguageModel,
        module: nn.Module,
        arguments: TrainingArguments,
        patience: int,
        **kwargs,
    ):
        """module is what is trained, model what is saved of it; patience, if the best model is
        kept: after so many evaluations without a better one, training ends (see
        `best_evaluation`); kwargs are the Trainer's."""
        self.language_model, self.patience = model, patience
        self._run_dir = Path(arguments.output_dir)
        self._checkpoint: Path | None = None  # the newest, read or written
        self._saved: tuple[Path, int] | None = None  # and the lines of the log when it was written
        self._is_resumed = False
        self._unlogged: tuple[float, int] | None = None  # see `read_unlogged`
        self._unlogged_name = f"loss_{arguments.process_index}.json"
        self.kept_step: int | None = None  # of the best model, if that is what is kept in the end
        super().__init__(module, arguments, **kwargs)
        self.safe_stop = SafeStop(arguments.device)
        self.add_callback(self.safe_stop)

    def train(
        self,
        resume_from_checkpoint: str | Path | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the end, from a checkpoint if one is given. Of one in the output folder that is
        of the end only the weights are read. begin is called when nothing is left that could be
        found wrong with the arguments. Ctrl-C and SIGTERM end it as ever, once a checkpoint is
        saved."""
        self._begin = begin
        if resume_from_checkpoint is not None:
            require_whole(resume_from_checkpoint)
            self._checkpoint = Path(resume_from_checkpoint)
            self.args.eval_on_start = False
            state = read_state(self._checkpoint)
            is_ours = self._checkpoint.parent.resolve() == self._run_dir.resolve()
            if has_ended(state) and is_ours and not self._evaluation_is_due(state):
                begin()
                self.state = state
                if self.args.should_save:  # it may have been cut off just before
                    write_log(state.log_history, self._run_dir / LOG)
                    plot(state.log_history, self._run_dir / PLOT)
                if not (self.args.load_best_model_at_end and self._load_best_model()):
                    self._load_from_checkpoint(self._checkpoint)
                return
            path = self._checkpoint / self._unlogged_name
            if path.exists():
                self._unlogged = read_unlogged(path)
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._is_resumed = self._checkpoint is not None
        self._require_finite_weights()
        with self.safe_stop:
            super().train(resume_from_checkpoint)

    def create_optimizer(self, *args, **kwargs):
        with blaming_arguments():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        with blaming_arguments():
            return super().create_scheduler(*args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._begin()
        return prepared

    def _evaluation_is_due(self, state: TrainerState) -> bool:
        """Whether the run was cut off in the evaluation of the step it had come to, or before."""
        args, in_steps = self.args, self.args.eval_strategy == IntervalStrategy.STEPS
        if args.eval_strategy == IntervalStrategy.NO:
            return False
        on_time = (state.global_step % state.eval_steps if in_steps else state.epoch % 1) == 0
        is_last = state.global_step >= state.max_steps
        is_delayed = args.eval_delay > (state.global_step if in_steps else state.epoch)
        rows = [row for row in state.log_history if row["step"] == state.global_step]
        is_done = any(name.startswith("eval_") for row in rows for name in row)
        return (on_time or is_last) and not is_delayed and not is_done

    def _catch_up(self, start_time: float) -> None:
        """What is left to do of the step that a resumed run had come to."""
        if not self._is_resumed:
            return
        self._is_resumed = False
        if self._unlogged is not None:
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss += loss
        if self._evaluation_is_due(self.state):
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
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            self._load_best_model()  # which says why it cannot
        # The Trainer would now remove all checkpoints but the best, also that of a run which a
        # signal ended and which goes on from it. `rotate` has removed what is to be.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether the model is to be saved: as the best yet, or as the last."""
        if self.args.metric_for_best_model is None:
            return self.control.should_save
        name = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        if name not in metrics:
            known = ", ".join(name.removeprefix("eval_") for name in metrics)
            raise UserError(f"metric_for_best_model: choose from {known}")
        best = best_evaluation(self.state.log_history, name, self.args.greater_is_better)
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

    def _load_callback_state(self) -> None:
        """None: what callbacks know is not in checkpoints, which may be a stranger's."""

    def _get_output_dir(self, trial) -> str:
        return str(self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """As the Trainer does it, in another folder, which is then made the checkpoint."""
        output = Path(self.args.output_dir)
        checkpoint = output / f"checkpoint-{self.state.global_step}"
        known = (checkpoint, len(self.state.log_history))
        if known == self._saved:  # a moment ago, for another reason
            return
        started = time.monotonic()
        self._run_dir = partial_folder(output)
        written = self._run_dir / checkpoint.name
        try:
            if self.args.should_save:
                shutil.rmtree(self._run_dir, ignore_errors=True)
                written.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            best = self._best_checkpoint()
            self.state.best_model_checkpoint = best and str(best)
            unlogged = json.dumps([self._tr_loss.item(), self._globalstep_last_logged])
            (written / self._unlogged_name).write_text(unlogged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # With the log's figures in their order, which the Trainer would sort.
                state = json.dumps(dataclasses.asdict(self.state), indent=2)
                (written / STATE).write_text(state + "\n")
                seal(written, checkpoint)
                rotate(checkpoint, self.args.save_total_limit, best)
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

    def _best_checkpoint(self) -> Path | None:
        """That of the best evaluation in the output folder, which a move or a hand may have taken
        away; or the one that is being written."""
        step = self.state.best_global_step
        if not step:
            return None
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        return best if best.is_dir() or step == self.state.global_step else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._require_finite_weights()
        weights = whole(self.language_model.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_model(self.language_model, folder, self.processing_class, weights=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The same files, sharded or not: a run goes on in either way from them."""
        state = whole(self.optimizer.state_dict(), keep=self.args.should_save)
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
        read, _ = read_model_weights(folder, self.language_model.config)
        weights = {
            name: like(own[name], weight) if name in own else weight
            for name, weight in read.items()
        }
        load_weights(self.language_model, weights, folder)

    def _load_best_model(self) -> bool:
        """Whether there is a whole best checkpoint, whose weights are then the model's."""
        best, step = self._best_checkpoint(), self.state.best_global_step
        complaint = "it is gone" if best is None else fault(best)
        if complaint is not None:
            if step:
                said = f"checkpoint-{step} was best, but {complaint}: the last model is kept"
                warn(said)
            return False
        self._load_from_checkpoint(best)
        self.kept_step = self.state.best_global_step
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / "optimizer.pt"
        state = read_tensors(path)
        if not fits_optimizer(state, self.optimizer):
            raise UserError(f"{path}: not the state of this run's optimizer")
        load_optimizer_state(self.optimizer, state)
        path = Path(checkpoint) / "scheduler.pt"
        state = read_tensors(path)
        if not is_alike(state, self.lr_scheduler.state_dict()):
            raise UserError(f"{path}: not the state of this run's learning rate scheduler")
        self.lr_scheduler.load_state_dict(state)
        self._load_rng_state(checkpoint)  # to find out now whether it can be read

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: there is none without fp16."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        of_process = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        path = Path(checkpoint) / f"rng_state{of_process}.pth"
        if path.is_file():
            require_plain(path, "random state", has_arrays=True)
        with parsing(
            lambda reason: f"{checkpoint}: the state of random numbers cannot be read ({reason})"
        ):
            super()._load_rng_state(checkpoint)

    def _require_finite_weights(self) -> None:
        if not all(torch.isfinite(weight).all() for weight in self.model.parameters()):
            step = self.state.global_step
            when = f"after step {step}: lower --learning_rate; {self._last_good()}"
            raise UserError(f"weights are no finite numbers {when if step else 'to begin with'}")

    def _last_good(self) -> str:
        if self._checkpoint is None:
            return "no checkpoint has been written"
        return f"the last good checkpoint is {self._checkpoint}"

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Sharded, before the last batch of a step: gradients stay where they are."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)
