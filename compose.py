"""Stage 2a: compose the modules of a hub for one task (Adaptive Module Composition: section 2.3, Algorithm 1).

    python compose.py --task dielectric --hub hub

Writes the composed module runs/dielectric/composed, which finetune.py starts from, with composition.json (weights,
errors, merge gap), and beside it composed_weights.png; settings and skipped crystals are in .runs/composed.

m: training crystals. N: modules of the hub. C: channels. K: neighbours. g_j: a module. g_D: the composed one.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import data
import hub
import model as moma
import train_module as tm
from crystals import find_source
from files import cache_folder, write_atomic, write_skipped
from stage import claim, main, pick_device, say, silent
from tasks import ALIASES, get_task, task_names, unit_of

GAP = 1e-8  # largest Frank-Wolfe gap accepted, in units of the label's variance
FLOOR = 1e-6  # an interior-point solver leaves no exact zeros: weights below this are zero
DENSE = 2000  # modules up to which D'D goes to cvxpy; a sparse active set above
LARGE_GAP = 0.5  # a merge that loses more than this share of what the mixture gains over theta_0 is said aloud


@dataclass
class Config:
    task: str = "dielectric"  # a task of TASKS or --tasks, or several: a,b,c
    all: bool = False  # every downstream task whose data are here; as several, with a heat map tasks x modules
    data: str = ""  # folder, file or "demo"; default: the task's own data set
    tasks: str = ""  # JSON file with more tasks
    target_column: str = ""  # of --data, as the five below
    structure_column: str = ""
    id_column: str = ""
    unit: str = ""
    transform: str = ""  # none, log, log10, log1p
    pooling: Literal["", "mean", "sum", "max"] = ""
    limit: int = 0  # use this many random rows; 0: all
    on_error: Literal["skip", "stop"] = "skip"  # at a row that cannot be used
    split_seed: int = 0  # of 70/15/15
    split_file: str = ""  # or row numbers: {"train": [], "val": [], "test": []}; "{task}" in it is the name
    hub: str = "hub"
    output: str = ""  # default: runs/TASK/composed; of several tasks: runs, the folder above
    cache: str = ""  # folder of the built graphs and of the embeddings
    kind: Literal["", "full", "adapter"] = ""  # only these modules, in a hub that has both
    modules: str = ""  # only these: a,b,c
    select: Literal["amc", "average", "all", "random"] = "amc"  # ablation; average: AMC's modules with equal weights
    neighbors: int = 5  # K (2.3)
    temperature: float = 0.2  # neighbours weigh exp(cosine / temperature); released code 0.2, Eq. 1 has 1
    few_shot: int = 0  # use only this many random training rows; 0: all
    bootstrap: int = 100  # resamples of the rows that show how stable the weights are; 0: none
    seed: int = 0  # of few-shot, bootstrap and random
    batch_size: int = 64
    max_atoms: int = 2000  # never more atoms in a batch; 0: no limit
    num_workers: int = 0  # processes that load batches
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False  # accepted as everywhere; what is embedded already is never computed again
    config: str = ""  # a run's config.json as defaults
    quiet: bool = False


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
        raise ValueError(f"leave-one-out estimates need 2 crystals or more; the training split has m={m}")
    if K < 1 or not temperature > 0:
        raise ValueError(f"--neighbors {K} --temperature {temperature}: both must be above 0")
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
    raise ValueError(f"no solver reached the optimal weights of {N} modules: gap {gaps or 'none'}, allowed {GAP}")


def standardise(Y_hat, y):
    """D = (ŷ - y) / std(y), (m, N). As Σ w = 1, E_D(w) = var(y) |D w|² / m: no unit and no offset reach the solver."""
    Y_hat, y = np.asarray(Y_hat, np.float64), np.asarray(y, np.float64)
    std = y.std()
    if not std > 1e-12 * np.abs(y).max():
        raise ValueError(f"all {len(y)} training labels are {y[0]:g}: no module can be preferred; give varied labels")
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
                        raise ValueError(f"module {name}: {k} holds integers unlike those of {parents[0][0]}")
                else:
                    kind.setdefault(k, x.dtype)
                    x = x.double().mul_(w_j) if x.dtype != torch.float64 else x * w_j
                    total[k] = total[k].add_(x) if k in total else x
    return {k: x.to(kind.get(k, x.dtype)) for k, x in total.items()}


def select(w, how: str, seed: int = 0):
    """The paper's ablation: AMC's weights; equal ones on AMC's modules, on all, on as many drawn at random."""
    if how == "amc":
        return w
    chosen = w > 0
    if how == "all":
        chosen = np.ones(len(w), bool)
    elif how == "random":
        chosen = np.isin(np.arange(len(w)), np.random.default_rng(seed).choice(len(w), chosen.sum(), replace=False))
    elif how != "average":
        raise ValueError(f"--select {how}: amc, average, all or random")
    return chosen / chosen.sum()


def finite(X, name):
    bad = int((~np.isfinite(X).all(axis=1)).sum())
    if bad:
        raise ValueError(f"module {name}: {bad} of {len(X)} crystals have a representation that is not finite; "
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


def merge_verdict(merged: float, mixture: float, theta_0: float | None):
    """Sentences on the merge gap, and whether it is large: more than half of the mixture's gain over theta_0 lost.

    A mixture that gains less than a tenth of its own error has little to lose: the tenth then stands for the gain.
    """
    gap = merged - mixture
    gain = max((theta_0 if theta_0 is not None else 1.0) - mixture, 0.1 * mixture)
    large = gap > LARGE_GAP * gain
    found = [f"merge gap {gap:+.3f}: composed module less mixture of predictions, in MSE / variance"]
    if large:
        found.append("LARGE merge gap: the composed module is not what the weights promise; train theta_0 longer, or "
                     "the modules less far from it")  # fmt: skip
    return found, large


# -------------------------------------------------------------------------------- representations, each computed once


def make_embed(cfg, arch, kind, dataset, rows):
    """Returns embed(key, load) -> (m, C): crystals `rows`, the mean over their atoms, under the tensors load() gives.

    key tells the tensors apart (their hash). A result is a file named by key, structures and settings, so a module is
    run once on a task, ever. Adapters run on stored atom features: one pass of the backbone for a whole hub of them;
    with load() None they are left out, which is theta_0.
    """
    device = pick_device(cfg.device)
    theta_0 = hub.read_card(Path(cfg.hub) / hub.BACKBONE)["tensors_sha256"] if kind == "adapter" else None
    settings = {"arch": arch, "theta_0": theta_0, "pooling": "mean", "version": data.CACHE_VERSION}
    settings["crystals"] = [dataset.hashes[i] for i in rows]
    numbers = np.asarray(dataset.num_atoms)[rows]
    end = np.cumsum(numbers)  # the atoms of crystal i are end[i] - numbers[i] ... end[i]
    place = {int(row): i for i, row in enumerate(rows)}

    def passes(what):
        by_size = np.asarray(rows)[np.argsort(numbers, kind="stable")]
        batches = tm.loader(dataset, by_size, cfg, share=False)
        for batch in tqdm(batches, what, leave=False, disable=silent(cfg)):
            yield [place[i] for i in batch["index"].tolist()], data.to_device(batch, device)

    @torch.no_grad()
    def full(tensors, new):
        net = moma.build_backbone(arch)
        tm.load_tensors(net, tensors, "compose")
        net.to(device).eval()
        X = new((len(rows), net.width))
        for i, batch in passes("embed"):
            X[i] = net.embed(batch).float().cpu().numpy()

    @torch.no_grad()
    def features(net, new):
        x = new((end[-1], net.num_features, net.adapter_width))  # (A, L, C), the crystals in the order of rows
        for i, batch in passes("encode"):
            atoms = np.concatenate([np.arange(end[j] - numbers[j], end[j]) for j in i])
            x[atoms] = net.atom_features(batch).float().cpu().numpy()

    @torch.no_grad()
    def adapter(tensors, new):
        net, adapters = tm.load_backbone(cfg.hub)[0].to(device).eval(), None
        if tensors is not None:
            adapters = moma.Adapters(arch)
            tm.load_tensors(adapters, tensors, "compose")
            adapters.to(device).eval()
        x = cached(cfg, ["features", settings], lambda new: features(net, new))
        X = new((len(rows), net.width))
        for i in range(0, len(rows), cfg.batch_size):
            n = torch.as_tensor(numbers[i : i + cfg.batch_size])
            atoms = torch.tensor(x[end[i] - n[0] : end[i] - n[0] + n.sum()]).to(device)
            batch = {"num_atoms": n.to(device), "batch": torch.repeat_interleave(torch.arange(len(n)), n).to(device)}
            X[i : i + len(n)] = moma.pool(net.readout(atoms, adapters), batch, "mean").float().cpu().numpy()

    fill = {"full": full, "adapter": adapter}[kind]
    return lambda key, load: cached(cfg, [key, settings], lambda new: fill(load(), new))


def cached(cfg, key, fill):
    """The array in the file named by the hash of key; if there is none, fill(new) first fills the array new(shape)."""
    folder = cache_folder(cfg.cache) / "embeddings"
    file = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.stem}.{os.getpid()}.part")
        try:
            fill(lambda shape: np.lib.format.open_memmap(part, "w+", np.float32, tuple(map(int, shape))))
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    return np.load(file, mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------- the stage


def run(cfg):
    """Compose one module for a task, or one for each of several. Returns what composition.json holds."""
    if cfg.all or "," in cfg.task:
        return run_several(cfg)
    start, cards = time.monotonic(), candidates(cfg)
    cfg = replace(cfg, split_file=cfg.split_file.replace("{task}", ALIASES.get(cfg.task, cfg.task)))
    modules = {name: hub.module_dir(cfg.hub, name) for name in cards}
    sha = {name: card["tensors_sha256"] for name, card in cards.items()}
    some = next(iter(cards.values()))
    output = Path(cfg.output or f"runs/{cfg.task}/composed")
    hub.module_dir(output.parent, output.name)
    if output.exists() and not (output / "composition.json").exists():
        raise ValueError(f"{output}: exists and is not a composed module; give another --output")
    folder = output.parent / ".runs" / output.name
    claim(folder, cfg)

    crystals, dataset, splits = tm.prepare(cfg, some["architecture"])
    write_skipped(folder / "skipped.csv", crystals.skipped)
    rows = few_shot(splits["train"], cfg.few_shot, cfg.seed)  # from here on nothing else is looked at
    y = np.asarray(crystals.y, np.float64)[rows]
    embed = make_embed(cfg, some["architecture"], some["kind"], dataset, rows)
    g_D, w, amc = compose(
        modules, lambda name: embed(sha[name], lambda: hub.load_tensors(modules[name])), y,
        cfg.neighbors, cfg.temperature, lambda w: select(w, cfg.select, cfg.seed),
    )  # fmt: skip

    def error_of(name, key, load):
        X = finite(embed(key, load), name)
        return proxy_error(standardise([knn_estimate(X, y, cfg.neighbors, cfg.temperature)], y), [1])

    D = standardise(amc["Y_hat"], y)
    alone = (D**2).mean(axis=0)
    parents = {name: float(w_j) for name, w_j in zip(modules, w, strict=True) if w_j > 0}
    key = [[sha[name], w_j] for name, w_j in parents.items()]
    errors = {  # leave-one-out; mean squared error / variance of the labels
        "mixture": proxy_error(D, w),
        "composed": error_of("(composed)", key if len(key) > 1 else key[0][0], lambda: g_D),
        "amc": proxy_error(D, amc["w_amc"]),
        "best_single": float(alone.min()),
        "uniform": proxy_error(D, np.full(len(w), 1 / len(w))),
        "theta_0": None,  # a hub of imported modules may lack it
        "mean": (len(y) / (len(y) - 1)) ** 2,
    }
    theta_0 = Path(cfg.hub) / hub.BACKBONE
    if theta_0.is_dir():
        load = {"full": lambda: hub.load_tensors(theta_0), "adapter": lambda: None}[some["kind"]]
        errors["theta_0"] = error_of("(theta_0)", some["backbone_sha256"], load)
    verdict, large = merge_verdict(errors["composed"], errors["mixture"], errors["theta_0"])
    boot = stability(D, cfg.bootstrap, cfg.seed) if cfg.bootstrap else [[None] * len(w)] * 3
    names = ("weight", "amc_weight", "error", "bootstrap_mean", "bootstrap_sd", "bootstrap_share")
    columns = zip(w, amc["w_amc"], alone, *boot, strict=True)
    values = [{k: x if x is None else float(x) for k, x in zip(names, row, strict=True)} for row in columns]
    result = {
        "task": crystals.task.name, "unit": unit_of(crystals.task), "label_std": float(y.std()),
        "rows_used": len(y),
        "modules": {name: {"tensors_sha256": sha[name], **v} for name, v in zip(modules, values, strict=True)},
        "best_single": list(modules)[int(alone.argmin())], "errors": errors,
        "merge_gap": errors["composed"] - errors["mixture"], "merge_gap_large": large, "weights_unique": unique(D),
        "frank_wolfe_gap": amc["gap"], "solver": amc["solver"], "backbone_sha256": some["backbone_sha256"],
        "neighbors": min(cfg.neighbors, len(y) - 1),
        **{k: getattr(cfg, k) for k in ("temperature", "select", "few_shot", "bootstrap", "seed")},
        "split": {"seed": cfg.split_seed, "file": Path(cfg.split_file).name, "train": len(splits["train"])},
        "versions": {p: version(p) for p in ("torch", "numpy", "scipy", "cvxpy", "clarabel")},
        "notes": verdict + notes(cfg, cards, crystals, D),
    }  # fmt: skip
    card = make_card(cfg, {name: cards[name] for name in parents}, parents, crystals, rows)
    card["seconds"] = round(time.monotonic() - start, 1)
    hub.save(output, g_D, card, extra={"composition.json": result}, overwrite=True)
    chart = output.with_name(f"{output.name}_weights.png")
    draw_weights(result, chart)
    if not cfg.quiet:
        print(report(result), f"{output}  {chart}", sep="\n")
    return result | {"output": str(output)}


def candidates(cfg):
    """{name: card} of the modules to choose from, checked against each other before any tensor is read."""
    cards = hub.list_modules(cfg.hub)
    names = [name.strip() for name in cfg.modules.split(",") if name.strip()]
    for name in names:
        if name not in cards:
            raise ValueError(f"--modules {name}: not in {cfg.hub}, which has {', '.join(cards) or 'none'}")
    cards = {name: c for name, c in cards.items() if (not names or name in names) and cfg.kind in ("", c["kind"])}
    if not cards:
        kind = f"{cfg.kind} " if cfg.kind else ""
        raise ValueError(f"{cfg.hub}: no {kind}module to compose; train some with `make hub`")
    if len({card["kind"] for card in cards.values()}) > 1:
        raise ValueError(f"{cfg.hub}: has full and adapter modules, which do not mix; choose with --kind")
    hub.check_compatible(cards, cfg.hub)
    theta_0, some = Path(cfg.hub) / hub.BACKBONE, next(iter(cards))
    if theta_0.is_dir() and hub.read_card(theta_0)["tensors_sha256"] != cards[some]["backbone_sha256"]:
        raise ValueError(f"{theta_0}: not the theta_0 that module {some} started from; put that one there")
    return cards


def few_shot(rows, n: int, seed: int):
    """n random rows, sorted; those of a smaller n are among those of a larger one."""
    if not 0 <= n <= len(rows):
        raise ValueError(f"--few-shot {n}: the training split has {len(rows)} rows")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:n]) if n else np.asarray(rows)


def notes(cfg, cards, crystals, D):
    """What a user should hear about this composition, one sentence each."""
    m, N = D.shape
    same = [name for name, card in cards.items() if card.get("dataset_fingerprint") == crystals.fingerprint]
    found = [f"module {name} was trained on these very rows: its error here is not out of sample" for name in same]
    if not unique(D):
        found.append(f"the weights are not unique ({m} rows, {N} modules): others fit the training rows as well")
    if cfg.neighbors > m - 1:
        found.append(f"K={m - 1}, not {cfg.neighbors}: there are only {m} crystals")
    return found


def make_card(cfg, cards, parents, crystals, rows):
    """The composed module's card (design 3). cards: those of the modules merged; parents: {name: weight}."""
    task, some = crystals.task, next(iter(cards.values()))
    return {
        **{k: some[k] for k in ("kind", "architecture", "graph", "backbone_sha256")},
        "property": task.name, "unit": unit_of(task), "physical_unit": task.unit, "transform": task.transform,
        "pooling": task.pooling, "dataset": Path(task.dataset).name, "dataset_fingerprint": crystals.fingerprint,
        "rows_used": len(rows), "rows_skipped": len(crystals.skipped), "seed": cfg.seed, "split_seed": cfg.split_seed,
        "elements": sorted({z for card in cards.values() for z in card.get("elements") or []}),
        "split": {"train": len(rows), "file": Path(cfg.split_file).name},
        "training": {"composed": cfg.select, "neighbors": cfg.neighbors, "temperature": cfg.temperature},
        "parents": [{"name": name, "tensors_sha256": card["tensors_sha256"]} for name, card in cards.items()],
        "weights": list(parents.values()),
        **{k: strictest(c.get(k) for c in cards.values()) for k in ("license_code", "license_weights", "license_data")},
    }  # fmt: skip


def strictest(licences):
    """All licences of the parents, the most restrictive first; one that is not known counts as that."""

    def rank(licence):
        words = licence.upper().replace("_", "-").replace(" ", "-").split("-")
        return [word in words for word in ("UNKNOWN", "ND", "NC", "SA", "GPL", "BY")]

    return "; ".join(sorted({x or "unknown" for x in licences}, key=lambda x: (rank(x), x), reverse=True))


def run_several(cfg):
    """One composition for each task, and a heat map of all weights. --all leaves out tasks whose data are not here."""
    candidates(cfg)  # a hub that cannot be composed is an error at once
    names, left_out = [name.strip() for name in cfg.task.split(",") if name.strip()], []
    if cfg.all:
        names, left_out = downstream_tasks(cfg)
    folder, results = Path(cfg.output or "runs"), {}
    for name in names:
        results[name] = run(replace(cfg, task=name, all=False, output=str(folder / name / "composed")))
    picture = folder / "heat_map.png"
    draw_heat_map(results, picture)
    weights = {task: {name: x["weight"] for name, x in r["modules"].items()} for task, r in results.items()}
    write_atomic(picture.with_suffix(".json"), lambda f: f.write(json.dumps(weights, indent=2).encode()))
    say(cfg, f"{picture}: {len(results)} tasks" + (f"; no data for {', '.join(left_out)}" if left_out else ""))
    return {"results": results, "left_out": left_out, "output": str(picture)}


def downstream_tasks(cfg):
    """Downstream tasks whose data are here, and those whose are not."""
    here, left_out = [], []
    for name in task_names("downstream", cfg.tasks, cfg.data):
        try:
            if cfg.data != "demo":
                find_source(get_task(name, cfg.tasks, cfg.data))
            here.append(name)
        except FileNotFoundError as error:
            left_out.append(name)
            say(cfg, f"{name} left out: {error}")
    if not here:
        raise FileNotFoundError(f"--all: no data for a downstream task ({', '.join(left_out)}); set MATMINER_DATA")
    return here, left_out


# ------------------------------------------------------------------------------------------------- report and pictures


def report(r):
    """The table of the weights and the errors behind them, for the screen."""
    how = f"K={r['neighbors']}, temperature {r['temperature']:g}, {r['select']}"
    lines = [f"{r['task']}: {r['rows_used']} training rows, {how}"]
    wide = max(map(len, r["modules"]))
    lines.append(f"{'module':<{wide}}  weight   bootstrap mean, sd, chosen   error alone")
    for name, x in sorted(r["modules"].items(), key=lambda item: -item[1]["weight"]):
        b = [x[f"bootstrap_{k}"] for k in ("mean", "sd", "share")]
        text = "-" if b[0] is None else f"{b[0]:.3f} +- {b[1]:.3f} {b[2]:7.0%}"
        lines.append(f"{name:<{wide}}  {x['weight']:6.3f}   {text:>26}   {x['error']:11.3f}")
    unit = r["unit"] or "units of the label"
    lines.append(f"{'leave-one-out error':<{wide + 18}}  MSE/variance   RMSE, {unit}")
    said = {"mixture": "mixture of predictions", "composed": "composed module", "amc": "AMC's own mixture"}
    said |= {"best_single": f"best module, {r['best_single']}", "uniform": "mixture of all alike", "theta_0": "theta_0"}
    for k, text in {**said, "mean": "predicting the mean"}.items():
        e = r["errors"][k]
        if e is not None and (k != "amc" or r["select"] != "amc"):
            lines.append(f"  {text:<{wide + 16}}  {e:12.3f}   {e**0.5 * r['label_std']:.4g}")
    return "\n".join([*lines, *r["notes"], f"{r['solver']}, Frank-Wolfe gap {r['frank_wolfe_gap']:.1e}"])


def draw_weights(r, path):
    """Bars: the weights. Dots and lines: mean and standard deviation over the bootstrap."""
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
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=150))


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
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=150))


if __name__ == "__main__":
    main(run, Config, __doc__)
