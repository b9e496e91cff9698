/* What it costs a core to write memory that another core has read, and that one to read it: two threads, one a core.
 *
 *     gcc -O2 benchmarks/stores.c -o stores -lpthread && ./stores
 *
 * x86-64. A line has the medians of 35 turns for 512 KiB, in µs: by ordinary stores, by streaming ones, and by ordinary ones
 * where the reader writes a byte of every line back, so that the lines are its own. It runs for 20 seconds, because a machine
 * may have phases. */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BYTES = 512 << 10, TURNS = 35, LINE = 64 };
enum { ORDINARY, STREAMING, OWNED, WAYS };

static char *slot[2], *own[2];
static int turn[2], way;
static const char *const names[WAYS] = {"ordinary", "streaming", "owned"};
static double written[TURNS], heard[TURNS];

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void meet(int me, int k) {
    __atomic_store_n(&turn[me], k, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&turn[1 - me], __ATOMIC_SEQ_CST) < k) _mm_pause();
}

static void *rank(void *number) {
    const int me = (int)(intptr_t)number, streams = way == STREAMING, owns = way == OWNED;
    int met = 0;
    cpu_set_t core;
    CPU_ZERO(&core);
    CPU_SET(me, &core);
    pthread_setaffinity_np(pthread_self(), sizeof core, &core);
    for (int k = -5; k < TURNS; k++) {
        memset(own[me], 0, BYTES);
        meet(me, ++met);
        double began = now();
        for (long i = 0; i < BYTES; i += 16) {
            __m128i value = _mm_load_si128((const __m128i *)(own[me] + i));
            if (streams) _mm_stream_si128((__m128i *)(slot[me] + i), value);
            else _mm_store_si128((__m128i *)(slot[me] + i), value);
        }
        _mm_sfence();
        double wrote = now() - began;
        meet(me, ++met);
        began = now();
        for (long i = 0; i < BYTES; i += 16) {
            float *sum = (float *)(own[me] + i);
            _mm_store_ps(sum, _mm_add_ps(_mm_load_ps(sum), _mm_load_ps((float *)(slot[1 - me] + i))));
        }
        for (volatile char *byte = slot[1 - me]; owns && byte < slot[1 - me] + BYTES; byte += LINE) *byte = *byte;
        if (me == 0 && k >= 0) written[k] = wrote, heard[k] = now() - began;
        meet(me, ++met);
    }
    return 0;
}

static int less(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

int main(void) {
    for (int me = 0; me < 2; me++) slot[me] = aligned_alloc(4096, BYTES), own[me] = aligned_alloc(4096, BYTES);
    for (double end = now() + 20e6; now() < end;) {
        for (way = 0; way < WAYS; way++) {
            pthread_t thread[2];
            turn[0] = turn[1] = 0;
            for (intptr_t me = 0; me < 2; me++) pthread_create(&thread[me], 0, rank, (void *)me);
            for (int me = 0; me < 2; me++) pthread_join(thread[me], 0);
            qsort(written, TURNS, sizeof *written, less);
            qsort(heard, TURNS, sizeof *heard, less);
            printf("%s: write %4.0f, read %4.0f%s", names[way], written[TURNS / 2], heard[TURNS / 2],
                   way == OWNED ? "\n" : "   ");
        }
        fflush(stdout);
        nanosleep(&(struct timespec){0, 200000000}, 0);
    }
}
