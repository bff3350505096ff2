"""NNI 3.0 on Pythons and machines that are younger than it is.

NNI is no longer released. It pins a ``typeguard`` that Python 3.14 cannot import, and has wheels for x86-64 only.
"""

from __future__ import annotations

import ast
import importlib
import platform

__all__ = ["RETAGGED", "import_typeguard", "nni_has_a_wheel"]

# NNI's wheel is bound to a platform by its web server alone, which no search of ours starts.
RETAGGED = (
    "pip download nni==3.0 --no-deps --only-binary=:all: --platform manylinux1_x86_64 && "
    "python -m wheel tags --platform-tag any nni-3.0-*.whl && pip install ./nni-3.0-py3-none-any.whl"
)


def nni_has_a_wheel() -> bool:
    """Whether NNI's wheels are for machines such as this: on ARM and others they are not, whatever the system."""
    return platform.machine().lower() in ("x86_64", "amd64")


def import_typeguard() -> None:
    """Import the ``typeguard`` that is installed, also one that needs ``ast.Str``, which Python 3.14 lacks.

    The name is there while ``typeguard`` is imported, and gone afterwards. Nothing calls for it later: it annotates a
    method that Python has not called since 3.8. A missing ``typeguard`` is left to whoever needs it.

    Raises:
        ImportError: Another Python may have dropped more; the message has the command that helps.
    """
    try:
        importlib.import_module("typeguard")
    except ModuleNotFoundError:
        return
    except ImportError as error:
        if error.name != "ast":
            raise
        ast.Str = ast.Constant
        try:
            importlib.import_module("typeguard")
        except ImportError as again:
            raise ImportError(
                f"NNI needs typeguard, and the one that it asks for cannot be imported on Python "
                f"{platform.python_version()} ({again}): pip install --no-deps --upgrade typeguard.",
                name="typeguard",
            ) from again
        finally:
            del ast.Str
