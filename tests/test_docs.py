"""The pages mean what they say: commands and code run, links lead somewhere, figures and defaults are the code's."""

import ast
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from original_names import save_single_file
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from test_lcm import tiny_lcm  # noqa: F401
from test_sdxl import tiny_xl  # noqa: F401

import build_nullspace
import nullspace_utils
import train_dreambooth_nullspace as trainer
from nullspace import finding, settling
from nullspace.names import LORA_NAME, WORD_NAME
from nullspace.report import LEAKAGE_BOUNDS
from test_train import drawing_in_two_steps  # noqa: F401


DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", *DOCS]
TOLD = [path for path in PAGES if re.search(r"^```(bash|py)$", path.read_text(), re.M)]  # what a reader is to type
DOORS = {
    "train_dreambooth_nullspace.py": trainer,
    "build_nullspace.py": build_nullspace,
    "nullspace_utils.py": nullspace_utils,
}
# What makes a command quick and keeps it in its folder; what is given last counts.
QUICK = {
    "train_dreambooth_nullspace.py": "--max_train_steps 2 --resolution 32 --mixed_precision no --checkpointing_steps 1 "
    "--num_validation_images 1 --report_to none --nullspace_cache_dir cache",
    "build_nullspace.py": "--num_inference_steps 2 --mixed_precision no",
    "find": "--nullspace_cache_dir cache",
    "cache": "--nullspace_cache_dir cache",
    "verify": "--prompts 2",
}
FOREIGN = {"--num_processes", "--with", "train_dreambooth_lora.py"}  # of accelerate, uv and diffusers


def named(path):
    return str(path.relative_to(ROOT))


def blocks(path, languages):
    """The fenced blocks of a page, in order: a list of (language, text)."""
    return [
        found for found in re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.S | re.M) if found[0] in languages
    ]


def commands(text):
    """The commands of a shell block, each a list of words; comments are dropped."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def prose(path):
    """A page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", path.read_text(), flags=re.S | re.M)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("|") else []


def tables(text):
    """The tables of a text: lists of rows, the header first, each a list of cells."""
    found = re.findall(r"^\|.*\n\|[-:| ]+\|\n(?:\|.*\n)+", text, re.M)
    return [[cells(line) for number, line in enumerate(table.splitlines()) if number != 1] for table in found]


# ---- What is typed ---------------------------------------------------------------------------------------------------


def script_of(words):
    """The script that a command runs, and its flags; None for another program's command."""
    launcher = next((known for known in (["accelerate", "launch"], ["python"]) if words[: len(known)] == known), None)
    return (words[len(launcher)], words[len(launcher) + 1 :]) if launcher else (None, words)


def run(script, flags, quick=None):
    """Run a door in this process as a user does in a shell, with the flags that make it quick."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # what accelerate shares within a process must not leak from one run to the next
    door, quick = DOORS[script], quick or QUICK.get(script, QUICK.get(flags[0], ""))
    sys.argv = [script, *flags]  # the builder records its command
    door.main(door.parse_args([*flags, *quick.split()]))


@pytest.fixture(scope="module")
def translated(tiny_sd1, tiny_xl, tiny_lcm):  # noqa: F811
    """What a page's names stand for here: a function of text."""
    names = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_sd1,
        "stabilityai/stable-diffusion-xl-base-1.0": tiny_xl,
        "SimianLuo/LCM_Dreamshaper_v7": tiny_lcm,
        "latent-consistency/lcm-lora-sdv1-5": "sks-dog",  # any LoRA of that model
        "<your-username>/": "",
        "--initializer_token dog": "--initializer_token star",  # words of the tiny model
        "--initializer_token cat": "--initializer_token heart",
        "torch.float16": "torch.float32",
        '"cuda"': '"cpu"',
        'bucket").images': 'bucket", num_inference_steps=2).images',
    }

    def translate(text):
        for name, here in names.items():
            text = text.replace(name, str(here))
        return text

    return translate


@pytest.fixture(scope="module")
def desk(tiny_sd1, tiny_lcm, translated, tmp_path_factory):  # noqa: F811
    """A folder with what pages take for granted: pictures, prompts, two bundles, two LoRAs and a model in one file."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.linear_gradient("L").resize((48, 64)).convert("RGB").save(folder / "pictures" / f"{number}.png")
    (folder / "prompts.txt").write_text("a red star\na blue heart on a white background\n")
    (folder / "animals.txt").write_text("a large ring\n")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    save_single_file(pipeline, folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [])  # and what `run` puts there goes again
        patch.setattr(finding, "PROMPTS", 3)
        for name, prompts in {"nullspace-sd15": "prompts.txt", "nullspace-animals": "animals.txt"}.items():
            flags = ["--pretrained_model_name_or_path", str(tiny_sd1), "--prompts_file", prompts, "--output_dir", name]
            run("build_nullspace.py", flags)
        trained = [words for _, text in blocks(ROOT / "README.md", ["bash"]) for words in commands(translated(text))]
        for words in trained:
            script, flags = script_of(words)
            if script and "sdxl" not in str(flags) and str(tiny_xl) not in flags:
                run(script, flags)
        checkpoint = folder / "sks-dog" / "checkpoint-500"  # after whose steps these trainings have long been over
        checkpoint.mkdir()
        for name in (LORA_NAME, WORD_NAME):
            shutil.copy(folder / "sks-dog" / name, checkpoint)
        (folder / "plain-dog").mkdir()  # has no word
        shutil.copy(folder / "sks-dog" / LORA_NAME, folder / "plain-dog")
    return folder


@pytest.mark.parametrize("path", TOLD, ids=named)
def test_what_a_page_tells_to_type_does_its_work(path, desk, translated, tiny_sd1, tmp_path, monkeypatch):
    shutil.copytree(desk, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setattr(finding, "PROMPTS", 3)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    for language, text in blocks(path, ["bash", "py"]):
        if language == "py":
            run_python(translated(text), tiny_sd1)
            continue
        for words, here in zip(commands(text), commands(translated(text)), strict=True):
            script, flags = script_of(words)
            if script is None:
                assert words[0] == "make" and set(words[1:]) <= set(targets), words
                continue
            monkeypatch.setattr(sys, "argv", [script, *flags])
            DOORS[script].parse_args(flags)  # as it is written, with the values that it has
            if "--push_to_hub" not in flags:  # for which tests/test_hub.py has a Hub
                run(*script_of(here))


def run_python(text, model):
    """Run a block as if it stood in a reader's training; what it draws must be a picture, what it saves a LoRA."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=r".*\.attn2\.to_k"))
    optimizer = torch.optim.AdamW([each for each in unet.parameters() if each.requires_grad])
    space = {"unet": unet, "optimizer": optimizer}
    exec(text, space)
    if ".save(" in text:
        assert load_file(Path("lora") / LORA_NAME)
    else:
        assert space["image"].size == (32, 32)


# ---- The notebook ----------------------------------------------------------------------------------------------------


def code_cells():
    """The code cells of the notebook, each a text."""
    notebook = json.loads((ROOT / "docs/nullspace.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # what they gave on some machine is not kept
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(text, space, quick):
    """Run a cell as IPython does: lines of Python, or one of its commands."""
    if text.startswith("%pip install"):
        assert (ROOT / text.split()[-1]).is_file()
    elif text.startswith("!{sys.executable} -m accelerate.commands.launch "):
        text = re.sub(r"\{(.+?)\}", lambda found: str(eval(found[1], space)), text.replace("\\\n", " "))
        _, _, _, script, *flags = shlex.split(text)
        run(script, flags, quick)
    else:
        exec(text, space)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """On the demo's model, in few steps, as it is opened in its folder."""
    shown = []
    space = {"display": shown.append}  # IPython's own
    monkeypatch.setattr(finding, "PROMPTS", 3)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(ROOT / "docs")
    settings, *others = code_cells()
    exec(settings, space)
    names = {name for name in space if name.isupper()}
    space |= {"STEPS": 2, "OUTPUT": str(tmp_path / "sks-star")}
    for text in others:
        assert not {name for name in names if re.search(rf"^{name} =", text, re.M)}  # one cell is to be changed
        run_cell(text, space, f"--report_to none --nullspace_cache_dir {tmp_path / 'cache'}")
    assert all(re.search(rf"\b{name}\b", "\n".join(others)) for name in names)
    assert [picture.size for picture in shown[:5]] == [(256, 256)] * 5
    sheet, drawn = shown[5:]
    assert drawn.size == (64, 64) and sheet.width > 2 * 64
    assert space["report"]["leakage"]["max"] < 1e-5
    for name in ("sks-star", "embeddings/sks-star"):
        assert (tmp_path / "sks-star" / f"{name}.safetensors").is_file()


# ---- What is named ---------------------------------------------------------------------------------------------------


def helps(capsys):
    """The help of all doors and commands."""
    lines = [["train_dreambooth_nullspace.py"], ["build_nullspace.py"]]
    lines += [
        ["nullspace_utils.py", name] for name in "audit export merge merge-loras verify repair find cache".split()
    ]
    for script, *command in lines:
        with pytest.raises(SystemExit):
            DOORS[script].parse_args([*command, "--help"])
    return capsys.readouterr().out


def known_flags(capsys):
    """Every flag in the help of doors and commands, and of benchmarks and demo by their code."""
    code = [path.read_text() for folder in ("benchmarks", "demo") for path in (ROOT / folder).glob("*.py")]
    return {*re.findall(r"--\w[\w-]*", helps(capsys)), *re.findall(r'"(--\w+)"', "\n".join(code))}


def test_flags_and_scripts_in_the_text_are_there(capsys):
    known = known_flags(capsys)
    for path in PAGES:
        text = prose(path)
        if path.name == "migrating.md":  # the first column is of others
            text = "\n".join(" | ".join(cells(line)[1:]) if cells(line) else line for line in text.splitlines())
        for code in re.findall(r"`([^`\n]+)`", text):
            unknown = set(re.findall(r"--[a-z]\w*", code)) - known - FOREIGN
            assert not unknown, f"{named(path)}: {unknown} in `{code}`"
            for script in set(re.findall(r"\S+\.py\b", code)) - FOREIGN:
                places = [ROOT / script, *(ROOT / folder / script for folder in ("benchmarks", "tests"))]
                assert any(place.is_file() for place in places), f"{named(path)}: {script}"


def test_every_flag_is_on_a_page(capsys):
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *DOCS))
    flags = set(re.findall(r"^  (--[a-z]\w*)", helps(capsys), re.M))
    assert len(flags) > 100
    assert sorted(flags - set(re.findall(r"--[a-z]\w*", text))) == []


def test_flags_that_others_have_are_compared_with_ours(capsys):
    """In the table of diffusers' flags: what is said to be gone is refused by name."""
    text = (ROOT / "docs/migrating.md").read_text()
    gone = set(re.findall(r"--\w+", text)) & set(settling.REPLACED)
    assert gone == set(settling.REPLACED)


def slug(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), f"{named(path)}: {link}"
        titles = re.findall(r"^#+ (.*)$", prose(target), re.M) if target.suffix == ".md" else []
        assert not anchor or anchor in map(slug, titles), f"{named(path)}: {link}"


def test_the_front_door_is_short_and_leads_everywhere():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 9000
    for path in (ROOT / "docs").iterdir():
        assert f"](docs/{path.name})" in readme or f"](docs/{path.name}#" in readme, path


# ---- What is claimed -------------------------------------------------------------------------------------------------


def score(key, form):
    return lambda row: format(row["scores"][key]["median"], form) if key in (row["scores"] or ()) else ""


def relation(other, key, form):
    return lambda row: format(row[other][key]["median"], form) if row.get(other) else ""


FIGURES = {
    "got there": lambda row: f"{row['reached']} of {row['runs']}",
    "distance": score("subject", ".2f"),
    "drift": score("noise_drift", ".4f"),
    "of plain's": relation("vs_plain", "noise_drift", ".3f"),
    "of prior preservation's": relation("vs_prior", "noise_drift", ".3f"),
    "class leak": score("class_leak", ".2f"),
    "class right": score("class_right", ".2f"),
    "combinations right": score("combinations_right", ".2f"),
    "scenes right": score("scenes_right", ".2f"),
    "unlike right": score("unlike_right", ".2f"),
    "new places": score("placed", ".2f"),
    "new places right": score("placed_right", ".2f"),
    "pictures moved": score("others_moved", ".3f"),
    "diversity": score("diversity", ".3f"),
    "seconds": score("seconds", ".0f"),
}


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/benchmarks.md"], ids=named)
def test_tables_of_methods_are_those_of_the_results(path):
    """A section's title says which of the comparisons it is."""
    whole, compared = json.loads((ROOT / "benchmarks/results/preservation.json").read_text()), 0
    for section in re.split(r"^(?=#)", path.read_text(), flags=re.M):
        title = section.partition("\n")[0].lstrip("# ")
        results = whole["tier_two"] if "every method" in title.lower() else whole
        levels = results["levels_anywhere" if "new places" in title else "levels"]["1.0" if "100%" in title else "0.9"]
        if "800 steps" in title:
            levels = results["at_the_end"]
        for header, *rows in tables(section):
            for method, *values in rows if header[0] == "method" else ():
                for name, value in zip(header[1:], values, strict=True):
                    assert value == FIGURES[name](levels[method.strip("*")]), f"{title}: {method}, {name}"
                    compared += 1
    assert compared >= 24


def test_the_table_of_repair_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks/results/repair.json").read_text())["medians"]
    section = (ROOT / "docs/benchmarks.md").read_text().partition("\n## Repair\n")[2].partition("\n## ")[0]
    forms = {"subject": ".2f", "placed": ".2f", "class": ".2f", "others_right": ".2f", "noise_drift": ".4f"}
    ((header, *rows),) = tables(section)
    assert len(header) == 7 and [row[0].strip("*") for row in rows] == list(found)
    for way, *values, seconds in rows:
        scores = found[way.strip("*")]
        assert values == [format(scores[key], form) for key, form in forms.items()], way
        assert seconds == format(scores["seconds"], ".0f"), way


def test_the_table_of_stored_bundles_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks/results/bundle_likeness.json").read_text())["ways"]
    section = (ROOT / "docs/benchmarks.md").read_text().partition("\n## Storage\n")[2].partition("\n## ")[0]
    *_, (header, *rows) = tables(section)
    assert [row[0].strip("*") for row in rows] == list(found) and len(header) == 4
    for way, *values in rows:
        scores = found[way.strip("*")]
        shown = [f"{scores['bytes'] / 1000:.0f} kB", f"{scores['subject']:.3f}", f"{scores['noise_drift']:.5f}"]
        assert values == shown, way


def test_every_figure_has_its_command():
    """Each section with a table of numbers names what made it, and what it names has left its results."""
    for path in (ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/quickstart.md"):
        for section in re.split(r"^(?=#)", path.read_text(), flags=re.M):
            numeric = any("---:" in line for line in section.splitlines())
            made = re.findall(r"`(python (?:demo|benchmarks)/(\w+)\.py|make demo)", section)
            assert made or not numeric, section.partition("\n")[0]
            for _, name in made:
                results = ROOT / "benchmarks" / "results" / f"{name}.json"
                assert results.is_file() or name in ("", "real_model", "score_world"), results


def test_defaults_in_tables_are_those_of_the_trainer():
    args = trainer.parse_args(
        ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "a b"]
    )
    word = trainer.parse_args(
        ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "a b"]
        + ["--placeholder_token", "sks-dog", "--initializer_token", "dog"]
    )
    (table,) = [rows for rows in tables((ROOT / "docs/settings.md").read_text()) if rows[0][:2] == ["flag", "default"]]
    for flag, default, _ in table[1:]:
        name = flag.strip("`-")
        value = getattr(word if name.startswith("word") else args, name)
        assert (default == "none") if value is None else (type(value)(default) == value), flag
    criteria = {row[0].strip("`"): float(row[1]) for row in tables((ROOT / "docs/settings.md").read_text())[-1][1:]}
    assert criteria == trainer.DEFAULT_THRESHOLDS


def test_the_bound_of_leakage_is_that_of_the_code():
    full, half = (
        f"{bound:.0e}".replace("e-0", "e-") for bound in (LEAKAGE_BOUNDS[torch.float32], LEAKAGE_BOUNDS[torch.float16])
    )
    assert f"more than {full} of a layer's change" in (ROOT / "README.md").read_text()
    assert f"float32 file above {full}, or a 16-bit one above {half}," in (ROOT / "docs/how_it_works.md").read_text()


def test_figures_in_prose_are_those_of_the_results():
    """Of the README, where they stand out; tables are compared above."""
    text = " ".join((ROOT / "README.md").read_text().split())
    found = json.loads((ROOT / "benchmarks/results/preservation.json").read_text())
    headline, reached = found["headline"], found["levels"]["0.9"]
    ours, plain = (reached[name] for name in ("null space, word", "plain LoRA"))
    got_there = f"{ours['reached']} of {ours['runs']} runs got there, of the plain LoRA's {plain['reached']}"
    assert f"with a word {got_there}" in text
    drift, other, seconds = (headline[key] for key in ("drift_vs_plain", "drift_vs_prior", "time_vs_prior"))
    assert f"drifted {drift:.3f} times as much as the plain LoRA and {other:.3f} times as much as prior" in text
    assert f"in {seconds:.2f} of the latter's time" in text
    steps = json.loads((ROOT / "benchmarks/results/step_overhead.json").read_text())
    projections = steps["ranks"]["4"]["projections_per_step"] - 1
    launched, alone = steps["ratio_launched"], steps["ratio"]["rank 4"]
    assert f"costs {launched:.2f} times an unprotected one, {alone:.2f} without word and budget" in text
    assert f"the projections by themselves take {projections:.4f}" in text


def messages():
    """Every string of the code but its docstrings, what is filled in left out."""
    found = []
    for path in [*(ROOT / "nullspace").rglob("*.py"), *(ROOT / door for door in DOORS)]:
        tree = ast.parse(path.read_text())
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                found.append(node.value)
    return found


def test_messages_in_the_table_are_those_of_the_code():
    known = messages()
    rows = [row for table in tables((ROOT / "docs/troubleshooting.md").read_text()) for row in table[1:]]
    assert len(rows) > 30
    for message, _ in rows:
        words = re.compile(".*".join(re.escape(part.strip()) for part in message.strip("`").split("...")), re.S)
        assert any(words.search(text) for text in known), message


def test_where_things_are_is_what_the_files_say():
    rows = {row[0].strip("`"): row[1] for table in tables((ROOT / "CONTRIBUTING.md").read_text()) for row in table}
    rooms = {}
    for path in (ROOT / "nullspace").rglob("*.py"):
        rooms[named(path)] = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert {name: text for name, text in rows.items() if name.startswith("nullspace/")} == rooms
    assert set(DOORS) <= set(rows)


def test_the_version_is_one():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
