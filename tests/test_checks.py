"""What the scripts refuse at once: values, folders, prompts and tokenizers."""

import pytest

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace.checks import RANGES, Parser, output_folder_fault, resolution_fault, unquoted_prompt
from nullspace.prompts import counted, read_lines, tokenizer_fault, word_warnings


LINES = {
    trainer: "--pretrained_model_name_or_path m --nullspace_name_or_path b --instance_data_dir i --instance_prompt p",
    build_nullspace: "--pretrained_model_name_or_path m --prompts_file p",
}


@pytest.mark.parametrize("script", LINES)
def test_every_number_has_a_range(script, monkeypatch):
    parsers, parse = [], Parser.parse_known_args
    monkeypatch.setattr(Parser, "parse_known_args", lambda self, *a: parsers.append(self) or parse(self, *a))
    script.parse_args(LINES[script].split())
    numeric = [action.dest for action in parsers[0]._actions if action.type in (int, float)]
    assert numeric and not [name for name in numeric if name not in RANGES]


@pytest.mark.parametrize(
    "flags", ["--rank 0", "--learning_rate nan", "--learning_rate inf", "--adam_beta1 1", "--max_grad_norm -1",
              "--nullspace_timestep_range 500 100", "--nullspace_timestep_range 0 1000", "--seed -1",
              "--nullspace_softness 0.01", "--nullspace_softness nan", "--lr_warmup_steps -1"]
)  # fmt: skip
def test_values_are_refused_by_name(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.parse_args((LINES[trainer] + " " + flags).split())
    message = capsys.readouterr().err
    assert caught.value.code == 1 and message.startswith(f"error: {flags.split()[0]} ") and message.count("\n") == 1


def test_home_folder_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert str(trainer.parse_args([*LINES[trainer].split(), "--output_dir=~/lora"]).output_dir) == "/h/lora"


def test_unquoted_prompt():
    assert unquoted_prompt("a photo of a sks star".split()).endswith("--instance_prompt 'a photo of a sks star'")
    assert unquoted_prompt(["sks"]) is None and unquoted_prompt(["a sks", "sks"]) is None


def test_output_folder(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in output_folder_fault(tmp_path / "file")
    assert "is or holds" in output_folder_fault(tmp_path, tmp_path)
    assert "is or holds" in output_folder_fault(tmp_path, tmp_path / "pictures")
    assert output_folder_fault(tmp_path / "new", tmp_path) is None


def test_resolution():
    assert "try 32" in resolution_fault(36, [1, 1, 1, 1]) and resolution_fault(40, [1, 1, 1, 1]) is None
    assert "multiple of 16" in resolution_fault(40, [1] * 5)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_of_prompt_files(encoding, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red circle\na blue star\n".encode(encoding))
    assert list(read_lines(path)) == ["a red circle\n", "a blue star\n"]


@pytest.mark.parametrize("text", ['{"text": "a dog"}\n', "prompt,seed\na dog,1\n", '["a dog"]\n'])
def test_tables_are_no_prompt_files(text, tmp_path):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(ValueError, match="--prompt_column"):
        list(read_lines(tmp_path / "prompts.txt"))


def test_empty_and_repeated_lines_are_counted(capsys):
    assert len(list(counted(["a", "", "a", "b"], "here"))) == 4
    assert "1 empty lines passed over, 1 repeated prompts" in capsys.readouterr().err


def test_tokenizer_without_vocabulary():
    class Tokenizer:
        model_max_length, pad_token, eos_token, all_special_ids = 10**30, None, "</s>", [0, 1]

        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

    assert "knows only 2 tokens" in tokenizer_fault(Tokenizer(2), "m")
    whole = Tokenizer(49408)
    assert tokenizer_fault(whole, "m") is None and (whole.model_max_length, whole.pad_token) == (77, "</s>")


def test_words_of_several_tokens_are_named():
    class Tokenizer:
        unk_token_id = 0

        def tokenize(self, word):
            return [word] if len(word) < 4 else [word[:3], word[3:]]

        def convert_tokens_to_ids(self, tokens):
            return [0 if token == "???" else 1 for token in tokens]

    several, unknown = word_warnings(Tokenizer(), ["a starry ???"])
    assert "['sta', 'rry']" in several and "unknown" in unknown
