// Work on single rows: rounding activations, and what happens to a finished block. Plain loops, which each level's
// file compiles with its own flags: everything here lies in an anonymous namespace, so that no level borrows the
// instructions of another through the linker.
#pragma once
#include <cstring>

#include "layout.h"

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bf16(uint16_t value) { return from_bits(uint32_t(value) << 16); }

// To the nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return uint16_t(is_nan ? (bits >> 16) | 0x40 : rounded);
}

// To the nearest whole number, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline void load_floats(const void* x, int32_t element, int64_t n, float* out) {
    if (element == ELEMENT_F32) {
        std::memcpy(out, x, size_t(n) * 4);
        return;
    }
    const auto* source = static_cast<const uint8_t*>(x);
    for (int64_t i = 0; i < n; ++i) {
        uint16_t half;
        std::memcpy(&half, source + 2 * i, 2);
        out[i] = from_bf16(half);
    }
}

// Where the rounded values of one row go; a second part lies right behind the first in every place.
struct Place {
    int8_t* q[2];
    float* scale;
    float* shift;
    float shift_of_one;  // the factor of the sum
};

struct GroupScale {
    float inverse, scale;
    bool is_usable;  // else all its numbers are zero
};

// largest: the bits of the largest magnitude, which becomes `limit`.
inline GroupScale scale_of_group(uint32_t largest, float limit) {
    // NOTE: below 2^-100 the reciprocal of the scale would leave float32; such a group counts as zeros.
    if (largest >= 0x7f800000) return {0.0f, from_bits(0x7fc00000), false};
    if (largest < 0x0d800000) return {0.0f, 0.0f, false};
    return {limit / from_bits(largest), from_bits(largest) / limit, true};
}

// With two parts a value is 128 high + low, |high| <= 127, |low| <= 64: 15 bits in two rows that the kernels multiply
// like any others. The largest magnitude is found on the bit patterns, where a NaN is larger than infinity and cannot
// hide.
void quantise_group(const float* x, int64_t group, int num_parts, const Place& place) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < group; ++i) {
        const uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const auto [inverse, scale, is_usable] = scale_of_group(largest, num_parts == 2 ? 127.0f * 128.0f : 127.0f);
    if (!is_usable) {
        for (int part = 0; part < num_parts; ++part) {
            std::memset(place.q[part], 0, size_t(group));
            place.scale[part] = scale;
            place.shift[part] = 0.0f;
        }
        return;
    }
    int32_t high_sum = 0, low_sum = 0;
    if (num_parts == 1) {
        for (int64_t i = 0; i < group; ++i) {
            const int32_t value = int32_t(round_even(x[i] * inverse));
            place.q[0][i] = int8_t(value);
            high_sum += value;
        }
    } else {
        for (int64_t i = 0; i < group; ++i) {
            const float value = round_even(x[i] * inverse), high = round_even(value * 0.0078125f);
            const int32_t high_part = int32_t(high), low_part = int32_t(value - 128.0f * high);
            place.q[0][i] = int8_t(high_part);
            place.q[1][i] = int8_t(low_part);
            high_sum += high_part;
            low_sum += low_part;
        }
        place.scale[1] = scale;
        place.shift[1] = place.shift_of_one * float(low_sum);
    }
    place.scale[0] = num_parts == 2 ? 128.0f * scale : scale;
    place.shift[0] = place.shift_of_one * float(high_sum);
}

constexpr int64_t MAX_GROUP = 256;

constexpr float TURN_NORM = 0.17677669f;

// What the sum of the activations is multiplied with to take back the shift or zero of unsigned weights.
inline float shift_of(const Weight& weight) { return weight.has_zeros ? 0.0625f : weight.kind == INT8 ? 128.0f : 8.0f; }

// x times the Hadamard matrix of 32 columns (Sylvester's, divided by sqrt(32), so that the product turned twice is x
// again), for each 32 values: an outlier is spread over its neighbours, and 8 bits are enough for all of them. Five times
// the same step, which the compiler makes vectors of; https://arxiv.org/abs/2404.00456 is where the idea is from.
void turn(float* x, int64_t size) {
    constexpr int64_t HALF = COLUMN_MULTIPLE / 2;
    for (int64_t start = 0; start < size; start += COLUMN_MULTIPLE, x += COLUMN_MULTIPLE) {
        alignas(64) float other[COLUMN_MULTIPLE];
        for (int64_t i = 0; i < COLUMN_MULTIPLE; ++i) x[i] *= TURN_NORM;
        const auto step = [](const float* from, float* to) {
            for (int64_t i = 0; i < HALF; ++i) {
                to[i] = from[2 * i] + from[2 * i + 1];
                to[HALF + i] = from[2 * i] - from[2 * i + 1];
            }
        };
        step(x, other);
        step(other, x);
        step(x, other);
        step(other, x);
        step(x, other);
        std::memcpy(x, other, sizeof(other));
    }
}

// Where one row of activations begins in its tile; its next word or group is `stride` further.
struct RowPlace {
    int32_t* words;
    float* scale;
    float* shift;
    int64_t stride;
};

inline RowPlace row_at(const Activations& x, int64_t row) {
    const int64_t tile = row / x.tile_rows, first = tile * x.tile_rows, m = row % x.tile_rows;
    return {x.words + first * x.num_words + m, x.scale + first * x.num_groups + m,
            x.shift + first * x.num_groups + m, rows_of_tile(x, tile)};
}

void round_row(const Weight& weight, const void* x, int32_t element, const Activations& out, int64_t row) {
    auto [words, scale, shift, stride] = row_at(out, row);
    const auto* source = static_cast<const uint8_t*>(x);
    const bool is_bf16 = weight.kind == BFLOAT16;
    const float shift_of_one = shift_of(weight);
    const int64_t step = is_bf16 ? COLUMN_MULTIPLE : weight.group;
    alignas(64) float values[MAX_GROUP];
    union {
        uint16_t halves[MAX_GROUP];
        int8_t q[2][MAX_GROUP];
        int32_t joined[2][MAX_GROUP / 4];
        int32_t pairs[MAX_GROUP / 2];
    } rounded;
    for (int64_t start = 0; start < weight.padded_columns; start += step) {
        const int64_t left = weight.columns - start;
        const int64_t count = left < 0 ? 0 : left < step ? left : step;
        load_floats(source + start * (element == ELEMENT_F32 ? 4 : 2), element, count, values);
        for (int64_t i = count; i < step; ++i) values[i] = 0.0f;
        if (is_bf16) {
            for (int64_t i = 0; i < step; ++i) rounded.halves[i] = to_bf16(values[i]);
            for (int64_t word = 0; word < step / 2; ++word, words += stride) *words = rounded.pairs[word];
            continue;
        }
        if (weight.uses_hadamard) turn(values, step);
        quantise_group(values, step, weight.num_parts, {{rounded.q[0], rounded.q[1]}, scale, shift, shift_of_one});
        for (int64_t word = 0; word < step / 4; ++word, words += stride) {
            for (int part = 0; part < weight.num_parts; ++part) words[part] = rounded.joined[part][word];
        }
        scale += stride;
        shift += stride;
    }
}

// exp for the gate, to about 2 ulp: 2^n times a polynomial of the rest (Cephes' expf coefficients,
// https://www.netlib.org/cephes). Without calls, so that the compiler makes vectors of it.
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;  // NOTE: written so that a NaN passes through
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t power = ((to_bits(shifted) & 0x1ff) + 127) << 23;
    return p * from_bits(power & 0x7f800000);
}

void store_block(const float* values, const float* bias, bool is_gated, int64_t n, int32_t element, void* out) {
    float finished[BLOCK_ROWS];
    if (is_gated) {
        for (int64_t i = 0; i < HALF_ROWS; ++i) {
            const float gate = values[i];
            finished[i] = gate / (1.0f + exponential(-gate)) * values[HALF_ROWS + i];
        }
    } else {
        for (int64_t i = 0; i < BLOCK_ROWS; ++i) finished[i] = values[i];
    }
    if (bias != nullptr) {
        for (int64_t i = 0; i < n; ++i) finished[i] += bias[i];
    }
    if (element == ELEMENT_F32) {
        std::memcpy(out, finished, size_t(n) * 4);
        return;
    }
    uint16_t rounded[BLOCK_ROWS];
    for (int64_t i = 0; i < BLOCK_ROWS; ++i) rounded[i] = to_bf16(finished[i]);
    std::memcpy(out, rounded, size_t(n) * 2);
}

}  // namespace
