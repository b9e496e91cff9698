/* Folds of 16-bit floats on x86-64, in registers: a group of elements at a time, by AVX2 with F16C and by AVX-512 with BF16.
 *
 * A group is widened to two vectors of 32-bit floats, `low` and `high`, in an order that only load and store know. What is
 * left over at the end goes to the plain folds, which folds.c defines before it includes this file. */
#ifndef RINGRED_HALVES_H
#define RINGRED_HALVES_H

#include <immintrin.h>

#define HALF_FOLD(ISA, TARGET, V, GROUP, NAME, KIND, OP, DIVIDE, SET)                                            \
    TARGET static inline __attribute__((always_inline)) int64_t NAME##_groups_##ISA(                             \
        uint16_t *out, const void *const *operands, int64_t count, int64_t n, double divisor) {                  \
        const V divisors = SET((float)divisor);                                                                  \
        int64_t i = 0;                                                                                           \
        for (; i + GROUP <= n; i += GROUP) {                                                                     \
            V low, high, next_low, next_high;                                                                    \
            load_##KIND##_##ISA((const uint16_t *)operands[0] + i, &low, &high);                                 \
            for (int64_t k = 1; k < count; k++) {                                                                \
                load_##KIND##_##ISA((const uint16_t *)operands[k] + i, &next_low, &next_high);                   \
                low = OP(low, next_low), high = OP(high, next_high);                                             \
            }                                                                                                    \
            if (divisor != 0) low = DIVIDE(low, divisors), high = DIVIDE(high, divisors);                        \
            store_##KIND##_##ISA(out + i, low, high);                                                            \
        }                                                                                                        \
        return i;                                                                                                \
    }                                                                                                            \
    TARGET static void NAME##_##ISA(void *out, const void *const *operands, int64_t count, int64_t n,            \
                                    double divisor) {                                                            \
        int64_t i = count == 2 && divisor == 0 ? NAME##_groups_##ISA(out, operands, 2, n, 0)                     \
                                               : NAME##_groups_##ISA(out, operands, count, n, divisor);          \
        const void *rest[count];                                                                                 \
        for (int64_t k = 0; k < count; k++) rest[k] = (const uint16_t *)operands[k] + i;                         \
        if (i < n) NAME##_plain((uint16_t *)out + i, rest, count, n - i, divisor);                               \
    }

#define HALF_FOLDS(ISA, TARGET, V, GROUP, KIND, MM)                                                        \
    HALF_FOLD(ISA, TARGET, V, GROUP, sum_##KIND, KIND, MM##_add_ps, MM##_div_ps, MM##_set1_ps)             \
    HALF_FOLD(ISA, TARGET, V, GROUP, prod_##KIND, KIND, MM##_mul_ps, MM##_div_ps, MM##_set1_ps)            \
    HALF_FOLD(ISA, TARGET, V, GROUP, min_##KIND, KIND, less_or_nan_##ISA, MM##_div_ps, MM##_set1_ps)       \
    HALF_FOLD(ISA, TARGET, V, GROUP, max_##KIND, KIND, greater_or_nan_##ISA, MM##_div_ps, MM##_set1_ps)

/* ---------------------------------------------------------------- AVX2 */

#define AVX2 __attribute__((target("avx2,f16c")))

AVX2 static inline void load_f16_avx2(const uint16_t *from, __m256 *low, __m256 *high) {
    *low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
    *high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)));
}

AVX2 static inline void store_f16_avx2(uint16_t *to, __m256 low, __m256 high) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(to + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
}

/* Even elements low, odd ones high: each is a shift or a mask away from a float. */
AVX2 static inline void load_bf16_avx2(const uint16_t *from, __m256 *low, __m256 *high) {
    __m256i both = _mm256_loadu_si256((const __m256i *)from);
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}

/* Rounded to the nearest even, in the upper 16 bits. */
AVX2 static inline __m256i rounded_avx2(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

AVX2 static inline __m256i kept_nan_avx2(__m256i rounded, __m256 value) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    __m256 unordered = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, unordered));
}

AVX2 static inline void store_bf16_avx2(uint16_t *to, __m256 low, __m256 high) {
    __m256i even = rounded_avx2(low), odd = rounded_avx2(high);
    if (_mm256_movemask_ps(_mm256_cmp_ps(low, high, _CMP_UNORD_Q)))
        even = kept_nan_avx2(even, low), odd = kept_nan_avx2(odd, high);
    _mm256_storeu_si256((__m256i *)to, _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
}

AVX2 static inline __m256 less_or_nan_avx2(__m256 a, __m256 b) {
    return _mm256_blendv_ps(_mm256_min_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

AVX2 static inline __m256 greater_or_nan_avx2(__m256 a, __m256 b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

HALF_FOLDS(avx2, AVX2, __m256, 16, bf16, _mm256)
HALF_FOLDS(avx2, AVX2, __m256, 16, f16, _mm256)

/* ---------------------------------------------------------------- AVX-512 */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

AVX512 static inline void load_bf16_avx512(const uint16_t *from, __m512 *low, __m512 *high) {
    __m512i both = _mm512_loadu_si512(from);
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

AVX512 static inline __m512i rounded_avx512(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 unordered = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, unordered, _mm512_set1_epi32(0x7fc00000));
}

/* The instruction that rounds to BF16 takes subnormal numbers for zeros; they go another way. */
AVX512 static inline void store_bf16_avx512(uint16_t *to, __m512 low, __m512 high) {
    enum { SUBNORMAL = 0x20 };
    if (__builtin_expect(_mm512_fpclass_ps_mask(low, SUBNORMAL) | _mm512_fpclass_ps_mask(high, SUBNORMAL), 0)) {
        __m512i even = _mm512_srli_epi32(rounded_avx512(low), 16), odd = rounded_avx512(high);
        _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd));
        return;
    }
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
}

AVX512 static inline __m512 less_or_nan_avx512(__m512 a, __m512 b) {
    return _mm512_mask_mov_ps(_mm512_min_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

AVX512 static inline __m512 greater_or_nan_avx512(__m512 a, __m512 b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

HALF_FOLDS(avx512, AVX512, __m512, 32, bf16, _mm512)

/* Measured on Zen 4, wider conversions of f16 are slower. */
#define sum_f16_avx512 sum_f16_avx2
#define prod_f16_avx512 prod_f16_avx2
#define min_f16_avx512 min_f16_avx2
#define max_f16_avx512 max_f16_avx2

#endif
