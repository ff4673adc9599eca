"""Does the null space keep its promise? Ways to personalise the demo's model, scored as curves over training.

    python benchmarks/preservation.py            # tier one: five subjects, three seeds; goes on where it stopped
    python benchmarks/preservation.py --tier 2   # every other method, on one tuning subject and one seed
    python benchmarks/preservation.py --quick    # tier one's methods on one seed of one subject

`methods.py` has the methods and how they train, `scoring.py` what is scored. Each method trains on the same pictures
and captions, from the same seeds, and is scored at several step counts: how near its pictures come to the subject, and
how far all else moved. Methods are compared at equal likeness, a share of the plain LoRA's gain over the base model.

Tier one chooses each method's learning rate, and its weight where it has one, on the two tuning subjects, and reports
on the five others, on which nothing is tuned. Tier two chooses and reports on the first tuning subject: what comes
near there belongs in tier one. Writes `results/preservation.json`, every run of the sweep in it, and a picture each.
"""

import argparse
import math
import os
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean, mean, median

import numpy as np
from methods import METHODS, REFERENCES, SHIPPED, TIER_ONE, TRAINED, predicted_drifts, train
from resumable import Results, describe_machine
from scoring import (
    DRAWING_STEPS,
    DRAWN,
    GUIDANCE,
    HERE,
    REPEATS,
    SAMPLER,
    SINGLES,
    WORK,
    Base,
    build_bundle,
    bundle_folder,
    world_hash,
)

from world import REPORTED_SUBJECTS, SUBJECTS, TUNING_SUBJECTS


SEEDS, TUNING_SEED = (0, 1, 2), 100
MARKS = (100, 200, 400, 800)  # steps after which a run is scored
PLAIN = REFERENCES["plain"]


# ---- Jobs, each done by a worker -------------------------------------------------------------------------------------


def make_base():
    return Base(bundle_folder())


def do(base, job):
    kind, *rest = job
    return {"base": score_base, "attempt": attempt, "run": run, "memory": measure_memory}[kind](base, *rest)


def score_base(base, subject):
    return base.score(base.pipeline, subject, subject)


def run(base, name, subject, seed, rate, weight):
    """Train and score one method: its settings and a point for each of `MARKS`."""
    return _run(base, name, subject, seed, rate, weight, base.score)


def attempt(base, name, subject, seed, rate, weight):
    """As `run`, with the scores alone that settings are chosen by."""
    return _run(base, name, subject, seed, rate, weight, base.nearness)


def _run(base, name, subject, seed, rate, weight, score):
    points, method = [], METHODS[name]
    for step, seconds, pipeline in train(base, method, subject, seed, rate, weight, MARKS):
        drifts = predicted_drifts(base, pipeline.unet)
        rms = math.sqrt(mean(drift**2 for drift in drifts)) if drifts else 0.0
        scores = score(pipeline, subject, method.called(subject))
        points.append({"step": step, "seconds": seconds, "predicted_drift": rms} | scores)
    return {"method": name, "subject": subject, "seed": seed, "rate": rate, "weight": weight, "points": points}


def measure_memory(base, name):
    """Resident memory of a fresh process, in bytes, before a personalisation and at its peak (Linux, see proc(5))."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    method = METHODS[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = resident("VmRSS")
    for _ in train(base, method, TUNING_SUBJECTS[0], 0, method.rates[1], method.weights[0], (5,)):
        pass
    return {"before": before, "peak": resident("VmHWM")}


# ---- Methods at equal likeness of the subject ------------------------------------------------------------------------

LEVELS = (0.9, 1.0)  # of the plain LoRA's gain
LIKENESS = {"levels": "subject", "levels_anywhere": "anywhere"}  # with the bare prompt; in new places, too
LEAKS = {"class_leak": "class", "class_placed_leak": "class_placed"}  # how much nearer these came to the subject
COMPARED = ("noise_drift", *LEAKS, "seconds")


def at_level(run, base, level, likeness="subject"):
    """A run's scores where its pictures had come this near to the subject, `dict`, or None if they never did.

    Between two scored steps, and the base model, everything is interpolated in proportion to the distance.
    """
    before = {"step": 0, "seconds": 0.0, "predicted_drift": 0.0} | base
    for point in run["points"]:
        if point[likeness] <= level:
            share = (before[likeness] - level) / (before[likeness] - point[likeness])
            there = {key: before[key] + share * (point[key] - before[key]) for key in point}
            leaks = {leak: kind for leak, kind in LEAKS.items() if kind in there}
            return there | {leak: (base[kind] - there[kind]) / base[kind] for leak, kind in leaks.items()}
        before = point
    return None


def relative(key, there, other):
    """A score as a ratio to another method's; leaks, which may be nothing or less, as the difference."""
    return there[key] - other[key] if key in LEAKS else there[key] / other[key]


def levels_of(runs, base, likeness="subject"):
    """The distance to the subject at each share of the plain LoRA's best gain, by subject: `dict[str, dict]`."""
    levels = {}
    for subject in dict.fromkeys(run["subject"] for run in runs):
        plain = [run["points"] for run in runs if run["method"] == PLAIN and run["subject"] == subject]
        nearest = min(median(point[likeness] for point in points) for points in zip(*plain, strict=True))
        start = base[subject][likeness]
        levels[subject] = {level: start - level * (start - nearest) for level in LEVELS}
    return levels


def spread(values):
    values = list(values)
    return {"median": median(values), "least": min(values), "most": max(values), "runs": len(values)}


def compare(runs, base, likeness="subject"):
    """At each level, each method's scores: medians over subjects and seeds, and of the relations to the references.

    Relations are of the same subject and seed: over all, and by subject with their spread over the seeds. A method that
    reaches a level in fewer than half of its runs does not get there, and nothing is compared with it: None.
    """
    levels, table = levels_of(runs, base, likeness), {}
    for level in LEVELS:
        found = {}  # by method, then by subject and seed
        for run in runs:
            there = at_level(run, base[run["subject"]], levels[run["subject"]][level], likeness)
            found.setdefault(run["method"], {})[run["subject"], run["seed"]] = there
        reached = {method: {key: there for key, there in mine.items() if there} for method, mine in found.items()}
        arrived = [method for method, mine in reached.items() if 2 * len(mine) >= len(found[method])]
        rows = table[str(level)] = {}
        for method, mine in reached.items():
            row = rows[method] = {"reached": len(mine), "runs": len(found[method]), "scores": None}
            if method not in arrived:
                continue
            row["scores"] = {key: spread(there[key] for there in mine.values()) for key in next(iter(mine.values()))}
            for short, other in REFERENCES.items():
                both = {
                    key: (there, reached[other][key]) for key, there in mine.items() if key in reached.get(other, {})
                }
                row[f"vs_{short}"] = _relations(both) if both and other in arrived else None
    return table


def _relations(both):
    """Medians and spread of relations between pairs of scores, `dict` by subject and seed."""
    related = {pair: {key: relative(key, *both[pair]) for key in COMPARED} for pair in both}
    return {
        key: spread(each[key] for each in related.values())
        | {
            "by_subject": {
                subject: spread(each[key] for pair, each in related.items() if pair[0] == subject)
                for subject in dict.fromkeys(subject for subject, _ in related)
            }
        }
        for key in COMPARED
    }


def headline(rows):
    """Of the shipped defaults at one level: drift and time as ratios, class leak as difference, to each reference.

    Drift is the squared change, as in every table: the root of the ratio is that of the changes.
    """
    names = {"noise_drift": "drift", "class_leak": "class_leak", "seconds": "time"}
    found, by_subject = {}, {}
    for short in REFERENCES:
        relations = rows[SHIPPED].get(f"vs_{short}")
        for key, name in names.items():
            found[f"{name}_vs_{short}"] = relations and relations[key]["median"]
            for subject, values in (relations[key]["by_subject"] if relations else {}).items():
                by_subject.setdefault(subject, {})[f"{name}_vs_{short}"] = values
    return found | {"by_subject": by_subject}


def at_the_end(runs, base):
    """Each method's scores after the last step, medians over subjects and seeds, in rows like those of `compare`.

    The first row is the base model's.
    """
    last = {"base model": [base[subject] for subject in dict.fromkeys(run["subject"] for run in runs)]}
    for run in runs:
        last.setdefault(run["method"], []).append(run["points"][-1])
    return {
        method: {
            "runs": len(points),
            "scores": {key: spread(point[key] for point in points) for key in points[0]},
        }
        for method, points in last.items()
    }


def rank_correlation(runs):
    """Spearman's correlation of predicted drift with measured noise drift, over every scored point of the runs.

    Also within each method, as the median over methods, the least and the most: methods differ by more than the
    points of any one of them, which alone makes the correlation of all of them high.
    """

    def spearman(runs):
        points = [point for run in runs for point in run["points"]]
        ranks = [np.argsort(np.argsort([point[key] for point in points])) for key in ("predicted_drift", "noise_drift")]
        return float(np.corrcoef(*ranks)[0, 1])

    by_method = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    within = [spearman(mine) for mine in by_method.values()]
    return {
        "spearman": spearman(runs),
        "points": sum(len(run["points"]) for run in runs),
        "within_methods": {"median": median(within), "least": min(within), "most": max(within), "methods": len(within)},
    }


# ---- Choosing rates and weights --------------------------------------------------------------------------------------


def setting_of(run):
    return {"rate": run["rate"], "weight": run["weight"]}


def tune(runs, base):
    """Each method's setting, `{"rate", "weight"}`: the one of least drift at 90% of the best plain LoRA's gain.

    That which gets there on the most subjects comes first, then the geometric mean of the drift; where none does, the
    one that comes nearest to the subjects.
    """
    levels = {
        subject: scores["subject"]
        - 0.9 * (scores["subject"] - min(point["subject"] for run in plain for point in run["points"]))
        for subject, scores in base.items()
        if (plain := [run for run in runs if run["method"] == PLAIN and run["subject"] == subject])
    }
    settings = {}
    for run in runs:
        settings.setdefault(run["method"], {}).setdefault((run["rate"], run["weight"]), []).append(run)

    def cost(mine):
        there = [at_level(run, base[run["subject"]], levels[run["subject"]]) for run in mine]
        drifts = [each["noise_drift"] for each in there if each]
        if drifts:
            return -len(drifts), geometric_mean(drifts)
        return 0, mean(min(point["subject"] for point in run["points"]) for run in mine)

    chosen = {method: min(tried, key=lambda setting: cost(tried[setting])) for method, tried in settings.items()}
    return {method: dict(zip(("rate", "weight"), setting, strict=True)) for method, setting in chosen.items()}


def sweep(results, base, names, subjects):
    """Try each method's rates at its usual weight, then its weights at the rate chosen; return runs and settings."""

    def tried(settings_of):
        jobs = {
            f"{name}/{subject}/{rate:g}/{weight}": ("attempt", name, subject, TUNING_SEED, rate, weight)
            for name in names
            for rate, weight in settings_of(name)
            for subject in subjects
        }
        return list(results.complete("tuning", jobs, "Tuning").values())

    runs = tried(lambda name: [(rate, METHODS[name].weights[0]) for rate in METHODS[name].rates])
    chosen = tune(runs, base)
    runs += tried(lambda name: [(chosen[name]["rate"], weight) for weight in METHODS[name].weights[1:]])
    return runs, tune(runs, base)


# ---- What people see -------------------------------------------------------------------------------------------------


def plot(panels, path):
    """Drift against distance to the subject, a panel for each `{title: runs}`: curves of medians at each mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 8), layout="constrained", squeeze=False)
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        methods = list(dict.fromkeys(run["method"] for run in runs))
        for number, method in enumerate(methods):
            mine = [run["points"] for run in runs if run["method"] == method]
            x, y = (
                [median(point[key] for point in points) for points in zip(*mine, strict=True)]
                for key in ("subject", "noise_drift")
            )
            look = {"color": plt.get_cmap("tab20")(number % 20), "linestyle": ("-", "--")[number // 20 % 2]}
            if method == SHIPPED:
                look = {"color": "black", "zorder": 3, "linewidth": 2.5}
            axis.plot(x, y, marker="o", markersize=4, label=method, **look)
        axis.set(
            title=title,
            xlabel="distance to the subject (nearer is to the right)",
            ylabel="change of the predicted noise (squared, relative)",
            yscale="log",
        )
        axis.invert_xaxis()
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panels_of(runs):
    """The runs of every method in panels that can be told apart, the shipped one's in each: `dict` by title."""
    panels = {"other ways to keep the model": [], "the null space": [], "without captions, and another identifier": []}
    others, ours, varied = panels.values()
    for run in runs:
        name = run["method"]
        panel = varied if name.endswith((", no captions", f", {TRAINED}")) else ours if "null space" in name else others
        for each in panels.values() if name == SHIPPED else [panel]:
            each.append(run)
    return panels


SHOWN = {  # title and format of a table's columns
    "noise_drift": ("drift", ".4f"), "class_leak": ("leak", ".2f"), "class_placed_leak": ("placed", ".2f"),
    "class_right": ("class", ".2f"), "class_placed_right": ("placed", ".2f"), "placed": ("places", ".2f"),
    "placed_right": ("right", ".2f"), "combinations_right": ("combin.", ".2f"), "scenes_right": ("scenes", ".2f"),
    "unlike_right": ("unlike", ".2f"), "diversity": ("diverse", ".3f"), "seconds": ("seconds", ".0f"),
}  # fmt: skip


def print_table(table, base, where):
    for level, rows in table.items():
        print(f"\nAt {float(level):.0%} of the plain LoRA's gain, {where}")
        titles = [*(title for title, _ in SHOWN.values()), "/plain", "/prior", "/output"]
        print(f"{'':46}{'reached':>8}" + "".join(f"{title:>9}" for title in titles))
        scores = {key: median(each[key] for each in base) for key in SHOWN if key in base[0]}
        print(f"{'base model':54}" + "".join(_cell(scores.get(key), form) for key, (_, form) in SHOWN.items()))
        for method, row in rows.items():
            line = f"{method:46}{row['reached']:>4}/{row['runs']:<3}"
            if row["scores"]:
                line += "".join(_cell(row["scores"][key]["median"], form) for key, (_, form) in SHOWN.items())
                for short in REFERENCES:
                    relations = row[f"vs_{short}"]
                    line += _cell(relations and relations["noise_drift"]["median"], ".3f")
            print(line)


def _cell(value, form):
    return f"{'-' if value is None else format(value, form):>9}"


def tell(results, base):
    """Compare what was run so far, write and print it."""
    content = results.content
    runs = list(content.get("runs", {}).values())
    if runs:
        title = f"{len({run['subject'] for run in runs})} subjects, {len({run['seed'] for run in runs})} seeds"
        plot({title: runs}, results.path.with_suffix(".png"))
        for name, likeness in LIKENESS.items():
            content[name] = compare(runs, base, likeness)
            content[name.replace("levels", "headline")] = headline(content[name]["0.9"])
            content[name.replace("levels", "headline_at_all")] = headline(content[name]["1.0"])
            print_table(content[name], [base[run["subject"]] for run in runs], f"by {likeness}")
        content["at_the_end"] = at_the_end(runs, base)
        content["ranking"] = rank_correlation(runs)
    others = content.get("tier_two", {})
    if others:
        subject, runs = TUNING_SUBJECTS[0], list(others["runs"].values())
        plot(panels_of(runs), results.path.with_name(f"{results.path.stem}_every_method.png"))
        for name, likeness in LIKENESS.items():
            others[name] = compare(runs, base, likeness)
            print_table(others[name], [base[subject]], f"by {likeness}, {subject}")
        others["at_the_end"] = at_the_end(runs, base)
        others["ranking"] = rank_correlation(runs)
    content["machine"] = describe_machine()
    results.save()


# ---- Running ---------------------------------------------------------------------------------------------------------


def drop_changed(content):
    """Drop what was measured in another world, or of methods that were otherwise but for what is tried of them."""
    drawing = [SAMPLER, DRAWING_STEPS, GUIDANCE, REPEATS, sum(map(len, DRAWN.values()))]
    setting = {"world": world_hash(), "marks": list(MARKS), "drawing": drawing}
    if content.get("setting") != setting:
        content.clear()
    known, methods = content.get("methods", {}), {}
    for name, method in METHODS.items():
        methods[name] = {key: value for key, value in asdict(method).items() if key not in ("rates", "weights")}
    if known != methods:
        content.pop("tier_two", None)  # which is made of the sweep
    for section in ("tuning", "runs", "at_chosen", "memory"):
        done = content.get(section, {})
        for key in list(done):
            name = key.partition("/")[0]
            if name not in methods or known.get(name) != methods[name]:
                del done[key]
    content |= {"setting": setting, "methods": methods}


def drop_tuned_anew(results, chosen):
    """Drop runs at other settings than those that are chosen now."""
    done = results.content.setdefault("runs", {})
    for key in [key for key, run in done.items() if setting_of(run) != chosen[run["method"]]]:
        del done[key]


def first_tier(results, base):
    """Choose settings on the tuning subjects, then train and score on the others, seed by seed."""
    _, chosen = sweep(results, base, TIER_ONE, TUNING_SUBJECTS)
    results.content["chosen"] = chosen
    drop_tuned_anew(results, chosen)
    for seed in SEEDS:
        results.complete("runs", _jobs(REPORTED_SUBJECTS, seed, chosen), f"Seed {seed}")
        tell(results, base)
    results.complete("memory", {name: ("memory", name) for name in TIER_ONE}, "Memory", fresh=True)


def second_tier(results, base):
    """Every method on one tuning subject: its run at the setting chosen there."""
    _, chosen = sweep(results, base, METHODS, TUNING_SUBJECTS[:1])
    subject = TUNING_SUBJECTS[0]
    jobs = {
        f"{name}/{rate:g}/{weight}": ("run", name, subject, TUNING_SEED, rate, weight)
        for name, (rate, weight) in ((name, setting.values()) for name, setting in chosen.items())
    }
    runs = results.complete("at_chosen", jobs, "Every method")
    results.content["tier_two"] = {"chosen": chosen, "runs": {run["method"]: run for run in runs.values()}}
    tell(results, base)


def quick(results, base, chosen):
    """One seed of one subject, at the settings that tier one has chosen, or else usual ones."""
    for name in TIER_ONE:
        chosen.setdefault(name, {"rate": METHODS[name].rates[1], "weight": METHODS[name].weights[0]})
    drop_tuned_anew(results, chosen)
    results.complete("runs", _jobs(TUNING_SUBJECTS[:1], SEEDS[0], chosen), "Quick")
    tell(results, base)


def _jobs(subjects, seed, chosen):
    return {
        f"{name}/{subject}/{seed}": ("run", name, subject, seed, *chosen[name].values())
        for subject in subjects
        for name in TIER_ONE
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", type=int, choices=(1, 2), default=1, help="Which methods (default: %(default)s).")
    parser.add_argument("--quick", action="store_true", help="One seed of one subject, tier one's methods.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes (default: one for each core).")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    build_bundle()
    build_bundle(SINGLES)

    full = Results(HERE / "results" / "preservation.json", make_base, do, args.workers)
    drop_changed(full.content)
    results = Results(WORK / "preservation.json", make_base, do, args.workers) if args.quick else full
    drop_changed(results.content)
    subjects = TUNING_SUBJECTS[:1] if args.quick else SUBJECTS
    base = results.complete("base", {subject: ("base", subject) for subject in subjects}, "Base model")
    if args.quick:
        quick(results, base, dict(full.content.get("chosen", {})))
    elif args.tier == 1:
        first_tier(results, base)
    else:
        second_tier(results, base)


if __name__ == "__main__":
    main()
