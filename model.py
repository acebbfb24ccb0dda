"""The backbone contract, GemNet-OC (Gasteiger et al. 2022, as in JMP), adapters, heads. MoMa 2.2 and B.2.

A backbone is a subclass of `Backbone`. The stages use of it what this list names, and nothing else.

    Class(arch)       arch: JSON-able dict of every constructor argument, named and typed as in its presets,
                      and "backbone", "preset", "graph" (GraphConfig's fields). Equal arch, equal parameters
    .arch             that dict
    .width            C, channels of the representation
    .adapter_width    channels of the per-block atom features that adapters read
    .num_features     L, how many of them an atom has
    atom_features(batch) -> (A, L, adapter_width)    constants of a frozen backbone in evaluation mode
    readout(features, adapters=None) -> (A, C)       each atom by itself, from features or adapters(features)

The base class gives `forward(batch, adapters=None)` -> (A, C), the readout of the atom features;
`embed(batch, adapters=None)` -> (B, C), the per-crystal representation x_i^j, their mean over atoms; and a
default for each of these:

    .graphs           the graphs it reads; ("main",)
    .interactions     how the names of its interaction blocks' parameters begin (--train interactions); ()
    .can_checkpoint   whether it obeys .checkpointing = True, keep less and compute it again; False
    .edge_width       C_edge, where it has edge features: what pre-training on forces needs; None
    .force_arguments  constructor arguments that give it edge features, for pre-training only; {}
    .ranges           {argument: (least, most)} where `usual_range` does not suit; {}
    edge_features(batch) -> (A, C), (E, C_edge), (E, 3)    readout, edge features, unit vectors of main edges
    shared_gradient_divisors()    {parameter: number of blocks that share it}, for pre-training; {}

BACKBONES[name] = Class and PRESETS[name] = {name of a size: Preset} make it known; "small" is the commands'
default. Modules are averaged, so nothing is learnt outside parameters and buffers.

`batch` is what `data.collate` returns:

    Z (A,) atomic numbers, pos (A, 3) in Å, cell (B, 3, 3), batch (A,) the crystal of an atom, num_atoms (B,)
    G.src, G.dst (E,), G.offset (E, 3)    of each graph G; `data.edge_vectors` gives distances and directions
    G.table (A, K)            the edges into each atom, padded with E
    main.swap, main.slot      (E,) an edge's reverse; its place in the flattened main.table
    e2e.mask, a2e.mask, qint.mask, quad.mask, a2a.pair, a2a.pair_src, a2a.table_src    see `data.tables`
    edge_scale                1 / (1 - p) under edge dropout p, or absent: a factor of sums over edges that
                              keeps their expected values (`sum_edges` applies it)

Shapes: B crystals, A atoms, E main edges, Q qint edges, K edges of one atom (padded), R radial and S angular
functions. An edge is s -> t: the image of atom s displaced by n @ cell sends to t. An angle is c -> a <- b, a
dihedral d -> b -> a <- c.

Left out of GemNet-OC: learnable radial bases, scaled basis functions, dropout inside the blocks, forces
coupled by symmetrisation. Triplets and quadruplets are never listed: every sum over them is a batched matrix
product over the edges that share an atom (see `Bases`). cos(theta) of a dihedral comes from two normals.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from architecture import (  # noqa: F401; some for those who import them from here
    BACKBONES, FOR_SMALL, FOR_TINY, GEMNET, PAPER, PRESETS, Preset, build_backbone, check_architecture,
    preset, shapes_only, training_defaults,
)  # fmt: skip
from data import edge_vectors
from files import UserError

# ---------------------------------------------------------------- leaves


def act(x):
    """Scaled SiLU."""
    return F.silu(x).mul_(1 / 0.6)


def he_orthogonal_(weight, fan_in, axis):
    """Orthogonal, then zero mean and unit variance along the input axes, then 1 / sqrt(fan_in)."""
    if weight.is_meta:  # shapes only (`check_architecture`): there is nothing to fill
        return
    with torch.no_grad():
        nn.init.orthogonal_(weight.view(-1, weight.shape[-1]) if weight.dim() == 3 else weight)
        var, mean = torch.var_mean(weight, dim=axis, correction=1, keepdim=True)
        weight.sub_(mean).div_((var + 1e-6).sqrt()).mul_(fan_in**-0.5)


class Dense(nn.Module):
    """Linear without bias, then the activation (unless activation=False)."""

    def __init__(self, n_in, n_out, activation=True):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)
        self.activation = activation
        he_orthogonal_(self.linear.weight, n_in, 1)

    def forward(self, x):
        x = self.linear(x)
        return act(x) if self.activation else x


class Residual(nn.Module):
    """(x + Dense(Dense(x))) / sqrt 2."""

    def __init__(self, n):
        super().__init__()
        self.dense_mlp = nn.Sequential(Dense(n, n), Dense(n, n))

    def forward(self, x):
        return (x + self.dense_mlp(x)).mul_(0.5**0.5)


def residual_layers(number, n):
    return nn.Sequential(*(Residual(n) for _ in range(number)))


class ScaleFactor(nn.Module):
    """Multiplies by a constant that keeps variances near one; 0: not applied. `fit_scale_factors` sets it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale_factor", torch.zeros(()))
        self.fitting = False
        self.unset = None  # the buffer's value is read once, not at every step: a read would wait for the GPU

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.unset = None

    def forward(self, x, reference=None):
        if self.fitting:
            variance = lambda x: float((x - x.mean(0)).square().mean())  # noqa: E731
            var, target = variance(x), 1.0 if reference is None else variance(reference)
            noise = 1e-6 * float(x.square().mean())
            known = var > noise and target > noise  # not with no rows, or one, or equal ones
            self.scale_factor.fill_((target / var) ** 0.5 if known else 1.0)
            self.unset = False
        if self.unset is None:
            self.unset = float(self.scale_factor) == 0.0
        return x if self.unset else x * self.scale_factor


class Recompute(torch.autograd.Function):
    """f(*inputs) without keeping f's inner arrays: the backward pass computes them again.

    For cheap products of large arrays; parameters that f uses must be inputs.
    """

    @staticmethod
    def forward(ctx, f, *inputs):
        device = inputs[0].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.autocast = torch.autocast(device, dtype, enabled)
        ctx.f = f
        ctx.save_for_backward(*inputs)
        return f(*inputs)

    @staticmethod
    def backward(ctx, grad):
        again = torch.is_grad_enabled()  # a gradient of this gradient is wanted: inputs keep their history
        fresh = lambda x: x.detach().requires_grad_(x.requires_grad)  # noqa: E731
        with torch.enable_grad(), ctx.autocast:
            own = [x.view_as(x) if again else fresh(x) for x in ctx.saved_tensors]
            y = ctx.f(*own)
        grads = iter(torch.autograd.grad(y, [x for x in own if x.requires_grad], grad, create_graph=again))
        return None, *(next(grads) if x.requires_grad else None for x in own)


def gather(x, table):
    """Rows of x by an index table: (E, C), (A, K) -> (A, K, C). Padding, len(x), reads the last row: what is
    padded meets a zero of the bases' masks."""
    return x.index_select(0, table.reshape(-1).clamp(max=len(x) - 1)).view(*table.shape, *x.shape[1:])


def sum_to(x, index, number):
    """Sum of rows by index, in float32 or better: (E, C) -> (number, C)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.new_zeros(number, *x.shape[1:]).index_add(0, index, x)


def sum_edges(x, batch):
    """Sum over the main edges into every atom: (E, C) -> (A, C). Edge dropout keeps its expected value."""
    return sum_to(x, batch["main.dst"], len(batch["Z"])) * batch.get("edge_scale", 1.0)


# ---------------------------------------------------------------- bases


class Gaussians(nn.Module):
    """Radial basis: envelope(x) * exp(-t (x - offset_k)^2) with x = d / cutoff. d: (E,) -> (E, R)."""

    def __init__(self, num_radial, cutoff):
        super().__init__()
        self.cutoff = cutoff
        self.rbf = nn.Module()  # published buffer names: radial_basis.rbf.offset
        self.rbf.register_buffer("offset", torch.linspace(0, 1, num_radial))
        self.rbf.register_buffer("temps", torch.full((num_radial,), 0.5 * (num_radial - 1) ** 2))

    def forward(self, d):
        x = d / self.cutoff
        envelope = torch.where(x < 1, 1 + x**5 * (-21 + x * (35 - 15 * x)), 0)
        return envelope[:, None] * torch.exp(-self.rbf.temps * (x[:, None] - self.rbf.offset) ** 2)


def legendre(z, S, dim):
    """Y_l(z) = sqrt((2l + 1) / 4 pi) P_l(z) for l = 0..S-1, stacked along a new axis `dim`.

    From (l + 1) P_{l+1} = (2l + 1) z P_l - l P_{l-1}, with the factors of the Y_l worked in.
    """
    z = z.clamp(-1, 1)
    norm = [math.sqrt((2 * l + 1) / (4 * math.pi)) for l in range(S + 1)]
    Y = [torch.full_like(z, norm[0]), norm[1] * z]
    for l in range(1, S - 1):
        a, b = (2 * l + 1) / (l + 1) * norm[l + 1] / norm[l], l / (l + 1) * norm[l + 1] / norm[l - 1]
        Y.append((z * Y[l]).mul_(a).sub_(Y[l - 1], alpha=b))
    return torch.stack(Y[:S], dim=dim)


def cos_dihedral(u, w):
    """cos(theta) = u.w / max(|u||w|, eps) of normals u (Q, Kc, 3) and w (Q, Kd, 3) -> (Q, Kc, Kd).

    A normal vanishes where an angle is straight; its direction is then rounding noise, and the gradient 0. In
    float64 the value is the published one, whose clamp is 1e-9; in float32 noise is larger, the value 0.
    """
    exact = u.dtype == torch.float64
    eps = 1e-9 if exact else 1e-5
    length = lambda x: (x.square().sum(-1) + 1e-30).sqrt()  # noqa: E731; 1e-30: a finite gradient at 0
    dot, product = u @ w.transpose(1, 2), length(u)[:, :, None] * length(w)[:, None, :]
    return torch.where(product > eps, dot / product.clamp(min=eps), dot.detach() / eps if exact else 0)


class AngularWeights(nn.Module):
    """Per-edge weights of the angular functions: radial (E, R) -> (E, C, S)."""

    def __init__(self, R, S, C):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(R, S, C))
        he_orthogonal_(self.weight, R * S, (0, 1))

    def forward(self, rbf):
        R, S, C = self.weight.shape
        # Published: flat (S, C) is *reshaped*, not transposed, to (C, S). Trained weights depend on it.
        return (rbf @ self.weight.reshape(R, S * C)).view(-1, C, S)


class EdgeEmbedding(nn.Module):
    """act(W [h_s, h_t, f]): (A, n_atom), (E, n_edge) -> (E, n_out)."""

    def __init__(self, n_atom, n_edge, n_out):
        super().__init__()
        self.dense = Dense(2 * n_atom + n_edge, n_out)

    def forward(self, h, f, src, dst):
        n = h.shape[1]
        W = self.dense.linear.weight  # W_s h_s + W_t h_t + W_f f: the first two once per atom
        by_source, by_target = h @ W[:, :n].T, h @ W[:, n : 2 * n].T
        return act(by_source.index_select(0, src) + by_target.index_select(0, dst) + f @ W[:, 2 * n :].T)


class Bases(nn.Module):
    """Everything that depends on geometry only, shared by all blocks, and its shared down-projections.

    No triplet is listed. The bilinear layer of an output edge i = (c -> a) sums over triplets, j = (b -> a),

        B vec( sum_j [sum_s W_i[:, s] Y_s(cos angle_ij)] x_j^T ) = B vec( W_i M_i )
        M_i = sum_j Y(cos angle_ij) x_j^T

    and W_i (C, S), which depends on the length of i, is the same for all j: so M_i (S, n) comes first. With
    the edges into an atom padded to K, the M_i of an atom are one product of (K S, K) with (K, n) matrices;
    pairs left out are zeros in Y. The quadruplet basis is an outer product, Y_l(cos phi_cab)
    Y_m(cos theta_cabd), so its sum takes two steps: over d, for each qint edge b -> a, and then over b.

    Each basis is a method that returns what its interaction multiplies with in every block: rad, the radial
    weights of the inputs; Y, the angular functions; W, the weights of the outputs.
    """

    def __init__(self, a):
        super().__init__()
        R, S = a["num_radial"], a["num_spherical"]
        rbf, cbf, sbf = a["emb_size_rbf"], a["emb_size_cbf"], a["emb_size_sbf"]
        self.S = S
        self.radial_basis = Gaussians(R, a["rbf_cutoff"])
        if a["quad_interaction"]:
            self.mlp_rbf_qint = Dense(R, rbf, activation=False)
            self.mlp_cbf_qint = AngularWeights(R, S, cbf)
            self.mlp_sbf_qint = AngularWeights(R, S * S, sbf)
        if a["atom_edge_interaction"]:
            self.mlp_rbf_aeint = Dense(R, rbf, activation=False)
            self.mlp_cbf_aeint = AngularWeights(R, S, cbf)
        if a["edge_atom_interaction"]:
            self.mlp_rbf_eaint = Dense(R, rbf, activation=False)
            self.mlp_cbf_eaint = AngularWeights(R, S, cbf)
        if a["atom_interaction"]:
            self.mlp_rbf_aint = nn.Linear(R, rbf, bias=False)
            he_orthogonal_(self.mlp_rbf_aint.weight, R, 1)
        if a["trip_interaction"]:
            self.mlp_rbf_tint = Dense(R, rbf, activation=False)
            self.mlp_cbf_tint = AngularWeights(R, S, cbf)
        self.mlp_rbf_h = Dense(R, rbf, activation=False)
        self.mlp_rbf_out = Dense(R, rbf, activation=False)
        self.edge_emb = EdgeEmbedding(a["emb_size_atom"], R, a["emb_size_edge"])
        self.a = a

    def forward(self, batch):
        """Returns a dict: the indices that the blocks use, and an entry for each basis in use."""
        a = self.a
        rbf, V = self.radial(batch, "main")
        V_in = gather(V, batch["main.table"])  # (A, K, 3) unit vectors of the main edges into each atom
        g = {"num_atoms": len(batch["Z"]), "V": V, "edge_scale": batch.get("edge_scale", 1.0)}
        g |= {key: batch[f"main.{key}"] for key in ("src", "dst", "swap", "table", "slot")}
        g |= {"rbf": rbf, "rad_h": self.mlp_rbf_h(rbf), "rad_out": self.mlp_rbf_out(rbf)}
        if a["trip_interaction"]:
            g["e2e"] = self.triplets(batch, rbf, V_in)
        if a["atom_edge_interaction"] or a["edge_atom_interaction"]:
            rbf2, V2 = self.radial(batch, "a2ee2a")
            g |= {"src2": batch["a2ee2a.src"], "table2": batch["a2ee2a.table"]}
            cos_cab = V_in @ gather(V2, g["table2"]).transpose(1, 2)  # (A, K, K2)
            if a["atom_edge_interaction"]:
                g["a2e"] = self.atom_to_edge(batch, rbf, rbf2, cos_cab)
            if a["edge_atom_interaction"]:
                g["e2a"] = self.edge_to_atom(batch, rbf, rbf2, cos_cab.transpose(1, 2))
        if a["atom_interaction"]:
            g["a2a"] = self.atom_to_atom(batch)
        if a["quad_interaction"]:
            g["quad"] = self.quadruplets(batch, rbf, V_in)
            g |= {"table_d": g["table"].index_select(0, batch["qint.src"]), "table_q": batch["qint.table"]}
        return g

    def radial(self, batch, graph):
        """rbf_k = envelope(d / r) exp(-t (d / r - o_k)^2) of a graph's edges, (E, R); directions, (E, 3)."""
        d, V = edge_vectors(batch, graph, self.radial_basis.rbf.offset.dtype)
        return self.radial_basis(d), V

    def angular(self, z, mask):
        """Y_s(z) of cosines z and 0 where the mask has no pair of edges: both (N, K, K2) -> (N, K, S, K2)."""
        return legendre(z, self.S, 2).mul_(mask[:, :, None, :])

    def triplets(self, batch, rbf, V_in):
        """c -> a <- b, both main edges: M_ca = sum_b Y(cos angle_cab) x_ba, without b = c.

        Returns rad (E, n) of b -> a, Y (A, K S, K), W (E, C, S) of c -> a.
        """
        A, K, _ = V_in.shape
        Y = self.angular(V_in @ V_in.transpose(1, 2), batch["e2e.mask"])
        return self.mlp_rbf_tint(rbf), Y.view(A, K * self.S, K), self.mlp_cbf_tint(rbf)

    def atom_to_edge(self, batch, rbf, rbf2, cos_cab):
        """Main edge c -> a, atom b near a: M_ca = sum_b Y(cos angle_cab) x_b, without b = c.

        Returns rad (E2, n) of b -> a, Y (A, K S, K2), W (E, C, S) of c -> a.
        """
        A, K, K2 = cos_cab.shape
        Y = self.angular(cos_cab, batch["a2e.mask"])
        return self.mlp_rbf_aeint(rbf2), Y.view(A, K * self.S, K2), self.mlp_cbf_aeint(rbf)

    def edge_to_atom(self, batch, rbf, rbf2, cos_bac):
        """Atom c near a, main edge b -> a: sum_c W_ca sum_b Y(cos angle_cab) x_ba^T = sum_b G_ab x_ba^T.

        The sum over c is the same in every block. Returns rad (E, n) of b -> a and G (A, C, K).
        """
        A, K2, K = cos_bac.shape
        Y = self.angular(cos_bac, batch["a2e.mask"].transpose(1, 2))  # (A, K2, S, K)
        W = gather(self.mlp_cbf_eaint(rbf2), batch["a2ee2a.table"])  # (A, K2, C, S)
        W = W.transpose(1, 2).reshape(A, W.shape[2], K2 * self.S)
        return self.mlp_rbf_eaint(rbf), torch.bmm(W, Y.reshape(A, K2 * self.S, K))

    def atom_to_atom(self, batch):
        """b -> a: x_a = sum_b rad_ab h_b^T, rad_ab = W sum_images rbf(d_ab), for images of b share its h_b.

        Returns rad (A, n, N) of the N atoms near each, and which atoms they are (A, N).
        """
        rbf, _ = self.radial(batch, "a2a")
        rad = self.mlp_rbf_aint(sum_to(rbf, batch["a2a.pair"], len(batch["a2a.pair_src"])))  # (pairs, n)
        rad = torch.cat([rad, rad.new_zeros(1, rad.shape[1])])  # for the padding: this product has no mask
        return gather(rad, batch["a2a.table"]).transpose(1, 2), batch["a2a.table_src"]

    def quadruplets(self, batch, rbf, V_in):
        """d -> b -> a <- c: main edges d -> b and c -> a, joined by a qint edge b -> a.

            M_ca = sum_b Y_l(cos phi_cab) sum_d Y_m(cos theta_cabd) cbf_abd x_db
            cbf_abd = sum_s W_ba,s Y_s(cos angle_abd)

        Returns rad (E, n) of d -> b; cbf (Q, K, C); Y_theta (Q, K S, K), of c and d at an edge b -> a; Y_phi
        (A, K, S, K_q), of c and b at an atom a; W (E, C, S^2) of c -> a.
        """
        rbf_ba, V_ba = self.radial(batch, "qint")
        V_ba = V_ba[:, None]  # (Q, 1, 3)
        V_ca = V_in.index_select(0, batch["qint.dst"])  # (Q, K, 3)
        V_db = V_in.index_select(0, batch["qint.src"])  # (Q, K, 3)
        Q, K, _ = V_ca.shape
        normal_cab = torch.linalg.cross(V_ca, V_ba.expand_as(V_ca))
        normal_abd = torch.linalg.cross(V_db, V_ba.expand_as(V_db))
        Y_theta = self.angular(cos_dihedral(normal_cab, normal_abd), batch["quad.mask"])  # (Q, Kc, S, Kd)
        cos_cab = gather((V_ca * V_ba).sum(-1), batch["qint.table"]).transpose(1, 2)  # (A, K, K_q)
        Y_phi = self.angular(cos_cab, batch["qint.mask"])
        Y_abd = legendre((V_db * V_ba).sum(-1), self.S, 2)  # (Q, Kd, S)
        cbf = Y_abd @ self.mlp_cbf_qint(rbf_ba).transpose(1, 2)
        return self.mlp_rbf_qint(rbf), cbf, Y_theta.view(Q, K * self.S, K), Y_phi, self.mlp_sbf_qint(rbf)


# ---------------------------------------------------------------- interactions


class Bilinear(nn.Module):
    """Of every output: (C, S) weights times the (S, n_in) sum over inputs, flattened, linear to n_out."""

    def __init__(self, C, n_in, n_out):
        super().__init__()
        self.bilinear = Dense(C * n_in, n_out, activation=False)

    def forward(self, W, M):
        product = lambda W, M, weight: F.linear(torch.bmm(W, M).flatten(1), weight)  # noqa: E731
        return Recompute.apply(product, W, M, self.bilinear.linear.weight)


class Interaction(nn.Module):
    """The projections before and after the sum over inputs, of layers that a subclass makes."""

    def down(self, z, rad):
        """Activate z, weight by distance, project to the width of the sum: (N, n) -> (N, n_in)."""

        def product(z, rad, W_rbf, W_down):
            x = act(z)
            return F.linear(self.scale_rbf(x * F.linear(rad, W_rbf), x), W_down)

        weights = self.mlp_rbf.linear.weight, self.down_projection.linear.weight
        return act(Recompute.apply(product, z, rad, *weights))

    def up(self, x, swap):
        """Back to edge width, once for c -> a and once for its reverse."""
        return (self.up_projection_ca(x) + self.up_projection_ac(x.index_select(0, swap))).mul_(0.5**0.5)


class TripletLayers(Interaction):
    """The layers of the interactions over c -> a <- b. n: channels of the inputs; n_up: of the outputs."""

    def __init__(self, a, n, n_up):
        super().__init__()
        n_in, n_out = a["emb_size_trip_in"], a["emb_size_trip_out"]
        self.dense_ba = Dense(n, n)
        self.mlp_rbf = Dense(a["emb_size_rbf"], n, activation=False)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Bilinear(a["emb_size_cbf"], n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()
        self.down_projection = Dense(n, n_in)
        self.up_projection_ca = Dense(n_out, n_up)

    def to_edges(self, x, Y, W, g):
        """By M_ca = sum_b Y(cos angle_cab) x_b^T: (A, K2, n_in), (A, K S, K2), (E, C, S) -> (E, n_up)."""
        M = torch.bmm(Y, x).view(-1, W.shape[2], x.shape[2]).index_select(0, g["slot"])  # (E, S, n_in)
        return self.up(self.scale_cbf_sum(self.mlp_cbf(W, M)), g["swap"])


class TripletInteraction(TripletLayers):
    """Edge to edge (e2e): main edges b -> a to main edges c -> a."""

    def __init__(self, a):
        super().__init__(a, a["emb_size_edge"], a["emb_size_edge"])
        self.up_projection_ac = Dense(a["emb_size_trip_out"], a["emb_size_edge"])

    def forward(self, m, g):
        rad, Y, W = g["e2e"]
        x = self.down(self.dense_ba.linear(m), rad)  # (E, n_in)
        return self.to_edges(gather(x, g["table"]), Y, W, g)


class AtomEdgeInteraction(TripletLayers):
    """Atom to edge (a2e): atoms b near a to main edges c -> a."""

    def __init__(self, a):
        super().__init__(a, a["emb_size_atom"], a["emb_size_edge"])
        self.up_projection_ac = Dense(a["emb_size_trip_out"], a["emb_size_edge"])

    def forward(self, h, g):
        rad, Y, W = g["a2e"]
        x = self.down(self.dense_ba.linear(h).index_select(0, g["src2"]), rad)  # (E2, n_in)
        return self.to_edges(gather(x, g["table2"]), Y, W, g)


class EdgeAtomInteraction(TripletLayers):
    """Edge to atom (e2a): main edges b -> a to the atom a, weighted by its neighbours c -> a."""

    def __init__(self, a):
        super().__init__(a, a["emb_size_edge"], a["emb_size_atom"])

    def forward(self, m, g):
        rad, G = g["e2a"]
        x = self.down(self.dense_ba.linear(m), rad)  # (E, n_in)
        x = self.mlp_cbf(G, gather(x, g["table"]))  # (A, C, K) @ (A, K, n_in)
        return self.up_projection_ca(self.scale_cbf_sum(x))


class AtomInteraction(nn.Module):
    """Atom to atom (a2a): every atom of the crystal, its images already summed in the radial values."""

    def __init__(self, a):
        super().__init__()
        atom, n_in, n_out = a["emb_size_atom"], a["emb_size_aint_in"], a["emb_size_aint_out"]
        self.bilinear = Dense(a["emb_size_rbf"] * n_in, n_out, activation=False)
        self.scale_rbf_sum = ScaleFactor()
        self.down_projection = Dense(atom, n_in)
        self.up_projection = Dense(n_out, atom)

    def forward(self, h, g):
        rad, table = g["a2a"]
        x = torch.bmm(rad, gather(self.down_projection(h), table))  # (A, C, N) @ (A, N, n_in)
        return self.up_projection(self.scale_rbf_sum(self.bilinear(x.flatten(1))))


class QuadrupletInteraction(Interaction):
    """Quadruplets d -> b -> a <- c: main edges d -> b to main edges c -> a through qint edges b -> a."""

    def __init__(self, a):
        super().__init__()
        edge, n_in, n_out = a["emb_size_edge"], a["emb_size_quad_in"], a["emb_size_quad_out"]
        self.dense_db = Dense(edge, edge)
        self.mlp_rbf = Dense(a["emb_size_rbf"], edge, activation=False)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Dense(a["emb_size_cbf"], n_in, activation=False)
        self.scale_cbf = ScaleFactor()
        self.mlp_sbf = Bilinear(a["emb_size_sbf"], n_in, n_out)
        self.scale_sbf_sum = ScaleFactor()
        self.down_projection = Dense(edge, n_in)
        self.up_projection_ca = Dense(n_out, edge)
        self.up_projection_ac = Dense(n_out, edge)

    def forward(self, m, g):
        rad, cbf, Y_theta, Y_phi, W = g["quad"]
        A, K, S, KQ = Y_phi.shape
        x = self.down(self.dense_db.linear(m), rad)  # (E, n)

        def weighted(x, cbf, W_cbf):
            x = gather(x, g["table_d"])  # (Q, Kd, n) edges d -> b
            reference = x.flatten(0, 1) if self.scale_cbf.fitting else None
            return self.scale_cbf(x * F.linear(cbf, W_cbf), reference)

        x = Recompute.apply(weighted, x, cbf, self.mlp_cbf.linear.weight)
        M = torch.bmm(Y_theta, x).view(len(x), K, S * x.shape[2])  # (Q, Kc, S n) sum over d
        M = gather(M, g["table_q"]).transpose(1, 2)  # (A, Kc, KQ, S n)
        M = Y_phi @ M  # (A, Kc, S, S n) sum over b
        M = M.reshape(A * K, S * S, x.shape[2]).index_select(0, g["slot"])  # (E, S^2, n)
        return self.up(self.scale_sbf_sum(self.mlp_sbf(W, M)), g["swap"])


class AtomUpdate(nn.Module):
    """Sum over the main edges into an atom of m * W rad, then residual layers: (E, n_edge) -> (A, n_atom)."""

    def __init__(self, a):
        super().__init__()
        atom, edge = a["emb_size_atom"], a["emb_size_edge"]
        self.dense_rbf = Dense(a["emb_size_rbf"], edge, activation=False)
        self.scale_sum = ScaleFactor()
        first = [Dense(edge, atom)] if edge != atom else []
        self.layers = nn.Sequential(*first, *residual_layers(a["num_atom"], atom))

    def forward(self, m, g, rad, scale=1.0):
        messages = lambda m, rad, W: sum_to(m * F.linear(rad, W), g["dst"], g["num_atoms"])  # noqa: E731
        x = Recompute.apply(messages, m, rad, self.dense_rbf.linear.weight) * scale
        return self.layers(self.scale_sum(x, m if self.scale_sum.fitting else None))


class InteractionBlock(nn.Module):
    """One block: all interactions read the same (h, m); returns the new (h, m)."""

    def __init__(self, a):
        super().__init__()
        atom, edge = a["emb_size_atom"], a["emb_size_edge"]
        self.dense_ca = Dense(edge, edge)
        self.trip_interaction = TripletInteraction(a) if a["trip_interaction"] else None
        self.quad_interaction = QuadrupletInteraction(a) if a["quad_interaction"] else None
        self.atom_edge_interaction = AtomEdgeInteraction(a) if a["atom_edge_interaction"] else None
        self.edge_atom_interaction = EdgeAtomInteraction(a) if a["edge_atom_interaction"] else None
        self.atom_interaction = AtomInteraction(a) if a["atom_interaction"] else None
        self.layers_before_skip = residual_layers(a["num_before_skip"], edge)
        self.layers_after_skip = residual_layers(a["num_after_skip"], edge)
        self.atom_emb_layers = residual_layers(a["num_atom_emb_layers"], atom)
        self.atom_update = AtomUpdate(a)
        self.concat_layer = EdgeEmbedding(atom, edge, edge)
        self.residual_m = residual_layers(a["num_concat"], edge)

    def forward(self, h, m, g):
        def total(x, *interactions):
            """x and what the interactions give, divided by the square root of their number."""
            parts = [x, *(f(y, g) for f, y in interactions if f)]
            return sum(parts[1:], parts[0]) * len(parts) ** -0.5

        on_edges = (self.trip_interaction, m), (self.quad_interaction, m), (self.atom_edge_interaction, h)
        on_atoms = (self.edge_atom_interaction, m), (self.atom_interaction, h)
        x = self.layers_before_skip(total(self.dense_ca(m), *on_edges))
        h = self.atom_emb_layers(total(h, *on_atoms))
        m = self.layers_after_skip((m + x).mul_(0.5**0.5))
        h = (h + self.atom_update(m, g, g["rad_h"])) * 0.5**0.5
        m2 = self.residual_m(self.concat_layer(h, m, g["src"], g["dst"]))
        return h, (m + m2).mul_(0.5**0.5)


class OutputBlock(AtomUpdate):
    """Contribution of one block to the atoms (x_E) and, with forces, to the edges (x_F)."""

    def __init__(self, a):
        super().__init__(a)
        self.seq_energy2 = residual_layers(a["num_output_afteratom"], a["emb_size_atom"])
        if a["forces"]:
            self.scale_rbf_F = ScaleFactor()
            self.seq_forces = residual_layers(a["num_atom"], a["emb_size_edge"])
            self.dense_rbf_F = Dense(a["emb_size_rbf"], a["emb_size_edge"], activation=False)

    def forward(self, h, m, g, with_edges=False):
        x_E = self.seq_energy2((super().forward(m, g, g["rad_out"], g["edge_scale"]) + h) * 0.5**0.5)
        if not with_edges:
            return x_E, None
        x = self.seq_forces(m)
        return x_E, self.scale_rbf_F(x * self.dense_rbf_F(g["rad_out"]), x)


# ---------------------------------------------------------------- backbones


class Backbone(nn.Module):
    """What every backbone has, and the defaults of what it may have; see the contract above."""

    graphs = ("main",)
    interactions = ()
    can_checkpoint = checkpointing = False
    edge_width = None
    force_arguments = {}
    ranges = {}

    def __init__(self, arch):
        super().__init__()
        self.arch = arch

    def forward(self, batch, adapters=None):
        return self.readout(self.atom_features(batch), adapters)

    def embed(self, batch, adapters=None):
        return pool(self(batch, adapters), batch, "mean")

    def shared_gradient_divisors(self):
        return {}


class GemNetOC(Backbone):
    """GemNet-OC. The parameters' names are those of the published checkpoints without `backbone.`."""

    interactions = ("int_blocks.",)
    can_checkpoint = True
    force_arguments = {"forces": True}
    ranges = {"num_elements": (118, 1000), "num_spherical": (1, 20)} | dict.fromkeys(
        ("num_before_skip", "num_after_skip", "num_concat", "num_atom", "num_output_afteratom",
         "num_atom_emb_layers", "num_global_out_layers"), (0, 20))  # fmt: skip

    def __init__(self, arch):
        super().__init__(arch)
        a, blocks = arch, arch["num_blocks"]
        self.width = self.adapter_width = a["emb_size_atom"]
        self.num_features = blocks + 1
        self.edge_width = a["emb_size_edge"] if a["forces"] else None
        near = a["atom_edge_interaction"] or a["edge_atom_interaction"]
        reads = {"main": True, "a2ee2a": near, "qint": a["quad_interaction"], "a2a": a["atom_interaction"]}
        self.graphs = tuple(graph for graph, used in reads.items() if used)
        self.embedding = nn.Embedding(a["num_elements"], a["emb_size_atom"])
        self.bases = Bases(a)
        self.int_blocks = nn.ModuleList(InteractionBlock(a) for _ in range(blocks))
        self.out_blocks = nn.ModuleList(OutputBlock(a) for _ in range(blocks + 1))
        self.out_mlp_E = self.out_mlp(self.width)
        if a["forces"]:
            self.out_mlp_F = self.out_mlp(self.edge_width)

    def out_mlp(self, n):
        """All blocks' outputs side by side -> n channels."""
        named = nn.Module()  # published name: out_mlp_E.out_mlp.0.linear.weight
        layers = residual_layers(self.arch["num_global_out_layers"], n)
        named.out_mlp = nn.Sequential(Dense(self.num_features * n, n), *layers)
        return named

    def states(self, batch, with_edges=False):
        """Yields (h, m, x_E, x_F, bases) before the first and after every interaction block."""
        device = batch["Z"].device.type
        with torch.autocast(device, enabled=False):  # angles need all digits
            g = self.bases(batch)
        if torch.is_autocast_enabled(device):  # lower the bases here once, not in every block
            dtype = torch.get_autocast_dtype(device)
            lower = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
            g |= {key: tuple(map(lower, basis)) for key, basis in g.items() if isinstance(basis, tuple)}
        h = self.embedding(batch["Z"] - 1)
        m = self.bases.edge_emb(h, g["rbf"], g["src"], g["dst"])
        yield h, m, *self.out_blocks[0](h, m, g, with_edges), g
        for block, out_block in zip(self.int_blocks, self.out_blocks[1:]):

            def step(h, m, block=block, out_block=out_block):  # bound now: checkpointing calls it again
                h, m = block(h, m, g)
                return h, m, *out_block(h, m, g, with_edges)

            h, m, x_E, x_F = checkpoint(step, h, m, use_reentrant=False) if self.checkpointing else step(h, m)
            yield h, m, x_E, x_F, g

    def atom_features(self, batch):
        return torch.stack([x_E for _, _, x_E, _, _ in self.states(batch)], dim=1)

    def readout(self, features, adapters=None):
        if adapters is not None:
            features = adapters(features)
        return self.out_mlp_E.out_mlp(features.flatten(1))

    def edge_features(self, batch):
        """Final atom and edge features for energy and force heads: x_E (A, C), x_F (E, C_edge), V (E, 3)."""
        *_, x_E, x_F, g = zip(*self.states(batch, with_edges=True))
        x_E = self.readout(torch.stack(x_E, dim=1))
        return x_E, self.out_mlp_F.out_mlp(torch.cat(x_F, dim=1)), g[0]["V"]

    def shared_gradient_divisors(self):
        """JMP divides these gradients by the number of blocks before clipping."""
        blocks = self.arch["num_blocks"]
        names = [n for n, _ in self.bases.named_parameters() if not n.startswith("edge_emb")]
        return {f"bases.{n}": blocks + n.startswith("mlp_rbf_out") for n in names}


@torch.no_grad()
def fit_scale_factors(backbone, batch):
    """Set every ScaleFactor of a fresh backbone from one batch, in the order the layers run.

    Each becomes sqrt(var(reference) / var(x)), or 1 / sqrt(var(x)) without a reference; variances are kept.
    """
    factors = [module for module in backbone.modules() if isinstance(module, ScaleFactor)]
    for factor in factors:
        factor.fitting = True
    training = backbone.training
    everything = backbone if backbone.edge_width is None else backbone.edge_features
    backbone.eval()
    everything(batch)
    backbone.train(training)
    for factor in factors:
        factor.fitting = False


# ---------------------------------------------------------------- adapters, heads and pooling


class Adapters(nn.Module):
    """A bottleneck for each per-block output, x + up(dropout(relu(down(norm(x))))): (A, L, C) -> same."""

    def __init__(self, C, L, dropout=0.1):
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.down = nn.ModuleList(nn.Linear(C, C // 2) for _ in range(L))
        self.up = nn.ModuleList(nn.Linear(C // 2, C) for _ in range(L))
        self.dropout = nn.Dropout(dropout)
        for linear in [*self.down, *self.up]:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, features):
        out = []
        for x, norm, down, up in zip(features.unbind(1), self.norm, self.down, self.up, strict=True):
            out.append(x + up(self.dropout(F.relu(down(norm(x))))))
        return torch.stack(out, dim=1)


def new_adapters(backbone, seed=0):
    """Initial adapters of a backbone, or of an architecture; the same values for every module of a hub."""
    if isinstance(backbone, dict):
        backbone = shapes_only(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapters(backbone.adapter_width, backbone.num_features)


def mlp(n, n_out=1):
    """JMP's head: five linear layers, activation between them, the last without bias."""
    layers = []
    for _ in range(4):
        layers += [nn.Linear(n, n), ScaledSiLU()]
    return nn.Sequential(*layers, nn.Linear(n, n_out, bias=False))


class ScaledSiLU(nn.Module):
    def forward(self, x):
        return act(x)


def pool(x, batch, how):
    """Over the atoms of each crystal: (A, C) -> (B, C). how: mean, sum or max."""
    index, number = batch["batch"], batch["num_atoms"]
    column = -1, *[1] * (x.dim() - 1)  # (A,) -> (A, 1), to go with (A, C)
    if how == "max":
        lowest = x.new_full((len(number), *x.shape[1:]), -math.inf)
        return lowest.scatter_reduce(0, index.view(column).expand_as(x), x, "amax")
    total = sum_to(x, index, len(number))
    if how == "sum":
        return total
    if how == "mean":
        return total / number.to(total.dtype).view(column)
    raise UserError(f"pooling {how!r}: use mean, sum or max")


class PropertyModel(nn.Module):
    """Backbone (with or without adapters) and a property head. model(batch) -> (B,) normalised predictions.

    With stored atom features in the batch ("features", (A, L, C)) the backbone's blocks are not run: adapters
    train on features that were encoded once.
    """

    def __init__(self, backbone, pooling, adapters=None):
        super().__init__()
        self.backbone, self.pooling, self.adapters = backbone, pooling, adapters
        self.head = mlp(backbone.width)
        self.hints = None  # while it is fine-tuned: finetune.Hints

    def forward(self, batch, embed=False):
        """embed: also (B, C), the representation of every crystal: the mean over atoms of what the head reads."""
        features = batch["features"] if "features" in batch else self.backbone.atom_features(batch)
        h = self.backbone.readout(features, self.adapters)  # (A, C)
        y = pool(self.head(h).squeeze(-1), batch, self.pooling)
        return (y, pool(h, batch, "mean")) if embed else y


class PretrainModel(nn.Module):
    """JMP's pre-training model: an energy head and, where a set has forces, a force head for each data set.

    model(batch, task) -> energy (B,), the sum over atoms; forces (A, 3) or None; a teacher's features of the atoms
    (A, C) or None; all normalised. Direct forces: the force on atom t is the sum over main edges into t of
    scalar_e * V_e. tasks: {name: has forces}. taught: {name: C} of those with a teacher's features; these and the
    energy are linear in an atom's representation, so the mean over the atoms, which kNN compares, holds both.
    """

    def __init__(self, backbone, tasks, taught=()):
        super().__init__()
        self.backbone = backbone
        n, taught = backbone.width, dict(taught)
        self.out_energy = nn.ModuleDict({name: nn.Linear(n, 1) if name in taught else mlp(n) for name in tasks})
        with_forces = [name for name, has_forces in tasks.items() if has_forces]
        self.out_forces = nn.ModuleDict({name: mlp(backbone.edge_width) for name in with_forces})
        self.out_teacher = nn.ModuleDict({name: nn.Linear(n, C) for name, C in taught.items()})

    def forward(self, batch, task):
        forces = None
        if task in self.out_forces:
            x, x_F, V = self.backbone.edge_features(batch)
            forces = sum_to(self.out_forces[task](x_F) * V, batch["main.dst"], len(x))
        else:
            x = self.backbone(batch)
        energy = pool(self.out_energy[task](x), batch, "sum").squeeze(-1)
        return energy, forces, self.out_teacher[task](x) if task in self.out_teacher else None


# ---------------------------------------------------------------- backbones by name; each file adds its own

BACKBONES["gemnet_oc"] = GemNetOC

import cgcnn  # noqa: E402, F401
