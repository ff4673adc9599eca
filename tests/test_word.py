"""A word of the subject's own: which rows are trained, what loads them, and what is refused."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kohya import assert_same_lora
from tokenizers import AddedToken
from transformers import CLIPTokenizer

import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace import results, validation
from nullspace.embeddings import loading_code, read_word, save_words
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.families.stable_diffusion import encode_tokens, prompt_arguments
from nullspace.layers import is_trained
from nullspace.lora import load_lora, read_embeddings, read_lora
from nullspace.names import DEFAULT_SOFTNESS, LORA_NAME, REPORT_NAME, TEXT_ENCODERS, WORD_NAME, WORD_SOFTNESS
from nullspace.results import default_prompts, put_in_place
from nullspace.word import add_token, check_not_protected, check_window
from test_train import bundle1, command_line, drawing_in_two_steps, report, same, train  # noqa: F401


PROMPT, OTHER = "a photo of a sks-star", "a red star"
WORD = ("--placeholder_token", "sks-star", "--initializer_token", "star", "--instance_prompt", PROMPT)
TWO = (*WORD, "--num_vectors", 2, "--train_text_encoder", "--text_encoder_lr", 2e-2, "--word_learning_rate", 3e-2)
DRAWN = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


def load(model, lora=None, word=None, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = get_family("sd").sampler.from_config(pipeline.scheduler.config)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    if word is not None:
        pipeline.load_textual_inversion(word, **options)
    return pipeline


def draw(pipeline, prompt=PROMPT):
    return pipeline(prompt, **DRAWN, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def trained(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    """A run with nearly everything: its folder, the optimizer's groups, the word, what it drew, and what it wrote."""
    folder, seen = tmp_path_factory.mktemp("trained") / "sks-dog", Namespace(drawn={})
    make, make_word, draw_rows, write = trainer.make_optimizer, trainer.NewWord, validation.draw, results.write_results

    def drawing(pipeline, prompts, args, description):
        seen.drawn[description] = [draw(pipeline, prompt) for prompt in (PROMPT, OTHER)]
        return draw_rows(pipeline, prompts, args, description)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer, "make_optimizer", lambda groups, args: setattr(seen, "groups", groups) or make(groups, args)
        )
        patch.setattr(trainer, "NewWord", lambda *given: setattr(seen, "word", make_word(*given)) or seen.word)
        patch.setattr(validation, "draw", drawing)
        patch.setattr(results, "write_results", lambda *given: setattr(seen, "written", write(*given)) or seen.written)
        flags = ("--output_kohya_format", "--checkpointing_steps", 2, "--validation_steps", 3)
        train(tiny_sd1, bundle1, folder, *TWO, *flags, "--gradient_checkpointing")
    seen.folder = folder
    return seen


# ---- What is trained and saved ---------------------------------------------------------------------------------------


def test_its_rows_alone_are_trained(trained, tiny_sd1):
    pipeline, base = (load(tiny_sd1, word=word) for word in (trained.folder, None))
    found, before = (each.text_encoder.get_input_embeddings().weight for each in (pipeline, base))
    assert torch.equal(found[: len(before)], before) and len(found) == len(before) + 2
    rows = load_file(trained.folder / WORD_NAME)["sks-star"]
    assert torch.equal(found[len(before) :], rows) and rows.dtype == torch.float32
    began = before[base.tokenizer.convert_tokens_to_ids("star</w>")]
    assert ((rows - began).abs().amax(1) > 0.02).all() and not torch.equal(*rows)
    found = [(group["lr"], group["weight_decay"]) for group in trained.groups]
    assert found == [(1e-2, 1e-2), (2e-2, 1e-2), (3e-2, 0.0)]
    layers = [name.startswith("text_encoder.") for name in load_lora(trained.folder)]
    sizes = [2 * layers.count(False), 2 * layers.count(True), 1]
    assert [len(group["params"]) for group in trained.groups] == sizes and all(sizes)


def test_report_card_and_list_of_files_know_it(trained):
    written, card = report(trained.folder), (trained.folder / "README.md").read_text()
    promise = "sks-star is 2 new rows of the embedding, whose other rows are the base model's, to the last bit."
    assert written["guarantee"].startswith("Guaranteed: at most") and written["guarantee"].endswith(promise)
    assert written["leakage"]["max"] < 1e-5 and promise in card and "- textual_inversion\n" in card
    told = {"placeholder_token": "sks-star", "num_vectors": 2, "word_learning_rate": 3e-2, "text_encoder_lr": 2e-2}
    assert told.items() <= written["training"].items()
    assert {LORA_NAME, WORD_NAME, "sks-dog.safetensors", "embeddings/sks-star.safetensors"} < set(trained.written)
    assert all((trained.folder / name).is_file() for name in trained.written)


@pytest.mark.parametrize("protected", [True, False])
def test_the_class_of_a_word_is_drawn_beside_it(protected):
    examples = [f"a {colour} ring" for colour in ("red", "blue", "green", "white")]
    bundle = Namespace(config={"prompts": {"examples": examples}}) if protected else None
    args = Namespace(
        instance_prompt=["a photo of a Sks-Star", "a sks-star"], placeholder_token="sks-star", initializer_token="star"
    )
    others = ["a red ring", "a green ring"] if protected else []
    assert default_prompts(bundle, args) == ["a photo of a Sks-Star", "a photo of a star", *others]
    args.placeholder_token = None
    others = examples[:3] if protected else []
    assert default_prompts(bundle, args) == ["a photo of a Sks-Star", *others]


def test_a_changed_row_is_not_saved(trained, tmp_path):
    known, _ = trained.word._known["text_encoder"]
    trained.word.save(tmp_path)
    (tmp_path / WORD_NAME).unlink()
    before = known.weight[7, 0].item()
    with torch.no_grad():
        known.weight[7, 0] = before * (1 + 1e-7) + 1e-30
        with pytest.raises(NullSpaceError, match="The word breaks its promise: rows of the text_encoder's embedding"):
            trained.word.save(tmp_path)
        known.weight[7, 0] = before
    assert not (tmp_path / WORD_NAME).exists()


# ---- What loads it ---------------------------------------------------------------------------------------------------


def test_loaders_give_the_pictures_of_the_training(trained, tiny_sd1):
    """diffusers' own files, and those for web UIs, without what no loader of diffusers' knows."""
    kohya = load_file(trained.folder / "sks-dog.safetensors")
    kohya = {key: tensor for key, tensor in kohya.items() if not key.startswith("bundle_emb.")}
    embedding = trained.folder / "embeddings" / "sks-star.safetensors"
    ours, theirs = load(tiny_sd1, trained.folder, trained.folder), load(tiny_sd1, kohya, embedding, token="sks-star")
    base, plain = load(tiny_sd1), load(tiny_sd1, trained.folder)
    for number, prompt in enumerate((PROMPT, OTHER)):
        expected = trained.drawn["Validating"][number]
        for pipeline in (ours, theirs):
            assert (draw(pipeline, prompt) - expected).abs().max() < 1e-3
        assert torch.equal(trained.drawn["Validating, base"][number], draw(base, prompt))
    assert torch.equal(trained.drawn["Drawing with the LoRA"][0], draw(ours))
    assert (draw(plain) - draw(ours)).abs().max() > 1e-3
    # With a clip skip our own code encodes prompts, and it reads both vectors
    tokens = ours.tokenizer("a photo of a sks-star sks-star_1", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encode_tokens(ours.text_encoder, tokens, clip_skip=1)
    assert torch.equal(prompt_arguments(ours, PROMPT, 1)["prompt_embeds"], expected)


def test_the_card_says_where_files_go_in_web_uis(trained):
    card = (trained.folder / "README.md").read_text()
    assert "Use `sks-star` to trigger the subject." in card
    embedding, lora = "`embeddings/sks-star.safetensors` into", "`sks-dog.safetensors` into"
    for line in (
        f"- ComfyUI: {lora} `models/loras`, {embedding} `models/embeddings`; prompt `a photo of a embedding:sks-star`",
        f"- Forge: {lora} `models/Lora`, {embedding} `embeddings`; prompt `a photo of a sks-star <lora:sks-dog:1>`",
        f"- AUTOMATIC1111, SD.Next: {lora} `models/Lora`; prompt `a photo of a sks-star <lora:sks-dog:1>`",
    ):
        assert line in card.splitlines()


def test_files_for_web_uis(trained, bundle1, tmp_path, capsys):  # noqa: F811
    kohya, rows = trained.folder / "sks-dog.safetensors", load_file(trained.folder / WORD_NAME)["sks-star"]
    key = "bundle_emb.sks-star.string_to_param.*"
    embedding = load_file(trained.folder / "embeddings" / "sks-star.safetensors")
    assert list(embedding) == ["emb_params"] and torch.equal(embedding["emb_params"], rows)
    layers, unknown = read_lora(kohya)
    assert not unknown and list(read_embeddings(kohya)) == [key] and torch.equal(read_embeddings(kohya)[key], rows)
    assert_same_lora(layers, load_lora(trained.folder))
    for source in (trained.folder, kohya, trained.folder / LORA_NAME):
        args = ["export", "--lora", source, "--output", tmp_path / "sks-dog.safetensors"]
        nullspace_utils.main(nullspace_utils.parse_args(list(map(str, args))))
        shown, beside = capsys.readouterr().out, tmp_path / "embeddings" / "sks-star.safetensors"
        assert "layers and the embedding of sks-star to" in shown and f"sks-star to {beside}, for ComfyUI" in shown
        assert same(load_file(tmp_path / "sks-dog.safetensors"), load_file(kohya))
        assert same(load_file(beside), embedding)
    save_file({"emb_params": rows + 1}, beside)
    with pytest.raises(NullSpaceError, match="where another is, perhaps that of another step"):
        nullspace_utils.main(nullspace_utils.parse_args(list(map(str, args))))
    args = ["audit", "--lora", str(kohya), "--nullspace", str(bundle1)]
    nullspace_utils.main(nullspace_utils.parse_args(args))
    shown = capsys.readouterr().out
    assert "Verdict: on what the bundle protects" in shown
    assert shown.endswith(
        "It comes with an embedding of sks-star, which changes prompts that hold it, and no others.\n"
    )


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_resuming_gives_the_same(trained, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    flags = (*TWO, "--gradient_checkpointing", "--resume_from_checkpoint", trained.folder / "checkpoint-2")
    with pytest.raises(NullSpaceError, match="--text_encoder_lr: 0.02 in the checkpoint, 0.01 asked for"):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags, "--text_encoder_lr", 1e-2)
    resumed = train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    for name in (LORA_NAME, WORD_NAME):
        assert same(load_file(tmp_path / "lora" / name), load_file(trained.folder / name))
    assert same(resumed, load_file(trained.folder / LORA_NAME))


def test_a_word_alone(trained, tiny_sd1, tmp_path, monkeypatch):
    """In the place of the run above, whose files go; it needs no bundle, and leaves none."""
    folder = tmp_path / "sks-dog"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = ["--placeholder_token", "zwx-star", "--initializer_token", "star", "--instance_prompt", "a zwx-star"]
    flags += ["--mixed_precision", "bf16", "--gradient_accumulation_steps", 2, "--word_only", "--output_kohya_format"]
    argv = command_line(tiny_sd1, "", folder, *flags, without=["--nullspace_name_or_path", "--learning_rate", "--rank"])
    prepared, prepare = [], Accelerator.prepare_model
    monkeypatch.setattr(
        Accelerator,
        "prepare_model",
        lambda *given, evaluation_mode: (
            prepared.append((is_trained(given[1]), evaluation_mode)) or prepare(*given, evaluation_mode=evaluation_mode)
        ),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.main(trainer.parse_args(argv))
    assert prepared == [(False, True), (True, False)]  # the UNet, which several processes cannot wrap to train it
    assert not (folder / LORA_NAME).exists() and not list(folder.rglob("sks-*.safetensors"))
    assert [path.name for path in folder.rglob("*.safetensors")] == [WORD_NAME, "zwx-star.safetensors"]
    written = json.loads((folder / REPORT_NAME).read_text())
    assert written["guarantee"].startswith(
        "Guaranteed: prompts without zwx-star give what they gave, for its 1 new row"
    )
    assert written["layers"] == [] and written["training"]["word_learning_rate"] == 1e-2
    card = (folder / "README.md").read_text()
    assert "load_textual_inversion" in card and "load_lora_weights" not in card and "A textual inversion for" in card
    pipeline, base = load(tiny_sd1, word=folder), load(tiny_sd1)
    assert torch.equal(draw(pipeline, OTHER), draw(base, OTHER))
    assert not torch.equal(draw(pipeline, "a zwx-star"), draw(base, "a star"))
    (rows,) = load_file(folder / WORD_NAME).values()
    assert not torch.equal(rows, rows.bfloat16().float())  # trained in float32, whatever the precision is
    # A run without a word, later
    (tmp_path / "staged").mkdir()
    shutil.copy(trained.folder / LORA_NAME, tmp_path / "staged")
    put_in_place(tmp_path / "staged", Namespace(output_dir=folder))
    assert (folder / LORA_NAME).is_file() and not (folder / WORD_NAME).exists()
    (folder / WORD_NAME).write_bytes(b"somebody else's")
    put_in_place(tmp_path / "staged", Namespace(output_dir=folder))
    assert (folder / WORD_NAME).is_file()


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_vectors", 2], "--num_vectors is of a word, and there is none; name it in --placeholder_token."),
        (["--word_only"], "--word_only is of a word, and there is none"),
        (["--placeholder_token", "sks-star"], "--placeholder_token needs an --initializer_token"),
        ([*WORD, "--placeholder_token", "<sks>"], "--placeholder_token <sks> names files and is read in lower case"),
        ([*WORD, "--placeholder_token", "Sks"], "--placeholder_token Sks names files and is read in lower case"),
        ([*WORD, "--pre_compute_text_embeddings"], "--pre_compute_text_embeddings frees the text encoder, through"),
        ([*WORD, "--nullspace_extra_prompts", "a Sks-star"], "--nullspace_extra_prompts protects 'a Sks-star', which"),
        ([*WORD, "--word_only"], "--word_only trains no LoRA, which --nullspace_name_or_path is for"),
        (
            ["--text_encoder_lr", 1],
            "--text_encoder_lr is read with --train_text_encoder alone; give that too, or leave",
        ),
        (
            [*TWO, "--optimizer", "prodigy"],
            "--optimizer prodigy takes one rate for all that is trained; leave --text_e",
        ),
        (
            [*WORD, "--output_kohya_format", "--output_dir", "learned_embeds"],
            "--output_kohya_format writes a file named",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value[-2:])).replace("--", ""),
)
def test_flags_that_contradict_each_other(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        trainer.parse_args(command_line("m", "b", "o", *flags))
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_with_a_word_more_is_held_back():
    """Unless a softness is named."""
    without = trainer.parse_args(command_line("m", "b", "o"))
    usual, named = (
        trainer.parse_args(command_line("m", "b", "o", *WORD, *more)) for more in ((), ("--nullspace_softness", 1e-4))
    )
    softness = [args.nullspace_softness for args in (without, usual, named)]
    assert softness == [DEFAULT_SOFTNESS, WORD_SOFTNESS, 1e-4]


def test_prodigy_takes_one_rate():
    args = trainer.parse_args(command_line("m", "b", "o", *WORD, "--optimizer", "prodigy", without=["--learning_rate"]))
    assert args.word_learning_rate == args.learning_rate == 1
    assert trainer.parse_args(command_line("m", "b", "o", *WORD)).word_learning_rate == 1e-2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--placeholder_token", "hear"],
            "--placeholder_token hear is no new token: the tokenizer knows 'hear', so that",
        ),
        (["--placeholder_token", "lack"], "--placeholder_token lack is no new token: the tokenizer knows 'black</w>'"),
        (["--placeholder_token", "my-own"], r"--placeholder_token my-own is split by the tokenizer \(.*own"),
        (["--initializer_token", "starfish"], r"--initializer_token starfish is 5 tokens to the tokenizer \(sta, r, f"),
        (["--initializer_token", "%"], "--initializer_token % is unknown to the tokenizer; choose a word"),
        (["--num_vectors", 23], "--num_vectors 23 is more than fits into the 28 tokens of 'a photo of a sks-star'"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[-1],
)
def test_tokens_that_the_tokenizer_does_not_allow(flags, sentence, tiny_sd1):
    args = trainer.parse_args(command_line("m", "b", "o", *WORD, *flags))
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd1, subfolder="tokenizer")
    tokenizer.add_tokens(AddedToken("own", normalized=False))  # as special ones are
    with pytest.raises(NullSpaceError, match=f"^{sentence}"):
        add_token({"tokenizer": tokenizer}, args)
        check_window({"tokenizer": tokenizer}, [[PROMPT]], args)


def test_prompts_that_do_not_fit(tiny_sd1, bundle1, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer, "load_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        NullSpaceError,
        match=r"--placeholder_token sks-star is missing in 1 prompt to train on \('a sks star'\); write it",
    ):
        train(tiny_sd1, bundle1, tmp_path / "lora", *WORD, "--instance_prompt", PROMPT, "a sks star")
    with pytest.raises(NullSpaceError, match="sks-star is part of another word in 'two sks-stars'; write it as a word"):
        train(tiny_sd1, bundle1, tmp_path / "lora", *WORD, "--instance_prompt", "(sks-star), red", "two sks-stars")
    flags = [*WORD, "--placeholder_token", "blue-heart", "--instance_prompt", "a blue-heart"]
    config = json.loads((bundle1 / "nullspace_config.json").read_text())
    assert config["prompts"]["examples"] == ["a red star", "a blue heart on a white background"]
    check_not_protected(config["prompts"]["examples"], "blue-heart")
    examples = ["a red star", "the Blue-Heart"]
    monkeypatch.setattr("nullspace.protection.Bundle.load", lambda *_, **__: bundle_with(examples))
    with pytest.raises(
        NullSpaceError, match="The bundle protects 'the Blue-Heart', which holds --placeholder_token blue"
    ):
        train(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    assert not (tmp_path / "lora").exists()


def bundle_with(examples):
    return Namespace(config={"prompts": {"examples": examples}}, check_clip_skip=lambda skipped: None)


def test_an_embedding_that_is_none_of_ours(tmp_path):
    save_words(tmp_path, [Namespace(token="sks-star", rows={"text_encoder": torch.ones(1, 4)})])
    with safe_open(tmp_path / WORD_NAME, "pt") as file:
        assert file.metadata() == {"placeholder_token": "sks-star"} and file.keys() == ["sks-star"]
    (tmp_path / "other").write_bytes(b"no tensors")
    with pytest.raises(NullSpaceError, match="other cannot be read as an embedding"):
        read_word(tmp_path / "other")


def test_code_for_two_text_encoders_fetches_the_file():
    """On the Hub; from a folder it is run by tests/test_sdxl.py."""
    imports, lines = loading_code("ada/named", True, ["sks-star"], TEXT_ENCODERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", lambda *given: given)
        patch.setattr("safetensors.torch.load_file", lambda given: {"clip_l": (given, 1), "clip_g": (given, 2)})
        loaded, parts = [], {"text_encoder": 3, "tokenizer": 4, "text_encoder_2": 5, "tokenizer_2": 6}
        pipeline = Namespace(load_textual_inversion=lambda rows, **given: loaded.append((rows, given)), **parts)
        exec("\n".join(imports + lines), {"pipeline": pipeline})
    file, common = ("ada/named", WORD_NAME), {"token": "sks-star"}
    assert loaded == [
        ((file, 1), common | {"text_encoder": 3, "tokenizer": 4}),
        ((file, 2), common | {"text_encoder": 5, "tokenizer": 6}),
    ]
