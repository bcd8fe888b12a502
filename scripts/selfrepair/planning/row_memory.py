"""Memory of rows, for the stages and for the estimates.

A module of its own: all code that a cell imports is part of what makes the cell stale, and constants of estimates must
not be.
"""

ROWS_HELD = 1 << 30  # bytes of rows of a cell with `read: every` that are measured before they are reduced
_SCALARS = 25  # numbers of a row beside its lists, with every outcome


def row_bytes(item: int, width: int, widest: int, heads: int, length: float) -> float:
    """Return an upper estimate of the bytes that one token takes in a pass over prompts of `length` tokens.

    Counted: eight vectors of the residual stream and four of the widest product of a layer in the model's precision,
    four readout vectors in float32, and two float32 rows of attention scores. No row has the vocabulary's size. An
    ablated head is a row as well, and its inputs of the output projection are no wider than the widest product.
    """
    return item * (8 * width + 4 * widest) + 4 * (4 * width) + 2 * 4 * heads * length


def row_bytes_held(rows: float, layers: int) -> float:
    """Return the bytes of main memory of rows with `read: every`: three copies while they are put in order."""
    return 3 * rows * 4 * (2 * layers + _SCALARS)
