// AVX2 with FMA: a register holds one word of 8 output rows, and a block is done in two halves of 16 rows.
#include <immintrin.h>

#include "attention_block.h"
#include "sampling_rows.h"

namespace {

constexpr int64_t AHEAD = 4096;  // of the words: so far on, data are asked for
constexpr int TILE = 3;          // activation rows at a time: 6 sums, their registers for products, the weights

inline __m256i load(const uint8_t* data) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)); }

inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

inline __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000u))));
}

template <int M>
void half_bf16(const uint8_t* data, const Tile& x, float* out) {
    const int32_t* words = x.words;
    __m256 sums[M][2];
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_ps();
    for (int64_t word = 0; word < x.num_words; ++word, data += 128, words += x.stride) {
        _mm_prefetch(reinterpret_cast<const char*>(data + AHEAD), _MM_HINT_T0);
        const __m256i low = load(data), high = load(data + 32);
        for (int m = 0; m < M; ++m) {
            const __m256i pair = _mm256_set1_epi32(words[m]);
            sums[m][0] = _mm256_fmadd_ps(even(low), even(pair), sums[m][0]);
            sums[m][1] = _mm256_fmadd_ps(even(high), even(pair), sums[m][1]);
            sums[m][0] = _mm256_fmadd_ps(odd(low), odd(pair), sums[m][0]);
            sums[m][1] = _mm256_fmadd_ps(odd(high), odd(pair), sums[m][1]);
        }
    }
    for (int m = 0; m < M; ++m) {
        _mm256_storeu_ps(out + 32 * m, sums[m][0]);
        _mm256_storeu_ps(out + 32 * m + 8, sums[m][1]);
    }
}

// Products of signed bytes, four to a word. NOTE: vpmaddubsw adds pairs of unsigned-by-signed products with
// saturation; |w| times x with the sign of w keeps them within 2 * 127 * 127 < 2^15.
inline __m256i dot_signed(__m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline __m256i dot_nibbles(__m256i w, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
}

inline __m256 load_scales(const uint8_t* scales) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// The whole numbers of one register less the zero of each row times the sum of the activations. zeros: of its rows.
inline __m256 without_zero(const Weight& weight, const uint8_t* zeros, __m256i whole, float shift) {
    const __m256 value = _mm256_cvtepi32_ps(whole);
    if (weight.kind == INT8) return value;
    if (!weight.has_zeros) return _mm256_sub_ps(value, _mm256_set1_ps(shift));
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros));
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(shift), value);
}

// half_index: 0 or 1, the first or last 16 rows of the block.
template <int M, bool IS_INT4>
void half_integer(const Weight& weight, const uint8_t* block, const Tile& x, int64_t half_index, float* out) {
    const int64_t steps = weight.group / (IS_INT4 ? 8 : 4);  // of a group
    const int32_t* words = x.words;
    const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(int8_t(0x80));
    for (int64_t g = 0; g < x.num_groups; ++g) {
        const uint8_t* data = block + 64 * half_index;
        const uint8_t* scales = block + word_bytes(weight) + SCALE_BYTES / 2 * half_index;
        const uint8_t* zeros = block + word_bytes(weight) + SCALE_BYTES + HALF_ROWS * half_index;
        block += word_bytes(weight) + SCALE_BYTES + (weight.has_zeros ? BLOCK_ROWS : 0);
        __m256i sums[M][2];
        for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
        for (int64_t step = 0; step < steps; ++step, data += 128, words += (IS_INT4 ? 2 : 1) * x.stride) {
            _mm_prefetch(reinterpret_cast<const char*>(data + AHEAD), _MM_HINT_T0);
            for (int half = 0; half < 2; ++half) {
                const __m256i bytes = load(data + 32 * half);
                const __m256i low = IS_INT4 ? _mm256_and_si256(bytes, nibble) : _mm256_xor_si256(bytes, sign);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
                for (int m = 0; m < M; ++m) {
                    const __m256i one = _mm256_set1_epi32(words[m]);
                    __m256i& total = sums[m][half];
                    total = _mm256_add_epi32(total, IS_INT4 ? dot_nibbles(low, one) : dot_signed(low, one));
                    if (IS_INT4) {
                        const __m256i two = _mm256_set1_epi32(words[x.stride + m]);
                        total = _mm256_add_epi32(total, dot_nibbles(high, two));
                    }
                }
            }
        }
        for (int m = 0; m < M; ++m) {
            const int64_t index = g * x.stride + m;
            for (int half = 0; half < 2; ++half) {
                float* target = out + 32 * m + 8 * half;
                const __m256 value = without_zero(weight, zeros + 8 * half, sums[m][half], x.shift[index]);
                const __m256 scale = _mm256_mul_ps(load_scales(scales + 16 * half),
                                                   _mm256_set1_ps(x.scale[index]));
                const __m256 before = g == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(target);
                _mm256_storeu_ps(target, _mm256_fmadd_ps(value, scale, before));
            }
        }
    }
}

template <int M>
void tile_of(const Weight& weight, const Tile& x, int64_t block, float* out) {
    for (int64_t half = 0; half < 2; ++half) {
        const uint8_t* data = weight.data + block * block_bytes(weight);
        float* target = out + 16 * half;
        if (weight.kind == BFLOAT16) {
            half_bf16<M>(data + 64 * half, x, target);
        } else if (weight.kind == INT8) {
            half_integer<M, false>(weight, data, x, half, target);
        } else {
            half_integer<M, true>(weight, data, x, half, target);
        }
    }
}

void tile(const Weight& weight, const Tile& x, int64_t block, int num, float* out) {
    Tile part = x;
    for (; num > 0; num -= TILE, part.words += TILE, part.scale += TILE, part.shift += TILE, out += 32 * TILE) {
        if (num >= TILE) {
            tile_of<TILE>(weight, part, block, out);
        } else if (num == 2) {
            tile_of<2>(weight, part, block, out);
        } else {
            tile_of<1>(weight, part, block, out);
        }
    }
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
    __m256i sums[4] = {};
    for (int64_t i = 0; i + 128 <= num_bytes; i += 128) {
        _mm_prefetch(reinterpret_cast<const char*>(data + i + AHEAD), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + AHEAD + 64), _MM_HINT_T0);
        for (int j = 0; j < 4; ++j) sums[j] = _mm256_add_epi64(sums[j], load(data + i + 32 * j));
    }
    uint64_t parts[4];
    const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), all);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

}  // namespace

const Kernels avx2_kernels = {round_row,
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

const SamplingKernels avx2_sampling = {largest_logit, weigh_blocks, gather_ids};
