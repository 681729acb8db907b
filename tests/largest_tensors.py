"""Which calls make large tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensors(TorchDispatchMode):
    """Counts the calls that made a new tensor of `numel` elements, by operator."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for out in tree_leaves(outputs):
            if isinstance(out, torch.Tensor) and out.numel() >= self.numel:
                if out.untyped_storage().data_ptr() not in known:
                    self.made.append((str(function), out.dtype))
        return outputs
