"""One training step in a single process, or averaged over ranks by DistributedDataParallel."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvlab.distributed.process_group import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    LossFn = Callable[[nn.Module, Any], dict[str, Tensor]]

BUCKET_MB = 100  # of gradients that go together; on a CPU the exchange takes the core from the backward pass


class SingleProcessStep:
    """The losses of a step in one process; `Averaged` is the same for several."""

    def __init__(self, model: "nn.Module", loss_fn: "LossFn") -> None:
        self.model, self.loss_fn = model, loss_fn
        self.wishes: Sequence[bool] = ()

    def losses(self, batch: Any, wishes: Sequence[bool]) -> "dict[str, Tensor]":
        """Return the losses of a batch."""
        self.wishes = wishes
        return self.loss_fn(self.model, batch)

    def agreed(self, losses: "Mapping[str, Tensor]") -> tuple[list[bool], bool]:
        """Return, after the backward pass, what any process wished for, and whether the loss is finite in all."""
        return list(self.wishes), math.isfinite(losses["loss"].item())


class DDPStep(SingleProcessStep):
    """The losses of a step in one of several processes: their gradients are means over all, by torch's DDP.

    What each process wishes for, and whether its loss is finite, is the gradient of a parameter that is always 0: it
    goes with the other gradients in one exchange, where one of its own costs a small net a tenth of its step. The
    buckets stay as they are made (`find_unused_parameters` brings that about), so that a training that goes on adds in
    the order of one that was never stopped. Statistics of BatchNorm are not exchanged: those of process 0 count.
    """

    def __init__(self, model: "nn.Module", loss_fn: "LossFn", device: "torch.device", num_wishes: int) -> None:
        super().__init__(model, loss_fn)
        import torch
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        dtype = next(model.parameters()).dtype

        class Losses(nn.Module):
            """The losses as a module, whose parameters are the model's: a model's other methods may be called too."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.wishes = nn.Parameter(torch.zeros(num_wishes + 1, dtype=dtype, device=device))

            def forward(self, batch: Any, wishes: "Tensor") -> "dict[str, Tensor]":
                losses = loss_fn(self.model, batch)
                diverged = ~torch.isfinite(losses["loss"].detach()).view(1)
                given = torch.cat([wishes, diverged.to(wishes)])
                return losses | {"loss": losses["loss"] + (self.wishes * given).sum().to(losses["loss"])}

        ids = [device.index] if device.type == "cuda" else None
        self.inner = Losses()
        self.outer = DistributedDataParallel(
            self.inner, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False, bucket_cap_mb=BUCKET_MB
        )

    def losses(self, batch: Any, wishes: Sequence[bool]) -> "dict[str, Tensor]":
        """Return the losses of this process's share of a batch."""
        found: dict[str, Tensor] = self.outer(batch, self.inner.wishes.new_tensor([float(wish) for wish in wishes]))
        return found

    def agreed(self, losses: "Mapping[str, Tensor]") -> tuple[list[bool], bool]:  # noqa: ARG002 - as the other
        """Return, after the backward pass, what any process wished for, and whether the loss is finite in all."""
        assert self.inner.wishes.grad is not None
        *wishes, diverged = (self.inner.wishes.grad > 0).tolist()
        self.inner.wishes.grad = None
        return wishes, not diverged


def make_step(model: "nn.Module", loss_fn: "LossFn", device: "torch.device", num_wishes: int) -> SingleProcessStep:
    """Return the losses of a step for as many processes as there are."""
    return SingleProcessStep(model, loss_fn) if world().size == 1 else DDPStep(model, loss_fn, device, num_wishes)
