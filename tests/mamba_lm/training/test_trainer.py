"""Training on forked prefixes is training on independent examples, step by step and bit by bit."""

import ast
import dataclasses
import json
import math
import random
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from common.errors import UserError
from mamba_lm.checkpoint import load_model
from mamba_lm.training import trainer as training
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.prefix_suffix import IGNORED, Item, PrefixSuffixLM, collate
from mamba_lm.training.trainer import PrefixSuffixTrainer

CPU = torch.device("cpu")
TOKENIZER = Path(__file__).parents[3] / "data/demo/tokenizer"

SHARED, LONE, NONE = [5, 4, 3, 2, 1, 0], [9, 8], []
EXAMPLES = [
    Item.with_target(SHARED, [11, 12, 13], [21, 30]),
    Item.with_target(LONE, [14], [22, 23, 24, 30]),
    Item.with_target(SHARED, [15, 16], [30]),
    Item.with_target(NONE, [17, 18, 19, 20], [25, 26, 30]),
    Item.with_target(list(SHARED), [14], [22, 23, 24, 30]),
]
_ = IGNORED
SPANS = [  # as turns of a chat
    Item(SHARED, [11, 12, 13, 14, 15, 16], [_, 12, 13, _, 15, _]),
    Item(SHARED, [11, 12, 13], [11, _, 13]),
    Item(NONE, [17, 18, 19, 20], [_, 18, _, 20]),
    Item(LONE, [17, 18, 19, 20, 21], [17, 18, _, _, _]),
]
PREFIX_LABELS = [  # of one prefix, twice the same ones, others and none
    Item(SHARED, [], [], [_, 4, 3, 2, 1, 0]),
    Item(SHARED, [11, 12], [11, 12], [_, 4, 3, 2, 1, 0]),
    Item(SHARED, [11, 13], [11, 13], [_, _, _, 2, _, 0]),
    Item(SHARED, [11, 14], [_, 14]),
    Item(LONE, [12], [12], [_, 8]),
    Item(NONE, [12, 13], [_, 13]),
]
ONE_TOKEN = [
    Item(SHARED, [11], [11]), Item(LONE, [11], [11]), Item([7], [12], [12]), Item([7], [11], [11])
]  # fmt: skip
SUBSETS = {
    "all": EXAMPLES,
    "one": EXAMPLES[:1],
    "one context": [EXAMPLES[i] for i in (4, 0, 2)],
    "context each": EXAMPLES[:2],
    "no suffix token": EXAMPLES[2:3],
    "no context": EXAMPLES[3:4],
    "spans": SPANS,
    "prefix labels": PREFIX_LABELS,
    "prefix labels alone": PREFIX_LABELS[:1],
    "one-token items": ONE_TOKEN,
    "one token alone": ONE_TOKEN[:1],
    "all kinds": [*SPANS, *PREFIX_LABELS, *EXAMPLES, *ONE_TOKEN],
}
TARGETS = {name: SUBSETS[name] for name in list(SUBSETS)[:6]}
subsets = pytest.mark.parametrize("examples", SUBSETS.values(), ids=SUBSETS)


class Listed(Sampler):
    """Batches in the order of a list of examples, and the epochs that were announced."""

    def __init__(self, examples: list[Item], batch_size: int = 4):
        self.examples, self.epochs = examples, []
        self.batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, examples, tokenizer=None, tokenize=lambda example: example, **settings):
        defaults = {"disable_tqdm": True, "learning_rate": 0.01}
        arguments = training_arguments(str(tmp_path / "out"), CPU, **defaults | settings)
        batches = examples if isinstance(examples, Sampler) else Listed(examples)
        return PrefixSuffixTrainer(model, arguments, batches, tokenize, tokenizer)

    return make


def random_examples(count: int, seed: int = 0) -> list[Item]:
    """Every other one shares its prefix with the next; lengths vary."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(30) for _ in range(rng.randint(1, most))]

    examples = []
    for _ in range(count // 2):
        prefix = ids(12)
        examples += [Item.with_target(prefix, ids(5), [*ids(9), 30]) for _ in range(2)]
    return examples


def copy_task(count: int, seed: int = 0) -> list[Item]:
    """Which of two words stood in the context?"""
    rng = random.Random(seed)
    words = rng.choices([7, 8], k=count)
    return [Item.with_target([1, word, 2], [3], [word, 30]) for word in words]


def independent_losses(model, examples: list[Item]) -> list[torch.Tensor]:
    """Cross-entropy of each example's labels: it is read alone, from its first token on."""
    losses = []
    for example in examples:
        labels = torch.tensor(all_labels(example))[1:]
        logits, _ = model(torch.tensor([[*example.prefix, *example.suffix]])[:, :-1])
        each = F.cross_entropy(logits[0], labels, reduction="none")
        losses.append(each[labels != IGNORED])
    return losses


def all_labels(item: Item) -> list[int]:
    """Of its prefix and its suffix."""
    return [*(item.prefix_labels or [IGNORED] * len(item.prefix)), *item.labels]


# Batches


@pytest.mark.parametrize("examples", TARGETS.values(), ids=TARGETS)
def test_collate_aligns_labels_with_the_suffix(examples):
    batch = collate(examples)
    assert batch["labels"].shape[1] == 1 + batch["suffixes"].shape[1]
    for row, example in enumerate(examples):
        place = batch["prefix_index"][row]
        prefix = batch["prefixes"][place, : batch["prefix_lengths"][place]].tolist()
        suffix = batch["suffixes"][row, : batch["suffix_lengths"][row]].tolist()
        assert prefix == list(example.prefix)
        assert suffix == list(example.suffix[:-1])
        labels = batch["labels"][row].tolist()
        assert labels[: len(example.suffix)] == example.labels
        assert set(labels[len(example.suffix) :]) <= {IGNORED}


def test_collate_reads_equal_prefixes_once():
    batch = collate(EXAMPLES)
    assert batch["prefixes"].shape == (3, len(SHARED))
    assert batch["prefix_lengths"].tolist() == [len(SHARED), len(LONE), 0]
    assert batch["prefix_index"].tolist() == [0, 1, 0, 2, 0]


def test_collate_reads_no_token_after_which_nothing_is_predicted():
    items = [
        Item([1, 2], [3, 4, 5, 6], [IGNORED, 4, IGNORED, IGNORED]),
        Item([1, 2], [3, 4], [3, IGNORED]),
        Item([1, 2], [], [], [IGNORED, 2]),
    ]
    batch = collate(items)
    assert batch["suffixes"].tolist() == [[3], [0], [0]]
    assert batch["suffix_lengths"].tolist() == [1, 0, 0]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, IGNORED, 4],
        [IGNORED, IGNORED, 3, IGNORED],
        [IGNORED, 2, IGNORED, IGNORED],
    ]


@pytest.mark.parametrize(
    "item, message",
    [
        (([], [1, 2], [1, 2]), "nothing before it can predict it"),
        (([3, 4], [1], [1], [3, 4]), "nothing before it can predict it"),
        (([3], [1, 2], [IGNORED, IGNORED]), "needs at least one label"),
        (([3], [], []), "needs at least one label"),
        (([3], [1, 2], [2]), "1 labels for a suffix of 2 tokens"),
        (([3, 4], [1, 2], [1, 2], [IGNORED]), "1 labels for a prefix of 2 tokens"),
    ],
)
def test_an_item_whose_labels_cannot_be_predicted_is_refused(item, message):
    """Better an error than a wrong loss."""
    with pytest.raises(ValueError, match=message):
        Item(*item)


# Loss


@subsets
@pytest.mark.parametrize("changes", [{}, {"bcdt_rms_eps": 1e-6, "tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_and_gradient_equal_those_of_independent_examples(
    dtype, tolerance, items, examples, changes, make_model, assert_near, gradients
):
    model = make_model(**changes).to(dtype)
    items_in_batch = None if items is None else torch.tensor(items)
    loss = PrefixSuffixLM(model)(**collate(examples), num_items_in_batch=items_in_batch)["loss"]
    losses = torch.cat(independent_losses(model, examples))
    wanted = losses.sum() / (items or len(losses))
    assert_near(loss, wanted, tolerance)
    assert_near(gradients(model, loss), gradients(model, wanted), tolerance)


@subsets
def test_token_losses_belong_to_their_items(examples, make_model, assert_near):
    model = make_model().double()
    losses, rows = PrefixSuffixLM(model).token_losses(**collate(examples))
    for row, wanted in enumerate(independent_losses(model, examples)):
        assert_near(losses[rows == row].sort().values, wanted.sort().values, 1e-9)
    assert len(losses) == len(rows) == sum(example.num_labels for example in examples)


def test_tokens_under_the_padding_do_not_matter(make_model):
    wrapped, batch = PrefixSuffixLM(make_model()), collate(EXAMPLES)
    loss = wrapped(**batch)["loss"]
    for name, lengths in [("prefixes", "prefix_lengths"), ("suffixes", "suffix_lengths")]:
        padding = torch.arange(batch[name].shape[1]) >= batch[lengths][:, None]
        assert padding.any()
        batch[name] = batch[name].masked_fill(padding, 29)
    assert torch.equal(wrapped(**batch)["loss"], loss)


# Trainer


def weights_after(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: w.detach().clone() for name, w in trainer.language_model.named_parameters()}


SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
       "warmup_steps": 0, "weight_decay": 0.0}  # fmt: skip


def test_accumulated_batches_equal_one_big_batch(make_trainer, make_model, assert_near):
    """Three steps, halves of unlike numbers of labels: the mean of means would be another loss."""
    examples = random_examples(24)
    halves = [sum(e.num_labels for e in examples[at : at + 4]) for at in range(0, 24, 4)]
    assert all(first != second for first, second in zip(halves[::2], halves[1::2], strict=True))
    settings = SGD | {"max_steps": 3}
    big = make_trainer(make_model(), Listed(examples, batch_size=8), **settings)
    small = make_trainer(make_model(), examples, gradient_accumulation_steps=2, **settings)
    wanted, got = weights_after(big), weights_after(small)
    start = dict(make_model().named_parameters())
    moved = {name: wanted[name] - start[name] for name in start}
    assert_near({name: got[name] - start[name] for name in start}, moved, 1e-3)


def test_lengths_stay_on_the_cpu(make_trainer, make_model, monkeypatch):
    """By torch's meta device in a GPU's place."""
    trainer = make_trainer(make_model(), EXAMPLES)

    def move(self, inputs):
        return {name: value.to("meta") for name, value in inputs.items()}

    class Read(Exception):
        """The batch as the loss module gets it."""

    class Module(torch.nn.Module):
        def forward(self, **batch):
            raise Read(batch)

    monkeypatch.setattr(Trainer, "_prepare_inputs", move)
    with pytest.raises(Read) as caught:
        trainer.training_step(Module(), collate(EXAMPLES) | {"ids": []})
    [batch] = caught.value.args
    on_host = {name for name, value in batch.items() if value.device.type == "cpu"}
    assert on_host == {"prefix_lengths", "suffix_lengths"} and len(batch) == 6


def test_a_step_equals_one_by_hand(make_trainer, make_model, assert_near, gradients):
    examples = random_examples(4)
    model = make_model()
    wanted = gradients(model, torch.cat(independent_losses(model, examples)).mean())
    got = weights_after(make_trainer(make_model(), examples, max_steps=1, **SGD))
    for name, parameter in model.named_parameters():
        assert_near((parameter - got[name]).detach(), 0.5 * wanted[name], 1e-3)


def test_weight_decay_spares_the_ssms_own_norms_and_biases(make_trainer, make_model):
    model = make_model(proj_bias=True)
    trainer = make_trainer(model, EXAMPLES)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        names.pop(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert not names  # all of them are trained
    spared = {name for name, decay in decays.items() if decay == 0.0}
    assert {decays[name] for name in decays.keys() - spared} == {0.1}
    layer = {"A_log", "D", "in_proj.bias", "conv1d.bias", "dt_proj.bias", "out_proj.bias"}
    assert spared == {"backbone.norm_f.weight"} | {
        f"backbone.layers.{i}.{name}"
        for i in range(2)
        for name in ("norm.weight", *(f"mixer.{own}" for own in layer))
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_reported_before_training(value, make_trainer, make_model):
    model = make_model()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = value
    with pytest.raises(UserError, match="weights that are not finite before training"):
        make_trainer(model, EXAMPLES, max_steps=3).train()


def test_weights_that_became_infinite_are_not_saved(make_trainer, make_model, tmp_path):
    trainer = make_trainer(make_model(), EXAMPLES, max_steps=1, save_strategy="no")
    trainer.train()
    with torch.no_grad():
        trainer.language_model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(UserError, match="not finite after step 1: lower the learning rate"):
        trainer.save_model()
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "norm of the gradients"])
def test_a_loss_or_gradient_that_is_not_finite_stops_training(
    what, value, make_trainer, make_model
):
    """Of two batches a step the second one of the third step; its loss, or its gradients alone."""
    examples = [dataclasses.replace(e, id=f"id{i}") for i, e in enumerate(random_examples(40))]
    settings = SGD | {"gradient_accumulation_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    trainer = make_trainer(make_model(), examples, max_steps=10, **settings)
    batches = iter(range(100))

    def spoil(module, inputs, output):
        if next(batches) == 5:
            output["loss"] = Spoilt.apply(output["loss"], value, what == "loss")
        return output

    trainer.model.register_forward_hook(spoil)
    before = trainer.language_model.lm_head.weight.detach().clone()
    with pytest.raises(UserError, match=rf"the {what} became .* at step 3, ") as caught:
        trainer.train()
    named = re.search("on the examples (.*?);", str(caught.value))[1].split(", ")
    first = 20 if what == "loss" else 16  # gradients are those of the whole step
    assert named == [f"id{number}" for number in range(first, 24)]
    assert str(caught.value).endswith("out/checkpoint-2")
    weight = trainer.language_model.lm_head.weight
    assert torch.isfinite(weight).all() and not torch.equal(weight, before)


class Spoilt(torch.autograd.Function):
    """Adds `value` to what goes forward, or multiplies what goes backward by it."""

    @staticmethod
    def forward(ctx, loss, value, is_forward):
        ctx.value = 1.0 if is_forward else value
        return loss + value if is_forward else loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value, None, None


def test_many_examples_are_not_all_named():
    listed = training._list_ids([f"id{number}" for number in range(100)])
    assert listed.endswith("id63 and 36 more") and listed.count(",") == 63


def test_a_batch_without_labels_is_an_error(make_trainer, make_model, monkeypatch):
    def without_labels(examples):
        batch = collate_with_ids(examples)
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    collate_with_ids = training._collate_with_ids
    monkeypatch.setattr(training, "_collate_with_ids", without_labels)
    examples = [dataclasses.replace(e, id=f"id{i}") for i, e in enumerate(random_examples(4))]
    with pytest.raises(UserError, match=r"without any label, .* id0, id1, id2, id3$"):
        make_trainer(make_model(), examples).train()


def test_a_loss_that_turns_nan_later_stops_there(make_trainer, make_model):
    trainer = make_trainer(make_model(), random_examples(40), max_steps=10, **SGD)
    steps = iter(range(100))

    def spoil(module, inputs, output):
        return {"loss": output["loss"] * (math.nan if next(steps) == 4 else 1.0)}

    trainer.model.register_forward_hook(spoil)
    with pytest.raises(UserError, match="nan at step 5, "):
        trainer.train()


def test_training_learns_a_copy_task(make_trainer, make_model):
    trainer = make_trainer(make_model(), copy_task(240), max_steps=60, logging_steps=10)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 7  # the first step's too
    assert losses[0] > 1.0 and losses[-1] < 0.05  # guessing between the two words: 0.35


def test_the_same_seed_gives_the_same_bits(make_trainer, make_model):
    first, second = (
        weights_after(make_trainer(make_model(), random_examples(16), max_steps=4))
        for _ in range(2)
    )
    start = dict(make_model().named_parameters())
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert not torch.equal(weight, start[name])


def test_batches_are_not_changed_and_know_the_epoch(make_trainer, make_model):
    seen = []
    batches = Listed(random_examples(10), batch_size=3)

    def tokenize(example):
        seen.append(example)
        return example

    make_trainer(make_model(), batches, tokenize=tokenize, num_train_epochs=3).train()
    assert seen == batches.examples * 3
    assert sorted(set(batches.epochs)) == [0, 1, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_model_is_saved_and_read_again(tied, make_trainer, make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = make_model(tie_embeddings=tied)
    trainer = make_trainer(model, EXAMPLES, tokenizer=tokenizer, max_steps=1)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    for name, weight in load_model(str(folder)).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_trains_on_as_one_in_memory(tied, make_trainer, make_model, tmp_path):
    """What one loses if reading a checkpoint splits tied embeddings."""
    first = make_trainer(make_model(tie_embeddings=tied), random_examples(16), max_steps=2)
    first.train()
    first.save_model()
    reread = load_model(str(tmp_path / "out"))
    going_on = [
        weights_after(make_trainer(model, random_examples(16, seed=1), max_steps=4))
        for model in (first.language_model, reread)
    ]
    assert going_on[0].keys() == going_on[1].keys()
    assert all(torch.equal(going_on[0][name], going_on[1][name]) for name in going_on[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_equals_one_that_was_never_stopped(tied, make_trainer, make_model, tmp_path):
    examples, settings = random_examples(24), {"save_steps": 2, "save_strategy": "steps"}
    model = {"tie_embeddings": tied}
    wanted = weights_after(make_trainer(make_model(**model), examples, max_steps=6, **settings))
    checkpoint = tmp_path / "out/checkpoint-4"
    assert load_model(str(checkpoint)) and (checkpoint / "optimizer.pt").exists()
    resumed = make_trainer(make_model(**model, seed=5), examples, max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in resumed.language_model.named_parameters():
        assert torch.equal(parameter, wanted[name])


def test_a_damaged_checkpoint_is_named(make_trainer, make_model, tmp_path):
    settings = {"save_steps": 2, "save_strategy": "steps", "max_steps": 2}
    make_trainer(make_model(), random_examples(8), **settings).train()
    weights = tmp_path / "out/checkpoint-2/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    trainer = make_trainer(make_model(), random_examples(8), **settings)
    with pytest.raises(UserError, match=f"{weights.parent}: .*model.safetensors has"):
        trainer.train(resume_from_checkpoint=str(weights.parent))


# Arguments


def test_defaults(tmp_path):
    arguments = training_arguments(str(tmp_path), CPU)
    assert arguments.use_cpu and not arguments.bf16
    assert not arguments.logging_nan_inf_filter
    assert arguments.report_to == []
    assert arguments.n_gpu <= 1


@pytest.mark.parametrize(
    "override, field, value",
    [
        ("weight_decay=0.25", "weight_decay", 0.25),
        ("save_strategy=epoch", "save_strategy", "epoch"),
        ("run_name=a=b", "run_name", "a=b"),
        ("dataloader_drop_last=true", "dataloader_drop_last", True),
        ('optim_args="eps=1e-6"', "optim_args", "eps=1e-6"),
    ],
)
def test_overrides_win_over_settings_and_defaults(override, field, value, tmp_path):
    arguments = training_arguments(str(tmp_path), CPU, [override], weight_decay=0.5, max_steps=3)
    assert getattr(arguments, field) == value


@pytest.mark.parametrize(
    "override",
    ["max_step=7", "max_steps", "", "=7", "_n_gpu=2", "learning-rate=1"],
)
def test_unknown_overrides_are_named(override, tmp_path):
    with pytest.raises(UserError, match="KEY=VALUE") as caught:
        training_arguments(str(tmp_path), CPU, [override])
    assert override in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "lr_scheduler_type=flat",
        "save_strategy=3",
    ],
)
def test_values_that_training_arguments_refuses_are_user_errors(override, tmp_path):
    with pytest.raises(UserError, match="training arguments") as caught:
        training_arguments(str(tmp_path), CPU, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["fsdp=true", "fsdp=full_shard", "deepspeed=zero.json"])
def test_the_trainers_own_sharding_is_refused(override, tmp_path):
    """On a CPU it would be data parallelism, and nobody would know."""
    with pytest.raises(UserError, match="fully_shard works"):
        training_arguments(str(tmp_path), CPU, [override])


def test_sharding_asked_for_by_accelerate_launch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fully_shard works"):
        training_arguments(str(tmp_path), CPU)


def test_arguments_can_be_kept_as_json(tmp_path):
    json.dumps(training_arguments(str(tmp_path), CPU).to_dict())


# The engine


class SquaredLogits(torch.nn.Module):
    """A loss module of another kind: it reads no labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, suffixes, suffix_lengths, **batch):
        assert suffix_lengths.device.type == "cpu"
        return {"loss": self.model(suffixes)[0].square().mean()}


def test_any_loss_module_is_trained(make_model, tmp_path):
    arguments = training_arguments(str(tmp_path), CPU, max_steps=20, logging_steps=1,
                                   learning_rate=0.01, disable_tqdm=True)  # fmt: skip
    model, batches = make_model(), Listed(random_examples(20))
    trainer = PrefixSuffixTrainer(
        model, arguments, batches, lambda item: item, None, loss_module=SquaredLogits(model)
    )
    trainer.train()
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, model.lm_head.weight)


def test_a_step_has_the_documented_order(make_model, tmp_path, monkeypatch):
    """That of the docstring of mamba_lm/training/trainer.py."""
    order = []

    def noting(name, function):
        def noted(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        return noted

    def note(owner, attribute, name):
        monkeypatch.setattr(owner, attribute, noting(name, getattr(owner, attribute)))

    settings = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    arguments = training_arguments(
        str(tmp_path), CPU, max_steps=1, metric_for_best_model="f1", disable_tqdm=True,
        gradient_accumulation_steps=2, **settings,
    )  # fmt: skip
    monkeypatch.setattr(training, "collate", noting("batch", collate))
    trainer = PrefixSuffixTrainer(
        make_model(), arguments, Listed(random_examples(8)), lambda item: item, None,
        score=noting("evaluate", lambda model, poll: {"f1": 1.0}),
    )  # fmt: skip
    note(trainer.model, "forward", "forward, loss")
    note(trainer.accelerator, "backward", "backward")
    note(trainer, "_get_grad_norm", "clip")
    note(trainer, "_save_checkpoint", "save")
    note(trainer, "create_optimizer", "ready")
    log = trainer.log

    def noted_log(row, *args):
        if "loss" in row:
            order.append("log")
        log(row, *args)

    monkeypatch.setattr(trainer, "log", noted_log)
    trainer.add_callback(UpdateNoted(order))
    trainer.train()
    documented = re.findall(r"^    (\w+(?:, \w+)?)  +\S", training.__doc__, re.MULTILINE)
    batch, forward, backward, *others = documented
    assert order == ["ready", batch, batch, forward, backward, forward, backward, *others]


class UpdateNoted(TrainerCallback):
    def __init__(self, order: list[str]):
        self.order = order

    def on_optimizer_step(self, *args, **kwargs) -> None:
        self.order.append("update")


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, RuntimeError, IndexError])
@pytest.mark.parametrize(
    "place",
    [
        "torch.optim.AdamW.__init__",
        "torch.optim.AdamW.step",
        "mamba_lm.training.trainer.PrefixSuffixTrainer.get_decay_parameter_names",
        "mamba_lm.training.trainer.PrefixSuffixTrainer.get_train_dataloader",
        "mamba_lm.training.trainer._collate_with_ids",
        "mamba_lm.training.prefix_suffix.PrefixSuffixLM.forward",
        "transformers.Trainer.create_scheduler",
        "transformers.Trainer.create_accelerator_and_postprocess",
        "transformers.TrainingArguments.__post_init__",
    ],
)
def test_a_bug_stays_a_traceback(place, error, make_trainer, make_model):
    """Not the user's arguments are wrong where our code, torch or transformers has a bug."""
    with mock.patch(place, side_effect=error("a bug")), pytest.raises(error, match="a bug"):
        make_trainer(make_model(), random_examples(8), optim="adamw_torch", max_steps=1).train()


def test_a_field_that_this_code_misspells_is_a_bug(tmp_path):
    with pytest.raises(TypeError, match="lerning_rate"):
        training_arguments(str(tmp_path), CPU, lerning_rate=1.0)


@pytest.mark.parametrize(
    "override, message",
    [
        ("report_to=nonsense", "not installed; choose from none"),
        ("report_to=wandb", "not installed; choose from none"),
        ("log_level=nonsense", "choose from detail, debug"),
        ("lr_scheduler_type=flat", "not a valid SchedulerType"),
        ('lr_scheduler_kwargs={"a": 1}', "unexpected keyword argument 'a'"),
        ('lr_scheduler_kwargs={"num_cycles": "x"}', "could not convert|must be real"),
        ("lr_scheduler_type=warmup_stable_decay", "num_decay_steps"),
        ("lr_scheduler_type=cosine_with_min_lr", "min_lr"),
        ('accelerator_config={"a": 1}', "its keys are split_batches"),
        ("accelerator_config=nowhere.json", "nowhere.json"),
        ("save_steps=1e400", "cannot convert float infinity"),
        ("output_dir=x", "set output instead"),
        ("restore_callback_states_from_checkpoint=true", "no callback keeps a state"),
    ],
)
def test_a_wrong_value_is_reported_in_one_line(override, message, tmp_path):
    with pytest.raises(UserError, match=f"^training arguments: .*({message})") as caught:
        training_arguments(str(tmp_path), CPU, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"optim": "adamw_bnb_8bit"}, {"adam_beta2": 2}, {"optim_args": "x"},
     {"optim": "galore_adamw"}, {"optim": "lomo"}], ids=str,
)  # fmt: skip
def test_a_wrong_optimizer_is_reported_in_one_line(settings, make_trainer, make_model):
    with pytest.raises(UserError, match=r"^training arguments: ") as caught:
        make_trainer(make_model(), random_examples(8), max_steps=1, **settings).train()
    assert "\n" not in str(caught.value)


def test_the_engine_names_no_flag():
    """Its users are scripts with flags of their own."""
    for path in Path(training.__file__).parent.glob("*.py"):
        texts = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in texts if "--" in text], path


def test_a_model_with_an_adapter_is_refused_before_training(make_trainer, make_model, add_lora):
    """Not at its first checkpoint, when what was trained would be lost."""
    model = make_model()
    add_lora(model, "in_proj")
    with pytest.raises(UserError, match="with an adapter is not supported yet; merge it first"):
        make_trainer(model, random_examples(4))
