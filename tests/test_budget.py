"""--max_drift: the LoRA stays within its budget, in every file, and gives up first what costs most."""

import copy
import logging
import math
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

import train_dreambooth_nullspace as trainer
from nullspace.adapters import add_lora, lora_modules
from nullspace.audit import audit, summarize
from nullspace.budget import DriftBudget
from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.layers import base_layer, find_module
from nullspace.lora import LoraLayer, load_lora
from nullspace.names import JOINT, LORA_NAME
from nullspace.projector import NullSpaceProjector
from test_train import bundle1, command_line, drawing_in_two_steps, report, same, train, worst_leakage  # noqa: F401


LIMIT = 0.02


@pytest.fixture
def lora(tiny_sd1, bundle1):  # noqa: F811
    """Adapted models whose LoRA, projected as for a training, drifts, their bundle and the names of its layers."""
    adapted = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet").requires_grad_(False),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd1, subfolder="text_encoder").requires_grad_(False),
    }
    bundle = Bundle.load(bundle1, text_encoder=True)
    protected, base = bundle.protected(), copy.deepcopy(adapted)
    args = trainer.parse_args(command_line(tiny_sd1, bundle1, "lora", "--lora_alpha", 6))
    torch.manual_seed(0)
    add_lora(adapted, list(protected), args)
    NullSpaceProjector(groups={JOINT: protected}, **adapted)
    for module in lora_modules(**adapted).values():
        module.lora_B["default"].weight.data.normal_(std=0.1 * torch.rand(()).item())
    return adapted, base, bundle, list(protected)


def layers_of(adapted):
    """The LoRA of adapted models as a file has it."""
    return {
        name: LoraLayer(
            module.lora_A["default"].weight.detach().clone(),
            module.lora_B["default"].weight.detach().clone(),
            module.scaling["default"],
        )
        for name, module in lora_modules(**adapted).items()
    }


def test_what_is_left_is_the_nearest_within_the_budget(lora):
    """That of the multiplier at which the drift is the limit, which bisection in float64 finds here."""
    adapted, base, bundle, names = lora
    before = layers_of(adapted)
    drift = audit(before, bundle, **base)["predicted_drift"]["rms"]
    budget = DriftBudget(drift / 5, bundle, names, adapted)
    assert budget.hold().item() == pytest.approx(drift, rel=1e-5)
    after = layers_of(adapted)
    found = audit(after, bundle, **base)
    assert 0.999 * drift / 5 < found["predicted_drift"]["rms"] < drift / 5
    assert budget.predicted.item() == pytest.approx(found["predicted_drift"]["rms"], rel=1e-5)
    assert found["leakage"]["max"] < 1e-5

    changes, costs = {}, {}
    for name, layer in before.items():
        spectrum = bundle.group(JOINT)[bundle.modules[name]["input"]]
        moment = spectrum.sum() / spectrum.tokens
        weight = find_module(name, **base).weight.detach().double()
        costs[name] = moment / (len(before) * (weight @ moment @ weight.T).trace())
        changes[name] = layer.scale * layer.up.double() @ layer.down.double()

    def at(multiplier):
        return {
            name: change @ torch.linalg.inv(torch.eye(len(costs[name])) + multiplier * costs[name])
            for name, change in changes.items()
        }

    def square(nearer):
        return sum((change @ costs[name] @ change.T).trace().item() for name, change in nearer.items())

    assert math.sqrt(square(changes)) == pytest.approx(drift, rel=1e-5)
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if square(at(middle)) > (drift / 5 * (1 - 1e-4)) ** 2 else (low, middle)
    for name, expected in at(high).items():
        layer = after[name]
        assert torch.equal(layer.up, before[name].up)
        change = layer.scale * layer.up.double() @ layer.down.double()
        assert (change - expected).norm() < 1e-4 * expected.norm()


def test_within_the_budget_no_bit_changes(lora):
    adapted, base, bundle, names = lora
    before = layers_of(adapted)
    budget = DriftBudget(1.01 * audit(before, bundle, **base)["predicted_drift"]["rms"], bundle, names, adapted)
    budget.hold()
    assert all(torch.equal(layer.down, before[name].down) for name, layer in layers_of(adapted).items())


