"""The projector: keeps LoRA's down-projections in the null space of what is protected, step by step."""

from typing import NamedTuple

import torch

from nullspace.layers import find_module
from nullspace.names import JOINT
from nullspace.spectrum import tf32


class Protected(NamedTuple):
    """An orthonormal basis (in, in) float32 of a layer's input space, whose first `rank` columns are protected.

    The others are free, or held back by the factors `gains` (in - rank,) where there are any. `distance` is that of
    the `Spectrum`.
    """

    basis: torch.Tensor
    rank: int
    gains: torch.Tensor | None = None
    distance: float | None = None


class _Batch(NamedTuple):
    """Adapters projected in one batched product: bases of one size, each shared by the same number of adapters."""

    names: list  # of modules, those that share a basis next to each other
    directions: torch.Tensor  # (bases, in, k), padded with zeros to one k; scaled by the roots of the gains
    free: bool  # whether the directions span the free space, otherwise the protected one

    def project(self, tensors):
        """Project the rows of tensors (r, in), one for each name, in order, in float32."""
        stacked = torch.stack(tensors).float()
        x = stacked.view(len(self.directions), -1, stacked.shape[-1])
        with tf32(False, x.device):  # it would leak about 1e-3
            inside = torch.bmm(torch.bmm(x, self.directions), self.directions.mT)
        return (inside if self.free else x - inside).view_as(stacked).unbind()


def _make_batches(protected, device, soft):
    """Group modules (`dict[str, Protected]`) into as few batched products as there are kinds of basis.

    `soft` says whether the free directions are held back, where they have gains, or given in full.
    """
    sharing = {}  # one basis -> its modules
    for name, item in protected.items():
        sharing.setdefault(id(item), []).append(name)
    kinds = {}
    for names in sharing.values():
        item = protected[names[0]]
        if item.rank:
            if soft and item.gains is not None:
                free, directions = True, item.basis[:, item.rank :] * item.gains.sqrt()
            else:
                free = item.rank > len(item.basis) // 2  # work with whichever half is smaller
                directions = item.basis[:, item.rank :] if free else item.basis[:, : item.rank]
            kinds.setdefault((len(item.basis), len(names), free), []).append((names, directions))
    batches = []
    for (size, _, free), members in kinds.items():
        padded = torch.zeros(len(members), size, max(directions.shape[1] for _, directions in members))
        for row, (_, directions) in zip(padded, members, strict=True):
            row[:, : directions.shape[1]] = directions
        batches.append(_Batch([name for names, _ in members for name in names], padded.to(device), free))
    return batches


class NullSpaceProjector:
    """Keeps the down-projections A (r, in) of LoRA layers in the null space of what is protected.

    B @ A then answers every protected input with zero, whatever B is. It takes three things: A's initial value is
    projected, its gradient is projected before it is clipped (so that the clip and the optimizer's moments see only
    what is allowed), and its value after every step, because Adam's division by each coordinate's own second moment
    leaves the subspace (Adam-NSCL, CVPR 2021). Free directions that are held back (`Protected.gains`) are so in all
    three: the initial value, the gradient and the change.

        projector = NullSpaceProjector(unet, {"joint": bundle.protected()})
        projector.attach(optimizer)
        ...
        loss.backward()
        projector.project_gradients()
        optimizer.step()

    That is the joint group's way. With others, no null space holds at all times, so the initial value is left as it
    is, and of each step the gradient and the change are projected with the group that is selected.

    Args:
        unet (`UNet2DConditionModel`): a model with LoRA layers on the protected modules.
        groups (`dict[str, dict[str, Protected]]`): group -> module name -> what it protects.
        adapter (`str`): name of the adapter.
        text_encoders (`CLIPTextModel`, *optional*): with LoRA layers, by the name that begins those of their layers.
    """

    def __init__(self, unet, groups, adapter="default", **text_encoders):
        self.groups = groups
        self.selected = next(iter(groups))
        names = dict.fromkeys(name for protected in groups.values() for name in protected)
        self.parameters = {name: find_module(name, unet, **text_encoders).lora_A[adapter].weight for name in names}
        device = next(unet.parameters()).device
        self._batches = {group: _make_batches(protected, device, soft=True) for group, protected in groups.items()}
        self._closed = self._batches  # for the values: holding back is no projection, and would shrink them to nothing
        self._is_soft = any(item.gains is not None for protected in groups.values() for item in protected.values())
        if self._is_soft:
            self._closed = {group: _make_batches(protected, device, soft=False) for group, protected in groups.items()}
        self._before = None
        if JOINT in groups:
            with torch.no_grad():
                self._apply(lambda parameter: parameter, self._batches)

    def attach(self, optimizer):
        """Project after each of the optimizer's steps, whichever `torch.optim.Optimizer` it is."""
        if JOINT in self.groups and not self._is_soft:
            optimizer.register_step_post_hook(lambda *_: self.project_values())
        else:
            optimizer.register_step_pre_hook(lambda *_: self._remember_values())
            optimizer.register_step_post_hook(lambda *_: self._project_change())

    def select(self, group):
        """Project with this group's null space from now on; a name that is none of the groups protects nothing."""
        self.selected = group

    def _apply(self, tensor_of, batches):
        """Project, in place, the tensor (r, in) that belongs to each parameter; those without one are left out."""
        for batch in batches.get(self.selected, ()):
            tensors = [tensor_of(self.parameters[name]) for name in batch.names]
            present = [index for index, tensor in enumerate(tensors) if tensor is not None]
            if present:
                zero = torch.zeros_like(tensors[present[0]])
                projected = batch.project([zero if tensor is None else tensor for tensor in tensors])
                torch._foreach_copy_([tensors[i] for i in present], [projected[i] for i in present])

    @torch.no_grad()
    def project_values(self):
        """Project A itself, as the joint group's null space asks for after every change."""
        self._apply(lambda parameter: parameter, self._closed)

    @torch.no_grad()
    def project_gradients(self):
        """Project A's gradients; call it after the backward pass and before clipping."""
        self._apply(lambda parameter: parameter.grad, self._batches)

    @torch.no_grad()
    def _remember_values(self):
        self._before = {parameter: parameter.clone() for parameter in self.parameters.values()}

    @torch.no_grad()
    def _project_change(self):
        change = {parameter: parameter - before for parameter, before in self._before.items()}
        self._apply(change.get, self._batches)
        for parameter, before in self._before.items():
            parameter.copy_(before + change[parameter])
        self._before = None
        if JOINT in self.groups:  # what rounding has added up to
            self.project_values()

    @torch.no_grad()
    def leakage(self):
        """The largest share of any A's norm that lies in what the selected group protects: 0 is none."""
        worst = 0.0
        for name, item in self.groups.get(self.selected, {}).items():
            parameter = self.parameters[name].double().cpu()
            inside = (parameter @ item.basis[:, : item.rank].double()).norm()
            worst = max(worst, (inside / parameter.norm().clamp_min(1e-30)).item())
        return worst
