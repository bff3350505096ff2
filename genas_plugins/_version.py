"""The version, in a module without imports: packaging reads it where torch is not installed."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
