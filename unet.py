"""The progressive U-Net, which grows in place from 32x32 to 256x256, and the classic U-Net beside it.

    model = ProgressiveUNet(in_channels=1, out_channels=1)      # constructed at stage 1
    model.set_stage(4)
    logits = model(torch.rand(2, 1, 256, 256))                  # (2, 1, 256, 256)

After PGU-net+ (Zhao et al. 2019, arXiv 1911.01062). Ours sums the heads of all scales, there is one set of weights
that grows, and coarse levels are narrow, so that the early stages cost little (docs/experiments.md). The classic
network is Ronneberger et al. 2015 (arXiv 1505.04597) with batch normalisation and padded convolutions.
"""

import torch
from torch import nn
from torch.nn import functional as F

from images.resolutions import MOST_CHANNELS, RESOLUTIONS, WIDEST
from system.errors import UserError
from system.notebooks import Described, html_table
from unet_parts import (
    COARSEST,
    DECODER_WIDTH,
    ENCODER_WIDTH,
    BottomLevel,
    ConvBNReLU,
    DecoderLevel,
    DoubleConv,
    EncoderLevel,
    ToLogits,
    channels_of,
    join,
    mean2x2,
    upsample2x,
)

STAGE_RESOLUTIONS = dict(enumerate(RESOLUTIONS, start=1))  # 1: 32, 2: 64, 3: 128, 4: 256
LAST_STAGE = len(RESOLUTIONS)


class Network(Described, nn.Module):
    """What both networks share: the image statistics, the check of the input, and the naming of their parts."""

    name: str
    stage: int
    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, base_channels: int):
        super().__init__()
        for key, value, most in (("in_channels", in_channels, 64), ("out_channels", out_channels, MOST_CHANNELS),
                                 ("base_channels", base_channels, WIDEST)):
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UserError(f"{key} is {value!r}; it must be a whole number of at least 1 (and at most {most})")
        self.in_channels, self.out_channels, self.base_channels = in_channels, out_channels, base_channels
        self.register_buffer("image_mean", torch.zeros(in_channels))
        self.register_buffer("image_std", torch.ones(in_channels))

    @property
    def model_args(self) -> dict:
        """Return the plain dictionary from which `build_model` makes this network again."""
        return {"model": self.name, "in_channels": self.in_channels, "out_channels": self.out_channels,
                "base_channels": self.base_channels}

    def set_stage(self, stage: int) -> None:
        """Go to a stage without touching a weight."""
        raise NotImplementedError

    def parts(self) -> dict[str, int]:
        """Return the name of every part, in a fixed order, with the stage at which it is born."""
        raise NotImplementedError

    def live_parts(self) -> list[str]:
        """Return the names of the parts that the forward pass uses now."""
        raise NotImplementedError

    def widths(self, stage: int) -> str:
        """Return the channels of encoder and decoder at the resolution of a stage, in words."""
        raise NotImplementedError

    def stage_table(self) -> list[tuple[str, ...]]:
        """Return for each stage: its number and resolution, channels, parameters that it adds, whether it is in use."""
        added = dict.fromkeys(sorted(set(self.parts().values())), 0)
        for part, born in self.parts().items():
            added[born] += sum(p.numel() for name, p in self.named_parameters() if name.startswith(f"{part}."))
        return [(str(stage), f"{STAGE_RESOLUTIONS[stage]}x{STAGE_RESOLUTIONS[stage]}", self.widths(stage), f"{n:,}",
                 "yes" if stage <= self.stage else "not yet") for stage, n in added.items()]

    def described(self) -> dict[str, str]:
        """Return what the network was built from, its stage and its parameters."""
        live = sum(int(row[3].replace(",", "")) for row in self.stage_table() if row[4] == "yes")
        return {"in_channels": str(self.in_channels), "out_channels": str(self.out_channels),
                "base_channels": str(self.base_channels),
                "stage": f"{self.stage} ({self.resolution}x{self.resolution})",
                "parameters in use": f"{live:,} of {count_parameters(self):,}"}

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n  its layers: for name, part in model.named_children(): print(name, part)"

    def _repr_html_(self) -> str:
        return html_table(super().__repr__(), self.stage_table(), (
            "stage", "resolution", "channels of encoder and decoder", "parameters added", "in use"))

    @property
    def resolution(self) -> int:
        """Return the side in pixels at which the current stage is trained."""
        return STAGE_RESOLUTIONS[self.stage]

    @property
    def scales(self) -> list[int]:
        """Return the resolutions at which the network has logits at its stage, for a square of its resolution."""
        return [r for r in STAGE_RESOLUTIONS.values() if r <= self.resolution]

    def checked_scale(self, scale: int | None) -> int:
        """Return the scale, or the finest for None; raises UserError where the network has no logits."""
        if scale is not None and scale not in self.scales:
            raise UserError(f"scale is {scale!r}; at stage {self.stage} this network has logits at "
                             f"{', '.join(map(str, self.scales))}")
        return scale or self.resolution

    @property
    def has_image_statistics(self) -> bool:
        """Tell whether `set_image_statistics` or a state dict has replaced mean 0 and standard deviation 1."""
        return bool((self.image_mean != 0).any() or (self.image_std != 1).any())

    def set_image_statistics(self, mean, std) -> None:
        """Store mean and standard deviation (raised to 0.001) of the training images, on the scale [0, 1].

        Each is one number a channel, or one for all.
        """
        self.image_mean.copy_(torch.as_tensor(mean, dtype=torch.float32))
        self.image_std.copy_(torch.as_tensor(std, dtype=torch.float32).clamp_min(1e-3))

    def check_input(self, x: torch.Tensor) -> None:
        """Raise UserError unless `x` is (N, in_channels, H, W) with sides that are multiples of 2**stage."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"the input has shape {tuple(x.shape)}; this network takes (N, {self.in_channels}, H, W)")
        multiple = 2 ** self.stage
        height, width = x.shape[-2:]
        if height % multiple or width % multiple or not height * width:
            pad_h, pad_w = -height % multiple, -width % multiple
            raise UserError(
                f"the input is {height}x{width} pixels; at stage {self.stage} both sides must be multiples of "
                f"{multiple}. Pad it, e.g. torch.nn.functional.pad(x, (0, {pad_w}, 0, {pad_h}), mode='replicate'), "
                f"and crop the logits back to [..., :{height}, :{width}]")

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """Return images with the mean and standard deviation of the training images taken out."""
        return (x - self.image_mean.view(1, -1, 1, 1)) / self.image_std.view(1, -1, 1, 1)

    def logits(self, x: torch.Tensor, scale: int | None = None) -> list[torch.Tensor]:
        """Do what `forward` does with `return_all_scales`, without looking at the input's shape first."""
        raise NotImplementedError

    def fold(self) -> None:
        """Fold the batch normalisation into the convolutions: fewer operations, for prediction alone, in eval mode."""
        for block in self.modules():
            if isinstance(block, ConvBNReLU | EncoderLevel):
                block.fold()

    def live_state(self) -> dict[str, torch.Tensor]:
        """Return the state dict of the parts that live at the current stage, image statistics included."""
        live = tuple(f"{part}." for part in self.live_parts())
        return {key: tensor for key, tensor in self.state_dict().items()
                if key.startswith(live) or key in ("image_mean", "image_std")}

    def unborn_state(self) -> dict[str, torch.Tensor]:
        """Return the state dict of the parts that do not live yet at the current stage."""
        live = self.live_state()
        return {key: tensor for key, tensor in self.state_dict().items() if key not in live}

    def transfer_weights(self, source: dict) -> tuple[list[str], list[str], list[str]]:
        """Copy every tensor of `source` whose full name and shape match one of ours; never a part of a tensor.

        Args:
            source: state dict of a network of any stage.
        Returns:
            (carried, new, left_out): names copied, names living at the current stage that got nothing, and names of
            the source that found no partner.
        """
        ours = self.state_dict()
        carried = [key for key, tensor in source.items() if key in ours and ours[key].shape == tensor.shape]
        with torch.no_grad():
            for key in carried:
                ours[key].copy_(source[key])
        taken = set(carried)
        return carried, [k for k in self.live_state() if k not in taken], [k for k in source if k not in taken]


class ProgressiveUNet(Network):
    """A U-Net of which stage 1..4 reads 32, 64, 128 or 256 pixel images (or any multiple of 2**stage).

    All parts exist from construction; `set_stage` decides which of them the forward pass uses.

    Args:
        in_channels: channels of the image, 1 for grey or 3 for RGB.
        out_channels: independent sigmoid channels, e.g. nucleus and cytoplasm.
        base_channels: width at 256 pixels; the other levels are multiples of it.
    """

    name = "pgunet"

    def __init__(self, in_channels: int = 1, out_channels: int = 1, base_channels: int = 64):
        super().__init__(in_channels, out_channels, base_channels)
        encoder_channels = channels_of(ENCODER_WIDTH, base_channels)
        decoder_channels = channels_of(DECODER_WIDTH, base_channels)
        self.encoder = nn.ModuleDict({
            str(r): EncoderLevel(in_channels, encoder_channels.get(2 * r), channels) if r > COARSEST else
            BottomLevel(encoder_channels[2 * r], channels) for r, channels in encoder_channels.items()})
        below = {COARSEST: encoder_channels[COARSEST]} | decoder_channels
        self.decoder = nn.ModuleDict({
            str(r): DecoderLevel(below[r // 2], encoder_channels[r], channels)
            for r, channels in decoder_channels.items()})
        self.heads = nn.ModuleDict({
            str(r): ToLogits(channels, out_channels, zero=r != STAGE_RESOLUTIONS[1])
            for r, channels in decoder_channels.items()})
        self.stage = 1

    def set_stage(self, stage: int) -> None:
        """Go to a stage, 1..4, up or down, without touching a weight."""
        if stage not in STAGE_RESOLUTIONS:
            raise UserError(f"stage is {stage!r}; it must be one of {list(STAGE_RESOLUTIONS)}")
        self.stage = int(stage)  # NumPy's do not load safely

    def start_whole(self) -> None:
        """Draw random weights for `from_finer`, which growth starts at zero; for training at the last stage alone."""
        for level in self.encoder.values():
            if isinstance(level, EncoderLevel) and hasattr(level, "from_finer"):
                level.from_finer.reset_parameters()

    def parts(self) -> dict[str, int]:
        """Return the name of every part, in a fixed order, with the stage at which it is born."""
        parts = {f"encoder.{COARSEST}": 1}
        for stage, r in STAGE_RESOLUTIONS.items():
            parts |= dict.fromkeys((f"encoder.{r}.from_image", f"encoder.{r}.norm", f"encoder.{r}.refine"), stage)
            if stage < LAST_STAGE:
                parts[f"encoder.{r}.from_finer"] = stage + 1
            parts |= dict.fromkeys((f"decoder.{r}", f"heads.{r}"), stage)
        return parts

    def widths(self, stage: int) -> str:
        """Return the channels of encoder and decoder at the resolution of a stage; the first has the bottom besides."""
        r = STAGE_RESOLUTIONS[stage]
        encoder, decoder = (channels_of(widths, self.base_channels) for widths in (ENCODER_WIDTH, DECODER_WIDTH))
        bottom = f"{encoder[COARSEST]} at {COARSEST}x{COARSEST}, " if stage == 1 else ""
        return f"{bottom}{encoder[r]}, {decoder[r]}"

    def live_parts(self) -> list[str]:
        """Return the names of the parts that the forward pass uses at the current stage: all that are born."""
        return [part for part, born in self.parts().items() if born <= self.stage]

    def forward(self, x: torch.Tensor, return_all_scales: bool = False,
                scale: int | None = None) -> torch.Tensor | list[torch.Tensor]:
        """Segment a batch of images.

        Args:
            x: (N, in_channels, H, W) float in [0, 1], both sides multiples of 2**stage.
            scale: decoder level at which to stop, 32 up to the stage's resolution; finer ones are then not computed.
        Returns:
            (N, out_channels, H, W) float32 logits, of half the sides for each level left out; with
            `return_all_scales` the list from coarse to fine, at stage 4 of sides H/8, H/4, H/2, H.
        """
        self.check_input(x)
        scales = self.logits(x, scale)
        return scales if return_all_scales else scales[-1]

    def logits(self, x: torch.Tensor, scale: int | None = None) -> list[torch.Tensor]:
        """Return the logits of all scales, from coarse to fine, without looking at the input's shape first."""
        image, last = self.normalised(x), self.checked_scale(scale)
        features, skips = None, {}
        for r in reversed(self.scales):
            features = skips[r] = self.encoder[str(r)](image, features)
            image = mean2x2(image)
        features = self.encoder[str(COARSEST)](features)
        scales: list[torch.Tensor] = []
        for r in [r for r in self.scales if r <= last]:
            features = self.decoder[str(r)](features, skips[r])
            residual = self.heads[str(r)](features)
            scales.append(residual if not scales else upsample2x(scales[-1]) + residual)
        return scales


class UNet(Network):
    """The classic U-Net: four 2x2 max poolings, transposed convolutions, 31 M parameters at 64 channels.

    It is trained at 256 pixels from the start; to the trainer it is a network that is always at stage 4.
    """

    name = "unet"

    def __init__(self, in_channels: int = 1, out_channels: int = 1, base_channels: int = 64):
        super().__init__(in_channels, out_channels, base_channels)
        self.stage = LAST_STAGE
        widths = [base_channels * 2 ** i for i in range(LAST_STAGE + 1)]
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([in_channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, kernel_size=2, stride=2) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(DoubleConv(2 * w, w) for w in reversed(widths[:-1]))
        self.head = ToLogits(base_channels, out_channels)

    def set_stage(self, stage: int) -> None:
        """Accept stage 4, the only one of a network that does not grow."""
        if stage != LAST_STAGE:
            raise UserError(f"stage is {stage!r}; the classic U-Net does not grow and knows "
                             f"stage {LAST_STAGE} alone. Use ProgressiveUNet to grow")

    @property
    def scales(self) -> list[int]:
        """Return the one resolution at which the network has logits."""
        return [self.resolution]

    def parts(self) -> dict[str, int]:
        """Return the names of the parts with the stage of their birth, which is 4 for all."""
        return {name: LAST_STAGE for name, _ in self.named_children()}

    def widths(self, stage: int) -> str:
        """Return the channels at 256 pixels and at the bottom."""
        return f"{self.base_channels}, {self.base_channels} (bottom: {self.base_channels * 2 ** LAST_STAGE})"

    def live_parts(self) -> list[str]:
        """Return the names of all parts."""
        return list(self.parts())

    def forward(self, x: torch.Tensor, return_all_scales: bool = False,
                scale: int | None = None) -> torch.Tensor | list[torch.Tensor]:
        """Segment (N, in_channels, H, W) images in [0, 1]; see `ProgressiveUNet.forward`. It has one scale only."""
        self.check_input(x)
        logits = self.logits(x, scale)
        return logits if return_all_scales else logits[-1]

    def logits(self, x: torch.Tensor, scale: int | None = None) -> list[torch.Tensor]:
        """Return the logits of the one scale there is, without looking at the input's shape first."""
        self.checked_scale(scale)
        features, skips = self.normalised(x), []
        for i, block in enumerate(self.down):
            features = block(features if i == 0 else F.max_pool2d(features, 2))
            skips.append(features)
        for up, block, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            features = block(join(skip, up(features)))
        return [self.head(features)]


MODELS: dict[str, type[Network]] = {model.name: model for model in (ProgressiveUNet, UNet)}


def build_model(model_args: dict) -> Network:
    """Make the network that `model_args` describes (see `model_args` of a network): the only place that does.

    Raises UserError for a name other than 'pgunet' and 'unet'.
    """
    kwargs = dict(model_args)
    name = kwargs.pop("model", None)
    if name not in MODELS:
        raise UserError(f"model is {name!r}; it must be one of {sorted(MODELS)}")
    return MODELS[name](**kwargs)


def count_parameters(model: nn.Module) -> int:
    """Count the numbers that training may change."""
    return sum(p.numel() for p in model.parameters())
