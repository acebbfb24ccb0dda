"""Methods x tasks x split seeds, from the stages themselves, and the table of their test errors (section 3, Table 1).

    python benchmark.py --task dielectric,mp_phonons
    python benchmark.py --table --output runs/results

Each run is a folder OUTPUT/METHOD/TASK/seedK; what is finished is kept, so an interrupted benchmark goes on where it
stopped. Methods: moma-full and moma-adapter (compose, then fine-tune), moma-hinted (compose.py --select hinted), theta0
(fine-tune the backbone), theta0-adapter (fresh adapters in it), best-module (fine-tune the module with the largest
weight: pair-wise transfer), scratch (the backbone's architecture, fresh), cgcnn (from scratch); and what one would use
instead (baselines.py): magpie (trees), chgnet-svr (support vector regression on frozen features of CHGNet, which needs
`make teacher`). moma-svr, theta0-svr, mixture-svr: the same regression on frozen representations of the composed
module, of theta_0, and of all the modules that were composed, side by side: what composing brings before any
fine-tuning, and what averaging loses. All get the same rows, and the networks the same budget of epochs.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from files import (VERSION, MissingError, UserError, csv_text, read_json, reading, whole_folder, write_json,
                   write_text)
from stage import (LearningRate, Positive, TaskConfig, Whole, check_settings, compare, main, read_task, rests_on, say,
                   split_rows, stage_of, written_by)

import numpy as np

import baselines
import compose
import evaluate
import finetune
import hub
from crystals import load_crystals
from tasks import TRANSFORMS, get_task, inverse, unit_of

WRITES = ("config.json", "table.md", "runs.csv")
FROZEN = ("moma-svr", "theta0-svr", "mixture-svr")
BASELINES = ("magpie", "chgnet-svr", *FROZEN)  # nothing is fine-tuned
METHODS = ("moma-full", "moma-hinted", "moma-adapter", "best-module", "theta0", "theta0-adapter", "scratch", "cgcnn",
           *BASELINES)  # fmt: skip
# Table 1 of the paper, mean over 5 splits, for the rows this project has data for: CGCNN, MoE-(18), JMP-FT, MoMa (Full)
PUBLISHED = {
    "expt_bandgap": (0.471, 0.374, 0.358, 0.305),
    "expt_eform": (0.193, 0.0949, 0.168, 0.0839),
    "jarvis_2d_dielectric_opt": (2.90, 2.29, 2.35, 1.89),
    "jarvis_2d_eform": (0.169, 0.106, 0.125, 0.0495),
    "jarvis_2d_exfoliation": (59.7, 52.5, 35.4, 36.3),
    "jarvis_2d_gap_opt": (0.686, 0.532, 0.582, 0.375),
    "mp_eps_electronic": (0.168, 0.157, 0.108, 0.0885),
    "mp_eps_total": (0.258, 0.236, 0.171, 0.158),
    "mp_phonons": (0.127, 0.0996, 0.0596, 0.0484),
    "mp_poly_electronic": (2.97, 2.61, 2.11, 2.09),
    "mp_poly_total": (6.54, 5.51, 4.89, 4.86),
}
STD = {  # of the labels, by which the released code divides: a mean over tasks needs errors without a unit
    "expt_bandgap": 1.6101, "expt_eform": 1.0065, "jarvis_2d_dielectric_opt": 6.7591, "jarvis_2d_eform": 0.8199,
    "jarvis_2d_exfoliation": 134.17, "jarvis_2d_gap_opt": 1.3779, "mp_eps_electronic": 0.7685, "mp_eps_total": 0.7440,
    "mp_phonons": 0.7093, "mp_poly_electronic": 13.055, "mp_poly_total": 19.435,
}  # fmt: skip


@dataclass
class Config:
    task: str = ""  # one or several: a,b,c [the name of --data]
    data: str = ""  # "demo", or a folder or file [each task's own data set]
    tasks: str = ""  # JSON file with more tasks
    splits: str = ""  # folder with TASK/seedK.json [published ones, else 70/15/15 by the seed]
    seeds: str = "0,1,2"  # of the split and of the training
    methods: str = "moma-full,moma-adapter,theta0,scratch,cgcnn,magpie"  # of those above
    hub: str = "hub"
    output: str = "runs/benchmark"
    cache: str = ""  # folder of parsed rows, graphs and embeddings [.cache]
    limit: Whole = 0  # use this many random rows of each task; 0: all
    few_shot: Whole = 0  # keep this many random training rows; 0: all
    epochs: Positive = 60
    patience: Whole = 10
    batch_size: Positive = 32
    lr: LearningRate = 0.0  # 0: fine-tuning's default for the preset
    overwrite: bool = False  # run again what stands there
    table: bool = False  # run nothing; show what has run
    device: Literal["auto", "cpu", "cuda"] = "auto"
    config: str = ""  # a run's config.json as defaults
    quiet: bool = False


def run(cfg):
    """Run what is missing, then print and write the tables. Returns {task: {method: {seed: metrics}}}."""
    check_settings(cfg)
    methods = [m.strip() for m in cfg.methods.split(",") if m.strip()]
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: use {', '.join(METHODS)}")
    if not all(s.strip().isdigit() for s in cfg.seeds.split(",")):
        raise UserError(f"--seeds {cfg.seeds}: give whole numbers, as in 0,1,2")
    output = Path(cfg.output)
    if not cfg.table:
        foreign = [p.name for p in map(output.joinpath, WRITES) if p.exists() and written_by(output) != stage_of(cfg)]
        if foreign:
            raise UserError(f"--output {output}: holds a {foreign[0]} of another program; name another folder")
        tasks = [task.strip() for task in cfg.task.split(",") if task.strip()] or [""] * bool(cfg.data)
        if not tasks:
            raise UserError("--task is missing: names in the task table (tasks.py) or in --tasks FILE; or give --data")
        names = {task: get_task(task, cfg.tasks, cfg.data).name for task in tasks}
        for task, name in names.items():
            for seed in map(int, cfg.seeds.split(",")):
                for method in methods:
                    one_run(cfg, method, task, name, seed)
        write_json(output / "config.json", {"stage": stage_of(cfg), "version": VERSION, **asdict(cfg)})
    found = collect(output)
    if not found:
        raise MissingError(f"{output}: no finished run; run the benchmark without --table first")
    said = [gains(found), gains(found, "moma-adapter", ["theta0-adapter"]), gains(found, "moma-svr", FROZEN)]
    said += [by_validation(found), unseen(output, found), coverage(found)]
    parts = [table(found), "\n".join(part for part in said if part)]
    if (output / "composed").is_dir():
        parts += [f"Compositions: {merges.__doc__.strip()}", merges(output)]
    text = "\n\n".join(part for part in parts if part)
    write_text(output / "table.md", text + "\n")
    write_text(output / "runs.csv", runs_csv(found))
    print(text)
    return found


def one_run(cfg, method, task, name, seed):
    """One method on one split of one task. A stage keeps what it finished with the same settings, and refuses others."""
    say(cfg, f"--- {method}, {name}, seed {seed}")
    shared = dict(task=task, data=cfg.data, tasks=cfg.tasks, hub=cfg.hub, cache=cfg.cache, limit=cfg.limit, seed=seed,
                  split_seed=seed, split_file=f"{cfg.splits}/{name}/seed{seed}.json" if cfg.splits else "",
                  few_shot=cfg.few_shot, device=cfg.device, quiet=cfg.quiet)  # fmt: skip
    folder = Path(cfg.output) / method / name.lower() / f"seed{seed}"
    if method in BASELINES:
        return baseline(cfg, method, TaskConfig(**shared), folder, name)
    shared["overwrite"] = cfg.overwrite
    how = dict(init="backbone", kind="adapter" if method == "theta0-adapter" else "")
    if method.startswith("moma-"):
        how = dict(init=composed(cfg, method.removeprefix("moma-"), name, seed, shared)["output"])
    elif method == "best-module":
        weights = composed(cfg, "full", name, seed, shared)["modules"]
        how = dict(init=max(weights, key=lambda name: weights[name]["weight"]))
    elif method in ("scratch", "cgcnn"):
        how = dict(init="scratch", backbone="cgcnn" if method == "cgcnn" else "")
    budget = dict(epochs=cfg.epochs, patience=cfg.patience, batch_size=cfg.batch_size, lr=cfg.lr)
    verdict = method.startswith("moma-")  # in words, as finetune.py alone gives it, so its run is the same run
    run = dict(folds=0, compare=verdict, output=str(folder), resume=True)
    finetune.run(finetune.Config(**shared, **how, **budget, **run))


def composed(cfg, kind, name, seed, shared):
    """composition.json of the module composed for this split; made once."""
    folder = Path(cfg.output) / "composed" / kind / name.lower() / f"seed{seed}"
    how = dict(kind="full", select="hinted") if kind == "hinted" else dict(kind=kind)
    return compose.run(compose.Config(**shared, **how, folds=0, output=str(folder)))


def baseline(cfg, method, settings, folder, name):
    """A run that fine-tunes nothing, with a fine-tuned run's files. What is finished is kept, or refused, likewise."""
    task = get_task(settings.task, settings.tasks, settings.data)
    crystals = load_crystals(task, settings.limit, quiet=cfg.quiet, cache_dir=cfg.cache)
    splits, task, y = split_rows(settings, crystals), crystals.task, crystals.y
    record = {"method": method, "seed": settings.seed, **rests_on(crystals, splits)}
    networks = []  # whose representations are the features
    if method in FROZEN:
        networks = [hub.module_dir(cfg.hub, hub.BACKBONE)]
        if method != "theta0-svr":
            how = vars(settings) | {"overwrite": cfg.overwrite}
            networks = [Path(composed(cfg, "full", name, settings.seed, how)["output"])]
        if method == "mixture-svr":
            networks = [hub.module_dir(cfg.hub, parent["name"]) for parent in hub.read_card(*networks)["parents"]]
        found = [hub.read_card(network)["tensors_sha256"] for network in networks]
        record["init"] = found if method == "mixture-svr" else found[0]
    if (folder / "metrics.json").exists() and not cfg.overwrite:
        old = read_json(folder / "config.json", "the settings of a run").get("record")
        compare(old, record, folder, "give another --output, or --overwrite")
        return show(read_json(folder / "metrics.json", "the metrics of a run"), folder)
    began, train, val = time.perf_counter(), splits["train"], splits["val"]
    rows = np.concatenate([val, splits["test"]])
    if method == "magpie":
        X = baselines.magpie_features(crystals, cfg.cache)
        prediction = baselines.magpie_trees(X, y, train, settings.seed, cfg.cache)[rows]
    else:
        found = [representations(settings, network) for network in networks]
        X = np.concatenate(found or [baselines.chgnet_features(crystals, cfg.cache)], axis=1)
        prediction = baselines.support_vector_regression(X, y, train, val, rows)
    metrics = {"task": task.name, "init": method, "epochs": None, "best_epoch": None, "unit": unit_of(task)}
    metrics |= {"seconds": time.perf_counter() - began, "budget": {k: getattr(cfg, k) for k in ("limit", "few_shot")}}
    mean, files = y[train].mean(), {}
    for part, p in zip(("val", "test"), np.split(prediction, [len(val)]), strict=True):
        true = y[splits[part]]
        metrics |= evaluate.all_scores(task, part, true, p, mean)
        metrics[f"{part}_mae"] = metrics[part]["mae"]
        true, p = inverse(task, true), inverse(task, p)
        lines = zip([crystals.ids[i] for i in splits[part]], true.tolist(), p.tolist(), strict=True)
        files[f"predictions_{part}.csv"] = csv_text(["id", "target", "prediction"], lines)
    config = {"stage": stage_of(cfg), "version": VERSION, "record": record, **asdict(settings)}
    splits = {part: crystals.row[index].tolist() for part, index in splits.items()}
    with whole_folder(folder, replace=cfg.overwrite) as new:
        for name, content in (("metrics", metrics), ("splits", splits), ("config", config)):
            write_json(new / f"{name}.json", content)
        for name, text in files.items():
            write_text(new / name, text)
    show(metrics, folder)


def representations(settings, network):
    """(M, C): of all crystals of the task, under the module in the folder `network`."""
    card = hub.read_card(network)
    crystals, dataset = read_task(settings, card["architecture"])
    embed = compose.make_embed(settings, card | {"kind": "full"}, dataset, np.arange(len(crystals)))
    return embed(card["tensors_sha256"], lambda: hub.load_tensors(network))


def show(metrics, folder):
    print(f"{metrics['task']}, {metrics['init']}: test MAE {evaluate.sentence(metrics)}; {folder}")


def collect(root):
    """{task: {method: {seed: metrics}}} of the finished runs under root."""
    found = {}
    for method in METHODS:
        for path in root.glob(f"{method}/*/seed*/metrics.json"):
            metrics = read_json(path, "the metrics of a run", "delete that folder and run the benchmark again")
            with reading(path, "the metrics of a run", "delete that folder and run the benchmark again"):
                seed = int(path.parent.name.removeprefix("seed"))
                metrics["train_rows"] = len(json.loads((path.parent / "splits.json").read_text())["train"])
                inside = metrics.get("coverage", {}).get("test")
                metrics = {k: metrics[k] for k in ("test", "budget", *COLUMNS)} | {"coverage": inside}
                found.setdefault(path.parent.parent.name, {}).setdefault(method, {})[seed] = metrics
    for task, runs in found.items():
        check_alike(root, task, [(f"{m}, seed {seed}", r) for m in runs for seed, r in runs[m].items()])
    return {task: {m: dict(sorted(runs[m].items())) for m in runs} for task, runs in sorted(found.items())}


def check_alike(root, task, runs):
    """Means are of runs of one budget; only networks have epochs. runs: [(its name, metrics)]."""
    first = {}  # {setting: (value, of which run)}
    for name, metrics in runs:
        for k, value in metrics["budget"].items():
            known, one = first.setdefault(k, (value, name))
            if value != known:
                differ = f"{k} {known} in {one}, but {value} in {name}"
                cure = "delete one, or name another --output"
                raise UserError(f"{root}: runs of {task} do not compare: {differ}; {cure}")


COLUMNS = ("val_mae", "test_mae", "unit", "train_rows", "best_epoch", "epochs", "seconds")


def runs_csv(found):
    """One line a run."""
    rows = [
        [task, method, seed, *(metrics[c] for c in COLUMNS)]
        for task, runs in found.items() for method, seeds in runs.items() for seed, metrics in seeds.items()
    ]  # fmt: skip
    return csv_text(["task", "method", "seed", *COLUMNS], rows)


def table(found):
    """Test MAE, mean ± standard deviation over the seeds, as Markdown; the lowest of a row in bold. minutes: all runs.

    Last the mean over the tasks whose STD is published, of MAE / STD.
    """
    methods = [m for m in METHODS if any(m in runs for runs in found.values())]
    published = any(task in PUBLISHED for task in found)
    head = ["test MAE (unit)", "rows, train / test", *methods, "minutes"]
    head += ["paper: CGCNN, MoE-(18), JMP-FT, MoMa"] * published
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, runs in found.items():
        some = next(r for seeds in runs.values() for r in seeds.values())
        means = {m: np.mean([r["test_mae"] for r in runs[m].values()]) for m in runs}
        cells = [f"{task} ({some['unit'] or '1'})", f"{some['train_rows']} / {some['test']['rows']}"]
        for m in methods:
            if m not in runs:
                cells.append("")
                continue
            errors = [r["test_mae"] for r in runs[m].values()]
            text = f"{means[m]:.4g} ± {np.std(errors, ddof=1) if len(errors) > 1 else 0:.2g}"
            text = f"**{text}**" if means[m] == min(means.values()) else text
            cells.append(text + ("" if len(errors) == max(map(len, runs.values())) else f" ({len(errors)} seeds)"))
        cells.append(f"{sum(r['seconds'] for m in runs for r in runs[m].values()) / 60:.1f}")
        if published:
            cells.append(", ".join(f"{x:g}" for x in PUBLISHED.get(task, ())))
        lines.append("| " + " | ".join(cells) + " |")
    common = [task for task in found if task in STD]
    if len(common) > 1:
        mean = {}
        for m in methods:
            errors = [mean_mae(found[task][m]) / STD[task] for task in common if m in found[task]]
            mean[m] = f"{np.mean(errors):.4f}" + ("" if len(errors) == len(common) else f" ({len(errors)} tasks)")
        theirs = [np.mean([PUBLISHED[task][i] / STD[task] for task in common]) for i in range(4)]
        cells = [f"mean of MAE / std, {len(common)} tasks", "", *mean.values(), ""]
        cells.append(", ".join(f"{x:.4f}" for x in theirs))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_mae(seeds, of=None) -> float:
    """{seed: metrics} -> mean test MAE over the seeds, or over some of them."""
    return float(np.mean([metrics["test_mae"] for seed, metrics in seeds.items() if of is None or seed in of]))


def gains(found, best="moma-full", others=METHODS) -> str:
    """A line for each other method: mean over the tasks of 1 - MAE / its MAE, on the seeds that both have.

    Of one task: mean and standard deviation over its splits; a mean within that spread is said to be no difference.
    """
    lines = []
    for other in (m for m in others if m != best):
        gain = []
        for runs in (runs for runs in found.values() if best in runs and other in runs):
            seeds = runs[best].keys() & runs[other].keys()
            of = [seeds] if len(found) > 1 else [{seed} for seed in sorted(seeds)]
            gain += [1 - mean_mae(runs[best], some) / mean_mae(runs[other], some) for some in of if some]
        if not gain:
            continue
        what, text = "tasks" if len(found) > 1 else "splits", f"gain of {best} over {other}: mean {np.mean(gain):.1%}"
        if what == "splits" and len(gain) > 1:
            spread = np.std(gain, ddof=1)
            inside = " (inside the spread: no difference to speak of)" * bool(abs(np.mean(gain)) <= spread)
            text += f", spread {spread:.1%} over {len(gain)} splits{inside}"
        lines.append(f"- {text}, better on {sum(g > 0 for g in gain)} of {len(gain)} {what}")
    return "\n".join(lines)


def by_validation(found, of=("moma-full", "moma-hinted")) -> str:
    """A line: the gain over theta0 of whichever of these has the lower validation error, split by split."""
    best, chosen = f"{' or '.join(of)}, whichever has the lower validation error,", {}
    for task, runs in found.items():
        seeds = set.intersection(*(set(runs.get(m, ())) for m in (*of, "theta0")))
        pick = {seed: min((runs[m][seed] for m in of), key=lambda run: run["val_mae"]) for seed in seeds}
        chosen |= {task: {best: pick, "theta0": runs["theta0"]}} if seeds else {}
    return gains(chosen, best, ["theta0"])


def unseen(root, found, best="moma-full") -> str:
    """The mean gains on the test crystals that neither a module of `best`'s start nor theta_0 was trained on."""
    rows, error = [], {}  # error: {(task, method): [mean over those of a split]}
    for task, runs in found.items():
        for seed in runs.get(best, ()):
            of = {m: root / m / task / f"seed{seed}" for m in runs if seed in runs[m]}
            label = TRANSFORMS[read_json(of[best] / "module.json", "the card of a run")["transform"]][0]
            tested = {m: evaluate.read_columns(folder / "predictions_test.csv") for m, folder in of.items()}
            new = tested[best].get("seen", np.array([])) == "0"  # runs of an earlier release do not say
            rows += new.tolist()
            for m in tested if new.any() else ():
                y, prediction = (label(tested[m][k].astype(float)[new]) for k in ("target", "prediction"))
                error.setdefault((task, m), []).append(np.abs(y - prediction).mean())
    said = []
    for other in (m for m in METHODS if m != best):
        pairs = [(error[task, best], error[task, m]) for task, m in error if m == other]
        if gain := [1 - np.mean(a) / np.mean(b) for a, b in pairs if len(a) == len(b)]:
            said.append(f"{np.mean(gain):.1%} over {other}")
    what = f"on {sum(rows)} of {len(rows)} test crystals, which nothing in {best}'s start was trained on"
    return f"- {what}: mean gain {', '.join(said)}" * bool(said)


def coverage(found) -> str:
    """Share of the test labels inside the 90 % intervals, mean over all runs of a method."""
    of = {m: [r["coverage"] for runs in found.values() for r in runs.get(m, {}).values()] for m in METHODS}
    said = [f"{m} {np.mean(some):.1%} ({len(some)} runs)" for m in of if (some := [c for c in of[m] if c is not None])]
    return f"- in the 90 % intervals: {', '.join(said)}" * bool(said)


def merges(root):
    """Leave-one-out errors on the training rows, mean squared error / variance of the labels, mean over the seeds."""
    head = ["task, kind", "mixture", "composed module", "best module", "theta_0", "merge gap", "largest weights"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in ("full", "adapter"):
        pictures = {}
        for folder in sorted((root / "composed" / kind).glob("*")):
            cure = "delete that folder and run the benchmark again"
            files = sorted(folder.glob("seed*/composition.json"))
            results = [read_json(p, "the report of a composition", cure) for p in files]
            if not results:
                continue
            keys = ("mixture", "composed", "best_single", "theta_0")
            error = {k: np.mean([r["errors"][k] for r in results]) for k in keys}
            weight = {g: float(np.mean([r["modules"][g]["weight"] for r in results])) for g in results[0]["modules"]}
            largest = sorted(weight.items(), key=lambda item: -item[1])[:3]
            cells = [f"{folder.name}, {kind}", *(f"{e:.3f}" for e in error.values())]
            cells += [f"{error['composed'] - error['mixture']:+.3f}", ", ".join(f"{g} {w:.2f}" for g, w in largest)]
            lines.append("| " + " | ".join(cells) + " |")
            pictures[folder.name] = {"modules": {g: {"weight": w} for g, w in weight.items()}}
        if pictures:
            compose.draw_heat_map(pictures, root / f"heat_map_{kind}.png")
    return "\n".join(lines)


if __name__ == "__main__":
    main(run, Config, __doc__)
