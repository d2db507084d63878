// Passes over a row of logits. Plain loops over 16 lanes, which each level's file compiles with its own flags; so every
// level gives the same bits.
#pragma once
#include "rows.h"
#include "sampling.h"

namespace {

constexpr int64_t LOGITS_AT_ONCE = 16;
typedef float Logits __attribute__((vector_size(4 * LOGITS_AT_ONCE)));
typedef int32_t LogitBits __attribute__((vector_size(4 * LOGITS_AT_ONCE)));

inline Logits load_logits(const float* x) {
    Logits values;
    std::memcpy(&values, x, sizeof(values));
    return values;
}

float largest_logit(const float* x, int64_t n) {
    constexpr int CHAINS = 4;
    Logits most[CHAINS];
    LogitBits is_nan[CHAINS] = {};
    for (Logits& values : most) values = Logits{} - __builtin_inff();
    int64_t i = 0;
    for (; i + CHAINS * LOGITS_AT_ONCE <= n; i += CHAINS * LOGITS_AT_ONCE) {
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Logits values = load_logits(x + i + chain * LOGITS_AT_ONCE);
            most[chain] = values > most[chain] ? values : most[chain];
            is_nan[chain] |= values != values;
        }
    }
    float result = -__builtin_inff();
    int32_t any = 0;
    for (int chain = 0; chain < CHAINS; ++chain) {
        for (int64_t j = 0; j < LOGITS_AT_ONCE; ++j) {
            result = most[chain][j] > result ? most[chain][j] : result;
            any |= is_nan[chain][j];
        }
    }
    for (; i < n; ++i) {
        result = x[i] > result ? x[i] : result;
        any |= x[i] != x[i];
    }
    return any ? from_bits(0x7fc00000) : result;
}

// NOTE: `exponential` ends at exp(-87); what is smaller, an excluded token above all, must weigh nothing.
inline float weight_of(float x, float largest, float temperature) {
    const float scaled = (x - largest) / temperature;
    const float weight = exponential(scaled);
    return scaled < -87.0f ? 0.0f : weight;
}

void weigh_blocks(const float* x, int64_t n, float largest, float temperature, float* sums) {
    for (int64_t start = 0; start < n; start += BLOCK_IDS) {
        const int64_t count = n - start < BLOCK_IDS ? n - start : BLOCK_IDS;
        float lanes[LOGITS_AT_ONCE] = {};
        int64_t i = 0;
        for (; i + LOGITS_AT_ONCE <= count; i += LOGITS_AT_ONCE) {
            for (int64_t j = 0; j < LOGITS_AT_ONCE; ++j) lanes[j] += weight_of(x[start + i + j], largest, temperature);
        }
        for (int64_t j = 0; i < count; ++i, ++j) lanes[j] += weight_of(x[start + i], largest, temperature);
        float sum = 0.0f;
        for (const float lane : lanes) sum += lane;
        *sums++ = sum;
    }
}

int64_t gather_ids(const float* x, int64_t n, float least, int32_t* ids) {
    constexpr int64_t STEP = 8 * LOGITS_AT_ONCE;  // few of them hold any
    int64_t count = 0;
    for (int64_t start = 0; start < n; start += STEP) {
        const int64_t end = n - start < STEP ? n : start + STEP;
        if (end - start == STEP) {
            LogitBits found = {};
            for (int64_t i = 0; i < STEP; i += LOGITS_AT_ONCE) found |= load_logits(x + start + i) >= least;
            int32_t any = 0;
            for (int64_t j = 0; j < LOGITS_AT_ONCE; ++j) any |= found[j];
            if (any == 0) continue;
        }
        for (int64_t i = start; i < end; ++i) {
            if (x[i] >= least) ids[count++] = int32_t(i);
        }
    }
    return count;
}

}  // namespace
