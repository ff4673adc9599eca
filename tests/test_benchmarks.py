"""The benchmarks' own arithmetic, and the wiring of those that are meant for real weights."""

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from shapes import DEMO, render, render_subject


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bundle_data
import preservation
import real_model

from nullspace.errors import NullSpaceError


# ---- Methods at equal likeness of the subject ------------------------------------------------------------------------

BASE = {"star": {"subject": 0.9, "subject_anywhere": 0.9, "class": 0.8}}


def make_run(method, seed, subjects, drift):
    """A run whose pictures come nearer to the subject step by step, at a drift in proportion to the steps."""
    points = [
        {
            "step": 100 * number, "seconds": 10.0 * number, "class": 0.8 - 0.08 * number,
            "subject": subject, "subject_anywhere": subject, "noise_drift": drift * number, "others_moved": drift,
            "predicted_drift": 2 * drift * number,
        }
        for number, subject in enumerate(subjects, 1)
    ]  # fmt: skip
    return {"method": method, "subject": "star", "seed": seed, "points": points}


def test_costs_are_interpolated_where_the_level_is_reached():
    run = make_run("plain LoRA", 0, [0.7, 0.5], 0.02)
    cost = preservation.at_level(run, BASE["star"], 0.6)  # half way between the two points
    assert cost["step"] == pytest.approx(150) and cost["seconds"] == pytest.approx(15)
    assert cost["noise_drift"] == pytest.approx(0.03) and cost["class_leak"] == pytest.approx(0.15)
    assert preservation.at_level(run, BASE["star"], 0.8)["noise_drift"] == pytest.approx(0.01)  # from the base model
    assert preservation.at_level(run, BASE["star"], 0.4) is None


def test_methods_are_compared_where_both_arrive():
    """The level is a share of the best gain of the plain LoRA; who seldom reaches it is told so."""
    runs = [make_run("plain LoRA", seed, [0.7, 0.5], 0.02) for seed in range(3)]
    runs += [make_run("prior preservation", seed, [0.8, 0.5], 0.04) for seed in range(3)]
    runs += [make_run(preservation.SHIPPED, seed, [0.6, 0.4], 0.002) for seed in range(3)]
    runs += [make_run("never", seed, [0.89, 0.88 if seed else 0.4], 0.001) for seed in range(3)]
    assert preservation.levels_of(runs, BASE)["star"][0.9] == pytest.approx(0.9 - 0.9 * 0.4)
    rows = preservation.compare(runs, BASE)["0.9"]
    assert rows["never"]["reached"] == 1 and rows["never"]["noise_drift"] is None
    shipped = rows[preservation.SHIPPED]  # 0.54 is at 1.3 of its points, at 1.8 of plain's and 1.867 of prior's
    assert shipped["vs_plain"]["noise_drift"] == pytest.approx(1.3 * 0.002 / (1.8 * 0.02))
    found = preservation.headline(rows)
    assert found["drift_vs_prior"] == pytest.approx(1.3 * 0.002 / ((1 + 0.26 / 0.3) * 0.04))
    assert found["time_vs_prior"] == pytest.approx(1.3 / (1 + 0.26 / 0.3))
    assert found["class_leak_vs_prior"] == pytest.approx((1.3 - (1 + 0.26 / 0.3)) * 0.1)
    assert shipped["vs_plain"]["pairs"] == shipped["vs_prior"]["pairs"] == 3
    rows = preservation.compare([run for run in runs if run["method"] != "prior preservation" or run["seed"]], BASE)
    assert rows["0.9"][preservation.SHIPPED]["vs_prior"]["pairs"] == 2
    late = [make_run("prior preservation", seed, [0.8, 0.7 if seed else 0.5], 0.04) for seed in range(3)]
    rows = preservation.compare([run for run in runs if run["method"] != "prior preservation"] + late, BASE)["0.9"]
    assert rows["prior preservation"]["reached"] == 1 and rows[preservation.SHIPPED]["vs_prior"] is None
    assert preservation.headline(rows)["drift_vs_prior"] is None  # rather than that of a single pair


def test_the_audit_is_also_judged_within_a_method():
    """Methods that lie far apart make the correlation of all high, whatever it is within each."""
    runs = [make_run("plain LoRA", seed, [0.7, 0.5, 0.4], 0.02) for seed in range(3)]
    ranking = preservation.rank_correlation(runs)
    assert ranking["points"] == 9 and ranking["spearman"] == pytest.approx(1)
    upside_down = make_run("null space", 0, [0.7, 0.5, 0.4], 0.0001)
    for point, drift in zip(upside_down["points"], (3e-4, 2e-4, 1e-4), strict=True):
        point["predicted_drift"] = drift
    ranking = preservation.rank_correlation([*runs, upside_down])
    assert ranking["spearman"] > 0.8
    within = ranking["within_methods"]
    assert within["methods"] == 2 and within["least"] == pytest.approx(-1) and within["most"] == pytest.approx(1)
    assert within["median"] == pytest.approx(0)


def test_likeness_may_count_new_places():
    """Equally near with the trained prompt is not equally near everywhere."""
    base = {"star": BASE["star"] | {"subject_anywhere": 0.8}}
    runs = [make_run("plain LoRA", 0, [0.7, 0.5], 0.02), make_run(preservation.SHIPPED, 0, [0.7, 0.5], 0.002)]
    for run, nearest in zip(runs, (0.6, 0.7), strict=True):
        run["points"] = [point | {"subject_anywhere": nearest} for point in run["points"]]
    assert preservation.compare(runs, base)["0.9"][preservation.SHIPPED]["reached"] == 1
    rows = preservation.compare(runs, base, "subject_anywhere")
    assert rows["0.9"][preservation.SHIPPED] | {"reached": 0} == rows["0.9"][preservation.SHIPPED]
    assert rows["0.9"]["plain LoRA"]["noise_drift"] == pytest.approx(0.9 * 0.02)  # from the base model's 0.8 to 0.6


def test_what_is_told_of_other_methods(tmp_path):
    """They have a row of panels of their own; the audit reads LoRAs only."""
    heights = []
    for others in ([], ["nearest", "DoRA"]):
        results = preservation.Results(tmp_path / f"{len(others)}.json")
        methods = ["plain LoRA", preservation.SHIPPED, *others]
        runs = results.content["runs"] = {method: make_run(method, 0, [0.8, 0.7, 0.6, 0.5], 0.01) for method in methods}
        for run in runs.values():
            for point in run["points"]:
                point["others_right"] = 1.0
        preservation.tell(results, {"star": BASE["star"] | {"others_right": 1.0}})
        heights.append(Image.open(results.path.with_suffix(".png")).height)
    assert heights[1] == 2 * heights[0]
    told = json.loads(results.path.read_text())
    assert told["ranking"]["LoRAs"]["points"] == 12 and told["ranking"]["all adapters"]["points"] == 16
    assert all(list(told[levels]["0.9"]) == methods for levels in preservation.LIKENESS)


def test_the_class_is_looked_at_where_the_subject_is():
    prompts = preservation.prompts_of("heart")
    assert prompts["class_placed"] == [prompt.replace("sks ", "") for prompt in prompts["subject_placed"]]
    assert len(set(prompts["class_placed"])) == 8 and not any("sks" in prompt for prompt in prompts["class"])


def test_the_subject_in_new_places_is_scored_apart(monkeypatch):
    """A model that draws the subject only where a prompt names it and a background."""

    def draw(self, unet, prompts, seed):
        return np.array([
            render_subject("star", "green") if "sks" in prompt and "background" in prompt
            else render("star", "red", "green") for prompt in prompts
        ])  # fmt: skip

    monkeypatch.setattr(preservation.World, "_probe", lambda self: None)
    monkeypatch.setattr(preservation.World, "noise_drift", lambda self, unet: 0.0)
    monkeypatch.setattr(preservation.World, "draw", draw)
    monkeypatch.setattr(preservation.Bundle, "load", lambda folder: None)
    scores = preservation.World(None).score(None, "star")
    assert scores["subject_placed"] < 0.05 < 0.5 < scores["class_placed"] == pytest.approx(scores["class"])
    assert scores["subject_anywhere"] == pytest.approx((scores["subject"] + scores["subject_placed"]) / 2)


@pytest.mark.parametrize(("method", "count"), [("plain LoRA", 1), ("prior preservation, five prompts", 5)])
def test_instance_prompts_take_turns(method, count, monkeypatch):
    monkeypatch.setattr(preservation.World, "_probe", lambda self: None)
    monkeypatch.setattr(preservation.World, "draw", lambda self, _, prompts, **__: np.full((2, 32, 32, 3), 0.5))
    monkeypatch.setattr(preservation.Bundle, "load", lambda folder: None)
    world, seen, loss = preservation.World(None), [], preservation.diffusion_loss

    def watch(unet, noise_scheduler, latents, timesteps, noise, encoder_hidden_states):
        seen.extend(encoder_hidden_states[:5])
        assert len(latents) == len(encoder_hidden_states) == (10 if "prior" in method else 5)
        return loss(unet, noise_scheduler, latents, timesteps, noise, encoder_hidden_states=encoder_hidden_states)

    monkeypatch.setattr(preservation, "diffusion_loss", watch)
    for _ in preservation.train(world, preservation.METHODS[method], "star", 0, 1e-3, (6,)):
        pass
    prompts = world.encode([prompt.format("sks star") for prompt in preservation.INSTANCE_PROMPTS])
    chosen = [[index for index in range(5) if torch.equal(one, prompts[index])] for one in seen]
    assert all(len(indices) == 1 for indices in chosen) and len(chosen) == 30
    assert {indices[0] for indices in chosen} == set(range(count))


def test_the_learning_rate_is_the_one_of_least_drift_that_arrives():
    runs = [make_run("plain LoRA", 100, [0.7, 0.5], 0.02) | {"rate": 1e-3}]
    runs += [make_run("plain LoRA", 100, [0.6, 0.45], 0.01) | {"rate": 2e-3}]
    runs += [make_run("plain LoRA", 100, [0.8, 0.75], 0.001) | {"rate": 5e-3}]
    runs += [make_run("other", 100, [0.8, 0.7], 0.001) | {"rate": rate} for rate in (1.0,)]
    runs += [make_run("other", 100, [0.8, 0.6], 0.001) | {"rate": 2.0}]  # neither arrives
    assert preservation.tune(runs, BASE["star"]) == {"plain LoRA": 2e-3, "other": 2.0}


def test_results_go_on_where_they_stopped(tmp_path, monkeypatch):
    """A job that fails ends it: what was done is on disk, what was not begun is not begun, and is all that is left."""
    monkeypatch.setattr(preservation, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    jobs, did = {name: (name,) for name in "abcdefgh"}, []

    def do(world, job):
        did.append(job[0])
        time.sleep(0.1)
        if job[0] == "b" and did.count("b") == 1:
            raise OSError("no space left")
        return {"value": job[0]}

    path = tmp_path / "results.json"
    with pytest.raises(OSError, match="no space left"):
        preservation.Results(path).complete("runs", jobs, 1, "some", do)
    assert json.loads(path.read_text())["runs"] == {"a": {"value": "a"}}
    assert did[:2] == ["a", "b"] and len(did) < len(jobs)
    done = preservation.Results(path).complete("runs", jobs, 1, "the others", do)
    assert did.count("a") == 1 and done == {name: {"value": name} for name in jobs}
    assert json.loads(path.read_text())["runs"] == done
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_was_measured_of_another_definition_is_measured_again(tmp_path, monkeypatch):
    results = preservation.Results(tmp_path / "results.json")
    preservation.drop_changed(results)
    for section in ("tuning", "runs"):
        results.content[section] = {f"{name}/star/0": {"method": name} for name in ("DoRA", "nearest", "gone")}
    results.content["memory"] = {"DoRA": {"peak": 1}, "nearest": {"peak": 1}}
    results.save()
    again = preservation.Results(tmp_path / "results.json")
    changed = {"nearest": preservation.METHODS["nearest"] | {"rank": 2}}
    changed["DoRA"] = preservation.METHODS["DoRA"] | {"rates": (1.0,)}  # another grid changes no run
    monkeypatch.setattr(preservation, "METHODS", preservation.METHODS | changed)
    preservation.drop_changed(again)
    assert list(again.content["tuning"]) == list(again.content["runs"]) == ["DoRA/star/0"]
    assert again.content["memory"] == {"DoRA": {"peak": 1}}
    preservation.drop_changed(again)
    assert again.content["memory"]


def test_quick_mode_leaves_the_full_results_alone(tmp_path, monkeypatch):
    """It takes the learning rates from them, and adds those that they lack."""
    did, drawn = [], []

    def complete(self, section, jobs, *_):
        did.extend(jobs.values())
        for key, job in jobs.items():
            done = self.content.setdefault(section, {})
            done[key] = BASE["star"]
            if job[0] == "run":
                done[key] = make_run(job[1], job[3], [0.8, 0.7, 0.6, 0.5], 0.01) | {"rate": job[4]}
                if job[1] == preservation.SHIPPED:  # as near in new places after half the steps
                    for point, nearer in zip(done[key]["points"], (0.7, 0.5, 0.5, 0.5), strict=True):
                        point["subject_anywhere"] = nearer
        return {key: self.content[section][key] for key in jobs}

    monkeypatch.setattr(preservation.Results, "complete", complete)
    monkeypatch.setattr(preservation, "HERE", tmp_path)
    monkeypatch.setattr(preservation, "WORK", tmp_path / "output")
    for name in ("build_bundle", "plot"):
        monkeypatch.setattr(preservation, name, lambda *_: None)
    monkeypatch.setattr(preservation, "draw_picture", lambda *args: drawn.append(args))
    monkeypatch.setattr(sys, "argv", ["preservation.py", "--quick"])
    (tmp_path / "results").mkdir()
    preservation.main()
    runs = [job for job in did if job[0] == "run" and job[3] in preservation.SEEDS]
    assert [job[1:4] for job in runs] == [(method, "star", 0) for method in preservation.COMPARED]
    ((done, rates, _, path),) = drawn
    assert path.parent == tmp_path / "output" and len(done) == len(runs)
    assert rates == {job[1]: job[4] for job in runs}
    written = json.loads((tmp_path / "output" / "preservation.json").read_text())
    assert len(written["runs"]) == len(runs)
    for name, share, leak in (("headline", 1, 0), ("headline_anywhere", 0.5, 0.18 - 0.36)):
        assert written[name]["drift_vs_plain"] == pytest.approx(share)
        assert written[name]["time_vs_prior"] == pytest.approx(share)
        assert written[name]["class_leak_vs_prior"] == pytest.approx(leak)
    assert not list((tmp_path / "results").iterdir())  # `complete`, which writes there, is stood in for


# ---- What a bundle is built from -------------------------------------------------------------------------------------


def test_bundles_differ_in_one_thing_at_a_time():
    settings = bundle_data.settings()
    assert len(settings) == 18 - 4  # all values, of which five are those of one usual bundle
    for setting in settings.values():
        assert sum(setting[key] != usual for key, usual in bundle_data.USUAL.items()) <= 1


def test_bundles_are_tried_anew_where_training_changed(tmp_path, monkeypatch, capsys):
    """The LoRA without a bundle is like the others but for its protection and the rate that suits it."""
    did, trained = [], []
    score = {"noise_drift": 0.01, "subject": 0.5, "moved": dict.fromkeys(bundle_data.SAMPLERS, 0.01)}

    def complete(self, section, jobs, *_):
        did.extend(key for key in jobs if key not in self.content.setdefault(section, {}))
        self.content[section] |= dict.fromkeys(jobs, score)

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(bundle_data, "HERE", tmp_path)
    monkeypatch.setattr(preservation, "WORK", tmp_path)
    monkeypatch.setattr(preservation, "build_bundle", lambda: None)
    monkeypatch.setattr(bundle_data, "bundle_of", lambda setting: None)
    monkeypatch.setattr(bundle_data, "plot", lambda *_: None)
    monkeypatch.setattr(preservation.Results, "complete", complete)
    jobs = len(preservation.SEEDS) * (1 + len(bundle_data.settings()))
    for steps, count in ((400, jobs), (400, 0), (500, jobs)):
        did.clear()
        monkeypatch.setattr(bundle_data, "STEPS", steps)
        bundle_data.main()
        assert len(did) == count

    class Stopped(Exception):
        pass

    def train(world, method, subject, seed, rate, marks):
        trained.append((method, rate))
        raise Stopped

    monkeypatch.setattr(preservation, "train", train)
    monkeypatch.setattr(bundle_data.Bundle, "load", lambda *_, **__: None)
    for setting in (None, bundle_data.USUAL):
        with pytest.raises(Stopped):
            bundle_data.measure(SimpleNamespace(), (setting, 0))
    shipped = preservation.METHODS[preservation.SHIPPED]
    assert trained == [(shipped | {"energy": None}, bundle_data.PLAIN_RATE), (shipped, bundle_data.RATE)]


def test_bundles_are_compared_by_medians_over_seeds(tmp_path):
    names = [bundle_data.NONE, *bundle_data.settings()]
    runs = {
        f"{name}/{seed}": {
            "noise_drift": drift * (1 + index), "subject": 0.5, "moved": dict.fromkeys(bundle_data.SAMPLERS, drift)
        }
        for index, name in enumerate(names) for seed, drift in enumerate((0.01, 0.05, 0.02))
    }  # fmt: skip
    table = bundle_data.medians(runs)
    assert list(table) == names and table[names[1]]["noise_drift"] == pytest.approx(0.04)
    assert table[bundle_data.NONE]["moved"] == dict.fromkeys(bundle_data.SAMPLERS, 0.02)
    bundle_data.plot(table, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 1000


# ---- Real weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(tiny_sd1, tmp_path_factory):
    """Folders of a tiny random DINOv2 and a tiny random CLIP."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ).save_pretrained(folder / "dino")
    processor.save_pretrained(folder / "dino")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd1, subfolder="tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return folder


def test_the_metrics_of_a_model_that_draws_the_photographs(judges):
    features = real_model.Features(judges / "dino", judges / "clip", "cpu")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(12)]
    args = real_model.parse_args(
        ["--instance_data_dir", "x", "--subject", "s", "--class_name", "star", "--lora", "a=b"]
    )
    count = len(real_model.SCENES)
    row, other = [pictures[0]] * count + pictures[1:6], [pictures[0]] * count + pictures[6:11]
    with torch.no_grad():
        same = real_model.score(features, [row], [row], [pictures[0]], args)
        moved = real_model.score(features, [row], [other], [pictures[0]], args)
        texts = features.of_text([scene.format("star") for scene in real_model.SCENES])
        expected = (texts @ features.of_clip([pictures[0]]).T).mean().item()
    assert same["dino"] == pytest.approx(1, abs=1e-5) and same["clip_i"] == pytest.approx(1, abs=1e-5)
    assert same["drift"] == pytest.approx(0, abs=1e-6) and same["clip_t"] == pytest.approx(expected, abs=1e-6)
    assert 1e-6 < moved["drift"] <= 1 and moved["dino"] == same["dino"]


@pytest.mark.parametrize("is_lcm", [False, True])
def test_real_models_are_scored_through_their_pipelines(is_lcm, judges, tiny_sd1, tmp_path, capsys):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    model = DEMO / "shapes-lcm" if is_lcm else tiny_sd1
    pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    zero = {key: torch.zeros_like(value) for key, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "zero", unet_lora_layers=zero)
    words = ["--instance_data_dir", DEMO / "instance_images" / "star", "--subject", "sks star", "--class_name", "star"]
    words += ["--lora", f"random={tmp_path / 'lora'}", "--lora", f"nothing={tmp_path / 'zero'}"]
    words += ["--pretrained_model_name_or_path", model, "--dino_name_or_path", judges / "dino"]
    words += ["--clip_name_or_path", judges / "clip", "--resolution", 16, "--num_images", 1]
    words += ["--num_inference_steps", 1, "--output_dir", tmp_path / "out"]
    real_model.main(real_model.parse_args([str(word) for word in words]))
    scores = json.loads((tmp_path / "out" / "real_model.json").read_text())["scores"]
    assert list(scores) == ["base", "random", "nothing"]
    assert all(math.isfinite(value) for row in scores.values() for value in row.values())
    assert scores["base"]["drift"] == pytest.approx(0, abs=1e-6)
    assert scores["nothing"] == pytest.approx(scores["base"], abs=1e-5)
    assert scores["random"]["drift"] > 1e-6
    picture = Image.open(tmp_path / "out" / "real_model.png")
    assert 3 * 256 < picture.height < 4 * 256
    assert "random" in capsys.readouterr().out
    words += ["--lora", f"mistyped={tmp_path / 'loar'}", "--pretrained_model_name_or_path", "never/looked-for"]
    with pytest.raises(NullSpaceError, match="loar cannot be read as a LoRA"):
        real_model.main(real_model.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    ("loras", "message"),
    [(["no-name"], "NAME=PATH"), (["a=x", "a=y"], "a name of its own"), (["base=x"], "other than base")],
)
def test_a_lora_without_a_name_of_its_own_is_refused(loras, message, capsys):
    words = ["--instance_data_dir", "x", "--subject", "s", "--class_name", "c"]
    with pytest.raises(SystemExit):
        real_model.parse_args(words + [word for lora in loras for word in ("--lora", lora)])
    assert message in capsys.readouterr().err
