"""One run on several processes, one device each, started by ``torchrun``: together they take the steps of one process.

Every process holds the whole model, draws the same batches and works on its slice of each. A process weighs its loss by
the share of rows it took, so gradients are summed, however a batch divides:

* rows of tables: (ids, gradients) of touched rows only, gathered with padding and summed per id;
* dense parameters: one all-reduce; gradients that a schedule moves itself: likewise.

All processes then take the same step from the same numbers; sums are made in one order everywhere. Evaluation batches
are dealt out and logits put together. Only the first process writes rows, logits and warm-ups. What a method does with
whole batches beyond its gradients would differ; such methods are refused (:data:`WHOLE_BATCH`).
"""
from __future__ import annotations

import contextlib
import json
import os
from typing import Sequence

import torch
from torch import Tensor

from ..tables import coalesce

#: Methods that need a batch in one piece, with the reason. An option that makes the method do without stands in
#: :func:`check`.
WHOLE_BATCH = dict(
    ada_embed="utilities count the look-ups and gradients of the whole batch",
    adapt_emb="with dynamic=True it counts the ids of whole batches; leave dynamic out",
    alpt="the gradient of its scales is normalised by the rows of the whole batch",
    auto_dim="its search normalises over the whole batch; give widths=, which need no search",
    auto_emb="its search and its rows are normalised over the whole batch",
    cafe="it scores the ids of whole batches",
    cel="it sums the gradients of each id over whole batches",
    dhe="it normalises over the whole batch",
    dpq="its centroids are pulled and replaced by the queries of the whole batch",
    esapn="its policy is rewarded by all rows of a batch in which an id occurs",
    fiited="utilities count the look-ups and gradients of the whole batch",
    ham="its penalty takes the distinct rows of the whole batch; give orth=0, which needs none",
    light_rec="its codewords are drawn by the vectors of the whole batch",
    mgqe="its centroids are pulled and replaced by the queries of the whole batch",
    mpe="its steps round to few bits, which turns sums in another order into other vectors",
    nis="its controller draws a choice for each row of the whole batch",
    opt_embed="its supernet draws a width for each id of the whole batch; give widths=, which need no supernet",
    pep="decay takes each row of the whole batch once; give decay=0",
)

_current: Group | None = None


def started() -> int:
    """How many processes ``torchrun`` started for this run; 1 if it started none."""
    named = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if named else 1


def current() -> Group | None:
    """The processes of the run that goes on here; None for a run of one process."""
    return _current


def check(cell, count: int) -> None:
    """Raise CellError for a cell that ``count`` processes cannot run as one would, naming method or value."""
    from ..study.row import CellError

    spec = cell.spec
    free = dict(adapt_emb=not spec.options.get("dynamic"), auto_dim="widths" in spec.options,
                opt_embed="widths" in spec.options, pep=spec.options.get("decay") == 0,
                ham=spec.options.get("orth") == 0 or "widths" in spec.options)
    if spec.name in WHOLE_BATCH and not free.get(spec.name):
        raise CellError(f"{spec.name} cannot run on {count} processes: {WHOLE_BATCH[spec.name]}; or run it without "
                        "torchrun")
    if cell.batch < count:
        raise CellError(f"batch {cell.batch}: expected at least one row for each of the {count} processes")
    if ":" in cell.device:
        raise CellError(f"device {cell.device!r}: each of the {count} processes takes a device of its own; write "
                        f"{cell.device.split(':')[0]}")


@contextlib.contextmanager
def joined(cell):
    """Join the processes that ``torchrun`` started: yields their :class:`Group`, or None for one process.

    Raises
    ------
    CellError, ValueError
        In every process and before any of them waits, for a cell that cannot be run, or not on several processes.
    """
    global _current
    if (count := started()) < 2:
        yield None
        return
    check(cell, count)
    cell.check()
    import torch.distributed as dist

    cuda = cell.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        _current = Group(cell.device)
        yield _current
    finally:
        _current = None
        dist.destroy_process_group()


class Group:
    """The processes of one run. Every method is a collective: all of them call it, in the same order."""

    def __init__(self, device="cpu"):
        import torch.distributed as dist

        self._dist, self.device = dist, torch.device(device)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    # --- words ----------------------------------------------------------------------------------------------------

    def tell(self, message=None):
        """What the first process says (JSON), to all of them."""
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor(len(text), device=self.device)
        self._dist.broadcast(size, 0)
        if self.rank:
            text = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self._dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def begin(self) -> None:
        """The first process found that there is work to do; the others wait for it in :meth:`follow`."""
        if self.rank == 0:
            self.tell("go")

    def follow(self, cell):
        """What the other processes do: take part in the run if there is one; the row of the first process."""
        message = self.tell()
        if message == "go":
            cell.measure()
            message = self.tell()
        return message

    def all(self, answer: bool) -> bool:
        """Whether it holds in every process."""
        count = torch.tensor(int(answer), device=self.device)
        self._dist.all_reduce(count)
        return int(count) == self.count

    # --- batches --------------------------------------------------------------------------------------------------

    def part(self, index: Tensor) -> Tensor:
        """This process's slice of a batch's rows."""
        return index.tensor_split(self.count)[self.rank]

    def share(self, batch: int) -> float:
        """The share of a batch's rows in that slice."""
        return len(self.part(torch.arange(batch))) / batch

    def whole(self, batches, labels: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels [N] and logits [N] of a split, of which every process has each ``count``-th batch."""
        whole = torch.zeros(2, batches.rows, device=self.device)
        starts = range(self.rank * batches.batch, batches.rows, self.count * batches.batch)
        for start, label, logit in zip(starts, labels, logits, strict=True):
            whole[0, start:start + len(label)], whole[1, start:start + len(label)] = label, logit.float()
        self._dist.all_reduce(whole)                 # x + 0 is x; infinities and NaN stay what they are
        return whole[0], whole[1]

    # --- gradients ------------------------------------------------------------------------------------------------

    def rows(self, touched: Sequence[tuple[Tensor, Tensor] | None], shapes) -> list[tuple[Tensor, Tensor] | None]:
        """Sum (distinct rows [k], gradients [k, ...]) over the processes, for tables of ``shapes`` at once.

        What crosses the wire is three gathers: how many rows each process has of each table, their numbers, their
        gradients, each padded to the longest process.
        """
        widths = [tuple(shape[1:]) for shape in shapes]
        none = [(torch.empty(0, dtype=torch.int64, device=self.device), torch.empty(0, *w, device=self.device))
                for w in widths]
        touched = [pair or empty for pair, empty in zip(touched, none, strict=True)]
        if not touched:
            return []
        size = torch.tensor([len(index) for index, _ in touched], device=self.device)
        cells = torch.tensor([int(torch.Size(w).numel()) for w in widths])
        sizes = self._gather(size).cpu()                                                       # [processes, tables]
        index = self._padded(torch.cat([index.long() for index, _ in touched]), int(sizes.sum(1).max()))
        value = self._padded(torch.cat([value.float().reshape(-1) for _, value in touched]),
                             int((sizes * cells).sum(1).max()))
        index = [part.split([*row.tolist(), len(part) - int(row.sum())]) for part, row in zip(index, sizes)]
        value = [part.split([*row.tolist(), len(part) - int(row.sum())]) for part, row in zip(value, sizes * cells)]
        out: list[tuple[Tensor, Tensor] | None] = []
        for table, width in enumerate(widths):
            distinct, place = torch.unique(torch.cat([part[table] for part in index]), return_inverse=True)
            total = torch.zeros(len(distinct), *width, device=self.device)
            # one process after the other: a process's rows are distinct, so the order of a sum is the same everywhere
            for part, at in zip(value, place.split(sizes[:, table].tolist())):
                total.index_add_(0, at, part[table].view(-1, *width))
            out.append((distinct, total) if len(distinct) else None)
        return out

    def parameters(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients of parameters in place, those marked ``sparse_grad`` by their touched rows."""
        sparse = [p for p in parameters if getattr(p, "sparse_grad", False)]
        dense = [p for p in parameters if not getattr(p, "sparse_grad", False)]
        touched = [None if p.grad is None else coalesce(p.grad._indices()[0], p.grad._values()) for p in sparse]
        for p, pair in zip(sparse, self.rows(touched, [p.shape for p in sparse])):
            p.grad = None if pair is None else torch.sparse_coo_tensor(pair[0][None], pair[1], p.shape,
                                                                       is_coalesced=True, check_invariants=False)
        # a parameter that no process reached keeps no gradient: Adam would otherwise move it by its momentum
        reached = torch.tensor([float(p.grad is not None) for p in dense], device=self.device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in dense]
        *grads, reached = self.sum([*grads, reached])
        for p, grad, reached in zip(dense, grads, reached.tolist()):
            p.grad = grad if reached else None

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums of dense float32 tensors over the processes, in one exchange."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self._dist.all_reduce(flat)
        return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def agree(self, *modules) -> None:
        """Raise RuntimeError unless every process holds the same numbers (to the last bit of their sums)."""
        tensors = [t.detach() for m in modules for t in m.state_dict().values()]
        mine = torch.stack([t.double().sum() for t in tensors]).nan_to_num()
        theirs = self._gather(mine)
        if not bool((theirs == theirs[0]).all()):
            raise RuntimeError(f"the {self.count} processes hold different weights after the same steps; are they on "
                               "machines of one kind, with one version of everything?")

    def _gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty(self.count, *tensor.shape)
        self._dist.all_gather(list(out.unbind()), tensor)
        return out

    def _padded(self, tensor: Tensor, length: int) -> Tensor:
        return self._gather(torch.nn.functional.pad(tensor, (0, length - len(tensor))))
