"""Formats against the `gguf` package, bit for bit."""

import gguf
import numpy
import pytest
import torch

from graph_capture.codegen.c.decoding import dequantized
from graph_capture.errors import CaptureError
from graph_capture.ir import quantised
from graph_capture.ir.quantised import FORMATS, decoded, format_of
from tests.quantised.blocks import packed


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_has_the_bits_of_the_gguf_package(name):
    blocks = packed(name, 9, 5 * 256)
    want = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    assert numpy.array_equal(decoded(blocks, name).numpy().view(numpy.uint32), want.view(numpy.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_as_large_as_the_gguf_package_says(name):
    row = format_of(name)
    assert (row.size, row.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def test_what_is_no_format_is_refused_by_name():
    for name in ("Q9_9", "int8", "int8:33", "int4:2048", "int3:32"):
        with pytest.raises(CaptureError, match=r"no format|a group of"):
            format_of(name)
    with pytest.raises(CaptureError, match="a row of 48 weights is not blocks of 32"):
        format_of("Q8_0").row_bytes(48)
    with pytest.raises(CaptureError, match="a row of 35 bytes is not blocks of 34"):
        decoded(torch.zeros(2, 35, dtype=torch.uint8), "Q8_0")


def test_the_op_computes_in_tiles_what_it_computes_whole(monkeypatch):
    weight, x = packed("Q4_K", 70, 512), torch.randn(3, 512)
    whole = quantised.quant_linear(x, weight, torch.ones(70), format="Q4_K")
    monkeypatch.setattr(quantised, "TILE", 512 * 32)
    torch.testing.assert_close(quantised.quant_linear(x, weight, torch.ones(70), format="Q4_K"), whole)
    torch.testing.assert_close(whole, x @ decoded(weight, "Q4_K").t() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "int8:64", "int4:32", "int4:128"])
def test_c_decodes_to_the_reference_s_bits(name, dtype):
    weight = packed(name, 7, 1024)
    found = dequantized(weight, name, dtype)
    assert torch.equal(found, decoded(weight, name).to(dtype))
    assert torch.equal(dequantized(weight[1:5], name, dtype), found[1:5])
