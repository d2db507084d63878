// Rounding activations to 8 bits with AVX-512: the same numbers as `round_row` of rows.h, bit by bit, in a third of the
// time, which is felt in long prompts.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace {

// `turn` of rows.h for 32 values in two registers.
inline void turn_pair(__m512& low, __m512& high) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 norm = _mm512_set1_ps(TURN_NORM);
    low = _mm512_mul_ps(low, norm);
    high = _mm512_mul_ps(high, norm);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
        const __m512 a = _mm512_permutex2var_ps(low, even, high), b = _mm512_permutex2var_ps(low, odd, high);
        low = _mm512_add_ps(a, b);
        high = _mm512_sub_ps(a, b);
    }
}

// 16 values from `from` on, those past `count` as zeros.
inline __m512 load_sixteen(const uint8_t* source, int32_t element, int64_t from, int64_t count) {
    const int64_t left = count - from;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    if (element == ELEMENT_F32) return _mm512_maskz_loadu_ps(mask, source + 4 * from);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, source + 2 * from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

void round_row_512(const Weight& weight, const void* x, int32_t element, const Activations& out, int64_t row) {
    if (weight.kind == BFLOAT16 || weight.num_parts != 1) return round_row(weight, x, element, out, row);
    auto [words, scale, shift, stride] = row_at(out, row);
    const auto* source = static_cast<const uint8_t*>(x);
    const float shift_of_one = shift_of(weight);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    __m512 values[MAX_GROUP / 16];
    for (int64_t start = 0; start < weight.padded_columns; start += weight.group) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < weight.group / 16; i += 2) {
            __m512 low = load_sixteen(source, element, start + 16 * i, weight.columns);
            __m512 high = load_sixteen(source, element, start + 16 * i + 16, weight.columns);
            if (weight.uses_hadamard) turn_pair(low, high);
            const __m512i low_bits = _mm512_and_si512(_mm512_castps_si512(low), magnitude);
            const __m512i high_bits = _mm512_and_si512(_mm512_castps_si512(high), magnitude);
            most = _mm512_max_epu32(most, _mm512_max_epu32(low_bits, high_bits));
            values[i] = low;
            values[i + 1] = high;
        }
        const GroupScale group = scale_of_group(_mm512_reduce_max_epu32(most), 127.0f);
        const __m512 inverse = _mm512_set1_ps(group.inverse);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < weight.group / 16; ++i, words += 4 * stride) {
            // NOTE: what is not finite becomes zero, whatever the product with the zero inverse is.
            const __m512 product = _mm512_maskz_mul_ps(group.is_usable ? 0xffff : 0, values[i], inverse);
            const __m512 whole = _mm512_sub_ps(_mm512_add_ps(product, magic), magic);
            const __m512i numbers = _mm512_cvtps_epi32(whole);
            sum = _mm512_add_epi32(sum, numbers);
            const __m128i bytes = _mm512_cvtepi32_epi8(numbers);
            words[0] = _mm_cvtsi128_si32(bytes);
            words[stride] = _mm_extract_epi32(bytes, 1);
            words[2 * stride] = _mm_extract_epi32(bytes, 2);
            words[3 * stride] = _mm_extract_epi32(bytes, 3);
        }
        *scale = group.scale;
        *shift = shift_of_one * float(_mm512_reduce_add_epi32(sum));
        scale += stride;
        shift += stride;
    }
}

}  // namespace
