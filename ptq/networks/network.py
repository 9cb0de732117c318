"""Which network do these weights make, as it is built and as it is folded?

The stages of a run follow each other on the same weights, so the last networks are kept: a run builds and folds its
network once. What is returned is shared, and must not be changed.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ptq.files import file_sha256
from ptq.networks.checkpoint import load_weights_
from ptq.networks.factory import create_model
from ptq.networks.folding import FoldedModel, fold_model, require_statistics
from ptq.networks.outputs import take_logits_
from ptq.networks.padding import number_padding_
from ptq.networks.parametrizations import make_plain_, untie_
from ptq.networks.reparameterization import reparameterized

# A run works on its network as it came and on the equalized one.
_MOST_KEPT = 2


@dataclass(frozen=True, slots=True)
class NetworkKind:
    """What beside its weights makes a network: its name, see `factory.create_model`, and its sizes."""

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Network:
    """A network with its weights, and what `fold_model` made of it; `note` says what of its output was taken."""

    original: nn.Module
    folded: FoldedModel
    note: str = ""


_KEPT: OrderedDict[tuple[str, NetworkKind], Network] = OrderedDict()


def network_as_built(state: Mapping[str, torch.Tensor], kind: NetworkKind, *, source: str) -> tuple[nn.Module, str]:
    """Builds the network, which returns its logits alone, and loads its weights; `source` names these in messages.

    Returns:
        the network, and a note where there was more to choose from.

    Raises:
        CheckpointError: the weights do not fit.
        ExportError: what it computes of an image depends on the others of its batch.
        UsageError: there is no such network.
    """
    network = create_model(kind.name, num_classes=kind.num_classes, channels=kind.input_shape[0])
    state = _with_shared(state, untie_(network))
    if not _fits(network, state):  # as equalization leaves them, or someone who saved the network's final form
        fresh = create_model(kind.name, num_classes=kind.num_classes, channels=kind.input_shape[0])
        final, note = _in_final_form(fresh, kind)
        if _fits(final, state):
            load_weights_(final, state, name=kind.name, source=source)
            return final, note
    load_weights_(network, state, name=kind.name, source=source)
    return _in_final_form(network, kind)


def _with_shared(state: Mapping[str, torch.Tensor], shared: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights with those that a file has under one of several names under each of them."""
    complete = dict(state)
    for _ in range(2):  # from whichever is there to the first, and from the first to the others
        for name, owner in shared.items():
            for one, other in ((name, owner), (owner, name)):
                if one in complete:
                    complete.setdefault(other, complete[one])
    return complete


def _fits(network: nn.Module, state: Mapping[str, torch.Tensor]) -> bool:
    return {key for key in network.state_dict() if not key.endswith("num_batches_tracked")} <= state.keys()


def _in_final_form(network: nn.Module, kind: NetworkKind) -> tuple[nn.Module, str]:
    """The network with plain weights of its layers' own, logits alone, and no training branches; and notes on these."""
    require_statistics(network)
    untie_(network)
    make_plain_(network)
    number_padding_(network)
    taken = take_logits_(network, input_shape=kind.input_shape, num_classes=kind.num_classes)
    network, left = reparameterized(network, input_shape=kind.input_shape)
    return network, " ".join(note for note in (taken, left) if note)


def network_from_state(state: Mapping[str, torch.Tensor], kind: NetworkKind, *, source: str) -> Network:
    """Builds the network and folds it; see `network_as_built`."""
    original, note = network_as_built(state, kind, source=source)
    return Network(original, fold_model(original, input_shape=kind.input_shape), note)


def network_from_weights(weights: Path, kind: NetworkKind) -> Network:
    """Returns the network of a safetensors file, built where it is none of the last. See `network_from_state`."""
    key = (file_sha256(weights), kind)
    if key not in _KEPT:
        keep_network(weights, kind, network_from_state(safetensors.torch.load_file(weights), kind, source=str(weights)))
    _KEPT.move_to_end(key)
    return _KEPT[key]


def keep_network(weights: Path, kind: NetworkKind, network: Network) -> None:
    """Keeps the network of a weights file for the stages that follow."""
    _KEPT[file_sha256(weights), kind] = network
    while len(_KEPT) > _MOST_KEPT:
        _KEPT.popitem(last=False)
