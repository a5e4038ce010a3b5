"""Settings that must stand before anything is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, by its interpreter
