"""Mamba-1 language model whose whole memory is a value: read a prefix, fork its state, go on.

Symbols, after Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023):

    b   batch                         A (d, n)    state decay, -exp(A_log)        (eq. 2)
    l   length                        B (b, l, n) input matrix, selected by x     (algorithm 2)
    m   d_model, residual width       C (b, l, n) output matrix, selected by x    (algorithm 2)
    d   d_inner = expand * d_model    D (d,)      skip connection                 (section 2)
    n   d_state                       Δ (b, l, d) step, softplus(dt_proj(dt))     (section 3.5.1)
    r   dt_rank                       h (b, n, d) the state                       (eq. 2)
    w   d_conv                        v           vocabulary rows

Parameter names are those of `transformers`' MambaForCausalLM. Falcon-Mamba ("Falcon Mamba: The
First Competitive Attention-free 7B Language Model", 2024) adds an RMS norm on B, C and dt.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_lm.selective_scan import (
    LayerWeights,
    causal_conv1d,
    fused_layers,
    fused_mixer,
    linear,
    reads_packed,
    rms_norm,
    selective_scan,
    softplus_linear,
)


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
        for name in ("norm_eps", "bcdt_rms_eps"):  # JSON may hold an integer
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
        """Rows of the embedding; those from the tokenizer's length on are never sampled."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def num_parameters(self) -> int:
        """Of a model that need not exist: tied embeddings once."""
        m, d, n, r = self.d_model, self.d_inner, self.d_state, self.dt_rank
        projections = 3 * m * d + (r + 2 * n) * d + r * d + (2 * d + m if self.proj_bias else 0)
        layer = m + projections + d * (self.d_conv + self.conv_bias) + d * (n + 2)
        return self.n_layer * layer + m + self.vocab_rows * m * (1 if self.tie_embeddings else 2)


class MambaState(NamedTuple):
    """Everything a model remembers of what it has read. A value: no call changes one in place.

    conv: per layer (b, w - 1, d), the last inputs of the convolution, oldest first.
    ssm: per layer (b, n, d), the state h, in float32 or float64; d innermost, as kernels read it.
    """

    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return self.ssm[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.ssm[0].device

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [*self.conv, *self.ssm]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "MambaState":
        """From what `tensors` gives."""
        n_layer = len(tensors) // 2
        return MambaState(tuple(tensors[:n_layer]), tuple(tensors[n_layer:]))

    def fork(self, index: Tensor) -> "MambaState":
        """Rows `index` (int64, (k,)) of this state, each as often as it is named.

        By index_select, whose gradient is bit-reproducible on CPU (that of h[index] is not).
        """
        return self._map(lambda t: t.index_select(0, index))

    def detach(self) -> "MambaState":
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> "MambaState":
        return self._map(lambda t: t.to(*args, **kwargs))

    def _map(self, function) -> "MambaState":
        return MambaState(*(tuple(function(t) for t in part) for part in self))

    @staticmethod
    def concatenate(states: "list[MambaState]") -> "MambaState":
        """The rows of all states, in order."""
        parts = zip(*states, strict=True)
        return MambaState(*(tuple(map(torch.cat, zip(*part, strict=True))) for part in parts))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DeltaProjection(Linear):
    """dt (b, l, r) -> Δ (b, l, d). A module of its own, so that a forward hook on it reads Δ.

    On the CPU, rows of unlike lengths come back to back: (tokens, r) -> (tokens, d).
    """

    def forward(self, dt: Tensor) -> Tensor:
        return softplus_linear(dt, self.weight, self.bias)


class MambaMixer(nn.Module):
    """The selective state-space layer (section 3.4, figure 3)."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
        self.split = (r, n, n)
        self.bcdt_rms_eps = config.bcdt_rms_eps
        self.in_proj = Linear(m, 2 * d, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d, bias=config.conv_bias)
        self.x_proj = Linear(d, r + 2 * n, bias=False)
        self.dt_proj = DeltaProjection(r, d)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1).repeat(d, 1)))  # S4D-Real
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = Linear(d, m, bias=config.proj_bias)

    def forward(
        self,
        u: Tensor,
        conv: Tensor | None,
        ssm: Tensor | None,
        lengths: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """u (b, l, m) -> output (b, l, m), the new conv (b, w - 1, d) and ssm (b, n, d), or None.

        Or u (tokens, m) and so on: rows of `lengths` back to back.
        """
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (b, l, d) each
        width = self.conv1d.kernel_size[0]
        new_conv = last_inputs(x, conv, width - 1, lengths) if keep_state else None
        weight = self.conv1d.weight.squeeze(1)  # (d, w)
        x = causal_conv1d(x, weight, self.conv1d.bias, conv, lengths)  # (b, l, d)
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)  # (b, l, r), (b, l, n), (b, l, n)
        if self.bcdt_rms_eps is not None:
            dt, B, C = (F.rms_norm(v, v.shape[-1:], eps=self.bcdt_rms_eps) for v in (dt, B, C))
        delta = self.dt_proj(dt)  # (b, l, d)
        A = -torch.exp(at_least_float32(self.A_log))  # (d, n)
        y, new_ssm = selective_scan(x, delta, A, B, C, self.D, z, ssm, lengths, keep_state)
        return self.out_proj(y), new_conv, new_ssm


def last_inputs(x: Tensor, before: Tensor | None, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` real inputs (b, count, d) of x (b, l, d), those in `before` included.

    `lengths` (b,) counts each row's real inputs, all l by default and at most; zeros stand before
    the first. x may be (tokens, d), rows of these lengths back to back.
    """
    d = x.shape[-1]
    if before is None:
        before = x.new_zeros(len(x) if x.dim() == 3 else len(lengths), count, d)
    if x.numel() == 0:
        return before
    if lengths is None:
        # A copy in either case: a view would keep all of x alive as long as the state.
        return torch.cat([before[:, x.shape[1] :], x[:, max(x.shape[1] - count, 0) :]], dim=1)
    if x.dim() == 3:
        starts = torch.arange(len(x), device=x.device) * x.shape[1]
        lengths = lengths.clamp(0, x.shape[1])
    else:
        # Empty rows at the end start behind the last token.
        starts = (lengths.cumsum(0) - lengths).clamp(max=len(x) - 1)
    at = lengths[:, None] + torch.arange(-count, 0, device=x.device)  # (b, count), < 0: in `before`
    places = starts[:, None] + at.clamp(min=0)
    in_x = x.reshape(-1, d).index_select(0, places.flatten()).view_as(before)
    in_tail = (at + count).clamp(max=count - 1).unsqueeze(-1).expand_as(before)
    return torch.where((at >= 0).unsqueeze(-1), in_x, before.gather(1, in_tail))


class MambaBlock(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)

    def forward(
        self, residual: Tensor, conv, ssm, lengths, keep_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        u = self.norm(residual)
        if ssm is None and not keep_state:  # padding, at the end, then matters to nothing
            output = fused_mixer(u, self.weights)
            if output is not None:
                return residual + output, None, None
        output, conv, ssm = self.mixer(u, conv, ssm, lengths, keep_state)
        return residual + output, conv, ssm

    def weights(self) -> LayerWeights | None:
        """None where they do not say all: a module is replaced, as by LoRA, or has a hook."""
        norm, mixer = self.norm, self.mixer
        in_proj, conv, x_proj = mixer.in_proj, mixer.conv1d, mixer.x_proj
        dt_proj, out_proj = mixer.dt_proj, mixer.out_proj
        plain = (
            (self, MambaBlock), (norm, RMSNorm), (mixer, MambaMixer), (in_proj, Linear),
            (conv, nn.Conv1d), (x_proj, Linear), (dt_proj, DeltaProjection), (out_proj, Linear),
        )  # fmt: skip
        if not all(
            type(module) is expected and _is_untouched(module) for module, expected in plain
        ):
            return None
        return LayerWeights(
            norm.eps, mixer.bcdt_rms_eps, norm.weight, in_proj.weight, in_proj.bias, conv.weight,
            conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, mixer.A_log, mixer.D,
            out_proj.weight, out_proj.bias,
        )  # fmt: skip


def _is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module does no more than its class says."""
    hooks = module._forward_hooks, module._forward_pre_hooks, *_EVERY_MODULES_HOOKS
    return not any(hooks) and "forward" not in vars(module)


_EVERY_MODULES_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)


class MambaBackbone(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_rows, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class MambaLM(nn.Module):
    """Language model over token ids. Weights start as in the paper's own code."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.recompute_every = 0  # each nth layer keeps for its gradients what it reads, no more
        self.generation: dict = {}  # a checkpoint's settings of it, written when it is saved
        self.backbone = MambaBackbone(config)
        self.lm_head = Linear(config.d_model, config.vocab_rows, bias=False)
        initialize(self)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

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
        states at padded positions mean nothing. Who needs no state spares work on a GPU by
        keep_state=False, and gets None. There, lengths on the CPU spare the host a wait for the
        GPU. Raises ValueError on lengths of another shape.
        """
        if lengths is not None:
            b, l = input_ids.shape
            if lengths.shape != (b,):
                raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected {(b,)}")
            lengths = lengths.clamp(0, l)  # longer ones would read the next row
        packs = lengths is not None and reads_packed(self.lm_head.weight)
        if packs:  # padding is not even computed
            is_real = torch.arange(l, device=lengths.device) < lengths[:, None]  # (b, l)
            places = is_real.flatten().nonzero().squeeze(1).to(input_ids.device)  # (tokens,)
            input_ids = input_ids.flatten().index_select(0, places)
        if lengths is not None:
            lengths = lengths.to(input_ids.device)
        hidden = self._embed(input_ids)  # (b, l, m), or (tokens, m)
        convs, ssms = state if state is not None else [(None,) * len(self.backbone.layers)] * 2
        new_convs, new_ssms = [], []
        recompute_every = self.recompute_every if torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.backbone.layers):
            if recompute_every and index % recompute_every == 0:
                layer = functools.partial(
                    checkpoint, layer, use_reentrant=False, preserve_rng_state=False
                )
            hidden, conv, ssm = layer(hidden, convs[index], ssms[index], lengths, keep_state)
            new_convs.append(conv)
            new_ssms.append(ssm)
        hidden = self.backbone.norm_f(hidden)
        if packs:
            padded = hidden.new_zeros(b * l, self.config.d_model)
            hidden = padded.index_copy(0, places, hidden).view(b, l, self.config.d_model)
        return hidden, MambaState(tuple(new_convs), tuple(new_ssms)) if keep_state else None

    def layer_weights(self) -> list[LayerWeights] | None:
        """None where they do not say all that the layers do."""
        layers = self.backbone.layers
        weights = [layer.weights() if type(layer) is MambaBlock else None for layer in layers]
        return None if None in weights else weights

    def is_plain(self) -> bool:
        """Whether its weights say all that it does: nothing is replaced and nothing has a hook."""
        others = (self, self.backbone.embeddings, self.backbone.norm_f, self.lm_head)
        return self.layer_weights() is not None and all(map(_is_untouched, others))

    def stepper(self) -> Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]:
        """What reads one token more a row: (token_ids (b,), state) to hidden (b, m) and a state.

        As `encode`, but in one kernel where the backend has it. Good until weights are moved,
        replaced or hooked.
        """
        fused = self._fused_layers()

        def step(token_ids, state):
            stepped = fused(self._embed(token_ids[:, None]), *state) if fused is not None else None
            if stepped is None:
                hidden, state = self.encode(token_ids[:, None], state)
                return hidden[:, 0], state
            residual, convs, ssms = stepped
            return self.backbone.norm_f(residual)[:, 0], MambaState(convs, ssms)

        return step

    def encode_each(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState] | None:
        """Read the tokens (l,) of one row: hidden (l, m), and the states after each of them, a row
        each. None where the backend has no kernel for that, or they are too many for it."""
        fused = self._fused_layers()
        if fused is None:
            return None
        read = fused(self._embed(token_ids[:, None]), *state, in_sequence=True)
        if read is None:
            return None
        residual, convs, ssms = read
        return self.backbone.norm_f(residual)[:, 0], MambaState(convs, ssms)

    def _fused_layers(self) -> Callable | None:
        weights = self.layer_weights()
        return fused_layers(weights) if weights is not None else None

    def _embed(self, input_ids: Tensor) -> Tensor:
        hidden = self.backbone.embeddings(input_ids)
        return at_least_float32(hidden) if self.config.residual_in_fp32 else hidden

    def forward(
        self,
        input_ids: Tensor,
        state: MambaState | None = None,
        mask: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Logits of the next token and the state after input_ids (b, l), read from `state` on.

        mask (b, l) bool, True where a token is real; padding may stand anywhere and neither enters
        the window of real tokens nor moves the state. logits_at (b, l) bool asks for logits at
        those positions only. Returns logits (b, l, v), or (k, v) for the k asked-for positions.
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


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def right_pad(sequences: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Token sequences as one (b, l) int64 tensor, padded at the end, and their lengths (b,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), max(map(len, sequences))), value)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return padded, lengths


def initialize(model: MambaLM) -> None:
    """The initialisation of the paper (section 3.6) and its code, `mamba_ssm`: Δ starts between
    0.001 and 0.1, residual outputs are scaled by 1 / sqrt(n_layer)."""
    nn.init.normal_(model.backbone.embeddings.weight, std=model.config.initializer_range)
    for block in model.backbone.layers:
        mixer = block.mixer
        for projection in (mixer.in_proj, mixer.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        initialize_delta(mixer.dt_proj, 1e-3, 0.1)
        if model.config.rescale_prenorm_residual:
            with torch.no_grad():
                mixer.out_proj.weight /= math.sqrt(model.config.n_layer)


def initialize_delta(dt_proj: DeltaProjection, dt_min: float, dt_max: float) -> None:
    """Let Δ start between dt_min and dt_max, log-uniformly over the channels."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand_like(dt_proj.bias) * (high - low) + low).clamp(min=1e-4)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus's inverse
