// AVX-512 with VNNI and BF16 (Zen 4, Sapphire Rapids and later): a register holds one word of 16 output rows.
//
// Every activation row has one chain of additions along the columns, whatever the number of rows in the tile, so a
// result does not depend, bit by bit, on what else is in the batch.
#include <immintrin.h>

#include "attention_avx512.h"
#include "attention_block.h"
#include "rounding_avx512.h"
#include "sampling_rows.h"

namespace {

// The processor follows a stream by itself, but begins anew in every page of 4 KiB, and there the wait is for the address
// as well as for the data. So every page is touched long before its turn. That is enough for one or two rows, which ask
// for data as fast as the memory gives it (asking for every line is slower); with more rows the processor looks ahead
// too late, so every line is asked for, a page ahead.
constexpr uintptr_t PAGE = 4096, TOUCH_AHEAD = 8 * PAGE;
constexpr int64_t ASK_BYTES = 512;  // from one call of `ask` to the next
constexpr int FEW_ROWS = 2;

template <int M>
inline void ask(const uint8_t* data) {
    const auto at = reinterpret_cast<uintptr_t>(data), page = at & ~(PAGE - 1);
    _mm_prefetch(reinterpret_cast<const char*>(page + TOUCH_AHEAD), _MM_HINT_T1);
    if (M > FEW_ROWS) {
        const auto* next = reinterpret_cast<const char*>(at + PAGE);
#pragma GCC unroll 8
        for (int64_t i = 0; i < ASK_BYTES; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
    }
}

inline __m512 load_scales(const uint8_t* scales) {
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
        if (word * 128 % ASK_BYTES == 0) ask<M>(data);
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

// Adds one group's whole numbers, times both scales, to the sums in float32. scales: its own, and the zeros behind them.
template <int M, bool HAS_ZEROS>
[[gnu::always_inline]] inline void flush(const uint8_t* scales_at, const Tile& x, int64_t g, const Integers<M>& group,
                                         Floats<M>& sums) {
    const __m512 scales[2] = {load_scales(scales_at), load_scales(scales_at + SCALE_BYTES / 2)};
    __m512 zeros[2];
    if (HAS_ZEROS) {
        zeros[0] = load_zeros(scales_at + SCALE_BYTES);
        zeros[1] = load_zeros(scales_at + SCALE_BYTES + HALF_ROWS);
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
    const __m512i low = _mm512_loadu_si512(data), high = _mm512_loadu_si512(data + 64);
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
        for (int64_t i = 0; i < steps; i += 4) {  // ASK_BYTES each
            ask<M>(data);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j, data += 128, words += STRIDE) step<M, IS_INT4>(data, words, group);
        }
        flush<M, HAS_ZEROS>(data, x, g, group, sums);
        data += SCALE_BYTES + (HAS_ZEROS ? BLOCK_ROWS : 0);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        _mm512_storeu_ps(out + 32 * m, sums[m][0]);
        _mm512_storeu_ps(out + 32 * m + 16, sums[m][1]);
    }
}

template <int M>
void tile_of(const Weight& weight, const Tile& x, int64_t block, float* out) {
    if (weight.kind == BFLOAT16) return tile_bf16<M>(weight, x, block, out);
    if constexpr (M <= MAX_INTEGER_TILE) {
        if (weight.kind == INT8) {
            tile_integer<M, false, false>(weight, x, block, out);
        } else if (!weight.has_zeros) {
            tile_integer<M, true, false>(weight, x, block, out);
        } else {
            tile_integer<M, true, true>(weight, x, block, out);
        }
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
    for (int64_t i = 0; i + ASK_BYTES <= num_bytes; i += ASK_BYTES) {
        ask<1>(data + i);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) sums[j % 4] = _mm512_add_epi64(sums[j % 4], _mm512_load_si512(data + i + 64 * j));
    }
    const __m512i all = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
    return uint64_t(_mm512_reduce_add_epi64(all));
}

// Which products suit the queries, and the keys and values.
inline bool is_float32(const Queries& queries, const Places& places) {
    return queries.element != ELEMENT_BF16 || places.element == ELEMENT_F32;
}

void pack_queries(const Queries& queries, const Places& places, const Workspace& work) {
    const auto pack = is_float32(queries, places)        ? pack_queries_by<Float32>
                      : places.element == ELEMENT_BF16 ? pack_queries_by<Bfloat16>
                                                       : pack_queries_by<Integer8>;
    pack(queries, places, work);
}

void attend_range(const Queries& queries, const Places& places, int64_t begin, int64_t end, const Workspace& work,
                  const State& state) {
    const auto attend = is_float32(queries, places)        ? attend_range_by<Float32>
                        : places.element == ELEMENT_BF16 ? attend_range_by<Bfloat16>
                                                         : attend_range_by<Integer8>;
    attend(queries, places, begin, end, work, state);
}

}  // namespace

const Kernels avx512_kernels = {round_row_512, tile,   store_block, read,        pack_queries, attend_range,
                                merge,     finish, norm_row,    rotate_head, store_head,   load_floats};

const SamplingKernels avx512_sampling = {largest_logit, weigh_blocks, gather_ids};
