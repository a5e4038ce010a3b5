"""Mamba-1 language model whose whole memory is a value: read a prefix, fork its state, read on.

Symbols, after Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023):

    b   batch                         A (d, n)    state decay, -exp(A_log)        (eq. 2)
    l   length                        B (b, l, n) input matrix, selected by x     (algorithm 2)
    m   d_model, residual width       C (b, l, n) output matrix, selected by x    (algorithm 2)
    d   d_inner = expand * d_model    D (d,)      skip connection                 (section 2)
    n   d_state                       Δ (b, l, d) step, softplus(dt_proj(dt))     (section 3.5.1)
    r   dt_rank                       h (b, n, d) the state                       (eq. 2)
    w   d_conv                        v           vocabulary rows

The state of each layer is the convolution's last inputs (b, w - 1, d), oldest first, and h in
float32 or float64, with d innermost, as kernels read it.

Parameter names are those of `transformers`' MambaForCausalLM. Falcon-Mamba ("Falcon Mamba: The
First Competitive Attention-free 7B Language Model", 2024) adds an RMS norm on B, C and dt.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.modules import (
    DeltaSoftplus,
    Linear,
    RMSNorm,
    convolve,
    has_hooks,
    is_plain_convolution,
    is_untouched,
    last_inputs,
)
from mamba_lm.models.state import MambaState
from mamba_lm.selective_scan import (
    LayerWeights,
    fused_layers,
    fused_mixer,
    selective_scan,
    softplus_linear,
)
from mamba_lm.tensors import at_least_float32


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a model; vocab_size is rounded up to a multiple of pad_vocab_size_multiple."""

    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | None = None  # None: ceil(d_model / 16)
    d_inner: int | None = None  # None: expand * d_model
    norm_eps: float = 1e-5
    bcdt_rms_eps: float | None = None  # Falcon-Mamba's RMS norm on B, C and dt; None: no such norm
    proj_bias: bool = False
    conv_bias: bool = True
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    initializer_range: float = 0.02  # standard deviation of fresh embeddings
    rescale_prenorm_residual: bool = True  # fresh output projections by 1 / sqrt(n_layer)

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layer", "pad_vocab_size_multiple"):
            self._require_size(name)
        derived = {
            "dt_rank": self.dt_rank or math.ceil(self.d_model / 16),
            "d_inner": self.d_inner or int(self.expand * self.d_model),
        }
        for name in ("norm_eps", "bcdt_rms_eps"):  # JSON may have an integer
            value = getattr(self, name)
            derived[name] = value if value is None else float(value)
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        for name in ("d_state", "d_conv", "dt_rank", "d_inner"):
            self._require_size(name)

    def _require_size(self, name: str) -> None:
        value = getattr(self, name)
        limit = 2**12 if name == "n_layer" else 2**31  # each is made, in a millisecond
        if type(value) is not int or not 1 <= value < limit:
            raise ValueError(f"{name} must be an integer from 1 to {limit - 1}, not {value!r:.40}")

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: vocab_size rounded up to pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def num_parameters(self) -> int:
        """Those of the model, which need not exist; tied embeddings count once."""
        m, d, n, r = self.d_model, self.d_inner, self.d_state, self.dt_rank
        projections = 3 * m * d + (r + 2 * n) * d + r * d + (2 * d + m if self.proj_bias else 0)
        layer = m + projections + d * (self.d_conv + self.conv_bias) + d * (n + 2)
        return self.n_layer * layer + m + self.vocab_rows * m * (1 if self.tie_embeddings else 2)

    def build(self) -> "MambaLM":
        """A model of this shape with random weights."""
        return MambaLM(self)


class MambaMixer(nn.Module):
    """The selective state-space layer (section 3.4, figure 3)."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
        self.split, self.width = (r, n, n), config.d_conv
        self.bcdt_rms_eps = config.bcdt_rms_eps
        self.in_proj = Linear(m, 2 * d, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d, bias=config.conv_bias)
        self.x_proj = Linear(d, r + 2 * n, bias=False)
        self.dt_proj = Linear(r, d)
        self.delta = DeltaSoftplus()
        self.A_log = nn.Parameter(torch.empty(d, n))
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = Linear(d, m, bias=config.proj_bias)

    def forward(
        self,
        u: Tensor,
        tail: Tensor | None,
        h: Tensor | None,
        lengths: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """u (b, l, m) -> output (b, l, m), the new tail (b, w - 1, d) and h (b, n, d), or None.

        Packed rows of `lengths`, back to back, are (tokens, m) and so on.
        """
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (b, l, d) each
        new_tail = last_inputs(x, tail, self.width - 1, lengths) if keep_state else None
        x = convolve(self.conv1d, x, tail, self.width, lengths)  # (b, l, d)
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)  # (b, l, r), (b, l, n), (b, l, n)
        if self.bcdt_rms_eps is not None:
            dt, B, C = (F.rms_norm(v, v.shape[-1:], eps=self.bcdt_rms_eps) for v in (dt, B, C))
        delta = self._delta(dt)  # (b, l, d)
        A = -torch.exp(at_least_float32(self.A_log))  # (d, n)
        y, h = selective_scan(x, delta, A, B, C, self.D, z, h, lengths, keep_state)
        return self.out_proj(y), new_tail, h

    def _delta(self, dt: Tensor) -> Tensor:
        """Δ (b, l, d) of dt (b, l, r)."""
        if is_untouched(self.dt_proj, Linear) and is_untouched(self.delta, DeltaSoftplus):
            return softplus_linear(dt, self.dt_proj.weight, self.dt_proj.bias)  # one kernel
        return self.delta(self.dt_proj(dt))

    def is_plain(self) -> bool:
        """Whether its weights say all that it does."""
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        return (
            is_untouched(self, MambaMixer)
            and all(is_untouched(module, Linear) for module in linears)
            and is_plain_convolution(self.conv1d)
            and is_untouched(self.delta, DeltaSoftplus)
        )


class MambaBlock(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)

    def forward(
        self,
        residual: Tensor,
        tail: Tensor | None,
        h: Tensor | None,
        lengths: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `MambaMixer.forward`, with the residual (b, l, m) in u's place."""
        u = self.norm(residual)
        if h is None and not keep_state:  # padding, at the end, then matters to nothing
            output = fused_mixer(u, self.weights)
            if output is not None:
                return residual + output, None, None
        output, tail, h = self.mixer(u, tail, h, lengths, keep_state)
        return residual + output, tail, h

    def weights(self) -> LayerWeights | None:
        """Those of the layer; None where they do not say all that it does."""
        norm, mixer = self.norm, self.mixer
        if not (
            is_untouched(self, MambaBlock)
            and is_untouched(norm, RMSNorm)
            and type(mixer) is MambaMixer
            and mixer.is_plain()
        ):
            return None
        in_proj, conv, x_proj = mixer.in_proj, mixer.conv1d, mixer.x_proj
        dt_proj, out_proj = mixer.dt_proj, mixer.out_proj
        return LayerWeights(
            norm.eps, mixer.bcdt_rms_eps, norm.weight, in_proj.weight, in_proj.bias, conv.weight,
            conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, mixer.A_log, mixer.D,
            out_proj.weight, out_proj.bias,
        )  # fmt: skip

    def can_pack(self) -> bool:
        """Whether its modules read tokens back to back."""
        mixer = self.mixer
        return (
            type(mixer) is MambaMixer
            and is_plain_convolution(mixer.conv1d)
            and not any(map(has_hooks, mixer.modules()))
        )


class MambaBackbone(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_rows, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class MambaLM(LanguageModel):
    """Language model over token ids. Weights start as in the paper's own code."""

    config: MambaConfig

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.backbone = MambaBackbone(config)
        self.lm_head = Linear(config.d_model, config.vocab_rows, bias=False)
        if not self.lm_head.weight.is_meta:  # else there is nothing to fill
            initialize(self)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def read_tokens(
        self,
        input_ids: Tensor,
        state: MambaState | None,
        lengths: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, MambaState | None]:
        hidden = self._embed(input_ids)  # (b, l, m)
        tails, hs = self._split(state)
        new_tails, new_hs = [], []
        recompute_every = self.recompute_every if torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.backbone.layers):
            if recompute_every and index % recompute_every == 0:
                layer = functools.partial(
                    checkpoint, layer, use_reentrant=False, preserve_rng_state=False
                )
            hidden, tail, h = layer(hidden, tails[index], hs[index], lengths, keep_state)
            new_tails.append(tail)
            new_hs.append(h)
        hidden = self.backbone.norm_f(hidden)
        return hidden, MambaState((*new_tails, *new_hs)) if keep_state else None

    def _embed(self, input_ids: Tensor) -> Tensor:
        hidden = self.backbone.embeddings(input_ids)
        return at_least_float32(hidden) if self.config.residual_in_fp32 else hidden

    def _split(self, state: MambaState | None) -> tuple[Sequence, Sequence]:
        """The convolution's tail and h of each layer: first all tails, then all h."""
        n = len(self.backbone.layers)
        return ([None] * n,) * 2 if state is None else (state.tensors[:n], state.tensors[n:])

    # One token, or several, through all layers in one kernel

    def stepper(self) -> Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]:
        fused = self._fused_layers()

        def step(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
            ids = token_ids[:, None]
            stepped = fused(self._embed(ids), *self._split(state)) if fused is not None else None
            if stepped is None:
                hidden, state = self.encode(ids, state)
                return hidden[:, 0], state
            return self._finish(*stepped)

        return step

    def encode_each(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState] | None:
        fused = self._fused_layers()
        if fused is None:
            return None
        read = fused(self._embed(token_ids[:, None]), *self._split(state), in_sequence=True)
        return None if read is None else self._finish(*read)

    def _fused_layers(self) -> Callable | None:
        weights = self._layer_weights()
        return None if weights is None else fused_layers(weights)

    def _finish(
        self, residual: Tensor, tails: Sequence[Tensor], hs: Sequence[Tensor]
    ) -> tuple[Tensor, MambaState]:
        return self.backbone.norm_f(residual)[:, 0], MambaState((*tails, *hs))

    # What its modules are

    def _layer_weights(self) -> list[LayerWeights] | None:
        """None where they do not say all that the layers do."""
        layers = self.backbone.layers
        weights = [layer.weights() if type(layer) is MambaBlock else None for layer in layers]
        return None if None in weights else weights

    def is_plain(self) -> bool:
        return (
            self._layer_weights() is not None
            and is_untouched(self, MambaLM)
            and is_untouched(self.backbone.embeddings, nn.Embedding)
            and is_untouched(self.backbone.norm_f, RMSNorm)
            and is_untouched(self.lm_head, Linear)
        )

    def can_pack(self) -> bool:
        return all(isinstance(layer, MambaBlock) and layer.can_pack() for layer in self.blocks)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.backbone.layers)

    @property
    def delta_modules(self) -> Sequence[nn.Module]:
        found = [
            [module for module in block.modules() if isinstance(module, DeltaSoftplus)]
            for block in self.blocks
        ]
        if any(len(modules) != 1 for modules in found):
            raise UserError("a layer has copies of the module that computes Δ: merge the adapters")
        return [module for (module,) in found]


def initialize(model: MambaLM) -> None:
    """The initialisation of the paper (section 3.6) and its code, `mamba_ssm`: Δ starts between
    0.001 and 0.1, residual outputs are scaled by 1 / sqrt(n_layer)."""
    nn.init.normal_(model.backbone.embeddings.weight, std=model.config.initializer_range)
    for block in model.backbone.layers:
        mixer = block.mixer
        d, n = mixer.A_log.shape
        with torch.no_grad():
            mixer.A_log.copy_(torch.log(torch.arange(1.0, n + 1).repeat(d, 1)))  # S4D-Real
            mixer.D.fill_(1.0)
        for projection in (mixer.in_proj, mixer.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        initialize_delta(mixer.dt_proj, 1e-3, 0.1)
        if model.config.rescale_prenorm_residual:
            with torch.no_grad():
                mixer.out_proj.weight /= math.sqrt(model.config.n_layer)


def initialize_delta(dt_proj: nn.Linear, dt_min: float, dt_max: float) -> None:
    """Let Δ start between dt_min and dt_max, log-uniformly over the channels."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand_like(dt_proj.bias) * (high - low) + low).clamp(min=1e-4)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus's inverse
