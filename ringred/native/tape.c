/* Plays a tape: the instructions of one rank's plan, over the shared memory that shm.py describes.
 *
 * It does what executor.py does by means of shm.py and shm_sending.py, instruction by instruction, and leaves a
 * state from which those go on. A wait that cannot end here returns to Python; what is played again goes on where it was. */
#include <stdlib.h>
#include <string.h>

#include "slots.h"

enum { MOST_FUSED = 16, LEAST_BLOCK = 1 << 10 };

typedef struct {
    Rank *rank;
    Link *links;
    Tape *tape;
    Request *requests;
    int how;
    int64_t queues;         /* links with sends that wait for room */
    const int64_t *sharing; /* the SEND whose data lies in shared slots already, and where */
    int64_t shared_at;
} Player;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---------------------------------------------------------------- sending */

static void post(Player *player, Link *link, int64_t number, int64_t nbytes, int64_t place) {
    int64_t entry = link->entries_out + 8 * ENTRY_WORDS * (number % ENTRIES);
    set_word(entry, CONTRACT, player->rank->contract);
    set_word(entry, LENGTH, nbytes);
    set_word(entry, PLACE, place);
    set_word(entry, NUMBER, number); /* last: the descriptor is now complete */
    link->sent = number;
    wake(link->block);
}

/* Posts as much of a send as there is room for; whether that is all. */
static int start(Player *player, Request *request) {
    Link *link = player->links + request->link;
    for (;;) {
        int64_t number = link->sent + 1;
        if (!consumed(link, number - ENTRIES)) return 0;
        if (request->place >= 0) {
            request->until = request->place == PUT || request->done ? 0 : number;
            post(player, link, number, request->nbytes, request->place);
            return 1;
        }
        int64_t part = least(request->nbytes - request->done, SEGMENT_BYTES);
        int64_t offset = room(link, number, part);
        if (offset < 0) return 0;
        if (part) memcpy((char *)player->rank->window + offset, (char *)request->address + request->done, (size_t)part);
        request->done += part;
        int last = request->done == request->nbytes;
        if (last) request->until = 0;
        post(player, link, number, request->nbytes, offset << KIND_BITS | (last ? SLOT : SLOT_PART));
        if (last) return 1;
    }
}

/* Posts the sends that wait for room, in order, as far as there is room now. */
static void drain(Player *player) {
    for (int64_t at = 0; player->queues && at < player->rank->links; at++) {
        Link *link = player->links + at;
        if (link->sends < 0) continue;
        while (link->sends >= 0 && start(player, player->requests + link->sends))
            link->sends = player->requests[link->sends].next;
        player->queues -= link->sends < 0;
    }
}

/* Whether the peer has begun this collective. The first question waits a moment for that. */
static int entered(Player *player, Link *link) {
    int64_t contract = player->rank->contract;
    if (word_of(link->block, EXPOSED_CONTRACT) == contract) return 1;
    if (link->awaited == contract) return 0;
    link->awaited = contract;
    for (int64_t patience = now() + SPIN_NS; now() < patience;) {
        if (word_of(link->block, EXPOSED_CONTRACT) == contract) return 1;
        if (player->rank->gives_way) sched_yield();
        else pause_core();
    }
    return 0;
}

/* Where in the peer's window a put from `address` goes, or 0. */
static char *put_target(Player *player, Link *link, int64_t address, int64_t nbytes) {
    Rank *rank = player->rank;
    if (address < rank->exposed || address >= rank->exposed_end || !entered(player, link)) return 0;
    int64_t offset = word_of(link->block, EXPOSED_AT) + address - rank->exposed;
    if (offset < 0 || offset + nbytes > link->window_end - link->window) return 0;
    return (char *)link->window + offset;
}

/* Whether the next instruction sends the same data to another peer. */
static int sends_again(const int64_t *words) {
    const int64_t *next = words + 6;
    return next[0] == SEND && next[2] != words[2] && next[3] == words[3] && next[4] == words[4];
}

/* Takes slots for a message: its own, or those of one copy for several peers. Where in this rank's window, or -1; `copied`
 * says whether the copy is made already. */
static int64_t placed(Player *player, Link *link, const int64_t *words, int *copied) {
    Rank *rank = player->rank;
    int64_t nbytes = words[4], number = link->sent + 1, offset = -1;
    *copied = words == player->sharing;
    if (*copied) offset = player->shared_at;
    else if (sends_again(words)) offset = shared_room(rank, nbytes);
    if (offset < 0) return room(link, number, nbytes);
    share(rank, link, number, offset, nbytes);
    if (sends_again(words)) player->sharing = words + 6, player->shared_at = offset;
    return offset;
}

/* SEND, request, link, address, bytes, how.
 * Whether its data has a place now; `target` is where it is to be copied before it is posted, or 0. */
static int begin_send(Player *player, const int64_t *words, char **target) {
    Request *request = player->requests + words[1];
    Link *link = player->links + words[2];
    Rank *rank = player->rank;
    int64_t address = words[3], nbytes = words[4], put = words[5] & MAY_PUT, buffered = words[5] & BUFFERED;
    *request = (Request){.link = words[2], .address = address, .nbytes = nbytes, .place = -1, .until = -1, .next = -1};
    *target = 0;
    if (nbytes <= SMALL_BYTES) return 0;
    if (put && (*target = put_target(player, link, address, nbytes)) != 0) {
        request->place = PUT;
    } else if (!buffered && address >= rank->window && address < rank->window_end) {
        request->place = (address - rank->window) << KIND_BITS | AT;
    } else if (nbytes <= PART_BYTES && link->sends < 0) {
        int copied;
        int64_t offset = placed(player, link, words, &copied);
        if (offset < 0) return 0;
        request->place = offset << KIND_BITS | SLOT;
        request->done = nbytes;
        if (!copied) *target = (char *)rank->window + offset;
    }
    return request->place >= 0;
}

static void send(Player *player, const int64_t *words) {
    Request *request = player->requests + words[1];
    Link *link = player->links + words[2];
    if (player->tape->put) {
        player->tape->put--;
    } else {
        char *target;
        begin_send(player, words, &target);
        if (target) memcpy(target, (char *)request->address, (size_t)request->nbytes);
    }
    if (link->sends < 0 && start(player, request)) return;
    if (link->sends < 0) link->sends = words[1], player->queues++;
    else player->requests[link->last_send].next = words[1];
    link->last_send = words[1];
}

/* ---------------------------------------------------------------- waiting */

/* Returns once the word at `address` has reached `value`: DONE, or why it has to return before. */
static int until(Player *player, int64_t link, int64_t address, int64_t value) {
    Rank *rank = player->rank;
    if (word_of(address, 0) >= value) return DONE;
    for (int64_t spin = now() + (rank->gives_way ? rank->gives_way : SPIN_NS); now() < spin;) {
        drain(player);
        for (int look = 0; look < (rank->gives_way ? 1 : LOOKS); look++) {
            if (word_of(address, 0) >= value) return DONE;
            if (rank->gives_way) sched_yield();
            else pause_core();
        }
    }
    player->tape->fault_link = link;
    if (player->how & BRIEFLY) return LOOK;
    for (int interrupted = 0;;) {
        set_word(rank->block, SLEEPING, 1);
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* a peer that writes after this sees that it must wake this rank */
        drain(player);
        int64_t left = player->tape->deadline - now();
        int result = word_of(address, 0) >= value                                    ? DONE
                     : word_of(rank->block, ALARM) || player->how & LAST_LOOK        ? LOOK
                     : word_of((int64_t)&player->links[link].gone, 0)                ? LOOK
                     : word_of(player->links[link].block, CLOSED)                    ? LOOK
                     : left <= 0                                                     ? LATE
                     : interrupted                                                   ? SIGNAL
                                                                                     : -1;
        if (result >= 0) {
            set_word(rank->block, SLEEPING, 0);
            return result;
        }
        interrupted = sleep_on(rank->block + 8 * SLEEPING, least(left, LONGEST_SLEEP_NS));
    }
}

/* ---------------------------------------------------------------- receiving */

static void consume(Player *player, Link *link, int64_t number) {
    set_word(link->taken_at, 0, number);
    wake(link->block);
    drain(player); /* the peer gives back too: what waits may have room now */
}

/* Finishes the next receive from a peer, or lends what came for it. */
static int take(Player *player, Request *request, int wanted) {
    Link *link = player->links + request->link;
    for (;;) {
        int64_t number = link->taken + 1;
        int64_t entry = link->entries_in + 8 * ENTRY_WORDS * (number % ENTRIES);
        if (word_of(entry, NUMBER) != number) {
            int result = until(player, request->link, entry + 8 * NUMBER, number);
            if (result != DONE) return result;
        }
        int64_t nbytes = word_of(entry, LENGTH), place = word_of(entry, PLACE);
        int64_t offset = place >> KIND_BITS, kind = place & ((1 << KIND_BITS) - 1);
        if (word_of(entry, CONTRACT) != player->rank->contract || nbytes != request->nbytes) {
            player->tape->fault_link = request->link;
            player->tape->fault_expected = request->nbytes;
            player->tape->fault_got = nbytes;
            return MISMATCH;
        }
        int lent = (kind == AT || kind == SLOT) && request->how & LEND && !request->staging && wanted && nbytes;
        if (request->how & LEND && !lent && !request->staging && nbytes) {
            request->staging = (int64_t)malloc((size_t)nbytes);
            if (!request->staging) return NO_MEMORY;
        }
        link->taken = number;
        if (lent) {
            request->view = link->window + offset;
            request->number = number;
            request->in_slots = kind == SLOT;
            return DONE;
        }
        if (kind != PUT && nbytes) {
            int64_t part = kind == PART ? PART_BYTES : kind == SLOT_PART ? SEGMENT_BYTES : nbytes - request->done;
            char *target = (char *)(request->staging ? request->staging : request->address) + request->done;
            if (kind == AT || kind == PART) memcpy(target, (char *)link->window + offset, (size_t)part);
            else fetch(target, (char *)link->window + offset, part, request->how & PAST);
            request->done += part;
        }
        consume(player, link, number);
        if (kind != PART && kind != SLOT_PART) {
            request->number = -1;
            request->view = request->staging;
            return DONE;
        }
    }
}

/* RECEIVE, request, link, address, bytes, how. */
static void receive(Player *player, const int64_t *words) {
    Request *request = player->requests + words[1];
    Link *link = player->links + words[2];
    *request = (Request){.link = words[2], .address = words[3], .nbytes = words[4], .how = words[5], .next = -1};
    if (link->receives < 0) link->receives = words[1];
    else player->requests[link->last_receive].next = words[1];
    link->last_receive = words[1];
}

static int wait_received(Player *player, int64_t number) {
    Request *request = player->requests + number;
    Link *link = player->links + request->link;
    while (request->number == 0) {
        Request *first = player->requests + link->receives;
        int result = take(player, first, first == request);
        if (result != DONE) return result;
        link->receives = first->next;
    }
    return DONE;
}

static void release(Player *player, Request *request) {
    if (request->number > 0) consume(player, player->links + request->link, request->number);
    free((void *)request->staging);
    request->staging = request->view = 0;
    request->number = -1;
}

static int wait_sent(Player *player, int64_t number) {
    Request *request = player->requests + number;
    Link *link = player->links + request->link;
    drain(player);
    while (request->until < 0) {
        int result = until(player, request->link, link->acked_at, link->acked + 1);
        if (result != DONE) return result;
        drain(player);
    }
    if (consumed(link, request->until)) return DONE;
    int result = until(player, request->link, link->acked_at, request->until);
    if (result == DONE) consumed(link, request->until);
    return result;
}

/* ---------------------------------------------------------------- folding */

/* Whether one of the sends from `first` to `next` goes to the same peer as that. */
static int again(const int64_t *first, const int64_t *next) {
    for (; first < next; first += 6)
        if (first[2] == next[2]) return 1;
    return 0;
}

/* FOLD, out, elements, element size, kernel, divisor (the bits of a double), own operand, n, requests...
 * Where sends of the result follow, it is copied to where they need it block by block. Lines of slots that it reads become this
 * core's own with each block. */
static void fold(Player *player, const int64_t *words) {
    int64_t elements = words[2], size = words[3], own = words[6], n = words[7], sends = 0, copies = 0, held = 0;
    Fold kernel = (Fold)words[4];
    double divisor;
    memcpy(&divisor, words + 5, 8);
    char *out = (char *)words[1], *targets[MOST_FUSED];
    const char *operands[n + 1], *slots[n + 1];
    const void *parts[n + 1];
    for (int64_t k = 0, at = 8; k <= n; k++) {
        Request *request = k == own ? 0 : player->requests + words[at++];
        operands[k] = request ? (char *)request->view : out;
        if (request && request->in_slots) slots[held++] = operands[k];
    }
    const int64_t *first = words + 8 + n, *next = first; /* a second message to one peer has no number yet */
    while (copies < MOST_FUSED && next[0] == SEND && next[3] == words[1] && next[4] == elements * size
           && !again(first, next) && begin_send(player, next, targets + copies)) {
        if (targets[copies]) copies++;
        sends++;
        next += 6;
    }
    int64_t bytes = BLOCK_BYTES / (1 + held) & -LINE;
    int64_t block = copies || held ? (bytes < LEAST_BLOCK ? LEAST_BLOCK : bytes) / size : elements;
    for (int64_t start = 0; start < elements; start += block) {
        int64_t count = least(block, elements - start);
        for (int64_t k = 0; k <= n; k++) parts[k] = operands[k] + start * size;
        kernel(out + start * size, parts, n + 1, count, divisor);
        for (int64_t k = 0; k < copies; k++)
            memcpy(targets[k] + start * size, out + start * size, (size_t)(count * size));
        for (int64_t k = 0; k < held; k++) own_lines(slots[k] + start * size, count * size);
    }
    player->tape->put = sends;
}

/* ---------------------------------------------------------------- playing */

/* When a fold or take began to wait, had what it waited for, and ended: three words each. */
static void note(int64_t *times, const Tape *tape, int which) {
    if (times && (which || !times[3 * tape->timed])) times[3 * tape->timed + which] = now();
}

/* Makes a collective the one under way, and tells the peers where they may put; LOOK if it cannot begin. */
static int begin(Rank *rank, Tape *tape, int64_t contract, int64_t timeout) {
    if (word_of(rank->block, ALARM) || rank->forked || rank->queued) return LOOK;
    Link *links = (Link *)(rank + 1);
    rank->contract = contract;
    int shared = tape->exposed >= rank->window && tape->exposed < rank->window_end;
    rank->exposed = shared ? tape->exposed : 0;
    rank->exposed_end = shared ? tape->exposed_end : 0;
    set_word(rank->block, EXPOSED_AT, shared ? tape->exposed - rank->window : NOWHERE);
    set_word(rank->block, EXPOSED_CONTRACT, contract); /* last: peers read the other once they see this */
    for (int64_t at = 0; at < rank->links; at++) links[at].sends = links[at].receives = -1;
    memset((void *)tape->requests, 0, (size_t)tape->count * sizeof(Request));
    tape->at = tape->timed = tape->put = 0;
    tape->deadline = now() + timeout;
    tape->playing = 1;
    return DONE;
}

static void end(Rank *rank, Tape *tape) {
    int64_t *counters = (int64_t *)rank->counters;
    for (int k = 0; k < 4; k++) counters[k] += tape->moved[k];
    tape->playing = 0;
}

int play(Rank *rank, Tape *tape, int64_t contract, int64_t timeout, int64_t *times, int how) {
    int result = tape->playing ? DONE : begin(rank, tape, contract, timeout);
    if (result != DONE) return result;
    Player player = {rank, (Link *)(rank + 1), tape, (Request *)tape->requests, how, 0, 0, 0};
    for (int64_t at = 0; at < rank->links; at++) player.queues += player.links[at].sends >= 0;
    for (;;) {
        const int64_t *words = tape->words + tape->at;
        switch (words[0]) {
        case SEND:
            send(&player, words);
            tape->at += 6;
            break;
        case RECEIVE:
            receive(&player, words);
            tape->at += 6;
            break;
        case FOLD:
            note(times, tape, 0);
            for (int64_t k = 0; k < words[7]; k++)
                if ((result = wait_received(&player, words[8 + k])) != DONE) return result;
            note(times, tape, 1);
            fold(&player, words);
            for (int64_t k = 0; k < words[7]; k++) release(&player, player.requests + words[8 + k]);
            note(times, tape, 2);
            tape->timed++;
            tape->at += 8 + words[7];
            break;
        case TAKE:
            note(times, tape, 0);
            if ((result = wait_received(&player, words[1])) != DONE) return result;
            note(times, tape, 1);
            tape->timed++;
            tape->at += 2;
            break;
        case WAIT_SENT:
            if ((result = wait_sent(&player, words[1])) != DONE) return result;
            tape->at += 2;
            break;
        case SNAPSHOT: /* target, source, bytes, how */
            if (words[4] & PAST) stream((char *)words[1], (char *)words[2], words[3]);
            else if (words[3]) memcpy((void *)words[1], (void *)words[2], (size_t)words[3]);
            tape->at += 5;
            break;
        default:
            end(rank, tape);
            return DONE;
        }
    }
}

void drop(Tape *tape) {
    Request *requests = (Request *)tape->requests;
    for (int64_t at = 0; at < tape->count && tape->playing; at++) free((void *)requests[at].staging);
    tape->playing = 0;
}
