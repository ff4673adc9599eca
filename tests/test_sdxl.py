"""Stable Diffusion XL and its relatives: two text encoders, sizes and crops, and files that its programs read."""

import json
import re
import shutil
from argparse import Namespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from original_names import save_single_file
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_kohya import assert_same_lora
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace.bundle import Bundle
from nullspace.divergence import sound_vae
from nullspace.errors import NullSpaceError
from nullspace.families import get_family, recognise
from nullspace.families import sdxl as room
from nullspace.finding import fingerprint_of
from nullspace.kohya import kohya_metadata, kohya_name, kohya_names, save_kohya
from nullspace.layers import attention_inputs, find_module
from nullspace.lora import LoraLayer, load_lora, read_embeddings
from nullspace.models import download_model
from nullspace.names import LORA_NAME, TEXT_ENCODERS, TEXT_INPUT, WORD_NAME, tokenizer_of
from nullspace.publishing import name_repository, published_as
from test_train import bundle1, command_line, drawing_in_two_steps, make_bundle, report, same, train  # noqa: F401
from train_world import CONTEXT, make_tokenizer


FAMILY = room.StableDiffusionXL()
PROMPTS = ["a red star", "a blue heart on a white background"]
WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
DEPTH, PROJECTED = 3, 16
FLAGS = ("--train_text_encoder", "--nullspace_extra_prompts", "a green star", "--lora_alpha", 3)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_unet(**changes):
    """As SDXL's: no attention at the full size, and below it several transformer blocks in a row."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=[2, 4], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=PROJECTED + 6 * 8,
        cross_attention_dim=sum(WIDTHS.values()), **changes,
    )  # fmt: skip


def save_tiny_xl(folder, scheduler, **unet_config):
    """A random SDXL that draws 32 x 32 pictures; its tokenizers pad with different tokens."""
    tokenizers = {tokenizer_of(name): make_tokenizer(folder.with_name(f"{folder.name}-{name}")) for name in WIDTHS}
    tokenizers["tokenizer_2"].pad_token = "."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        text_encoders = {
            name: kind(
                CLIPTextConfig(
                    vocab_size=len(tokenizers["tokenizer"]), hidden_size=WIDTHS[name], intermediate_size=64,
                    num_hidden_layers=DEPTH, num_attention_heads=4, max_position_embeddings=CONTEXT,
                    projection_dim=PROJECTED, eos_token_id=tokenizers["tokenizer"].eos_token_id,
                )
            )
            for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
        }  # fmt: skip
        vae = AutoencoderKL(
            sample_size=32, block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, scaling_factor=0.13025,
        )  # fmt: skip
        pipeline = StableDiffusionXLPipeline(
            vae, **text_encoders, **tokenizers, unet=make_unet(**unet_config), scheduler=scheduler,
            add_watermarker=False,
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_xl(tmp_path_factory):
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")
    return save_tiny_xl(tmp_path_factory.mktemp("models") / "tiny-xl", scheduler)


@pytest.fixture(scope="module")
def tiny_turbo(tiny_xl, tmp_path_factory):
    """The same with the scheduler of SDXL-Turbo."""
    folder = tmp_path_factory.mktemp("models") / "tiny-turbo"
    shutil.copytree(tiny_xl, folder)
    EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def tiny_xl_lcm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-xl-lcm"
    return save_tiny_xl(folder, LCMScheduler(**SCHEDULE, original_inference_steps=20), time_cond_proj_dim=8)


@pytest.fixture(scope="module")
def xl_bundle(tiny_xl, tmp_path_factory):
    return make_bundle(tiny_xl, tmp_path_factory.mktemp("bundles") / "xl", "--with_text_encoder")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures that are larger than what is trained on, and longer than wide."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(64, 96), (80, 40)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tiny_xl, xl_bundle, pictures, tmp_path_factory):
    """A run with nearly everything: its folder, and the time ids (batch, 6) that the UNet was given in training."""
    folder, given, forward = tmp_path_factory.mktemp("trained") / "sks-star", [], UNet2DConditionModel.forward

    def spying(unet, *args, added_cond_kwargs, **kwargs):
        if unet.training:
            given.append(added_cond_kwargs["time_ids"])
        return forward(unet, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    flags = (*FLAGS, "--output_kohya_format", "--checkpointing_steps", 2, "--validation_steps", 2, "--random_flip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", spying)
        train(tiny_xl, xl_bundle, folder, *flags, "--instance_data_dir", pictures)
    return folder, torch.cat(given)


def load(folder, lora=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def draw(pipeline, prompt="a sks star"):
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline(prompt, **settings, generator=torch.Generator().manual_seed(0)).images


def edited(model, folder, **changes):
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_one_file_is_the_same_model(tiny_xl, xl_bundle, pictures, tmp_path):
    """In float16, as most are, both text encoders in it."""
    path = save_single_file(load(tiny_xl), tmp_path / "xl.safetensors", torch.float16)
    parts = []
    for model in (download_model(tiny_xl), download_model(path, config=tiny_xl)):
        models = FAMILY.load_models(model) | FAMILY.load_tokenizers(model)
        parts.append(models | {"noise_scheduler": FAMILY.load_noise_scheduler(model.folder)})
    assert fingerprint_of(parts[0]) == fingerprint_of(parts[1])
    assert {parts[1][name].dtype for name in (*TEXT_ENCODERS, "unet", "vae")} == {torch.float32}
    flags = ("--train_text_encoder", "--instance_data_dir", pictures, "--single_file_config", tiny_xl)
    train(path, xl_bundle, tmp_path / "lora", *flags)
    assert report(tmp_path / "lora")["base_model"] == Bundle.load(xl_bundle).config["base_model"] | {"id": path.name}


# ---- What a model is -------------------------------------------------------------------------------------------------


def test_unet_and_scheduler_tell_the_family(tiny_sd1, tiny_xl, tiny_turbo, tiny_xl_lcm, tmp_path):
    models = {"sd": tiny_sd1, "sdxl": tiny_xl, "sdxl-turbo": tiny_turbo, "sdxl-lcm": tiny_xl_lcm}
    assert {name: recognise(model).name for name, model in models.items()} == {name: name for name in models}
    # Where the UNet fits both, the user may know better than the scheduler
    for name, model in (("sdxl", tiny_turbo), ("sdxl-turbo", tiny_xl)):
        assert recognise(model, wanted=name).name == name
    with pytest.raises(NullSpaceError, match="--model_type sdxl-lcm contradicts"):
        recognise(tiny_xl, wanted="sdxl-lcm")
    with pytest.raises(NullSpaceError, match="has a LCMScheduler, but its UNet is told of the picture's size and"):
        recognise(edited(tiny_xl, tmp_path / "lcm", scheduler=["diffusers", "LCMScheduler"]))
    with pytest.raises(NullSpaceError, match="has a StableDiffusionXLPipeline, but its UNet takes no guidance"):
        recognise(edited(tiny_sd1, tmp_path / "sd", _class_name="StableDiffusionXLPipeline"))
    with pytest.raises(NullSpaceError, match="has a EDMEulerScheduler: it was trained with EDM's noise"):
        recognise(edited(tiny_xl, tmp_path / "edm", scheduler=["diffusers", "EDMEulerScheduler"]))
    zero_snr = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert not get_family("sdxl-turbo").claims(zero_snr)  # trained as all are


def test_the_layers_of_the_real_one():
    """By stabilityai/stable-diffusion-xl-base-1.0's configuration, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    inputs = attention_inputs(unet)
    sizes = {source: find_module(name, unet).in_features for name, source in inputs.items()}
    assert len({name.rpartition(".attn2")[0] for name in inputs}) == 70 and len(inputs) == 280
    assert sorted(sizes.values()) == 20 * [640] + 120 * [1280] + [2048] and sizes[TEXT_INPUT] == 2048
    assert FAMILY.recognises(unet.config)
    names = [kohya_name(name, of_two=True) for name in inputs]
    assert len(set(names)) == 280
    blocks = {tuple(name.split("_")[2:6]) for name in names}  # as in the original code's UNet
    expected = {("input", "blocks", str(number), "1") for number in (4, 5, 7, 8)} | {
        ("middle", "block", "1", "transformer")
    }
    assert blocks == expected | {("output", "blocks", str(number), "1") for number in range(6)}


@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_embeddings_are_those_of_the_pipeline(skip, tiny_xl):
    pipeline = load(tiny_xl)
    expected = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=skip or None)
    text_encoders = {name: getattr(pipeline, name) for name in TEXT_ENCODERS}
    tokens = {
        name: {"input_ids": getattr(pipeline, tokenizer_of(name))(
            PROMPTS, padding="max_length", max_length=CONTEXT, return_tensors="pt"
        ).input_ids} for name in text_encoders
    }  # fmt: skip
    assert not torch.equal(tokens["text_encoder"]["input_ids"], tokens["text_encoder_2"]["input_ids"])
    told = FAMILY.encode(text_encoders, tokens, skip)
    assert torch.equal(told[TEXT_INPUT], expected[0]) and torch.equal(told["text_embeds"], expected[2])
    called = FAMILY.prompt_arguments(pipeline, PROMPTS, skip)
    assert called == {"prompt": PROMPTS} | ({"clip_skip": 1} if skip else {})


# ---- Bundles ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bundle_holds_both_text_encoders(tiny_xl, xl_bundle):
    bundle, pipeline = Bundle.load(xl_bundle, text_encoder=True), load(tiny_xl)
    assert bundle.config["model_type"] == "sdxl" and bundle.config["sampler"] == "euler"
    assert set(bundle.config["base_model"]["fingerprint"]) >= {"text_encoder_2", "tokenizer_2"}
    prompts = ["", "a red star", "a blue heart on a white background"]
    read = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)[0].flatten(0, 1).double()
    found = bundle.spectra[TEXT_INPUT][TEXT_INPUT].sum()  # the negative prompt is all zeros
    assert found.shape == (80, 80) and (found - read.T @ read).norm() < 1e-3 * found.norm()
    for name, width in WIDTHS.items():
        assert {len(each.eigenvalues) for each in bundle.spectra[name].values()} == {width}
        assert len(bundle.spectra[name]) == 2 * DEPTH and len(bundle.config[name]["modules"]) == 4 * DEPTH
    parts = {name: getattr(pipeline, name) for name in ("unet", *TEXT_ENCODERS, "tokenizer", "tokenizer_2")}
    bundle.check(**parts)
    pipeline.text_encoder_2.text_projection.weight += 0.1
    with pytest.raises(NullSpaceError, match=r"the fingerprints differ \(text encoder 2\)"):
        bundle.check(**parts)


def test_bundles_of_two_such_merge(xl_bundle):
    bundle = Bundle.load(xl_bundle, text_encoder=True, every_group=True)
    merged = bundle.merge(bundle)
    assert merged.spectra["text_encoder_2"].keys() == bundle.spectra["text_encoder_2"].keys()
    with pytest.raises(NullSpaceError, match="loaded in part"):
        bundle.merge(Bundle.load(xl_bundle, every_group=True))


# ---- Training --------------------------------------------------------------------------------------------------------


def test_training_keeps_the_guarantee(trained, xl_bundle):
    written, layers = report(trained[0]), load_lora(trained[0])
    assert written["leakage"]["max"] < 1e-5 and not written["unprotected"] and written["model_type"] == "sdxl"
    # 12 transformer blocks; text encoders without the first one's last layer, which nothing reads
    assert len(written["layers"]) == len(layers) == 4 * 12 + 4 * (DEPTH - 1) + 4 * DEPTH
    for name, depth in (("text_encoder", DEPTH - 1), ("text_encoder_2", DEPTH)):
        own = [layer for key, layer in layers.items() if key.startswith(f"{name}.")]
        assert len(own) == 4 * depth and all(layer.up.any() for layer in own)
    card = (trained[0] / "README.md").read_text()
    assert "- stable-diffusion-xl\n" in card and (trained[0] / "validation" / "000002.png").is_file()


def test_the_unet_is_told_sizes_and_crops(trained):
    """Those of the files, 64 x 96 and 80 x 40, which are resized to 32 x 48 and 64 x 32, and the crop in them."""
    time_ids = trained[1]
    assert time_ids.shape == (6, 6) and time_ids[:, 4:].eq(32).all()
    tall, wide = (time_ids[time_ids[:, 0] == height] for height in (96, 40))
    assert len(tall) == len(wide) == 3 and tall[:, 1].eq(64).all() and wide[:, 1].eq(80).all()
    assert tall[:, 3].eq(0).all() and wide[:, 2].eq(0).all()
    assert 0 < tall[:, 2].max() <= 16 and 0 < wide[:, 3].max() <= 32


def test_framings_follow_crop_mirror_and_cache():
    picture = Image.linear_gradient("L").rotate(90).resize((64, 32)).convert("RGB")
    picture.info["original_size"] = (640, 320)
    args = trainer.parse_args(command_line("m", "b", "o", "--random_flip"))
    dataset = trainer.InstanceDataset([picture], [[0]], args)
    (plain, framing), (mirrored, other) = (dataset.picture(0, flip) for flip in (False, True))
    assert torch.equal(plain, mirrored.flip(-1)) and framing[:2].tolist() == [320, 640]
    assert framing[3] + other[3] == 32 and framing[3] != other[3]
    whole = dataset.processor.preprocess(picture)[0]
    for image, where, shown in ((plain, framing, whole), (mirrored, other, whole.flip(-1))):
        assert torch.equal(image, shown[:, :, int(where[3]) : int(where[3]) + 32])
    dataset.cache(lambda pixels: pixels)
    dataset.set_epoch(1)  # which would crop elsewhere
    assert not torch.equal(dataset.picture(0, False)[1], framing)
    assert any(torch.equal(dataset[0][2], kept) for kept in (framing, other))


def test_the_pipeline_loads_it(trained, tiny_xl):
    """Every layer of the file, at its scale, and what it draws moves."""
    pipeline, layers = load(tiny_xl, trained[0]), load_lora(trained[0])
    models = {name: getattr(pipeline, name) for name in ("unet", *TEXT_ENCODERS)}
    for name, layer in layers.items():
        module = find_module(name, **models)
        change = module.scaling["default_0"] * module.lora_B["default_0"].weight @ module.lora_A["default_0"].weight
        assert layer.scale == 1.5 and torch.allclose(change, layer.scale * layer.up @ layer.down, atol=1e-6)
    count = sum(hasattr(module, "lora_A") for model in models.values() for module in model.modules())
    assert count == len(layers)
    assert not torch.equal(draw(pipeline), draw(load(tiny_xl)))


def test_resuming_gives_the_same(trained, tiny_xl, xl_bundle, pictures, tmp_path):
    flags = (*FLAGS, "--random_flip", "--instance_data_dir", pictures)
    checkpoint = trained[0] / "checkpoint-2"
    resumed = train(tiny_xl, xl_bundle, tmp_path / "lora", *flags, "--resume_from_checkpoint", checkpoint)
    assert same(resumed, load_file(trained[0] / LORA_NAME))


def test_a_word_has_rows_in_both_text_encoders(tiny_xl, xl_bundle, pictures, tmp_path):
    """The card's code loads them; both kinds of file for web UIs have them by the same names."""
    folder, flags = tmp_path / "sks-dog", ("--placeholder_token", "sks-star", "--initializer_token", "star")
    flags += ("--instance_prompt", "a sks-star", "--num_vectors", 2, "--instance_data_dir", pictures)
    train(tiny_xl, xl_bundle, folder, *flags, "--output_kohya_format", "--max_train_steps", 2)
    rows = load_file(folder / WORD_NAME)
    assert {key: tuple(each.shape) for key, each in rows.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    bundled = read_embeddings(folder / "sks-dog.safetensors")
    assert same({key.removeprefix("bundle_emb.sks-star."): each for key, each in bundled.items()}, rows)
    assert same(load_file(folder / "embeddings" / "sks-star.safetensors"), rows)
    (code,) = re.findall(r"^```py\n(.*?)^```$", (folder / "README.md").read_text(), re.S | re.M)
    names, base = {}, load(tiny_xl)
    exec(code.replace("float16", "float32").replace('.to("cuda")', ""), names)
    assert names["image"].size == (32, 32)
    for name, key in zip(TEXT_ENCODERS, ("clip_l", "clip_g"), strict=True):
        found, before = (getattr(each, name).get_input_embeddings().weight for each in (names["pipeline"], base))
        first = before[base.tokenizer.convert_tokens_to_ids("star</w>")]
        assert torch.equal(found, torch.cat([before, rows[key]])) and not torch.isclose(rows[key], first).all()


def test_the_audit_reads_it(trained, xl_bundle, capsys):
    args = ["audit", "--lora", str(trained[0]), "--nullspace", str(xl_bundle)]
    nullspace_utils.main(nullspace_utils.parse_args(args))
    shown = capsys.readouterr().out
    assert "text_encoder_2.encoder.layers.2.self_attn.out_proj" in shown and "not covered" not in shown
    assert "Verdict: on what the bundle protects" in shown


# ---- kohya's names ---------------------------------------------------------------------------------------------------


def test_the_file_for_the_web_uis(trained, tiny_xl):
    path = trained[0] / "sks-star.safetensors"
    layers = load_lora(trained[0])
    assert_same_lora(load_lora(path), layers)
    tensors = load_file(path)
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q",
        "lora_unet_output_blocks_2_1_transformer_blocks_1_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_self_attn_out_proj",
    ):
        assert f"{name}.lora_down.weight" in tensors and tensors[f"{name}.alpha"] == 3
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"
    assert torch.equal(draw(load(tiny_xl, path)), draw(load(tiny_xl, trained[0])))


def test_layers_beyond_attention_keep_todays_names(tmp_path):
    """The original code's are known for attention blocks only, and no file has both."""
    names = ["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", "down_blocks.0.resnets.0.conv1"]
    layers = {name: LoraLayer(torch.ones(2, 4), torch.ones(6, 2), 0.5) for name in names[:1]}
    layers |= {names[1]: LoraLayer(torch.ones(2, 4, 3, 3), torch.ones(6, 2, 1, 1), 0.5)}
    layers |= {"text_encoder.encoder.layers.0.self_attn.q_proj": LoraLayer(torch.ones(2, 4), torch.ones(6, 2), 0.5)}
    save_kohya(tmp_path / "lora.safetensors", layers)
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    assert "lora_unet_down_blocks_0_resnets_0_conv1" in keys and not any("input_blocks" in key for key in keys)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in keys
    assert load_lora(tmp_path / "lora.safetensors").keys() == layers.keys()


def test_what_tells_kohyas_name_of_the_model():
    wide, of_two = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "text_encoder_2.encoder.layers.0.mlp.fc1"
    for names, width in (((wide,), 2048), ((of_two,), 8), ((wide.replace("blocks.0", "blocks.3"),), 8)):
        layers = {name: LoraLayer(torch.ones(2, width), torch.ones(3, 2), 1.0) for name in names}
        assert kohya_metadata(layers)["ss_base_model_version"] == "sdxl_base_v1-0"
    assert list(kohya_names("mid_block.resnets.0.conv1")) == ["lora_unet_mid_block_resnets_0_conv1"]


# ---- Relatives, and what is refused ----------------------------------------------------------------------------------


def test_a_turbo_is_drawn_and_not_trained(tiny_turbo, tiny_xl, xl_bundle, tmp_path):
    flags = ("--num_inference_steps", 1, 2, "--with_text_encoder")
    bundle = Bundle.load(make_bundle(tiny_turbo, tmp_path / "bundle", *flags), text_encoder=True)
    tokens = {spectrum.tokens for name in TEXT_ENCODERS for spectrum in bundle.spectra[name].values()}
    assert tokens == {3 * CONTEXT}  # of each prompt once, however often it is drawn
    assert bundle.config["model_type"] == "sdxl-turbo" and bundle.config["guidance_scale"] == 0
    assert [each["timesteps"] for each in bundle.config["groups"]][0] == [499, 999]
    bundle.check(load(tiny_turbo).unet)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "nullspace_utils.py audit" in card and "train_dreambooth_nullspace.py" not in card
    assert "| text encoder | 12 projections, in `text_encoder.safetensors`; 12 projections, in `text_encoder_2." in card
    for given in (tmp_path / "bundle", xl_bundle):
        with pytest.raises(NullSpaceError, match="is an SDXL-Turbo by its scheduler.*pass --model_type sdxl if"):
            train(tiny_turbo, given, tmp_path / "lora")
    with pytest.raises(NullSpaceError, match="was built for an SDXL-Turbo .* nothing of a Stable Diffusion XL model"):
        train(tiny_xl, tmp_path / "bundle", tmp_path / "lora")
    assert published_as(tmp_path / "bundle") is None
    name_repository("ada/turbo", tmp_path / "bundle")
    assert published_as(tmp_path / "bundle") == "ada/turbo"
    assert not (tmp_path / "lora").exists()


def test_a_latent_consistency_model_is_trained(tiny_xl_lcm, tmp_path):
    bundle = make_bundle(tiny_xl_lcm, tmp_path / "bundle")
    train(tiny_xl_lcm, bundle, tmp_path / "lora", "--max_train_steps", 1, "--lcm_loss", "consistency")
    written = report(tmp_path / "lora")
    assert written["model_type"] == "sdxl-lcm" and written["training"]["lcm_loss"] == "consistency"
    assert written["leakage"]["max"] < 1e-5 and "num_inference_steps=4" in (tmp_path / "lora/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokenizer_name", "t"), "--tokenizer_name names one tokenizer"),
        (("--text_encoder_use_attention_mask",), "--text_encoder_use_attention_mask hides the padding"),
        (("--lcm_loss", "x0"), "--lcm_loss is not for a Stable Diffusion XL model"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tiny_xl, xl_bundle, tmp_path):
    with pytest.raises(NullSpaceError, match=message):
        train(tiny_xl, xl_bundle, tmp_path / "lora", *flags)
    assert not (tmp_path / "lora").exists()


def test_the_bundle_of_another_family_is_refused(tiny_xl, bundle1, tmp_path):  # noqa: F811
    with pytest.raises(NullSpaceError, match="was built for a Stable Diffusion model"):
        train(tiny_xl, bundle1, tmp_path / "lora")


def test_a_clip_skip_that_leaves_nothing_of_a_text_encoder_is_refused(tiny_xl, tmp_path):
    with pytest.raises(NullSpaceError, match="--clip_skip 2 leaves nothing of the text encoder, which has 3 layers"):
        make_bundle(tiny_xl, tmp_path / "bundle", "--clip_skip", 2)


def test_the_resolution_is_the_models_own_where_it_is_not_given(tiny_sd1, tiny_xl, pictures, tmp_path):
    def resolved(model):
        args = trainer.parse_args(
            command_line(model, "b", "o", "--instance_data_dir", pictures, without=["--resolution"])
        )
        accelerator = Namespace(main_process_first=lambda: pytest.MonkeyPatch.context())
        sides = {min(picture.size) for picture in trainer.read_subject(accelerator, args)[0]}
        assert sides == {args.resolution}
        return args.resolution

    for model in (tiny_sd1, tiny_xl):
        pipeline = load(model)
        assert resolved(model) == pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    shutil.copytree(tiny_sd1, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"sample_size": 2 * config["sample_size"]}))
    assert resolved(tmp_path / "model") == 2 * resolved(tiny_sd1)
    path.write_text(json.dumps(config | {"sample_size": None}))
    with pytest.raises(NullSpaceError, match="has no single sample_size"):
        resolved(tmp_path / "model")


def test_a_vae_that_is_known_to_overflow_is_run_in_float32(tiny_xl):
    def half():
        return AutoencoderKL.from_pretrained(tiny_xl, subfolder="vae", torch_dtype=torch.float16)

    def pictures():
        yield torch.zeros(3, 32, 32)

    for vae, known, dtype in (
        (half(), FAMILY.needs_float32(half().config), torch.float32),  # though these pictures are sound
        (half(), False, torch.float16),
        (half().to(torch.bfloat16), True, torch.bfloat16),
    ):
        assert sound_vae(vae, pictures, lambda: half().float(), None, known).dtype == dtype
    fixed = half()
    fixed.register_to_config(force_upcast=False)
    assert not FAMILY.needs_float32(fixed.config) and not get_family("sd").needs_float32(half().config)
