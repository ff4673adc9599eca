"""What a bundle is bound to: every weight, the vocabulary and the noise schedule, by whichever names and precision."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from nullspace.bundle import Bundle
from nullspace.errors import NullSpaceError
from nullspace.fingerprints import PIECE, fingerprints, hash_weights
from test_train import bundle1, command_line, trainer  # noqa: F401


@pytest.fixture(scope="module")
def pipeline(tiny_sd1):
    return StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)


def parts_of(pipeline):
    names = ("unet", "text_encoder", "tokenizer")
    return {name: getattr(pipeline, name) for name in names} | {"noise_scheduler": pipeline.scheduler}


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_every_weight_counts(pipeline, name):
    model = copy.deepcopy(getattr(pipeline, name))
    expected, seen, chosen = hash_weights(model), set(), list(model.parameters())
    chosen = chosen[:: len(chosen) // 30 + 1] + [max(chosen, key=torch.numel)]
    for parameter in chosen:
        value = parameter.data.view(-1)[-1].clone()
        parameter.data.view(-1)[-1] += 1
        seen.add(hash_weights(model))
        parameter.data.view(-1)[-1] = value
    assert len(seen) == len({id(parameter) for parameter in chosen}) > 15 and expected not in seen
    assert hash_weights(model) == expected
    assert hash_weights(nn.Sequential(nn.Linear(2, 3))) != hash_weights(nn.ModuleDict({"a": nn.Linear(2, 3)}))


def test_precision_buffers_and_wrappers_do_not_count(pipeline):
    unet, text_encoder = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.text_encoder)
    expected = fingerprints(unet=unet, text_encoder=text_encoder)
    assert (unet.conv_in.weight != unet.conv_in.weight.half().float()).any()  # what float16 does not hold
    halves = {"unet": copy.deepcopy(unet).half(), "text_encoder": copy.deepcopy(text_encoder).half()}
    assert fingerprints(**halves) == fingerprints(**{k: v.float() for k, v in halves.items()}) == expected
    assert hash_weights(copy.deepcopy(unet).bfloat16()) != expected["unet"]
    text_encoder.register_buffer("position_ids", torch.arange(77))  # which some versions of transformers have
    for model, targets in ((unet, ["to_q", "to_k"]), (text_encoder, ["q_proj"])):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, use_dora=True), model)
    assert any("lora_magnitude" in name for name, _ in unet.named_parameters())
    assert fingerprints(unet=unet, text_encoder=text_encoder) == expected
    inner = getattr(text_encoder, "text_model", text_encoder)  # with the prefix that versions differ in, and without
    prefixed = nn.Module()
    prefixed.text_model = inner
    assert hash_weights(prefixed) == hash_weights(inner) == expected["text_encoder"]


def test_tensors_of_several_pieces_and_of_any_layout():
    weight = torch.randn(3, PIECE)
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    whole = hash_weights(model)
    model.weight = nn.Parameter(weight.T.contiguous().T)  # the same values, laid out otherwise
    assert hash_weights(model) == whole
    for place in ((0, 0), (2, -1)):
        changed = weight.clone()
        changed[place] += 1
        model.weight = nn.Parameter(changed)
        assert hash_weights(model) != whole


def test_schedules_are_those_of_training_whichever_sampler_draws(pipeline):
    def parts(scheduler):
        return fingerprints(noise_scheduler=scheduler)

    config = pipeline.scheduler.config
    expected = parts(pipeline.scheduler)
    assert expected["prediction_type"] == "epsilon"
    others = [DDPMScheduler.from_config(config), PNDMScheduler.from_config(config)]
    others += [DDPMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=True)]
    assert all(parts(other) == expected for other in others)
    for change in ({"beta_end": 0.02}, {"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}):
        assert parts(DDPMScheduler.from_config(config, **change))["noise_schedule"] != expected["noise_schedule"]
    assert parts(DDPMScheduler.from_config(config, prediction_type="v_prediction"))["prediction_type"] == "v_prediction"


def change_unet(pipeline):
    pipeline.unet.down_blocks[0].resnets[0].conv1.bias.data[0] += 1


def change_text_encoder(pipeline):
    next(p for name, p in pipeline.text_encoder.named_parameters() if name.endswith("mlp.fc1.bias")).data[0] += 1


def change_tokenizer(pipeline):
    pipeline.tokenizer.add_tokens("ohwx")


def change_prediction_type(pipeline):
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")


def change_noise_schedule(pipeline):
    pipeline.scheduler.register_to_config(beta_end=0.02)


CHANGES = [change_unet, change_text_encoder, change_tokenizer, change_prediction_type, change_noise_schedule]


@pytest.mark.parametrize("change", CHANGES)
def test_a_mismatch_names_what_differs(change, tiny_sd1, bundle1, pipeline):  # noqa: F811
    bundle = Bundle.load(bundle1)
    bundle.check(**parts_of(pipeline))
    other = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    change(other)
    named = change.__name__.removeprefix("change_").replace("_", " ")
    with pytest.raises(NullSpaceError, match=rf"the fingerprints differ \({named}\); use the bundle of this model"):
        bundle.check(**parts_of(other))


@pytest.mark.parametrize("change", [change_unet, change_text_encoder, change_noise_schedule])
def test_the_trainer_refuses_another_model(change, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    """Whether or not the text encoder is trained, and though no projection that is covered differs."""
    other = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    change(other)
    other.save_pretrained(tmp_path / "other")
    line = command_line(tmp_path / "other", bundle1, tmp_path / "lora")
    with pytest.raises(NullSpaceError, match="the fingerprints differ"):
        trainer.main(trainer.parse_args(line))
    assert not (tmp_path / "lora").exists()
