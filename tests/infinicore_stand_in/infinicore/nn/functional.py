import infinicore
from infinicore.lib import _infinicore


class RopeAlgo:
    GPT_J, GPT_NEOX = _infinicore.RoPEAlgo.GPT_J, _infinicore.RoPEAlgo.GPT_NEOX


def linear(input, weight, bias=None, *, out=None):
    return infinicore._call("linear", out, input, weight, bias)


def silu(input, inplace=False, *, out=None):
    if infinicore.use_ntops:
        raise RuntimeError("ntops would launch a kernel of its own")
    return infinicore._call("silu", input if inplace else out, input)


def swiglu(input, other, *, out=None):
    return infinicore._call("swiglu", out, input, other)


def rms_norm(input, normalized_shape, weight, eps=1e-5, *, out=None):
    return infinicore._call("rms_norm", out, input, weight, eps)


def rope(x, pos_ids, sin_table, cos_table, algo=RopeAlgo.GPT_NEOX, *, out=None):
    return infinicore._call("rope", out, x, pos_ids, sin_table, cos_table, algo)


def causal_softmax(input, out=None):
    return infinicore._call("causal_softmax", out, input)


def embedding(input, weight, *, out=None):
    return infinicore._call("embedding", out, input, weight)


def random_sample(logits, random_val, topp, topk, temperature, *, out=None):
    return infinicore._call("random_sample", out, logits, random_val, topp, topk, temperature)
