# SPDX-License-Identifier: Apache-2.0
"""AutoAttack `standard`, published protocol and budgets, by torchattacks and by us: same images.

python benchmarks/autoattack_agrees.py MODEL DATA [--eps 1/255] [--norm linf] [--images 100]

Counts the images that withstand each of the two, and those that withstand only one; all verdicts
are taken by one forward pass in fp32 over the final points. docs/attacks.md holds what came out.
"""

import argparse
import time
from collections.abc import Callable
from fractions import Fraction

import torch
import torchattacks
from torch import Tensor, nn

import nimfast
from nimfast import data
from nimfast.attacks import AutoAttack


def published(model: nn.Module, norm: str, eps: float, classes: int) -> torchattacks.MultiAttack:
    """Their attacks with the budgets of `standard`: their AutoAttack makes 10 iterations."""
    options = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}
    return torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, steps=100, **options),
            torchattacks.APGDT(model, steps=100, n_classes=classes, **options),
            torchattacks.FAB(model, steps=100, multi_targeted=True, n_classes=classes, **options),
            torchattacks.Square(model, n_queries=5000, **options),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as nimfast.load takes it; deterministic")
    parser.add_argument("data", help="as --data of the command lines, for example cifar10:DIR")
    parser.add_argument("--eps", type=Fraction, default=Fraction(1, 255))
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf")
    parser.add_argument("--images", type=int, default=100)
    asked = parser.parse_args()
    model = nimfast.load(asked.model).eval().requires_grad_(False)
    images = data.load(asked.data, "test")
    some = [images[place] for place in images.places(None, asked.images, asked.images)]
    x, y = torch.stack([image for image, _ in some]), torch.tensor([label for _, label in some])

    def right(points: Tensor) -> Tensor:
        verdicts: Tensor = model(points).argmax(1) == y
        return verdicts

    attackers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "nimfast": AutoAttack(model, norm=asked.norm, eps=float(asked.eps)),
        "torchattacks": published(model, asked.norm, float(asked.eps), len(images.classes)),
    }
    print(f"{len(x)} images, {int(right(x).sum())} right; {asked.norm}, eps {asked.eps}")
    robust = {}
    for name, attacker in attackers.items():
        begin = time.process_time()
        robust[name] = right(attacker(x, y))
        seconds = time.process_time() - begin
        print(f"{name}: {int(robust[name].sum())} withstand, {seconds:.0f} s of CPU", flush=True)
    ours, theirs = robust.values()
    print(f"withstand only ours: {int((ours & ~theirs).sum())}, only theirs: "
          f"{int((theirs & ~ours).sum())}")  # fmt: skip


if __name__ == "__main__":
    main()
