"""Which networks stand for the families, and what keeps their random weights from being absurd?

Weights as a constructor draws them make poor subjects: the running statistics of BatchNorm are not those of any
activation, some heads are all zero, and ConvNeXt's blocks are scaled by 1e-6. Here such a network becomes one whose
activations have the sizes that training gives them. Nothing is measured here.
"""

import numpy as np
import torch
from torch import nn

from ptq.data.images import network_input
from ptq.networks.factory import create_model

FAMILIES = {
    "ResNet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "ResNeXt": ("resnext50_32x4d",),
    "Wide-ResNet": ("wide_resnet50_2",),
    "MobileNetV2": ("mobilenet_v2",),
    "MobileNetV3": ("mobilenet_v3_small", "mobilenet_v3_large"),
    "EfficientNet": ("efficientnet_b0", "efficientnet_v2_s"),
    "DenseNet": ("densenet121",),
    "SqueezeNet": ("squeezenet1_0", "squeezenet1_1"),
    "VGG": ("vgg11_bn", "vgg16"),
    "RegNet": ("regnet_x_400mf", "regnet_y_400mf"),
    "ConvNeXt": ("convnext_tiny",),
    "ViT": ("vit_b_32", "vit_b_16"),
    "Swin": ("swin_t", "swin_v2_t"),
    "own factory": ("benchmarks.networks:cifar_resnet20",),
}
CLASSES = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCHES, _BATCH = 2, 16
_LAYER_SCALE = 0.2


def image_side(model: str) -> int:
    """Returns the height and width in pixels of the images that a network is measured with."""
    return 32 if "cifar" in model else 224


def random_pixels(count: int, *, side: int, seed: int) -> np.ndarray:
    """Returns images of coloured blobs with noise, uint8 (count, side, side, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(0, 50, (count, side // 16 + 1, side // 16 + 1, 3))
    blobs = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :side, :side]
    return np.clip(118 + blobs + generator.normal(0, 25, blobs.shape), 0, 255).astype(np.uint8)


def realistic_network(model: str, *, side: int) -> nn.Module:
    """Returns the network with random weights of seed 0, in `eval()`.

    BatchNorm has the statistics of random images, layers whose weights are all zero get small random ones, and
    layer scales are `_LAYER_SCALE`.
    """
    network = create_model(model, num_classes=10 if "cifar" in model else CLASSES, channels=3)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        if isinstance(getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.constant_(module.layer_scale, _LAYER_SCALE)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, std=0.2, generator=generator)
        norm.train()
    if norms:
        pixels = random_pixels(_BATCHES * _BATCH, side=side, seed=1)
        with torch.inference_mode():
            for batch in np.array_split(pixels, _BATCHES):
                network(torch.from_numpy(network_input(batch, mean=MEAN, std=STD)))
    return network.eval()
