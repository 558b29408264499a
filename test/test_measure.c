/* What is measured of heads, in double: their weights against those of the network itself, found by giving it values
   that are rows of the identity; entropy, distance and reach against sums over these weights; the count of
   operations by hand. */
#define GSA_DOUBLE
#include "network.h"

#include "../gsa/look/measure.h"

/* ---------------------------------------------------------------------- weights, every mode */

/* w (NH, T, T): what layer l does with the values of the last forward pass (B = 1), found out block by block of HS
   of them. */
static void network_weights(const GSA *m, size_t l, real *w) {
    Sizes z = config_sizes(&m->config);
    size_t T = m->used_T, A = z.A, HS = z.HS;
    real *qkv = numbers(T * 3 * A, 0, NULL), *fq = numbers(T * A, 0, NULL), *fk = numbers(T * A, 0, NULL),
         *att = numbers(T * A, 0, NULL), *lse = numbers(z.NH * T, 0, NULL), *rho = numbers(z.NH * T, 0, NULL);
    memcpy(qkv, m->a.qkv + l * T * 3 * A, T * 3 * A * sizeof(real));
    features_forward(m, fq, fk, qkv, l, 1, T, m->a.rope_waves, m->a.splat_waves);
    ActivationTensors block = block_activations(m, l, T);
    Gates gates = layer_gates(m, &block, l);
    for (size_t j0 = 0; j0 < T; j0 += HS) {
        for (size_t t = 0; t < T; t++)
            for (size_t a = 0; a < A; a++) qkv[t * 3 * A + 2 * A + a] = t == j0 + a % HS;
        attention_forward(att, lse, fq, fk, qkv, m->scale + l * z.NH, m->window + l * z.NH, &gates,
                          m->config.objective == OBJECTIVE_LM, 1, T, z.NH, HS);
        scans_forward(m, att, lse, rho, qkv, l, 1, T);
        for (size_t h = 0; h < z.NH; h++)
            for (size_t i = 0; i < T; i++)
                for (size_t e = 0; e < HS && j0 + e < T; e++) w[(h * T + i) * T + j0 + e] = att[i * A + h * HS + e];
    }
    double worst = 0;
    /* up to 1e-6 of the constant parts; keys that are far off the sphere have responses below the epsilon of the row
       sum */
    for (size_t row = 0; row < z.NH * T; row++) {
        double sum = 0;
        for (size_t j = 0; j < T; j++) sum += fabs(w[row * T + j]);
        worst = fmax(worst, fabs(sum - 1));
        for (size_t j = 0; j < T; j++) w[row * T + j] /= sum;
    }
    CHECK(m->config.raw || worst < 3e-6, "the network's weights sum to 1 but for %.2e", worst);
}

static void read_head(void *model, int l, int h, int part, float *out) {
    const GSA *m = (const GSA *)model;
    Sizes z = config_sizes(&m->config);
    ActivationTensors block = block_activations(m, (size_t)l, m->used_T);
    Gates gates = layer_gates(m, &block, (size_t)l);
    for (size_t t = 0; t < m->used_T && part == PART_FORGET; t++)
        out[t] = (float)gates.log_forget[t * gates.count + (size_t)gates.column[h]];
    for (size_t t = 0; t < m->used_T && part != PART_FORGET; t++)
        for (size_t k = 0; k < z.HS; k++)
            out[t * z.HS + k] =
                (float)m->a.qkv[((size_t)l * m->used_T + t) * 3 * z.A + (size_t)part * z.A + (size_t)h * z.HS + k];
}

static void check_mode(int attention, const char *heads, int position, int mixer, int covariance, int envelope,
                       int window, int objective, int raw) {
    Config c;
    char name[160], kind[16], shape[16], by_distance[16];
    if (try_config(&c, attention, heads, position, mixer, covariance, envelope, window, objective)) return;
    c.raw = raw;
    choice_name(ATTENTION_CHOICES, attention, kind, sizeof kind);
    choice_name(COVARIANCE_CHOICES, covariance, shape, sizeof shape);
    choice_name(ENVELOPE_CHOICES, envelope, by_distance, sizeof by_distance);
    snprintf(name, sizeof name, "%s, %s, %s, %s, positions %d, window %d%s%s", kind, mixer ? "linear" : "softmax",
             shape, by_distance, position, window, objective ? ", encoder" : "", raw ? ", no sphere" : "");
    GSA *m = scattered_model(&c, 1, 5);
    size_t T = 70, NH = (size_t)config_heads(&c), HS = (size_t)config_head_size(&c);
    uint64_t rng = 8;
    int x[70];
    random_tokens(x, T, c.V, &rng);
    float *params = (float *)xmalloc(m->total * sizeof *params);
    for (size_t i = 0; i < m->total; i++) m->params[i] = (real)(params[i] = (float)m->params[i]);
    gsa_forward(m, x, NULL, 1, T);
    HeadMeasure each[8], mean = measure_heads(&c, params, T, read_head, m, each);
    real *w = numbers(NH * T * T, 0, NULL), *all = numbers(T, 0, NULL);
    float *q = (float *)xmalloc((2 * T * HS + T) * sizeof *q), *log_forget = q + 2 * T * HS;
    double *row = (double *)xmalloc(T * sizeof *row), entropies = 0, distances = 0, worst = 0;
    bool measured = true;
    for (size_t l = 0; l < (size_t)c.L; l++) {
        network_weights(m, l, w);
        for (size_t h = 0; h < NH; h++) {
            real *mass = numbers(T, 0, NULL), *p = w + h * T * T;
            double entropy = 0, distance = 0, sum = 0, total = 0, difference = 0, square = 0;
            size_t reach = 0, queries = 64;
            read_head(m, (int)l, (int)h, 0, q);
            read_head(m, (int)l, (int)h, 1, q + T * HS);
            if (config_is_gated(&c, (int)l, (int)h)) read_head(m, (int)l, (int)h, PART_FORGET, log_forget);
            HeadWeights *view = head_weights_open(&c, params, (int)l, (int)h, q, q + T * HS, log_forget, T);
            for (size_t i = 0; i < T; i++) {
                head_weights_row(view, i, row);
                for (size_t j = 0; j < T; j++) {
                    difference += (row[j] - p[i * T + j]) * (row[j] - p[i * T + j]);
                    square += p[i * T + j] * p[i * T + j];
                }
            }
            head_weights_close(view);
            worst = fmax(worst, isfinite(difference) ? sqrt(difference / square) : INFINITY);
            for (size_t n = 0; n < queries; n++) {
                size_t i = (n + 1) * T / queries - 1;
                for (size_t j = 0; j < T; j++) {
                    double v = fabs(p[i * T + j]);
                    entropy -= v > 0 ? v * log(v) : 0;
                    distance += v * fabs((double)i - (double)j);
                    mass[abs((int)i - (int)j)] += v;
                    all[abs((int)i - (int)j)] += v;
                    total += v;
                }
            }
            while ((sum += mass[reach]) < 0.9 * total) reach++;
            entropy /= (double)queries;
            distance /= (double)queries;
            entropies += entropy / (double)(NH * c.L);
            distances += distance / (double)(NH * c.L);
            const HeadMeasure *got = &each[l * NH + h];
            bool good = fabs(got->entropy - entropy) < 1e-4 && fabs(got->distance - distance) < 1e-3 &&
                        fabs(got->reach - (double)reach) < 0.5;
            if (!good)
                printf("head %zu:%zu of %s: %g %g %g, not %g %g %zu\n", l, h, name, got->entropy, got->distance,
                       got->reach, entropy, distance, reach);
            measured = measured && good;
        }
    }
    double sum = 0, total = 0;
    size_t reach = 0;
    for (size_t n = 0; n < T; n++) total += all[n];
    while ((sum += all[reach]) < 0.9 * total) reach++;
    CHECK(worst < 1e-5, "weights of %s: %.2e from the network's", name, worst);
    CHECK(measured, "entropy, distance, reach of each head: %s", name);
    CHECK(fabs(mean.entropy - entropies) < 1e-4 && fabs(mean.distance - distances) < 1e-3 &&
              mean.reach == (double)reach,
          "means over heads: %s: %g %g %g, not %g %g %zu", name, mean.entropy, mean.distance, mean.reach, entropies,
          distances, reach);
    free(q);
    free(row);
    free(params);
    gsa_destroy(m);
    free_numbers();
}

/* ---------------------------------------------------------------------- operations, by hand */

static void check_operations(void) {
    Config c;
    try_config(&c, ATTENTION_STANDARD, NULL, POSITION_ROPE, MIXER_SOFTMAX, COVARIANCE_ISO, ENVELOPE_NONE, 0,
               OBJECTIVE_LM);
    /* 2 layers, 2 heads of 10, 20 channels, vocabulary 13: 2 (12 20^2) + 13 20 weights, 2 x 2 x 10 a layer and key,
       50.5 keys; a forget gate has 20 weights */
    c.T = 100;
    c.forget = FORGET_HALF;
    double gated = config_operations(&c);
    c.forget = FORGET_NONE;
    CHECK(gated - config_operations(&c) == 6 * 2 * 20, "operations of gates: %g", gated - config_operations(&c));
    CHECK(config_operations(&c) == 6 * (9600 + 260 + 2 * 2 * 20 * 50.5), "operations of standard attention: %g",
          config_operations(&c));
    c.window = 10; /* 9 tokens see fewer: 9.55 keys */
    CHECK(fabs(config_operations(&c) - 6 * (9860 + 80 * 9.55)) < 1e-6, "operations within a window: %g",
          config_operations(&c));
    CHECK(config_muon_operations(&c) == 0, "no operations of Muon by AdamW");
    c.muon = true; /* a layer: four matrices of 20 x 20, two of 20 x 80; five times X X^T, its square, and that by X */
    CHECK(config_muon_operations(&c) == 2 * 5 * (4 * 3 * 2 * 8000 + 2 * (2 * 2 * 32000 + 2 * 8000)),
          "operations of Muon: %g", config_muon_operations(&c));
    try_config(&c, ATTENTION_GSA, NULL, POSITION_ROPE, MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 0, OBJECTIVE_LM);
    double at_70 = config_operations(&c);
    c.T = 7000;
    CHECK(config_operations(&c) == at_70, "operations of the linear mixer do not grow with T");
}

int main(void) {
    for (int attention = 0; attention <= ATTENTION_EXTEND; attention++)
        for (int mixer = 0; mixer < 2; mixer++)
            for (int covariance = 0; covariance < 3; covariance++)
                for (int envelope = 0; envelope < 4; envelope++)
                    for (int raw = 0; raw < 2; raw++) {
                        int window = attention == ATTENTION_EXTEND ? 9 : attention == ATTENTION_GSA ? 0 : 17;
                        if (attention == ATTENTION_STANDARD && (mixer || covariance || envelope || raw)) continue;
                        check_mode(attention, attention == ATTENTION_EXTEND ? "1" : NULL, POSITION_ROPE, mixer,
                                   covariance, envelope, window, OBJECTIVE_LM, raw);
                    }
    check_mode(ATTENTION_STANDARD, NULL, POSITION_LEARNED, MIXER_SOFTMAX, COVARIANCE_ISO, ENVELOPE_NONE, 0,
               OBJECTIVE_LM, 0);
    check_mode(ATTENTION_EXTEND, NULL, POSITION_LEARNED, MIXER_LINEAR, COVARIANCE_ISO, ENVELOPE_RAISED, 20,
               OBJECTIVE_LM, 0);
    for (int mixer = 0; mixer < 2; mixer++)
        check_mode(ATTENTION_HYBRID, NULL, POSITION_BOTH, mixer, COVARIANCE_DIAG,
                   mixer ? ENVELOPE_RAISED : ENVELOPE_COSINE, 12, OBJECTIVE_MLM, 0);
    check_operations();
    return test_summary("measure");
}
