"""What goes wrong with a measurement."""

from __future__ import annotations

__all__ = ["MeasurementError"]


class MeasurementError(ArithmeticError):
    """A measurement gave no finite number; the search records such a candidate as failed and goes on."""
