// What attention multiplies and in which form: a Path says how queries, keys, values and weights become 32-bit words.
//
// Every level has Float32; AVX-512 has two more (attention_avx512.h). A Path may hold queries and weights in two parts,
// each a row of words, of which the first counts a power of two more.
#pragma once
#include "vectors.h"

namespace {

constexpr int COLUMNS = 4;                 // registers of a block of sums
constexpr int ROWS = LANES == 16 ? 4 : 2;  // its queries
constexpr int64_t GROUP_KEYS = LANES;      // keys whose scores fill a register
constexpr int64_t CHUNK = 4;               // words of a key that stay together when keys are packed

inline int64_t bytes_of(int32_t element, int64_t count) {
    return count * (element == ELEMENT_F32 ? 4 : element == ELEMENT_BF16 ? 2 : 1);
}

// Whole numbers become floats as they are: their scales are applied to the scores, and to the weights of values.
inline void read_head(const void* x, int32_t element, int64_t size, float* out) {
    if (element != ELEMENT_INT8) return load_floats(x, element, size, out);
    const auto* source = static_cast<const int8_t*>(x);
    for (int64_t i = 0; i < size; ++i) out[i] = float(source[i]);
}

// Everything in float32: a word is one number.
struct Float32 {
    static constexpr int64_t PER_WORD = 1;
    static constexpr int PARTS = 1;
    static constexpr int64_t QUERY_EXTRA = 0;    // words behind a query, see `scores`
    static constexpr bool IS_WHOLE = false;      // sums are whole numbers, exact in any order
    static constexpr uint32_t EXPONENTS = 0x7f800000u;  // of a word of values, all bits set: not finite

    static bool is_stored_so(int32_t element) { return element == ELEMENT_F32; }
    static bool streams(int64_t head_dim) { return head_dim % 16 == 0; }

    // A key or value of any element becomes words.
    static void load(const void* x, int32_t element, int64_t size, int32_t* out) {
        read_head(x, element, size, reinterpret_cast<float*>(out));
    }
    static void load_query(const void* x, int32_t element, int64_t size, int64_t, int32_t* out) {
        load(x, element, size, out);
    }

    static Vector key(const void* words) { return load_vector(words); }
    static void copy_chunk(int32_t* out, const int32_t* words) { std::memcpy(out, words, CHUNK * 4); }
    static Vector add_dot(Vector sums, Vector keys, Vector queries) { return multiply_add(keys, queries, sums); }
    static Vector add(Vector a, Vector b) { return a + b; }
    static Vector next_query_part(Vector sums) { return sums; }
    static Vector scores(Vector sums, const int32_t*) { return sums; }

    static void store_weights(const Vector* weights, int32_t* out, float*) {
        std::memcpy(out, weights, BLOCK_KEYS * 4);
    }
    // N registers of values of the keys of one word, from column d on, read where they lie.
    template <int N>
    static void load_values(const uint8_t* const* rows, int64_t key, int64_t, int64_t d, Vector* out) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) out[n] = load_vector(rows[key] + 4 * (d + n * LANES));
    }
    static Vector add_products(Vector sums, Vector values, int32_t weight) {
        return multiply_add(all(from_bits(uint32_t(weight))), values, sums);
    }
    static Vector next_weight_part(Vector sums) { return sums; }
    static Vector begin(const float* out, float factor) { return load_vector(out) * all(factor); }
    static void end(float* out, Vector sums, float, float) { store_vector(out, sums); }
    static void end_stream(const float*, float*, int64_t, float, float) {}

    // Values of the keys [0, count): [key][padded].
    static void pack_values(const uint8_t* const* rows, int64_t count, int32_t element, int64_t size, int64_t padded,
                            int32_t* out) {
        for (int64_t key = 0; key < count; ++key) load(rows[key], element, size, out + key * padded);
    }
    static void hide_value(int32_t* values, int64_t key, int64_t padded) {
        std::memset(values + key * padded, 0, size_t(padded) * 4);
    }
};

template <class Path>
int64_t words_of(int64_t size) {
    return (size + Path::PER_WORD - 1) / Path::PER_WORD;
}

// Of a key, in whole registers.
template <class Path>
int64_t padded_words(int64_t size) {
    return (words_of<Path>(size) + LANES - 1) / LANES * LANES;
}

template <class Path>
int64_t query_words(int64_t size) {
    return Path::PARTS * padded_words<Path>(size) + Path::QUERY_EXTRA;
}

// Words of a row of weights, one part.
template <class Path>
constexpr int64_t WEIGHT_WORDS = BLOCK_KEYS / Path::PER_WORD;

// Weights of some queries, BLOCK_KEYS words apart, and what their sums so far are multiplied with. scales: of weights
// that are whole numbers.
struct Weights {
    const int32_t* words;
    const float* factors;
    const float* scales;

    void skip(int64_t count) {
        words += count * BLOCK_KEYS;
        factors += count;
        scales += count;
    }
};

// out (M, N registers) = factor * out + weights (M, depth words) b (depth, N registers).
template <class Path, int M, int N>
inline void multiply_block(const Weights& weights, const int32_t* b, int64_t b_stride, int64_t depth, float* out,
                           int64_t out_stride) {
    Vector sums[M][N];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = Path::begin(out + m * out_stride + n * LANES, weights.factors[m]);
    }
    for (int part = 0; part < Path::PARTS; ++part) {
        const int32_t* words = weights.words + part * WEIGHT_WORDS<Path>;
        for (int64_t k = 0; k < depth; ++k) {
            Vector columns[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) columns[n] = load_vector(b + k * b_stride + n * LANES);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const int32_t word = words[m * BLOCK_KEYS + k];
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sums[m][n] = Path::add_products(sums[m][n], columns[n], word);
            }
        }
        if (part + 1 == Path::PARTS) break;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[m][n] = Path::next_weight_part(sums[m][n]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            Path::end(out + m * out_stride + n * LANES, sums[m][n], weights.factors[m], weights.scales[m]);
        }
    }
}

template <class Path, int N>
void multiply_rows(Weights weights, int64_t num_rows, const int32_t* b, int64_t b_stride, int64_t depth, float* out,
                   int64_t out_stride) {
    while (num_rows > 0) {
        const int64_t done = num_rows >= ROWS ? ROWS : num_rows >= 2 ? 2 : 1;
        const auto multiply = done == ROWS ? multiply_block<Path, ROWS, N>
                              : done == 2  ? multiply_block<Path, 2, N>
                                           : multiply_block<Path, 1, N>;
        multiply(weights, b, b_stride, depth, out, out_stride);
        num_rows -= done;
        weights.skip(done);
        out += done * out_stride;
    }
}

// out (rows, columns) = factor * out + weights (rows, depth words) b (depth, columns); columns: a multiple of LANES.
template <class Path>
void multiply(const Weights& weights, int64_t num_rows, const int32_t* b, int64_t num_columns, int64_t depth,
              float* out) {
    int64_t n = 0;
    for (; n + COLUMNS * LANES <= num_columns; n += COLUMNS * LANES) {
        multiply_rows<Path, COLUMNS>(weights, num_rows, b + n, num_columns, depth, out + n, num_columns);
    }
    for (; n < num_columns; n += LANES) {
        multiply_rows<Path, 1>(weights, num_rows, b + n, num_columns, depth, out + n, num_columns);
    }
}

}  // namespace
