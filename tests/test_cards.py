"""The cards of LoRA and bundle mean what was typed, whatever prompts and names hold."""

import ast
import re
import shlex

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

import train_dreambooth_nullspace as trainer
from nullspace import model_card
from nullspace.bundle import Bundle
from nullspace.markdown import code_block, code_span, csv_cell, link, one_line, plain, python_string, table_cell, utf8
from nullspace.models import download_model
from nullspace.publishing import name_repository
from nullspace.terminal import printable
from test_train import INSTANCES, bundle1, make_bundle, report, train  # noqa: F401


NASTY = [
    'a photo of a "sks" star',
    "it's a sks star",
    "back\\slash \\n and a last one\\",
    "two\nlines\r\n---\n# no heading",
    "{braces} {0} %s ${HOME} $x^2$",
    "`ticks` and ```\nfences",
    "*bold* _lean_ [link](http://x) <b>html</b> | bar \\| bar ~~no~~",
    "key: value # no comment",
    "- item",
    "1e3",
    "null",
    "'''",
    '"""',
    "`",
    "\u2028\x85\tünïcode 星",
    "two\nlines\n---\ntags: [mine]\n---\n# no heading",
    "\x1b[2J\x1b]0;title\x07 and back\x08\x7f",
    "\u202e turned \u2066around\u2069",
    "<script>alert(1)</script> <img src=x onerror=y> &lt;",
    "[![x](http://x)](javascript:y) http://x.y <http://x>",
]


@pytest.mark.parametrize("text", NASTY)
def test_python_strings_are_read_back(text):
    literal = python_string(text)
    assert ast.literal_eval(literal) == text and len(literal.split("\n")) == 1


@pytest.mark.parametrize("text", NASTY)
def test_markdown_shows_the_text(text):
    """As the parser that GitHub's readers agree with renders it, in a line, in a cell and as a heading."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    shown = [re.sub(r"<\w+>|</\w+>", "", part) for part in (
        markdown.render(f"Use {code_span(text)} here."),
        markdown.render(f"# {plain(text)}"),
        markdown.render(f"| {table_cell(code_span(text))} | second |\n|---|---|\n").split("\n")[3],
    )]  # fmt: skip
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert [one_line(part) for part in shown] == [f"Use {escaped} here.", escaped, escaped]


@pytest.mark.parametrize("text", NASTY)
def test_a_link_shows_the_text_and_leads_to_the_address(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    (inline,) = [token for token in markdown.parse(f"A {link(text, 'https://x/' + text)} b") if token.type == "inline"]
    before, opening, *shown, closing, after = inline.children
    assert (before.content, opening.type, closing.type, after.content) == ("A ", "link_open", "link_close", " b")
    assert opening.attrs["href"].startswith("https://x/")
    assert "".join(token.content for token in shown) == one_line(text)
    assert {token.type for token in shown} <= {"text", "text_special"}


@pytest.mark.parametrize("text", NASTY)
def test_nothing_that_is_shown_moves_a_cursor_or_turns_the_text(text):
    for shown in (plain(text), code_span(text), python_string(text), csv_cell(text), printable(text)):
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", shown), shown


def test_a_cell_of_the_table_is_no_formula(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    for text in ("=HYPERLINK(1)", "+1", "-1", "@x", "\t=1", "\r=1"):
        assert not csv_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert csv_cell("plain.text") == "plain.text" and csv_cell(-1) == -1
    bundle = Bundle.load(bundle1)
    module = next(iter(bundle.config["modules"]))
    bundle.config["modules"]["=HYPERLINK(\x1b)"] = bundle.config["modules"].pop(module)
    bundle._write_table(tmp_path / "modules.csv")
    text = (tmp_path / "modules.csv").read_text()
    assert "'=HYPERLINK(\\x1b)," in text and "\n=" not in text and "\x1b" not in text


@pytest.mark.parametrize("text", NASTY)
def test_code_blocks_end_where_the_code_does(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt()
    command = shlex.join(["python", "x.py", "--prompts_file", text])
    block, after = markdown.parse(f"{code_block('bash', command)}\n\nafter")[:2]
    assert block.type == "fence" and shlex.split(block.content) == shlex.split(command.replace("\r\n", "\n"))
    assert after.type == "paragraph_open"


def test_what_is_no_unicode_can_be_written():
    assert utf8("caf\udce9") == "caf?"


def card_of(bundle, folder, prompt, monkeypatch):
    """The model card of a run with this prompt, without the training."""
    argv = ["--pretrained_model_name_or_path", str(folder), "--nullspace_name_or_path", str(folder)]
    argv += ["--instance_data_dir", str(INSTANCES), "--instance_prompt", prompt, "a second prompt"]
    args = trainer.parse_args([*argv, "--output_dir", str(folder), "--max_train_steps", "3"])
    args.model_type, args.guidance_scale, args.compare_with_base = "sd", 7.5, True
    args.base_model = download_model(folder)
    values = {"max": 1e-7, "mean": 1e-8}
    found = {
        "guarantee": "Guaranteed.",
        "leakage": values,
        "predicted_drift": values,
        "layers": [{}],
        "unprotected": [],
    }
    monkeypatch.setattr(model_card, "save_picture", lambda *_: None)
    model_card.write_model_card(bundle, found, [prompt], [None], args)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", NASTY)
def test_a_card_is_right_whatever_the_prompt_holds(prompt, bundle1, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / 'a "lora" `of` {mine} \\ *it*'
    folder.mkdir()
    text = card_of(Bundle.load(bundle1), folder, prompt, monkeypatch)
    (code,) = re.findall(r"^```py\n(.*?)^```$", text, re.S | re.M)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    literals = [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    assert sorted(literals) == sorted([prompt, str(folder), str(folder), "cuda"])
    data = ModelCard(text).data
    assert (data.instance_prompt, data.widget[0]["text"]) == (prompt, prompt)
    assert f"Use {code_span(prompt)} or `a second prompt` to trigger" in text
    assert f"# {plain(folder.name)}\n" in text


@pytest.mark.parametrize("word", [(), ("--placeholder_token", "sks-star", "--initializer_token", "star")])
def test_the_code_of_a_card_runs(word, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    """It draws what the trainer's prompt says, on this device and in its precision."""
    prompt = 'a "sks-star"\\ {of}\n```\nours'
    output = tmp_path / 'the "lora"'
    train(tiny_sd1, bundle1, output, *word, "--instance_prompt", prompt, without=("--instance_prompt",))
    (code,) = re.findall(r"^```py\n(.*?)^```$", (output / "README.md").read_text(), re.S | re.M)
    names = {}
    exec(code.replace("float16", "float32").replace('.to("cuda")', ""), names)
    assert names["image"].size == (32, 32)
    layers = sum(hasattr(module, "lora_A") for module in names["pipeline"].unet.modules())
    assert layers == len(report(output)["layers"]) and ("sks-star" in names["pipeline"].tokenizer.get_vocab()) == any(
        word
    )
    assert report(output)["training"]["instance_prompt"] == [prompt]


def test_a_bundles_card_is_right_whatever_its_names_hold(tiny_sd1, tmp_path):
    model = tmp_path / "a 'model' `of` | {mine} *it*"
    model.symlink_to(tiny_sd1)
    prompts = tmp_path / "pro`mpts |'\" $HOME.txt"
    prompts.write_text("".join(f"{one_line(prompt)}\n" for prompt in NASTY))
    bundle = make_bundle(model, tmp_path / "bundle", "--prompts_file", prompts)
    text = (bundle / "README.md").read_text(encoding="utf-8")
    assert DatasetCard(text).data.pretty_name == f"Null-space bundle of {model.name}"
    assert yaml.safe_load(text.split("---\n")[1])["configs"][0]["data_files"] == "modules.csv"
    assert f"# Null-space bundle of {plain(model.name)}\n" in text and code_span(prompts.name) in text
    blocks = re.findall(r"^(```+)bash\n(.*?)^\1$", text, re.S | re.M)
    words = [shlex.split(code.replace("\\\n", " ")) for _, code in blocks]
    assert words[0][words[0].index("--pretrained_model_name_or_path") + 1] == str(model)
    assert words[1] == shlex.split(Bundle.load(bundle).config["command"])
    assert f"| base model | {table_cell(code_span(model))} |" in text
    name_repository("ada/bundle", bundle)
    assert "--nullspace_name_or_path ada/bundle \\\n" in (bundle / "README.md").read_text(encoding="utf-8")
