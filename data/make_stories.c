/* Writes made-up stories, separated by lines <|endoftext|>, to a file or to standard output. */
#include <stdlib.h>
#include <string.h>

#include "../gsa/flags.h"
#include "../gsa/util.h"
#include "stories.h"

static int64_t bytes = 10000000, seed = 1, first = 0;
static const char *out = NULL;

static Flag flags[] = {
    {FLAG_INT, "bytes", &bytes, 1, 1e15, "N", "stop after the story that reaches this many bytes", false},
    {FLAG_INT, "seed", &seed, 0, 9e15, "N", "another seed, other stories", false},
    {FLAG_INT, "first", &first, 0, 9e15, "INDEX", "number of the first story; story INDEX of a seed is always the same", false},
    {FLAG_TEXT, "out", &out, 0, 0, "FILE", "where to write; - is standard output", false},
    {FLAG_TEXT, NULL, NULL, 0, 0, NULL, NULL, false}};

int main(int argc, char **argv) {
    program_name(argv[0]);
    if (parse_flags(flags, argc, argv, "data/make_stories --out FILE [flags]: made-up stories, separated by lines <|endoftext|>\n\n") > 0)
        die_usage("'%s' is not a flag; --out FILE says where to write", argv[1]);
    if (!out) die_usage("--out FILE is missing; --out - writes to standard output");
    bool to_stdout = strcmp(out, "-") == 0;
    const char *path = to_stdout ? "standard output" : out;
    FILE *f = to_stdout ? stdout : create_file(out);
    int64_t written = 0, index = first;
    for (; written < bytes; index++) {
        size_t n;
        char *text = story((uint64_t)seed, (uint64_t)index, &n);
        xfwrite(text, 1, n, f, path);
        xfwrite("\n<|endoftext|>\n", 1, 15, f, path);
        written += (int64_t)n + 15;
        free(text);
        progress("stories", (double)(written < bytes ? written : bytes), (double)bytes);
    }
    if (!to_stdout) commit_file(f, out);
    else if (fflush(f) != 0) die("cannot write standard output");
    fprintf(stderr, "stories %lld to %lld of seed %lld: %lld bytes\n", (long long)first, (long long)index - 1, (long long)seed, (long long)written);
}
