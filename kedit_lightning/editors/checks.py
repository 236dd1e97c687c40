"""Refusing settings in one line."""

from __future__ import annotations

from kedit_lightning.errors import KeditError


def ascending(**layers: list[int]) -> list[int]:
    """The layers of a setting, if there are any, each once and ascending.

    Args:
        layers: The layers by the setting's name.

    Raises:
        KeditError: They are not.
    """
    ((name, found),) = layers.items()
    if not found or sorted(set(found)) != list(found):
        msg = f"{name}: expected at least one layer, each once and in ascending order, got {found}"
        raise KeditError(msg)
    return found


def at_least(least: float, **settings: float) -> None:
    """Refuse settings that are too small.

    Raises:
        KeditError: One is.
    """
    for name, value in settings.items():
        if not value >= least:
            msg = f"{name}: expected {'a positive number' if 0 < least < 1 else f'at least {least}'}, got {value}"
            raise KeditError(msg)
