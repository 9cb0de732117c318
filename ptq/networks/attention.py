"""Which linear layers does an attention block hide, and how can they be seen?

`nn.MultiheadAttention` and torchvision's windowed attention read the weights of their projections without calling a
layer, so that neither `torch.fx` nor a quantizer finds one. Here such blocks are replaced by others that call
`nn.Linear` and compute the same. What lies between the projections (products of two activations, softmax, masks) is
one opaque function of the traced graph and stays in float. Where quantizers go is decided in `ptq.quantization.rules`.
"""

import math
from collections.abc import Mapping
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

# Scores of pairs that must not see each other, as torchvision masks them.
_MASKED = -100.0


class WindowedAttention(Protocol):
    """What is read of a module that attends within windows, as Swin's does."""

    qkv: nn.Linear
    proj: nn.Linear
    window_size: list[int]
    shift_size: list[int]
    num_heads: int

    def get_relative_position_bias(self) -> torch.Tensor:
        """Returns what is added to the scores, (1, heads, area, area)."""


def explicit_attention_(model: nn.Module, *, windowed: tuple[type, ...]) -> nn.Module:
    """Returns `model` with attention blocks that call their projections; a block of another kind is left alone.

    The projections of `nn.MultiheadAttention` are then called `in_proj` and `out_proj`, those of a windowed block
    `qkv` and `proj`, beneath the block's own name.

    Args:
        model: the network in `eval()`; it is changed.
        windowed: the classes that satisfy `WindowedAttention`.
    """
    replaced: dict[int, nn.Module] = {}

    def explicit(module: nn.Module) -> nn.Module:
        if id(module) not in replaced:
            replaced[id(module)] = _explicit(module, windowed)
        return replaced[id(module)]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = explicit(child)
    return explicit(model)


def _explicit(module: nn.Module, windowed: tuple[type, ...]) -> nn.Module:
    if isinstance(module, windowed):
        return _ExplicitWindowedAttention(cast(WindowedAttention, module)).eval()
    if type(module) is nn.MultiheadAttention and _is_plain(module):
        return _ExplicitSelfAttention(module).eval()
    return module


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether one weight makes query, key and value, with nothing appended to key and value."""
    has_one_weight = attention.in_proj_weight is not None and attention.batch_first
    return has_one_weight and attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn


def original_name(name: str, names: Mapping[str, object]) -> str | None:
    """Returns how a parameter was called before `explicit_attention_`; None where `names` has no such parameter.

    >>> original_name("layer.attention.in_proj.weight", {"layer.attention.in_proj_weight": ...})
    'layer.attention.in_proj_weight'
    """
    for candidate in (name, "in_proj_".join(name.rsplit("in_proj.", 1))):
        if candidate in names:
            return candidate
    return None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer with these weights; it is built without drawing random ones."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


class _ExplicitSelfAttention(nn.Module):
    """`nn.MultiheadAttention` of one sequence with itself, (n, tokens, channels), without masks."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = original.num_heads
        self.in_proj = _linear(original.in_proj_weight, original.in_proj_bias)
        self.out_proj = _linear(original.out_proj.weight, original.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: None = None,
        need_weights: bool = True,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """Returns the result and no attention weights.

        Raises:
            NotImplementedError: the three sequences differ, there is a mask, or the weights are asked for. While a
                network is traced this says that the block must stay as it was.
        """
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        if key is not query or value is not query or masked or need_weights:
            raise NotImplementedError("Expected self-attention without masks and without attention weights.")
        return self.out_proj(_attend(self.in_proj(query), self.heads)), None


class _ExplicitWindowedAttention(nn.Module):
    """Attention within windows that tile the picture, (n, h, w, channels), which may be shifted."""

    def __init__(self, original: WindowedAttention) -> None:
        super().__init__()
        self.heads = original.num_heads
        self.window = (original.window_size[0], original.window_size[1])
        self.shift = (original.shift_size[0], original.shift_size[1])
        bias = original.qkv.bias
        scale = getattr(original, "logit_scale", None)
        if scale is not None and bias is not None:
            third = bias.numel() // 3  # the keys of cosine attention have no bias
            bias = torch.cat([bias[:third], torch.zeros_like(bias[third : 2 * third]), bias[2 * third :]])
        self.qkv = _linear(original.qkv.weight, bias)
        self.proj = _linear(original.proj.weight, original.proj.bias)
        with torch.no_grad():
            self.register_buffer("position_bias", original.get_relative_position_bias().detach().clone(), False)
            cosine_scale = None if scale is None else torch.clamp(scale, max=math.log(100.0)).exp().detach().clone()
            self.register_buffer("cosine_scale", cosine_scale, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what attention makes of `x`, in its shape."""
        # A linear layer treats every pixel alike, so that it need not wait until the picture is padded and cut.
        found = _attend_in_windows(
            self.qkv(x), self.qkv.bias, self.position_bias, self.cosine_scale, self.window, self.shift, self.heads
        )
        return self.proj(found)


def _attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Scaled dot-product attention from queries, keys and values side by side, (n, tokens, 3 * channels)."""
    query, key, value = _split(qkv, heads)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return _merge(torch.softmax(scores, dim=-1) @ value)


def _split(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, each (n, heads, tokens, width)."""
    tokens, width = int(qkv.shape[1]), int(qkv.shape[2]) // (3 * heads)
    parts = qkv.reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def _merge(result: torch.Tensor) -> torch.Tensor:
    """(n, heads, tokens, width) to (n, tokens, channels)."""
    heads, tokens, width = (int(length) for length in result.shape[1:])
    return result.transpose(1, 2).reshape(-1, tokens, heads * width)


def _padded(qkv: torch.Tensor, bias: torch.Tensor | None, window: tuple[int, int]) -> torch.Tensor:
    """(n, h, w, 3 * channels) with pixels added below and on the right until windows tile it.

    The picture before the linear layer is padded with zeros, of which the layer makes its bias.
    """
    below, right = (-int(qkv.shape[1]) % window[0], -int(qkv.shape[2]) % window[1])
    if not below and not right:
        return qkv
    if bias is None:
        return F.pad(qkv, (0, 0, 0, right, 0, below))
    return F.pad(qkv - bias, (0, 0, 0, right, 0, below)) + bias


def _attend_in_windows(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    position_bias: torch.Tensor,
    cosine_scale: torch.Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
) -> torch.Tensor:
    """Attention within each window of `qkv`, (n, h, w, 3 * channels), which a linear layer with `bias` made."""
    found = (int(qkv.shape[1]), int(qkv.shape[2]))
    qkv = _padded(qkv, bias, window)
    height, width = int(qkv.shape[1]), int(qkv.shape[2])
    # A window that covers the picture needs no shift.
    down, right = (0 if window[i] >= (height, width)[i] else shift[i] for i in range(2))
    if down or right:
        qkv = torch.roll(qkv, shifts=(-down, -right), dims=(1, 2))
    query, key, value = _split(_cut(qkv, window), heads)
    if cosine_scale is not None:
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * cosine_scale
    else:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if down or right:
        mask = _shift_mask(height, width, window, (down, right)).to(scores)
        windows, area = mask.shape[0], mask.shape[1]
        scores = scores.reshape(-1, windows, heads, area, area) + (position_bias + mask.unsqueeze(1)).unsqueeze(0)
        scores = scores.reshape(-1, heads, area, area)
    else:
        scores = scores + position_bias
    result = _join(_merge(torch.softmax(scores, dim=-1) @ value), height, width, window)
    if down or right:
        result = torch.roll(result, shifts=(down, right), dims=(1, 2))
    return result if found == (height, width) else result[:, : found[0], : found[1]]


def _cut(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """(n, h, w, c) to (n * windows, area, c)."""
    height, width, channels = (int(length) for length in x.shape[1:])
    parts = x.reshape(-1, height // window[0], window[0], width // window[1], window[1], channels)
    return parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], channels)


def _join(windows: torch.Tensor, height: int, width: int, window: tuple[int, int]) -> torch.Tensor:
    """(n * windows, area, c) to (n, h, w, c)."""
    channels = int(windows.shape[-1])
    parts = windows.reshape(-1, height // window[0], width // window[1], window[0], window[1], channels)
    return parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def _shift_mask(height: int, width: int, window: tuple[int, int], shift: tuple[int, int]) -> torch.Tensor:
    """Zero for pairs of pixels that were neighbours before the picture was rolled, else `_MASKED`.

    Returns:
        (windows, area, area), float32. Source: Liu et al., Swin Transformer (2021), section 3.2.
    """

    def regions(length: int, size: int, step: int) -> np.ndarray:
        place = np.arange(length)
        return np.where(step > 0, 1 * (place >= length - size) + (place >= length - step), 0)

    rows, columns = (regions(*sizes) for sizes in zip((height, width), window, shift, strict=True))
    region = (3 * rows[:, None] + columns).reshape(height // window[0], window[0], width // window[1], window[1])
    flat = region.transpose(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    # Made outside of torch, so that an export sees a constant.
    return torch.from_numpy(np.where(flat[:, None, :] != flat[:, :, None], np.float32(_MASKED), np.float32(0)))


# To the tracer these are single operations: their shapes depend on the picture's size.
fx.wrap("_attend")
fx.wrap("_attend_in_windows")
