"""`Hogwild`: several processes of one host change the same parameters, without locks and without a server.

Niu, Recht, Ré and Wright, Hogwild!: A Lock-Free Approach to Parallelizing Stochastic Gradient Descent (NIPS 2011):
where each gradient touches few elements, updates seldom meet, and what is lost where they do is little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ringred.communicator import Communicator, default_communicator
from ringred.errors import TransportUnavailable, UnsupportedTensor
from ringred.parameter_server.shared import Area, map_window
from ringred.parameter_server.training import named_parameters

__all__ = ["Hogwild"]


class Hogwild:
    """Puts the parameters of `model` into memory that all ranks of `comm` share, and steps them there.

        hogwild = ringred.parameter_server.Hogwild(model, lr=0.1)
        for features, labels in loader:
            loss(model(features), labels).backward()
            hogwild.step()
        hogwild.close()

    A step subtracts `lr` times the gradient, of a sparse (COO) gradient at the elements that it has, and clears it. The
    values at the start are rank 0's. Each element is read and written whole; of two steps that change one element at
    the same moment, one may be lost. All ranks have to be on one host. Collective.
    """

    def __init__(self, model: nn.Module | Iterable[Any], lr: float, *, comm: Communicator | Any = None) -> None:
        self.comm = default_communicator(comm)
        self.lr = lr
        self.parameters = named_parameters(model)
        self.steps = 0
        if len(set(self.comm.hosts)) > 1:
            raise TransportUnavailable(f"rank {self.comm.rank}: Hogwild shares memory; the ranks are on several hosts")
        for name, parameter in self.parameters.items():
            if parameter.device.type != "cpu" or parameter.layout is not torch.strided:
                raise UnsupportedTensor(f"rank {self.comm.rank}: {name!r}: expected a dense CPU tensor")
        self._private = {name: parameter.data for name, parameter in self.parameters.items()}
        self._area, shared = self._allocated()
        for name, parameter in self.parameters.items():
            parameter.data = shared[name]
        self.comm.barrier()

    def _allocated(self) -> tuple[Area | None, dict[str, Tensor]]:
        """Rank 0's values in memory of rank 0, as this rank maps it."""
        area = Area() if self.comm.rank == 0 else None
        told = torch.zeros(2 + len(self.parameters), dtype=torch.int64)
        own: dict[str, Tensor] = {}
        if area is not None:
            for at, (name, parameter) in enumerate(self.parameters.items()):
                own[name] = area.heap.empty(parameter.numel(), parameter.dtype)
                own[name].copy_(parameter.detach().reshape(-1))
                told[2 + at] = area.offset(own[name]) if parameter.numel() else 0
            told[0], told[1] = area.process, area.descriptor
        self.comm.broadcast(told, 0)
        if area is None:
            process, descriptor, *offsets = told.tolist()
            try:
                window = map_window(process, descriptor)
            except OSError as failure:
                raise TransportUnavailable(
                    f"rank {self.comm.rank}: rank 0's memory cannot be mapped: {failure}; all ranks need one user, and "
                    "one view of processes"
                ) from failure
            for (name, parameter), offset in zip(self.parameters.items(), offsets, strict=True):
                nbytes = parameter.numel() * parameter.element_size()
                own[name] = window.view(offset, nbytes, parameter.dtype) if nbytes else parameter.data.reshape(-1)
        return area, {name: own[name].view(parameter.shape) for name, parameter in self.parameters.items()}

    def step(self) -> None:
        """Subtracts `lr` times the gradients, and clears them."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout is torch.strided:
                    parameter.sub_(gradient, alpha=self.lr)
                else:
                    self._sparse_step(parameter.data, gradient)
                parameter.grad = None
        self.steps += 1

    def _sparse_step(self, values: Tensor, gradient: Tensor) -> None:
        """Only the rows that the gradient has are read and written."""
        indices, changes = gradient._indices(), gradient._values()
        if indices.shape[0] == 1:
            values.index_add_(0, indices[0], changes, alpha=-self.lr)
        else:
            values.index_put_(tuple(indices), changes * -self.lr, accumulate=True)

    def total_steps(self) -> int:
        """How many steps all ranks have made. Collective."""
        total = torch.tensor([self.steps])
        self.comm.all_reduce(total)
        return int(total.item())

    def close(self) -> None:
        """Gives the shared memory back; the parameters keep the values that all ranks came to. Collective."""
        self.comm.barrier()
        for name, parameter in self.parameters.items():
            private = self._private[name]
            private.copy_(parameter.data)
            parameter.data = private
        self.comm.barrier()
        if self._area is not None:
            self._area.close()

    def __enter__(self) -> Hogwild:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        if value is None:
            self.close()
