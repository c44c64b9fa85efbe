"""Models written with `infinicore`, in the shape of InfiniLM's Python Llama; and what they compute, in torch."""

from types import SimpleNamespace

import torch

from graph_capture import record


def ic_model(library):
    """The classes, made with one `infinicore` package."""
    nn, functional = library.nn, library.nn.functional

    class Mlp(nn.Module):
        def __init__(self, hidden, inner, **options):
            super().__init__()
            self.gate_proj = nn.Linear(hidden, inner, bias=False, **options)
            self.up_proj = nn.Linear(hidden, inner, bias=False, **options)
            self.down_proj = nn.Linear(inner, hidden, bias=False, **options)
            self.act_fn = functional.silu

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def repeated(x, groups):
        length, heads, width = x.shape
        first, second, third = x.stride()
        wide = x.as_strided((length, heads, groups, width), (first, second, 0, third))
        return wide.contiguous().view((length, heads * groups, width))

    class Attention(nn.Module):
        def __init__(self, hidden, heads, kv_heads, **options):
            super().__init__()
            self.heads, self.kv_heads, self.width = heads, kv_heads, hidden // heads
            self.q_proj = nn.Linear(hidden, hidden, bias=False, **options)
            self.k_proj = nn.Linear(hidden, kv_heads * self.width, bias=False, **options)
            self.v_proj = nn.Linear(hidden, kv_heads * self.width, bias=False, **options)
            self.o_proj = nn.Linear(hidden, hidden, bias=False, **options)
            self.buffer = None

        def forward(self, x, positions, rope, cache):
            batch, length, hidden = x.shape
            query = self.q_proj(x).view((batch, length, self.heads, self.width))
            key = self.k_proj(x).view((batch, length, self.kv_heads, self.width))
            value = self.v_proj(x).view((batch, length, self.kv_heads, self.width))
            query, key = rope(query, positions), rope(key, positions)
            keys, values = cache.update(key, value)
            if self.buffer is None or self.buffer.shape[1] != length:
                size = (batch, length, self.heads, self.width)
                self.buffer = library.empty(size, dtype=query.dtype, device=query.device)
            total = keys.shape[1]
            for i in range(batch):
                q = query.narrow(0, i, 1).view((length, self.heads, self.width))
                k = keys.narrow(0, i, 1).view((total, self.kv_heads, self.width))
                v = values.narrow(0, i, 1).view((total, self.kv_heads, self.width))
                if self.heads > self.kv_heads:
                    k, v = (repeated(part, self.heads // self.kv_heads) for part in (k, v))
                scores = library.matmul(q.permute((1, 0, 2)), k.permute((1, 2, 0)), alpha=self.width**-0.5)
                functional.causal_softmax(scores, out=scores)
                out = (scores @ v.permute((1, 0, 2))).permute((1, 0, 2)).contiguous()
                self.buffer.narrow(0, i, 1).view((length, self.heads, self.width)).copy_(out)
            return self.o_proj(self.buffer.view((batch, length, hidden)))

    class Layer(nn.Module):
        def __init__(self, hidden, inner, heads, kv_heads, **options):
            super().__init__()
            self.self_attn = Attention(hidden, heads, kv_heads, **options)
            self.mlp = Mlp(hidden, inner, **options)
            self.input_layernorm = nn.RMSNorm(hidden, eps=1e-5, **options)
            self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-5, **options)

        def forward(self, x, positions, rope, cache):
            residual = x
            x = self.self_attn(self.input_layernorm(x), positions, rope, cache)
            x += residual
            residual = x
            x = self.mlp(self.post_attention_layernorm(x))
            x += residual
            return x

    class Cache:
        """Keys and values of one layer; counts its positions in Python."""

        def __init__(self, batch, longest, kv_heads, width, **options):
            self.keys, self.values = (zeros(library, (batch, longest, kv_heads, width), **options) for _ in range(2))
            self.used = 0

        def update(self, key, value):
            length = key.shape[1]
            self.keys.narrow(1, self.used, length).copy_(key)
            self.values.narrow(1, self.used, length).copy_(value)
            self.used += length
            return tuple(part.narrow(1, 0, self.used).contiguous() for part in (self.keys, self.values))

    return SimpleNamespace(Mlp=Mlp, Layer=Layer, Cache=Cache, Attention=Attention)


def zeros(library, shape, dtype, device):
    """Zeros; `infinicore.zeros` leaves memory as it is."""
    made = library.empty(list(shape), dtype=dtype, device=device)
    made.copy_(library.from_torch(torch.zeros(shape)))
    return made


def randomised(library, module, seed=0):
    """Fill a module's parameters; returns copies of them as torch tensors, in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in module.state_dict().items():
        values = torch.randn(tuple(parameter.shape), generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        parameter.copy_(library.from_torch(values))
        found[name] = values.double()
    return found


def torch_layer(weights, x, positions, tables, cache, heads, kv_heads):
    """The layer in float64; `cache` is a pair of [batch, longest, kv_heads, width] and how much of it is used."""
    hidden = x.shape[-1]
    width, (batch, length) = hidden // heads, x.shape[:2]
    sin, cos = (table.double()[positions].unsqueeze(-2) for table in tables)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def rope(x):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    normed = norm(x, weights["input_layernorm.weight"])
    parts = {}
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        parts[name] = (normed @ weights[f"self_attn.{name}_proj.weight"].T).view(batch, length, count, width)
    keys, values, used = cache
    keys[:, used : used + length], values[:, used : used + length] = rope(parts["k"]), parts["v"]
    key, value = (part[:, : used + length].repeat_interleave(heads // kv_heads, 2) for part in (keys, values))
    scores = torch.einsum("blhd,bthd->bhlt", rope(parts["q"]), key) * width**-0.5
    ahead = torch.ones(length, used + length, dtype=torch.bool).triu(used + 1)
    mixed = torch.einsum("bhlt,bthd->blhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), value)
    x = x + mixed.reshape(batch, length, hidden) @ weights["self_attn.o_proj.weight"].T
    normed = norm(x, weights["post_attention_layernorm.weight"])
    gate, up = (normed @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (torch.nn.functional.silu(gate) * up) @ weights["mlp.down_proj.weight"].T


def options(ic, dtype="float32"):
    return {"dtype": getattr(ic, dtype), "device": ic.device("cpu")}


def tensors(ic, *values):
    """InfiniCore tensors on copies of torch tensors."""
    return [ic.from_torch(value.clone()) for value in values]


def recorded(function, *args, **kwargs):
    """The graph of a call, and its result as InfiniCore tensors."""
    with record(*args, **kwargs) as recording:
        result = function(*args, **kwargs)
        recording.output(result)
    return recording.graph, result


def ops(graph):
    return [node.op_type for node in graph.subgraph.nodes]


def regions(fused):
    return [region.name.rpartition("_")[0] for region in fused.regions if region.decision]
