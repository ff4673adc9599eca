"""What a subject comes to, and what moves, when the bundle's directions are stored in fewer bytes.

    OMP_NUM_THREADS=1 python benchmarks/bundle_likeness.py

On the demo's world two subjects are taught as the README launches it, from one bundle whose directions are stored in
each of the ways of `bundle_size.py`: with the bytes of that bundle, the distance to the subject and the drift of
held-out prompts. Goes on where it stopped. Writes `results/bundle_likeness.json`.
"""

from functools import partial
from statistics import mean

from bundle_size import WAYS
from common import HERE
from methods import METHODS, SHIPPED, train
from resumable import Results, describe_machine
from scoring import GENERAL, Base, build_bundle, bundle_folder, world_hash

from nullspace.protection import moments_of
from nullspace.samplers import make_scheduler
from nullspace.spectrum import Spectrum
from world import TUNING_SUBJECTS


STEPS, RATE, PROMPTS = 800, 1e-2, 40  # of the training, and how many prompts are protected


def load(folder):
    """The base model with a bundle whose directions were never rounded, of the model's first prompts."""
    base = Base(folder)
    pipeline, bundle = base.tuned(), base.bundle
    pipeline.scheduler = make_scheduler(bundle.config["sampler"], pipeline.scheduler.config)
    prompts = GENERAL.read_text().splitlines()[:PROMPTS]
    moments = moments_of(prompts, bundle, [bundle.joint], pipeline, PROMPTS, "Bundle", disable=True)
    for (group, source), total in moments.sums.items():
        bundle.spectra[group][source] = Spectrum.from_sum(total, moments.tokens[group, source])
    return base


def measure(base, job):
    """Bytes of the bundle stored in a way, and what a training from it gives: `dict` of numbers."""
    way, subject = job
    whole, stored = base.bundle.spectra, 0
    base.bundle.spectra = {}
    for group, spectra in whole.items():
        base.bundle.spectra[group] = {}
        for source, full in spectra.items():
            base.bundle.spectra[group][source], size = WAYS[way](full)
            stored += size
    method = METHODS[SHIPPED]
    ((_, _, pipeline),) = train(base, method, subject, 0, RATE, None, (STEPS,))
    base.bundle.spectra = whole
    return {"bytes": stored} | base.nearness(pipeline, subject, method.called(subject))


def main():
    build_bundle()
    results = Results(HERE / "results" / "bundle_likeness.json", partial(load, bundle_folder()), measure, workers=2)
    setting = {"world": world_hash(), "steps": STEPS, "rate": RATE, "prompts": PROMPTS}
    if results.content.get("setting") != setting:
        results.content = {"setting": setting}
    jobs = {f"{way}, {subject}": (way, subject) for subject in TUNING_SUBJECTS for way in WAYS}
    runs = results.complete("runs", jobs, "Runs")
    keys = ("bytes", "subject", "noise_drift")
    results.content |= describe_machine() | {
        "ways": {
            way: {key: mean(runs[f"{way}, {one}"][key] for one in TUNING_SUBJECTS) for key in keys} for way in WAYS
        }
    }
    results.save()
    for way, row in results.content["ways"].items():
        print(f"| {way} | {row['bytes']:,.0f} | {row['subject']:.3f} | {row['noise_drift']:.6f} |")


if __name__ == "__main__":
    main()
