// A block of keys for few queries of every head: memory is read token by token, all heads of a token together, as it
// lies. Keys and values come as two long streams that the processor's own prefetcher follows.
#pragma once
#include "attention_scores.h"
#include "attention_softmax.h"

namespace {

// The slots of some keys that follow each other.
struct Block {
    int64_t slots[BLOCK_KEYS];
    int64_t count;
};

constexpr int64_t FEW_QUERIES = 8;      // of a head: for so few, packing keys and values costs more than it saves
constexpr int64_t BYTES_AHEAD = 8192;   // of the group that comes next

// Asks the memory for what comes: the keys of a block, its values, the keys of the next one, line by line and never far
// ahead. NOTE: into the second cache. What is asked into the first one occupies its 24 or so buffers for misses until
// the memory answers, and those are too few to read at the full rate.
struct Scout {
    const Places& places;
    const Block* block;  // null: nothing is left
    const Block* next;   // the block after it, or null
    int64_t token_bytes;  // that are wanted
    int64_t most;         // tokens that it may be ahead
    int64_t token, byte = 0, ahead = 0;
    bool is_at_values = false;

    // N lines that follow each other.
    template <int N>
    [[gnu::always_inline]] inline void ask() {
        if (block == nullptr || ahead >= most) return;
        const uint8_t* line = (is_at_values ? places.values : places.keys) + block->slots[token] * places.slot_bytes + byte;
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
        byte += 64 * N;
        if (byte >= token_bytes) next_token();
    }

    void ask(int64_t lines) {
        for (int64_t i = 0; i < lines; ++i) ask<1>();
    }

    void next_token() {
        byte = 0;
        ++ahead;
        if (places.element == ELEMENT_INT8) {
            const float* scales = is_at_values ? places.value_scales : places.key_scales;
            __builtin_prefetch(scales + block->slots[token] * places.slot_scales, 0, 2);
        }
        if (++token < block->count) return;
        token = 0;
        if (is_at_values) {
            block = next;
            next = nullptr;
        }
        is_at_values = !is_at_values;
    }
};

// Some keys or values of a block, in the form that the Path reads in place: rows of one head, `offset` bytes behind the
// first one's. Without a copy where they are stored so.
template <class Path>
struct Group {
    const uint8_t* rows[GROUP_KEYS > 16 ? GROUP_KEYS : 16];
    const uint8_t* copies[GROUP_KEYS > 16 ? GROUP_KEYS : 16];

    // Behind the last key, it is repeated.
    Group(const uint8_t* base, const Places& places, const Block& block, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t key = first + i < block.count ? first + i : block.count - 1;
            rows[i] = base + block.slots[key] * places.slot_bytes;
        }
    }

    const uint8_t* const* of_head(const Places& places, int64_t count, int64_t offset, int32_t* memory) {
        const int64_t num_words = padded_words<Path>(places.head_dim);
        for (int64_t i = 0; i < count; ++i) {
            if (Path::is_stored_so(places.element)) {
                copies[i] = rows[i] + offset;
            } else {
                Path::load(rows[i] + offset, places.element, places.head_dim, memory + i * num_words);
                copies[i] = reinterpret_cast<const uint8_t*>(memory + i * num_words);
            }
        }
        return copies;
    }
};

template <class Path>
void stream_scores(const int32_t* queries, int64_t num_queries, const uint8_t* const* rows, int64_t head_dim,
                   int32_t* out, Scout& scout) {
    const int64_t num_words = padded_words<Path>(head_dim), stride = query_words<Path>(head_dim);
    const auto step = [&] { scout.ask<4>(); };
    while (num_queries > 0) {
        const int64_t done = num_queries >= 4 ? 4 : num_queries >= 2 ? 2 : 1;
        if (done == 4) {
            score_in_place<Path, 4>(queries, stride, rows, 0, num_words, out, step);
        } else if (done == 2) {
            score_in_place<Path, 2>(queries, stride, rows, 0, num_words, out, step);
        } else {
            score_in_place<Path, 1>(queries, stride, rows, 0, num_words, out, step);
        }
        num_queries -= done;
        queries += done * stride;
        out += done * BLOCK_KEYS;
    }
}

// Sums of M queries over some values, from column d on, N registers of them.
template <class Path, int M, int N>
inline void stream_columns(const int32_t* weights, const uint8_t* const* rows, int64_t count, int64_t d,
                           int64_t head_dim, float* out, Scout& scout) {
    Vector sums[Path::PARTS][M][N];
#pragma GCC unroll 2
    for (int part = 0; part < Path::PARTS; ++part) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                sums[part][m][n] = Path::IS_WHOLE ? Vector{} : load_vector(out + m * head_dim + d + n * LANES);
            }
        }
    }
    for (int64_t word = 0; word * Path::PER_WORD < count; ++word) {
        Vector values[N];
        Path::template load_values<N>(rows, word * Path::PER_WORD, count, d, values);
        scout.ask<N>();
#pragma GCC unroll 2
        for (int part = 0; part < Path::PARTS; ++part) {
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const int32_t weight = weights[m * BLOCK_KEYS + part * WEIGHT_WORDS<Path> + word];
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    sums[part][m][n] = Path::add_products(sums[part][m][n], values[n], weight);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            float* target = out + m * head_dim + d + n * LANES;
            Vector sum = sums[0][m][n];
#pragma GCC unroll 2
            for (int part = 1; part < Path::PARTS; ++part) {
                sum = Path::add(Path::next_weight_part(sum), sums[part][m][n]);
            }
            store_vector(target, Path::IS_WHOLE ? Path::add(load_vector(target), sum) : sum);
        }
    }
}

template <class Path, int M>
void stream_values_of(const int32_t* weights, const uint8_t* const* rows, int64_t count, int64_t head_dim, float* out,
                      Scout& scout) {
    int64_t d = 0;
    for (; d + COLUMNS * LANES <= head_dim; d += COLUMNS * LANES) {
        stream_columns<Path, M, COLUMNS>(weights, rows, count, d, head_dim, out, scout);
    }
    for (; d < head_dim; d += Path::PER_WORD * LANES) {
        stream_columns<Path, M, int(Path::PER_WORD)>(weights, rows, count, d, head_dim, out, scout);
    }
}

// out: as stream_block keeps it between groups.
template <class Path>
void stream_values(const int32_t* weights, int64_t num_queries, const uint8_t* const* rows, int64_t count,
                   int64_t head_dim, float* out, Scout& scout) {
    constexpr int AT_ONCE = ROWS / Path::PARTS;
    while (num_queries > 0) {
        const int64_t done = num_queries >= AT_ONCE ? AT_ONCE : num_queries >= 2 ? 2 : 1;
        const auto add = done == AT_ONCE ? stream_values_of<Path, AT_ONCE>
                         : done == 2     ? stream_values_of<Path, 2>
                                         : stream_values_of<Path, 1>;
        add(weights, rows, count, head_dim, out, scout);
        num_queries -= done;
        weights += done * BLOCK_KEYS;
        out += done * head_dim;
    }
}

// What the sums of all queries are between groups of a block: themselves, or whole numbers that join them in the end.
template <class Path>
float* begin_sums(const State& state, const Workspace& work, int64_t num_queries, int64_t head_dim) {
    if (Path::IS_WHOLE) {
        std::memset(work.sums, 0, size_t(num_queries * head_dim) * 4);
        return work.sums;
    }
    float* sum = state.sum;
    for (int64_t i = 0; i < num_queries; ++i) {
        for (int64_t d = 0; d < head_dim; d += LANES, sum += LANES) store_vector(sum, Path::begin(sum, work.factors[i]));
    }
    return state.sum;
}

// One block of which every query sees all keys, for all heads. head_dim: whole registers.
template <class Path>
void stream_block(const Queries& queries, const Places& places, const Block& block, const Workspace& work,
                  const State& state, Scout& scout) {
    constexpr int64_t AT_ONCE = 16;  // values: as many rows as a group of keys has with the widest registers
    const int64_t heads = queries.num_heads, count = queries.num_rows * queries.group, head_dim = places.head_dim;
    const int64_t words = query_words<Path>(head_dim), head_bytes = bytes_of(places.element, head_dim);
    for (int64_t first = 0; first < block.count; first += GROUP_KEYS) {
        Group<Path> group(places.keys, places, block, first, GROUP_KEYS);
        for (int64_t head = 0; head < heads; ++head) {
            stream_scores<Path>(work.queries + head * count * words, count,
                                group.of_head(places, GROUP_KEYS, head * head_bytes, work.rows), head_dim,
                                work.scores + head * count * BLOCK_KEYS + first, scout);
        }
        scout.ahead -= GROUP_KEYS;
    }
    for (int64_t head = 0, i = 0; head < heads; ++head) {
        Scales scales;
        find_scales(queries.scale, places, block.slots, block.count, head, scales);
        for (int64_t end = i + count; i < end; ++i) {
            soften<Path>(work.scores + i * BLOCK_KEYS, work.queries + (i + 1) * words - Path::QUERY_EXTRA, block.count,
                         scales, state.most + i, state.total + i, work.factors + i, work.weight_scales + i);
        }
    }
    float* sums = begin_sums<Path>(state, work, heads * count, head_dim);
    for (int64_t first = 0; first < block.count; first += AT_ONCE) {
        const int64_t num = block.count - first < AT_ONCE ? block.count - first : AT_ONCE;
        Group<Path> group(places.values, places, block, first, num);
        for (int64_t head = 0; head < heads; ++head) {
            stream_values<Path>(work.scores + head * count * BLOCK_KEYS + first / Path::PER_WORD, count,
                                group.of_head(places, num, head * head_bytes, work.rows), num, head_dim,
                                sums + head * count * head_dim, scout);
        }
        scout.ahead -= AT_ONCE;
    }
    for (int64_t i = 0; i < heads * count; ++i) {
        Path::end_stream(sums + i * head_dim, state.sum + i * head_dim, head_dim, work.factors[i],
                         work.weight_scales[i]);
    }
}

}  // namespace
