/* Ranks that are threads play all-reduces over one memory, so that sanitizers see what they do to each other.
 *
 *     ranks RANKS TURNS SEED
 *
 * Each turn draws how many elements, in a window or not, and whether the results may be put;
 * each rank for itself, whether what comes goes past the cache. All is built by hand here as
 * links.py and tape.py build it: rank r owns share r, gets it from everybody, folds it, and gives it to everybody, in
 * pieces that take more slots than there are. */
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

static unsigned drawn(unsigned *state) { return *state = *state * 1103515245u + 12345u, *state >> 8; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void layout(void) {
    entries_at = 8 * (CONSUMED + 8 * ranks);
    small_at = entries_at + ranks * ENTRIES * 32 + REPORT_BYTES;
    large_at = (small_at + ranks * SMALL_SLOTS * SMALL_STRIDE + 4095) / 4096 * 4096;
    block_bytes = large_at + (int64_t)ranks * SLOTS * SLOT_BYTES;
    window_bytes = block_bytes + 4 * MOST_ELEMENTS;
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

/* The tape of rank `me` for an all-reduce of `data`, whose share r is the elements bounds[r] to bounds[r + 1]. */
static Tape *tape_of(int me, float *data, const int64_t *bounds, int window, int put, int past) {
    Tape *tape = calloc((size_t)(HEAD + 32 * (MOST_PIECES + 2) * ranks), 8);
    tape->count = 2 * (MOST_PIECES + 1) * ranks;
    tape->requests = (int64_t)calloc((size_t)tape->count, sizeof(Request));
    if (window) tape->exposed = (int64_t)data, tape->exposed_end = (int64_t)(data + bounds[ranks]);
    int64_t *word = tape->words, request = 0, received[MOST_RANKS], sent[(MOST_PIECES + 1) * MOST_RANKS], sends = 0;
#define SHARE(r) (int64_t)(data + bounds[r]), 4 * (bounds[(r) + 1] - bounds[r])
#define PIECE(r, at) (int64_t)(data + (at)), 4 * least(PIECE_ELEMENTS, bounds[(r) + 1] - (at))
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
    EMIT(FOLD, (int64_t)(data + bounds[me]), bounds[me + 1] - bounds[me], 4, (int64_t)fold_of(F32, SUM, 2), 0, me, ranks - 1);
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
    float *outside = malloc(4 * MOST_ELEMENTS), *inside = (float *)(windows[me] + block_bytes);
    pthread_barrier_wait(&met);
    for (int turn = 1; turn <= turns; turn++) {
        static const int64_t most[] = {40, 3000, 40000, MOST_ELEMENTS};
        int64_t elements = ranks + drawn(&state) % (most[drawn(&state) % 4] - ranks);
        int window = drawn(&state) & 1, put = window && drawn(&state) & 1;
        int64_t bounds[MOST_RANKS + 1];
        for (int r = 0; r <= ranks; r++) bounds[r] = elements * r / ranks;
        float *data = window ? inside : outside;
        for (int64_t i = 0; i < elements; i++) data[i] = (float)((i + turn) % 97 + me);
        Tape *tape = tape_of(me, data, bounds, window, put, drawn(&own) % 2 ? PAST : 0);
        if (drawn(&own) % 4 == 0) usleep(drawn(&own) % 300);
        int ended;
        do ended = play(rank, tape, turn, INT64_C(8000000000), 0, 0);
        while (ended == SIGNAL);
        int64_t wrong = 0;
        for (int64_t i = 0; i < elements; i++)
            wrong += data[i] != (float)((i + turn) % 97 * ranks + ranks * (ranks - 1) / 2);
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
    free(outside);
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
    printf("%d ranks, %d turns: all right\n", ranks, turns);
    return failures != 0;
}
