"""What a fine-tuned model is worth, and the folder that says so: errors, intervals, comparison, leakage.

    metrics.json     errors (test, val), coverage of the intervals, verdict against Magpie trees, leakage
    predictions_test.csv, predictions_val.csv, parity.png, splits.json, skipped.csv, config.json; model.safetensors
    neighbours.npz, calibration.json    what predict.py needs for distances and intervals (conformal.py)

A run of folds has metrics.json, predictions.csv (each row by the model that has not seen it) and so on of all rows,
and fold0, fold1, ...: a folder as above for each model.

M: crystals. y: (M,) labels after the task's transform, whose unit is that of every error; files of predictions, and
errors named physical, are in the physical unit.
"""

import csv
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from files import VERSION, UserError, csv_text, png, read_json, reading, whole_folder, write_json
from stage import compare, number, say, work_folder

import numpy as np

import hub
from baselines import magpie_features, magpie_trees
from conformal import calibration_file, covered, difficulty, distance, files_of, interval, neighbours, quantile
from crystals import prototypes
from tasks import inverse, transform, unit_of
from train_module import loader, plan_batches, predict_batches, read_graphs, tensors_of

FOLDED = "folds.json"  # in the folder of a run of folds: what it was made from, and the hashes of its files


def write(cfg, target, origin, model, card, result, crystals, dataset, splits, errors):
    """The result's folder, by one rename: model and card, metrics, predictions, splits, parity plot, settings."""
    mean, (index, y, prediction) = result["normalizer_mean"], errors["test"]
    known, sigma = uncertainty(cfg, model, dataset, splits)
    held_out = np.abs(errors["val"][1] - errors["val"][2]) / sigma["val"]
    q = quantile(held_out)
    metrics = {"task": crystals.task.name, "init": origin.name, "init_why": origin.why, "kind": cfg.kind}
    metrics |= {"epochs": result["epochs"]}
    for name, (_, *values) in errors.items():
        metrics |= all_scores(crystals.task, name, *values, mean)
    metrics |= summary(cfg, metrics, result["best_epoch"], result["seconds"])
    metrics["coverage"] = covered(y, prediction, sigma["test"], q)
    seen = seen_rows(cfg, origin, crystals)[index]
    metrics["leakage"] = leakage(seen, np.abs(y - prediction))
    if cfg.compare:
        metrics |= compared(y, prediction, mean, magpie(cfg, crystals, [splits])[index], unit_of(crystals.task))
    rows = {name: crystals.row[index].tolist() for name, index in splits.items()}
    files = common_files(target, crystals, metrics, rows, errors["test"]) | files_of(known, held_out)
    files["predictions_val.csv"] = predictions_csv(crystals, *errors["val"])
    files["predictions_test.csv"] = predictions_csv(crystals, *errors["test"], sigma["test"], q, seen=seen)
    hub.save(target, tensors_of(model), card, history=result["history"], extra=files, overwrite=cfg.overwrite,
             main=hub.MODEL)  # fmt: skip


def write_folds(cfg, target, record, origins, crystals, folds):
    """The folder of a run of folds, by one rename. Each row's prediction is of the model that has not seen it.

    Intervals of a fold's rows rest on the residuals of the other folds; those of new crystals on all.
    """
    task, y, work, M = crystals.task, crystals.y, work_folder(target), len(crystals)
    prediction, sigma, mean, seen, fold = np.empty((5, M))
    cards, parts = [], []
    for k, (origin, splits) in enumerate(zip(origins, folds, strict=True)):
        path, test = work / f"fold{k}", splits["test"]
        columns = read_columns(path / "predictions_test.csv")
        prediction[test] = transform(task, columns["prediction"].astype(float))
        sigma[test], fold[test] = columns["difficulty"].astype(float), k
        cards.append(hub.read_card(path))
        parts.append(read_json(path / "metrics.json", "the metrics of a run"))
        mean[test], seen[test] = cards[k]["normalizer_mean"], seen_rows(cfg, origin, crystals)[test]
    scores_of = np.abs(y - prediction) / sigma
    q = np.array([quantile(scores_of[fold != k]) for k in range(len(folds))])[fold.astype(int)]
    starts = Counter(origin.name for origin in origins).most_common()
    init = starts[0][0] if len(starts) == 1 else ", ".join(f"{name} in {n} folds" for name, n in starts)
    metrics = {"task": task.name, "init": init, "init_why": [origin.why for origin in origins]}
    metrics |= {"kind": cards[0]["kind"], "epochs": [part["epochs"] for part in parts], "folds": len(folds)}
    metrics |= all_scores(task, "test", y, prediction, mean)
    metrics["val"] = {"mae": float(np.mean([part["val_mae"] for part in parts]))}
    seconds = round(sum(part["seconds"] for part in parts), 1)
    metrics |= summary(cfg, metrics, [part["best_epoch"] for part in parts], seconds)
    metrics |= {"fold_mae": [part["test_mae"] for part in parts], "coverage": covered(y, prediction, sigma, q)}
    metrics["leakage"] = leakage(seen, np.abs(y - prediction))
    if cfg.compare:
        metrics |= compared(y, prediction, mean, magpie(cfg, crystals, folds), unit_of(task))
    rows = [{name: crystals.row[index].tolist() for name, index in splits.items()} for splits in folds]
    files = common_files(target, crystals, metrics, {"folds": rows}, (np.arange(M), y, prediction))
    files |= calibration_file(scores_of)
    files["predictions.csv"] = predictions_csv(crystals, np.arange(M), y, prediction, sigma, q, fold=fold, seen=seen)
    with whole_folder(target, replace=cfg.overwrite) as part:
        for k in range(len(folds)):
            shutil.copytree(work / f"fold{k}", part / f"fold{k}")
        for name, content in files.items():
            (part / name).write_bytes(content)
        sums = {str(p.relative_to(part)): hub.sha256(p) for p in sorted(part.rglob("*")) if p.is_file()}
        write_json(part / FOLDED, {"version": VERSION, "record": record, "files_sha256": sums})


def finished_folds(cfg, target, record):
    """Whether `target` holds this run of folds, whole; UserError if it holds another, or files of others."""
    if not (target / FOLDED).exists():
        if target.is_symlink() or target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target}: exists and is no run of folds; name another")
        return False
    stored = read_json(target / FOLDED, "what a run of folds was made from", "name another --output")
    inside = {str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()}
    if foreign := sorted(inside - {FOLDED, *stored["files_sha256"]}):
        raise UserError(f"{target}: holds {foreign[0]}, which finetune.py has not written; name another --output")
    if cfg.overwrite:
        return False
    compare(stored["record"], record, target, "give another --output, or --overwrite")
    for file, digest in stored["files_sha256"].items():
        if hub.sha256(target / file) != digest:
            raise UserError(f"{target / file}: damaged or changed since it was written; --overwrite makes it again")
    say(cfg, f"{target} is finished; nothing to do (--overwrite makes it again)")
    return True


def uncertainty(cfg, model, dataset, splits):
    """The training rows in the space of the model, for distances; {"val", "test": (M,) difficulty of these rows}."""
    X, device = {}, next(model.parameters()).device
    model.to(device)
    for name, rows in splits.items():
        plan = plan_batches(dataset.num_atoms, rows, cfg)
        batches = loader(partial(read_graphs, dataset), plan, cfg, share=False)
        X[name] = predict_batches(model, batches, 0, 1, cfg, embed=True)[-1]
    known = neighbours(X["train"])
    return known, {name: difficulty(distance(X[name], known)) for name in ("val", "test")}


def all_scores(task, name, y, prediction, mean):
    """{name: scores in the unit of y, and, after a transform, NAME_physical: in the unit that people say}."""
    found = {name: scores(y, prediction, mean, unit_of(task))}
    if task.transform != "none":
        y, prediction, mean = (inverse(task, x) for x in (y, prediction, mean))
        found[f"{name}_physical"] = scores(y, prediction, mean, task.unit)
    return found


def scores(y, prediction, mean, unit):
    """Errors of one split in the unit of y, null where undefined. mad: error of predicting the training mean."""
    error, spread = np.abs(prediction - y), ((y - y.mean()) ** 2).sum()
    found = {"mae": error.mean(), "rmse": np.sqrt((error**2).mean()), "mad": np.abs(y - mean).mean()}
    found |= {"mad_mae": found["mad"] / found["mae"] if found["mae"] else None}
    found |= {"r2": 1 - (error**2).sum() / spread if spread else None}
    defined = {k: float(v) if v is not None and np.isfinite(v) else None for k, v in found.items()}
    return defined | {"unit": unit, "rows": len(y)}


def summary(cfg, metrics, best_epoch, seconds):
    found = {"val_mae": metrics["val"]["mae"], "test_mae": metrics["test"]["mae"], "unit": metrics["test"]["unit"]}
    found |= {"best_epoch": best_epoch, "seconds": seconds}
    return found | {"budget": {k: getattr(cfg, k) for k in ("epochs", "patience", "batch_size", "limit", "few_shot")}}


def magpie(cfg, crystals, folds):
    """(M,) predictions of Magpie trees from the same training rows; NaN for rows that no fold tests."""
    X, found = magpie_features(crystals, cfg.cache), np.full(len(crystals), np.nan)
    for splits in folds:
        trees = magpie_trees(X, crystals.y, splits["train"], cfg.seed, cfg.cache)
        found[splits["test"]] = trees[splits["test"]]
    return found


def compared(y, prediction, mean, trees, unit):
    """How the model compares with predicting the training mean and with Magpie trees, all (M,), on the same test rows:
    {"magpie": numbers, "verdict": a sentence}.

    A difference counts if it is beyond the 95 % of Student's t for the paired differences of absolute errors.
    """
    from scipy.stats import t

    n, error = len(y), np.abs(y - prediction)
    others = {"predicting the mean": np.abs(y - mean), "Magpie trees": np.abs(y - trees)}
    said, judged, mae = [], [], error.mean()
    for name, other in others.items():
        gain, noise = (other - error).mean(), (other - error).std(ddof=1) / n**0.5 if n > 1 else np.inf
        judged.append(int(np.sign(gain)) if abs(gain) > noise * t.ppf(0.975, max(n - 1, 1)) else 0)
        if judged[-1]:
            side = "below" if gain > 0 else "above"
            said.append(f"{abs(gain) / other.mean():.0%} {side} {name} ({number(other.mean())})")
        else:
            paired = f"difference {abs(gain):.2g} +- {noise:.2g}, paired over {n} test rows"
            said.append(f"not distinguishable from {name} ({number(other.mean())}; {paired})")
    found = {"mae": float(others["Magpie trees"].mean()), "gain": float(gain), "standard_error": float(noise)}
    advice = "worth it" if judged == [1, 1] else "use those" if judged[1] < 0 else ""
    advice = "do not use it" if judged[0] < 1 else advice
    text = f"test MAE {number(mae)} {unit}".strip() + f" on {n} crystals: {', '.join(said)}"
    found = {k: v if np.isfinite(v) else None for k, v in found.items()}
    return {"magpie": found, "verdict": f"{text}: {advice}" if advice else text}


def seen_rows(cfg, origin, crystals):
    """(M,) 1 for crystals that the start was trained on, under whatever label; 0 for others; NaN: not known."""
    if origin.path is None:
        return np.zeros(len(crystals))
    theta_0, files = Path(cfg.hub) / hub.BACKBONE, origin.card["files_sha256"]
    whole = "composition.json" in files or origin.card["kind"] == hub.BACKBONE  # has what theta_0 has seen in its list
    folders = [origin.path] if whole else [origin.path, theta_0]
    if not all((path / "module.json").exists() and hub.read_seen(path) is not None for path in folders):
        return np.full(len(crystals), np.nan)
    return hub.seen(folders, prototypes(crystals, cfg.cache, cfg.quiet)).astype(float)


def leakage(seen, error):
    """The test error with and without rows that the start was trained on; None where nothing is known of any row."""
    if np.isnan(seen).all():
        return None
    mean = lambda rows: float(error[rows].mean()) if rows.any() else None  # noqa: E731
    found = {"test": int((seen == 1).sum()), "unknown": int(np.isnan(seen).sum())}
    return found | {"test_mae_seen": mean(seen == 1), "test_mae_unseen": mean(seen == 0)}


def common_files(target, crystals, metrics, rows, test):
    """{file: bytes} that every run writes. rows: of the source, by part. test: as draw_parity takes."""
    settings = read_json(work_folder(target) / "config.json", "the settings of a run")
    contents = {"metrics": metrics, "splits": rows, "config": settings}
    files = {f"{name}.json": (json.dumps(content, indent=2) + "\n").encode() for name, content in contents.items()}
    files["skipped.csv"] = csv_text(["id", "reason"], crystals.skipped).encode()
    return files | {"parity.png": draw_parity(crystals.task, test, metrics)}


def predictions_csv(crystals, index, y, prediction, sigma=None, q=None, **more) -> bytes:
    """Of the crystals at `index`, in the physical unit. sigma, q: for intervals, blank where q is infinite.

    more: columns of whole numbers, blank where NaN. seen: 1 for a crystal that the start was trained on.
    """
    task = crystals.task
    columns = {"id": [crystals.ids[i] for i in index], "target": inverse(task, y).tolist()}
    columns["prediction"] = inverse(task, prediction).tolist()
    if sigma is not None:
        known = np.broadcast_to(np.isfinite(q), y.shape)
        for name, end in zip(("lower", "upper"), interval(task, prediction, sigma, q), strict=True):
            columns[name] = [x if ok else "" for x, ok in zip(end.tolist(), known, strict=True)]
        columns["difficulty"] = sigma.tolist()
    columns |= {name: ["" if np.isnan(x) else int(x) for x in values] for name, values in more.items()}
    return csv_text(list(columns), zip(*columns.values(), strict=True)).encode()


def read_columns(path):
    """{column: (M,) strings} of a file of predictions."""
    with reading(path, "the predictions of a run", "delete that folder and run it again"), open(path, newline="") as f:
        return {name: np.array(values) for name, *values in zip(*csv.reader(f), strict=True)}


def sentence(metrics) -> str:
    """The errors of the test rows in words; what is undefined is left out."""
    test, physical = metrics["test"], metrics.get("test_physical")
    mae = f"{number(test['mae'])} {test['unit']}".strip()
    parts = [f"{mae} = {number(physical['mae'])} {physical['unit']}".strip() if physical else mae]
    forms = {"mad_mae": "MAD:MAE {:.3g}", "r2": "R2 {:.3f}"}
    parts += [form.format(test[k]) for k, form in forms.items() if test[k] is not None]
    verdict = ["no better than predicting the mean"] * ((test["mad_mae"] or 2) <= 1)
    return ", ".join([*parts, f"{test['rows']} crystals", *verdict])


def draw_parity(task, errors, metrics) -> bytes:
    """Predicted against true, test rows, a PNG: in physical units, on the axes of the transform."""
    from matplotlib.figure import Figure

    y, prediction = (inverse(task, v) for v in errors[1:])
    drawn = np.isfinite(prediction)  # the exponential of a prediction far off may not be
    y, prediction = y[drawn], prediction[drawn]
    score = metrics.get("test_physical", metrics["test"])
    fig = Figure(figsize=(4.2, 4.2), layout="constrained")
    ax = fig.subplots()
    ends = [f([*y, *prediction], default=1) for f in (min, max)]
    ax.plot(ends, ends, color="#999999", linewidth=1)
    ax.scatter(y, prediction, s=14, color="#4878a8", alpha=0.8, linewidths=0)
    if task.transform in ("log", "log10"):
        ax.set(xscale="log", yscale="log")
    unit = f" ({task.unit})" if task.unit else ""
    title = f"{task.name}\n{score['rows']} test crystals, MAE {number(score['mae'])} {task.unit}"
    ax.set(xlabel=f"true{unit}", ylabel=f"predicted{unit}", aspect="equal")
    ax.set_title(title, fontsize=9)
    return png(fig)
