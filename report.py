"""What a composition says to people: which start it recommends, what its modules have seen, a table, pictures.

r: what composition.json holds. m: training crystals. Errors are leave-one-out, in units of the labels' variance.
"""

from pathlib import Path

from files import png, write_atomic
from stage import number

import numpy as np

import hub
from crystals import prototypes

NOISE = 2  # standard errors by which another start has to be better than the composed module
LARGE_GAP = 0.5  # a merge that loses more than this share of what the mixture gains over theta_0 is said aloud
SPAN = 30  # of labels that ask for a logarithm

# ----------------------------------------------------------------------------------------------------------- verdicts


def recommend(squares):
    """The start of fine-tuning with the best leave-one-out error; the composed module where the rows cannot tell.

    squares: {"composed": (m,) squared errors, other start: (m,), ...}, in any one unit. Another is recommended if its
    mean is lower by more than NOISE standard errors of the paired difference: the best of N modules is lucky, too.
    Returns the name, and {other: {"difference", "standard_error"}}; positive differences speak for the other.
    """
    found = {}
    for name in [name for name in squares if name != "composed"]:
        d = squares["composed"] - squares[name]
        found[name] = {"difference": float(d.mean()), "standard_error": float(d.std(ddof=1) / len(d) ** 0.5)}
    better = [name for name, x in found.items() if x["difference"] > NOISE * x["standard_error"]]
    return max(better, key=lambda name: found[name]["difference"], default="composed"), found


def start_verdict(recommended, compared, errors):
    """The recommended start in a sentence. errors: {start: mean squared error / variance}."""
    if recommended == "composed":
        others = " and ".join(f"{errors[name]:.3f} of {name}" for name in sorted(compared))
        why = f"error {errors['composed']:.3f}" + (f", against {others}" if others else "")
        return f"recommended start: the composed module ({why}; others would have to be better by more than noise)"
    x = compared[recommended]
    why = f"{errors[recommended]:.3f}, the composed module's {errors['composed']:.3f}"
    noise = f"difference {x['difference']:.3f}, standard error {x['standard_error']:.3f}"
    return f"recommended start: {recommended}, not the composed module (error {why}; {noise})"


def skewed(y):
    """Whether labels (m,) ask for a logarithm: positive, the 99th percentile more than SPAN times the 1st, skewed, and
    less so as logarithms. So are moduli, dielectric constants and phonon frequencies, which are usually logged."""
    low, high = np.quantile(y, [0.01, 0.99])
    if not y.min() > 0 or high < SPAN * low:
        return False
    skewness = [((z - z.mean()) ** 3).mean() / z.std() ** 3 for z in (y, np.log(y))]
    return bool(skewness[0] > 1 and abs(skewness[1]) < skewness[0])


def merge_verdict(merged: float, mixture: float, theta_0: float | None, alternative: str = ""):
    """Sentences on the merge gap, and whether it is large: more than half of the mixture's gain over theta_0 lost.

    A mixture that gains less than a tenth of its own error has little to lose: the tenth then stands for the gain.
    alternative: another start and its error, in words.
    """
    gap = merged - mixture
    gain = max((theta_0 if theta_0 is not None else 1.0) - mixture, 0.1 * mixture)
    large = gap > LARGE_GAP * gain
    found = [f"merge gap {gap:+.3f}: composed module less mixture of predictions, in MSE / variance"]
    if large:
        cure = "train theta_0 longer, or the modules less far from it"
        found.append(f"LARGE merge gap: the composed module is not what the weights promise; {cure}")
        found[-1] += f"; lower here: {alternative}, which --init auto takes if by more than noise" if alternative else ""
    return found, large


def transform_note(cfg, task, y):
    """Whether labels of one's own would rather be logarithms: a list of one sentence, or none."""
    if task.role != "user" or cfg.transform or task.transform != "none" or not skewed(y):
        return []
    span = f"{number(np.quantile(y, 0.01))} to {number(np.quantile(y, 0.99))} {task.unit}".strip()
    return [f"the labels are positive and skewed over orders of magnitude ({span}): try --transform log --overwrite"]


# --------------------------------------------------------------------------------- crystals that were trained on before


def seen_before(cfg, cards, crystals):
    """{"theta_0" or module: (M,) bool, whether it was trained on these crystals, under whatever label; None: not known}."""
    folders = {"theta_0": Path(cfg.hub) / hub.BACKBONE, **{name: hub.module_dir(cfg.hub, name) for name in cards}}
    known = [name for name, path in folders.items() if path.is_dir() and hub.read_seen(path) is not None]
    found = prototypes(crystals, cfg.cache, cfg.quiet) if known else []
    return {name: hub.seen([path], found) if name in known else None for name, path in folders.items()}


def count_seen(seen, splits):
    """{name: {"train", "test": how many of the rows were seen before}, or None}. With folds each row is tested once."""
    parts = {"train": splits["train"], "test": splits.get("test", splits["train"])}
    return {name: None if x is None else {part: int(x[rows].sum()) for part, rows in parts.items()}
            for name, x in seen.items()}  # fmt: skip


def leakage_verdict(leakage, splits):
    """What the chosen modules and theta_0 have seen of these crystals, in a sentence."""
    parts = [part for part in ("train", "test") if part in splits]
    total = " and ".join(f"{len(splits[part])} in {part}" for part in parts)
    counts = [f"{name} {' and '.join(str(x[part]) for part in parts)}" for name, x in leakage.items() if x]
    unknown = ", ".join(name for name, x in leakage.items() if not x)
    said = [f"seen in training before, under whatever label, of the crystals ({total}): {', '.join(counts)}"] * bool(counts)
    said += [f"which crystals were seen before is unknown for {unknown} (no {hub.SEEN})"] * bool(unknown)
    return "; ".join(said)


# -------------------------------------------------------------------------------------------------- table and pictures


def table(r) -> str:
    """The table of the weights and the errors behind them, for the screen."""
    how = f"K={r['neighbors']}, temperature {r['temperature']:g}, {r['select']}"
    lines = [f"{r['task']}: {r['rows_used']} training rows, {how}"]
    wide = max(12, *map(len, r["modules"]))
    lines.append(f"{'module':<{wide}}  weight   bootstrap mean, sd, chosen   error alone")
    for name, x in sorted(r["modules"].items(), key=lambda item: -item[1]["weight"]):
        b = [x[f"bootstrap_{k}"] for k in ("mean", "sd", "share")]
        text = "-" if b[0] is None else f"{b[0]:.3f} +- {b[1]:.3f} {b[2]:7.0%}"
        lines.append(f"{name:<{wide}}  {x['weight']:6.3f}   {text:>26}   {x['error']:11.3f}")
    unit = r["unit"] or "units of the label"
    lines.append(f"{'leave-one-out error':<{wide + 18}}  MSE/variance   RMSE, {unit}")
    said = {"mixture": "mixture of predictions", "composed": "composed module", "amc": "AMC's own mixture"}
    said |= {"best_single": f"best module, {r['best_single']}", "uniform": "mixture of all alike"}
    said |= {"theta_0": "theta_0", "mean": "predicting the mean"}
    for k, text in said.items():
        e = r["errors"][k]
        if e is not None and (k != "amc" or r["select"] != "amc"):
            lines.append(f"  {text:<{wide + 16}}  {e:12.3f}   {e**0.5 * r['label_std']:.4g}")
    return "\n".join([*lines, *r["notes"], f"{r['solver']}, Frank-Wolfe gap {r['frank_wolfe_gap']:.1e}"])


def draw_weights(r) -> bytes:
    """A PNG. Bars: the weights. Dots and lines: mean and standard deviation over the bootstrap."""
    from matplotlib.figure import Figure

    items = sorted(r["modules"].items(), key=lambda item: item[1]["weight"])
    fig = Figure(figsize=(6, 1.2 + 0.28 * len(items)), layout="constrained")
    ax = fig.subplots()
    ax.barh([name for name, _ in items], [x["weight"] for _, x in items], color="#4878a8")
    for i, (_, x) in enumerate(items):
        if x["bootstrap_mean"] is not None:
            ax.errorbar(x["bootstrap_mean"], i, xerr=x["bootstrap_sd"], color="#222222", fmt=".", linewidth=1)
    ax.set(xlabel="weight (bars); bootstrap mean and sd (dots)", title=f"{r['task']}, {r['rows_used']} rows")
    ax.set_xlim(left=0)
    return png(fig)


def draw_heat_map(results, path):
    """Weights, tasks x modules, as Figure 7 of the paper."""
    from matplotlib.figure import Figure

    tasks, modules = list(results), sorted({name for r in results.values() for name in r["modules"]})
    W = np.array([[results[task]["modules"].get(g, {"weight": 0})["weight"] for g in modules] for task in tasks])
    fig = Figure(figsize=(2.5 + 0.5 * len(modules), 1.8 + 0.4 * len(tasks)), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(W, cmap="Blues", vmin=0, aspect="auto")
    ax.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
    ax.set_yticks(range(len(tasks)), tasks)
    for i, j in zip(*np.nonzero(W >= 0.005)):
        color = "white" if W[i, j] > 0.6 * W.max() else "black"
        ax.text(j, i, f"{W[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
    fig.colorbar(image, label="weight")
    write_atomic(path, lambda f: f.write(png(fig)))
