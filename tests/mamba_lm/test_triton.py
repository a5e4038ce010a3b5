"""The triton backend beyond parity: its kernels compile, the model trains with it."""

import json
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from common.errors import UserError
from mamba_lm import device, selective_scan
from mamba_lm.device import choose_device
from mamba_lm.training.prefix_suffix import Item, PrefixSuffixLM, collate

pytest.importorskip("triton")

KERNELS = {
    "scan_forward", "scan_gradients", "scan_carry", "scan_backward",
    "conv_forward", "conv_gradients", "conv_backward",
    "norm_step", "conv_step", "scan_step",
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_ahead_of_time(capability):
    """The interpreter also runs kernels that the compiler refuses."""
    command = [sys.executable, "-m", "tests.mamba_lm.compile_triton", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert {name.split()[0] for name in compiled} == KERNELS
    for target, size in compiled.values():
        assert target.rstrip("a") == f"sm_{capability}" and size > 1000


def test_training_on_forked_states_equals_the_reference(
    make_model, gradients, assert_near, monkeypatch
):
    """Prefixes and suffixes of different lengths, packed, with gradients through forks."""
    model = PrefixSuffixLM(make_model(d_state=4))
    examples = [
        Item.with_target(range(1, 1 + prefix), [7, 8, 9][:prompt], [3, 4, 0][:target])
        for prefix, prompt, target in ((5, 2, 3), (11, 3, 2), (5, 1, 1), (0, 2, 2))
    ]
    batch = collate(examples)

    def loss_and_gradients(backend):
        monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
        loss = model(**batch)["loss"]
        return loss.detach(), gradients(model, loss)

    loss, got = loss_and_gradients("triton")
    want_loss, want = loss_and_gradients("reference")
    assert_near(loss, want_loss, tolerance=1e-5)
    assert_near(got, want, tolerance=1e-4)


def test_a_gpu_without_mamba_ssm_is_used(monkeypatch, capsys):
    """Both `auto` and `cuda`: the triton backend needs no other package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selective_scan, "_inference_backend", lambda: "triton")
    for name in ("auto", "cuda"):
        assert choose_device(name) == torch.device("cuda")
    assert "warning" not in capsys.readouterr().err
    missing = "the triton selective scan is not installed"
    monkeypatch.setattr(device, "load_backend", Mock(side_effect=UserError(missing)))
    assert choose_device("auto") == torch.device("cpu")
    assert f"warning: there is a GPU, but {missing}" in capsys.readouterr().err
    with pytest.raises(UserError, match=missing):
        choose_device("cuda")
