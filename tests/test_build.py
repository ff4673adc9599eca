"""build_nullspace.py: what it collects, from what it is given, and what it refuses."""

import csv
import hashlib
import json
import os
import shutil
import tracemalloc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import build_nullspace
from nullspace.bundle import Bundle
from nullspace.collection import STAGES, Checkpoint, collect_moments
from nullspace.errors import NullSpaceError
from nullspace.hashes import sha256
from nullspace.layers import attention_inputs, find_module, text_encoder_inputs
from nullspace.moments import SecondMoments
from nullspace.names import JOINT, TEXT_ENCODER, TEXT_INPUT
from nullspace.prompts import Prompts
from nullspace.samplers import make_scheduler


PROMPTS = ["a red star", "a photo of a large blue heart on a white background", "a ring", "a moon on black", "a cross"]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


def build(output_dir, model, prompts_file, *flags):
    """Build in this process: `build_nullspace.py` with a short sampling."""
    argv = ["--pretrained_model_name_or_path", model, "--output_dir", output_dir, "--num_inference_steps", 4]
    argv += ["--prompts_file", prompts_file, *flags]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in argv]))
    return json.loads((output_dir / "nullspace_config.json").read_text())


def sums(folder, name=JOINT):
    """Sum of x x^T (in, in) of each input in a group, from the files of a bundle."""
    bundle = Bundle.load(folder, every_group=name != JOINT)
    return {source: spectrum.sum() for source, spectrum in bundle.group(name).items()}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_launched_as_a_user_does(run_script, tiny_sd1, prompts_file, tmp_path):
    bundle = tmp_path / "bundle"
    done = run_script(
        "build_nullspace.py", "--pretrained_model_name_or_path", tiny_sd1, "--prompts_file", prompts_file,
        "--num_inference_steps", 4, "--output_dir", bundle, "--timestep_groups", "stages",
    )  # fmt: skip
    assert {"README.md", "spectra.png", "modules.csv", "joint.safetensors"} <= {path.name for path in bundle.iterdir()}
    assert "rank at 0.999" in done.stdout and f"Wrote {bundle}" in done.stdout
    assert "Collecting" in done.stderr  # the progress bar
    config = json.loads((bundle / "nullspace_config.json").read_text())
    assert len(config["groups"]) == 1 + STAGES
    assert config["prompts"]["count"] == len(PROMPTS) + 1  # and the empty one
    rows = list(csv.DictReader(open(bundle / "modules.csv")))
    assert {row["group"] for row in rows} == {TEXT_INPUT} | {group["name"] for group in config["groups"]}
    assert all(0 < int(row["rank_0.9"]) <= int(row["rank_0.9999"]) <= int(row["in_features"]) for row in rows)


def test_collects_what_the_pipeline_reads(tiny_sd2, prompts_file, tmp_path):
    """Against inputs gathered by hooks of this test while the pipeline draws the prompts one by one."""
    build(tmp_path / "bundle", tiny_sd2, prompts_file, "--seed", 5, "--guidance_scale", 3, "--timestep_groups", "steps")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2, safety_checker=None)
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler.config)
    queries, name = {}, "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    texts, timesteps = [], []
    pipeline.unet.get_submodule(name).register_forward_pre_hook(
        lambda module, args: queries.setdefault(timesteps[-1], []).append(args[0].detach())
    )

    def remember(module, args, kwargs):
        timesteps.append(int(args[1]))
        texts.append(kwargs["encoder_hidden_states"])

    pipeline.unet.register_forward_pre_hook(remember, with_kwargs=True)
    for index, prompt in enumerate(["", *PROMPTS]):
        generator = torch.Generator().manual_seed(5 + index)
        pipeline(prompt, num_inference_steps=4, guidance_scale=3, generator=generator, output_type="latent")
    joint, config = sums(tmp_path / "bundle"), Bundle.load(tmp_path / "bundle").config
    x = torch.cat([each.reshape(-1, each.shape[-1]) for group in queries.values() for each in group]).double()
    assert relative(joint[name], x.T @ x) < 2e-3
    assert config["tokens"][JOINT][name] == len(x)
    for group in config["groups"][1:]:
        (timestep,) = group["timesteps"]
        x = torch.cat([each.reshape(-1, each.shape[-1]) for each in queries[timestep]]).double()
        assert relative(sums(tmp_path / "bundle", group["name"])[name], x.T @ x) < 2e-3
    x = torch.cat([each.reshape(-1, each.shape[-1]) for each in texts[::4]]).double()  # once for each prompt
    assert config["tokens"][TEXT_INPUT][TEXT_INPUT] == len(x)
    assert relative(joint[TEXT_INPUT], x.T @ x) < 2e-3


BUILD_AND_LOOK = """
import runpy, sys
from torch import distributed

sys.path.insert(0, ".")
runpy.run_path("build_nullspace.py", run_name="__main__")
assert not distributed.is_initialized(), "the threads of the process group are left to the end of Python"
"""


def test_two_processes_build_what_one_does(run_script, tiny_sd1, prompts_file, tmp_path):
    (tmp_path / "build_and_look.py").write_text(BUILD_AND_LOOK)
    flags = ("--sampler", "euler_a", "--guidance_scale", 5, "--with_text_encoder")
    build(tmp_path / "one", tiny_sd1, prompts_file, *flags)
    run_script(
        tmp_path / "build_and_look.py", "--pretrained_model_name_or_path", tiny_sd1, "--prompts_file", prompts_file,
        "--num_inference_steps", 4, "--output_dir", tmp_path / "two", *flags, processes=2,
    )  # fmt: skip
    one, two = (Bundle.load(tmp_path / name, text_encoder=True) for name in ("one", "two"))
    assert TEXT_ENCODER in one.spectra
    assert two.config["tokens"] == one.config["tokens"]
    for source, spectrum in one.group(JOINT).items():
        # Eigenvalues are stored in float32 and do not depend on the rounding of the eigenvectors.
        assert relative(two.group(JOINT)[source].eigenvalues, spectrum.eigenvalues) < 1e-5


def test_sums_before_rounding_do_not_depend_on_the_batch(tiny_sd1, tmp_path):
    """In float32, as accumulated: to 1e-5, with a sampler that adds noise at every step."""
    collected = []
    for size in (1, 3):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler("euler_a", pipeline.scheduler.config)
        argv = ["--pretrained_model_name_or_path", "x", "--prompts_file", "x", "--batch_size", str(size)]
        args = build_nullspace.parse_args(argv + ["--num_inference_steps", "3", "--resolution", "32"])
        args.guidance_scale, args.model_type = 5.0, "sd"
        pipeline.scheduler.set_timesteps(3)
        groups = [{"name": JOINT, "timesteps": [round(t) for t in pipeline.scheduler.timesteps.tolist()]}]
        state = build_nullspace.PartialState()
        checkpoint = Checkpoint(tmp_path / str(size), {}, state)
        moments = collect_moments(pipeline, ["", *PROMPTS], groups, checkpoint, args, state)
        collected.append(moments.sums)
    assert collected[0].keys() == collected[1].keys()
    assert max(relative(collected[1][key], collected[0][key]) for key in collected[0]) < 1e-5


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def test_killed_and_run_again_builds_the_same_bundle(kill_script, tiny_sd1, tmp_path):
    """Bit for bit, with a sampler that adds noise at every step; another build does not go on from the checkpoint."""
    prompts, bundle, checkpoint = tmp_path / "prompts.txt", tmp_path / "bundle", tmp_path / "bundle.checkpoint"
    prompts.write_text("\n".join(PROMPTS * 5))
    flags = ("--sampler", "euler_a", "--timestep_groups", "steps", "--with_text_encoder")
    flags += ("--batch_size", 2, "--checkpointing_steps", 2)
    build(tmp_path / "undisturbed", tiny_sd1, prompts, *flags)
    kill_script(
        checkpoint / "process-0.safetensors",
        "build_nullspace.py", "--pretrained_model_name_or_path", tiny_sd1, "--output_dir", bundle,
        "--num_inference_steps", 4, "--prompts_file", prompts, *flags,
    )  # fmt: skip
    assert not bundle.exists()
    with safe_open(checkpoint / "process-0.safetensors", "pt") as file:
        done = int(file.metadata()["batches"])
    assert 0 < done < 13 and done % 2 == 0
    (checkpoint / "partial-process-0.safetensors").write_bytes(b"killed while this was written")
    for name, value in (("seed", 1), ("batch_size", 4)):
        with pytest.raises(NullSpaceError, match=rf"another build \({name}\)"):
            build(bundle, tiny_sd1, prompts, *flags, f"--{name}", value)
    prompts.write_text("\n".join(PROMPTS * 5).replace("star", "stars"))
    with pytest.raises(NullSpaceError, match=r"another build \(prompts\)"):
        build(bundle, tiny_sd1, prompts, *flags)
    prompts.write_text("\n".join(PROMPTS * 5))
    build(bundle, tiny_sd1, prompts, *flags)
    assert not checkpoint.exists()
    digests = [{p.name: sha256(p) for p in (tmp_path / n).glob("*.safetensors")} for n in ("undisturbed", "bundle")]
    assert len(digests[0]) == 7 and digests[0] == digests[1]


class Killed(Exception):
    pass


def test_each_process_goes_on_with_its_own_share(tiny_sd1, tmp_path):
    """The shares of two processes, one after the other; each is stopped after two batches of three.

    Launched with several, accelerate calls the CPU cpu:0.
    """
    args = build_nullspace.parse_args(["--pretrained_model_name_or_path", "x", "--prompts_file", "x"])
    args.num_inference_steps, args.guidance_scale, args.batch_size, args.checkpointing_steps = [2], 5.0, 1, 1
    args.model_type = "sd"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(2)
    groups = [{"name": JOINT, "timesteps": pipeline.scheduler.timesteps.tolist()}]

    def collect(folder, rank, drawn, stop_after=3):
        def draw(prompt, **settings):
            if len(drawn) == stop_after:
                raise Killed
            drawn.extend(prompt)
            pipeline(prompt, **settings)

        models = SimpleNamespace(unet=pipeline.unet, text_encoder=pipeline.text_encoder)
        drawing = type("Drawing", (SimpleNamespace,), {"__call__": lambda self, *a, **k: draw(*a, **k)})
        drawing.to = lambda self, *where: None
        state = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu", 0), is_local_main_process=False
        )
        checkpoint = Checkpoint(tmp_path / folder, {}, state)
        return collect_moments(drawing(**vars(models)), ["", *PROMPTS], groups, checkpoint, args, state)

    for rank in (0, 1):
        whole, first, rest = [], [], []
        expected = collect(f"whole-{rank}", rank, whole)
        with pytest.raises(Killed):
            collect("stopped", rank, first, stop_after=2)
        actual = collect("stopped", rank, rest)
        assert whole == first + rest == ["", *PROMPTS][rank::2]
        assert list(actual.tokens.items()) == list(expected.tokens.items())
        assert all(torch.equal(actual.sums[key], expected.sums[key]) for key in expected.sums)
    assert {path.name for path in (tmp_path / "stopped.checkpoint").iterdir()} == {
        "process-0.safetensors",
        "process-1.safetensors",
    }


def test_a_damaged_checkpoint_is_one_sentence(tiny_sd1, prompts_file, tmp_path):
    (tmp_path / "bundle.checkpoint").mkdir()
    (tmp_path / "bundle.checkpoint" / "process-0.safetensors").write_bytes(b"nothing")
    with pytest.raises(NullSpaceError, match="cannot be read .* delete it"):
        build(tmp_path / "bundle", tiny_sd1, prompts_file)


# ---- Settings --------------------------------------------------------------------------------------------------------


# ---- The text encoder's own layers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_text_encoder(tiny_sd1, prompts_file, tmp_path_factory):
    """Folder of a bundle with them: six prompts in batches of four and two, drawn in two step counts, in two groups."""
    folder = tmp_path_factory.mktemp("with-text-encoder") / "bundle"
    flags = ("--with_text_encoder", "--timestep_groups", "steps", "--batch_size", 4, "--num_inference_steps", 1, 2)
    build(folder, tiny_sd1, prompts_file, *flags)
    return folder


def encoder_sums(model, prompts):
    """Sum of x x^T and tokens of each input of the text encoder's projections, by hooks on every one of them."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    read = {}
    for name in text_encoder_inputs(pipeline.text_encoder):
        find_module(name, None, text_encoder=pipeline.text_encoder).register_forward_pre_hook(
            lambda module, args, name=name: read.setdefault(name, []).append(args[0].detach().double().flatten(0, 1))
        )
    with torch.no_grad():
        for prompt in prompts:
            tokens = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
            pipeline.text_encoder(tokens.input_ids)
    return {name: (sum(x.T @ x for x in xs), sum(map(len, xs))) for name, xs in read.items()}


def test_text_encoder_counts_each_prompt_and_its_empty_one_once(with_text_encoder, tiny_sd1, prompts_file, tmp_path):
    """However many step counts, batches and groups there are; without guidance there is no empty one to count."""
    prompts = ["", *PROMPTS]
    build(tmp_path / "unguided", tiny_sd1, prompts_file, "--with_text_encoder", "--guidance_scale", 1)
    for folder, read in ((with_text_encoder, prompts + [""] * len(prompts)), (tmp_path / "unguided", prompts)):
        bundle, expected = Bundle.load(folder, text_encoder=True), encoder_sums(tiny_sd1, read)
        assert len(expected) == 8 and bundle.config[TEXT_ENCODER]["modules"].keys() == expected.keys()
        assert bundle.spectra[TEXT_ENCODER].keys() == {info["input"] for info in bundle.modules.values()} & {*expected}
        for name, (total, tokens) in expected.items():  # q, k and v of a layer are each compared with what they share
            spectrum = bundle.spectra[TEXT_ENCODER][bundle.modules[name]["input"]]
            assert spectrum.tokens == tokens
            assert relative(spectrum.sum(), total) < 2e-3
        assert bundle.config["tokens"][TEXT_INPUT] == {TEXT_INPUT: tokens}  # its output, as often


def test_text_encoder_is_in_the_table_the_card_and_the_fingerprint(with_text_encoder, tiny_sd1, prompts_file, tmp_path):
    names = set(text_encoder_inputs(StableDiffusionPipeline.from_pretrained(tiny_sd1).text_encoder))
    rows = list(csv.DictReader(open(with_text_encoder / "modules.csv")))
    assert {row["module"] for row in rows if row["group"] == TEXT_ENCODER} == names
    _, ranks = build_nullspace.rank_table(Bundle.load(with_text_encoder, text_encoder=True))
    assert [row[:3] for row in ranks if "encoder" in row[0]] == [["32 (text encoder)", "4", "8"]]
    assert (
        "| text encoder | 8 projections, in `text_encoder.safetensors` |"
        in (with_text_encoder / "README.md").read_text()
    )

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    find_module(min(names), None, text_encoder=pipeline.text_encoder).weight.data[0, 0] += 1
    pipeline.save_pretrained(tmp_path / "finetuned")
    other = build(tmp_path / "other", tmp_path / "finetuned", prompts_file, "--with_text_encoder", "--max_prompts", 1)
    mine = json.loads((with_text_encoder / "nullspace_config.json").read_text())
    parts = [config["base_model"]["fingerprint"] for config in (mine, other)]
    assert {name for name in parts[0] if parts[0][name] != parts[1][name]} == {TEXT_ENCODER}
    assert set(parts[0]) == {"unet", TEXT_ENCODER, "tokenizer", "prediction_type", "noise_schedule"}
    bundle = Bundle.load(with_text_encoder)
    bundle.check(pipeline.unet)  # a LoRA on the UNet alone does not ask for the text encoder
    with pytest.raises(NullSpaceError, match="fingerprints differ"):
        bundle.check(pipeline.unet, pipeline.text_encoder)


def test_without_text_encoder_nothing_of_it_is_there(tiny_sd1, prompts_file, tmp_path):
    config = build(tmp_path / "bundle", tiny_sd1, prompts_file, "--max_prompts", 1)
    assert TEXT_ENCODER not in config and TEXT_ENCODER not in config["tokens"]
    assert not (tmp_path / "bundle" / "text_encoder.safetensors").exists()
    assert "| text encoder | not covered |" in (tmp_path / "bundle" / "README.md").read_text()


def test_text_encoder_merges_and_restricts(with_text_encoder, tiny_sd1, prompts_file, tmp_path):
    """Its sums add up over prompts, and are whole in every range of timesteps."""
    flags = ("--timestep_groups", "steps", "--num_inference_steps", 1, 2)
    (tmp_path / "more.txt").write_text("a green cross on a table\n")
    build(tmp_path / "more", tiny_sd1, tmp_path / "more.txt", *flags, "--with_text_encoder")
    build(tmp_path / "bare", tiny_sd1, tmp_path / "more.txt", *flags)

    def load(folder, timestep_range=None):
        return Bundle.load(folder, timestep_range, text_encoder=True, every_group=True)

    whole, more = load(with_text_encoder), load(tmp_path / "more")
    merged = whole.merge(more)
    merged.save(tmp_path / "merged")
    again = load(tmp_path / "merged")
    expected = encoder_sums(tiny_sd1, ["", *PROMPTS, *[""] * 6, "", "a green cross on a table", "", ""])
    for source, spectrum in again.spectra[TEXT_ENCODER].items():
        total, tokens = expected[source]
        assert spectrum.tokens == tokens
        assert relative(spectrum.sum(), total) < 4e-3
    with pytest.raises(NullSpaceError, match="their text encoder differ"):
        whole.merge(load(tmp_path / "bare"))

    last = whole.config["groups"][-1]
    part = load(with_text_encoder, last["range"])
    assert [group["name"] for group in part.config["groups"]] == [JOINT, last["name"]]
    for source, spectrum in whole.spectra[TEXT_ENCODER].items():
        for kept, stored in zip(part.spectra[TEXT_ENCODER][source], spectrum, strict=True):
            assert torch.equal(torch.as_tensor(kept), torch.as_tensor(stored))


@pytest.mark.parametrize("sampler", build_nullspace.SAMPLERS)
def test_every_sampler_samples(sampler, tiny_sd1, prompts_file, tmp_path):
    config = build(tmp_path / "bundle", tiny_sd1, prompts_file, "--sampler", sampler, "--max_prompts", 1)
    assert config["sampler"] == sampler
    assert len(config["groups"][0]["timesteps"]) == 4


def test_samplers_differ(tiny_sd1, prompts_file, tmp_path):
    found = {}
    for sampler in build_nullspace.SAMPLERS:
        build(tmp_path / sampler, tiny_sd1, prompts_file, "--sampler", sampler, "--num_inference_steps", 6)
        found[sampler] = sums(tmp_path / sampler)["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    names = list(found)
    for i, first in enumerate(names):
        for second in names[:i]:
            if {first, second} != {"ddim", "euler"}:  # on one grid both are Euler's method (arXiv 2010.02502, sec. 4.3)
                assert relative(found[first], found[second]) > 1e-6, (first, second)


@pytest.mark.parametrize("attention", ["cross", "self", "all"])
def test_attention_choices(attention, tiny_sd1, prompts_file, tmp_path):
    config = build(tmp_path / "bundle", tiny_sd1, prompts_file, "--attention", attention, "--max_prompts", 1)
    kinds = {"cross": {"attn2"}, "self": {"attn1"}, "all": {"attn1", "attn2"}}[attention]
    assert {name.split(".")[-2 - name.endswith(".0")] for name in config["modules"]} == kinds
    Bundle.load(tmp_path / "bundle").check(StableDiffusionPipeline.from_pretrained(tiny_sd1).unet)


def test_settings_change_what_is_collected(tiny_sd1, prompts_file, tmp_path):
    """Each flag against the same build without it."""
    reference_config = build(tmp_path / "reference", tiny_sd1, prompts_file)
    reference = sums(tmp_path / "reference")
    for flags in (("--guidance_scale", 1.0), ("--seed", 7), ("--resolution", 48), ("--mixed_precision", "bf16")):
        config = build(tmp_path / flags[0], tiny_sd1, prompts_file, *flags)
        assert config[flags[0][2:]] == flags[1] != reference_config[flags[0][2:]]
        other = sums(tmp_path / flags[0])
        assert max(relative(other[key], reference[key]) for key in other) > 1e-3
        assert config["base_model"]["fingerprint"] == reference_config["base_model"]["fingerprint"]


def test_several_step_counts_are_joined(tiny_sd1, prompts_file, tmp_path):
    flags = ("--max_prompts", 1, "--num_inference_steps", 2, 5)
    config = build(tmp_path / "bundle", tiny_sd1, prompts_file, *flags)
    assert config["groups"][0]["timesteps"] == [1, 201, 401, 501, 601, 801]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 129, 4321])
def test_prompts_are_counted_hashed_and_sampled_as_they_stream(count):
    expected = ["", *(f"prompt {index}\nin two lines" for index in range(count))]
    lines = (f"  {prompt} \n" for prompt in ["  ", *expected] + ["too many"])
    prompts = Prompts(lines, limit=count)
    assert len(prompts) == count + 1
    assert list(prompts) == list(prompts) == expected
    assert prompts.sha256 == hashlib.sha256("\n".join(expected).encode()).hexdigest()
    places = [expected.index(prompt) - 1 for prompt in prompts.examples]
    assert len(places) == min(count, 64) and places[0] == 0
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert all(count / 128 <= gap <= count / 32 for gap in gaps)


def test_prompts_take_no_memory():
    """Peak of Python's own memory while prompts of 10 MB in all are read and gone through."""
    tracemalloc.start()
    prompts = Prompts(f"{index} " + 1000 * "x" for index in range(10_000))
    assert sum(map(len, prompts)) > 1e7
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prompts) == 10_001 and peak < 1e6


def test_prompts_from_a_dataset(tiny_sd1, prompts_file, tmp_path):
    data = tmp_path / "prompts"
    data.mkdir()
    with open(data / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["caption"], *[[prompt] for prompt in PROMPTS]])
    argv = ["--pretrained_model_name_or_path", str(tiny_sd1), "--prompts_dataset_name", str(data), "--prompt_column"]
    args = build_nullspace.parse_args([*argv, "caption", "--max_prompts", "3"])
    assert list(build_nullspace.read_prompts(args)) == ["", *PROMPTS[:3]]
    with pytest.raises(NullSpaceError, match="no column 'text'.*caption"):
        build_nullspace.read_prompts(build_nullspace.parse_args(argv[:-1]))


def test_nan_is_an_error_that_names_a_layer(tiny_sd1, prompts_file, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    layer.weight.data[0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(NullSpaceError, match="blocks.*attn2.*NaN"):
        build(tmp_path / "bundle", tmp_path / "model", prompts_file)
    assert not (tmp_path / "bundle").exists()


NOWHERE = "no/such/model"  # given with bad input that must be found before the model is looked for


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts_file", "{tmp}/empty.txt"], "holds no prompt"),
        (["--prompts_file", "{tmp}/none.txt"], "cannot be read"),
        (["--prompts_file", "{tmp}/picture.png"], "cannot be read"),
        (["--prompts_dataset_name", "{tmp}/no-data"], "cannot be read"),
        (["--prompts_file", "{prompts}", "--output_dir", "{tmp}/empty.txt/bundle"], "cannot be written"),
        (["--prompts_file", "{prompts}", "--output_dir", "{tmp}/other"], "not a bundle"),
        (["--prompts_file", "{prompts}", "--output_dir", "{tmp}/empty.txt"], "is a file"),
        (["--prompts_file", "{prompts}"], "cannot be had"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, tmp_path, prompts_file):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("keep me")
    argv = [flag.format(tmp=tmp_path, prompts=prompts_file) for flag in flags]
    model = ["--pretrained_model_name_or_path", NOWHERE, "--output_dir", f"{tmp_path}/b"]
    args = build_nullspace.parse_args(model + argv)
    with pytest.raises(NullSpaceError, match=message) as caught:
        build_nullspace.main(args)
    assert "\n" not in str(caught.value).strip()
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_more_processes_than_prompts_are_refused(tmp_path, prompts_file, monkeypatch):
    """One without a prompt would have no sums to add to those of the others, who would wait for it for ever."""
    state = SimpleNamespace(
        num_processes=7, is_main_process=True, wait_for_everyone=lambda: None, main_process_first=nullcontext,
        device=torch.device("cpu"),
    )  # fmt: skip
    monkeypatch.setattr(build_nullspace, "PartialState", lambda **settings: state)
    argv = ["--pretrained_model_name_or_path", NOWHERE, "--prompts_file", prompts_file, "--output_dir", tmp_path / "b"]
    args = build_nullspace.parse_args([str(word) for word in argv])
    with pytest.raises(NullSpaceError, match="There are 6 prompts, .* for 7 processes"):
        build_nullspace.main(args)


def test_a_damaged_model_is_refused(tiny_sd1, tmp_path, prompts_file):
    model = shutil.copytree(tiny_sd1, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    args = build_nullspace.parse_args(
        ["--pretrained_model_name_or_path", str(model), "--prompts_file", str(prompts_file)]
        + ["--output_dir", str(tmp_path / "bundle")]
    )
    os.truncate(weights, 1000)
    with pytest.raises(NullSpaceError, match=f"The base model {model} cannot be loaded .*weights"):
        build_nullspace.main(args)
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(NullSpaceError, match="no file named .* check .* --variant"):
        build_nullspace.main(args)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "best"], "invalid choice: 'best'"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be at least 1"),
        (["--nullspace_threshold", "1"], "--nullspace_threshold 1.0 is out of range"),
        (["--prompts_dataset_name", "also"], "either --prompts_file or --prompts_dataset_name"),
        (["--prompt_column", "caption"], "--prompt_column is read with --prompts_dataset_name alone"),
        (["--hub_dataset_id", "me/bundle"], "--hub_dataset_id is read with --push_to_hub alone"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        build_nullspace.parse_args(["--pretrained_model_name_or_path", NOWHERE, "--prompts_file", "x", *flags])
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


def test_help_fits_in_100_columns(capsys):
    with pytest.raises(SystemExit):
        build_nullspace.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert {"model:", "sampling:", "bundle:"} <= set(lines)


def test_a_model_of_another_kind_is_refused(tmp_path, prompts_file):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(NullSpaceError, match="is a FluxPipeline"):
        build(tmp_path / "bundle", tmp_path / "model", prompts_file)


def test_an_error_ends_the_script_with_its_sentence_and_no_traceback(run_script, tmp_path):
    flags = ("--pretrained_model_name_or_path", NOWHERE, "--prompts_file", tmp_path / "no")
    done = run_script("build_nullspace.py", *flags, "--output_dir", tmp_path / "bundle", check=False)
    assert done.returncode != 0
    assert "error: --prompts_file" in done.stderr
    assert "NullSpaceError" not in done.stderr


def test_second_moments_hold_no_features(tiny_sd1):
    """What is kept does not grow with the number of prompts."""
    unet = StableDiffusionPipeline.from_pretrained(tiny_sd1).unet
    moments = SecondMoments(unet, attention_inputs(unet), {500: JOINT})
    sizes = []
    with moments.collect(), torch.no_grad():
        for _ in range(3):
            moments.start_batch()
            unet(torch.randn(2, 4, 8, 8), 500, torch.randn(2, 16, 32))
            sizes.append(sum(tensor.numel() for tensor in moments.sums.values()))
    assert sizes[0] == sizes[1] == sizes[2]
