/* Ranks that are threads play all-reduces over one memory, so that sanitizers see what they do to each other.
 *
 *     ranks RANKS TURNS SEED
 *
 * Each turn draws how many elements of which kind, sum or maximum, in a window or not, and whether the results may be put;
 * each rank for itself, whether what comes goes past the cache, whether it is timed, and whether it plays in many short goes,
 * with pauses. All is built by hand here as links.py and tape.py build it: rank r owns share r, gets it from everybody, folds
 * it, and gives it to everybody, in pieces that take more slots than there are. In the last turn the last rank does not play,
 * or another collective, by the seed: the others find it out, and drop what they had. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layout.h"
#include "waits.h"

enum { MOST_RANKS = 8, MOST_ELEMENTS = 1500000, CONSUMED = 32, REPORT_BYTES = 16 << 10, HEAD = sizeof(Tape) / 8 };
enum { PIECE_ELEMENTS = 33000, MOST_PIECES = MOST_ELEMENTS / 2 / PIECE_ELEMENTS + 1 };

static int ranks, turns;
static unsigned seed;
static char *windows[MOST_RANKS];
static int64_t entries_at, small_at, large_at, block_bytes, window_bytes;
static pthread_barrier_t met;
static int failures;

/* What the elements are: small whole numbers, which every kind holds. */
static const struct { int kind, bytes; } kinds[] = {{F32, 4}, {BF16, 2}, {I64, 8}, {U8, 1}, {F64, 8}};

static int64_t value_at(int kind, const void *data, int64_t i) {
    uint32_t bits = (uint32_t)((const uint16_t *)data)[kind == BF16 ? i : 0] << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return kind == F32    ? (int64_t)((const float *)data)[i]
           : kind == F64  ? (int64_t)((const double *)data)[i]
           : kind == I64  ? ((const int64_t *)data)[i]
           : kind == BF16 ? (int64_t)wide
                          : ((const uint8_t *)data)[i];
}

static void set_value(int kind, void *data, int64_t i, int value) {
    float wide = (float)value;
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    switch (kind) {
    case F32: ((float *)data)[i] = wide; break;
    case F64: ((double *)data)[i] = value; break;
    case I64: ((int64_t *)data)[i] = value; break;
    case BF16: ((uint16_t *)data)[i] = (uint16_t)(bits >> 16); break;
    default: ((uint8_t *)data)[i] = (uint8_t)value;
    }
}

static unsigned drawn(unsigned *state) { return *state = *state * 1103515245u + 12345u, *state >> 8; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void layout(void) {
    entries_at = 8 * (CONSUMED + 8 * ranks);
    small_at = entries_at + ranks * ENTRIES * 32 + REPORT_BYTES;
    large_at = (small_at + ranks * SMALL_SLOTS * SMALL_STRIDE + 4095) / 4096 * 4096;
    block_bytes = large_at + (int64_t)ranks * SLOTS * SLOT_BYTES;
    window_bytes = block_bytes + 8 * MOST_ELEMENTS;
}

static Rank *made(int me) {
    Rank *rank = calloc(1, sizeof(Rank) + (size_t)(ranks - 1) * sizeof(Link));
    rank->window = rank->block = (int64_t)windows[me];
    rank->window_end = rank->window + window_bytes;
    rank->links = ranks - 1;
    rank->gives_way = 20000;
    rank->shared = large_at + (int64_t)me * SLOTS * SLOT_BYTES;
    rank->counters = (int64_t)calloc(4, 8);
    Link *link = (Link *)(rank + 1);
    for (int peer = 0; peer < ranks; peer++) {
        if (peer == me) continue;
        int64_t theirs = (int64_t)windows[peer];
        link->window = link->block = theirs;
        link->window_end = theirs + window_bytes;
        link->acked_at = theirs + 8 * (CONSUMED + 8 * me);
        link->taken_at = rank->window + 8 * (CONSUMED + 8 * peer);
        link->entries_in = theirs + entries_at + me * ENTRIES * 32;
        link->entries_out = rank->window + entries_at + peer * ENTRIES * 32;
        link->small = small_at + peer * SMALL_SLOTS * SMALL_STRIDE;
        link->large = large_at + (int64_t)peer * SLOTS * SLOT_BYTES;
        link++;
    }
    return rank;
}

/* The tape of rank `me` for an all-reduce of `data`, whose share r is the elements bounds[r] to bounds[r + 1], each of `size`
 * bytes. */
static Tape *tape_of(int me, char *data, int64_t size, Fold kernel, const int64_t *bounds, int window, int put, int past) {
    Tape *tape = calloc((size_t)(HEAD + 32 * (MOST_PIECES + 2) * ranks), 8);
    tape->count = 2 * (MOST_PIECES + 1) * ranks;
    tape->requests = (int64_t)calloc((size_t)tape->count, sizeof(Request));
    if (window) tape->exposed = (int64_t)data, tape->exposed_end = (int64_t)(data + size * bounds[ranks]);
    int64_t *word = tape->words, request = 0, received[MOST_RANKS], sent[(MOST_PIECES + 1) * MOST_RANKS], sends = 0;
#define SHARE(r) (int64_t)(data + size * bounds[r]), size * (bounds[(r) + 1] - bounds[r])
#define PIECE(r, at) (int64_t)(data + size * (at)), size * least(PIECE_ELEMENTS, bounds[(r) + 1] - (at))
#define LINK(peer) ((peer) - ((peer) > me))
#define EMIT(...)                                          \
    do {                                                   \
        const int64_t given[] = {__VA_ARGS__};             \
        memcpy(word, given, sizeof given), word += sizeof given / 8; \
    } while (0)
    for (int peer = 0; peer < ranks; peer++)
        if (peer != me) {
            EMIT(SEND, sent[sends++] = request, LINK(peer), SHARE(peer), window ? 0 : BUFFERED);
            request++;
        }
    for (int peer = 0; peer < ranks; peer++)
        if (peer != me) {
            EMIT(RECEIVE, received[LINK(peer)] = request, LINK(peer), SHARE(me), LEND);
            request++;
        }
    EMIT(FOLD, (int64_t)(data + size * bounds[me]), bounds[me + 1] - bounds[me], size, (int64_t)kernel, 0, me, ranks - 1);
    for (int at = 0; at < ranks - 1; at++) *word++ = received[at];
    for (int64_t at = bounds[me]; at < bounds[me + 1]; at += PIECE_ELEMENTS)
        for (int peer = 0; peer < ranks; peer++)
            if (peer != me) {
                EMIT(SEND, sent[sends++] = request, LINK(peer), PIECE(me, at), put);
                request++;
            }
    for (int peer = 0; peer < ranks; peer++)
        if (peer != me) {
            if (!window) EMIT(WAIT_SENT, sent[LINK(peer)]);
            for (int64_t at = bounds[peer]; at < bounds[peer + 1]; at += PIECE_ELEMENTS) {
                EMIT(RECEIVE, request, LINK(peer), PIECE(peer, at), past);
                EMIT(TAKE, request);
                request++;
            }
        }
    for (int at = 0; at < sends; at++) EMIT(WAIT_SENT, sent[at]);
    EMIT(END);
    return tape;
}

static void *run(void *given) {
    int me = (int)(intptr_t)given;
    unsigned state = seed, own = seed + 77u * (unsigned)me;
    Rank *rank = made(me);
    char *outside = malloc(8 * MOST_ELEMENTS), *inside = windows[me] + block_bytes;
    int64_t *times = calloc(3 * (MOST_PIECES + 2) * MOST_RANKS, 8);
    pthread_barrier_wait(&met);
    for (int turn = 1; turn <= turns; turn++) {
        static const int64_t most[] = {40, 3000, 40000, MOST_ELEMENTS};
        int amiss = turn == turns, silent = amiss && seed % 2;
        int64_t greatest = most[drawn(&state) % 4], elements = ranks + drawn(&state) % (greatest - ranks);
        int window = drawn(&state) & 1, put = drawn(&state) & window & 1;
        /* What waits in vain holds long messages in parts; what is of another collective is found in the first, short one,
         * before anybody waits for a rank that found it and stopped. */
        if (amiss) window = put = 0, elements = silent ? MOST_ELEMENTS : 3000;
        int64_t bounds[MOST_RANKS + 1];
        for (int r = 0; r <= ranks; r++) bounds[r] = elements * r / ranks;
        unsigned which = drawn(&state) % (sizeof kinds / sizeof *kinds);
        int kind = kinds[which].kind, op = drawn(&state) & 1 ? SUM : MAX;
        char *data = window ? inside : outside;
        for (int64_t i = 0; i < elements; i++) set_value(kind, data, i, (int)((i + turn) % 13) + me);
        Fold kernel = fold_of(kind, op, 2);
        Tape *tape = tape_of(me, data, kinds[which].bytes, kernel, bounds, window, put, drawn(&own) % 2 ? PAST : 0);
        if (drawn(&own) % 4 == 0) usleep(drawn(&own) % 300);
        int ended, how = drawn(&own) % 3 ? 0 : BRIEFLY, timed = drawn(&own) & 1;
        if (silent && me == ranks - 1) {
            free((void *)tape->requests), free(tape);
            break;
        }
        int64_t contract = turn + (amiss && me == ranks - 1), timeout = silent ? 300000000 : INT64_C(8000000000);
        memset(times, 0, 24 * (MOST_PIECES + 2) * MOST_RANKS);
        while ((ended = play(rank, tape, contract, timeout, timed ? times : 0, how)) == SIGNAL || (ended == LOOK && how))
            if (amiss && now() > tape->deadline) how = 0; /* only a wait that may sleep ends at its deadline */
            else if (drawn(&own) % 4 == 0) usleep(drawn(&own) % 100);
        if (amiss) {
            if (ended != (silent ? LATE : MISMATCH)) {
                printf("rank %d, last turn: ended %d\n", me, ended);
                __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
            }
            drop(tape);
            free((void *)tape->requests), free(tape);
            break;
        }
        int64_t wrong = 0;
        for (int64_t i = 0; i < elements; i++)
            wrong += value_at(kind, data, i) != (i + turn) % 13 * (op == SUM ? ranks : 1) + (ranks - 1) * (op == SUM ? ranks : 2) / 2;
        if (ended != DONE || wrong) {
            printf("rank %d, turn %d: %lld elements, ended %d, %lld wrong\n", me, turn, (long long)elements, ended,
                   (long long)wrong);
            __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
            drop(tape);
            exit(1); /* the others would wait in vain */
        }
        free((void *)tape->requests);
        free(tape);
    }
    pthread_barrier_wait(&met);
    free(outside), free(times);
    free((void *)rank->counters);
    free(rank);
    return 0;
}

int main(int count, char **arguments) {
    ranks = count > 1 ? atoi(arguments[1]) : 2;
    turns = count > 2 ? atoi(arguments[2]) : 100;
    seed = count > 3 ? (unsigned)atoi(arguments[3]) : 1;
    if (ranks < 2 || ranks > MOST_RANKS) return printf("expected 2 to %d ranks\n", MOST_RANKS), 2;
    layout();
    pthread_t threads[MOST_RANKS];
    pthread_barrier_init(&met, 0, (unsigned)ranks);
    for (int r = 0; r < ranks; r++) windows[r] = calloc(1, (size_t)window_bytes);
    for (int r = 0; r < ranks; r++) pthread_create(threads + r, 0, run, (void *)(intptr_t)r);
    for (int r = 0; r < ranks; r++) pthread_join(threads[r], 0);
    for (int r = 0; r < ranks; r++) free(windows[r]);
    if (!failures) printf("%d ranks, %d turns: all right\n", ranks, turns);
    return failures != 0;
}
