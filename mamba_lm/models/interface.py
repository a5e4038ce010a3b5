"""What the rest of the project may use of a language model, whichever its family.

`generate`, `training`, `delta`, `checkpoint` and `context_qa` know this page alone. A family is one
file beside it: a config and a `LanguageModel`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mamba_lm.models.state import MambaState
from mamba_lm.selective_scan import reads_packed
from mamba_lm.tensors import find_tokens, unpack


class ModelConfig(Protocol):
    """The shape of a model: a frozen dataclass of a family's own.

    It has no `model_type`: peft refuses adapters on out_proj where one names a Mamba model.
    """

    d_model: int
    n_layer: int
    tie_embeddings: bool

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding; those from the tokenizer's length on are never sampled."""

    @property
    def num_parameters(self) -> int:
        """Those of the model, which need not exist; tied embeddings count once."""

    def build(self) -> "LanguageModel":
        """A model of this shape, its weights as at the start of training."""


class LanguageModel(nn.Module, ABC):
    """A language model over token ids whose memory is a value.

    Its weights are named as `transformers` names them: `backbone.embeddings` and `lm_head`, which
    are one parameter where config.tie_embeddings, and a family's own.
    """

    lm_head: nn.Module  # hidden states (..., m) -> logits (..., v)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute_every = 0  # each nth layer keeps for its gradients what it reads, no more
        self.generation: dict[str, Any] = {}  # a checkpoint's settings of it, written when saved

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(
        self,
        input_ids: Tensor,
        state: MambaState | None = None,
        lengths: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, MambaState | None]:
        """Read input_ids (b, l), from `state` on, into normed hidden states (b, l, m) and a state.

        lengths (b,) int64: the real tokens of right-padded rows, all l where it is more and none
        where it is less. Padding is exact: the state is that after a row's last real token. Hidden
        states at padded positions mean nothing. keep_state=False spares work on a GPU, and returns
        None as the state. There, lengths on the CPU spare the host a wait for the GPU. Raises
        ValueError on lengths of another shape.
        """
        if lengths is None:
            return self.read_tokens(input_ids, state, None, keep_state)
        b, l = input_ids.shape
        if lengths.shape != (b,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected {(b,)}")
        device, lengths = input_ids.device, lengths.clamp(0, l)  # longer: the next row's tokens
        if not (reads_packed(next(self.parameters())) and self.can_pack()):
            return self.read_tokens(input_ids, state, lengths.to(device), keep_state)
        # Padding is not even computed.
        places = find_tokens(lengths, l).to(device)
        packed = input_ids.flatten().index_select(0, places)
        hidden, state = self.read_tokens(packed, state, lengths.to(device), keep_state)
        return unpack(hidden, places, (b, l)), state

    def forward(
        self,
        input_ids: Tensor,
        state: MambaState | None = None,
        mask: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Logits of the next token and the state after input_ids (b, l), read from `state` on.

        mask (b, l) bool, True where a token is real; padding may be anywhere and neither enters the
        window of real tokens nor moves the state. logits_at (b, l) bool asks for logits at those
        positions only. Returns logits (b, l, v), or (k, v) for the k asked-for positions.
        """
        if mask is None:
            hidden, state = self.encode(input_ids, state)
        else:
            mask = mask.bool()
            order = torch.argsort(~mask, dim=1, stable=True)  # real tokens first, in order
            hidden, state = self.encode(input_ids.gather(1, order), state, mask.sum(1))
            back = torch.argsort(order, dim=1).unsqueeze(-1).expand_as(hidden)
            hidden = hidden.gather(1, back)
        return self.lm_head(hidden if logits_at is None else hidden[logits_at]), state

    @abstractmethod
    def read_tokens(
        self,
        input_ids: Tensor,
        state: MambaState | None,
        lengths: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, MambaState | None]:
        """As `encode`, of which it is the family's own part: lengths are from 0 to l. Where
        `can_pack` and the backend reads packed rows, input_ids (tokens,) are rows of these lengths
        back to back, and so are the hidden states (tokens, m)."""

    @abstractmethod
    def stepper(self) -> Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]:
        """A function that reads one token more a row: (token_ids (b,), state) to hidden (b, m) and
        a state.

        As `encode`, but in one kernel where the backend has it and the weights say everything. Ask
        for a new one after weights were moved or replaced, and after a hook or an adapter was
        added; weights that are updated in place are read as they are.
        """

    @abstractmethod
    def encode_each(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState] | None:
        """Read the tokens (l,) of one row: hidden (l, m), and the states after each of them, a row
        each. None where the backend has no kernel for that, the weights do not say everything, or
        they are too many tokens for it."""

    @abstractmethod
    def is_plain(self) -> bool:
        """Whether its weights say all that it does: no adapter, nothing replaced, no hook."""

    @abstractmethod
    def can_pack(self) -> bool:
        """Whether all its modules read tokens back to back: no hook has to see (b, l, ...), and the
        convolutions are plain. An adapter of a projection maps each token by itself."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The layers in order, each called once a pass: what is sharded one by one."""

    @property
    @abstractmethod
    def delta_modules(self) -> Sequence[nn.Module]:
        """Of each layer, in order, the module whose output is Δ (b, l, channels): hooks read it."""
