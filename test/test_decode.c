/* Decoding one token at a time gives what one pass over the whole text gives, at every position of every decoder. */
#define INFER_NO_MAIN
#include "network.h"

enum { T = 260 }; /* several chunks of the scan and blocks of queries, beyond all windows here */

static void check_decoder(const Config *c, const char *what) {
    GSA *m = scattered_model(c, 1, 40);
    Decoder d = decoder_create(m);
    uint64_t rng = 41;
    size_t V = (size_t)c->V, Vp = (size_t)c->Vp, worst_at = 0;
    int x[T];
    double worst = 0;
    random_tokens(x, T, c->V, &rng);
    gsa_forward(m, x, NULL, 1, T);
    for (size_t t = 0; t < T; t++) {
        double difference = 0, square = 0;
        decoder_step(&d, m, x[t]);
        for (size_t v = 0; v < V; v++) {
            double a = (double)d.logits[v], b = (double)m->a.logits[t * Vp + v];
            difference += (a - b) * (a - b), square += b * b;
        }
        if (!(difference / square <= worst)) worst = difference / square, worst_at = t;
    }
    CHECK(worst <= 1e-9 && d.position == T, "%s: decoding differs from the forward pass by %g at token %zu", what, worst, worst_at);
    decoder_free(&d);
    gsa_destroy(m);
}

int main(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    static const struct {
        const char *name, *heads;
        int attention;
    } maps[] = {{"standard", NULL, ATTENTION_STANDARD}, {"gsa", NULL, ATTENTION_GSA}, {"hybrid 0:1,1:0", "0:1,1:0", ATTENTION_HYBRID}, {"augment 1", "1", ATTENTION_AUGMENT},
                {"extend", NULL, ATTENTION_EXTEND}, {"extend 1", "1", ATTENTION_EXTEND}};
    static const int windows[] = {0, 1, 9, 64, 130, T, T + 40};
    for (size_t map = 0; map < sizeof maps / sizeof *maps; map++)
        for (int position = 0; position <= POSITION_BOTH; position++)
            for (int mixer = 0; mixer <= MIXER_LINEAR; mixer++)
                for (int covariance = 0; covariance <= COVARIANCE_FULL; covariance++)
                    for (int envelope = 0; envelope <= ENVELOPE_RAISED; envelope++)
                        for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
                            Config c;
                            char what[128];
                            if (try_config(&c, maps[map].attention, maps[map].heads, position, mixer, covariance, envelope, windows[w], OBJECTIVE_LM)) continue;
                            if (maps[map].attention == ATTENTION_STANDARD && (mixer || covariance || envelope)) continue;
                            if (covariance && (position != POSITION_ROPE || w % 2)) continue;
                            c.T = T;
                            snprintf(what, sizeof what, "%s, positions %d, mixer %d, covariance %d, envelope %d, window %d", maps[map].name, position, mixer, covariance, envelope, windows[w]);
                            check_decoder(&c, what);
                        }
    return test_summary("test_decode");
}
