"""Online hard-example selection: after the first epoch, skip the images whose loss was smallest when last seen.

References:
    Loshchilov and Hutter, 2015, "Online batch selection for faster training of neural networks".

Differences from the paper:
    The losses are those that training has computed anyway, so the selection costs nothing, and a selected image is seen
    once per epoch.
"""

import torch
from torch import Tensor

from cvlab.data.rng import permutation
from cvlab.distributed import collectives
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.experiments.classification.data.images import Images, Normalization, TrainLoader


class HardExampleLoader(TrainLoader):
    """The batch of every step as a pure function of (seed, step, extra_state).

    `extra_state` holds the loss of every image when it was last seen, now and at the start of the epoch: two float32
    tensors (N,), which must be saved in every checkpoint. After every step `record` must be called with the losses.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        batch_size: int,
        seed: int,
        normalize: Normalization,
        augment: Augmentation | None = None,
        *,
        skip_easy: float,
    ) -> None:
        """Take the arguments of `TrainLoader`, and the fraction of images that later epochs skip, in [0, 1)."""
        super().__init__(images, labels, batch_size, seed, normalize, augment)
        self.steps_per_later_epoch = max(1, int(len(images) * (1 - skip_easy)) // self.batch_size)
        unseen = torch.full((len(images),), torch.inf, device=images.device)
        self.extra_state = {"losses": unseen, "losses_at_epoch_start": unseen.clone()}
        self._step = -1
        self._indices = labels[:0]

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its index within the epoch."""
        if step < self.steps_per_epoch:
            return 0, step
        later, index = divmod(step - self.steps_per_epoch, self.steps_per_later_epoch)
        return 1 + later, index

    def batch_indices(self, step: int) -> Tensor:
        """Return the indices of the images of a step: int64 (batch_size,)."""
        if self.locate(step)[1] == 0:
            self.extra_state["losses_at_epoch_start"].copy_(self.extra_state["losses"])
        if step != self._step + 1:
            self._order = (-1, self.labels)  # after a resume or a benchmark extra_state may have changed
        self._step = step
        self._indices = super().batch_indices(step)
        return self._indices

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the indices of the images of an epoch, in the order in which they are seen."""
        if epoch == 0:
            return super().epoch_order(epoch)
        hardest = self.extra_state["losses_at_epoch_start"].argsort(descending=True, stable=True)
        hardest = hardest[: self.steps_per_later_epoch * self.batch_size]
        return hardest[permutation(self.seed, epoch, len(hardest), hardest.device)]

    def record(self, losses: Tensor) -> None:
        """Store the losses (batch_size / world_size,) of this rank's images of the last step."""
        self.extra_state["losses"][self._indices] = collectives.all_gather_cat(losses.float())
