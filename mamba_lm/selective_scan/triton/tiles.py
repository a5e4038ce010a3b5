"""What the Triton kernels share: masked tiles in float32, and which row a tile of tokens is of."""

import triton
import triton.language as tl


@triton.jit
def load(pointer, mask):
    """In float32, zeros where the mask is false."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, mask):
    """In the dtype of what is pointed at."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_state(states, channels, d):
    """Where a program's part (STATES, CHANNELS) of a state (n, d) lies.

    Not as contiguous as it is: for wide loads, lanes would lie along four channels each, unlike in
    the tiles of steps, and every step's part would have to pass through shared memory.
    """
    return tl.max_contiguous(states[:, None] * d + channels[None], (1, 1))


@triton.jit
def slot_of(start, row, step, STEPS: tl.constexpr):
    """Where a row's tile from `step` on, a multiple of STEPS, stands among those of all rows.

    Rows start at tokens `start` and follow each other. Slots are in the rows' order and none is of
    two rows; there are num_slots of them, some without a tile.
    """
    return start // STEPS + row + step // STEPS


@triton.jit
def num_slots(tokens, rows, STEPS: tl.constexpr):
    return tokens // STEPS + rows


@triton.jit
def tile_in(slot, starts, lengths, rows, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """The row of a slot, its first token, its length and the step from which the slot's tile is;
    that is the length or more if there is none. ROWS is at least rows."""
    every = tl.arange(0, ROWS)
    first_slots = slot_of(tl.load(starts + every, mask=every < rows, other=0), every, 0, STEPS)
    row = tl.sum(((first_slots <= slot) & (every < rows)).to(tl.int32)) - 1
    start = tl.load(starts + row)
    step = (slot - slot_of(start, row, 0, STEPS)) * STEPS
    return row, start, tl.load(lengths + row), step
