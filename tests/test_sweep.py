"""Long sweeps of faults, for `make sweep`: nothing is lost, and what is resumed ends as if nothing had happened.

NULLSPACE_SWEEP is the number of kills (30); there are a third as many SIGTERM.
"""

import errno
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_build import PROMPTS

from nullspace.bundle import Bundle, check_files
from nullspace.checkpoint import checkpoints, damage
from nullspace.hashes import sha256
from nullspace.names import CONFIG_NAME, LORA_NAME
from test_train import bundle1, command_line, same  # noqa: F401 (fixtures)


pytestmark = pytest.mark.sweep
KILLS = int(os.environ.get("NULLSPACE_SWEEP", 30))
TRAINER, BUILDER = "train_dreambooth_nullspace.py", "build_nullspace.py"


def start(script, line, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, script, *map(str, line)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(script, line):
    """Run to the end; return what it said."""
    process = start(script, line)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def training(tiny_sd1, bundle1, tmp_path_factory):  # noqa: F811
    """A command line without --output_dir's value, its LoRA, and the seconds that it takes."""
    flags = ("--max_train_steps", 12, "--checkpointing_steps", 3, "--lr_scheduler", "linear", "--random_flip")
    flags += ("--dataloader_num_workers", 1, "--validation_steps", 5, "--no-compare_with_base")

    def line(folder):
        return command_line(tiny_sd1, bundle1, folder, *flags)

    folder = tmp_path_factory.mktemp("undisturbed") / "lora"
    began = time.monotonic()
    run(TRAINER, line(folder))
    return line, load_file(folder / LORA_NAME), time.monotonic() - began


@pytest.fixture(scope="module")
def building(tiny_sd1, tmp_path_factory):
    """The same of a build: its bundle's files by their sha256."""
    folder = tmp_path_factory.mktemp("undisturbed-build")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS * 3))

    def line(output):
        words = ["--pretrained_model_name_or_path", tiny_sd1, "--prompts_file", folder / "prompts.txt"]
        words += ["--num_inference_steps", 3, "--batch_size", 2, "--checkpointing_steps", 2, "--output_dir", output]
        return [str(word) for word in words]

    began = time.monotonic()
    run(BUILDER, line(folder / "bundle"))
    digests = {path.name: sha256(path) for path in (folder / "bundle").glob("*.safetensors")}
    return line, digests, time.monotonic() - began


def kill_after(script, line, seconds, number=signal.SIGKILL):
    """Start, and send a signal after so many seconds: the exit code, or None where it had ended; and what it said."""
    process = start(script, line)
    time.sleep(seconds)
    ended = process.poll() is not None
    os.killpg(process.pid, signal.SIGKILL) if number == signal.SIGKILL and not ended else process.send_signal(number)
    sent = time.monotonic()
    said = process.communicate(timeout=120)[0]
    return None if ended else process.returncode, said, time.monotonic() - sent


def test_kill_9_in_training(training, tmp_path):
    """At random moments, each run going on from what the one before left; whatever is whole stays whole."""
    line, expected, seconds = training
    chance, folder, resumed = random.Random(0), tmp_path / "lora", 0
    for number in range(KILLS // 2):
        kill_after(TRAINER, [*line(folder), "--resume_from_checkpoint", "latest"], chance.uniform(0.3, 1.0) * seconds)
        assert all(damage(path) is None for path in checkpoints(folder)), number
        resumed += bool(checkpoints(folder))
        if (folder / LORA_NAME).exists():
            assert same(load_file(folder / LORA_NAME), expected)
            shutil.rmtree(folder)
    said = run(TRAINER, [*line(folder), "--resume_from_checkpoint", "latest"])
    assert same(load_file(folder / LORA_NAME), expected), said
    assert not [path for path in folder.rglob("*") if re.search(r"\.(partial|old|probe)-\d", path.name)]
    print(f"{KILLS // 2} kills of trainings, {resumed} of them with a checkpoint to go on from")


def test_kill_9_in_building(building, tmp_path):
    """Each build replaces an earlier bundle, which is whole until the new one is."""
    line, expected, seconds = building
    chance, folder = random.Random(1), tmp_path / "bundle"
    run(BUILDER, [*line(folder), "--seed", "5"])
    for number in range(KILLS - KILLS // 2):
        kill_after(BUILDER, line(folder), chance.uniform(0.3, 1.0) * seconds)
        stepped_aside = [path for path in tmp_path.iterdir() if ".old-" in path.name]
        assert folder.exists() or len(stepped_aside) == 1, number
        check_files(folder if folder.exists() else stepped_aside[0])
    run(BUILDER, line(folder))
    assert {path.name: sha256(path) for path in folder.glob("*.safetensors")} == expected
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle", ".bundle.lock"}


@pytest.mark.parametrize("script", [TRAINER, BUILDER])
def test_sigterm(script, training, building, tmp_path):
    """At random moments: an answer within 10 seconds, and the command that it prints goes on to the same result."""
    line, expected, seconds = training if script == TRAINER else building
    chance = random.Random(2)
    for number in range(max(1, KILLS // 6)):
        folder = tmp_path / str(number)
        code, said, took = kill_after(script, line(folder), chance.uniform(0.1, 1.0) * seconds, signal.SIGTERM)
        assert code in (None, 0, 143, -signal.SIGTERM), said  # 0: it had begun to end, and -15: Python had
        assert took < max(10, seconds / 2), said  # a machine that is busy with other things takes longer for a step
        if "Go on with:" in said:
            told = said.splitlines()[-1]
            process = subprocess.run([sys.executable, *shlex.split(told)[1:]], cwd=ROOT, timeout=600)
            assert process.returncode == 0
        elif code == 143:  # while libraries were imported
            run(script, line(folder))
        if script == TRAINER:
            assert same(load_file(folder / LORA_NAME), expected)
        else:
            assert {path.name: sha256(path) for path in folder.glob("*.safetensors")} == expected


def test_two_processes_stop_at_the_same_step(tiny_sd1, bundle1, tmp_path):  # noqa: F811
    """Only one is sent the signal; the command that is printed names their number."""
    config = tmp_path / "accelerate.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--multi_gpu", "--num_processes", "2"]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    flags = ("--max_train_steps", 40, "--checkpointing_steps", 5)
    line = command_line(tiny_sd1, bundle1, tmp_path / "lora", *flags)
    process = start(TRAINER, line, launcher)
    while not (tmp_path / "lora" / "checkpoint-5").exists() and process.poll() is None:
        time.sleep(0.05)
    ranks = [child for child in children(process.pid) if TRAINER in " ".join(child.cmdline())]
    ranks[-1].send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert not any(rank.is_running() for rank in ranks), said
    (told,) = (text for text in said.splitlines() if text.startswith("accelerate launch"))
    assert "--num_processes 2" in told and said.count("Stopped by SIGTERM") == 1
    again = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(told)[2:]], cwd=ROOT, timeout=600
    )
    assert again.returncode == 0
    whole = start(TRAINER, command_line(tiny_sd1, bundle1, tmp_path / "whole", *flags), launcher)
    assert whole.wait(600) == 0
    assert same(*(load_file(tmp_path / name / LORA_NAME) for name in ("lora", "whole")))


def children(pid):
    import psutil

    return psutil.Process(pid).children(recursive=True)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes."""
    mounted = []

    def make(size):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here ({done.stderr.decode().strip()})")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


FULL = """
import os, sys
sys.path.insert(0, {root!r})
import {door} as door
from nullspace import collection, preparation, signals
collection.check_space = preparation.check_space = lambda *args: None
signals.run(door.main, door.parse_args())
"""


def test_a_full_disk_in_training(training, tmp_path, small_disk):
    """Disks that are full at ever later writes; the earlier LoRA and every checkpoint are whole."""
    line, expected, _ = training
    reference, script = tmp_path / "reference", tmp_path / "full.py"
    run(TRAINER, line(reference))
    script.write_text(FULL.format(root=str(ROOT), door=TRAINER[:-3]))
    earlier = {name: (reference / name).read_bytes() for name in (LORA_NAME, "README.md", "nullspace_report.json")}
    total = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    refused = 0
    for share in (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)[: max(2, KILLS // 5)]:
        disk = small_disk(int(sum(map(len, earlier.values())) + share * total) // 4096 * 4096 + 65536)
        (disk / "lora").mkdir()
        for name, content in earlier.items():
            (disk / "lora" / name).write_bytes(content)
        process = start(script, [*line(disk / "lora"), "--seed", "1"])
        said = process.communicate(timeout=600)[0]
        if process.returncode:
            refused += 1
            assert process.returncode == 1 and "Traceback" not in said, said
            assert "No space left on device" in said and "were free" in said
            assert (disk / "lora" / LORA_NAME).read_bytes() == earlier[LORA_NAME] or share > 0.5
        assert all(damage(path) is None for path in checkpoints(disk / "lora"))
    assert refused


def test_a_full_disk_in_building(building, tmp_path, small_disk):
    line, expected, _ = building
    run(BUILDER, [*line(tmp_path / "reference"), "--seed", "5"])
    script = tmp_path / "full.py"
    script.write_text(FULL.format(root=str(ROOT), door=BUILDER[:-3]))
    size, refused = sum(path.stat().st_size for path in (tmp_path / "reference").iterdir()), 0
    for share in (0.2, 0.6, 0.9, 1.2, 2.5)[: max(2, KILLS // 6)]:
        disk = small_disk(int(size * (1 + share)) + 65536)
        shutil.copytree(tmp_path / "reference", disk / "bundle")
        process = start(script, line(disk / "bundle"))
        said = process.communicate(timeout=600)[0]
        check_files(disk / "bundle")
        if process.returncode:
            refused += 1
            assert process.returncode == 1 and "Traceback" not in said and "No space left on device" in said, said
            assert Bundle.load(disk / "bundle").config["seed"] == 5
    assert refused


def test_a_disk_without_room_is_refused_before_the_work(training, building, small_disk):
    disk = small_disk(256 * 1024)
    for script, (line, *_) in ((TRAINER, training), (BUILDER, building)):
        process = start(script, line(disk / "new"))
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 1 and "Traceback" not in said and "is too full for" in said, said
        assert "Training:" not in said and "Collecting:" not in said and not (disk / "new" / CONFIG_NAME).exists()


def test_a_read_only_disk(training, building, small_disk):
    disk = small_disk(2**22)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for script, (line, *_) in ((TRAINER, training), (BUILDER, building)):
        process = start(script, line(disk / "new"))
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 1 and "Traceback" not in said and os.strerror(errno.EROFS) in said, said


def test_a_folder_removed_under_the_run(training, tmp_path):
    line, *_ = training
    process = start(TRAINER, line(tmp_path / "lora"))
    while not (tmp_path / "lora" / "checkpoint-3").exists() and process.poll() is None:
        time.sleep(0.02)
    shutil.rmtree(tmp_path / "lora", ignore_errors=True)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 1 and "Traceback" not in said and "was removed while the run wrote to it" in said, said


def test_two_runs_in_one_folder(training, tmp_path):
    line, expected, _ = training
    first = start(TRAINER, line(tmp_path / "lora"))
    while not (tmp_path / "lora" / ".lock-holder").exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    second = start(TRAINER, [*line(tmp_path / "lora"), "--resume_from_checkpoint", "latest"])
    told = next(text for text in second.stdout if "Waiting for process" in text)
    first.send_signal(signal.SIGCONT)
    said = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert f"Waiting for process {first.pid} on " in told and "Resuming from" in said[1]
    assert same(load_file(tmp_path / "lora" / LORA_NAME), expected)
