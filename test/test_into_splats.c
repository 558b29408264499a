/* Splats that learn whom a standard head attended to: the divergence and its gradient against finite differences of
   measure.c's weights in double, which know nothing of how the fit computes them, in every mode that the fit takes. */
#include "test.h"

#include "../gsa/look/measure.h"
#include "../gsa/run/into_splats.h"

enum { T = 26, D = 8, S = 3 };

static Config config_of(int mixer, int envelope, int phase, int objective) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.V = c.Vp = 64;
    c.L = 1;
    c.NH = 1;
    c.C = D;
    c.position = POSITION_ROPE;
    c.attention = ATTENTION_GSA;
    c.mixer = mixer;
    c.S = S;
    c.envelope = envelope;
    c.phase = phase;
    c.objective = objective;
    c.gsa_heads[0] = 1;
    CHECK(!config_check(&c), "%s", config_check(&c) ? config_check(&c) : "");
    return c;
}

/* The numbers of a model's only head, in the order of HeadSplats, to (back: from) a flat buffer. */
static void move(const Config *c, float *flat, float *splats, bool back) {
    static const int of[] = {TENSOR_mu,        TENSOR_log_precision, TENSOR_log_alpha,
                             TENSOR_log_theta, TENSOR_log_delta,     TENSOR_psi};
    Tensor tensors[NUM_TENSORS];
    model_tensors(c, tensors);
    HeadSplats p = head_splats(c, splats);
    float *parts[] = {p.mu, p.log_precision, p.log_alpha, p.log_theta, p.log_delta, p.psi};
    for (int i = 0; i < 6; i++)
        for (size_t n = 0; n < tensors[of[i]].size; n++) {
            float *there = &flat[tensors[of[i]].offset + n], *here = &parts[i][n];
            if (back) *here = *there;
            else *there = *here;
        }
}

static double witness(const Config *c, float *flat, const float *splats, const float *q, const float *k,
                      const float *old) {
    double row[T], loss = 0;
    move(c, flat, (float *)splats, false);
    HeadWeights *w = head_weights_open(c, flat, 0, 0, q, k, NULL, T);
    for (size_t i = 0; i < T; i++) {
        head_weights_row(w, i, row);
        for (size_t j = 0; j < T; j++)
            if (old[i * T + j] > 0) loss += (double)old[i * T + j] * log((double)old[i * T + j] / row[j]) / T;
    }
    head_weights_close(w);
    return loss;
}

static void test_divergence(int mixer, int envelope, int phase, int objective, const char *name) {
    Config c = config_of(mixer, envelope, phase, objective);
    Tensor tensors[NUM_TENSORS];
    float *flat = (float *)xmalloc(model_tensors(&c, tensors) * sizeof *flat), q[T * D], k[T * D], old[T * T] = {0};
    uint64_t rng = 5;
    model_start(&c, flat, 3);
    for (int i = 0; i < T * D; i++) q[i] = (float)(2 * rng_normal(&rng));
    for (int i = 0; i < T * D; i++) k[i] = (float)(2 * rng_normal(&rng));
    for (int i = 0; i < T; i++) {
        double sum = 0;
        int end = objective == OBJECTIVE_LM ? i + 1 : T;
        for (int j = 0; j < end; j++) /* some keys out of the old head's window */
            sum += (double)(old[i * T + j] = i > j + 15 ? 0 : (float)exp(2 * rng_normal(&rng)));
        for (int j = 0; j < end; j++) old[i * T + j] = (float)((double)old[i * T + j] / sum);
    }
    float *splats = (float *)xcalloc(2 * splats_room(&c), sizeof *splats), *gradient = splats + splats_room(&c);
    move(&c, flat, splats, true);
    HeadSplats p = head_splats(&c, splats), g = head_splats(&c, gradient);
    for (int s = 0; s < S; s++) { /* nothing as it starts; logits of some size */
        p.log_precision[s] -= (float)(1 + 0.3 * rng_normal(&rng));
        p.log_alpha[s] = (float)(mixer == MIXER_SOFTMAX ? 2 + 0.3 * rng_normal(&rng) : 0.5 * rng_normal(&rng));
        p.log_theta[s] = (float)log(0.3 + 0.2 * s);
        p.log_delta[s] = (float)log(0.05 + 0.03 * s);
        if (phase) p.psi[s] = (float)(0.4 * rng_normal(&rng));
    }
    double loss = splats_divergence(&c, splats, q, k, old, T, gradient), want = witness(&c, flat, splats, q, k, old);
    CHECK(isfinite(loss) && isfinite(want) && fabs(loss - want) < 1e-4 * want, "%s: divergence %.7f, witness %.7f",
          name, loss, want);
    CHECK(splats_divergence(&c, splats, q, k, old, T, NULL) == loss, "%s: with and without a gradient", name);
    const struct {
        const char *name;
        size_t at, count;
        bool has;
    } parts[] = {{"mu", 0, S * D, true},
                 {"log_precision", (size_t)(g.log_precision - gradient), S, true},
                 {"log_alpha", (size_t)(g.log_alpha - gradient), S, true},
                 {"log_theta", (size_t)(g.log_theta - gradient), S, config_has_cosine(&c)},
                 {"log_delta", (size_t)(g.log_delta - gradient), S, config_has_decay(&c)},
                 {"psi", (size_t)(g.psi - gradient), S, phase == PHASE_LEARNED}};
    for (size_t part = 0; part < sizeof parts / sizeof *parts; part++) {
        float found[S * D], expected[S * D];
        for (size_t i = 0; i < parts[part].count; i++) {
            float *x = &splats[parts[part].at + i], before = *x, up = before + 2e-3f, down = before - 2e-3f;
            *x = up;
            double above = witness(&c, flat, splats, q, k, old);
            *x = down;
            double below = witness(&c, flat, splats, q, k, old);
            *x = before;
            expected[i] = (float)((above - below) / ((double)up - (double)down));
            found[i] = gradient[parts[part].at + i];
        }
        if (parts[part].has)
            CHECK(relative_error(found, expected, parts[part].count) < 1e-3, "%s: gradient of %s is %.2e off", name,
                  parts[part].name, relative_error(found, expected, parts[part].count));
        for (size_t i = 0; i < parts[part].count && !parts[part].has; i++)
            CHECK(found[i] == 0, "%s: gradient %g of %s, which it has not", name, (double)found[i], parts[part].name);
    }
    free(splats);
    free(flat);
}

int main(void) {
    test_divergence(MIXER_SOFTMAX, ENVELOPE_COSINE, PHASE_NONE, OBJECTIVE_LM, "softmax");
    test_divergence(MIXER_SOFTMAX, ENVELOPE_COSINE, PHASE_LEARNED, OBJECTIVE_LM, "softmax, phases");
    test_divergence(MIXER_SOFTMAX, ENVELOPE_NONE, PHASE_NONE, OBJECTIVE_LM, "softmax without a cosine");
    test_divergence(MIXER_SOFTMAX, ENVELOPE_COSINE, PHASE_LEARNED, OBJECTIVE_MLM, "softmax, an encoder");
    test_divergence(MIXER_LINEAR, ENVELOPE_RAISED, PHASE_NONE, OBJECTIVE_LM, "linear");
    test_divergence(MIXER_LINEAR, ENVELOPE_RAISED, PHASE_LEARNED, OBJECTIVE_LM, "linear, phases");
    test_divergence(MIXER_LINEAR, ENVELOPE_DECAY, PHASE_NONE, OBJECTIVE_LM, "linear, decay");
    test_divergence(MIXER_LINEAR, ENVELOPE_NONE, PHASE_NONE, OBJECTIVE_LM, "linear without an envelope");
    test_divergence(MIXER_LINEAR, ENVELOPE_RAISED, PHASE_LEARNED, OBJECTIVE_MLM, "linear, an encoder");
    return test_summary("test_into_splats");
}
