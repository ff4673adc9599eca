"""Aspect-ratio buckets: the sizes that pictures of different shapes are trained at, all of about one area."""

import math

from nullspace.errors import NullSpaceError


# As in the training of arXiv 2307.01952, app. I: sides of half to twice 1024 pixels, in steps of 64
MOST_STRETCH = 2
STEPS = 16


def common_multiple(*block_out_channels):
    """What the sides of a picture must be multiples of, in pixels, for each halving of it and its latents to be whole.

    Args:
        block_out_channels (`Sequence[int]`): of the VAE's configuration, and of the UNet's: they halve between blocks.
    """
    return 2 ** sum(len(channels) - 1 for channels in block_out_channels)


def bucket_sizes(resolution, multiple):
    """The sizes, (width, height) each, of at most `resolution`^2 pixels: a square, and for each side the longest other.

    Args:
        multiple (`int`): what sides are multiples of.

    Raises:
        NullSpaceError: if there are none.
    """
    if resolution < multiple:
        raise NullSpaceError(
            f"--enable_bucket makes sizes in multiples of {multiple} pixels for this model, which --resolution "
            f"{resolution} is too small for; choose at least {multiple}."
        )
    step = math.ceil(resolution / STEPS / multiple) * multiple
    sizes = [(resolution // step * step,) * 2]
    for side in range(step, MOST_STRETCH * resolution + 1, step):
        other = resolution**2 // side // step * step
        if min(side, other) * MOST_STRETCH >= resolution:
            sizes += [(side, other), (other, side)]
    return sorted({*sizes})


def nearest_size(size, sizes):
    """That of the sizes, (width, height) each, which shows most of a picture of this size; of equals the largest."""

    def stretch(target):
        return round(abs(math.log(target[0] * size[1] / (target[1] * size[0]))), 9)

    return min(sizes, key=lambda target: (stretch(target), -target[0] * target[1]))
