"""A space in one file: how many times a picture is blurred before a linear classifier sees it.

What CONTRIBUTING.md and docs/howto/new-space.md describe, whole: the space, its supernet and its subnets. Blurred often
enough, all digits look the same, so that the best of the 16 candidates by accuracy blurs least.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn


class BlurNet(nn.Module):
    """A candidate; its classifier may be the supernet's."""

    def __init__(self, blurs: int, classifier: nn.Module) -> None:
        super().__init__()
        self.blurs = blurs
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.blurs):
            x = F.avg_pool2d(x, 3, 1, 1)
        return self.classifier(x.flatten(1))


class BlurSuperNet(nn.Module):
    """Shares one classifier among all candidates."""

    def __init__(self, num_classes: int, pixels: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pixels = pixels
        self.classifier = nn.Linear(3 * pixels**2, num_classes)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "pixels": self.pixels}

    @property
    def search_space(self) -> BlurSpace:
        return BlurSpace()

    def forward(self, x: Tensor, candidate: int) -> Tensor:
        return self.subnet(candidate)(x)

    def subnet(self, candidate: int) -> nn.Module:
        return BlurNet(candidate, self.classifier)

    def path_modules(self, candidate: int) -> Iterator[nn.Module]:
        yield self.classifier

    def vector_pieces(self, candidate: int) -> list[tuple[Tensor, int]]:
        return [(parameter, 1) for parameter in self.classifier.parameters()]

    @staticmethod
    def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        if set(state) != {"classifier.weight", "classifier.bias"}:
            return None
        classes, features = state["classifier.weight"].shape
        return {"num_classes": classes, "pixels": round((features / 3) ** 0.5)}


class BlurSpace:
    """Whole numbers from 0 to 15, as the four bits of NNI's sample."""

    candidate = int
    supernet_type = BlurSuperNet
    choices: Mapping[str, tuple[tuple[Any, ...], int]] = {f"bit_{place}": ((0, 1), 1) for place in range(4)}

    def sample(self, rng: np.random.Generator) -> int:
        return int(rng.integers(16))

    def mutate(self, candidate: int, probability: float, rng: np.random.Generator) -> int:
        return candidate ^ sum(1 << place for place in range(4) if rng.random() < probability)

    def crossover(self, first: int, second: int, rng: np.random.Generator) -> int:
        mask = int(rng.integers(16))
        return first & mask | second & ~mask & 15

    def to_json(self, candidate: int) -> int:
        return candidate

    def from_json(self, data: Any) -> int:
        return int(data)

    def to_sample(self, candidate: int) -> dict[str, Any]:
        return {f"bit_{place}": candidate >> place & 1 for place in range(4)}

    def from_sample(self, sample: Mapping[str, Any]) -> int:
        return sum(sample[f"bit_{place}"] << place for place in range(4))

    def read(self, text: str) -> int:
        if not re.fullmatch("[0-9]+", text) or int(text) > 15:
            raise ValueError(f"The number of blurs is 0 to 15, got {text!r}.")
        return int(text)

    def supernet_arguments(self, num_classes: int, settings: Any) -> dict[str, Any]:
        return {"num_classes": num_classes, **settings.arguments}

    def network(self, candidate: int, arguments: Mapping[str, Any]) -> nn.Module:
        return BlurNet(candidate, nn.Linear(3 * arguments["pixels"] ** 2, arguments["num_classes"]))
