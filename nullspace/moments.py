"""Second moments of layer inputs, summed while a model runs."""

import math
from contextlib import contextmanager

import torch

from nullspace.layers import base_layer, find_module
from nullspace.names import TEXT_ENCODERS, TEXT_INPUT, TIMELESS
from nullspace.spectrum import tf32


TILES = 4  # of a matrix's rows: 5/8 of its entries are computed, the rest are their mirror images


class SecondMoments:
    """Streams the uncentred second moments of layer inputs into one matrix for each input and timestep group.

    Nothing else is kept: each input x (tokens, in) adds x^T x to a float32 matrix (in, in) on the model's device. What
    lies far above its diagonal is filled in when `collect` ends.

    Args:
        unet (`UNet2DConditionModel`): the model whose inputs are read.
        inputs (`dict[str, str]`): module name -> input name, from `attention_inputs` and `text_encoder_inputs`.
        group_of (`dict[int, str]`): group name of each timestep, rounded to a whole number; at others that the
            sampler visits, only what does not depend on the timestep is read.
        text_encoders (`CLIPTextModel`, *optional*): by the name that begins those of their layers in `inputs`.
    """

    def __init__(self, unet, inputs, group_of, **text_encoders):
        self.unet, self.inputs, self.group_of, self.text_encoders = unet, inputs, group_of, text_encoders
        self.sums = {}  # (group, input) -> (in, in), sum of x x^T
        self.tokens = {}  # (group, input) -> number of tokens summed
        self._group = None
        self._pending = set()  # of the groups that a batch of prompts adds to once

    @contextmanager
    def collect(self):
        """Read the inputs of every forward pass of the model while the context is open."""
        readers = {}  # one module stands for all that share its input
        for name, source in self.inputs.items():
            readers.setdefault(source, name)
        handles = [self.unet.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        for source, name in readers.items():
            module = base_layer(find_module(name, self.unet, **self.text_encoders))
            handles.append(module.register_forward_pre_hook(self._reader(source)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.mirror()

    def start_batch(self):
        """Say that new prompts follow: what does not depend on the timestep is then counted once."""
        self._pending = set(TIMELESS)

    def _on_forward(self, unet, args, kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self._group = self.group_of.get(round(float(timestep)))
        self._pending.difference_update(TEXT_ENCODERS)  # they have read the prompts, the empty one included

    def _reader(self, source):
        def read(module, args):
            group = source.partition(".")[0]
            if group not in TIMELESS:
                group = self._group
                if group is None:
                    return
            elif group not in self._pending:
                return
            elif group == TEXT_INPUT:
                self._pending.discard(TEXT_INPUT)
            self.add(group, source, args[0].detach())

        return read

    def add(self, group, source, x):
        """Add inputs x (..., in) of the layer input `source` to a group's matrix, up to the diagonal: see `mirror`."""
        # What fits into 16 bits fits into TF32, which then loses nothing and is far faster than float32.
        fits_tf32 = x.dtype in (torch.float16, torch.bfloat16)
        x = x.reshape(-1, x.shape[-1]).float()
        key = (group, source)
        if key not in self.sums:
            self.sums[key] = x.new_zeros(x.shape[1], x.shape[1])
            self.tokens[key] = 0
        size = math.ceil(x.shape[1] / TILES)
        with tf32(fits_tf32, x.device):
            for start in range(0, x.shape[1], size):
                tile = slice(start, start + size)
                self.sums[key][tile, : tile.stop].addmm_(x[:, tile].T, x[:, : tile.stop])
        self.tokens[key] += x.shape[0]

    def mirror(self):
        """Give every matrix above its diagonal what it has below."""
        for total in self.sums.values():
            total.copy_(total.tril() + total.tril(-1).T)

    def reduce(self, reduce_sum):
        """Replace every sum and count by that over all processes.

        Args:
            reduce_sum (`Callable[[Tensor], Tensor]`): the sum of a tensor over all processes.
        """
        for key in sorted(self.sums):
            self.sums[key] = reduce_sum(self.sums[key])
            self.tokens[key] = int(reduce_sum(torch.tensor(self.tokens[key], device=self.sums[key].device)))

    def group(self, name):
        """The sums and token counts of one group: `dict[str, tuple[Tensor (in, in), int]]` by input."""
        return {
            source: (self.sums[key], self.tokens[key]) for key in self.sums for group, source in [key] if group == name
        }
