#include "model.h"

#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------- configuration */

int config_gsa_before(const Config *c, int l, int h) {
    int count = 0;
    for (int i = 0; i < l; i++) count += __builtin_popcountll(c->gsa_heads[i]);
    return h ? count + __builtin_popcountll(c->gsa_heads[l] & (~0ull >> (64 - h))) : count;
}

int config_gates_before(const Config *c, int l, int h) {
    int count = 0;
    for (int i = 0; i <= l && i < c->L && c->forget; i++) {
        int standard = config_heads(c) - __builtin_popcountll(c->gsa_heads[i]),
            most = c->forget == FORGET_ALL ? standard : (standard + 1) / 2,
            before = i < l ? standard : h - (config_gsa_before(c, l, h) - config_gsa_before(c, l, 0));
        count += before < most ? before : most;
    }
    return count;
}

static const char *sentence(const char *format, ...) {
    static char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

const char *config_check(const Config *c) {
    if (c->L < 1 || c->L > MAX_LAYERS) return sentence("--layers must be between 1 and %d, not %d", MAX_LAYERS, c->L);
    if (c->extra < 0 || (c->extra > 0) != (c->attention == ATTENTION_AUGMENT))
        return sentence("%d extra heads do not fit this kind of attention", c->extra);
    if (c->NH < 1 || c->NH > MAX_HEADS || c->extra > MAX_HEADS - c->NH)
        return sentence("--heads must be between 1 and %d, extra ones included, not %lld", MAX_HEADS,
                        (long long)c->NH + c->extra);
    if (c->C < 2 || c->C > 65536 || c->C % c->NH)
        return sentence("--channels %d is not a multiple of --heads %d", c->C, c->NH);
    int d = config_head_size(c);
    if (d > 1024)
        return sentence("the head size, --channels %d / --heads %d = %d, must not exceed 1024", c->C, c->NH, d);
    if (d % 2) return sentence("the head size, --channels %d / --heads %d = %d, must be even", c->C, c->NH, d);
    if (c->T < 1 || c->T > 1 << 24) return sentence("--seq must be between 1 and %d, not %d", 1 << 24, c->T);
    if (c->V < 2 || c->Vp < c->V || c->Vp > 1 << 20)
        return sentence("a vocabulary of %d tokens, padded to %d, cannot be used", c->V, c->Vp);
    if (c->position < 0 || c->position > POSITION_BOTH) return sentence("unknown kind of positions %d", c->position);
    if (c->attention < 0 || c->attention > ATTENTION_EXTEND)
        return sentence("unknown kind of attention %d", c->attention);
    if (c->mixer < 0 || c->mixer > MIXER_LINEAR) return sentence("unknown mixer %d", c->mixer);
    if (c->envelope < 0 || c->envelope > ENVELOPE_RAISED) return sentence("unknown envelope %d", c->envelope);
    if (c->covariance < 0 || c->covariance > COVARIANCE_FULL) return sentence("unknown covariance %d", c->covariance);
    if (c->objective < 0 || c->objective > OBJECTIVE_MLM) return sentence("unknown objective %d", c->objective);
    if (c->raw < 0 || c->raw > 1 || c->unbounded < 0 || c->unbounded >> NUM_BOUNDS)
        return sentence("unknown way of keeping splats in bounds (%d, %d)", c->raw, c->unbounded);
    if (c->gain < 0 || c->gain > GAIN_HEAD) return sentence("unknown gain %d", c->gain);
    if (c->phase < 0 || c->phase > PHASE_LEARNED) return sentence("unknown phase %d", c->phase);
    if (c->gain && c->position == POSITION_LEARNED)
        return "--gain head is for unit queries and keys, which --pos learned does not have; choose --pos rope or both";
    if (c->gain && !config_gains(c)) return "--gain is for standard heads, and this model has none";
    if (c->rope < 0 || c->rope > ROPE_LEARNED) return sentence("unknown kind of rotation frequencies %d", c->rope);
    if (c->rope && c->position == POSITION_LEARNED)
        return "--rope-frequencies learned is for rotations, which --pos learned does not have; choose --pos rope or "
               "both";
    if (c->rope && !config_ropes(c)) return "--rope-frequencies is for standard heads, and this model has none";
    if (c->forget < 0 || c->forget > FORGET_ALL) return sentence("unknown kind of forget gates %d", c->forget);
    if (c->forget && c->attention == ATTENTION_EXTEND)
        return "--forget-gate does not fit --attention extend, whose splats weigh what is far; choose hybrid";
    if (c->forget && c->objective == OBJECTIVE_MLM)
        return "--forget-gate weighs what lies before a token; it does not fit --objective mlm, which looks both ways";
    if (c->forget && !config_gates(c)) return "--forget-gate is for standard heads, and this model has none";
    if (c->window < 0) return sentence("--window must be at least 1, not %d", c->window);
    for (int l = 0; l < MAX_LAYERS; l++)
        if (l >= c->L ? c->gsa_heads[l] != 0 : config_heads(c) < 64 && c->gsa_heads[l] >> config_heads(c))
            return sentence("the map of GSA heads names a head that the model lacks");
    if (c->attention == ATTENTION_EXTEND) {
        if (c->mixer != MIXER_LINEAR)
            return "--attention extend reaches beyond its window by the linear mixer; --mixer softmax does not fit it";
        if (c->window < 1) return "--attention extend needs a --window of at least 1";
        if (c->objective == OBJECTIVE_MLM) return "--attention extend looks back only; it does not fit --objective mlm";
    }
    if (c->window && c->attention == ATTENTION_GSA)
        return "--window bounds standard heads, and --attention gsa has none; choose hybrid";
    if (!config_gsa_heads(c)) return NULL;
    if (c->mixer == MIXER_LINEAR && c->envelope == ENVELOPE_COSINE)
        return "--envelope cosine can be negative, which the average of --mixer linear cannot use; choose raised, "
               "decay or none";
    if (c->mixer == MIXER_SOFTMAX && config_has_decay(c))
        return "--envelope decay and raised belong to --mixer linear; with --mixer softmax choose cosine or none";
    if (c->phase && !config_has_cosine(c))
        return "--phase learned is that of the envelope's cosine, which --envelope none and decay do not have; choose "
               "cosine for --mixer softmax, raised for --mixer linear, or --phase none";
    /* softmax: a head has d features, and cosine and sine need two a splat; linear: what is still cheaper than
       attention */
    int most = c->mixer == MIXER_LINEAR ? 64 : c->envelope == ENVELOPE_COSINE ? d / 2 : d;
    if (c->S < 1 || c->S > most)
        return sentence("--splats must be between 1 and %d for this mixer, envelope and head size %d, not %d", most, d,
                        c->S);
    return NULL;
}

static uint64_t low_bits(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

const char *config_head_map(Config *c, const char *text) {
    memset(c->gsa_heads, 0, sizeof c->gsa_heads);
    c->extra = 0;
    if (c->attention == ATTENTION_STANDARD)
        return text ? "--gsa-heads does not fit --attention standard; choose hybrid" : NULL;
    if (c->attention == ATTENTION_GSA && text)
        return "--gsa-heads does not fit --attention gsa, where every head is one; choose hybrid";
    bool all = c->attention == ATTENTION_GSA || c->attention == ATTENTION_EXTEND;
    char *end = NULL;
    long last = text ? strtol(text, &end, 10) : all ? c->NH : (c->NH + 1) / 2;
    if (!text || (end != text && *end == 0)) {
        int heads = c->NH;
        if (c->attention == ATTENTION_AUGMENT) {
            if (last < 1 || last > MAX_HEADS - c->NH)
                return sentence("--gsa-heads %ld: with %d standard heads a layer can have 1 to %d extra ones", last,
                                c->NH, MAX_HEADS - c->NH);
            c->extra = (int)last;
            heads += c->extra;
        }
        if (last < 0 || last > heads) return sentence("--gsa-heads %ld: a layer has %d heads", last, heads);
        uint64_t every = low_bits(heads), others = low_bits(heads - (int)last);
        for (int l = 0; l < c->L; l++) c->gsa_heads[l] = every & ~others;
        return NULL;
    }
    if (c->attention == ATTENTION_AUGMENT)
        return sentence("--gsa-heads '%.80s': --attention augment takes a number of extra heads", text);
    for (const char *p = text;;) { /* layer:head or layer:first-last, separated by commas */
        int layer, first, used = 0;
        if (sscanf(p, "%9d:%9d%n", &layer, &first, &used) != 2)
            return sentence("--gsa-heads '%.80s' is neither a number nor a list such as 0:3,2:1-4", text);
        int final = first;
        p += used;
        if (*p == '-') {
            if (sscanf(p, "-%9d%n", &final, &used) != 1)
                return sentence("--gsa-heads '%.80s': a head must follow the -", text);
            p += used;
        }
        if (layer < 0 || layer >= c->L || first < 0 || final < first || final >= c->NH)
            return sentence("--gsa-heads %d:%d-%d: layers are 0 to %d, heads 0 to %d", layer, first, final, c->L - 1,
                            c->NH - 1);
        for (int h = first; h <= final; h++) c->gsa_heads[layer] |= 1ull << h;
        if (*p == 0) return NULL;
        if (*p++ != ',') return sentence("--gsa-heads '%.80s': entries are separated by commas", text);
    }
}

/* ---------------------------------------------------------------------- parameters */

const Group groups[NUM_GROUPS] = {
    {true, true, CLIP_WEIGHTS},  /* GROUP_MATRIX */
    {true, false, CLIP_WEIGHTS}, /* GROUP_VECTOR */
    {true, false, CLIP_WEIGHTS}, /* GROUP_CENTRE */
    {true, false, CLIP_SPLATS},  /* GROUP_SCALAR */
    {false, false, CLIP_SPLATS}, /* GROUP_FIXED */
};

size_t model_tensors(const Config *c, Tensor *tensors) {
    size_t offset = 0;
    Tensor *t = tensors;
#define X(tensor, d0, d1, d2, tensor_start, tensor_group)                 \
    t->name = #tensor;                                                    \
    t->shape[0] = (d0), t->shape[1] = (d1), t->shape[2] = (d2);           \
    t->size = (size_t)(t->shape[0] * t->shape[1] * t->shape[2]);          \
    t->offset = offset, t->start = tensor_start, t->group = tensor_group; \
    offset += (t->size + 31) / 32 * 32, t++;
    PARAMETERS(X)
#undef X
    return offset;
}

size_t model_second_moments(const Config *c, Tensor *tensors) {
    size_t offset = 0;
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) {
        Tensor *t = &tensors[i];
        if (config_muon_matrices(c, i)) {
            t->shape[0] = 0;
            t->size = 0;
        }
        t->offset = offset;
        offset += (t->size + 31) / 32 * 32;
    }
    return offset;
}

size_t model_second_moment(const Tensor *tensors, const Tensor *second, size_t at) {
    for (int i = 0; i < NUM_TENSORS; i++)
        if (at < tensors[i].offset + tensors[i].size) return second[i].offset + (at - tensors[i].offset);
    return 0;
}

MuonMatrix config_muon_matrix(const Config *c, const Tensor *tensors, int tensor, size_t j) {
    const Tensor *t = &tensors[tensor];
    size_t columns = (size_t)t->shape[2], rows = t->size / config_muon_matrices(c, tensor) / columns;
    MuonMatrix x = {t->offset + j * rows * columns, rows, columns};
    return x;
}

size_t model_parameters(const Config *c) {
    Tensor tensors[NUM_TENSORS];
    size_t count = 0;
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++)
        if (groups[tensors[i].group].trained) count += tensors[i].size;
    return count - (size_t)(c->Vp - c->V) * c->C;
}

/* The bias of a gate whose f = exp(-1 / n) at x = 0: ln(f / (1 - f)) = -ln(exp(1 / n) - 1). One after the other for
   the heads of each layer; a single one has the longest memory. */
static void start_memory(const Config *c, float *bias) {
    for (int l = 0; l < c->L; l++) {
        int first = config_gates_before(c, l, 0), count = config_gates_before(c, l + 1, 0) - first;
        for (int i = 0; i < count; i++) {
            double along = count > 1 ? (double)i / (count - 1) : 1,
                   n = FORGET_SHORTEST * pow(FORGET_LONGEST / FORGET_SHORTEST, along);
            bias[first + i] = (float)-log(expm1(1 / n));
        }
    }
}

void model_start(const Config *c, float *params, uint64_t seed) {
    Tensor tensors[NUM_TENSORS];
    size_t total = model_tensors(c, tensors);
    double amplitude = config_amplitude_start(c);
    memset(params, 0, total * sizeof *params);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &tensors[i];
        float *p = params + t->offset;
        uint64_t name = 0, rng;
        for (const char *letter = t->name; *letter; letter++) name = rng_mix(name, (uint64_t)*letter);
        rng = rng_mix(seed, name); /* a stream for each name: adding a tensor does not change the others */
        double deviation = t->start == START_RESIDUAL ? 0.02 / sqrt(2.0 * c->L) : 0.02;
        size_t d = t->shape[2];
        switch (t->start) {
        case START_NORMAL:
        case START_RESIDUAL: {
            /* rows of the padding stay 0, but for the first: it stands for [MASK] where the vocabulary has none */
            size_t rows = c->objective == OBJECTIVE_MLM && c->V < c->Vp ? (size_t)c->V + 1 : (size_t)c->V,
                   n = i == TENSOR_wte ? rows * c->C : t->size;
            for (size_t k = 0; k < n; k++) p[k] = (float)(deviation * rng_normal(&rng));
            break;
        }
        case START_ZERO: break;
        case START_ONE:
            for (size_t k = 0; k < t->size; k++) p[k] = 1;
            break;
        case START_SPHERE: /* uniform on the unit sphere: a normal vector, scaled */
            for (size_t s = 0; s < t->size / d; s++) {
                double square = 0;
                for (size_t k = 0; k < d; k++) p[s * d + k] = (float)rng_normal(&rng);
                for (size_t k = 0; k < d; k++) square += (double)p[s * d + k] * p[s * d + k];
                for (size_t k = 0; k < d; k++) p[s * d + k] /= (float)sqrt(square);
            }
            break;
        case START_AMPLITUDE:
            for (size_t k = 0; k < t->size; k++) p[k] = (float)amplitude;
            break;
        case START_FREQUENCY: /* log-spaced from 1 to THETA_LOWEST within each head */
            for (size_t k = 0; k < t->size; k++)
                p[k] = (float)(log((double)THETA_LOWEST) * (k % c->S) / (c->S > 1 ? c->S - 1 : 1));
            break;
        case START_DECAY: /* from 0.08 to 5e-4 */
            for (size_t k = 0; k < t->size; k++)
                p[k] = (float)(log(0.08) + log(5e-4 / 0.08) * (k % c->S) / (c->S > 1 ? c->S - 1 : 1));
            break;
        case START_FAR:
            for (size_t k = 0; k < t->size; k++) p[k] = 2;
            break;
        case START_GAIN:
            for (size_t k = 0; k < t->size; k++) p[k] = (float)log(GAIN_START);
            break;
        case START_ROPE:
            for (size_t k = 0; k < t->size; k++)
                p[k] = (float)log(rope_frequency((int)(k % tensor_row(t)), config_head_size(c)));
            break;
        case START_MEMORY: start_memory(c, p); break;
        }
    }
    model_set_precision(c, params, SPLAT_PRECISION_START);
}

void model_set_precision(const Config *c, float *params, double precision) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    float *p = params + tensors[TENSOR_log_precision].offset;
    if (c->covariance != COVARIANCE_FULL) {
        for (size_t k = 0; k < tensors[TENSOR_log_precision].size; k++) p[k] = (float)log(precision);
        return;
    }
    /* Lambda = L L^T, L lower triangular, row by row, its diagonal as logarithms: L = sqrt(precision) times the
       identity */
    size_t P = (size_t)config_precisions(c);
    memset(p, 0, tensors[TENSOR_log_precision].size * sizeof *p);
    for (size_t s = 0; s < tensors[TENSOR_log_precision].size / P; s++)
        for (size_t i = 0; i < (size_t)config_head_size(c); i++)
            p[s * P + i * (i + 1) / 2 + i] = (float)(0.5 * log(precision));
}

void model_scale_amplitudes(const Config *c, float *params, double factor) {
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    float *alpha = params + tensors[TENSOR_log_alpha].offset,
          *bound = params + tensors[TENSOR_log_alpha_reference].offset;
    for (int l = 0; l < c->L; l++) {
        int g = config_gsa_before(c, l, 0), heads = config_gsa_before(c, l + 1, 0) - g;
        double by = factor ? factor : heads == config_heads(c) ? SOFT_AMPLITUDE : 1;
        for (int s = g * c->S; s < (g + heads) * c->S; s++) {
            alpha[s] += (float)log(by);
            bound[s] += (float)log(by);
        }
    }
}

double rope_frequency(int k, int d) { return pow(10000, -2.0 * k / d); }

/* ---------------------------------------------------------------------- splats */

const char *model_check_alive(const Config *c, const float *alive) {
    for (int g = 0; g < config_gsa_heads(c); g++) {
        int count = 0;
        for (int s = 0; s < c->S; s++) {
            float a = alive[g * c->S + s];
            if (a != 0 && a != 1)
                return sentence("splat %d of GSA head %d is neither alive (1) nor dead (0) but %g", s, g, (double)a);
            count += a == 1;
        }
        if (!count) return sentence("GSA head %d has no splat alive", g);
    }
    return NULL;
}

/* E exp(k u.x) over random unit vectors x of dimension d, |u| = 1: the series of 0F1(; d/2; k^2/4). */
static double sphere_mean(double k, int d) {
    double term = 1, sum = 1;
    for (int n = 1; n < 1000 && term > 1e-17 * sum; n++) sum += term *= k * k / 4 / (n * (d / 2.0 + n - 1));
    return sum;
}

double splat_amplitude_start(int S, int d) {
    /* With a_s = phi_s(q), b_s = phi_s(k): z = alpha sum_s a_s b_s, E z = alpha S (E a)^2, E z^2 = alpha^2 sum_st (E
       a_s a_t)^2, and phi_s phi_t = exp(-2p + p (mu_s + mu_t).x). The mean over pairs s != t is an integral over the
       cosine c of two random centres, whose density is (1 - c^2)^((d-3)/2); with c = sin u the weight is
       cos(u)^(d-2). */
    double p = SPLAT_PRECISION_START, mean = sphere_mean(p, d), pairs = 0, weights = 0;
    enum { STEPS = 2000 };
    for (int i = 0; i < STEPS; i++) {
        double u = 3.141592653589793 * ((i + 0.5) / STEPS - 0.5), weight = pow(cos(u), d - 2);
        double together = sphere_mean(p * sqrt(2 + 2 * sin(u)), d);
        pairs += weight * together * together;
        weights += weight;
    }
    double same = sphere_mean(2 * p, d);
    double variance = S * same * same + (double)S * (S - 1) * pairs / weights - (double)S * S * pow(mean, 4);
    return 2 * p - 0.5 * log(variance); /* the factor exp(-4p) of z^2, taken out of the logarithm */
}

double config_amplitude_start(const Config *c) {
    return config_gsa_heads(c) && c->mixer == MIXER_SOFTMAX ? splat_amplitude_start(c->S, config_head_size(c)) : 0;
}
