// The functions that Python calls: out = x W^T (+ bias), the streaming-read probe, and the choice of instructions.
#include <atomic>

#include "layout.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
uint64_t enabled_states() {  // which registers the system saves: without that, the instructions must not be used
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

Level detect() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return SCALAR;
    const bool has_fma = c & bit_FMA, saves_states = c & bit_OSXSAVE;
    if (!has_fma || !saves_states || (enabled_states() & 0x6) != 0x6) return SCALAR;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return SCALAR;
    const bool has_512 = (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512VL) && (b & bit_AVX512DQ);
    const bool has_vnni = c & bit_AVX512VNNI;
    const bool has_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
    const bool saves_512 = (enabled_states() & 0xe6) == 0xe6;
    return has_512 && has_vnni && has_bf16 && saves_512 ? AVX512 : AVX2;
}

const Kernels& kernels_of(Level level) {
    return level == AVX512 ? avx512_kernels : level == AVX2 ? avx2_kernels : scalar_kernels;
}
#else
Level detect() { return SCALAR; }
const Kernels& kernels_of(Level) { return scalar_kernels; }
#endif

std::atomic<Level>& chosen() {
    static std::atomic<Level> level{detect()};
    return level;
}

struct Call {
    const Weight& weight;
    const Kernels& kernels;
    const uint8_t* x;
    uint8_t* out;
    int64_t num_rows, x_stride, out_stride;  // strides in elements
    int32_t x_element, out_element;
    int64_t blocks_per_chunk, num_blocks;
    Activations activations;
};

int64_t size_of(int32_t element) { return element == ELEMENT_F32 ? 4 : 2; }

void prepare(void* context, int64_t chunk) {
    const Call& call = *static_cast<const Call*>(context);
    const int64_t size = rows_per_chunk(call.weight.columns), end = (chunk + 1) * size;
    for (int64_t row = chunk * size; row < end && row < call.num_rows; ++row) {
        const uint8_t* x = call.x + row * call.x_stride * size_of(call.x_element);
        call.kernels.round_row(call.weight, x, call.x_element, call.activations,
                               row * call.weight.num_parts);
    }
}

void multiply(void* context, int64_t chunk) {
    const Call& call = *static_cast<const Call*>(context);
    const Weight& w = call.weight;
    const int64_t outputs = w.is_gated ? HALF_ROWS : BLOCK_ROWS;  // of one block
    const int64_t tile_rows = call.activations.tile_rows;
    alignas(64) float values[MAX_TILE * BLOCK_ROWS];
    const int64_t end = (chunk + 1) * call.blocks_per_chunk;
    for (int64_t block = chunk * call.blocks_per_chunk; block < end && block < call.num_blocks; ++block) {
        const int64_t column = block * outputs;
        const int64_t count = w.rows - column < outputs ? w.rows - column : outputs;
        const float* bias = w.bias == nullptr ? nullptr : w.bias + column;
        for (int64_t first = 0; first < call.activations.num_rows; first += tile_rows) {
            const Tile tile = tile_at(call.activations, first / tile_rows);
            const auto place = [&](int64_t m) {  // of the outputs of a row of the tile
                const int64_t row = (first + m) / w.num_parts;
                return call.out + (row * call.out_stride + column) * size_of(call.out_element);
            };
            // The lines of the outputs, each in a row of its own, come while the products are formed.
            for (int64_t m = 0; m < tile.stride; m += w.num_parts) {
                __builtin_prefetch(place(m), 1);
                __builtin_prefetch(place(m) + 64, 1);
            }
            call.kernels.tile(w, tile, block, int(tile.stride), values);
            for (int64_t m = 0; m < tile.stride; m += w.num_parts) {
                float* sums = values + m * BLOCK_ROWS;
                if (w.num_parts == 2) {
                    for (int64_t i = 0; i < BLOCK_ROWS; ++i) sums[i] += sums[BLOCK_ROWS + i];
                }
                call.kernels.store(sums, bias, w.is_gated, count, call.out_element, place(m));
            }
        }
    }
}

// Handing work to another thread costs microseconds: not for what one thread reads in ten.
constexpr int64_t WORTH_SHARING_BYTES = 256 * 1024;

// Small enough that the last chunk is short, large enough that taking it costs nothing.
int64_t choose_blocks_per_chunk(const Weight& w, int64_t num_blocks, int num_threads) {
    const int64_t wanted = 64 * 1024 / block_bytes(w);
    const int64_t most = num_blocks / (4 * num_threads);
    const int64_t chosen_size = wanted < most ? wanted : most;
    return chosen_size < 1 ? 1 : chosen_size;
}

struct Probe {
    const Kernels& kernels;
    const uint8_t* data;
    int64_t num_bytes, chunk_bytes;
    std::atomic<uint64_t> sum;
};

void read_chunk(void* context, int64_t chunk) {
    auto& probe = *static_cast<Probe*>(context);
    const int64_t start = chunk * probe.chunk_bytes;
    const int64_t left = probe.num_bytes - start;
    probe.sum += probe.kernels.read(probe.data + start, left < probe.chunk_bytes ? left : probe.chunk_bytes);
}

}  // namespace

const Kernels& current_kernels() { return kernels_of(chosen().load()); }

// Which instructions this processor can run at most.
EXPORTED int32_t internlm2_detected_level() { return detect(); }

EXPORTED int32_t internlm2_level() { return chosen().load(); }

// Asks for a level; what the processor cannot run is lowered to what it can. Returns what is used now.
EXPORTED int32_t internlm2_set_level(int32_t level) {
    const Level most = detect();
    const Level wanted = level <= SCALAR ? SCALAR : level >= AVX512 ? AVX512 : AVX2;
    chosen().store(wanted < most ? wanted : most);
    return chosen().load();
}

EXPORTED int32_t internlm2_num_workers() { return num_workers(); }

// out (num_rows, weight.rows) = x (num_rows, weight.columns) times the weight. Strides in elements. Returns 0, or 1
// when there is no memory for the rounded activations.
EXPORTED int32_t internlm2_linear(const Weight* weight, const void* x, int32_t x_element, int64_t num_rows,
                                  int64_t x_stride, void* out, int32_t out_element, int64_t out_stride, int32_t num_threads) {
    thread_local Scratch scratch;  // the rounded activations
    const Weight& w = *weight;
    const int64_t stored = w.is_gated ? (w.rows + HALF_ROWS - 1) / HALF_ROWS * BLOCK_ROWS : w.rows;
    const int64_t groups = w.kind == BFLOAT16 ? 0 : w.padded_columns / w.group;
    const int64_t words = w.padded_columns / (w.kind == BFLOAT16 ? 2 : 4);
    const int64_t parts = num_rows * w.num_parts;
    auto* memory = static_cast<int32_t*>(scratch.take(size_t(parts * (words + 2 * groups)) * 4));
    if (memory == nullptr) return 1;
    auto* scale = reinterpret_cast<float*>(memory + parts * words);
    auto* shift = scale + parts * groups;
    const int64_t most = w.kind == BFLOAT16 ? MAX_TILE : MAX_INTEGER_TILE;
    const int64_t num_tiles = (parts + most - 1) / most;
    const int64_t tile_rows = num_tiles == 0 ? 1 : (num_rows + num_tiles - 1) / num_tiles * w.num_parts;
    const int64_t num_blocks = (stored + BLOCK_ROWS - 1) / BLOCK_ROWS;
    Call call{w, current_kernels(), static_cast<const uint8_t*>(x), static_cast<uint8_t*>(out), num_rows,
              x_stride, out_stride, x_element, out_element, choose_blocks_per_chunk(w, num_blocks, num_threads),
              num_blocks, {memory, scale, shift, parts, words, groups, tile_rows}};
    if (num_blocks * block_bytes(w) * num_rows < WORTH_SHARING_BYTES) num_threads = 1;
    const int64_t rows = rows_per_chunk(w.columns);
    run_chunks((num_rows + rows - 1) / rows, num_threads, prepare, &call);
    run_chunks((call.num_blocks + call.blocks_per_chunk - 1) / call.blocks_per_chunk, num_threads, multiply, &call);
    return 0;
}

// Reads num_bytes of memory once, as fast as it goes. The sum keeps the compiler from leaving the work out.
EXPORTED uint64_t internlm2_read(const void* data, int64_t num_bytes, int32_t num_threads) {
    Probe probe{current_kernels(), static_cast<const uint8_t*>(data), num_bytes, 1 << 20, {0}};
    run_chunks((num_bytes + probe.chunk_bytes - 1) / probe.chunk_bytes, num_threads, read_chunk, &probe);
    return probe.sum;
}
