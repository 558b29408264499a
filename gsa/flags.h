/* One table of flags gives the parser, --help and the text of each value. */
#ifndef GSA_FLAGS_H
#define GSA_FLAGS_H

#include "util.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FLAG_ROOM,   /* not a flag: a heading in --help, its text in .help */
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
    const char *help;    /* a line of its own after each \n */
    bool given;          /* on the command line */
} Flag;

/* A table ends with an entry whose help is NULL. Reads --name value and --name=value, and -o as --out; "--" ends the
   flags. All other arguments are moved to argv[1], argv[2] ... in their order, and their number is returned.
   --help prints usage and the table on stdout and exits with 0; every mistake is one sentence and exit status 2. */
int parse_flags(Flag *flags, int argc, char **argv, const char *usage);

/* Sets one flag from text, by the rules of the command line, but does not make it `given`. Texts are not copied. False,
   with the sentence in error (256 bytes), where the text will not do. */
bool set_flag(Flag *flag, const char *text, char *error);
Flag *find_flag(Flag *flags, const char *name); /* NULL where there is none */
/* The present value as it could be given again; "" for a text or choice that is NULL. The caller frees it. */
char *flag_text(const Flag *flag);

#ifdef __cplusplus
}
#endif
#endif
