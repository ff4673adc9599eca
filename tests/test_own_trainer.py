"""The null space in somebody else's training loop: optimizers of all kinds, wrapped ones, and saving."""

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from test_nullspace_utils import (
    EXACT,
    TARGETS,
    array,
    assert_close,
    down,
    mixture,
    project_by_numpy,
    projected,
    set_gradients,
    world,  # noqa: F401
    worst_share,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModel

from nullspace import NullSpace
from nullspace.errors import NullSpaceError
from nullspace.kohya import read_report
from nullspace.lora import load_lora
from nullspace.names import LORA_NAME, UNPROTECTED_NAME
from nullspace.projector import NullSpaceProjector
from nullspace.stack import read_stack, unnamed_subjects
from test_train import BESIDE, INSTANCES, bundle1, needs  # noqa: F401


# ---- Optimizers as others have them ----------------------------------------------------------------------------------


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD, arXiv 2405.15682, eq. 6 to 8, as its authors' package keeps it: y in the weights, z beside."""

    def __init__(self, parameters, lr=0.1, beta=0.9, weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "k": 0})

    def move_to(self, weight):
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight(group["beta"]))

    def eval(self):
        self.move_to(lambda beta: 1 - 1 / beta)

    def train(self):
        self.move_to(lambda beta: 1 - beta)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta, c = group["lr"], group["beta"], 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                gradient = p.grad / (p.grad.abs() + 1e-3) + group["weight_decay"] * p  # leaves any subspace, as Adam's
                p.lerp_(z, c).add_(gradient, alpha=lr * (beta * (1 - c) - 1))
                z.sub_(gradient, alpha=lr)
            group["k"] += 1


class KeepsCopy(torch.optim.SGD):
    """SGD that keeps the weights from before its first step, and goes back to half way every other step."""

    def __init__(self, parameters, name="slow", early=False, flat=False):
        super().__init__(parameters, lr=1e-2)
        self.name, self.flat = name, flat
        if early:
            self.remember()

    def remember(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault(self.name, p.detach().clone().flatten() if self.flat else p.detach().clone())

    @torch.no_grad()
    def step(self):
        self.remember()
        return super().step()


class Lookahead(torch.optim.Optimizer):
    """A wrapper in the style of those that leave out torch's constructor: nothing calls its hooks."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, {}

    def step(self):
        self.optimizer.step()


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "schedule-free": lambda parameters: ScheduleFree(parameters, weight_decay=0.1),
    "prodigy": lambda parameters: KeepsCopy(parameters, "p0", flat=True),
}


@pytest.fixture(autouse=True)
def accelerate_from_the_start():
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def inside(tensor, item):
    """The norm of what lies in the protected directions."""
    return (tensor.detach().double() @ item.basis[:, : item.rank].double()).norm().item()


@pytest.mark.parametrize("lowest", [None, EXACT])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_a_call_gradients_are_projected_in_the_step(make_optimizer, lowest):
    """As a trainer that calls `project_gradients` has them, to the bit, whether gradients are zeroed or dropped."""
    unet, protected = mixture(lowest=lowest)
    twin = copy.deepcopy(unet)
    steps = []
    for model, calls in ((unet, False), (twin, True)):
        projector = NullSpaceProjector(model, protected)
        optimizer = make_optimizer(model.parameters())
        projector.attach(optimizer)
        for step in range(4):
            if step % 2:
                optimizer.zero_grad(set_to_none=False)
            set_gradients(model, step)
            if calls:
                projector.project_gradients()
            optimizer.step()
        steps.append([parameter.detach().clone() for parameter in model.parameters()])
        assert worst_share(projector, protected) < 1e-6
    assert all(torch.equal(*pair) for pair in zip(*steps, strict=True))


@pytest.mark.parametrize("lowest", [None, EXACT])
def test_gradients_that_were_projected_are_left_as_they_were_clipped(lowest):
    unet, protected = mixture(lowest=lowest)
    projector = NullSpaceProjector(unet, protected)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    projector.attach(optimizer)
    set_gradients(unet, 0)
    projector.project_gradients()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5)
    before = [parameter.grad.clone() for parameter in unet.parameters()]
    optimizer.step()
    assert all(torch.equal(old, each.grad) for old, each in zip(before, unet.parameters(), strict=True))
    set_gradients(unet, 1)  # the next ones are others
    before = {name: parameter.grad.clone() for name, parameter in down(unet).items()}
    optimizer.step()
    for name, parameter in down(unet).items():
        assert_close(parameter.grad, projected(before[name], protected[name]))


@pytest.mark.parametrize("lowest", [None, EXACT])
def test_what_is_averaged_into_the_weights_stays_in_the_null_space(lowest):
    """In training, in evaluation and back: schedule-free's x, y and z."""
    unet, protected = mixture(lowest=lowest)
    projector = NullSpaceProjector(unet, protected)
    optimizer = ScheduleFree(unet.parameters())
    projector.attach(optimizer)
    moved = [parameter.detach().clone() for parameter in unet.parameters()]
    for step in range(30):
        before = {name: array(optimizer.state.get(p, {}).get("z", p)) for name, p in down(unet).items()}
        set_gradients(unet, step)
        gradients = {name: projected(p.grad, protected[name]) for name, p in down(unet).items()}
        optimizer.step()
        for name, parameter in down(unet).items():
            change = torch.from_numpy(-0.1 * gradients[name] / (abs(gradients[name]) + 1e-3))
            expected = before[name] + projected(change, protected[name])
            # A gradient near zero is divided by little more
            np.testing.assert_allclose(array(optimizer.state[parameter]["z"]), expected, atol=1e-4)
    optimizer.eval()
    assert worst_share(projector, protected) < 1e-6
    optimizer.train()
    assert worst_share(projector, protected) < 1e-6
    for name, parameter in down(unet).items():
        z = optimizer.state[parameter]["z"]
        assert inside(z, protected[name]) < 1e-5 * z.norm()
    assert sum((old - each).norm() for old, each in zip(moved, unet.parameters(), strict=True)) > 1


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("lowest", [None, EXACT])
def test_other_copies_of_the_weights_are_refused(early, flat, lowest):
    unet, protected = mixture(lowest=lowest)
    optimizer = KeepsCopy(unet.parameters(), early=early, flat=flat)
    projector = NullSpaceProjector(unet, protected)
    set_gradients(unet, 0)
    with pytest.raises(NullSpaceError, match=r"KeepsCopy keeps a copy of the weights in its state \('slow'\)"):
        projector.attach(optimizer)
        assert not early
        optimizer.step()


def test_wrappers_that_call_no_hooks_are_refused():
    unet, protected = mixture()
    projector = NullSpaceProjector(unet, protected)
    with pytest.raises(NullSpaceError, match="The steps of Lookahead cannot be followed"):
        projector.attach(Lookahead(torch.optim.SGD(unet.parameters(), lr=0.1)))
    with pytest.raises(NullSpaceError, match="SGD trains no layer that is protected"):
        projector.attach(torch.optim.SGD(copy.deepcopy(unet).parameters(), lr=0.1))


@pytest.mark.parametrize("attach_first", [False, True])
def test_accelerates_optimizer_with_accumulation(attach_first):
    """Against the same steps of a twin, whose gradients and values numpy projects."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    unet, protected = mixture()
    projector = NullSpaceProjector(unet, protected)
    twin = copy.deepcopy(unet)
    plain, twin_optimizer = (torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (unet, twin))
    if attach_first:
        projector.attach(plain)
    model, optimizer = accelerator.prepare(unet, plain)
    assert optimizer is not plain
    if not attach_first:
        projector.attach(optimizer)
    for batch in range(6):
        with accelerator.accumulate(model):
            for each in (unet, twin):
                torch.manual_seed(batch)
                for parameter in each.parameters():
                    gradient = torch.randn_like(parameter) / 2
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            before = [parameter.detach().clone() for parameter in unet.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            if not accelerator.sync_gradients:
                assert all(torch.equal(old, each) for old, each in zip(before, unet.parameters(), strict=True))
                continue
        project_by_numpy(twin, protected)
        twin_optimizer.step()
        twin_optimizer.zero_grad()
        for name, parameter in down(twin).items():
            parameter.data = torch.from_numpy(projected(parameter, protected[name])).float()
            assert_close(down(unet)[name], array(parameter))
    assert worst_share(projector, protected) < 1e-6


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="its fake tensors want a driver"
)
@pytest.mark.parametrize("lowest", [None, EXACT])
def test_the_model_may_go_to_another_device_afterwards(lowest):
    """As `accelerator.prepare` takes it there; a GPU of shapes alone does."""
    unet, protected = mixture(lowest=lowest)
    projector = NullSpaceProjector(unet, protected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = {parameter: torch.empty(parameter.shape, device="cuda") for parameter in projector.parameters.values()}
        projector._apply(on_gpu.get)
        assert {tensor.device.type for tensor in on_gpu.values()} == {"cuda"}


@pytest.mark.parametrize("lowest", [None, EXACT])
def test_scaled_gradients_and_a_step_that_is_skipped(lowest):
    """With a real `GradScaler` in accelerate's wrapper; where it skips, nothing moves and the next step is right."""
    from accelerate.optimizer import AcceleratedOptimizer

    unet, protected = mixture(lowest=lowest)
    projector = NullSpaceProjector(unet, protected)
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = torch.optim.SGD(unet.parameters(), lr=0.1)
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    projector.attach(optimizer)
    scaler.scale(torch.ones(()))  # which sets it up
    for step, overflows in enumerate((False, True, False)):
        set_gradients(unet, step)
        expected = {name: (array(p), array(p.grad)) for name, p in down(unet).items()}
        for parameter in unet.parameters():
            parameter.grad *= scaler.get_scale()
        if overflows:
            next(unet.parameters()).grad[0, 0] = torch.inf
            projector.project_gradients()  # of a step that is never made
        optimizer.step()
        assert optimizer.step_was_skipped == overflows
        for name, parameter in down(unet).items():
            before, gradient = expected[name]
            change = projected(torch.from_numpy(-0.1 * gradient), protected[name])
            change = projected(torch.from_numpy(change), protected[name])
            assert_close(parameter, before + (0 if overflows else change))
    assert worst_share(projector, protected) < 1e-6


@needs("bitsandbytes")
def test_eight_bit_states_wrapped_by_accelerate():
    from bitsandbytes.optim import AdamW8bit

    accelerator = Accelerator(cpu=True)
    unet, protected = mixture(rank=300)  # below 4,096 elements bitsandbytes keeps 32 bits
    projector = NullSpaceProjector(unet, protected)
    optimizer = accelerator.prepare_optimizer(AdamW8bit(unet.parameters(), lr=1e-2))
    projector.attach(optimizer)
    before = {name: parameter.detach().clone() for name, parameter in down(unet).items()}
    for step in range(3):
        set_gradients(unet, step)
        optimizer.step()
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    assert all((before[name] - parameter).norm() > 0.1 for name, parameter in down(unet).items())
    assert worst_share(projector, protected) < 1e-6


# ---- Three lines in a loop of one's own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_encoder_of(tiny_sd1):
    return lambda: CLIPTextModel.from_pretrained(tiny_sd1, subfolder="text_encoder").requires_grad_(False)


@pytest.fixture(scope="module")
def unet_of(tiny_sd1):
    return lambda: UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet").requires_grad_(False)


def add_adapter(model, targets, adapter="default", **options):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, **options)
    inject_adapter_in_model(config, model, adapter)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


CROSS = r".*attn2\.(to_q|to_k|to_v|to_out\.0)"


def steps(model, text_encoder, optimizer, count=3):
    """Any loop: teach the text's own embedding one picture."""
    torch.manual_seed(1)
    ids = torch.arange(32).reshape(2, 16) % 20
    for _ in range(count):
        noise = torch.randn(2, 4, 8, 8)
        prediction = model(noise, torch.tensor([10, 500]), text_encoder(ids)[0]).sample
        (prediction - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_importing_the_package_imports_no_library():
    code = "import sys, nullspace; assert 'torch' not in sys.modules; print(nullspace.__all__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['NullSpace']\n", done.stderr
    with pytest.raises(ImportError):
        from nullspace import Nonsense  # noqa: F401


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_is_trained_and_saved_with_its_report(unet_of, text_encoder_of, bundle1, tmp_path, rslora):  # noqa: F811
    """UNet and text encoder, an adapter of another name, ranks of their own, and accelerate around it all."""
    accelerator = Accelerator(cpu=True)
    unet, text_encoder = unet_of(), text_encoder_of()
    patterns = {"rank_pattern": {"mid_block.*to_q": 2}, "alpha_pattern": {"mid_block.*to_q": 8}, "use_rslora": rslora}
    parameters = add_adapter(unet, CROSS, "subject", **patterns)
    parameters += add_adapter(text_encoder, ["q_proj", "v_proj"], "subject")
    model, encoder, optimizer = accelerator.prepare(unet, text_encoder, torch.optim.AdamW(parameters, lr=1e-2))
    nullspace = NullSpace(bundle1, adapter="subject")
    nullspace.attach(model, optimizer, text_encoder=encoder)
    steps(model, encoder, optimizer)
    report = nullspace.save(tmp_path / "lora", training={"max_train_steps": 3, "optimizer": "AdamW"})
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["nullspace_report.json", LORA_NAME]
    assert report == json.loads((tmp_path / "lora" / "nullspace_report.json").read_text())
    assert read_report(tmp_path / "lora") == report
    (earlier,) = read_stack([str(tmp_path / "lora")])
    assert "No prompt of" in unnamed_subjects([earlier])
    assert report["guarantee"].startswith("Guaranteed: at most ") and report["leakage"]["max"] < 1e-5
    assert report["training"]["max_train_steps"] == 3 and report["training"]["train_text_encoder"]
    assert not report["unprotected"] and 0 < report["predicted_drift"]["max"]
    layers = load_lora(tmp_path / "lora")
    assert len(layers) == len(parameters) / 2
    for name, layer in layers.items():
        module = unet.get_submodule(name) if not name.startswith("text_encoder.") else None
        if module is not None:
            assert torch.equal(layer.down, module.lora_A["subject"].weight)
            assert layer.scale == pytest.approx(module.scaling["subject"])
    pipeline = StableDiffusionPipeline.from_pretrained(bundle_model(report))
    pipeline.load_lora_weights(tmp_path / "lora")
    assert {len(adapters) for adapters in pipeline.get_list_adapters().values()} == {1}


def bundle_model(report):
    return report["base_model"]["id"]


def test_wrapped_models_are_the_models(unet_of, text_encoder_of, bundle1, tmp_path):  # noqa: F811
    """peft's own wrapper, and what `torch.compile` makes of a model."""
    unet, text_encoder = unet_of(), text_encoder_of()
    wrapped = get_peft_model(unet, LoraConfig(r=2, init_lora_weights="gaussian", target_modules=CROSS))
    optimizer = ScheduleFree([each for each in wrapped.parameters() if each.requires_grad], lr=1e-3)
    nullspace = NullSpace(bundle1)
    nullspace.attach(torch.compile(wrapped), optimizer)
    steps(wrapped, text_encoder, optimizer)
    optimizer.eval()
    assert nullspace.save(tmp_path)["leakage"]["max"] < 1e-5
    assert len(load_lora(tmp_path)) == 28


def test_a_lora_that_something_else_has_moved_is_not_saved(unet_of, bundle1, tmp_path):  # noqa: F811
    unet = unet_of()
    parameters = add_adapter(unet, CROSS)
    nullspace = NullSpace(bundle1)
    for too_early in (nullspace.project_gradients, lambda: nullspace.save(tmp_path)):
        with pytest.raises(NullSpaceError, match="attached to no model yet"):
            too_early()
    nullspace.attach(unet, torch.optim.SGD(parameters, lr=0.1))
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.rand_like(parameter)
    with pytest.raises(NullSpaceError, match="breaks its promise.*nothing but the attached optimizer moves the LoRA"):
        nullspace.save(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [UNPROTECTED_NAME]
    (tmp_path / "file").touch()
    with pytest.raises(NullSpaceError, match="file is a file; choose a folder") as error:
        nullspace.save(tmp_path / "file")
    assert "--output_dir" not in str(error.value)
    with pytest.raises(NullSpaceError, match="not saved in torch.float64"):
        nullspace.save(tmp_path / "lora", torch.float64)


def test_what_cannot_be_protected_is_refused(unet_of, text_encoder_of, bundle1, tmp_path):  # noqa: F811
    nullspace = NullSpace(bundle1)
    sgd = torch.optim.SGD

    def refused(sentence, unet, parameters, **options):
        with pytest.raises(NullSpaceError, match=sentence) as error:
            nullspace.attach(unet, sgd(parameters, lr=0.1), **options)
        assert "\n" not in str(error.value) and nullspace.projector is None

    unet, text_encoder = unet_of(), text_encoder_of()
    refused("The unet has no LoRA layers of an adapter 'default'", unet, [torch.zeros(1)])
    parameters = add_adapter(unet, CROSS)
    refused("The text encoder has no LoRA layers", unet, parameters, text_encoder=text_encoder)
    more = add_adapter(text_encoder, ["q_proj"])
    refused("trains 4 tensors of other than the LoRA", unet, parameters + more)
    both = unet_of()
    refused(r"leaves 28 layers with LoRA unprotected \(attn1", both, add_adapter(both, TARGETS))
    for option in ({"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}):
        extended = unet_of()
        parameters = add_adapter(extended, CROSS, **option)
        refused(f"The adapter 'default' has {next(iter(option))}, which", extended, parameters)
    half = unet_of().to(torch.bfloat16)
    parameters = add_adapter(half, CROSS)
    refused("The unet is in bfloat16.*call NullSpace.check with the models as they are loaded", half, parameters)
    other = unet_of()
    other.conv_in.weight.data += 0.1
    refused("built from other weights", other, add_adapter(other, CROSS))
    with pytest.raises(NullSpaceError, match="--nullspace_threshold 2 is out of range"):
        NullSpace(bundle1, threshold=2)
    with pytest.raises(NullSpaceError, match="it is not a bundle"):
        NullSpace(tmp_path)


def test_what_was_checked_before_may_be_in_bfloat16(unet_of, text_encoder_of, bundle1, tmp_path):  # noqa: F811
    """And what the bundle does not cover is trained when that is asked for, and said."""
    unet, text_encoder = unet_of(), text_encoder_of()
    nullspace = NullSpace(bundle1, softness=float("inf"))
    nullspace.check(unet, text_encoder)
    unet.to(torch.bfloat16)
    parameters = add_adapter(unet, TARGETS)
    for parameter in parameters:
        parameter.data = parameter.float()
    nullspace.attach(unet, torch.optim.SGD(parameters, lr=0.1), allow_unprotected=True)
    report = nullspace.save(tmp_path, torch.bfloat16)
    assert report["guarantee"].startswith("Nothing is guaranteed: 28 of 56 layers are unprotected")
    assert {layer.down.dtype for layer in load_lora(tmp_path).values()} == {torch.bfloat16}
    assert report["nullspace"]["softness"] is None
    altered = text_encoder_of()
    altered.get_input_embeddings().weight.data += 0.1
    with pytest.raises(NullSpaceError, match=r"the fingerprints differ \(text encoder\)"):
        NullSpace(bundle1).check(unet_of(), altered)


def test_the_example_trains(tiny_sd1, bundle1, tmp_path, capsys, monkeypatch):  # noqa: F811
    """As it is in the folder, with nothing of the project but the class."""
    source = (ROOT / "examples" / "own_trainer.py").read_text()
    assert source.count("\n") <= 60
    assert set(re.findall(r"^(?:from|import) (\w+)", source, re.M)) == {
        "argparse", "random", "pathlib", "torch", "diffusers", "peft", "nullspace",
    }  # fmt: skip
    monkeypatch.syspath_prepend(ROOT / "examples")
    own_trainer = importlib.import_module("own_trainer")
    pictures = shutil.copytree(INSTANCES, tmp_path / "pictures", ignore=BESIDE)
    argv = ["--model", tiny_sd1, "--bundle", bundle1, "--pictures", pictures, "--prompt", "a photo of a sks star"]
    argv += ["--output", tmp_path / "lora", "--steps", 3, "--size", 32, "--rank", 2]
    own_trainer.main([str(word) for word in argv])
    assert "Guaranteed: at most" in capsys.readouterr().out
    layers = load_lora(tmp_path / "lora")
    assert len(layers) == 28 and all(layer.up.any() and len(layer.down) == 2 for layer in layers.values())
