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
constexpr int MAX_INTEGER_TILE = 8;  // of int8 and int4, which need registers for sums in float32 too
constexpr int64_t COLUMN_MULTIPLE = 32;  // columns are padded with zeros to a multiple of this, or of the group

enum Kind : int32_t { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };
enum Element : int32_t { ELEMENT_BF16 = 0, ELEMENT_F32 = 1, ELEMENT_INT8 = 2 };
enum Level : int32_t { SCALAR = 0, AVX2 = 1, AVX512 = 2 };

// Mirrored by `CWeight` in library.py. data holds, per block and word (k of the padded columns):
//   bf16: columns 2w, 2w+1.   int8: columns 4w .. 4w+3, each the weight + 128.
//   int4: columns 8w .. 8w+3 in the low nibbles, 8w+4 .. 8w+7 in the high ones.
// Behind the words of each group of columns lie its scales, 32 of bf16, and then, if there are any, its zeros, 32 bytes
// in sixteenths. Without them the zero of int8 is 128, of int4 8. Scales in a place of their own would be a second
// stream: for one row, that costs a quarter of the speed.
struct Weight {
    const uint8_t* data;
    const float* bias;       // [rows] or null
    int64_t rows;            // of the output: half of the stored ones when gated
    int64_t columns;         // as the activations have them, before padding
    int64_t padded_columns;
    int64_t group;           // columns that share a scale; 0 for bf16
    int32_t kind;
    int32_t is_gated;        // output = silu(w1 x) * (w3 x)
    int32_t num_parts;       // 1: activations of 8 bits; 2: of 15 bits, as a high and a low row of 8 bits each
    int32_t has_zeros;
    int32_t uses_hadamard;   // activations are turned as the weights were: 32 columns at a time, by a Hadamard matrix
};

constexpr int64_t SCALE_BYTES = 2 * BLOCK_ROWS;  // of one group

// The words of one group, without its scales and zeros.
inline int64_t word_bytes(const Weight& w) { return BLOCK_ROWS * w.group / (w.kind == INT4 ? 2 : 1); }

inline int64_t block_bytes(const Weight& w) {
    if (w.kind == BFLOAT16) return BLOCK_ROWS * w.padded_columns * 2;
    return w.padded_columns / w.group * (word_bytes(w) + SCALE_BYTES + (w.has_zeros ? BLOCK_ROWS : 0));
}

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
    int64_t tile_rows;  // at most MAX_TILE or MAX_INTEGER_TILE, no row's parts in two tiles; the last tile may have fewer
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

// Keys and values of one layer, (slots, K, D) each. Mirrored by `CPages` in library.py.
struct Pages {
    uint8_t* keys;
    uint8_t* values;
    float* key_scales;  // (slots, K), for int8 only: a value is its whole number times the scale
    float* value_scales;
    int64_t num_slots, num_layers;  // layers follow each other: the pointers are those of the first
    int64_t num_kv_heads, head_dim;
    int32_t element;
};

// Some rows of one sequence, and some key/value heads, each with the `group` queries of a row that share it. Of a head,
// query i is of row i / group, which stands at first_position + i / group and sees all keys up to there.
struct Queries {
    const uint8_t* q;  // the first head of row 0
    uint8_t* out;
    int64_t row_bytes;  // from one row to the next, of both
    int32_t element;    // of both
    int64_t num_rows, group, num_heads, first_position;
    float scale;
};

// Where the keys and values of one sequence lie: pieces of (first position, slot), and one more for the end.
struct Places {
    const uint8_t* keys;  // of slot 0, this layer and the first head
    const uint8_t* values;
    const float* key_scales;
    const float* value_scales;
    int64_t slot_bytes, slot_scales;  // from one slot to the next
    const int64_t* runs;
    int64_t num_runs;
    int64_t head_dim;
    int32_t element;
};

// What attention to some keys gives for each query, head after head: a sum of values, not divided yet, and the two numbers that join it
// with others.
struct State {
    float* sum;    // (queries, padded head_dim)
    float* most;   // (queries): the largest score
    float* total;  // (queries): the sum of exp(score - most)
};

// Memory of one thread for one tile of queries.
struct Workspace {
    int32_t *queries, *keys, *values, *scores, *rows;
    float *factors, *weight_scales, *sums;
    State part, whole;
};

constexpr int64_t BLOCK_KEYS = 64;   // keys whose scores are found together
constexpr int64_t RANGE_KEYS = 128;  // the sums of a range are joined with those before it: always here, so that no
                                     // result depends on who computed which range
constexpr int64_t MAX_QUERIES = 128;  // of a head, in a tile
constexpr int64_t MAX_SHARED_QUERIES = 256;  // of all heads, when one task takes all heads of a row

inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Words of a packed query at most, in whatever form.
inline int64_t query_words_limit(int64_t head_dim) { return padded_dim(head_dim) + 48; }

// One instruction level.
struct Kernels {
    // Rounds one row of activations into its place; row: of the first part, which its other part follows.
    void (*round_row)(const Weight& weight, const void* x, int32_t element, const Activations& out, int64_t row);
    // out[num][32] = one block times the rows of one tile, num <= MAX_TILE
    void (*tile)(const Weight& weight, const Tile& x, int64_t block, int num, float* out);
    // Adds the bias, joins the halves of a gated block, and writes up to 32 outputs of one activation row.
    void (*store)(const float* values, const float* bias, bool is_gated, int64_t n, int32_t element, void* out);
    uint64_t (*read)(const uint8_t* data, int64_t num_bytes);  // the streaming-read probe
    // Brings the queries into the form that attend_range reads.
    void (*pack_queries)(const Queries& queries, const Places& places, const Workspace& work);
    // Attention to the keys [begin, end), at most RANGE_KEYS of them, by the queries that see any.
    void (*attend_range)(const Queries& queries, const Places& places, int64_t begin, int64_t end,
                         const Workspace& work, const State& state);
    // Joins the queries [first, end) with what they have already.
    void (*merge)(const State& whole, const State& part, int64_t first, int64_t end, int64_t head_dim);
    void (*finish)(const Queries& queries, const State& whole, int64_t head_dim);
    // hidden += added (may be null), out = hidden / rms(hidden) * weight
    void (*norm_row)(float* hidden, const float* added, const float* weight, int64_t size, float eps, float* out);
    // Turns the pairs (i, i + size / 2) of x by their angles; stores them as element.
    void (*rotate_head)(const float* x, const float* cos, const float* sin, int64_t size, int32_t element, void* out,
                        float* scale);
    // Stores a key or value as element; scale: of int8.
    void (*store_head)(const float* x, int64_t size, int32_t element, void* out, float* scale);
    void (*load_head)(const void* x, int32_t element, int64_t size, float* out);
};

const Kernels& current_kernels();

// One decoder layer with packed weights, and all of them. Mirrored in library.py.
struct Layer {
    const float* attention_norm;
    const float* ffn_norm;
    const Weight* wqkv;
    const Weight* wo;
    const Weight* w13;
    const Weight* w2;
};

struct Decoder {
    const Layer* layers;
    const float* norm;
    int64_t num_layers, hidden_size, num_heads;
    int32_t element;  // of the queries
    float eps, scale;
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif
