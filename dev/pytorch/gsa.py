"""Gaussian Splat Attention as a PyTorch module. This one file is all there is to copy; it needs nothing but torch.

    from gsa import GaussianSplatAttention
    attention = GaussianSplatAttention(384, 6, attention="hybrid")       # half of the heads standard, half splats
    out, weights, cache = attention(hidden_states)                       # (B, T, 384); None; None

Equations are those of dev/MODEL.md in the repository; tensors have the names of gsa/model.h, with one row for each GSA
head of this layer. The mathematics in short: with x^ = x / |x| for queries and keys,

    phi_s(x) = exp(-1/2 (x - mu_s)^T Lambda_s (x - mu_s))                   splat s at x                         (2)
    A_s(i,j) = alpha_s e_s(i - j) phi_s(q^_i) phi_s(k^_j)                   a pair through splat s               (3)
    softmax mixer  o_i = sum_j softmax_j(sum_s A_s(i,j)) v_j                e = cos(theta n), or 1               (4)
    linear mixer   o_i = sum_j w_ij v_j / sum_j w_ij,  w = sum_s A_s        e = exp(-delta |n|) (1 + cos(theta n)) / 2,
                                                                            or exp(-delta |n|), or 1             (5)

With phase="learned" a cosine is that of theta n - psi (7b), so that a splat may favour a distance.
Both are features of queries and keys in front of a mixer: scaled_dot_product_attention, or a scan over chunks of 64
tokens that carries a state of constant size.

To train: parameter_groups(model, lr) for the optimiser, clip_gradients(model, 1.0) before each step and
apply_bounds(model) after it. Without bounds splats can become so narrow that they no longer learn. Features and scans
are computed in fp32 at least, also under autocast; attention over features takes autocast's type."""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 64  # tokens of one step of the scan
SPHERE_EPSILON = 1e-6  # equation (1)
ROW_SUM_EPSILON = 1e-6  # added to a row sum, for queries whose keys no splat responds to
ROW_SUM_ROUNDING = 1e-6  # and this share of its constant part, where cosines cancel it
PRECISION_START, PRECISION_MIN, PRECISION_MAX = 4.0, 0.4, 40.0  # bounds: see apply_bounds
CENTRE_MAX, SLOPE_MAX, AMPLITUDE_RANGE, DECAY_MAX = 2.0, 40.0, math.log(10), 0.14
SOFT_AMPLITUDE = 0.1  # the start of softmax splats in a layer that has nothing else, times amplitude_start
GAIN_MIN, GAIN_MAX = 0.25, 10.0
FORGET_SHORTEST, FORGET_LONGEST = 16.0, 1024.0  # tokens in which gates' weights fall by e at the start
BOUNDS = ("precision", "centre", "amplitude", "frequency", "decay", "gain", "phase")
SCALARS = ("log_precision", "log_alpha", "log_theta", "log_delta", "psi", "log_far", "log_gain",
           "log_rope")  # with a rate of their own
CHOICES = {"attention": ("standard", "gsa", "hybrid", "augment", "extend"), "mixer": ("softmax", "linear"),
           "position": ("learned", "rope", "both"), "envelope": ("none", "cosine", "decay", "raised"),
           "covariance": ("iso", "diag", "full"), "gain": ("none", "head"), "phase": ("none", "learned"),
           "rope": ("fixed", "learned"), "forget": ("none", "half", "all")}


# ---- what is remembered of a text


class GSACache:
    """One dictionary for each layer: keys (as features) and values of softmax heads, no more of them than their window
    reaches; the state of linear heads, whose size does not grow. The methods are those that transformers asks of a
    cache."""

    is_compileable = False

    def __init__(self):
        self.layers = []

    def layer(self, index):
        while len(self.layers) <= index:
            self.layers.append({"seen": 0})
        return self.layers[index]

    def get_seq_length(self, layer_idx=0):
        """tokens seen"""
        return self.layers[layer_idx]["seen"] if layer_idx < len(self.layers) else 0

    def _each(self, change):
        for memory in self.layers:
            memory.update({name: change(x) for name, x in memory.items() if torch.is_tensor(x)})

    def reorder_cache(self, beam_idx):
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices):
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats):
        self._each(lambda x: x.repeat_interleave(repeats, 0))


# ---- features: equations (1), (2), (9), (10)


def unit_vectors(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + SPHERE_EPSILON)


def turn_angles(theta, positions):
    """theta n modulo a turn, (..., T, S), from theta (..., S) in radians a token, double, and whole positions (T). The
    phase is a whole number of 2^-32 turns, which wraps exactly: position 1,000,000 is as exact as position 1. The
    gradient is that of theta n."""
    steps = torch.round(theta.detach() * (2**32 / (2 * math.pi))).long()
    phase = (steps.unsqueeze(-2) * positions.unsqueeze(-1)) & 0xFFFFFFFF
    angle = (phase - ((phase >> 31) << 32)).double() * (math.pi / 2**31)
    return angle + (theta - theta.detach()).unsqueeze(-2) * positions.double().unsqueeze(-1)


def rotate(x, angles):
    """the pairs (k, k + d/2) of x (..., T, d) by angles (..., T, d/2)"""
    a, b = x.chunk(2, -1)
    c, s = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * c - b * s, a * s + b * c], -1)


def cholesky_factor(packed, d):
    """L (..., d, d) from its rows (..., d (d + 1) / 2), the diagonal as logarithms"""
    row, column = torch.tril_indices(d, d, device=packed.device)
    entries = torch.where(row == column, packed.exp(), packed)
    flat = entries.new_zeros(*entries.shape[:-1], d * d).index_copy(-1, row * d + column, entries)
    return flat.unflatten(-1, (d, d))


def log_responses(x, mu, log_precision):
    """ln phi_s(x), (B, G, T, S), of x (B, G, T, d) for mu (G, S, d) and log_precision (G, S, 1 | d | d (d + 1) / 2)"""
    d = mu.shape[-1]
    if log_precision.shape[-1] > d:
        L = cholesky_factor(log_precision, d)
        across = torch.einsum("bgtsd,gsde->bgtse", x.unsqueeze(3) - mu.unsqueeze(1), L)
        return -0.5 * across.square().sum(-1)
    precision = log_precision.exp()
    slope = mu * precision
    spread = x.square() @ precision.expand_as(mu).transpose(-1, -2)
    return x @ slope.transpose(-1, -2) - 0.5 * (spread + (mu * slope).sum(-1).unsqueeze(-2))


@torch.no_grad()
def key_scale(mu, log_precision, alive):
    """c (G): the largest typical ln phi of a head's living splats. exp(-c) keeps key features of the linear mixer clear
    of underflow and cancels in the division."""
    d = mu.shape[-1]
    if log_precision.shape[-1] > d:
        L = cholesky_factor(log_precision, d)
        trace, centre = L.square().sum((-1, -2)), (mu.unsqueeze(-2) @ L).square().sum((-1, -2))
    else:
        precision = log_precision.exp().expand_as(mu)
        trace, centre = precision.sum(-1), (precision * mu.square()).sum(-1)
    return torch.where(alive > 0, -0.5 * (trace / d + centre), -math.inf).amax(-1)


# ---- the softmax mixer, equation (4)


def visible(queries, keys, window, causal, device):
    """(queries, keys): whether a query, they are the last of the keys, sees a key"""
    apart = torch.arange(keys - queries, keys, device=device).unsqueeze(-1) - torch.arange(keys, device=device)
    return (apart >= 0) & (apart < window) if causal else apart.abs() < window


def mix(q, k, v, mask, sums, whole):
    """softmax(q k^T) v under a mask; sums: None, or what gates add to logits, c_i - c_j, as (c_i, c_j); whole: also the
    logarithm of the weights' sum and the weights themselves"""
    if sums is not None:  # of large sums only differences matter: they are taken in double
        bias = (sums[0].unsqueeze(-1) - sums[1].unsqueeze(-2)).masked_fill(~mask, -math.inf)
    if not whole:
        mask = mask if sums is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0), None, None
    wide = torch.promote_types(q.dtype, torch.float32)
    z = (q @ k.transpose(-1, -2)).to(wide)
    z = z.masked_fill(~mask, -math.inf) if sums is None else z + bias.to(wide)
    lse = z.logsumexp(-1)
    weights = (z - lse.unsqueeze(-1)).exp()
    return weights.to(v.dtype) @ v, lse, weights


def softmax_mixer(q, k, v, window, causal, padding, sums=None, need_lse=False, need_weights=False):
    """q (B, H, Tq, f) of the last of Tk tokens, k (B, H, Tk, f), v (B, H, Tk, d); window: None, or how far a query
    sees; padding: None, or (B, Tk), False where there is no token; sums: None, or of gated heads (B, H, Tk), double.
    Returns output, lse and weights (None unless needed). A window costs O(Tk window): blocks of queries meet the blocks
    of keys next to theirs."""
    Tq, Tk, device = q.shape[2], k.shape[2], q.device
    plain = window is None and padding is None and sums is None and not need_lse and not need_weights
    if plain and (Tq in (1, Tk) or not causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and Tq > 1, scale=1.0), None, None
    if window is None or need_weights or Tq == 1 or Tk <= 2 * window:
        mask = visible(Tq, Tk, window or Tk, causal, device)
        if padding is not None:  # every query sees itself, so that no row is empty
            mask = mask & padding[:, None, None, :] | visible(Tq, Tk, 1, causal, device)
        return mix(q, k, v, mask, None if sums is None else (sums[:, :, Tk - Tq:], sums), need_lse or need_weights)
    around, end = (2 if causal else 3), -Tk % window
    behind = end + (around - 2) * window

    def key_blocks(x):  # (..., Tk) -> (..., blocks, around * window)
        return F.pad(x, (window, behind)).unfold(-1, around * window, window)

    def query_blocks(x):  # (..., Tk) -> (..., blocks, window)
        return F.pad(x, (0, end)).unflatten(-1, (-1, window))

    def cut(x):
        return x.flatten(2, 3)[:, :, Tk - Tq:Tk]

    k, v = (key_blocks(x.transpose(-1, -2)).permute(0, 1, 3, 4, 2) for x in (k, v))
    q = F.pad(q, (0, 0, Tk - Tq, end)).unflatten(2, (-1, window))
    apart = torch.arange(window, 2 * window, device=device).unsqueeze(-1) - torch.arange(around * window, device=device)
    near = (apart >= 0) & (apart < window) if causal else apart.abs() < window
    real = key_blocks(torch.ones(1, Tk, dtype=torch.bool, device=device) if padding is None else padding)
    mask = near & real[:, None, :, None, :] | (apart == 0)
    out, lse, _ = mix(q, k, v, mask, None if sums is None else (query_blocks(sums), key_blocks(sums)), need_lse)
    return cut(out), cut(lse) if need_lse else None, None


# ---- the linear mixer, equation (5), as a recurrence over chunks


def shift_state(state, theta, delta, n, S):
    """the sums (B, G, F, d + 1), their origin n tokens on: they fade, and their cosine and sine parts turn"""
    if delta is not None:
        fade = torch.exp(-delta * n).to(state.dtype).unsqueeze(-1)
        state = state * (fade if theta is None else torch.cat([fade] * 3, -2))
    if theta is None:
        return state
    angle = turn_angles(theta, torch.tensor([n], device=state.device)).transpose(-1, -2)
    c, s = angle.cos().to(state.dtype), angle.sin().to(state.dtype)
    one, x, y = state.split(S, -2)
    return torch.cat([one, x * c + y * s, y * c - x * s], -2)


def linear_scan(r, phi, v, theta, delta, psi, late=0, state=None, reverse=False):
    """Sums over the keys up to each query: N (B, G, T, d) = sum_j w_ij v_j, D (B, G, T) = sum_j w_ij (1 + what rounding
    may take), and the state after the last token. r, phi (B, G, T, S): equation (11) of queries, responses of keys;
    theta, delta, psi (G, S) or None, double; late: keys are that many tokens older than the queries beside them;
    reverse: from the end, a query's own key left out."""
    B, G, T, S = phi.shape
    n = min(CHUNK, T)
    chunks, d, device, dtype = -(-T // n), v.shape[-1], phi.device, phi.dtype
    v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)  # the last column sums the weights
    if reverse:
        r, phi, v = r.flip(2), phi.flip(2), v.flip(2)
    r, phi, v = (F.pad(x, (0, 0, 0, chunks * n - T)).unflatten(2, (chunks, n)) for x in (r, phi, v))
    at = torch.arange(n, device=device)
    fq, fk = [r], [phi]
    if theta is not None:
        key_angle = turn_angles(theta, at)
        if psi is not None:  # from the end i - j has the other sign
            key_angle = key_angle + (-psi if reverse else psi).unsqueeze(-2)
        query_angle = turn_angles(theta, at + late)
        half = math.sqrt(0.5)
        fq = [half * r] + [half * r * f(query_angle).to(dtype).unsqueeze(1) for f in (torch.cos, torch.sin)]
        fk = [half * phi] + [half * phi * f(key_angle).to(dtype).unsqueeze(1) for f in (torch.cos, torch.sin)]
    if delta is not None:  # exponentials count from the chunk, so that none grows beyond exp(64 delta)
        exponent = delta.unsqueeze(-2) * at.unsqueeze(-1).double()
        fade, grow = (-exponent - late * delta.unsqueeze(-2)).exp().to(dtype), exponent.exp().to(dtype)
        fq, fk = [x * fade.unsqueeze(1) for x in fq], [x * grow.unsqueeze(1) for x in fk]
    fq, fk = torch.cat(fq, -1), torch.cat(fk, -1)
    sums, states = fk.transpose(-1, -2) @ v, []
    if state is None:
        state = sums.new_zeros(B, G, fk.shape[-1], d + 1)
    for chunk in range(chunks):
        states.append(state)
        state = shift_state(state + sums[:, :, chunk], theta, delta, min(n, T - chunk * n), S)
    states = torch.stack(states, 2)
    inside = (fq @ fk.transpose(-1, -2)).tril(-1 if reverse else 0)
    N = inside @ v + fq @ states
    seen = fk[..., :S].cumsum(-2) - (fk[..., :S] if reverse else 0) + states[..., :S, -1].unsqueeze(-2)
    D = N[..., -1] + ROW_SUM_ROUNDING * (fq[..., :S] * seen).sum(-1)
    N, D = N[..., :-1].flatten(2, 3)[:, :, :T], D.flatten(2, 3)[:, :, :T]
    return (N.flip(2), D.flip(2), state) if reverse else (N, D, state)


# ---- the module


@functools.lru_cache
def amplitude_start(S, d, precision=PRECISION_START):
    """ln alpha with which logits of random unit vectors have deviation 1 (MODEL.md, section 6)"""

    def sphere_mean(k):  # E exp(k u.x) over random unit vectors x
        term = total = 1.0
        for n in range(1, 1000):
            term *= k * k / 4 / (n * (d / 2 + n - 1))
            total += term
            if term <= 1e-17 * total:
                break
        return total

    pairs = weights = 0.0
    for i in range(2000):
        u = math.pi * ((i + 0.5) / 2000 - 0.5)
        weight = math.cos(u) ** (d - 2)
        pairs += weight * sphere_mean(precision * math.sqrt(2 + 2 * math.sin(u))) ** 2
        weights += weight
    same, mean = sphere_mean(2 * precision), sphere_mean(precision)
    return 2 * precision - 0.5 * math.log(S * same**2 + S * (S - 1) * pairs / weights - S * S * mean**4)


def pick(x, heads):
    """these heads of x (B, heads, ...), as a view where they are neighbours"""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0]:heads[0] + len(heads)]
    return torch.stack([x[:, h] for h in heads], 1)


class GaussianSplatAttention(nn.Module):
    """Attention of one layer, projections included: (B, T, hidden_size) to the same.

    attention   standard; gsa: all heads have splats; hybrid: some, the last half unless gsa_heads says which; augment:
                extra_heads more that have them; extend: all (or gsa_heads) look at the last `window` tokens by softmax
                and through splats at everything before them
    mixer       softmax or linear; envelope: None is cosine for softmax and raised for linear; splats: None is as many
                as a softmax head takes, 16 for linear
    window      None or 0: no limit; else how many tokens standard heads see
    position    rope, both: standard heads rotate unit queries and keys; learned: they take them as they are
    gain        head: standard heads learn a factor of their logits; or none
    rope        learned: they learn the frequencies of their rotations; or fixed
    phase       learned: splats learn the phase of their cosine; or none
    forget      none, half, all: so many of the standard heads learn gates, by which they let go of older tokens
                (these four, where None: as train_gsa does, head, learned, learned and half where there is such a thing)
    sphere      False leaves equation (1) out; unbounded: names of BOUNDS that apply_bounds leaves alone
    layer_idx   which entry of the cache is this layer's; layers: of the model, for the start of the last projection
    """

    def __init__(self, hidden_size, num_heads, *, attention="hybrid", gsa_heads=None, extra_heads=0, mixer=None,
                 envelope=None, covariance="iso", splats=None, window=None, position="rope", gain=None, rope=None,
                 phase=None, forget=None, causal=True, sphere=True, unbounded=(), layer_idx=0, layers=1):
        super().__init__()
        d, NH = hidden_size // num_heads, num_heads + extra_heads
        given = {"attention": attention, "mixer": mixer or ("linear" if attention == "extend" else "softmax"),
                 "position": position, "covariance": covariance}
        given["envelope"] = envelope or ("raised" if given["mixer"] == "linear" else "cosine")
        if gsa_heads is None:
            last = {"standard": 0, "hybrid": (num_heads + 1) // 2, "augment": extra_heads}.get(attention, num_heads)
            gsa_heads = range(NH - last, NH)
        self.gsa_heads = sorted(set(gsa_heads))
        rotations = position != "learned" and (attention == "extend" or len(self.gsa_heads) < NH)
        gates = rotations and attention != "extend" and causal
        cosine = given["envelope"] in ("cosine", "raised")
        given["gain"] = gain or ("head" if rotations else "none")
        given["rope"] = rope or ("learned" if rotations else "fixed")
        given["phase"] = phase or ("learned" if cosine else "none")
        given["forget"] = forget or ("half" if gates else "none")
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} is one of {', '.join(CHOICES[name])}, not {value!r}")
            setattr(self, name, value)
        if hidden_size % num_heads or d % 2:
            raise ValueError(f"hidden_size {hidden_size} is not an even multiple of {num_heads} heads")
        standard = [h for h in range(NH) if h not in self.gsa_heads]
        gates = {"none": 0, "half": (len(standard) + 1) // 2, "all": len(standard)}[self.forget]
        self.gated_heads, self.standard_heads = standard[:gates], standard[gates:]
        self.rope_heads = list(range(NH)) if attention == "extend" else standard  # rows of log_gain and log_rope
        self.hidden_size, self.num_heads, self.head_size, self.causal = hidden_size, NH, d, causal
        self.window, self.sphere, self.unbounded = window or None, sphere, tuple(unbounded)
        self.layer_idx, self.layers = layer_idx, layers
        self.has_cosine = cosine
        self.has_decay = self.envelope in ("decay", "raised")
        self.splats = splats or (16 if self.mixer == "linear" else d // 2 if self.has_cosine else d)
        self._refuse()
        G, S = len(self.gsa_heads), self.splats
        P = {"iso": 1, "diag": d, "full": d * (d + 1) // 2}[covariance]
        self.c_attn = nn.Linear(hidden_size, 3 * NH * d)
        self.c_proj = nn.Linear(NH * d, hidden_size)
        if G:
            self.mu = nn.Parameter(torch.empty(G, S, d))
            self.log_precision = nn.Parameter(torch.empty(G, S, P))
            self.log_alpha = nn.Parameter(torch.empty(G, S))
            self.register_buffer("log_alpha_reference", torch.empty(G, S))  # the middle of its bounds
            self.register_buffer("alive", torch.empty(G, S))  # 1 or 0
            self.log_theta = nn.Parameter(torch.empty(G, S)) if self.has_cosine else None
            self.log_delta = nn.Parameter(torch.empty(G, S)) if self.has_decay else None
            self.psi = nn.Parameter(torch.empty(G, S)) if self.phase == "learned" else None
            self.log_far = nn.Parameter(torch.empty(G)) if attention == "extend" else None
        ropes = len(self.rope_heads)
        self.log_gain = nn.Parameter(torch.empty(ropes)) if self.gain == "head" and ropes else None
        self.log_rope = nn.Parameter(torch.empty(ropes, d // 2)) if self.rope == "learned" and ropes else None
        self.forgetw = nn.Parameter(torch.empty(gates, hidden_size)) if gates else None
        self.forgetb = nn.Parameter(torch.empty(gates)) if gates else None
        self.reset_parameters()

    def _refuse(self):
        linear, most = self.mixer == "linear", self.head_size
        if self.has_cosine:
            most //= 2
        if not all(0 <= h < self.num_heads for h in self.gsa_heads):
            raise ValueError(f"gsa_heads {self.gsa_heads}: there are heads 0 to {self.num_heads - 1}")
        if self.attention == "extend" and not (linear and self.window and self.causal):
            raise ValueError("attention='extend' needs the linear mixer, a window, and to be causal")
        if (self.gain == "head" or self.rope == "learned") and self.position == "learned":
            raise ValueError("gain='head' and rope='learned' are for rotated vectors; choose position='rope' or 'both'")
        if self.forget != "none" and (self.attention == "extend" or not self.causal):
            raise ValueError(f"forget={self.forget!r} fits neither attention='extend' nor an encoder")
        if self.phase == "learned" and not self.has_cosine:
            raise ValueError(f"phase='learned' is that of a cosine, which envelope {self.envelope!r} does not have")
        if not self.gsa_heads:
            return
        if linear and self.envelope == "cosine" or not linear and self.has_decay:
            raise ValueError(f"envelope {self.envelope!r} does not fit the {self.mixer} mixer")
        if not 1 <= self.splats <= (64 if linear else most):
            raise ValueError(f"{self.splats} splats: these heads take 1 to {64 if linear else most}")

    @torch.no_grad()
    def reset_parameters(self):
        for layer, deviation in ((self.c_attn, 0.02), (self.c_proj, 0.02 / math.sqrt(2 * self.layers))):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)
        if self.log_gain is not None:
            self.log_gain.zero_()
        if self.log_rope is not None:
            self.log_rope.copy_(self._rope_frequencies(None).log())
        if self.forgetw is not None:
            nn.init.normal_(self.forgetw, std=0.02)
            along = torch.linspace(0, 1, len(self.forgetb)) if len(self.forgetb) > 1 else torch.ones(1)
            tokens = FORGET_SHORTEST * (FORGET_LONGEST / FORGET_SHORTEST) ** along
            self.forgetb.copy_(-torch.expm1(1 / tokens).log())
        if not self.gsa_heads:
            return
        nn.init.normal_(self.mu)
        self.mu.div_(self.mu.norm(dim=-1, keepdim=True))
        d, S = self.head_size, self.splats
        self.log_precision.fill_(math.log(PRECISION_START))
        if self.covariance == "full":
            row, column = torch.tril_indices(d, d)
            self.log_precision.copy_((row == column) * 0.5 * math.log(PRECISION_START))
        start = 0.0 if self.mixer == "linear" else amplitude_start(S, d)
        if self.mixer == "softmax" and len(self.gsa_heads) == self.num_heads:
            start += math.log(SOFT_AMPLITUDE)
        self.log_alpha.fill_(start)
        self.log_alpha_reference.fill_(start)
        self.alive.fill_(1)
        if self.log_theta is not None:
            self.log_theta.copy_(torch.linspace(0, math.log(1e-3), S) if S > 1 else torch.zeros(1))
        if self.log_delta is not None:
            self.log_delta.copy_(torch.linspace(math.log(0.08), math.log(5e-4), S)[:S])
        if self.psi is not None:
            self.psi.zero_()
        if self.log_far is not None:
            self.log_far.fill_(2)

    def extra_repr(self):
        return f"{self.attention}, GSA heads {self.gsa_heads} of {self.num_heads}, {self.mixer} mixer"

    # ---- what heads make of queries and keys

    def _standard_features(self, q, k, heads, first):
        if self.position == "learned":
            return q / math.sqrt(self.head_size), k
        rows = [self.rope_heads.index(h) for h in heads]
        theta = self._rope_frequencies(rows).to(q.device)
        angles = turn_angles(theta, torch.arange(first, first + q.shape[2], device=q.device))
        scale = math.sqrt(self.head_size)
        if self.log_gain is not None:  # equation (7c)
            scale = scale * pick(self.log_gain.to(q.dtype).exp().reshape(1, -1, 1, 1), rows)
        return rotate(unit_vectors(q), angles) * scale, rotate(unit_vectors(k), angles)

    def _rope_frequencies(self, rows):
        """of these rows of log_rope, or the fixed ones"""
        if rows is not None and self.log_rope is not None:
            return pick(self.log_rope.double().exp().unsqueeze(0), rows)[0]
        return 10000 ** (torch.arange(0, self.head_size, 2, dtype=torch.float64) * (-1 / self.head_size))

    def _responses(self, q, k):
        """ln phi of queries and keys, (B, G, T, S) each"""
        mu, log_precision = self.mu.to(q.dtype), self.log_precision.to(q.dtype)
        return [log_responses(unit_vectors(x) if self.sphere else x, mu, log_precision) for x in (q, k)]

    def _splat_features(self, q, k, first):
        """equation (9)"""
        lives, log_alpha = self.alive.to(q.dtype).unsqueeze(-2), self.log_alpha.to(q.dtype).unsqueeze(-2)
        at_q, at_k = self._responses(q, k)
        f = [(at_q + log_alpha).exp() * lives, at_k.exp() * lives]
        if self.log_theta is None:
            return f
        angles = turn_angles(self.log_theta.double().exp(), torch.arange(first, first + q.shape[2], device=q.device))
        turned = angles if self.psi is None else angles + self.psi.double().unsqueeze(-2)  # equation (7b)
        return [torch.cat([x * a.cos().to(q.dtype), x * a.sin().to(q.dtype)], -1) for x, a in zip(f, (angles, turned))]

    def _scan_features(self, q, k):
        """responsibilities, equation (11), and phi exp(-c) of keys; c (G)"""
        mu, log_precision = self.mu.to(q.dtype), self.log_precision.to(q.dtype)
        at_q, at_k = self._responses(q, k)
        scale, lives = key_scale(mu, log_precision, self.alive), self.alive.unsqueeze(-2) > 0
        r = (at_q + self.log_alpha.to(q.dtype).unsqueeze(-2)).masked_fill(~lives, -math.inf).softmax(-1)
        return r, (at_k - scale.reshape(-1, 1, 1)).exp() * lives, scale

    # ---- groups of heads; memory: of this layer, or None

    def _softmax_heads(self, q, k, v, window, padding, memory, name, sums, need_lse, need_weights):
        # logits of splats reach 500: half precision has not the exponents for their features
        kind = v.dtype if v.dtype != torch.float16 else torch.float32
        q, k, v = q.to(kind), k.to(kind), v.to(kind)
        if memory is not None:
            if name + ".keys" in memory:
                k, v = (torch.cat([memory[f"{name}.{x}"], new], 2) for x, new in (("keys", k), ("values", v)))
                if sums is not None:
                    past = memory[name + ".sums"]
                    sums = torch.cat([past, past[:, :, -1:] + sums], 2)
            kept = k.shape[2] if window is None else min(window, k.shape[2])
            memory[name + ".keys"], memory[name + ".values"] = k[:, :, -kept:], v[:, :, -kept:]
            if sums is not None:
                memory[name + ".sums"] = sums[:, :, -kept:]
        if padding is not None:
            padding = padding[:, -k.shape[2]:]
        return softmax_mixer(q, k, v, window, self.causal, padding, sums, need_lse, need_weights)

    def _scan_heads(self, r, phi, v, memory, late):
        """N and D of linear heads; late: what is scanned are the tokens that were seen `late` before"""
        theta, delta = (None if x is None else x.double().exp() for x in (self.log_theta, self.log_delta))
        psi = None if self.psi is None else self.psi.double()
        state, T = None, phi.shape[2]
        v = v.to(phi.dtype)
        if late:
            past = 0
            if memory is not None and "responses" in memory:
                past = memory["responses"].shape[2]
                phi, v = torch.cat([memory["responses"], phi], 2), torch.cat([memory["far_values"], v], 2)
            if memory is not None:
                memory["responses"], memory["far_values"] = phi[:, :, -late:], v[:, :, -late:]
            phi, v = (F.pad(x, (0, 0, late - past, 0))[:, :, :T] for x in (phi, v))
        if memory is not None:
            state = memory.get("state")
        N, D, state = linear_scan(r, phi, v, theta, delta, psi, late, state)
        if memory is not None:
            memory["state"] = state
        if not self.causal:
            n, D_after, _ = linear_scan(r, phi, v, theta, delta, psi, reverse=True)
            N, D = N + n, D + D_after
        return N, D

    def _far_share(self, lse, D, scale):
        """of equation (12): how much of the merged output lies beyond the window"""
        some = D > 0
        far = self.log_far.to(D.dtype).unsqueeze(-1) + scale.unsqueeze(-1) + torch.where(some, D, 1).log()
        return torch.where(some, torch.sigmoid(far - lse), 0)

    def _linear_heads(self, q, k, v, padding, memory, near, need_weights):
        """linear heads, or with the near part's (output, lse, weights) heads of extend"""
        r, phi, scale = self._scan_features(q, k)
        if padding is not None:
            phi = phi * padding[:, None, -phi.shape[2]:, None]
        late = self.window if near else 0
        values = v.to(phi.dtype)
        if need_weights:  # the weights are what one-hot values come out as
            T = v.shape[2]
            one = torch.eye(T, dtype=phi.dtype, device=v.device).expand(*v.shape[:2], T, T)
            values = torch.cat([values, one], -1)
        N, D = self._scan_heads(r, phi, values, memory, late)
        share = self._far_share(near[1], D, scale).unsqueeze(-1) if near else 1
        far = share * N / (D.unsqueeze(-1) + (0 if near else ROW_SUM_EPSILON)).masked_fill(D.unsqueeze(-1) == 0, 1)
        out, weights = far[..., :v.shape[-1]], far[..., v.shape[-1]:] if need_weights else None
        if near:
            out = out + (1 - share) * near[0]
            weights = weights + (1 - share) * near[2] if need_weights else None
        return out.to(v.dtype), weights

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                output_attentions=False, **kwargs):
        """hidden_states (B, T, hidden_size); attention_mask: None, or (B, tokens seen + T), 0 where there is no token;
        past_key_values: a GSACache or None. Returns the output (B, T, hidden_size), the weights (B, heads, T, tokens
        seen + T) if asked for, else None, and the cache if it is used, else None."""
        B, T, _ = hidden_states.shape
        if use_cache and past_key_values is None:
            past_key_values = GSACache()
        memory = None if past_key_values is None else past_key_values.layer(self.layer_idx)
        first = 0 if memory is None else memory["seen"]
        if memory is not None and not self.causal:
            raise ValueError("an encoder sees all tokens at once and has no use for a cache")
        if output_attentions and first and (self.window or self.mixer == "linear" and self.gsa_heads):
            raise ValueError("output_attentions needs the whole text at once: windows and linear heads forget old keys")
        padding = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"attention_mask is (batch, tokens), 0 for padding, not {tuple(attention_mask.shape)}")
            padding = attention_mask > 0
        qkv = self.c_attn(hidden_states).view(B, T, 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)
        parts = {}
        with torch.autocast(hidden_states.device.type, enabled=False):
            sums = self._forget_sums(hidden_states)
            for heads in (self.gated_heads, self.standard_heads, self.gsa_heads):
                if heads:
                    parts.update(zip(heads, self._heads(heads, qkv, first, padding, memory, output_attentions,
                                                        sums if heads is self.gated_heads else None)))
        out = torch.stack([parts[h][0] for h in range(self.num_heads)], 2)
        weights = torch.stack([parts[h][1] for h in range(self.num_heads)], 1) if output_attentions else None
        if memory is not None:
            memory["seen"] = first + T
        return self.c_proj(out.flatten(2)), weights, past_key_values

    def _forget_sums(self, x):
        """c (B, gated heads, T), double: sums of ln f up to each token, f = sigmoid(w . x + b); None without gates"""
        if self.forgetw is None:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = F.logsigmoid(F.linear(x.to(wide), self.forgetw.to(wide), self.forgetb.to(wide)))
        return gates.double().transpose(1, 2).cumsum(-1)

    def _heads(self, heads, qkv, first, padding, memory, need_weights, sums):
        """(output (B, T, d), weights or None) of each of these heads, which are of one kind"""
        wide = torch.promote_types(qkv.dtype, torch.float32)
        v, q, k = pick(qkv[2], heads), pick(qkv[0], heads).to(wide), pick(qkv[1], heads).to(wide)
        splats = heads is self.gsa_heads
        name = "splats" if splats else "standard" if sums is None else "gated"
        if splats and self.attention != "extend" and self.mixer == "linear":
            out, weights = self._linear_heads(q, k, v, padding, memory, None, need_weights)
        elif splats and self.attention != "extend":
            f = self._splat_features(q, k, first)
            out, _, weights = self._softmax_heads(*f, v, None, padding, memory, name, None, False, need_weights)
        else:
            f = self._standard_features(q, k, heads, first)
            near = self._softmax_heads(*f, v, self.window, padding, memory, name, sums, splats, need_weights)
            out, weights = near[0], near[2]
            if splats:
                out, weights = self._linear_heads(q, k, v, padding, memory, near, need_weights)
        return zip(out.unbind(1), weights.unbind(1) if need_weights else [None] * len(heads))


# ---- training


@torch.no_grad()
def largest_eigenvalue(L):
    """of L L^T (..., d, d), by eight steps of power iteration"""
    d = L.shape[-1]
    x = torch.where(torch.arange(d, device=L.device) % 3 == 2, -1.0, 1.0).to(L.dtype) / math.sqrt(d)
    x = x.expand(*L.shape[:-1]).unsqueeze(-1)
    for _ in range(8):
        x = L @ (L.transpose(-1, -2) @ x)
        norm = x.norm(dim=-2, keepdim=True)
        x = x / norm.clamp_min(1e-30)
    return norm.squeeze(-1).squeeze(-1)


@torch.no_grad()
def apply_bounds(model):
    """Puts the splats and gains of every GaussianSplatAttention in a model back into their bounds (MODEL.md, section
    6); to be called after each step of the optimiser."""
    for m in model.modules():
        if not isinstance(m, GaussianSplatAttention):
            continue
        bounded = [name for name in BOUNDS if name not in m.unbounded]
        if m.log_gain is not None and "gain" in bounded:
            m.log_gain.clamp_(math.log(GAIN_MIN), math.log(GAIN_MAX))
        if m.log_rope is not None and "frequency" in bounded:
            m.log_rope.clamp_(max=math.log(math.pi))
        if m.gsa_heads:
            _splat_bounds(m, bounded, m.alive > 0)


def _splat_bounds(m, bounded, lives):
    d = m.head_size

    def put_back(x, value):
        x.copy_(torch.where(lives.reshape(*lives.shape, *[1] * (x.dim() - 2)), value, x))

    if m.covariance == "full":
        L = cholesky_factor(m.log_precision, d)
        excess = largest_eigenvalue(L) / PRECISION_MAX
        if "precision" in bounded:
            factor = torch.where(excess > 1, excess.rsqrt(), 1).unsqueeze(-1)
            row, column = torch.tril_indices(d, d, device=L.device)
            smaller = torch.where(row == column, m.log_precision + factor.log(), m.log_precision * factor)
            put_back(m.log_precision, smaller)
            L = cholesky_factor(m.log_precision, d)
        slope = (L @ (L.transpose(-1, -2) @ m.mu.unsqueeze(-1))).squeeze(-1)
    else:
        if "precision" in bounded:
            put_back(m.log_precision, m.log_precision.clamp(math.log(PRECISION_MIN), math.log(PRECISION_MAX)))
        slope = m.mu * m.log_precision.exp()
    if "centre" in bounded:
        put_back(m.mu, m.mu / torch.maximum(m.mu.norm(dim=-1, keepdim=True) / CENTRE_MAX,
                                            slope.norm(dim=-1, keepdim=True) / SLOPE_MAX).clamp_min(1))
    if "amplitude" in bounded:
        middle = m.log_alpha_reference
        put_back(m.log_alpha, m.log_alpha.clamp(middle - AMPLITUDE_RANGE, middle + AMPLITUDE_RANGE))
    if m.log_theta is not None and "frequency" in bounded:
        put_back(m.log_theta, m.log_theta.clamp_max(math.log(math.pi)))
    if m.psi is not None and m.mixer == "softmax":  # the same angle within (-pi, pi]
        put_back(m.psi, m.psi - 2 * math.pi * torch.ceil(m.psi / (2 * math.pi) - 0.5))
    elif m.psi is not None and "phase" in bounded:
        put_back(m.psi, m.psi.clamp(-math.pi / 2, math.pi / 2))
    if m.log_delta is not None and "decay" in bounded:
        put_back(m.log_delta, m.log_delta.clamp_max(math.log(DECAY_MAX)))


def parameter_groups(model, lr, splat_lr=None, weight_decay=0.1):
    """For AdamW(groups, betas=(0.9, 0.95)): matrices and embeddings decay; scalars of splats and gains have a rate of
    their own, ten times lr but at most 0.01; centres, biases and layernorms neither."""
    splat_lr = min(10 * lr, 0.01) if splat_lr is None else splat_lr
    scalars, matrices, others = [], [], []
    for name, p in model.named_parameters():
        bare = name.rpartition(".")[2]
        (scalars if bare in SCALARS else matrices if p.dim() == 2 else others).append(p)
    return [{"params": matrices, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
            {"params": scalars, "lr": splat_lr, "weight_decay": 0.0}]


def clip_gradients(model, most):
    """Clips the gradients of scalars, and those of all else, each to this norm: the gradient of a frequency grows with
    the length of the text and would throttle the others. Returns both norms."""
    groups = parameter_groups(model, 0)
    return [torch.nn.utils.clip_grad_norm_(p, most) for p in (groups[0]["params"] + groups[1]["params"],
                                                               groups[2]["params"])]
