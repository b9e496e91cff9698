/* Slots: memory of the sender's window in which a message lies until its receivers have read it. */
#ifndef RINGRED_SLOTS_H
#define RINGRED_SLOTS_H

#include <string.h>

#include "layout.h"
#include "waits.h"

_Static_assert(PART_BYTES <= HOT_SLOTS * SLOT_BYTES && HOT_SLOTS <= SLOTS, "a message finds room");

#ifndef BLOCK_BYTES /* they stay in the first-level cache between two passes */
#define BLOCK_BYTES (16 << 10)
#endif

/* ThreadSanitizer is told of `own_lines` only where no slots are shared. */
#ifdef NOTHING_IS_SHARED
#define UNSEEN
#else
#define UNSEEN __attribute__((no_sanitize("thread")))
#endif

static inline int consumed(Link *link, int64_t number) {
    if (number > link->acked) link->acked = word_of(link->acked_at, 0);
    return number <= link->acked;
}

/* The first of the next `count` large slots that lie in a row. */
static inline int64_t in_a_row(int64_t next, int64_t count) { return next + count > HOT_SLOTS ? 0 : next; }

static inline int64_t large_slots(int64_t nbytes) { return (nbytes + SLOT_BYTES - 1) / SLOT_BYTES; }

/* Takes slots for a message, or part of one, that gets this number: their offset in this rank's window; -1 if the peer
 * has not read what was last in them. */
static int64_t room(Link *link, int64_t number, int64_t nbytes) {
    if (nbytes <= SMALL_BYTES) {
        int64_t at = link->small_next;
        if (!consumed(link, link->small_used[at])) return -1;
        link->small_used[at] = number;
        link->small_next = (at + 1) % SMALL_SLOTS;
        return link->small + at * SMALL_STRIDE;
    }
    int64_t count = large_slots(nbytes), first = in_a_row(link->large_next, count);
    for (int64_t at = first; at < first + count; at++)
        if (!consumed(link, link->large_used[at])) return -1;
    for (int64_t at = first; at < first + count; at++) link->large_used[at] = number;
    link->large_next = (first + count) % HOT_SLOTS;
    return link->large + first * SLOT_BYTES;
}

/* Takes slots for a message that goes to several peers, who all read this one copy: their offset; -1 if one of the peers
 * has not read what was last in them. Nobody ever waits for these, as a peer that reads late would hold up the others. */
static int64_t shared_room(Rank *rank, int64_t nbytes) {
    Link *links = (Link *)(rank + 1);
    int64_t count = large_slots(nbytes), first = in_a_row(rank->shared_next, count);
    for (int64_t peer = 0; peer < rank->links; peer++)
        for (int64_t at = first; at < first + count; at++)
            if (!consumed(links + peer, links[peer].shared_used[at])) return -1;
    rank->shared_next = (first + count) % HOT_SLOTS;
    return rank->shared + first * SLOT_BYTES;
}

/* Notes that the message of this number, too, lies in the shared slots at `offset`. */
static void share(const Rank *rank, Link *link, int64_t number, int64_t offset, int64_t nbytes) {
    int64_t first = (offset - rank->shared) / SLOT_BYTES;
    for (int64_t at = first; at < first + large_slots(nbytes); at++) link->shared_used[at] = number;
}

/* Makes lines that were read this core's own, by writing to each a byte that stands there, before they are given back: the
 * sender's next writes take longer to lines that another core has only read (docs/design/native.md). Shared slots have several
 * readers, who all write the same. */
UNSEEN static inline void own_lines(const char *slots, int64_t nbytes) {
    for (volatile char *line = (volatile char *)slots; line < slots + nbytes; line += LINE)
        __atomic_store_n(line, __atomic_load_n(line, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}

/* Copies a message, or part of one, out of a peer's slots, `past` the cache or not, and makes their lines this core's own. */
static inline void fetch(char *to, const char *slots, int64_t nbytes, int past) {
    int64_t at = 0;
    for (; past && at + BLOCK_BYTES <= nbytes; at += BLOCK_BYTES) {
        stream(to + at, slots + at, BLOCK_BYTES);
        own_lines(slots + at, BLOCK_BYTES);
    }
    for (; at + LINE <= nbytes; at += LINE) { /* a tenth quicker than to copy all and then own the lines */
        memcpy(to + at, slots + at, LINE);
        own_lines(slots + at, LINE);
    }
    memcpy(to + at, slots + at, (size_t)(nbytes - at));
    own_lines(slots + at, nbytes - at);
}

#endif
