"""Draw docs/method.png, the figure of the README: crystals -> modules -> weights -> composed module -> fine-tuned model.

    python docs/method.py
"""

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

COLOURS = ("#4878a8", "#d98a3d", "#5b9a68", "#a9709b")  # of the modules
TASKS = ("formation energy", "band gap", "shear modulus", "...")
INDEX = "123N"
WEIGHTS = (0.15, 0.6, 0.25, 0.0)  # invented
ROWS = (31.0, 23.6, 16.2, 8.8)  # y of their centres
PANELS = (  # centre, width, title, files
    (18.5, 36, "Stages 0 and 1: the hub", "pretrain.py  train_module.py"),
    (54.0, 33, "Stage 2a: compose", "compose.py"),
    (85.5, 28, "Stage 2b: fine-tune", "finetune.py  predict.py"),
)
INK, GREY, YOURS = "#222222", "#6a6a6a", ("#c0504d", "#e3a6a4")


def draw():
    fig = Figure(figsize=(10, 4.5))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 100), ylim=(0, 45))
    ax.axis("off")
    for x, width, title, files in PANELS:
        box(ax, x, 22.5, width, 44, "#f5f5f2", "#dddddd")
        text(ax, x, 42.2, title, weight="bold", size=11.5)
        text(ax, x, 39.5, files, family="monospace", size=9, color=GREY)

    text(ax, 10.5, 35.7, "many crystals and labels")
    box(ax, 31, 35.9, 7, 3.4, "white", INK)
    text(ax, 31, 35.9, r"$\theta_0$", size=13, color=INK)
    text(ax, 18.5, 3.9, r"all modules start from one pre-trained $\theta_0$:" "\nonly then can they be averaged")
    text(ax, 45, 35.7, "kNN estimates")
    text(ax, 61, 35.7, "weights, sum 1")
    for y, colour, task, j, w in zip(ROWS, COLOURS, TASKS, INDEX, WEIGHTS, strict=True):
        crystal(ax, 3.4, y)
        text(ax, 6, y, task, ha="left", size=10, color=INK)
        arrow(ax, (20.2, y), (26.5, y))
        box(ax, 31, y, 8, 4.4, colour)
        text(ax, 31, y, f"$g_{j}$", color="white", size=14)
        arrow(ax, (35.3, y), (40.5, y), colour)
        box(ax, 45, y, 8, 4.4, "white", colour)
        text(ax, 45, y, rf"$\hat y^{{\,{j}}}$", size=13, color=INK)
        arrow(ax, (49.3, y), (52.5, y), colour)
        ax.add_patch(Rectangle((53, y - 1.4), 11 * w, 2.8, color=colour))
        text(ax, 53.6 + 11 * w, y, f"$w_{j}$ = {w:g}", ha="left", size=10, color=INK)
    arrow(ax, (31, 34.1), (31, 33.3))
    crystal(ax, 40.4, 3.4, YOURS)
    text(ax, 43, 3.4, r"your crystals $x_i$, few labels $y_i$", ha="left", size=10.5, color=INK)
    arrow(ax, (45, 5.0), (45, 6.5), YOURS[0])

    text(ax, 85.5, 35.7, "average of the parameters")
    left = 76.5
    for w, colour in zip(WEIGHTS, COLOURS, strict=True):  # the composed module: stripes as wide as the weights
        ax.add_patch(Rectangle((left, 28.4), 18 * w, 5.2, color=colour, linewidth=0))
        left += 18 * w
    text(ax, 85.5, 31, r"$g_D = \Sigma_j\, w_j\, g_j$", color="white", size=14)
    arrow(ax, (69.2, 31), (76, 31))
    arrow(ax, (85.5, 28), (85.5, 22.6))
    text(ax, 86.5, 25.5, "your labels", ha="left", color=YOURS[0])
    box(ax, 85.5, 19.9, 18, 5, "white", INK)
    text(ax, 85.5, 19.9, "model with a new head", size=10.5, color=INK)
    arrow(ax, (85.5, 17.2), (85.5, 11.8))
    crystal(ax, 88.5, 14.5, YOURS)
    text(ax, 91, 14.5, "new", ha="left", color=YOURS[0])
    text(ax, 85.5, 9.7, "prediction, 90 % interval", size=10.5, color=INK)
    text(ax, 85.5, 4.8, "verdict: better than the mean,\nthan trees on simple features?")
    return fig


def text(ax, x, y, s, **more):
    ax.text(x, y, s, **{"ha": "center", "va": "center", "size": 9.5, "color": GREY, **more})


def box(ax, x, y, width, height, colour, edge=None):
    """A rounded box centred at (x, y)."""
    shape = {"boxstyle": "round,pad=0,rounding_size=0.9", "facecolor": colour, "edgecolor": edge or colour}
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, linewidth=1, **shape))


def arrow(ax, start, end, colour=GREY):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, shrinkA=0, shrinkB=0, color=colour))


def crystal(ax, x, y, colours=("#777777", "#bbbbbb")):
    """A lattice plane of rocksalt, centred at (x, y)."""
    for k in range(9):
        ax.plot(x + 1.1 * (k % 3 - 1), y + 1.1 * (k // 3 - 1), "o", markersize=3.2, color=colours[k % 2])


if __name__ == "__main__":
    picture = io.BytesIO()
    draw().savefig(picture, dpi=160)
    Image.open(picture).convert("RGB").quantize(64).save(Path(__file__).with_suffix(".png"), optimize=True)
