// Scores of queries with keys. The words of a key are summed in one order, whether the key is read where it lies (few
// queries) or packed first (many): lane by lane along the key, then the lanes by halves.
#pragma once
#include "attention_products.h"

namespace {

#if defined(__AVX512F__)

// Steps of a tree of shuffles and additions. Quarters of a register are summed first: out[c] has key 4 r + c in its
// quarter r.
template <class Path>
[[gnu::always_inline]] inline void fold_quarters(const Vector* x, Vector* out) {
    __m512 eights[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int one = 2 * i, two = 2 * i + 1;
        const auto a = __m512(x[one % 4 * 4 + one / 4]), b = __m512(x[two % 4 * 4 + two / 4]);
        eights[i] = __m512(
            Path::add(Vector(_mm512_shuffle_f32x4(a, b, 0x44)), Vector(_mm512_shuffle_f32x4(a, b, 0xee))));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = eights[2 * i], b = eights[2 * i + 1];
        out[i] = Path::add(Vector(_mm512_shuffle_f32x4(a, b, 0x88)), Vector(_mm512_shuffle_f32x4(a, b, 0xdd)));
    }
}

template <class Path>
[[gnu::always_inline]] inline Vector fold_pair(Vector a, Vector b) {
    return Path::add(Vector(_mm512_shuffle_ps(__m512(a), __m512(b), 0x44)),
                     Vector(_mm512_shuffle_ps(__m512(a), __m512(b), 0xee)));
}

template <class Path>
[[gnu::always_inline]] inline Vector fold_end(Vector a, Vector b) {
    return Path::add(Vector(_mm512_shuffle_ps(__m512(a), __m512(b), 0x88)),
                     Vector(_mm512_shuffle_ps(__m512(a), __m512(b), 0xdd)));
}

#elif defined(__AVX2__)

template <class Path>
inline void fold_quarters(const Vector* x, Vector* out) {
    for (int i = 0; i < 4; ++i) {
        const auto a = __m256(x[i]), b = __m256(x[i + 4]);
        out[i] = Path::add(Vector(_mm256_permute2f128_ps(a, b, 0x20)), Vector(_mm256_permute2f128_ps(a, b, 0x31)));
    }
}

template <class Path>
inline Vector fold_pair(Vector a, Vector b) {
    return Path::add(Vector(_mm256_shuffle_ps(__m256(a), __m256(b), 0x44)),
                     Vector(_mm256_shuffle_ps(__m256(a), __m256(b), 0xee)));
}

template <class Path>
inline Vector fold_end(Vector a, Vector b) {
    return Path::add(Vector(_mm256_shuffle_ps(__m256(a), __m256(b), 0x88)),
                     Vector(_mm256_shuffle_ps(__m256(a), __m256(b), 0xdd)));
}

#else

template <class Path>
inline void fold_quarters(const Vector* x, Vector* out) {
    for (int i = 0; i < 4; ++i) out[i] = x[i];
}

template <class Path>
inline Vector fold_pair(Vector a, Vector b) {
    return Path::add(Vector{a[0], a[1], b[0], b[1]}, Vector{a[2], a[3], b[2], b[3]});
}

template <class Path>
inline Vector fold_end(Vector a, Vector b) {
    return Path::add(Vector{a[0], a[2], b[0], b[2]}, Vector{a[1], a[3], b[1], b[3]});
}

#endif

// Lane k of the result: the sum of the lanes of x[k].
template <class Path>
[[gnu::always_inline]] inline Vector fold(const Vector* x) {
    Vector four[4];
    fold_quarters<Path>(x, four);
    return fold_end<Path>(fold_pair<Path>(four[0], four[1]), fold_pair<Path>(four[2], four[3]));
}

// Scores of Q queries with GROUP_KEYS keys, at `offset` bytes in each row. step(): after every four lines of keys.
template <class Path, int Q, class Step>
inline void score_in_place(const int32_t* queries, int64_t stride, const uint8_t* const* rows, int64_t offset,
                           int64_t num_words, int32_t* out, Step&& step) {
    constexpr int KEYS = int(GROUP_KEYS) / Q;
#pragma GCC unroll 1
    for (int first = 0; first < GROUP_KEYS; first += KEYS) {
        Vector sums[GROUP_KEYS];
#pragma GCC unroll 16
        for (int i = 0; i < GROUP_KEYS; ++i) sums[i] = Vector{};
        for (int part = 0; part < Path::PARTS; ++part) {
            if (part > 0) {
#pragma GCC unroll 16
                for (int i = 0; i < GROUP_KEYS; ++i) sums[i] = Path::next_query_part(sums[i]);
            }
            for (int64_t word = 0; word < num_words; word += LANES) {
                Vector words[Q];
#pragma GCC unroll 4
                for (int i = 0; i < Q; ++i) words[i] = load_vector(queries + i * stride + part * num_words + word);
#pragma GCC unroll 16
                for (int k = 0; k < KEYS; ++k) {
                    const Vector key = Path::key(rows[first + k] + offset + 4 * word);
                    if (part == 0 && k % 4 == 3) step();
#pragma GCC unroll 4
                    for (int i = 0; i < Q; ++i) {
                        sums[i * KEYS + k] = Path::add_dot(sums[i * KEYS + k], key, words[i]);
                    }
                }
            }
        }
        const Vector folded = fold<Path>(sums);
#pragma GCC unroll 4
        for (int i = 0; i < Q; ++i) {
            std::memcpy(out + i * BLOCK_KEYS + first, reinterpret_cast<const int32_t*>(&folded) + i * KEYS, KEYS * 4);
        }
    }
}

// Packed keys: groups of GROUP_KEYS, of which four registers at a time hold a chunk of every key, as `fold_quarters`
// leaves them: [group][c][chunk][key 4 r + c at quarter r].
template <class Path>
void pack_key(const int32_t* words, int64_t num_words, int64_t key, int32_t* out) {
    const int64_t in_group = key % GROUP_KEYS, c = in_group % 4, r = in_group / 4;
    out += key / GROUP_KEYS * GROUP_KEYS * num_words + c * num_words / CHUNK * LANES + r * CHUNK;
    for (int64_t word = 0; word < num_words; word += CHUNK, out += LANES) Path::copy_chunk(out, words + word);
}

// A chunk of a query beside as many keys as a register holds.
inline Vector repeat_chunk(const int32_t* words) {
#if defined(__AVX512F__)
    return Vector(_mm512_castsi512_ps(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)))));
#elif defined(__AVX2__)
    return Vector(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(words)));
#else
    return load_vector(words);
#endif
}

// sums (M, N) over the chunks first, first + step, ... of one part.
template <class Path, int M, int N>
[[gnu::always_inline]] inline void add_chunks(const int32_t* queries, int64_t stride, const int32_t* keys,
                                              int64_t num_words, int64_t first, int64_t step, Vector (&sums)[M][N]) {
    const int64_t num_chunks = num_words / CHUNK;
    for (int64_t t = first; t < num_chunks; t += step) {
        Vector columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) columns[n] = load_vector(keys + (n * num_chunks + t) * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Vector words = repeat_chunk(queries + m * stride + t * CHUNK);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[m][n] = Path::add_dot(sums[m][n], columns[n], words);
        }
    }
}

template <class Path, int M, int N>
[[gnu::always_inline]] inline void add_all(Vector (&sums)[M][N], const Vector (&added)[M][N]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = Path::add(sums[m][n], added[m][n]);
    }
}

// Quarter by quarter, in the order in which `fold_quarters` joins them.
template <class Path, int M, int N>
[[gnu::always_inline]] inline void score_chunks(const int32_t* queries, int64_t stride, const int32_t* keys,
                                                int64_t num_words, Vector (&sums)[M][N]) {
    constexpr int64_t QUARTERS = LANES / CHUNK;
    if (Path::IS_WHOLE) {
        add_chunks<Path>(queries, stride, keys, num_words, 0, 1, sums);
        for (int part = 1; part < Path::PARTS; ++part) {
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sums[m][n] = Path::next_query_part(sums[m][n]);
            }
            add_chunks<Path>(queries + part * num_words, stride, keys, num_words, 0, 1, sums);
        }
        return;
    }
    add_chunks<Path>(queries, stride, keys, num_words, 0, QUARTERS, sums);
    if (QUARTERS == 1) return;
    Vector second[M][N] = {};
    add_chunks<Path>(queries, stride, keys, num_words, QUARTERS / 2, QUARTERS, second);
    add_all<Path>(sums, second);
    if (QUARTERS == 2) return;
    Vector third[M][N] = {}, fourth[M][N] = {};
    add_chunks<Path>(queries, stride, keys, num_words, 1, QUARTERS, third);
    add_chunks<Path>(queries, stride, keys, num_words, 3, QUARTERS, fourth);
    add_all<Path>(third, fourth);
    add_all<Path>(sums, third);
}

// Scores of M queries with all packed keys of a block.
template <class Path, int M>
void score_packed(const int32_t* queries, int64_t stride, const int32_t* keys, int64_t num_words, int64_t num_keys,
                  int32_t* out) {
    for (int64_t first = 0; first < num_keys; first += GROUP_KEYS, keys += GROUP_KEYS * num_words) {
        Vector pairs[2][M];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            Vector sums[M][2] = {};
            score_chunks<Path>(queries, stride, keys + half * (GROUP_KEYS / 2) * num_words, num_words, sums);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) pairs[half][m] = fold_pair<Path>(sums[m][0], sums[m][1]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) store_vector(out + m * BLOCK_KEYS + first, fold_end<Path>(pairs[0][m], pairs[1][m]));
    }
}

}  // namespace
