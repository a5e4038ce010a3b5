"""Training items that share prefixes, their batches, and the loss on them.

A batch contains each prefix once, however many suffixes follow it. One forward pass reads the
prefixes, forks their states into the suffixes, reads those and computes the loss. Gradients flow
back through the forked states, so that the result is that of independent examples.

To train on another loss, pass `PrefixSuffixTrainer` another module that maps a batch, as `collate`
makes it, to {"loss": ...}, or change `label_losses`, which training and evaluation share.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from mamba_lm.models.mamba import MambaLM, MambaState, at_least_float32, right_pad

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Item:
    """One training example: the tokens of a prefix, which other items may share, those of the
    suffix that follows it, and labels.

    labels and prefix_labels are aligned with the tokens of suffix and prefix: the token to predict
    at this place, IGNORED where there is no loss (prefix_labels=(): nowhere in the prefix). The
    shift by one token happens in the loss. id names the item in messages. ValueError if labels do
    not fit the tokens, if there are none, or if the first token of all has one: nothing comes
    before it that could predict it.
    """

    prefix: Sequence[int]
    suffix: Sequence[int]
    labels: Sequence[int]
    prefix_labels: Sequence[int] = ()
    id: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if len(self.labels) != len(self.suffix):
            raise ValueError(f"{len(self.labels)} labels for a suffix of {len(self.suffix)} tokens")
        if len(self.prefix_labels) not in (0, len(self.prefix)):
            given = len(self.prefix_labels)
            raise ValueError(f"{given} labels for a prefix of {len(self.prefix)} tokens")
        labels = self.prefix_labels if len(self.prefix) else self.labels
        if len(labels) and labels[0] != IGNORED:
            raise ValueError("the first token has a label, but nothing before it can predict it")
        if not _num_predicting(self.labels) and not _num_predicting(self.prefix_labels):
            raise ValueError("an item needs at least one label")

    @classmethod
    def with_target(
        cls, prefix: Sequence[int], start: Sequence[int], target: Sequence[int], id: str = ""
    ) -> "Item":
        """An item whose suffix is `start`, without labels, and then `target`, all labelled."""
        return cls(prefix, [*start, *target], [*[IGNORED] * len(start), *target], id=id)

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in (*self.prefix_labels, *self.labels))


def _num_predicting(labels: Sequence[int]) -> int:
    """The number of tokens up to the last one that has a label."""
    count = len(labels)
    while count and labels[count - 1] == IGNORED:
        count -= 1
    return count


def collate(items: Iterable[Item]) -> dict[str, Tensor]:
    """A batch for `PrefixSuffixLM`; c distinct prefixes, each read once, q suffixes.

    prefixes (c, l_c) and prefix_lengths (c,); suffixes (q, l_q) without the tokens after which
    nothing is predicted, and suffix_lengths (q,); prefix_index (q,), each suffix's prefix.
    labels (q, 1 + l_q): of each suffix's tokens, its last labelled one included, IGNORED where
    there is no loss. If any item has a label that is predicted from a prefix, that is on its prefix
    or on its suffix's first token, labels are (q, l_c + 1 + l_q): those of its prefix come first.
    """
    items = list(items)
    places: dict[tuple[int, ...], int] = {}
    index = [places.setdefault(tuple(item.prefix), len(places)) for item in items]
    ends = [_num_predicting(item.labels) for item in items]
    read = [item.suffix[: max(end - 1, 0)] for item, end in zip(items, ends, strict=True)]
    prefixes, prefix_lengths = right_pad(list(places))
    suffixes, suffix_lengths = right_pad([list(tokens) for tokens in read])
    width = 1 + suffixes.shape[1]
    labels = [list(item.labels[:end]) for item, end in zip(items, ends, strict=True)]
    rows = [row + [IGNORED] * (width - len(row)) for row in labels]
    before = [list(item.prefix_labels) for item in items]
    if any(before) or any(row[0] != IGNORED for row in rows):
        width = prefixes.shape[1]
        rows = [
            [*own, *[IGNORED] * (width - len(own)), *row]
            for own, row in zip(before, rows, strict=True)
        ]
    return {
        "prefixes": prefixes,
        "prefix_lengths": prefix_lengths,
        "suffixes": suffixes,
        "suffix_lengths": suffix_lengths,
        "prefix_index": torch.tensor(index),
        "labels": torch.tensor(rows),
    }


class PrefixSuffixLM(nn.Module):
    """A language model with the default loss: cross-entropy, the mean over an optimizer step's
    labels. The labels of a prefix count once for each item that has them, as if the items were read
    one by one."""

    accepts_loss_kwargs = True  # the Trainer then counts the labels of a whole optimizer step

    def __init__(self, model: MambaLM):
        super().__init__()
        self.model = model

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """For the Trainer's activation_checkpointing: layers are computed again in the backward."""
        if activation_checkpointing_kwargs or offload:
            raise UserError("activation_checkpointing_kwargs: only every_n_layers is supported")
        self.model.recompute_every = every_n_layers

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """A batch as `collate` makes it. Returns loss: the sum of cross-entropy over the labels /
        num_items_in_batch, by default the number of labels in this batch."""
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
        """Cross-entropy (k,) at each of a batch's k labels, and the item (k,) it belongs to."""
        num_prefix_labels = labels.shape[1] - 1 - suffixes.shape[1]
        hidden, state = None, None
        if prefixes.shape[1] > 0:
            hidden, state = self.model.encode(prefixes, lengths=prefix_lengths)
            state = state.fork(prefix_index)
        found = []
        if num_prefix_labels > 0:
            by_prefix = labels[:, : num_prefix_labels + 1]
            found.append(prefix_losses(self.model, hidden, prefix_lengths, prefix_index, by_prefix))
        if suffixes.shape[1] > 0:
            by_suffix = labels[:, num_prefix_labels:]
            found.append(suffix_losses(self.model, state, suffixes, suffix_lengths, by_suffix))
        if len(found) == 1:
            return found[0]
        losses, items = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(items)


def prefix_losses(
    model: MambaLM, hidden: Tensor, lengths: Tensor, index: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (k,) at the labels that are predicted from prefixes, and the item (k,) each
    belongs to.

    hidden (c, l_c, m) are the prefixes' hidden states, lengths (c,) their lengths, index (q,) each
    item's prefix; labels (q, l_c + 1): of an item's prefix, and in the last column of the token
    after it. Where items that share a prefix agree on a label, its logits are computed once.
    """
    items, columns = (labels != IGNORED).nonzero(as_tuple=True)
    wanted, own = labels[items, columns], index[items]
    ends = lengths.to(own.device)[own]
    before = torch.where(columns == hidden.shape[1], ends, columns) - 1
    distinct, which = torch.unique(
        torch.stack([own * hidden.shape[1] + before, wanted]), dim=1, return_inverse=True
    )
    losses = label_losses(model, hidden, *distinct)
    return losses.index_select(0, which), items


def suffix_losses(
    model: MambaLM,
    state: MambaState | None,
    suffixes: Tensor,
    suffix_lengths: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (k,) at each of the k labels that are predicted from suffixes (q, l_q), which
    are read from a state, a row each, and the suffix (k,) it belongs to. labels (q, 1 + l_q) as
    `collate` makes them; the first column, the prefix's to predict, is not looked at."""
    hidden, _ = model.encode(suffixes, state, suffix_lengths, keep_state=False)
    following = labels[:, 1:].flatten()
    places = (following != IGNORED).nonzero().squeeze(1)
    return label_losses(model, hidden, places, following[places]), places // suffixes.shape[1]


def label_losses(model: MambaLM, hidden: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (k,) of labels (k,), predicted from hidden (rows, l, m) at places (k,), which
    count row after row. Logits are computed there only."""
    # index_select, because its gradient is reproducible.
    logits = at_least_float32(model.lm_head(hidden.flatten(0, 1).index_select(0, places)))
    return F.cross_entropy(logits, labels, reduction="none")
