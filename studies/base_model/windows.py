"""Windows of a token file: what a step reads is a function of the seed and the step."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from studies.base_model.pack import Packed, number_of_documents

ON_GPU = 4 * 2**30  # bytes of tokens, as int32, that a GPU's memory holds beside the model


class HeldOut(NamedTuple):
    """The last documents of a token file, and the bytes of their text."""

    tokens: np.ndarray
    num_bytes: int


def split_held_out(packed: Packed, held_out: int) -> tuple[np.ndarray, HeldOut]:
    """The tokens of all documents but the last ones, which have `held_out` tokens or a few more.
    UserError where nothing would be left."""
    count = number_of_documents(packed, held_out)
    start = packed.starts[-1 - count]
    if start == 0:
        raise UserError(f"{held_out:,} tokens held out are all there are; give fewer or more text")
    return packed.tokens[:start], HeldOut(packed.tokens[start:], sum(packed.num_bytes[-count:]))


class Windows:
    """Batches of windows of length + 1 tokens: each window is the input and what follows it.

    An epoch reads every token once, but for a part of a window: its windows stand side by side from
    a random place on, and come in a random order. On a GPU the tokens are held in its memory, so
    that no step waits for them.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int, device: torch.device):
        self.length, self.seed, self.device = length, seed, device
        self.num_tokens = len(tokens)
        self.an_epoch = (len(tokens) - 1 - length) // length  # windows
        if self.an_epoch < 1:
            raise UserError(f"{len(tokens):,} tokens are too few for windows of {length}")
        self.tokens, self.on_device = tokens, None
        if device.type == "cuda" and 4 * len(tokens) <= ON_GPU:
            self.on_device = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self._epoch, self._starts = -1, torch.empty(0)

    def batch(self, step: int, size: int) -> Tensor:
        """Batch number `step` of `size` windows: (size, length + 1) int64 on the device."""
        places = range(step * size, (step + 1) * size)
        starts = torch.tensor([self._start(place) for place in places])
        offsets = torch.arange(self.length + 1)
        if self.on_device is None:
            at = (starts[:, None] + offsets).numpy()
            return torch.from_numpy(self.tokens[at].astype(np.int64)).to(self.device)
        starts = starts.pin_memory().to(self.device, non_blocking=True)
        at = starts[:, None] + offsets.to(self.device, non_blocking=True)
        return self.on_device[at].long()

    def _start(self, place: int) -> int:
        epoch, place = divmod(place, self.an_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(self.length, (1,), generator=generator)
            order = torch.randperm(self.an_epoch, generator=generator)
            self._epoch, self._starts = epoch, (offset + order * self.length).tolist()
        return self._starts[place]
