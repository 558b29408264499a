/* What splats mean: information against tables by hand, snippets and typical tokens against what was put in, classes of
   tokens of a text whose classes are known, contributions by distance against equation (3) written out. */
#include "test.h"

#include "../gsa/look/classes.h"
#include "../gsa/look/splats.h"

static void test_information(void) {
    enum { N = 12000 };
    static int a[N], b[N], c[N];
    uint64_t rng = 5;
    for (int i = 0; i < N; i++) {
        a[i] = i % 4;
        b[i] = i % 2;                   /* known from a: ln 2 */
        c[i] = (int)rng_below(&rng, 3); /* independent of a */
    }
    CHECK(fabs(mutual_information(a, 4, b, 2, N) - log(2)) < 1e-12, "half of a: %.6f",
          mutual_information(a, 4, b, 2, N));
    CHECK(fabs(mutual_information(a, 4, a, 4, N) - log(4)) < 1e-12, "a itself: %.6f",
          mutual_information(a, 4, a, 4, N));
    double chance = shuffled_information(a, 4, b, 2, N, 20, 1), expected = 3.0 / (2 * N); /* (A-1)(B-1) / 2N */
    CHECK(chance > 0.4 * expected && chance < 2 * expected, "by chance %.2e, expected %.2e", chance, expected);
    CHECK(mutual_information(a, 4, c, 3, N) < 20 * 6.0 / (2 * N), "independent: %.2e",
          mutual_information(a, 4, c, 3, N));
    /* p = (1/2, 1/4; 0, 1/4): ln 2 / 2 + ln(2/3) / 4 ... by hand */
    int x[4] = {0, 0, 0, 1}, y[4] = {0, 0, 1, 1};
    double by_hand = 0.5 * log(0.5 / (0.75 * 0.5)) + 0.25 * log(0.25 / (0.75 * 0.5)) + 0.25 * log(0.25 / (0.25 * 0.5));
    CHECK(fabs(mutual_information(x, 2, y, 2, 4) - by_hand) < 1e-12, "four tokens: %.6f, not %.6f",
          mutual_information(x, 2, y, 2, 4), by_hand);
}

static void test_tokens(void) {
    /* splat 1 has much of token 7, of token 3 only once, and of token 5 never the most */
    int tokens[20], ids[4], owner[20];
    float r[20 * 2];
    size_t places[20];
    for (int i = 0; i < 20; i++) {
        tokens[i] = i % 4 == 0 ? 7 : i % 4 == 1 ? 5 : 2;
        r[2 * i + 1] = tokens[i] == 7 ? 0.7f + 0.01f * (float)i : tokens[i] == 5 ? 0.45f : 0.1f;
    }
    tokens[18] = 3;
    r[2 * 18 + 1] = 0.99f;
    for (int i = 0; i < 20; i++) r[2 * i] = 1 - r[2 * i + 1];
    size_t count = splat_tokens(r, tokens, 20, 2, 1, 9, 4, ids);
    CHECK(count >= 2 && ids[0] == 7, "typical tokens: %zu, first %d: often seen before seen once", count, ids[0]);
    for (size_t i = 0; i < count; i++) CHECK(ids[i] != 2, "token 2 is below the mean, and typical");
    count = splat_places(r, tokens, 20, 2, 1, 2, 20, places);
    CHECK(count == 3 && places[0] == 18 && places[1] == 16 && places[2] == 12, "%zu places: %zu, %zu, %zu", count,
          places[0], places[1], places[2]);
    count = splat_places(r, tokens, 20, 2, 1, 9, 20, places);
    CHECK(count == 6, "%zu places where it is the strongest", count);
    strongest_splats(r, 20, 2, owner);
    for (int i = 0; i < 20; i++) CHECK(owner[i] == (tokens[i] == 7 || tokens[i] == 3), "owner of place %d", i);
}

static void test_bins(void) {
    size_t first[DISTANCE_BINS], bins = distance_bins(20, first);
    static const size_t want[] = {0, 1, 2, 3, 4, 6, 8, 12, 16, 20};
    CHECK(bins == 9 && memcmp(first, want, sizeof want) == 0, "%zu bins below 20", bins);
    CHECK(distance_bins(1, first) == 1 && first[1] == 1, "one distance");
    CHECK(distance_bins(1u << 31, first) < DISTANCE_BINS, "room for the longest text");
}

static void test_classes(int kind, const char *text, const char *const *want) {
    Tokenizer *t = tokenizer_train("the the the the cat cat cat", 27, 262, false); /* bytes, and a few merges */
    int *ids = NULL, count, classes[256];
    size_t n = 0, room = 0, at = 0, bytes;
    tokenizer_encode(t, text, strlen(text), true, &ids, &n, &room);
    const char *const *names = token_classes(kind, t, ids, n, classes, &count);
    /* want: a class for each run of bytes of one class, spaces with what follows them */
    for (size_t i = 0; i < n; i++) {
        if (i && classes[i] != classes[i - 1]) at++;
        CHECK(want[at] && strcmp(names[classes[i]], want[at]) == 0, "'%.*s' of '%s' is '%s', not '%s'",
              (int)(tokenizer_piece(t, ids[i], &bytes) ? bytes : 0), tokenizer_piece(t, ids[i], &bytes), text,
              names[classes[i]], want[at] ? want[at] : "(more)");
        if (!want[at]) break;
    }
    CHECK(!want[at] || !want[at + 1], "'%s' has fewer runs", text);
    free(ids);
    tokenizer_free(t);
}

/* A text of bytes: a space is a token of its own, and belongs to nothing. */
static void test_all_classes(void) {
    static const char *const story[] = {"name", "line end", "other word", "line end",    "function word", "line end",
                                        "look", "line end", "thing",      "punctuation", "line end",      NULL};
    static const char *const english[] = {"determiner", "line end",    "-ed",         "line end",
                                          "capital",    "contraction", "line end",    "-ing",
                                          "line end",   "number",      "punctuation", NULL};
    test_classes(CLASSES_STORIES, "Mia saw a red kite.\n", story);
    test_classes(CLASSES_ENGLISH, "The wanted Bob's running 42!", english);
}

/* sum_s of head_offsets is the mean logit at a distance, by equation (3) in plain loops. */
static void test_offsets(int mixer, int envelope) {
    Config c;
    memset(&c, 0, sizeof c);
    c.T = 24;
    c.V = c.Vp = 64;
    c.L = 1;
    c.NH = 1;
    c.C = 8;
    c.position = POSITION_ROPE;
    c.attention = ATTENTION_GSA;
    c.mixer = mixer;
    c.S = 4;
    c.envelope = envelope;
    c.gsa_heads[0] = 1;
    CHECK(!config_check(&c), "%s", config_check(&c) ? config_check(&c) : "");
    enum { T = 24, d = 8, S = 4 };
    Tensor tensors[NUM_TENSORS];
    float *p = (float *)xmalloc(model_tensors(&c, tensors) * sizeof *p), q[T * d], k[T * d];
    model_start(&c, p, 3);
    uint64_t rng = 9;
    for (int i = 0; i < T * d; i++) q[i] = (float)rng_normal(&rng);
    for (int i = 0; i < T * d; i++) k[i] = (float)rng_normal(&rng);
    double got[S * T] = {0}, want[S * T] = {0};
    HeadWeights *w = head_weights_open(&c, p, 0, 0, q, k, NULL, T);
    head_offsets(w, got);
    head_weights_close(w);
    for (int i = 0; i < T; i++) {
        double row[S * T], total = 0;
        for (int j = 0; j <= i; j++)
            for (int s = 0; s < S; s++) {
                double a = exp((double)p[tensors[TENSOR_log_alpha].offset + s]), e = 1;
                for (int side = 0; side < 2; side++) {
                    const float *x = side ? k + j * d : q + i * d, *mu = p + tensors[TENSOR_mu].offset + s * d;
                    double square = 1e-6, apart = 0;
                    for (int n = 0; n < d; n++) square += (double)x[n] * x[n];
                    for (int n = 0; n < d; n++) apart += pow(x[n] / sqrt(square) - mu[n], 2);
                    a *= exp(-0.5 * exp((double)p[tensors[TENSOR_log_precision].offset + s]) * apart);
                }
                double theta = exp((double)p[tensors[TENSOR_log_theta].offset + s]);
                if (envelope == ENVELOPE_COSINE) e = cos(theta * (i - j));
                if (envelope == ENVELOPE_RAISED)
                    e = exp(-exp((double)p[tensors[TENSOR_log_delta].offset + s]) * (i - j)) *
                        (1 + cos(theta * (i - j))) / 2;
                total += row[s * T + j] = a * e;
            }
        for (int j = 0; j <= i; j++)
            for (int s = 0; s < S; s++)
                want[s * T + i - j] += row[s * T + j] / (mixer == MIXER_LINEAR ? total : 1) / (T - (i - j));
    }
    double error = relative_error_double(got, want, S * T);
    CHECK(error < 1e-5, "contributions by distance, mixer %d: error %.2e", mixer, error);
    free(p);
}

/* Partners: the largest first, of equal ones the first, none below 1 %. */
static void test_partners(void) {
    Config c;
    memset(&c, 0, sizeof c);
    c.S = 6;
    SplatStudy a = {.config = c};
    double met[2 * 6 * 6] = {0};
    static const double of_splat[6] = {5, 0.5, 40, 0, 40, 14.5}; /* in percent */
    memcpy(met + (1 * 6 + 4) * 6, of_splat, sizeof of_splat);
    a.met = met;
    int splats[6];
    float shares[6];
    size_t count = splat_partners(&a, 1, 4, 6, splats, shares);
    CHECK(count == 4 && splats[0] == 2 && splats[1] == 4 && splats[2] == 5 && splats[3] == 0,
          "%zu partners: %d %d %d %d", count, splats[0], splats[1], splats[2], splats[3]);
    CHECK(fabs((double)shares[0] - 0.4) < 1e-6 && fabs((double)shares[3] - 0.05) < 1e-6, "shares %g and %g",
          (double)shares[0], (double)shares[3]);
    CHECK(splat_partners(&a, 1, 4, 2, splats, shares) == 2, "no more than are asked for");
    CHECK(splat_partners(&a, 0, 0, 6, splats, shares) == 0, "a splat that no query has any of has none");
}

int main(void) {
    test_information();
    test_tokens();
    test_bins();
    test_all_classes();
    test_partners();
    test_offsets(MIXER_SOFTMAX, ENVELOPE_COSINE);
    test_offsets(MIXER_LINEAR, ENVELOPE_RAISED);
    return test_summary("splats");
}
