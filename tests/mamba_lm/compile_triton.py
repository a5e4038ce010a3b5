"""Compile, without a GPU, every Triton kernel as training and decoding launch it.

    python -m tests.mamba_lm.compile_triton 90        # for compute capability 9.0

The launches are real, but the compiled kernel is not run. Prints one JSON object: for each launch,
named by the kernel and a number, the PTX target and the bytes of machine code.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mamba_lm.models.mamba import MambaConfig, MambaLM


class NoGPU:
    """A driver for launches that end after compilation."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(capability: int) -> dict[str, tuple[str, int]]:
    compiled, run = {}, JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **settings):
        binary = run(kernel, *args, grid=grid, warmup=True, **settings)
        name = kernel.fn.__name__
        seen = sum(key.split()[0] == name for key in compiled)
        target = next(line for line in binary.asm["ptx"].splitlines() if ".target" in line)
        compiled[f"{name} {seen}"] = target.split()[1], len(binary.asm["cubin"])

    triton.runtime.driver.set_active(NoGPU(capability))
    JITFunction.run = compile_only
    from mamba_lm.selective_scan import triton as kernels

    for dtype in (torch.bfloat16, torch.float32):
        launch_training(kernels, dtype)
        launch_decoding(kernels, dtype)
    return compiled


def launch_training(kernels, dtype: torch.dtype) -> None:
    """The width of mamba-130m; views of projections, both passes, with and without spans."""
    b, l, d, n, r = 8, 160, 1536, 16, 48
    x, z = torch.zeros(b, l, 2 * d, dtype=dtype, requires_grad=True).chunk(2, dim=2)
    B, C = torch.zeros(b, l, r + 2 * n, dtype=dtype).split((r, n, n), dim=2)[1:]
    delta, h0 = torch.zeros(b, l, d), torch.zeros(b, n, d)
    A, D, weight, bias = -torch.ones(d, n), torch.ones(d), torch.ones(d, 4), torch.ones(d)
    for rows in (b, 1):
        inputs = (x[:rows], delta[:rows], A, B[:rows], C[:rows], D, z[:rows], h0[:rows])
        y, h = kernels.selective_scan(*inputs)
        (y.float().sum() + h.sum()).backward(retain_graph=True)
        with torch.no_grad():
            kernels.selective_scan(*inputs)
    tail = torch.zeros(b, 3, d, dtype=dtype)
    kernels.causal_conv1d(x, weight, bias, tail).float().sum().backward()


@torch.no_grad()
def launch_decoding(kernels, dtype: torch.dtype) -> None:
    model = MambaLM(MambaConfig(vocab_size=1000, d_model=768, n_layer=2)).to(dtype)
    d, n = model.config.d_inner, model.config.d_state
    step = kernels.fused_layers([block.weights() for block in model.blocks])
    convs, ssms = [torch.zeros(4, 3, d, dtype=dtype)] * 2, [torch.zeros(4, n, d)] * 2
    step(torch.zeros(4, 1, 768), convs, ssms)


if __name__ == "__main__":
    print(json.dumps(compile_launches(int(sys.argv[1]))))
