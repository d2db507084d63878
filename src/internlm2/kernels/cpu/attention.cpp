// Grouped-query attention over pages, of a whole batch in one call: decode rows of many sequences, rows of prompts, and
// both together. Keys and values are read where they lie.
//
// A task is a tile of one sequence's rows with one key/value head, or with all of them. Where few tasks hold most of the work (one long
// sequence that decodes), a task is cut at the ends of ranges; the sums of ranges are joined in the same order in any
// case, so that neither the number of threads nor the rest of the batch changes a bit.
#include <atomic>
#include <new>
#include <utility>
#include <vector>

#include "layout.h"
#include "pool.h"

namespace {

struct Call {
    const Kernels& kernels;
    const Pages& pages;
    const int64_t* spans;  // (spans, 5): first row, rows, first position, first run, runs
    const int64_t* runs;   // (runs, 2): first position, slot; each sequence's end with (positions, 0)
    const uint8_t* q;
    uint8_t* out;
    int32_t element;
    int64_t layer, num_heads, tile_rows;
    float scale;
};

// Part of the work: the ranges [first, end) of a tile. parts: where each range's sums go; null: the tile is whole.
struct Task {
    Queries queries;
    Places places;
    int64_t first, end;
    float* parts;
};

// A tile that was cut: its ranges are joined at the end.
struct Cut {
    int64_t task, num_ranges;
    float* parts;
};

struct Job {
    const Kernels& kernels;
    std::vector<Task> tasks;
    std::vector<Cut> cuts;
    std::vector<std::pair<size_t, int64_t>> cut_heads;  // every cut with each of its heads
    std::atomic<bool> is_out_of_memory{false};
};

constexpr int64_t SMALLEST_PIECE = 128 * 1024;  // bytes of keys and values that are worth another thread

constexpr int64_t SMALLEST_JOIN = 32 * 1024;     // floats of sums that are worth another thread

int64_t element_bytes(int32_t element) { return element == ELEMENT_F32 ? 4 : element == ELEMENT_BF16 ? 2 : 1; }

int64_t state_floats(int64_t num_queries, int64_t head_dim) { return num_queries * (padded_dim(head_dim) + 2); }

State state_at(float* memory, int64_t num_queries, int64_t head_dim) {
    float* most = memory + num_queries * padded_dim(head_dim);
    return {memory, most, most + num_queries};
}

bool make_workspace(int64_t num_queries, int64_t num_heads, int64_t head_dim, Workspace& out) {
    thread_local Scratch scratch;
    const int64_t all = num_queries * num_heads, dim = padded_dim(head_dim), state = state_floats(all, head_dim);
    const int64_t sizes[] = {all * query_words_limit(head_dim), BLOCK_KEYS * dim, BLOCK_KEYS * dim, all * BLOCK_KEYS,
                             16 * dim, all, all, all * dim, state, state};
    constexpr int COUNT = sizeof sizes / sizeof *sizes;
    int64_t total = 0;
    for (const int64_t size : sizes) total += (size + 15) / 16 * 16;
    auto* memory = static_cast<int32_t*>(scratch.take(size_t(total) * 4));
    if (memory == nullptr) return false;
    int32_t* parts[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        parts[i] = memory;
        memory += (sizes[i] + 15) / 16 * 16;
    }
    const auto floats = [&](int i) { return reinterpret_cast<float*>(parts[i]); };
    out = {parts[0],  parts[1],  parts[2],  parts[3],
           parts[4],  floats(5), floats(6), floats(7),
           state_at(floats(8), all, head_dim), state_at(floats(9), all, head_dim)};
    return true;
}

int64_t num_keys_of(const Queries& queries) { return queries.first_position + queries.num_rows; }

int64_t num_queries_of(const Queries& queries) { return queries.num_rows * queries.group * queries.num_heads; }

// Joins a range with those before it, for the queries that see any of its keys.
void join(const Kernels& kernels, const Queries& queries, const State& whole, const State& part, int64_t range,
          int64_t head_dim) {
    const int64_t hidden = range * RANGE_KEYS - queries.first_position;
    const int64_t first = hidden > 0 ? hidden * queries.group : 0, count = queries.num_rows * queries.group;
    for (int64_t head = 0; head < queries.num_heads; ++head) {
        kernels.merge(whole, part, head * count + first, (head + 1) * count, head_dim);
    }
}

void run_task(void* context, int64_t index) {
    auto& job = *static_cast<Job*>(context);
    const Task& task = job.tasks[size_t(index)];
    const Queries& queries = task.queries;
    const int64_t num_queries = num_queries_of(queries), head_dim = task.places.head_dim;
    Workspace work;
    if (!make_workspace(queries.num_rows * queries.group, queries.num_heads, head_dim, work)) {
        job.is_out_of_memory = true;
        return;
    }
    job.kernels.pack_queries(queries, task.places, work);
    const int64_t num_keys = num_keys_of(queries);
    for (int64_t range = task.first; range < task.end; ++range) {
        const int64_t begin = range * RANGE_KEYS, next = begin + RANGE_KEYS;
        State state = range == 0 ? work.whole : work.part;
        if (task.parts != nullptr) {
            state = state_at(task.parts + range * state_floats(num_queries, head_dim), num_queries, head_dim);
        }
        job.kernels.attend_range(queries, task.places, begin, next < num_keys ? next : num_keys, work, state);
        if (task.parts == nullptr && range > 0) {
            join(job.kernels, queries, work.whole, work.part, range, head_dim);
        }
    }
    if (task.parts == nullptr) job.kernels.finish(queries, work.whole, head_dim);
}

// One head of a tile, and its part of the sums.
Queries head_of(const Queries& queries, int64_t head, int64_t head_dim) {
    Queries one = queries;
    one.num_heads = 1;
    one.out += head * queries.group * head_dim * element_bytes(queries.element);
    return one;
}

State head_of(const State& state, int64_t first, int64_t head_dim) {
    return {state.sum + first * padded_dim(head_dim), state.most + first, state.total + first};
}

// Joins the ranges of one head of a tile that was cut.
void run_cut(void* context, int64_t index) {
    const auto& job = *static_cast<Job*>(context);
    const auto [cut_index, head] = job.cut_heads[size_t(index)];
    const Cut& cut = job.cuts[cut_index];
    const Task& task = job.tasks[size_t(cut.task)];
    const int64_t num_queries = num_queries_of(task.queries), head_dim = task.places.head_dim;
    const int64_t size = state_floats(num_queries, head_dim), first = head * task.queries.num_rows * task.queries.group;
    const Queries queries = head_of(task.queries, head, head_dim);
    const auto range_state = [&](int64_t range) {
        return head_of(state_at(cut.parts + range * size, num_queries, head_dim), first, head_dim);
    };
    const State whole = range_state(0);
    for (int64_t range = 1; range < cut.num_ranges; ++range) {
        join(job.kernels, queries, whole, range_state(range), range, head_dim);
    }
    job.kernels.finish(queries, whole, head_dim);
}

Places places_of(const Call& call, const int64_t* span, int64_t head) {
    const Pages& pages = call.pages;
    const int64_t size = element_bytes(pages.element), first = call.layer * pages.num_slots * pages.num_kv_heads + head;
    const int64_t offset = first * pages.head_dim * size;
    const bool has_scales = pages.element == ELEMENT_INT8;
    return {pages.keys + offset,
            pages.values + offset,
            has_scales ? pages.key_scales + first : nullptr,
            has_scales ? pages.value_scales + first : nullptr,
            pages.num_kv_heads * pages.head_dim * size,
            pages.num_kv_heads,
            call.runs + 2 * span[3],
            span[4],
            pages.head_dim,
            pages.element};
}

Queries queries_of(const Call& call, const int64_t* span, int64_t first_row, int64_t tile_rows, int64_t head,
                   int64_t num_heads) {
    const int64_t group = call.num_heads / call.pages.num_kv_heads, size = element_bytes(call.element);
    const int64_t row_bytes = call.num_heads * call.pages.head_dim * size;
    const int64_t offset = (span[0] + first_row) * row_bytes + head * group * call.pages.head_dim * size;
    const int64_t left = span[1] - first_row;
    return {call.q + offset, call.out + offset, row_bytes, call.element, left < tile_rows ? left : tile_rows,
            group,           num_heads,         span[2] + first_row, call.scale};
}

// Bytes of keys and values that the task reads, many queries counting as more.
int64_t cost_of(const Task& task) {
    const int64_t weight = 1 + task.queries.num_rows * task.queries.group / 8;
    const int64_t token = 2 * task.queries.num_heads * task.places.head_dim * element_bytes(task.places.element);
    return num_keys_of(task.queries) * token * weight;
}

// Few rows: all heads together, so that keys are read in one stream. Many: head by head, so that what is packed serves
// many queries. Long ones first, so that no thread begins one when the others are done.
void add_tiles(const Call& call, int64_t num_spans, std::vector<Task>& out) {
    for (int64_t s = 0; s < num_spans; ++s) {
        const int64_t* span = call.spans + 5 * s;
        const bool is_few = span[1] * call.num_heads <= MAX_SHARED_QUERIES;
        const int64_t tile_rows = is_few ? span[1] : call.tile_rows;
        const int64_t heads_at_once = is_few ? call.pages.num_kv_heads : 1;
        const int64_t tiles = (span[1] + tile_rows - 1) / tile_rows;
        for (int64_t tile = tiles - 1; tile >= 0; --tile) {
            for (int64_t head = 0; head < call.pages.num_kv_heads; head += heads_at_once) {
                const Queries queries = queries_of(call, span, tile * tile_rows, tile_rows, head, heads_at_once);
                const int64_t num_ranges = (num_keys_of(queries) + RANGE_KEYS - 1) / RANGE_KEYS;
                out.push_back({queries, places_of(call, span, head), 0, num_ranges, nullptr});
            }
        }
    }
}

// Cuts tiles that hold more than their share of the work. Returns the floats that their sums need.
int64_t cut_tiles(const std::vector<Task>& tiles, int64_t share, Job& job) {
    int64_t needed = 0;
    for (const Task& tile : tiles) {
        const int64_t num_queries = num_queries_of(tile.queries);
        int64_t pieces = num_queries > MAX_SHARED_QUERIES ? 1 : (cost_of(tile) + share - 1) / share;
        if (pieces > tile.end) pieces = tile.end;
        if (pieces <= 1) {
            job.tasks.push_back(tile);
            continue;
        }
        for (int64_t head = 0; head < tile.queries.num_heads; ++head) job.cut_heads.emplace_back(job.cuts.size(), head);
        job.cuts.push_back({int64_t(job.tasks.size()), tile.end, nullptr});
        needed += tile.end * state_floats(num_queries, tile.places.head_dim);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            Task task = tile;
            task.first = piece * tile.end / pieces;
            task.end = (piece + 1) * tile.end / pieces;
            job.tasks.push_back(task);
        }
    }
    return needed;
}

void place_parts(Job& job, float* memory) {
    for (Cut& cut : job.cuts) {
        cut.parts = memory;
        const Task& first = job.tasks[size_t(cut.task)];
        memory += cut.num_ranges * state_floats(num_queries_of(first.queries), first.places.head_dim);
        for (size_t i = size_t(cut.task);; ++i) {
            job.tasks[i].parts = cut.parts;
            if (job.tasks[i].end == cut.num_ranges) break;
        }
    }
}

int32_t attend(const Call& call, int64_t num_spans, int32_t num_threads) {
    thread_local Scratch scratch;
    Job job{call.kernels, {}, {}, {}};
    std::vector<Task> tiles;
    add_tiles(call, num_spans, tiles);
    int64_t total = 0, needed = 0;
    for (const Task& tile : tiles) total += cost_of(tile);
    if (total < 2 * SMALLEST_PIECE || num_threads <= 1) {
        num_threads = 1;
        job.tasks = std::move(tiles);
    } else {
        const int64_t share = total / (4 * num_threads);
        needed = cut_tiles(tiles, share < SMALLEST_PIECE ? SMALLEST_PIECE : share, job);
        auto* memory = static_cast<float*>(scratch.take(size_t(needed + 1) * 4));
        if (memory == nullptr) return 1;
        place_parts(job, memory);
    }
    run_chunks(int64_t(job.tasks.size()), num_threads, run_task, &job);
    if (job.is_out_of_memory) return 1;
    run_chunks(int64_t(job.cut_heads.size()), needed < SMALLEST_JOIN ? 1 : num_threads, run_cut, &job);
    return 0;
}

}  // namespace

// q and out: (rows, num_heads, head_dim), contiguous, of one element. spans and runs: see Call; checked by the caller.
// Returns 0, or 1 when there is no memory.
EXPORTED int32_t internlm2_attend(const Pages* pages, int64_t layer, const int64_t* spans, int64_t num_spans,
                                  const int64_t* runs, const void* q, void* out, int32_t element, int64_t num_heads,
                                  float scale, int32_t num_threads) {
    const int64_t group = num_heads / pages->num_kv_heads;
    const int64_t tile_rows = MAX_QUERIES / group < 1 ? 1 : MAX_QUERIES / group;
    const Call call{current_kernels(), *pages, spans, runs, static_cast<const uint8_t*>(q), static_cast<uint8_t*>(out),
                    element, layer, num_heads, tile_rows < 64 ? tile_rows : 64, scale};
    try {
        return attend(call, num_spans, num_threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
