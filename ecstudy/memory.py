"""The only truth about size: bytes of what is stored, read off the tensors (Rule 1)."""
from __future__ import annotations

from torch import Tensor, nn


def stored(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that saving ``module`` writes, each storage once. Works on ``meta`` builds."""
    seen, kept = set(), {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        # meta storages have no address of their own, so there the tensor object tells them apart
        key = id(tensor) if tensor.is_meta else (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.numel():                           # an empty tensor may stand at the address of a full one
            if key in seen:
                continue
            seen.add(key)
        kept[name] = tensor
    return kept


def breakdown(module: nn.Module) -> dict[str, int]:
    """Bytes by stored tensor, largest first; sums to :func:`memory`."""
    sizes = {name: tensor.numel() * tensor.element_size() if tensor.is_meta else tensor.untyped_storage().nbytes()
             for name, tensor in stored(module).items()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def memory(module: nn.Module) -> int:
    """Bytes of the parameters and saved buffers of ``module``: codes, maps, seeds and scales all count.

    Derived tensors of at most a few numbers per field (sizes, offsets, moduli) follow from the constructor's
    arguments, are not saved and do not count; a test holds them to that size.
    """
    return sum(breakdown(module).values())
