"""--base_lora: LoRAs trained one on top of the other, what loads them together, and what is refused."""

import json
import re
import shutil
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sdxl import tiny_xl  # noqa: F401
from test_word import draw, load

import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace import finding, stack, validation
from nullspace.adapters import write_layers
from nullspace.bundle import Bundle
from nullspace.embeddings import Word, read_words, save_words
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.layers import text_layers
from nullspace.lora import LoraLayer, load_lora
from nullspace.models import download_model
from nullspace.names import LORA_NAME, REPORT_NAME, WORD_NAME
from test_train import bundle1, command_line, drawing_in_two_steps, report, same, train  # noqa: F401


STAR = ("--placeholder_token", "sks-star", "--initializer_token", "star", "--instance_prompt", "a photo of a sks-star")
HEART = ("--placeholder_token", "sks-heart", "--initializer_token", "heart", "--instance_prompt", "a red sks-heart")
PROMPTS = ("a photo of a sks-star", "a red sks-heart", "a red star")


@pytest.fixture(scope="module")
def trained(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    """A star, with its text encoder and a word of two rows, and a heart on top of it: folders, and what was drawn."""
    folder, seen, draw_rows = tmp_path_factory.mktemp("trained"), Namespace(drawn={}), validation.draw
    seen.star, seen.heart, seen.cache = folder / "star", folder / "heart.2", folder / "bundles"

    def drawing(pipeline, prompts, args, description):
        seen.drawn[description] = [draw(pipeline, prompt) for prompt in PROMPTS]
        return draw_rows(pipeline, prompts, args, description)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "PROMPTS", 5)
        train(tiny_sd1, bundle1, seen.star, *STAR, "--num_vectors", 2, "--train_text_encoder", "--lora_alpha", 6)
        patch.setattr(validation, "draw", drawing)
        seen.flags = (*HEART, "--rank", 3, "--base_lora", seen.star, "--nullspace_cache_dir", seen.cache)
        seen.flags += ("--validation_steps", 3, "--checkpointing_steps", 2)
        train(tiny_sd1, "", seen.heart, *seen.flags, without=["--nullspace_name_or_path"])
    (seen.bundle,) = [path for path in seen.cache.iterdir() if path.is_dir()]
    return seen


def utils(*words):
    return nullspace_utils.main(nullspace_utils.parse_args(list(map(str, words))))


def run_card(folder, model, lines=None):
    """The pipeline that the code of a card, or other lines, makes of a model."""
    if lines is None:
        code = re.search(r"```py\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        lines = "\n".join(line for line in code.splitlines() if line.startswith(("from", "rows", "pipeline.")))
    names = {"pipeline": load(model)}
    exec(lines, names)
    return names["pipeline"]


def equal(pipeline, pictures, atol=1e-3):
    return all(
        (draw(pipeline, prompt) - each).abs().max() < atol for prompt, each in zip(PROMPTS, pictures, strict=True)
    )


# ---- What stands on what ---------------------------------------------------------------------------------------------


def test_pictures_are_of_the_stack_and_one_file_gives_them(trained, tiny_sd1, tmp_path, capsys):
    """In training, at its end, by the card's code, and by a file of both."""
    drawn = trained.drawn
    star = load(tiny_sd1, trained.star, trained.star)
    assert equal(star, drawn["Validating, base"]) and equal(star, drawn["Drawing with the base model"])
    assert not equal(load(tiny_sd1), drawn["Validating, base"], 3e-3)
    together = run_card(trained.heart, tiny_sd1)
    assert together.get_active_adapters() == ["1-star", "2-heart-2"]
    assert equal(together, drawn["Validating"]) and equal(together, drawn["Drawing with the LoRA"])
    assert not equal(star, drawn["Validating"], 3e-3)

    output = tmp_path / "both"
    utils("merge-loras", "--lora", trained.star, trained.heart, "--output_dir", output)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert equal(run_card(None, tiny_sd1, "\n".join(lines)), drawn["Validating"])
    star, heart, both = (load_lora(folder) for folder in (trained.star, trained.heart, output))
    assert both.keys() == star.keys() > heart.keys() and {len(both[name].down) for name in heart} == {5}

    def change(layer):
        return layer.scale * layer.up.double() @ layer.down.double()

    for name, layer in both.items():
        expected = change(star[name]) + (change(heart[name]) if name in heart else 0)
        assert torch.allclose(change(layer), expected, rtol=0, atol=1e-8)
    words = [each for folder in (trained.star, trained.heart) for each in read_words(folder / WORD_NAME)]
    for word, found in zip(words, read_words(output / WORD_NAME), strict=True):
        assert word.token == found.token and same(word.rows, found.rows)
    utils("export", "--lora", output, "--output", tmp_path / "both.safetensors")
    assert "the embedding of sks-heart and the embedding of sks-star to" in capsys.readouterr().out


def test_report_and_bundle_name_it(trained, tiny_sd1, bundle1, capsys):  # noqa: F811
    (star,) = stack.read_stack([str(trained.star)])
    named = [{"id": "star", "sha256": star.sha256}]
    assert report(trained.heart)["base_model"]["loras"] == named and "loras" not in report(trained.star)["base_model"]
    bundle = Bundle.load(trained.bundle)
    assert bundle.config["base_model"]["loras"] == named
    assert bundle.config["prompts"]["count"] == 5 + stack.PER_SUBJECT
    assert bundle.config["prompts"]["source"].endswith(".txt + star")
    assert "a photo of a sks-star" in bundle.config["prompts"]["examples"]
    assert report(trained.heart)["leakage"]["max"] < 1e-5
    card = (trained.bundle / "README.md").read_text()
    assert "  --base_lora star \\\n" in card and f"with the LoRAs `star` (sha256 `{star.sha256[:12]}...`)" in card
    audit = ("audit", "--lora", trained.heart, "--nullspace")
    utils(*audit, trained.bundle, "--base_lora", trained.star)
    assert "Verdict: on what the bundle protects" in capsys.readouterr().out
    utils(*audit, bundle1)
    assert capsys.readouterr().out.endswith(
        "on top of star, which are to be loaded with it and are not counted here.\n"
    )
    utils("verify", "--nullspace", trained.bundle, "--base_lora", trained.star)
    assert "protects what it claims" in capsys.readouterr().out
    utils("find", "--pretrained_model_name_or_path", tiny_sd1, "--nullspace_cache_dir", trained.cache)
    assert "There is no bundle of this very model" in capsys.readouterr().out
    with pytest.raises(
        NullSpaceError, match=r"is of \S+ with star \(sha256 \w{12}...\); name just these in --base_lora"
    ):
        utils("verify", "--nullspace", trained.bundle)
    with pytest.raises(NullSpaceError, match="is of .* alone, and with --base_lora the layers read something else"):
        utils(*audit, bundle1, "--base_lora", trained.star)


def test_resuming_gives_the_same(trained, tiny_sd1, tmp_path):
    """With the same LoRA under another name, and not with another."""
    shutil.copytree(trained.star, tmp_path / "moved")
    shutil.copytree(trained.heart / "checkpoint-2", tmp_path / "heart" / "checkpoint-2")
    flags = (*trained.flags, "--base_lora", tmp_path / "moved", "--resume_from_checkpoint", "latest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "PROMPTS", 5)
        found = train(tiny_sd1, "", tmp_path / "heart", *flags, without=["--nullspace_name_or_path"])
    assert same(found, load_file(trained.heart / LORA_NAME))
    assert same(load_file(tmp_path / "heart" / WORD_NAME), load_file(trained.heart / WORD_NAME))
    assert len([path for path in trained.cache.iterdir() if path.is_dir()]) == 1
    tensors = load_file(tmp_path / "moved" / WORD_NAME)
    save_file(
        {key: rows + 1e-3 for key, rows in tensors.items()},
        tmp_path / "moved" / WORD_NAME,
        {"placeholder_token": "sks-star"},
    )
    with pytest.raises(
        NullSpaceError, match=r"the LoRAs stood on \(--base_lora\): sha256 \w+... in the checkpoint, sha256"
    ):
        train(tiny_sd1, "", tmp_path / "heart", *flags, without=["--nullspace_name_or_path"])


def test_a_model_with_two_text_encoders(tiny_xl, tmp_path):  # noqa: F811
    """LoRA and word of both, and a second LoRA: loaded as part of the model, and by diffusers."""
    model, family = download_model(tiny_xl), get_family("sdxl")
    pipeline = family.load_pipeline(model)
    torch.manual_seed(0)
    names = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": pipeline.unet,
        "text_encoder_2.encoder.layers.0.self_attn.q_proj": text_layers(pipeline.text_encoder_2),
    }
    for number, token in enumerate(("sks-star", "sks-heart")):
        layers, folder = {}, tmp_path / token
        for name, part in names.items():
            rows, columns = part.get_submodule(name.removeprefix("text_encoder_2.")).weight.shape
            layers[name] = LoraLayer(torch.randn(2 + number, columns), torch.randn(rows, 2 + number), 0.1)
        folder.mkdir()
        write_layers(folder, layers)
        encoders = ("text_encoder", "text_encoder_2")
        widths = [getattr(pipeline, name).config.hidden_size for name in encoders]
        save_words(
            folder, [Word(token, {name: torch.randn(2, width) for name, width in zip(encoders, widths, strict=True)})]
        )
    folders = [tmp_path / token for token in ("sks-star", "sks-heart")]
    utils("merge-loras", "--lora", *folders, "--output_dir", tmp_path / "both")
    words = read_words(tmp_path / "both" / WORD_NAME)
    assert [word.token for word in words] == ["sks-star", "sks-heart"]
    pipeline.load_lora_weights(tmp_path / "both")
    for word in words:
        for name, rows in word.rows.items():
            parts = {
                "text_encoder": getattr(pipeline, name),
                "tokenizer": getattr(pipeline, name.replace("text_encoder", "tokenizer")),
            }
            pipeline.load_textual_inversion(rows, token=word.token, **parts)
    ours = family.load_pipeline(model._replace(loras=stack.read_stack(map(str, folders))))
    prompt = "a sks-star and a sks-heart"
    for each in (pipeline, ours):
        each.set_progress_bar_config(disable=True)
    found, expected = (
        each(
            prompt,
            height=32,
            width=32,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        for each in (ours, pipeline)
    )
    assert (found - expected).abs().max() < 1e-3
    word = Word("sks-star", {"text_encoder": words[0].rows["text_encoder"]})
    alone = stack.Earlier("star", "0", {}, [word], {})
    with pytest.raises(NullSpaceError, match="has rows for 1 text encoder, and .* has 2; give a LoRA of this model"):
        family.load_tokenizers(model._replace(loras=(alone,)))


def test_prompts_of_a_subject(tmp_path):
    """What it was trained on, its subject in kinds of pictures, and in the places of the model's own prompts."""
    (tmp_path / "prompts.txt").write_text("a dog on a beach\na cat\na bird in a tree, at night\na cow on a beach\n")
    lora = stack.Earlier("d", "0", {}, [], {"training": {"instance_prompt": ["a photo of a sks dog in a box"]}})
    model = Namespace(folder=tmp_path, loras=(lora,))
    kinds = ["a sks dog"] + [f"a {kind} of a sks dog" for kind in ("photo", "picture")] + ["an image of a sks dog"]
    kinds += ["a painting of a sks dog", "a close-up photo of a sks dog"]
    expected = ["a photo of a sks dog in a box", *kinds, "a sks dog on a beach", "a sks dog in a tree, at night"]
    assert stack.subject_prompts(model) == expected
    word = Word("sks-dog", {"text_encoder": torch.ones(1, 4)})
    many = {"training": {"instance_prompt": [f"sks-dog, {number}" for number in range(100)]}}
    model.loras = (lora, lora._replace(words=[word], report=many))
    found = stack.subject_prompts(model)[len(expected) :]
    assert found[:2] == ["sks-dog, 0", "sks-dog, 6"] and found[16:18] == ["a sks-dog", "a photo of a sks-dog"]
    assert found[-1] == "a sks-dog in a tree, at night" and len(found) == 16 + 6 + 2
    (tmp_path / "prompts.txt").write_text("".join(f"a cat on {number}\n" for number in range(200)))
    assert len(set(stack.subject_prompts(model))) == 2 * stack.PER_SUBJECT
    assert "No prompt of x is known" in stack.unnamed_subjects([lora, stack.Earlier("x", "0", {}, [], {})])


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["missing"], "^--base_lora: The LoRA .*missing cannot be had"),
        (["star", "again"], "--base_lora .*again is the same LoRA as .*star, which would count twice; leave it out"),
        (["twin"], "The word sks-heart of --base_lora .*twin is that of --placeholder_token, too"),
        (["star", "retrained"], "The word sks-star of --base_lora .*retrained is that of .*star, too"),
        (["heart.2"], r"--base_lora .*heart.2 was trained on top of star \(sha256 \w{12}...\); name that before it"),
        (["cut"], "^--base_lora: .*cut cannot be read as a LoRA"),
        (["mute"], "^--base_lora: .*learned_embeds.safetensors cannot be read as an embedding"),
        (["odd"], "^--base_lora: .*nullspace_report.json is no report of the trainer"),
        (["nan"], "--base_lora .*nan holds NaN or infinity"),
        (["dora"], "--base_lora .*dora is a DoRA, which does not add up"),
        (["other"], r"--base_lora .*other was trained on other weights than those of .*fingerprints differ \(unet\)"),
        (["narrow"], r"--base_lora .*narrow was made for another model: its \S+ is \(16, 31\), and in .* \(16, 32\)"),
        (["second"], r"--base_lora .*second was made for another model: its text_encoder_2.* it is missing"),
        (["wide"], "wide was made for another model: the rows of sks-star have 31 numbers, and in .* 32; give one"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_what_cannot_be_stood_on(given, message, trained, tiny_sd1, tmp_path):
    tensors, folders = load_file(trained.star / LORA_NAME), {"star": trained.star, "heart.2": trained.heart}
    down = next(key for key in tensors if "down_blocks.0" in key and key.endswith("to_k.lora.down.weight"))
    up, rows = down.replace(".down.", ".up."), load_file(trained.star / WORD_NAME)["sks-star"]
    changes = {
        "retrained": tensors | {down: tensors[down] + 1},
        "nan": tensors | {down: tensors[down] * float("nan")},
        "dora": tensors | {down.replace("lora.down.weight", "lora_magnitude_vector"): torch.ones(len(tensors[up]))},
        "narrow": tensors | {down: tensors[down][:, 1:].contiguous()},
        "second": tensors
        | {key.replace("text_encoder.", "text_encoder_2."): each + 1 for key, each in tensors.items()},
    }
    name = given[-1]
    if name not in folders and name != "missing":
        folder = shutil.copytree(trained.star, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        if name in changes:
            save_file(changes[name], folder / LORA_NAME)
        if name in ("twin", "wide"):
            word = ("sks-heart", rows) if name == "twin" else ("sks-star", rows[:, 1:])
            save_words(folder, [Word(word[0], {"text_encoder": word[1]})])
        for odd, file in {"cut": LORA_NAME, "mute": WORD_NAME, "odd": REPORT_NAME}.items():
            if name == odd:
                (folder / file).write_bytes((folder / file).read_bytes()[:-100])
        if name == "other":
            written = report(folder)
            written["base_model"]["fingerprint"]["unet"] = "0" * 64
            (folder / REPORT_NAME).write_text(json.dumps(written))
    loras = [folders.get(each, tmp_path / each) for each in given]
    flags = (*HEART, "--nullspace_cache_dir", tmp_path / "cache", "--base_lora", *loras)
    argv = command_line(tiny_sd1, "", tmp_path / "lora", *flags, without=["--nullspace_name_or_path"])
    with pytest.raises(NullSpaceError, match=message) as caught:
        trainer.main(trainer.parse_args(argv))
    assert "\n" not in str(caught.value) and not (tmp_path / "lora" / LORA_NAME).exists()
    assert not (tmp_path / "cache").exists()
