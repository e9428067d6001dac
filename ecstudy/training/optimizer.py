"""Adam that visits only the rows a batch touched, and the pair of optimisers the loop uses."""
from __future__ import annotations

import math
from typing import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..method import Method
from ..tables import Holder


def _zeros(shape, device) -> Tensor:
    """Zeros that on the CPU take memory only where they are written: torch.zeros writes every page at once."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, np.float32))
    return torch.zeros(shape, device=device)


class RowAdam:
    """Row-sparse (lazy) Adam over holders of vectors.

    Weights and both moments of a touched row are read once and written once; other rows are not visited, so a
    step's cost does not depend on the size of the table. Gradients of duplicate ids are summed first. Bias correction
    uses the global step, as the study's framework does and ``torch.optim.SparseAdam`` does per parameter. Moments are
    float32 whatever the holder stores.

    Parameters
    ----------
    holders:
        The holders to train (``emb.holders()``); they are switched to sparse gradients.
    """

    def __init__(self, holders: Iterable[Holder], lr: float = 0.001, betas=(0.9, 0.999), eps: float = 1e-8):
        if lr <= 0:
            raise ValueError(f"lr={lr}: expected a positive learning rate")
        self.holders = list(holders)
        self.lr, self.betas, self.eps, self.steps = lr, betas, eps, 0
        self.moments: list[tuple[Tensor, Tensor] | None] = [None] * len(self.holders)
        self.group = None                            # of a run on several processes
        for holder in self.holders:
            holder.sparse = True

    def zero_grad(self) -> None:
        for holder in self.holders:
            holder.forget()

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        size = self.lr * math.sqrt(1 - beta2 ** self.steps) / (1 - beta1 ** self.steps)
        all_touched = (holder.touched() for holder in self.holders)          # one after the other: less memory
        if self.group is not None:
            all_touched = self.group.rows(list(all_touched), [holder.shape for holder in self.holders])
        for i, (holder, touched) in enumerate(zip(self.holders, all_touched)):
            if touched is None or not len(touched[0]):
                continue
            index, grad = touched
            if self.moments[i] is None:
                self.moments[i] = _zeros(holder.shape, grad.device), _zeros(holder.shape, grad.device)
            first, second = self.moments[i]
            m = first.index_select(0, index).lerp_(grad, 1 - beta1)
            v = second.index_select(0, index).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            first.index_copy_(0, index, m)
            second.index_copy_(0, index, v)
            rows = holder.read(index).detach()
            holder.write(index, rows.addcdiv_(m, v.sqrt_().add_(self.eps), value=-size))

    def state(self) -> dict[str, Tensor]:
        """Tensors that :meth:`restore` takes."""
        state = {"steps": torch.tensor(self.steps)}
        for i, pair in enumerate(self.moments):
            if pair is not None:
                state[f"{i}.first"], state[f"{i}.second"] = pair
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for i, holder in enumerate(self.holders):
            if f"{i}.first" in state:
                device = next(iter(holder.state_dict().values())).device
                self.moments[i] = tuple(state[f"{i}.{name}"].to(device).clone() for name in ("first", "second"))
            else:
                self.moments[i] = None


class Optimizers:
    """Row-sparse Adam for the tables and dense Adam for everything else, stepped together or apart.

    Parameters
    ----------
    emb, head:
        The embedding, and the network on top of it (any module; its parameters marked ``sparse_grad`` get SparseAdam).
    lr:
        One learning rate for all, as in the study.
    group:
        Processes (:class:`ecstudy.training.distributed.Group`) whose gradients are summed before each step.
    """

    def __init__(self, emb: Method, head: nn.Module | None = None, lr: float = 0.001, group=None):
        self.emb, self.head, self.lr, self.group = emb, head, lr, group
        self.rows = RowAdam(emb.holders(), lr)
        self.rows.group = group
        head_parameters = [p for p in head.parameters() if p.requires_grad] if head is not None else []
        sparse = [p for p in head_parameters if getattr(p, "sparse_grad", False)]
        dense = [p for p in head_parameters if not getattr(p, "sparse_grad", False)]
        self.emb_dense = torch.optim.Adam(emb.dense_parameters(), lr, fused=True) if emb.dense_parameters() else None
        self.head_dense = torch.optim.Adam(dense, lr, fused=True) if dense else None
        self.head_sparse = torch.optim.SparseAdam(sparse, lr) if sparse else None

    def _all(self) -> dict:
        named = dict(rows=self.rows, emb_dense=self.emb_dense, head_dense=self.head_dense, head_sparse=self.head_sparse)
        return {name: optimizer for name, optimizer in named.items() if optimizer is not None}

    def rate(self, lr: float) -> None:
        """Set the learning rate of all (schedules)."""
        self.lr = self.rows.lr = lr
        for name, optimizer in self._all().items():
            for group in optimizer.param_groups if name != "rows" else ():
                group["lr"] = lr

    def zero_grad(self) -> None:
        for optimizer in self._all().values():
            optimizer.zero_grad()

    def step(self, which: str = "all") -> None:
        """Update ``"all"``, or only the embedding (``"emb"``)."""
        chosen = {name: o for name, o in self._all().items() if which == "all" or not name.startswith("head")}
        if self.group is not None:
            self.group.parameters([p for name, o in chosen.items() if name != "rows"
                                   for part in o.param_groups for p in part["params"]])
        for optimizer in chosen.values():
            optimizer.step()

    def embedding_leaves(self) -> list[Tensor]:
        """What a backward pass restricted to the embedding must reach."""
        return [leaf for holder in self.rows.holders for leaf in holder.leaves()] + self.emb.dense_parameters()

    def state(self) -> dict[str, Tensor]:
        """All moments and step counts as one flat dict of tensors."""
        out = {f"rows.{k}": v for k, v in self.rows.state().items()}
        for name, optimizer in self._all().items():
            if name != "rows":
                for number, entry in optimizer.state_dict()["state"].items():
                    out |= {f"{name}.{number}.{k}": torch.as_tensor(v) for k, v in entry.items()}
        return out

    def restore(self, state: dict[str, Tensor]) -> None:
        self.rows.restore({k.removeprefix("rows."): v for k, v in state.items() if k.startswith("rows.")})
        for name, optimizer in self._all().items():
            if name == "rows":
                continue
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                if key.startswith(f"{name}."):
                    _, number, field = key.split(".")
                    entries.setdefault(int(number), {})[field] = value.clone()
            optimizer.load_state_dict(dict(state=entries, param_groups=optimizer.state_dict()["param_groups"]))


def optimizers(emb: Method, head: nn.Module | None = None, lr: float = 0.001) -> Optimizers:
    """Optimisers for a user's own loop: ``opt.zero_grad(); loss.backward(); opt.step()``."""
    return Optimizers(emb, head, lr)
