"""What the scripts refuse at once: values, folders, prompts and tokenizers."""

import argparse
import errno
import json
import os
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

import build_nullspace
import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace.audit import load_audited_models
from nullspace.bundle import Bundle
from nullspace.checks import (
    Parser,
    check_writable,
    drawing_fault,
    is_number,
    output_folder_fault,
    rank_fault,
    resolution_fault,
)
from nullspace.errors import NullSpaceError
from nullspace.families import stable_diffusion
from nullspace.names import CONFIG_NAME
from nullspace.prompts import Counted, length_warnings, prompt_warnings, read_lines, tokenizer_fault, word_warnings
from nullspace.settling import UNUSED_BY_WORD, WORD_FLAGS, unquoted_prompt
from test_train import INSTANCES, bundle1, command_line  # noqa: F401


LINES = {
    trainer: "--pretrained_model_name_or_path m --nullspace_name_or_path b --instance_data_dir i --instance_prompt p",
    build_nullspace: "--pretrained_model_name_or_path m --prompts_file p",
    nullspace_utils: "audit --lora l --nullspace n",
}


def parsers_of(script, words, monkeypatch):
    """The parser of a script and its subparsers."""
    parsers, parse = [], Parser.parse_known_args
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", lambda self, *a: parsers.append(self) or parse(self, *a))
        script.parse_args(words.split())
    commands = [action.choices for action in parsers[0]._actions if isinstance(action, argparse._SubParsersAction)]
    return [parsers[0], *(parser for choices in commands for parser in choices.values())]


def gives_number(action):
    """Whether a flag is a number, whatever function makes it one."""
    try:
        return is_number(action.default) or (action.type is not None and is_number(action.type("1")))
    except ValueError:
        return False


@pytest.mark.parametrize("script", LINES)
def test_every_number_has_a_range_that_the_help_shows(script, monkeypatch):
    seen = 0
    for parser in parsers_of(script, LINES[script], monkeypatch):
        numeric = [action for action in parser._actions if gives_number(action)]
        shown, again = parser.format_help(), parser.format_help()
        assert shown == again
        entries = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n  (?=-)", shown)[1:]}
        for action in numeric:
            entry, words = entries[action.option_strings[0]], parser.ranges[action.dest]
            assert f"({words}; default" in entry or re.search(rf"\({re.escape(str(words))}\)\.(?= |$)", entry), entry
        seen += len(numeric)
    assert seen


def test_every_flag_of_a_word_or_a_lora_alone_is_known_as_one(monkeypatch):
    (parser,) = parsers_of(trainer, LINES[trainer], monkeypatch)
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    of_word, most = groups["word"], groups["what most trainings name"]
    assert of_word | {"placeholder_token", "initializer_token", "num_vectors"} == {"placeholder_token", *WORD_FLAGS}, (
        "WORD_FLAGS of nullspace/settling.py has the flags of a word"
    )
    of_lora = groups["null space"] | groups["LoRA"] - {"output_kohya_format"} | most & {"max_drift", "learning_rate"}
    assert not of_lora - set(UNUSED_BY_WORD), "add them to UNUSED_BY_WORD of nullspace/settling.py"


@pytest.mark.parametrize("kind", [int, float, lambda text: int(text, 16), Fraction])
def test_numbers_of_any_type_are_held_to_their_range(kind, capsys):
    parser = Parser()
    parser.add_argument("--rank", type=kind, nargs="*")
    assert parser.parse_args(["--rank", "1", "3"]).rank == [1, 3]
    with pytest.raises(SystemExit):
        parser.parse_args(["--rank", "1", "0"])
    assert capsys.readouterr().err == "error: --rank must be at least 1, not 0.\n".replace("0.", f"{kind('0')}.")


def test_help_says_a_range_before_the_default(capsys):
    parser = Parser()
    parser.add_argument("--seed", type=int, default=3, help="Of (arXiv 1) all (default: %(default)s).")
    parser.add_argument("--rank", type=int, help="Of it.")
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    text = " ".join(parser.format_help().split())
    assert "Of (arXiv 1) all (at least 0 and below 4294967296; default: 3)." in text
    assert "Of it (at least 1)." in text and "--repeats" not in text


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "the following arguments are required: command"),
        ("audit --lora l", "the following arguments are required: --nullspace"),
        (
            "audit --lora l --nullspace n --nullspace_threshold 1",
            "--nullspace_threshold must be at least 0 and below 1, ",
        ),
        (
            "audit --lora l --nullspace n --nullspace_threshold nan",
            "--nullspace_threshold must be at least 0 and below",
        ),
        ("audit --lora l --nullspace n --rank 3", "unrecognized arguments: --rank 3"),
        (
            "audit --lora l --nulspace n --nullspace n",
            "unrecognized arguments: --nulspace n; did you mean --nullspace?",
        ),
        ("export --lora l --output x --format y", "argument --format: invalid choice"),
        ("export --lora l --output x", "--output x must end in .safetensors"),
    ],
)
def test_the_commands_refuse_as_the_scripts_do(words, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        nullspace_utils.parse_args(words.split())
    message = capsys.readouterr().err
    assert caught.value.code == 1 and message.startswith(f"error: {sentence}") and message.count("\n") == 1


def test_home_folder_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    words = "export --lora=~/l --output=~/o.safetensors".split()
    assert nullspace_utils.parse_args(words).output == Path("/h/o.safetensors")
    assert str(trainer.parse_args([*LINES[trainer].split(), "--output_dir=~/lora"]).output_dir) == "/h/lora"


@pytest.mark.parametrize("name", ["x" * 256, "loop", "a\0b"])
def test_what_can_be_no_path_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(SystemExit):
        build_nullspace.parse_args([*LINES[build_nullspace].split(), "--output_dir", name])
    assert re.fullmatch(r"error: --output_dir .* no path.*\.\n", capsys.readouterr().err)


def test_unquoted_prompt():
    assert unquoted_prompt("a photo of a sks star".split()).endswith("--instance_prompt 'a photo of a sks star'")
    assert unquoted_prompt(["sks"]) is None and unquoted_prompt(["a sks", "sks"]) is None


def test_output_folder(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in output_folder_fault(tmp_path / "file")
    assert "is or holds" in output_folder_fault(tmp_path, tmp_path)
    assert "is or holds" in output_folder_fault(tmp_path, tmp_path / "pictures")
    assert output_folder_fault(tmp_path / "new", tmp_path / "pictures") is None
    assert "is inside --instance_data_dir" in output_folder_fault(tmp_path / "new", tmp_path)
    assert "is inside --dataset_name" in output_folder_fault(tmp_path / "a" / "b", None, tmp_path)
    assert "is or holds --dataset_name" in output_folder_fault(tmp_path, None, tmp_path)
    assert output_folder_fault(Path("someone/data/lora"), None, "someone/data") is None  # of the Hub


def test_rank():
    shapes = {"a": (8, 64), "b": (64, 6), "c": (64, 64)}
    assert rank_fault(6, shapes) is None
    assert rank_fault(7, shapes) == "--rank 7 is more than b can have, whose weights are 64 x 6; choose at most 6."


def test_what_a_bundle_can_be_drawn_at():
    assert drawing_fault(512, 64) is drawing_fault(2048, 64) is drawing_fault(4096, None) is None
    for resolution, sample_size in ((2056, 64), (516, 64), (8192, None)):
        assert drawing_fault(resolution, sample_size).startswith(f"{resolution} pixels, no multiple of 8 or more than")


def test_resolution():
    assert "try 32" in resolution_fault(36, [1, 1, 1, 1]) and resolution_fault(40, [1, 1, 1, 1]) is None
    assert "multiple of 16" in resolution_fault(40, [1] * 5)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_of_prompt_files(encoding, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red circle\na blue star\n".encode(encoding))
    assert list(read_lines(path)) == ["a red circle\n", "a blue star\n"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"text": "a dog"}\n', "JSON (its columns: text)"),
        ('\n\n{"id": "1"}\n', "JSON (its columns: id)"),
        ('["a dog"]\n', "JSON,"),
        ("prompt,seed\na dog,1\n", "CSV (its columns: prompt, seed)"),
        ("Prompt, Seed\na dog, 1\n", "CSV (its columns: Prompt, Seed)"),
        ("prompt,seed\na dog, sitting,1\n", "CSV (its columns: prompt, seed)"),
        ("prompt;seed\na dog;1\n", "CSV with semicolons (its columns: prompt, seed)"),
        ("seed; prompt; negative prompt\n1; a dog; blurry\n", "CSV with semicolons (its columns: seed, prompt, neg"),
        ('id;words\n1;"a dog; a cat"\n2;a bird\n', "CSV with semicolons (its columns: id, words)"),
        ("prompt|seed\na dog|1\n", "a table with bars (its columns: prompt, seed)"),
        ("prompt\tseed\na dog\t1\n", "a table with tabs (its columns: prompt, seed)"),
        ("a dog\t1\na cat\t2\n", "a table with tabs, not"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_are_no_prompt_files(encoding, text, kind, tmp_path):
    (tmp_path / "prompts.txt").write_text(text, encoding=encoding)
    with pytest.raises(ValueError, match=f"^it is {re.escape(kind)}.*--prompt_column") as caught:
        list(read_lines(tmp_path / "prompts.txt"))
    assert ("with commas as .csv" in str(caught.value)) == ("semicolons" in kind or "bars" in kind)


def test_a_json_string_on_each_line_is_no_prompt_file(tmp_path):
    (tmp_path / "prompts.txt").write_text('"a dog"\n\n"a cat"\n')
    with pytest.raises(ValueError, match="JSON string; take the quotation marks away"):
        list(read_lines(tmp_path / "prompts.txt"))


@pytest.mark.parametrize(
    "lines",
    [
        ["a red star; blue sky"],
        ["a red star; blue sky", "a green ring; night"],
        ["star;moon", "a dog; a cat; a bird"],
        ["dog;cat", "red;blue"],
        ["text, a neon sign", "a dog", "caption, speech bubble, cat"],
        ["a car, 1960", "a man, 1950"],
        ['"Hello" on a wall', '"Guernica"', "a dog"],
        ["a red star | 4k", "a dog"],
        ["\ta dog", "a cat\t"],
        ["text"],
        ["1984", "2001"],
    ],
)
def test_prompts_with_signs_of_tables_are_prompts(lines, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    assert [line.removesuffix("\n") for line in read_lines(tmp_path / "prompts.txt")] == lines


def test_prompt_files_of_other_encodings_say_how_to_convert_them(tmp_path):
    path = tmp_path / "a b.txt"
    path.write_bytes("a dog\na café in Orléansville\r\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"is not UTF-8 \(as Latin-1 it would read 'a café in Orléans'\); save"
    ) as caught:
        list(read_lines(path))
    command = str(caught.value).partition(": ")[2]
    assert command == f"iconv -f windows-1252 -t utf-8 '{path}' > utf8.txt"
    if shutil.which("iconv"):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert list(read_lines(tmp_path / "utf8.txt")) == ["a dog\n", "a café in Orléansville\n"]
    path.write_bytes("a dog\r\nÉtoile\r\n".encode("latin-1"))
    with pytest.raises(ValueError, match="would read 'Étoile'"):
        list(read_lines(path))
    for encoding in ("utf-32", "utf-32-le", "utf-32-be"):
        path.write_bytes("a dog\na cat\n".encode(encoding))
        with pytest.raises(ValueError, match="save it as plain text in UTF-8"):
            list(read_lines(path))


def test_empty_and_repeated_lines_are_counted():
    lines = Counted(["a", "", "a\n", "b", "b"])
    assert len(list(lines)) == 5 and str(lines) == "empty lines passed over: 1, repeated prompts kept: 2"
    assert str(Counted(["a"])) == ""


def test_lines_are_counted_where_reading_is_cut_short(tmp_path):
    (tmp_path / "p").write_text("a\n\na\nb\n\n\n")
    argv, told = f"{LINES[build_nullspace][:-1]}{tmp_path / 'p'} --max_prompts 3".split(), []
    assert len(build_nullspace.read_prompts(build_nullspace.parse_args(argv), told.append)) == 1 + 3
    assert told == [f"{tmp_path / 'p'}: empty lines passed over: 1, repeated prompts kept: 1."]


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


class Letters:
    """A tokenizer that knows words of up to three letters, splits others there, and knows no `?`."""

    unk_token_id, model_max_length = 0, 5

    def __call__(self, text, truncation):
        return {"input_ids": ["<", *self.tokenize(text), ">"]}

    def tokenize(self, text):
        return [token for word in text.split() for token in re.findall(r"<s1>|\w{1,3}|[^\w\s]", word)]

    def convert_tokens_to_ids(self, tokens):
        return [0 if token in ("?", "ß") else 1 for token in tokens]


def test_words_that_are_no_token_are_named_once():
    several, unknown = word_warnings(Letters(), ["a starry, <s1> dog. ß", "Starry in 2024 (the sky)"])
    assert several == "'starry' of --instance_prompt is 2 tokens: ['sta', 'rry']."
    assert unknown == "'ß' of --instance_prompt is unknown to the tokenizer: ['ß']."


def test_prompts_beyond_the_window_are_counted():
    prompts = ["a b c", "a b c d", "a b c d e"]
    assert length_warnings(Letters(), prompts[:1], "x") == []
    assert "ends of 2 of x" in length_warnings(Letters(), prompts, "x")[0]
    assert "ends of 1 of x are not read, for they are longer than 6" in length_warnings(Letters(), prompts, "x", 6)[0]


def test_captions_and_extra_prompts_are_held_to_the_window():
    args = SimpleNamespace(tokenizer_max_length=4, nullspace_extra_prompts=["a b c", "a b c d"])
    assert list(prompt_warnings(Letters(), [["a b c"], ["a b"], ["d e f"]], ["a b"], args)) == [
        "The ends of 2 of the captions are not read, for they are longer than 4 tokens.",
        "The ends of 1 of --nullspace_extra_prompts are not read, for they are longer than 5 tokens.",
    ]


# ---- Runs ------------------------------------------------------------------------------------------------------------


def refusal(script, *argv):
    """Run main() of trainer or builder, which must refuse: its sentence."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    with pytest.raises(NullSpaceError) as caught:
        script.main(script.parse_args([str(word) for word in argv]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def train(model, bundle, output_dir, *flags):
    return [trainer, *command_line(model, bundle, output_dir, *flags)]


def build(model, output_dir, prompts, *flags):
    argv = ["--pretrained_model_name_or_path", model, "--output_dir", output_dir, "--prompts_file", prompts]
    return [build_nullspace, *argv, "--num_inference_steps", 1, *flags]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def nothing_loads(monkeypatch):
    """Loading weights fails, so that what is refused is refused before."""
    monkeypatch.setattr(stable_diffusion, "load_whole", lambda *a, **k: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("script", ["trainer", "builder"])
def test_a_resolution_is_refused_before_loading(script, tiny_sd1, bundle1, prompts, tmp_path, nothing_loads):
    flags = ("--resolution", 36)
    argv = (
        train(tiny_sd1, bundle1, tmp_path / "o", *flags)
        if script == "trainer"
        else build(tiny_sd1, tmp_path / "o", prompts, *flags)
    )
    assert refusal(*argv) == "--resolution 36 is no multiple of 8, as this model's VAE needs; try 32."
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("script", ["trainer", "builder"])
def test_a_tokenizer_without_vocabulary_is_refused_before_loading(
    script, tiny_sd1, bundle1, prompts, tmp_path, nothing_loads
):
    model = shutil.copytree(tiny_sd1, tmp_path / "model")
    (model / "tokenizer" / "tokenizer.json").unlink()
    argv = train(model, bundle1, tmp_path / "o") if script == "trainer" else build(model, tmp_path / "o", prompts)
    sentence = refusal(*argv)
    assert sentence.startswith(f"The tokenizer of {model} knows only 2 tokens") and not (tmp_path / "o").exists()


def test_an_output_folder_that_is_a_file(tiny_sd1, bundle1, prompts, tmp_path):
    (tmp_path / "o").write_text("kept")
    wanted = f"--output_dir {tmp_path / 'o'} is a file; choose a folder."
    assert refusal(*train(tiny_sd1, bundle1, tmp_path / "o")) == wanted
    assert "is a file; choose a folder" in refusal(*build(tiny_sd1, tmp_path / "o", prompts))
    assert (tmp_path / "o").read_text() == "kept"


def test_an_output_folder_with_a_folder_for_a_file(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    (tmp_path / "o" / "comparison.png").mkdir(parents=True)
    with pytest.raises(NullSpaceError, match="comparison.png is a folder, where a file is to be written; rename it"):
        trainer.check_output(trainer.parse_args(command_line(tiny_sd1, bundle1, tmp_path / "o")))


def test_an_output_folder_that_is_the_instance_folder(tiny_sd1, bundle1, prompts, tmp_path):
    pictures = shutil.copytree(INSTANCES, tmp_path / "pictures")
    before = sorted(tmp_path.rglob("*"))
    for folder in (pictures, tmp_path):
        argv = train(tiny_sd1, bundle1, folder, "--instance_data_dir", pictures)
        assert refusal(*argv).startswith(f"--output_dir {folder} is or holds --instance_data_dir {pictures}")
    assert "holds something that is not a bundle" in refusal(*build(tiny_sd1, pictures, prompts))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_inside_the_pictures(tiny_sd1, bundle1, tmp_path, nothing_loads):
    pictures = shutil.copytree(INSTANCES, tmp_path / "pictures")
    before = sorted(tmp_path.rglob("*"))
    argv = train(tiny_sd1, bundle1, pictures / "out" / "lora", "--instance_data_dir", pictures)
    assert refusal(*argv).startswith(f"--output_dir {pictures}/out/lora is inside --instance_data_dir {pictures}, so")
    flags = ("--dataset_name", pictures, "--cache_dir", tmp_path / "cache")
    argv = command_line(tiny_sd1, bundle1, pictures / "lora", *flags, without=["--instance_data_dir"])
    assert refusal(trainer, *argv).startswith(f"--output_dir {pictures}/lora is inside --dataset_name {pictures}, so")
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in str(path)) == before


def test_a_rank_above_a_layers_size_is_refused_before_the_training(tiny_sd1, bundle1, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "add_lora", lambda *args: pytest.fail("a LoRA was added"))
    sentence = refusal(*train(tiny_sd1, bundle1, tmp_path / "o", "--rank", 1000000))
    assert re.fullmatch(
        r"--rank 1000000 is more than \S+attn2\.to_\S+ can have, whose weights are 16 x \d+; choose at most 16\.",
        sentence,
    )
    assert not (tmp_path / "o").exists()


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c")
    check_writable(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(NullSpaceError, match="File name too long"):
        check_writable(tmp_path / ("a" * 300) / "b")


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_folder_that_cannot_be_written(exists, tiny_sd1, bundle1, prompts, tmp_path, monkeypatch):
    """As on a read-only file system, for permissions do not hold root back."""
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.is_relative_to(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(self, *args, **kwargs)

    if exists:
        (tmp_path / "o").mkdir()
    monkeypatch.setattr(Path, "mkdir", refuse)
    for argv in (train(tiny_sd1, bundle1, tmp_path / "o"), build(tiny_sd1, tmp_path / "o", prompts)):
        sentence = refusal(*argv)
        assert f"{tmp_path / 'o'} cannot be written (Read-only file system); choose another" in sentence


def test_an_output_folder_below_a_file(tiny_sd1, bundle1, prompts, tmp_path):
    for argv in (train(tiny_sd1, bundle1, prompts / "o"), build(tiny_sd1, prompts / "o", prompts)):
        assert "prompts.txt/o cannot be written (Not a directory); choose another" in refusal(*argv)


def test_a_bundle_is_not_built_on_a_mount_point(tiny_sd1, prompts, tmp_path, monkeypatch):
    (tmp_path / "o").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "o")
    assert refusal(*build(tiny_sd1, tmp_path / "o", prompts)) == (
        f"--output_dir {tmp_path / 'o'} is a mount point, which is never renamed; choose a folder in it."
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_prompts_file_of_other_encodings_is_built_from(encoding, tiny_sd1, prompts, tmp_path):
    prompts.write_bytes("a red star\r\na blue ring\r\n".encode(encoding))
    script, *argv = build(tiny_sd1, tmp_path / "o", prompts)
    script.main(script.parse_args([str(word) for word in argv]))
    config = json.loads((tmp_path / "o" / CONFIG_NAME).read_text())
    assert config["prompts"]["examples"] == ["a red star", "a blue ring"]


@pytest.mark.parametrize(
    "name, text, kind",
    [
        ("p.csv", "caption\na dog\n", "CSV (its columns: caption)"),
        ("p.jsonl", '{"text": "a dog"}\n', "JSON (its columns: text)"),
        ("p.txt", "prompt;seed\na dog;1\n", "CSV with semicolons (its columns: prompt, seed)"),
    ],
)
def test_a_table_is_refused_as_prompts_file(name, text, kind, tiny_sd1, tmp_path, nothing_loads):
    (tmp_path / name).write_text(text)
    sentence = refusal(*build(tiny_sd1, tmp_path / "o", tmp_path / name))
    assert sentence.startswith(f"--prompts_file {tmp_path / name} cannot be read: it is {kind}, not a prompt on each")
    assert "--prompt_column" in sentence


def test_a_prompts_file_in_latin_1_is_refused(tiny_sd1, tmp_path, nothing_loads):
    (tmp_path / "p.txt").write_bytes(b"a dog\n" * 9000 + "a café\n".encode("latin-1"))
    sentence = refusal(*build(tiny_sd1, tmp_path / "o", tmp_path / "p.txt"))
    assert sentence.startswith(f"--prompts_file {tmp_path / 'p.txt'} cannot be read: it is not UTF-8 (as Latin-1 it")
    assert "'a café'); save it as plain text in UTF-8, or convert it: iconv" in sentence


PARTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@pytest.mark.parametrize("part", PARTS)
def test_files_that_lack_weights_are_refused(part, tiny_sd1, bundle1, prompts, tmp_path):
    model = shutil.copytree(tiny_sd1, tmp_path / "model")
    path = model / part / f"{PARTS[part]}.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[-1]
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    wanted = f"The base model {model} cannot be loaded (the file of its {part} lacks the weights {lost}): check its"
    for argv in (train(model, bundle1, tmp_path / "o"), build(model, tmp_path / "o", prompts)):
        assert refusal(*argv).startswith(wanted)
    assert not (tmp_path / "o").exists()
    if part != "vae":  # which the audit does not load
        with pytest.raises(NullSpaceError, match=re.escape(f"its {part} lacks the weights {lost}")):
            load_audited_models(Bundle.load(bundle1), True, name_or_path=model)


@pytest.mark.parametrize(("name", "what"), [("nullspace_config.json", "a bundle"), ("model_index.json", "a model")])
def test_a_lora_is_not_written_over_what_is_no_lora(name, what, tmp_path):
    (tmp_path / name).write_text("{}")
    assert f"holds {what}" in output_folder_fault(tmp_path)


@pytest.mark.parametrize("prompts", [[""], ["a sks star", "  "]])
def test_an_empty_prompt_is_refused(prompts):
    assert "--instance_prompt is empty" in unquoted_prompt(prompts)
