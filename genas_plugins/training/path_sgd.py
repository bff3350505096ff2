"""SGD for weight-sharing supernets: a step costs as much as the sampled path, and yet every weight decays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

__all__ = ["PathSGD"]


class PathSGD(SGD):
    """SGD with momentum and weight decay, as if zeros were written where a step has no gradient.

    The official supernet training (clovaai/GeNAS@fd3cba8) ran on a torch whose ``zero_grad`` wrote zeros, so weight
    decay and momentum moved every weight that had been sampled before, at every step. With a gradient of zero a step
    is linear in a weight w and its momentum v::

        v <- momentum v + weight_decay w
        w <- w - lr v

    and k of them are the k-th power of a 2x2 matrix. A step only updates parameters with a gradient. :meth:`catch_up`
    applies the steps that others have missed and must be called before a forward pass that reads them; :meth:`flush`
    does so for all, and ``state_dict()`` calls it.

    As with ``torch.optim.SGD``, a parameter that never had a gradient does not move. The state is that of
    ``torch.optim.SGD``, and either optimizer continues from the other's. Between steps gradients must be None rather
    than zero, as ``zero_grad()`` leaves them.

    Args:
        params: Parameters, in one group.
        lr: Learning rate. It and the others may change at any time; missed steps use the values of their time.
        momentum: Momentum factor.
        weight_decay: Weight decay factor (L2 penalty).

    Raises:
        ValueError: A setting is negative, or there are no parameters or several groups of them.

    Example:
        >>> import torch
        >>> from genas_plugins.training.path_sgd import PathSGD
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = PathSGD([weight], lr=0.1, weight_decay=0.5)
        >>> for weight.grad in (torch.tensor(1.0), None):  # the second step does not sample its path
        ...     loss = optimizer.step()
        >>> optimizer.flush()
        >>> round(weight.item(), 4)  # 1 - 0.1 * (1 + 0.5), and then 0.85 - 0.1 * 0.5 * 0.85
        0.8075
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
        self._all_present()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group of parameters.

        Raises:
            ValueError: There is one already.
        """
        if self.param_groups:
            raise ValueError("PathSGD takes one group of parameters, but got a second one.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters that have a gradient.

        Args:
            closure: Computes the gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        lr, momentum, decay = settings = group["lr"], group["momentum"], group["weight_decay"]
        if settings != self._settings:
            self.flush()
            self._settings = settings
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        self.catch_up(moved)
        self._steps += 1
        if not moved:
            return loss
        gradients = torch._foreach_add([parameter.grad for parameter in moved], moved, alpha=decay)
        buffers = [self._buffer(parameter) for parameter in moved]
        known = [(old, new) for old, new in zip(buffers, gradients, strict=True) if old is not None]
        if known:
            old, new = map(list, zip(*known, strict=True))
            torch._foreach_mul_(old, momentum)
            torch._foreach_add_(old, new)
        # The first gradient of a parameter becomes its momentum.
        buffers = [new if old is None else old for old, new in zip(buffers, gradients, strict=True)]
        torch._foreach_add_(moved, buffers, alpha=-lr)
        for parameter, buffer in zip(moved, buffers, strict=True):
            self.state[parameter]["momentum_buffer"] = buffer
            self._made[parameter] = self._steps
        return loss

    @torch.no_grad()
    def catch_up(self, parameters: Iterable[Tensor]) -> None:
        """Apply the steps that these parameters of this optimizer have missed."""
        late = []
        for parameter in parameters:
            missed = self._steps - self._made.get(parameter, 0)
            buffer = self._buffer(parameter) if missed else None
            if buffer is not None:
                late.append((parameter, buffer, self._power(missed)))
                self._made[parameter] = self._steps
        if not late:
            return
        weights, buffers, powers = map(list, zip(*late, strict=True))
        to_weight, to_buffer = ([power[row] for power in powers] for row in (0, 1))
        change = torch._foreach_mul(buffers, [factor for _, factor in to_weight])
        torch._foreach_mul_(buffers, [factor for _, factor in to_buffer])
        torch._foreach_add_(buffers, torch._foreach_mul(weights, [factor for factor, _ in to_buffer]))
        torch._foreach_mul_(weights, [factor for factor, _ in to_weight])
        torch._foreach_add_(weights, change)

    def flush(self) -> None:
        """Apply all steps that any parameter has missed."""
        self.catch_up(self.param_groups[0]["params"])
        self._all_present()

    def state_dict(self) -> dict[str, Any]:
        """The state of ``torch.optim.SGD``, after a flush."""
        self.flush()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict ends here too.
        super().__setstate__(state)
        self._all_present()

    def _all_present(self) -> None:
        # Steps since the last flush, how many of them a parameter has made, and their settings.
        self._steps = 0
        self._made: dict[Tensor, int] = {}
        self._settings: tuple[float, float, float] | None = None
        self._powers: dict[int, list[list[float]]] = {}

    def _buffer(self, parameter: Tensor) -> Tensor | None:
        return self.state[parameter].get("momentum_buffer") if parameter in self.state else None

    def _power(self, steps: int) -> list[list[float]]:
        """The matrix that advances (weight, momentum) by ``steps`` steps without a gradient."""
        if steps not in self._powers:
            lr, momentum, decay = self._settings
            once = np.array([[1 - lr * decay, -lr * momentum], [decay, momentum]], dtype=np.float64)
            self._powers[steps] = np.linalg.matrix_power(once, steps).tolist()
        return self._powers[steps]
