// AVX-512 with VNNI and BF16 (Zen 4, Sapphire Rapids and later): a register holds one word of 16 output rows.
//
// Every activation row has one chain of additions along the columns, whatever the number of rows in the tile, so a
// result does not depend, bit by bit, on what else is in the batch.
#include <immintrin.h>

#include "attention_block.h"

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

// A tree of shuffles and additions, so that each step halves the registers. In the end lane 4 r + c holds what came in as
// 4 c + r, so the keys go in that way.
inline Vector fold(const Vector* x) {
    __m512 eights[8], fours[4], twos[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int one = 2 * i, two = 2 * i + 1;
        const auto a = __m512(x[one % 4 * 4 + one / 4]), b = __m512(x[two % 4 * 4 + two / 4]);
        eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = eights[2 * i], b = eights[2 * i + 1];
        fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        twos[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return Vector(_mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xdd)));
}

// Queries, keys, values and weights in bfloat16, for queries that are stored so: a word is a pair of coordinates of one
// key, or of the same coordinate of two keys. int8 becomes bfloat16 without loss.
struct Bfloat16 {
    static constexpr int64_t PER_WORD = 2;
    static bool is_stored_so(int32_t element) { return element == ELEMENT_BF16; }
    static bool reads_values(int32_t) { return true; }
    static Vector add_dot(Vector sums, const int32_t* a, Vector b) {
        return Vector(_mm512_dpbf16_ps(__m512(sums), (__m512bh)_mm512_loadu_si512(a), (__m512bh)b));
    }
    // N (even) registers of words of both keys' values, from column d on.
    template <int N>
    static void load_values(const uint8_t* const* rows, int64_t key, int64_t count, int32_t element, int64_t d,
                            Vector* out) {
#pragma GCC unroll 2
        for (int n = 0; n < N; n += 2) {
            const __m512i a = load_halves(rows[key], element, d + n * LANES, 0xffffffffu);
            const __m512i b =
                key + 1 < count ? load_halves(rows[key + 1], element, d + n * LANES, 0xffffffffu) : __m512i{};
            out[n] = Vector(_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low_halves(), b)));
            out[n + 1] = Vector(_mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high_halves(), b)));
        }
    }
    static void load(const void* x, int32_t element, int64_t size, int32_t* out) {
        auto* halves = reinterpret_cast<uint16_t*>(out);
        if (element == ELEMENT_BF16) {
            std::memcpy(out, x, size_t(size) * 2);
        } else {
            const auto* source = static_cast<const int8_t*>(x);
            for (int64_t i = 0; i < size; ++i) halves[i] = uint16_t(to_bits(float(source[i])) >> 16);
        }
        if (size % 2 != 0) halves[size] = 0;
    }
    static Vector add_products(Vector sums, Vector b, int32_t a) {
        return Vector(_mm512_dpbf16_ps(__m512(sums), (__m512bh)b, (__m512bh)_mm512_set1_epi32(a)));
    }
    static void store_weights(const Vector* weights, int32_t* out) {
        for (int64_t i = 0; i < BLOCK_KEYS / LANES; ++i) {
            const auto halves = (__m256i)_mm512_cvtneps_pbh(__m512(weights[i]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, halves);
        }
    }
    // [pair of keys][padded]: words of both keys' values.
    static void pack_values(const uint8_t* const* rows, int64_t count, int32_t element, int64_t size, int64_t padded,
                            int32_t* out) {
        for (int64_t key = 0; key < count; key += 2, out += padded) {
            const uint8_t* one = rows[key];
            const uint8_t* two = key + 1 < count ? rows[key + 1] : nullptr;
            for (int64_t d = 0; d < size; d += 32) {
                const __mmask32 mask = size - d >= 32 ? 0xffffffffu : (1u << (size - d)) - 1;
                const __m512i a = load_halves(one, element, d, mask);
                const __m512i b = two == nullptr ? _mm512_setzero_si512() : load_halves(two, element, d, mask);
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
    static __m512i load_halves(const uint8_t* row, int32_t element, int64_t d, __mmask32 mask) {
        if (element == ELEMENT_BF16) return _mm512_maskz_loadu_epi16(mask, row + 2 * d);
        const __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + d);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
};

inline bool is_bfloat16(const Queries& queries, const Places& places) {
    return queries.element == ELEMENT_BF16 && places.element != ELEMENT_F32;
}

void pack_queries(const Queries& queries, const Places& places, const Workspace& work) {
    (is_bfloat16(queries, places) ? pack_queries_by<Bfloat16> : pack_queries_by<Float32>)(queries, places, work);
}

void attend_range(const Queries& queries, const Places& places, int64_t begin, int64_t end, const Workspace& work,
                  const State& state) {
    const auto attend = is_bfloat16(queries, places) ? attend_range_by<Bfloat16> : attend_range_by<Float32>;
    attend(queries, places, begin, end, work, state);
}

}  // namespace

const Kernels avx512_kernels = {round_row, tile,   store_block, read,        pack_queries, attend_range,
                                merge,     finish, norm_row,    rotate_head, store_head,   load_floats};
