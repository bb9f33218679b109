"""Says when tensors are about to be changed: by an optimizer, or by what averages weights.

Each object gets one hook, for ever: hooks are called in the thread that trains, and taking one away in another thread
would break the loop over them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["announcers_of"]


class Announcer:
    """Calls functions each time before its object changes tensors.

    Attributes:
        listeners: The functions; may be added and discarded in any thread.
    """

    def __init__(self) -> None:
        self.listeners: set[Callable[[], object]] = set()

    def announce(self) -> None:
        """Calls all of them."""
        for listener in tuple(self.listeners):
            listener()


_announcers: WeakKeyDictionary[Any, Announcer] = WeakKeyDictionary()


def announcers_of(until: Any) -> list[Announcer]:
    """The announcers of one object, or of several in a list or another iterable.

    An object has ``register_step_pre_hook``, as torch's optimizers have, or ``update_parameters``, as
    ``torch.optim.swa_utils.AveragedModel`` has.

    Raises:
        TypeError: one of them has neither.
    """
    is_one = _can_announce(until) or not isinstance(until, Iterable)
    return [_announcer_of(one) for one in ([until] if is_one else until)]


def _can_announce(one: Any) -> bool:
    if isinstance(one, type):  # its methods are not for it
        return False
    return callable(getattr(one, "register_step_pre_hook", None)) or callable(getattr(one, "update_parameters", None))


def _announcer_of(one: Any) -> Announcer:
    if not _can_announce(one):
        raise TypeError(
            "until= takes what has register_step_pre_hook, as optimizers have, or update_parameters, as AveragedModel "
            f"has, not {type(one).__name__}. Before something else changes the tensors, call copy_rest() of the save."
        )
    announcer = _announcers.get(one)
    if announcer is None:
        announcer = _announcers[one] = Announcer()
        if callable(getattr(one, "register_step_pre_hook", None)):
            one.register_step_pre_hook(_Hook(announcer))
        else:
            one.update_parameters = _Update(one, announcer)
    return announcer


class _Hook:
    """What an optimizer calls before its step."""

    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer

    def __call__(self, *_: Any) -> None:
        self._announcer.announce()


class _Update:
    """Stands for the method ``update_parameters`` of one object. Copies and pickles of that have the method itself."""

    def __init__(self, one: Any, announcer: Announcer) -> None:
        self._method = one.update_parameters
        self._announcer = announcer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._announcer.announce()
        return self._method(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._method.__self__, "update_parameters")
