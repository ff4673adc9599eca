"""Print the sha256 of the safetensors files that the demo's models make: what a change that moves nothing leaves alone.

    OMP_NUM_THREADS=1 python benchmarks/file_hashes.py

Bundles and LoRAs of both models, with the text encoder and without, in two precisions, and of a resumed run. They hold
for one kind of machine and one set of library versions: run it before and after a change.
"""

import hashlib
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
BUILD = "--prompts_file demo/world/protected.txt --max_prompts 16 --batch_size 16"
TRAIN = (
    "--instance_data_dir demo/world/star --instance_prompt 'a photo of a sks star' --resolution 64 --seed 0 "
    "--train_batch_size 2 --learning_rate 1e-2 --num_validation_images 1 --report_to none --no-compare_with_base"
)


def run(script, model, output_dir, flags):
    words = ["--pretrained_model_name_or_path", f"demo/{model}", "--output_dir", output_dir, *shlex.split(flags)]
    done = subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {shlex.join(map(str, words))}\n{done.stderr}")


def tell(folder):
    for path in sorted(folder.glob("*.safetensors")):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), f"{folder.name}/{path.name}", flush=True)


def main():
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for model, steps in (("shapes-sd", "--num_inference_steps 4"), ("shapes-lcm", "--num_inference_steps 2")):
            bundle = scratch / f"{model}-bundle"
            run("build_nullspace.py", model, bundle, f"{BUILD} {steps} --with_text_encoder")
            tell(bundle)
            common = f"{TRAIN} --nullspace_name_or_path {bundle} --max_train_steps"
            for name, flags in {
                "lora": "4",
                "lora-text-encoder": "4 --train_text_encoder",
                "lora-bf16": "4 --mixed_precision bf16 --no-upcast_before_saving",
                "lora-hard": "4 --nullspace_softness inf --cache_latents --snr_gamma 5 --lcm_loss epsilon",
            }.items():
                folder = scratch / f"{model}-{name}"
                run("train_dreambooth_nullspace.py", model, folder, f"{common} {flags}".replace(
                    *("--lcm_loss epsilon", "") if model == "shapes-sd" else ("", "")
                ))  # fmt: skip
                tell(folder)
        stopped = scratch / "shapes-sd-resumed"
        common = f"{TRAIN} --nullspace_name_or_path {scratch / 'shapes-sd-bundle'} --max_train_steps"
        run("train_dreambooth_nullspace.py", "shapes-sd", stopped, f"{common} 2 --checkpointing_steps 2")
        run("train_dreambooth_nullspace.py", "shapes-sd", stopped, f"{common} 4 --resume_from_checkpoint latest")
        tell(stopped)


if __name__ == "__main__":
    main()
