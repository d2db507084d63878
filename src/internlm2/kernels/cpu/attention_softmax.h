// From scores to weights: the softmax in powers of two, kept up to date block by block.
#pragma once
#include "attention_products.h"

namespace {

constexpr float LOG2_E = 1.44269504f;  // scores are multiplied with it, so that e to the x becomes 2 to the x

// 2 to the x for x <= 0, to about 1 ulp; exactly 0 below -126 and exactly 1 at 0; a NaN stays one. The polynomial is the
// best one of its degree on [-1/2, 1/2] that is 1 at 0.
inline Vector powers_of_two(Vector x) {
    const Whole is_small = x < all(-126.0f);
    const Vector clamped = is_small ? all(0.0f) : x;
    const Vector shifted = clamped + all(12582912.0f);
    const Vector r = clamped - (shifted - all(12582912.0f));
    Vector p = all(1.3264727214e-3f);
    p = multiply_add(p, r, all(9.6715128125e-3f));
    p = multiply_add(p, r, all(5.5507337448e-2f));
    p = multiply_add(p, r, all(2.4022242083e-1f));
    p = multiply_add(p, r, all(6.9314697760e-1f));
    p = multiply_add(p, r, all(1.0f));
    Whole bits, power;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    power = (bits << 23) + (127 << 23);  // what is above the whole number is shifted out
    Vector factor;
    __builtin_memcpy(&factor, &power, sizeof factor);
    return is_small ? all(0.0f) : p * factor;
}

// What the scores of each key are multiplied with, and with int8 also the weight of each value.
struct Scales {
    float keys[BLOCK_KEYS], values[BLOCK_KEYS];
    bool has_values;
};

// head: counted from the first one of `places`. A value scale is never negative.
inline void find_scales(float scale, const Places& places, const int64_t* slots, int64_t count, int64_t head,
                        Scales& out) {
    out.has_values = places.element == ELEMENT_INT8;
    for (int64_t i = 0; i < BLOCK_KEYS; ++i) out.keys[i] = scale * LOG2_E;
    if (!out.has_values) return;
    if (count < BLOCK_KEYS) std::memset(out.values, 0, sizeof out.values);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = slots[i] * places.slot_scales + head;
        out.keys[i] *= places.key_scales[at];
        out.values[i] = places.value_scales[at];
    }
}

// The scores of one query become weights, in place; the keys from `visible` on are hidden and weigh exactly nothing.
// query: packed, for what lies behind its words. weight_scale: of weights that become whole numbers.
template <class Path>
inline void soften(int32_t* scores, const int32_t* query_extra, int64_t visible, const Scales& scales, float* most,
                   float* total, float* factor, float* weight_scale) {
    constexpr int64_t COUNT = BLOCK_KEYS / LANES;
    Vector x[COUNT];
    Whole lane;
    for (int32_t i = 0; i < int32_t(LANES); ++i) lane[i] = i;
    const bool is_partial = visible < BLOCK_KEYS;
    Vector high = all(-__builtin_inff());
#pragma GCC unroll 16
    for (int64_t i = 0; i < COUNT; ++i) {
        x[i] = Path::scores(load_vector(scores + i * LANES), query_extra) * load_vector(scales.keys + i * LANES);
        if (is_partial) x[i] = lane + int32_t(i * LANES) < int32_t(visible) ? x[i] : all(-__builtin_inff());
        high = larger(x[i], high);
    }
    const float before = *most, largest = largest_of(high), now = largest > before ? largest : before;
    Vector sum = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < COUNT; ++i) {
        x[i] = powers_of_two(x[i] - all(now));
        sum += x[i];
        if (scales.has_values) {
            x[i] *= load_vector(scales.values + i * LANES);
            if (is_partial) x[i] = lane + int32_t(i * LANES) < int32_t(visible) ? x[i] : all(0.0f);
        }
    }
    Path::store_weights(x, scores, weight_scale);
    *factor = before == now ? 1.0f : powers_of_two(all(before - now))[0];
    *total = *total * *factor + sum_of(sum);
    *most = now;
}

}  // namespace
