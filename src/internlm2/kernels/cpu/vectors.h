// Vectors of float32 as wide as the level has them, and what a layer does to single rows besides products.
//
// LANES and the instructions come from the flags of the file that includes this; everything lies in an anonymous
// namespace, as in rows.h.
#pragma once
#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Whole __attribute__((vector_size(LANES * 4)));

inline Vector load_vector(const void* x) {
    Vector value;
    __builtin_memcpy(&value, x, sizeof value);
    return value;
}

inline void store_vector(void* out, Vector value) { __builtin_memcpy(out, &value, sizeof value); }

inline Vector all(float value) { return value - Vector{}; }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return Vector(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
    return Vector(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
}

inline float sum_of(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(__m512(x));
#else
    float lanes[LANES];
    store_vector(lanes, x);
    for (int64_t half = LANES / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
#endif
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float largest_of(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(__m512(x));
#else
    float lanes[LANES];
    store_vector(lanes, x);
    for (int64_t half = LANES / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
    return lanes[0];
#endif
}

void norm_row(float* hidden, const float* added, const float* weight, int64_t size, float eps, float* out) {
    Vector squares = {};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        Vector value = load_vector(hidden + i);
        if (added != nullptr) {
            value += load_vector(added + i);
            store_vector(hidden + i, value);
        }
        squares = multiply_add(value, value, squares);
    }
    for (; i < size; ++i) {
        if (added != nullptr) hidden[i] += added[i];
        rest += hidden[i] * hidden[i];
    }
    const float factor = 1.0f / __builtin_sqrtf((sum_of(squares) + rest) / float(size) + eps);
    for (i = 0; i < size; ++i) out[i] = hidden[i] * factor * weight[i];
}

constexpr int64_t HEAD_AT_ONCE = 1024;  // the longest head that these take; Python asks for no longer one

// As quant/kv.py: one scale for the head, whole numbers to the nearest, ties to even.
void store_int8(const float* x, int64_t size, int8_t* out, float* scale) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float wanted = from_bits(largest) / 127.0f;
    *scale = wanted < 1e-20f ? 1e-20f : wanted;
    if (largest >= 0x7f800000) {  // whole numbers cannot say it, so the scale does
        *scale = from_bits(0x7fc00000);
        std::memset(out, 0, size_t(size));
        return;
    }
    for (int64_t i = 0; i < size; ++i) out[i] = int8_t(int32_t(round_even(x[i] / *scale)));
}

void store_head(const float* x, int64_t size, int32_t element, void* out, float* scale) {
    if (element == ELEMENT_INT8) {
        store_int8(x, size, static_cast<int8_t*>(out), scale);
    } else if (element == ELEMENT_F32) {
        std::memcpy(out, x, size_t(size) * 4);
    } else {
        uint16_t rounded[HEAD_AT_ONCE];
        for (int64_t i = 0; i < size; ++i) rounded[i] = to_bf16(x[i]);
        std::memcpy(out, rounded, size_t(size) * 2);
    }
}

void rotate_head(const float* x, const float* cos, const float* sin, int64_t size, int32_t element, void* out,
                 float* scale) {
    float turned[HEAD_AT_ONCE];
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) turned[i] = x[i] * cos[i] - x[half + i] * sin[i];
    for (int64_t i = 0; i < half; ++i) turned[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
    store_head(turned, size, element, out, scale);
}

}  // namespace
