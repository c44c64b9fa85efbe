import numpy as np

import infinicore
from infinicore.nn import functional
from infinicore.nn.functional import RopeAlgo


class Parameter(infinicore.Tensor):
    def __init__(self, data):
        super().__init__(data._underlying)


class Module:
    def __init__(self):
        for name in ("_parameters", "_buffers", "_modules"):
            object.__setattr__(self, name, {})

    def __getattr__(self, name):
        for table in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(table, {}):
                return self.__dict__[table][name]
        raise AttributeError(name)

    def __setattr__(self, name, value):
        if isinstance(value, Parameter):
            self._parameters[name] = value
        if isinstance(value, Module):
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def state_dict(self, prefix=""):
        found = {prefix + name: value for name, value in self._parameters.items() if value is not None}
        for name, module in self._modules.items():
            found |= module.state_dict(f"{prefix}{name}.")
        return found


class ModuleList(Module):
    def __init__(self, modules):
        super().__init__()
        self._modules.update({str(index): module for index, module in enumerate(modules)})

    def __iter__(self):
        return iter(self._modules.values())


class Linear(Module):
    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        options = {"dtype": dtype, "device": device}
        self.weight = Parameter(infinicore.empty([out_features, in_features], **options))
        self.bias = Parameter(infinicore.empty([out_features], **options)) if bias else None

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


class RMSNorm(Module):
    def __init__(self, size, eps=1e-6, device=None, dtype=None):
        super().__init__()
        self.normalized_shape, self.eps = [size], eps
        self.weight = Parameter(infinicore.empty([size], dtype=dtype, device=device))

    def forward(self, x):
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Embedding(Module):
    def __init__(self, count, width, device=None, dtype=None):
        super().__init__()
        self.weight = Parameter(infinicore.empty([count, width], dtype=dtype, device=device))

    def forward(self, ids):
        return functional.embedding(ids, self.weight)


class RoPE(Module):
    def __init__(self, max_position_embeddings, rope_theta, head_dim, device=None, dtype=None):
        super().__init__()
        steps = np.arange(0, head_dim, 2) / head_dim
        angles = np.outer(np.arange(max_position_embeddings), rope_theta**-steps)
        tables = (np.sin(angles), np.cos(angles))
        self._sin_table, self._cos_table = (infinicore.from_numpy(table, dtype=dtype) for table in tables)

    def forward(self, states, position_ids, algo=RopeAlgo.GPT_NEOX):
        functional.rope(states, position_ids, self._sin_table, self._cos_table, algo=algo, out=states)
        return states
