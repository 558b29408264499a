#include "model.h"

#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------------------------------- configuration */

int choice_index(const char *choices, const char *text) {
    size_t n = strlen(text);
    int index = 0;
    for (const char *p = choices; p; index++) {
        if (strcspn(p, "|") == n && strncmp(p, text, n) == 0) return index;
        p = strchr(p, '|');
        if (p) p++;
    }
    return -1;
}

void choice_name(const char *choices, int index, char *out, size_t room) {
    const char *p = choices;
    for (; index > 0 && p; index--) p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL;
    snprintf(out, room, "%.*s", p ? (int)strcspn(p, "|") : 1, p ? p : "?");
}

int config_gsa_before(const Config *c, int l, int h) {
    int count = 0;
    for (int i = 0; i < l; i++) count += __builtin_popcountll(c->gsa_heads[i]);
    return h ? count + __builtin_popcountll(c->gsa_heads[l] & (~0ull >> (64 - h))) : count;
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
    if (c->NH < 1 || c->NH > MAX_HEADS) return sentence("--heads must be between 1 and %d, not %d", MAX_HEADS, c->NH);
    if (c->C < 2 || c->C > 65536 || c->C % c->NH) return sentence("--channels %d is not a multiple of --heads %d", c->C, c->NH);
    int d = config_head_size(c);
    if (d % 2) return sentence("the head size, --channels %d / --heads %d = %d, must be even", c->C, c->NH, d);
    if (c->T < 1 || c->T > 1 << 24) return sentence("--seq must be between 1 and %d, not %d", 1 << 24, c->T);
    if (c->V < 2 || c->Vp < c->V || c->Vp > 1 << 20) return sentence("a vocabulary of %d tokens, padded to %d, cannot be used", c->V, c->Vp);
    if (c->position < 0 || c->position > POSITION_BOTH) return sentence("unknown kind of positions %d", c->position);
    if (c->attention < 0 || c->attention > ATTENTION_HYBRID) return sentence("unknown kind of attention %d", c->attention);
    if (c->envelope < 0 || c->envelope > ENVELOPE_COSINE) return sentence("unknown envelope %d", c->envelope);
    if (c->covariance < 0 || c->covariance > COVARIANCE_DIAG) return sentence("unknown covariance %d", c->covariance);
    for (int l = 0; l < MAX_LAYERS; l++)
        if (l >= c->L ? c->gsa_heads[l] != 0 : c->NH < 64 && c->gsa_heads[l] >> c->NH) return sentence("the map of GSA heads names a head that the model lacks");
    int most = c->envelope == ENVELOPE_COSINE ? d / 2 : d; /* cosine and sine need two features a splat, and a head has d */
    if (config_gsa_heads(c) && (c->S < 1 || c->S > most))
        return sentence("--splats must be between 1 and %d for heads of size %d %s an envelope, not %d", most, d, most < d ? "with" : "without", c->S);
    return NULL;
}

const char *config_head_map(Config *c, const char *text) {
    uint64_t all = c->NH >= 64 ? ~0ull : (1ull << c->NH) - 1;
    memset(c->gsa_heads, 0, sizeof c->gsa_heads);
    if (c->attention == ATTENTION_STANDARD) return text ? "--gsa-heads does not fit --attention standard; choose hybrid" : NULL;
    if (c->attention == ATTENTION_GSA) {
        if (text) return "--gsa-heads does not fit --attention gsa, where every head is one; choose hybrid";
        for (int l = 0; l < c->L; l++) c->gsa_heads[l] = all;
        return NULL;
    }
    char *end;
    long last = text ? strtol(text, &end, 10) : (c->NH + 1) / 2;
    if (!text || (end != text && *end == 0)) {
        if (last < 0 || last > c->NH) return sentence("--gsa-heads %ld: a layer has %d heads", last, c->NH);
        for (int l = 0; l < c->L; l++) c->gsa_heads[l] = all & ~(last == c->NH ? 0 : ~0ull >> (64 - (c->NH - last)));
        return NULL;
    }
    for (const char *p = text;;) { /* layer:head or layer:first-last, separated by commas */
        int layer, first, used = 0;
        if (sscanf(p, "%9d:%9d%n", &layer, &first, &used) != 2) return sentence("--gsa-heads '%.80s' is neither a number nor a list such as 0:3,2:1-4", text);
        int final = first;
        p += used;
        if (*p == '-') {
            if (sscanf(p, "-%9d%n", &final, &used) != 1) return sentence("--gsa-heads '%.80s': a head must follow the -", text);
            p += used;
        }
        if (layer < 0 || layer >= c->L || first < 0 || final < first || final >= c->NH)
            return sentence("--gsa-heads %d:%d-%d: layers are 0 to %d, heads 0 to %d", layer, first, final, c->L - 1, c->NH - 1);
        for (int h = first; h <= final; h++) c->gsa_heads[layer] |= 1ull << h;
        if (*p == 0) return NULL;
        if (*p++ != ',') return sentence("--gsa-heads '%.80s': entries are separated by commas", text);
    }
}

/* ---------------------------------------------------------------------------------------------- parameters */

const Group groups[NUM_GROUPS] = {
    {1, true, CLIP_WEIGHTS},   /* GROUP_MATRIX */
    {1, false, CLIP_WEIGHTS},  /* GROUP_VECTOR */
    {1, false, CLIP_WEIGHTS},  /* GROUP_CENTRE */
    {10, false, CLIP_SPLATS},  /* GROUP_SCALAR */
};

size_t model_tensors(const Config *c, Tensor *tensors) {
    size_t offset = 0;
    Tensor *t = tensors;
#define X(tensor, d0, d1, d2, tensor_start, tensor_group)              \
    t->name = #tensor;                                                 \
    t->shape[0] = (d0), t->shape[1] = (d1), t->shape[2] = (d2);        \
    t->size = (size_t)(t->shape[0] * t->shape[1] * t->shape[2]);       \
    t->offset = offset, t->start = tensor_start, t->group = tensor_group; \
    offset += (t->size + 31) / 32 * 32, t++;
    PARAMETERS(X)
#undef X
    return offset;
}

size_t model_parameters(const Config *c) {
    Tensor tensors[NUM_TENSORS];
    size_t count = 0;
    model_tensors(c, tensors);
    for (int i = 0; i < NUM_TENSORS; i++) count += tensors[i].size;
    return count - (size_t)(c->Vp - c->V) * c->C;
}

void model_start(const Config *c, float *params, uint64_t seed) {
    Tensor tensors[NUM_TENSORS];
    size_t total = model_tensors(c, tensors);
    double amplitude = config_gsa_heads(c) ? splat_amplitude_start(c->S, config_head_size(c)) : 0;
    memset(params, 0, total * sizeof *params);
    for (int i = 0; i < NUM_TENSORS; i++) {
        const Tensor *t = &tensors[i];
        float *p = params + t->offset;
        uint64_t rng = rng_mix(seed, (uint64_t)i); /* one stream a tensor: adding a tensor does not change the others */
        double deviation = t->start == START_RESIDUAL ? 0.02 / sqrt(2.0 * c->L) : 0.02;
        size_t d = t->shape[2];
        switch (t->start) {
        case START_NORMAL:
        case START_RESIDUAL: {
            size_t n = i == TENSOR_wte ? (size_t)c->V * c->C : t->size; /* rows of the padding stay 0 */
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
        case START_PRECISION:
            for (size_t k = 0; k < t->size; k++) p[k] = (float)log(SPLAT_PRECISION_START);
            break;
        case START_AMPLITUDE:
            for (size_t k = 0; k < t->size; k++) p[k] = (float)amplitude;
            break;
        case START_FREQUENCY: /* log-spaced from 1 to 1e-3 within each head */
            for (size_t k = 0; k < t->size; k++) p[k] = (float)(-log(1e3) * (k % c->S) / (c->S > 1 ? c->S - 1 : 1));
            break;
        }
    }
}

/* ---------------------------------------------------------------------------------------------- splats */

/* E exp(k u.x) over random unit vectors x of dimension d, |u| = 1: the series of 0F1(; d/2; k^2/4). */
static double sphere_mean(double k, int d) {
    double term = 1, sum = 1;
    for (int n = 1; n < 1000 && term > 1e-17 * sum; n++) sum += term *= k * k / 4 / (n * (d / 2.0 + n - 1));
    return sum;
}

double splat_amplitude_start(int S, int d) {
    /* With a_s = phi_s(q), b_s = phi_s(k): z = alpha sum_s a_s b_s, E z = alpha S (E a)^2, E z^2 = alpha^2 sum_st (E a_s a_t)^2,
       and phi_s phi_t = exp(-2p + p (mu_s + mu_t).x). The mean over pairs s != t is an integral over the cosine c of two random
       centres, whose density is (1 - c^2)^((d-3)/2); with c = sin u the weight is cos(u)^(d-2). */
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
