/* What infer measures, against the definitions computed from whole forward passes in double: the loss of a text with
   and without overlapping windows, the likelihood of endings. What is read to be measured: tasks, and models of
   llm.c. What a trained model and models of known weights write. */
#define INFER_NO_MAIN
#include "network.h"

#include "../data/stories.h"

#include <ctype.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { T = 24 };
static char *folder;
static char *in_folder(const char *name) { return xasprintf("%s/%s", folder, name); }

/* A model's file, with the tokenizer in it; opened. */
static Model *model_in_file(const GSA *net, const Tokenizer *tokenizer) {
    Entry entries[NUM_TENSORS + 1];
    const void *data[NUM_TENSORS + 1];
    size_t size;
    int n = 0;
    char *path = in_folder("model.bin");
    data[n] = tokenizer_to_memory(tokenizer, &size);
    int64_t length = (int64_t)size;
    entries[n++] = checkpoint_entry("tokenizer", TYPE_BYTES, 1, &length);
    checkpoint_add_tensors(&net->config, "", net->params, entries, data, &n);
    checkpoint_write(path, CHECKPOINT_MODEL, &net->config, 1, entries, data, n);
    free((void *)data[0]);
    Model *m = model_open(path, NULL, OBJECTIVE_LM);
    free(path);
    return m;
}

static double formula_loss(const real *logits, size_t V, int target, bool *likeliest) {
    double most = -INFINITY, sum = 0;
    for (size_t v = 0; v < V; v++) most = fmax(most, (double)logits[v]);
    for (size_t v = 0; v < V; v++) sum += exp((double)logits[v] - most);
    size_t best = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (likeliest) *likeliest = (int)best == target;
    return most + log(sum) - (double)logits[target];
}

/* ---------------------------------------------------------------------- the loss of a text */

/* What measure_losses makes of tokens in a shard. */
static Losses losses_of(const Model *m, const int *tokens, size_t count, size_t stride, size_t batch) {
    char *path = in_folder("losses.bin");
    ShardWriter *w = shard_create(path);
    for (size_t i = 0; i < count; i++) {
        uint16_t token = (uint16_t)tokens[i];
        shard_append(w, &token, 1);
    }
    shard_close(w);
    TokenSource *source = source_open(path, m->tokenizer);
    Losses l = measure_losses(m, source, stride, batch);
    source_close(source);
    free(path);
    return l;
}

static void check_losses(const Model *m, GSA *net, const int *tokens, size_t count, size_t stride, size_t batch,
                         const char *what) {
    size_t Vp = (size_t)net->config.Vp, V = (size_t)net->config.V, rows = 0;
    double *loss = (double *)xmalloc(count * sizeof *loss), sum = 0, by_row[POSITIONS] = {0}, squares[POSITIONS] = {0},
           counts[POSITIONS] = {0}, worst = 0, square = 0;
    Losses l = losses_of(m, tokens, count, stride, batch);
    for (size_t i = 1; i < count; i++) { /* token i, from the first window that reaches it */
        size_t begin = 0;
        while (begin + T < i) begin += stride;
        gsa_forward(net, tokens + begin, NULL, 1, i - begin);
        loss[i - 1] = formula_loss(net->a.logits + (i - begin - 1) * Vp, V, tokens[i], NULL);
        sum += loss[i - 1];
        size_t row = 0;
        while ((size_t)2 << row <= i - begin) row++;
        by_row[row] += loss[i - 1];
        squares[row] += loss[i - 1] * loss[i - 1];
        counts[row]++;
    }
    CHECK(l.predictions == count - 1 && fabs(l.sum - sum) <= 1e-6 * sum, "%s: loss %.9g, by definition %.9g", what,
          l.sum, sum);
    for (size_t row = 0; row < POSITIONS; row++) {
        if (l.position[row].count != counts[row]) worst = INFINITY;
        if (!counts[row]) continue;
        rows++;
        double mean = by_row[row] / counts[row],
               error = counts[row] > 1 ? sqrt((squares[row] / counts[row] - mean * mean) / (counts[row] - 1)) : 0;
        worst = fmax(worst, fabs(mean_value(&l.position[row]) - mean) + fabs(mean_error(&l.position[row]) - error));
    }
    CHECK(worst <= 1e-5 && rows >= 4, "%s: %zu rows of the table, off by %g", what, rows, worst);
    size_t stretches = (count - 2) / T + 1;
    for (size_t k = 0; k < stretches; k++) {
        double beyond = 0;
        for (size_t i = k * T; i < (k + 1) * T && i < count - 1; i++) beyond += loss[i] - sum / (double)(count - 1);
        square += beyond * beyond;
    }
    double n = (double)stretches, error = n > 1 ? sqrt(square * n / (n - 1)) / (double)(count - 1) : 0;
    CHECK(l.stretches == stretches && fabs(l.error - error) <= 1e-5 * error + 1e-12,
          "%s: the standard error of %zu stretches is %g, by definition %g", what, l.stretches, l.error, error);
    size_t bytes = 0, length;
    for (size_t i = 1; i < count; i++)
        if (tokens[i] != tokenizer_eot(m->tokenizer)) {
            tokenizer_piece(m->tokenizer, tokens[i], &length);
            bytes += length;
        }
    CHECK(l.bytes == (double)bytes, "%s: %g bytes, not %zu", what, l.bytes, bytes);
    free(loss);
}

/* ---------------------------------------------------------------------- tasks */

static const char tasks_text[] =
    "{\"ctx\": \"One day, Mia saw a\", \"endings\": [\"bird.\", \"big dog in the sun.\", \"x\"], \"label\": 1, "
    "\"split\": \"val\"}\n"
    "\n"
    "  {\"text\":\"Tom had a red ball. He liked the red ball\"}\r\n"
    "{\"endings\":[\" kite\",\"kite\"],\"ctx\":\"A \\\"blue\\\"\\n\",\"label\":\"0\"}\n"
    "{\"text\":\"So\\nlong \"}\n"
    "{\"ctx\":\"\",\"endings\":[\"a\",\"b\",\"\\u00e9t\\u00e9 \\ud83d\\ude00\"],\"label\":2}\n"
    "{\"ctx\":\"Once upon a time there was a very long story that nobody could keep in mind and that went on and on "
    "and on\",\"endings\":[\"for ever.\",\"and on\"],\"label\":1}\n"
    "{\"text\":\"He told it again and again and again, and he told it over and over, until nobody in the house or in "
    "the town wanted to hear it\"}";

static Task *read_these(const char *text, size_t *count) {
    char *path = xasprintf("%s/tasks.jsonl", folder);
    FILE *f = xfopen(path, "wb");
    xfwrite(text, 1, strlen(text), f, path);
    fclose(f);
    Task *tasks = tasks_read(path, count);
    free(path);
    return tasks;
}

static Task *read_tasks(size_t *count) { return read_these(tasks_text, count); }

/* Context and ending are the text, byte for byte, and the space before a word goes with it. */
static void test_white_space(void) {
    static const struct {
        const char *json, *context, *ending;
    } words[] = {{"{\"text\":\"a red  ball\"}", "a red ", " ball"},
                 {"{\"text\":\"a red\\t ball\\n\"}", "a red\t", " ball"},
                 {"{\"text\":\"a red \\tball \"}", "a red \t", "ball"},
                 {"{\"text\":\" red ball\"}", " red", " ball"},
                 {"{\"ctx\":\"a red \",\"endings\":[\"ball\",\" x\"],\"label\":0}", "a red", " ball"},
                 {"{\"ctx\":\"a red \",\"endings\":[\" ball\",\"x\"],\"label\":0}", "a red", "  ball"},
                 {"{\"ctx\":\"a red  \",\"endings\":[\"ball\",\"x\"],\"label\":0}", "a red ", " ball"},
                 {"{\"ctx\":\"a red\\t\",\"endings\":[\"ball\",\"x\"],\"label\":0}", "a red\t", "ball"},
                 {"\xEF\xBB\xBF{\"ctx\":\"a red\",\"endings\":[\"ball\",\"x\"],\"label\":0}", "a red", " ball"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t count;
        Task *t = read_these(words[i].json, &count);
        CHECK(count == 1 && strcmp(t->context, words[i].context) == 0 && strcmp(t->endings[0], words[i].ending) == 0,
              "%s became '%s' and '%s'", words[i].json, t->context, t->endings[0]);
        tasks_free(t, count);
    }
}

static void test_reading(void) {
    size_t count;
    Task *t = read_tasks(&count);
    if (!CHECK(count == 7, "%zu tasks", count)) return;
    CHECK(t[0].line == 1 && t[1].line == 3 && t[6].line == 8, "lines are counted from 1, blank ones too");
    CHECK(!t[0].last_word && t[0].count == 3 && t[0].label == 1 && strcmp(t[0].context, "One day, Mia saw a") == 0,
          "a choice");
    CHECK(strcmp(t[0].endings[0], " bird.") == 0 && t[0].bytes[0] == 5, "an ending gets a space, which is not counted");
    CHECK(t[1].last_word && t[1].count == 1 && t[1].label == 0 && strcmp(t[1].endings[0], " ball") == 0 &&
              t[1].bytes[0] == 4,
          "a last word");
    CHECK(strcmp(t[1].context, "Tom had a red ball. He liked the red") == 0, "and what stands before it");
    CHECK(t[2].label == 0 && strcmp(t[2].endings[0], " kite") == 0 && strcmp(t[2].endings[1], "kite") == 0 &&
              strcmp(t[2].context, "A \"blue\"\n") == 0,
          "no second space; a label as text");
    CHECK(strcmp(t[3].context, "So\n") == 0 && strcmp(t[3].endings[0], "long") == 0, "a word behind a newline");
    CHECK(t[4].context[0] == 0 && strcmp(t[4].endings[2], " \xC3\xA9t\xC3\xA9 \xF0\x9F\x98\x80") == 0,
          "no context; escapes");
    tasks_free(t, count);
}

static void check_scores(const Model *m, GSA *net, const char *what) {
    size_t count, V = (size_t)net->config.V, Vp = (size_t)net->config.Vp, cut = 0;
    Task *tasks = read_tasks(&count);
    double right = 0, normalised = 0, chance = 0, words = 0, likelihoods = 0, choices = 0, last_words = 0, worst = 0;
    Session *s = session_create(m, 3, T);
    for (size_t i = 0; i < count; i++) {
        const Task *t = &tasks[i];
        double likelihood[TASK_ENDINGS_MAX], expected[TASK_ENDINGS_MAX], best = -INFINITY, best_per_byte = -INFINITY;
        bool greedy[TASK_ENDINGS_MAX], all[TASK_ENDINGS_MAX];
        int answer = 0, answer_per_byte = 0;
        size_t longest = 0;
        score_task(m, s, t, "tasks", likelihood, greedy);
        for (int pass = 0; pass < 2; pass++)
            for (int e = 0; e < t->count; e++) {
                int *ids = NULL;
                size_t n = 0, room = 0, context;
                tokenizer_encode(m->tokenizer, "", 0, false, &ids, &n, &room);
                int start = tokenizer_eot(m->tokenizer);
                tokenizer_encode(m->tokenizer, t->context, strlen(t->context), false, &ids, &n, &room);
                context = n;
                tokenizer_encode(m->tokenizer, t->endings[e], strlen(t->endings[e]), false, &ids, &n, &room);
                if (n - context > longest) longest = n - context;
                if (pass == 1) {
                    /* with the start in front, T tokens fit before the last of the longest */
                    size_t skip = context + longest > T ? context + longest - T : 0;
                    int x[2 * T];
                    cut += skip > 0;
                    x[0] = start;
                    memcpy(x + 1, ids, (n < 2 * T - 1 ? n : 2 * T - 1) * sizeof *x);
                    size_t length = n - skip;
                    if (skip) memcpy(x, ids + skip - 1, (length + 1) * sizeof *x);
                    gsa_forward(net, x, NULL, 1, length);
                    expected[e] = 0;
                    all[e] = true;
                    for (size_t p = context - skip; p < length; p++) {
                        bool likeliest;
                        expected[e] -= formula_loss(net->a.logits + p * Vp, V, x[p + 1], &likeliest);
                        all[e] = all[e] && likeliest;
                    }
                    worst = fmax(worst, fabs(expected[e] - likelihood[e]));
                    CHECK(greedy[e] == all[e], "%s: line %d, ending %d: greedy", what, t->line, e);
                    if (expected[e] > best) {
                        best = expected[e];
                        answer = e;
                    }
                    if (expected[e] / (double)t->bytes[e] > best_per_byte) {
                        best_per_byte = expected[e] / (double)t->bytes[e];
                        answer_per_byte = e;
                    }
                }
                free(ids);
            }
        if (t->last_word) {
            last_words++;
            words += all[0];
            likelihoods += expected[0];
        } else {
            choices++;
            right += answer == t->label;
            normalised += answer_per_byte == t->label;
            chance += 1.0 / t->count;
        }
    }
    session_free(s);
    CHECK(worst <= 1e-4 && cut == 7, "%s: log-likelihoods are off by %g; %zu contexts were cut", what, worst, cut);
    Scores got = score_tasks(m, tasks, count, "tasks");
    CHECK(got.choice.count == choices && got.choice.sum == right && got.normalised.sum == normalised &&
              fabs(got.chance.sum - chance) < 1e-12,
          "%s: %g of %g choices, %g by byte; expected %g, %g", what, got.choice.sum, got.choice.count,
          got.normalised.sum, right, normalised);
    CHECK(got.word.count == last_words && got.word.sum == words && fabs(got.likelihood.sum - likelihoods) <= 1e-3,
          "%s: %g last words, likelihood %g; expected %g, %g", what, got.word.sum, got.likelihood.sum, words,
          likelihoods);
    double p = right / choices;
    CHECK(fabs(mean_error(&got.choice) - sqrt(p * (1 - p) / (choices - 1))) <= 1e-12,
          "%s: the standard error of a share", what);
    tasks_free(tasks, count);
}

/* ---------------------------------------------------------------------- a trained model */

/* Runs one of the programs, its output to files; the most memory that it had at once, in KiB, or -1 where it failed. */
static long run(const char *program, char **argv, const char *out, const char *errors) {
    char *path = xasprintf("./%s%s", getenv("OUT") ? getenv("OUT") : "", program);
    struct rusage used;
    int status = -1;
    argv[0] = path;
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) die("cannot fork");
    if (pid == 0) {
        if (!freopen(out, "wb", stdout) || !freopen(errors, "wb", stderr)) _exit(127);
        execv(path, argv);
        _exit(127);
    }
    if (wait4(pid, &status, 0, &used) != pid) die("cannot wait for %s", path);
    CHECK(status == 0, "%s %s ended with status %d; its words are in %s", path, argv[1], status, errors);
    free(path);
    return status == 0 ? used.ru_maxrss : -1;
}

/* A small model of windows and linear splats learns made-up stories; it writes 100,000 tokens in the memory that
   1,000 take, all of them text; rounded to int8 it predicts as well. Comes before all else: a process counts what
   the one that it was forked from had as its own. */
static void test_trained(void) {
    char *model = in_folder("trained/model_00000400.bin"), *small = in_folder("int8.bin"),
         *text = in_folder("text.txt"), *out = in_folder("out"), *errors = in_folder("errors"),
         *runs = in_folder("trained");
#define WORD(text) (char *)text
    char *training[] = {NULL,           WORD("--layers"),
                        WORD("2"),      WORD("--heads"),
                        WORD("2"),      WORD("--channels"),
                        WORD("32"),     WORD("--seq"),
                        WORD("32"),     WORD("--vocab"),
                        WORD("300"),    WORD("--attention"),
                        WORD("hybrid"), WORD("--mixer"),
                        WORD("linear"), WORD("--window"),
                        WORD("8"),      WORD("--batch"),
                        WORD("8"),      WORD("--steps"),
                        WORD("400"),    WORD("--lr"),
                        WORD("5e-3"),   WORD("--warmup"),
                        WORD("20"),     WORD("--eval-every"),
                        WORD("0"),      WORD("--sample-every"),
                        WORD("0"),      WORD("--threads"),
                        WORD("1"),      WORD("--out"),
                        runs,           NULL};
    run("train_gsa", training, out, errors);
    long peak[2];
    char many[] = "100000";
#ifdef __SANITIZE_ADDRESS__
    strcpy(many, "20000"); /* a minute less; what is not freed at the end is found besides */
    setenv("ASAN_OPTIONS", "quarantine_size_mb=1", 1); /* freed memory that the sanitizer keeps */
#endif
    for (int i = 0; i < 2; i++) {
        char *writing[] = {NULL,
                           WORD("generate"),
                           model,
                           WORD("--endless"),
                           WORD("--tokens"),
                           i ? many : WORD("1000"),
                           WORD("--seed"),
                           WORD("3"),
                           WORD("--threads"),
                           WORD("1"),
                           NULL};
        peak[i] = run("infer", writing, out, errors);
    }
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    CHECK(peak[0] > own.ru_maxrss, "what the program had at once, %ld KiB, cannot be told from the test's own %ld",
          peak[0], own.ru_maxrss);
    CHECK(peak[1] - peak[0] < 1024, "1,000 tokens took %ld KiB, %s took %ld", peak[0], many, peak[1]);
    size_t bytes, letters = 0, strange = 0, n;
    char *written = read_file(out, &bytes), *said = read_file(errors, &n);
    for (size_t i = 0; i < bytes; i++) {
        letters += (written[i] >= 'a' && written[i] <= 'z') || written[i] == ' ';
        strange += (unsigned char)written[i] >= 0x80;
    }
    CHECK(strtol(strchr(said, ';') ? strchr(said, ';') + 1 : "", NULL, 10) == atol(many), "the program says: %s", said);
    CHECK(bytes > (size_t)atol(many) && (double)letters > 0.8 * (double)bytes && strange < bytes / 1000,
          "of %zu bytes %zu are letters or spaces, %zu no ASCII", bytes, letters, strange);
    free(written);
    free(said);

    char *rounding[] = {NULL, WORD("quantize"), model, small, WORD("--type"), WORD("int8"), NULL};
    run("infer", rounding, out, errors);
    double perplexity[2];
    char *story = stories(9, 40000, &bytes);
    FILE *f = xfopen(text, "wb");
    xfwrite(story, 1, bytes, f, text);
    fclose(f);
    for (int i = 0; i < 2; i++) {
        Model *m = model_open(i ? small : model, NULL, OBJECTIVE_LM);
        CHECK(m->matrix[TENSOR_fcw].type == (i ? TYPE_I8 : TYPE_F32), "the type of the weights");
        TokenSource *source = source_open(text, m->tokenizer);
        Losses l = measure_losses(m, source, (size_t)m->net.config.T, 8);
        perplexity[i] = exp(l.sum / (double)l.predictions);
        source_close(source);
        model_close(m);
    }
    CHECK(perplexity[0] < 20 && fabs(perplexity[1] / perplexity[0] - 1) < 0.001,
          "perplexity %.4f in fp32 of a vocabulary of 300, %.4f in int8", perplexity[0], perplexity[1]);
    free(model);
    free(small);
    free(text);
    free(out);
    free(errors);
    free(runs);
    free(story);
}

/* Perplexity of a shard takes the same memory however long it is. */
static void check_memory(const Tokenizer *tokenizer) {
    char *model = in_folder("model.bin"), *shard = in_folder("long.bin"), *out = in_folder("out"),
         *errors = in_folder("errors");
    char *arguments[] = {NULL, WORD("perplexity"), model, shard, WORD("--threads"), WORD("1"), NULL};
    long peak[2];
    for (int i = 0; i < 2; i++) {
        ShardWriter *w = shard_create(shard);
        for (int k = 0; k < (i ? 200000 : 2000); k++) {
            uint16_t token = (uint16_t)(k % tokenizer_vocab_size(tokenizer));
            shard_append(w, &token, 1);
        }
        shard_close(w);
        peak[i] = run("infer", arguments, out, errors);
    }
    CHECK(peak[0] > 0 && peak[1] > 0 && peak[1] - peak[0] < 500,
          "perplexity of 2,000 tokens took %ld KiB, of 200,000 %ld", peak[0], peak[1]);
    free(model);
    free(shard);
    free(out);
    free(errors);
}

/* ---------------------------------------------------------------------- golden texts */

/* What `infer generate MODEL "One day" --temperature 0 --tokens 16` writes with a scattered model whose tokens that
   are no plain letters have no logits: the same with every compiler and CPU, as the likeliest token is always ahead
   by far more than rounding. */
static void check_golden(const Config *c, const Tokenizer *tokenizer, uint64_t seed, const char *kind,
                         const char *expected) {
    enum { START = 8, TOKENS = 16 };
    GSA *net = scattered_model(c, 1, seed);
    int ids[T] = {tokenizer_eot(tokenizer)}, *prompt = NULL;
    size_t bytes, count = 0, room = 0;
    for (int v = 0; v < c->V; v++) {
        const char *piece = tokenizer_piece(tokenizer, v, &bytes);
        for (size_t k = 0; k < bytes; k++)
            if (!isalpha((unsigned char)piece[k]) && piece[k] != ' ')
                memset(net->p.wte + (size_t)v * (size_t)c->C, 0, (size_t)c->C * sizeof(real));
    }
    Model *m = model_in_file(net, tokenizer);
    char *path = in_folder("model.bin"), *out = in_folder("out"), *errors = in_folder("errors");
    char *arguments[] = {
        NULL, WORD("generate"), path, WORD("One day"), WORD("--temperature"), WORD("0"), WORD("--tokens"), WORD("16"),
        NULL};
    run("infer", arguments, out, errors);
    char *written = read_file(out, &bytes);
    CHECK(bytes == strlen(expected) + 1 && memcmp(written, expected, bytes - 1) == 0, "%s wrote '%.*s', not '%s'", kind,
          (int)bytes, written, expected);
    double margin = INFINITY;
    tokenizer_encode(tokenizer, "One day", 7, false, &prompt, &count, &room);
    CHECK(count < START, "the prompt has %zu tokens", count);
    memcpy(ids + 1, prompt, count++ * sizeof *ids);
    for (size_t i = 0; i < TOKENS; i++) {
        gsa_forward(net, ids, NULL, 1, count);
        const real *logits = net->a.logits + (count - 1) * (size_t)c->Vp;
        int best = 0;
        for (int v = 1; v < c->V; v++) best = logits[v] > logits[best] ? v : best;
        for (int v = 0; v < c->V; v++) margin = v == best ? margin : fmin(margin, (double)(logits[best] - logits[v]));
        ids[count++] = best;
    }
    CHECK(margin > 0.02, "%s: the likeliest token is ahead by %g only", kind, margin);
    model_close(m);
    gsa_destroy(net);
    free(prompt);
    free(path);
    free(out);
    free(errors);
    free(written);
}

/* ---------------------------------------------------------------------- llm.c */

/* A model as llm.c writes it, in fp32 (version 3) and bf16 (5), tensor by tensor in its order: what is read has the
   same numbers, or their upper halves. */
static void test_llmc(void) {
    Config c;
    const char *wrong = try_config(&c, ATTENTION_STANDARD, NULL, POSITION_LEARNED, 0, 0, 0, 0, OBJECTIVE_LM);
    if (wrong) die("%s", wrong);
    c.forget = FORGET_NONE; /* GPT-2 has none */
    GSA *m = scattered_model(&c, 1, 90);
    const ParameterTensors *p = &m->p;
    size_t L = (size_t)c.L, C = (size_t)c.C;
    const struct {
        const real *numbers;
        size_t count;
    } tensors[] = {{p->wte, (size_t)c.Vp * C},
                   {p->wpe, (size_t)c.T * C},
                   {p->ln1w, L * C},
                   {p->ln1b, L * C},
                   {p->qkvw, L * 3 * C * C},
                   {p->qkvb, L * 3 * C},
                   {p->attprojw, L * C * C},
                   {p->attprojb, L * C},
                   {p->ln2w, L * C},
                   {p->ln2b, L * C},
                   {p->fcw, L * 4 * C * C},
                   {p->fcb, L * 4 * C},
                   {p->fcprojw, L * C * 4 * C},
                   {p->fcprojb, L * C},
                   {p->lnfw, C},
                   {p->lnfb, C}};
    for (int version = 3; version <= 5; version += 2) {
        char *path = xasprintf("%s/llmc.bin", folder);
        FILE *f = xfopen(path, "wb");
        int32_t header[256] = {20240326, version, c.T, c.V, c.L, c.NH, c.C, c.Vp};
        xfwrite(header, sizeof header, 1, f, path);
        for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
            for (size_t k = 0; k < tensors[i].count; k++) {
                uint32_t bits;
                memcpy(&bits, &tensors[i].numbers[k], 4);
                uint16_t upper = (uint16_t)(bits >> 16);
                if (version == 3) xfwrite(&bits, 4, 1, f, path);
                else xfwrite(&upper, 2, 1, f, path);
            }
        fclose(f);
        Checkpoint *k = checkpoint_open(path, CHECKPOINT_MODEL);
        Config same = c;
        same.S = 0; /* of no meaning without splats */
        checkpoint_match(k, &same);
        float *params = (float *)xcalloc(m->total, sizeof *params);
        checkpoint_read_tensors(k, "", params);
        size_t differences = 0;
        for (size_t i = 0; i < m->total; i++) {
            uint32_t expected, got;
            memcpy(&expected, &m->params[i], 4);
            memcpy(&got, &params[i], 4);
            differences += got != (version == 3 ? expected : expected & 0xFFFF0000u);
        }
        CHECK(differences == 0, "llm.c's version %d: %zu of %zu numbers differ", version, differences, m->total);
        CHECK(!checkpoint_has(k, "tokenizer"), "it holds no tokenizer");
        checkpoint_close(k);
        free(params);
        free(path);
    }
    gsa_destroy(m);
}

/* What damaged files have brought to light. */
static void test_found(void) {
    Config c;
    const char *wrong = try_config(&c, ATTENTION_AUGMENT, NULL, POSITION_ROPE, MIXER_SOFTMAX, COVARIANCE_ISO,
                                   ENVELOPE_COSINE, 0, OBJECTIVE_LM);
    CHECK(!wrong, "augment: %s", wrong);
    c.extra = INT32_MAX;
    wrong = config_check(&c);
    CHECK(wrong && strstr(wrong, "--heads"), "more heads than a number holds: %s", wrong);
    Stream o;
    memset(&o, 0, sizeof o);
    stream_release(&o, 0, true);
    CHECK(o.ready_bytes == 0 && o.held_bytes == 0, "a text without a token");
}

int main(int argc, char **argv) {
    (void)argc;
    program_name(argv[0]);
    char name[] = "/tmp/test_infer.XXXXXX";
    folder = mkdtemp(name);
    if (!folder) die("cannot make a folder in /tmp");
    test_trained();
    size_t bytes;
    char *text = stories(1, 20000, &bytes);
    Tokenizer *tokenizer = tokenizer_train(text, bytes, 300, false);
    free(text);
    test_reading();
    test_white_space();
    test_llmc();
    test_found();

    static const struct {
        const char *name;
        int attention, position, mixer, envelope, window;
        uint64_t seed; /* of a model whose greedy text is stored */
        const char *golden;
    } kinds[] = {{"standard, learned", ATTENTION_STANDARD, POSITION_LEARNED, MIXER_SOFTMAX, ENVELOPE_NONE, 0, 373,
                  "One daynHZbuVkeHZURhJbDD"},
                 {"hybrid", ATTENTION_HYBRID, POSITION_ROPE, MIXER_SOFTMAX, ENVELOPE_COSINE, 0, 919,
                  "One dayW faren dH fh sr fll srH f"},
                 {"window and linear", ATTENTION_HYBRID, POSITION_ROPE, MIXER_LINEAR, ENVELOPE_RAISED, 5, 28,
                  "One day Tn tenraraxayJis f ttjtt"},
                 {"extend", ATTENTION_EXTEND, POSITION_BOTH, MIXER_LINEAR, ENVELOPE_RAISED, 7, 278,
                  "One dayreadGinminbuuujjBininA"}};
    uint64_t rng = 7;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        Config c;
        int tokens[200];
        const char *wrong = try_config(&c, kinds[i].attention, NULL, kinds[i].position, kinds[i].mixer, COVARIANCE_ISO,
                                       kinds[i].envelope, kinds[i].window, OBJECTIVE_LM);
        if (wrong) die("%s", wrong);
        c.gain = GAIN_NONE; /* these texts are older than gains, phases, learned rotations and forget gates */
        c.phase = PHASE_NONE;
        c.rope = ROPE_FIXED;
        c.forget = FORGET_NONE;
        c.T = T;
        c.V = tokenizer_vocab_size(tokenizer);
        c.Vp = 384;
        GSA *net = scattered_model(&c, 1, 70 + i);
        Model *m = model_in_file(net, tokenizer);
        random_tokens(tokens, 200, net->config.V, &rng);
        static const size_t counts[] = {200, 2 * T + 1, 17}, strides[] = {T, 1, 7, T - 1}, batches[] = {8, 3, 1, 100};
        for (size_t a = 0; a < 3; a++)
            for (size_t b = 0; b < 4; b++) {
                char what[128];
                snprintf(what, sizeof what, "%s, %zu tokens, stride %zu, batch %zu", kinds[i].name, counts[a],
                         strides[b], batches[(a + b) % 4]);
                check_losses(m, net, tokens, counts[a], strides[b], batches[(a + b) % 4], what);
            }
        check_scores(m, net, kinds[i].name);
        if (i == 0) check_memory(tokenizer);
        check_golden(&c, tokenizer, kinds[i].seed, kinds[i].name, kinds[i].golden);
        model_close(m);
        gsa_destroy(net);
    }
    tokenizer_free(tokenizer);
    char *path = xasprintf("rm -rf %s", folder);
    if (system(path) != 0) warn("%s is left behind", folder);
    free(path);
    return test_summary("test_infer");
}
