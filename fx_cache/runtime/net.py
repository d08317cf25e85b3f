"""Runs a forward again, uncached, where it went another way than the step that it reuses.

Code between graphs runs at every step, and is not ours. That it has gone another way shows when calls of the span have
been skipped already, and what came of them is in its hands: then the whole forward is begun anew. Nobody but who called
it can do that. So a net is put between the compiled call and the code that it runs, once it turns out that this is
captured in several graphs.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any, Protocol

import torch
from torch._dynamo import disable
from torch._dynamo.eval_frame import skip_code

from fx_cache.errors import guarded
from fx_cache.runtime.contents import contents

_CALLED = "fn"
"""What a compiled call's frame has for the code that it runs."""


_VERSIONS = "__fx_cache_versions__"

Versions = list[tuple[torch.Tensor, int]]


def versions(value: Any) -> Versions:
    """The tensors in a value, with their versions; without those made in inference mode, which have none."""
    found = (v for v in contents(value) if isinstance(v, torch.Tensor))
    return [(v, v._version) for v in found if not v.is_inference()]


def versions_at_begin(frame: FrameType) -> Versions | None:
    """Those of what the compiled call of a frame was given, as they were when it began; None if unknown."""
    found: Versions | None = frame.f_locals.get(_VERSIONS)
    return found


class Astray(BaseException):
    """A forward went another way than the step that it reuses. No error: no code of the model's is to catch it."""


class Caught(Protocol):
    """A forward under way."""

    def end(self, result: Any) -> bool:
        """It is over, with this result; returns whether that counts."""

    @property
    def reusing(self) -> bool:
        """Whether calls were skipped in a span that has not ended."""

    def again(self) -> None:
        """It begins anew, and computes."""


class Net:
    """Calls the code of a compiled call, and calls it again where what came of it does not count."""

    def __init__(self, called: Callable[..., Any], under_way: Callable[[FrameType], Caught | None]) -> None:
        """
        Args:
            called: the code.
            under_way: the forward of a compiled call's frame, if it is captured in several graphs.
        """
        self.called = called
        self._under_way = under_way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        self._begins(frame, args, kwargs)
        try:
            result = self.called(*args, **kwargs)
        except (Astray, Exception) as error:
            if not self._broken_off(frame, error):
                raise
        else:
            if self._counts(frame, result):
                return result
        return self.called(*args, **kwargs)

    # What the code calls is captured, as without a net; what the net itself does is not.
    skip_code(__call__.__code__)

    @disable
    def _begins(self, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the versions of what a forward is given: by them is seen what it writes to before its first graph."""
        with guarded("begin"):
            frame.f_locals[_VERSIONS] = versions((args, kwargs))

    @disable
    def _counts(self, frame: FrameType, result: Any) -> bool:
        """Whether the result of a forward that is over counts; if not, it is to begin anew."""
        forward = self._under_way(frame)
        if forward is None or forward.end(result):
            return True
        forward.again()
        return False

    @disable
    def _broken_off(self, frame: FrameType, error: BaseException) -> bool:
        """Whether a forward that an error has ended is to begin anew."""
        forward = self._under_way(frame)
        if forward is None or not (isinstance(error, Astray) or forward.reusing):
            return False
        forward.again()
        return True


def spread(frame: FrameType, under_way: Callable[[FrameType], Caught | None]) -> bool:
    """Puts a net under the compiled call whose frame this is, from its next time on; whether it has one already."""
    called = frame.f_locals.get(_CALLED)
    if isinstance(called, Net):
        return True
    for function in gc.get_referrers(frame.f_code):
        if isinstance(function, FunctionType):
            for name, cell in zip(frame.f_code.co_freevars, function.__closure__ or (), strict=False):
                if name == _CALLED and cell.cell_contents is called:
                    cell.cell_contents = Net(called, under_way)
    return False


def plain(called: Any) -> Any:
    """The code of a compiled call, without a net."""
    return called.called if isinstance(called, Net) else called
