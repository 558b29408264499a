/* Reading a text in pieces of any sizes, token by token or side by side with other texts, gives what one pass over the whole text gives, at every
   position of every decoder. */
#define INFER_NO_MAIN
#include "network.h"

enum { T = 300 }; /* several chunks of the scan, blocks of queries and passes, beyond all windows here */

/* A model for infer.c on the parameters of one for training. */
static Model *model_on(const GSA *g) {
    Model *m = (Model *)xcalloc(1, sizeof *m);
    m->net.config = g->config, m->net.p = g->p;
    for (int i = 0; i < NUM_TENSORS; i++) {
        Matrix matrix = {TYPE_F32, (size_t)(g->tensors[i].shape[2] > 1 ? g->tensors[i].shape[2] : g->tensors[i].shape[1]), g->params + g->tensors[i].offset, NULL};
        m->matrix[i] = matrix;
    }
    model_prepare(m);
    return m;
}

typedef struct {
    const real *expected; /* (T, Vp) of the forward pass */
    size_t V, Vp, seen, worst_at;
    double worst;
} Comparison;

/* A LogitsSink: keeps the largest normalised squared error of a position. */
static void compare(void *context, size_t sample, size_t position, size_t rows, const real *logits) {
    Comparison *c = (Comparison *)context;
    (void)sample;
    for (size_t r = 0; r < rows; r++) {
        double difference = 0, square = 0;
        for (size_t v = 0; v < c->V; v++) {
            double a = (double)logits[r * c->Vp + v], b = (double)c->expected[(position + r) * c->Vp + v];
            difference += (a - b) * (a - b), square += b * b;
        }
        if (!(difference / square <= c->worst)) c->worst = difference / square, c->worst_at = position + r;
    }
    c->seen += rows;
}

static void check_decoder(const Config *c, const char *what) {
    GSA *g = scattered_model(c, 1, 40);
    Model *m = model_on(g);
    uint64_t rng = 41;
    size_t V = (size_t)c->V, Vp = (size_t)c->Vp;
    int x[T];
    random_tokens(x, T, c->V, &rng);
    gsa_forward(g, x, NULL, 1, T);
    const Comparison none = {g->a.logits, V, Vp, 0, 0, 0};

    /* token by token */
    Session *s = session_create(m, 6, model_endless(m) ? SIZE_MAX : T);
    Comparison found = none;
    for (size_t t = 0; t < T; t++) {
        session_run(s, NULL, 1, x + t, 1, NULL, NULL);
        compare(&found, 0, t, 1, session_logits(s, 0));
    }
    CHECK(found.worst <= 1e-9 && s->position[0] == T, "%s: decoding differs from the forward pass by %g at token %zu", what, found.worst, found.worst_at);

    /* pieces of many sizes, small steps between them */
    static const size_t pieces[][8] = {{T}, {64, 1, 63, 65, 1, 1, 105}, {1, 9, 10, 1, 129, 130, 20}, {257, 43}, {2, 2, 2, 2, 2, 2, 2, T - 14}};
    for (size_t split = 0; split < sizeof pieces / sizeof *pieces; split++) {
        found = none;
        session_reset(s, 1);
        for (size_t i = 0, at = 0; at < T; at += pieces[split][i++]) {
            size_t one = 1;
            session_run(s, &one, 1, x + at, pieces[split][i], compare, &found);
        }
        CHECK(found.worst <= 1e-9 && found.seen == T, "%s: split %zu differs from the forward pass by %g at token %zu of %zu", what, split, found.worst, found.worst_at, found.seen);
    }

    /* six texts, one of them at another place, side by side: to the bit what each is alone */
    enum { TEXTS = 6, STEPS = 40 };
    const size_t start = 70, order[TEXTS] = {1, 2, 0, 4, 3, 5};
    real *alone = numbers(2 * STEPS * V, 0, NULL);
    bool same = true;
    session_reset(s, 0);
    session_run(s, NULL, 1, x, start, NULL, NULL);
    session_copy(s, 2, 0);
    CHECK(memcmp(session_logits(s, 2), session_logits(s, 0), V * sizeof(real)) == 0, "%s: a copied session has the same logits", what);
    for (size_t t = 0; t < STEPS; t++) {
        session_run(s, NULL, 1, x + start + t, 1, NULL, NULL);
        memcpy(alone + t * V, session_logits(s, 0), V * sizeof(real));
    }
    session_reset(s, 0);
    for (size_t t = 0; t < STEPS; t++) {
        session_run(s, NULL, 1, x + t, 1, NULL, NULL);
        memcpy(alone + (STEPS + t) * V, session_logits(s, 0), V * sizeof(real));
    }
    for (size_t i = 0; i < TEXTS; i++)
        if (i != 2) session_reset(s, i);
    for (size_t t = 0; t < STEPS; t++) {
        int next[TEXTS];
        for (size_t i = 0; i < TEXTS; i++) next[i] = order[i] == 2 ? x[start + t] : x[t];
        session_run(s, order, TEXTS, next, 1, NULL, NULL);
        for (size_t i = 0; i < TEXTS; i++) same = same && memcmp(session_logits(s, i), alone + (i == 2 ? t : STEPS + t) * V, V * sizeof(real)) == 0;
    }
    CHECK(same, "%s: texts side by side are not what they are alone", what);
    session_free(s);
    free_numbers();
    model_close(m);
    gsa_destroy(g);
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
                            if (w % 3 == 0) c.C = 72; /* long enough rows for the blocks of matrix_step, with a rest */
                            if (w % 3 == 1) c.C = 64;
                            snprintf(what, sizeof what, "%s, positions %d, mixer %d, covariance %d, envelope %d, window %d", maps[map].name, position, mixer, covariance, envelope, windows[w]);
                            check_decoder(&c, what);
                        }
    return test_summary("test_decode");
}
