// What Python and every instruction level agree on: how weights and activations lie in memory.
//
// A weight is cut into blocks of 32 output rows. A block is a stream of words, 4 bytes of one row each, the words
// of the 32 rows beside each other: one sequential stream, read once, whatever the number of activation rows.
// Interleaving rows so that one register holds many of them is how llama.cpp's repacked types and oneDNN's blocked
// formats reach the memory rate; https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-cpu/repack.cpp
#pragma once
#include <cstdint>

constexpr int64_t BLOCK_ROWS = 32;   // output rows of a block: two registers of 16 words with AVX-512
constexpr int64_t HALF_ROWS = 16;    // a gated block holds 16 rows of w1, then the same 16 rows of w3
constexpr int MAX_TILE = 12;         // activation rows that share one reading of a block: 24 of 32 registers
constexpr int64_t COLUMN_MULTIPLE = 32;  // columns are padded with zeros to a multiple of this, or of the group

enum Kind : int32_t { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };
enum Element : int32_t { ELEMENT_BF16 = 0, ELEMENT_F32 = 1 };
enum Level : int32_t { SCALAR = 0, AVX2 = 1, AVX512 = 2 };

// Mirrored by `_CWeight` in library.py. data holds, per block and word (k of the padded columns):
//   bf16: columns 2w, 2w+1.   int8: columns 4w .. 4w+3, each the weight + 128.
//   int4: columns 8w .. 8w+3 in the low nibbles, 8w+4 .. 8w+7 in the high ones.
struct Weight {
    const uint8_t* data;
    const uint16_t* scales;  // bf16 [block][group][32]; null for bf16 weights
    const uint8_t* zeros;    // [block][group][32], in sixteenths; null: the zero of int8 is 128, of int4 8
    const float* bias;       // [rows] or null
    int64_t rows;            // of the output: half of the stored ones when gated
    int64_t columns;         // as the activations have them, before padding
    int64_t padded_columns;
    int64_t group;           // columns that share a scale
    int32_t kind;
    int32_t is_gated;        // output = silu(w1 x) * (w3 x)
    int32_t num_parts;       // 1: activations of 8 bits; 2: of 15 bits, as a high and a low row of 8 bits each
};

// Activations, rounded and interleaved as the weights are: rows are cut into tiles, and the words of a tile's rows lie
// beside each other. So a tile is one stream too, and rows a power of two apart do not push each other out of a cache.
struct Activations {
    int32_t* words;  // [tile][word][row of the tile]: 2 bf16 or 4 int8 in [-127, 127]
    float* scale;    // [tile][group][row of the tile]; NaN where a value of the group is not finite
    float* shift;    // the same shape: the sum of the int8 values times 128 (int8), 8 (int4) or 1/16 (int4 with
                     // zeros): what is taken back for weights that are stored without their sign
    int64_t num_rows;   // parts counted
    int64_t num_words;  // of a row
    int64_t num_groups;
    int64_t tile_rows;  // <= MAX_TILE, no row's parts in two tiles; the last tile may have fewer
};

// Some rows of one tile. stride: the rows of the tile.
struct Tile {
    const int32_t* words;
    const float* scale;
    const float* shift;
    int64_t stride, num_words, num_groups;
};

inline int64_t rows_of_tile(const Activations& x, int64_t tile) {
    const int64_t left = x.num_rows - tile * x.tile_rows;
    return left < x.tile_rows ? left : x.tile_rows;
}

inline Tile tile_at(const Activations& x, int64_t tile) {
    const int64_t first = tile * x.tile_rows;
    return {x.words + first * x.num_words, x.scale + first * x.num_groups, x.shift + first * x.num_groups,
            rows_of_tile(x, tile), x.num_words, x.num_groups};
}

// One instruction level.
struct Kernels {
    // Rounds one row of activations into its place; row: of the first part, which its other part follows.
    void (*round_row)(const Weight& weight, const void* x, int32_t element, const Activations& out, int64_t row);
    // out[num][32] = one block times the rows of one tile, num <= MAX_TILE
    void (*tile)(const Weight& weight, const Tile& x, int64_t block, int num, float* out);
    // Adds the bias, joins the halves of a gated block, and writes up to 32 outputs of one activation row.
    void (*store)(const float* values, const float* bias, bool is_gated, int64_t n, int32_t element, void* out);
    uint64_t (*read)(const uint8_t* data, int64_t num_bytes);  // the streaming-read probe
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

inline int64_t block_bytes(const Weight& w) {
    const int64_t bits = w.kind == BFLOAT16 ? 16 : w.kind == INT8 ? 8 : 4;
    return BLOCK_ROWS * w.padded_columns * bits / 8;
}
