"""What all commands have in common: each option is given once, near names are suggested, -q and -v work everywhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from delineate.core.text import near

if TYPE_CHECKING:
    _Base = TyperCommand
else:
    _Base = object


@contextmanager
def importing() -> Iterator[None]:
    """Pause garbage collection during imports that take seconds, much of it spent looking for garbage.

    They leave no garbage, and what they define stays until the process ends, so it is exempt from later searches.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Commands(typer.Typer):
    """A group of commands that check their options before anything runs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, rich_markup_mode=None, **settings)

    def command(self, *names: Any, **settings: Any) -> Callable[[Any], Any]:
        return super().command(*names, cls=_Command, **settings)


class _Checked(_Base):
    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters and the root's that every command takes."""
        root = ctx.find_root().command
        own = super().get_params(ctx)
        if root is self:
            return own
        return [*own, *(param for param in root.params if param.name in EVERYWHERE)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            values, _, given = self.make_parser(ctx).parse_args(args=list(args))
            _check_given_once(ctx, given)
            for param in self.get_params(ctx):
                _check_choice(ctx, param, values.get(param.name))
        return super().parse_args(ctx, args)


class _Command(_Checked, TyperCommand):
    pass


class _Group(_Checked, TyperGroup):
    pass


EVERYWHERE = ("quiet", "verbose")
"""Root options that may also follow any command's name."""


def adds_up(param: Any) -> bool:
    """Whether an option may be given several times: all its values count, or it acts at once, as --help does."""
    return bool(param.multiple or param.is_eager)


def _check_given_once(ctx: Any, given: Sequence[Any]) -> None:
    for param in given:
        if given.count(param) > 1 and not adds_up(param):
            ctx.fail(f"{max(param.opts, key=len)} is given {given.count(param)} times; give it once")


def choices_of(param: Any) -> list[str]:
    """The words that an option or argument accepts, if they are fixed."""
    return [str(choice) for choice in getattr(getattr(param, "type_descriptor", None), "choices", None) or ()]


def _check_choice(ctx: Any, param: Any, value: Any) -> None:
    choices = choices_of(param)
    if isinstance(value, str) and choices and value not in choices and (hint := near(value, choices)):
        known = ", ".join(repr(choice) for choice in choices)
        raise typer.BadParameter(f"'{value}' is not one of {known}{hint}", ctx=ctx, param=param)
