"""Keyword arguments that a function passes on to a class of settings, shown in the function's own signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["keywords_of", "renamed"]

Function = TypeVar("Function", bound=Callable[..., Any])


def keywords_of(settings: type, *left_out: str, **defaults: Any) -> Callable[[Function], Function]:
    """Show the keywords of ``settings`` where a function has ``**settings``, to ``help``, editors and checks.

    Args:
        settings: A class whose constructor takes keywords.
        left_out: Names of those that the function does not take.
        **defaults: Other defaults than those of the class.
    """

    def decorate(function: Function) -> Function:
        own = list(inspect.signature(function).parameters.values())
        names = {parameter.name for parameter in own} | set(left_out)
        added = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(settings).parameters.items()
            if name not in names and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        kept = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        return function

    return decorate


def renamed(function: Function, **old: str) -> Function:
    """Let a function take keywords under the names that they had before.

    Args:
        function: Takes the present names.
        **old: The present name by the old one.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        for before, now in old.items():
            if before in keywords:
                if now in keywords:
                    raise TypeError(f"{before} is the old name of {now}: pass {now} alone.")
                keywords[now] = keywords.pop(before)
        return function(*arguments, **keywords)

    return call  # type: ignore[return-value]
