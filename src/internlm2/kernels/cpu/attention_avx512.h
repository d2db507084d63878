// The Paths of AVX-512 for queries that are stored in bfloat16: products of pairs of bfloat16, and of whole numbers where
// keys and values are int8.
#pragma once
#include "attention_products.h"

namespace {

inline __m512i whole(Vector x) { return _mm512_castps_si512(__m512(x)); }
inline Vector as_vector(__m512i x) { return Vector(_mm512_castsi512_ps(x)); }

// A word is a pair of coordinates of one key, or of the same coordinate of two keys.
struct Bfloat16 {
    static constexpr int64_t PER_WORD = 2;
    static constexpr int PARTS = 1;
    static constexpr int64_t QUERY_EXTRA = 0;
    static constexpr bool IS_WHOLE = false;
    static constexpr uint32_t EXPONENTS = 0x7f807f80u;

    static bool is_stored_so(int32_t) { return true; }
    static bool streams(int64_t head_dim) { return head_dim % 32 == 0; }

    static void load(const void* x, int32_t, int64_t size, int32_t* out) {
        auto* halves = reinterpret_cast<uint16_t*>(out);
        std::memcpy(halves, x, size_t(size) * 2);
        if (size % 2 != 0) halves[size] = 0;
    }
    static void load_query(const void* x, int32_t element, int64_t size, int64_t, int32_t* out) {
        load(x, element, size, out);
    }

    static Vector key(const void* words) { return load_vector(words); }
    static void copy_chunk(int32_t* out, const int32_t* words) { std::memcpy(out, words, CHUNK * 4); }
    static Vector add_dot(Vector sums, Vector keys, Vector queries) {
        return Vector(_mm512_dpbf16_ps(__m512(sums), (__m512bh)keys, (__m512bh)queries));
    }
    static Vector add(Vector a, Vector b) { return a + b; }
    static Vector next_query_part(Vector sums) { return sums; }
    static Vector scores(Vector sums, const int32_t*) { return sums; }

    static void store_weights(const Vector* weights, int32_t* out, float*) {
        for (int64_t i = 0; i < BLOCK_KEYS / LANES; ++i) {
            const auto halves = (__m256i)_mm512_cvtneps_pbh(__m512(weights[i]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, halves);
        }
    }
    // N (even) registers of words of both keys' values, from column d on.
    template <int N>
    static void load_values(const uint8_t* const* rows, int64_t key, int64_t count, int64_t d, Vector* out) {
#pragma GCC unroll 2
        for (int n = 0; n < N; n += 2) {
            const int64_t at = 2 * (d + n * LANES);
            const __m512i a = _mm512_loadu_si512(rows[key] + at);
            const __m512i b = key + 1 < count ? _mm512_loadu_si512(rows[key + 1] + at) : __m512i{};
            out[n] = as_vector(_mm512_permutex2var_epi16(a, low_halves(), b));
            out[n + 1] = as_vector(_mm512_permutex2var_epi16(a, high_halves(), b));
        }
    }
    static Vector add_products(Vector sums, Vector values, int32_t weight) {
        return Vector(_mm512_dpbf16_ps(__m512(sums), (__m512bh)values, (__m512bh)_mm512_set1_epi32(weight)));
    }
    static Vector next_weight_part(Vector sums) { return sums; }
    static Vector begin(const float* out, float factor) { return load_vector(out) * all(factor); }
    static void end(float* out, Vector sums, float, float) { store_vector(out, sums); }
    static void end_stream(const float*, float*, int64_t, float, float) {}

    // [pair of keys][padded]: words of both keys' values.
    static void pack_values(const uint8_t* const* rows, int64_t count, int32_t, int64_t size, int64_t padded,
                            int32_t* out) {
        for (int64_t key = 0; key < count; key += 2, out += padded) {
            for (int64_t d = 0; d < size; d += 32) {
                const __mmask32 mask = size - d >= 32 ? 0xffffffffu : (1u << (size - d)) - 1;
                const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[key] + 2 * d);
                const __m512i b =
                    key + 1 < count ? _mm512_maskz_loadu_epi16(mask, rows[key + 1] + 2 * d) : __m512i{};
                _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low_halves(), b));
                if (d + 16 >= padded) continue;
                _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high_halves(), b));
            }
        }
    }
    static void hide_value(int32_t* values, int64_t key, int64_t padded) {
        int32_t* words = values + key / 2 * padded;
        for (int64_t d = 0; d < padded; ++d) words[d] &= key % 2 == 0 ? int32_t(0xffff0000u) : 0xffff;
    }

   private:
    // Halves 0, 32, 1, 33, ... of two registers, and those from 16 on.
    static __m512i low_halves() {
        return _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                 0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    }
    static __m512i high_halves() { return _mm512_add_epi16(low_halves(), _mm512_set1_epi16(16)); }
};

// Keys and values in int8, four to a word, are multiplied as they are. vpdpbusd takes bytes without a sign on one side:
// keys are shifted by 128, which is taken back through the sum of the query; weights have no sign.
//
// A query becomes 15 bits and a scale that is a power of two, as 128 high + low: a coordinate in bfloat16 loses nothing
// unless it is less than a 64th of the largest. The weights of a block become 16 bits, 256 high + low, and a scale:
// closer than bfloat16 would be. So all sums are whole numbers, modulo 2^32 between and within 2^31 in the end.
struct Integer8 {
    static constexpr int64_t PER_WORD = 4;
    static constexpr int PARTS = 2;
    static constexpr int64_t QUERY_EXTRA = LANES;  // the scale, and 128 times the sum
    static constexpr bool IS_WHOLE = true;
    static constexpr uint32_t EXPONENTS = 0;

    static bool is_stored_so(int32_t) { return true; }
    static bool streams(int64_t head_dim) { return head_dim % 64 == 0; }

    static void load(const void* x, int32_t, int64_t size, int32_t* out) { std::memcpy(out, x, size_t(size)); }

    static void load_query(const void* x, int32_t element, int64_t size, int64_t num_words, int32_t* out) {
        float values[HEAD_AT_ONCE];
        load_floats(x, element, size, values);
        uint32_t largest = 0;
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t magnitude = to_bits(values[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        int32_t* extra = out + PARTS * num_words;
        const uint32_t exponent = largest >> 23;
        if (exponent == 255) extra[0] = 0x7fc00000;
        if (exponent == 255 || exponent < 27) return;  // below 2^-100 it counts as zeros
        const float inverse = from_bits((254 + 13 - exponent) << 23);
        auto* high = reinterpret_cast<int8_t*>(out);
        auto* low = reinterpret_cast<int8_t*>(out + num_words);
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) {  // |value| < 2^14
            const float value = round_even(values[i] * inverse);
            float top = round_even(value * 0.0078125f);
            top = top > 127.0f ? 127.0f : top;
            high[i] = int8_t(int32_t(top));
            low[i] = int8_t(int32_t(value - 128.0f * top));
            sum += int32_t(value);
        }
        extra[0] = int32_t((exponent - 13) << 23);
        extra[1] = int32_t(128u * uint32_t(sum));
    }

    static Vector key(const void* words) {
        return as_vector(_mm512_xor_si512(_mm512_loadu_si512(words), _mm512_set1_epi8(-128)));
    }
    static void copy_chunk(int32_t* out, const int32_t* words) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    }
    static Vector add_dot(Vector sums, Vector keys, Vector queries) { return dot(sums, keys, queries); }
    static Vector add(Vector a, Vector b) { return as_vector(_mm512_add_epi32(whole(a), whole(b))); }
    static Vector next_query_part(Vector sums) { return as_vector(_mm512_slli_epi32(whole(sums), 7)); }
    static Vector scores(Vector sums, const int32_t* extra) {
        const __m512i signed_sums = _mm512_sub_epi32(whole(sums), _mm512_set1_epi32(extra[1]));
        return Vector(_mm512_cvtepi32_ps(signed_sums)) * all(from_bits(uint32_t(extra[0])));
    }

    // 64 high bytes, then 64 low ones. What is not finite or negative, which no scale should make it, becomes NaN.
    static void store_weights(const Vector* weights, int32_t* out, float* scale) {
        constexpr int64_t COUNT = BLOCK_KEYS / LANES;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 is_good = 0xffff;
        for (int64_t i = 0; i < COUNT; ++i) {
            const auto x = __m512(weights[i]);
            is_good &= _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
            largest = _mm512_max_ps(largest, x);
        }
        const float most = _mm512_reduce_max_ps(largest);
        const bool is_finite = is_good == 0xffff && most < __builtin_inff();
        // NOTE: below 2^-100 the reciprocal of the scale would leave float32; such a block counts as zeros.
        const bool is_zero = !is_finite || most < from_bits(0x0d800000);
        *scale = !is_finite ? from_bits(0x7fc00000) : is_zero ? 0.0f : most / 65535.0f;
        const Vector inverse = all(is_zero ? 0.0f : 65535.0f / most);
        auto* bytes = reinterpret_cast<uint8_t*>(out);
        for (int64_t i = 0; i < COUNT; ++i, bytes += LANES) {
            const __m512i value = is_zero ? __m512i{} : _mm512_cvtps_epi32(__m512(weights[i] * inverse));
            const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), high);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + BLOCK_KEYS), _mm512_cvtepi32_epi8(value));
        }
    }
    // Four registers, of 64 columns: register n holds columns 16 r + 4 n + ... in its quarter r, see end_stream. Behind
    // the last key it is repeated; its weight is zero there.
    template <int N>
    static void load_values(const uint8_t* const* rows, int64_t key, int64_t count, int64_t d, Vector* out) {
        static_assert(N == 4, "64 columns at a time");
        __m512i four[4];
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
            four[i] = _mm512_loadu_si512(rows[key + i < count ? key + i : count - 1] + d);
        }
        interleave(four, out);
    }
    static Vector add_products(Vector sums, Vector values, int32_t weight) {
        return dot(sums, as_vector(_mm512_set1_epi32(weight)), values);
    }
    static Vector next_weight_part(Vector sums) { return as_vector(_mm512_slli_epi32(whole(sums), 8)); }
    static Vector begin(const float*, float) { return Vector{}; }
    static void end(float* out, Vector sums, float factor, float scale) {
        const Vector added = Vector(_mm512_cvtepi32_ps(whole(sums))) * all(scale);
        store_vector(out, multiply_add(load_vector(out), all(factor), added));
    }
    static void end_stream(const float* sums, float* out, int64_t head_dim, float factor, float scale) {
        for (int64_t d = 0; d < head_dim; d += 64) {
            Vector four[4];
            for (int n = 0; n < 4; ++n) four[n] = load_vector(sums + d + n * LANES);
            turn(four);
            for (int n = 0; n < 4; ++n) end(out + d + n * LANES, four[n], factor, scale);
        }
    }

    // [four keys][padded]: words of all four keys' values.
    static void pack_values(const uint8_t* const* rows, int64_t count, int32_t, int64_t size, int64_t padded,
                            int32_t* out) {
        for (int64_t key = 0; key < count; key += 4, out += padded) {
            for (int64_t d = 0; d < size; d += 64) {
                const __mmask64 mask = size - d >= 64 ? ~__mmask64{0} : (__mmask64{1} << (size - d)) - 1;
                __m512i four[4];
                for (int64_t i = 0; i < 4; ++i) {
                    four[i] = key + i < count ? _mm512_maskz_loadu_epi8(mask, rows[key + i] + d) : __m512i{};
                }
                Vector words[4];
                interleave(four, words);
                turn(words);
                for (int64_t n = 0; n < 4 && d + n * LANES < padded; ++n) store_vector(out + d + n * LANES, words[n]);
            }
        }
    }
    static void hide_value(int32_t*, int64_t, int64_t) {}  // whole numbers times a weight of zero are zero

   private:
    // NOTE: not the intrinsic, see avx512.cpp.
    static Vector dot(Vector sums, Vector bytes, Vector signed_bytes) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(signed_bytes));
        return sums;
    }
    static void interleave(const __m512i* rows, Vector* out) {
        const __m512i low_ab = _mm512_unpacklo_epi8(rows[0], rows[1]), low_cd = _mm512_unpacklo_epi8(rows[2], rows[3]);
        const __m512i high_ab = _mm512_unpackhi_epi8(rows[0], rows[1]);
        const __m512i high_cd = _mm512_unpackhi_epi8(rows[2], rows[3]);
        out[0] = as_vector(_mm512_unpacklo_epi16(low_ab, low_cd));
        out[1] = as_vector(_mm512_unpackhi_epi16(low_ab, low_cd));
        out[2] = as_vector(_mm512_unpacklo_epi16(high_ab, high_cd));
        out[3] = as_vector(_mm512_unpackhi_epi16(high_ab, high_cd));
    }
    // Quarter r of register n changes places with quarter n of register r.
    static void turn(Vector* x) {
        const auto a = __m512(x[0]), b = __m512(x[1]), c = __m512(x[2]), d = __m512(x[3]);
        const __m512 low_ab = _mm512_shuffle_f32x4(a, b, 0x44), low_cd = _mm512_shuffle_f32x4(c, d, 0x44);
        const __m512 high_ab = _mm512_shuffle_f32x4(a, b, 0xee), high_cd = _mm512_shuffle_f32x4(c, d, 0xee);
        x[0] = Vector(_mm512_shuffle_f32x4(low_ab, low_cd, 0x88));
        x[1] = Vector(_mm512_shuffle_f32x4(low_ab, low_cd, 0xdd));
        x[2] = Vector(_mm512_shuffle_f32x4(high_ab, high_cd, 0x88));
        x[3] = Vector(_mm512_shuffle_f32x4(high_ab, high_cd, 0xdd));
    }
};

}  // namespace
