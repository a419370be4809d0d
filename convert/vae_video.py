"""AutoencoderKLWan and AutoencoderKLQwenImage: official keys (diffusers' layout) beside our parameters."""

from collections.abc import Iterator

from .table import Rule, linear


def norm(official: str, path: str) -> Iterator[Rule]:
    """The rule of a norm's weight."""
    yield Rule(f"{official}.gamma", f"{path}.gamma")


def resnet(official: str, path: str) -> Iterator[Rule]:
    """The rules of two convolutions, their norms, and the shortcut that some resnets have."""
    for number in (1, 2):
        yield from norm(f"{official}.norm{number}", f"{path}.norm{number}")
        yield from linear(f"{official}.conv{number}", f"{path}.conv{number}")
    yield from linear(f"{official}.conv_shortcut", f"{path}.shortcut")


def resample(official: str, path: str) -> Iterator[Rule]:
    """The rules of a change of resolution, and of its change of frames if it has one."""
    yield from linear(f"{official}.resample.1", f"{path}.space.conv")
    yield from linear(f"{official}.time_conv", f"{path}.time")


def ends(name: str) -> Iterator[Rule]:
    """The rules of the layers of the encoder or the decoder outside their levels."""
    yield from linear(f"{name}.conv_in", f"{name}.conv_in")
    yield from resnet(f"{name}.mid_block.resnets.0", f"{name}.middle.before")
    yield from norm(f"{name}.mid_block.attentions.0.norm", f"{name}.middle.attention.norm")
    yield from linear(f"{name}.mid_block.attentions.0.to_qkv", f"{name}.middle.attention.qkv")
    yield from linear(f"{name}.mid_block.attentions.0.proj", f"{name}.middle.attention.out")
    yield from resnet(f"{name}.mid_block.resnets.1", f"{name}.middle.after")
    yield from norm(f"{name}.norm_out", f"{name}.norm_out")
    yield from linear(f"{name}.conv_out", f"{name}.conv_out")


def rules(levels: int, num_res_blocks: int) -> tuple[Rule, ...]:
    """The table for `levels` levels, one for each entry of `dim_mult`, with `num_res_blocks` resnets."""
    table = [
        *linear("quant_conv", "quant_conv"),
        *linear("post_quant_conv", "post_quant_conv"),
        *ends("encoder"),
        *ends("decoder"),
    ]
    for level in range(levels):
        # The encoder's resnets and changes of resolution are numbered together, level after level.
        first = level * (num_res_blocks + 1)
        path = f"encoder.levels.{level}"
        for number in range(num_res_blocks):
            table += resnet(f"encoder.down_blocks.{first + number}", f"{path}.resnets.{number}")
        table += resample(f"encoder.down_blocks.{first + num_res_blocks}", f"encoder.downs.{level}")

        official, path = f"decoder.up_blocks.{level}", f"decoder.levels.{level}"
        for number in range(num_res_blocks + 1):
            table += resnet(f"{official}.resnets.{number}", f"{path}.resnets.{number}")
        table += resample(f"{official}.upsamplers.0", f"decoder.ups.{level}")
    return tuple(table)
