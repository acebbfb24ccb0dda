"""Architectures: presets, the training that suits them, and the check of what a card says (appendix B.2).

    arch = preset("small")  # {"backbone": "gemnet_oc", "preset": "small", "graph": {...}, "num_blocks": 2}
    backbone = build_backbone(arch)

An architecture is a JSON-able dict, so that a module's card alone rebuilds its backbone. Import these names
from model.py, which fills BACKBONES.
"""

import functools
import json
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from data import GraphConfig
from files import UserError, short


class Preset(NamedTuple):
    """One size of a backbone: constructor arguments, graphs, and defaults of the stages that train it.

    training: {stage: {"lr"}}, of pretrain also "epochs"; the stages are those of `training_defaults`.
    """

    arch: dict
    graph: GraphConfig
    training: dict


def training(epochs, **rates):
    """Learning rates of the stages, and the epochs of pre-training."""
    stages = {stage: {"lr": lr} for stage, lr in rates.items()}
    stages["pretrain"]["epochs"] = epochs
    return stages


# JMP-L's; its 2 epochs are of 120 million structures. Small nets bear and need larger steps, adapters larger ones yet.
PAPER = training(pretrain=3e-4, epochs=2, full=5e-4, adapter=5e-4, finetune=8e-5, finetune_adapter=8e-5, scratch=8e-5)
FOR_SMALL = training(pretrain=2e-3, epochs=40, full=5e-4, adapter=2e-3, finetune=3e-4, finetune_adapter=3e-3,
                     scratch=1e-3)  # fmt: skip
FOR_TINY = training(pretrain=5e-3, epochs=20, full=2e-3, adapter=2e-3, finetune=1e-3, finetune_adapter=1e-3,
                    scratch=1e-3)  # fmt: skip

GEMNET = dict(  # JMP-S
    num_elements=120, num_radial=128, num_spherical=7, num_blocks=4, emb_size_atom=256, emb_size_edge=512,
    emb_size_trip_in=64, emb_size_trip_out=64, emb_size_quad_in=32, emb_size_quad_out=32, emb_size_aint_in=64,
    emb_size_aint_out=64, emb_size_rbf=16, emb_size_cbf=16, emb_size_sbf=32, num_before_skip=2,
    num_after_skip=2, num_concat=1, num_atom=3, num_output_afteratom=3, num_atom_emb_layers=2,
    num_global_out_layers=2, rbf_cutoff=12.0, trip_interaction=True, quad_interaction=True,
    atom_edge_interaction=True, edge_atom_interaction=True, atom_interaction=True, forces=False,
)  # fmt: skip
LARGE = GEMNET | dict(  # JMP-L
    num_blocks=6, emb_size_edge=1024, emb_size_trip_out=128, emb_size_quad_in=64, emb_size_rbf=32,
    emb_size_sbf=64, num_concat=4,
)  # fmt: skip
SMALL = GEMNET | dict(
    num_radial=32, num_spherical=5, num_blocks=2, emb_size_atom=128, emb_size_edge=64, emb_size_trip_in=16,
    emb_size_trip_out=16, emb_size_quad_in=8, emb_size_quad_out=8, emb_size_aint_in=32, emb_size_aint_out=32,
    emb_size_cbf=8, emb_size_sbf=8, num_before_skip=1, num_after_skip=1, num_atom=1, num_output_afteratom=1,
    num_atom_emb_layers=1, num_global_out_layers=1, rbf_cutoff=6.0, quad_interaction=False,
)  # fmt: skip
TINY = SMALL | dict(num_radial=16, num_spherical=4, num_blocks=1, emb_size_atom=32, emb_size_edge=24,
                    emb_size_aint_in=16, emb_size_aint_out=16, emb_size_rbf=8)  # fmt: skip

NEAR = GraphConfig(cutoff=6.0, cutoff_a2ee2a=6.0, cutoff_qint=6.0, cutoff_a2a=6.0, qint=False)
NEAR_8 = replace(NEAR, max_neighbors=8, max_neighbors_a2ee2a=8, max_neighbors_qint=4)
NEAR_12 = replace(NEAR, max_neighbors=12, max_neighbors_a2ee2a=12, max_neighbors_qint=6)

BACKBONES = {}  # filled by the files that define them, model.py first
PRESETS = {
    "gemnet_oc": {
        "tiny": Preset(TINY, NEAR_8, FOR_TINY),
        "small": Preset(SMALL, NEAR_12, FOR_SMALL),
        "base": Preset(GEMNET, GraphConfig(), PAPER),
        "large": Preset(LARGE, GraphConfig(), PAPER),
    }
}


def preset(name, backbone="gemnet_oc", graph=None, **overrides):
    """An architecture by name. overrides: constructor arguments; graph: fields of GraphConfig.

    Raises UserError where `check_architecture` does.
    """
    if backbone not in BACKBONES:
        raise UserError(f"--backbone {backbone}: use one of {', '.join(BACKBONES)}")
    if name not in PRESETS[backbone]:
        raise UserError(f"--preset {name}: use one of {', '.join(PRESETS[backbone])}")
    chosen = PRESETS[backbone][name]
    arch = {"backbone": backbone, "preset": name} | chosen.arch | overrides
    arch["graph"] = asdict(chosen.graph) | (graph or {})
    check_architecture(arch, f"--preset {name}")
    return arch


def training_defaults(arch, stage):
    """{"lr": ...}, of pretrain {"lr": ..., "epochs": ...}: the preset's; the paper's where arch names none.

    stage: pretrain, full, adapter, finetune (of a full module), finetune_adapter, scratch (fine-tuning from nothing).
    """
    known = PRESETS.get(arch["backbone"], {}).get(arch["preset"])
    return dict((known.training if known else PAPER)[stage])


def build_backbone(arch):
    """The backbone that `arch` describes, with fresh weights (torch's global seed)."""
    return BACKBONES[arch["backbone"]](arch)


class NoNumbers(TorchFunctionMode):
    """Leaves out initial weights, whose random numbers on the meta device import torch._dynamo: two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func is torch.Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def shapes_only(arch):
    """The backbone without numbers: parameters on the meta device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), NoNumbers():
        return build_backbone(arch)


# ---------------------------------------------------------------- architectures of cards

MOST_PARAMETERS = 2_000_000_000  # 8 GB in float32


def check_architecture(arch, where="architecture"):
    """Raise UserError, one line that begins with `where`, unless a backbone can be built from arch.

    Needed: a known backbone, exactly the arguments of its presets, their types, numbers within their ranges,
    the same of the graph settings, every graph that the backbone reads, and at most MOST_PARAMETERS.
    """
    try:
        check_text(json.dumps(arch, sort_keys=True))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{where}: not in JSON's types; take a card as this program wrote it") from None


@functools.lru_cache(maxsize=64)
def check_text(text):
    arch = json.loads(text)
    name = arch.get("backbone") if isinstance(arch, dict) else None
    if not isinstance(name, str) or name not in BACKBONES:
        raise UserError(f"backbone {short(name)}: known are {', '.join(BACKBONES)}; use the code that has it")
    like = {"backbone": name, "preset": "", "graph": {}} | next(iter(PRESETS[name].values())).arch
    check_fields(arch, like, name, BACKBONES[name].ranges)
    check_fields(arch["graph"], asdict(GraphConfig()), "graph", {})
    rule = arch["graph"]["graph_rule"]
    if rule not in ("symmetric", "published"):
        raise UserError(f"graph: graph_rule is {short(rule)}; should be symmetric or published")
    try:
        backbone = shapes_only(arch)
    except OSError:  # of the machine, not of the arguments
        raise
    except Exception as error:  # constructors raise what they like, and the arguments are the cause
        raise UserError(f"{name} cannot be built of these arguments ({short(error)}); change them") from None
    number = sum(p.numel() for p in backbone.parameters())
    if number > MOST_PARAMETERS:
        raise UserError(f"{name} would have {number:,} parameters; at most {MOST_PARAMETERS:,} are built")
    missing = [graph for graph in backbone.graphs if not arch["graph"].get(graph, graph == "main")]
    if missing:
        raise UserError(f"graph.{missing[0]} is false, but {name} reads it with these arguments; set it true")


def check_fields(found, like, what, ranges):
    """UserError unless `found` has the names of `like`, values of their types, and numbers within range."""
    for name in sorted(like.keys() ^ found.keys()):
        verb = "lacks" if name in like else "has no argument"
        raise UserError(f"{what} {verb} {short(name)}; its arguments are {', '.join(like)}")
    for name, value in found.items():
        kind = type(like[name])
        least, most = ranges.get(name) or usual_range(name, kind)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{what}: {name} is {short(value)}; should be like {short(like[name])}")
        if kind in (int, float) and not least <= value <= most:
            raise UserError(f"{what}: {name} is {short(value)}; should be from {least} to {most}")
        if kind is str and len(value) > 64:
            raise UserError(f"{what}: {name} is {short(value)}; should have at most 64 letters")


def usual_range(name, kind):
    """The least and the largest value of a constructor argument or graph setting, by its name or type."""
    by_name = {"cutoff": (0.1, 50), "neighbors": (1, 10_000), "blocks": (1, 100)}  # cutoffs in angstrom
    by_name |= {"emb_size": (2, 65536), "radial": (2, 65536)}  # initial weights have a variance
    found = [bounds for part, bounds in by_name.items() if part in name]
    return found[0] if found else (1, 65536) if kind is int else (0, 1e6)
