"""Convolutional and recurrent networks of the usual shapes, with random weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]


class Residual(nn.Module):
    """Two convolutions of 3 x 3 beside a skip connection (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList((norm(width), norm(width)))
        self.skip = nn.Sequential()
        if stride != 1 or channels != width:
            self.skip.extend([nn.Conv2d(channels, width, 1, stride, bias=False), norm(width)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(h)) + self.skip(x))


def resnet18(norm: Norm, outputs: int = 10) -> nn.Module:
    """ResNet-18 (He et al. 2016) with any norm: 11.2 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(channels, width, stride, norm), Residual(width, width, 1, norm)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs))


class Depthwise(nn.Module):
    """A depthwise convolution of 7 x 7 and two layers on channels beside a skip connection (Liu et al. 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.mixing, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.mixing(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(F.gelu(self.wide(h)))).permute(0, 3, 1, 2)


def depthwise(outputs: int = 10) -> nn.Module:
    """A network of depthwise convolutions in the manner of ConvNeXt (Liu et al. 2022): 1.0 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 48, 4, 4), Depthwise(48), Depthwise(48)]
    for width in (96, 192):
        layers += [nn.Conv2d(width // 2, width, 2, 2), Depthwise(width), Depthwise(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, outputs))


class LSTMClassifier(nn.Module):
    """An LSTM whose states are averaged over the steps."""

    def __init__(self, width: int = 64, hidden: int = 128, outputs: int = 2):
        super().__init__()
        self.layer, self.out = nn.LSTM(width, hidden, batch_first=True), nn.Linear(hidden, outputs)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(self.layer(input)[0].mean(dim=1))
