"""torchvision's residual networks and those for CIFAR, written for PyTorch from their layout."""

import torch
from torch import nn


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs, width, stride, groups, base, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, width, stride, groups, base, shortcut):
        super().__init__()
        inner, out = int(width * base / 64) * groups, 4 * width
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = shortcut(inputs, out, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def projection(inputs, out, stride):
    if stride == 1 and inputs == out:
        return None
    return nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class Padding(nn.Module):
    """Every second pixel, and channels of zeros on both sides."""

    def __init__(self, more, stride):
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more // 2))


def padding(inputs, out, stride):
    return None if stride == 1 and inputs == out else Padding(out - inputs, stride)


class ResNet(nn.Module):
    def __init__(self, block, blocks, labels, groups=1, base=64, cifar=False):
        super().__init__()
        width = 16 if cifar else 64
        stem = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, *stem, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        inputs, shortcut = width, padding if cifar else projection
        for index, count in enumerate(blocks):
            layers = []
            for i in range(count):
                stride = 2 if index and not i else 1
                layers.append(block(inputs, width * 2**index, stride, groups, base, shortcut))
                inputs = width * 2**index * block.expansion
            setattr(self, f"layer{index + 1}", nn.Sequential(*layers))
        setattr(self, "linear" if cifar else "fc", nn.Linear(inputs, labels))
        self.cifar, self.count = cifar, len(blocks)

    def forward(self, pixel_values):
        x = self.pool(torch.relu(self.bn1(self.conv1(pixel_values))))
        for index in range(self.count):
            x = getattr(self, f"layer{index + 1}")(x)
        return (self.linear if self.cifar else self.fc)(x.mean((2, 3)))


def make(name, labels, seed=0):
    """One of the networks, every parameter and statistic random."""
    block, blocks, more = {
        "resnet18": (Basic, (2, 2, 2, 2), {}),
        "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
        "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "base": 4}),
        "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"base": 128}),
        **{f"resnet{6 * n + 2}": (Basic, (n, n, n), {"cifar": True}) for n in (3, 5, 7, 9)},
    }[name]
    torch.manual_seed(seed)
    model = ResNet(block, blocks, labels, **more)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var") or (x.ndim == 1 and name.endswith("weight")):
                x.copy_(0.5 + torch.rand(x.shape))
            elif x.ndim == 1:
                x.copy_(0.1 * torch.randn(x.shape))
    return model.eval()
