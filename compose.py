"""Stage 2a: compose the modules of a hub for one task (Adaptive Module Composition: section 2.3, Algorithm 1).

    python compose.py --task dielectric --hub hub
    python compose.py --data my_folder --unit GPa

Writes the composed module runs/composed/TASK, which finetune.py starts from, with composition.json (weights, errors,
merge gap, which start is recommended, what the modules have seen of these crystals) and weights.png. With --folds
(the default for few rows that nothing divides) that module rests on all rows, and folds/0, 1, ... in its folder hold
one for each fold of cross-validation, composed without the labels of the fold's validation and test rows.

m: training crystals. N: modules of the hub. C: channels. K: neighbours. g_j: a module. g_D: the composed one.
Merge gap: what the merged module loses against the mixture of predictions that its weights were chosen for.
Recommended start: the composed module, unless theta_0 or the best single module has a leave-one-out error lower by
more than two standard errors of the paired difference over the rows (report.py, `recommend`).
--select hinted, ours: the same module g_D, and beside it hints.npz, what the modules that were averaged say of the
training crystals (`hints`). Averaging their parameters loses much of it; finetune.py learns some of it back, on most
tasks: compare the validation errors with and without (finetune.py --hints 0). Recommended is then the composed module.
"""

import hashlib
import io
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from files import (MissingError, UserError, cache_folder, cached_folder, new_array, output_path, read_json,
                   write_json, write_skipped)
from stage import (Above, Positive, TaskConfig, Whole, claim, fold_rows, main, pick_device, read_task, rests_on,
                   run_name, say, silent, split_rows, start, work_folder)

import numpy as np
import torch
from tqdm import tqdm

import hub
from card import all_licences
from crystals import find_source
from data import by_structure, few_shot, to_device
from model import Adapters, build_backbone, pool
from report import (count_seen, draw_heat_map, draw_weights, leakage_verdict, merge_verdict, recommend, seen_before,
                    start_verdict, table, transform_note)
from tasks import get_task, task_names, unit_of
from train_module import Features, encode, finished, label_card, loader, plan_batches, read_graphs

GAP = 1e-8  # largest Frank-Wolfe gap accepted, in units of the label's variance
FLOOR = 1e-6  # an interior-point solver leaves no exact zeros: weights below this are zero
DENSE = 2000  # modules up to which D'D goes to cvxpy; a sparse active set above
HINTS = 64  # numbers about a crystal, of --select hinted
CACHE_VERSION = 1  # raise when embeddings of the same tensors change


@dataclass
class Config(TaskConfig):
    task: str = ""  # a name in the task table, or in --tasks; or several: a,b,c
    all: bool = False  # every downstream task whose data are here; with a heat map
    output: str = ""  # folder of the composed module [runs/composed/TASK]; of several: the folder above
    kind: Literal["", "full", "adapter"] = ""  # only these modules [full, in a hub that has both]
    modules: str = ""  # only these: a,b,c
    select: Literal["amc", "hinted", "average", "all", "random"] = "amc"  # hinted: ours; then the ablation
    neighbors: Positive = 5  # K (2.3)
    temperature: Above = 0.2  # neighbours weigh exp(cosine / temperature); released code 0.2, Eq. 1 has 1
    bootstrap: Whole = 100  # resamples of the rows, for the stability of the weights; 0: none
    folds: Whole | None = None  # of cross-validation; 0: one split [5 below 1,000 rows that nothing divides, else 0]
    save_embeddings: bool = False  # embeddings.npz: ids, labels, representations of the training rows, for your plots
    overwrite: bool = False  # replace the composed module that stands there


# ------------------------------------------------------------------------------------------------ Algorithm 1


def compose(modules, embed, y, K: int = 5, temperature: float = 0.2, choose=lambda w: w):
    """Algorithm 1. modules: {name: folder of g_j}; embed(name) -> (m, C); y: (m,) labels, any unit.

    choose(w) -> (N,): what the ablation makes of the weights. Returns the tensors of g_D, the weights used (N,) and
    what they rest on: Y_hat (N, m), AMC's own weights, their Frank-Wolfe gap, the solver.
    """
    Y_hat = np.stack([knn_estimate(finite(embed(name), name), y, K, temperature) for name in modules])  # ŷ_i^j
    w_amc, gap, solver = solve_weights(Y_hat, y)
    w = choose(w_amc)
    g_D = merge(modules, w)
    return g_D, w, {"Y_hat": Y_hat, "w_amc": w_amc, "gap": gap, "solver": solver}


def knn_estimate(X, y, K: int = 5, temperature: float = 0.2):
    """Leave-one-out kNN estimate of every label (Eq. 1). Algorithm 1, step 1.

    X: (m, C) representations x_i^j under one module g_j. y: (m,) labels, any unit; the estimate ŷ^j (m,) has the same.
    K is at most m - 1. Equal cosines (to 1e-10, so copies of a crystal too) go to the lower index.
    """
    X, y = np.asarray(X, np.float64), np.asarray(y, np.float64)
    m = len(X)
    if m < 2:
        raise UserError(f"leave-one-out estimates need 2 crystals or more; the training split has m={m}")
    if K < 1 or not temperature > 0:
        raise UserError(f"--neighbors {K} --temperature {temperature}: both must be above 0")
    K = min(K, m - 1)
    X = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-300)
    estimate = np.empty(m)
    block = max(1, 2**22 // m)  # rows at a time: 32 MB of similarities whatever m is
    for i in range(0, m, block):
        S = X[i : i + block] @ X.T  # (b, m) cosine similarity
        own = np.arange(len(S))
        S[own, i + own] = -2.0  # leave one out: i is not its own neighbour, and no cosine is below -1
        order = np.rint(S * 1e10).astype(np.int64) * m - np.arange(m)  # all different: equal cosines by lower index
        nbr = np.argpartition(order, m - K, axis=1)[:, m - K :]  # (b, K) N_i
        nbr = np.sort(nbr, axis=1)  # one order of summation
        s = np.take_along_axis(S, nbr, axis=1)
        f = np.exp((s - s.max(axis=1, keepdims=True)) / temperature)  # f_d = exp(cosine), up to a factor
        estimate[i : i + block] = (f * y[nbr]).sum(axis=1) / f.sum(axis=1)  # the factor leaves with Z_i
    return estimate


def solve_weights(Y_hat, y):
    """argmin_w E_D(w) over w_j >= 0, Σ_j w_j = 1 (Eq. 2). Algorithm 1, step 2. Returns w (N,), its gap, the solver.

    A solver's word is not taken: the Frank-Wolfe gap bounds how far E_D(w) is above its minimum.
    """
    D = standardise(Y_hat, y)  # (m, N)
    N = D.shape[1]
    if N == 1:
        return np.ones(1), 0.0, "none (one module)"
    gaps = {}
    for solver in (solve_clarabel, solve_nnls) if N <= DENSE else (solve_nnls,):
        w = solver(D)
        if w is not None and np.isfinite(w).all() and (w > 0).any():
            w = np.maximum(w, 0)
            w = w / w.sum()
            gap = frank_wolfe_gap(D, w)
            if gap < GAP:
                return w, gap, SOLVERS[solver]
            gaps[SOLVERS[solver]] = gap
    raise UserError(f"no solver reached the optimal weights of {N} modules: gap {gaps or 'none'}, allowed {GAP}")


def standardise(Y_hat, y):
    """D = (ŷ - y) / std(y), (m, N). As Σ w = 1, E_D(w) = var(y) |D w|² / m: no unit and no offset reach the solver."""
    Y_hat, y = np.asarray(Y_hat, np.float64), np.asarray(y, np.float64)
    std = y.std()
    if not std > 1e-12 * np.abs(y).max():
        raise UserError(f"all {len(y)} training labels are {y[0]:g}: no module can be preferred; give varied labels")
    return ((Y_hat - y) / std).T


def solve_clarabel(D):
    """Minimise w' (D'D/m) w over the simplex with cvxpy and Clarabel: (N,), or None."""
    import cvxpy as cp

    w = cp.Variable(D.shape[1], nonneg=True)
    G = D.T @ D / len(D)
    problem = cp.Problem(cp.Minimize(cp.quad_form(w, cp.psd_wrap(G))), [cp.sum(w) == 1])
    try:
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    except cp.SolverError:
        return None
    return None if w.value is None else np.where(w.value < FLOOR, 0, w.value)


def solve_nnls(D):
    """The same minimum, by an active set: (N,), or None. min |D u|²/m + (Σu - 1)² over u >= 0, and w = u / Σu.

    Exact, not a penalty: for u = s w the minimum over s is f / (1 + f), which grows with f = |D w|²/m.
    """
    from scipy.optimize import nnls

    A = np.vstack([D / np.sqrt(len(D)), np.ones(D.shape[1])])
    try:
        u = nnls(A, np.append(np.zeros(len(D)), 1.0))[0]
    except RuntimeError:  # too many steps
        return None
    return np.where(u < 1e-12, 0, u)


SOLVERS = {solve_clarabel: "cvxpy Clarabel", solve_nnls: "scipy nnls"}


def frank_wolfe_gap(D, w):
    """g'w - min g for g the gradient of |D w|²/m: an upper bound of its distance to the minimum over the simplex."""
    g = 2 * D.T @ (D @ w) / len(D)
    return float(max(g @ w - g.min(), 0))


def merge(modules, w):
    """g_D = Σ_j w_j g_j. Algorithm 1, step 3. modules: {name: folder}; w: (N,). Returns {name: tensor}.

    One module after the other: the memory is one float64 accumulator and one tensor, whatever N is. A module of weight
    0 is not read; weight 1 gives the module bit for bit. Integers must be equal in all, but for batch norm's counters,
    which no prediction reads: the largest.
    """
    parents = [(name, path, float(w_j)) for (name, path), w_j in zip(modules.items(), w, strict=True) if w_j > 0]
    total, kind = {}, {}
    for name, path, w_j in parents:
        with hub.open_tensors(path) as g:
            for k in g.keys():
                x = g.get_tensor(k)
                if len(parents) == 1:
                    total[k] = x.clone()
                elif not x.is_floating_point():
                    if k.endswith("num_batches_tracked"):
                        total[k] = torch.maximum(total.get(k, x), x)
                    elif not torch.equal(total.setdefault(k, x.clone()), x):
                        raise UserError(f"module {name}: {k} holds integers unlike those of {parents[0][0]}")
                else:
                    kind.setdefault(k, x.dtype)
                    x = x.double().mul_(w_j) if x.dtype != torch.float64 else x * w_j
                    total[k] = total[k].add_(x) if k in total else x
    return {k: x.to(kind.get(k, x.dtype)) for k, x in total.items()}


def hints(X, X_D):
    """What fine-tuning g_D may learn from the composed modules about each training crystal, labels aside (as in Romero
    et al. 2015, FitNets): the leading principal components of their representations side by side.

    X: (m, C) of each module with weight; all count alike. X_D: (m, C) of g_D. Returns the targets (m, k), whose
    absolute values have the mean 1 and the first of which are the largest, and the linear layer, weight (k, C) and bias
    (k,), that reads them best from X_D (ridge regression): where fine-tuning begins.
    """
    *centred, A = (x - x.mean(axis=0, dtype=np.float64) for x in (*X, X_D))
    side_by_side = np.hstack([x / (x.std() or 1) for x in centred])
    axes = np.linalg.eigh(side_by_side.T @ side_by_side)[1][:, ::-1]  # of falling variance
    T = side_by_side @ axes[:, : min(HINTS, len(side_by_side))]
    T /= np.abs(T).mean() or 1
    ridge = 0.01 * len(A) * (A.var() or 1) * np.eye(A.shape[1])
    W = np.linalg.solve(A.T @ A + ridge, A.T @ T).T
    return {k: np.float32(x) for k, x in (("targets", T), ("weight", W), ("bias", -W @ X_D.mean(axis=0)))}


def select(w, how: str, seed: int = 0):
    """The paper's ablation: AMC's weights; equal ones on AMC's modules, on all, on as many drawn at random."""
    if how in ("amc", "hinted"):
        return w
    chosen = w > 0
    if how == "all":
        chosen = np.ones(len(w), bool)
    elif how == "random":
        chosen = np.isin(np.arange(len(w)), np.random.default_rng(seed).choice(len(w), chosen.sum(), replace=False))
    elif how != "average":
        raise UserError(f"--select {how}: amc, hinted, average, all or random")
    return chosen / chosen.sum()


def finite(X, name):
    bad = int((~np.isfinite(X).all(axis=1)).sum())
    if bad:
        raise UserError(f"module {name}: {bad} of {len(X)} crystals have a representation that is not finite; "
                         "train it again, or leave it out with --modules")
    return X


# ------------------------------------------------------------------------------------- how far to trust the weights


def proxy_error(D, w):
    """E_D(w) in units of the label's variance."""
    return float(((D @ w) ** 2).mean())


def stability(D, n: int, seed: int):
    """Weights over n bootstrap resamples of the rows: mean, sd, share of resamples with w > 1e-6; each (N,)."""
    rng = np.random.default_rng(seed)
    W = [solve_nnls(D[rng.integers(len(D), size=len(D))]) for _ in range(n)]
    W = np.stack([w / w.sum() for w in W if w is not None and w.sum() > 0])
    return W.mean(0), W.std(0), (W > FLOOR).mean(0)


def unique(D):
    """Whether only one w is optimal: no direction d, to rounding, with D d = 0 and Σ d = 0."""
    m, N = D.shape
    if m + 1 < N or N > DENSE:
        return m + 1 >= N
    eigenvalues = np.linalg.eigvalsh(D.T @ D / m + 1)
    return bool(eigenvalues[0] > 1e-12 * eigenvalues[-1])


# -------------------------------------------------------------------------------- representations, each computed once


def make_embed(cfg, card, dataset, rows):
    """Returns embed(key, load) -> (len(rows), C): means over a crystal's atoms under the tensors that load() gives.

    card: of one of the modules. key tells the tensors apart (their hash). A result is kept by key, structures and
    settings, so a module is run once on a task, ever. Adapters run on stored atom features: one pass of the backbone
    for a whole hub of them; with load() None they are left out, which is theta_0.
    """
    arch, kind, device = card["architecture"], card["kind"], pick_device(cfg.device)
    settings = {"arch": arch, "theta_0": card["backbone_sha256"] if kind == "adapter" else None, "pooling": "mean"}
    settings |= {"version": CACHE_VERSION, "crystals": [dataset.hashes[i] for i in rows]}
    numbers = np.asarray(dataset.num_atoms)[rows]
    theta_0 = []  # read once, when it is first needed

    def backbone():
        if not theta_0:
            theta_0.append(hub.load_module(Path(cfg.hub) / hub.BACKBONE).backbone.to(device))
        return theta_0[0]

    @torch.no_grad()
    def full(tensors, new):
        net = build_backbone(arch)
        hub.load_tensors_into(net, tensors, "compose")
        net.to(device).eval()
        X, place = new((len(rows), net.width)), {int(row): i for i, row in enumerate(rows)}
        batches = loader(partial(read_graphs, dataset), plan_batches(dataset.num_atoms, rows, cfg), cfg, share=False)
        for batch in tqdm(batches, "embed", leave=False, disable=silent(cfg)):
            X[[place[i] for i in batch["index"].tolist()]] = net.embed(to_device(batch, device)).float().cpu().numpy()

    @torch.no_grad()
    def adapter(tensors, new):
        net, adapters = backbone(), None
        if tensors is not None:
            adapters = Adapters(net.adapter_width, net.num_features)
            hub.load_tensors_into(adapters, tensors, "compose")
            adapters.to(device).eval()
        x = cached(cfg, ["features", settings], lambda new: encode(net, dataset, rows, cfg, new))
        X = new((len(rows), net.width))
        features = Features(x, numbers)
        for i in range(0, len(rows), cfg.batch_size):
            batch = to_device(features.read(np.arange(i, min(i + cfg.batch_size, len(rows)))), device)
            mean = pool(net.readout(batch["features"], adapters), batch, "mean")
            X[i : i + cfg.batch_size] = mean.float().cpu().numpy()

    fill = {"full": full, "adapter": adapter}[kind]
    return lambda key, load: cached(cfg, [key, settings], lambda new: fill(load(), new))


def cached(cfg, key, fill):
    """The array kept under the hash of key; if there is none, or a damaged one, fill(new) fills the array new(shape)."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(cfg.cache) / "embeddings" / name
    cached_folder(folder, lambda part: fill(partial(new_array, part / "x.npy")))
    return np.load(folder / "x.npy", mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------- the stage


def run(cfg):
    """Compose one module for a task, or one for each of several. Returns what composition.json holds."""
    start(cfg)
    if cfg.all or "," in cfg.task:
        return run_several(cfg)
    name, cards = run_name(cfg), candidates(cfg)
    output = output_path(cfg.output or Path("runs") / "composed" / name)
    hub.check_name(output.name)
    some = next(iter(cards.values()))
    crystals, dataset = read_task(cfg, some["architecture"])
    folds = fold_rows(cfg, crystals)
    every = np.arange(len(crystals))  # with folds the label of each row is trained on, in one of them or another
    splits = {"train": few_shot(every, cfg.few_shot, cfg.split_seed)} if folds else split_rows(cfg, crystals)
    record = record_of(cfg, cards, crystals, splits)
    record |= {"folds": len(folds), "split_seed": cfg.split_seed} if folds else {}
    if finished(cfg, output, record, "give another --output, or --overwrite"):
        return show(cfg, output)
    hub.check_card(new_card(cfg, cards, crystals, splits, record), output)
    folder = work_folder(output)
    claim(folder, replace(cfg, folds=len(folds)), record)
    write_skipped(folder / "skipped.csv", crystals.skipped)

    rows = splits["train"] if cfg.few_shot and not folds else every  # one embedding for all splits of a table
    embed, seen = make_embed(cfg, some, dataset, rows), seen_before(cfg, cards, crystals)
    make = partial(composed_module, cfg, cards, crystals, embed, rows, seen)
    g_D, card, files = make(splits, record)
    files["weights.png"] = draw_weights(files["composition.json"])
    if folds:
        card["folds"] = files["composition.json"]["split"]["folds"] = len(folds)
    if cfg.save_embeddings:
        files["embeddings.npz"] = embeddings_file(cfg, cards, card, crystals, rows, embed, g_D)
    each = (make(fold, record_of(cfg, cards, crystals, fold)) for fold in folds)
    hub.save(output, g_D, card, extra=files, overwrite=cfg.overwrite, folds=each)
    return show(cfg, output)


def record_of(cfg, cards, crystals, splits):
    """What a composition rests on."""
    record = {"modules": {name: card["tensors_sha256"] for name, card in cards.items()}, **rests_on(crystals, splits)}
    return record | {k: getattr(cfg, k) for k in ("select", "neighbors", "temperature", "bootstrap", "seed")}


def composed_module(cfg, cards, crystals, embed, rows, seen, splits, record):
    """The tensors, card and files of the module composed on the training rows of `splits`, which are among `rows`."""
    began, place = time.monotonic(), {int(row): i for i, row in enumerate(rows)}
    train = [place[int(row)] for row in splits["train"]]
    g_D, w, result = compose_for(cfg, cards, crystals, splits["train"], lambda *args: embed(*args)[train])
    parents = {name: w_j for name, w_j in zip(cards, w.tolist(), strict=True) if w_j > 0}
    result["leakage"] = count_seen({name: x for name, x in seen.items() if name in ("theta_0", *parents)}, splits)
    result["notes"].append(leakage_verdict(result["leakage"], splits))
    card = new_card(cfg, cards, crystals, splits, record) | {"weights": list(parents.values())}
    card |= from_parents(cfg, {name: cards[name] for name in parents})
    card["seconds"] = round(time.monotonic() - began, 1)
    files = {"composition.json": result}
    if cfg.select == "hinted" and len(parents) > 1:
        order = [place[row] for row in by_structure(crystals, splits["train"])]
        *X, X_D = (x[order] for x in representations(cfg, cards, parents, embed, g_D).values())
        files[hub.HINTS] = npz_bytes(**hints(X, X_D))
    theta_0 = Path(cfg.hub) / hub.BACKBONE
    if theta_0.is_dir():  # else what it has seen is not known
        files |= hub.joined_seen([theta_0, *(hub.module_dir(cfg.hub, name) for name in parents)])
    return g_D, card, files


def show(cfg, output):
    """Print the report, with --quiet its last line. Returns it with the folder."""
    form = "the report of a composition"
    result = read_json(output / "composition.json", form)
    if "recommended" not in result:
        raise UserError(f"{output}: an earlier release composed it; --overwrite composes it again")
    if cfg.save_embeddings and not (output / "embeddings.npz").exists():
        raise UserError(f"{output}: was composed without embeddings.npz; --overwrite composes it again")
    if not cfg.quiet:
        print(table(result))
    names = {"mixture": "mixture", "composed": "composed module", "best_single": "best module", "theta_0": "theta_0"}
    errors = {name: result["errors"][k] for k, name in names.items()}
    found = ", ".join(f"{name} {e:.3f}" for name, e in errors.items() if e is not None)
    print(f"{output}: leave-one-out error {found}; recommended start: {result['recommended']}")
    K = result["split"].get("folds", 0)
    folds = [read_json(output / hub.FOLDS / str(k) / "composition.json", form) for k in range(K)]
    starts = Counter(fold["recommended"] for fold in folds).most_common()
    if folds and not cfg.quiet:
        print(f"{output / hub.FOLDS}: {K} folds; recommended starts: {', '.join(f'{s} in {n}' for s, n in starts)}")
    return result | {"output": str(output)}


def compose_for(cfg, cards, crystals, rows, embed):
    """Algorithm 1 on the training rows, and how far to trust it. Returns g_D, w (N,) and composition.json.

    embed(key, load) -> (m, C) of these rows.
    """
    modules = {name: hub.module_dir(cfg.hub, name) for name in cards}
    sha, some = {name: card["tensors_sha256"] for name, card in cards.items()}, next(iter(cards.values()))
    names = list(cards)
    y = np.asarray(crystals.y, np.float64)[rows]
    estimate = partial(knn_estimate, y=y, K=cfg.neighbors, temperature=cfg.temperature)
    g_D, w, amc = compose(
        modules, lambda name: embed(sha[name], lambda: hub.load_tensors(modules[name])), y,
        cfg.neighbors, cfg.temperature, lambda w: select(w, cfg.select, cfg.seed),
    )  # fmt: skip

    def squares_of(name, key, load):
        return standardise([estimate(finite(embed(key, load), name))], y)[:, 0] ** 2

    D = standardise(amc["Y_hat"], y)
    alone = (D**2).mean(axis=0)
    best = int(alone.argmin())
    theta_0 = Path(cfg.hub) / hub.BACKBONE
    squares = {"composed": squares_of("(composed)", merged_key(cards, w), lambda: g_D)}
    if w[best] < 1:  # else it is the composed module
        squares[names[best]] = D[:, best] ** 2
    if theta_0.is_dir():
        load = {"full": lambda: hub.load_tensors(theta_0), "adapter": lambda: None}[some["kind"]]
        squares["theta_0"] = squares_of("(theta_0)", some["backbone_sha256"], load)
    means = {name: float(x.mean()) for name, x in squares.items()}
    recommended, compared = recommend(squares)
    errors = {  # leave-one-out; mean squared error / variance of the labels
        "mixture": proxy_error(D, w),
        "composed": means["composed"],
        "amc": proxy_error(D, amc["w_amc"]),
        "best_single": float(alone.min()),
        "uniform": proxy_error(D, np.full(len(w), 1 / len(w))),
        "theta_0": means.get("theta_0"),  # a hub of imported modules may lack it
        "mean": (len(y) / (len(y) - 1)) ** 2,
    }
    better = [name for name in compared if means[name] < means["composed"]]
    other = min(better, key=means.get, default="")
    alternative = f"{other}, error {means[other]:.3f}" if other else ""
    verdict, large = merge_verdict(errors["composed"], errors["mixture"], errors["theta_0"], alternative)
    if large and cfg.select == "amc":
        verdict.append("with --select hinted --overwrite fine-tuning may learn back some of what averaging lost")
    averaged = np.count_nonzero(w) > 1
    if cfg.select == "hinted" and averaged:
        recommended = "composed"
        verdict.append("recommended start: the composed module, which alone has the hints")
    else:
        verdict.append(start_verdict(recommended, compared, means))
    if cfg.select == "hinted" and not averaged:
        verdict.append("one module has all the weight: averaging loses nothing, so there are no hints")
    boot = stability(D, cfg.bootstrap, cfg.seed) if cfg.bootstrap else [[None] * len(w)] * 3
    fields = ("weight", "amc_weight", "error", "bootstrap_mean", "bootstrap_sd", "bootstrap_share")
    columns = zip(w, amc["w_amc"], alone, *boot, strict=True)
    values = [{k: x if x is None else float(x) for k, x in zip(fields, row, strict=True)} for row in columns]
    result = {
        "task": crystals.task.name, "unit": unit_of(crystals.task), "label_std": float(y.std()), "rows_used": len(y),
        "modules": {name: {"tensors_sha256": sha[name], **v} for name, v in zip(modules, values, strict=True)},
        "best_single": names[best], "errors": errors, "recommended": recommended, "compared": compared,
        "merge_gap": errors["composed"] - errors["mixture"], "merge_gap_large": large, "weights_unique": unique(D),
        "frank_wolfe_gap": amc["gap"], "solver": amc["solver"], "backbone_sha256": some["backbone_sha256"],
        "neighbors": min(cfg.neighbors, len(y) - 1),
        **{k: getattr(cfg, k) for k in ("temperature", "select", "few_shot", "bootstrap", "seed")},
        "split": {"seed": cfg.split_seed, "file": Path(cfg.split_file).name, "train": len(rows)},
        "versions": {p: version(p) for p in ("torch", "numpy", "scipy", "cvxpy", "clarabel")},
        "notes": verdict + notes(cfg, cards, crystals, D, errors) + transform_note(cfg, crystals.task, y),
    }  # fmt: skip
    return g_D, w, result


def merged_key(cards, w):
    """What the tensors of g_D follow from, for the cache of embeddings."""
    key = [[card["tensors_sha256"], w_j] for card, w_j in zip(cards.values(), map(float, w), strict=True) if w_j > 0]
    return key if len(key) > 1 else key[0][0]


def representations(cfg, cards, weights, embed, g_D):
    """{name: (rows, C)} of every module with weight, and of g_D as "composed". weights: {name: w_j > 0}."""
    paths = {name: hub.module_dir(cfg.hub, name) for name in weights}
    X = {name: embed(cards[name]["tensors_sha256"], partial(hub.load_tensors, path)) for name, path in paths.items()}
    return X | {"composed": embed(merged_key(cards, [weights.get(name, 0) for name in cards]), lambda: g_D)}


def embeddings_file(cfg, cards, card, crystals, rows, embed, g_D) -> bytes:
    """embeddings.npz: ids (m,), y (m,) and, for every parent and "composed", X_NAME (m, C). card: of the composed g_D."""
    weights = dict(zip((parent["name"] for parent in card["parents"]), card["weights"], strict=True))
    X = representations(cfg, cards, weights, embed, g_D)
    ids = np.array([crystals.ids[i] for i in rows])
    return npz_bytes(ids=ids, y=crystals.y[rows], **{f"X_{name}": x for name, x in X.items()})


def npz_bytes(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def candidates(cfg):
    """{name: card} of the modules to choose from, checked against each other before any tensor is read."""
    cards = hub.list_modules(cfg.hub)
    names = [name.strip() for name in cfg.modules.split(",") if name.strip()]
    for name in names:
        if name not in cards:
            raise UserError(f"--modules {name}: not in {cfg.hub}, which has {', '.join(cards) or 'none'}")
    kind = cfg.kind or ("full" if not names and "full" in {card["kind"] for card in cards.values()} else "")
    cards = {name: c for name, c in cards.items() if (not names or name in names) and kind in ("", c["kind"])}
    if not cards:
        kind = f"{kind} " if kind else ""
        raise UserError(f"{cfg.hub}: no {kind}module to compose; train some with `make hub`")
    if len({card["kind"] for card in cards.values()}) > 1:
        raise UserError(f"--modules {cfg.modules}: full and adapter modules do not mix; choose with --kind")
    if taken := {"theta_0", "composed"} & cards.keys():
        raise UserError(f"{cfg.hub}/{min(taken)}: modules are not called composed or theta_0; rename it")
    hub.check_compatible(cards, cfg.hub)
    theta_0, some = Path(cfg.hub) / hub.BACKBONE, next(iter(cards))
    if theta_0.is_dir() and hub.read_card(theta_0)["tensors_sha256"] != cards[some]["backbone_sha256"]:
        raise UserError(f"{theta_0}: not the theta_0 that module {some} started from; put that one there")
    return cards


def notes(cfg, cards, crystals, D, errors):
    """What a user should hear about this composition, one sentence each."""
    m, N = D.shape
    same = [name for name, card in cards.items() if card.get("dataset_fingerprint") == crystals.fingerprint]
    found = [f"module {name} was trained on these very rows: its error here is not out of sample" for name in same]
    if errors["composed"] >= errors["mean"]:
        found.append("the composed module predicts these rows no better than their mean: expect little of a model")
    if not unique(D):
        found.append(f"the weights are not unique ({m} rows, {N} modules): others fit the training rows as well")
    if crystals.task.pooling == "sum":
        found.append("the labels are totals of a cell, which kNN estimates, trees and intervals take as they are: "
                     "better give them per atom")  # fmt: skip
    if cfg.neighbors > m - 1:
        found.append(f"K={m - 1}, not {cfg.neighbors}: there are only {m} crystals")
    return found


def new_card(cfg, cards, crystals, splits, record):
    """What is known of the composed module before it is composed. cards: those of the modules to choose from."""
    some, rows = next(iter(cards.values())), {k: len(v) for k, v in splits.items()}
    return {
        **{k: some[k] for k in ("kind", "architecture", "graph", "backbone_sha256")}, "record": record,
        **label_card(crystals), "rows_used": rows["train"], "seed": cfg.seed, "split_seed": cfg.split_seed,
        "split": {"file": Path(cfg.split_file).name, **rows},
        "training": {"composed": cfg.select, "neighbors": cfg.neighbors, "temperature": cfg.temperature},
    }  # fmt: skip


def from_parents(cfg, cards):
    """The card's fields that follow from the modules merged, {name: card}."""
    theta_0 = Path(cfg.hub) / hub.BACKBONE
    start = [hub.read_card(theta_0)] if theta_0.is_dir() else []
    licences = ("license_code", "license_weights", "license_data")
    return {
        "elements": sorted({z for card in cards.values() for z in card.get("elements") or []}),
        "parents": [{"name": name, "tensors_sha256": card["tensors_sha256"]} for name, card in cards.items()],
        "author": "; ".join(sorted({card["author"] for card in [*start, *cards.values()]} - {None})) or None,
        **{k: all_licences([*start, *cards.values()], k) for k in licences},
    }  # fmt: skip


def run_several(cfg):
    """One composition for each task, and a heat map of all weights. --all leaves out tasks whose data are not here."""
    candidates(cfg)  # a hub that cannot be composed is an error at once
    names, left_out = [name.strip() for name in cfg.task.split(",") if name.strip()], []
    if cfg.all:
        names, left_out = downstream_tasks(cfg)
    if not names:
        raise UserError(f"--task {cfg.task}: names no task")
    folder, results = Path(cfg.output or Path("runs") / "composed"), {}
    for name in names:
        try:
            results[name] = run(replace(cfg, task=name, all=False, output=str(folder / name.lower())))
        except UserError as error:
            if not cfg.all:
                raise
            left_out.append(name)  # a table without structures, say: the others are composed
            say(cfg, f"{name} left out: {error}")
    if not results:
        raise UserError(f"--all: none of {', '.join(left_out)} could be composed")
    picture = folder / "heat_map.png"
    draw_heat_map(results, picture)
    weights = {task: {name: x["weight"] for name, x in r["modules"].items()} for task, r in results.items()}
    write_json(picture.with_suffix(".json"), weights)
    print(f"{picture}: {len(results)} tasks" + (f"; no data for {', '.join(left_out)}" if left_out else ""))
    return {"results": results, "left_out": left_out, "output": str(picture)}


def downstream_tasks(cfg):
    """Downstream tasks whose data are here, and those whose are not."""
    here, left_out = [], []
    for name in task_names("downstream", cfg.tasks, cfg.data):
        try:
            find_source(get_task(name, cfg.tasks, cfg.data), download=False)
            here.append(name)
        except MissingError as error:
            left_out.append(name)
            say(cfg, f"{name} left out: {error}")
    if not here:
        raise MissingError(f"--all: no data for a downstream task ({', '.join(left_out)}); set MATMINER_DATA")
    return here, left_out


if __name__ == "__main__":
    main(run, Config, __doc__)
