// The layers of a model with packed weights in one call: a small model feels every call from Python. Between the
// products everything is float32 but queries, which are as the model's weights; keys and values as the pages have them.
#include "layout.h"
#include "pool.h"

EXPORTED int32_t internlm2_linear(const Weight* weight, const void* x, int32_t x_element, int64_t num_rows,
                                  int64_t x_stride, void* out, int32_t out_element, int64_t out_stride,
                                  int32_t num_threads);
EXPORTED int32_t internlm2_attend(const Pages* pages, int64_t layer, const int64_t* spans, int64_t num_spans,
                                  const int64_t* runs, const void* q, void* out, int32_t element, int64_t num_heads,
                                  float scale, int32_t num_threads);

namespace {

constexpr int64_t ROWS_PER_CHUNK = 8;  // of keys and values that are only written

int64_t element_bytes(int32_t element) { return element == ELEMENT_F32 ? 4 : element == ELEMENT_BF16 ? 2 : 1; }

// Where a key or value and its scale lie.
struct Slot {
    void* keys;
    void* values;
    float* key_scale;
    float* value_scale;
};

Slot slot_at(const Pages& pages, int64_t layer, int64_t slot, int64_t head) {
    const int64_t index = (layer * pages.num_slots + slot) * pages.num_kv_heads + head;
    const int64_t offset = index * pages.head_dim * element_bytes(pages.element);
    const bool has_scales = pages.element == ELEMENT_INT8;
    return {pages.keys + offset, pages.values + offset, has_scales ? pages.key_scales + index : nullptr,
            has_scales ? pages.value_scales + index : nullptr};
}

// The rows of one step, and what lies between the products of a layer.
struct Step {
    const Kernels& kernels;
    const Decoder& decoder;
    const Pages& pages;
    const int64_t* slots;
    const float* cos;
    const float* sin;
    float* hidden;
    const float* added;  // to `hidden` before the next norm; null: nothing
    const float* norm;   // the weight of the next norm
    float* normed;
    const float* qkv;
    uint8_t* queries;
    int64_t num_rows, layer, rows_per_chunk;
};

void norm_rows(void* context, int64_t chunk) {
    const Step& step = *static_cast<const Step*>(context);
    const int64_t size = step.decoder.hidden_size, end = (chunk + 1) * step.rows_per_chunk;
    for (int64_t row = chunk * step.rows_per_chunk; row < end && row < step.num_rows; ++row) {
        const float* added = step.added == nullptr ? nullptr : step.added + row * size;
        step.kernels.norm_row(step.hidden + row * size, added, step.norm, size, step.decoder.eps,
                              step.normed + row * size);
    }
}

// Turns queries and keys, and puts keys and values into their pages.
void rotate_rows(void* context, int64_t chunk) {
    const Step& step = *static_cast<const Step*>(context);
    const Pages& pages = step.pages;
    const int64_t dim = pages.head_dim, group = step.decoder.num_heads / pages.num_kv_heads;
    const int64_t end = (chunk + 1) * step.rows_per_chunk;
    for (int64_t row = chunk * step.rows_per_chunk; row < end && row < step.num_rows; ++row) {
        const float* cos = step.cos + row * dim;
        const float* sin = step.sin + row * dim;
        for (int64_t head = 0; head < pages.num_kv_heads; ++head) {
            const float* x = step.qkv + (row * pages.num_kv_heads + head) * (group + 2) * dim;
            const int64_t first = row * step.decoder.num_heads + head * group;
            for (int64_t g = 0; g < group; ++g) {
                step.kernels.rotate_head(x + g * dim, cos, sin, dim, step.decoder.element,
                                         step.queries + (first + g) * dim * element_bytes(step.decoder.element),
                                         nullptr);
            }
            const Slot slot = slot_at(pages, step.layer, step.slots[row], head);
            step.kernels.rotate_head(x + group * dim, cos, sin, dim, pages.element, slot.keys, slot.key_scale);
            step.kernels.store_head(x + (group + 1) * dim, dim, pages.element, slot.values, slot.value_scale);
        }
    }
}

void by_rows(Step& step, Work work, int32_t num_threads) {
    run_chunks((step.num_rows + step.rows_per_chunk - 1) / step.rows_per_chunk, num_threads, work, &step);
}

void norm(Step& step, const float* added, const float* weight, int32_t num_threads) {
    step.added = added;
    step.norm = weight;
    by_rows(step, norm_rows, num_threads);
}

// Floats between the products of a layer, each part on a cache line of its own.
struct Rows {
    float *normed, *qkv, *queries, *attended, *product, *gated;
};

bool take_rows(const Decoder& decoder, const Pages& pages, int64_t num_rows, Rows& out) {
    thread_local Scratch scratch;
    int64_t qkv = 0, gated = 0;
    for (int64_t layer = 0; layer < decoder.num_layers; ++layer) {
        const Layer& parts = decoder.layers[layer];
        qkv = parts.wqkv->rows > qkv ? parts.wqkv->rows : qkv;
        gated = parts.w13->rows > gated ? parts.w13->rows : gated;
    }
    const int64_t heads = decoder.num_heads * pages.head_dim, size = decoder.hidden_size;
    const int64_t sizes[] = {size, qkv, heads, heads, size, gated};
    int64_t total = 0;
    for (const int64_t width : sizes) total += (width * num_rows + 15) / 16 * 16;
    auto* memory = static_cast<float*>(scratch.take(size_t(total) * 4));
    if (memory == nullptr) return false;
    float** parts[] = {&out.normed, &out.qkv, &out.queries, &out.attended, &out.product, &out.gated};
    for (int i = 0; i < 6; ++i) {
        *parts[i] = memory;
        memory += (sizes[i] * num_rows + 15) / 16 * 16;
    }
    return true;
}

int32_t multiply(const Weight* weight, const void* x, int32_t element, float* out, int64_t num_rows,
                 int32_t num_threads) {
    return internlm2_linear(weight, x, element, num_rows, weight->columns, out, ELEMENT_F32, weight->rows, num_threads);
}

struct WriteCall {
    const Kernels& kernels;
    const Pages& pages;
    const int64_t* slots;
    const uint8_t* k;
    const uint8_t* v;
    int64_t layer, num_rows;
    int64_t k_row, k_head, v_row, v_head;  // bytes
    int32_t element;
};

constexpr int64_t LONGEST_HEAD = 1024;

void write_rows(void* context, int64_t chunk) {
    const WriteCall& call = *static_cast<const WriteCall*>(context);
    float values[LONGEST_HEAD];
    const int64_t end = (chunk + 1) * ROWS_PER_CHUNK, dim = call.pages.head_dim;
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end && row < call.num_rows; ++row) {
        for (int64_t head = 0; head < call.pages.num_kv_heads; ++head) {
            const Slot slot = slot_at(call.pages, call.layer, call.slots[row], head);
            call.kernels.load_head(call.k + row * call.k_row + head * call.k_head, call.element, dim, values);
            call.kernels.store_head(values, dim, call.pages.element, slot.keys, slot.key_scale);
            call.kernels.load_head(call.v + row * call.v_row + head * call.v_head, call.element, dim, values);
            call.kernels.store_head(values, dim, call.pages.element, slot.values, slot.value_scale);
        }
    }
}

}  // namespace

// Puts keys and values (rows, K, D) into their slots. Strides in bytes; the last dimension is contiguous.
EXPORTED void internlm2_write(const Pages* pages, int64_t layer, const int64_t* slots, int64_t num_rows, const void* k,
                              const void* v, int32_t element, int64_t k_row, int64_t k_head, int64_t v_row,
                              int64_t v_head, int32_t num_threads) {
    WriteCall call{current_kernels(), *pages, slots, static_cast<const uint8_t*>(k), static_cast<const uint8_t*>(v),
                   layer, num_rows, k_row, k_head, v_row, v_head, element};
    run_chunks((num_rows + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK, num_rows < 4 * ROWS_PER_CHUNK ? 1 : num_threads,
               write_rows, &call);
}

// All layers and the last norm. hidden: (rows, C) embeddings, overwritten; out: (rows, C); cos and sin: (rows, D); all
// float32. Returns 0, or 1 when there is no memory.
EXPORTED int32_t internlm2_decode(const Decoder* decoder, const Pages* pages, const int64_t* spans, int64_t num_spans,
                                  const int64_t* runs, const int64_t* slots, const float* cos, const float* sin,
                                  float* hidden, float* out, int64_t num_rows, int32_t num_threads) {
    Rows rows;
    if (!take_rows(*decoder, *pages, num_rows, rows)) return 1;
    Step step{current_kernels(), *decoder, *pages, slots, cos, sin, hidden, nullptr, nullptr, rows.normed, rows.qkv,
              reinterpret_cast<uint8_t*>(rows.queries), num_rows, 0, rows_per_chunk(decoder->hidden_size)};
    const float* added = nullptr;
    for (; step.layer < decoder->num_layers; ++step.layer) {
        const Layer& layer = decoder->layers[step.layer];
        norm(step, added, layer.attention_norm, num_threads);
        if (multiply(layer.wqkv, rows.normed, ELEMENT_F32, rows.qkv, num_rows, num_threads)) return 1;
        by_rows(step, rotate_rows, num_threads);
        if (internlm2_attend(pages, step.layer, spans, num_spans, runs, rows.queries, rows.attended, decoder->element,
                             decoder->num_heads, decoder->scale, num_threads)) {
            return 1;
        }
        if (multiply(layer.wo, rows.attended, decoder->element, rows.product, num_rows, num_threads)) return 1;
        norm(step, rows.product, layer.ffn_norm, num_threads);
        if (multiply(layer.w13, rows.normed, ELEMENT_F32, rows.gated, num_rows, num_threads)) return 1;
        if (multiply(layer.w2, rows.gated, ELEMENT_F32, rows.product, num_rows, num_threads)) return 1;
        added = rows.product;
    }
    step.normed = out;
    norm(step, added, decoder->norm, num_threads);
    return 0;
}
