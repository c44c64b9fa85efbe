"""What is found in whole models, against what their architectures hold: counted by hand, not by the code."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, fuse, record
from graph_capture.ir.ops import Kind, op
from graph_capture.passes import DEFAULT
from tests import zoo
from tests.benchmarks.bench_passes import analyse, decode_step

LAYERS = 2
NAMED = {item.name for item in DEFAULT} | {"parallel_linear", "scaled_dot_product_attention"}

# For L layers. A residual sum and the norm that reads it are one fusion, also where the norm is the next layer's or the
# model's last; the first norm has no sum before it.
LLAMA = {
    "parallel_linear": 2 * LAYERS,  # query, key, value; gate, up
    "rope": LAYERS,
    "add_rms_norm": 2 * LAYERS,
    "swiglu": LAYERS,
    "rms_norm": 1,
}
EXPECTED = {
    "llama": LLAMA,
    "qwen2": LLAMA,  # with biases on query, key and value
    "qwen3": LLAMA | {"rope": 0, "qk_norm_rope": LAYERS},
    "mistral": LLAMA | {"scaled_dot_product_attention": LAYERS},  # repeats its heads where a window masks
    "gemma2": {
        "parallel_linear": 2 * LAYERS,
        "rope": LAYERS,
        "geglu_tanh": LAYERS,
        "norm_add_norm": 2 * LAYERS,  # each branch is normed before it is added
        "embedding_scale_norm": 1,
        "softcap": 1,  # of the logits; that of scores is one kernel with the mask and the softmax
    },
    "phi3": LLAMA | {"parallel_linear": 0},  # its linears are merged already
    "gpt2": {"add_layer_norm": 2 * LAYERS + 1},  # the sum of the two embeddings is one more
    "gpt_neox": {"rope": LAYERS, "add_two_layer_norms": LAYERS - 1, "bias_add_layer_norm": 1},  # parallel branches
    "opt": {"parallel_linear": LAYERS, "add_layer_norm": 2 * LAYERS + 1},
    "t5": {
        "parallel_linear": 2 * LAYERS + 1,  # all cross attentions' keys and values read the encoder's one output
        "add_rms_norm": 2 * LAYERS + 3 * LAYERS,
        "rms_norm": 2,
    },
    # Embeddings are scaled, so that the first norm is one region with them; norms multiply by 1 + weight.
    "gemma": LLAMA | {"swiglu": 0, "geglu_tanh": LAYERS, "rms_norm": 0, "embedding_scale_norm": 1},
    # Branches are scaled before they are added: one kernel for both saves writing and reading the scaled branch, one
    # for sum and norm only reading the sum. So each norm but the first, which goes with the embedding, is alone.
    "granite": LLAMA
    | {"add_rms_norm": 0, "scaled_residual": 2 * LAYERS, "rms_norm": 2 * LAYERS, "embedding_scale_norm": 1},
    "smollm3": LLAMA | {"rope": LAYERS - 1},  # one of the layers has no position embedding
    "glm": LLAMA | {"parallel_linear": LAYERS},  # gate and up are one linear, halves of the heads are turned
    # Branches are normed before they are added, and nothing is normed before a branch: only the model's last norm reads
    # a sum. Query and key are normed as a whole.
    "olmo2": LLAMA | {"add_rms_norm": 0, "norm_add_norm": 1, "rms_norm": 4 * LAYERS - 1},
    # torch's LayerNorm is one op, and none alone. A quarter of the heads is turned.
    "stablelm": {"parallel_linear": 2 * LAYERS, "rope": LAYERS, "add_layer_norm": 2 * LAYERS, "swiglu": LAYERS},
    "starcoder2": {"parallel_linear": LAYERS, "rope": LAYERS, "add_layer_norm": 2 * LAYERS},  # its MLP has no gate
    "distilbert": {"parallel_linear": LAYERS, "add_layer_norm": 2 * LAYERS + 1},  # two embeddings are summed and normed
    "bert": {"parallel_linear": LAYERS, "add_layer_norm": 2 * LAYERS, "bias_add_layer_norm": 1},  # three embeddings
}


def recorded(name):
    model, ids = zoo.build(name), zoo.ids(12)
    whole = {"t5": {"decoder_input_ids": ids[:, :10], "use_cache": False}, "bert": {}, "distilbert": {}}
    options = whole.get(name, {"use_cache": False})
    with torch.no_grad(), record(ids) as recording:
        recording.output(model(input_ids=ids, **options).logits)
    return recording.graph, ids


@pytest.mark.parametrize("name", EXPECTED)
def test_named_fusions(name):
    graph, ids = recorded(name)
    fused = fuse(graph, FusionConfig(profile="static"))
    found = Counter(region.kind for region in fused.regions if not region.parent and region.kind in NAMED)
    assert found == Counter({kind: count for kind, count in EXPECTED[name].items() if count}), str(fused.explain())
    assert fused.verify(ids).ok, str(fused.verify(ids))
    assert fused.bisect(ids).culprit is None, str(fused.bisect(ids))
    torch.testing.assert_close(fused(ids), graph.run(ids), rtol=1e-4, atol=1e-5)


def launched(graph):
    return [node for node in graph if op(node.op_type).kind is not Kind.VIEW]


def test_a_decode_step_of_llama_launches_eight_steps_a_layer():
    small, large = (analyse(decode_step(layers)).graph for layers in (2, 3))
    steps = len(launched(large)) - len(launched(small))
    assert steps <= 8, "\n".join(node.op_type for node in launched(large))
    kinds = Counter(n.op_type for n in launched(large)) - Counter(n.op_type for n in launched(small))
    assert kinds == Counter(
        {
            "fused.parallel_linear": 1,
            "fused.rope_cache": 1,
            "fused.decode_attention": 1,
            "fused.skinny_linear": 2,
            "fused.add_rms_norm": 2,
            "fused.linear_epilogue": 1,  # gate and up, and what they make
        }
    )


def test_a_region_without_a_kernel_runs_as_its_parts():
    table, weight, ids = torch.randn(9, 16), torch.randn(16), zoo.ids(12) % 9

    def embedded(ids):
        scaled = F.embedding(ids, table) * 3.0
        return scaled, F.rms_norm(scaled, (16,), weight, 1e-6)

    with torch.no_grad(), record(ids) as recording:
        recording.output(embedded(ids))
    fused = fuse(recording.graph, FusionConfig(profile="always"))
    region = fused.regions[0]
    assert (region.kind, region.kernel) == ("embedding_scale_norm", None)
    assert "no kernel: embedding" in region.decision.reason
    parts = [part for part in fused.regions if part.parent == region.name]
    assert [part.kind for part in parts] == ["row"]  # the scale and the norm
    assert {node.outputs for part in parts for node in part.nodes} <= {node.outputs for node in region.nodes}
    for got, want in zip(fused(ids), embedded(ids), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
