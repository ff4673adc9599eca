"""The drift budget: holds what a LoRA moves of the protected inputs under a limit, step by step."""

import math
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer

from nullspace.errors import NullSpaceError
from nullspace.layers import base_layer, find_module
from nullspace.names import JOINT
from nullspace.spectrum import Spectrum, tf32


logger = get_logger(__name__)

RESERVE = 1e-4  # share of a budget that is left to what float32 rounds
NEWTON_STEPS = 8  # towards the edge of the budget, from outside; what is missing then is scaled away


class _Batch(NamedTuple):
    """Layers of one size and rank: those that read one input next to each other, and as many of them for each input."""

    down: list  # their A (r, in)
    up: list  # their B (out, r)
    vectors: torch.Tensor  # (inputs, in, in), the eigenvectors u_j of each C as columns
    costs: torch.Tensor  # (layers, in): ||dW u_j||^2 counts so often in the mean square of the drifts
    gains: torch.Tensor  # (layers, in), those of the projector's steps

    def rows(self):
        """A (layers, r, in) in the eigenvectors' coordinates."""
        stacked = torch.stack(self.down).float()
        return (stacked.view(len(self.vectors), -1, stacked.shape[-1]) @ self.vectors).view_as(stacked)

    def moved(self, rows):
        """What each direction has in the mean square of the drifts, (layers, in)."""
        grams = torch.stack([up.mT.float() @ up.float() for up in self.up])
        return self.costs * (rows * (grams @ rows)).sum(1)

    def take(self, rows):
        """Subtract rows (layers, r, in) in the eigenvectors' coordinates from A."""
        taken = rows.view(len(self.vectors), -1, rows.shape[-1]) @ self.vectors.mT
        torch._foreach_sub_(self.down, [each.to(self.down[0].dtype) for each in taken.view_as(rows)])


class DriftBudget:
    """Holds the root mean square of a LoRA's predicted drifts (see `audit.predicted_drift`) over its layers at a limit.

    After every step the changes dW of all layers are replaced by the nearest ones within the budget,

        min sum_l ||(dW'_l - dW_l) S_l^-1||_F^2   such that   sum_l w_l tr(dW'_l C_l dW'_l^T) <= limit^2

    with w_l = 1 / (layers * tr(W_l C_l W_l^T)). The distance is that of the projector, which makes steps in A S^-1 (S
    holds its gains): where the two agree, steps and budget come to rest where the loss has no descent within the budget
    (a projected gradient method in a metric of its own). The solution is dW'_l = dW_l (1 + mu w_l C_l S_l^2)^-1 with
    one multiplier mu for all layers: a direction shrinks by what it costs, in one layer against another, too, and what
    the loss misses of it the next steps bring back. It changes A alone, in C's eigenvectors, so that what is closed
    stays closed; it keeps no state; and within the budget it changes no bit.

    Args:
        limit (`float`): of the root mean square.
        bundle (`Bundle`): with its joint group loaded, and that of the text encoders if layers there are trained.
        targets (`list[str]`): names of the layers; those that the bundle does not cover are not counted.
        adapted (`dict[str, Module]`): the models that have LoRA layers there, by name.
        softness (`float`): of the projector's gains; infinite where it has none.
        adapter (`str`): name of the adapter.

    Attributes:
        predicted (`Tensor`): the root mean square since `hold`, a scalar on the models' device.

    Raises:
        NullSpaceError: if the bundle covers none of the layers.
    """

    def __init__(self, limit, bundle, targets, adapted, softness=math.inf, adapter="default"):
        self.limit, spectra = limit, bundle.group(JOINT)
        readers = {}  # input -> the layers that read it
        for name in targets:
            if name in bundle.modules and bundle.modules[name]["input"] in spectra:
                readers.setdefault(bundle.modules[name]["input"], []).append(name)
        if not readers:
            raise NullSpaceError(
                "--max_drift bounds what the bundle predicts, and it covers none of the layers to train; train others, "
                "build a bundle that covers them, or leave --max_drift out."
            )
        count, kinds = sum(map(len, readers.values())), {}
        bases = Spectrum.orthonormal_all([spectra[source] for source in readers])
        self._device = next(adapted["unet"].parameters()).device
        with tf32(False, self._device), torch.no_grad():
            for (source, names), vectors in zip(readers.items(), bases, strict=True):
                vectors = vectors.to(self._device)
                eigenvalues = spectra[source].eigenvalues.to(self._device, torch.float32)
                layers = [find_module(name, **adapted) for name in names]
                costs = [
                    layer.scaling[adapter] ** 2 * eigenvalues / (count * _output_energy(layer, vectors, eigenvalues))
                    for layer in layers
                ]
                gains = spectra[source].gains(softness).to(self._device).expand(len(layers), -1)
                kinds.setdefault((len(vectors), len(names)), []).append((layers, vectors, torch.stack(costs), gains))
        self._batches = []
        for members in kinds.values():
            layers, vectors, costs, gains = zip(*members, strict=True)
            layers = sum(layers, [])
            down, up = ([getattr(layer, kind)[adapter].weight for layer in layers] for kind in ("lora_A", "lora_B"))
            self._batches.append(_Batch(down, up, torch.stack(vectors), torch.cat(costs), torch.cat(gains)))

    def attach(self, optimizer):
        """Hold the budget after each step of the optimizer; the projector is to be attached before."""
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        optimizer.register_step_post_hook(lambda *_: self.hold())

    @torch.no_grad()
    def moved_by_a_step(self, optimizer):
        """About what a step moves that changes every entry of B by the learning rate, as the first one of Adam does.

        With signs that are independent the mean of ||dB A C^(1/2)||_F^2 is rate^2 out tr(A C A^T).
        """
        # Prodigy has an estimate by which it multiplies the rate
        groups = [(group, group["lr"] * group.get("d", 1.0)) for group in optimizer.param_groups]
        rates = {parameter: rate for group, rate in groups for parameter in group["params"]}
        total = 0.0
        with tf32(False, self._device):
            for batch in self._batches:
                weights = [rates[up] ** 2 * len(up) for up in batch.up]
                energies = (batch.rows().square().sum(1) * batch.costs).sum(1)
                total += sum(weight * energy for weight, energy in zip(weights, energies.tolist(), strict=True))
        return total**0.5

    @torch.no_grad()
    def hold(self):
        """Bring the LoRA into the budget, without waiting for the device; return the drift before, a scalar tensor."""
        limit = self.limit * (1 - RESERVE)
        with tf32(False, self._device):
            rows = [batch.rows() for batch in self._batches]
            moved = torch.cat([batch.moved(each).flatten() for batch, each in zip(self._batches, rows, strict=True)])
            costs = torch.cat([(batch.costs * batch.gains.square()).flatten() for batch in self._batches])
            before, multiplier, tiny = moved.sum().sqrt(), torch.zeros((), device=self._device), 1e-37
            # The secular equation of trust regions by Newton's method on 1 / drift (Nocedal and Wright, algorithm 4.3)
            for _ in range(NEWTON_STEPS):
                left = moved / (1 + multiplier * costs) ** 2
                slope = (left * costs / (1 + multiplier * costs)).sum()
                over = left.sum().sqrt() / limit - 1
                multiplier = (multiplier + over * left.sum() / slope.clamp_min(tiny)).clamp_min(0)
            kept = 1 / (1 + multiplier * costs)
            after = (moved * kept**2).sum().sqrt()
            rest = (limit / after.clamp_min(tiny)).clamp_max(1)
            self.predicted = rest * after
            sizes = [batch.costs.numel() for batch in self._batches]
            for batch, each, factors in zip(self._batches, rows, (kept * rest).split(sizes), strict=True):
                batch.take(each * (1 - factors).view_as(batch.costs)[:, None])
        return before


def _output_energy(layer, vectors, eigenvalues):
    """tr(W C W^T) of a layer's base weight (out, in)."""
    weight = base_layer(layer).weight.detach().flatten(1).float()
    return ((weight @ vectors).square().sum(0) * eigenvalues).sum()


def hold_drift(optimizer, bundle, targets, adapted, args):
    """Hold --max_drift in every step of an optimizer to which the projector is attached; None where it is not given.

    Raises:
        NullSpaceError: if nothing can be predicted, or the budget is less than one step moves.
    """
    if args.max_drift is None:
        return None
    softness = args.nullspace_softness if args.nullspace_threshold else math.inf  # where nothing is closed, all is free
    budget = DriftBudget(args.max_drift, bundle, targets, adapted, softness)
    before = budget.hold().item()
    if before > args.max_drift:
        logger.info(
            f"Going on from a predicted drift of {before:.3g}, brought to {args.max_drift:g} (--max_drift) first."
        )
    step = budget.moved_by_a_step(optimizer)
    if args.max_drift < step:
        raise NullSpaceError(
            f"--max_drift {args.max_drift:g} is less than one step moves, which is about {step:.2g} at --learning_rate "
            f"{args.learning_rate:g}; allow more, or lower the rate."
        )
    budget.attach(optimizer)
    return budget
