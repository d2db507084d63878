// What attention multiplies and in which form: a Path says how queries, keys, values and weights become 32-bit words.
//
// Included by each level's file, which defines `fold` and may define a Path of its own besides Float32.
#pragma once
#include "vectors.h"

namespace {

constexpr int COLUMNS = 4;                 // registers of a block of sums
constexpr int ROWS = LANES == 16 ? 4 : 2;  // its queries
constexpr int64_t GROUP_KEYS = LANES;      // keys whose scores fill a register

// Lane k of the result: the sum of the lanes of x[k], always by halves: lane i and i + LANES / 2 first.
[[gnu::always_inline]] inline Vector fold(const Vector* x);

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
    static bool is_stored_so(int32_t element) { return element == ELEMENT_F32; }
    static bool reads_values(int32_t element) { return element == ELEMENT_F32; }
    static Vector add_dot(Vector sums, const int32_t* a, Vector b) {
        return multiply_add(load_vector(a), b, sums);
    }
    // N registers of values of the keys of one word, from column d on.
    template <int N>
    static void load_values(const uint8_t* const* rows, int64_t key, int64_t, int32_t, int64_t d, Vector* out) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) out[n] = load_vector(rows[key] + 4 * (d + n * LANES));
    }
    static void load(const void* x, int32_t element, int64_t size, int32_t* out) {
        read_head(x, element, size, reinterpret_cast<float*>(out));
    }
    static Vector add_products(Vector sums, Vector b, int32_t a) {
        return multiply_add(all(from_bits(uint32_t(a))), b, sums);
    }
    static void store_weights(const Vector* weights, int32_t* out) { std::memcpy(out, weights, BLOCK_KEYS * 4); }
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

// Of a query or key, in whole registers.
template <class Path>
int64_t padded_words(int64_t size) {
    return (words_of<Path>(size) + LANES - 1) / LANES * LANES;
}

// out (M, N registers) = factor * out + a (M, depth words) b (depth, N registers).
template <class Path, int M, int N>
inline void multiply_block(const int32_t* a, int64_t a_stride, const int32_t* b, int64_t b_stride, int64_t depth,
                           const float* factors, float* out, int64_t out_stride) {
    Vector sums[M][N];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            sums[m][n] = load_vector(out + m * out_stride + n * LANES) * all(factors[m]);
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vector columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) columns[n] = load_vector(b + k * b_stride + n * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const int32_t word = a[m * a_stride + k];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[m][n] = Path::add_products(sums[m][n], columns[n], word);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store_vector(out + m * out_stride + n * LANES, sums[m][n]);
    }
}

template <class Path, int N>
void multiply_rows(const int32_t* a, int64_t a_stride, int64_t num_rows, const int32_t* b, int64_t b_stride,
                   int64_t depth, const float* factors, float* out, int64_t out_stride) {
    while (num_rows > 0) {
        const int64_t done = num_rows >= ROWS ? ROWS : num_rows >= 2 ? 2 : 1;
        if (done == ROWS) {
            multiply_block<Path, ROWS, N>(a, a_stride, b, b_stride, depth, factors, out, out_stride);
        } else if (done == 2) {
            multiply_block<Path, 2, N>(a, a_stride, b, b_stride, depth, factors, out, out_stride);
        } else {
            multiply_block<Path, 1, N>(a, a_stride, b, b_stride, depth, factors, out, out_stride);
        }
        num_rows -= done;
        a += done * a_stride;
        out += done * out_stride;
        factors += done;
    }
}

// out (rows, columns) = factor * out + a (rows, depth words) b (depth, columns); columns: a multiple of LANES.
template <class Path>
void multiply(const int32_t* a, int64_t a_stride, int64_t num_rows, const int32_t* b, int64_t num_columns,
              int64_t depth, const float* factors, float* out, int64_t out_stride) {
    int64_t n = 0;
    for (; n + COLUMNS * LANES <= num_columns; n += COLUMNS * LANES) {
        multiply_rows<Path, COLUMNS>(a, a_stride, num_rows, b + n, num_columns, depth, factors, out + n, out_stride);
    }
    for (; n < num_columns; n += LANES) {
        multiply_rows<Path, 1>(a, a_stride, num_rows, b + n, num_columns, depth, factors, out + n, out_stride);
    }
}

}  // namespace
