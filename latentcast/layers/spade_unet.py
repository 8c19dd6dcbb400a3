"""A diffusion U-Net whose every ResNet block is conditioned on a feature map by SPADE, as in STDiff."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..sizes import nearest_multiples, size_text

Maps = tuple[Float[Tensor, "N _ _ _"], Float[Tensor, "N _ _ _"]]  # scale 1 + gamma and shift beta of a block


class Spade(nn.Module):
    """Spatially-adaptive denormalisation (Park et al. 2019): instance normalisation, then a scale and a shift for
    every channel and position, which two convolutions read off the condition.

    Args:
        channels: C of the features that are normalised.
        condition_channels: channels of the condition; the convolutions' width is the mean of both.
    """

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        hidden = (channels + condition_channels) // 2
        self.shared = nn.Conv2d(condition_channels, hidden, 3, padding=1)
        self.to_maps = nn.Conv2d(hidden, 2 * channels, 3, padding=1)

    def maps(self, condition: Float[Tensor, "N condition h w"], size: Sequence[int]) -> Maps:
        """What a condition says at that size."""
        condition = F.interpolate(condition, size, mode="nearest")
        gamma, beta = self.to_maps(self.shared(condition).relu()).chunk(2, 1)
        return 1 + gamma, beta

    def forward(
        self, x: Float[Tensor, "N C H W"], scale: Float[Tensor, "N C H W"], shift: Float[Tensor, "N C H W"]
    ) -> Float[Tensor, "N C H W"]:
        # One group a channel is instance normalisation; unlike F.instance_norm it keeps channels_last.
        return torch.addcmul(shift, F.group_norm(x, x.shape[1]), scale)


class Conditions(NamedTuple):
    """What the U-Net hands to its ResNet blocks, in the place of diffusers' time embedding.

    time: embedding of the diffusion time, activated. feature: the condition. maps: of all blocks when they are known
    already, else None.
    """

    time: Float[Tensor, "N width"]
    feature: Float[Tensor, "N C h w"]
    maps: list[Maps] | None


class SpadeResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D with SPADE after its first convolution.

    The time embedding is added after SPADE: an instance normalisation would take away again what was added to a channel
    as a whole.

    Args:
        resnet: the ResnetBlock2D that is wrapped.
        condition_channels: channels of the condition.
        level: of the U-Net, 0 at full size.
        index: which of ``Conditions.maps`` are this block's.
    """

    def __init__(self, resnet: nn.Module, condition_channels: int, level: int, index: int) -> None:
        super().__init__()
        self.resnet, self.level, self.index = resnet, level, index
        self.spade = Spade(resnet.out_channels, condition_channels)

    def forward(self, x: Float[Tensor, "N C H W"], conditions: Conditions) -> Float[Tensor, "N out H W"]:
        time, feature, maps = conditions
        resnet = self.resnet
        h = resnet.conv1(resnet.nonlinearity(resnet.norm1(x)))
        h = self.spade(h, *(self.spade.maps(feature, h.shape[2:]) if maps is None else maps[self.index]))
        h += resnet.time_emb_proj(time)[:, :, None, None]  # in place here and below, which autograd allows
        h = resnet.conv2(resnet.nonlinearity(resnet.norm2(h)))
        h += x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
        return h


class SpadeUNet(nn.Module):
    """diffusers' UNet2DModel with its ResNet blocks replaced: (noisy image, time, condition) -> its prediction.

    Args:
        in_channels, out_channels: of the image that goes in and of what comes out.
        condition_channels: channels of the condition.
        size: (H, W) of the image.
        block_channels: width of each level; every level but the last halves the size.
        n_blocks: ResNet blocks of a level on the way down; one more on the way up.
        attention_from: the first level, counted from 0, that has self-attention; the middle block always has.
        head_dim: width of an attention head; divides the widths of the levels with attention.
        norm_groups: of the group normalisation; divides every width.
        n_heads: attention heads of every level, in the place of ``head_dim``; None: as many as that says.
    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition_channels: int,
        size: Sequence[int],
        block_channels: Sequence[int],
        n_blocks: int = 2,
        attention_from: int = 1,
        head_dim: int = 128,
        norm_groups: int = 32,
        n_heads: int | None = None,
    ) -> None:
        super().__init__()
        n_levels = len(block_channels)
        check_size(size, n_levels)
        if any(width % norm_groups for width in block_channels):
            raise ValueError(f"block_channels: expected multiples of norm_groups={norm_groups}, found {block_channels}")
        unit = f"head_dim={head_dim}" if n_heads is None else f"n_heads={n_heads}"
        if any(width % (n_heads or head_dim) for width in [*block_channels[attention_from:], block_channels[-1]]):
            raise ValueError(
                f"block_channels: expected multiples of {unit} from level {attention_from} on and at the last, found "
                f"{block_channels}"
            )
        attends = [level >= attention_from for level in range(n_levels)]
        self.size = tuple(size)
        self.unet = UNet2DModel(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(block_channels),
            layers_per_block=n_blocks,
            down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
            attention_head_dim=None,  # one head of all channels: their number is set below
            norm_num_groups=norm_groups,
        )
        for module in self.unet.modules():
            if isinstance(module, Attention):
                module.heads = n_heads or module.inner_dim // head_dim
                module.scale = (module.inner_dim // module.heads) ** -0.5
        self.time_channels = self.unet.time_embedding.linear_2.out_features
        levels = [*range(n_levels), n_levels - 1, *reversed(range(n_levels))]
        count = itertools.count()
        for level, block in zip(levels, self._blocks()):
            block.resnets = nn.ModuleList(
                SpadeResnetBlock(resnet, condition_channels, level, next(count)) for resnet in block.resnets
            )

    def maps(self, feature: Float[Tensor, "N condition h w"]) -> list[Maps]:
        """Those of every block for a condition.

        They depend on nothing else, so one call serves all denoising steps, with the same bits.
        """
        height, width = self.size
        resnets = [resnet for block in self._blocks() for resnet in block.resnets]
        return [resnet.spade.maps(feature, (height >> resnet.level, width >> resnet.level)) for resnet in resnets]

    def _blocks(self):
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def forward(
        self,
        x: Float[Tensor, "N in H W"],
        t: Shaped[Tensor, " N"],
        feature: Float[Tensor, "N C h w"],
        maps: list[Maps] | None = None,
        told: Float[Tensor, "N time"] | None = None,
    ) -> Float[Tensor, "N out H W"]:
        """Predict.

        Args:
            t: diffusion times.
            feature: the condition.
            maps: ``self.maps(feature)``, or None to compute each where it is used, which training does: gradient
                checkpointing then keeps none of them.
            told: added to the embedding of the time; None: nothing.
        """
        unet = self.unet
        time = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        time = F.silu(time if told is None else time + told)
        conditions = Conditions(time, feature, maps)
        # diffusers' blocks hand their second argument, the embedding of the time, on to each of their ResNet blocks
        # untouched: it carries all three conditions to SpadeResnetBlock.
        h = unet.conv_in(x)
        skips = (h,)
        for block in unet.down_blocks:
            h, outputs = block(h, temb=conditions)
            skips += outputs
        h = unet.mid_block(h, temb=conditions)
        for block in unet.up_blocks:
            n = len(block.resnets)
            h = block(h, skips[-n:], temb=conditions)
            skips = skips[:-n]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def check_size(size: Sequence[int], n_levels: int) -> None:
    """Refuse (H, W) that the levels cannot halve, or whose last level has a single position to normalise over."""
    height, width = size
    factor = 2 ** (n_levels - 1)
    if height % factor or width % factor or height * width == factor**2:
        nearest = nearest_multiples(height, width, factor, positions=2)
        raise ValueError(
            f"block_channels: {n_levels} of them need multiples of {factor} in height and width, and more than one "
            f"position at the last level, found {height} x {width}; take fewer, or the nearest size that fits, "
            f"{size_text(nearest)}"
        )
