"""The blocks of both networks, and the channels of the levels; each is read once and knows nothing of training.

Convolutions are 3x3 with padding 1 and no bias, because batch normalisation follows and brings its own.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

COARSEST = 16  # the encoder's bottom level, below the first stage

# Channels in units of base_channels; what is not whole is rounded down.
ENCODER_WIDTH = {16: 3, 32: 2, 64: 1.5, 128: 1.25, 256: 1}
DECODER_WIDTH = {32: 2, 64: 1.5, 128: 1, 256: 1}


def channels_of(widths: dict[int, float], base_channels: int) -> dict[int, int]:
    """Return the channels of each level."""
    return {r: int(width * base_channels) for r, width in widths.items()}


class ConvBNReLU(nn.Sequential):
    """Convolve 3x3, normalise over the batch, rectify: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def fold(self) -> None:
        """Fold the batch normalisation into the convolution: fewer operations, for prediction alone, in eval mode."""
        convolution, normalisation, _ = self
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(normalisation, nn.BatchNorm2d)
        self[0], self[1] = fuse_conv_bn_eval(convolution, normalisation), nn.Identity()


class DoubleConv(nn.Sequential):
    """Apply ConvBNReLU twice: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(ConvBNReLU(in_channels, out_channels), ConvBNReLU(out_channels, out_channels))


class EncoderLevel(nn.Module):
    """Read the image at one resolution, take the finer level's features in, refine.

    (N, image_channels, H, W) and, once a finer level exists, (N, finer_channels, 2H, 2W) -> (N, channels, H, W).
    Both convolutions add up before one batch normalisation. `from_finer` starts at zero, so that a network which
    gains a finer level does not change.

    Args:
        image_channels: channels of the image, which the level sees for ever.
        finer_channels: channels of the next finer level, or None where there never is one (the finest).
        channels: channels of this level.
    """

    def __init__(self, image_channels: int, finer_channels: int | None, channels: int):
        super().__init__()
        self.from_image = nn.Conv2d(image_channels, channels, kernel_size=3, padding=1, bias=False)
        if finer_channels is not None:
            self.from_finer = nn.Conv2d(finer_channels, channels, kernel_size=3, padding=1, bias=False)
            nn.init.zeros_(self.from_finer.weight)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.refine = ConvBNReLU(channels, channels)

    def forward(self, image: torch.Tensor, finer: torch.Tensor | None) -> torch.Tensor:
        entered = self.from_image(image)
        if finer is not None:
            entered = entered + self.from_finer(F.max_pool2d(finer, 2))
        return self.refine(F.relu(self.norm(entered), inplace=True))

    def fold(self) -> None:
        """Fold the batch normalisation into both convolutions before it, for prediction alone, in eval mode."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        if hasattr(self, "from_finer"):
            variance = self.norm.get_buffer("running_var")
            scale = self.norm.weight / torch.sqrt(variance + self.norm.eps)
            self.from_finer.weight = nn.Parameter(self.from_finer.weight * scale.view(-1, 1, 1, 1))
        self.from_image, self.norm = fuse_conv_bn_eval(self.from_image, self.norm), nn.Identity()


class BottomLevel(nn.Sequential):
    """Convolve what the coarsest level that sees the image hands down, twice; the image is not seen here.

    (N, finer_channels, 2H, 2W) -> (N, channels, H, W).
    """

    def __init__(self, finer_channels: int, channels: int):
        super().__init__(nn.MaxPool2d(2), ConvBNReLU(finer_channels, channels), ConvBNReLU(channels, channels))


class DecoderLevel(nn.Module):
    """Bring coarse features to twice the resolution and join them with the encoder's features there.

    (N, below, H, W) and (N, skip, 2H, 2W) -> (N, channels, 2H, 2W).
    """

    def __init__(self, below_channels: int, skip_channels: int, channels: int):
        super().__init__()
        self.conv = DoubleConv(below_channels + skip_channels, channels)

    def forward(self, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv(join(upsample2x(below), skip))


def join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Concatenate (N, A, H, W) and (N, B, H, W) to (N, A + B, H, W).

    The gradients of `torch.cat` are views into one wide tensor. Of such a view the backward pass of the upsampling took
    98 ms instead of 9 on a CPU, and all that comes below it works on the view as well. So each gets a gradient in a
    memory of its own. Compiled code lays out its gradients itself, and older compilers stop at functions like this one;
    so do exports, which need no gradients.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.cat([first, second], dim=1)
    return _Join.apply(first, second)


class _Join(torch.autograd.Function):
    """What `join` does."""

    @staticmethod
    def forward(ctx, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        ctx.channels = [first.shape[1], second.shape[1]]
        return torch.cat([first, second], dim=1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = gradient.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        first, second = gradient.split(ctx.channels, dim=1)
        return first.contiguous(memory_format=layout), second.contiguous(memory_format=layout)


class ToLogits(nn.Module):
    """Turn features into logits by a 1x1 convolution in float32, whatever the precision around it.

    (N, channels, H, W) of any floating type -> (N, out_channels, H, W) float32 logits.
    With `zero=True` the head starts by adding nothing, so that a network which gains it does not change.
    """

    def __init__(self, channels: int, out_channels: int, zero: bool = False):
        super().__init__()
        self.linear = nn.Linear(channels, out_channels)
        if zero:
            for parameter in self.linear.parameters():
                nn.init.zeros_(parameter)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            # As a matrix product, whose backward pass is twice as fast as the convolution's on a CPU.
            last = features.permute(0, 2, 3, 1).to(self.linear.weight.dtype)
            return self.linear(last).permute(0, 3, 1, 2)


def upsample2x(x: torch.Tensor) -> torch.Tensor:
    """Enlarge (N, C, H, W) to (N, C, 2H, 2W) bilinearly with `align_corners=False`, which pairs with `mean2x2`.

    In the type of `x`: mixed precision on CUDA would return float32, and the features it is joined with would become
    float32 as well.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def mean2x2(x: torch.Tensor) -> torch.Tensor:
    """Halve (N, C, 2H, 2W) to (N, C, H, W) by the exact mean of each 2x2 block."""
    return F.avg_pool2d(x, kernel_size=2)
