"""A Trainer whose runs go on where they were cut off, sharded or not."""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from errors import UserError, warn
from mamba_lm.checkpoint import load_weights, read_model_weights, save_model, writing_tensors
from mamba_lm.model import MambaLM
from mamba_lm.sharding import like, load_optimizer_state, whole
from mamba_lm.training_arguments import blaming_arguments
from mamba_lm.training_checkpoints import fault, partial_folder, require_whole, rotate, seal
from mamba_lm.training_progress import SafeStop


class ResumableTrainer(Trainer):
    """Writes checkpoints that are whole or not there, one of them when it is asked to end, by
    Ctrl-C or SIGTERM. A resumed run gives the bits of one that was never stopped, on a CPU."""

    def __init__(self, model: MambaLM, module: nn.Module, arguments: TrainingArguments, **kwargs):
        """module is what is trained, model what is saved of it; kwargs are the Trainer's."""
        self.language_model = model
        self._run_dir = Path(arguments.output_dir)
        self._checkpoint: Path | None = None  # the newest, read or written
        self._saved: tuple[Path, int] | None = None  # and the lines of the log when it was written
        self._is_resumed = False
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
            state = TrainerState.load_from_json(str(self._checkpoint / "trainer_state.json"))
            ended = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
            is_ours = self._checkpoint.parent.resolve() == self._run_dir.resolve()
            if ended and is_ours and not self._evaluation_is_due(state):
                begin()
                self.state = state
                if not (self.args.load_best_model_at_end and self._load_best_model()):
                    self._load_from_checkpoint(self._checkpoint)
                return
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
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # the run before may not have had it
                name = type(callback).__name__
                self.state.stateful_callbacks.setdefault(name, callback.state())
        path = self._checkpoint / f"loss_{self.args.process_index}.json"
        if path.exists():  # what has not been logged yet
            loss, self._globalstep_last_logged = json.loads(path.read_text())
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
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        try:
            is_new_best = super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(name.removeprefix("eval_") for name in metrics)
            raise UserError(f"metric_for_best_model: choose from {known}") from error
        is_kept = is_new_best or self.control.should_training_stop  # the best and the last
        if is_kept and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True
        return is_new_best

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
            (written / f"loss_{self.args.process_index}.json").write_text(unlogged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
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
        if checkpoint is not None:
            # Mapped: what several processes read of it is in memory once.
            read = functools.partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
            load_optimizer_state(self.optimizer, read(Path(checkpoint) / "optimizer.pt"))
            self.lr_scheduler.load_state_dict(read(Path(checkpoint) / "scheduler.pt"))

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
