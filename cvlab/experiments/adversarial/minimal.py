"""DeepFool and the attack of Carlini and Wagner on photos; an example counts if the photo as it will be saved fools."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvlab.experiments.common.photo_batches import CheckInterrupt
from cvlab.ops import l2_attacks

if TYPE_CHECKING:
    from cvlab.experiments.adversarial.attack import AdversarialExample, Attack

Minimize = Callable[["Attack", "list[AdversarialExample]", CheckInterrupt], None]


def deepfool(attack: "Attack", examples: "list[AdversarialExample]", check_interrupt: CheckInterrupt) -> None:
    """Take steps of DeepFool until each example fools, or has used up its steps."""
    config = attack.config
    for number, example in enumerate(examples):
        candidates = None
        if attack.target is None:
            order = example.clean_probabilities.argsort(descending=True)
            others = order[order != example.attacked_class][: config.candidates]
            candidates = others.to(attack.ctx.device)

        def logits(images: Tensor, resize: Callable[[Tensor], Tensor] = example.resize) -> Tensor:
            return attack.logits([resize(image) for image in images])

        while example.steps < config.steps and not attack.fools(example, example.adversarial):
            check_interrupt(f"step {example.steps} of {config.steps}", number / len(examples))
            example.adversarial = l2_attacks.deepfool_step(
                logits, example.adversarial, example.attacked_class, candidates, config.overshoot
            )
            example.steps += 1


def carlini_wagner(attack: "Attack", examples: "list[AdversarialExample]", check_interrupt: CheckInterrupt) -> None:
    """Search for the smallest change of each example that fools."""
    config = attack.config

    def logits(images: Sequence[Tensor]) -> Tensor:
        return attack.logits([example.resize(image) for example, image in zip(examples, images, strict=True)])

    search = l2_attacks.carlini_wagner(
        logits,
        [example.original for example in examples],
        torch.tensor([example.attacked_class for example in examples], device=attack.ctx.device),
        attack.target is not None,
        scales=[example.resize.scale for example in examples],
        steps=config.steps,
        search_steps=config.search_steps,
        is_fooled=lambda k, pixels: attack.fools(examples[k], pixels),
        confidence=config.confidence,
    )
    total = config.steps * config.search_steps
    for step, best in enumerate(search):
        check_interrupt(f"step {step} of {total}", step / total)
        for example, pixels in zip(examples, best, strict=True):
            example.adversarial, example.steps = pixels, step + 1


MINIMIZERS: dict[str, Minimize] = {"deepfool": deepfool, "cw": carlini_wagner}
