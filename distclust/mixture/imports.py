"""Rows, dissimilarities and networks of a user's own, named by an import path `package.module:name`.

Importing runs code. So a path is imported only when its module was allowed in this process: by the recipe
that the user gives, by `allow_modules` of a function, `--allow-module` of a command, or the environment
variable DISTCLUST_ALLOW_MODULES (names with commas between them). A path that merely stands in a checkpoint
or a model is refused.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable
from typing import Any

VARIABLE = "DISTCLUST_ALLOW_MODULES"
_PATH = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def is_import_path(text: str) -> bool:
    """Whether the text is of the form `package.module:name`."""
    return bool(_PATH.match(text))


def allow_modules(names: Iterable[str]) -> None:
    """Allow imports of these modules in this process and those that it starts."""
    together = dict.fromkeys([*allowed_modules(), *names])
    if together:
        os.environ[VARIABLE] = ",".join(together)


def allowed_modules() -> list[str]:
    """The modules that may be imported by path."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def import_object(path: str) -> Any:
    """The object that `package.module:name` names.

    Raises:
        ValueError: the module was not allowed, cannot be imported or has no such name.
    """
    module, _, name = path.partition(":")
    if module not in allowed_modules():
        raise ValueError(
            f"{path!r} would import the module {module!r}, which was not allowed here; if you trust it, give "
            f"allow_modules, --allow-module {module}, or set {VARIABLE}={module}"
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{path!r}: the module cannot be imported ({error}); is it on PYTHONPATH?"
        ) from error
    except Exception as error:  # it is somebody's code
        raise ValueError(
            f"{path!r}: importing the module failed ({type(error).__name__}: {error}); mend the module"
        ) from error
    if not hasattr(found, name):
        raise ValueError(f"{path!r}: the module has no {name!r}")
    return getattr(found, name)
