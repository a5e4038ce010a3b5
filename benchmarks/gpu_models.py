"""The models that benchmarks.gpu compares, with the calls that it times."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import VOCABULARY, without_prefix
from mamba_lm import generate
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.training.prefix_suffix import IGNORED, Item, PrefixSuffixLM, collate

MAMBA_SSM, TRANSFORMERS = "mamba-ssm", "transformers"
PARTS = 4  # of a batch of examples that are read whole


class Model:
    """A language model of random weights and its ways of being run."""

    def __init__(self, name: str, d_model: int, n_layer: int, device: torch.device):
        self.name, self.device = name, device
        torch.manual_seed(0)
        with torch.device(device):  # to make 790 million weights on the CPU takes long
            self.module = _make(name, d_model, n_layer)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """(b, l, m), after the last norm; nothing is kept for later tokens."""
        if self.name == MAMBA_SSM:
            return self.module.backbone(input_ids)
        if self.name == TRANSFORMERS:
            return self.module.backbone(input_ids, use_cache=False).last_hidden_state
        return self.module.encode(input_ids, keep_state=False)[0]

    def training_step(self, examples: list[Item], forked: bool) -> Callable[[], None]:
        """bfloat16 autocast, forward, backward and AdamW; the head only where there is loss.

        Forked, each context is read once. Otherwise each example is read whole, as by the peers, in
        PARTS of similar lengths whose gradients are added: there is less padding then.
        """
        if forked:
            parts = [examples]
        else:
            examples = sorted(map(without_prefix, examples), key=lambda e: len(e.suffix))
            size = -(-len(examples) // PARTS)
            parts = [examples[at : at + size] for at in range(0, len(examples), size)]
        batches = [
            {  # lengths stay where the Trainer leaves them
                name: value if name.endswith("lengths") else value.to(self.device)
                for name, value in collate(part).items()
            }
            for part in parts
        ]
        labels = sum(example.num_labels for example in examples)
        loss = PrefixSuffixLM(self.module) if forked else self._loss
        is_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            for batch in batches:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=is_gpu):
                    losses = loss(**batch, num_items_in_batch=labels)
                losses["loss"].backward()
            optimizer.step()

        return step

    def _loss(self, suffixes, labels, num_items_in_batch, **_) -> dict[str, Tensor]:
        following = labels[:, 1:].flatten()
        at = (following != IGNORED).nonzero().squeeze(1)
        logits = self.module.lm_head(self.hidden(suffixes).flatten(0, 1)[at]).float()
        losses = F.cross_entropy(logits, following[at], reduction="sum")
        return {"loss": losses / num_items_in_batch}

    def for_inference(self) -> nn.Module:
        """In bfloat16 on a GPU."""
        return self.module.to(torch.bfloat16 if self.device.type == "cuda" else None).eval()

    def prefill(self, rows: int, length: int) -> Callable[[], None]:
        self.for_inference()
        input_ids = torch.randint(VOCABULARY, (rows, length), device=self.device)

        @torch.inference_mode()
        def call() -> None:
            self.hidden(input_ids)

        return call

    def generation(self, rows: int, length: int, new: int) -> Callable[[], None]:
        """A prompt is read and `new` tokens follow: greedily, without a stop."""
        model = self.for_inference()
        input_ids = torch.randint(VOCABULARY, (rows, length), device=self.device)

        @torch.inference_mode()
        def call() -> None:
            if self.name == MAMBA_SSM:
                model.generate(input_ids, length + new, cg=True, top_k=1)
            elif self.name == TRANSFORMERS:
                settings = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
                model.generate(input_ids, do_sample=False, **settings)
            else:
                reading = generate.read(model, input_ids.tolist())
                generate.decode(model, reading, [], new)

        return call

    def product_flop(self) -> float:
        """FLOP of all layers' products in one token's forward pass; without the head."""
        parameters = self.module.named_parameters()
        return 2.0 * sum(p.numel() for name, p in parameters if name.endswith("proj.weight"))

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    def state_bytes(self, rows: int, d_inner: int, n_layer: int) -> int:
        """Ours is float32, with the convolution's last three inputs; the peers' is of the weights'
        dtype, with four."""
        n, w = 16, 4
        values = 4 * n + 2 * (w - 1) if self.name == "ours" else 2 * n + 2 * w
        return rows * n_layer * d_inner * values


def _make(name: str, d_model: int, n_layer: int) -> nn.Module:
    ours = MambaConfig(VOCABULARY, d_model, n_layer)
    if name == MAMBA_SSM:
        from mamba_ssm.models.config_mamba import MambaConfig as Config
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        return MambaLMHeadModel(Config(d_model, 0, n_layer, VOCABULARY))
    if name == TRANSFORMERS:
        from transformers import MambaConfig as Config
        from transformers import MambaForCausalLM

        shape = {"hidden_size": d_model, "num_hidden_layers": n_layer}
        return MambaForCausalLM(Config(vocab_size=ours.vocab_rows, **shape))
    return MambaLM(ours)
