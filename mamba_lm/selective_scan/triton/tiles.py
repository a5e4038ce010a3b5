"""Helpers of the Triton kernels: masked tiles in float32, and the row of each tile of tokens."""

import triton
import triton.language as tl


@triton.jit
def load(pointer, mask):
    """Load as float32; zeros where the mask is false."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, mask):
    """Store in the dtype of the pointer."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_state(states, channels, d):
    """Return the offsets of a program's part (STATES, CHANNELS) of a state (n, d).

    They are declared less contiguous than they are. For wide loads, the compiler would give each
    lane four channels, unlike in the tiles of steps, and move every step through shared memory.
    """
    return tl.max_contiguous(states[:, None] * d + channels[None], (1, 1))


@triton.jit
def slot_of(start, row, step, STEPS: tl.constexpr):
    """Return the slot of a row's tile that begins at `step`, a multiple of STEPS.

    Slots number the tiles of all rows. The row begins at token `start`. Slots are in the order of
    the rows, and no two tiles share one; there are `num_slots` of them, some without a tile.
    """
    return start // STEPS + row + step // STEPS


@triton.jit
def num_slots(tokens, rows, STEPS: tl.constexpr):
    """Return the number of slots for this number of tokens in all rows together."""
    return tokens // STEPS + rows


@triton.jit
def tile_in(slot, starts, lengths, rows, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """Return the row of a slot, the row's first token and length, and the first step of the slot's
    tile: the length or more if the slot has no tile. ROWS is at least rows."""
    every = tl.arange(0, ROWS)
    first_slots = slot_of(tl.load(starts + every, mask=every < rows, other=0), every, 0, STEPS)
    row = tl.sum(((first_slots <= slot) & (every < rows)).to(tl.int32)) - 1
    start = tl.load(starts + row)
    step = (slot - slot_of(start, row, 0, STEPS)) * STEPS
    return row, start, tl.load(lengths + row), step
