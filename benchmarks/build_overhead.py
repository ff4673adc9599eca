"""What collecting second moments costs, against drawing the same prompts without.

    OMP_NUM_THREADS=1 python benchmarks/build_overhead.py

Stable Diffusion 1.x with random weights, 256 x 256, float32, cross-attention, guidance 7.5: the builder's own loop,
with its hooks and without, alternating in one process. Checkpoints, of which a build writes one every ten batches, are
left out. Writes `results/build_overhead.json`.
"""

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from accelerate import PartialState
from common import TEXT, alternate, median, ratio, sd1_unet, write
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from build_nullspace import parse_args
from nullspace.collection import Checkpoint, collect_moments
from nullspace.moments import SecondMoments
from nullspace.names import JOINT
from nullspace.timesteps import timestep_groups
from train_world import make_tokenizer


PROMPTS, STEPS, ROUNDS, RESOLUTION = 1, 10, 4, 256


def sd1_pipeline(folder):
    """A pipeline of the sizes of Stable Diffusion 1.x; the VAE is never used."""
    tokenizer = make_tokenizer(folder)
    tokenizer.model_max_length = TEXT[0]
    sizes = {"hidden_size": TEXT[1], "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                          up_block_types=("UpDecoderBlock2D",) * 4),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes, **ids)),
        tokenizer=tokenizer, unet=sd1_unet(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timed(function, seconds):
    """The same function, whose CPU seconds are put into a list."""

    def call(*args):
        start = time.process_time()
        function(*args)
        seconds.append(time.process_time() - start)

    return call


def main():
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = sd1_pipeline(Path(scratch) / "tokenizer")
        args = parse_args(["--pretrained_model_name_or_path", "x", "--prompts_file", "x"])
        args.num_inference_steps, args.guidance_scale, args.resolution = [STEPS], 7.5, RESOLUTION
        args.model_type, args.batch_size = "sd", PROMPTS
        pipeline.scheduler.set_timesteps(STEPS)
        groups = timestep_groups(pipeline.scheduler.timesteps.tolist(), 1)
        state = PartialState()
        prompts = ["a photo of a cat"] * PROMPTS
        collected, seconds = [], []

        def collecting():
            checkpoint = Checkpoint(Path(scratch) / "bundle", {}, state)
            with patch.object(checkpoint, "save"):
                collected.append(collect_moments(pipeline, prompts, groups, checkpoint, args, state))

        def drawing():
            with patch.object(SecondMoments, "collect", lambda moments: nullcontext()):
                collecting()
            assert not collected.pop().sums  # no hook was there

        with patch.object(SecondMoments, "add", timed(SecondMoments.add, seconds)):
            with patch.object(SecondMoments, "mirror", timed(SecondMoments.mirror, seconds)):
                runs = alternate({"drawing": drawing, "collecting": collecting}, ROUNDS)
    per_step = {name: median(runs[name]) / (PROMPTS * STEPS) for name in runs}
    write(
        "build_overhead",
        setting=f"{PROMPTS} prompt x {STEPS} steps with guidance, {RESOLUTION} pixels, float32; CPU seconds",
        ratio=ratio(runs["collecting"], runs["drawing"]),
        # Far less noisy than the difference of two runs: what collecting takes by itself
        collecting_alone=1 + sum(seconds) / (ROUNDS + 1) / median(runs["drawing"]),
        ratio_wall=ratio(runs["collecting"], runs["drawing"], "wall"),
        seconds_per_prompt_and_step=per_step,
        tokens=sum(count for (group, _), count in collected[-1].tokens.items() if group == JOINT),
        runs=runs,
    )


if __name__ == "__main__":
    main()
