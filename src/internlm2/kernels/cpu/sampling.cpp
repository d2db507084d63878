// One token for each row of logits, by the law of engine/sampling/filters.py, which is the twin: temperature, top-k,
// top-p and min-p in float64, equal logits in the order of their ids, and the inverse of the cumulative distribution at
// one uniform number, over ids without filters and over ranks with them. A row is read once or twice, and only the few
// tokens that can be kept are sorted.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "pool.h"

EXPORTED int32_t internlm2_level();

namespace {

// The relative error of a row's weight that is summed in float32: 2^-24 for each of two roundings of an exponent below
// 18, as much again for exp and the sums. Nearer than this to the edge of top-p it is summed again in float64.
constexpr double MARGIN = 1e-5;
// How far below the largest logit, in units of the temperature, tokens are looked for; then all.
constexpr double REACHES[] = {4.0, 8.0, 16.0, 32.0};
constexpr int64_t AT_ONCE = 1024;  // ids in which the largest logit is looked for
constexpr double SMALLEST = 2e-38;  // weight of a token when nothing is filtered: float32 has no less
constexpr int32_t NOT_FINITE = -1;

struct Candidate {
    float logit;
    int32_t id;
};

const SamplingKernels& kernels() {
#if defined(__x86_64__)
    const int32_t level = internlm2_level();
    return level == 2 ? avx512_sampling : level == 1 ? avx2_sampling : scalar_sampling;
#else
    return scalar_sampling;
#endif
}

// Memory of one thread for one row.
struct Workspace {
    float* sums;      // (blocks)
    int32_t* ids;     // (n)
    Candidate* kept;  // (n)
    double* weights;  // (n)
};

struct Row {
    const SamplingKernels& kernels;
    const float* x;
    int64_t n;
    float largest;
    const Wanted& wanted;
    const Workspace& work;

    double weight(float logit) const { return std::exp((double(logit) - double(largest)) / wanted.temperature); }

    // Of all ids: near enough, or exact.
    double mass(bool is_exact) const {
        double total = 0.0;
        if (is_exact) {
            for (int64_t i = 0; i < n; ++i) total += weight(x[i]);
            return total;
        }
        kernels.weigh(x, n, largest, float(wanted.temperature), work.sums);
        for (int64_t i = 0; i * BLOCK_IDS < n; ++i) total += work.sums[i];
        return total;
    }
};

// The first place where the cumulative weight exceeds the target, which is brought below the whole first; *rest: what is
// left of the target there.
template <typename Value>
int64_t invert(const Value* weights, int64_t n, double target, double* rest) {
    double whole = 0.0;
    for (int64_t i = 0; i < n; ++i) whole += weights[i];
    target = std::min(target, std::nextafter(whole, 0.0));
    double before = 0.0;
    for (int64_t i = 0;; ++i) {
        const double after = before + weights[i];
        if (after > target || i + 1 == n) {
            *rest = target - before;
            return i;
        }
        before = after;
    }
}

// Over ids: first the block, then the token within.
int32_t draw_free(const Row& row) {
    const double whole = row.mass(false);
    const int64_t num_blocks = (row.n + BLOCK_IDS - 1) / BLOCK_IDS;
    double rest = 0.0;
    const int64_t block = invert(row.work.sums, num_blocks, row.wanted.uniform * whole, &rest);
    const int64_t first = block * BLOCK_IDS, count = std::min(row.n - first, BLOCK_IDS);
    for (int64_t i = 0; i < count; ++i) {
        const double weight = row.weight(row.x[first + i]);
        row.work.weights[i] = weight < SMALLEST ? 0.0 : weight;
    }
    return int32_t(first + invert(row.work.weights, count, rest, &rest));
}

// All tokens from some logit on, the best first, and their weights: at least those that the filters can keep.
int64_t rank(const Row& row, double mass) {
    const Wanted& wanted = row.wanted;
    const double by_min_p = wanted.min_p > 0.0 ? 0.001 - std::log(wanted.min_p) : 0.0;
    int64_t count = 0;
    for (int step = 0;; ++step) {
        const bool is_last = step == int(std::size(REACHES));
        const double reach = is_last ? INFINITY : wanted.top_k || wanted.top_p < 1.0 ? REACHES[step] : by_min_p;
        const float least = float(double(row.largest) - reach * wanted.temperature);
        count = row.kernels.gather(row.x, row.n, least, row.work.ids);
        for (int64_t i = 0; i < count; ++i) row.work.kept[i] = {row.x[row.work.ids[i]], row.work.ids[i]};
        if (is_last) break;
        if (wanted.top_k) {
            if (count >= wanted.top_k) break;
        } else if (wanted.top_p < 1.0) {
            double found = 0.0;
            for (int64_t i = 0; i < count; ++i) found += row.weight(row.work.kept[i].logit);
            if (found > wanted.top_p * mass + 2.0 * MARGIN * mass) break;
        } else {
            break;
        }
    }
    // NOTE: + 0.0 makes -0.0 the same as 0.0.
    std::sort(row.work.kept, row.work.kept + count, [](const Candidate& a, const Candidate& b) {
        const float x = a.logit + 0.0f, y = b.logit + 0.0f;
        return x > y || (x == y && a.id < b.id);
    });
    for (int64_t i = 0; i < count; ++i) row.work.weights[i] = row.weight(row.work.kept[i].logit);
    return count;
}

// How many of the ranked tokens top-p keeps: those with less than the edge before them. *is_near: whether `margin`
// could change that.
int64_t keep_top_p(const double* weights, int64_t count, double edge, double margin, bool* is_near) {
    double before = 0.0;
    int64_t kept = 0;
    for (; kept < count && before < edge; ++kept) {
        *is_near |= std::fabs(before - edge) < margin;
        before += weights[kept];
    }
    *is_near |= kept < count && std::fabs(before - edge) < margin;
    return kept < 1 ? 1 : kept;
}

int32_t draw_filtered(const Row& row) {
    const Wanted& wanted = row.wanted;
    const bool needs_mass = wanted.top_p < 1.0 && wanted.top_k == 0;
    double mass = needs_mass ? row.mass(false) : 0.0;
    const double* weights = row.work.weights;
    int64_t count = rank(row, mass);
    if (wanted.top_k && wanted.top_k < count) {  // equals of the last one stay
        const float last = row.work.kept[wanted.top_k - 1].logit;
        count = std::upper_bound(row.work.kept, row.work.kept + count, last,
                                 [](float value, const Candidate& one) { return one.logit < value; }) -
                row.work.kept;
    }
    if (wanted.top_p < 1.0) {
        if (!needs_mass) {
            for (int64_t i = 0; i < count; ++i) mass += weights[i];
        }
        bool is_near = false;
        int64_t kept = keep_top_p(weights, count, wanted.top_p * mass, needs_mass ? MARGIN * mass : 0.0, &is_near);
        if (is_near) kept = keep_top_p(weights, count, wanted.top_p * row.mass(true), 0.0, &is_near);
        count = kept;
    }
    if (wanted.min_p > 0.0) {
        int64_t kept = 1;
        while (kept < count && weights[kept] >= wanted.min_p) ++kept;
        count = kept;
    }
    double whole = 0.0, rest = 0.0;
    for (int64_t i = 0; i < count; ++i) whole += weights[i];
    return row.work.kept[invert(weights, count, wanted.uniform * whole, &rest)].id;
}

struct Call {
    const float* logits;
    const int64_t* rows;
    const Wanted* wanted;
    int32_t* tokens;
    int64_t stride, n;
    bool failed;
};

bool take_workspace(int64_t n, Workspace& out) {
    thread_local Scratch scratch;
    const int64_t num_blocks = (n + BLOCK_IDS - 1) / BLOCK_IDS;
    auto* memory = static_cast<char*>(scratch.take(size_t(n) * (8 + 8 + 4) + size_t(num_blocks) * 4));
    if (memory == nullptr) return false;
    out.weights = reinterpret_cast<double*>(memory);
    out.kept = reinterpret_cast<Candidate*>(out.weights + n);
    out.ids = reinterpret_cast<int32_t*>(out.kept + n);
    out.sums = reinterpret_cast<float*>(out.ids + n);
    return true;
}

int32_t choose(const Row& row) {
    if (!std::isfinite(row.largest)) return NOT_FINITE;
    if (row.wanted.temperature == 0.0) {
        for (int64_t first = 0;; first += AT_ONCE) {
            const int64_t count = std::min(row.n - first, AT_ONCE);
            if (row.kernels.gather(row.x + first, count, row.largest, row.work.ids) > 0) {
                return int32_t(first) + row.work.ids[0];
            }
        }
    }
    const bool is_free = row.wanted.top_k == 0 && row.wanted.top_p >= 1.0 && row.wanted.min_p <= 0.0;
    return is_free ? draw_free(row) : draw_filtered(row);
}

void choose_row(void* context, int64_t index) {
    Call& call = *static_cast<Call*>(context);
    Workspace work;
    if (!take_workspace(call.n, work)) {
        call.failed = true;
        return;
    }
    const float* x = call.logits + call.rows[index] * call.stride;
    const SamplingKernels& chosen = kernels();
    call.tokens[index] = choose({chosen, x, call.n, chosen.largest(x, call.n), call.wanted[index], work});
}

}  // namespace

// tokens[i]: for row rows[i] of the logits, stride apart, of which the first n count; -1: the largest is not finite.
// Returns 0, or 1 when there is no memory.
EXPORTED int32_t internlm2_sample(const float* logits, int64_t stride, int64_t n, const int64_t* rows, int64_t num_rows,
                                  const Wanted* wanted, int32_t* tokens, int32_t num_threads) {
    Call call{logits, rows, wanted, tokens, stride, n, false};
    run_chunks(num_rows, num_threads, choose_row, &call);
    return call.failed;
}
