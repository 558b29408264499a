/* infer.c: uses a trained model: continues a prompt, measures how well the model predicts a text, or fills in masked tokens.

   The layers are those of train_gsa.c, included as they are; what is new here is decoding one token at a time with the keys' features
   and the values of all earlier tokens kept. Text goes to standard output, everything else to standard error. INFER_NO_MAIN leaves main to
   the file that includes this one. */

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* the backward pass */
#endif
#define GSA_NO_MAIN
#include "train_gsa.c"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include "gsa/checkpoint.h"
#include "gsa/flags.h"
#include "gsa/loader.h"
#include "gsa/sample.h"
#include "tokenizer/tokenizer.h"

/* ---------------------------------------------------------------------------------------------- loading */

typedef struct {
    GSA *model;
    Tokenizer *tokenizer;
} Loaded;

/* tokenizer: a file for a model that holds none, or NULL */
static Loaded load(const char *path, const char *tokenizer, size_t B, int objective) {
    Checkpoint *k = checkpoint_open(path, CHECKPOINT_MODEL);
    if (k->config.objective != objective)
        die(objective == OBJECTIVE_LM ? "%s is an encoder, trained to fill in masked tokens: use infer fill" : "%s is a decoder, trained to predict the next token: use infer generate", path);
    Loaded l;
    l.tokenizer = checkpoint_tokenizer(k, tokenizer);
    l.model = gsa_create(&k->config, B);
    checkpoint_read_tensors(k, "", l.model->params);
    checkpoint_close(k);
    return l;
}

static void unload(Loaded l) {
    gsa_destroy(l.model);
    tokenizer_free(l.tokenizer);
}

/* ---------------------------------------------------------------------------------------------- decoding */

/* What a model remembers of the tokens so far, and room for one token. */
typedef struct {
    real *keys, *values; /* (L, NH, T, HS): features of keys, values: what softmax looks back on */
    real *responses;     /* (L, NH, T, S): extend heads, phi of keys that are still near */
    real *states;        /* (L, NH, F, HS + 1): scan and extend heads, the sums over all keys that are far */
    size_t state_size;
    real *x, *norm, *qkv, *fq, *fk, *att, *fc, *waves, *weights, *logits;
    real mean, rstd;
    size_t position;     /* tokens seen */
} Decoder;

static Decoder decoder_create(const GSA *m) {
    Sizes z = config_sizes(&m->config);
    Decoder d;
    memset(&d, 0, sizeof d);
    d.state_size = 3 * z.S * (z.HS + 1);
    size_t heads = z.L * z.NH, extend = m->config.attention == ATTENTION_EXTEND, scans = m->config.mixer == MIXER_LINEAR;
    d.keys = (real *)xcalloc(2 * heads * z.T * z.HS + extend * heads * z.T * z.S + scans * heads * d.state_size, sizeof(real));
    d.values = d.keys + heads * z.T * z.HS, d.responses = d.values + heads * z.T * z.HS, d.states = d.responses + extend * heads * z.T * z.S;
    d.x = (real *)xmalloc((6 * z.C + 6 * z.A + 2 * z.G * z.S + z.NH * z.T + z.Vp) * sizeof(real));
    d.norm = d.x + z.C, d.fc = d.norm + z.C, d.qkv = d.fc + 4 * z.C, d.fq = d.qkv + 3 * z.A, d.fk = d.fq + z.A, d.att = d.fk + z.A;
    d.waves = d.att + z.A, d.weights = d.waves + 2 * z.G * z.S, d.logits = d.weights + z.NH * z.T;
    return d;
}

static void decoder_free(Decoder *d) { free(d->keys), free(d->x); }

/* out (OC) = weight (OC, C) in + bias, or += where add; a thread owns a row, so that each weight is read once */
static void matvec(real *out, const real *in, const real *weight, const real *bias, size_t C, size_t OC, bool add) {
#pragma omp parallel for if (C * OC > 65536)
    for (size_t o = 0; o < OC; o++) {
        const real *w = weight + o * C;
        real sum = bias ? bias[o] : 0;
#pragma omp simd reduction(+ : sum)
        for (size_t c = 0; c < C; c++) sum += w[c] * in[c];
        out[o] = add ? out[o] + sum : sum;
    }
}

/* Softmax attention of one head's query over the keys that it may see, up to its own; returns the logarithm of the weights' sum. */
static real decode_attention(real *o, real *w, const real *fq, const real *keys, const real *values, real scale, size_t window, size_t position, size_t HS) {
    size_t first = first_key(position, window);
    real most = -INFINITY, sum = 0;
    for (size_t j = first; j <= position; j++) {
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (size_t k = 0; k < HS; k++) dot += fq[k] * keys[j * HS + k];
        w[j] = dot * scale;
        most = w[j] > most ? w[j] : most;
    }
    for (size_t j = first; j <= position; j++) sum += w[j] = exp_real(w[j] - most);
    memset(o, 0, HS * sizeof(real));
    for (size_t j = first; j <= position; j++)
        for (size_t k = 0; k < HS; k++) o[k] += w[j] / sum * values[j * HS + k];
    return most + (real)log(sum);
}

/* One token of a scan head, or of the far part of an extend head: there the key that has just left the window enters the state. */
static void decode_scan(Decoder *d, const GSA *m, size_t l, size_t h, real *o, real *lse) {
    Sizes z = config_sizes(&m->config);
    size_t head = l * z.NH + h, HS = z.HS, late = lse ? (size_t)m->config.window : 0, skip = 0;
    const real *q = d->qkv + h * HS, *phi, *v = q + 2 * z.A;
    Splats w = head_splats(m, l, h);
    ScanHead s = scan_head_open(q, q + z.A, 3 * z.A, &w, 1, HS);
    Scan c = scan_open(&w, late, 1);
    real *N = (real *)xcalloc(HS + 1, sizeof(real)), rho;
    phi = s.k.response;
    if (lse) {
        real *responses = d->responses + head * z.T * z.S;
        memcpy(responses + d->position * z.S, phi, z.S * sizeof(real));
        skip = d->position < late;
        phi = responses + (skip ? 0 : d->position - late) * z.S, v = d->values + (head * z.T + (skip ? 0 : d->position - late)) * HS;
    }
    scan_forward(&c, N, N + HS, s.q.response, phi, v, HS, skip, false, d->states + head * d->state_size, NULL, 1, HS);
    scan_output(o, lse, &rho, N, N[HS], &w, s.key_scale, HS);
    free(N);
    scan_close(&c);
    scan_head_close(&s);
}

/* One more token; logits of what follows it into d->logits. */
static void decoder_step(Decoder *d, const GSA *m, int token) {
    Sizes z = config_sizes(&m->config);
    ParameterTensors p = m->p;
    size_t C = z.C, HS = z.HS, A = z.A;
    gsa_splat_waves(m, d->waves, 1, d->position);
    encoder_forward(d->x, &token, p.wte, p.wpe, 1, 1, C, d->position);
    for (size_t l = 0; l < z.L; l++) {
        layernorm_forward(d->norm, &d->mean, &d->rstd, d->x, p.ln1w + l * C, p.ln1b + l * C, 1, C);
        matvec(d->qkv, d->norm, p.qkvw + l * 3 * A * C, p.qkvb + l * 3 * A, C, 3 * A, false);
        features_forward(m, d->fq, d->fk, d->qkv, l, 1, 1, m->rope_waves + d->position * HS, d->waves);
#pragma omp parallel for if (d->position * A > 65536)
        for (size_t h = 0; h < z.NH; h++) {
            size_t head = l * z.NH + h;
            real *keys = d->keys + head * z.T * HS, *values = d->values + head * z.T * HS, *o = d->att + h * HS, lse = 0;
            int kind = config_head_kind(&m->config, (int)l, (int)h);
            memcpy(keys + d->position * HS, d->fk + h * HS, HS * sizeof(real));
            memcpy(values + d->position * HS, d->qkv + 2 * A + h * HS, HS * sizeof(real));
            if (kind != HEAD_SCAN) lse = decode_attention(o, d->weights + h * z.T, d->fq + h * HS, keys, values, m->scale[head], m->window[head], d->position, HS);
            if (kind == HEAD_SCAN || kind == HEAD_EXTEND) decode_scan(d, m, l, h, o, kind == HEAD_EXTEND ? &lse : NULL);
        }
        matvec(d->x, d->att, p.attprojw + l * C * A, p.attprojb + l * C, A, C, true);
        layernorm_forward(d->norm, &d->mean, &d->rstd, d->x, p.ln2w + l * C, p.ln2b + l * C, 1, C);
        matvec(d->fc, d->norm, p.fcw + l * 4 * C * C, p.fcb + l * 4 * C, C, 4 * C, false);
        gelu_forward(d->fc, d->fc, 4 * C);
        matvec(d->x, d->fc, p.fcprojw + l * 4 * C * C, p.fcprojb + l * C, 4 * C, C, true);
    }
    layernorm_forward(d->norm, &d->mean, &d->rstd, d->x, p.lnfw, p.lnfb, 1, C);
    matvec(d->logits, d->norm, p.wte, NULL, C, z.V, false);
    d->position++;
}

/* ---------------------------------------------------------------------------------------------- commands */

static void set_threads(int64_t threads) {
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads((int)threads);
#else
    if (threads > 1) die_usage("--threads %lld: this program was built without OpenMP and has one thread", (long long)threads);
#endif
}

static int generate(int argc, char **argv) {
    int64_t tokens = 0, top_k = 0, seed = 1, threads = 0;
    double temperature = 0.8, top_p = 0.95;
    const char *file = NULL, *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_TEXT, "file", &file, 0, 0, "FILE", "read the prompt from FILE; - is standard input", false},
        {FLAG_INT, "tokens", &tokens, 0, 1 << 24, NULL, "tokens to generate, at most; 0: until the end of the text or of the model's context", false},
        {FLAG_REAL, "temperature", &temperature, 0, 100, NULL, "below 1 bolder in favour of the likely; 0: always the most likely token", false},
        {FLAG_INT, "top-k", &top_k, 0, 1 << 20, NULL, "choose among the K most likely; 0: all", false},
        {FLAG_REAL, "top-p", &top_p, 1e-9, 1, NULL, "choose among the most likely that together have probability P", false},
        {FLAG_INT, "seed", &seed, 0, 9e15, NULL, "same seed, same text", false},
        {FLAG_TEXT, "tokenizer", &tokenizer, 0, 0, "FILE", "the tokenizer of a model file that holds none, as those of llm.c", false},
        {FLAG_INT, "threads", &threads, 0, 4096, NULL, "CPU threads; 0: what OpenMP chooses", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv, "usage: infer generate MODEL [PROMPT] [flags]\nContinues PROMPT; without one, starts a new text.\n");
    if (n < 1) die_usage("generate needs a model file, such as runs/default/model_00000800.bin");
    if (n > 2) die_usage("generate takes a model and one prompt; put the prompt in quotes");
    if (n == 2 && file) die_usage("give the prompt as an argument or by --file, not both");
    set_threads(threads);
    Loaded l = load(argv[1], tokenizer, 1, OBJECTIVE_LM);
    const Config *c = &l.model->config;
    size_t bytes = n == 2 ? strlen(argv[2]) : 0, count = 0, room = 0;
    char *prompt = file ? read_file(file, &bytes) : xstrdup(n == 2 ? argv[2] : "");
    while (file && bytes > 0 && prompt[bytes - 1] == '\n') bytes--; /* the newline that ends a file is not part of the sentence */
    int *ids = NULL;
    tokenizer_encode(l.tokenizer, prompt, bytes, false, &ids, &count, &room);
    int *context = (int *)xmalloc((count + 1) * sizeof *context);
    context[0] = tokenizer_eot(l.tokenizer); /* as in training: every document stands behind one */
    if (count) memcpy(context + 1, ids, count * sizeof *ids);
    if (count + 1 > (size_t)c->T) die("the prompt has %zu tokens; the model was trained for %d, one of them for the start", count, c->T);

    Sampler sampler = {temperature, (int)top_k, top_p, (uint64_t)seed};
    Decoder d = decoder_create(l.model);
    double start = now_seconds();
    for (size_t i = 0; i <= count; i++) decoder_step(&d, l.model, context[i]);
    double prefill = now_seconds() - start;
    fwrite(prompt, 1, bytes, stdout);
    int64_t made = 0;
    start = now_seconds();
    const char *why = "the number of tokens asked for";
    while (tokens == 0 || made < tokens) {
        int token = sample_token(&sampler, d.logits, c->V);
        if (token == context[0]) {
            why = "the end of the text";
            break;
        }
        const char *piece = tokenizer_piece(l.tokenizer, token, &bytes);
        fwrite(piece, 1, bytes, stdout);
        if (fflush(stdout) != 0) die("cannot write the text to standard output");
        made++;
        if (d.position == (size_t)c->T) {
            why = "the end of the model's context";
            break;
        }
        if (tokens == 0 || made < tokens) decoder_step(&d, l.model, token);
    }
    double took = now_seconds() - start;
    printf("\n");
    fprintf(stderr, "prompt %zu tokens in %.3f s; %lld tokens generated", count + 1, prefill, (long long)made);
    if (made > 1) fprintf(stderr, ", %.0f tokens/s", (double)made / took);
    fprintf(stderr, "; stopped at %s\n", why);
    decoder_free(&d);
    unload(l);
    free(prompt), free(ids), free(context);
    return 0;
}

/* The tokens of a text, each document behind its <|endoftext|> as data/prepare would write them, or those of a shard. */
static int *perplexity_tokens(const char *path, const Tokenizer *t, size_t *count) {
    size_t bytes, room = 0;
    char *text = read_file(path, &bytes);
    int *ids = NULL, eot = tokenizer_eot(t);
    int32_t magic = 0;
    *count = 0;
    if (bytes >= 4) memcpy(&magic, text, 4);
    if (magic == 20240520) {
        free(text);
        Loader *l = loader_open(path, 1, tokenizer_vocab_size(t), -1, false, 0);
        uint64_t n = loader_tokens(l);
        ids = (int *)xmalloc((n + 1) * sizeof *ids);
        int y;
        for (uint64_t i = 0; i + 1 < n; i++) loader_next(l, ids + i, &y, 1), ids[i + 1] = y;
        *count = n;
        loader_free(l);
        return ids;
    }
    static const char mark[] = "<|endoftext|>";
    for (char *at = text, *end = text + bytes; at < end;) { /* documents, without the newlines next to the marks */
        char *stop = (char *)memmem(at, (size_t)(end - at), mark, sizeof mark - 1), *next = stop ? stop + sizeof mark - 1 : end, *last = stop ? stop : end;
        while (at < last && *at == '\n') at++;
        while (last > at && last[-1] == '\n') last--;
        if (last > at) {
            if (*count + 2 > room) ids = (int *)xrealloc(ids, (room = 2 * *count + 1024) * sizeof *ids);
            ids[(*count)++] = eot;
            tokenizer_encode(t, at, (size_t)(last - at), false, &ids, count, &room);
        }
        at = next;
    }
    free(text);
    return ids;
}

static int perplexity(int argc, char **argv) {
    int64_t batch = 8, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "batch", &batch, 1, 65536, NULL, "windows per pass", false},
        {FLAG_TEXT, "tokenizer", &tokenizer, 0, 0, "FILE", "the tokenizer of a model file that holds none, as those of llm.c", false},
        {FLAG_INT, "threads", &threads, 0, 4096, NULL, "CPU threads; 0: what OpenMP chooses", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv,
                        "usage: infer perplexity MODEL FILE [flags]\n"
                        "FILE is a text, documents separated by lines <|endoftext|>, or a shard of data/prepare. It is cut into windows of the\n"
                        "model's length, each predicted from nothing but itself; the standard error is over windows.\n");
    if (n != 2) die_usage("perplexity needs a model and a file: infer perplexity MODEL FILE");
    set_threads(threads);
    Loaded l = load(argv[1], tokenizer, (size_t)batch, OBJECTIVE_LM);
    size_t T = (size_t)l.model->config.T, count;
    int *tokens = perplexity_tokens(argv[2], l.tokenizer, &count);
    if (count < 2) die("%s holds no text to predict", argv[2]);
    size_t windows = (count - 1 + T - 1) / T;
    int *x = (int *)xmalloc(2 * (size_t)batch * T * sizeof *x), *y = x + (size_t)batch * T;
    double sum = 0, bytes = 0, *loss = (double *)xmalloc(windows * sizeof *loss);
    for (size_t i = 1; i < count; i++) {
        size_t length = 0;
        if (tokens[i] != tokenizer_eot(l.tokenizer)) tokenizer_piece(l.tokenizer, tokens[i], &length);
        bytes += (double)length;
    }
    double start = now_seconds();
    for (size_t w = 0; w < windows;) {
        size_t B = 0, length = T;
        if ((w + 1) * T > count - 1) length = count - 1 - w * T; /* the last window may be shorter: a pass of its own */
        while (B < (size_t)batch && w + B < windows && (length < T ? B == 0 : (w + B + 1) * T <= count - 1)) {
            memcpy(x + B * length, tokens + (w + B) * T, length * sizeof *x);
            memcpy(y + B * length, tokens + (w + B) * T + 1, length * sizeof *y);
            B++;
        }
        gsa_forward(l.model, x, y, B, length);
        for (size_t b = 0; b < B; b++) {
            loss[w + b] = 0;
            for (size_t t = 0; t < length; t++) loss[w + b] += (double)l.model->a.losses[b * length + t];
            sum += loss[w + b];
        }
        w += B;
        progress("perplexity", (double)w, (double)windows);
    }
    double mean = sum / (double)(count - 1), square = 0;
    for (size_t w = 0; w < windows; w++) { /* deviation of a window's sum from what its length makes one expect */
        double expected = mean * (double)(w + 1 < windows ? T : count - 1 - w * T);
        square += (loss[w] - expected) * (loss[w] - expected);
    }
    if (!isfinite(mean)) die("%s gives a loss that is not finite on %s: it is not a usable model", argv[1], argv[2]);
    printf("tokens %zu, bytes %.0f, windows %zu of %zu\n", count - 1, bytes, windows, T);
    printf("loss %.6f nats per token\n", mean);
    if (windows > 1) {
        double error = sqrt(square * (double)windows / (double)(windows - 1)) / (double)(count - 1);
        printf("perplexity %.4f +- %.4f\n", exp(mean), exp(mean) * error);
    } else printf("perplexity %.4f (one window: no standard error)\n", exp(mean));
    printf("bits per byte %.5f\n", sum / log(2) / bytes);
    fprintf(stderr, "%.0f tokens/s\n", (double)(count - 1) / (now_seconds() - start));
    unload(l);
    free(tokens), free(x), free(loss);
    return 0;
}

static int fill(int argc, char **argv) {
    int64_t show = 5, threads = 0;
    const char *tokenizer = NULL;
    Flag flags[] = {
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, "flags", false},
        {FLAG_INT, "show", &show, 0, 1000, NULL, "likeliest tokens listed for each mask, on standard error", false},
        {FLAG_TEXT, "tokenizer", &tokenizer, 0, 0, "FILE", "the tokenizer of a model file that holds none, as those of llm.c", false},
        {FLAG_INT, "threads", &threads, 0, 4096, NULL, "CPU threads; 0: what OpenMP chooses", false},
        {FLAG_ROOM, NULL, NULL, 0, 0, NULL, NULL, false},
    };
    int n = parse_flags(flags, argc, argv, "usage: infer fill MODEL \"The [MASK] sat\" [flags]\nPuts the likeliest token in place of each [MASK], all at once.\n");
    if (n != 2) die_usage("fill needs a model and a text with [MASK] in it, in quotes");
    set_threads(threads);
    Loaded l = load(argv[1], tokenizer, 1, OBJECTIVE_MLM);
    const Config *c = &l.model->config;
    int *ids = NULL, mask = tokenizer_mask(l.tokenizer), masks = 0;
    size_t count = 1, room = 1024;
    ids = (int *)xmalloc(room * sizeof *ids);
    ids[0] = tokenizer_eot(l.tokenizer);
    tokenizer_encode(l.tokenizer, argv[2], strlen(argv[2]), true, &ids, &count, &room);
    for (size_t i = 0; i < count; i++) masks += ids[i] == mask;
    if (!masks) die("there is no [MASK] in the text '%.80s'", argv[2]);
    if (count > (size_t)c->T) die("the text has %zu tokens; the model was trained for %d, one of them for the start", count - 1, c->T);
    gsa_forward(l.model, ids, NULL, 1, count);
    for (size_t i = 1; i < count; i++) {
        size_t bytes;
        if (ids[i] == mask) {
            real *logits = l.model->a.logits + i * (size_t)c->Vp, most, sum = 0;
            int best = 0;
            if (mask < c->V) logits[mask] = -INFINITY; /* no answer */
            most = largest(logits, (size_t)c->V);
            for (int v = 0; v < c->V; v++) sum += exp_real(logits[v] - most);
            for (int64_t k = 0; k < (show > 1 ? show : 1) && k < c->V; k++) {
                int token = 0;
                for (int v = 1; v < c->V; v++)
                    if (logits[v] > logits[token]) token = v;
                if (k == 0) best = token;
                const char *piece = tokenizer_piece(l.tokenizer, token, &bytes);
                if (k < show) fprintf(stderr, "%s%.*s %.1f %%", k ? ", " : "mask: ", (int)bytes, piece, 100 * (double)(exp_real(logits[token] - most) / sum));
                logits[token] = -INFINITY;
            }
            if (show) fputc('\n', stderr);
            ids[i] = best;
        }
        const char *piece = tokenizer_piece(l.tokenizer, ids[i], &bytes);
        fwrite(piece, 1, bytes, stdout);
    }
    printf("\n");
    unload(l);
    free(ids);
    return 0;
}

#ifndef INFER_NO_MAIN

int main(int argc, char **argv) {
    static const char help[] = "usage: infer COMMAND MODEL ...\n"
                               "  generate MODEL [PROMPT]    continue a prompt\n"
                               "  perplexity MODEL FILE      loss, perplexity and bits per byte of a text or shard\n"
                               "  fill MODEL TEXT            put tokens in place of each [MASK] of TEXT (models of --objective mlm)\n"
                               "infer COMMAND --help lists the flags of a command.\n";
    program_name(argv[0]);
    if (argc >= 2 && strcmp(argv[1], "generate") == 0) return generate(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "perplexity") == 0) return perplexity(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "fill") == 0) return fill(argc - 1, argv + 1);
    if (argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(help, stdout);
        return 0;
    }
    fputs(help, stderr);
    if (argc >= 2) die_usage("unknown command '%s'", argv[1]);
    return 2;
}

#endif
