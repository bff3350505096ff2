"""Search spaces: what can be drawn, mutated and crossed."""

from genas_plugins.spaces.darts import DartsSearchSpace

__all__ = ["DartsSearchSpace"]
