"""AutoencoderKL and AutoencoderKLFlux2: official keys (diffusers' layout) beside our parameters."""

from collections.abc import Iterator

from .checkpoint import Checkpoint
from .table import Rule, linear

# A counter of training steps, which nothing reads.
UNREAD = {"bn.num_batches_tracked"}


class ImageAutoencoderCheckpoint(Checkpoint):
    """A checkpoint without the counter in `UNREAD`."""

    def keys(self) -> set[str]:
        return super().keys() - UNREAD


def resnet(official: str, path: str) -> Iterator[Rule]:
    """The rules of two convolutions, their norms, and the shortcut that some resnets have."""
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from linear(f"{official}.{name}", f"{path}.{name}")
    yield from linear(f"{official}.conv_shortcut", f"{path}.shortcut")


def half(name: str, levels: str, resample: str, depth: int, length: int) -> Iterator[Rule]:
    """The rules of the encoder or the decoder, with `depth` levels of `length` resnets."""
    yield from linear(f"{name}.conv_in", f"{name}.conv_in")
    yield from resnet(f"{name}.mid_block.resnets.0", f"{name}.middle.before")
    yield from resnet(f"{name}.mid_block.resnets.1", f"{name}.middle.after")
    for theirs, ours in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "out"),
    ):
        yield from linear(f"{name}.mid_block.attentions.0.{theirs}", f"{name}.middle.attention.{ours}")
    for level in range(depth):
        official, path = f"{name}.{levels}.{level}", f"{name}.levels.{level}"
        for number in range(length):
            yield from resnet(f"{official}.resnets.{number}", f"{path}.resnets.{number}")
        yield from linear(f"{official}.{resample}.0.conv", f"{path}.resample.conv")
    yield from linear(f"{name}.conv_norm_out", f"{name}.norm_out")
    yield from linear(f"{name}.conv_out", f"{name}.conv_out")


def rules(levels: int, layers_per_block: int) -> tuple[Rule, ...]:
    """The table for `levels` levels, one for each of `block_out_channels`, with `layers_per_block`
    resnets.
    """
    return (
        *linear("quant_conv", "quant_conv"),
        *linear("post_quant_conv", "post_quant_conv"),
        Rule("bn.running_mean", "mean"),
        Rule("bn.running_var", "variance"),
        *half("encoder", "down_blocks", "downsamplers", levels, layers_per_block),
        *half("decoder", "up_blocks", "upsamplers", levels, layers_per_block + 1),
    )
