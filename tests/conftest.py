"""Settings that must stand before anything is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, by its interpreter
