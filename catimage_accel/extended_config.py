"""Diffusers models with more config keys than the class they extend."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

Model = TypeVar("Model", bound=type)


def extends_config(model: Model) -> Model:
    """Class decorator: diffusers finds in a saved config what the base class takes and what ``model`` adds to it.

    Diffusers takes from a config the names in the constructor's signature, which ``**config`` would hide.
    """
    init: Any = model.__init__  # type: ignore[misc]
    base = inspect.signature(model.__mro__[1].__init__).parameters  # type: ignore[misc]
    own = [one for name, one in inspect.signature(init).parameters.items()
           if name != "self" and one.kind is not inspect.Parameter.VAR_KEYWORD]  # fmt: skip
    init.__signature__ = inspect.Signature([*base.values(), *own])
    return model
