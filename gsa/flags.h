/* One table of flags gives the parser, --help, the printed configuration and the settings stored in checkpoints. */
#ifndef GSA_FLAGS_H
#define GSA_FLAGS_H

#include "util.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FLAG_ROOM,   /* no flag: a heading in --help, its text in .help */
    FLAG_SWITCH, /* --name            bool *   */
    FLAG_INT,    /* --name 12         int64_t *; 10k, 5M and 2G are understood */
    FLAG_REAL,   /* --name 1e-3       double * */
    FLAG_TEXT,   /* --name anything   const char **, NULL where not given */
    FLAG_TEXTS,  /* --name anything   Texts *, may be given several times */
    FLAG_CHOICE  /* --name word       const char **, one of .choices */
} FlagKind;

typedef struct {
    const char *text[16];
    int count;
} Texts;

typedef struct {
    FlagKind kind;
    const char *name;    /* without the dashes */
    void *value;         /* holds the default before parsing */
    double low, high;    /* bounds of numbers, inclusive; checked where low < high */
    const char *choices; /* "a|b|c"; for other kinds the placeholder shown in --help, such as "FILE" */
    const char *help;
    bool given; /* set by the parser */
} Flag;

/* A table ends with an entry whose help is NULL. Parses --name value and --name=value, -o as --out; "--" ends the
   flags. Everything else is positional: stored in order at the start of argv (argv[1] ...), its number returned.
   --help prints usage and the table on stdout and exits 0; every mistake is one sentence and exit status 2. */
int parse_flags(Flag *flags, int argc, char **argv, const char *usage);

/* Sets one flag from text as the parser would; false with the sentence in error (256 bytes) where it will not do. */
bool set_flag(Flag *flag, const char *text, char *error);
Flag *find_flag(Flag *flags, const char *name); /* NULL where there is none */
/* its present value, as it could be given again; "" for a text not given */
void flag_text(const Flag *flag, char *out, size_t room);

#ifdef __cplusplus
}
#endif
#endif
