"""The projector: keeps LoRA's down-projections in the null space of what is protected, step by step.

A linear layer maps inputs x (in,) to W x. Over the inputs that it sees on knowledge to keep, C = E[x x^T] says which
directions they use. LoRA adds s * B @ A to W; with every row of A orthogonal to the leading eigenvectors of C, the
layer answers those inputs as before, whatever B is (AlphaEdit, arXiv 2410.02355, eq. 5 to 8, for closed-form edits;
Adam-NSCL, CVPR 2021, for training).
"""

from typing import NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer

from nullspace.errors import NullSpaceError
from nullspace.layers import find_module
from nullspace.spectrum import tf32


# What optimizers keep of the weights in their state. Schedule-free ones (arXiv 2405.15682) average `z` into the
# weights, so that it must stay in the null space as they do; Prodigy only measures how far it is from `p0`.
AVERAGED, REFERENCE = "z", "p0"
HELD_AT_ONCE = 16  # bases whose factors are in float32 at a time: of SDXL's all take 750 MB


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
    directions: torch.Tensor  # (bases, in, k), padded with zeros to one k
    free: bool  # whether the directions span the free space, otherwise the protected one
    held: torch.Tensor | None  # (bases, in, in), what the gains take away of each free direction

    def to(self, device):
        """The same on a device, to which the model may have gone since this was made."""
        if self.directions.device == device:
            return self
        held = None if self.held is None else self.held.to(device)
        return self._replace(directions=self.directions.to(device), held=held)

    def project(self, tensors, soft):
        """Project the rows of tensors (r, in), one for each name, in order, in float32; hold them back if `soft`."""
        stacked = torch.stack(tensors).float()
        x = stacked.view(len(self.directions), -1, stacked.shape[-1])
        with tf32(False, x.device):  # it would leak about 1e-3
            if soft and self.held is not None:
                parts = zip(x.split(HELD_AT_ONCE), self.held.split(HELD_AT_ONCE), strict=True)
                x = torch.cat([torch.baddbmm(part, part, held.float(), alpha=-1) for part, held in parts])
            inside = torch.bmm(torch.bmm(x, self.directions), self.directions.mT)
        return (inside if self.free else x - inside).view_as(stacked).unbind()


def _held_back(item, device):
    """U (1 - g) U^T (in, in), made on a device, of the free directions U (in, in - rank) and their gains g.

    It takes most of a projector's memory, and half precision does: its rounding moves a gain by at most 3e-4, and
    what is closed is projected away afterwards. Lower gains need more.
    """
    free = item.basis[:, item.rank :].to(device)
    held = (free * (1 - item.gains.to(device))) @ free.T
    return held.half() if item.gains.min() > 1e-3 else held


def _make_batches(protected, parameters, device):
    """Group modules (`dict[str, Protected]`) into as few batched products as there are kinds of basis and of rank.

    `parameters` are their A (r, in).
    """
    sharing = {}  # one basis and one rank -> its modules
    for name, item in protected.items():
        sharing.setdefault((id(item), len(parameters[name])), []).append(name)
    kinds = {}
    for (_, lora_rank), names in sharing.items():
        item = protected[names[0]]
        if item.rank:
            free = item.rank > len(item.basis) // 2  # work with whichever half is smaller
            directions = item.basis[:, item.rank :] if free else item.basis[:, : item.rank]
            held = None if item.gains is None else _held_back(item, device)
            kind = (len(item.basis), lora_rank, len(names), free, None if held is None else held.dtype)
            kinds.setdefault(kind, []).append((names, directions, held))
    batches = []
    for (size, _, _, free, dtype), members in kinds.items():
        padded = torch.zeros(len(members), size, max(directions.shape[1] for _, directions, _ in members))
        for row, (_, directions, _) in zip(padded, members, strict=True):
            row[:, : directions.shape[1]] = directions
        held = None if dtype is None else torch.stack([each for *_, each in members])
        batches.append(_Batch([name for names, *_ in members for name in names], padded.to(device), free, held))
    return batches


class NullSpaceProjector:
    """Keeps the down-projections A (r, in) of LoRA layers in the null space of what is protected.

    B @ A then answers every protected input with zero, whatever B is. It takes three things: A's initial value is
    projected, its gradient is projected before it is clipped (so that the clip and the optimizer's moments see only
    what is allowed), and its value after every step, because Adam's division by each coordinate's own second moment
    leaves the subspace (Adam-NSCL, CVPR 2021). Free directions that are held back (`Protected.gains`) are so in all
    three: the initial value, the gradient and the change.

        projector = NullSpaceProjector(unet, bundle.protected())
        projector.attach(optimizer)
        ...
        loss.backward()
        projector.project_gradients()  # so that the clip sees what is left; the step projects what was not
        optimizer.step()

    Args:
        unet (`UNet2DConditionModel`): a model with LoRA layers on the protected modules.
        protected (`dict[str, Protected]`): what is protected, by module name.
        adapter (`str`): name of the adapter.
        trained (`bool`): whether A holds what was learned: its value is then kept out of the closed directions only.
            Holding it back would undo what was learned where steps were held back already.
        text_encoders (`CLIPTextModel`, *optional*): with LoRA layers, by the name that begins those of their layers.

    Attributes:
        ranks (`dict[str, int]`): how many directions are closed, by module name.
    """

    def __init__(self, unet, protected, adapter="default", trained=False, **text_encoders):
        self.ranks = {name: item.rank for name, item in protected.items()}
        self.parameters = {name: find_module(name, unet, **text_encoders).lora_A[adapter].weight for name in protected}
        device = next(unet.parameters()).device
        with tf32(False, device):
            self._batches = _make_batches(protected, self.parameters, device)
        self._is_soft = any(batch.held is not None for batch in self._batches)
        self._projected = {}  # parameter -> its gradient, once that is projected
        self._before = {}  # parameter -> its value before the step, and that of what is averaged into it
        self._known = {}  # parameter -> names of the tensors in its optimizer's state that are known to be no copies
        with torch.no_grad():
            self._apply(lambda parameter: parameter, soft=not trained)

    def attach(self, optimizer):
        """Project in each step of the optimizer, any `torch.optim.Optimizer`, as it is or as accelerate has wrapped it.

        Raises:
            NullSpaceError: if its steps cannot be followed, it trains no layer that is protected, or it keeps a copy of
                the weights that is not understood; where it makes the copy later, the step that does so raises it.
        """
        while isinstance(optimizer, AcceleratedOptimizer):  # which steps the one below, and has no hooks
            optimizer = optimizer.optimizer
        kind = type(optimizer).__name__
        # What torch's own constructor sets up; wrappers that leave it out take hooks, if at all, and never call them
        if not (getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_post_hooks")):
            raise NullSpaceError(
                f"The steps of {kind} cannot be followed, since it calls no hooks of torch.optim.Optimizer; attach to "
                "an optimizer that does."
            )
        if self.parameters and not self._trained_by(optimizer):
            raise NullSpaceError(
                f"{kind} trains no layer that is protected; attach to the optimizer of this model's LoRA, before "
                "anything replaces its parameters."
            )
        self._check_state(optimizer, soft=True)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _trained_by(self, optimizer):
        """Those of the parameters that an optimizer has."""
        own = set(self.parameters.values())
        return [each for group in optimizer.param_groups for each in group["params"] if each in own]

    @torch.no_grad()
    def _check_state(self, optimizer, soft):
        """Raise `NullSpaceError` if the state of an optimizer holds a copy of the weights that is not understood.

        Each tensor is looked at when it is new: then a copy is near the weights, whatever is done with it later.
        """
        copies = {}  # name -> parameter -> the tensor of that name, in float32
        for parameter in self._trained_by(optimizer):
            state, known = optimizer.state.get(parameter, {}), self._known.get(parameter, set())
            if state.keys() <= known:
                continue
            self._known[parameter] = set(state)
            for name, tensor in state.items():
                fits = torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.numel() == parameter.numel()
                if (
                    fits
                    and name not in known
                    and name != REFERENCE
                    and tensor is not self._averaged(optimizer, parameter)
                ):
                    copy = tensor.to(parameter.device, torch.float32, copy=True).view_as(parameter)
                    copies.setdefault(name, {})[parameter] = copy
        for name, of_name in copies.items():
            distances = [(copy - parameter).norm() for parameter, copy in of_name.items()]
            self._apply(of_name.get, soft)  # a copy from before the weights were projected
            for distance, (parameter, copy) in zip(distances, of_name.items(), strict=True):
                if min(distance, (copy - parameter).norm()) < parameter.norm() / 2:  # no moment of gradients is so near
                    raise NullSpaceError(
                        f"{type(optimizer).__name__} keeps a copy of the weights in its state ('{name}'), which may "
                        "carry what is protected back into them; choose an optimizer without one."
                    )

    def _apply(self, tensor_of, soft=True):
        """Project, in place, the tensor (r, in) that belongs to each parameter; those without one are left out.

        Not `soft` is for values: holding back is no projection, and would shrink them to nothing, step by step.
        """
        for number, batch in enumerate(self._batches):
            tensors = [tensor_of(self.parameters[name]) for name in batch.names]
            present = [index for index, tensor in enumerate(tensors) if tensor is not None]
            if present:
                batch = self._batches[number] = batch.to(tensors[present[0]].device)
                zero = torch.zeros_like(tensors[present[0]])
                projected = batch.project([zero if tensor is None else tensor for tensor in tensors], soft)
                torch._foreach_copy_([tensors[i] for i in present], [projected[i] for i in present])

    @torch.no_grad()
    def project_values(self):
        """Project A itself, as the null space asks for after every change."""
        self._apply(lambda parameter: parameter, soft=False)

    @torch.no_grad()
    def project_gradients(self):
        """Project A's gradients: once a step, after its last backward pass and before clipping.

        A step projects those that are not projected yet, after a clip that has seen more than what is left.
        """
        self._apply(lambda parameter: parameter.grad)
        self._projected = {parameter: parameter.grad for parameter in self.parameters.values()}

    @torch.no_grad()
    def _before_step(self, optimizer, *_):
        trained = self._trained_by(optimizer)
        left = {each for each in trained if each.grad is not None and each.grad is not self._projected.pop(each, None)}
        if left:
            self._apply(lambda parameter: parameter.grad if parameter in left else None)
        if self._is_soft:  # as few operations as can be, for each layer's would cost a GPU a launch
            copies = torch._foreach_mul(trained, 1)
            averaged = [self._averaged(optimizer, parameter) for parameter in trained]
            self._before = {
                parameter: (copy, None if mean is None else mean.clone())
                for parameter, copy, mean in zip(trained, copies, averaged, strict=True)
            }

    @torch.no_grad()
    def _after_step(self, optimizer, *_):
        averaged = {parameter: self._averaged(optimizer, parameter) for parameter in self._trained_by(optimizer)}
        if self._before:
            self._project_changes([{parameter: parameter for parameter in averaged}, averaged])
        self.project_values()  # with gains, what rounding has added up to
        if any(copy is not None for copy in averaged.values()):
            self._apply(averaged.get, soft=False)
        self._check_state(optimizer, soft=False)

    def _project_changes(self, values):
        """Project what a step has changed, in the weights and in what is averaged into them."""
        for index, tensors in enumerate(values):
            now = {parameter: tensor for parameter, tensor in tensors.items() if tensor is not None}
            if now:
                both = [self._before[parameter] for parameter in now]
                start = [
                    before[0] if before[index] is None else before[index] for before in both
                ]  # copied in this step
                change = torch._foreach_sub(list(now.values()), start)
                self._apply(dict(zip(now, change, strict=True)).get)
                torch._foreach_copy_(list(now.values()), torch._foreach_add(start, change))
        self._before = {}

    def _averaged(self, optimizer, parameter):
        """What a schedule-free optimizer averages into a parameter (r, in), or None."""
        tensor = optimizer.state.get(parameter, {}).get(AVERAGED)
        fits = torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.shape == parameter.shape
        return tensor if fits else None
