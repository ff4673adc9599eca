"""The null space in a training loop of one's own: open a bundle, attach it to a LoRA, save that with its report."""

from pathlib import Path
from weakref import WeakSet

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel

from nullspace.adapters import kinds_of
from nullspace.audit import Auditor
from nullspace.bundle import Bundle
from nullspace.checks import check_softness, check_threshold, check_writable, output_folder_fault
from nullspace.errors import NullSpaceError, listed
from nullspace.layers import text_layers
from nullspace.names import (
    DEFAULT_SOFTNESS,
    DEFAULT_THRESHOLDS,
    LORA_NAME,
    REPORT_NAME,
    TEXT_ENCODER,
    TEXT_ENCODERS,
    UNPROTECTED_NAME,
)
from nullspace.projector import NullSpaceProjector
from nullspace.report import LEAKAGE_BOUNDS, make_report, save_audited, write_json
from nullspace.system import put, staging


class NullSpace:
    """Keeps the LoRA of a peft model in the null space of what a bundle protects, in any training loop.

        nullspace = NullSpace("<your-username>/nullspace-sd15")
        nullspace.attach(unet, optimizer)  # before accelerator.prepare or after it
        ...
        nullspace.save("lora")  # on the main process

    The optimizer's steps then project by themselves. Where gradients are clipped, call `project_gradients` before, so
    that the clip sees only what is left of them. Prompts are to be encoded with the bundle's `clip_skip`.

    Args:
        name_or_path (`str` or `Path`): folder or Hub dataset id of the bundle.
        criterion, threshold, softness: what is closed and how the rest is held back, see `Bundle.protected`.
        adapter (`str`): the LoRA's name in peft.
        revision, token (`str`, *optional*): of the bundle on the Hub, as in huggingface_hub.

    Attributes:
        bundle (`Bundle`): as it was opened.
        projector (`NullSpaceProjector` or `None`): once it is attached.

    Raises:
        NullSpaceError: if the bundle cannot be had, or a value is out of range.
    """

    def __init__(
        self,
        name_or_path,
        criterion="energy",
        threshold=None,
        softness=DEFAULT_SOFTNESS,
        adapter="default",
        revision=None,
        token=None,
    ):
        threshold = DEFAULT_THRESHOLDS.get(criterion) if threshold is None else threshold
        check_threshold(criterion, threshold)
        check_softness(softness)
        self.name, self.adapter = name_or_path, adapter
        self.criterion, self.threshold, self.softness = criterion, threshold, softness
        self.bundle = Bundle.load(name_or_path, revision=revision, token=token, text_encoder=True)
        self.projector, self._checked, self._adapted = None, WeakSet(), {}

    def check(self, unet, text_encoder=None, **others):
        """Raise `NullSpaceError` unless the bundle was built from these parts of a model; those given are compared.

        Args:
            others: `text_encoder_2`, tokenizers and `noise_scheduler`, by their names in a pipeline.

        `attach` does it with what it is given. Do it before where models are cast to bfloat16, in which they cannot be
        recognised, and to compare parts that are not trained.
        """
        parts = {TEXT_ENCODER: text_encoder, **others}
        parts = {name: part for name, part in parts.items() if part is not None}
        models = {"unet": unet} | {name: parts[name] for name in TEXT_ENCODERS if name in parts}
        for name, model in models.items():
            models[name] = model = _plain(model)
            if any(each.dtype == torch.bfloat16 for key, each in model.named_parameters() if "lora_" not in key):
                raise NullSpaceError(
                    f"The {name.replace('_', ' ')} is in bfloat16, in which it cannot be recognised as the one that "
                    "the bundle was built from; call NullSpace.check with the models as they are loaded, in float32 or "
                    "float16, and cast them afterwards."
                )
        self.bundle.check(**(parts | models))
        self._checked |= set(models.values())

    def attach(self, unet, optimizer, allow_unprotected=False, **text_encoders):
        """Keep the LoRA of a UNet, and of text encoders, in the null space in every step of their optimizer.

        Args:
            unet (`UNet2DConditionModel`), text_encoders (`CLIPTextModel`): those that are trained, with
                LoRA layers of peft, alone or wrapped by `get_peft_model`, accelerate or `torch.compile`.
            optimizer (`torch.optim.Optimizer`): also as accelerate wraps it, see `NullSpaceProjector.attach`.
            allow_unprotected (`bool`): whether it may also train what the bundle does not cover.

        Raises:
            NullSpaceError: if the bundle is another model's or does not cover what is trained, the adapter is more
                than a LoRA, or the optimizer cannot be kept in the null space.
        """
        models = {"unet": unet, **text_encoders}
        models = {name: _plain(model) for name, model in models.items() if model is not None}
        if not all(model in self._checked for model in models.values()):
            self.check(**models)
        layers = {}  # name -> A and B
        for name, model in models.items():
            layers |= self._lora_layers(name, model)
        protected = self.bundle.protected(self.criterion, self.threshold, self.softness)
        unprotected = [name for name in layers if name not in protected]
        weights = {weight for layer in layers.values() for weight in layer}
        others = [each for group in optimizer.param_groups for each in group["params"] if each not in weights]
        if unprotected and not allow_unprotected:
            raise NullSpaceError(
                f"The bundle leaves {len(unprotected)} layers with LoRA unprotected ({kinds_of(unprotected)}); leave "
                "them out, build a bundle that covers them, or pass allow_unprotected=True."
            )
        if others and not allow_unprotected:
            raise NullSpaceError(
                f"The optimizer trains {len(others)} tensors of other than the LoRA '{self.adapter}' of the models "
                "given, which nothing protects; leave them out, name the text encoder, or pass allow_unprotected=True."
            )
        protected = {name: protected[name] for name in layers if name in protected}
        projector = NullSpaceProjector(protected=protected, adapter=self.adapter, **models)
        projector.attach(optimizer)
        self.projector, self._adapted, self._dtype = projector, models, next(iter(weights)).dtype
        self._auditor = Auditor(self.bundle, protected, models)

    def _lora_layers(self, name, model):
        """A (r, in) and B (out, r) of the LoRA layers of a model, by the name that a bundle gives them."""
        prefix, inner = ("", model) if name == "unet" else (f"{name}.", text_layers(model))
        found = {
            f"{prefix}{key}": (module.lora_A[self.adapter].weight, module.lora_B[self.adapter].weight)
            for key, module in inner.named_modules()
            if self.adapter in getattr(module, "lora_A", ())
        }
        if not found:
            raise NullSpaceError(
                f"The {name.replace('_', ' ')} has no LoRA layers of an adapter '{self.adapter}'; add them with peft "
                "before attaching."
            )
        config = model.peft_config[self.adapter]
        extras = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "bias": config.bias != "none"}
        if any(extras.values()):
            raise NullSpaceError(
                f"The adapter '{self.adapter}' has {listed(key for key in extras if extras[key])}, which changes what "
                "protected inputs give whatever its LoRA does; leave it out of the LoraConfig."
            )
        return found

    def project_gradients(self):
        """Project the gradients: once a step, after its last backward pass and before they are clipped.

        Raises:
            NullSpaceError: if it is not attached yet.
        """
        self._check_attached()
        self.projector.project_gradients()

    def _check_attached(self):
        if self.projector is None:
            raise NullSpaceError("The null space is attached to no model yet; call NullSpace.attach first.")

    def save(self, folder, dtype=None, training=None):
        """Write the LoRA as diffusers reads it, and `nullspace_report.json` beside it; an earlier one is replaced.

        Call `optimizer.eval()` before, where the optimizer has it: it puts the averaged weights in place.

        Args:
            folder (`str` or `Path`): where; it is made if need be.
            dtype (`torch.dtype`, *optional*): of the saved weights; that of the LoRA if it is not given.
            training (`dict`, *optional*): more of what the report says of the training.

        Returns:
            `dict`: the report.

        Raises:
            NullSpaceError: if it is not attached yet, a protected layer leaks more than `LEAKAGE_BOUNDS` of
                nullspace/report.py allow, `dtype` is none of them, or the folder cannot be written.
        """
        self._check_attached()
        folder = Path(folder)
        if fault := output_folder_fault(folder):
            raise NullSpaceError(fault.removeprefix("--output_dir "))
        if not folder.is_dir():
            check_writable(folder)
        config = self._adapted["unet"].peft_config[self.adapter]
        dtype = dtype or self._dtype
        if dtype not in LEAKAGE_BOUNDS:
            raise NullSpaceError(f"A LoRA is not saved in {dtype}; choose one of {listed(LEAKAGE_BOUNDS)}.")
        setting = {"criterion": self.criterion, "threshold": self.threshold, "softness": self.softness}
        told = {"rank": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        told |= {"train_text_encoder": len(self._adapted) > 1, "clip_skip": self.bundle.clip_skip}
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder / "lora") as staged:
            found = save_audited(
                staged, self._auditor, dtype, folder / UNPROTECTED_NAME,
                advice="see that nothing but the attached optimizer moves the LoRA, and train and save it in float32",
                adapter=self.adapter,
            )  # fmt: skip
            report = make_report(found, self.bundle, dtype, self.name, setting, told | (training or {}))
            put(staged / LORA_NAME, folder / LORA_NAME)
        (folder / UNPROTECTED_NAME).unlink(missing_ok=True)  # of an earlier attempt, whose place this one takes
        write_json(folder / REPORT_NAME, report)
        return report


def _plain(model):
    """The model itself, below what peft, accelerate and `torch.compile` have wrapped around it."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model
