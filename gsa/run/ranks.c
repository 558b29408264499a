#include "ranks.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* the program ignores SIGPIPE */
#endif

double ranks_patience = 20, ranks_coming = 60;
enum { PORT = 29500 }; /* where a launcher names none */

/* ---------------------------------------------------------------------- the environment */

/* The number in a variable; -1 where it is not set or is none. */
static int number_of(char *(*get)(const char *name), const char *name) {
    const char *text = name ? get(name) : NULL;
    char *end;
    if (!text || !*text) return -1;
    long value = strtol(text, &end, 10);
    return *end || value < 0 || value > INT32_MAX ? -1 : (int)value;
}

/* The first host of a list of Slurm, such as "node[03-05,9],other": node03. */
static void first_host(const char *list, char *out, size_t room) {
    size_t n = strcspn(list, "[,");
    snprintf(out, room, "%.*s", (int)n, list);
    if (list[n] != '[') return;
    size_t digits = strcspn(list + n + 1, "-,]");
    snprintf(out + strlen(out), room - strlen(out), "%.*s", (int)digits, list + n + 1);
}

/* Rank, size and place on the machine by three variables. */
typedef struct {
    const char *source, *rank, *count, *local, *local_count;
} Launcher;
static const Launcher launchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    /* the number of a job's tasks is set for its script too, which is none of them; that of a step is not */
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", NULL}};

const char *ranks_place(RankPlace *p, char *(*get)(const char *name)) {
    static char sentence[400];
    const Launcher *by = NULL;
    memset(p, 0, sizeof *p);
    p->listener = -1;
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers && !by; i++)
        if (get(launchers[i].rank) && get(launchers[i].count)) by = &launchers[i];
    if (!by) return NULL;
    p->source = by->source;
    p->rank = number_of(get, by->rank);
    p->count = number_of(get, by->count);
    p->local = number_of(get, by->local);
    if (p->rank < 0 || p->count < 1 || p->rank >= p->count || p->local < 0) {
        snprintf(sentence, sizeof sentence,
                 "%s says that this process is rank %.40s of %.40s and number %.40s of its machine; %s must be below "
                 "%s, and %s must be set (unset all three to run alone)",
                 by->source, get(by->rank), get(by->count), get(by->local) ? get(by->local) : "?", by->rank, by->count,
                 by->local);
        return sentence;
    }
    const char *address = get("MASTER_ADDR"), *hosts = get("SLURM_STEP_NODELIST");
    int port = number_of(get, "MASTER_PORT"), job = number_of(get, "SLURM_JOB_ID");
    const char *store = get("TORCHELASTIC_USE_AGENT_STORE");
    if (address && *address) snprintf(p->address, sizeof p->address, "%s", address);
    else if (by == &launchers[2] && hosts) first_host(hosts, p->address, sizeof p->address);
    else if (p->count == 1 || number_of(get, by->local_count) == p->count) strcpy(p->address, "127.0.0.1");
    else {
        snprintf(sentence, sizeof sentence,
                 "%s has started %d processes on several machines: set MASTER_ADDR to the address of rank 0's",
                 by->source, p->count);
        return sentence;
    }
    p->port = port > 0 && port < 65535 ? port : by == &launchers[2] && job >= 0 ? 20000 + job % 10000 : PORT;
    /* torchrun itself listens at MASTER_PORT then */
    if (store && strcmp(store, "True") == 0) p->port++;
    return NULL;
}

/* ---------------------------------------------------------------------- several processes on this machine */

typedef struct {
    pid_t *process; /* of each rank; 0: it has ended */
    int count, left;
    int status;   /* of the first that ended badly; 0: none has */
    double ended; /* when that was */
} Family;

static void signal_all(const Family *f, int number) {
    for (int i = 0; i < f->count; i++)
        if (f->process[i]) kill(f->process[i], number);
}

static void bury(Family *f) {
    int status;
    for (pid_t p; (p = waitpid(-1, &status, WNOHANG)) > 0;)
        for (int i = 0; i < f->count; i++) {
            if (f->process[i] != p) continue;
            f->process[i] = 0;
            f->left--;
            int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            if (!code || f->status) continue;
            f->status = code;
            f->ended = now_seconds();
        }
}

/* What is left of the first process: signals are passed on, and when a rank has ended badly the others, which end by
   themselves as a rule, get a while before they are stopped. */
GSA_NORETURN static void watch_over(Family *f, const sigset_t *signals) {
    while (f->left > 0) {
        sigset_t pending;
        int number;
        usleep(20000);
        sigpending(&pending);
        if ((sigismember(&pending, SIGINT) || sigismember(&pending, SIGTERM) || sigismember(&pending, SIGHUP)) &&
            sigwait(signals, &number) == 0)
            signal_all(f, number);
        bury(f);
        if (f->status && now_seconds() - f->ended > 3) signal_all(f, SIGKILL);
    }
    exit(f->status);
}

static int listen_at(const struct sockaddr *address, socklen_t bytes) {
    int on = 1, s = socket(address->sa_family, SOCK_STREAM, 0);
    if (s < 0) return -1;
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(s, address, bytes) == 0 && listen(s, 64) == 0) return s;
    int error = errno;
    close(s);
    errno = error;
    return -1;
}

RankPlace ranks_launch(int count) {
    Family f = {(pid_t *)xcalloc((size_t)count, sizeof(pid_t)), count, count, 0, 0};
    struct sockaddr_in address;
    socklen_t bytes = sizeof address;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK); /* port 0: any that is free */
    RankPlace p = {.count = count, .source = "--gpus"};
    strcpy(p.address, "127.0.0.1");
    p.listener = listen_at((struct sockaddr *)&address, bytes);
    if (p.listener < 0 || getsockname(p.listener, (struct sockaddr *)&address, &bytes) != 0)
        die("no port of this machine can be listened at: %s", strerror(errno));
    p.port = ntohs(address.sin_port);
    sigset_t signals, before;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &signals, &before);
    fflush(NULL);
    pid_t parent = getpid();
    for (int i = 0; i < count; i++) {
        f.process[i] = fork();
        if (f.process[i] < 0) {
            int error = errno;
            f.process[i] = 0;
            signal_all(&f, SIGKILL);
            die("cannot start %d processes: %s", count, strerror(error));
        }
        if (f.process[i] > 0) continue;
        /* a group of its own: a terminal's Ctrl-C comes once, from the first process, which does not live on alone */
        setpgid(0, 0);
#ifdef __linux__
        prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
        if (getppid() != parent) _exit(1);
        sigprocmask(SIG_SETMASK, &before, NULL);
        free(f.process);
        p.rank = p.local = i;
        if (i == 0) return p;
        close(p.listener);
        p.listener = -1;
        return p;
    }
    close(p.listener);
    watch_over(&f, &signals);
}

int ranks_ask(int (*f)(void)) {
    int wire[2], answer = 0, status = 0;
    fflush(NULL);
    if (pipe(wire) != 0) die("cannot open a pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0) die("cannot start a process: %s", strerror(errno));
    if (child == 0) {
        answer = f();
        _exit(write(wire[1], &answer, sizeof answer) != sizeof answer);
    }
    close(wire[1]);
    bool answered = read(wire[0], &answer, sizeof answer) == sizeof answer;
    close(wire[0]);
    waitpid(child, &status, 0);
    if (!answered) exit(WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : 1); /* f has said why */
    return answer;
}

/* ---------------------------------------------------------------------- wires */

enum { MAGIC = 20261128, DATA = 0, CONTROL = 1 };
typedef struct {
    int32_t magic, rank, count, wire;
} Hello;

/* On the control wire. BEAT: what the main thread does, and how often it has said so. LAST_WORDS: a sentence of
   `length` bytes follows, with which this rank ends. END: end now with `status`, all is said. BYE: this rank has done
   its work. */
enum { BEAT, LAST_WORDS, END, BYE };
typedef struct {
    int32_t kind, status, doing, length;
    int64_t ticks;
} Message;

typedef struct {
    char host[64];
    int64_t process;
} Name;

typedef struct {
    int data, control; /* sockets; rank 0 has them to all others, these to rank 0 only */
    bool gone;         /* after BYE */
    Message last;      /* BEAT */
    double heard, moved;
} Peer;

struct RankWires {
    Ranks *ranks;
    RankPlace place;
    Peer *peers; /* by rank */
    Name *names;
    pthread_t thread;
    pthread_mutex_t sending; /* on control wires */
    atomic_int doing;
    atomic_llong ticks;
    atomic_bool spoken;  /* the sentence with which the run ends is said */
    atomic_bool leaving; /* the work of all ranks is done: who goes now is not missed */
};
static struct RankWires *speaking; /* of this process, for what die says */

static bool send_all(int s, const void *data, size_t bytes) {
    for (const char *p = (const char *)data; bytes > 0;) {
        ssize_t n = send(s, p, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        p += n;
        bytes -= (size_t)n;
    }
    return true;
}

static bool receive_all(int s, void *data, size_t bytes) {
    for (char *p = (char *)data; bytes > 0;) {
        ssize_t n = recv(s, p, bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        p += n;
        bytes -= (size_t)n;
    }
    return true;
}

static void set_timeout(int s, int option, double seconds) { /* 0: none */
    struct timeval t = {(time_t)seconds, (suseconds_t)((seconds - floor(seconds)) * 1e6)};
    setsockopt(s, SOL_SOCKET, option, &t, sizeof t);
}

static void tell(struct RankWires *w, int rank, int kind, int status, const char *text) {
    Message m = {kind, status, w->doing, text ? (int32_t)strlen(text) : 0, w->ticks};
    pthread_mutex_lock(&w->sending);
    if (!w->peers[rank].gone && send_all(w->peers[rank].control, &m, sizeof m) && text)
        send_all(w->peers[rank].control, text, (size_t)m.length);
    pthread_mutex_unlock(&w->sending);
}

static void tell_all(struct RankWires *w, int kind, int status) {
    int others = w->ranks->rank ? 1 : w->ranks->count; /* of those that wires lead to */
    for (int q = 0; q < others; q++)
        if (q != w->ranks->rank) tell(w, q, kind, status, NULL);
}

/* ---------------------------------------------------------------------- the end of a run that fails */

/* The first to call this may say why; others wait for the end, which is near. */
static void claim(struct RankWires *w) {
    if (!atomic_exchange(&w->spoken, true)) return;
    sleep(10);
    _exit(1);
}

/* What set_speaker is given. The sentence of another rank is said by rank 0, once for all. */
static bool speak(const char *sentence, int status) {
    struct RankWires *w = speaking;
    if (!status) return w->ranks->rank == 0 || w->spoken; /* end_run's, or a warning */
    claim(w);
    if (w->ranks->rank == 0) {
        warn("rank 0: %s", sentence);
        tell_all(w, END, status);
        return false;
    }
    tell(w, 0, LAST_WORDS, status, sentence);
    sleep(5); /* rank 0 answers by END, and the control thread ends this process */
    return true;
}

static void name_rank(const struct RankWires *w, int rank, char out[128]) {
    snprintf(out, 128, "rank %d (process %lld on %s)", rank, (long long)w->names[rank].process, w->names[rank].host);
}

/* In the control thread: says why, naming the rank, and ends the run. */
GSA_PRINTF(4, 5) static void end_run(struct RankWires *w, int rank, int status, const char *format, ...) {
    va_list args;
    char *sentence = NULL, name[128];
    va_start(args, format);
    if (vasprintf(&sentence, format, args) < 0) sentence = NULL;
    va_end(args);
    name_rank(w, rank, name);
    claim(w);
    warn("%s%s", name, sentence ? sentence : " has failed");
    fflush(stderr);
    tell_all(w, END, status);
    _exit(status);
}

/* A rank that ends by the same signal or mistake as this one should not be named: this one may end in a moment. */
static void lost(struct RankWires *w, int q) {
    usleep(300000);
    if (w->leaving) {
        w->peers[q].gone = true;
        return;
    }
    if (w->ranks->rank > 1) _exit(1); /* rank 0 is gone, and rank 1 says so */
    end_run(w, q, 1, " has died; go on from the last checkpoint with --resume");
}

/* One message of rank q. */
static void hear(struct RankWires *w, int q) {
    Peer *p = &w->peers[q];
    Message m;
    char text[4096] = "";
    if (!receive_all(p->control, &m, sizeof m)) {
        lost(w, q);
        return;
    }
    double now = now_seconds();
    p->heard = now;
    if (m.kind == BEAT) {
        if (m.doing != p->last.doing || m.ticks != p->last.ticks) p->moved = now;
        p->last = m;
    } else if (m.kind == LAST_WORDS) {
        for (int32_t at = 0; at < m.length;) { /* the beginning is kept */
            char part[1024];
            int32_t n = m.length - at < (int32_t)sizeof part ? m.length - at : (int32_t)sizeof part;
            if (!receive_all(p->control, part, (size_t)n)) break;
            if (strlen(text) + (size_t)n < sizeof text) strncat(text, part, (size_t)n);
            at += n;
        }
        end_run(w, q, m.status, ": %s", text);
    } else if (m.kind == END) {
        usleep(q == 0 ? 0 : 200000);
        _exit(m.status);
    } else p->gone = true;
}

/* Rank 0 looks whether every main thread gets on, its own among them; all look whether others can be heard. */
static void look(struct RankWires *w) {
    double now = now_seconds(), patience = ranks_patience;
    int count = w->ranks->count, rank = w->ranks->rank;
    bool waiting = true;
    Peer *own = &w->peers[rank];
    if (own->last.doing != w->doing || own->last.ticks != w->ticks) own->moved = now;
    own->last.doing = w->doing;
    own->last.ticks = w->ticks;
    for (int q = 0; q < (rank ? 1 : count); q++)
        if (q != rank && !w->peers[q].gone && now - w->peers[q].heard > patience + (rank > 1)) {
            if (rank > 1) _exit(1); /* rank 1 has said so */
            end_run(w, q, 1, " has said nothing for %.0f s: it is stopped, or its machine or the network is down",
                    patience);
        }
    for (int q = 0; q < count && rank == 0; q++) {
        const Peer *p = &w->peers[q];
        bool stuck = now - p->moved > patience;
        if (stuck && p->last.doing == RANKS_WORKING) end_run(w, q, 1, " hangs: no pass has ended for %.0f s", patience);
        waiting = waiting && stuck && p->last.doing == RANKS_WAITING;
    }
    if (rank == 0 && waiting)
        end_run(w, 0, 1,
                " and all others wait for each other since %.0f s: the connection of the GPUs hangs "
                "(NCCL_DEBUG=INFO says more)",
                patience);
}

static void *control(void *wires) {
    struct RankWires *w = (struct RankWires *)wires;
    int count = w->ranks->rank ? 1 : w->ranks->count;
    struct pollfd *polled = (struct pollfd *)xcalloc((size_t)count, sizeof *polled);
    double beat = 0, before = now_seconds();
    for (;;) {
        int left = 0;
        for (int q = 0; q < count; q++) {
            bool other = q != w->ranks->rank && !w->peers[q].gone;
            polled[q].fd = other ? w->peers[q].control : -1;
            polled[q].events = POLLIN;
            left += other;
        }
        if (!left) break;
        poll(polled, (nfds_t)count, 250);
        double now = now_seconds();
        /* after this process was stopped for a while, others were not silent: nobody listened */
        for (int q = 0; q < w->ranks->count && now - before > 2; q++) w->peers[q].heard = w->peers[q].moved = now;
        before = now;
        for (int q = 0; q < count; q++)
            if (polled[q].fd >= 0 && polled[q].revents) hear(w, q);
        if (now - beat >= 1) {
            tell_all(w, BEAT, 0);
            beat = now;
        }
        look(w);
    }
    free(polled);
    return NULL;
}

/* ---------------------------------------------------------------------- meeting */

static int first_socket(const RankPlace *p, int (*open_socket)(const struct sockaddr *, socklen_t)) {
    struct addrinfo hints, *found = NULL;
    char port[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(port, sizeof port, "%d", p->port);
    int error = getaddrinfo(p->address, port, &hints, &found), s = -1, why = 0;
    if (error) die("MASTER_ADDR %s: %s", p->address, gai_strerror(error));
    for (struct addrinfo *a = found; a && s < 0; a = a->ai_next) {
        s = open_socket(a->ai_addr, a->ai_addrlen);
        why = s < 0 ? errno : 0;
    }
    freeaddrinfo(found);
    errno = why;
    return s;
}

static int connect_to(const struct sockaddr *address, socklen_t bytes) {
    int s = socket(address->sa_family, SOCK_STREAM, 0);
    if (s < 0) return -1;
    set_timeout(s, SO_SNDTIMEO, 5); /* of connect too */
    if (connect(s, address, bytes) == 0) return s;
    int error = errno;
    close(s);
    errno = error;
    return -1;
}

static int listen_as_master(const RankPlace *p) {
    int s = first_socket(p, listen_at);
    if (s < 0 && errno == EADDRNOTAVAIL) { /* an address by which others see this machine, but not it itself */
        struct sockaddr_in any;
        memset(&any, 0, sizeof any);
        any.sin_family = AF_INET;
        any.sin_port = htons((uint16_t)p->port);
        s = listen_at((struct sockaddr *)&any, sizeof any);
    }
    if (s < 0)
        die("rank 0 cannot listen at %s:%d (%s); give another port with MASTER_PORT, on all ranks", p->address, p->port,
            strerror(errno));
    return s;
}

static void ready_socket(int s) {
    int on = 1;
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    set_timeout(s, SO_RCVTIMEO, 0);
    set_timeout(s, SO_SNDTIMEO, 0);
}

/* "1, 3" */
static char *missing_ranks(const struct RankWires *w) {
    char *text = xstrdup("");
    for (int q = 1; q < w->ranks->count; q++) {
        if (w->peers[q].data >= 0 && w->peers[q].control >= 0) continue;
        char *longer = xasprintf("%s%s%d", text, *text ? ", " : "", q);
        free(text);
        text = longer;
    }
    return text;
}

/* Rank 0: both wires of all others. */
static void meet_all(struct RankWires *w) {
    const RankPlace *place = &w->place;
    double deadline = now_seconds() + ranks_coming;
    int listener = place->listener >= 0 ? place->listener : listen_as_master(place), wanted = 2 * (place->count - 1);
    while (wanted > 0) {
        struct pollfd polled = {listener, POLLIN, 0};
        double left = deadline - now_seconds();
        if (left <= 0 || poll(&polled, 1, (int)(left * 1000) + 1) == 0)
            die("rank %s of %d did not come to %s:%d within %.0f s: start %d processes, and let them reach this port",
                missing_ranks(w), place->count, place->address, place->port, ranks_coming, place->count);
        int s = accept(listener, NULL, NULL);
        if (s < 0) continue;
        Hello h;
        set_timeout(s, SO_RCVTIMEO, 5);
        if (!receive_all(s, &h, sizeof h) || h.magic != MAGIC) { /* somebody else */
            close(s);
            continue;
        }
        if (h.count != place->count || h.rank < 1 || h.rank >= place->count)
            die("rank %d of %d came, and there are %d: give all processes the same number of ranks", h.rank, h.count,
                place->count);
        int *to = h.wire == DATA ? &w->peers[h.rank].data : &w->peers[h.rank].control;
        if (*to >= 0) die("two processes say that they are rank %d: give each a rank of its own", h.rank);
        *to = s;
        ready_socket(s);
        wanted--;
    }
    close(listener);
    for (int q = 1; q < place->count; q++) {
        int32_t go = MAGIC;
        send_all(w->peers[q].data, &go, sizeof go);
    }
}

/* Another rank: both wires to rank 0, which answers when all are there. */
static void meet_first(struct RankWires *w) {
    const RankPlace *place = &w->place;
    double deadline = now_seconds() + ranks_coming;
    int32_t go = 0;
    for (int wire = DATA; wire <= CONTROL; wire++) {
        Hello h = {MAGIC, place->rank, place->count, wire};
        int s;
        while ((s = first_socket(place, connect_to)) < 0) {
            if (now_seconds() > deadline)
                die("rank %d: rank 0 does not answer at %s:%d (%s) within %.0f s; MASTER_ADDR and MASTER_PORT say "
                    "where it is",
                    place->rank, place->address, place->port, strerror(errno), ranks_coming);
            usleep(100000);
        }
        ready_socket(s);
        if (!send_all(s, &h, sizeof h)) die("rank %d: rank 0 has gone", place->rank);
        *(wire == DATA ? &w->peers[0].data : &w->peers[0].control) = s;
    }
    set_timeout(w->peers[0].data, SO_RCVTIMEO, ranks_coming);
    if (!receive_all(w->peers[0].data, &go, sizeof go) || go != MAGIC)
        die("rank %d: rank 0 at %s:%d does not go on: not all ranks have come, or another program listens there",
            place->rank, place->address, place->port);
    ready_socket(w->peers[0].data);
}

Ranks *ranks_join(const RankPlace *place) {
    Ranks *k = (Ranks *)xcalloc(1, sizeof *k);
    k->count = place->count > 1 ? place->count : 1;
    k->rank = place->rank;
    k->local = place->local;
    if (k->count == 1) return k;
    struct RankWires *w = (struct RankWires *)xcalloc(1, sizeof *w);
    w->ranks = k;
    w->place = *place;
    w->peers = (Peer *)xcalloc((size_t)k->count, sizeof *w->peers);
    w->names = (Name *)xcalloc((size_t)k->count, sizeof *w->names);
    pthread_mutex_init(&w->sending, NULL);
    for (int q = 0; q < k->count; q++) w->peers[q].data = w->peers[q].control = -1;
    if (k->rank == 0) meet_all(w);
    else meet_first(w);
    k->wires = w;
    Name own = {"", (int64_t)getpid()};
    gethostname(own.host, sizeof own.host - 1);
    ranks_gather(k, &own, w->names, sizeof own);
    for (int q = 0; q < k->count; q++) w->peers[q].heard = w->peers[q].moved = now_seconds();
    speaking = w;
    set_speaker(speak);
    int error = pthread_create(&w->thread, NULL, control, w);
    if (error) die("cannot start a thread: %s", strerror(error));
    return k;
}

void ranks_leave(Ranks *k) {
    struct RankWires *w = k->wires;
    if (w) {
        char nothing = 0, *all = (char *)xmalloc((size_t)k->count);
        ranks_gather(k, &nothing, all, 1);
        free(all);
        w->leaving = true;
        tell_all(w, BYE, 0);
        pthread_join(w->thread, NULL);
        set_speaker(NULL);
        for (int q = 0; q < k->count; q++) {
            if (w->peers[q].data >= 0) close(w->peers[q].data);
            if (w->peers[q].control >= 0) close(w->peers[q].control);
        }
        free(w->peers);
        free(w->names);
        free(w);
    }
    free(k);
}

void ranks_doing(Ranks *k, int what) {
    if (!k->wires) return;
    k->wires->doing = what;
    k->wires->ticks++;
}

const char *ranks_name(const Ranks *k, int rank) {
    static char text[128];
    name_rank(k->wires, rank, text);
    return text;
}

/* ---------------------------------------------------------------------- exchange */

/* Before each exchange, so that ranks that have lost each other's place end instead of reading nonsense. */
typedef struct {
    int64_t bytes, root;
} Subject;

/* A wire that breaks: the control thread finds out why and ends the process. */
GSA_NORETURN static void broken(void) {
    sleep(30);
    die("the connection between the ranks broke");
}

static void receive(int s, void *data, size_t bytes, int64_t root) {
    Subject subject;
    if (!receive_all(s, &subject, sizeof subject)) broken();
    if (subject.bytes != (int64_t)bytes || subject.root != root)
        die("internal error: the ranks exchange different things (%lld bytes of %lld, not %lld of %lld)",
            (long long)subject.bytes, (long long)subject.root, (long long)bytes, (long long)root);
    if (!receive_all(s, data, bytes)) broken();
}

static void give(int s, const void *data, size_t bytes, int64_t root) {
    Subject subject = {(int64_t)bytes, root};
    if (!send_all(s, &subject, sizeof subject) || !send_all(s, data, bytes)) broken();
}

void ranks_gather(Ranks *k, const void *mine, void *all, size_t bytes) {
    memcpy((char *)all + (size_t)k->rank * bytes, mine, bytes);
    if (k->count == 1) return;
    struct RankWires *w = k->wires;
    int before = w->doing;
    ranks_doing(k, RANKS_WAITING);
    if (k->rank == 0) {
        for (int q = 1; q < k->count; q++) receive(w->peers[q].data, (char *)all + (size_t)q * bytes, bytes, q);
        for (int q = 1; q < k->count; q++) give(w->peers[q].data, all, (size_t)k->count * bytes, -1);
    } else {
        give(w->peers[0].data, mine, bytes, k->rank);
        receive(w->peers[0].data, all, (size_t)k->count * bytes, -1);
    }
    ranks_doing(k, before);
}

void ranks_broadcast(Ranks *k, void *data, size_t bytes, int root) {
    if (k->count == 1) return;
    struct RankWires *w = k->wires;
    int before = w->doing;
    ranks_doing(k, RANKS_WAITING);
    if (k->rank == 0) {
        if (root) receive(w->peers[root].data, data, bytes, root);
        for (int q = 1; q < k->count; q++)
            if (q != root) give(w->peers[q].data, data, bytes, root);
    } else if (k->rank == root) give(w->peers[0].data, data, bytes, root);
    else receive(w->peers[0].data, data, bytes, root);
    ranks_doing(k, before);
}

/* ---------------------------------------------------------------------- who keeps what */

void ranks_cut(const Tensor *tensors, int rank, int count, size_t first[NUM_TENSORS], size_t end[NUM_TENSORS]) {
    double all = 0, before = 0, from, to;
    for (int i = 0; i < NUM_TENSORS; i++)
        if (tensors[i].group == GROUP_MATRIX) all += (double)tensors[i].size;
    from = all * rank / count;
    to = all * (rank + 1) / count;
    for (int i = 0; i < NUM_TENSORS; i++) {
        size_t size = tensors[i].size, row = tensor_row(&tensors[i]);
        first[i] = 0;
        end[i] = size;
        if (tensors[i].group != GROUP_MATRIX || !size) continue;
        /* both rounded in the same way: where one rank's part ends, the next one's begins */
        double low = fmin(fmax(from - before, 0), (double)size), high = fmin(fmax(to - before, 0), (double)size);
        first[i] = (size_t)(low / (double)row + 0.5) * row;
        end[i] = (size_t)(high / (double)row + 0.5) * row;
        before += (double)size;
    }
}
