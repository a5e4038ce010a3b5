"""Which device and number format a script runs in, from its --device and --dtype."""

import torch

from common.errors import UserError, warn
from mamba_lm.selective_scan import backend_name, load_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where a GPU and its kernels are; an explicit device must be there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    try:
        with torch.no_grad():
            load_backend(backend_name(torch.device("cuda"), torch.float32))
    except UserError as error:
        if name == "cuda":
            raise
        warn(f"a GPU is here, but {error}; running on the CPU")
        return torch.device("cpu")
    return torch.device("cuda")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
