"""Packed weights to test with."""

import torch

from graph_capture.ir.quantised import format_of


def packed(name: str, rows: int, inner: int, seed: int = 0, size: float = 0.01) -> torch.Tensor:
    """Blocks of any bytes, whose float16 are tame numbers; [rows, bytes] uint8."""
    row, generator = format_of(name), torch.Generator().manual_seed(seed)
    count = inner // row.size
    blocks = torch.randint(0, 256, (rows, count, row.bytes), dtype=torch.uint8, generator=generator)
    for field in row.fields:
        if field.dtype is torch.float16:
            numbers = (torch.randn(rows, count, 1, generator=generator) * size).half().view(torch.uint8)
            blocks[..., field.offset : field.offset + 2] = numbers
    return blocks.reshape(rows, -1)
