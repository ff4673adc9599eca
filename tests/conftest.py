"""Tiny random Stable Diffusion pipelines, and the launcher of scripts, for all tests."""

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "demo", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# What `accelerate config default` asks for on a machine without accelerators; with it, `launch` warns of nothing.
ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
dynamo_config: {dynamo_backend: 'NO'}
mixed_precision: 'no'
num_machines: 1
num_processes: 1
"""


def pytest_collection_finish():
    """Take what importing has made out of garbage collection: a training collects, and half a million objects stay."""
    gc.freeze()


def save_tiny_pipeline(folder: Path, seed: int, cross_attention_dim: int, prediction_type: str, **unet_config) -> Path:
    """Save a random Stable Diffusion that draws 32 x 32 pictures through 8 x 8 latents; the same for the same seed."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from train_world import CONTEXT, make_tokenizer

    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=cross_attention_dim,
            **unet_config,
        )
        vae = AutoencoderKL(
            sample_size=32,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=cross_attention_dim,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline built as Stable Diffusion 1.x is: epsilon, the same number of heads everywhere."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd1"
    return save_tiny_pipeline(folder, 1, cross_attention_dim=32, prediction_type="epsilon", attention_head_dim=4)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline built as Stable Diffusion 2.x is: v-prediction, linear projections, heads by block."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd2"
    return save_tiny_pipeline(
        folder,
        2,
        cross_attention_dim=48,
        prediction_type="v_prediction",
        attention_head_dim=[2, 4],
        use_linear_projection=True,
    )


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Launch a script of the repository as a user does: `run_script("build_nullspace.py", "--num_prompts", 8)`.

    `env` is the whole environment of the process, this one's by default. Unless `check` is off, the test fails with
    the script's output when the script fails.
    """
    config = tmp_path_factory.mktemp("accelerate") / "default_config.yaml"
    config.write_text(ACCELERATE_CONFIG)

    def run(
        script, *args, env: dict[str, str] | None = None, check: bool = True, processes: int = 1
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        if processes > 1:
            # `--cpu` would start one process; told to use GPUs, and then not to, it starts as many as are asked for.
            with socket.socket() as probe:  # accelerate 1.4 does not take 0 for a free one
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command += ["--multi_gpu", "--num_processes", processes, "--main_process_port", port]
            if not torch.cuda.is_available():
                env = (os.environ if env is None else env) | {"ACCELERATE_USE_CPU": "true"}
        command += [script, *args]
        done = subprocess.run(
            [str(part) for part in command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        shown = f"{script} ended with exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        assert done.returncode == 0 or not check, shown
        return done

    return run


@pytest.fixture(scope="session")
def kill_script() -> Callable[..., None]:
    """Start a script and end it with SIGKILL once a file is there: `kill_script(path, "build_nullspace.py", ...)`."""

    def kill(path: Path, script, *args) -> None:
        process = subprocess.Popen(
            [sys.executable, *map(str, (script, *args))], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 120
            while not path.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
        finally:
            process.kill()
        assert process.wait() == -9 and path.exists(), f"{script} was not killed in the middle of its work"

    return kill
