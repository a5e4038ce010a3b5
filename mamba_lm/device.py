"""Choose the device and the number format of a run."""

import torch

from common.errors import UserError, warn
from mamba_lm.selective_scan import backend_name, load_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """Return the device of this name.

    Args:
        name: "cpu", "cuda", or "auto": CUDA if there is a GPU and a scan backend for it, else the
            CPU, with a warning if only the backend is missing.

    Raises:
        UserError: if "cuda" is asked for without a GPU or without a backend.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no CUDA GPU on this machine; use device cpu")
    try:
        with torch.no_grad():
            load_backend(backend_name(torch.device("cuda"), torch.float32))
    except UserError as error:
        if name == "cuda":
            raise
        warn(f"there is a GPU, but {error}; running on the CPU")
        return torch.device("cpu")
    return torch.device("cuda")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name: a key of `DTYPES`, or "auto", which is bfloat16 on CUDA and
    float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
