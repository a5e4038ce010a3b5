"""Examples that share prefixes: their batches, and the loss on suffixes that go on from them.

A batch holds each prefix once, however many suffixes share it. One forward reads the prefixes,
forks their states into the suffixes, reads those and takes the loss; gradients flow back through
the forked states, so that the result is that of independent examples.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState
from mamba_lm.tensors import at_least_float32, right_pad

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Token ids of one training example: loss falls on `target`, read after prefix and prompt. The
    id tells which example it is, should it have to be named."""

    prefix: Sequence[int]
    prompt: Sequence[int]
    target: Sequence[int]
    id: str = dataclasses.field(default="", compare=False)

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

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """For the Trainer's activation_checkpointing: layers are computed again in the backward."""
        if activation_checkpointing_kwargs or offload:
            raise UserError("activation_checkpointing_kwargs: every_n_layers is all there is here")
        self.model.recompute_every = every_n_layers

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
        return suffix_losses(self.model, state, suffixes, suffix_lengths, labels)


def suffix_losses(
    model: LanguageModel,
    state: MambaState | None,
    suffixes: Tensor,
    suffix_lengths: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (k,) at each of the k labels of suffixes that are read from a state, a row
    each, and the suffix (k,) it belongs to; see `collate`."""
    hidden, _ = model.encode(suffixes, state, suffix_lengths, keep_state=False)
    # Logits only where there is loss; index_select, because its gradient is reproducible.
    at = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    logits = at_least_float32(model.lm_head(hidden.flatten(0, 1).index_select(0, at)))
    losses = F.cross_entropy(logits, labels.flatten()[at], reduction="none")
    return losses, at // labels.shape[1]
