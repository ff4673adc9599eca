"""The benchmarks' own arithmetic, and the wiring of those that are meant for real weights."""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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

from world import DEMO, FOLDER, protected_prompts


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bundle_data
import bundle_size
import memory_guide
import methods
import preservation
import real_model
import resumable
import scoring
from methods import METHODS, TIER_ONE

import build_nullspace
import world
from nullspace.errors import NullSpaceError
from nullspace.families import get_family
from nullspace.names import DEFAULT_SOFTNESS, DEFAULT_THRESHOLDS, DEFAULT_WORD_RATE, WORD_SOFTNESS


# ---- Methods at equal likeness of the subject ------------------------------------------------------------------------

RIGHT = dict.fromkeys([key for key in preservation.SHOWN if key.endswith("_right")] + ["diversity"], 1.0)
BASE = {
    "heart": {
        "subject": 0.9, "placed": 0.9, "anywhere": 0.9, "class": 0.8, "class_placed": 0.8, "noise_drift": 0.0, **RIGHT
    }
}  # fmt: skip
PLAIN, PRIOR, SHIPPED = preservation.PLAIN, preservation.REFERENCES["prior"], preservation.SHIPPED
SETTING = {"rate": 1e-3, "weight": None}


def make_run(method, seed, subjects, drift, subject="heart", **setting):
    """A run whose pictures come nearer to the subject step by step, at a drift in proportion to the steps."""
    points = [
        {
            "step": 100 * number, "seconds": 10.0 * number, "class": 0.8 - 0.08 * number, "class_placed": 0.8,
            "subject": distance, "anywhere": distance, "placed": distance, "noise_drift": drift * number,
            "predicted_drift": 2 * drift * number, **RIGHT,
        }
        for number, distance in enumerate(subjects, 1)
    ]  # fmt: skip
    return {"method": method, "subject": subject, "seed": seed, **SETTING, **setting, "points": points}


def test_scores_are_interpolated_where_the_level_is_reached():
    run = make_run(PLAIN, 0, [0.7, 0.5], 0.02)
    there = preservation.at_level(run, BASE["heart"], 0.6)  # half way between the two points
    assert there["step"] == pytest.approx(150) and there["seconds"] == pytest.approx(15)
    assert there["noise_drift"] == pytest.approx(0.03) and there["class_leak"] == pytest.approx(0.15)
    assert there["class_placed_leak"] == pytest.approx(0)
    from_base = preservation.at_level(run, BASE["heart"], 0.8)  # half way to the first
    assert from_base["noise_drift"] == pytest.approx(0.01) and from_base["seconds"] == pytest.approx(5)
    assert preservation.at_level(run, BASE["heart"], 0.4) is None


def test_methods_are_compared_where_both_arrive():
    """The level is a share of the best gain of the plain LoRA; who seldom reaches it is told so."""
    runs = [make_run(PLAIN, seed, [0.7, 0.5], 0.02) for seed in range(3)]
    runs += [make_run(PRIOR, seed, [0.8, 0.5], 0.04) for seed in range(3)]
    runs += [make_run(SHIPPED, seed, [0.6, 0.4], 0.002 * (1 + seed)) for seed in range(3)]
    runs += [make_run("never", seed, [0.89, 0.88 if seed else 0.4], 0.001) for seed in range(3)]
    assert preservation.levels_of(runs, BASE)["heart"] == pytest.approx({0.9: 0.9 - 0.9 * 0.4, 1.0: 0.5})
    table = preservation.compare(runs, BASE)
    assert list(table) == ["0.9", "1.0"]
    rows = table["0.9"]
    assert rows["never"] == {"reached": 1, "runs": 3, "scores": None}
    shipped = rows[SHIPPED]  # 0.54 is at 1.3 of its points, at 1.8 of plain's and 1.867 of prior's
    drift = shipped["vs_plain"]["noise_drift"]
    assert drift["median"] == pytest.approx(1.3 * 0.004 / (1.8 * 0.02)) and drift["runs"] == 3
    assert drift["by_subject"]["heart"]["least"] == pytest.approx(drift["median"] / 2)
    assert drift["by_subject"]["heart"]["most"] == pytest.approx(drift["median"] * 1.5)
    assert shipped["vs_output"] is None and shipped["scores"]["seconds"]["median"] == pytest.approx(13)
    found, prior = preservation.headline(rows), 1 + 0.26 / 0.3
    assert found["drift_vs_prior"] == pytest.approx(1.3 * 0.004 / (prior * 0.04))
    assert found["time_vs_prior"] == pytest.approx(1.3 / prior)
    assert found["class_leak_vs_prior"] == pytest.approx((1.3 - prior) * 0.1)
    assert found["drift_vs_output"] is None
    rows = preservation.at_the_end(runs, BASE)
    assert next(iter(rows)) == "base model" and rows["base model"]["scores"]["subject"]["median"] == 0.9
    last = rows[SHIPPED]
    assert last["runs"] == 3 and last["scores"]["noise_drift"]["median"] == pytest.approx(0.008)
    assert found["by_subject"]["heart"]["drift_vs_plain"] == drift["by_subject"]["heart"]
    at_all = table["1.0"][SHIPPED]["vs_plain"]["seconds"]["median"]  # 0.5 is at 1.5 of its points, at 2 of plain's
    assert at_all == pytest.approx(1.5 / 2)
    late = [make_run(PRIOR, seed, [0.8, 0.7 if seed else 0.5], 0.04) for seed in range(3)]
    rows = preservation.compare([run for run in runs if run["method"] != PRIOR] + late, BASE)["0.9"]
    assert rows[PRIOR]["reached"] == 1 and rows[SHIPPED]["vs_prior"] is None
    assert preservation.headline(rows)["drift_vs_prior"] is None  # rather than that of a single pair


def test_the_audit_is_also_judged_within_a_method():
    """Methods that lie far apart make the correlation of all high, whatever it is within each."""
    runs = [make_run(PLAIN, seed, [0.7, 0.5, 0.4], 0.02) for seed in range(3)]
    ranking = preservation.rank_correlation(runs)
    assert ranking["points"] == 9 and ranking["spearman"] == pytest.approx(1)
    upside_down = make_run(SHIPPED, 0, [0.7, 0.5, 0.4], 0.0001)
    for point, drift in zip(upside_down["points"], (3e-4, 2e-4, 1e-4), strict=True):
        point["predicted_drift"] = drift
    ranking = preservation.rank_correlation([*runs, upside_down])
    assert ranking["spearman"] > 0.8
    within = ranking["within_methods"]
    assert within["methods"] == 2 and within["least"] == pytest.approx(-1) and within["most"] == pytest.approx(1)
    assert within["median"] == pytest.approx(0)


def test_likeness_may_count_new_places():
    """Equally near with the trained prompt is not equally near everywhere."""
    base = {"heart": BASE["heart"] | {"anywhere": 0.8}}
    runs = [make_run(PLAIN, 0, [0.7, 0.5], 0.02), make_run(SHIPPED, 0, [0.7, 0.5], 0.002)]
    for run, nearest in zip(runs, (0.6, 0.7), strict=True):
        run["points"] = [point | {"anywhere": nearest} for point in run["points"]]
    assert preservation.compare(runs, base)["0.9"][SHIPPED]["reached"] == 1
    rows = preservation.compare(runs, base, "anywhere")["0.9"]
    assert rows[SHIPPED] == {"reached": 0, "runs": 1, "scores": None}
    assert rows[PLAIN]["scores"]["noise_drift"]["median"] == pytest.approx(0.9 * 0.02)  # from the base's 0.8 to 0.6


def test_settings_are_swept_alike(tmp_path, monkeypatch):
    """Rates first, at the usual weight; then weights, at the rate chosen: where most subjects arrive, least drift."""
    names, base = [PLAIN, PRIOR], {subject: BASE["heart"] for subject in ("star", "arrow")}
    results, tried = preservation.Results(tmp_path / "results.json", None, None, 1), []

    def complete(section, jobs, description):
        assert section == "tuning" and all(job[3] == preservation.TUNING_SEED for job in jobs.values())
        tried.extend(job[1:3] + job[4:] for job in jobs.values())
        done = {}
        for key, (_, name, subject, seed, rate, weight) in jobs.items():
            nearest = 0.9 - 0.1 * math.log10(rate / 1e-5)  # higher rates come nearer, and the arrow is harder
            nearest += 0.1 * (subject == "arrow" and rate < 1e-3)
            done[key] = make_run(name, seed, [nearest], rate * 10 / (weight or 1), subject, rate=rate, weight=weight)
        return done

    monkeypatch.setattr(results, "complete", complete)
    runs, chosen = preservation.sweep(results, base, names, list(base))
    # 0.9 of the gain of the highest rate is out of reach of others on both; the highest weight drifts least
    assert chosen == {PLAIN: {"rate": 5e-3, "weight": None}, PRIOR: {"rate": 5e-3, "weight": 3.0}}
    rates = [(name, subject, rate, METHODS[name].weights[0]) for name in names for rate in METHODS[name].rates
             for subject in base]  # fmt: skip
    assert tried[:16] == rates and len(runs) == len(tried) == 20
    assert tried[16:] == [(PRIOR, subject, 5e-3, weight) for weight in (0.3, 3.0) for subject in base]


def test_every_method_is_swept_over_the_same_range():
    for method in METHODS.values():
        assert max(method.rates) / min(method.rates) == pytest.approx(10) and len(method.rates) == 4
        assert (
            len(method.weights) in (1, 3)
            and (method.weights[0] is None) == (len(method.weights) == 1)
            or (
                len(method.weights) == 1  # variants of tier one's methods keep its usual weight
            )
        )
        if len(method.weights) == 3:
            assert max(method.weights) / min(method.weights) == pytest.approx(10, rel=0.01)


def test_both_tiers_are_told(tmp_path, capsys):
    """Tier two has a picture, a table and levels of its own, which leave tier one's as they are."""
    told = []
    for others in ([], ["DCO", "OFT"]):
        results = preservation.Results(tmp_path / f"{len(others)}.json", None, None, 1)
        first = [PLAIN, PRIOR, SHIPPED]
        results.content["runs"] = {name: make_run(name, 0, [0.8, 0.6], 0.01) for name in first}
        if others:
            runs = {name: make_run(name, 100, [0.8, 0.7], 0.01, "star") for name in first + others}
            results.content["tier_two"] = {"runs": runs}
        preservation.tell(results, BASE | {"star": BASE["heart"]})
        told.append(json.loads(results.path.read_text()))
    assert not (tmp_path / "0_every_method.png").exists()
    widths = [Image.open(tmp_path / name).width for name in ("0.png", "2.png", "2_every_method.png")]
    assert widths[0] == widths[1] and widths[2] > 2 * widths[1]
    assert all(told[0][key] == told[1][key] for key in ("levels", "levels_anywhere", "headline", "ranking"))
    assert told[1]["headline"]["drift_vs_prior"] == told[1]["headline"]["time_vs_plain"] == pytest.approx(1)
    assert list(told[1]["tier_two"]["levels"]["0.9"]) == [PLAIN, PRIOR, SHIPPED, "DCO", "OFT"]
    assert "OFT" in capsys.readouterr().out


def test_each_method_is_in_a_panel():
    runs = [make_run(name, 100, [0.8, 0.7], 0.01) for name in METHODS]
    others, ours, varied = ({run["method"] for run in panel} for panel in preservation.panels_of(runs).values())
    assert others & ours == ours & varied == others & varied == {SHIPPED} and others | ours | varied == set(METHODS)
    assert {PLAIN, "DCO"} < others and "null space" in ours and len(varied) == 1 + 2 * len(TIER_ONE)


# ---- What is scored --------------------------------------------------------------------------------------------------


def test_the_class_is_looked_at_where_the_subject_is():
    prompts = scoring.prompts_of("arrow", "sks arrow")
    assert len(prompts["placed"]) == 15 and tuple(prompts) == scoring.KINDS
    assert prompts["class_placed"] == [
        prompt.replace("a sks arrow", "an arrow").replace("sks ", "") for prompt in prompts["placed"]
    ]
    assert set(prompts["class"]) == {"a photo of an arrow"}
    assert not set(prompts["unlike"]) & set(scoring.PROBED)


class DrawingBase(scoring.Base):
    """A model that draws what prompts ask for, and the true subject, on its background, where it is named."""

    probe = None

    def __init__(self):
        self.pipeline = "base"

    def noise_drift(self, pipeline):
        return 0.0

    def draw(self, pipeline, prompts, seed):
        pictures = []
        for prompt in prompts:
            wanted = world.parse(prompt)
            background = wanted.background or world.Background("plain", ("white",))
            if "sks" in prompt:
                pictures.append(world.SUBJECTS["square"].render(background))
            else:
                each = world.Object(wanted.objects[0].get("shape", "square"), "red")
                pictures.append(world.Scene((each,), background).render())
        return np.array(pictures)


def test_the_subject_and_all_else_are_scored_apart(monkeypatch):
    places = ["a {} on a black background", "a {} on a pink background", "a small {} on black"]
    few = {kind: prompts[:1] for kind, prompts in scoring.DRAWN.items()}
    few["combinations"] = ["a red star on a white background", "a blue star on a white background"]
    monkeypatch.setattr(scoring, "DRAWN", few)
    monkeypatch.setattr(scoring, "REPEATS", 2)
    purple = np.array(world.PALETTE["purple"])  # which nothing else has here
    distance = lambda _, pictures: 1.0 - (np.abs(pictures - purple).max(-1) < 0.1).any((1, 2))  # noqa: E731
    monkeypatch.setattr(scoring, "subject_distance", distance)
    monkeypatch.setattr(scoring, "places_of", lambda subject: places)
    scores = DrawingBase().score("tuned", "square", "sks square")
    assert scores["subject"] == scores["placed"] == scores["anywhere"] == 0 and scores["class"] == 1
    assert scores["placed_right"] == pytest.approx(2 / 3)  # it is not small, whatever it looks like
    assert scores["class_right"] == 1 and scores["class_placed_right"] == pytest.approx(2 / 3)
    assert DrawingBase().nearness("tuned", "square", "sks square") == {
        key: scores[key] for key in ("subject", "noise_drift")
    }
    assert scores["combinations_right"] == 0.5 and scores["diversity"] == 0 and scores["others_moved"] == 0


# ---- How methods train -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_prompts(tmp_path_factory):
    """The folder of a bundle of a few prompts."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "prompts.txt").write_text("a red star on blue\na circle on green\n")
    words = ["--pretrained_model_name_or_path", scoring.MODEL, "--prompts_file", folder / "prompts.txt"]
    words += ["--num_inference_steps", 2, "--output_dir", folder / "bundle", "--nullspace_threshold", 0.999]
    build_nullspace.main(build_nullspace.parse_args([str(word) for word in words]))
    return folder / "bundle"


@pytest.fixture(scope="module")
def bench(few_prompts):
    """The base model and that bundle."""
    return scoring.Base(few_prompts)


def taught(bench, name, steps=2):
    """The pipeline, and the LoRA's A and B by layer, after a few steps at the method's lowest rate."""
    method = METHODS[name]
    ((step, seconds, pipeline),) = methods.train(
        bench, method, "arrow", 0, method.rates[0], method.weights[0], (steps,)
    )
    assert step == steps and seconds > 0
    return pipeline


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("prior preservation", "prior prediction")
                                  and not name.endswith((f", {methods.TRAINED}", ", no captions"))])  # fmt: skip
def test_every_method_trains(name, bench, few_prompts, monkeypatch):
    """Each moves the subject's prompts; in the null space what is closed is answered with nothing."""
    monkeypatch.setattr(scoring, "PROBED", ["a red star"])
    monkeypatch.setattr(methods, "bundle_folder", lambda prompts: few_prompts)
    pipeline, method = taught(bench, name), METHODS[name]
    called = method.called("arrow")
    embeddings = bench.encode([f"a photo of a {called}"], pipeline)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = pipeline.unet(latents, 500, embeddings).sample
        before = bench.unet(latents, 500, bench.encode([f"a photo of a {called}"])).sample
    assert not torch.equal(moved, before)
    assert torch.equal(bench.encode(["a red star"], pipeline), bench.encode(["a red star"]))
    if method.protects:
        leaks = []
        for module, item in bench.bundle.protected().items():
            down = pipeline.unet.get_submodule(module).lora_A.default.weight
            leaks.append(((down @ item.basis[:, : item.rank]).norm() / down.norm()).item())
        # With prompts of one's own, what is closed is not quite what the bundle closes
        assert (max(leaks) < 1e-4) == ("nullspace_extra_prompts" not in method.flags)
    if method.adapter == "oplora":
        for module, weight in bench.weights.items():
            layer = pipeline.unet.get_submodule(module)
            change = layer.lora_B.default.weight @ layer.lora_A.default.weight
            left, _, right = torch.linalg.svd(weight)
            assert (left[:, :5].T @ change).norm() < 1e-5 and (change @ right[:5].T).norm() < 1e-5
    assert (name == "textual inversion") == (not methods.predicted_drifts(bench, pipeline.unet))


@pytest.mark.parametrize(
    ("name", "batch"), [("plain LoRA", 5), ("prior preservation", 10), ("prior prediction", 10), ("DCO", 5)]
)
def test_what_is_trained_along(name, batch, bench, monkeypatch):
    """Class pictures have their own noise as target, protected prompts what the model itself predicts."""
    monkeypatch.setattr(methods, "CLASS_PICTURES", 2)
    asked, of_base, called = [], [], bench.unet.forward
    draw = scoring.Base.draw
    monkeypatch.setattr(bench, "draw", lambda pipeline, prompts, seed, steps: asked.extend(prompts)
                        or draw(bench, pipeline, prompts, seed, 1))  # fmt: skip
    pipeline = taught(bench, name, 1)
    monkeypatch.setattr(
        bench.unet, "forward", lambda *inputs, **named: of_base.append(inputs) or called(*inputs, **named)
    )
    numbers = torch.Generator().manual_seed(0)
    loss = methods.Loss(bench, pipeline.unet, METHODS[name], METHODS[name].weights[0], "arrow", 0, numbers)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    latents, conditions = torch.randn(5, 4, 16, 16), bench.encode(["a photo of a sks arrow"] * 5)
    of_base.clear()
    assert loss(latents, conditions, conditions).isfinite() and seen == [batch]
    assert len(of_base) == (name in ("prior prediction", "DCO"))
    expected = {"prior preservation": {"a photo of an arrow"}, "prior prediction": set(protected_prompts()[:2])}
    assert set(asked) == expected.get(name, set())


def test_half_of_the_captions_name_the_background():
    """Two take turns for each picture; the identifier is the method's own."""
    captions = [several for _, several in methods.captions_of(METHODS[PLAIN], "star")]
    assert len(captions) == 5 and all(bare == "a photo of a sks star" and bare in named for bare, named in captions)
    rare = [several for _, several in methods.captions_of(METHODS[f"{PLAIN}, {methods.TRAINED}"], "star")]
    assert rare == [[caption.replace("sks", methods.TRAINED) for caption in several] for several in captions]
    own = [several for _, several in methods.captions_of(METHODS["null space, word"], "star")]
    assert own == [[caption.replace("sks star", "sks-star") for caption in several] for several in captions]
    assert {len(several) for _, several in methods.captions_of(METHODS[f"{PLAIN}, no captions"], "star")} == {1}


def test_the_methods_have_the_trainers_own_defaults():
    args = methods.trainer_args(METHODS["null space"], "star", 3e-3)
    assert args.nullspace_softness == DEFAULT_SOFTNESS and args.nullspace_threshold == DEFAULT_THRESHOLDS["energy"]
    assert args.rank == 4 and args.learning_rate == 3e-3 and args.placeholder_token is None
    word = methods.trainer_args(METHODS[SHIPPED], "star", 3e-3)
    assert word.placeholder_token == "sks-star" and word.initializer_token == "star"
    assert (word.num_vectors, word.max_drift, word.rank) == (4, 0.05, 4)
    assert word.nullspace_softness == WORD_SOFTNESS and word.word_learning_rate == DEFAULT_WORD_RATE
    alone = methods.trainer_args(METHODS["textual inversion"], "star", 3e-3)
    assert alone.word_only and alone.word_learning_rate == 3e-3


# ---- Running, resumably ----------------------------------------------------------------------------------------------


def test_results_go_on_where_they_stopped(tmp_path, monkeypatch):
    """A job that fails ends it: what was done is on disk, what was not begun is not begun, and is all that is left."""
    monkeypatch.setattr(resumable, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    jobs, did = {name: (name,) for name in "abcdefgh"}, []

    def do(subject, job):
        did.append(job[0])
        time.sleep(0.1)
        if job[0] == "b" and did.count("b") == 1:
            raise OSError("no space left")
        return {"value": job[0]}

    path = tmp_path / "results.json"
    with pytest.raises(OSError, match="no space left"):
        preservation.Results(path, None, do, 1).complete("runs", jobs, "some")
    assert json.loads(path.read_text())["runs"] == {"a": {"value": "a"}}
    assert did[:2] == ["a", "b"] and len(did) < len(jobs)
    done = preservation.Results(path, None, do, 1).complete("runs", jobs, "the others")
    assert did.count("a") == 1 and done == {name: {"value": name} for name in jobs}
    assert json.loads(path.read_text())["runs"] == done
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_was_measured_of_another_definition_is_measured_again(monkeypatch):
    content = {}
    preservation.drop_changed(content)
    content["tier_two"] = {"runs": {}}
    for section in ("tuning", "runs", "at_chosen"):
        content[section] = {f"{name}/star/0": {"method": name} for name in ("DoRA", "DCO", "gone")}
    content["memory"] = {"DoRA": {"peak": 1}, "DCO": {"peak": 1}}
    again = json.loads(json.dumps(content))
    changed = {"DCO": replace(METHODS["DCO"], token="ohwx")}
    changed["DoRA"] = replace(METHODS["DoRA"], rates=(1.0,))  # another grid changes no run
    monkeypatch.setattr(preservation, "METHODS", METHODS | changed)
    preservation.drop_changed(again)
    assert "tier_two" not in again  # which is made of the sweep
    assert list(again["tuning"]) == list(again["runs"]) == list(again["at_chosen"]) == ["DoRA/star/0"]
    assert again["memory"] == {"DoRA": {"peak": 1}}
    monkeypatch.setattr(preservation, "world_hash", lambda: "another")
    preservation.drop_changed(again)
    assert set(again) == {"setting", "methods"} and again["setting"]["world"] == "another"


def stood_in(monkeypatch, tmp_path, did):
    """Runs of `preservation.main` whose jobs are only noted, with results in a folder of the test's."""

    def complete(self, section, jobs, description, fresh=False):
        done = self.content.setdefault(section, {})
        for key, job in jobs.items():
            if key not in done:
                did.append(job)
                done[key] = BASE["heart"]
                if job[0] in ("attempt", "run"):
                    nearest = 0.6 - 0.01 * (job[1] == SHIPPED)
                    rate = {"rate": job[4], "weight": job[5]}
                    done[key] = make_run(job[1], job[3], [0.8, nearest], job[4], job[2], **rate)
        self.save()
        return {key: done[key] for key in jobs}

    monkeypatch.setattr(preservation.Results, "complete", complete)
    monkeypatch.setattr(preservation, "HERE", tmp_path)
    monkeypatch.setattr(preservation, "WORK", tmp_path / "output")
    for name in ("build_bundle", "plot"):
        monkeypatch.setattr(preservation, name, lambda *_: None)
    for folder in ("results", "output"):
        (tmp_path / folder).mkdir()

    def launch(*words):
        did.clear()
        monkeypatch.setattr(sys, "argv", ["preservation.py", *words])
        preservation.main()
        return [[job[1:] for job in did if job[0] == kind] for kind in ("attempt", "run")]

    return launch


def test_tiers(tmp_path, monkeypatch):
    """Nothing is tuned on the subjects that are reported; quick mode leaves the full results alone."""
    launch = stood_in(monkeypatch, tmp_path, [])
    usual = {name: (METHODS[name].rates[1], METHODS[name].weights[0]) for name in TIER_ONE}
    assert launch("--quick") == [[], [(name, "star", 0, *usual[name]) for name in TIER_ONE]]
    assert not list((tmp_path / "results").iterdir())
    assert len(json.loads((tmp_path / "output" / "preservation.json").read_text())["runs"]) == len(TIER_ONE)

    tuned, reported = launch()
    assert {run[1] for run in tuned} == set(world.TUNING_SUBJECTS) and {run[2] for run in tuned} == {100}
    assert len(tuned) == 2 * (4 * len(TIER_ONE) + 2 * 2)
    written = json.loads((tmp_path / "results" / "preservation.json").read_text())
    settings = {name: tuple(setting.values()) for name, setting in written["chosen"].items()}
    assert reported == [
        (name, subject, seed, *settings[name])
        for seed in range(3) for subject in world.REPORTED_SUBJECTS for name in TIER_ONE
    ]  # fmt: skip
    assert set(written["headline"]["by_subject"]) == set(world.REPORTED_SUBJECTS)
    assert set(written["memory"]) == set(TIER_ONE)
    assert launch() == [[], []]  # all is there
    assert launch("--quick")[1] == [(name, "star", 0, *settings[name]) for name in TIER_ONE]

    tuned, reported = launch("--tier", "2")
    assert {run[0] for run in tuned} == set(METHODS) - set(TIER_ONE)
    assert sorted(run[0] for run in reported) == sorted(METHODS)
    assert {run[1:3] for run in tuned + reported} == {("star", 100)}
    again = json.loads((tmp_path / "results" / "preservation.json").read_text())
    assert again["headline"] == written["headline"] and set(again["tier_two"]["runs"]) == set(METHODS)
    assert set(again["tier_two"]["levels"]["0.9"]) == set(METHODS)


# ---- What a bundle is built from -------------------------------------------------------------------------------------


def test_bundles_differ_in_one_thing_at_a_time():
    settings = bundle_data.settings()
    assert (
        len(settings) == sum(len(values) - 1 for values in bundle_data.VARIED.values()) + 2
    )  # usual, and the trainer's
    folders = {name: bundle_data.folder_of(setting) for name, setting in settings.items()}
    once = len(bundle_data.VARIED["stored"]) - 1  # built, and stored in so many other ways
    assert len(set(folders.values())) == len(settings) - once - 1  # two ranges share one
    settings.pop(bundle_data.name_of(bundle_data.OWN))
    for setting in settings.values():
        assert sum(setting[key] != usual for key, usual in bundle_data.USUAL.items()) <= 1


def test_bundles_are_tried_anew_where_training_changed(tmp_path, monkeypatch, capsys):
    """The LoRA without a bundle is like the others but for its protection and the rate that suits it."""
    did, trained = [], []
    score = {"noise_drift": 0.01, "subject": 0.5, "moved": dict.fromkeys(bundle_data.SAMPLERS, 0.01)}

    def complete(self, section, jobs, *_):
        did.extend(key for key in jobs if key not in self.content.setdefault(section, {}))
        self.content[section] |= dict.fromkeys(jobs, score)
        return dict.fromkeys(jobs, score)

    (tmp_path / "results").mkdir()
    for name, value in {"HERE": tmp_path, "WORK": tmp_path, "build_bundle": lambda: None}.items():
        monkeypatch.setattr(bundle_data, name, value)
    built = dict.fromkeys(bundle_data.settings(), {"cpu_seconds": 1.0, "bytes": 1000, "let_through": 0.001})
    monkeypatch.setattr(bundle_data, "measure_bundles", lambda results: results.content.update(bundles=built))
    monkeypatch.setattr(bundle_data, "plot", lambda *_: None)
    monkeypatch.setattr(resumable.Results, "complete", complete)
    jobs = len(preservation.SEEDS) * (1 + len(bundle_data.settings()))
    for steps, count in ((400, jobs), (400, 0), (500, jobs)):
        did.clear()
        monkeypatch.setattr(bundle_data, "STEPS", steps)
        bundle_data.main()
        assert len(did) == count

    class Stopped(Exception):
        pass

    def train(base, method, subject, seed, rate, weight, marks):
        trained.append((method, rate))
        raise Stopped

    monkeypatch.setattr(bundle_data, "train", train)
    monkeypatch.setattr(bundle_data, "load", lambda _: (None, 0))
    for setting in (None, bundle_data.USUAL):
        with pytest.raises(Stopped):
            bundle_data.measure(SimpleNamespace(), (setting, 0))
    shipped = METHODS[SHIPPED]
    plain = replace(shipped, flags=shipped.flags | {"nullspace_threshold": 0})
    assert trained == [(plain, bundle_data.PLAIN_RATE),
                       (shipped, bundle_data.RATE)]  # fmt: skip


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
    for name in names[1:]:
        table[name] |= {"cpu_seconds": 1.0, "bytes": 1000, "let_through": 0.001}
    bundle_data.plot(table, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 1000


def test_bundles_are_stored_in_ways_that_let_ever_more_through():
    """What is closed is the same in all of them."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    full = bundle_size.Spectrum(torch.logspace(0, -6, 64), basis.float(), 1000)
    exact, drifts, sizes = full.pack().exact, {}, {}
    for way, store in bundle_size.WAYS.items():
        stored, sizes[way] = store(full)
        assert torch.equal(stored.eigenvectors[:, :exact], full.eigenvectors[:, :exact])
        drifts[way] = bundle_size.drift(stored, full, exact, 1e-6)
    assert sorted(sizes, key=sizes.get)[0] == "leading alone" and max(sizes, key=sizes.get) == "float32"
    assert drifts["float32"] < drifts["8-bit reflections"] < drifts["leading alone"]
    assert drifts[bundle_size.BUNDLES] == pytest.approx(drifts["float32"], rel=1e-3)


# ---- All of them -----------------------------------------------------------------------------------------------------


IMPORT_EACH = """
import os, sys, traceback
import accelerate, datasets, matplotlib.pyplot, peft, torch  # once for all
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import lora_pipeline
from transformers import CLIPTextModel, CLIPTokenizer

failed = []
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            sys.path[0], name = os.path.split(path)  # where Python looks first when it runs the file
            __import__(name.removesuffix(".py"))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(path)
sys.exit(f"cannot be started: {failed}" if failed else 0)
"""


def test_each_script_finds_what_it_imports(tmp_path):
    """By itself, as its command starts it: what takes hours is run by no test, and here the path is already set."""
    (tmp_path / "import_each.py").write_text(IMPORT_EACH)
    scripts = [path for folder in ("benchmarks", "demo") for path in sorted((DEMO.parent / folder).glob("*.py"))]
    assert len(scripts) > 20
    command = [sys.executable, tmp_path / "import_each.py", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- What fits on a card ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="Adam reads its steps on the meta device there"
)
def test_memory_is_counted_without_a_gpu():
    """Of Stable Diffusion 1.5 as the README launches it, and without protection."""
    family = get_family("sd")
    with memory_guide.without_values():
        launched = memory_guide.memory(memory_guide.LAUNCHED, family)
        plain = memory_guide.memory(memory_guide.FP16 | memory_guide.FREED, family, projected=False)
    assert plain["projector"] == plain["budget"] == 0
    assert 50e6 < launched["projector"] < launched["budget"] < 110e6
    assert launched["projector"] + launched["budget"] < launched["training"] - plain["training"] < 600e6


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
    words = ["--instance_data_dir", FOLDER / "star", "--subject", "sks star", "--class_name", "star"]
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
    with pytest.raises(NullSpaceError, match="loar, no folder or file here, cannot be read as a LoRA"):
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
