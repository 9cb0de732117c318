"""Which part of what a network returns are its logits?

Classifiers return tuples with auxiliary heads, dicts, or objects with a field `logits`, and take masks and switches
behind the image. What is quantized takes images alone and returns logits alone, under the names of its parameters.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

# A step into what a network returned: a key, a position, or an attribute.
_Step = tuple[str, Callable[[Any], Any]]


def take_logits_(network: nn.Module, *, input_shape: tuple[int, int, int], num_classes: int) -> str:
    """Makes a network return its logits alone, (n, classes), where it returns more or another shape.

    Among several things the one that is called `logits` is taken, else the first with a number per class. A network
    that cannot run a zero image, or returns nothing of the kind, is left as it is.

    Returns:
        what was taken, in a sentence; empty where nothing had to be chosen.
    """
    try:
        with torch.no_grad():
            returned = network(torch.zeros(1, *input_shape))
    except Exception:  # `check_runs` says what is wrong
        return ""
    found = next(
        ((steps, value) for steps, value in _tensors(returned, ()) if value.numel() == num_classes), ((), None)
    )
    steps, logits = found
    if logits is None:
        return ""
    is_plain = logits.ndim == 2 and len(logits) == 1
    if steps or not is_plain or len(inspect.signature(type(network).forward).parameters) > 2:
        _set_forward_(network, steps, num_classes, is_plain=is_plain)
    if not steps:
        return ""
    what = "".join(text for text, _ in steps)
    return f"The network returns a {type(returned).__name__}, of which output{what} is taken as its logits."


def _tensors(value: object, steps: tuple[_Step, ...]) -> Iterator[tuple[tuple[_Step, ...], torch.Tensor]]:
    """The tensors in what was returned, one called `logits` first, each with the way to it."""
    if isinstance(value, torch.Tensor):
        yield steps, value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=lambda key: key != "logits"):
            yield from _tensors(value[key], (*steps, (f"[{key!r}]", _item(key))))
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", ())
        places = sorted(range(len(value)), key=lambda place: list(names[place : place + 1]) != ["logits"])
        for place in places:
            yield from _tensors(value[place], (*steps, (f"[{place}]", _item(place))))
    elif isinstance(getattr(value, "logits", None), torch.Tensor):
        yield (*steps, (".logits", lambda output: output.logits)), value.logits  # type: ignore[attr-defined]


def _item(key: Any) -> Callable[[Any], Any]:
    return lambda output: output[key]


def _set_forward_(network: nn.Module, steps: tuple[_Step, ...], num_classes: int, *, is_plain: bool) -> None:
    """Gives the network a class of its own, for tracers ask the class for `forward`."""
    base = type(network)

    def forward(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        output = base.forward(self, images)
        for _, step in steps:
            output = step(output)
        return output if is_plain else output.reshape(-1, num_classes)

    network.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
