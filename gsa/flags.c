#include "flags.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

Flag *find_flag(Flag *flags, const char *name) {
    for (Flag *f = flags; f->help; f++)
        if (f->kind != FLAG_ROOM && strcmp(f->name, name) == 0) return f;
    return NULL;
}

bool set_flag(Flag *f, const char *text, char *error) {
    char *end = NULL;
    double number = 0, high = f->kind == FLAG_INT ? 9e15 : INFINITY,
           low = -high; /* whole numbers up to there are exact */
    switch (f->kind) {
    case FLAG_ROOM: break;
    case FLAG_SWITCH:
        if (strcmp(text, "yes") != 0 && strcmp(text, "no") != 0) {
            snprintf(error, 256, "--%s takes no value", f->name);
            return false;
        }
        *(bool *)f->value = text[0] == 'y';
        break;
    case FLAG_INT:
    case FLAG_REAL:
        number = strtod(text, &end);
        if (end != text && f->kind == FLAG_INT && *end) {
            double unit = *end == 'k' ? 1e3 : *end == 'M' ? 1e6 : *end == 'G' ? 1e9 : 0;
            if (unit > 0) {
                number *= unit;
                end++;
            }
        }
        if (end == text || *end || isnan(number) ||
            (f->kind == FLAG_INT ? number != floor(number) : !isfinite(number))) {
            snprintf(error, 256, "--%s needs %s, not '%.60s'", f->name,
                     f->kind == FLAG_INT ? "a whole number" : "a number", text);
            return false;
        }
        if (f->low < f->high) {
            low = f->low;
            high = f->high;
        }
        if (number < low || number > high) {
            snprintf(error, 256, "--%s must be between %.16g and %.16g, not %.60s", f->name, low, high, text);
            return false;
        }
        if (f->kind == FLAG_INT) *(int64_t *)f->value = (int64_t)number;
        else *(double *)f->value = number;
        break;
    case FLAG_CHOICE:
        if (choice_index(f->choices, text) < 0) {
            snprintf(error, 256, "--%s must be one of %s, not '%.60s'", f->name, f->choices, text);
            return false;
        }
        *(const char **)f->value = text;
        break;
    case FLAG_TEXT: *(const char **)f->value = text; break;
    case FLAG_TEXTS: {
        Texts *all = (Texts *)f->value;
        if (all->count == (int)(sizeof all->text / sizeof *all->text)) {
            snprintf(error, 256, "--%s is given more than %d times", f->name, all->count);
            return false;
        }
        all->text[all->count++] = text;
        break;
    }
    }
    return true;
}

/* as short as it can be without becoming another number */
static char *number_text(double x) {
    char *text = xasprintf("%.10g", x);
    if (strtod(text, NULL) == x) return text;
    free(text);
    return xasprintf("%.17g", x);
}

char *flag_text(const Flag *f) {
    const char *text = "";
    switch (f->kind) {
    case FLAG_ROOM:
    case FLAG_TEXTS: break;
    case FLAG_SWITCH: text = *(bool *)f->value ? "yes" : "no"; break;
    case FLAG_INT: return xasprintf("%lld", (long long)*(int64_t *)f->value);
    case FLAG_REAL: return number_text(*(double *)f->value);
    case FLAG_TEXT:
    case FLAG_CHOICE: text = *(const char **)f->value ? *(const char **)f->value : ""; break;
    }
    return xstrdup(text);
}

static void print_help(const Flag *flags, const char *usage) {
    const char *const indent = "\n                               ";
    printf("%s", usage);
    for (const Flag *f = flags; f->help; f++) {
        if (f->kind == FLAG_ROOM) {
            printf("\n%s\n", f->help);
            continue;
        }
        bool takes = f->kind != FLAG_SWITCH;
        const char *placeholder = f->choices             ? f->choices
                                  : f->kind == FLAG_INT  ? "N"
                                  : f->kind == FLAG_REAL ? "X"
                                                         : "TEXT";
        char *left = xasprintf("--%s%s%s", f->name, takes ? " " : "", takes ? placeholder : "");
        printf("  %-28s %s", left, strlen(left) > 28 ? indent : "");
        for (const char *p = f->help; *p; p++)
            if (*p == '\n') printf("%s", indent);
            else putchar(*p);
        char *value = flag_text(f); /* the default; a 0 is not shown, because the text says what it stands for */
        if (takes && value[0] && strcmp(value, "0") != 0) printf(" (%s)", value);
        printf("\n");
        free(left);
        free(value);
    }
    printf("  %-28s ends the flags: what follows may begin with a dash\n", "--");
}

int parse_flags(Flag *flags, int argc, char **argv, const char *usage) {
    int positional = 0;
    bool flags_ended = false;
    for (int i = 1; i < argc; i++) {
        char *arg = argv[i];
        if (flags_ended || arg[0] != '-' || arg[1] == 0) {
            argv[1 + positional++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            flags_ended = true;
            continue;
        }
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            print_help(flags, usage);
            exit(0);
        }
        char name[64], error[256];
        const char *equals = strchr(arg, '=');
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - arg) : (int)strlen(arg), arg);
        Flag *f = strncmp(name, "--", 2) == 0 ? find_flag(flags, name + 2)
                  : strcmp(name, "-o") == 0   ? find_flag(flags, "out")
                                              : NULL;
        if (!f)
            die_usage("unknown flag %s; --help lists them all, and a text or name that begins with a dash goes behind "
                      "--",
                      name);
        if (f->given && f->kind != FLAG_TEXTS) die_usage("--%s is given twice", f->name);
        const char *text = equals ? equals + 1 : NULL;
        if (f->kind == FLAG_SWITCH) {
            if (text) die_usage("--%s takes no value", f->name);
            text = "yes";
        } else if (!text) {
            if (i + 1 == argc) die_usage("--%s needs a value; --help says which", f->name);
            text = argv[++i];
        }
        if (!*text) die_usage("--%s needs a value that is not empty; leave it out otherwise", f->name);
        if (!set_flag(f, text, error)) die_usage("%s", error);
        f->given = true;
    }
    return positional;
}
