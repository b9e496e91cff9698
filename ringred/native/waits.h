/* Looking at a word that a peer writes, and sleeping on one's own. The orders are argued in docs/design/native.md. */
#ifndef RINGRED_WAITS_H
#define RINGRED_WAITS_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NS = 20000, LOOKS = 32, LONGEST_SLEEP_NS = 1000000000 };

static inline int64_t word_of(int64_t address, int64_t index) {
    return __atomic_load_n((const int64_t *)address + index, __ATOMIC_ACQUIRE);
}

static inline void set_word(int64_t address, int64_t index, int64_t value) {
    __atomic_store_n((int64_t *)address + index, value, __ATOMIC_RELEASE);
}

static inline void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static inline int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Sleeps while the 32-bit word at `address` is 1: until it is woken, a signal comes, or `ns` have passed. Whether Python
 * should look for signals: one came, or another thread may have got it meanwhile. */
static inline int sleep_on(int64_t address, int64_t ns) {
    struct timespec limit = {ns / 1000000000, ns % 1000000000};
    return syscall(SYS_futex, address, FUTEX_WAIT, 1, &limit, 0, 0) < 0 && (errno == EINTR || errno == ETIMEDOUT);
}

/* Wakes the rank whose control block is at `block`, if it sleeps, to see what was just written. */
static inline void wake(int64_t block) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was written before what is looked at */
    if (word_of(block, SLEEPING)) {
        set_word(block, SLEEPING, 0);
        syscall(SYS_futex, block + 8 * SLEEPING, FUTEX_WAKE, INT_MAX, 0, 0, 0);
    }
}

#endif
