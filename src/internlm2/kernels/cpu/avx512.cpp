// AVX-512 with VNNI and BF16 (Zen 4, Sapphire Rapids and later): a register holds one word of 16 output rows.
//
// Every activation row has one chain of additions along the columns, whatever the number of rows in the tile, so a
// result does not depend, bit by bit, on what else is in the batch.
#include <immintrin.h>

#include "rows.h"

namespace {

// How far ahead of the reading position the memory is asked: about one memory latency at 25 GB/s and core.
constexpr int64_t AHEAD = 4096;
constexpr int64_t GROUPS_AHEAD = 16;  // the same for the scales, which are a stream of their own

inline void ask(const uint8_t* data) {
    _mm_prefetch(reinterpret_cast<const char*>(data + AHEAD), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + AHEAD + 64), _MM_HINT_T0);
}

inline __m512 load_scales(const uint16_t* scales) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// sums += unsigned bytes of w times signed bytes of x. NOTE: not the intrinsic: for twelve rows, gcc 12 then keeps a
// second copy of every sum in memory and halves the speed.
inline void add_products(__m512i& sums, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
}

template <int M>
void tile_bf16(const Weight& weight, const Tile& x, int64_t block, float* out) {
    const uint8_t* data = weight.data + block * block_bytes(weight);
    const int32_t* words = x.words;
    __m512 left[M], right[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) left[m] = right[m] = _mm512_setzero_ps();
    for (int64_t word = 0; word < x.num_words; ++word, data += 128, words += M) {
        ask(data);
        const auto low = (__m512bh)_mm512_load_si512(data);
        const auto high = (__m512bh)_mm512_load_si512(data + 64);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            const auto pair = (__m512bh)_mm512_set1_epi32(words[m]);
            left[m] = _mm512_dpbf16_ps(left[m], low, pair);
            right[m] = _mm512_dpbf16_ps(right[m], high, pair);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        _mm512_storeu_ps(out + 32 * m, left[m]);
        _mm512_storeu_ps(out + 32 * m + 16, right[m]);
    }
}

// The sums of a tile: [row][half of the block].
template <int M>
using Floats = __m512[M][2];
template <int M>
using Integers = __m512i[M][2];

inline __m512 load_zeros(const uint8_t* zeros) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// Adds one group's whole numbers, times both scales, to the sums in float32.
template <int M, bool HAS_ZEROS>
[[gnu::always_inline]] inline void flush(const Weight& weight, const Tile& x, int64_t at, int64_t g,
                                         const Integers<M>& group, Floats<M>& sums) {
    _mm_prefetch(reinterpret_cast<const char*>(weight.scales + at + GROUPS_AHEAD * BLOCK_ROWS), _MM_HINT_T0);
    const __m512 scales[2] = {load_scales(weight.scales + at), load_scales(weight.scales + at + 16)};
    __m512 zeros[2];
    if (HAS_ZEROS) {
        _mm_prefetch(reinterpret_cast<const char*>(weight.zeros + at + GROUPS_AHEAD * BLOCK_ROWS), _MM_HINT_T0);
        zeros[0] = load_zeros(weight.zeros + at);
        zeros[1] = load_zeros(weight.zeros + at + 16);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        const int64_t index = g * M + m;
        const __m512 scale = _mm512_set1_ps(x.scale[index]), shift = _mm512_set1_ps(x.shift[index]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512 whole = _mm512_cvtepi32_ps(group[m][half]);
            whole = HAS_ZEROS ? _mm512_fnmadd_ps(zeros[half], shift, whole) : _mm512_sub_ps(whole, shift);
            sums[m][half] = _mm512_fmadd_ps(whole, _mm512_mul_ps(scales[half], scale), sums[m][half]);
        }
    }
}

// One word of every weight row (two registers, 128 bytes) times the activations of every row of the tile.
template <int M, bool IS_INT4>
[[gnu::always_inline]] inline void step(const uint8_t* data, const int32_t* words, Integers<M>& group) {
    ask(data);
    const __m512i low = _mm512_load_si512(data), high = _mm512_load_si512(data + 64);
    if (IS_INT4) {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i low_first = _mm512_and_si512(low, nibble), high_first = _mm512_and_si512(high, nibble);
        const __m512i low_second = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
        const __m512i high_second = _mm512_and_si512(_mm512_srli_epi16(high, 4), nibble);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            const __m512i one = _mm512_set1_epi32(words[m]), two = _mm512_set1_epi32(words[M + m]);
            add_products(group[m][0], low_first, one);
            add_products(group[m][1], high_first, one);
            add_products(group[m][0], low_second, two);
            add_products(group[m][1], high_second, two);
        }
    } else {
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            const __m512i four = _mm512_set1_epi32(words[m]);
            add_products(group[m][0], low, four);
            add_products(group[m][1], high, four);
        }
    }
}

// vpdpbusd multiplies unsigned by signed bytes: the weights are the unsigned side, shifted by 128, 8 or their zero, and
// the shift is taken back through the sum of the activations. Whole numbers stay below 2^24, exact as float32.
template <int M, bool IS_INT4, bool HAS_ZEROS>
void tile_integer(const Weight& weight, const Tile& x, int64_t block, float* out) {
    constexpr int STRIDE = (IS_INT4 ? 2 : 1) * M;  // of the activations, from one step to the next
    const uint8_t* data = weight.data + block * block_bytes(weight);
    const int64_t steps = weight.group / (IS_INT4 ? 8 : 4);  // of a group: a multiple of 4
    const int32_t* words = x.words;
    Floats<M> sums;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.num_groups; ++g) {
        Integers<M> group;
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) group[m][0] = group[m][1] = _mm512_setzero_si512();
        constexpr int AT_ONCE = M <= 2 ? 4 : 1;
        for (int64_t i = 0; i < steps; i += AT_ONCE) {
#pragma GCC unroll 4
            for (int j = 0; j < AT_ONCE; ++j, data += 128, words += STRIDE) step<M, IS_INT4>(data, words, group);
        }
        flush<M, HAS_ZEROS>(weight, x, (block * x.num_groups + g) * BLOCK_ROWS, g, group, sums);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        _mm512_storeu_ps(out + 32 * m, sums[m][0]);
        _mm512_storeu_ps(out + 32 * m + 16, sums[m][1]);
    }
}

template <int M>
void tile_of(const Weight& weight, const Tile& x, int64_t block, float* out) {
    if (weight.kind == BFLOAT16) {
        tile_bf16<M>(weight, x, block, out);
    } else if (weight.kind == INT8) {
        tile_integer<M, false, false>(weight, x, block, out);
    } else if (weight.zeros == nullptr) {
        tile_integer<M, true, false>(weight, x, block, out);
    } else {
        tile_integer<M, true, true>(weight, x, block, out);
    }
}

void tile(const Weight& weight, const Tile& x, int64_t block, int num, float* out) {
    using TileOf = void (*)(const Weight&, const Tile&, int64_t, float*);
    static constexpr TileOf tiles[MAX_TILE] = {tile_of<1>, tile_of<2>, tile_of<3>,  tile_of<4>,
                                             tile_of<5>, tile_of<6>, tile_of<7>,  tile_of<8>,
                                             tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};
    tiles[num - 1](weight, x, block, out);
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
    __m512i sums[4] = {};
    for (int64_t i = 0; i + 256 <= num_bytes; i += 256) {
        _mm_prefetch(reinterpret_cast<const char*>(data + i + AHEAD), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + AHEAD + 64), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + AHEAD + 128), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + AHEAD + 192), _MM_HINT_T0);
        for (int j = 0; j < 4; ++j) sums[j] = _mm512_add_epi64(sums[j], _mm512_load_si512(data + i + 64 * j));
    }
    const __m512i all = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
    return uint64_t(_mm512_reduce_add_epi64(all));
}

}  // namespace

const Kernels avx512_kernels = {round_row, tile, store_block, read};
