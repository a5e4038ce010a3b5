"""How a training run ends early, and when checkpoints are due: signals and the clock."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

SAVE_SECONDS = 600  # between two checkpoints, at most
SAVE_SHARE = 0.05  # of the time, at most, is spent on the checkpoints that this asks for
# torchrun and a terminal both send a signal for one Ctrl-C: within this time it counts once.
_REPEAT_SECONDS = 2.0


class SafeStop(TrainerCallback):
    """Saves checkpoints by the clock, and one before a signal ends the run.

    Inside the `with` block, SIGINT, SIGTERM and SIGHUP wait for the end of the step and for a
    checkpoint; then the signal is delivered to the handler from before. A second signal does not
    wait, nor does one in the first step: that may compile kernels for minutes, and nothing is lost
    with it. All processes of a run stop at the same step, whichever of them received the signal.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        """device: of the tensors that processes exchange."""
        self._device = device
        self._caught: int | None = None
        self._caught_at = 0.0
        self._stops = self._waits = False
        self._before: dict[int, object] = {}
        self._interval, self._saved_at = SAVE_SECONDS, time.monotonic()

    @property
    def is_requested(self) -> bool:
        """Whether a signal has been received."""
        return self._caught is not None

    def __enter__(self) -> "SafeStop":
        self._saved_at = time.monotonic()
        self._waits = _is_distributed()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # by a shell that runs it with "&"
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.is_requested:
            signal.raise_signal(self._caught)

    @contextmanager
    def without_delay(self) -> Iterator[None]:
        """Signals do not wait in this block, whose work can be repeated. With several processes
        it has to call `poll`."""
        if not _is_distributed():
            self._waits = False
        self.poll()
        try:
            yield
        finally:
            self._waits = True

    def poll(self) -> None:
        """Deliver a signal that any process has received, in all of them at the same time."""
        if self._exchange()[1]:
            self._deliver()

    def _exchange(self, wanted: bool = False) -> tuple[bool, bool]:
        """Whether any process wants something, and whether any has received a signal: the same
        answer in all of them, even if a signal arrives meanwhile."""
        if not _is_distributed():
            return wanted, self.is_requested
        shared = torch.tensor([self._caught or 0, wanted], dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        caught, wanted = shared.tolist()
        if caught and not self.is_requested:  # one may have arrived here meanwhile
            self._caught, self._caught_at = caught, time.monotonic()
        return bool(wanted), bool(caught)

    def note_save(self, seconds: float) -> None:
        """To be called when a checkpoint has been saved, with the time it took."""
        self._interval = max(SAVE_SECONDS, seconds / SAVE_SHARE)
        self._saved_at = time.monotonic()

    def _receive(self, number: int, frame) -> None:
        again = self.is_requested and time.monotonic() - self._caught_at > _REPEAT_SECONDS
        if not self.is_requested:
            self._caught, self._caught_at = number, time.monotonic()
        if again or not self._waits:
            self._deliver()

    def _deliver(self) -> None:
        """To the handler from before."""
        handler = self._before.get(self._caught)
        if callable(handler):
            handler(self._caught, None)
        else:
            signal.signal(self._caught, handler or signal.SIG_DFL)
            signal.raise_signal(self._caught)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._waits = True
        is_time, self._stops = self._exchange(time.monotonic() - self._saved_at > self._interval)
        if args.save_strategy == SaveStrategy.NO:
            control.should_training_stop |= self._stops
        elif self._stops or is_time:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        # Not before the save: a checkpoint records whether the run has come to its own end.
        if self._stops:
            control.should_training_stop = True
            if state.is_world_process_zero:
                saved = f"checkpoint-{state.global_step} is saved; the same command resumes from it"
                tqdm.write(saved, file=sys.stderr)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self._stops:
            control.should_evaluate = control.should_save = False


def _is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
