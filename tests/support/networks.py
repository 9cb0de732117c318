"""Small networks that tests of several files use."""

import torch
from torch import nn

# Every quantizer there is: the arguments of `place_quantizers`.
PLACEMENT = {
    "residuals": True, "pools": True, "commuting_pools": True, "first_layer": True, "last_layer": True,
    "skip_layers": (),
}  # fmt: skip


class ResidualBlock(nn.Module):
    """conv-bn-relu-conv-bn plus identity or downsample, as in a ResNet."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1
            else None
        )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class SmallResNet(nn.Module):
    """Stem with max pool, one identity block, one downsample block, average pool, linear layer."""

    def __init__(self, num_classes=4, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.block1 = ResidualBlock(8, 8, 1)
        self.block2 = ResidualBlock(8, 16, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.block2(self.block1(x)))
        return self.fc(torch.flatten(x, 1))


class Untraceable(nn.Module):
    """Its forward branches on data, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        if x.shape[0] > 0 and x.sum() > -1:
            x = x * 1.0
        return self.fc(x.mean((2, 3)))


class NeedsTwoMethods(nn.Module):
    """Finds the brightest quarter of a picture, by tensors that no single calibration method serves.

    `gather` reads one small channel beside one that is 10,000 times as large: max leaves nothing of it. `score` reads
    one large channel beside fifteen small ones: a percentile of 90 leaves nothing of it.
    """

    def __init__(self):
        super().__init__()
        self.spread = nn.Conv2d(3, 16, 1)
        self.gather = nn.Conv2d(16, 16, 1)
        self.score = nn.Conv2d(16, 1, 1)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(12)
        self.fc = nn.Linear(4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.spread.weight[:] = 1 / 3
            self.spread.bias[:] = 2.2  # above the most negative pixel, so that ReLU loses nothing
            self.spread.weight[15] *= 1e4
            self.spread.bias[15] *= 1e4
            self.gather.weight[:, 0] = 0.01
            self.gather.weight[0, 0] = 100.0
            self.score.weight[:, 0] = 0.01
            self.fc.weight[:] = 4 * torch.eye(4)

    def forward(self, x):
        x = self.relu(self.gather(self.relu(self.spread(x))))
        return self.fc(torch.flatten(self.pool(self.score(x)), 1))


def small_resnet(seed=0, **options):
    """A SmallResNet in eval() whose BatchNorm statistics are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallResNet(**options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def small_vision_transformer(num_classes=5):
    """torchvision's vision transformer for 32 pixels with two narrow blocks, and a head that is not all zero."""
    model = _torchvision().VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=num_classes
    )
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


def small_swin(num_classes=5):
    """torchvision's Swin transformer with two stages of two narrow blocks, of which every second is shifted."""
    return _torchvision().SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[5, 5], num_classes=num_classes
    ).eval()  # fmt: skip


class PoolBesideGate(nn.Module):
    """Multiplies a pool's input by something that does not follow the pool."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        return self.fc((self.pool(x) - self.pool(x * torch.sigmoid(x))).flatten(1))


class SecondConvNeXt(nn.Module):
    """A block as in ConvNeXt V2: what its last layer hands to a permutation goes into the residual add as it is."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.narrow, self.fc = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        branch = nn.functional.layer_norm(self.depthwise(x).permute(0, 2, 3, 1), (8,))
        branch = self.narrow(nn.functional.gelu(self.wide(branch))).permute(0, 3, 1, 2)
        return self.fc((x + branch).mean((2, 3)))


class Mixer(nn.Module):
    """A block that mixes positions: both operands of its residual add stay in float."""

    def __init__(self):
        super().__init__()
        self.patches, self.tokens, self.fc = nn.Conv2d(3, 8, 12, stride=12), nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(nn.functional.layer_norm(x, (8,)).transpose(1, 2)).transpose(1, 2)
        return self.fc(nn.functional.layer_norm(x, (8,)).mean(1))


class PermutedIntoLayer(nn.Module):
    """A convolution whose result a linear layer reads, its axes permuted."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 4)

    def forward(self, x):
        return torch.relu(self.fc(self.conv(x).permute(0, 2, 3, 1))).mean((1, 2))


class PermutedLogits(nn.Module):
    """A convolution that writes the logits, their axes permuted."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1)
        return self.head(x).permute(0, 2, 3, 1).flatten(1)


class Inception(nn.Module):
    """A max pool that convolutions and another max pool read, as in GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right, self.fc = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        right = self.right(nn.functional.max_pool2d(x, 3, stride=1, padding=1))
        return self.fc(torch.cat([torch.relu(self.left(x)), torch.relu(right)], 1).mean((2, 3)))


def small_convnext(num_classes=5):
    """torchvision's ConvNeXt with two narrow stages."""
    from torchvision.models.convnext import CNBlockConfig

    return _torchvision().ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=num_classes)


def small_densenet(num_classes=5):
    """torchvision's DenseNet with blocks of three and two layers."""
    return _torchvision().DenseNet(
        growth_rate=4, block_config=(3, 2), num_init_features=8, bn_size=2, num_classes=num_classes
    )


def _torchvision():
    import torchvision

    import ptq.networks.factory  # noqa: F401  (a build of torch without CUDA needs its schemas first)

    return torchvision.models


class TwoConvolutions(nn.Module):
    """Two convolutions with a ReLU between them, through which a factor can be moved, and a linear layer."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))
