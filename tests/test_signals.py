"""SIGINT and SIGTERM: what is written, what is said, and that a resumed run ends as an undisturbed one."""

import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from test_build import PROMPTS, build

import train_dreambooth_nullspace as trainer
from nullspace import collection, launch, results, signals
from nullspace.checkpoint import checkpoints
from nullspace.hashes import sha256
from nullspace.names import LORA_NAME
from test_train import bundle1, command_line, drawing_in_two_steps, reference, same, train  # noqa: F401 (fixtures)


# ---- The room --------------------------------------------------------------------------------------------------------


SCRIPT = """
import multiprocessing, signal, sys, time
from nullspace import signals
signals.listen()
if sys.argv[1] == "import":
    print("ready", flush=True)
    time.sleep(60)

def steps():
    for step in signals.noted_during(range(100)):
        print("ready", flush=True)
        time.sleep(60 if sys.argv[1] == "twice" else 0.5)
        if signals.asked():
            raise signals.Stopped(signals.asked(), "All is saved.", "latest")

def nap():
    signals.leave_to_parent(0)
    time.sleep(60)

def main(args):
    if sys.argv[1] == "worker":
        process = multiprocessing.Process(target=nap, daemon=True)
        process.start()
        print(process.pid, flush=True)
    if sys.argv[1] in ("twice", "steps", "worker"):
        steps()
    print("ready", flush=True)
    with signals.waiting():
        with signals.cut_short():
            time.sleep(60)
        print("went on", flush=True)
    if sys.argv[1] == "cut":
        raise signals.Stopped(signals.asked())

signals.run(main, None)
"""


@pytest.fixture
def start(tmp_path):
    path = tmp_path / "a script.py"
    path.write_text(SCRIPT)

    def run(*words, **environment):
        return subprocess.Popen(
            [sys.executable, path, *words], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_step_in_flight_is_finished_and_the_command_told(number, code, start):
    process = start("steps", "--hub_tok", "hf_secret", "--resume_from=checkpoint-2", "--instance_prompt", "a 'sks' dog")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said = process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == code and "hf_secret" not in str(said)
    assert said[0] == f"Stopped by {number.name}. All is saved. Go on with:" and len(said) == 2
    script = process.args[1]
    words = ["python", str(script), "steps", "--instance_prompt", "a 'sks' dog", "--resume_from_checkpoint", "latest"]
    assert shlex.split(said[1]) == words


def test_a_second_signal_ends_at_once(start):
    process = start("twice")
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM


def test_while_libraries_are_imported_it_ends_without_a_word(start):
    process = start("import")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "") and process.returncode == 130


def test_what_can_be_left_is_left(start):
    process = start("cut")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # for what prints it to be left
    process.terminate()
    out, said = process.communicate(timeout=10)
    assert out == "went on\n" and process.returncode == 143 and said.startswith("Stopped by SIGTERM. Go on with:\n")


def test_workers_take_no_part_and_are_not_left(start):
    """As `torchrun` does, the signal is sent to the whole group."""
    process = start("worker")
    worker = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # for the worker to begin
    os.killpg(process.pid, signal.SIGTERM)
    assert "All is saved" in process.communicate(timeout=30)[1] and process.returncode == 143
    assert not psutil.pid_exists(worker)


def test_the_end_of_the_launcher_is_a_signal(start, tmp_path):
    """Its flags are part of the command to go on with, though it is no longer there to ask."""
    program, flags = tmp_path / "accelerate", ["launch", "--num_processes", "1"]
    program.write_text("import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[4:]]); input()")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_MIXED_PRECISION": "no"}
    start("import").kill()  # writes nothing; the script is there
    launcher = subprocess.Popen(
        [sys.executable, program, *flags, tmp_path / "a script.py", "steps"], env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    said = launcher.stderr.read()
    assert "Stopped by SIGTERM. All is saved." in said and "accelerate launch --num_processes 1 " in said


@pytest.mark.parametrize(("device", "threads", "given"), [("cuda", 1, [4]), ("cuda", 3, []), ("cpu", 1, [])])
def test_cores_are_shared_while_gpus_wait(device, threads, given, monkeypatch):
    """accelerate leaves each process one thread; of 8 cores, two processes have 4 each."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch.share_cores(torch.device(device))
    assert asked == given


@pytest.mark.parametrize("program", [["/usr/bin/accelerate", "launch"], ["-m", "accelerate.commands.launch"]])
def test_the_launchers_flags_are_part_of_the_command(program, monkeypatch):
    typed = ["train.py", "--rank", "4", "--hub_token", "hf_secret"]
    started = ["/usr/bin/python", *program, "--num_processes", "2", *typed]
    parent = SimpleNamespace(parent=lambda: SimpleNamespace(cmdline=lambda: started))
    monkeypatch.setattr(launch.psutil, "Process", lambda: parent)
    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.delenv(launch.LAUNCHED, raising=False)
    monkeypatch.setattr(launch, "launcher", launch.launcher.__wrapped__)  # asked anew
    assert launch.command_line() == ["python", "train.py", "--rank", "4"]
    monkeypatch.setenv(launch.LAUNCHED, "no")
    expected = ["accelerate", "launch", "--num_processes", "2", "train.py", "--rank", "4"]
    assert launch.command_line() == expected
    assert launch.command_line("latest") == [*expected, "--resume_from_checkpoint", "latest"]


# ---- The trainer and the builder -------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Have a signal come: `asked(number)`; it is over with the test."""
    monkeypatch.setattr(signals._now, "asked", None)
    return lambda number: monkeypatch.setattr(signals._now, "asked", number)


def test_a_stopped_training_goes_on_to_the_same_lora(asked, tiny_sd1, bundle1, reference, tmp_path, monkeypatch):  # noqa: F811
    """With no checkpoint of its own; later ones of another run are in nobody's way."""
    output, add = tmp_path / "lora", trainer.ScalarLog.add
    (output / "checkpoint-9").mkdir(parents=True)

    def add_and_ask(self, step, *args, **kwargs):
        add(self, step, *args, **kwargs)
        if step == 2:
            asked(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped) as stopped:
        patch.setattr(trainer.ScalarLog, "add", add_and_ask)
        train(tiny_sd1, bundle1, output)
    assert (stopped.value.number, stopped.value.resume) == (15, "checkpoint-2")
    assert stopped.value.saved == f"{output / 'checkpoint-2'} is written." and not (output / LORA_NAME).exists()
    asked(None)
    assert same(train(tiny_sd1, bundle1, output, "--resume_from_checkpoint", "checkpoint-2"), reference)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-9"]


def test_stopped_while_it_draws_it_trains_no_step_again(asked, tiny_sd1, bundle1, reference, tmp_path, monkeypatch):  # noqa: F811
    output = tmp_path / "lora"

    def stop(*args):
        raise signals.Stopped(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped) as stopped:
        patch.setattr(results, "draw_saved", stop)
        train(tiny_sd1, bundle1, output)
    assert (stopped.value.number, stopped.value.resume) == (2, "latest")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3"] and not list(output.glob("*partial*"))
    monkeypatch.setattr(trainer.ScalarLog, "add", lambda *args, **kwargs: pytest.fail("a step was trained"))
    assert same(train(tiny_sd1, bundle1, output, "--resume_from_checkpoint", "latest"), reference)


def test_a_stopped_build_goes_on_to_the_same_bundle(asked, tiny_sd1, tmp_path, monkeypatch):
    prompts, start_batch, batches = tmp_path / "prompts.txt", collection.SecondMoments.start_batch, []
    prompts.write_text("\n".join(PROMPTS))
    flags = ("--batch_size", 2, "--num_inference_steps", 2)
    build(tmp_path / "whole", tiny_sd1, prompts, *flags)

    def count(self):
        batches.append(1)
        start_batch(self)
        if len(batches) == 2:
            asked(signal.SIGINT)

    monkeypatch.setattr(collection.SecondMoments, "start_batch", count)
    with pytest.raises(signals.Stopped) as stopped:
        build(tmp_path / "bundle", tiny_sd1, prompts, *flags)
    assert stopped.value.saved == f"2 of 3 batches are in {tmp_path / 'bundle.checkpoint'}."
    asked(None)
    build(tmp_path / "bundle", tiny_sd1, prompts, *flags)
    assert len(batches) == 3 and not (tmp_path / "bundle.checkpoint").exists()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert sha256(path) == sha256(tmp_path / "bundle" / path.name)
