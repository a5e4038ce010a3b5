"""The loss of a language model on every token of its windows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_lm.models.mamba import MambaLM
from mamba_lm.tensors import at_least_float32
from studies.base_model.windows import HeldOut


def next_token_loss(model: MambaLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of windows (b, l + 1): each token given those before it."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        hidden, _ = model.encode(windows[:, :-1], keep_state=False)
        logits = model.lm_head(hidden)
    return F.cross_entropy(at_least_float32(logits).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: MambaLM, held_out: HeldOut, length: int, batch_size: int, device: torch.device
) -> float:
    """Bits that the model needs for a byte of held-out text, end-of-text included, read in windows
    of `length` tokens that do not overlap, each from a fresh state: the model is a little better
    than that where it reads on."""
    tokens = torch.from_numpy(held_out.tokens.astype("int64"))
    length = min(length, len(tokens) - 1)
    count = (len(tokens) - 1) // length
    windows = torch.stack([tokens[k * length : (k + 1) * length + 1] for k in range(count)])
    nats = sum(
        next_token_loss(model, part.to(device)).item() * len(part)
        for part in windows.split(batch_size)
    )
    bytes_a_token = held_out.num_bytes / len(tokens)
    return nats / count / math.log(2) / bytes_a_token
