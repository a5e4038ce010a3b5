"""llama.cpp as a peer: the same weights in its format, read and continued greedily."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch

from mamba_lm.models.mamba import MambaLM

FLOAT32 = ("ssm_conv1d.weight", "ssm_a")


def write_gguf(model: MambaLM, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """The weights, without a tokenizer; of bfloat16 are the matrices alone, as in its own files."""
    config = model.config
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.dt_rank)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_rows)
    writer.add_tokenizer_model("none")
    tensors = {
        "token_embd.weight": model.backbone.embeddings.weight,
        "output_norm.weight": model.backbone.norm_f.weight,
    }
    for place, block in enumerate(model.backbone.layers):
        mixer = block.mixer
        names = {
            "attn_norm.weight": block.norm.weight,
            "ssm_in.weight": mixer.in_proj.weight,
            "ssm_conv1d.weight": mixer.conv1d.weight.squeeze(1),
            "ssm_conv1d.bias": mixer.conv1d.bias,
            "ssm_x.weight": mixer.x_proj.weight,
            "ssm_dt.weight": mixer.dt_proj.weight,
            "ssm_dt.bias": mixer.dt_proj.bias,
            "ssm_a": -torch.exp(mixer.A_log),
            "ssm_d": mixer.D,
            "ssm_out.weight": mixer.out_proj.weight,
        }
        tensors |= {f"blk.{place}.{name}": tensor for name, tensor in names.items()}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().contiguous()
        if dtype == torch.bfloat16 and tensor.dim() == 2 and not name.endswith(FLOAT32):
            bits = tensor.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One sequence at a time, the way the Python binding is used."""

    def __init__(self, path: Path, context: int = 4096):
        threads = torch.get_num_threads()
        self.llm = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

    def read(self, ids: Sequence[int]) -> None:
        self.llm.reset()
        self.llm.eval(ids)

    def decode(self, count: int) -> list[int]:
        """Greedy tokens, without a stop."""
        tokens = []
        for _ in range(count):
            tokens.append(int(self.logits().argmax()))
            self.llm.eval(tokens[-1:])
        return tokens

    def logits(self) -> np.ndarray:
        """Logits (v,) of the next token."""
        return np.ctypeslib.as_array(self.llm._ctx.get_logits(), shape=(self.llm.n_vocab(),))

    def answer(self, prefix: Sequence[int], suffixes: Sequence[Sequence[int]], count: int) -> list:
        """Continuations of prefix and each suffix, the prefix read once, its state kept."""
        self.read(prefix)
        state = self.llm.save_state()
        answers = []
        for suffix in suffixes:
            self.llm.load_state(state)
            self.llm.eval(suffix)
            answers.append(self.decode(count))
        return answers
