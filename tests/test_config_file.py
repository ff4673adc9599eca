"""--config: flags from a file, and the file that a run leaves."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace.names import FLAGS_NAME, LORA_NAME
from test_train import bundle1, train  # noqa: F401 (a fixture)


MODEL = "--pretrained_model_name_or_path m"


def parse(*words, script=trainer):
    return script.parse_args([str(word) for word in words])


def test_what_a_run_was_told_can_be_passed_back(tmp_path):
    told = parse(
        *"--pretrained_model_name_or_path m --instance_data_dir d --learning_rate 3e-5 --background #102030".split(),
        *"--nullspace_softness inf --no-compare_with_base --random_flip --lr_warmup_steps 0 --seed 0".split(),
        *"--mixed_precision no --hub_token hf_secret --resume_from_checkpoint latest".split(),
        *("--instance_prompt", "a photo of a sks dog", "a sks dog"),
        *("--nullspace_extra_prompts", 'ünï: a "word"', "no", "1e-4"),
    )
    assert "hf_secret" not in told.config and "latest" not in told.config
    path = tmp_path / "config.yaml"
    path.write_text(told.config, encoding="utf-8")
    again = parse("--config", path)
    told.hub_token = told.resume_from_checkpoint = None
    assert vars(again) == vars(told)
    # The command line comes first, whatever a flag makes of being given twice
    other = parse("--config", path, "--nullspace_extra_prompts", "a cat", "--rank=8", "--compare_with_base")
    assert (other.nullspace_extra_prompts, other.rank, other.compare_with_base) == (["a cat"], 8, True)
    assert other.instance_prompt == told.instance_prompt
    # A file has no shell that knows the home folder
    path.write_text(told.config + "base_lora: [~/loras/a, ada/b]\nlogging_dir: ~/logs\n")
    assert parse("--config", path).base_lora == [str(Path.home() / "loras/a"), "ada/b"]
    assert Path(parse("--config", path).logging_dir) == Path.home() / "logs"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat: 1e-4", "has 'learning_rat', which is no flag; did you mean learning_rate?"),
        ("prior_loss_weight: 1", "has 'prior_loss_weight', which is no flag"),
        ("random_flip: 1", "has 'random_flip', which is either true or false"),
        ("rank: [4, 8]", "has 'rank', which takes one value, not a list."),
        ("rank: {a: 1}", "has 'rank' with more in it than a value can be"),
        ("rank: 0", "--rank must be at least 1, not 0."),
        ("- rank", "has no flags"),
        ("rank: [", "cannot be read as YAML"),
    ],
)
def test_files_that_are_refused(text, sentence, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse("--config", path, *MODEL.split(), "--instance_data_dir", "d")
    error = capsys.readouterr().err
    assert caught.value.code == 1 and sentence in error and error.count("\n") == 1
    path.unlink()
    with pytest.raises(SystemExit):
        parse("--config", path, script=build_nullspace)
    assert capsys.readouterr().err == f"error: --config {path} is not there; check its name.\n"


def test_a_result_has_its_flags_beside_it_and_says_how_it_is_used(tiny_sd1, bundle1, tmp_path, capsys, caplog):  # noqa: F811
    caplog.set_level("INFO")
    train(tiny_sd1, bundle1, tmp_path / "lora", "--max_train_steps", 2, "--learning_rate", 2e-3)
    again = parse("--config", tmp_path / "lora" / FLAGS_NAME)
    assert (again.max_train_steps, again.learning_rate, again.output_dir) == (2, 2e-3, tmp_path / "lora")
    assert Path(again.nullspace_name_or_path) == bundle1
    told = capsys.readouterr().out.rstrip().partition("To use it:\n\n")[2].splitlines()
    assert told == [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{tiny_sd1}", torch_dtype=torch.float32).to("cpu")',
        f'pipeline.load_lora_weights("{tmp_path / "lora"}")',
        'image = pipeline("a photo of a sks star").images[0]',
    ]
    place = {}
    exec("\n".join(told), place)
    assert place["image"].width == 32
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "lora" / LORA_NAME).values())
    assert f"accumulated: {count:,} trained parameters" in caplog.text
