"""What the scripts owe to their surroundings: permissions, launchers, packages and systems."""

import os
import re
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

import build_nullspace
import train_dreambooth_nullspace as trainer
from nullspace import system
from nullspace_utils import NullSpaceError, check_launcher
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
    monkeypatch.setattr(build_nullspace.Checkpoint, "remove", lambda self: None)
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
