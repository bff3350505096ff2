"""Parameters and FLOPs of the networks of NAS-Bench-201, without building them."""

from __future__ import annotations

from dataclasses import dataclass

from genas_plugins.counting import Size, height_and_width
from genas_plugins.nasbench201.architecture import NasBench201Architecture

__all__ = ["NasBench201Costs", "nasbench201_costs", "stage_channels"]

_STAGES = 3


@dataclass(frozen=True)
class NasBench201Costs:
    """Parameters and FLOPs of one architecture.

    Attributes:
        parameters: Number of parameters.
        flops: Multiply-adds of one image: convolutions, and the classifier with its bias, as the benchmark counts.
    """

    parameters: int
    flops: int


def nasbench201_costs(
    architecture: NasBench201Architecture,
    init_channels: int = 16,
    cells_per_stage: int = 5,
    num_classes: int = 10,
    image_size: Size = 32,
    live: bool = False,
) -> NasBench201Costs:
    """Parameters and FLOPs of :class:`~genas_plugins.nasbench201.NasBench201Network`, without building it.

    Args:
        architecture: The cell.
        init_channels: C, channels of the first stage.
        cells_per_stage: N, cells in each of the three stages.
        num_classes: Outputs of the classifier.
        image_size: Height and width of the image in pixels; a number for both.
        live: Count only what reaches the output: edges on a path of operations that are not ``none``. The
            benchmark's own figures count every edge.

    Example:
        >>> from genas_plugins.nasbench201 import NasBench201Architecture, nasbench201_costs
        >>> nasbench201_costs(NasBench201Architecture(6 * ("nor_conv_3x3",)))
        NasBench201Costs(parameters=1531546, flops=220119690)
    """
    counted = (architecture.live() if live else architecture).operations
    kernels = [9] * counted.count("nor_conv_3x3") + [1] * counted.count("nor_conv_1x1")
    height, width = height_and_width(image_size)
    parameters = 27 * init_channels + 2 * init_channels
    flops = 27 * init_channels * height * width
    for channels in stage_channels(init_channels):
        if channels > init_channels:
            height, width = (height + 1) // 2, (width + 1) // 2
            # Two 3x3 convolutions, the second with twice the inputs, and the shortcut's 1x1.
            weights = (9 + 18 + 1) * channels // 2 * channels
            parameters += weights + 2 * 2 * channels
            flops += weights * height * width
        weights = cells_per_stage * sum(kernels) * channels**2
        parameters += weights + cells_per_stage * len(kernels) * 2 * channels
        flops += weights * height * width
    classifier = (channels + 1) * num_classes
    return NasBench201Costs(parameters + 2 * channels + classifier, flops + classifier)


def stage_channels(init_channels: int) -> list[int]:
    """Channels of the cells in each of the three stages."""
    return [init_channels * 2**stage for stage in range(_STAGES)]
