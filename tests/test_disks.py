"""Full disks, folders that go away, runs that were killed, and two at once: what was there stays whole."""

import errno
import gc
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

from nullspace import bundle as bundle_room
from nullspace import locks, system
from nullspace.bundle import Bundle
from nullspace.collection import Checkpoint
from nullspace.errors import NullSpaceError
from nullspace.kohya import save_kohya
from nullspace.lora import LoraLayer
from nullspace.names import JOINT
from nullspace.pictures import save_picture
from nullspace.report import write_json
from nullspace.spectrum import Spectrum
from nullspace.system import replacing, write_text


ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, process_index=0, device="cpu")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def largest_file(size):
    """Within the block no file of this process can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def make_bundle():
    generator = torch.Generator().manual_seed(0)
    spectra = {}
    for group in (JOINT, "encoder_hidden_states"):
        x = torch.randn(32, 16, generator=generator).double()
        spectra[group] = {group: Spectrum.from_sum(x.T @ x, 32, name=group)}
    module = {"input": JOINT, "in_features": 16, "out_features": 8}
    return Bundle({"format_version": 2, "modules": {"attn2.to_q": module}}, spectra)


def write_bundle(path, number):
    make_bundle().save(path, extras=[lambda bundle, folder: (folder / "README.md").write_text(f"card {number}")])


def write_lora(path, number):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_kohya(path, {name: LoraLayer(torch.full((2, 768), float(number)), torch.ones(3, 2), 1.0)})


def write_checkpoint(path, number):
    """A build's."""
    moments = SimpleNamespace(sums={(JOINT, "x"): torch.full((16, 16), float(number))}, tokens={(JOINT, "x"): number})
    Checkpoint(path, {}, ALONE).save(moments, number)


WRITERS = {
    "bundle": write_bundle,
    "lora.safetensors": write_lora,
    "report.json": lambda path, number: write_json(path, {"guarantee": f"{number}" * 400}),
    "card.md": lambda path, number: write_text(path, f"# Card {number}\n" * 50),
    "picture.png": lambda path, number: save_picture(Image.radial_gradient("L").rotate(number), path),
    "build": write_checkpoint,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_grow_leaves_the_earlier_one(name, tmp_path):
    """Cut off at each of many sizes, as a full disk or a quota does."""
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1)
    before = contents(tmp_path)
    largest = max(map(len, before.values()))
    for size in {0, 1, 64, largest // 4, largest // 2, largest - 1}:
        with largest_file(size), pytest.raises(NullSpaceError) as caught:
            write(path, 2)
        assert "cannot be written (File too large, where" in str(caught.value) and "needed" in str(caught.value)
        assert contents(tmp_path) == before, size
    write(path, 2)
    assert contents(tmp_path) != before and contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_disk_that_is_full_at_any_step_leaves_the_earlier_one(name, call, tmp_path, monkeypatch):
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1)
    before = contents(tmp_path)
    real, left = getattr(os, call), []

    def refuse(*args, **kwargs):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        return real(*args, **kwargs)

    failed = 0
    for allowed in range(40):
        left[:] = [None] * allowed
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            try:
                write(path, 2)
                break
            except NullSpaceError as error:
                assert "No space left on device" in str(error)
        failed += 1
        system.remove_leftovers(tmp_path, print)  # as the next start does, where even stepping back was refused
        assert not [name for name in contents(tmp_path) if "partial" in name]
        if contents(tmp_path) != before:  # it was in place already, and only its name may not have been on the disk
            assert contents(tmp_path).keys() == before.keys()
            write(path, 1)
            before = contents(tmp_path)
    used = {"fsync": True, "replace": name != "bundle", "rename": name == "bundle"}[call]
    assert (failed > 0) == used and failed < 40


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, rename, replace = [], os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))) or fsync(file)
    )
    monkeypatch.setattr(os, "rename", lambda *a, **k: done.append("rename") or rename(*a, **k))
    monkeypatch.setattr(os, "replace", lambda *a, **k: done.append("rename") or replace(*a, **k))
    (tmp_path / "home").mkdir()
    for path in (tmp_path / "home" / "file", tmp_path / "home" / "folder"):
        done.clear()
        with replacing(path) as partial:
            if path.name == "folder":
                partial.mkdir()
                (partial / "inner").mkdir()
                (partial / "inner" / "leaf").write_text("1")
            else:
                partial.write_text("1")
        renamed = done.index("rename")
        inside = {"leaf", "inner", partial.name} if path.name == "folder" else {partial.name}
        assert set(done[:renamed]) == inside and done[renamed + 1] == "home"


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_was_removed_is_not_made_again(name, tmp_path):
    home = tmp_path / "home"
    if name in ("bundle", "build"):
        pytest.skip("a build makes the folder that it writes to")
    with pytest.raises(NullSpaceError, match=f"{home} was removed while the run wrote to it"):
        WRITERS[name](home / "inner" / name if name == "picture.png" else home / name, 1)
    assert not home.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_each_library_says_that_a_disk_is_full_or_read_only(small_disk):
    """In words of its own, which ours take the place of."""
    tensors = {"x": torch.zeros(100_000)}

    def in_a_folder(path):
        path.mkdir()
        torch.save(tensors, path / "optimizer.bin")

    writers = (
        lambda path: save_file(tensors, path),
        lambda path: torch.save(tensors, path),
        lambda path: path.write_bytes(bytes(100_000)),
        in_a_folder,
    )
    for message in ("No space left on device, where 65.5 kB were free", "Read-only file system"):
        for write in writers:
            with pytest.raises(NullSpaceError) as caught, replacing(small_disk / "file") as partial:
                write(partial)
            assert message in str(caught.value) and not list(small_disk.iterdir())
            del caught  # whose frames hold a file open
            gc.collect()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)


def test_an_error_of_the_code_stays_what_it_is(tmp_path):
    for error in (KeyError("x"), FileNotFoundError(2, "No such file", "elsewhere"), RuntimeError("no more paper")):
        with pytest.raises(type(error)), replacing(tmp_path / "a") as partial:
            partial.write_text("half")
            raise error
    assert not contents(tmp_path)


def test_the_sentence_says_what_is_needed_and_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(system.shutil, "disk_usage", lambda path: SimpleNamespace(free=12_300_000))
    error = OSError(errno.ENOSPC, "x")
    fault = system.write_fault(tmp_path / "a", tmp_path / "b", error, 15e8)
    assert "where 12.3 MB were free, quotas aside, and 1.5 GB are needed); what was there before is as it was" in fault
    (tmp_path / "b").write_bytes(bytes(700_000))
    fault = system.write_fault(tmp_path / "a", tmp_path / "b", error)
    assert "where 13 MB were free, quotas aside, and more than 700 kB are needed" in fault
    fault = system.write_fault(tmp_path / "a", tmp_path / "b", OSError(errno.EROFS, "x"))
    assert "cannot be written (Read-only file system); what" in fault and "free" not in fault
    with pytest.raises(NullSpaceError, match="too full for the bundle: 20 MB are needed and 12.3 MB are free"):
        system.check_space(tmp_path / "not" / "there", 20_000_000, "the bundle")
    system.check_space(tmp_path, 12_000_000, "the bundle")


# ---- What killed runs left -------------------------------------------------------------------------------------------


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_are_known_by_owner_and_age(tmp_path):
    dead, alive, said = dead_pid(), os.getppid(), []
    hour = time.time() - psutil.Process(alive).create_time() + 3600
    for name in ("a.partial-{}", "b.old-{}", "b", "lora.partial-{}", "c.probe-{}"):
        (tmp_path / name.format(dead)).mkdir()
    (tmp_path / f"mine.partial-{os.getpid()}").write_text("of an earlier process with this number")
    (tmp_path / f"busy.partial-{alive}").write_text("of a process that runs")
    (tmp_path / f"late.partial-{alive}").write_text("written before that process began")
    os.utime(tmp_path / f"late.partial-{alive}", (time.time() - hour,) * 2)
    (tmp_path / "partial-checkpoint-3").mkdir()
    (tmp_path / "partial-README.md").write_text("of an earlier version, a minute ago")
    os.utime(tmp_path / "partial-checkpoint-3", (time.time() - 2 * system.DAY,) * 2)
    kept = {"notes.partial", "partial-thoughts", "x.partial-old", f"a.partial-{dead}.txt"}
    for name in kept:
        (tmp_path / name).write_text("the user's")
    system.remove_leftovers(tmp_path, said.append)
    assert {path.name for path in tmp_path.iterdir()} == kept | {"b", f"busy.partial-{alive}", "partial-README.md"}
    assert len(said) == 7 and all(line.startswith("Removed") and "killed" in line for line in said)
    system.remove_leftovers(tmp_path / "nowhere", said.append)


def test_what_was_moved_aside_and_not_replaced_comes_back(tmp_path):
    dead, said = dead_pid(), []
    for name in (f"bundle.old-{dead}", f"bundle.partial-{dead}", f"other.partial-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    system.remove_leftovers(tmp_path, said.append, "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", f"other.partial-{dead}"}
    assert (tmp_path / "bundle" / "file").read_text() == f"bundle.old-{dead}" and len(said) == 2


# ---- Two at once -----------------------------------------------------------------------------------------------------


HOLD = """
import sys, time
from types import SimpleNamespace
from pathlib import Path
from nullspace.locks import alone
state = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
with alone(Path(sys.argv[1]), lambda line: print(line, flush=True), state):
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""


def hold(path):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_the_second_waits_for_the_first_and_says_so(end, tmp_path):
    path = tmp_path / "new" / "folder" / ".lock"
    first = hold(path)
    assert first.stdout.readline() == "in\n"
    holder = json.loads(path.with_name(".lock-holder").read_text())
    assert holder["pid"] == first.pid and abs(holder["since"] - time.time()) < 60
    second = hold(path)
    line = second.stdout.readline()
    assert line.startswith(f"Waiting for process {first.pid} on {holder['host']}, since 20") and str(path) in line
    if end == "is killed":
        first.kill()
        first.wait()
    else:
        first.communicate("\n", timeout=60)
    assert second.stdout.readline() == "in\n"
    assert json.loads(path.with_name(".lock-holder").read_text())["pid"] == second.pid
    second.communicate("\n", timeout=60)
    assert second.returncode == 0 and not path.with_name(".lock-holder").exists()


def test_a_lock_leaves_no_folder_that_it_made(tmp_path):
    path = tmp_path / "new" / "folder" / ".lock"
    with pytest.raises(KeyError), locks.alone(path, print, ALONE):
        raise KeyError("refused")
    assert not list(tmp_path.iterdir())
    with locks.alone(path, print, ALONE):
        (path.parent / "result").write_text("kept")
    assert (path.parent / "result").exists()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def acquire(self, **settings):
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    with locks.alone(tmp_path / ".lock", said.append, ALONE):
        assert "No locks available" in said[0] and "see to it that no other run" in said[0]


def test_bundles_are_written_in_the_one_way():
    """And so is all else: nobody else renames or syncs."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "nullspace").rglob("*.py")]:
        if path.name != "system.py":
            text = path.read_text()
            assert not any(word in text for word in ("os.replace", "os.rename", "fsync", "NamedTemporaryFile")), path
    assert bundle_room.replacing is replacing
