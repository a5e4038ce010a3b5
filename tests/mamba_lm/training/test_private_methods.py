"""The private parts of transformers' Trainer that the training engine relies on.

A new version of transformers may change them without notice. It is supported once these tests, and
all others of training, pass with it: then raise NEWEST here and in requirements.txt.
"""

import inspect

import pytest
import transformers
from packaging.version import Version
from transformers import Trainer, TrainingArguments

from mamba_lm.training.trainer import PrefixSuffixTrainer

OLDEST, NEWEST = Version("5.17"), Version("5.23")
OVERRIDDEN = {  # with the parameters after self
    "_determine_best_metric": ["metrics", "trial"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_scaler": ["checkpoint"],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch"),
        *("trial", "ignore_keys_for_eval", "start_time", "resume_from_checkpoint"),
        *("epochs_trained", "steps_trained_in_current_epoch"),
    ],
    "_save_checkpoint": ["model", "trial"],
}
OVERRIDDEN_FOR_SHARDING = {"_defer_fsdp_gradient_reduction": []}  # since 5.23
CALLED = {
    "_evaluate": ["trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_load_rng_state": ["checkpoint"],
    "_save_rng_state": ["output_dir"],
}
ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")


def parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(Trainer, name)).parameters)[1:]


def test_the_version_is_one_that_these_tests_are_for():
    installed = Version(transformers.__version__)
    assert OLDEST <= Version(f"{installed.major}.{installed.minor}") <= NEWEST


def test_these_are_all_that_is_overridden():
    private = {
        name
        for name, value in vars(PrefixSuffixTrainer).items()
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert private == OVERRIDDEN.keys() | OVERRIDDEN_FOR_SHARDING.keys()
    for name in private:
        assert "Overridden because" in getattr(PrefixSuffixTrainer, name).__doc__, name


@pytest.mark.parametrize("name", [*OVERRIDDEN, *OVERRIDDEN_FOR_SHARDING, *CALLED])
def test_the_trainer_has_them_with_these_parameters(name):
    assert parameters(name) == (OVERRIDDEN | OVERRIDDEN_FOR_SHARDING | CALLED)[name]


def test_the_trainer_calls_what_is_overridden():
    """A method that exists but is no longer called would be skipped without a word."""
    source = inspect.getsource(Trainer)
    for name in OVERRIDDEN.keys() | OVERRIDDEN_FOR_SHARDING.keys():
        assert f"self.{name}" in source, name
    for name in ATTRIBUTES:
        assert f"self.{name} =" in source, name


def test_epochs_are_called_by_keyword():
    """`_run_epoch` passes keywords on."""
    call = inspect.getsource(Trainer._inner_training_loop).split("self._run_epoch(")[1]
    words = call.split(")")[0].split(",")
    assert all("=" in word for word in words if word.strip())


def test_the_arguments_have_what_is_set_behind_their_back():
    assert "self._n_gpu =" in inspect.getsource(TrainingArguments)
    assert "restore_callback_states_from_checkpoint" in TrainingArguments.__dataclass_fields__
