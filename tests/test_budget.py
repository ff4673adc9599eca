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
from nullspace.audit import Auditor, audit, load_audited_models
from nullspace.budget import DriftBudget
from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.layers import find_module
from nullspace.lora import LoraLayer, load_lora
from nullspace.names import JOINT, LORA_NAME
from nullspace.projector import NullSpaceProjector
from nullspace.report import save_audited
from test_train import bundle1, command_line, drawing_in_two_steps, report, same, train  # noqa: F401


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
    NullSpaceProjector(protected=protected, **adapted)
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


@pytest.mark.parametrize("softness", [1e-5, math.inf])
def test_what_is_left_is_the_nearest_within_the_budget(softness, lora):
    """That of the multiplier at which the drift is the limit, which bisection in float64 finds here."""
    adapted, base, bundle, names = lora
    before = layers_of(adapted)
    drift = audit(before, bundle, **base)["predicted_drift"]["rms"]
    budget = DriftBudget(drift / 5, bundle, names, adapted, softness)
    assert budget.hold().item() == pytest.approx(drift, rel=1e-5)
    after = layers_of(adapted)
    found = audit(after, bundle, **base)
    assert 0.999 * drift / 5 < found["predicted_drift"]["rms"] < drift / 5
    assert budget.predicted.item() == pytest.approx(found["predicted_drift"]["rms"], rel=1e-5)
    assert found["leakage"]["max"] < 1e-5

    changes, costs, held = {}, {}, {}  # held: C S^2, S^2 being (C / lambda + 1)^-1
    for name, layer in before.items():
        spectrum = bundle.group(JOINT)[bundle.modules[name]["input"]]
        moment = spectrum.sum() / spectrum.tokens
        weight = find_module(name, **base).weight.detach().double()
        costs[name] = moment / (len(before) * (weight @ moment @ weight.T).trace())
        share = moment / (softness * moment.trace())
        held[name] = costs[name] @ torch.linalg.inv(share + torch.eye(len(share)))
        changes[name] = layer.scale * layer.up.double() @ layer.down.double()

    def at(multiplier):
        return {
            name: change @ torch.linalg.inv(torch.eye(len(held[name])) + multiplier * held[name])
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


def test_what_rounding_to_16_bits_adds_is_taken_off(lora, tmp_path):
    """As if it had added half: B is scaled until what is read back is within the budget, and A is left alone."""
    adapted, base, bundle, _ = lora
    before = layers_of(adapted)
    limit = audit(before, bundle, **base)["predicted_drift"]["rms"] / 1.5
    auditor = Auditor(bundle, bundle.protected(), adapted)
    found = save_audited(tmp_path, auditor, torch.bfloat16, tmp_path / "leaking", max_drift=limit)
    assert 0.999 * limit < found["predicted_drift"]["rms"] <= limit
    assert found["predicted_drift"]["rms"] == audit(load_lora(tmp_path), bundle, **adapted)["predicted_drift"]["rms"]
    for name, layer in layers_of(adapted).items():
        assert torch.equal(layer.down, before[name].down)
        assert torch.allclose(layer.up, before[name].up / 1.5, rtol=1e-2)  # what bfloat16 rounds, and that scaled away


# ---- In a training ---------------------------------------------------------------------------------------------------


STEPS = ("--max_train_steps", 10, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 4)
ROUNDED = ("--mixed_precision", "bf16", "--no-upcast_before_saving")


def read_back(folder, bundle):
    """The root mean square of the predicted drifts of a LoRA, and its largest leakage, by the audit of its file."""
    bundle = Bundle.load(bundle, text_encoder=True)
    found = audit(load_lora(folder), bundle, **load_audited_models(bundle, with_text_encoder=True))
    return found["predicted_drift"]["rms"], found["leakage"]["max"]


@pytest.mark.parametrize(
    ("limit", "flags"),
    [
        (0.002, ("--train_text_encoder",)),
        (0.0003, (*ROUNDED, "--nullspace_softness", 1e-7)),
        (0.1, ("--nullspace_threshold", 0, "--lora_layers", "attn2.to_k")),
    ],
    ids=["text encoder", "16 bits", "nothing closed"],
)
def test_every_file_is_within_the_budget(limit, flags, tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    folder = tmp_path / "lora"
    with caplog.at_level(logging.INFO):
        train(tiny_sd1, bundle1, folder, *STEPS, *flags, "--max_drift", limit)
    found = report(folder)
    drift, leakage = read_back(folder, bundle1)
    assert drift == pytest.approx(found["predicted_drift"]["rms"], rel=5e-4)  # the model was in 16 bits, too
    assert 0.999 * limit < found["predicted_drift"]["rms"] <= limit
    assert found["nullspace"]["max_drift"] == limit
    drift, card = f"{found['predicted_drift']['rms']:.4g}", (folder / "README.md").read_text()
    told = f"The predicted drift of its layers is {drift} (root mean square), of the {limit:g} that --max_drift allows."
    assert told in caplog.text and told in found["guarantee"] and told in card
    assert f"root mean square {drift} of {limit:g} allowed" in card and f"drift at most {limit:g}, timesteps" in card
    for step in (4, 8):
        drift, leakage = read_back(folder / f"checkpoint-{step}", bundle1)
        assert 0.5 * limit < drift <= limit
        if limit < 0.1:
            assert leakage < 1e-5


def test_a_resumed_training_gives_the_same(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    folder, flags = tmp_path / "lora", (*STEPS, "--max_drift", 0.002)
    whole = train(tiny_sd1, bundle1, folder, *flags)
    (folder / LORA_NAME).unlink()
    assert same(train(tiny_sd1, bundle1, folder, *flags, "--resume_from_checkpoint", "checkpoint-4"), whole)
    with pytest.raises(NullSpaceError, match="--max_drift: 0.002 in the checkpoint, 0.003 asked for"):
        train(tiny_sd1, bundle1, folder, *STEPS, "--max_drift", 0.003, "--resume_from_checkpoint", "checkpoint-4")


def test_what_is_gone_on_from_is_brought_into_the_budget(tiny_sd1, bundle1, tmp_path, caplog):  # noqa: F811
    train(tiny_sd1, bundle1, tmp_path / "plain", "--nullspace_threshold", 0, "--lora_layers", "attn2.to_v")
    flags = ("--init_lora", tmp_path / "plain", "--max_drift", 0.01, "--learning_rate", 1e-4, "--max_train_steps", 1)
    with caplog.at_level(logging.INFO):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags, without=["--rank"])
    assert re.search(r"Going on from a predicted drift of 0\.\d+, brought to 0\.01 \(--max_drift\) first", caplog.text)
    drift, leakage = read_back(tmp_path / "lora", bundle1)
    assert 0.0099 < drift <= 0.01 and leakage < 1e-5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--max_drift", 1e-6), r"--max_drift 1e-06 is less than one step moves, which is about 0\.0\d+ at "
         r"--learning_rate 0\.01; allow more, or lower the rate\.$"),
        (("--max_drift", 1, "--lora_layers", "attn1.to_q", "--allow_unprotected"),
         r"--max_drift bounds what the bundle predicts, and it covers none of the layers to train; train others, "),
    ],
    ids=["less than a step", "not covered"],
)  # fmt: skip
def test_refused_before_the_training(flags, sentence, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    with pytest.raises(NullSpaceError, match=sentence):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert not list((tmp_path / "lora").glob("*"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--max_drift", value), f"error: --max_drift must be above 0, not {float(value)}.\n")
        for value in ("0", "-0.1", "inf", "nan")
    ]
    + [
        (
            ("--max_drift", 0.1, "--word_only", "--placeholder_token", "sks-star", "--initializer_token", "star"),
            "error: --word_only trains no LoRA, which --max_drift is for; leave one of them out.\n",
        )
    ],
)
def test_refused_as_a_flag(flags, sentence, tiny_sd1, tmp_path, capsys):
    without = ["--nullspace_name_or_path", "--rank", "--learning_rate"]
    with pytest.raises(SystemExit):
        trainer.parse_args(command_line(tiny_sd1, tmp_path, tmp_path, *flags, without=without))
    assert capsys.readouterr().err == sentence
