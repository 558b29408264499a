/* Do stories follow the grammar of data/stories_grammar.h? Reads stories separated by lines <|endoftext|>, says of each
   how many of its sentences the grammar could have made, how many contradict what the story said before (another name,
   another colour), and whether it is a copy of a training document. Exit status 0: enough sentences, no copy. */
#include <stdlib.h>

#include "../data/stories.h"
#include "../gsa/flags.h"
#include "../gsa/util.h"
#include "stories_match.h"

static double least = 0.9;
static int64_t seed = 1, count = 0;
static const char *training;

static Flag flags[] = {
    {FLAG_REAL, "min", &least, 0, 1, "SHARE", "least share of sentences that must follow the grammar", false},
    {FLAG_TEXT, "training", &training, 0, 0, "FILE", "no story may be a copy of one in this file", false},
    {FLAG_INT, "seed", &seed, 0, 9e15, "N", "with --count: no story may be a copy of one made from this seed", false},
    {FLAG_INT, "count", &count, 0, 1e9, "N", "the first N of that seed", false},
    {FLAG_TEXT, NULL, NULL, 0, 0, NULL, NULL, false}};

typedef struct {
    const char *text;
    size_t bytes;
    bool copied;
} Story;

/* The next story at *p, without white space around it; moves *p behind its separator. */
static Story next_story(const char **p, const char *end) {
    static const char separator[] = "<|endoftext|>";
    const char *from = *p, *to = (const char *)memmem(from, (size_t)(end - from), separator, strlen(separator));
    *p = to ? to + strlen(separator) : end;
    if (!to) to = end;
    while (from < to && isspace((unsigned char)*from)) from++;
    while (to > from && isspace((unsigned char)to[-1])) to--;
    return (Story){from, (size_t)(to - from), false};
}

/* A story cut off early is a copy of the document it begins like, unless it is so short that chance would do. */
static void mark_copies(Story *list, size_t n, const char *document, size_t bytes) {
    for (size_t i = 0; i < n; i++)
        if (list[i].bytes == bytes || (list[i].bytes < bytes && list[i].bytes > 200))
            if (memcmp(list[i].text, document, list[i].bytes) == 0) list[i].copied = true;
}

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv, "check_stories [flags] FILE: do these stories follow the grammar?\n\n") != 1)
        die_usage("name one file of stories, or - for standard input");
    size_t bytes, n = 0, room = 0;
    char *text = read_file(argv[1], &bytes);
    Story *list = NULL;
    for (const char *p = text, *end = text + bytes; p < end;) {
        Story s = next_story(&p, end);
        if (s.bytes == 0) continue;
        if (n == room) list = (Story *)xrealloc(list, (room = 2 * room + 16) * sizeof *list);
        list[n++] = s;
    }
    if (n == 0) die("%s has no story in it", argv[1]);

    if (training) {
        size_t training_bytes;
        char *documents = read_file(training, &training_bytes);
        for (const char *p = documents, *end = documents + training_bytes; p < end;) {
            Story s = next_story(&p, end);
            mark_copies(list, n, s.text, s.bytes);
        }
        free(documents);
    }
    for (int64_t i = 0; i < count; i++) {
        size_t got;
        char *document = story((uint64_t)seed, (uint64_t)i, &got);
        mark_copies(list, n, document, got);
        free(document);
    }

    long sentences = 0, good = 0, contradicting = 0, copies = 0;
    for (size_t i = 0; i < n; i++) {
        long its = 0, its_good = 0, its_contradicting = 0;
        Said said = nothing_said();
        const char *p = list[i].text, *end = p + list[i].bytes;
        while (p < end) {
            size_t length = sentence_length(p, (size_t)(end - p));
            its++;
            if (match_sentence(p, length, &said)) {
                its_good++;
            } else {
                Said alone = nothing_said();
                bool follows = match_sentence(p, length, &alone);
                its_good += follows;
                its_contradicting += follows;
                printf("  %s: %.*s\n", follows ? "contradicts" : "not in the grammar", (int)length, p);
            }
            for (p += length; p < end && isspace((unsigned char)*p);) p++;
        }
        printf("story %zu: %ld of %ld sentences follow the grammar, %ld contradict the story%s\n", i + 1, its_good, its,
               its_contradicting, list[i].copied ? "; a COPY of a training document" : "");
        sentences += its;
        good += its_good;
        contradicting += its_contradicting;
        copies += list[i].copied;
    }
    bool enough = (double)good >= least * (double)sentences;
    printf("%zu stories: %ld of %ld sentences (%.1f %%) follow the grammar, %ld contradict their story%s", n, good,
           sentences, 100.0 * (double)good / (double)sentences, contradicting, enough ? "" : "; too few follow it");
    if (training || count) printf("; %ld copies", copies);
    printf("\n");
    free(list);
    free(text);
    return enough && copies == 0 ? 0 : 1;
}
