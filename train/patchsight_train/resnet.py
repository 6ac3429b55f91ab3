"""Residual networks, arXiv:1512.03385, with parameter names as in torchvision, so that public weights load unmapped.

ResNet-18 and ResNet-50, the latter with its stride in the 3×3 convolution as everybody has it today; for pictures of
few pixels with the stem of SimCLR's App. B.9 (arXiv:2002.05709). Letters: N images, D channels of the last map, h × w
its cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.architecture import ResNetConfig
from patchsight_train.batch_norm import BatchNorm
from patchsight_train.encoder import Encoder


def conv(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Without bias: a batch norm follows."""
    return nn.Conv2d(channels, out, kernel_size=size, stride=stride, padding=size // 2, bias=False)


def shortcut(channels: int, out: int, stride: int) -> nn.Module:
    """The identity where it fits; else a projection, the paper's option B."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(conv(channels, out, 1, stride), BatchNorm(out))


class BasicBlock(nn.Module):
    """ReLU(x + two 3×3 convolutions of x): `(N, channels, H, W)` to `(N, width, H / stride, W / stride)`."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), BatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3), BatchNorm(width)
        self.downsample = shortcut(channels, width, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """ReLU(x + 1×1, 3×3, 1×1 convolutions of x): `(N, channels, H, W)` to `(N, 4 · width, H / stride, W / stride)`."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1, self.bn1 = conv(channels, width, 1), BatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), BatchNorm(width)
        self.conv3, self.bn3 = conv(width, out, 1), BatchNorm(out)
        self.downsample = shortcut(channels, out, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


Block = type[BasicBlock] | type[Bottleneck]

# By depth: the kind of block, and how many of them each stage has.
BLOCKS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def stage(block: Block, channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """`depth` blocks, of which the first takes the stride."""
    rest = (block(block.expansion * width, width, 1) for _ in range(depth - 1))
    return nn.Sequential(block(channels, width, stride), *rest)


class ResNet(Encoder):
    """Images `(N, 3, H, W)`, normalized and of any size, to the cells of the last map: tokens `(N, h·w, D)`.

    h and w are H and W through 32, or through 8 with the stem "cifar", rounded up. Batch norm makes an image's tokens
    depend on its batch in training; in evaluation they do not.
    """

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        cifar = config.stem == "cifar"
        self.conv1 = conv(3, 64, 3) if cifar else conv(3, 64, 7, stride=2)
        self.bn1 = BatchNorm(64)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        block, depths = BLOCKS[config.depth]
        self.layer1 = stage(block, 64, 64, depths[0], 1)
        self.layer2 = stage(block, 64 * block.expansion, 128, depths[1], 2)
        self.layer3 = stage(block, 128 * block.expansion, 256, depths[2], 2)
        self.layer4 = stage(block, 256 * block.expansion, 512, depths[3], 2)
        self.initialize()

    def initialize(self) -> None:
        """Convolutions as He et al. (arXiv:1502.01852). The last norm of each block starts at 0 (arXiv:1706.02677): the
        network is at first its shortcuts alone."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest with

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        cells: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, D, h, w)
        return cells.flatten(2).transpose(1, 2)
