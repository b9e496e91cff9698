/* What lies where: in the shared control blocks (links.py), in a rank's own state, and on a tape (runtime/tape.py).
 * Python compares these numbers with its own when it loads the extension. */
#ifndef RINGRED_LAYOUT_H
#define RINGRED_LAYOUT_H

#include <stdint.h>

#define VERSION 9 /* raised with every change of this file or of what Python calls, here and in __init__.py */

/* Words of a control block, of 8 bytes. */
enum { SLEEPING = 0, ALARM = 8, CLOSED = 17, EXPOSED_CONTRACT = 24, EXPOSED_AT = 25 };
/* Words of a descriptor, and how many of them a ring has. */
enum { CONTRACT = 0, LENGTH = 1, PLACE = 2, NUMBER = 3, ENTRY_WORDS = 4, ENTRIES = 256 };
/* Kinds of place, which stand below its offset. AT: in the sender's window, in the user's memory or in slots that Python
 * filled; PUT: in the receiver's; PART: in slots that Python filled, and more parts of PART_BYTES follow; SLOT: in slots that
 * the player filled; SLOT_PART: there, and more parts of SEGMENT_BYTES follow. */
enum { AT = 0, PUT = 1, PART = 2, SLOT = 3, SLOT_PART = 4, KIND_BITS = 3 };
enum { SMALL_BYTES = 512, SMALL_SLOTS = 16, SMALL_STRIDE = SMALL_BYTES + 64 };
/* HOT_SLOTS: so many of the large ones the player uses in turn, few enough to stay in caches. */
enum { SLOT_BYTES = 64 << 10, SLOTS = 32, HOT_SLOTS = 8, PART_BYTES = 512 << 10, SEGMENT_BYTES = 128 << 10, LINE = 64 };
#define NOWHERE (INT64_C(1) << 62)
#define CONTRACT_BITS (UINT64_MAX >> 2)

/* A rank's own state, in words that Python reads and writes too. */
typedef struct {
    int64_t window, window_end;    /* its own, as addresses */
    int64_t block;                 /* the address of its control block */
    int64_t contract;              /* of the collective under way */
    int64_t exposed, exposed_end;  /* memory into which peers may put, as addresses */
    int64_t gives_way;             /* ns for which it gives way between looks; 0 if it has a core of its own */
    int64_t links;
    int64_t forked;                /* this process is a child of the rank's own */
    int64_t queued;                /* sends of Python's that wait for room */
    int64_t counters;              /* the address of four: messages and bytes sent, messages and bytes received */
    int64_t shared, shared_next;   /* the offset of its slots for messages to several peers, and which of them is next */
    int64_t unused[3];
} Rank;

typedef struct {
    int64_t window, window_end;      /* the peer's, as addresses here */
    int64_t block;                   /* the address of its control block */
    int64_t acked_at;                /* address of the word that counts what the peer has consumed */
    int64_t taken_at;                /* of that which counts what this rank has consumed */
    int64_t entries_in, entries_out; /* addresses of the rings of descriptors */
    int64_t small, large;            /* offsets of both rings of slots in this rank's window */
    int64_t sent, acked, taken;      /* numbers of the last message sent, consumed there, taken here */
    int64_t awaited;                 /* the contract of the last collective that the peer was waited for to begin */
    int64_t small_next, large_next;
    int64_t small_used[SMALL_SLOTS], large_used[SLOTS], shared_used[SLOTS];
    int64_t gone; /* Python knows that the peer is */
    int64_t sends, last_send, receives, last_receive; /* requests that wait their turn, while a tape plays */
    int64_t unused[4];
} Link;

typedef struct {
    int64_t link, address, nbytes;
    int64_t place;  /* of a send: where the receiver finds it; -1: in slots that are not taken yet */
    int64_t done;   /* bytes that went into slots, or that were copied for a receive */
    int64_t until;  /* of a send: its source is free once the peer has consumed this message; -1 unknown, 0 at once */
    int64_t number; /* of a receive: the message that is lent; -1 once all is done */
    int64_t view;   /* where the message that is lent lies */
    int64_t staging, next;
    int64_t how;      /* of a receive: LEND, PAST */
    int64_t in_slots; /* of a receive: what is lent lies in slots */
} Request;

enum { SEND, RECEIVE, FOLD, TAKE, WAIT_SENT, SNAPSHOT, END };
/* How a send is made: as a put, where it may be; copied at once. How a receive: it may be lent to a fold; past the cache, as
 * a SNAPSHOT may be, too. */
enum { MAY_PUT = 1, BUFFERED = 2, LEND = 1, PAST = 2 };

typedef struct {
    int64_t at;       /* the word of the next instruction */
    int64_t requests; /* the address of `count` requests */
    int64_t count;
    int64_t exposed, exposed_end; /* the memory into which peers may put, as addresses; 0 if there is none */
    int64_t moved[4]; /* messages and bytes that all of it sends, messages and bytes that it receives */
    int64_t playing;  /* it was begun */
    int64_t deadline; /* of CLOCK_MONOTONIC, in ns */
    int64_t timed;    /* folds and takes that were played */
    int64_t put;      /* so many sends that come next have their data in place already */
    int64_t fault_link, fault_expected, fault_got;
    int64_t words[];
} Tape;

/* How playing a tape ends. LOOK: Python has to look whether a rank aborted or is gone, and may play on. */
enum { DONE, LOOK, LATE, MISMATCH, SIGNAL, NO_MEMORY };

typedef void (*Fold)(void *out, const void *const *operands, int64_t count, int64_t elements, double divisor);
/* `kind` is one of KINDS, `op` one of OPS, `level` the highest one of folds.c that may be used; 0 if there is none. The
 * divisor is 0 where nothing is divided. */
Fold fold_of(int kind, int op, int level);
int level_of_processor(void);
enum { U8, I8, I16, I32, I64, F16, BF16, F32, F64, BOOL, KINDS };
enum { SUM, PROD, MIN, MAX, BAND, BOR, BXOR, OPS };

void stream(char *to, const char *from, int64_t nbytes);

/* LAST_LOOK: a peer is gone, but what it wrote before still counts. BRIEFLY: returns LOOK instead of sleeping. */
enum { LAST_LOOK = 1, BRIEFLY = 2 };
/* Plays on, or begins: as the collective `contract`, which may take `timeout` ns. `times`, if not 0, get three words for
 * each fold and take: when it began to wait, had its data, and ended. `how` is any of the above. */
int play(Rank *rank, Tape *tape, int64_t contract, int64_t timeout, int64_t *times, int how);
/* Forgets a tape that was not played to its end. */
void drop(Tape *tape);

#endif
