/* Copies past the cache. */
#include <string.h>

#include "layout.h"

#if defined(__x86_64__)
#include <emmintrin.h>

/* Past the cache, so that what lies there is not read before it is overwritten. */
void stream(char *to, const char *from, int64_t nbytes) {
    int64_t head = -(intptr_t)to & (LINE - 1);
    if (nbytes < head + LINE) {
        memcpy(to, from, (size_t)nbytes);
        return;
    }
    memcpy(to, from, (size_t)head);
    int64_t at = head;
    for (; at + LINE <= nbytes; at += LINE)
        for (int part = 0; part < LINE; part += 16)
            _mm_stream_si128((__m128i *)(to + at + part), _mm_loadu_si128((const __m128i *)(from + at + part)));
    _mm_sfence(); /* before any word that tells of it */
    memcpy(to + at, from + at, (size_t)(nbytes - at));
}
#else
void stream(char *to, const char *from, int64_t nbytes) { memcpy(to, from, (size_t)nbytes); }
#endif
