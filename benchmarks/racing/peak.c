/* How many operations a second one thread's matrix instructions do, with operands in registers only.
 *
 * `vpdpbusd` (int8: 64 products and sums) and `vdpbf16ps` (bfloat16: 32), 24 chains so that their latency is hidden.
 * Compiled with -march=native; fails to compile where the processor lacks the instructions.
 */
#include <immintrin.h>
#include <stdint.h>

#if !defined(__AVX512VNNI__) || !defined(__AVX512BF16__)
#error "this processor has no AVX-512 VNNI and BF16"
#endif

enum { CHAINS = 24 };

#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) \
    X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

/* Operations done: 2 (a product and a sum) for each of 64 bytes. */
int64_t peak_int8(int64_t rounds) {
#define START(i) __m512i s##i = _mm512_set1_epi32(i);
#define STEP(i) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(s##i) : "v"(a), "v"(b));
#define ADD(i) sum = _mm512_add_epi32(sum, s##i);
    __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1), sum = _mm512_setzero_si512();
    EACH(START)
    for (int64_t n = 0; n < rounds; n++) { EACH(STEP) }
    EACH(ADD)
    volatile int keep = _mm512_reduce_add_epi32(sum);
    (void)keep;
    return rounds * CHAINS * 64 * 2;
#undef START
#undef STEP
#undef ADD
}

/* Operations done: 2 for each of 32 numbers. */
int64_t peak_bfloat16(int64_t rounds) {
#define START(i) __m512 s##i = _mm512_setzero_ps();
#define STEP(i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(s##i) : "v"(a), "v"(a));
#define ADD(i) sum = _mm512_add_ps(sum, s##i);
    __m512i a = _mm512_setzero_si512();
    __m512 sum = _mm512_setzero_ps();
    EACH(START)
    for (int64_t n = 0; n < rounds; n++) { EACH(STEP) }
    EACH(ADD)
    volatile float keep = _mm512_reduce_add_ps(sum);
    (void)keep;
    return rounds * CHAINS * 32 * 2;
}
