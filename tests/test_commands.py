"""The commands: merging bundles, one parser however it is called, and what `pip install` makes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import distributions, version
from importlib.util import find_spec
from zipfile import ZipFile

import pytest
from conftest import ROOT
from test_nullspace_utils import distance, world_of

from nullspace import console, finding, signals
from nullspace.bundle import Bundle, check_files
from nullspace.errors import NullSpaceError
from nullspace.hashes import config_sha256
from nullspace.names import CONFIG_NAME, JOINT
from nullspace_utils import main, parse_args


def merge(*flags):
    main(parse_args(["merge", *map(str, flags)]))


@pytest.fixture(scope="module")
def folders(tiny_sd1, tmp_path_factory):
    """Bundles of one half of the prompts each, of both, of another model and of all timesteps together."""
    world, folder = world_of(tiny_sd1), tmp_path_factory.mktemp("bundles")
    for index, half in enumerate(world.halves):
        prompts = {"source": f"half {index}", "count": 2, "sha256": f"{index}" * 64, "examples": [f"prompt {index}"]}
        world.bundle(moments=half, prompts=prompts).save(folder / f"half-{index}")
    world.bundle().save(folder / "whole")
    world.joint_bundle().save(folder / "joint")
    base = {"id": "tiny/other", "fingerprint": {"unet": "0" * 64}}
    world.bundle(base_model=base).save(folder / "other")
    world.bundle(base_model={"id": "tiny/model", "fingerprint": "0" * 64}).save(folder / "old")
    world.bundle(guidance_scale=1.0).save(folder / "unguided")
    return folder


def test_merged_bundles_are_that_of_all_their_prompts(folders, tmp_path, capsys):
    merge("--nullspace", folders / "half-0", "--nullspace", folders / "half-1", "--output_dir", tmp_path / "merged")
    assert capsys.readouterr().out == f"Wrote 4 prompts of 2 bundles to {tmp_path / 'merged'}\n"
    check_files(tmp_path / "merged")
    assert "merge --nullspace half-0 --nullspace half-1" in Bundle.load(tmp_path / "merged").config["command"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "- null-space\n" in card and "--nullspace half-1" in card and "not known, as of all" in card
    assert (tmp_path / "merged" / "spectra.png").exists()
    merged, whole = (Bundle.load(folder, every_group=True) for folder in (tmp_path / "merged", folders / "whole"))
    assert merged.spectra.keys() == whole.spectra.keys() and len(merged.spectra) == 5
    for group, spectra in whole.spectra.items():
        for source, spectrum in spectra.items():
            assert distance(merged.spectra[group][source].sum(), spectrum.sum()) < 1e-4  # 16 bits hold the tails
    assert merged.config["prompts"]["examples"] == ["prompt 0", "prompt 1"]
    # A third one, to an earlier bundle's place
    others = ("--nullspace", folders / "half-1", "--nullspace", folders / "whole")
    merge("--nullspace", folders / "half-0", *others, "--output_dir", tmp_path / "merged")
    total = Bundle.load(tmp_path / "merged").spectra[JOINT]
    assert all(spectrum.tokens == 2 * whole.spectra[JOINT][source].tokens for source, spectrum in total.items())


def test_bundles_that_are_not_merged(folders, tmp_path):
    shutil.copytree(folders / "half-0", tmp_path / "copy")
    shutil.copytree(folders / "half-0", tmp_path / "signed anew")  # as pushing does, which writes the card
    config = json.loads((folders / "half-0" / CONFIG_NAME).read_text()) | {"seed": 7}
    (tmp_path / "signed anew" / CONFIG_NAME).write_text(json.dumps(config | {"sha256": config_sha256(config)}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary").touch()
    half = folders / "half-0"
    for second, output, sentence in (
        (half, "new", "is the same bundle as .*half-0, whose prompts would count twice"),
        (tmp_path / "copy", "new", "is the same bundle as .*half-0"),
        (tmp_path / "signed anew", "new", "is the same bundle as .*half-0"),
        (folders / "other", "new", "their base model differ"),
        (folders / "joint", "new", "their groups differ"),
        (folders / "unguided", "new", "their guidance scale differ"),
        (folders / "old", "new", "one is of the old format"),
        (tmp_path, "new", "it is not a bundle"),
        (tmp_path / "copy", "copy", "is one of the bundles that are merged"),
        (folders / "half-1", "other", "holds something that is not a bundle"),
    ):
        before = sorted(path for path in tmp_path.rglob("*"))
        with pytest.raises(NullSpaceError, match=sentence) as error:
            merge("--nullspace", half, "--nullspace", second, "--output_dir", tmp_path / output)
        assert "\n" not in str(error.value) and sorted(path for path in tmp_path.rglob("*")) == before


def test_merge_wants_several_bundles(capsys):
    with pytest.raises(SystemExit):
        parse_args(["merge", "--nullspace", "a", "--output_dir", "b"])
    assert capsys.readouterr().err == "error: merge needs --nullspace two times or more, once for each bundle.\n"


# ---- What pip installs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what is installed from a copy of the repository, and nothing else."""
    if find_spec("setuptools") is None or int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools is not installed, or older than pyproject.toml asks for")
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("LICENSE", "README.md", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    for path in [*ROOT.glob("*.py"), ROOT / "tests", ROOT / "examples", ROOT / "nullspace"]:
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    # What pip calls, without the isolation for which it would download
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with ZipFile(next(copy.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


def test_the_wheel_holds_the_library_and_the_doors_alone(installed):
    expected = {path.relative_to(ROOT) for path in (ROOT / "nullspace").rglob("*") if "__pycache__" not in path.parts}
    expected = {path for path in expected if (ROOT / path).is_file()} | {path.relative_to(ROOT) for path in DOORS}
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in found if "dist-info" not in path.parts[0]} == expected
    (package,) = distributions(path=[str(installed)])
    users, extras = set(), set()
    for each in package.requires:
        name, _, marker = each.partition(";")
        (extras if marker else users).add(re.match(r"[\w-]+", name)[0])
    assert users == requirements("requirements.txt")
    assert extras == {"bitsandbytes", "prodigyopt"} and not extras & users
    # Tests need all of it, and those that run them no user does
    assert requirements("requirements-dev.txt") == {"-r requirements.txt", *extras, "pytest", "pytest-xdist", "ruff"}


def requirements(name):
    """What a file of requirements lists, without versions."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {re.split("[<>]", line)[0] for line in lines if line}


def test_the_oldest_versions_are_all_lower_bounds():
    """tests/oldest.sh makes its pins with sed."""
    script = (ROOT / "tests" / "oldest.sh").read_text()
    (command,) = re.findall(r"^(sed .*) > \"\$oldest\"$", script, re.M)
    pins = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+) *$", pins, re.M))
    files = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")]
    assert pinned == dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(files), re.M)) and "torch" in pinned
    assert not re.search("^-r|[<>]", pins, re.M) and "pytest\n" in pins


DOORS = {
    ROOT / "train_dreambooth_nullspace.py": "nullspace-train",
    ROOT / "build_nullspace.py": "nullspace-build",
    ROOT / "nullspace_utils.py": "nullspace",
}


def run_command(installed, name, *flags, tmp_path):
    """Run an installed command, as the script that pip makes of its entry point does, where no library can come in."""
    (package,) = distributions(path=[str(installed)])
    entry = next(each for each in package.entry_points if each.name == name)
    for library in ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('a library was imported')")
    script = tmp_path / name
    script.write_text(f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, installed)))}
    return subprocess.run(
        [sys.executable, script, *map(str, flags)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("door", "name"), DOORS.items(), ids=DOORS.values())
def test_commands_parse_their_flags_before_libraries_come(installed, door, name, tmp_path):
    done = run_command(installed, name, "--help", tmp_path=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name} [") and not done.stderr
    script = subprocess.run([sys.executable, door, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    shown = done.stdout.replace(f"usage: {name} ", "").split()
    usage = "usage: " if name == "nullspace" else "usage: accelerate launch "
    assert script.stdout.startswith(usage) and shown == script.stdout.replace(f"{usage}{door.name} ", "").split()
    done = run_command(installed, name, "--nonsense", tmp_path=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture
def own_signals():
    """Signals are handled as before once a command has run in this process."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    vars(signals._now).update(asked=None, waiting=False, running=False)


def test_a_command_does_its_work(own_signals, folders, tmp_path, monkeypatch, capsys):
    flags = ("merge", "--nullspace", folders / "half-0", "--nullspace", folders / "half-1", "--output_dir")
    monkeypatch.setattr(sys, "argv", ["nullspace", *map(str, flags), str(tmp_path / "merged")])
    console.tools()
    assert capsys.readouterr().out == f"Wrote 4 prompts of 2 bundles to {tmp_path / 'merged'}\n"
    sys.argv[-1] = str(folders / "half-1")
    with pytest.raises(SystemExit) as caught:
        console.tools()
    assert str(caught.value).startswith("error: --output_dir") and "\n" not in str(caught.value)


def test_a_command_is_stopped_with_a_sentence(own_signals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finding, "describe_cache", lambda cache: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["nullspace_utils.py", "cache", "--nullspace_cache_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        console.tools()
    command = f"python nullspace_utils.py cache --nullspace_cache_dir {tmp_path}"
    assert caught.value.code == 130 and capsys.readouterr().err == f"Stopped by SIGINT. Go on with:\n{command}\n"
