// Attention of some queries to a range of keys that lie in pages, 64 keys at a time; the softmax is kept up to date as in
// flash attention (arXiv 2205.14135). What a query gets does not depend, bit by bit, on the others: every sum runs over
// the same terms in the same order, whether the values are read where they lie (few queries) or packed first (many).
#pragma once
#include "attention_products.h"

namespace {

constexpr int64_t FEW_QUERIES = 8;  // for so few, packing values costs more than it saves

// Walks through the pieces of memory of a sequence, position by position.
struct Walker {
    const Places& places;
    int64_t run;

    Walker(const Places& all_places, int64_t position) : places(all_places) {
        int64_t low = 0, high = places.num_runs - 1;  // the last one that begins at or before the position
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (places.runs[2 * middle] <= position) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        run = low;
    }

    void slots(int64_t position, int64_t count, int64_t* out) {
        for (int64_t i = 0; i < count; ++i, ++position) {
            while (position >= places.runs[2 * run + 2]) ++run;
            out[i] = places.runs[2 * run + 1] + position - places.runs[2 * run];
        }
    }
};

// The slots of some keys that follow each other.
struct Block {
    int64_t slots[BLOCK_KEYS];
    int64_t count;
};

// Asks the memory for the next block while this one is computed: all heads of a token in one stream, and only a few lines
// at a time, for a core that waits for more than about twenty stands still.
struct Asker {
    const Places& places;
    const Block* block;   // null: nothing is left
    int64_t token_bytes;  // that are wanted
    int64_t key, at;

    // n lines of keys and as many of values.
    [[gnu::always_inline]] inline void ask(int n) {
        if (block == nullptr) return;
        const int64_t offset = block->slots[key] * places.slot_bytes + at;
        for (int i = 0; i < n; ++i) {
            __builtin_prefetch(places.keys + offset + 64 * i, 0, 2);
            __builtin_prefetch(places.values + offset + 64 * i, 0, 2);
        }
        at += 64 * n;
        if (at >= token_bytes) next_token();
    }

    void next_token() {
        if (places.element == ELEMENT_INT8) {
            __builtin_prefetch(places.key_scales + block->slots[key] * places.slot_scales, 0, 2);
            __builtin_prefetch(places.value_scales + block->slots[key] * places.slot_scales, 0, 2);
        }
        at = 0;
        if (++key == block->count) block = nullptr;
    }
};

// Scores of one query with GROUP_KEYS keys. C: registers of a key; 0: as `num_words` says.
template <class Path, int C>
inline Vector score_group(const int32_t* query, const int32_t* const* rows, int64_t num_words, Asker& asker) {
    Vector sums[GROUP_KEYS];
    if (C > 0) {
        Vector words[C > 0 ? C : 1];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) words[c] = load_vector(query + c * LANES);
#pragma GCC unroll 16
        for (int k = 0; k < GROUP_KEYS; ++k) {
            sums[k] = Vector{};
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[k] = Path::add_dot(sums[k], rows[k] + c * LANES, words[c]);
            if (k % 4 == 3) asker.ask(4);
        }
        return fold(sums);
    }
#pragma GCC unroll 16
    for (int k = 0; k < GROUP_KEYS; ++k) sums[k] = Vector{};
    for (int64_t word = 0; word < num_words; word += LANES) {
        const Vector words = load_vector(query + word);
#pragma GCC unroll 16
        for (int k = 0; k < GROUP_KEYS; ++k) sums[k] = Path::add_dot(sums[k], rows[k] + word, words);
    }
    return fold(sums);
}

template <class Path, int C>
void score_queries(const int32_t* queries, int64_t num_queries, const int32_t* const* rows, int64_t num_words,
                   int32_t* out, Asker& asker) {
    for (int64_t i = 0; i < num_queries; ++i, queries += num_words, out += BLOCK_KEYS) {
        store_vector(out, score_group<Path, C>(queries, rows, num_words, asker));
    }
}

// Scores of all queries with a block of keys; behind the last key, the registers repeat it.
template <class Path>
void find_scores(const Places& places, const Block& block, const int32_t* queries, int64_t num_queries,
                 const Workspace& work, int32_t* scores, Asker& asker) {
    const int64_t num_words = padded_words<Path>(places.head_dim);
    const bool is_direct =
        Path::is_stored_so(places.element) && num_words * Path::PER_WORD == places.head_dim;
    for (int64_t first = 0; first < block.count; first += GROUP_KEYS) {
        const int32_t* rows[GROUP_KEYS];
        for (int64_t i = 0; i < GROUP_KEYS; ++i) {
            const int64_t key = first + i < block.count ? first + i : block.count - 1;
            const uint8_t* source = places.keys + block.slots[key] * places.slot_bytes;
            if (is_direct) {
                rows[i] = reinterpret_cast<const int32_t*>(source);
            } else {
                int32_t* row = work.rows + i * num_words;
                if (num_words * Path::PER_WORD != places.head_dim) std::memset(row, 0, size_t(num_words) * 4);
                Path::load(source, places.element, places.head_dim, row);
                rows[i] = row;
            }
        }
        const auto score = LANES == 16 && num_words == 2 * LANES   ? score_queries<Path, 2>
                           : LANES == 16 && num_words == 4 * LANES ? score_queries<Path, 4>
                           : LANES == 16 && num_words == 8 * LANES ? score_queries<Path, 8>
                                                                   : score_queries<Path, 0>;
        score(queries, num_queries, rows, num_words, scores + first, asker);
    }
}

// Sums of M queries over the values of a block, from column d on, N registers of them; values are read where they lie.
template <class Path, int M, int N>
void add_values(const int32_t* weights, const uint8_t* const* rows, int64_t count, int32_t element, int64_t d,
                int64_t padded, const float* factors, float* out, Asker& asker) {
    Vector sums[M][N];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = load_vector(out + m * padded + d + n * LANES) * all(factors[m]);
    }
    for (int64_t word = 0; word * Path::PER_WORD < count; ++word) {
        asker.ask(2);
        Vector values[N];
        Path::template load_values<N>(rows, word * Path::PER_WORD, count, element, d, values);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                sums[m][n] = Path::add_products(sums[m][n], values[n], weights[m * BLOCK_KEYS + word]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store_vector(out + m * padded + d + n * LANES, sums[m][n]);
    }
}

template <class Path, int M>
void add_values_of(const int32_t* weights, const uint8_t* const* rows, int64_t count, int32_t element, int64_t size,
                   const float* factors, float* out, Asker& asker) {
    int64_t d = 0;
    for (; d + COLUMNS * LANES <= size; d += COLUMNS * LANES) {
        add_values<Path, M, COLUMNS>(weights, rows, count, element, d, size, factors, out, asker);
    }
    for (; d < size; d += 2 * LANES) {
        add_values<Path, M, 2>(weights, rows, count, element, d, size, factors, out, asker);
    }
}

template <class Path>
void add_values_in_place(const int32_t* weights, int64_t num_queries, const uint8_t* const* rows, int64_t count,
                         int32_t element, int64_t size, const float* factors, float* out, Asker& asker) {
    while (num_queries > 0) {
        const int64_t done = num_queries >= ROWS ? ROWS : num_queries >= 2 ? 2 : 1;
        const auto add = done == ROWS ? add_values_of<Path, ROWS>
                         : done == 2  ? add_values_of<Path, 2>
                                      : add_values_of<Path, 1>;
        add(weights, rows, count, element, size, factors, out, asker);
        num_queries -= done;
        weights += done * BLOCK_KEYS;
        factors += done;
        out += done * size;
    }
}

// What the scores of each key are multiplied with, and with int8 also the weight of each value.
struct Scales {
    float keys[BLOCK_KEYS], values[BLOCK_KEYS];
    bool has_values;
};

void find_scales(float scale, const Places& places, const Block& block, Scales& scales) {
    scales.has_values = places.element == ELEMENT_INT8;
    for (int64_t i = 0; i < BLOCK_KEYS; ++i) scales.keys[i] = scale;
    if (!scales.has_values) return;
    std::memset(scales.values, 0, sizeof scales.values);
    for (int64_t i = 0; i < block.count; ++i) {
        scales.keys[i] *= places.key_scales[block.slots[i] * places.slot_scales];
        scales.values[i] = places.value_scales[block.slots[i] * places.slot_scales];
    }
}

// The scores of one query become weights, in place; the keys from `visible` on are hidden and weigh exactly nothing.
template <class Path>
void soften(int32_t* scores, int64_t visible, const Scales& scales, float* most, float* total, float* factor) {
    constexpr int64_t COUNT = BLOCK_KEYS / LANES;
    Vector x[COUNT];
    Whole lane;
    for (int32_t i = 0; i < int32_t(LANES); ++i) lane[i] = i;
    Vector high = all(-__builtin_inff());
    for (int64_t i = 0; i < COUNT; ++i) {
        const Vector score = load_vector(scores + i * LANES) * load_vector(scales.keys + i * LANES);
        x[i] = lane + int32_t(i * LANES) < int32_t(visible) ? score : all(-__builtin_inff());
        high = larger(x[i], high);
    }
    const float before = *most, largest = largest_of(high), now = largest > before ? largest : before;
    Vector sum = {};
    for (int64_t i = 0; i < COUNT; ++i) {
        x[i] = exponentials(x[i] - all(now));
        sum += x[i];
        if (scales.has_values) {
            const Vector weight = x[i] * load_vector(scales.values + i * LANES);
            x[i] = lane + int32_t(i * LANES) < int32_t(visible) ? weight : all(0.0f);
        }
    }
    Path::store_weights(x, scores);
    *factor = exponentials(all(before - now))[0];
    *total = *total * *factor + sum_of(sum);
    *most = now;
}

bool is_finite(const int32_t* words, int64_t count, uint32_t exponents) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t high = uint32_t(words[i]) & exponents & 0xffff0000u, low = uint32_t(words[i]) & exponents & 0xffffu;
        found |= high == (exponents & 0xffff0000u) || ((exponents & 0xffffu) != 0 && low == (exponents & 0xffffu));
    }
    return !found;
}

// One block of keys and one head. state: of this head's queries, from the first one that sees a key.
template <class Path>
void attend_block(const Queries& queries, const Places& places, const Block& block, int64_t key, int64_t head,
                  const Workspace& work, const State& state, Asker& asker) {
    const int64_t num_queries = queries.num_rows * queries.group, padded = padded_dim(places.head_dim);
    const int64_t hidden_rows = key > queries.first_position ? key - queries.first_position : 0;
    const int64_t first = hidden_rows * queries.group, count = num_queries - first;
    const int64_t from = head * num_queries + first;  // in the arrays of all heads
    const int32_t* packed = work.queries + from * padded_words<Path>(places.head_dim);
    int32_t* scores = work.scores + first * BLOCK_KEYS;
    float* factors = work.factors + first;
    float* sums = state.sum + from * padded;
    find_scores<Path>(places, block, packed, count, work, scores, asker);
    Scales scales;
    find_scales(queries.scale, places, block, scales);
    const auto seen_by = [&](int64_t i) {
        const int64_t seen = queries.first_position + (first + i) / queries.group - key + 1;
        return seen < block.count ? seen : block.count;
    };
    for (int64_t i = 0; i < count; ++i) {
        soften<Path>(scores + i * BLOCK_KEYS, seen_by(i), scales, state.most + from + i, state.total + from + i,
                     factors + i);
    }
    const uint8_t* rows[BLOCK_KEYS];
    for (int64_t i = 0; i < block.count; ++i) rows[i] = places.values + block.slots[i] * places.slot_bytes;
    const bool is_diagonal = seen_by(0) < block.count;
    if (!is_diagonal && count <= FEW_QUERIES && Path::reads_values(places.element) && places.head_dim % 32 == 0) {
        return add_values_in_place<Path>(scores, count, rows, block.count, places.element, padded, factors, sums, asker);
    }
    const int64_t depth = words_of<Path>(block.count);
    Path::pack_values(rows, block.count, places.element, places.head_dim, padded, work.values);
    const uint32_t exponents = Path::PER_WORD == 1 ? 0x7f800000u : 0x7f807f80u;
    if (!is_diagonal || scales.has_values || is_finite(work.values, depth * padded, exponents)) {
        return multiply<Path>(scores, BLOCK_KEYS, count, work.values, padded, depth, factors, sums, padded);
    }
    // A value that is not finite must not reach a query that does not see it, for 0 times infinity is NaN: from the
    // last query to the first, what is hidden becomes zero.
    for (int64_t i = count - 1, shown = block.count; i >= 0; --i) {
        for (; shown > seen_by(i); --shown) Path::hide_value(work.values, shown - 1, padded);
        multiply<Path>(scores + i * BLOCK_KEYS, BLOCK_KEYS, 1, work.values, padded, depth, factors + i,
                       sums + i * padded, padded);
    }
}

template <class Path>
void attend_range_by(const Queries& queries, const Places& places, int64_t begin, int64_t end, const Workspace& work,
                     const State& state) {
    const int64_t num_queries = queries.num_rows * queries.group * queries.num_heads;
    const int64_t num_keys = queries.first_position + queries.num_rows;
    std::memset(state.sum, 0, size_t(num_queries * padded_dim(places.head_dim)) * 4);
    for (int64_t i = 0; i < num_queries; ++i) {
        state.most[i] = -__builtin_inff();
        state.total[i] = 0.0f;
    }
    const auto size_at = [&](int64_t key) { return num_keys - key < BLOCK_KEYS ? num_keys - key : BLOCK_KEYS; };
    const int64_t head_bytes = bytes_of(places.element, places.head_dim);
    Walker walker(places, begin);
    Block blocks[2];
    blocks[0].count = size_at(begin);
    walker.slots(begin, blocks[0].count, blocks[0].slots);
    for (int64_t key = begin, turn = 0; key < end; key += BLOCK_KEYS, turn ^= 1) {
        Block& next = blocks[turn ^ 1];
        Asker asker{places, nullptr, head_bytes * queries.num_heads, 0, 0};
        if (key + BLOCK_KEYS < num_keys) {
            next.count = size_at(key + BLOCK_KEYS);
            walker.slots(key + BLOCK_KEYS, next.count, next.slots);
            asker.block = &next;
        }
        Places own = places;
        for (int64_t head = 0; head < queries.num_heads; ++head) {
            attend_block<Path>(queries, own, blocks[turn], key, head, work, state, asker);
            own.keys += head_bytes;
            own.values += head_bytes;
            if (places.element == ELEMENT_INT8) {
                ++own.key_scales;
                ++own.value_scales;
            }
        }
        while (asker.block != nullptr) asker.ask(4);
    }
}

template <class Path>
void pack_queries_by(const Queries& queries, const Places& places, const Workspace& work) {
    const int64_t size = places.head_dim, num_words = padded_words<Path>(size);
    int32_t* out = work.queries;
    for (int64_t head = 0; head < queries.num_heads; ++head) {
        for (int64_t i = 0; i < queries.num_rows * queries.group; ++i, out += num_words) {
            const int64_t index = head * queries.group + i % queries.group;
            const uint8_t* source = queries.q + i / queries.group * queries.row_bytes;
            std::memset(out, 0, size_t(num_words) * 4);
            Path::load(source + bytes_of(queries.element, index * size), queries.element, size, out);
        }
    }
}

// Queries [first, end).
void merge(const State& whole, const State& part, int64_t first, int64_t end, int64_t head_dim) {
    const int64_t padded = padded_dim(head_dim);
    for (int64_t i = first; i < end; ++i) {
        const float a = whole.most[i], b = part.most[i], most = a > b ? a : b;
        const float old_factor = exponentials(all(a - most))[0], new_factor = exponentials(all(b - most))[0];
        float* sum = whole.sum + i * padded;
        const float* added = part.sum + i * padded;
        for (int64_t d = 0; d < padded; d += LANES) {
            const Vector old_part = load_vector(sum + d) * all(old_factor);
            store_vector(sum + d, multiply_add(load_vector(added + d), all(new_factor), old_part));
        }
        whole.total[i] = whole.total[i] * old_factor + part.total[i] * new_factor;
        whole.most[i] = most;
    }
}

void finish(const Queries& queries, const State& whole, int64_t head_dim) {
    const int64_t num_queries = queries.num_rows * queries.group;
    for (int64_t i = 0; i < num_queries * queries.num_heads; ++i) {
        const int64_t row = i % num_queries / queries.group;
        const int64_t index = i / num_queries * queries.group + i % queries.group;
        float* sum = whole.sum + i * padded_dim(head_dim);
        const float inverse = 1.0f / whole.total[i];
        for (int64_t d = 0; d < head_dim; ++d) sum[d] *= inverse;
        uint8_t* out = queries.out + row * queries.row_bytes + bytes_of(queries.element, index * head_dim);
        store_head(sum, head_dim, queries.element, out, nullptr);
    }
}

}  // namespace
