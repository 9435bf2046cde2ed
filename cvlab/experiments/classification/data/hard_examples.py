"""Batches that leave out what is easy: after the first pass, the images whose loss was smallest when last seen.

Paper: Loshchilov and Hutter, 2015, "Online batch selection for faster training of neural networks". Differs: the losses
are those that the training has computed anyway, so that the choice costs nothing; what is chosen is seen once a pass.
"""

from typing import Any

import torch
from torch import Tensor

from cvlab.data.rng import permutation
from cvlab.distributed import collectives
from cvlab.experiments.classification.data.images import TrainLoader


class HardExampleLoader(TrainLoader):
    """The batch of every step, as a pure function of (seed, step, memory).

    `memory` holds the loss of every image when it was last seen, and as it was when the present pass began: two float32
    tensors (N,), which belong into every checkpoint.
    """

    def __init__(self, *args: Any, skip_easy: float, **options: Any) -> None:
        """Take what `TrainBatches` takes, and the share of images that later passes leave out, in [0, 1)."""
        super().__init__(*args, **options)
        self.steps_of_a_pass = max(1, int(len(self.images) * (1 - skip_easy)) // self.batch_size)
        unseen = torch.full((len(self.images),), torch.inf, device=self.images.device)
        self.memory = {"losses": unseen, "losses_before_pass": unseen.clone()}
        self._step = -1
        self._indices = self.labels[:0]

    def place(self, step: int) -> tuple[int, int]:
        """Return in which pass a step is, and the how manieth of it."""
        if step < self.steps_per_epoch:
            return 0, step
        later, position = divmod(step - self.steps_per_epoch, self.steps_of_a_pass)
        return 1 + later, position

    def indices(self, step: int) -> Tensor:
        """Return the indices of the images of a step: int64 (batch_size,)."""
        if self.place(step)[1] == 0:
            self.memory["losses_before_pass"].copy_(self.memory["losses"])
        if step != self._step + 1:
            self._order = (-1, self.labels)  # a resumed or measured run: memory may be another one
        self._step = step
        self._indices = super().indices(step)
        return self._indices

    def order(self, number: int) -> Tensor:
        """Return the order in which a pass goes through the images that it takes."""
        if number == 0:
            return super().order(number)
        hardest = self.memory["losses_before_pass"].argsort(descending=True, stable=True)
        hardest = hardest[: self.steps_of_a_pass * self.batch_size]
        return hardest[permutation(self.seed, number, len(hardest), hardest.device)]

    def record(self, losses: Tensor) -> None:
        """Remember the losses of the images of the last step, this process's share of them."""
        self.memory["losses"][self._indices] = collectives.all_gather_cat(losses.float())
