// Attention of some queries to a range of keys that lie in pages, 64 keys at a time; the softmax is kept up to date as in
// flash attention (arXiv 2205.14135). What a query gets does not depend, bit by bit, on the others: every sum runs over
// the same terms in the same order, whether keys and values are read where they lie (few queries: attention_stream.h) or
// packed first (many: here).
#pragma once
#include "attention_stream.h"

namespace {

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

// Packs the keys of a block; behind the last one, whole registers repeat it. offset: of the head, in bytes.
template <class Path>
void pack_keys(const Places& places, const Block& block, int64_t offset, const Workspace& work) {
    const int64_t num_words = padded_words<Path>(places.head_dim);
    const bool is_direct = Path::is_stored_so(places.element) && num_words * Path::PER_WORD == places.head_dim;
    const int64_t count = (block.count + GROUP_KEYS - 1) / GROUP_KEYS * GROUP_KEYS;
    if (!is_direct) std::memset(work.rows, 0, size_t(num_words) * 4);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t key = i < block.count ? i : block.count - 1;
        const uint8_t* source = places.keys + block.slots[key] * places.slot_bytes + offset;
        if (!is_direct) Path::load(source, places.element, places.head_dim, work.rows);
        pack_key<Path>(is_direct ? reinterpret_cast<const int32_t*>(source) : work.rows, num_words, i, work.keys);
    }
}

bool is_finite(const int32_t* words, int64_t count, uint32_t exponents) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t high = uint32_t(words[i]) & exponents & 0xffff0000u, low = uint32_t(words[i]) & exponents & 0xffffu;
        found |= high == (exponents & 0xffff0000u) || ((exponents & 0xffffu) != 0 && low == (exponents & 0xffffu));
    }
    return !found;
}

// How many keys of a block query i of a head sees; the block begins at position `key`.
inline int64_t seen_by(const Queries& queries, int64_t i, int64_t key, int64_t count) {
    const int64_t seen = queries.first_position + i / queries.group - key + 1;
    return seen < count ? seen : count;
}

// Weights of the queries [first, end) of a head, in work.scores.
template <class Path>
void find_weights(const Queries& queries, const Places& places, const Block& block, int64_t key, int64_t head,
                  int64_t first, int64_t end, const Workspace& work, const State& state, Scout& scout) {
    const int64_t num_words = padded_words<Path>(places.head_dim), stride = query_words<Path>(places.head_dim);
    const int64_t of_head = head * queries.num_rows * queries.group;
    const int64_t lines = 1 + 2 * block.count * (scout.token_bytes / 64 + 1) * ROWS / ((end - first) * queries.num_heads);
    Scales scales;
    find_scales(queries.scale, places, block.slots, block.count, head, scales);
    for (int64_t i = first; i < end;) {
        const int64_t done = end - i >= ROWS ? ROWS : end - i >= 2 ? 2 : 1;
        const auto score = done == ROWS ? score_packed<Path, ROWS>
                           : done == 2  ? score_packed<Path, 2>
                                        : score_packed<Path, 1>;
        const int32_t* packed = work.queries + (of_head + i) * stride;
        score(packed, stride, work.keys, num_words, block.count, work.scores + i * BLOCK_KEYS);
        for (const int64_t next = i + done; i < next; ++i) {
            packed += stride;
            soften<Path>(work.scores + i * BLOCK_KEYS, packed - Path::QUERY_EXTRA,
                         seen_by(queries, i, key, block.count), scales, state.most + of_head + i,
                         state.total + of_head + i, work.factors + i, work.weight_scales + i);
        }
        scout.ask(lines);
    }
}

// One block of keys and one head, packed.
template <class Path>
void attend_block(const Queries& queries, const Places& places, const Block& block, int64_t key, int64_t head,
                  const Workspace& work, const State& state, Scout& scout) {
    const int64_t num_queries = queries.num_rows * queries.group, padded = padded_dim(places.head_dim);
    const int64_t hidden_rows = key > queries.first_position ? key - queries.first_position : 0;
    const int64_t first = hidden_rows * queries.group, offset = head * bytes_of(places.element, places.head_dim);
    pack_keys<Path>(places, block, offset, work);
    find_weights<Path>(queries, places, block, key, head, first, num_queries, work, state, scout);
    const uint8_t* rows[BLOCK_KEYS];
    for (int64_t i = 0; i < block.count; ++i) rows[i] = places.values + block.slots[i] * places.slot_bytes + offset;
    const int64_t depth = words_of<Path>(block.count);
    Path::pack_values(rows, block.count, places.element, places.head_dim, padded, work.values);
    Weights weights{work.scores, work.factors, work.weight_scales};
    weights.skip(first);
    float* sums = state.sum + (head * num_queries + first) * padded;
    const bool is_diagonal = seen_by(queries, first, key, block.count) < block.count;
    if (!is_diagonal || places.element == ELEMENT_INT8 || is_finite(work.values, depth * padded, Path::EXPONENTS)) {
        return multiply<Path>(weights, num_queries - first, work.values, padded, depth, sums);
    }
    // A value that is not finite must not reach a query that does not see it, for 0 times infinity is NaN: from the
    // last query to the first, what is hidden becomes zero.
    for (int64_t i = num_queries - 1, shown = block.count; i >= first; --i) {
        for (; shown > seen_by(queries, i, key, block.count); --shown) Path::hide_value(work.values, shown - 1, padded);
        Weights own{work.scores, work.factors, work.weight_scales};
        own.skip(i);
        multiply<Path>(own, 1, work.values, padded, depth, sums + (i - first) * padded);
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
    const bool is_few = queries.num_rows * queries.group <= FEW_QUERIES && Path::streams(places.head_dim);
    const int64_t token_bytes = bytes_of(places.element, places.head_dim) * queries.num_heads;
    const auto size_at = [&](int64_t key) { return num_keys - key < BLOCK_KEYS ? num_keys - key : BLOCK_KEYS; };
    Walker walker(places, begin);
    Block blocks[2];
    blocks[0].count = size_at(begin);
    walker.slots(begin, blocks[0].count, blocks[0].slots);
    for (int64_t key = begin, turn = 0; key < end; key += BLOCK_KEYS, turn ^= 1) {
        Block& next = blocks[turn ^ 1];
        const bool has_next = key + BLOCK_KEYS < num_keys;
        if (has_next) {
            next.count = size_at(key + BLOCK_KEYS);
            walker.slots(key + BLOCK_KEYS, next.count, next.slots);
        }
        const Block& block = blocks[turn];
        if (is_few && seen_by(queries, 0, key, block.count) == block.count) {
            const int64_t most = 32 + BYTES_AHEAD / token_bytes;
            Scout scout{places, &block, has_next ? &next : nullptr, token_bytes, most, 0};
            scout.token = block.count > 16 ? 16 : 0;
            scout.ahead = scout.token;
            stream_block<Path>(queries, places, block, work, state, scout);
            continue;
        }
        Scout scout{places, has_next ? &next : nullptr, nullptr, token_bytes, 2 * BLOCK_KEYS, 0};
        for (int64_t head = 0; head < queries.num_heads; ++head) {
            attend_block<Path>(queries, places, block, key, head, work, state, scout);
        }
    }
}

template <class Path>
void pack_queries_by(const Queries& queries, const Places& places, const Workspace& work) {
    const int64_t size = places.head_dim, num_words = padded_words<Path>(size), total = query_words<Path>(size);
    int32_t* out = work.queries;
    for (int64_t head = 0; head < queries.num_heads; ++head) {
        for (int64_t i = 0; i < queries.num_rows * queries.group; ++i, out += total) {
            const int64_t index = head * queries.group + i % queries.group;
            const uint8_t* source = queries.q + i / queries.group * queries.row_bytes;
            std::memset(out, 0, size_t(total) * 4);
            Path::load_query(source + bytes_of(queries.element, index * size), queries.element, size, num_words, out);
        }
    }
}

// Queries [first, end).
void merge(const State& whole, const State& part, int64_t first, int64_t end, int64_t head_dim) {
    const int64_t padded = padded_dim(head_dim);
    for (int64_t i = first; i < end; ++i) {
        const float a = whole.most[i], b = part.most[i], most = a > b ? a : b;
        const Vector old_factor = powers_of_two(all(a - most)), new_factor = powers_of_two(all(b - most));
        float* sum = whole.sum + i * padded;
        const float* added = part.sum + i * padded;
        for (int64_t d = 0; d < padded; d += LANES) {
            const Vector old_part = load_vector(sum + d) * old_factor;
            store_vector(sum + d, multiply_add(load_vector(added + d), new_factor, old_part));
        }
        whole.total[i] = whole.total[i] * old_factor[0] + part.total[i] * new_factor[0];
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
