"""What the scripts owe to their surroundings: permissions, launchers, packages and systems."""

import os
import re
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from diffusers.optimization import SchedulerType

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace import system
from nullspace.collection import Checkpoint
from nullspace.errors import NullSpaceError
from nullspace.launch import check_launcher
from test_train import bundle1, command_line, drawing_in_two_steps, make_bundle, train  # noqa: F401


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def umask():
    """027: files for the owner and, to read, for the group."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def modes(folder):
    """The permissions of all files and of all folders in one, which is among them."""
    found = {True: set(), False: set()}
    for path in (folder, *folder.rglob("*")):
        found[path.is_file()].add(oct(stat.S_IMODE(path.stat().st_mode)))
    return found[True], found[False]


def test_a_bundle_has_the_users_umask(umask, tiny_sd1, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "remove", lambda self: None)
    bundle = make_bundle(tiny_sd1, tmp_path / "bundle", "--checkpointing_steps", 1, "--batch_size", 1)
    for folder in (bundle, tmp_path / "bundle.checkpoint"):
        assert modes(folder) == ({"0o640"}, {"0o750"})


def test_a_lora_and_its_checkpoints_have_the_users_umask(umask, tiny_sd1, bundle1, tmp_path):  # noqa: F811
    flags = ("--checkpointing_steps", 2, "--report_to", "tensorboard", "--validation_steps", 2)
    train(tiny_sd1, bundle1, tmp_path / "lora", *flags, without=("--report_to",))
    assert modes(tmp_path / "lora") == ({"0o640"}, {"0o750"})


# ---- Launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ],
)
def test_what_shards_gradients_is_refused_by_name(variable, name, monkeypatch, tmp_path):
    """Before anything is read, for the command names nothing that exists."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(NullSpaceError, match=f"accelerate is set up for {name}, under which no process sees whole"):
        trainer.main(trainer.parse_args(command_line("nowhere", "nowhere", tmp_path / "lora")))
    assert not (tmp_path / "lora").exists()


def test_a_tpu_is_refused_by_name():
    with pytest.raises(NullSpaceError, match=r"accelerate is set up for a TPU \(XLA\)"):
        check_launcher(DistributedType.XLA)
    for kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        check_launcher(kind)


def test_processes_wait_for_one_that_takes_long(monkeypatch, tmp_path):
    """Rather than 10 minutes."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    accelerator = trainer.make_accelerator(trainer.parse_args(command_line("m", "b", tmp_path / "lora")))
    assert accelerator.init_handler.timeout > timedelta(days=1)

    def started(**settings):
        raise InterruptedError(settings["timeout"])

    monkeypatch.setattr(build_nullspace, "PartialState", started)
    with pytest.raises(InterruptedError) as caught:
        build_nullspace.main(build_nullspace.parse_args(["--output_dir", str(tmp_path), "--push_to_hub"]))
    assert caught.value.args[0] > timedelta(days=1)


# ---- Systems ---------------------------------------------------------------------------------------------------------


def test_only_one_file_looks_at_the_system():
    sources = [*ROOT.glob("*.py"), *(ROOT / "nullspace").glob("*.py")]
    asked = re.compile(r"\bos\.name\b|\bsys\.platform\b|\bplatform\.system\b")
    looking = {path.name for path in sources if asked.search(path.read_text())}
    assert looking == {"system.py"}


def test_a_folder_is_renamed_and_its_parent_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    (tmp_path / "partial").mkdir()
    system.rename_folder(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final").is_dir() and synced == [str(tmp_path)]


@pytest.mark.parametrize(("failures", "renamed"), [(0, True), (2, True), (9, False)])
def test_windows_is_given_time(failures, renamed, tmp_path, monkeypatch):
    """There a folder cannot be renamed while a file in it is open, nor can a folder be synced."""
    rename, attempts = Path.rename, []

    def busy(self, target):
        attempts.append(target)
        if len(attempts) <= failures:
            raise PermissionError(13, "The process cannot access the file")
        return rename(self, target)

    monkeypatch.setattr(system, "WINDOWS", True)
    monkeypatch.setattr(system.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("a folder was synced"))
    monkeypatch.setattr(Path, "rename", busy)
    (tmp_path / "partial").mkdir()
    if renamed:
        system.rename_folder(tmp_path / "partial", tmp_path / "final")
        assert len(attempts) == failures + 1
    else:
        with pytest.raises(PermissionError):
            system.rename_folder(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final").is_dir() == renamed


# ---- Flags before libraries ------------------------------------------------------------------------------------------


SCRIPTS = ("train_dreambooth_nullspace.py", "build_nullspace.py", "nullspace_utils.py")


def run_at_once(tmp_path, *command):
    """Run a script where no library can be imported."""
    blocker = "raise ImportError('a library was imported')"
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "PIL", "numpy"):
        (tmp_path / f"{package}.py").write_text(blocker)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_library(script, tmp_path):
    done = run_at_once(tmp_path, script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr
    if script != "nullspace_utils.py":
        assert "--mixed_precision" in done.stdout and "SchedulerType" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_help_is_the_one_of_the_libraries_names(script, tmp_path, capsys):
    module = trainer if script.startswith("train") else build_nullspace
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    expected = capsys.readouterr().out.replace("pytest", "")
    shown = run_at_once(tmp_path, script, "--help").stdout
    assert shown.split("options:")[1] == expected.split("options:")[1]


def test_wrong_flags_are_refused_before_the_libraries_come(tmp_path):
    done = run_at_once(tmp_path, *SCRIPTS[:1], *command_line("m", "b", "o", "--lr_scheduler", "cosine", "--rank", 0))
    assert (done.returncode, done.stderr) == (1, "error: --rank must be at least 1, not 0.\n")


def test_right_flags_go_on_with_the_libraries(tmp_path):
    flags = ("--lr_scheduler", "cosine", "--image_interpolation_mode", "box")
    done = run_at_once(tmp_path, SCRIPTS[0], *command_line("m", "b", "o", *flags))
    assert "ImportError: a library was imported" in done.stderr


def test_schedules_are_those_of_diffusers():
    assert trainer.SCHEDULES == [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


def test_nothing_is_said_or_imported_that_the_run_does_not_need(tmp_path):
    """The first sentence is the one on what is wrong, and bitsandbytes is there for the flag that needs it alone."""
    line = command_line("nowhere", tmp_path, tmp_path / "lora")
    done = subprocess.run([sys.executable, SCRIPTS[0], *line], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "error: " in done.stderr
    for word in ("bitsandbytes", "gemm", "torchvision", "kernels"):
        assert word not in done.stderr + done.stdout


def test_what_is_hidden_is_there_for_its_flag(tmp_path):
    (tmp_path / "torch.py").write_text("import sys; sys.exit(str('bitsandbytes' in sys.modules))")
    for flags, hidden in (((), True), (("--use_8bit_adam",), False)):
        line, environment = command_line("m", "b", "o", *flags), os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, SCRIPTS[0], *line], cwd=ROOT, env=environment, capture_output=True)
        assert done.stderr.decode() == f"{hidden}\n"


@pytest.mark.parametrize(
    ("package", "flags"),
    [("datasets", ("--prompts_dataset_name", "d")), ("matplotlib", ("--prompts_file", "p"))],
)
def test_the_builder_names_a_missing_package(package, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", str(tmp_path / "bundle"), *flags]
    with pytest.raises(NullSpaceError, match=f"needs {package}, which is not installed: pip install {package}"):
        build_nullspace.main(build_nullspace.parse_args(argv))
