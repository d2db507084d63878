// Choosing tokens: what is asked of a row of logits, and what every instruction level does for it.
#pragma once
#include <cstdint>

// Of one row. Mirrored by `WANTED` in sampling.py. temperature 0: the largest logit. top_k 0: all; top_p 1 and min_p 0:
// no limit.
struct Wanted {
    double temperature, top_p, min_p;
    double uniform;  // in [0, 1): the place in the cumulative distribution
    int64_t top_k;
};

constexpr int64_t BLOCK_IDS = 128;  // ids whose weights are summed together

struct SamplingKernels {
    // The largest of n logits; NaN when one of them is.
    float (*largest)(const float* x, int64_t n);
    // sums[i] = the weights exp((x - largest) / temperature) of ids [i * BLOCK_IDS, (i + 1) * BLOCK_IDS), in float32.
    void (*weigh)(const float* x, int64_t n, float largest, float temperature, float* sums);
    // The ids of all logits that are at least `least`, in order; how many.
    int64_t (*gather)(const float* x, int64_t n, float least, int32_t* ids);
};

extern const SamplingKernels scalar_sampling;
#if defined(__x86_64__)
extern const SamplingKernels avx2_sampling;
extern const SamplingKernels avx512_sampling;
#endif
