"""Training-free scores of a freshly initialised network: references to compare flatness with.

NASWOT (Mellor et al., ICML 2021; BayesWatch/nas-without-training@b3a82a6), SynFlow (Tanaka et al., NeurIPS 2020,
used for architecture search by Abdelfattah et al., ICLR 2021; SamsungLabs/zero-cost-nas@a43bfbc) and ZiCo (Li et
al., ICLR 2023; SLDGroup/ZiCo@b0fec65). A higher score is better. All three depend on the initial weights, so the
seed that drew them belongs to the result. Nothing about the model or the global random state is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from genas_plugins.devices import float64_device, full_in_float64, in_float64
from genas_plugins.scoring.batchnorm import evaluation_mode, preserve_batchnorm
from genas_plugins.scoring.data import Batches
from genas_plugins.scoring.errors import MeasurementError
from genas_plugins.scoring.losses import check_summed, image_loss
from genas_plugins.scoring.precision import in_parameter_type, parameter_types_alone

__all__ = ["Deviation", "naswot", "synflow", "zico"]

Deviation = Literal["signed", "absolute"]


@parameter_types_alone()
def naswot(model: nn.Module, images: Tensor) -> float:
    """NASWOT: log-determinant of the agreement of the images' ReLU codes, ``log |K_H|``.

    An image's code says for each ReLU output whether it is above 0. ``K_H[i, j]`` is the number of outputs, over
    all layers, on which images i and j agree: the sum over layers of ``x x^T + (1 - x)(1 - x)^T``. The authors take
    128 normalised training images without augmentation.

    As in the authors' code the network runs in training mode, so that batch normalisation uses this batch's
    statistics; dropout, which their networks lack, stays off. Every call of an :class:`torch.nn.ReLU` counts, in place
    or not, also on an edge that never reaches the output: theirs counts those of NAS-Bench-201, where ``none``
    multiplies by 0, as well. Calls of the function ``relu`` and other activations are not seen.

    Args:
        model: Network that maps images ``(N, 3, H, W)`` to logits.
        images: At least two such images on the model's device.

    Returns:
        Natural logarithm, computed in float64; ``-inf`` where the matrix is singular in float64, for instance
        because two images have the same code, as all have where ``none`` cuts the ReLUs off from the image. Such
        a network ranks below all others.

    Raises:
        ValueError: Fewer than two images, images that are not finite, or no :class:`torch.nn.ReLU` was called.
        MeasurementError: The logits are not finite.
    """
    _check_images(images)
    if len(images) < 2:
        raise ValueError(f"NASWOT compares images and needs at least two, got {len(images)}.")
    kernel = full_in_float64((len(images), len(images)), 0.0, images.device)
    layers = 0

    def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal layers
        # The product of codes of -1 and 1 is agreements minus disagreements.
        codes = (output.flatten(1) > 0).float() * 2 - 1
        kernel.add_(in_float64(codes @ codes.T) + codes.shape[1], alpha=0.5)
        layers += 1

    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    handles = [relu.register_forward_hook(compare) for relu in relus]
    try:
        with _batch_statistics(model), torch.no_grad():
            logits = model(in_parameter_type(model, images))
    finally:
        for handle in handles:
            handle.remove()
    if not layers:
        raise ValueError(
            f"NASWOT reads the outputs of nn.ReLU modules, and {type(model).__name__} called none; activations that "
            "are function calls (F.relu) must be replaced by modules."
        )
    if not bool(logits.isfinite().all()):
        raise MeasurementError("The network's logits are not finite.")
    eigenvalues = torch.linalg.eigvalsh(kernel.cpu())
    if float(eigenvalues[0]) <= float(eigenvalues[-1]) * len(images) * torch.finfo(torch.float64).eps:
        return -math.inf
    return float(eigenvalues.log().sum())


@parameter_types_alone()
def synflow(model: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> float:
    """Synaptic flow without data: the sum of ``|theta * dR / dtheta|`` over the weights.

    ``R`` is the sum of the logits of one image of ones, with all parameters and buffers made positive. As Abdelfattah
    et al. do, the sum runs over the weights of convolutions and linear layers (biases are made positive, but not
    summed), and batch normalisation is left out: it passes its input on. Tanaka et al. keep it, in evaluation mode.
    In a chain of L layers without biases each layer contributes ``R``, so that the score is ``L R``.

    Computed in float64 on copies: ``R`` grows with depth beyond what float32 can hold. The plain sum spans many
    orders of magnitude; take its logarithm for anything but ranks.

    Args:
        model: Network that maps images to logits.
        input_shape: Shape ``(C, H, W)`` of an image.

    Raises:
        ValueError: ``input_shape`` is not three positive integers, or there is no convolution or linear layer.
        MeasurementError: The score is not finite.

    Example:
        >>> from torch import nn
        >>> from genas_plugins.correlation.training_free import synflow
        >>> chain = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> ones = [nn.init.ones_(weight) for weight in chain.parameters()]
        >>> synflow(chain, input_shape=(3, 1, 1))  # L = 2 layers, R = 3 * 2
        12.0
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"input_shape must be (C, H, W), three positive integers, got {input_shape!r}.")
    names = _weight_names(model)
    device = next(model.parameters()).device
    place = float64_device(device)
    with torch.no_grad():
        state = {
            name: in_float64(tensor.detach()).abs() if tensor.is_floating_point() else tensor.to(place)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
    weights = [state[name].requires_grad_() for name in names]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    # A copy, because an activation in place must not alter what another branch reads.
    handles = [norm.register_forward_hook(lambda module, inputs, output: inputs[0].clone()) for norm in norms]
    try:
        with evaluation_mode(model), torch.enable_grad():
            flow = functional_call(model, state, full_in_float64((1, *shape), 1.0, device))
            gradients = torch.autograd.grad(flow.sum(), weights, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(weights, gradients, strict=True)
    # Read from the device once, not for each layer.
    parts = [(weight.detach() * gradient).abs().sum() for weight, gradient in pairs if gradient is not None]
    score = sum(torch.stack(parts).tolist()) if parts else 0.0
    if not math.isfinite(score):
        raise MeasurementError(f"SynFlow is {score}; the weights are not finite or their product leaves float64.")
    return score


@parameter_types_alone()
def zico(model: nn.Module, batches: Batches, deviation: Deviation = "signed") -> float:
    """Inverse coefficient of variation of gradients: ``sum_layers log sum_weights mean|g| / std``.

    ``g`` is the gradient of a batch's mean cross-entropy with respect to one weight; mean and standard deviation
    (divided by the number of batches) run over the batches. The authors take two batches of 128. Layers are
    convolutions and linear layers, without biases. A weight whose deviation is 0 is left out, and so is a layer
    without any other.

    As in the authors' code the network runs in training mode, so that batch normalisation uses each batch's
    statistics; dropout stays off.

    Args:
        model: Network that maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.
        batches: At least two pairs of images and labels ``(N,)`` on the model's device.
        deviation: Paper and code differ. ``"signed"``: that of ``g``, as the code does. ``"absolute"``: that of
            ``|g|``, as Eq. 15 is printed.

    Returns:
        Computed in float64 from the gradients; 0 where no gradient varies: the logits do not depend on the image,
        or all batches are the same.

    Raises:
        ValueError: Fewer than two batches, images that are not finite, no convolution or linear layer, or an
            unknown deviation.
        MeasurementError: A gradient is not finite.
    """
    if deviation not in get_args(Deviation):
        raise ValueError(f"Unknown deviation {deviation!r}; valid choices: {', '.join(get_args(Deviation))}.")
    names = _weight_names(model)
    parameters = dict(model.named_parameters())
    # New tensors on the same memory, so that frozen parameters have gradients too and no .grad is written.
    weights = {name: parameters[name].detach().requires_grad_() for name in names}
    gradients: list[list[Tensor]] = []
    with _batch_statistics(model), torch.enable_grad():
        for images, labels in batches:
            _check_images(images)
            logits = functional_call(model, weights, in_parameter_type(model, images))
            total, counted, outside = image_loss(logits, labels, None)
            check_summed(count := int(counted.sum()), int(outside.sum()), whole=True)
            loss = total / count
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
            gradients.append([in_float64(gradient) for gradient in found])
    if len(gradients) < 2:
        raise ValueError(f"ZiCo needs the gradients of at least two batches, got {len(gradients)}.")
    totals = []
    for layer in zip(*gradients, strict=True):
        signed = torch.stack(layer)
        absolute = signed.abs()
        spread = (signed if deviation == "signed" else absolute).std(0, correction=0)
        ratio = torch.where(spread > 0, absolute.mean(0) / spread, 0.0).sum()
        totals.append(torch.stack([ratio, in_float64(signed.isfinite().all())]))
    # Read from the device once, not for each layer.
    score = 0.0
    for name, (total, finite) in zip(names, torch.stack(totals).tolist(), strict=True):
        if not finite:
            raise MeasurementError(f"The gradient of {name} is not finite.")
        score += math.log(total) if total > 0 else 0.0
    return score


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, except that batch normalisation uses statistics of the batch; all is restored afterwards."""
    with evaluation_mode(model), preserve_batchnorm(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        yield


def _check_images(images: Tensor) -> None:
    broken = int((~images.isfinite().flatten(1).all(1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(images)} images have pixels that are not finite.")


def _weight_names(model: nn.Module) -> list[str]:
    """Names of the weights of convolutions and linear layers; a shared one counts once."""
    existing = dict(model.named_parameters())
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    names = [f"{name}.weight" if name else "weight" for name, _ in layers]
    names = [name for name in names if name in existing]
    if not names:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer whose weights could be scored.")
    return names
