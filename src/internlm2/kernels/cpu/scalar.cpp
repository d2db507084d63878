// Plain C++ for every other processor, and the reference that the vector levels are read against.
#include "attention_block.h"
#include "sampling_rows.h"

namespace {

float dot_bf16(const uint8_t* data, const Tile& x, int64_t m) {
    float sum = 0.0f;
    for (int64_t word = 0; word < x.num_words; ++word, data += 4 * BLOCK_ROWS) {
        uint16_t pair[2], values[2];
        std::memcpy(pair, data, 4);
        std::memcpy(values, &x.words[word * x.stride + m], 4);
        sum += from_bf16(pair[0]) * from_bf16(values[0]);
        sum += from_bf16(pair[1]) * from_bf16(values[1]);
    }
    return sum;
}

// The unsigned weights of one group times the signed activations.
int32_t dot_group(const Weight& weight, const uint8_t* data, const int32_t* words, int64_t stride) {
    const bool is_int4 = weight.kind == INT4;
    int32_t sum = 0;
    for (int64_t k = 0; k < weight.group; k += is_int4 ? 8 : 4, data += 4 * BLOCK_ROWS) {
        int8_t one[4], two[4];
        std::memcpy(one, words, 4);
        words += stride;
        if (is_int4) {
            std::memcpy(two, words, 4);
            words += stride;
        }
        for (int64_t i = 0; i < 4; ++i) sum += is_int4 ? (data[i] & 15) * one[i] + (data[i] >> 4) * two[i] : data[i] * one[i];
    }
    return sum;
}

float dot_integer(const Weight& weight, const uint8_t* block, const Tile& x, int64_t lane, int64_t m) {
    const int64_t words_per_group = weight.group / 4;  // of the activations
    float total = 0.0f;
    for (int64_t g = 0; g < x.num_groups; ++g) {
        const int64_t index = g * x.stride + m;
        const int32_t whole = dot_group(weight, block + 4 * lane, x.words + g * words_per_group * x.stride + m, x.stride);
        block += word_bytes(weight);
        uint16_t scale;
        std::memcpy(&scale, block + 2 * lane, 2);
        block += SCALE_BYTES;
        const float zero = weight.has_zeros ? float(block[lane]) : 1.0f;
        block += weight.has_zeros ? BLOCK_ROWS : 0;
        total += (float(whole) - zero * x.shift[index]) * (from_bf16(scale) * x.scale[index]);
    }
    return total;
}

void tile(const Weight& weight, const Tile& x, int64_t block, int num, float* out) {
    const uint8_t* data = weight.data + block * block_bytes(weight);
    for (int m = 0; m < num; ++m) {
        for (int64_t lane = 0; lane < BLOCK_ROWS; ++lane) {
            out[m * BLOCK_ROWS + lane] = weight.kind == BFLOAT16 ? dot_bf16(data + 4 * lane, x, m)
                                                                 : dot_integer(weight, data, x, lane, m);
        }
    }
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
    uint64_t sum = 0;
    for (int64_t i = 0; i + 8 <= num_bytes; i += 8) {
        uint64_t value;
        std::memcpy(&value, data + i, 8);
        sum += value;
    }
    return sum;
}

}  // namespace

extern const Kernels scalar_kernels = {round_row,
                                       tile,
                                       store_block,
                                       read,
                                       pack_queries_by<Float32>,
                                       attend_range_by<Float32>,
                                       merge,
                                       finish,
                                       norm_row,
                                       rotate_head,
                                       store_head,
                                       load_floats};

extern const SamplingKernels scalar_sampling = {largest_logit, weigh_blocks, gather_ids};
